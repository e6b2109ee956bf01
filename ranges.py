"""Named ranges for the profiler: which part of the model is at work, in a trace of a generation.

A trace without them tells kernels apart and not layers. `traced` makes `generate.py --profile` and
`profiler_scripts/` record a range for each step and each module that matters. Its name is

    tokenbus: Linear int4 layers.0.attention.wqkv 345600 B

that is: its kind, how its weight is stored (- if it has none), its name, and the bytes it reads
from memory (0 if they do not matter). Nothing here runs unless a profile was asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.profiler import record_function

from engine import Engine
from linear import Int4Linear, Int8ActivationLinear, Int8Linear, Linear
from model import Attention, RMSNorm, RotaryEmbedding

MARK = "tokenbus:"
SCHEME_NAMES = {Int8Linear: "int8", Int8ActivationLinear: "int8-activation", Int4Linear: "int4"}
FLOAT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KINDS = {Linear: "Linear", Attention: "Attention", RMSNorm: "Norm", RotaryEmbedding: "RoPE"}
KINDS |= {nn.Embedding: "Embedding"}  # the modules that get a range, subclasses included


def scheme_of(linear: Linear) -> str:
    """How a Linear's weight is stored: bf16 (fp16, fp32), int8, int8-activation or int4."""
    return SCHEME_NAMES.get(type(linear)) or FLOAT_NAMES[linear.weight.dtype]


def title(kind: str, scheme: str = "-", name: str = "-", size: int = 0) -> str:
    """The name of a range."""
    return f"{MARK} {kind} {scheme} {name} {size} B"


def title_of(module: nn.Module, kind: str, name: str, inputs: tuple) -> str:
    """The range of one call; attention reads the cached positions that it sees."""
    if isinstance(module, Linear):
        size = sum(tensor.nbytes for tensor in module.parameters())
        return title(kind, scheme_of(module), name, size)
    if not isinstance(module, Attention):
        return title(kind, name=name)
    input_pos, mask = inputs[1:3]
    length = int(input_pos.max()) + 1 if mask is None else mask.hidden.shape[-1]
    return title(kind, name=name, size=2 * module.kv_cache.k_cache[:, :, :length].nbytes)


@contextlib.contextmanager
def module_ranges(model: nn.Module) -> Iterator[None]:
    """Put every module of `KINDS` into a range, by hooks.

    Compiled code never sees them: Dynamo does not guard on hooks, and compiles them to nothing.
    """
    opened, handles = [], []

    def enter(kind: str, name: str, module: nn.Module, inputs: tuple) -> None:
        if not torch.compiler.is_compiling():
            opened.append(record_function(title_of(module, kind, name, inputs)))
            opened[-1].__enter__()

    def leave(*_) -> None:
        if not torch.compiler.is_compiling():
            opened.pop().__exit__(None, None, None)

    # A range ends before the collectives of tp.py begin, and also if its module raises.
    options = {"prepend": True, "always_call": True}
    for name, module in model.named_modules():
        for kind in (kind for base, kind in KINDS.items() if isinstance(module, base)):
            begin = functools.partial(enter, kind, name)
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(leave, **options))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_range(name: str, function: Callable) -> Callable:
    """The function inside a range of this name."""

    def inside(*inputs):
        with record_function(name):
            return function(*inputs)

    return inside


@contextlib.contextmanager
def traced(engine: Engine) -> Iterator[None]:
    """Have a profile of this Engine say what belongs to what.

    Compiled code has no ranges inside. A fused model runs by its modules meanwhile, and nothing is
    captured: nothing shows inside a kernel or a CUDA graph.
    """
    before = engine.prefill_step, engine.decode_step, engine.sample
    steps = (engine.prefill_step, engine.uncaptured_step)
    prefill, decode = (engine.model if step is engine.fused else step for step in steps)
    engine.prefill_step = in_range(title("Prefill"), prefill)
    engine.decode_step = in_range(title("Decode"), decode)
    engine.sample = in_range(title("Sampling", name="sample"), engine.sample)
    try:
        with module_ranges(engine.model):
            yield
    finally:
        engine.prefill_step, engine.decode_step, engine.sample = before
