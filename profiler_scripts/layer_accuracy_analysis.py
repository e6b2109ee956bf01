"""Measures the accuracy that int4 costs in each Linear, and chooses Linears for higher precision.

    python profiler_scripts/layer_accuracy_analysis.py --model_path model.pth --report_file r.md

Everything starts in int4 with --groupsize. One Linear at a time is raised to int8, and to int4 in
groups of 32 if those are smaller; the loss saved is divided by the bytes it costs. Linears that
save most per byte are chosen greedily within the budget, and the resulting model is measured once
more on held-back text.

The default loss is the KL divergence of the bf16 model's next-token distributions from those of the
rounded one. A Linear of block i changes nothing before block i, so the inputs of each block of the
int4 model are kept, and only the blocks from i on are run: half a model on average for each trial,
plus the output matrix. For SmolLM2-135M's 151 Linears with the default limit that takes some
minutes on two cores. An lm-eval task runs in full for each trial: hours.

--quantize also writes the checkpoint, its int4 calibrated on the ranking text. Without it, pass the
list from --layers_file to `quantize.py --mode hybrid --critical_layers @FILE`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import sys
from argparse import Namespace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import quantize
from checkpoint import find_device
from cli import Parser, UserError, bounded, named_path, replaced
from engine import load, load_model
from files import check_outputs, output_file, read_json, replacing
from linear import Linear, linear_for
from model import Transformer
from process import run
from profiler_scripts.losses import Losses, TaskLosses, TextLosses, read_parts
from profiler_scripts.profiler_analysis import (
    ROLES,
    chart,
    reports,
    shown,
    table,
    write_report,
)

PARTS = ("ranking", "held back")  # of the text or the task
README = Path(__file__).resolve().parents[1] / "README.md"

# ------------------------------------------------------------------------------------------------
# The int4 model, and each Linear in every scheme


@dataclasses.dataclass
class Variants:
    """A model with exchangeable Linears, `modules[scheme][name]`, and the bytes that a checkpoint
    stores of each, with scales and without bias."""

    model: Transformer
    modules: dict[str, dict[str, Linear]]
    nbytes: dict[str, dict[str, int]]

    def use(self, schemes: dict[str, str]) -> None:
        """Switch Linears to these schemes, by name."""
        for name, scheme in schemes.items():
            self.model.set_submodule(name, self.modules[scheme][name])

    def total(self, schemes: dict[str, str]) -> int:
        return sum(self.nbytes[scheme][name] for name, scheme in schemes.items())

    def bits(self, schemes: dict[str, str]) -> float:
        """Average bits a weight over all Linears."""
        return 8 * self.total(schemes) / self.weights

    @property
    def weights(self) -> int:
        return sum(linear.weight.numel() for linear in self.modules["bf16"].values())


def check_plain(model: Transformer, args: Namespace) -> None:
    """Raise a `UserError` unless every Linear is bf16 and can be rounded to int4."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    if any(type(linear) is not Linear for linear in linears.values()):
        raise UserError(
            f"{args.model_path} is quantized already; pass the model.pth it was made of"
        )
    quantize.check_groups(linears, dict.fromkeys(linears, "int4"), args.groupsize)


def levels(groupsize: int) -> list[str]:
    """The schemes that an int4 Linear may be raised to, as in `quantize.py --critical_layers`."""
    return ["int8"] + ["int4.g32"] * (groupsize > 32)


def make_variants(model: Transformer, groupsize: int) -> Variants:
    """Quantize every Linear of a bf16 model to each scheme, as quantize.py does; keeps the model.

    An int4 module is a plain Linear with the dequantized weight: it computes what an `Int4Linear`
    does with many rows, without unpacking in each run. Each group size takes the memory of another
    bf16 model.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    schemes = (*levels(groupsize), "int4")
    modules: dict[str, dict[str, Linear]] = {"bf16": linears} | {scheme: {} for scheme in schemes}
    nbytes: dict[str, dict[str, int]] = {scheme: {} for scheme in modules}
    for name, linear in tqdm(linears.items(), "quantizing", unit="matrix"):
        nbytes["bf16"][name] = linear.weight.nbytes
        for scheme in schemes:
            tensors = quantize.quantize(linear.weight, scheme, groupsize)
            nbytes[scheme][name] = sum(tensor.nbytes for tensor in tensors.values())
            module = linear_for(linear, tensors)
            module.load_state_dict(tensors, assign=True, strict=False)
            if scheme != "int8":
                weight = module.dequantize()
                with torch.device("meta"):
                    module = Linear(linear.in_features, linear.out_features, experts=linear.experts)
                module.weight = torch.nn.Parameter(weight)
            module.bias = linear.bias
            modules[scheme][name] = module.requires_grad_(False)
    return Variants(model, modules, nbytes)


# ------------------------------------------------------------------------------------------------
# Ranking, choosing, and the state of interrupted runs


def mean_and_error(losses: Tensor) -> tuple[float, float]:
    """Mean of independent losses `[N]` and its standard error."""
    return losses.mean().item(), losses.std().item() / math.sqrt(len(losses))


def fingerprint(args: Namespace, device: torch.device, parts: dict[str, Tensor]) -> dict:
    """Everything that results depend on: results with another fingerprint are not reused."""
    text = json.dumps([part.tolist() for part in parts.values()])
    checkpoint = hashlib.sha256()
    with open(args.model_path, "rb") as file:
        while chunk := file.read(2**20):
            checkpoint.update(chunk)
    return {
        "checkpoint": checkpoint.hexdigest(),
        "text": hashlib.sha256(text.encode()).hexdigest(),
        "metric": args.metric,
        "groupsize": args.groupsize,
        "limit": args.limit,
        "max_seq_length": args.max_seq_length,
        "device": device.type,
        "torch": torch.__version__,
    }


def state_file(report: Path) -> Path:
    return report.with_name(f"{report.name}.state.json")


def read_state(args: Namespace, of: dict, count: int) -> dict:
    """The results of an interrupted run with this fingerprint; `UserError` on another one.

    Each holds `count` losses.
    """
    path, advice = state_file(args.report_file), "delete it to start anew"
    if not os.path.exists(path):
        return {"of": of, "losses": {}}
    state = read_json(path, advice)
    known = state.get("of") if isinstance(state.get("of"), dict) else {}
    changed = [name.replace("_", " ") for name in of if known.get(name) != of[name]]
    if changed:
        raise UserError(
            f"{path} is of an interrupted run with another {', '.join(changed)}; {advice}, "
            "or name another --report_file"
        )
    losses = state.get("losses")
    rows = [*losses.values()] if isinstance(losses, dict) else [None]
    for row in rows:
        values = row if isinstance(row, list) else []
        fit = all(type(x) in (int, float) and abs(x) < 1e15 for x in values)
        if len(values) != count or not fit:
            raise UserError(f"{path} is damaged; {advice}")
    return state


class Move(NamedTuple):
    """A Linear raised from int4 to `scheme`: the bytes it costs, the loss it saves."""

    name: str
    scheme: str
    extra: int
    saved: float
    error: float = 0.0  # standard error of `saved`


def measure(variants: Variants, losses: Losses, state: dict, path: Path) -> list[Move]:
    """Raise each Linear alone to each level, and measure the loss saved on the ranking part.

    Losses are saved to the state file as they are measured, and read from it if they are there.
    """
    names = [*variants.modules["int4"]]
    schemes = [scheme for scheme in variants.modules if scheme not in ("bf16", "int4")]
    trials = {f"{name}={scheme}": (name, scheme) for name in names for scheme in schemes}
    variants.use(dict.fromkeys(names, "int4"))
    found = state["losses"] = {k: v for k, v in state["losses"].items() if k in ("", *trials)}
    if len(found) <= len(trials):
        losses.remember("ranking")
    if found:
        print(f"going on after {len(found) - 1} of {len(trials)} trials", file=sys.stderr)
    missing = [key for key in ("", *trials) if key not in found]
    for key in tqdm(missing, "raising", unit="trial"):
        name, scheme = trials.get(key, ("", ""))
        block = name.split(".")[1] if name.startswith("layers.") else len(variants.model.layers)
        variants.use({name: scheme} if name else {})
        found[key] = losses("ranking", int(block) if name else 0).tolist()
        variants.use({name: "int4"} if name else {})
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")
    moves, before = [], torch.tensor(found[""], dtype=torch.float64)
    for key, (name, scheme) in trials.items():
        extra = variants.nbytes[scheme][name] - variants.nbytes["int4"][name]
        after = torch.tensor(found[key], dtype=torch.float64)
        moves.append(Move(name, scheme, extra, *mean_and_error(before - after)))
    return moves


def rank(moves: list[Move], chosen: dict[str, str]) -> list[dict]:
    """A row for each Linear, sorted by loss saved per byte; unprefixed metrics are int8."""
    rows, best = {}, {}
    for name, scheme, extra, saved, error in moves:
        row = rows.setdefault(name, {"name": name, "role": name.rpartition(".")[2]})
        row["scheme"] = chosen.get(name, "int4")
        worth = saved / extra * 1e6
        best[name] = max(worth, best.get(name, worth))
        if scheme == "int8":
            row |= {"extra_bytes": extra, "saved": saved, "saved_error": error, "per_mb": worth}
        else:
            row |= {"g32_saved": saved, "g32_error": error, "g32_per_mb": worth}
    order = sorted(rows.values(), key=lambda row: -best[row["name"]])
    return [{"row": "layer", "rank": place, **row} for place, row in enumerate(order, 1)]


def choose(moves: list[Move], room: float) -> dict[str, str]:
    """Greedily choose Linears to raise, by loss saved per byte, within `room` bytes.

    A raised Linear may be raised further, at the difference of costs and savings.
    """
    chosen: dict[str, Move] = {}
    while True:
        best = None
        for move in moves:
            now = chosen.get(move.name, Move(move.name, "int4", 0, 0.0))
            extra, saved = move.extra - now.extra, move.saved - now.saved
            if 0 < extra <= room and saved > 0 and (best is None or saved / extra > best[0]):
                best = saved / extra, extra, move
        if best is None:
            return {name: move.scheme for name, move in chosen.items()}
        room -= best[1]
        chosen[best[2].name] = best[2]


def built_in_hybrid(names: list[str]) -> dict[str, str]:
    """The int8 Linears of `quantize.py --mode hybrid` by default."""
    patterns = quantize.INT8_IN_HYBRID
    return {n: "int8" for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)}


def random_choices(moves: list[Move], room: float, count: int) -> list[dict[str, str]]:
    """`count` random choices that fill `room` bytes as `choose` does."""
    draw = random.Random(0).random
    return [
        choose([move._replace(saved=move.extra * draw()) for move in moves], room)
        for _ in range(count)
    ]


def confirm(
    variants: Variants, losses: Losses, choices: dict[str, list[dict[str, str]]]
) -> list[dict]:
    """Measure whole models on both parts; returns a row for each title.

    `choices` are schemes of Linears; the other Linears are int4. Several choices of one title make
    one row of means, with the standard error over them.
    """
    names = [*variants.modules["int4"]]
    rows = []
    for title, several in tqdm(choices.items(), "confirming", unit="model"):
        found = collections.defaultdict(list)
        for raised in several:
            schemes = dict.fromkeys(names, "int4") | raised
            variants.use(schemes)
            found["bits"].append(variants.bits(schemes))
            for part in PARTS:
                found[part].append(losses(part, 0))
        parts = [found[part] for part in PARTS]
        losses_of = [one[0] if len(several) == 1 else torch.stack(one).mean(1) for one in parts]
        rows.append(model_row(title, sum(found["bits"]) / len(several), losses_of))
    return rows


def model_row(title: str, bits: float, losses: list[Tensor]) -> dict:
    """The row of a whole model, from its losses on both parts."""
    row = {"row": "model", "name": title, "bits": bits}
    for part, numbers in zip(PARTS, losses, strict=True):
        key = part.replace(" ", "_")
        row[f"{key}_loss"], row[f"{key}_error"] = mean_and_error(numbers)
    return row


# ------------------------------------------------------------------------------------------------
# The report


def loss_name(metric: str) -> str:
    names = {"kl": "KL divergence from bf16 (nats)", "perplexity": "-log probability (nats)"}
    return names.get(metric, f"{metric}, negated if higher is better")


def models_table(models: list[dict], metric: str) -> str:
    titles = ["model", "bits a weight", "ranking part", "±", "held-back part", "±"]
    keys = ["ranking_loss", "ranking_error", "held_back_loss", "held_back_error"]
    rows = [[row["name"], row["bits"], *(f"{row[key]:.5f}" for key in keys)] for row in models]
    if metric == "perplexity":
        titles.append("held-back perplexity")
        rows = [[*row, math.exp(m["held_back_loss"])] for row, m in zip(rows, models, strict=True)]
    return table(titles, rows)


def report_text(args: Namespace, layers: list[dict], models: list[dict], sizes: str) -> str:
    """The whole report as Markdown."""
    what = f"lm-eval's {args.metric}" if args.metric not in ("kl", "perplexity") else args.text.name
    counts = collections.Counter(row["scheme"] for row in layers if row["scheme"] != "int4")
    raised = ", ".join(f"{count} in {scheme}" for scheme, count in counts.items()) or "none"
    parts = [
        "# What each Linear costs in int4\n",
        f"{args.model_path}, groups of {args.groupsize}. Loss: {loss_name(args.metric)}, on "
        f"{what}: {sizes}. The first part ranks, the second one is held back to confirm. ± is one "
        "standard error.\n",
        f"Chosen under the budget of {args.budget:.4f} bits a weight: of {len(layers)} Linears "
        f"{raised}.\n",
        models_table(models, args.metric),
        "## Layers, by the loss that int8 or int4.g32 saves a megabyte\n",
        "Each is raised alone, everything else being int4. A Linear whose saving is within one or "
        "two standard errors of zero has no certain rank.\n",
    ]
    titles = ["rank", "layer", "scheme", "extra bytes", "saved", "±", "saved a MB"]
    keys = ["saved", "saved_error", "per_mb"]
    if "g32_saved" in layers[0]:
        titles += ["by int4.g32", "±", "by it a MB"]
        keys += ["g32_saved", "g32_error", "g32_per_mb"]
    rows = []
    for row in layers:
        numbers = [f"{row[key]:.6f}" for key in keys]
        rows.append([row["rank"], row["name"], row["scheme"], row["extra_bytes"], *numbers])
    return "\n".join([*parts, table(titles, rows)])


def csv_rows(layers: list[dict], models: list[dict]) -> list[dict]:
    """Layers and models as rows with the same columns."""
    columns = dict.fromkeys(itertools.chain(*layers, *models))
    return [{column: row.get(column) for column in columns} for row in [*models, *layers]]


def draw(layers: list[dict], metric: str, path: Path) -> None:
    """Three charts of the loss that int8 saves: by block and role, by role, over bytes."""
    figure, axes = chart(1, 3, (16, 5))
    inner = [row for row in layers if row["name"].startswith("layers.")]
    for row in inner:
        row["block"] = int(row["name"].split(".")[1])
    for role in ROLES:
        own = sorted((row for row in inner if row["role"] == role), key=lambda row: row["block"])
        if own:
            axes[0].plot(
                [row["block"] for row in own], [row["saved"] for row in own], "o-", ms=3, label=role
            )
    axes[0].set(title="Saved by int8, by block", xlabel="block", ylabel=loss_name(metric))
    axes[0].axhline(0, color="grey", lw=0.5)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend()
    sums = {role: sum(r["saved"] for r in layers if r["role"] == role) for role in ROLES}
    costs = {role: sum(r["extra_bytes"] for r in layers if r["role"] == role) for role in ROLES}
    axes[1].bar([*sums], [*sums.values()])
    for place, role in enumerate(ROLES):
        axes[1].text(
            place, max(0, sums[role]), f"{costs[role] / 1e6:.3g} MB", ha="center", va="bottom"
        )
    axes[1].set(title="Sum over the layers of a role, and its extra bytes")
    saved = list(itertools.accumulate(max(0, row["saved"]) for row in layers))
    bytes_used = list(itertools.accumulate(row["extra_bytes"] / 1e6 for row in layers))
    axes[2].plot([0, *bytes_used], [0, *saved])
    axes[2].set(title="Sum of single savings, in the order of rank", xlabel="extra MB")
    figure.savefig(path, format="png")
    for row in inner:
        del row["block"]


def entries(chosen: dict[str, str]) -> list[str]:
    """A choice in the syntax of --critical_layers; a name alone means int8."""
    return [name if scheme == "int8" else f"{name}={scheme}" for name, scheme in chosen.items()]


def write_all(args: Namespace, layers: list[dict], models: list[dict], sizes: str) -> list[Path]:
    """Write the report, its chart and the list of layers; returns their paths."""
    text = report_text(args, layers, models, sizes)
    for path in reports(args.report_file):
        drawing = functools.partial(draw, layers, args.metric)
        write_report(path, text, csv_rows(layers, models), drawing)
    if args.layers_file:
        chosen = {row["name"]: row["scheme"] for row in layers if row["scheme"] != "int4"}
        with replacing(args.layers_file) as temporary:
            temporary.write_text("".join(f"{e}\n" for e in entries(chosen)), encoding="utf-8")
    return [*reports(args.report_file), *([args.layers_file] if args.layers_file else [])]


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.group("model")
    add("--model_path", type=named_path, required=True, help="a bf16 model.pth")
    add("--device", help="cpu, cuda, cuda:1, … (default: $DEVICE, else cuda if available)")
    sizes = quantize.GROUP_SIZES
    add("--groupsize", type=int, default=32, choices=sizes, help="of int4 (default: 32)")
    add = parser.group("measurement")
    add("--metric", default="kl", help="kl, perplexity, or the name of an lm-eval task")
    add("--text", type=named_path, default=README, help="half of it ranks (default: README)")
    add(
        "--include_path", type=named_path, metavar="DIR", help="a folder with further lm-eval tasks"
    )
    add("--limit", type=bounded(int, 2), default=8, help="sequences or documents of each half")
    add("--max_seq_length", type=bounded(int, 2), default=256, help="tokens of a sequence")
    add = parser.group("choice")
    budget = "bits a weight of all Linears (default: those of quantize.py's hybrid)"
    add("--budget", type=bounded(float, 0, 16), metavar="BITS", help=budget)
    about = "random choices of the same size for comparison (default: 10)"
    add("--random_choices", type=bounded(int, 2, 10000), default=10, metavar="N", help=about)
    add = parser.group("output")
    add("--report_file", type=output_file, required=True, help="ends in .txt, .md, .csv or .png")
    add("--layers_file", type=output_file, metavar="OUT", help="write the layers for quantize.py")
    add("--quantize", action="store_true", help="write the checkpoint, calibrated on the text")
    return parser


def check_flags(args: Namespace) -> bool:
    """Whether the loss is on text; UserError if a flag has no effect or a file would be lost."""
    outputs = [*reports(args.report_file), state_file(args.report_file), args.layers_file]
    check_outputs(outputs, [args.text], [args.model_path])
    on_text = args.metric in ("kl", "perplexity")
    if on_text and args.include_path:
        raise UserError("--include_path goes with --metric TASK; leave it out")
    if not on_text and args.text != README:
        raise UserError("--text goes with --metric kl or perplexity; leave it out")
    if args.quantize and not on_text:
        raise UserError("--quantize calibrates on the --text that ranks; leave out --metric")
    stem = f"{args.model_path.stem}_"
    for mode, custom in (("hybrid", True), ("int4", False)) if args.quantize else ():
        name = quantize.file_name(mode, args.groupsize, custom, stem)
        check_outputs([args.model_path.with_name(name)], [args.text], [args.model_path])
    return on_text


def find_budget(args: Namespace, variants: Variants, hybrid: dict[str, str]) -> float:
    """The budget in bits a weight; `UserError` if int4 alone exceeds it."""
    names = [*variants.modules["int4"]]
    least = variants.bits(dict.fromkeys(names, "int4"))
    if args.budget is not None and args.budget < least:
        raise UserError(f"--budget {args.budget} is less than all int4 takes, {least:.4f} bits")
    in_hybrid = dict.fromkeys(names, "int4") | hybrid
    return variants.bits(in_hybrid) if args.budget is None else args.budget


def alternatives(
    variants: Variants, moves: list[Move], room: float, args: Namespace
) -> dict[str, list[dict[str, str]]]:
    """The choice and those to compare it with, by title."""
    names, int8 = [*variants.modules["int4"]], [move for move in moves if move.scheme == "int8"]
    titles = {scheme: [dict.fromkeys(names, scheme)] for scheme in variants.modules}
    found = {"bf16": titles.pop("bf16")}
    found |= {f"all {scheme}": choice for scheme, choice in titles.items()}
    found |= {"built-in hybrid": [built_in_hybrid(names)], "chosen": [choose(moves, room)]}
    if len(int8) < len(moves):
        found["chosen, int8 alone"] = [choose(int8, room)]
    some = random_choices(moves, room, args.random_choices)
    return found | {f"{len(some)} random choices, mean": some}


def write_checkpoint(
    args: Namespace,
    device: torch.device,
    chosen: dict[str, str],
    parts: dict[str, Tensor],
    losses: TextLosses,
) -> dict:
    """Quantize as chosen, calibrated on the ranking part; returns the checkpoint's row."""
    flags = ["--checkpoint_path", str(args.model_path), "--groupsize", str(args.groupsize)]
    if chosen:
        flags += ["--mode", "hybrid", "--critical_layers", *entries(chosen)]
    else:
        flags += ["--mode", "int4"]
    options = quantize.make_parser().parse_args(flags)
    options = replaced(options, device=device)
    model, schemes = quantize.prepare(options, device)
    sequences = [*parts["ranking"][:, :-1]]
    path, bits = quantize.write(options, model, schemes, sequences)
    losses.model = load_model(path, device)
    return model_row(f"written, {path.name}", bits, [losses(part) for part in PARTS])


def main(args: Namespace) -> None:
    on_text = check_flags(args)
    device = find_device(args.device)
    model, tokenizer = load(args.model_path, device, "bfloat16")
    if args.max_seq_length > model.args.block_size:
        raise UserError(f"--max_seq_length is over the model's context, {model.args.block_size}")
    parts = read_parts(args, tokenizer, device) if on_text else {}
    of = fingerprint(args, device, parts)
    check_plain(model, args)
    if on_text:
        losses = TextLosses(model, parts, args.metric)
        count = len(parts["ranking"])
        sizes = f"2 parts of {count} sequences of {args.max_seq_length} tokens"
    else:
        losses = TaskLosses(model, tokenizer, args)
        count = len(losses.documents["ranking"])
        sizes = f"2 parts of {count} documents"
    state = read_state(args, of, count)
    variants = make_variants(model, args.groupsize)
    hybrid = built_in_hybrid([*variants.modules["int4"]])
    args = replaced(args, budget=find_budget(args, variants, hybrid))
    moves = measure(variants, losses, state, state_file(args.report_file))
    room = args.budget * variants.weights / 8
    room -= variants.total(dict.fromkeys(variants.modules["int4"], "int4"))
    chosen = choose(moves, room)
    layers = rank(moves, chosen)
    models = confirm(variants, losses, alternatives(variants, moves, room, args))
    if args.quantize:
        models.append(write_checkpoint(args, device, chosen, parts, losses))
    written = write_all(args, layers, models, sizes)
    state_file(args.report_file).unlink(missing_ok=True)
    print(models_table(models, args.metric), end="")
    best = ", ".join(f"{row['name']} ({shown(row['saved'])})" for row in layers[:3])
    print(f"most saved a byte: {best}\nwritten: {', '.join(map(str, written))}")


if __name__ == "__main__":
    run(main, make_parser())
