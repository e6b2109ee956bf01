"""What the attention of a layer is, as a published `config.json` says it: heads and rotations.

A scaling takes the plain frequencies, one for each pair of dimensions, and returns its own and a
factor for cos and sin. A pair that does not turn has the frequency 0: partial rotary embeddings and
layers without any need no code of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from keys import MAX_SIZE, Keys, is_number

# What a file may ask for. The largest published numbers are 126 layers (Llama 3.1 405B), 128 heads
# and 512 dimensions a head; what is made of a configuration before the weights are seen takes time
# and memory in proportion to the layers and the head_dim.
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_EXPERTS = 2**10, 2**12, 2**12, 2**12


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


# ------------------------------------------------------------------------------------------------
# Rotary frequencies, in float32


def original_length(config: Keys, rope: Keys) -> float:
    """The context that the model was first trained on; scalings go by it."""
    key, default = "original_max_position_embeddings", config.count("max_position_embeddings")
    return (config if config.has(key) else rope).number(key, default)


def scaling_factor(config: Keys, rope: Keys) -> float:
    default = config.count("max_position_embeddings") / original_length(config, rope)
    return rope.number("factor", default)


def llama3_scaling(freqs: Tensor, rope: Keys, config: Keys) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between mixed."""
    factor, low = rope.number("factor"), rope.number("low_freq_factor")
    high = rope.number("high_freq_factor")
    if low >= high:
        raise rope.refusal("low_freq_factor", f"not below high_freq_factor, {high}")
    turns = original_length(config, rope) * freqs / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / factor), 1.0


def yarn_scaling(freqs: Tensor, rope: Keys, config: Keys) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): stretches long waves and lengthens q and k."""
    base, factor, pairs = rope.number("rope_theta"), scaling_factor(config, rope), len(freqs)
    if base <= 1:
        raise rope.refusal("rope_theta", "not above 1")
    # Waves of more turns in the original context than beta_fast are kept, and of fewer than
    # beta_slow stretched whole: low and high are the pairs that turn so often.
    context = original_length(config, rope) / (2 * math.pi)
    turns = rope.number("beta_fast", 32), rope.number("beta_slow", 1)
    low, high = (pairs * math.log(context / count) / math.log(base) for count in turns)
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    span = high - low or 0.001
    stretch = ((torch.arange(pairs, device="cpu") - low) / span).clamp(0, 1)

    def lengthening(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    scale = lengthening(1)
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        scale = lengthening(rope.number("mscale")) / lengthening(rope.number("mscale_all_dim"))
    return freqs * (1 - stretch) + freqs / factor * stretch, rope.number("attention_factor", scale)


def longrope_scaling(freqs: Tensor, rope: Keys, config: Keys) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753), within the original context.

    A longer text needs other frequencies, also for the keys that the cache holds already.
    """
    factor = scaling_factor(config, rope)
    original = max(original_length(config, rope), 2)
    scale = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original))
    divisors = rope.entries("short_factor", len(freqs), "positive numbers", is_number)
    return freqs / torch.tensor(divisors, device="cpu"), rope.number("attention_factor", scale)


ROPES: dict[str, Callable[[Tensor, Keys, Keys], tuple[Tensor, float]]] = {
    "default": lambda freqs, rope, config: (freqs, 1.0),
    "linear": lambda freqs, rope, config: (freqs / rope.number("factor"), 1.0),
    "llama3": llama3_scaling,
    "yarn": yarn_scaling,
    "longrope": longrope_scaling,
    "su": longrope_scaling,
}


def rope_section(config: Keys, windowed: bool, local: bool) -> Keys:
    """What a file says of the rotations of layers with a window, or of those without.

    `local` says that a scaling for all layers leaves those with a window alone.
    """
    rope, theta = config.section("rope_parameters", "rope_scaling"), "rope_theta"
    if rope.has("full_attention") or rope.has("sliding_attention"):
        rope = rope.section("sliding_attention" if windowed else "full_attention")
    elif windowed and local:
        rope = Keys({}, config.where)
    if windowed and local and config.has("rope_local_base_freq"):
        theta = "rope_local_base_freq"
    base = {} if rope.has("rope_theta") else {"rope_theta": config.number(theta, 1e4)}
    return Keys(rope.values | base, rope.where, rope.path[:-1])


def scaling_of(rope: Keys) -> str:
    return rope.choice("rope_type" if rope.has("rope_type") else "type", (*ROPES,), "default")


def context_length(config: Keys, local: bool) -> int:
    """Positions of the context: YaRN extends it, and of LongRoPE's the original part is used."""
    length, rope = config.count("max_position_embeddings"), rope_section(config, False, local)
    scaling = scaling_of(rope)
    if scaling == "yarn":
        extended = original_length(config, rope) * scaling_factor(config, rope)
        return max(length, min(int(extended), MAX_SIZE))
    longrope = ROPES[scaling] is longrope_scaling
    return min(length, int(original_length(config, rope))) if longrope else length


def rotations(config: Keys, rope: Keys, head_dim: int, partial: bool) -> dict:
    """`rope` and `rope_scale` of a LayerKind; `partial` says that a part of a head may turn."""
    key = "partial_rotary_factor"
    for keys in () if partial else (rope, config):
        keys.choice(key, (1.0,), 1.0)
    keys = rope if rope.has(key) else config
    rotated = int(head_dim * keys.number(key, 1.0))
    if rotated % 2 or not 0 < rotated <= head_dim:
        raise keys.refusal(key, f"so {rotated} of {head_dim} dimensions turn, which cannot be")
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
    freqs = 1.0 / rope.number("rope_theta") ** exponents
    freqs, scale = ROPES[scaling_of(rope)](freqs, rope, config)
    still = [0.0] * (head_dim // 2 - len(freqs))
    return {"rope": (*freqs.tolist(), *still), "rope_scale": scale}


# ------------------------------------------------------------------------------------------------
# Mixtures of experts

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def mixture_of(config: Keys, width: str = "moe_intermediate_size", **properties) -> dict:
    """The fields of a `model.Mixture` that every family has; `width` is the key of an expert's."""
    key = next((key for key in EXPERTS if config.has(key)), EXPERTS[0])
    experts = config.count(key, MAX_EXPERTS)
    chosen = config.count("num_experts_per_tok", MAX_EXPERTS)
    if chosen > experts:
        raise config.refusal("num_experts_per_tok", f"more than the {experts} of {key}")
    return dict(experts=experts, chosen=chosen, width=config.count(width)) | properties


def dense_layers(config: Keys) -> tuple[int, ...]:
    """The layers without a mixture: those that Qwen's files name, and all but every n-th."""
    layers = range(config.count("num_hidden_layers", MAX_LAYERS))
    dense = config.get("mlp_only_layers", [])
    if type(dense) is not list or not all(layer in layers for layer in dense):
        raise config.refusal("mlp_only_layers", "not a list of layers")
    step = config.count("decoder_sparse_step", default=1)
    return tuple(i for i in layers if i in dense or (i + 1) % step)
