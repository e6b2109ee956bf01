"""Matrix products, attention and a whole model in C++, for CPUs with AVX-512.

Decoding multiplies one row, or the few that speculation verifies, with every weight of the model.
It is memory-bound: stream weights sequentially, keep arithmetic ahead of the bus. So each weight is
packed once, after loading, in *tiles* of 32 rows, a few columns at a time. Small models wait for
Python more than for memory: `fuse` runs all that model.py does in one call.

kernels.cpp wants the bf16 instructions of AVX-512 (Intel Cooper Lake, Sapphire Rapids and newer;
AMD Zen 4 and newer) and is built once, by the first process that needs it. Without them, without a
compiler or in other dtypes PyTorch's own operations run.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import operators
from build_cpp import load_extension

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = "-std=c++20 -O3 -fopenmp "
FLAGS += "-mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni"
NEEDED = {"fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}


def supported() -> bool:
    """Whether the CPU has the instructions."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0]
    except (OSError, IndexError):  # another system, or another architecture
        return False
    return NEEDED <= set(flags.split())


@functools.cache
def load() -> bool:
    """Make the operators ready for CPUs, the first time by building them; whether that worked.

    Once built it takes milliseconds, so call it early where a build should not be on the clock.
    """
    return supported() and load_extension(SOURCE, FLAGS)


def take_cache(cache: Tensor) -> bool:
    """Whether the operators read and write a KV cache like this one, `[B, KV heads, S, D]`."""
    fits = cache.device.type == "cpu" and cache.dtype == torch.bfloat16
    return fits and cache.shape[3] % 2 == 0 and cache.shape[3] <= 256 and load()


def fuse(model: nn.Module) -> Callable | None:
    """One call that runs a whole model with packed weights on its caches; None where it cannot.

    It takes what `Transformer.forward` does and returns logits and hidden states as a tuple. None,
    too, if a module has forward hooks (tensor parallelism uses them) or the family needs more than
    the blocks of Llama, Qwen2, Qwen3, their mixtures and OLMoE: those run module by module, on the
    same operators.
    """
    linears = [module for module in model.modules() if hasattr(module, "tiles")]
    attentions = [layer.attention for layer in model.layers]
    fits = all(linear.tiles is not None for linear in linears)
    fits = fits and all(attention.kv_cache.has_kernels for attention in attentions)
    fits = fits and operators.fusible(model.args, mixtures=True, flat_norms=True)
    if not fits or any(module._forward_hooks for module in model.modules()):
        return None
    tensors = dict(model.named_parameters()) | dict(model.named_buffers(remove_duplicate=False))
    scales = [a.kind.scale or a.kind.head_dim**-0.5 for a in attentions]
    windows = [a.kind.window for a in attentions]
    m = model.args.mixture
    routing = m and (m.chosen, m.score == "sigmoid", m.renormalize, m.factor)
    options = model.args.norm_eps, scales, windows, routing or (0, False, False, 1.0)
    fused = torch.classes.tokenbus.Transformer(tensors, *options)
    return lambda idx, input_pos, kv_len, last=None: fused.forward(idx, input_pos, last)


class HugePages:
    """Memory for packed weights, one after the other in chunks of huge pages.

    With pages of 4 kB decoding ran at 0.6 to 1.0 times the speed (benchmarks.md). A chunk is freed
    with the last tensor in it, but for the one being filled; what is never written takes no memory.
    """

    CHUNK, ALIGNMENT = 2**26, 64  # bytes

    def __init__(self):
        self.free = torch.empty(0, dtype=torch.uint8)

    def hold(self, tensor: Tensor) -> Tensor:
        """A dense copy of the tensor."""
        size = -(-tensor.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        if size > self.CHUNK:
            room = self.allocate(size)
        else:
            rest = self.free if size <= len(self.free) else self.allocate(self.CHUNK)
            room, self.free = rest.split([size, len(rest) - size])
        return room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def allocate(self, size: int) -> Tensor:
        """So many bytes that the system may back with huge pages."""
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)


huge_pages = HugePages()


def pack(weight: Tensor, grid: Tensor | None = None) -> tuple[Tensor, Tensor | None] | None:
    """Tiles of a stored weight, and its grid, as the operators take them; None where they cannot.

    The scheme is told by the dtypes: bf16 without a grid, int8 with scales, or int4 codes in uint8
    with scales and zeros, all stored as in linear.py. Of experts all have a leading dimension.
    """
    columns = weight.shape[-1] * (2 if weight.dtype == torch.uint8 else 1)
    dtype = weight.dtype if grid is None else grid.dtype
    fits = weight.device.type == "cpu" and dtype == torch.bfloat16 and columns % 4 == 0
    if weight.dtype == torch.uint8:
        fits = fits and columns % 8 == 0 and columns // grid.shape[-3] % 16 == 0
    if not fits or not load():
        return None
    if weight.dtype == torch.uint8:
        each = weight.dim() == 3
        pairs = zip(weight, grid, strict=True) if each else [(weight, grid)]
        codes, grids = zip(*(pack_int4(*pair) for pair in pairs), strict=True)
        tiles, grid = (torch.stack(x) if each else x[0] for x in (codes, grids))
        return huge_pages.hold(tiles), huge_pages.hold(grid)
    return huge_pages.hold(tile(weight, 2 if grid is None else 4)), grid


def tile(weight: Tensor, columns: int) -> Tensor:
    """Tiles `[…, out/32, in/columns, 32, columns]` of a weight `[…, out, in]`, zero-padded."""
    weight = F.pad(weight, (0, 0, 0, -weight.shape[-2] % 32))
    return weight.unflatten(-1, (-1, columns)).unflatten(-3, (-1, 32)).transpose(-3, -2)


def pack_int4(weight: Tensor, scales_and_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of a weight stored as in `linear.Int4Linear`, codes and grid as for `linear_int4`."""
    even, odd = weight >> 4, weight & 15  # columns
    codes = torch.stack((even[:, ::2] | even[:, 1::2] << 4, odd[:, ::2] | odd[:, 1::2] << 4), -1)
    codes = codes.view(len(weight), -1, 2, 2).transpose(2, 3).flatten(1)
    grid = F.pad(scales_and_zeros, (0, 0, 0, -len(weight) % 32)).unflatten(1, (-1, 32))
    return tile(codes, 4), grid.transpose(0, 1).contiguous()
