"""Triton kernels for decoding on CUDA and ROCm, and a whole step made of them.

Decoding is memory-bound: every weight is read once a token. So the kernels read what a checkpoint
stores, 16 bytes a thread, straight into the registers that a tensor core takes: the weights are the
rows of its product, up to 8 rows of x its columns. No second copy of a weight exists, on NVIDIA
nothing goes through shared memory, and one binary serves 1 to 8 rows: a row's bits depend on no
other row. Tiles follow from the shape of a weight and the number of SMs, never from a stopwatch.

`register` implements the operators of operators.py; `fuse` runs a Llama, Qwen2 or Qwen3 layer in 7
launches. Nothing here waits for the device, so a CUDA graph can hold all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.runtime._async_compile import active_mode

import operators

# ------------------------------------------------------------------------------------------------
# Matrix products. The tensor core multiplies 16 rows by 8 columns; thread 4 r + t of a warp holds
# columns of weight row r and the same columns of row r of x. Which columns does not matter to a
# sum, so each thread takes the 16 bytes that it can load at once: a *chunk*. The tiles are
# [U, R, W, 8, 4, E]: U chunks in flight, R times 8 rows, W warps, 8 rows, 4 threads, E elements.


# Triton deals a warp's threads to the axes of a load from the last on, before 3.7 from the first.
FLIPPED = tl.constexpr([int(n) for n in triton.__version__.split(".")[:2]] < [3, 7])


@triton.jit
def axis(SIZE: tl.constexpr, AT: tl.constexpr):
    """0 .. SIZE - 1 along one of the six axes of a tile."""
    BEFORE: tl.constexpr = 4 - AT if FLIPPED and AT < 5 else AT
    i = tl.arange(0, SIZE)
    for _ in tl.static_range(BEFORE):
        i = tl.expand_dims(i, 0)
    for _ in tl.static_range(5 - BEFORE):
        i = tl.expand_dims(i, -1)
    return i


@triton.jit
def upright(tile):
    return tile.permute(4, 3, 2, 1, 0, 5) if FLIPPED else tile


@triton.jit
def load_weights(w, grid, n, N, chunk, chunks, PER_GROUP: tl.constexpr, E: tl.constexpr):
    """A chunk of each row n; of int4 the scale and zero of its group, too."""
    at, inside = w + (n.to(tl.int64) * chunks + chunk) * E + axis(E, 5), chunk < chunks
    tiles = (upright(tl.load(at, mask=inside, other=0, eviction_policy="evict_first")),)
    if PER_GROUP:
        at = grid + chunk // PER_GROUP * N + n
        tiles += (upright(tl.load(at, mask=inside, other=0, eviction_policy="evict_first")),)
    return tiles


@triton.jit
def float_of_byte(words, AT: tl.constexpr):
    """The int8 at bit AT, put into a mantissa: converting integers is slow."""
    bits = ((words ^ -2139062144) >> AT) & 255 | 0x4B000000  # 2^23 + 128 + value
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def halves(pair, DTYPE: tl.constexpr):
    """The two 16-bit floats of an int32, the low half first."""
    low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


def ptx(name: str, magic: str, less: str, one: str) -> tl.constexpr:
    """Two codes at once: put into mantissas as magic + code, less magic + 8, scaled, plus zero."""
    return tl.constexpr(f"""{{ .reg .b32 a, one, less; mov.b32 one, {one}; mov.b32 less, {less};
        lop3.b32 a, $1, 0x000f000f, {magic}, 0xEA; fma.rn.{name} a, a, one, less;
        fma.rn.{name} $0, a, $2, $3; }}""")


PTX_BF16 = ptx("bf16x2", "0x43004300", "0xc308c308", "0x3f803f80")
PTX_FP16 = ptx("f16x2", "0x64006400", "0xe408e408", "0x3c003c00")


@triton.jit
def two_codes(words, grid, DTYPE: tl.constexpr, BACKEND: tl.constexpr):
    """The 4-bit codes at bits 0 and 16, times their scale, plus their zero."""
    if BACKEND == "cuda":
        ASM: tl.constexpr = PTX_BF16 if DTYPE == tl.bfloat16 else PTX_FP16
        args = words, (grid & 0xFFFF) | (grid << 16), ((grid >> 16) & 0xFFFF) | (grid & -65536)
        pair = tl.inline_asm_elementwise(ASM, "=r,r,r,r", args, tl.int32, is_pure=True, pack=1)
        return halves(pair, DTYPE)
    scale, zero = halves(grid, DTYPE)
    low = (words << 16 & 0xF0000 | 0x43000000).to(tl.float32, bitcast=True) - 136.0  # 128 + code
    high = (words & 0xF0000 | 0x43000000).to(tl.float32, bitcast=True) - 136.0
    return (low * scale + zero).to(DTYPE), (high * scale + zero).to(DTYPE)


@triton.jit
def weight_operand(tiles, SCHEME: tl.constexpr, DTYPE: tl.constexpr, BACKEND: tl.constexpr):
    """The rows of the tensor core's product: [W, 8 R, columns], in the order of `x_operand`."""
    d: tl.constexpr = tiles[0].shape
    if SCHEME == "int4":
        v0, v4 = two_codes(tiles[0] >> 4, tiles[1], DTYPE, BACKEND)
        v1, v5 = two_codes(tiles[0], tiles[1], DTYPE, BACKEND)
        v2, v6 = two_codes(tiles[0] >> 12, tiles[1], DTYPE, BACKEND)
        v3, v7 = two_codes(tiles[0] >> 8, tiles[1], DTYPE, BACKEND)
        evens, odds = tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(v1, v5)
        # [U, R, W, 8, 4, E, h, a, b] is column 4 h + 2 a + b -> [W, R, 8, U, E, a, 4, b, h]
        a = tl.join(evens, tl.join(odds, tl.join(v3, v7))).permute(2, 1, 3, 0, 5, 7, 4, 8, 6)
    elif SCHEME == "int8":
        evens = tl.join(float_of_byte(tiles[0], 0), float_of_byte(tiles[0], 16))
        odds = tl.join(float_of_byte(tiles[0], 8), float_of_byte(tiles[0], 24))
        a = (
            tl.join(evens, odds).to(DTYPE).permute(2, 1, 3, 0, 5, 4, 6, 7)
        )  # [W, R, 8, U, E, 4, 2, 2]
    else:
        KEPT: tl.constexpr = 4 if SCHEME == "int8-activation" else 2  # neighbours in a register
        a = tiles[0].reshape(d[0], d[1], d[2], 8, 4, d[5] // KEPT, KEPT)
        a = a.permute(2, 1, 3, 0, 5, 4, 6)
    return a.reshape(d[2], 8 * d[1], a.numel // (d[2] * 8 * d[1]))


@triton.jit
def x_operand(x, SCHEME: tl.constexpr):
    """The columns of the tensor core's product: x [U, S, W, X, 4, C] as [W, columns, X]."""
    d: tl.constexpr = x.shape
    if SCHEME == "int4":
        x = x.reshape(d[0], d[1], d[2], d[3], 4, 2, 2, 2).permute(2, 0, 1, 6, 4, 7, 5, 3)
    else:
        KEPT: tl.constexpr = 2 if SCHEME == "bf16" else 4  # neighbours in a register
        x = x.reshape(d[0], d[1], d[2], d[3], 4, d[5] // KEPT, KEPT).permute(2, 0, 1, 5, 4, 6, 3)
    return x.reshape(d[2], x.numel // (d[2] * d[3]), d[3])


@triton.jit
def finish(sums, factor, grid, bias, n, inside, SCHEME: tl.constexpr):
    """Sums [W, 8 R, X] of the warps as outputs [8 R, X]: factors and bias applied."""
    out = tl.sum(sums, 0).to(tl.float32) * factor
    if SCHEME == "int8" or SCHEME == "int8-activation":
        out *= tl.load(grid + n, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    return out


@triton.jit(do_not_specialize=["rows", "N", "chunks"])
def linear_kernel(
    x, gain, eps, peaks, w, grid, bias, w3, grid3, bias3, add, y, rows, N, chunks,
    SCHEME: tl.constexpr, PER_GROUP: tl.constexpr, BACKEND: tl.constexpr, PDL: tl.constexpr,
    U: tl.constexpr, R: tl.constexpr, W: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    E: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """y [rows, N] = norm(x) [rows, K] @ w.T (+ bias) (+ add), or silu of that times the same by w3.

    A program computes 8 R outputs of X rows. The norm needs no pass of its own: its factor is
    applied to the sums. S pieces of C columns of x belong to a chunk of weights.
    """
    STEP: tl.constexpr = U * W * 4
    m0, n0 = tl.program_id(0) * X, tl.program_id(1) * 8 * R
    row, chunk = n0 + axis(R, 1) * 8 + axis(8, 3), (axis(U, 0) * W + axis(W, 2)) * 4 + axis(4, 4)
    n, token = tl.minimum(row, N - 1), m0 + axis(X, 3)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tiles = load_weights(w, grid, n, N, chunk, chunks, PER_GROUP, E)
    if w3 is not None:
        tiles3 = load_weights(w3, grid3, n, N, chunk, chunks, PER_GROUP, E)
    if PDL:  # only weights may be read before the kernel ahead is done
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((W, 8 * R, X), tl.int32 if SCHEME == "int8-activation" else tl.float32)
    sums3, squares = sums, tl.zeros((W, X, 4), tl.float32)
    for _ in range(0, chunks, STEP):
        next_tiles = load_weights(w, grid, n, N, chunk + STEP, chunks, PER_GROUP, E)
        if w3 is not None:
            next_tiles3 = load_weights(w3, grid3, n, N, chunk + STEP, chunks, PER_GROUP, E)
        at, inside = (chunk * S + axis(S, 1)) * C + axis(C, 5), (chunk < chunks) & (token < rows)
        xs = upright(tl.load(x + token * chunks * (S * C) + at, mask=inside, other=0))
        if gain is not None:
            floats = xs.to(tl.float32)  # [U, S, W, X, 4, C]
            squares += tl.sum(tl.sum(tl.sum(floats * floats, 5), 1), 0)
            gains = upright(tl.load(gain + at + token * 0, mask=inside, other=0.0))
            xs = (floats * gains.to(tl.float32)).to(xs.dtype)
        xs = x_operand(xs, SCHEME)
        ws = weight_operand(tiles, SCHEME, xs.dtype, BACKEND)
        sums, tiles = tl.dot(ws, xs, sums, out_dtype=sums.dtype), next_tiles
        if w3 is not None:
            ws = weight_operand(tiles3, SCHEME, xs.dtype, BACKEND)
            sums3, tiles3 = tl.dot(ws, xs, sums3, out_dtype=sums.dtype), next_tiles3
        chunk += STEP
    n, m = (n0 + tl.arange(0, 8 * R))[:, None], (m0 + tl.arange(0, X))[None, :]
    factor = 1.0
    if gain is not None:
        factor = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / (chunks * (S * C)) + eps)[None, :]
    if peaks is not None:
        factor = tl.maximum(tl.load(peaks + m, mask=m < rows, other=0.0), 1e-12) / 127
    out = finish(sums, factor, grid, bias, n, n < N, SCHEME)
    if w3 is not None:
        out = out / (1 + tl.exp(-out)) * finish(sums3, factor, grid3, bias3, n, n < N, SCHEME)
    inside, at = (m < rows) & (n < N), m.to(tl.int64) * N + n
    if add is not None:
        out += tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------
# What surrounds the products


@triton.jit(do_not_specialize=["K"])
def quantize_kernel(x, peaks, codes, K):
    """A row of x in steps of a 127th of its peak, rounded to nearest even."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * 1024 + tl.arange(0, 1024)
    step = tl.maximum(tl.load(peaks + row), 1e-12) / 127
    value = tl.load(x + row * K + at, mask=at < K, other=0.0).to(tl.float32)
    rounded = tl.math.div_rn(value, step) + 12582912.0  # 1.5 * 2^23: what follows is cut off
    tl.store(codes + row * K + at, (rounded - 12582912.0).to(tl.int8), mask=at < K)


@triton.jit(do_not_specialize=["N", "K"])
def dequantize_kernel(w, grid, y, N, K, GROUP: tl.constexpr):
    """y [N, K]: int8 times the scale of its row, or two codes a byte times that of its group."""
    n = (tl.program_id(1) * 16 + tl.arange(0, 16))[:, None]
    k = (tl.program_id(0) * 256 + tl.arange(0, 256))[None, :]
    row, inside = n.to(tl.int64) * K, (n < N) & (k < K)
    if GROUP == 0:
        scale = tl.load(grid + n, mask=n < N, other=0.0).to(tl.float32)
        value = tl.load(w + row + k, mask=inside, other=0).to(tl.float32) * scale
    else:
        byte = tl.program_id(0) * 128 + tl.arange(0, 128)[None, :]
        ok = (n < N) & (2 * byte < K)
        codes = tl.load(w + row // 2 + byte, mask=ok, other=0)
        at = grid + (2 * byte // GROUP * N + n).to(tl.int64) * 2
        scale = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        zero = tl.load(at + 1, mask=ok, other=0.0).to(tl.float32)
        even = ((codes >> 4).to(tl.float32) - 8) * scale + zero
        odd = ((codes & 15).to(tl.float32) - 8) * scale + zero
        value = tl.join(even, odd).reshape(16, 256)
    tl.store(y + row + k, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "S"])
def rotate_kernel(
    qkv, positions, table, q_gain, k_gain, eps, q, kc, vc, T, S,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One head of a token: q, normed and rotated, to [B T, H, D]; k, too, and v to the caches."""
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
# block b of positions belongs to split b mod SPLITS. So the splits are balanced at every length,
# and the order of a row's sums depends neither on the length nor on the rows beside it.


@triton.jit(do_not_specialize=["T", "S", "window"])
def attend_kernel(
    q, kc, vc, positions, sinks, part, stats, y, T, S, scale, window,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One tile of query rows and one split: each row sees the cache up to its own position.

    S counts the cache's last slot, too: a row that stands there is padding and sees nothing.
    """
    KV: tl.constexpr = H // G
    b, kv, split = tl.program_id(0) // KV, tl.program_id(0) % KV, tl.program_id(2)
    row, d, j = tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :], tl.arange(0, BLOCK)
    i = tl.program_id(1) * ROWS + row
    real, head = i < T * G, kv * G + i % G
    position = tl.load(positions + b * T + i // G, mask=real, other=S - 1).to(tl.int32)
    end = tl.where(position < S - 1, position + 1, 0)  # of what a row sees
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
    """The splits of one query row as one: y [B, T, H * D]."""
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


# ------------------------------------------------------------------------------------------------
# Launches

FEW_ROWS = 32  # more new tokens of a row, or rows of int8 activations, are a prefill


def supported(device: torch.device) -> bool:
    """CUDA from sm_80 on, ROCm from CDNA on."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    cdna = ("gfx908", "gfx90a", "gfx94", "gfx95")
    return properties.gcnArchName.startswith(cdna) if torch.version.hip else properties.major >= 8


def target(device: torch.device) -> tuple[str, int]:
    """What a device's kernels are compiled for, and its number of SMs; a CPU's are interpreted."""
    if device.type != "cuda":
        return "interpreter", 4
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return "hip" if torch.version.hip else "cuda", processors


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], *args, maxnreg: int | None = None,
    launch_pdl: bool = False, **constants,
) -> None:  # fmt: skip
    """Run a kernel, or only compile it, under `compile_kernels`."""
    if target(args[0].device)[0] == "cuda":  # ROCm knows neither of these
        constants |= dict(maxnreg=maxnreg, launch_pdl=launch_pdl)
    with torch.cuda.device_of(args[0]):
        if active_mode.get():
            kernel.warmup(*args, grid=grid, **constants)
        else:
            kernel[grid](*args, **constants)


class Weight(NamedTuple):
    """A weight as it is stored, and how it is to be multiplied: bf16 (fp16, too), int8, …"""

    scheme: str
    packed: Tensor
    grid: Tensor | None = None
    bias: Tensor | None = None


# Of each scheme: S and C, the pieces of x that belong to a chunk of weights and their columns; E,
# the elements of a chunk as loaded; U and R of the tiles.
SHAPES = {"bf16": (1, 8, 8, 4, 2), "int8": (2, 8, 4, 2, 2), "int4": (4, 8, 4, 1, 4)}
SHAPES["int8-activation"] = 1, 16, 16, 2, 2


def linear(
    x: Tensor, weight: Weight, *, norm: nn.Module | None = None, gate: Weight | None = None,
    add: Tensor | None = None, peaks: Tensor | None = None, dtype: torch.dtype | None = None,
    pdl: bool = False,
) -> Tensor:  # fmt: skip
    """norm(x) [M, K] times a weight, or silu(norm(x) times gate) times that; plus `add`: [M, N]."""
    scheme, (rows, K), N = weight.scheme, x.shape, len(weight.packed)
    (S, C, E, U, R), (backend, processors) = SHAPES[scheme], target(x.device)
    if norm:  # it takes registers, and so does a second weight
        U, R = max(1, U // 2) if gate else U, 2
    chunks, X = K // (S * C), 16 if backend == "hip" else 8  # an MFMA has 16 columns
    # 16 warps a processor as far as the width gives each some work; never by the rows of x.
    W = 1 << max(2, min(8, 128 * R * processors // N, chunks // (4 * U))).bit_length() - 1
    per_group = chunks // len(weight.grid) if scheme == "int4" else 0

    def operands(weight: Weight) -> tuple[Tensor | None, ...]:
        words = weight.packed.view(torch.int32) if E == 4 else weight.packed
        return words, weight.grid.view(torch.int32) if per_group else weight.grid, weight.bias

    y = x.new_empty(rows, N, dtype=dtype)
    launch(
        linear_kernel, (triton.cdiv(rows, X), triton.cdiv(N, 8 * R)),
        x.contiguous(), norm and norm.weight, norm.eps if norm else 0.0, peaks,
        *operands(gate or weight), *(operands(weight) if gate else (None, None, None)),
        add, y, rows, N, chunks, SCHEME=scheme, PER_GROUP=per_group, BACKEND=backend, PDL=pdl,
        U=U, R=R, W=W, S=S, C=C, E=E, X=X, num_warps=W, num_stages=1, launch_pdl=pdl,
        maxnreg=128 if scheme == "int4" and gate else None,  # others need fewer
    )  # fmt: skip
    return y


def dequantized(x: Tensor, weight: Weight) -> Tensor:
    """The weight in x's dtype [N, K], in memory that the caching allocator reuses."""
    (_, w, grid, _), N, K = weight, len(weight.packed), x.shape[1]
    y, group = x.new_empty(N, K), K // len(grid) if weight.scheme == "int4" else 0
    pieces = triton.cdiv(K, 256), triton.cdiv(N, 16)
    launch(dequantize_kernel, pieces, w, grid, y, N, K, GROUP=group)
    return y


def product(x: Tensor, weight: Weight, prefill: bool) -> Tensor:
    """x [M, K] times a weight by the arithmetic of a prefill, or that of decoding."""
    if not prefill:
        return linear(x, weight)
    return nn.functional.linear(
        x, weight.packed if weight.scheme == "bf16" else dequantized(x, weight)
    )


def product_of_codes(x: Tensor, weight: Tensor, scales: Tensor, peaks: Tensor | None) -> Tensor:
    """x in steps of its peaks times an int8 weight, summed as integers: one result for any M."""
    peaks = x.abs().amax(-1, keepdim=True).float() if peaks is None else peaks.contiguous()
    (rows, K), codes = x.shape, x.new_empty(x.shape, dtype=torch.int8)
    launch(quantize_kernel, (rows, triton.cdiv(K, 1024)), x.contiguous(), peaks, codes, K)
    if rows <= FEW_ROWS or len(weight) % 8:
        return linear(codes, Weight("int8-activation", weight, scales), peaks=peaks, dtype=x.dtype)
    step = peaks.clamp(min=1e-12) / 127
    return (torch._int_mm(codes, weight.t()) * step * scales.float()).to(x.dtype)


def rotate_write(
    qkv: Tensor, input_pos: Tensor, freqs_cis: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """q of qkv [B, T, heads, D], normed and rotated; k, too, and with v into the caches."""
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
    if T <= FEW_ROWS:  # 2 programs a processor; the tile must not depend on T
        rows, splits = 16, 1 << max(1, min(64, 2 * processors // KV).bit_length() - 1)
    tiles, block = triton.cdiv(T * G, rows), 32 if D <= 256 else 16
    size = B * KV * tiles * (splits > 1) * splits * rows
    part, stats = (q.new_empty(size, n, dtype=torch.float32) for n in (width, 2))
    y = q.new_empty(B, T, H * D)
    constants = dict(H=H, G=G, D=D, WIDTH=width, ROWS=rows, SPLITS=splits)
    launch(
        attend_kernel, (B * KV, tiles, splits), q.contiguous(), k_cache, v_cache,
        input_pos.contiguous(), sinks, part, stats, y, T, S, scale * 1.4426950408889634, window,
        BLOCK=block, num_stages=2, num_warps=4 if splits > 1 else 8, **constants,
    )  # fmt: skip
    if splits > 1:
        launch(merge_kernel, (B * T, H, triton.cdiv(D, 64)), part, stats, y, T, **constants)
    return y


# ------------------------------------------------------------------------------------------------
# What linear.py, model.py and engine.py ask for


@functools.cache
def register(key: str = "CUDA") -> None:
    """Implement the operators of operators.py for a dispatch key."""
    for name, implementation in {
        "linear_bf16": lambda x, w, out, many: product(x, Weight("bf16", w), many),
        "linear_int8": lambda x, w, grid, many: product(x, Weight("int8", w, grid), many),
        "linear_int4": lambda x, w, grid, out, many: product(x, Weight("int4", w, grid), many),
        "linear_int8_activation": product_of_codes,
        "rotate_write": rotate_write,
        "attend": attend,
    }.items():
        operators.library.impl(name, implementation, key)


def served(floats: Tensor) -> bool:
    """Whether there are kernels for this device and dtype; then they are registered."""
    fits = supported(floats.device) and floats.dtype in (torch.bfloat16, torch.float16)
    if fits and floats.is_cuda:
        register()
    return fits


def pack(weight: Tensor, grid: Tensor | None = None) -> tuple[Tensor, Tensor | None] | None:
    """A weight and its grid as the operators take them: as stored. None where no kernel serves it.

    The bytes of a row must be a multiple of 16, groups of int4 a multiple of 32 columns.
    """
    fits = weight.shape[1] * weight.itemsize % 16 == 0
    if weight.dtype == torch.uint8:
        fits = fits and weight.shape[1] % (16 * len(grid)) == 0
    return (weight, grid) if fits and served(weight if grid is None else grid) else None


def take_cache(cache: Tensor) -> bool:
    """Whether `attend` and `rotate_write` serve a KV cache like this one."""
    return cache.shape[3] % 2 == 0 and cache.shape[3] <= 512 and served(cache)


def fusible(model: nn.Module) -> bool:
    """Whether the fused step is this model's: its family, its weights, its caches, and no hooks."""
    modules = [*model.modules()]
    return (
        operators.fusible(model.args)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
        and all(getattr(m, "tiles", m) is not None and not hasattr(m, "scales_a8") for m in modules)
        and all(kind_of(f.feed_forward.w1) == kind_of(f.feed_forward.w3) for f in model.layers)
        and all(layer.attention.kv_cache.has_kernels for layer in model.layers)
    )


def kind_of(linear: nn.Module) -> tuple:
    """What must be the same of weights that one kernel multiplies: dtype and groups."""
    return linear.tiles.dtype, getattr(linear.grid, "shape", None)


def weight_of(linear: nn.Module) -> Weight:
    scheme = {torch.int8: "int8", torch.uint8: "int4"}.get(linear.tiles.dtype, "bf16")
    return Weight(scheme, linear.tiles, linear.grid, linear.bias)


def fuse(model: nn.Module, pdl: bool = False) -> Callable | None:
    """`Transformer.forward` in 7 launches a layer; None for a model that it cannot run.

    A pass with `last`, a prefill, goes through the modules. With `pdl` (sm_90 on) a product loads
    its first weights while the kernel ahead still runs (programmatic dependent launch).
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


def compile_kernels(step: Callable, model: nn.Module, rows: int, tokens: int = 1) -> None:
    """Compile in threads what `step` launches for these rows, without running any of it."""
    idx = torch.zeros(rows, tokens, dtype=torch.int64, device=model.device)
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        step(idx, torch.full_like(idx, model.max_seq_length), model.max_seq_length)
