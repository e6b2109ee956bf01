"""Makes a quantized checkpoint of a bf16 one: smaller, and so much faster to decode.

    python quantize.py --checkpoint_path checkpoints/…/model.pth --mode int4 --groupsize 32

What is written says by its tensors what it is (see linear.py), so it loads like any other. The
weights are read from the mapped file, quantized and written one at a time.
"""

from __future__ import annotations

import difflib
import sys
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import gptq
from checkpoint import StateFile, check_finite, default_checkpoint, find_device
from cli import (
    Parser,
    UserError,
    add_checkpoint_flags,
    check_outputs,
    number,
    read_text,
    replacing,
    run,
)
from engine import load_model
from linear import Linear, linear_for, pack_int4
from model import Transformer
from tokenizer import Tokenizer

GROUP_SIZES = (32, 64, 128, 256)
MARKERS = {"int8": "scales", "int8-activation": "scales_a8", "int4": "scales_and_zeros"}
INT8_IN_HYBRID = ("layers.*.attention.wo", "layers.*.feed_forward.w1", "output")

# ------------------------------------------------------------------------------------------------
# The tensors of each scheme


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight `[out, in]` to int8, symmetrically by row: codes and bf16 scales `[out]`."""
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127).clamp(min=1e-10).bfloat16()
    codes = (weight / scales.float().unsqueeze(1)).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def find_grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and zero `[n]` that round groups `[n, g]` to 4 bits with the least squared error.

    Grids from 1.0 down to 0.5 times a group's range are tried: clipping the extremes often costs
    less than a finer grid gains. Both are bf16 values, as they will be stored.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    least = torch.full_like(low, float("inf"))
    scale, zero = torch.zeros_like(low), torch.zeros_like(low)
    for share in torch.linspace(1.0, 0.5, 21).tolist():
        step = ((high - low) * share / 15).clamp(min=1e-10).bfloat16().float()
        middle = ((high + low) / 2 + step / 2).bfloat16().float()  # the value of code 8
        steps = (groups - middle).div_(step)
        error = steps.round().clamp_(-8, 7).sub_(steps).mul_(step).square_().sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, step, scale), torch.where(better, middle, zero)
    return scale.squeeze(1), zero.squeeze(1)


def quantize_int4(weight: Tensor, groupsize: int) -> tuple[Tensor, Tensor]:
    """Round weight `[out, in]` to 4 bits by group: the two tensors of an `Int4Linear`."""
    codes, grids = [], []
    for part in weight.float().split(max(1, 2**18 // weight.shape[1])):  # fits the CPU's caches
        groups = part.reshape(-1, groupsize)
        scale, zero = find_grid(groups)
        steps = ((groups - zero.unsqueeze(1)) / scale.unsqueeze(1)).round().clamp(-8, 7)
        codes.append((steps + 8).to(torch.uint8).view(part.shape))
        grids.append(torch.stack((scale, zero), -1).view(len(part), -1, 2).bfloat16())
    return pack_int4(torch.cat(codes)), torch.cat(grids).transpose(0, 1).contiguous()


def quantize(
    weight: Tensor,
    scheme: str,
    groupsize: int,
    hessian: Tensor | list[Tensor | None] | None = None,
    **gptq_options,
) -> dict[str, Tensor]:
    """The stored tensors of one Linear; a Hessian `[in, in]` makes int4 by GPTQ.

    Experts `[experts, out, in]` are quantized one by one, each by its Hessian if it has one.
    """
    if weight.dim() == 3:
        pairs = zip(weight, hessian or [None] * len(weight), strict=True)
        parts = [quantize(expert, scheme, groupsize, own, **gptq_options) for expert, own in pairs]
        return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    if scheme != "int4":
        codes, scales = quantize_int8(weight)
        return {"weight": codes, MARKERS[scheme]: scales}
    if hessian is None:
        packed, grid = quantize_int4(weight, groupsize)
    else:
        codes, grid = gptq.gptq(weight, hessian, groupsize, find_grid, **gptq_options)
        packed = pack_int4(codes)
    return {"weight": packed, "scales_and_zeros": grid}


def dequantize(linear: Linear, tensors: dict[str, Tensor]) -> Tensor:
    """The weight, float32 `[out, in]`, that a Linear with these stored tensors has."""
    stored = linear_for(linear, tensors)
    stored.load_state_dict(tensors, assign=True, strict=False)  # a bias is not stored here
    return stored.float().dequantize()


# ------------------------------------------------------------------------------------------------
# Which Linear is stored how


def choose_schemes(
    names: list[str], mode: str, critical_layers: list[str] | None = None
) -> dict[str, str]:
    """The scheme of every Linear, by its name; `UserError` on a layer that the model lacks."""
    if mode != "hybrid":
        return dict.fromkeys(names, "int4" if mode == "int4-gptq" else mode)
    critical = []
    for entry in critical_layers or INT8_IN_HYBRID:
        named = read_text(Path(entry[1:])).split() if entry.startswith("@") else [entry]
        if not named:
            raise UserError(f"--critical_layers {entry} names no layer; give it a name a line")
        critical += named
    schemes = dict.fromkeys(names, "int4")
    for pattern in (pattern.removesuffix(".weight") for pattern in critical):
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(
                f"--critical_layers: there is no layer {pattern!r}; near ones: {', '.join(near)}"
            )
        schemes |= dict.fromkeys(matches, "int8")
    return schemes


def check_groups(linears: dict[str, Linear], schemes: dict[str, str], groupsize: int) -> None:
    """Raise a `UserError` unless `groupsize` divides the width of every int4 Linear."""
    widths = {name: linears[name].in_features for name in schemes if schemes[name] == "int4"}
    for name, width in widths.items():
        if width % groupsize:
            fitting = [size for size in GROUP_SIZES if not any(w % size for w in widths.values())]
            advice = f"--groupsize {' or '.join(map(str, fitting))} fits" if fitting else "use int8"
            raise UserError(
                f"--groupsize {groupsize} does not divide the {width} columns of {name}; {advice}"
            )


def file_name(mode: str, groupsize: int, custom: bool = False, stem: str = "model_") -> str:
    """The published name of the new file, such as model_int4.g32.pth."""
    kind = mode
    if mode == "hybrid":
        kind = "custom_hybrid_int8_int4" if custom else "hybrid_int8_int4"
    if not mode.startswith("int8"):
        kind += f".g{groupsize}"
    return f"{stem}{kind}.pth"


# ------------------------------------------------------------------------------------------------
# The whole checkpoint


def stored_layout(model: Transformer, schemes: dict[str, str], groupsize: int) -> dict[str, Tensor]:
    """The state dict of this model with its Linears in these schemes, without their values."""
    layout = model.state_dict()
    for name, scheme in schemes.items():
        linear = model.get_submodule(name)
        with torch.device("meta"):
            plain = Linear(linear.in_features, linear.out_features, experts=linear.experts)
            groups = torch.empty(linear.in_features // groupsize, 0)
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
    """Write the stored tensors of these rows of a Linear, or of one of its experts."""
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
    """Write all tensors to `file`; return the squared errors of the weights by scheme.

    With calibration `sequences` of token ids, int4 is made by GPTQ.
    """
    errors: dict[str, list[float]] = {scheme: [] for scheme in schemes.values()}
    options = {"percdamp": args.percdamp, "blocksize": args.blocksize, "act_order": args.act_order}
    unseen: list[int] = []  # for each name, the experts that few tokens reached

    def store(name: str, weight: Tensor, hessian: Tensor | list | None = None) -> Tensor:
        if isinstance(hessian, list):
            unseen.append(sum(expert is None for expert in hessian))
        check_finite(args.checkpoint_path, f"{name}.weight", weight)
        tensors = quantize(weight, schemes[name], args.groupsize, hessian, **options)
        result = dequantize(model.get_submodule(name), tensors)
        errors[schemes[name]].append((result - weight.float()).square().mean().item())
        write_linear(file, name, tensors)
        bar.update()
        return result

    for key, tensor in model.state_dict().items():
        if key.removesuffix(".weight") not in schemes:  # those are read one by one
            check_finite(args.checkpoint_path, key, tensor)
            file.write(file.places[key], tensor.cpu())
    title = "GPTQ" if sequences else "quantizing"
    with tqdm(total=len(schemes), desc=title, unit="matrix") as bar:
        if sequences:
            gptq.quantize_blocks(model, sequences, store)
        for name in () if sequences else schemes:
            store(name, model.get_submodule(name).weight.to(args.device))
    if sum(unseen):
        print(
            f"[{sum(unseen)} matrices of experts were rounded to nearest: fewer calibration tokens "
            "reached them than they have columns; see --calibration_limit]",
            file=sys.stderr,
        )
    return errors


def summary(
    source: Path,
    output: Path,
    layout: dict[str, Tensor],
    model: Transformer,
    errors: dict[str, list[float]],
) -> str:
    """What became smaller, and what that did to the weights."""
    sizes = [path.stat().st_size / 1e6 for path in (source, output)]
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    weights = sum(linear.weight.numel() for linear in linears.values())
    stored = [key for key in layout if key.rpartition(".")[0] in linears and "bias" not in key]
    bits = 8 * sum(layout[key].nbytes for key in stored) / weights
    lines = [f"{output}: {sizes[1]:.1f} MB of {sizes[0]:.1f}, {bits:.2f} bits a weight"]
    for scheme, values in errors.items():
        mean = sum(values) / len(values)
        lines.append(f"{scheme}: {len(values)} matrices, mean squared error {mean:.3e}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    modes = ["int8", "int8-activation", "int4", "int4-gptq", "hybrid"]
    add("--mode", required=True, choices=modes)
    add("--groupsize", type=int, default=32, choices=GROUP_SIZES, help="columns that share a grid")
    add(
        "--critical_layers",
        nargs="+",
        metavar="LAYER",
        help="int8 in a hybrid: names, globs, @FILE",
    )
    add(
        "--label", default="_", help="what stands between `model` and the scheme in the file's name"
    )
    add("--gptq", action="store_true", help="make the int4 part of a hybrid by GPTQ")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--calibration_file", type=Path, help="a text for GPTQ")
    source.add_argument(
        "--calibration_tasks", nargs="+", metavar="TASK", help="lm-eval's, for GPTQ"
    )
    add("--include_path", type=Path, help="a folder with further lm-eval tasks")
    limit = number(int, 1, 2**31)
    add("--calibration_limit", type=limit, default=128, help="sequences for GPTQ (default: 128)")
    about = "tokens of each (default: 512, or the model's context)"
    add("--calibration_seq_length", type=number(int, 2), metavar="N", help=about)
    add("--pad_calibration_inputs", action="store_true", help="take shorter texts, too")
    add("--percdamp", type=number(float, 0, 100), default=0.01, help="damping of GPTQ's Hessians")
    add("--blocksize", type=number(int, 1), default=128, help="columns GPTQ updates at once")
    add("--act_order", action="store_true", help="GPTQ rounds columns of large inputs first")
    return parser


# What only GPTQ reads.
GPTQ_FLAGS = ("calibration_file", "calibration_tasks", "calibration_limit", "act_order")
GPTQ_FLAGS += ("calibration_seq_length", "pad_calibration_inputs", "percdamp", "blocksize")


def check_flags(args: Namespace, by_gptq: bool) -> None:
    """Raise a UserError if GPTQ lacks inputs, or a flag has nothing to go with."""
    if args.gptq and args.mode not in ("hybrid", "int4-gptq"):
        raise UserError("--gptq goes with --mode hybrid; int4 by GPTQ is --mode int4-gptq")
    needed = {name: (by_gptq, "GPTQ, --mode int4-gptq or --gptq") for name in GPTQ_FLAGS}
    needed["include_path"] = (args.calibration_tasks, "--calibration_tasks")
    needed["critical_layers"] = (args.mode == "hybrid", "--mode hybrid")
    needed["groupsize"] = (not args.mode.startswith("int8"), "int4")
    parser = make_parser()
    for name, (there, what) in needed.items():
        if getattr(args, name) != parser.get_default(name) and not there:
            raise UserError(f"--{name} goes with {what}; leave it out")
    if by_gptq and not (args.calibration_file or args.calibration_tasks):
        raise UserError("GPTQ needs inputs: pass --calibration_file or --calibration_tasks")


def output_path(args: Namespace) -> Path:
    """Where the checkpoint goes, known before hours of work are spent."""
    if "/" in args.label:
        raise UserError(f"--label {args.label!r} is part of a file's name; leave the / out")
    stem = f"{args.checkpoint_path.stem}{args.label}"
    name = file_name(args.mode, args.groupsize, bool(args.critical_layers), stem)
    path = args.checkpoint_path.with_name(name)
    check_outputs([path], [args.checkpoint_path, args.calibration_file])
    return path


def calibration(args: Namespace, model: Transformer) -> list[Tensor]:
    """The sequences of token ids that GPTQ runs."""
    context = model.args.block_size
    length = args.calibration_seq_length or min(512, context)
    if length > context:
        what = f"--calibration_seq_length {length} is over the model's context"
        raise UserError(f"{what}, {context}; lower it")
    if args.calibration_file:
        texts = [read_text(args.calibration_file)]
    else:
        texts = gptq.task_texts(args.calibration_tasks, args.include_path)
    encode = Tokenizer.from_folder(args.checkpoint_path.parent).encode
    options = (length, args.calibration_limit, args.pad_calibration_inputs)
    return gptq.calibration_sequences(texts, encode, *options)


def main(args: Namespace) -> None:
    by_gptq = args.gptq or args.mode == "int4-gptq"
    check_flags(args, by_gptq)
    args.device = find_device(args.device)
    path = args.checkpoint_path = args.checkpoint_path or default_checkpoint()
    model = load_model(path, args.device if by_gptq else "cpu")
    linears = {n: module for n, module in model.named_modules() if isinstance(module, Linear)}
    if any(type(linear) is not Linear for linear in linears.values()):
        raise UserError(f"{path} is quantized already; pass the model.pth it was made of")
    output = output_path(args)
    schemes = choose_schemes([*linears], args.mode, args.critical_layers)
    check_groups(linears, schemes, args.groupsize)
    sequences = calibration(args, model) if by_gptq else None
    layout = stored_layout(model, schemes, args.groupsize)
    with replacing(output) as temporary, StateFile(temporary, layout) as file:
        errors = quantize_model(model, schemes, sequences, file, args)
    print(summary(path, output, layout, model, errors))


if __name__ == "__main__":
    run(main, make_parser())
