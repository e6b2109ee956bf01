"""Dequantizes published fp8 weights: float8_e4m3fn values, and a scale for each block.

The scales of `x.weight` are `x.weight_scale_inv`; `weight_block_size` in config.json gives the rows
and columns of a block, as in DeepSeek-V3 (https://huggingface.co/deepseek-ai/DeepSeek-V3).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import UserError
from keys import MAX_SIZE, Keys


def find_block(config: Keys) -> tuple[int, int] | None:
    """Rows and columns of a block of fp8 weights with one scale; None if weights are not quantized.

    UserError on any other quantization.
    """
    if not config.has("quantization_config"):
        return None
    keys = config.section("quantization_config")
    advice = "download the original model"
    if keys.get("quant_method", "") != "fp8":
        raise keys.refusal("quant_method", "and of quantized weights only fp8 is read", advice)
    size = keys.get("weight_block_size", [])
    counts = isinstance(size, list) and all(type(n) is int and 1 <= n <= MAX_SIZE for n in size)
    if not counts or len(size) != 2:
        raise keys.refusal("weight_block_size", "not rows and columns of a block", advice)
    return tuple(size)


def take_scales(
    where: Path, found: dict[str, tuple], shapes: dict[str, tuple], block: tuple[int, int]
) -> list[str]:
    """Remove the scales from the shapes `found`; return the names of their matrices."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    scaled = [name for name in matrices if f"{name}_scale_inv" in found]
    for name in scaled:
        shape = found.pop(f"{name}_scale_inv")
        expected = [-(-n // size) for n, size in zip(shapes[name], block, strict=True)]
        if [*shape] != expected:
            raise UserError(
                f"{where}: {name}_scale_inv is {[*shape]}, and blocks of {[*block]} ask for "
                f"{expected}; fetch the files again"
            )
    return scaled


def dequantize(
    weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Multiply fp8 weight `[out, in]` by the scales of its blocks, rounding once to `dtype`."""
    rows, columns = block
    result = torch.empty(weight.shape, dtype=dtype)
    for i, scale in enumerate(scales.float()):  # [in / columns]
        part = slice(i * rows, (i + 1) * rows)
        result[part] = weight[part].float() * scale.repeat_interleave(columns)[: weight.shape[1]]
    return result
