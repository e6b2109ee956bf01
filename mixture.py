"""A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538) in place of a layer's FFN.

A router scores all experts, and each token goes through the few with the highest scores. Where the
kernels allow, one operator runs all chosen experts of a layer and reads no others. Otherwise tokens
are sorted by expert, or, in compiled code and where the host must not wait for the device, the
chosen experts' weights are gathered.

The experts of a layer are stacked in one tensor of each name, `[experts, ...]`, in any scheme of
linear.py. Shapes: N tokens, E experts, k of them chosen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear import Int8ActivationLinear, Linear, int_matmul, kernels_for


def one_expert(linear: Linear, expert: int) -> Linear:
    """The Linear of one expert, a view of the stack."""
    part = copy.copy(linear)
    part._parameters = {
        name: None if tensor is None else tensor[expert]
        for name, tensor in linear._parameters.items()
    }
    part._buffers = {
        name: None if tensor is None else tensor[expert] for name, tensor in linear._buffers.items()
    }
    part.experts, part.expert = 0, expert
    return part


def multiply_chosen(linear: Linear, x: Tensor, chosen: Tensor) -> Tensor:
    """Multiply row i of x `[n, in]` by the weight of expert chosen[i]: `[n, out]`."""
    if isinstance(linear, Int8ActivationLinear):
        step = linear.peak(x.abs().amax(-1, keepdim=True).float()).clamp(min=1e-12) / 127
        codes = (x.float() / step).round().to(torch.int8).unsqueeze(1)  # [n, 1, in]
        y = int_matmul(codes, linear.stored("weight", chosen)).squeeze(1)
        return (y * step * linear.stored("scales_a8", chosen).float()).to(x.dtype)
    weight = linear.dequantize(chosen).to(x.dtype)  # [n, out, in]
    return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)


class Router(nn.Module):
    """Chooses experts and their routing weights (`shares`), in float32; it is never quantized."""

    def __init__(self, dim: int, options: Any):
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(options.experts, dim))
        self.bias = nn.Parameter(torch.empty(options.experts)) if options.biased else None
        self.register_buffer("tiles", None, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        """Keep the bias in float32 in any model dtype: rounding it would change the choice."""
        before = None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if before is not None:
            device = self.weight.device
            kept = torch.empty(before.shape, device=device) if before.is_meta else before.to(device)
            self.bias = nn.Parameter(kept.float(), requires_grad=False)
        return self

    def pack_weights(self) -> None:
        """Pack a bf16 weight for this device's operators."""
        kernels = kernels_for(self.weight.device.type)
        packed = kernels.pack(self.weight.data) if kernels else None
        self.tiles = packed[0] if packed else None

    def forward(self, x: Tensor, prefill: bool) -> tuple[Tensor, Tensor]:
        """The chosen experts of each row of x `[N, dim]`, and their shares: `[N, k]` each."""
        options, weight, rows = self.options, self.weight, x.float()
        if self.tiles is not None:
            logits = torch.ops.tokenbus.linear_float32(x, self.tiles, options.experts)  # [N, E]
        elif prefill:
            logits = F.linear(rows, weight.float())
        else:  # row by row: the choice must not depend on the batch
            weight = weight.float().expand(len(x), -1, -1)
            logits = torch.bmm(weight, rows.unsqueeze(-1)).squeeze(-1)
        scores = logits.sigmoid() if options.score == "sigmoid" else logits.softmax(-1)
        chosen = (scores if self.bias is None else scores + self.bias).topk(options.chosen).indices
        shares = scores.gather(-1, chosen)
        if options.renormalize:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return chosen, shares * options.factor


class MixtureOfExperts(nn.Module):
    """A SwiGLU FFN for each expert, and `shared`, one for all tokens, if there is one.

    `options` is a `model.Mixture`.
    """

    def __init__(self, dim: int, options: Any, act: Callable, shared: nn.Module | None):
        super().__init__()
        self.act, self.shared, self.router = act, shared, Router(dim, options)
        self.shared_gate = nn.Linear(dim, 1, bias=False) if options.shared_gate else None
        self.w1 = Linear(dim, options.width, experts=options.experts)
        self.w3 = Linear(dim, options.width, experts=options.experts)
        self.w2 = Linear(options.width, dim, experts=options.experts)

    def hooked(self) -> bool:
        """Whether the experts' Linears have hooks: collectives, or a profile."""
        linears = self.w1, self.w3, self.w2
        parts = (*linears, *(linear.peak for linear in linears if hasattr(linear, "peak")))
        return any(part._forward_hooks or part._forward_pre_hooks for part in parts)

    def has_operator(self, prefill: bool, gpu: bool) -> bool:
        """Whether one operator can run all chosen experts.

        On a GPU it only decodes, and w1 and w3 must be stored alike.
        """
        linears = self.w1, self.w3, self.w2
        a8 = {isinstance(linear, Int8ActivationLinear) for linear in linears}
        fits = self.act is F.silu and len(a8) == 1 and not self.hooked()
        if gpu:
            kinds = {(w.weight.dtype, getattr(w.grid, "shape", None)) for w in linears[:2]}
            fits = fits and not prefill and len(kinds) == 1
        return fits and all(linear.tiles is not None for linear in linears)

    def forward(self, x: Tensor, prefill: bool) -> Tensor:
        rows = x.flatten(0, -2)  # [N, dim]
        chosen, shares = self.router(rows, prefill)
        # The host may wait on a CPU, and in a profile, whose hooks need the experts' Linears.
        waits = x.device.type == "cpu" or bool(self.w1._forward_hooks)
        waits = waits and not torch.compiler.is_compiling()
        if self.has_operator(prefill, x.is_cuda):
            y = self.by_operator(rows, chosen, shares, prefill)
        elif prefill or waits:
            y = self.by_expert(rows, chosen, shares, prefill)
        else:
            y = self.by_row(rows, chosen, shares)
        y = y.type_as(x).view_as(x)
        return y if self.shared is None else y + self.shared_output(x, prefill)

    def shared_output(self, x: Tensor, prefill: bool) -> Tensor:
        y = self.shared(x, prefill)
        return y if self.shared_gate is None else y * self.shared_gate(x).sigmoid()

    def by_operator(self, x: Tensor, chosen: Tensor, shares: Tensor, prefill: bool) -> Tensor:
        """The weighted sum of each row's experts, in order of expert index: float32 `[N, dim]`."""
        linears = self.w1, self.w3, self.w2
        packed = [tensor for linear in linears for tensor in (linear.tiles, linear.grid)]
        a8 = isinstance(self.w2, Int8ActivationLinear)
        return torch.ops.tokenbus.experts(x, chosen, shares, *packed, a8, prefill)

    def by_expert(self, x: Tensor, chosen: Tensor, shares: Tensor, prefill: bool) -> Tensor:
        """The same, one expert at a time with all its tokens."""
        chosen, shares = chosen.flatten(), shares.flatten()  # [N * k]
        order = chosen.argsort(stable=True)
        experts, counts = chosen.unique(return_counts=True)
        y = torch.zeros_like(x, dtype=torch.float32)
        for i, places in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
            rows = places // self.router.options.chosen
            w1, w3, w2 = (one_expert(linear, i) for linear in (self.w1, self.w3, self.w2))
            h = self.act(w1(x[rows], prefill)) * w3(x[rows], prefill)
            y.index_add_(0, rows, w2(h, prefill).float() * shares[places, None])
        return y

    def by_row(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The same for few tokens, without a sync to learn which experts they chose."""
        experts, x = chosen.flatten(), x.repeat_interleave(chosen.shape[1], 0)  # [N * k, dim]
        h = self.act(multiply_chosen(self.w1, x, experts)) * multiply_chosen(self.w3, x, experts)
        y = multiply_chosen(self.w2, h, experts).float() * shares.view(-1, 1)
        return y.unflatten(0, chosen.shape).sum(1)
