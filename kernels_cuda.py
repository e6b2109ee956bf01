"""Triton kernels for decoding on CUDA and ROCm, and a fused step made of them.

Matmuls are in matmul_cuda.py; rotary embeddings, attention and the entry points are here.
`register` implements the operators of operators.py, `fuse` runs a Llama, Qwen2 or Qwen3 layer in 7
launches. Nothing here waits for the device, so a CUDA graph can capture all of it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import operators
from matmul_cuda import (
    FEW_ROWS,
    SCHEMES,
    SCRATCH,
    Weight,
    experts,
    launch,
    linear,
    product,
    product_of_codes,
    quantized,
    supported,
    target,
)

# ------------------------------------------------------------------------------------------------
# Rotary embeddings


@triton.jit(do_not_specialize=["T", "S"])
def rotate_kernel(
    qkv, positions, table, q_gain, k_gain, eps, q, kc, vc, T, S,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One head of a token: q [B T, H, D], normed and rotated; k, too, and v into the caches."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = 2 * tl.arange(0, PAIRS)[:, None] + tl.arange(0, 2)[None, :]
    inside, position = at < D, tl.load(positions + row)
    value = tl.load(qkv + (row * (H + 2 * KV) + head) * D + at, mask=inside, other=0.0)
    slot = ((row // T * KV + (head - H) % KV) * S + position) * D + at
    if head < H + KV:
        floats = value.to(tl.float32)
        if q_gain is not None:
            floats *= tl.rsqrt(tl.sum(floats * floats) / D + eps)
            gains = tl.load(q_gain + at, mask=inside & (head < H), other=0.0).to(tl.float32)
            gains += tl.load(k_gain + at, mask=inside & (head >= H), other=0.0).to(tl.float32)
            floats *= gains
        even, odd = tl.split(floats)
        cos, sin = tl.split(tl.load(table + position * D + at, mask=inside, other=0.0))
        value = tl.join(even * cos - odd * sin, odd * cos + even * sin).to(value.dtype)
    tl.store(q + (row * H + head) * D + at, value, mask=inside & (head < H))
    tl.store(kc + slot, value, mask=inside & (head >= H) & (head < H + KV))
    tl.store(vc + slot, value, mask=inside & (head >= H + KV))


# ------------------------------------------------------------------------------------------------
# Attention. A tile holds ROWS of the T * G query rows of a KV head. Decoding splits the cache:
# block b of positions belongs to split b mod SPLITS. So splits are balanced at every length, and a
# row's summation order depends neither on the length nor on the rest of the batch.


@triton.jit(do_not_specialize=["T", "S", "window"])
def attend_kernel(
    q, kc, vc, positions, sinks, part, stats, y, T, S, scale, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One tile of query rows and one split; each row sees the cache up to its own position.

    S includes the cache's last slot: a row at that position is padding and sees nothing.
    """
    KV: tl.constexpr = H // G
    b, kv, split = tl.program_id(0) // KV, tl.program_id(0) % KV, tl.program_id(2)
    row, d, j = tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :], tl.arange(0, BLOCK)
    i = tl.program_id(1) * ROWS + row
    real, head = i < T * G, kv * G + i % G
    position = tl.load(positions + b * T + i // G, mask=real, other=S - 1).to(tl.int32)
    end = tl.where(position < S - 1, position + 1, 0)  # of the visible positions
    begin = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    at = ((b * T + i // G) * H + head).to(tl.int64)[:, None] * D + d
    qs = tl.load(q + at, mask=real[:, None] & (d < D), other=0.0)
    top, weight = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if sinks is not None:  # a logit without a value
        if split == 0:
            logits = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
            top, weight = logits * 1.4426950408889634, weight + 1.0
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    first = tl.min(tl.where(end > 0, begin, S), 0) // BLOCK
    first += (split + SPLITS - first % SPLITS) % SPLITS  # the first block of this split
    for block in range(first, tl.cdiv(tl.max(end, 0), BLOCK), SPLITS):
        place = block * BLOCK + j
        slots = (tl.program_id(0).to(tl.int64) * S + place)[:, None] * D + d
        inside = (place < S - 1)[:, None] & (d < D)
        k = tl.load(kc + slots, mask=inside, other=0.0)
        v = tl.load(vc + slots, mask=inside, other=0.0)
        seen = (place[None, :] < end[:, None]) & (place[None, :] >= begin[:, None])
        scores = tl.where(seen, tl.dot(qs, tl.trans(k)) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top > float("-inf"), new_top, 0.0)
        p, fade = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        weight = weight * fade + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums * fade[:, None])
        top = new_top
    if SPLITS == 1:
        out = sums / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(y + at, out.to(y.dtype.element_ty), mask=real[:, None] & (d < D))
    else:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        out = (tile * SPLITS + split) * ROWS + row
        tl.store(stats + 2 * out, top, mask=real)
        tl.store(stats + 2 * out + 1, weight, mask=real)
        tl.store(part + out[:, None] * WIDTH + d, sums, mask=(real & (weight > 0))[:, None])


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    part, stats, y, T,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query row: y [B, T, H * D]."""
    row, head = tl.program_id(0), tl.program_id(1)
    split, d = tl.arange(0, SPLITS), (tl.program_id(2) * 64 + tl.arange(0, 64))[None, :]
    i = row % T * G + head % G
    tile = (row // T * (H // G) + head // G) * tl.cdiv(T * G, ROWS) + i // ROWS
    at = (tile.to(tl.int64) * SPLITS + split) * ROWS + i % ROWS
    top, weight = tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1)
    at, inside = at[:, None] * WIDTH + d, (weight > 0)[:, None] & (d < D)
    sums = tl.load(part + at, mask=inside, other=0.0)
    share = tl.where(weight > 0, tl.exp2(top - tl.max(top, 0)), 0.0)
    total = tl.sum(weight * share, 0)
    out = tl.sum(sums * share[:, None], 0, keep_dims=True) / tl.where(total > 0, total, 1.0)
    tl.store(y + (row * H + head).to(tl.int64) * D + d, out.to(y.dtype.element_ty), mask=d < D)


def rotate_write(
    qkv: Tensor, input_pos: Tensor, freqs_cis: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """Norm and rotate q and k of qkv [B, T, heads, D]; returns q, writes k and v to the caches."""
    (B, T, heads, D), (KV, S) = qkv.shape, k_cache.shape[1:3]
    H = heads - 2 * KV
    q = qkv.new_empty(B, T, H, D)
    launch(
        rotate_kernel, (B * T, heads), qkv.contiguous(), input_pos.contiguous(), freqs_cis,
        q_norm, k_norm, eps, q, k_cache, v_cache, T, S,
        H=H, KV=KV, D=D, PAIRS=triton.next_power_of_2(D // 2), num_warps=1,
    )  # fmt: skip
    return q


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, input_pos: Tensor, scale: float, window: int,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of q [B, T, H, D] over caches [B, KV, S + 1, D], up to input_pos: [B, T, H * D]."""
    (B, T, H, D), (KV, S) = q.shape, k_cache.shape[1:3]
    G, width, (_, processors) = H // KV, max(16, triton.next_power_of_2(D)), target(q.device)
    rows, splits = 64 if D <= 64 else 32 if D <= 256 else 16, 1
    if T <= FEW_ROWS:  # 2 programs an SM; the tile must not depend on T
        rows, splits = 16, 1 << max(1, min(64, 2 * processors // KV).bit_length() - 1)
    tiles, block = triton.cdiv(T * G, rows), 32 if D <= 256 else 16
    size = KV * tiles * splits * rows if splits > 1 else 0  # partial sums of one batch row
    several = min(B, max(1, SCRATCH // (4 * size * (width + 2)))) if size else B
    part, stats = (q.new_empty(several * size, n, dtype=torch.float32) for n in (width, 2))
    q, input_pos, y = q.contiguous(), input_pos.contiguous(), q.new_empty(B, T, H * D)
    constants = dict(H=H, G=G, D=D, WIDTH=width, ROWS=rows, SPLITS=splits)
    for b in range(0, B, several):  # a few rows at a time, to bound the partial sums
        inputs = [tensor[b : b + several] for tensor in (q, k_cache, v_cache, input_pos)]
        out, count = y[b : b + several], len(inputs[0])
        launch(
            attend_kernel, (count * KV, tiles, splits), *inputs, sinks, part, stats, out, T, S,
            scale * 1.4426950408889634, window, BLOCK=block, num_stages=2,
            num_warps=4 if splits > 1 else 8, **constants,
        )  # fmt: skip
        if splits > 1:
            launch(
                merge_kernel, (count * T, H, triton.cdiv(D, 64)), part, stats, out, T, **constants
            )
    return y


# ------------------------------------------------------------------------------------------------
# Entry points for linear.py, model.py and engine.py


@functools.cache
def register(key: str = "CUDA") -> None:
    """Implement the operators of operators.py for a dispatch key."""
    for name, implementation in {
        "linear_bf16": lambda x, w, out, many: product(x, Weight("bf16", w), many),
        "linear_float32": lambda x, w, out: linear(x, Weight("bf16", w), dtype=torch.float32),
        "linear_int8": lambda x, w, grid, many: product(x, Weight("int8", w, grid), many),
        "linear_int4": lambda x, w, grid, out, many: product(x, Weight("int4", w, grid), many),
        "linear_int8_activation": product_of_codes,
        "rotate_write": rotate_write,
        "attend": attend,
        "experts": experts,
    }.items():
        operators.library.impl(name, implementation, key)


@functools.cache
def can_launch(device: torch.device) -> bool:
    """Whether kernels can run: Triton needs a C compiler and Python's headers for its launcher.

    If not, one line on standard error says what failed and what to do.
    """
    try:
        quantized(torch.ones(1, 1, device=device))
    except Exception as error:  # from the system, the compiler, Triton or CUDA
        reason = str(error).partition("\n")[0]
        if isinstance(error, subprocess.CalledProcessError):
            reason = f"{error.cmd[0]} fails to build Triton's launcher"
        reason += "; install gcc and Python's headers (python3-dev), or set CC to a C compiler"
        print(f"slower than it could be: no kernels for {device}; {reason}", file=sys.stderr)
        return False
    return True


def served(floats: Tensor) -> bool:
    """Whether there are kernels for this device and dtype; registers them if so."""
    fits = supported(floats.device) and floats.dtype in (torch.bfloat16, torch.float16)
    if fits and floats.is_cuda:
        fits = can_launch(floats.device)
        if fits:
            register()
    return fits


def pack(weight: Tensor, grid: Tensor | None = None) -> tuple[Tensor, Tensor | None] | None:
    """A weight and its grid for the operators, unchanged; None if no kernel supports it.

    The bytes of a row must be a multiple of 16, int4 groups a multiple of 32 columns.
    """
    fits = weight.shape[-1] * weight.itemsize % 16 == 0
    if weight.dtype == torch.uint8:
        fits = fits and weight.shape[-1] % (16 * grid.shape[-3]) == 0
    return (weight, grid) if fits and served(weight if grid is None else grid) else None


def take_cache(cache: Tensor) -> bool:
    """Whether `attend` and `rotate_write` support this KV cache."""
    return cache.shape[3] % 2 == 0 and cache.shape[3] <= 512 and served(cache)


def fusible(model: nn.Module) -> bool:
    """Whether the fused step supports this model: family, weights, caches, and no hooks."""
    modules = [*model.modules()]
    return (
        operators.fusible(model.args)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and all(getattr(m, "tiles", m) is not None and not hasattr(m, "scales_a8") for m in modules)
        and all(kind_of(f.feed_forward.w1) == kind_of(f.feed_forward.w3) for f in model.layers)
        and all(layer.attention.kv_cache.has_kernels for layer in model.layers)
    )


def kind_of(linear: nn.Module) -> tuple:
    """What weights of one kernel must have in common: dtype and group size."""
    return linear.tiles.dtype, getattr(linear.grid, "shape", None)


def weight_of(linear: nn.Module) -> Weight:
    scheme = SCHEMES.get(linear.tiles.dtype, "bf16")
    return Weight(scheme, linear.tiles, linear.grid, linear.bias)


def fuse(model: nn.Module, pdl: bool = False) -> Callable | None:
    """`Transformer.forward` in 7 launches a layer; None for an unsupported model.

    A prefill, a pass with `last`, runs module by module. With `pdl` (sm_90 and newer), programmatic
    dependent launch: a matmul loads its first weights while the previous kernel still runs.
    """
    if not fusible(model):
        return None
    layers = []
    for layer in model.layers:
        a, f = layer.attention, layer.feed_forward
        layers.append((layer, *map(weight_of, (a.wqkv, a.wo, f.w1, f.w3, f.w2))))
    output = weight_of(model.output)

    def step(idx: Tensor, input_pos: Tensor, kv_len: int, last: Tensor | None = None) -> tuple:
        if last is not None:
            return model(idx, input_pos, kv_len, last)
        x = model.tok_embeddings(idx.flatten())  # [B * T, dim]
        for layer, wqkv, wo, w1, w3, w2 in layers:
            qkv = linear(x, wqkv, norm=layer.attention_norm, pdl=pdl)
            qkv = qkv.view(*idx.shape, -1, layer.attention.kind.head_dim)
            y = layer.attention.attend_by_operators(qkv, input_pos, None)  # 3 launches
            x = linear(y.flatten(0, 1), wo, add=x, pdl=pdl)
            h = linear(x, w3, norm=layer.ffn_norm, gate=w1, pdl=pdl)
            x = linear(h, w2, add=x, pdl=pdl)
        hidden = model.norm(x)
        return tuple(y.view(*idx.shape, -1) for y in (linear(hidden, output, pdl=pdl), hidden))

    return step


def compile_kernels(
    step: Callable, model: nn.Module, rows: int, tokens: int = 1, prefill: bool = False
) -> None:
    """Compile in threads all kernels that `step` launches for these rows, without running them."""
    idx = torch.zeros(rows, tokens, dtype=torch.int64, device=model.device)
    input_pos, last = torch.full_like(idx, model.max_seq_length), idx[:, :1] if prefill else None
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        step(idx, input_pos, model.max_seq_length, last)
