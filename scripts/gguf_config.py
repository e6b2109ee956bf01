"""Translates the metadata of a GGUF file into a published `config.json`.

`ARCHITECTURES` maps llama.cpp's architectures to families and tensor names. What a file leaves open
is filled in as in llama.cpp: by the constants of its `src/models/*.cpp`
(https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.gguf_reader import ReaderTensor
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import UserError
from engine import PADDED
from keys import AGAIN, Keys
from kinds import MAX_EXPERTS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS

# llama.cpp's tensor names, by the keys of convert_hf_checkpoint.HF_NAMES.
GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "layer": "blk.{}.",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
    "router": "ffn_gate_inp",
    "expert_w1": "ffn_gate_exps.{}",
    "expert_w2": "ffn_down_exps.{}",
    "expert_w3": "ffn_up_exps.{}",
    "shared_w1": "ffn_gate_shexp",
    "shared_w2": "ffn_down_shexp",
    "shared_w3": "ffn_up_shexp",
    "shared_gate": "ffn_gate_inp_shexp",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention_post_norm": "post_attention_norm",
    "ffn_post_norm": "post_ffw_norm",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: its family, and what its files leave open."""

    family: str  # its `model_type`
    other: tuple[str, str] = ("", "")  # an alternative family, and the key that identifies it
    interleaved: bool = False  # q and k are stored in Meta's rotary order
    gating: int = 1  # of the router: 1 softmax, 2 sigmoid
    fused: bool = False  # gate and up are one tensor, `ffn_up`
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    constants: dict = dataclasses.field(default_factory=dict)  # keys of the config.json


ARCHITECTURES = {
    "llama": Architecture("llama", ("mixtral", "expert_count"), interleaved=True),  # Mistral, too
    "mistral3": Architecture(
        "mistral", ("ministral3", "attention.temperature_scale"), interleaved=True
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen2moe": Architecture("qwen2_moe", constants={"norm_topk_prob": False}),
    "qwen3moe": Architecture("qwen3_moe", constants={"norm_topk_prob": True}),
    "olmoe": Architecture("olmoe", constants={"norm_topk_prob": False}),
    "olmo2": Architecture("olmo2", ("olmo3", "attention.sliding_window")),
    "gemma3": Architecture("gemma3_text"),
    "phi3": Architecture("phi3", fused=True, names={"wqkv": "attn_qkv"}),
    "granite": Architecture("granite", interleaved=True),
    "granitemoe": Architecture("granitemoe", interleaved=True),
    "smollm3": Architecture("smollm3", interleaved=True),
    "seed_oss": Architecture("seed_oss", names={"ffn_norm": "post_attention_norm"}),
    "ernie4_5": Architecture("ernie4_5", interleaved=True),
    "glm4": Architecture("glm4", interleaved=True, fused=True),
    "glm4moe": Architecture("glm4_moe", gating=2, names={"ffn_norm": "post_attention_norm"}),
    "exaone4": Architecture("exaone4"),
}

# Optional GGUF keys -> config.json keys.
NUMBERS = {
    "attention.sliding_window": "sliding_window",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
YARN = {
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",  # llama.cpp takes mscale for 1
    "attention.temperature_scale": "llama_4_scaling_beta",
}
LAST_TYPE = 6  # of tokens: a byte
# Keys that change what llama.cpp computes, and the only supported values.
UNKNOWN = {"attn_logit_softcapping": 0.0, "attention.clamp_kqv": 0.0, "attention.causal": True}

# ------------------------------------------------------------------------------------------------
# The keys


class Metadata(Keys):
    """The key-value pairs of a GGUF file; a missing or wrong one is a `UserError`."""

    def __init__(self, path: Path, reader: GGUFReader):
        values = {name: field.contents() for name, field in reader.fields.items()}
        super().__init__(values, str(path))

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, default)
        if type(value) is not str:
            raise self.refusal(key, "not a text")
        return value

    def copied(self, names: dict[str, str]) -> dict:
        """The values of these keys, under their new names; absent keys and zeros are skipped."""
        arch, found = self.text("general.architecture"), {}
        for key, name in names.items():
            value = self.values.get(f"{arch}.{key}")
            if type(value) is bool:
                found[name] = value
            elif value:
                number = self.number(f"{arch}.{key}")
                found[name] = shortest(number) if type(value) is float else value
        return found

    def items(self, key: str, kind: type, length: int | None = None) -> list:
        """A list of values of one type, of this length."""
        value = self.get(key)
        if type(value) is not list or not all(type(item) is kind for item in value):
            raise self.refusal(key, f"not a list of {kind.__name__}")
        if length not in (None, len(value)):
            raise self.refusal(key, f"which has {len(value)} items, not {length}")
        return value

    @functools.cached_property
    def tokens(self) -> list[str]:
        tokens = self.items("tokenizer.ggml.tokens", str)
        if len(set(tokens)) < len(tokens) or not tokens:
            what = "which has a token twice" if tokens else "an empty list"
            raise self.refusal("tokenizer.ggml.tokens", what)
        return tokens

    @functools.cached_property
    def token_types(self) -> list[int]:
        types = self.items("tokenizer.ggml.token_type", int, len(self.tokens))
        if not {*types} <= {*range(LAST_TYPE + 1)}:
            raise self.refusal("tokenizer.ggml.token_type", f"not a list of 0 to {LAST_TYPE}")
        return types

    def token_id(self, role: str) -> int | None:
        """The id of the token with a role such as eos, if the file names one."""
        key = f"tokenizer.ggml.{role}_token_id"
        value = self.values.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise self.refusal(key, f"not the id of one of {len(self.tokens)} tokens")
        return value


# ------------------------------------------------------------------------------------------------
# Shapes of the tensors


def pieces(arch: str, tensor: ReaderTensor) -> dict[str, int | slice]:
    """The published tensors within a stored one: name -> rows or expert."""
    name, shape = tensor.name, shape_of(tensor)
    stem, _, kind = name.rpartition(".")
    if stem.endswith("_exps") and len(shape) == 3 and shape[0] <= MAX_EXPERTS:
        return {f"{stem}.{i}.{kind}": i for i in range(shape[0])}
    if ARCHITECTURES[arch].fused and stem.endswith(".ffn_up") and shape[0] % 2 == 0:
        gate, half = stem.replace("ffn_up", "ffn_gate"), shape[0] // 2
        return {f"{gate}.{kind}": slice(half), f"{stem}.{kind}": slice(half, None)}
    return {name.replace("exp_probs_b", "ffn_gate_inp"): slice(None)}


def shape_of(tensor: ReaderTensor, place: int | slice = slice(None)) -> tuple[int, ...]:
    """The shape of a piece in PyTorch's order; GGUF lists dimensions in reverse."""
    first, *rest = tensor.shape.tolist()[::-1]
    if "ffn_gate_inp_shexp" in tensor.name and not rest:
        return 1, first
    return (*rest,) if isinstance(place, int) else (len(range(first)[place]), *rest)


def text_shapes(meta: Metadata, reader: GGUFReader, drafts: range) -> dict[str, tuple[int, ...]]:
    """The shapes of the pieces of all tensors, except rotary factors and draft layers."""
    arch, shapes, holders = meta.text("general.architecture"), {}, {}
    for tensor in reader.tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if not tensor.name.startswith("rope_") and (not layer or int(layer[1]) not in drafts):
            for name, place in pieces(arch, tensor).items():
                if name in holders:
                    both = f"{holders[name]} and {tensor.name} are both {name}"
                    raise UserError(f"{meta.where}: {both}; {AGAIN}")
                shapes[name], holders[name] = shape_of(tensor, place), tensor.name
    return shapes


def rope_factors(reader: GGUFReader, kind: str) -> Tensor | None:
    """The divisors of the rotary frequencies `[D/2]` in rope_`kind`, or None."""
    name = f"rope_{kind}.weight"
    found = [tensor.data for tensor in reader.tensors if tensor.name == name]
    return torch.from_numpy(np.array(found[0])) if found else None


# ------------------------------------------------------------------------------------------------
# The configuration


def shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def llama3_scaling(factors: Tensor, rope_theta: float, pairs: int) -> dict:
    """Recover the `rope_scaling` of Llama 3.1 from the divisors `[pairs]` in a GGUF file."""
    factor = factors.max().item()
    exponents = torch.arange(len(factors)) / len(factors)
    turns = 8192 / (2 * torch.pi * rope_theta**exponents)  # over the original context
    keep = ((turns - 1) / (4 - 1)).clamp(0, 1)
    plain = factors.shape == (pairs,) and factors.is_floating_point()
    if not plain or not torch.allclose(factors, 1 / (keep + (1 - keep) / factor), rtol=1e-3):
        raise UserError("its rope_freqs.weight is not the scaling of Llama 3; use another model")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def rope_scaling(meta: Metadata, reader: GGUFReader, rope_theta: float, pairs: int) -> dict | None:
    """The `rope_scaling` of a published config.json, or None."""
    rope = f"{meta.text('general.architecture')}.rope"
    factors, short = rope_factors(reader, "freqs"), rope_factors(reader, "factors_short")
    if factors is not None and factors.max() != 1:
        return llama3_scaling(factors, rope_theta, pairs)
    if short is not None:
        scale = shortest(meta.number(f"{rope}.scaling.attn_factor"))
        short = [shortest(divisor) for divisor in short.flatten().tolist()]
        return {"rope_type": "longrope", "short_factor": short, "attention_factor": scale}
    linear = meta.number(f"{rope}.scale_linear", 1.0)
    factor = shortest(meta.number(f"{rope}.scaling.factor", linear))
    kind = meta.text(f"{rope}.scaling.type", "linear")
    if kind == "none" or factor == 1:
        return None
    if kind not in ("linear", "yarn"):
        what = "which is not supported (known: linear, yarn)"
        raise meta.refusal(f"{rope}.scaling.type", what, "use another model")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        meta.number(f"{rope}.scaling.original_context_length")  # required
        scaling |= meta.copied(YARN)
        scaling |= {"mscale": 1.0} if "mscale_all_dim" in scaling else {}
    return scaling


def layer_types(meta: Metadata, layers: int) -> dict:
    """`layer_types` of a config.json, if the file has a list of windowed layers."""
    key = f"{meta.text('general.architecture')}.attention.sliding_window_pattern"
    if not isinstance(meta.values.get(key), list):
        return {}
    names = {True: "sliding_attention", False: "full_attention"}
    return {"layer_types": [names[windowed] for windowed in meta.items(key, bool, layers)]}


def check_known(meta: Metadata, known: dict) -> None:
    """Raise a `UserError` if a key is present with another value than the `known` one."""
    arch = meta.text("general.architecture")
    for key, expected in known.items():
        if meta.get(f"{arch}.{key}", expected) != expected:
            what = f"and only {expected} is supported"
            raise meta.refusal(f"{arch}.{key}", what, "use another model")


def biases(shapes: dict[str, tuple[int, ...]]) -> dict:
    """The bias flags of a config.json, from the biases that the file has."""
    qkv, ffn = ("blk.0.attn_q.bias" in shapes, "blk.0.ffn_gate.bias" in shapes)
    flags = dict.fromkeys(("attention_bias", "qkv_bias", "use_bias"), qkv) | {"mlp_bias": ffn}
    return flags | {"attention_out_bias": "blk.0.attn_output.bias" in shapes}


def build_config(meta: Metadata, reader: GGUFReader, dtype: torch.dtype) -> dict:
    """The published `config.json` of the model; `UserError` on what it cannot express."""
    name = meta.text("general.architecture")
    arch = ARCHITECTURES[name]
    shapes = {tensor.name: shape_of(tensor) for tensor in reader.tensors}
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise UserError(f"{meta.where} has no matrix token_embd.weight; {AGAIN}")
    rows, tokens = shapes["token_embd.weight"][0], len(meta.tokens)
    if not PADDED * rows <= tokens <= rows:
        what = f"{tokens} tokens for an embedding of {rows}"
        raise meta.refusal("tokenizer.ggml.tokens", what)
    dim = meta.count(f"{name}.embedding_length")
    heads = meta.count(f"{name}.attention.head_count", MAX_HEADS)
    head_dim = meta.count(f"{name}.attention.key_length", MAX_HEAD_DIM, max(1, dim // heads))
    known = {"attention.value_length": head_dim, "expert_gating_func": arch.gating}
    check_known(meta, known | UNKNOWN)
    rotated = meta.count(f"{name}.rope.dimension_count", head_dim, head_dim)
    drafts = meta.count(f"{name}.nextn_predict_layers", MAX_LAYERS, 0, least=0)
    layers = meta.count(f"{name}.block_count", MAX_LAYERS) - drafts
    rope_theta = shortest(meta.number(f"{name}.rope.freq_base", 10000.0))
    config = {
        "model_type": arch.family,
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count(f"{name}.attention.head_count_kv", MAX_HEADS, heads),
        "head_dim": head_dim,
        "intermediate_size": meta.count(f"{name}.feed_forward_length"),
        "vocab_size": rows,
        "max_position_embeddings": meta.count(f"{name}.context_length"),
        "rms_norm_eps": shortest(meta.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling(meta, reader, rope_theta, rotated // 2),
        "partial_rotary_factor": rotated / head_dim,
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": meta.token_id("bos"),
        "eos_token_id": meta.token_id("eos"),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    config |= biases(shapes) | arch.constants | meta.copied(NUMBERS) | layer_types(meta, layers)
    if meta.has(f"{name}.{arch.other[1]}"):
        config["model_type"] = arch.other[0]
    if "num_experts" in config:
        dense = [i for i in range(layers) if f"blk.{i}.ffn_gate.weight" in shapes]
        config |= {"mlp_only_layers": dense, "use_qk_norm": "blk.0.attn_q_norm.weight" in shapes}
    if name == "gemma3":  # as llama.cpp recognizes the 27B, which scales scores differently
        config["query_pre_attn_scalar"] = dim // heads if layers == 62 else head_dim
    return config
