"""What a published Hugging Face `config.json` means, as `ModelArgs`.

`FAMILIES` holds what a `model_type` implies beyond the numbers in its file. Errors name the file's
own keys. Files without a `config.json`, as gpt-fast makes them, are known by their folder's name:
`presets.json` holds published configurations, and benchmarks use them, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cli import UserError, read_json
from model import LayerKind, ModelArgs

# What a file may ask for. The largest published numbers are 126 layers (Llama 3.1 405B), 128 heads,
# 512 dimensions a head, 262,144 tokens and 10,485,760 positions; what is made of a configuration
# before the weights are seen takes time and memory in proportion to the layers and the head_dim.
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_SIZE = 2**10, 2**12, 2**12, 2**24
NUMBERS = (1e-12, 1e12)  # within which no frequency overflows a float32
PRESETS = Path(__file__).with_name("presets.json")
AGAIN = "fetch the file again"

# ------------------------------------------------------------------------------------------------
# Reading a file's keys


class Keys:
    """The keys of a JSON object, each read as what it has to be; a `UserError` names it.

    An absent key and null are the same: the default, and an error where there is none.
    """

    def __init__(self, values: dict, where: str = "config.json", section: str = ""):
        self.values, self.where, self.path = values, where, section and f"{section}."

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default=None):
        value = self.values[key] if self.has(key) else default
        if value is None:
            raise UserError(f"{self.where} lacks {self.path}{key}; {AGAIN}")
        return value

    def refusal(self, key: str, what: str, advice: str = AGAIN) -> UserError:
        value = f"{self.values.get(key)!r:.60}"
        return UserError(f"{self.where}: {self.path}{key} is {value}, {what}; {advice}")

    def count(self, key: str, most: int = MAX_SIZE, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.refusal(key, f"not a count from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value, (low, high) = self.get(key, default), NUMBERS
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.refusal(key, f"not a number from {low} to {high}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.refusal(key, "not true or false")
        return value

    def choice(self, key: str, known: tuple, default: str | float) -> str | float:
        value = self.get(key, default)
        if value not in known:
            names = ", ".join(map(str, known))
            raise self.refusal(key, f"which is not supported (known: {names})", "use another model")
        return value

    def section(self, *names: str) -> Keys:
        """The first object there is under one of these names; an empty one if there is none."""
        key = next((name for name in names if self.values.get(name)), None)
        value = self.values[key] if key else {}
        if not isinstance(value, dict):
            raise self.refusal(key, "not an object")
        return Keys(value, self.where, key or "")


# ------------------------------------------------------------------------------------------------
# What each family is


def biases_by_flags(config: Keys) -> tuple[str, ...]:
    """The Linears with biases, as the flags of the file say."""
    attention = ("wqkv", "wo") if config.flag("attention_bias") else ()
    return attention + (("w1", "w2", "w3") if config.flag("mlp_bias") else ())


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` implies; the defaults are Llama's."""

    qk_norm: str = ""
    biases: Callable[[Keys], tuple[str, ...]] = biases_by_flags
    windowed: Callable[[Keys], bool] = lambda config: config.flag("use_sliding_window")


FAMILIES = {
    "llama": Family(),
    "mistral": Family(windowed=lambda config: True),
    "qwen2": Family(biases=lambda config: ("wqkv",)),
    "qwen3": Family(qk_norm="head"),
}

# ------------------------------------------------------------------------------------------------
# Rotary frequencies, in float32


def llama3_scaling(freqs: Tensor, rope: Keys) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between mixed."""
    factor, low = rope.number("factor"), rope.number("low_freq_factor")
    high = rope.number("high_freq_factor")
    if low >= high:
        raise rope.refusal("low_freq_factor", f"not below high_freq_factor, {high}")
    turns = rope.number("original_max_position_embeddings") * freqs / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / factor)


ROPES: dict[str, Callable[[Tensor, Keys], Tensor]] = {
    "default": lambda freqs, rope: freqs,
    "linear": lambda freqs, rope: freqs / rope.number("factor"),
    "llama3": llama3_scaling,
}


def rope_frequencies(config: Keys, head_dim: int) -> tuple[float, ...]:
    """Radians a position of each pair of dimensions, `head_dim / 2` float32 values."""
    rope = config.section("rope_parameters", "rope_scaling")
    for keys in (rope, config):
        keys.choice("partial_rotary_factor", (1.0,), 1.0)
    scaling = rope.choice("rope_type" if rope.has("rope_type") else "type", (*ROPES,), "default")
    base = (rope if rope.has("rope_theta") else config).number("rope_theta", 1e4)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return tuple(ROPES[scaling](1.0 / base**exponents, rope).tolist())


# ------------------------------------------------------------------------------------------------
# The whole


def head_sizes(config: Keys) -> tuple[int, int, int]:
    """The number of heads, that of KV heads, and head_dim."""
    dim, heads = config.count("hidden_size"), config.count("num_attention_heads", MAX_HEADS)
    kv_heads = config.count("num_key_value_heads", MAX_HEADS, heads)
    if heads % kv_heads:
        raise config.refusal("num_key_value_heads", f"which does not divide the {heads} heads")
    if config.has("head_dim"):
        head_dim, source = config.count("head_dim", MAX_HEAD_DIM), "head_dim"
    elif dim % heads:
        raise config.refusal("hidden_size", f"which {heads} heads do not divide (no head_dim)")
    else:
        head_dim, source = dim // heads, "hidden_size"
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        what = "an odd number" if head_dim % 2 else f"over {MAX_HEAD_DIM}"
        raise config.refusal(source, f"so a head has {head_dim} dimensions, {what}")
    return heads, kv_heads, head_dim


def from_config(config: dict) -> ModelArgs:
    """Read a published `config.json`; `UserError` on what is wrong with it or not supported."""
    keys = Keys(config)
    family = FAMILIES[keys.choice("model_type", (*FAMILIES,), None)]
    keys.choice("hidden_act", ("silu",), "silu")
    heads, kv_heads, head_dim = head_sizes(keys)
    # Attention sees the whole context, which equals a sliding window up to its length.
    length = keys.count("max_position_embeddings")
    window = keys.count("sliding_window", default=length) if family.windowed(keys) else length
    layers = keys.count("num_hidden_layers", MAX_LAYERS)
    return ModelArgs(
        dim=keys.count("hidden_size"),
        n_layer=layers,
        vocab_size=keys.count("vocab_size"),
        block_size=min(length, window),
        intermediate_size=keys.count("intermediate_size"),
        kinds=(LayerKind(heads, kv_heads, head_dim, rope=rope_frequencies(keys, head_dim)),),
        layers=(0,) * layers,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        qk_norm=family.qk_norm,
        tied=keys.flag("tie_word_embeddings"),
        biases=family.biases(keys),
    )


def read_config(folder: Path) -> ModelArgs:
    """Read `folder`/config.json or, where there is none, take the preset the name contains."""
    if (folder / "config.json").exists():
        return from_config(read_json(folder / "config.json"))
    name, presets = folder.resolve().name.lower(), read_json(PRESETS)
    fitting = [preset for preset in presets if preset in name]
    if not fitting:
        raise UserError(
            f"{folder} has no config.json and its name fits no preset; "
            f"add the config.json, or name the folder after one of: {', '.join(presets)}"
        )
    return preset(max(fitting, key=len))


def preset_names() -> list[str]:
    return [*read_json(PRESETS)]


def preset(name: str) -> ModelArgs:
    """The shape of a well-known model."""
    return from_config(read_json(PRESETS)[name])
