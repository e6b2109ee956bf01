"""Quantizes a bf16 checkpoint to int8, int4, or a mix of both, layer by layer.

    python quantize.py --checkpoint_path checkpoints/…/model.pth --mode int4 --groupsize 32

The tensors of the new file identify its scheme (see linear.py), so it loads like any other. Weights
are read from the mapped file, quantized and written one at a time. With calibration text, int4
minimizes the error of the outputs instead of the error of the weights.
"""

from __future__ import annotations

import difflib
import math
import sys
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import gptq
from calibration import add_calibration_flags, read_sequences
from checkpoint import StateFile, check_finite, default_checkpoint, find_device
from cli import Parser, UserError, add_checkpoint_flags, bounded, named, replaced
from engine import load_model
from files import at_file, check_outputs, read_text, replacing
from linear import Linear, linear_for, pack_int4
from model import Transformer
from process import run
from rounding import find_grid, quantize_int4, quantize_int8

GROUP_SIZES = (32, 64, 128, 256)
MARKERS = {"int8": "scales", "int8-activation": "scales_a8", "int4": "scales_and_zeros"}
LEVELS = ("int8", *(f"int4.g{size}" for size in GROUP_SIZES))  # of a critical layer
INT8_IN_HYBRID = ("layers.*.attention.wo", "layers.*.feed_forward.w1", "output")

# ------------------------------------------------------------------------------------------------
# The tensors of each scheme


def split_scheme(scheme: str, groupsize: int) -> tuple[str, int]:
    """Scheme and group size: `int4.g32` names its own, `int4` has `groupsize`."""
    kind, _, own = scheme.partition(".g")
    return kind, int(own or groupsize)


def quantize(
    weight: Tensor,
    scheme: str,
    groupsize: int,
    hessian: Tensor | list[Tensor | None] | None = None,
    gptq_options: dict | None = None,
) -> dict[str, Tensor]:
    """The stored tensors of one Linear.

    int4 is rounded to nearest. With a Hessian `[in, in]`, its diagonal weighs the error that grids
    are fitted to; with GPTQ options as well, GPTQ rounds. Experts `[experts, out, in]` are
    quantized one by one, each with its own Hessian or None.
    """
    if weight.dim() == 3:
        pairs = zip(weight, hessian or [None] * len(weight), strict=True)
        parts = [quantize(expert, scheme, groupsize, own, gptq_options) for expert, own in pairs]
        return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    scheme, groupsize = split_scheme(scheme, groupsize)
    if scheme != "int4":
        codes, scales = quantize_int8(weight)
        return {"weight": codes, MARKERS[scheme]: scales}
    if hessian is None or gptq_options is None:
        weights = None if hessian is None else hessian.diagonal()
        packed, grid = quantize_int4(weight, groupsize, weights)
    else:
        codes, grid = gptq.gptq(weight, hessian, groupsize, find_grid, **gptq_options)
        packed = pack_int4(codes)
    return {"weight": packed, "scales_and_zeros": grid}


def dequantize(linear: Linear, tensors: dict[str, Tensor]) -> Tensor:
    """The float32 weight `[out, in]` of a Linear with these stored tensors."""
    stored = linear_for(linear, tensors)
    stored.load_state_dict(tensors, assign=True, strict=False)  # `tensors` has no bias
    return stored.float().dequantize()


# ------------------------------------------------------------------------------------------------
# The scheme of each Linear


def choose_schemes(
    names: list[str], mode: str, critical_layers: list[str] | None = None
) -> dict[str, str]:
    """The scheme of every Linear, by name; `UserError` on a layer that the model lacks.

    Critical layers are int8, or the scheme after a `=`, as in `output=int4.g32`.
    """
    if mode != "hybrid":
        return dict.fromkeys(names, "int4" if mode == "int4-gptq" else mode)
    critical = []
    for entry in critical_layers or INT8_IN_HYBRID:
        named = read_text(file).split() if (file := at_file(entry)) else [entry]
        if not named:
            raise UserError(f"--critical_layers {entry} names no layer; give it a name a line")
        critical += named
    schemes = dict.fromkeys(names, "int4")
    for entry in critical:
        pattern, _, scheme = entry.partition("=")
        pattern, scheme = pattern.removesuffix(".weight"), scheme or "int8"
        if scheme not in LEVELS:
            raise UserError(f"--critical_layers: {entry!r} should end in {' or '.join(LEVELS)}")
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(
                f"--critical_layers: there is no layer {pattern!r}; near ones: {', '.join(near)}"
            )
        schemes |= dict.fromkeys(matches, scheme)
    return schemes


def check_groups(linears: dict[str, Linear], schemes: dict[str, str], groupsize: int) -> None:
    """Raise a `UserError` unless `groupsize` divides the width of every int4 Linear."""
    widths = {name: linears[name].in_features for name in schemes if schemes[name] == "int4"}
    for name, scheme in schemes.items():
        kind, size = split_scheme(scheme, groupsize)
        if kind == "int4" != scheme and linears[name].in_features % size:
            width = linears[name].in_features
            raise UserError(f"{name}={scheme}: {size} does not divide its {width} columns")
    for name, width in widths.items():
        if width % groupsize:
            fitting = [size for size in GROUP_SIZES if not any(w % size for w in widths.values())]
            advice = f"--groupsize {' or '.join(map(str, fitting))} fits" if fitting else "use int8"
            raise UserError(
                f"--groupsize {groupsize} does not divide the {width} columns of {name}; {advice}"
            )


def file_name(mode: str, groupsize: int, custom: bool = False, stem: str = "model_") -> str:
    """The name of the new file, such as model_int4.g32.pth."""
    kind = mode
    if mode == "hybrid":
        kind = "custom_hybrid_int8_int4" if custom else "hybrid_int8_int4"
    if not mode.startswith("int8"):
        kind += f".g{groupsize}"
    return f"{stem}{kind}.pth"


# ------------------------------------------------------------------------------------------------
# The checkpoint


def stored_layout(model: Transformer, schemes: dict[str, str], groupsize: int) -> dict[str, Tensor]:
    """The state dict of this model with its Linears in these schemes, on the meta device."""
    layout = model.state_dict()
    for name, scheme in schemes.items():
        linear = model.get_submodule(name)
        scheme, size = split_scheme(scheme, groupsize)
        with torch.device("meta"):
            plain = Linear(linear.in_features, linear.out_features, experts=linear.experts)
            groups = torch.empty(linear.in_features // size, 0)
        tensors = linear_for(plain, {MARKERS[scheme]: groups}).state_dict()
        layout |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    return layout


def write_linear(
    file: StateFile,
    name: str,
    tensors: dict[str, Tensor],
    rows: slice = slice(None),
    expert: int | None = None,
) -> None:
    """Write stored tensors to these rows of a Linear, or of one of its experts."""
    for key, tensor in tensors.items():
        place = file.places[f"{name}.{key}"]
        place = place if expert is None else place[expert]
        file.write(place[:, rows] if key == "scales_and_zeros" else place[rows], tensor.cpu())


def quantize_model(
    model: Transformer,
    schemes: dict[str, str],
    sequences: list[Tensor] | None,
    file: StateFile,
    args: Namespace,
) -> dict[str, list[float]]:
    """Write all tensors to `file`; return the error of each matrix, by scheme.

    With calibration `sequences` of token ids it is the `output_error` of gptq.py, else the mean
    squared error of the weights.
    """
    errors: dict[str, list[float]] = {scheme: [] for scheme in schemes.values()}
    names = ("percdamp", "blocksize", "act_order")
    options = {name: getattr(args, name) for name in names} if by_gptq(args) else None
    unseen: list[int] = []  # experts that too few tokens reached, for each matrix

    def store(name: str, weight: Tensor, hessian: Tensor | list | None = None) -> Tensor:
        if isinstance(hessian, list):
            unseen.append(sum(expert is None for expert in hessian))
        check_finite(args.checkpoint_path, f"{name}.weight", weight)
        tensors = quantize(weight, schemes[name], args.groupsize, hessian, options)
        result = dequantize(model.get_submodule(name), tensors)
        if hessian is None:
            error = (result - weight.float()).square().mean().item()
        else:
            error = gptq.output_error(weight, result, hessian)
        errors[schemes[name]] += [] if math.isnan(error) else [error]
        write_linear(file, name, tensors)
        bar.update()
        return result

    for key, tensor in model.state_dict().items():
        if key.removesuffix(".weight") not in schemes:  # Linears follow one by one
            check_finite(args.checkpoint_path, key, tensor)
            file.write(file.places[key], tensor.cpu())
    with tqdm(total=len(schemes), desc="quantizing", unit="matrix") as bar:
        if sequences:
            gptq.quantize_blocks(model, sequences, store)
        for name in () if sequences else schemes:
            store(name, model.get_submodule(name).weight.to(args.device))
    if sum(unseen):
        print(
            f"[{sum(unseen)} matrices of experts were rounded without data: fewer calibration "
            "tokens reached them than they have columns; see --calibration_limit]",
            file=sys.stderr,
        )
    return errors


def bits_a_weight(model: Transformer, layout: dict[str, Tensor]) -> float:
    """Average bits of a weight over all Linears, as stored in this layout."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    weights = sum(linear.weight.numel() for linear in linears.values())
    stored = [key for key in layout if key.rpartition(".")[0] in linears and "bias" not in key]
    return 8 * sum(layout[key].nbytes for key in stored) / weights


def prepare(args: Namespace, device: torch.device | str) -> tuple[Transformer, dict[str, str]]:
    """The bf16 model and the schemes of its Linears; `UserError` if they do not fit each other."""
    path = args.checkpoint_path
    model = load_model(path, device)
    linears = {n: module for n, module in model.named_modules() if isinstance(module, Linear)}
    if any(type(linear) is not Linear for linear in linears.values()):
        raise UserError(f"{path} is quantized already; pass the model.pth it was made of")
    schemes = choose_schemes([*linears], args.mode, args.critical_layers)
    check_groups(linears, schemes, args.groupsize)
    return model, schemes


def output_path(args: Namespace) -> Path:
    """The path of the new checkpoint; `UserError` if it cannot be written."""
    if "/" in args.label:
        raise UserError(f"--label {args.label!r} is part of a file's name; leave the / out")
    stem = f"{args.checkpoint_path.stem}{args.label}"
    name = file_name(args.mode, args.groupsize, bool(args.critical_layers), stem)
    path = args.checkpoint_path.with_name(name)
    texts = [args.calibration_file, *map(at_file, args.critical_layers or ())]
    check_outputs([path], texts, [args.checkpoint_path])
    return path


def write(
    args: Namespace, model: Transformer, schemes: dict[str, str], sequences: list[Tensor] | None
) -> tuple[Path, float]:
    """Write the checkpoint and print its size and errors; returns its path and bits a weight."""
    path, output = args.checkpoint_path, output_path(args)
    layout = stored_layout(model, schemes, args.groupsize)
    with replacing(output) as temporary, StateFile(temporary, layout) as file:
        errors = quantize_model(model, schemes, sequences, file, args)
    bits = bits_a_weight(model, layout)
    sizes = [file.stat().st_size / 1e6 for file in (path, output)]
    print(f"{output}: {sizes[1]:.1f} MB of {sizes[0]:.1f}, {bits:.2f} bits a weight")
    of = "outputs, relative," if sequences else "weights"
    for scheme, values in errors.items():
        mean = sum(values) / len(values) if values else math.nan
        print(f"{scheme}: {len(values)} matrices, mean squared error of {of} {mean:.3e}")
    return output, bits


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.group("scheme")
    modes = ["int8", "int8-activation", "int4", "int4-gptq", "hybrid"]
    add("--mode", required=True, choices=modes, help="how Linears are stored")
    add("--groupsize", type=int, default=32, choices=GROUP_SIZES, help="columns that share a grid")
    add(
        "--critical_layers",
        nargs="+",
        metavar="LAYER",
        help="int8 in a hybrid: names, globs, @FILE; NAME=int4.g32 is int4 in groups of 32",
    )
    about = "text placed between `model` and the scheme in the file's name"
    add("--label", type=named, default="_", help=about)
    add("--gptq", action="store_true", help="use GPTQ for the int4 part of a hybrid")
    add_calibration_flags(parser)
    add = parser.group("GPTQ")
    add("--percdamp", type=bounded(float, 0, 100), default=0.01, help="damping of GPTQ's Hessians")
    add("--blocksize", type=bounded(int, 1), default=128, help="columns that GPTQ updates at once")
    add("--act_order", action="store_true", help="GPTQ rounds columns with large inputs first")
    return parser


def by_gptq(args: Namespace) -> bool:
    return args.gptq or args.mode == "int4-gptq"


OF_SEQUENCES = ("calibration_limit", "calibration_seq_length", "calibration_seed")
OF_SEQUENCES += ("pad_calibration_inputs",)
OF_GPTQ = ("percdamp", "blocksize", "act_order")


def check_flags(args: Namespace) -> bool:
    """Whether there is calibration text; UserError if a flag has no effect in this mode."""
    calibrated, int4 = args.calibration_file or args.calibration_tasks, "int4, plain or in a hybrid"
    quantizes = not args.mode.startswith("int8")
    if by_gptq(args) and args.mode in ("hybrid", "int4-gptq") and not calibrated:
        raise UserError("GPTQ needs inputs: pass --calibration_file or --calibration_tasks")
    hybrid = "--mode hybrid (int4 by GPTQ is --mode int4-gptq)"
    needed = {"gptq": (args.mode in ("hybrid", "int4-gptq"), hybrid)}
    needed |= dict.fromkeys(OF_GPTQ, (by_gptq(args), "GPTQ, --mode int4-gptq or --gptq"))
    needed |= dict.fromkeys(("calibration_file", "calibration_tasks"), (quantizes, int4))
    needed |= dict.fromkeys(OF_SEQUENCES, (calibrated, "--calibration_file or --calibration_tasks"))
    needed["include_path"] = (args.calibration_tasks, "--calibration_tasks")
    needed["critical_layers"] = (args.mode == "hybrid", "--mode hybrid")
    needed["groupsize"] = (quantizes, int4)
    parser = make_parser()
    for name, (there, what) in needed.items():
        if getattr(args, name) != parser.get_default(name) and not there:
            raise UserError(f"--{name} goes with {what}; leave it out")
    return bool(calibrated)


def main(args: Namespace) -> None:
    calibrated, device = check_flags(args), find_device(args.device)
    args = replaced(
        args, device=device, checkpoint_path=args.checkpoint_path or default_checkpoint()
    )
    model, schemes = prepare(args, device if calibrated else "cpu")
    output_path(args)  # fails before hours of work
    sequences = read_sequences(args, args.checkpoint_path.parent, model.args.block_size)
    write(args, model, schemes, sequences)


if __name__ == "__main__":
    run(main, make_parser())
