"""GPTQ: 4-bit weights whose rounding errors are compensated in the columns not yet rounded.

Frantar et al. 2023 (arXiv 2210.17323). GPTQ minimizes the error of a layer's outputs on real
inputs, ||(W - Q) X||², not the error of its weights. The Hessian, 2 X X^T, says how the remaining
columns should change after one is rounded. `quantize_blocks` runs sequences of tokens through a
model and collects the Hessians; `gptq` rounds one weight.

Format: value = (code - 8) * scale + zero, codes 0 to 15, one scale and zero for each group of
neighbouring input columns of an output row.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cli import UserError
from linear import Linear
from model import Transformer, TransformerBlock

# ------------------------------------------------------------------------------------------------
# One weight


def inverse_root(hessian: Tensor, percdamp: float) -> Tensor:
    """Upper triangular U with U^T U = the inverse of the damped hessian `[in, in]`.

    Row j of U over its diagonal element spreads column j's error to the columns after it. Cholesky
    of the reversed matrix gives U without forming the inverse. `percdamp` times the diagonal's mean
    is added to the diagonal, and more if the factorization fails.
    """
    reverse = hessian.flip(0, 1)
    diagonal = reverse.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = 1  # an input that was always 0: its column is independent
    eye = torch.eye(len(hessian), device=hessian.device)
    for damping in (percdamp, 0.1, 1.0):
        lower, failed = torch.linalg.cholesky_ex(reverse + damping * mean * eye)
        if not failed and lower.isfinite().all():
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    raise UserError("inputs of a matrix are NaN or infinite; convert the checkpoint again")


def gptq(
    weight: Tensor,
    hessian: Tensor,
    groupsize: int,
    find_grid: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    percdamp: float = 0.01,
    blocksize: int = 128,
    act_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Round weight `[out, in]` to 4 bits, minimizing the output error on inputs with this hessian.

    `find_grid` maps float32 weights `[out, groupsize]` and the cost of an error in each column, the
    Hessian's diagonal `[groupsize]`, to scales (above 0) and zeros, `[out]` each, representable in
    bf16. `groupsize` divides `in`. A group's grid is chosen when its first column is reached; with
    `act_order`, columns with the largest inputs are rounded first, on grids of the original
    weights. `blocksize` only affects speed: errors reach the columns beyond a block in one matmul
    at its end. Returns codes uint8 `[out, in]` and bf16 scales_and_zeros
    `[in / groupsize, out, 2]`.
    """
    columns = torch.empty(weight.shape[::-1], device=weight.device).copy_(weight.t())  # [in, out]
    codes = torch.empty_like(columns, dtype=torch.uint8)
    grids = columns.new_empty(len(columns) // groupsize, columns.shape[1], 2)
    order = torch.arange(len(columns), device=columns.device)
    costs = hessian.diagonal().split(groupsize)
    if act_order:
        for group, members in enumerate(columns.split(groupsize)):
            grids[group] = torch.stack(find_grid(members.t(), costs[group]), -1)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        columns, hessian = columns[order], hessian[order][:, order]
    root = inverse_root(hessian.float(), percdamp)
    # Blocks hold whole groups, so a group's weights are up to date when its grid is chosen.
    blocksize = max(blocksize // groupsize, 1) * groupsize
    for start in range(0, len(columns), blocksize):
        end = min(start + blocksize, len(columns))
        errors = torch.empty_like(columns[start:end])
        for j, place in enumerate(order[start:end].tolist(), start):
            group = place // groupsize
            if not act_order and j % groupsize == 0:
                members = columns[j : j + groupsize].t()
                grids[group] = torch.stack(find_grid(members, costs[group]), -1)
            scale, zero = grids[group].unbind(-1)  # [out] each
            steps = ((columns[j] - zero) / scale).round().clamp(-8, 7)
            codes[place] = (steps + 8).to(torch.uint8)
            error = (columns[j] - (steps * scale + zero)) / root[j, j]
            columns[j + 1 : end].addr_(root[j, j + 1 : end], error, alpha=-1)
            errors[j - start] = error
        columns[end:].addmm_(root[start:end, end:].t(), errors, alpha=-1)
    return codes.t().contiguous(), grids.bfloat16()


def output_error(weight: Tensor, result: Tensor, hessian: Tensor | list[Tensor | None]) -> float:
    """||(W - Q) X||² / ||W X||², which GPTQ minimizes; NaN without a Hessian.

    For experts `[experts, out, in]` it covers all outputs of the experts with a Hessian.
    """
    if isinstance(hessian, Tensor):
        weight, result, hessian = weight[None], result[None], [hessian]
    moved = total = 0.0
    for old, new, own in zip(weight, result, hessian, strict=True):
        if own is not None:
            old = old.float()
            change = new.float() - old
            moved += ((change @ own) * change).sum().item()
            total += ((old @ own) * old).sum().item()
    return moved / total if total else math.nan


# ------------------------------------------------------------------------------------------------
# A whole model


class AllAtOnce(nn.Module):
    """Stands in for a KV cache when a whole sequence comes in one call."""

    has_kernels = False

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return k.transpose(1, 2), v.transpose(1, 2)  # [1, T, H, D] -> [1, H, T, D]


def add_inputs(hessian: Tensor, count: int, linear: Linear, args: tuple[Tensor]) -> None:
    """A forward pre-hook: add the contribution of x `[..., in]` to 2 X X^T / count, in float32.

    In a mixture the hessian is `[experts, in, in]`, and the hook runs for each expert.
    """
    x = args[0].flatten(0, -2).float()
    hessian = hessian[linear.expert] if hessian.dim() == 3 else hessian
    hessian.addmm_(x.t(), x, alpha=2 / count)


def count_tokens(tokens: Tensor, linear: Linear, args: tuple[Tensor]) -> None:
    """A forward pre-hook: count the tokens that reach each expert, int64 `[experts]`."""
    tokens[linear.expert] += len(args[0])


class Reached(Exception):
    """Ends the run of a block early."""


def stop(linear: Linear, args: tuple[Tensor]) -> None:
    """A forward pre-hook: end the run here."""
    raise Reached


def collect_hessians(linears: dict, run: Callable, states: list[Tensor], count: int) -> dict:
    """Run all states; return the Hessian `[in, in]` of each Linear's inputs, by name.

    `states` are hidden states `[1, T, dim]`, `count` positions in total. For experts it is a list,
    with None where fewer tokens reach an expert than its matrix has columns: on so few inputs GPTQ
    overfits, and does worse on others than rounding to nearest.
    """
    hessians, hooks, tokens = {}, [], {}
    for name, linear in linears.items():
        if name.endswith("w3"):  # same input as w1
            hessians[name] = hessians[name.removesuffix("w3") + "w1"]
            continue
        shape = (linear.experts,) * (linear.experts > 0) + (linear.in_features,) * 2
        hessians[name] = torch.zeros(shape, device=linear.weight.device)
        hook = functools.partial(add_inputs, hessians[name], count)
        hooks.append(linear.register_forward_pre_hook(hook))
        if linear.experts:
            tokens[name] = torch.zeros(linear.experts, dtype=torch.int64)
            hook = functools.partial(count_tokens, tokens[name])
            hooks.append(linear.register_forward_pre_hook(hook))
    if len(hooks) == 1:  # one Linear: the rest of the block is not needed
        hooks.append(linears[next(iter(linears))].register_forward_pre_hook(stop))
    for x in states:
        with contextlib.suppress(Reached):
            run(x)
    for hook in hooks:
        hook.remove()
    for name, reached in tokens.items():
        enough = reached >= linears[name].in_features
        own = [h if yes else None for h, yes in zip(hessians[name], enough, strict=True)]
        hessians |= {name: own} | ({name[:-1] + "3": own} if name.endswith("w1") else {})
    return hessians


def check_inputs(name: str, hessian: Tensor | list[Tensor | None]) -> None:
    """Raise a UserError if inputs of the calibration were NaN or infinite."""
    for own in [hessian] if isinstance(hessian, Tensor) else hessian:
        if own is not None and not own.diagonal().isfinite().all():
            raise UserError(
                f"on the calibration text, inputs of {name} are NaN or infinite in bfloat16: the "
                "checkpoint is damaged, or made for a wider precision; convert it again"
            )


def stages(layer: TransformerBlock) -> list[dict[str, Linear]]:
    """The Linears of a block by name, grouped by stage, in execution order.

    w1 and w3 share an input, hence a stage. A shared expert is in the stages of the other experts.
    """
    found: dict[str, dict[str, Linear]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, Linear):
            stage = name.rpartition(".")[2].replace("w3", "w1")
            found.setdefault(stage, {})[name] = module
    return [*found.values()]


@torch.no_grad()
def quantize_blocks(
    model: Transformer,
    sequences: Iterable[Tensor],
    quantize: Callable[[str, Tensor, Tensor | list[Tensor | None]], Tensor],
) -> None:
    """Call `quantize(name, weight, hessian)` once for every Linear, block by block.

    It returns the dequantized weight, with which all later inputs are computed, also within the
    block: each Hessian includes the errors of everything before it. So a block runs once up to each
    of its stages, and once as a whole. The model's own weights do not change. `sequences` are token
    ids `[T]` of any lengths up to the model's context. Memory holds one block, the Hessians of a
    stage and the hidden states. Call `setup_caches` before using the model for anything else.
    """
    device = model.device
    names = {module: name for name, module in model.named_modules()}
    states = [model.embed(tokens[None].to(device)) for tokens in sequences]  # [1, T, dim]
    lengths = [x.shape[1] for x in states]
    longest, count = max(lengths), sum(lengths)
    model.setup_caches(0, longest)  # for the RoPE tables
    for layer in model.layers:
        layer.attention.kv_cache = AllAtOnce()

        def run(x: Tensor, weights: dict[str, Tensor], layer: TransformerBlock = layer) -> Tensor:
            input_pos = torch.arange(x.shape[1], device=device)[None]
            mask = layer.attention.mask(input_pos, x.shape[1], x.dtype)
            return functional_call(layer, weights, (x, input_pos, mask, True))

        weights: dict[str, Tensor] = {}
        for linears in stages(layer):
            go = functools.partial(run, weights=weights)
            hessians = collect_hessians(linears, go, states, count)
            for name, linear in linears.items():
                whole_name = f"{names[layer]}.{name}"
                check_inputs(whole_name, hessians[name])
                weight = quantize(whole_name, linear.weight, hessians[name])
                weights[name + ".weight"] = weight.to(linear.weight)
        for i, state in enumerate(states):
            states[i] = run(state, weights)
    hessian = torch.zeros(model.args.dim, model.args.dim, device=device)
    for x in states:
        add_inputs(hessian, count, model.output, (model.norm(x),))  # without computing logits
    check_inputs("output", hessian)
    quantize("output", model.output.weight, hessian)
