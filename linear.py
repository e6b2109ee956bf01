"""The Linear layer of every model here: how a weight is stored, and how it is multiplied.

A checkpoint stores each Linear in one of four ways, told by the names of its tensors (`SCHEMES`).
The stored layout is plain and the same for every device; `pack_weights` makes what a kernel wants
of it once, after loading. Without a kernel, PyTorch's own operations multiply. `dequantize` is the
reference that every kernel is tested against.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import optional

FEW_ROWS = 32  # of x: at most so many tokens are verified at once, more are a prefill
TORCH_GROUPS = (32, 64, 128, 256)  # group sizes that PyTorch's own int4 operations take
aten = torch.ops.aten


@functools.cache
def kernels_for(device: str) -> ModuleType | None:
    """The file with this project's operators for a type of device; None where PyTorch's own run."""
    name = {"cpu": "kernels", "cuda": "kernels_cuda"}.get(device)
    return optional(name, "build_cpp", "operators", "matmul_cuda", "triton") if name else None


class Linear(nn.Module):
    """`y = x @ weight.T + bias`: x `[..., in]`, weight float `[out, in]`.

    With `experts`, every stored tensor has a leading dimension; mixture.py does the matmuls.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, experts: int = 0):
        super().__init__()
        self.in_features, self.out_features, self.experts = in_features, out_features, experts
        self.declare("weight", torch.get_default_dtype(), out_features, in_features)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        # The weight and its scales as the operators of this device take them.
        self.register_buffer("tiles", None, persistent=False)
        self.register_buffer("grid", None, persistent=False)

    def declare(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        """Declare a tensor of the checkpoint."""
        shape = (self.experts, *shape) if self.experts else shape
        setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def pack_weights(self, grid: Tensor | None = None) -> None:
        """Pack the weight for this device's operators; it must not change afterwards."""
        kernels = kernels_for(self.weight.device.type)
        packed = kernels.pack(self.weight.data, grid) if kernels else None
        self.tiles, self.grid = packed or (None, None)

    def stored(self, name: str, chosen: Tensor | None = None) -> Tensor:
        """A tensor of the checkpoint; with `chosen`, only that of these experts."""
        tensor = getattr(self, name)
        return tensor if chosen is None else tensor[chosen]

    def dequantize(self, chosen: Tensor | None = None) -> Tensor:
        """The weight as floats `[out, in]`, of `chosen` experts `[n, out, in]`."""
        return self.stored("weight", chosen)

    def forward(self, x: Tensor, prefill: bool = False) -> Tensor:
        """Kernels use one arithmetic for a `prefill` and one for decoding, for any number of rows:
        so a row's bits never depend on the rows beside it."""
        y = self.matmul(x.flatten(0, -2), prefill).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias

    def matmul(self, x: Tensor, prefill: bool) -> Tensor:
        """x `[M, in]` times the weight: `[M, out]`."""
        if self.tiles is not None:
            return torch.ops.tokenbus.linear_bf16(x, self.tiles, self.out_features, prefill)
        return F.linear(x, self.weight)


class Int8Linear(Linear):
    """Weight int8 `[out, in]`, scales `[out]`: value = weight * scale."""

    scales_name = "scales"

    def __init__(self, in_features: int, out_features: int, bias: bool = False, experts: int = 0):
        super().__init__(in_features, out_features, bias, experts)
        self.declare("weight", torch.int8, out_features, in_features)
        self.declare(self.scales_name, torch.bfloat16, out_features)

    def pack_weights(self) -> None:
        super().pack_weights(getattr(self, self.scales_name).data)

    def dequantize(self, chosen: Tensor | None = None) -> Tensor:
        scales = self.stored(self.scales_name, chosen)
        return self.stored("weight", chosen).to(scales.dtype) * scales.unsqueeze(-1)

    def matmul(self, x: Tensor, prefill: bool) -> Tensor:
        if self.tiles is not None:
            return torch.ops.tokenbus.linear_int8(x, self.tiles, self.grid, prefill)
        # The operation reads beyond rows whose width is no multiple of 16.
        if x.device.type == "cpu" and len(x) <= FEW_ROWS and self.in_features % 16 == 0:
            return torch._weight_int8pack_mm(x, self.weight, self.scales)
        return F.linear(x, self.weight.to(x.dtype)) * self.scales


class Int8ActivationLinear(Int8Linear):
    """Stored as in `Int8Linear`; x is rounded to int8, row by row, and integers are multiplied."""

    scales_name = "scales_a8"

    def __init__(self, in_features: int, out_features: int, bias: bool = False, experts: int = 0):
        super().__init__(in_features, out_features, bias, experts)
        self.peak = nn.Identity()  # where tp.py asks for the maximum of all ranks' columns

    def matmul(self, x: Tensor, prefill: bool) -> Tensor:
        peaks = self.peak(x.abs().amax(-1, keepdim=True).float())  # [M, 1]
        if self.tiles is not None:
            return torch.ops.tokenbus.linear_int8_activation(x, self.tiles, self.grid, peaks)
        step = peaks.clamp(min=1e-12) / 127
        codes = (x.float() / step).round().to(torch.int8)
        cpu = x.device.type == "cpu"
        y = torch._int_mm(codes, self.weight.t()) if cpu else int_matmul(codes, self.weight)
        return (y * step * self.scales_a8.float()).to(x.dtype)


class Int4Linear(Linear):
    """Two 4-bit codes a byte; `groups` of neighbouring columns have a scale and a zero each.

    weight uint8 `[out, in/2]` as `pack_int4` makes it, scales_and_zeros `[groups, out, 2]`:
    value = (code - 8) * scale + zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        experts: int = 0,
        groups: int = 1,
    ):
        super().__init__(in_features, out_features, bias, experts)
        self.groupsize = in_features // groups
        self.declare("weight", torch.uint8, out_features, in_features // 2)
        self.declare("scales_and_zeros", torch.bfloat16, groups, out_features, 2)
        self.register_buffer("packed", None, persistent=False)  # the weight as torch's ops want it

    def pack_weights(self) -> None:
        super().pack_weights(self.scales_and_zeros.data)
        fits = self.out_features % 16 == 0 and self.groupsize in TORCH_GROUPS
        if self.tiles is None and self.packed is None and fits and self.weight.device.type == "cpu":
            convert, weights = aten._convert_weight_to_int4pack_for_cpu, self.weight.data
            weights = weights if self.experts else weights[None]
            each = [convert(unpack_int4(w).int(), 1) for w in weights]
            self.packed = torch.stack(each) if self.experts else each[0]

    def dequantize(self, chosen: Tensor | None = None) -> Tensor:
        grid = self.stored("scales_and_zeros", chosen)
        grid = grid.transpose(-3, -2).unsqueeze(-2)  # [out, groups, 1, 2]
        codes = unpack_int4(self.stored("weight", chosen)).unflatten(-1, (-1, self.groupsize))
        return ((codes.to(grid.dtype) - 8) * grid[..., 0] + grid[..., 1]).flatten(-2)

    def matmul(self, x: Tensor, prefill: bool) -> Tensor:
        if self.tiles is not None:
            out = self.out_features
            return torch.ops.tokenbus.linear_int4(x, self.tiles, self.grid, out, prefill)
        if self.packed is None or len(x) > FEW_ROWS:
            return F.linear(x, self.dequantize())
        grid = self.scales_and_zeros
        return aten._weight_int4pack_mm_for_cpu(x, self.packed, self.groupsize, grid)


def int_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8 x `[M, in]` times int8 weight `[out, in]`, exactly, on a device that has only floats."""
    pairs = zip(x.float().split(1024, -1), weight.float().split(1024, -1), strict=True)
    return sum((a @ b.mT).int() for a, b in pairs)  # a sum of 1024 products fits float32


def pack_int4(codes: Tensor) -> Tensor:
    """Codes uint8 0..15 `[out, in]` -> `[out, in/2]`, even columns in the high halves."""
    return codes[:, ::2] << 4 | codes[:, 1::2]


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)


SCHEMES = {"scales": Int8Linear, "scales_a8": Int8ActivationLinear, "scales_and_zeros": Int4Linear}


def linear_for(linear: Linear, tensors: dict[str, Tensor]) -> Linear:
    """The Linear, on the same device and of the same shape, that takes these stored tensors."""
    options = dict(bias=linear.bias is not None, experts=linear.experts)
    scheme = next((scheme for name, scheme in SCHEMES.items() if name in tensors), None)
    if scheme is Int4Linear and linear.in_features % 2:  # codes are in pairs
        return linear  # which they do not fit
    if scheme is Int4Linear:
        groups = (*tensors["scales_and_zeros"].shape[-3:], 0)[0]
        options["groups"] = groups if groups and linear.in_features % groups == 0 else 1
    with linear.weight.device:
        return scheme(linear.in_features, linear.out_features, **options) if scheme else linear
