"""Named ranges for the profiler: which part of the model is at work, in a trace of a generation.

A trace without them tells kernels apart and not layers. `traced` makes `generate.py --profile` and
`profiler_scripts/` record a range for each step, module and function that matters. Its name is

    tokenbus: Linear int4 layers.0.attention.wqkv 345600 B

that is: what it is, how its weight is stored (- if it has none), which one it is, and the bytes it
has to read from memory (0 if they do not matter). Nothing here runs unless a profile was asked for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from engine import Engine, generate
from linear import Int4Linear, Int8ActivationLinear, Int8Linear, Linear
from model import Attention, Mask, RMSNorm, Transformer

MARK = "tokenbus:"
SCHEME_NAMES = {Int8Linear: "int8", Int8ActivationLinear: "int8-activation", Int4Linear: "int4"}
FLOAT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Patch = tuple[dict, str, Callable, "str | Callable[..., str]"]


def scheme_of(linear: Linear) -> str:
    """How a Linear's weight is stored: bf16 (fp16, fp32), int8, int8-activation or int4."""
    return SCHEME_NAMES.get(type(linear)) or FLOAT_NAMES[linear.weight.dtype]


def title(kind: str, scheme: str = "-", name: str = "-", size: int = 0) -> str:
    """The name of a range."""
    return f"{MARK} {kind} {scheme} {name} {size} B"


def in_range(function: Callable, label: str | Callable[..., str]) -> Callable:
    """The function inside a range of this name, which may depend on the arguments."""

    @functools.wraps(function)
    def inside(*args, **kwargs):
        name = label if isinstance(label, str) else label(*args)
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return inside


@contextlib.contextmanager
def in_ranges(places: list[Patch]) -> Iterator[None]:
    """Put functions into ranges for a while: `(namespace, name in it, function, range's name)`."""
    before = [(space, key, space.get(key)) for space, key, _, _ in places]
    for space, key, function, label in places:
        space[key] = in_range(function, label)
    try:
        yield
    finally:
        for space, key, function in before:
            if function is None:  # a method, found in its class again
                del space[key]
            else:
                space[key] = function


def module_places(model: Transformer) -> dict[str, Patch]:
    """The modules that get a range of their own, by name."""
    places = {}
    for name, module in model.named_modules():
        label = None
        if isinstance(module, Linear):
            size = sum(tensor.nbytes for tensor in module.parameters())
            label = title("Linear", scheme_of(module), name, size)
        elif isinstance(module, Attention):
            label = functools.partial(attention_title, module, name)
        elif isinstance(module, RMSNorm | nn.Embedding):
            label = title("Norm" if isinstance(module, RMSNorm) else "Embedding", name=name)
        if label:
            places[name] = (module.__dict__, "forward", module.forward, label)
    return places


def attention_title(
    attention: Attention,
    name: str,
    x: Tensor,
    input_pos: Tensor,
    mask: Mask | None,
    prefill: bool,
) -> str:
    """The range of one call of attention: its bytes are the cached positions it looks at."""
    length = int(input_pos.max()) + 1 if mask is None else mask.hidden.shape[-1]
    read = attention.kv_cache.k_cache[:, :, :length]
    return title("Attention", name=name, size=2 * read.nbytes)


def wrapped_steps(engine: Engine) -> Iterator[tuple[str, Callable]]:
    """The two steps of an Engine, by name, in their ranges."""
    inner = module_places(engine.model)
    outer = [place for name, place in inner.items() if not name.startswith("layers.")]
    rope = (Attention.attend.__globals__, "apply_rotary_emb")
    eager = [*inner.values(), (*rope, rope[0][rope[1]], title("RoPE", name=rope[1]))]

    def step(kind: str, function: Callable) -> Callable:
        function = engine.model if function is engine.fused else function
        block_only = isinstance(function, functools.partial)
        places = eager if function is engine.model else outer if block_only else []
        ranged = in_range(function, title(kind))

        def run(*args, **kwargs):
            with in_ranges(places):
                return ranged(*args, **kwargs)

        return run

    yield "prefill_step", step("Prefill", engine.prefill_step)
    yield "decode_step", step("Decode", engine.uncaptured_step)


@contextlib.contextmanager
def traced(engine: Engine) -> Iterator[None]:
    """Have a profile of this Engine say what belongs to what.

    Compiled code is left as it was compiled: ranges put into it would compile it anew. So those
    inside a step exist only while a step runs that is not compiled, and with one compiled block
    those outside of the blocks. A fused model runs by its modules meanwhile, and nothing is
    captured: nothing shows inside a kernel or a CUDA graph.
    """
    before, namespace = (engine.prefill_step, engine.decode_step), generate.__globals__
    sampling = (namespace, "sample", namespace["sample"], title("Sampling", name="sample"))
    try:
        for name, step in [*wrapped_steps(engine)]:
            setattr(engine, name, step)
        with in_ranges([sampling]):
            yield
    finally:
        engine.prefill_step, engine.decode_step = before
