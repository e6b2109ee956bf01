"""Triton's interpreter, made right for what kernels_cuda.py does; import it before that file.

As it is (3.6, 3.7) it truncates float32 to bfloat16, takes an integer that becomes a bfloat16 for
its bits, multiplies the bits of bfloat16 in `tl.dot`, and knows no inline PTX.
"""

import os
import re

os.environ["TRITON_INTERPRET"] = "1"
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

convert, cast = interpreter._convert_float, InterpreterBuilder.cast_impl
floats_of = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def convert_float(data, source, target, rounding):
    if source == tl.bfloat16 and target == tl.float32:
        return data.view(np.uint16).astype(np.uint32) << 16
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.array(data, np.float32)).bfloat16()  # to nearest even
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return convert(data, source, target, rounding)


def cast_impl(self, source, target):
    if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
        source = cast(self, source, tl.float32)
    return cast(self, source, target)


def create_dot(self, a, b, sums, *_options):
    """Sums in float64, so that BLAS's order of summing does not show."""
    a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return TensorHandle((product + sums.data).astype(sums.data.dtype), sums.dtype.scalar)


def fma(a, b, c, dtype: torch.dtype):
    """a * b + c of 16-bit floats, two in a word, rounded once."""
    a, b, c = (torch.from_numpy(v.view(np.int16).copy()).view(dtype).double() for v in (a, b, c))
    return (a * b + c).to(dtype).view(torch.int16).numpy().view(np.uint32)


class Ptx:
    """The words that a block of inline PTX leaves in its outputs."""

    def __init__(self, code: str, constraints: str, values: list[TensorHandle]):
        outputs = constraints.count("=")
        words = [np.ascontiguousarray(value.data).view(np.uint32) for value in values]
        shape, registers = words[0].shape, {f"${outputs + i}": w for i, w in enumerate(words)}

        def read(name: str):
            value = registers[name] if name in registers else np.uint32(int(name, 0))
            return np.ascontiguousarray(np.broadcast_to(value, shape))

        for name, arguments in re.findall(
            r"([a-z][\w.]+) ([^;{}]+);", code.replace(".reg .b32", "reg")
        ):
            if name == "reg":
                continue
            to, *values = re.split(r",\s*", arguments)
            values = [read(value) for value in values]
            if name == "mov.b32":
                registers[to] = values[0]
            elif name == "shr.b32":
                registers[to] = values[0] >> values[1]
            elif name == "lop3.b32" and (values[3] == 0xEA).all():
                registers[to] = values[0] & values[1] | values[2]
            else:
                registers[to] = fma(*values, floats_of[name.removeprefix("fma.rn.")])
        self.results = [registers[f"${i}"].view(np.int32) for i in range(outputs)]

    def get_result(self, i: int) -> TensorHandle:
        return TensorHandle(self.results[i], tl.int32)


def create_inline_asm(self, code, constraints, values, _types, _pure, _pack):
    return Ptx(code, constraints, values)


interpreter._convert_float = convert_float
InterpreterBuilder.cast_impl = cast_impl
InterpreterBuilder.create_dot = create_dot
InterpreterBuilder.create_inline_asm = create_inline_asm
