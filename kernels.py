"""Matrix products and attention on CPUs with AVX-512, written for the few rows of decoding.

Decoding multiplies one row, or the few that speculation judges, with every weight of the model: all
that counts is that weights stream in from the first byte to the last, and that what is done to them
keeps up. So each weight is stored anew, once, after loading: in *tiles* of 32 rows, a few columns
at a time. For prefill, which multiplies many rows, tile by tile becomes bf16. Small models wait for
Python more than for memory: so `Transformer` below does all that `model.py`'s does, in one call.

The C++ wants the bf16 instructions of AVX-512 (Intel Cooper Lake, Sapphire Rapids and newer; AMD
Zen 4 and newer) and is built once, by the first process that needs it. Without them, without a
compiler or in other dtypes torch's own operations run.

Up to FEW_ROWS, what a row gives never depends on how many there are: all sums have one order.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 32  # up to here weights are decoded as they are multiplied; above, made floats once
SOURCE = Path(__file__).with_name("kernels.cpp")

FLAGS = f"-std=c++20 -O3 -fopenmp -DFEW_ROWS={FEW_ROWS} "
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
    """Make `torch.ops.tokenbus` ready, the first time by building it; whether that worked."""
    if not supported():
        return False
    what = "\n".join((SOURCE.read_text(), FLAGS, torch.__version__))
    default = Path.home() / ".cache" / "torch_extensions"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    library = folder / f"tokenbus_{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    try:
        if library.exists():
            torch.ops.load_library(library)
        else:
            build(library)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        advice = "g++ 10 or newer and the package ninja are needed"
        print(
            f"slower than it could be: no kernels for this CPU; {advice} ({reason})",
            file=sys.stderr,
        )
        return False
    shapes = {
        "linear": lambda x, weight, out: x.new_empty(len(x), out),
        "linear_int8": lambda x, weight, scales: x.new_empty(len(x), len(scales)),
        "linear_int8_activation": lambda x, weight, scales, peaks: x.new_empty(len(x), len(scales)),
        "linear_int4": lambda x, weight, grid, out: x.new_empty(len(x), out),
        "attend": lambda q, k, v, positions: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]),
    }
    for name, shape in shapes.items():
        torch.library.register_fake(f"tokenbus::{name}", shape)
    return True


def build(library: Path) -> None:
    """Compile the kernels and load them; other processes see a whole file or none."""
    from torch.utils import cpp_extension  # takes a while to import

    print("building kernels for this CPU, once ...", file=sys.stderr)
    places = (os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent))
    os.environ["PATH"] = os.pathsep.join(places)  # pip puts ninja beside Python
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        options = {"extra_cflags": FLAGS.split(), "build_directory": folder}
        cpp_extension.load(library.stem, str(SOURCE), is_python_module=False, **options)
        os.replace(Path(folder) / library.name, library)


def fuse(model: nn.Module) -> Callable | None:
    """What runs all of a prepared model with its caches in one call, if it can.

    It cannot where a module listens: the collectives of tensor parallelism are hooks.
    """
    linears = [module for module in model.modules() if hasattr(module, "tiles")]
    packed = all(linear.tiles is not None for linear in linears)
    if not (model.attends and packed) or any(m._forward_hooks for m in model.modules()):
        return None
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    fused = torch.classes.tokenbus.Transformer(tensors, len(model.layers), model.args.norm_eps)
    return lambda idx, input_pos, kv_len, last=None: fused.forward(idx, input_pos, last)


def pack(weight: Tensor, columns: int) -> Tensor:
    """Tiles `[out/32, in/columns, 32, columns]` of a weight `[out, in]`, padded with zeros."""
    weight = F.pad(weight, (0, 0, 0, -len(weight) % 32))
    return weight.view(-1, 32, weight.shape[1] // columns, columns).transpose(1, 2).contiguous()


def pack_int4(weight: Tensor, scales_and_zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles of a weight stored as in `linear.Int4Linear`, codes and grid as for `linear_int4`."""
    even, odd = weight >> 4, weight & 15  # columns
    codes = torch.stack((even[:, ::2] | even[:, 1::2] << 4, odd[:, ::2] | odd[:, 1::2] << 4), -1)
    codes = codes.view(len(weight), -1, 2, 2).transpose(2, 3).flatten(1)
    grid = F.pad(scales_and_zeros, (0, 0, 0, -len(weight) % 32)).unflatten(1, (-1, 32))
    return pack(codes, 4), grid.transpose(0, 1).contiguous()
