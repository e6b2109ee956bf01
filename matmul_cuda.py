"""Matmuls in Triton for decoding on CUDA and ROCm, and how kernels are launched.

Decoding is memory-bound: every weight is read once a token. So the kernels read weights as stored,
16 bytes a thread, straight into the operand registers of a tensor core: weights are the M side of
its MMA, up to 8 rows of x the N side. There is no second copy of a weight, on NVIDIA nothing goes
through shared memory, and one binary serves 1 to 8 rows: a row's bits depend on no other row. Tile
sizes follow from the weight's shape and the number of SMs; nothing is autotuned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.runtime._async_compile import active_mode

# ------------------------------------------------------------------------------------------------
# Matmuls. The tensor core multiplies 16 rows by 8 columns; thread 4 r + t of a warp holds columns
# of weight row r and the same columns of row r of x. A sum does not care which columns, so each
# thread takes the 16 bytes of one load: a *chunk*. Tiles are [U, R, W, 8, 4, E]: U chunks in
# flight, R times 8 rows, W warps, 8 rows, 4 threads, E elements.


# Triton assigns a warp's threads to the axes of a load from the last axis on, before 3.7 from the
# first.
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
    """A chunk of each row n and, for int4, the scale and zero of its group."""
    at, inside = w + (n.to(tl.int64) * chunks + chunk) * E + axis(E, 5), chunk < chunks
    tiles = (upright(tl.load(at, mask=inside, other=0, eviction_policy="evict_first")),)
    if PER_GROUP:
        at = grid + chunk // PER_GROUP * N + n
        tiles += (upright(tl.load(at, mask=inside, other=0, eviction_policy="evict_first")),)
    return tiles


@triton.jit
def float_of_byte(words, AT: tl.constexpr):
    """The int8 at bit AT as a float, through the mantissa: integer conversion is slow."""
    bits = ((words ^ -2139062144) >> AT) & 255 | 0x4B000000  # 2^23 + 128 + value
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def halves(pair, DTYPE: tl.constexpr):
    """The two 16-bit floats of an int32, the low half first."""
    low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
    return low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)


def ptx(name: str, magic: str, less: str, one: str) -> tl.constexpr:
    """Two codes at once: magic + code by bit tricks, minus (magic + 8), times scale, plus zero."""
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
    """The weight operand of the MMA: [W, 8 R, columns], in the column order of `x_operand`."""
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
        KEPT: tl.constexpr = 4 if SCHEME == "int8-activation" else 2  # packed in a register
        a = tiles[0].reshape(d[0], d[1], d[2], 8, 4, d[5] // KEPT, KEPT)
        a = a.permute(2, 1, 3, 0, 5, 4, 6)
    return a.reshape(d[2], 8 * d[1], a.numel // (d[2] * 8 * d[1]))


@triton.jit
def x_operand(x, SCHEME: tl.constexpr):
    """The x operand of the MMA: [U, S, W, X, 4, C] -> [W, columns, X]."""
    d: tl.constexpr = x.shape
    if SCHEME == "int4":
        x = x.reshape(d[0], d[1], d[2], d[3], 4, 2, 2, 2).permute(2, 0, 1, 6, 4, 7, 5, 3)
    else:
        KEPT: tl.constexpr = 2 if SCHEME == "bf16" else 4  # packed in a register
        x = x.reshape(d[0], d[1], d[2], d[3], 4, d[5] // KEPT, KEPT).permute(2, 0, 1, 5, 4, 6, 3)
    return x.reshape(d[2], x.numel // (d[2] * d[3]), d[3])


@triton.jit
def finish(sums, factor, grid, bias, n, inside, SCHEME: tl.constexpr):
    """Reduce the warps' sums [W, 8 R, X] to outputs [8 R, X], with scales and bias applied."""
    out = tl.sum(sums, 0).to(tl.float32) * factor
    if SCHEME == "int8" or SCHEME == "int8-activation":
        out *= tl.load(grid + n, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    return out


@triton.jit(do_not_specialize=["rows", "N", "chunks"])
def linear_kernel(
    x, gain, eps, peaks, w, grid, bias, w3, grid3, bias3, add, experts, y, rows, N, chunks,
    SCHEME: tl.constexpr, PER_GROUP: tl.constexpr, BACKEND: tl.constexpr, PDL: tl.constexpr,
    U: tl.constexpr, R: tl.constexpr, W: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    E: tl.constexpr, X: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """y [rows, N] = norm(x) [rows, K] @ w.T (+ bias) (+ add), or silu of that times the same by w3.

    A program computes 8 R outputs of X rows. The norm needs no pass of its own: its factor is
    applied to the sums. A chunk of weights takes S pieces of C columns of x.

    With `experts` a program computes one row of y: a row of x, shared by CHOSEN rows of y, times
    the weight of that row's expert.
    """
    STEP: tl.constexpr = U * W * 4
    m0, n0 = tl.program_id(0) * X, tl.program_id(1) * 8 * R
    if experts is not None:
        m0 = tl.program_id(0)
        rows, expert, back = m0 + 1, tl.load(experts + m0), m0 - m0 // CHOSEN
        x -= back.to(tl.int64) * chunks * (S * C)
        w += expert * N * chunks * E
        if w3 is not None:
            w3 += expert * N * chunks * E
        groups = 1
        if PER_GROUP:
            groups = chunks // PER_GROUP
        if grid is not None:
            grid += expert * groups * N
        if grid3 is not None:
            grid3 += expert * groups * N
        if peaks is not None:
            peaks -= back
    row, chunk = n0 + axis(R, 1) * 8 + axis(8, 3), (axis(U, 0) * W + axis(W, 2)) * 4 + axis(4, 4)
    n, token = tl.minimum(row, N - 1), m0 + axis(X, 3)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tiles = load_weights(w, grid, n, N, chunk, chunks, PER_GROUP, E)
    if w3 is not None:
        tiles3 = load_weights(w3, grid3, n, N, chunk, chunks, PER_GROUP, E)
    if PDL:  # only weights may be read before the previous kernel is done
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
        factor = step_of(tl.load(peaks + m, mask=m < rows, other=0.0))
    out = finish(sums, factor, grid, bias, n, n < N, SCHEME)
    if w3 is not None:
        out = out / (1 + tl.exp(-out)) * finish(sums3, factor, grid3, bias3, n, n < N, SCHEME)
    inside, at = (m < rows) & (n < N), m.to(tl.int64) * N + n
    if add is not None:
        out += tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------
# Quantizing x, dequantizing weights, summing experts


@triton.jit
def step_of(peak):
    """What code 1 is worth where 127 is the largest value; NaN where a value is."""
    return tl.maximum(peak, 1e-12, propagate_nan=tl.PropagateNan.ALL) / 127


@triton.jit(do_not_specialize=["K"])
def quantize_kernel(x, peaks, codes, K):
    """Quantize a row of x to int8, with step peak / 127, rounded to nearest even."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * 1024 + tl.arange(0, 1024)
    step = step_of(tl.load(peaks + row))
    value = tl.load(x + row * K + at, mask=at < K, other=0.0).to(tl.float32)
    rounded = tl.math.div_rn(value, step) + 12582912.0  # 1.5 * 2^23: rounds off the fraction
    tl.store(codes + row * K + at, (rounded - 12582912.0).to(tl.int8), mask=at < K)


@triton.jit(do_not_specialize=["first", "end", "N", "K"])
def dequantize_kernel(w, grid, y, first, end, N, K, GROUP: tl.constexpr):
    """Dequantize rows first to end of a weight [N, K]: y [end - first, K]. GROUP 0 is int8 with a
    scale a row; else two 4-bit codes a byte, with a scale and zero for GROUP columns."""
    n = (first + tl.program_id(1) * 16 + tl.arange(0, 16))[:, None]
    k = (tl.program_id(0) * 256 + tl.arange(0, 256))[None, :]
    row, inside = n.to(tl.int64) * K, (n < end) & (k < K)
    if GROUP == 0:
        scale = tl.load(grid + n, mask=n < end, other=0.0).to(tl.float32)
        value = tl.load(w + row + k, mask=inside, other=0).to(tl.float32) * scale
    else:
        byte = tl.program_id(0) * 128 + tl.arange(0, 128)[None, :]
        ok = (n < end) & (2 * byte < K)
        codes = tl.load(w + row // 2 + byte, mask=ok, other=0)
        at = grid + (2 * byte // GROUP * N + n).to(tl.int64) * 2
        scale = tl.load(at, mask=ok, other=0.0).to(tl.float32)
        zero = tl.load(at + 1, mask=ok, other=0.0).to(tl.float32)
        even = ((codes >> 4).to(tl.float32) - 8) * scale + zero
        odd = ((codes & 15).to(tl.float32) - 8) * scale + zero
        value = tl.join(even, odd).reshape(16, 256)
    row -= first.to(tl.int64) * K
    tl.store(y + row + k, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["dim"])
def sum_experts_kernel(parts, chosen, shares, y, dim, K: tl.constexpr, SLOTS: tl.constexpr):
    """A row of y: its K parts weighted by their shares, summed in order of expert index."""
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    at = tl.program_id(1) * 256 + tl.arange(0, 256)
    number = tl.load(chosen + row * K + slot, mask=slot < K, other=0x7FFFFFFF) * SLOTS + slot
    place = tl.sum((number[None, :] < number[:, None]).to(tl.int32), 1)
    share = tl.load(shares + row * K + slot, mask=slot < K, other=0.0)
    sums = tl.zeros((256,), tl.float32)
    for i in tl.static_range(K):
        part = parts + (row * K + tl.sum(tl.where(place == i, slot, 0), 0)) * dim + at
        value = tl.load(part, mask=at < dim, other=0.0).to(tl.float32)
        sums += value * tl.sum(tl.where(place == i, share, 0.0), 0)
    tl.store(y + row * dim + at, sums, mask=at < dim)


# ------------------------------------------------------------------------------------------------
# Launches

SCRATCH = 1 << 28  # maximum bytes of a dequantized weight, or of the splits of attention
FEW_ROWS = 32  # with more tokens a row, or rows of int8 activations, it is a prefill


def supported(device: torch.device) -> bool:
    """CUDA from sm_80, ROCm from CDNA."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    cdna = ("gfx908", "gfx90a", "gfx94", "gfx95")
    return properties.gcnArchName.startswith(cdna) if torch.version.hip else properties.major >= 8


def target(device: torch.device) -> tuple[str, int]:
    """The backend of a device's kernels, and its number of SMs; on a CPU they are interpreted."""
    if device.type != "cuda":
        return "interpreter", 4
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return "hip" if torch.version.hip else "cuda", processors


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], *args, maxnreg: int | None = None,
    launch_pdl: bool = False, **constants,
) -> None:  # fmt: skip
    """Run a kernel, or only compile it within `compile_kernels`."""
    if target(args[0].device)[0] == "cuda":  # ROCm has neither option
        constants |= dict(maxnreg=maxnreg, launch_pdl=launch_pdl)
    with torch.cuda.device_of(args[0]):
        if active_mode.get():
            kernel.warmup(*args, grid=grid, **constants)
        else:
            kernel[grid](*args, **constants)


class Weight(NamedTuple):
    """A weight as stored, and its scheme: bf16 (also fp16), int8, …"""

    scheme: str
    packed: Tensor
    grid: Tensor | None = None
    bias: Tensor | None = None


# For each scheme (S, C, E, U, R): a chunk of E loaded elements takes S pieces of C columns of x; U
# and R are those of the tiles.
SHAPES = {"bf16": (1, 8, 8, 4, 2), "int8": (2, 8, 4, 2, 2), "int4": (4, 8, 4, 1, 4)}
SHAPES["int8-activation"] = 1, 16, 16, 2, 2
SCHEMES = {torch.int8: "int8", torch.uint8: "int4"}  # by dtype; the rest is bf16


def linear(
    x: Tensor, weight: Weight, *, norm: nn.Module | None = None, gate: Weight | None = None,
    add: Tensor | None = None, peaks: Tensor | None = None, dtype: torch.dtype | None = None,
    pdl: bool = False, experts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """norm(x) [M, K] @ weight.T, multiplied by silu(norm(x) @ gate.T) if given, plus `add`: [M, N].

    With `experts` [n, k], weights have a leading expert dimension and the result is [n * k, N], row
    i by its own expert's weight; x has n or n * k rows.
    """
    scheme, (rows, K), N = weight.scheme, x.shape, weight.packed.shape[-2]
    (S, C, E, U, R), (backend, processors) = SHAPES[scheme], target(x.device)
    if norm or gate:  # they need registers
        U, R = max(1, U // 2) if gate else U, 2
    chunks, X = K // (S * C), 16 if backend == "hip" else 8  # an MFMA has 16 columns
    chosen, tall = 1, N
    if experts is not None:
        rows, chosen, tall = experts.numel(), experts.numel() // rows, N * experts.shape[1]
    # 16 warps an SM if the width gives each enough work; never a function of the rows of x.
    W = 1 << max(2, min(8, 128 * R * processors // tall, chunks // (4 * U))).bit_length() - 1
    per_group = chunks // weight.grid.shape[-3] if scheme == "int4" else 0

    def operands(weight: Weight) -> tuple[Tensor | None, ...]:
        words = weight.packed.view(torch.int32) if E == 4 else weight.packed
        return words, weight.grid.view(torch.int32) if per_group else weight.grid, weight.bias

    y = x.new_empty(rows, N, dtype=dtype)
    launch(
        linear_kernel, (triton.cdiv(rows, X if experts is None else 1), triton.cdiv(N, 8 * R)),
        x.contiguous(), norm and norm.weight, norm.eps if norm else 0.0, peaks,
        *operands(gate or weight), *(operands(weight) if gate else (None, None, None)),
        add, experts, y, rows, N, chunks, SCHEME=scheme, PER_GROUP=per_group, BACKEND=backend,
        PDL=pdl, U=U, R=R, W=W, S=S, C=C, E=E, X=X, CHOSEN=chosen, num_warps=W, num_stages=1,
        launch_pdl=pdl, maxnreg=128 if scheme == "int4" and gate else None,  # the others need fewer
    )  # fmt: skip
    return y


def dequantized(x: Tensor, weight: Weight, rows: range) -> Tensor:
    """Rows of the weight in x's dtype [rows, K], in memory that the caching allocator reuses."""
    (_, w, grid, _), N, K = weight, len(weight.packed), x.shape[1]
    y, group = x.new_empty(len(rows), K), K // len(grid) if weight.scheme == "int4" else 0
    programs = triton.cdiv(K, 256), triton.cdiv(len(rows), 16)
    launch(dequantize_kernel, programs, w, grid, y, rows.start, rows.stop, N, K, GROUP=group)
    return y


def product(x: Tensor, weight: Weight, prefill: bool) -> Tensor:
    """x [M, K] @ weight.T, in the arithmetic of prefill or of decoding."""
    if not prefill:
        return linear(x, weight)
    if weight.scheme == "bf16":
        return nn.functional.linear(x, weight.packed)
    N = len(weight.packed)
    y, height = x.new_empty(len(x), N), SCRATCH // (x.shape[1] * x.element_size())
    for first in range(0, N, height):
        rows = range(N)[first : first + height]
        torch.mm(x, dequantized(x, weight, rows).t(), out=y[:, rows.start : rows.stop])
    return y


def quantized(x: Tensor, peaks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x quantized to int8 with step peak / 127 a row, and the peaks, float32 [M, 1]."""
    peaks = x.abs().amax(-1, keepdim=True).float() if peaks is None else peaks.contiguous()
    (rows, K), codes = x.shape, x.new_empty(x.shape, dtype=torch.int8)
    launch(quantize_kernel, (rows, triton.cdiv(K, 1024)), x.contiguous(), peaks, codes, K)
    return codes, peaks


def product_of_codes(x: Tensor, weight: Tensor, scales: Tensor, peaks: Tensor | None) -> Tensor:
    """x quantized to int8, times an int8 weight, summed in integers: the same bits for any M."""
    codes, peaks = quantized(x, peaks)
    if len(x) <= FEW_ROWS or len(weight) % 8:
        return linear(codes, Weight("int8-activation", weight, scales), peaks=peaks, dtype=x.dtype)
    step = peaks.clamp(min=1e-12) / 127
    return (torch._int_mm(codes, weight.t()) * step * scales.float()).to(x.dtype)


def experts(
    x: Tensor, chosen: Tensor, shares: Tensor, w1: Tensor, grid1: Tensor | None, w3: Tensor,
    grid3: Tensor | None, w2: Tensor, grid2: Tensor | None, a8: bool, _prefill: bool,
) -> Tensor:  # fmt: skip
    """The share-weighted sum of the FFNs of the chosen experts [N, k]: float32 [N, dim].

    No other expert is read, and the host does not wait to learn which were chosen. A row's bits
    depend on no other row.
    """

    def weight(packed: Tensor, grid: Tensor | None) -> Weight:
        return Weight("int8-activation" if a8 else SCHEMES.get(packed.dtype, "bf16"), packed, grid)

    chosen = chosen.contiguous()
    options = dict(dtype=x.dtype, experts=chosen)
    codes, peaks = quantized(x) if a8 else (x, None)
    h = linear(codes, weight(w3, grid3), gate=weight(w1, grid1), peaks=peaks, **options)
    codes, peaks = quantized(h) if a8 else (h, None)
    parts = linear(codes, weight(w2, grid2), peaks=peaks, **options)  # [N * k, dim]
    (N, k), dim = chosen.shape, parts.shape[1]
    y = x.new_empty(N, dim, dtype=torch.float32)
    launch(
        sum_experts_kernel, (N, triton.cdiv(dim, 256)), parts, chosen, shares.contiguous(), y, dim,
        K=k, SLOTS=triton.next_power_of_2(k), num_warps=1,
    )  # fmt: skip
    return y
