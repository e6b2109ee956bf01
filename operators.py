"""Custom operators: their schemas, output shapes, and which models can be fused.

kernels.py implements them in C++ for CPUs, kernels_cuda.py in Triton for GPUs. To torch.compile and
torch.cuda.graph they are opaque calls. They take whole KV caches, never views, so that compiled
code never clones a cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

# x is [M, in], `packed` a weight from `pack` of those files, `grid` its scales. `prefill` selects
# the arithmetic of a matmul, for any number of rows. `peaks`, float32 [M, 1], are the largest
# magnitudes in each row of x. linear_float32 takes a bf16 weight and does not round y. Attention:
# qkv [B, T, heads, D], input_pos [B, T], caches [B, KV heads, S + 1, D], freqs_cis [S + 1, D/2, 2],
# q [B, T, H, D]. Experts: chosen int64 and shares float32 [M, k], weights with a leading expert
# dimension, `a8` for int8-activation. They return float32 [M, in]: the sum, in order of expert
# index, of shares * w2(silu(w1 x) * w3 x).
SCHEMAS = (
    "linear_bf16(Tensor x, Tensor packed, int out, bool prefill) -> Tensor",
    "linear_float32(Tensor x, Tensor packed, int out) -> Tensor",
    "linear_int8(Tensor x, Tensor packed, Tensor grid, bool prefill) -> Tensor",
    "linear_int8_activation(Tensor x, Tensor packed, Tensor grid, Tensor? peaks) -> Tensor",
    "linear_int4(Tensor x, Tensor packed, Tensor grid, int out, bool prefill) -> Tensor",
    "rotate_write(Tensor qkv, Tensor input_pos, Tensor freqs_cis, Tensor? q_norm, Tensor? k_norm, "
    "float eps, Tensor(a!) k_cache, Tensor(b!) v_cache) -> Tensor",
    "attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor input_pos, float scale, int window, "
    "Tensor? sinks) -> Tensor",
    "experts(Tensor x, Tensor chosen, Tensor shares, Tensor w1, Tensor? w1_grid, Tensor w3, "
    "Tensor? w3_grid, Tensor w2, Tensor? w2_grid, bool a8, bool prefill) -> Tensor",
)


def product(x: Tensor, out: int) -> Tensor:
    return x.new_empty(len(x), out)


def queries(qkv: Tensor, _pos, _freqs, _q_norm, _k_norm, _eps, k_cache: Tensor, _v) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] - 2 * k_cache.shape[1], qkv.shape[3])


FAKES = {
    "linear_bf16": lambda x, packed, out, prefill: product(x, out),
    "linear_float32": lambda x, packed, out: x.new_empty(len(x), out, dtype=torch.float32),
    "linear_int8": lambda x, packed, grid, prefill: product(x, len(grid)),
    "linear_int8_activation": lambda x, packed, grid, peaks: product(x, len(grid)),
    "linear_int4": lambda x, packed, grid, out, prefill: product(x, out),
    "rotate_write": queries,
    "attend": lambda q, *_: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]),
    "experts": lambda x, *_: x.new_empty(x.shape, dtype=torch.float32),
}

library = torch.library.Library("tokenbus", "DEF")
for schema in SCHEMAS:
    library.define(schema)
for name, fake in FAKES.items():
    torch.library.register_fake(f"tokenbus::{name}", fake, lib=library)

# The properties that fused models support: blocks of Llama, Qwen2 and Qwen3. Any other field of
# ModelArgs and LayerKind must have its default.
FUSED = {"dim", "n_layer", "vocab_size", "block_size", "intermediate_size", "kinds", "layers"}
FUSED |= {"norm_eps", "qk_norm", "tied", "biases", "mixture"}
FUSED |= {"n_head", "n_local_heads", "head_dim", "window", "rope", "rope_scale", "scale"}


def fusible(args: Any, mixtures: bool = False, flat_norms: bool = False) -> bool:
    """Whether a fused model can run these ModelArgs.

    `mixtures`, `flat_norms`: it also supports experts without a shared one, or flat q/k norms.
    """
    for part in (args, *args.kinds):
        for field in dataclasses.fields(part):
            if field.name not in FUSED and getattr(part, field.name) != field.default:
                return False
    mixture = not args.mixture or (mixtures and not args.mixture.shared)
    return mixture and (flat_norms or args.qk_norm != "flat")
