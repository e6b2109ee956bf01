"""Rounds a weight to the codes and the grid that a checkpoint stores (see linear.py).

int8 has one scale for each row. int4 has a scale and a zero for each group of neighbouring columns;
their choice decides the loss, so `find_grid` searches for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linear import pack_int4

STARTS, REFITS = 13, 2  # candidate ranges of a group, and refits of the best grid


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight `[out, in]` to symmetric per-row int8: codes and bf16 scales `[out]`."""
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-10).bfloat16()
    codes = (weight / scales.float().unsqueeze(1)).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def find_grid(groups: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and zero `[n]` that round groups `[n, g]` to 4 bits with the least weighted error.

    Candidate grids span 1.0 down to 0.5 times a group's range: clipping the extremes often costs
    less than a finer grid gains. Each is refitted to its codes by weighted least squares, and the
    best one again. `weights` `[g]` or `[n, g]` weigh the squared errors: by the mean squared input
    of each column if inputs are known. By default they are x² + mean x² of the group's own x, as
    large weights matter more to the outputs of a trained network than their count suggests. Scale
    and zero are bf16 values, as stored.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    center = (low + high) / 2
    x = groups - center  # without centering, the sums below cancel
    if weights is None:
        weights = groups.square()
        weights = weights + weights.mean(1, keepdim=True)
    weights = weights / weights.mean(-1, keepdim=True).clamp(min=1e-30) + 1e-6
    w = weights.expand_as(x)
    wx = w * x
    total, sum_x, sum_xx = (part.sum(1, keepdim=True) for part in (w, wx, wx * x))
    best = [torch.full_like(low, float("inf")), torch.ones_like(low), center]

    def refit(scale: Tensor, zero: Tensor) -> None:
        """Fit a grid to the codes of this one; keep it where it is the best so far."""
        codes = ((groups - zero) / scale).round_().clamp_(-8, 7)
        wc = w * codes
        sum_c, sum_cc = wc.sum(1, keepdim=True), (wc * codes).sum(1, keepdim=True)
        sum_cx = wc.mul_(x).sum(1, keepdim=True)
        slope = (sum_cx - sum_c * sum_x / total) / (sum_cc - sum_c * sum_c / total)
        scale = torch.where((slope > 0) & slope.isfinite(), slope, scale).bfloat16().float()
        zero = center + (sum_x - scale * sum_c) / total
        zero = torch.where(zero.abs() < 1e-5 * scale, 0.0, zero).bfloat16().float()  # of float32
        z = zero - center
        error = sum_xx - 2 * scale * sum_cx - 2 * z * sum_x
        error = error + scale * scale * sum_cc + 2 * scale * z * sum_c + z * z * total
        better = error < best[0]
        for place, value in enumerate((error, scale, zero)):
            best[place] = torch.where(better, value, best[place])

    for share in torch.linspace(1.0, 0.5, STARTS).tolist():
        scale = ((high - low) * share / 15).clamp(min=1e-10)
        refit(scale, center + scale / 2)  # the value of code 8
    for _ in range(REFITS):
        refit(*best[1:])
    return best[1].squeeze(1), best[2].squeeze(1)


def quantize_int4(
    weight: Tensor, groupsize: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round weight `[out, in]` to 4 bits by group: the two tensors of an `Int4Linear`.

    `weights` `[in]` weigh squared errors as in `find_grid`.
    """
    codes, grids = [], []
    for part in weight.float().split(max(1, 2**18 // weight.shape[1])):  # fits the CPU's caches
        groups = part.reshape(-1, groupsize)
        own = None if weights is None else weights.view(-1, groupsize).repeat(len(part), 1)
        scale, zero = find_grid(groups, own)
        steps = ((groups - zero.unsqueeze(1)) / scale.unsqueeze(1)).round().clamp(-8, 7)
        codes.append((steps + 8).to(torch.uint8).view(part.shape))
        grids.append(torch.stack((scale, zero), -1).view(len(part), -1, 2).bfloat16())
    return pack_int4(torch.cat(codes)), torch.cat(grids).transpose(0, 1).contiguous()
