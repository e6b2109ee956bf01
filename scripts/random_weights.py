"""Makes models with random weights in every scheme, on the device, without a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from linear import Linear, linear_for
from model import ModelArgs, Transformer

MARKERS = {"bf16": "", "int8": "scales", "int8-activation": "scales_a8", "int4": "scales_and_zeros"}


def linears(model: Transformer) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def empty_model(args: ModelArgs, scheme: str, groupsize: int) -> Transformer:
    """The model on the meta device; `groupsize` has to divide every width."""
    with torch.device("meta"):
        model = Transformer(args)
    for name, linear in linears(model).items():
        groups = torch.empty(linear.in_features // groupsize, 0)
        model.set_submodule(name, linear_for(linear, {MARKERS[scheme]: groups}))
    if args.tied and scheme == "bf16":
        model.output.weight = model.tok_embeddings.weight
    return model.requires_grad_(False).eval().bfloat16()


def noise(tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    """Fill a tensor by repeating a million random values: fast, and random enough."""
    flat = tensor.view(-1)
    known = min(1_000_003, len(flat))  # a prime, so that no two rows are the same
    draw(flat[:known])
    while known < len(flat):
        more = min(known, len(flat) - known)
        flat[known : known + more] = flat[:more]
        known += more


def random_linear(
    shape: tuple[int, int],
    scheme: str,
    groupsize: int,
    device: torch.device,
    dtype: torch.dtype,
    experts: int = 0,
) -> Linear:
    """A single Linear of shape `(in, out)`, or a stack of experts of that shape."""
    with torch.device("meta"):
        plain = Linear(*shape, experts=experts)
        groups = torch.empty(shape[0] // groupsize, 0)
    linear = linear_for(plain, {MARKERS[scheme]: groups}).requires_grad_(False).to(dtype)
    randomize(linear.to_empty(device=device))
    return linear


def fill(model: Transformer, device: torch.device, symmetric: bool = False) -> Transformer:
    """Give an empty model random weights on the device; `symmetric` as in `randomize`."""
    tied = model.output.weight is model.tok_embeddings.weight
    model = model.to_empty(device=device)
    randomize(model, symmetric)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model


def pack(model: Transformer) -> Transformer:
    """Pack weights that come from no file, one by one, without keeping two copies.

    Stored weights are freed where kernels have their own copy; their sizes stay known.
    """
    tied = model.output.weight is model.tok_embeddings.weight
    for linear in linears(model).values():
        linear.pack_weights()
        if linear.tiles is None or (tied and linear is model.output):
            continue
        packed = [tensor for tensor in (linear.tiles, linear.grid) if tensor is not None]
        used = [tensor.untyped_storage().data_ptr() for tensor in packed]
        for name, tensor in linear.named_parameters(recurse=False):
            if name != "bias" and tensor.untyped_storage().data_ptr() not in used:
                tensor.untyped_storage().resize_(0)
    return model


def randomize(whole: nn.Module, symmetric: bool = False) -> None:
    """Draw all weights of a module on its device; matmuls preserve the scale of x.

    With `symmetric`, the zeros of int4 are 0, as in llama.cpp's Q4_0.
    """
    device = next(whole.parameters()).device
    generator = torch.Generator(device).manual_seed(0)

    def normal(tensor: Tensor, mean: float, spread: float) -> None:
        noise(tensor, lambda x: x.normal_(mean, spread, generator=generator))

    for name, module in whole.named_modules():
        spread = getattr(module, "in_features", 1) ** -0.5
        for key, tensor in module.named_parameters(recurse=False):
            if tensor.dtype in (torch.int8, torch.uint8):  # all bits random
                noise(tensor, lambda x: x.view(torch.uint8).random_(256, generator=generator))
            elif key == "scales_and_zeros":
                scales, zeros = torch.empty(
                    2, *tensor.shape[:-1], dtype=tensor.dtype, device=device
                )
                normal(scales, spread / 4.6, spread / 46)  # 4.6: the spread of 4-bit codes
                normal(zeros, spread / 9.2, spread / 16)  # the mean code is 7.5
                zeros *= not symmetric
                tensor.copy_(torch.stack((scales, zeros), -1))
            elif key.startswith("scales"):
                normal(tensor, spread / 74, spread / 740)  # 74: the spread of 8-bit codes
            elif "norm" in name:
                normal(tensor, 1, 0.1)
            else:
                normal(tensor, 0, spread)
