"""Reads the layers of a model from a published `config.json`: heads, windows, rotary embeddings.

`Family` is what a `model_type` implies; families.py has the table. A RoPE scaling maps the plain
frequencies, one for each pair of dimensions, to scaled ones and a factor for cos and sin. Pairs
that are not rotated have frequency 0, so partial rotary embeddings and layers without RoPE need no
code of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from keys import MAX_SIZE, Keys, is_number
from model import LayerKind

# Limits for a config.json. The largest published values are 126 layers (Llama 3.1 405B), 128 heads
# and 512 dimensions a head. What is built before the weights are seen takes time and memory
# proportional to the layers and head_dim.
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_EXPERTS = 2**10, 2**12, 2**12, 2**12

QKV, FFN = ("wqkv",), ("w1", "w2", "w3")  # Linears
LAYER_TYPES = ("full_attention", "sliding_attention")

# ------------------------------------------------------------------------------------------------
# Families


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` implies; the defaults are Llama's."""

    defaults: dict = dataclasses.field(default_factory=dict)  # for keys that its files may omit
    norms: str = "pre"
    qk_norm: str = ""
    biases: dict[str, tuple[str, ...]] = dataclasses.field(  # flag -> the Linears with a bias
        default_factory=lambda: {"attention_bias": (*QKV, "wo"), "mlp_bias": FFN}
    )
    # Which layers have a sliding window (`layer_types` overrides it), and which have no RoPE.
    windowed: Callable[[Keys, int], bool] | None = None
    unrotated: Callable[[Keys, int, bool], bool] = lambda config, layer, windowed: False
    local_rope: bool = False  # RoPE scaling skips the layers with a window
    partial_rotary: bool = False
    model: Callable[[Keys], dict] = lambda config: {}  # further fields of ModelArgs
    kind: Callable[[Keys], dict] = lambda config: {}  # of LayerKind
    mixture: Callable[[Keys], dict] | None = None  # the fields of Mixture
    # How its tensors are published: names by the keys of convert_hf_checkpoint.HF_NAMES.
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    interleaved: bool = False  # q and k are published in Meta's rotary order
    norm_offset: float = 0.0  # to add to norm weights


# ------------------------------------------------------------------------------------------------
# The heads


def head_sizes(config: Keys) -> tuple[int, int, int]:
    """Heads, KV heads and head_dim."""
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
    """The context length before RoPE scaling, which the scalings refer to."""
    key, default = "original_max_position_embeddings", config.count("max_position_embeddings")
    keys = config if config.has(key) else rope
    length = keys.number(key, default)
    if length < 2:
        raise keys.refusal(key, "fewer than two positions")
    return length


def scaling_factor(config: Keys, rope: Keys) -> float:
    default = config.count("max_position_embeddings") / original_length(config, rope)
    return rope.number("factor", default)


def llama3_scaling(freqs: Tensor, rope: Keys, config: Keys) -> tuple[Tensor, float]:
    """Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between blended."""
    factor, low = rope.number("factor"), rope.number("low_freq_factor")
    high = rope.number("high_freq_factor")
    if low >= high:
        raise rope.refusal("low_freq_factor", f"not below high_freq_factor, {high}")
    turns = original_length(config, rope) * freqs / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / factor), 1.0


def yarn_scaling(freqs: Tensor, rope: Keys, config: Keys) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): divides low frequencies, scales q and k up."""
    base, factor, pairs = rope.number("rope_theta"), scaling_factor(config, rope), len(freqs)
    if base <= 1:
        raise rope.refusal("rope_theta", "not above 1")
    # Frequencies of more than beta_fast turns over the original context are kept, those of fewer
    # than beta_slow divided by factor; low and high are the pair indices at these two limits.
    context = original_length(config, rope) / (2 * math.pi)
    turns = rope.number("beta_fast", 32), rope.number("beta_slow", 1)
    if turns[0] <= turns[1]:
        raise rope.refusal("beta_fast", f"not above beta_slow, {turns[1]}")
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

    Longer text needs other frequencies, even for keys that are already cached.
    """
    factor = scaling_factor(config, rope)
    scale = math.sqrt(1 + math.log(max(factor, 1)) / math.log(original_length(config, rope)))
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
    """The RoPE parameters of layers with a sliding window, or of those without.

    With `local`, a scaling given for all layers does not apply to those with a window.
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
    """The context length: YaRN extends it, LongRoPE is limited to the original context."""
    length = config.count("max_position_embeddings", least=2)
    rope = rope_section(config, False, local)
    scaling = scaling_of(rope)
    if scaling == "yarn":
        extended = original_length(config, rope) * scaling_factor(config, rope)
        return max(length, min(int(extended), MAX_SIZE))
    longrope = ROPES[scaling] is longrope_scaling
    return min(length, int(original_length(config, rope))) if longrope else length


def rotations(config: Keys, rope: Keys, head_dim: int, partial: bool) -> dict:
    """`rope` and `rope_scale` of a LayerKind; `partial` permits partial rotary embeddings."""
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
# The layers


def all_but_every(layers: int) -> Callable[[Keys, int], bool]:
    """Windows in all layers but every n-th, which has full attention."""
    return lambda config, i: (i + 1) % config.count("sliding_window_pattern", default=layers) > 0


def qwen_window(config: Keys, layer: int) -> bool:
    """Windows in the last layers."""
    return layer >= config.count("max_window_layers", default=28, least=0)


def without_rope(config: Keys, layer: int, _windowed: bool = False) -> bool:
    """SmolLM3: no_rope_layers has a 0 for a layer without RoPE; by default every n-th has none."""
    if config.has("no_rope_layers"):
        return not config.entries("no_rope_layers", layer + 1, "0 and 1", (0, 1).__contains__)[-1]
    return (layer + 1) % config.count("no_rope_layer_interval", default=4) == 0


def windowed_layers(config: Keys, family: Family, layers: int) -> list[bool]:
    """Whether each layer has a sliding window."""
    flag = "use_sliding_window"
    unused = flag in family.defaults and not config.flag(flag)
    if family.windowed is None or unused or not config.has("sliding_window"):
        return [False] * layers
    if not config.has("layer_types"):
        return [family.windowed(config, layer) for layer in range(layers)]
    what = f"layers with {' or '.join(LAYER_TYPES)}"
    types = config.entries("layer_types", layers, what, LAYER_TYPES.__contains__)
    return [name == "sliding_attention" for name in types]


def layer_kinds(config: Keys, family: Family, context: int) -> dict:
    """`kinds` and `layers` of ModelArgs."""
    sizes, count = head_sizes(config), config.count("num_hidden_layers", MAX_LAYERS)
    windowed = windowed_layers(config, family, count)
    window = config.count("sliding_window") if any(windowed) else 0
    unrotated = [family.unrotated(config, layer, w) for layer, w in enumerate(windowed)]
    layers, kinds = [*zip(windowed, unrotated, strict=True)], {}
    for near, still in dict.fromkeys(layers):
        rope = rope_section(config, near, family.local_rope)
        options = rotations(config, rope, sizes[2], family.partial_rotary)
        options |= {"rope": (0.0,) * (sizes[2] // 2)} if still else {}
        options |= {"window": window if near and window < context else 0} | family.kind(config)
        kinds[near, still] = LayerKind(*sizes, **options)
    different = [*dict.fromkeys(kinds.values())]
    places = {key: different.index(kind) for key, kind in kinds.items()}
    return {"kinds": tuple(different), "layers": tuple(places[key] for key in layers)}


# ------------------------------------------------------------------------------------------------
# Mixtures of experts

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def mixture_of(config: Keys, width: str = "moe_intermediate_size", **properties) -> dict:
    """The fields of `model.Mixture` that all families share; `width` is the key of its width."""
    key = next((key for key in EXPERTS if config.has(key)), EXPERTS[0])
    experts = config.count(key, MAX_EXPERTS)
    chosen = config.count("num_experts_per_tok", MAX_EXPERTS)
    if chosen > experts:
        raise config.refusal("num_experts_per_tok", f"more than the {experts} of {key}")
    return dict(experts=experts, chosen=chosen, width=config.count(width)) | properties


def dense_layers(config: Keys) -> tuple[int, ...]:
    """The layers without a mixture: mlp_only_layers, and all but every decoder_sparse_step-th."""
    layers = range(config.count("num_hidden_layers", MAX_LAYERS))
    dense = config.get("mlp_only_layers", [])
    if type(dense) is not list or not all(layer in layers for layer in dense):
        raise config.refusal("mlp_only_layers", "not a list of layers")
    step = config.count("decoder_sparse_step", default=1)
    return tuple(i for i in layers if i in dense or (i + 1) % step)


def qwen_mixture(config: Keys) -> dict:
    renormalize = config.flag("norm_topk_prob")
    return mixture_of(config, renormalize=renormalize, dense_layers=dense_layers(config))


def shared_qwen_mixture(config: Keys) -> dict:
    shared = config.count("shared_expert_intermediate_size")
    return qwen_mixture(config) | {"shared": shared, "shared_gate": True}


def glm_mixture(config: Keys) -> dict:
    for key in ("n_group", "topk_group"):
        config.choice(key, (1,), 1)
    width = config.count("moe_intermediate_size")
    return mixture_of(
        config,
        shared=width * config.count("n_shared_experts", MAX_SIZE // width, 1),
        score="sigmoid",
        renormalize=config.flag("norm_topk_prob", True),
        factor=config.number("routed_scaling_factor", 1.0),
        biased=True,
        dense_layers=tuple(range(config.count("first_k_dense_replace", MAX_LAYERS, 1, 0))),
    )
