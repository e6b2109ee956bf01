"""A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538) in place of a layer's FFN.

A router scores all experts, and each token goes through the few with the highest scores. Nothing
else is read: one operator runs the chosen experts where this device has it. Elsewhere a prefill
sorts its tokens by expert, and so does decoding on a CPU; what must not wait for the device or is
compiled takes the chosen experts' weights by their numbers.

The experts of a layer are stored as one tensor of each name with a leading dimension
`[experts, ...]`, in any scheme of linear.py. Shapes: N tokens, E experts, k of them chosen.
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
    """The Linear of one expert, on the memory of all."""
    part = copy.copy(linear)
    part._parameters = {
        name: None if tensor is None else tensor[expert]
        for name, tensor in linear._parameters.items()
    }
    part._buffers, part.experts, part.expert = dict(linear._buffers), 0, expert
    return part


def multiply_chosen(linear: Linear, x: Tensor, chosen: Tensor) -> Tensor:
    """Row i of x `[n, in]` times the weight of expert chosen[i]: `[n, out]`."""
    if isinstance(linear, Int8ActivationLinear):
        step = linear.peak(x.abs().amax(-1, keepdim=True).float()).clamp(min=1e-12) / 127
        codes = (x.float() / step).round().to(torch.int8).unsqueeze(1)  # [n, 1, in]
        y = int_matmul(codes, linear.stored("weight", chosen)).squeeze(1)
        return (y * step * linear.stored("scales_a8", chosen).float()).to(x.dtype)
    weight = linear.dequantize(chosen).to(x.dtype)  # [n, out, in]
    return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)


class Router(nn.Module):
    """Chooses experts and their shares, in float32; it is never quantized."""

    def __init__(self, dim: int, options: Any):
        super().__init__()
        self.options = options
        self.weight = nn.Parameter(torch.empty(options.experts, dim))
        self.bias = nn.Parameter(torch.empty(options.experts)) if options.biased else None

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        """Keep the bias in float32 when the model goes to another dtype: its digits decide."""
        before = None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if before is not None:
            device = self.weight.device
            kept = torch.empty(before.shape, device=device) if before.is_meta else before.to(device)
            self.bias = nn.Parameter(kept.float(), requires_grad=False)
        return self

    def forward(self, x: Tensor, prefill: bool) -> tuple[Tensor, Tensor]:
        """The experts of each row of x `[N, dim]`, and what each adds its share of: `[N, k]`."""
        options, weight, rows = self.options, self.weight.float(), x.float()
        if prefill:
            logits = F.linear(rows, weight)  # [N, E]
        else:  # each row by itself, so that no choice depends on the rows beside it
            logits = torch.bmm(weight.expand(len(x), -1, -1), rows.unsqueeze(-1)).squeeze(-1)
        scores = logits.sigmoid() if options.score == "sigmoid" else logits.softmax(-1)
        chosen = (scores if self.bias is None else scores + self.bias).topk(options.chosen).indices
        shares = scores.gather(-1, chosen)
        if options.renormalize:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        return chosen, shares * options.factor


class MixtureOfExperts(nn.Module):
    """The FFNs of all experts, SwiGLU each, and one that every token goes through, if any.

    `options` are a `model.Mixture`.
    """

    def __init__(self, dim: int, options: Any, act: Callable, shared: nn.Module | None):
        super().__init__()
        self.act, self.shared, self.router = act, shared, Router(dim, options)
        self.shared_gate = nn.Linear(dim, 1, bias=False) if options.shared_gate else None
        self.w1 = Linear(dim, options.width, experts=options.experts)
        self.w3 = Linear(dim, options.width, experts=options.experts)
        self.w2 = Linear(options.width, dim, experts=options.experts)
        self.packed: list[tuple[Linear, ...]] | None = None  # each expert's, for this device
        self.stacks: list[Tensor | None] = []  # all experts' weights and grids, for the operator

    def expert(self, i: int) -> tuple[Linear, ...]:
        """w1, w3 and w2 of one expert."""
        if self.packed:
            return self.packed[i]
        return tuple(one_expert(linear, i) for linear in (self.w1, self.w3, self.w2))

    def pack_weights(self) -> None:
        """Pack each expert's weights for this device's operators; they must not change then."""
        if self.packed is None:
            self.packed = [self.expert(i) for i in range(self.w1.experts)]
            for linear in (linear for expert in self.packed for linear in expert):
                linear.pack_weights()
            self.stacks = self.pack_stacks()

    def pack_stacks(self) -> list[Tensor | None]:
        """w1, w3 and w2 with their grids, as the operator takes them; none where it does not."""
        linears, kernels = (self.w1, self.w3, self.w2), kernels_for(self.w1.weight.device.type)
        stored = [[p.data for p in linear.parameters()] for linear in linears]
        kinds = [[(tensor.dtype, tensor.shape) for tensor in tensors] for tensors in stored]
        rounding = {isinstance(linear, Int8ActivationLinear) for linear in linears}
        if not kernels or self.act is not F.silu or kinds[0] != kinds[1] or len(rounding) > 1:
            return []
        packs = [kernels.pack(*tensors) for tensors in stored]
        return [tensor for pack in packs for tensor in pack] if all(packs) else []

    def has_kernels(self, prefill: bool) -> bool:
        """Whether the operator runs the chosen experts. On a GPU it decodes alone.

        Not where a hook is to see what a Linear gets or gives.
        """
        linears = (self.w1, self.w3, self.w2)
        parts = (*linears, *(linear.peak for linear in linears if hasattr(linear, "peak")))
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        return bool(self.stacks) and not hooked and not (prefill and self.w1.weight.is_cuda)

    def forward(self, x: Tensor, prefill: bool) -> Tensor:
        rows = x.flatten(0, -2)  # [N, dim]
        chosen, shares = self.router(rows, prefill)
        waits = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.has_kernels(prefill):
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
        """What `by_expert` gives, as one call."""
        a8 = isinstance(self.w1, Int8ActivationLinear)
        return torch.ops.tokenbus.experts(x, chosen, shares, *self.stacks, a8, prefill)

    def by_expert(self, x: Tensor, chosen: Tensor, shares: Tensor, prefill: bool) -> Tensor:
        """One expert after the other with all its tokens; the sum is float32 `[N, dim]`.

        Every row adds its experts in the order of their numbers, whatever rows are beside it.
        """
        chosen, shares = chosen.flatten(), shares.flatten()  # [N * k]
        order = chosen.argsort(stable=True)
        experts, counts = chosen.unique(return_counts=True)
        y = torch.zeros_like(x, dtype=torch.float32)
        for i, places in zip(experts.tolist(), order.split(counts.tolist()), strict=True):
            rows = places // self.router.options.chosen
            w1, w3, w2 = self.expert(i)
            h = self.act(w1(x[rows], prefill)) * w3(x[rows], prefill)
            y.index_add_(0, rows, w2(h, prefill).float() * shares[places, None])
        return y

    def by_row(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The same for few tokens, without asking the device which experts they chose."""
        experts, x = chosen.flatten(), x.repeat_interleave(chosen.shape[1], 0)  # [N * k, dim]
        h = self.act(multiply_chosen(self.w1, x, experts)) * multiply_chosen(self.w3, x, experts)
        y = multiply_chosen(self.w2, h, experts).float() * shares.view(-1, 1)
        return y.unflatten(0, chosen.shape).sum(1)
