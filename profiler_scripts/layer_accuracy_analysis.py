"""Measures what each Linear costs in accuracy when it is int4, and chooses those to keep in int8.

    python profiler_scripts/layer_accuracy_analysis.py --model_path model.pth --report_file r.md

Everything starts in int4. One Linear at a time is raised to int8, and the loss that this saves is
divided by the bytes it costs. The Linears that save most a byte are taken as long as they fit the
budget, and the model so made is measured once more on text that had no part in the choice.

The loss is by default the KL divergence of the bf16 model's next-token distributions from those of
the rounded one. A Linear of block i changes nothing before block i, so what enters each block of
the int4 model is kept and only the blocks from i on are run. The time goes into these runs, half
a model on average for each Linear, plus the output matrix; for SmolLM2-135M's 151 Linears with the
default limit some minutes on two cores. An lm-eval task runs in full for each of them: hours.

`quantize.py --mode hybrid --critical_layers @FILE` takes the list written by --layers_file.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import find_device
from cli import Parser, UserError, number, output_file, read_json, read_text, replacing, run
from engine import load
from eval import Evaluator, lm_eval
from linear import Linear, linear_for
from model import Transformer, TransformerBlock
from profiler_scripts.profiler_analysis import (
    ROLES,
    chart,
    check_suffix,
    shown,
    table,
    write_report,
)
from quantize import GROUP_SIZES, INT8_IN_HYBRID, check_groups, quantize
from tokenizer import Tokenizer

README = Path(__file__).resolve().parents[1] / "README.md"
TOP = 1024  # tokens of a reference distribution that are told apart; the others are one event
BATCH_TOKENS, BATCH_LOGITS = 2048, 2**28  # bounds of what runs at once
Losses = Callable[[str, int], Tensor]  # of a part of the data, if blocks before the int are int4

# ------------------------------------------------------------------------------------------------
# The model in int4, each Linear ready in int8


@dataclasses.dataclass
class Variants:
    """A model whose Linears can be exchanged: by scheme, then by name, the modules and the bytes
    that a checkpoint stores of each (scales included, a bias not)."""

    model: Transformer
    modules: dict[str, dict[str, Linear]]
    nbytes: dict[str, dict[str, int]]

    def use(self, schemes: dict[str, str]) -> None:
        """Put these Linears, by name, into these schemes."""
        for name, scheme in schemes.items():
            self.model.set_submodule(name, self.modules[scheme][name])

    def total(self, schemes: dict[str, str]) -> int:
        return sum(self.nbytes[scheme][name] for name, scheme in schemes.items())

    def bits(self, schemes: dict[str, str]) -> float:
        """Bits a weight over all Linears."""
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
    check_groups(linears, dict.fromkeys(linears, "int4"), args.groupsize)


def make_variants(model: Transformer, groupsize: int) -> Variants:
    """Round every Linear of a bf16 model both ways, as quantize.py does; the model stays as it is.

    An int4 module is a plain Linear with the dequantized weight: what an `Int4Linear` computes with
    many rows, without unpacking at each run. It takes the memory of the bf16 model once more.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    modules: dict[str, dict[str, Linear]] = {"bf16": linears, "int8": {}, "int4": {}}
    nbytes: dict[str, dict[str, int]] = {scheme: {} for scheme in modules}
    for name, linear in tqdm(linears.items(), "quantizing", unit="matrix"):
        nbytes["bf16"][name] = linear.weight.nbytes
        for scheme in ("int8", "int4"):
            tensors = quantize(linear.weight, scheme, groupsize)
            nbytes[scheme][name] = sum(tensor.nbytes for tensor in tensors.values())
            module = linear_for(linear, tensors)
            module.load_state_dict(tensors, assign=True, strict=False)
            if scheme == "int4":
                weight = module.dequantize()
                with torch.device("meta"):
                    module = Linear(linear.in_features, linear.out_features, experts=linear.experts)
                module.weight = torch.nn.Parameter(weight)
            module.bias = linear.bias
            modules[scheme][name] = module.requires_grad_(False)
    return Variants(model, modules, nbytes)


# ------------------------------------------------------------------------------------------------
# Losses on text


class TextLosses:
    """Losses of a model on sequences of a text, one number a sequence: KL or negative log prob.

    Called with the first block that is not what it was at the last `remember`.
    """

    def __init__(self, model: Transformer, parts: dict[str, Tensor], metric: str):
        """`parts` `[N, T + 1]` are token ids; the last one of a row is only predicted.

        The model is the reference as it is now. Of each of its distributions the `TOP` likeliest
        tokens are kept: lumping the rest makes the divergence smaller, by what lies in their tail.
        """
        self.model, self.metric = model, metric
        length = next(iter(parts.values())).shape[1] - 1
        rows = max(1, min(BATCH_TOKENS // length, BATCH_LOGITS // length // model.args.vocab_size))
        self.batches = {name: part.split(rows) for name, part in parts.items()}
        self.states: dict[str, list[list[Tensor]]] = {name: [] for name in parts}
        self.reference: dict[str, list] = {name: [] for name in parts}
        if metric == "kl":
            for name, batches in self.batches.items():
                for batch in batches:
                    logits = self.logits(batch)
                    tops = [likeliest(row) for row in logits]
                    self.reference[name].append([torch.stack(x) for x in zip(*tops, strict=True)])

    def logits(
        self,
        batch: Tensor,
        start: int = 0,
        states: list[Tensor] | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits `[B, T, V]` of a batch; `states` has what enters each block, up to `start`."""
        model, (rows, length) = self.model, (batch.shape[0], batch.shape[1] - 1)
        cache = model.layers[0].attention.kv_cache
        if cache is None or cache.k_cache.shape[0] != rows:
            model.setup_caches(rows, length)
        places = itertools.count()

        def block(layer: TransformerBlock, x: Tensor, *rest: Tensor) -> Tensor:
            if next(places) < start:
                return states[start]
            y = TransformerBlock.forward(layer, x, *rest)
            if record is not None:
                record.extend([x, y] if not record else [y])
            return y

        positions = torch.arange(length, device=batch.device).expand(rows, -1)
        return model(batch[:, :-1], positions, length, block=block).logits

    def remember(self, part: str) -> None:
        """Keep what enters every block, so that a later run may start at any."""
        self.states[part] = [[] for _ in self.batches[part]]
        for batch, record in zip(self.batches[part], self.states[part], strict=True):
            self.logits(batch, record=record)

    def __call__(self, part: str, start: int = 0) -> Tensor:
        """Mean loss of each sequence of a part, float64 `[N]`."""
        losses = []
        for i, batch in enumerate(self.batches[part]):
            logits = self.logits(batch, start, self.states[part][i] if start else None)
            for row, one in enumerate(logits):
                if self.metric == "kl":
                    reference = [values[row] for values in self.reference[part][i]]
                    losses.append(divergence(one, *reference))
                else:
                    log_probs = one.float().log_softmax(-1)
                    losses.append(-log_probs.gather(-1, batch[row, 1:].unsqueeze(-1)).mean())
        return torch.stack(losses).double().cpu()


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits `[T, V]`: the tokens that are told apart and their log probs, two `[T, K]`."""
    log_probs = logits.float().log_softmax(-1)
    values, tokens = log_probs.topk(min(TOP, logits.shape[-1]))
    return tokens, values


def divergence(logits: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """Mean KL divergence, in nats, of logits `[T, V]` from what `likeliest` gave; 0 if it is them.

    All tokens but those of the reference count as one event of its own probability.
    """
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens)  # [T, K]
    probs = reference.exp()
    rest, other = (
        (1 - p.sum(-1)).clamp(min=1e-6) for p in (probs, log_probs.exp())
    )  # float32 cannot tell less
    told = (probs * (reference - log_probs)).sum(-1)
    return (told + rest * (rest / other).log()).mean()


def read_parts(args: Namespace, tokenizer: Tokenizer, device: torch.device) -> dict[str, Tensor]:
    """Cut the text into sequences: its first half to rank by, and its second half held back."""
    ids = tokenizer.encode(read_text(args.text), bos=False)
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    length = args.max_seq_length + 1 - len(first)  # of a sequence, with the token it ends before
    half = min(args.limit, len(ids) // length // 2)
    if half < 2:
        raise UserError(
            f"--text {args.text} has {len(ids)} tokens and {4 * length} are needed, for two "
            "sequences to rank by and two to confirm; pass more text or lower --max_seq_length"
        )
    middle = len(ids) // 2
    parts = {"ranking": ids[:middle], "held back": ids[middle:]}
    return {
        name: torch.tensor(
            [first + part[i * length : (i + 1) * length] for i in range(half)], device=device
        )
        for name, part in parts.items()
    }


# ------------------------------------------------------------------------------------------------
# Losses on a task of lm-eval


class TaskLosses:
    """Losses of a model on documents of an lm-eval task, one number a document.

    The number is the task's first metric that every document has one of, negated if higher is
    better. The documents before --limit rank, as many after them confirm.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, args: Namespace):
        if lm_eval is None:
            raise UserError(f"--metric {args.metric} needs lm-eval; run `pip install lm-eval`")
        from lm_eval.tasks import TaskManager

        self.name, manager = args.metric, TaskManager(include_path=args.include_path)
        if self.name not in manager.all_tasks:
            raise UserError(
                f"--metric {self.name} is neither kl nor perplexity nor a task of lm-eval; "
                "`lm-eval ls tasks` lists them, --include_path DIR adds those of a folder"
            )
        try:
            self.loaded = manager.load([self.name])
            self.task = next(iter(self.loaded["tasks"].values()))
            count = len(self.task.eval_docs)
        except (OSError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"lm-eval cannot load {self.name} ({reason})") from None
        if len(self.loaded["tasks"]) != 1 or count < 4:
            raise UserError(f"--metric {self.name} should be one task with four documents or more")
        if self.task.get_config("num_fewshot") is None:
            self.task.set_config(key="num_fewshot", value=0)
        half = min(args.limit, count // 2)
        documents = {"ranking": range(half), "held back": range(half, 2 * half)}
        self.documents = {part: list(numbers) for part, numbers in documents.items()}
        self.evaluator = Evaluator(model, tokenizer, 8, args.max_seq_length)

    def remember(self, part: str) -> None:
        """Nothing: a task is always run in full."""

    def __call__(self, part: str, start: int = 0) -> Tensor:
        self.task.set_fewshot_seed(seed=1234)  # the same examples every time, lm-eval's own
        results = lm_eval.evaluate(  # simple_evaluate would ask the system about itself each time
            self.evaluator,
            self.loaded,
            samples={self.name: self.documents[part]},
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = sorted(results["samples"][self.name], key=lambda sample: sample["doc_id"])
        for metric, higher in results["higher_is_better"][self.name].items():
            values = [sample.get(metric) for sample in samples]
            if all(isinstance(value, int | float) for value in values) and higher is not None:
                return torch.tensor(values, dtype=torch.float64) * (-1 if higher else 1)
        raise UserError(f"--metric {self.name}: it has no metric with a number for each document")


# ------------------------------------------------------------------------------------------------
# Ranking, choosing, and what is kept for the next time


def mean_and_error(losses: Tensor) -> tuple[float, float]:
    """Mean of independent losses `[N]` and its standard error."""
    return losses.mean().item(), losses.std().item() / math.sqrt(len(losses))


def fingerprint(args: Namespace, device: torch.device) -> dict:
    """What results depend on: those of another fingerprint are not taken up."""
    on_task = args.metric not in ("kl", "perplexity")
    checkpoint = hashlib.sha256()
    with open(args.model_path, "rb") as file:
        while chunk := file.read(2**20):
            checkpoint.update(chunk)
    return {
        "checkpoint": checkpoint.hexdigest(),
        "text": "" if on_task else hashlib.sha256(args.text.read_bytes()).hexdigest(),
        "metric": args.metric,
        "groupsize": args.groupsize,
        "limit": args.limit,
        "max_seq_length": args.max_seq_length,
        "device": device.type,
        "torch": torch.__version__,
    }


def state_file(report: Path) -> Path:
    return report.with_name(f"{report.name}.state.json")


def read_state(args: Namespace, of: dict) -> dict:
    """What an interrupted run with this fingerprint had found; `UserError` on another's."""
    path = state_file(args.report_file)
    if not path.exists():
        return {"of": of, "losses": {}}
    state = read_json(path)
    known = state.get("of") if isinstance(state.get("of"), dict) else {}
    changed = [name.replace("_", " ") for name in of if known.get(name) != of[name]]
    if changed:
        raise UserError(
            f"{path} is of an interrupted run with another {', '.join(changed)}; delete it to "
            "start anew, or name another --report_file"
        )
    return state


def measure(variants: Variants, losses: Losses, state: dict, path: Path) -> dict[str, Tensor]:
    """Losses on the ranking part with each Linear raised to int8, and of all int4 as "".

    Each is written to the state file once it is known, and taken from there if it is known.
    """
    names = [*variants.modules["int4"]]
    variants.use(dict.fromkeys(names, "int4"))
    found = state["losses"]
    if len(found) <= len(names):
        losses.remember("ranking")
    if found:
        print(f"going on after {len(found) - 1} of {len(names)} layers", file=sys.stderr)
    missing = [name for name in ("", *names) if name not in found]
    for name in tqdm(missing, "raising to int8", unit="layer"):
        block = name.split(".")[1] if name.startswith("layers.") else len(variants.model.layers)
        variants.use({name: "int8"} if name else {})
        found[name] = losses("ranking", int(block) if name else 0).tolist()
        variants.use({name: "int4"} if name else {})
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def rank(variants: Variants, found: dict[str, Tensor]) -> list[dict]:
    """A row for each Linear, the one that saves most a byte first."""
    rows = []
    for name in variants.modules["int4"]:
        saved, error = mean_and_error(found[""] - found[name])
        extra = variants.nbytes["int8"][name] - variants.nbytes["int4"][name]
        row = {"name": name, "role": name.rpartition(".")[2], "extra_bytes": extra}
        rows.append(row | {"saved": saved, "saved_error": error, "per_mb": saved / extra * 1e6})
    rows.sort(key=lambda row: -row["per_mb"])
    return [{"row": "layer", "rank": place, **row} for place, row in enumerate(rows, 1)]


def choose(rows: list[dict], room: float) -> set[str]:
    """Of these rows, in their order, the Linears that fit `room` bytes and save something."""
    chosen = set()
    for row in rows:
        if row["saved"] > 0 and row["extra_bytes"] <= room:
            chosen.add(row["name"])
            room -= row["extra_bytes"]
    return chosen


def built_in_hybrid(names: list[str]) -> set[str]:
    """The Linears that `quantize.py --mode hybrid` stores in int8 when nothing is named."""
    return {n for n in names if any(fnmatchcase(n, pattern) for pattern in INT8_IN_HYBRID)}


def random_choices(rows: list[dict], room: float, count: int) -> list[set[str]]:
    """So many choices of Linears, whatever they save, that fill `room` bytes like `choose` does."""
    shuffle, choices = random.Random(0).sample, []
    for _ in range(count):
        order = [row | {"saved": 1.0} for row in shuffle(rows, len(rows))]
        choices.append(choose(order, room))
    return choices


def confirm(variants: Variants, losses: Losses, choices: dict[str, list[set[str]]]) -> list[dict]:
    """A row for each whole model that the choice is to be compared with, on both parts.

    `choices` are sets of Linears in int8, the others in int4. Several of one title make one row of
    means, whose error is that among the sets.
    """
    names = [*variants.modules["int4"]]
    rows = []
    for title, sets in tqdm(choices.items(), "confirming", unit="model"):
        row, found = {"row": "model", "name": title}, collections.defaultdict(list)
        for int8 in sets:
            schemes = {name: "int8" if name in int8 else "int4" for name in names}
            schemes = dict.fromkeys(names, "bf16") if title == "bf16" else schemes
            variants.use(schemes)
            found["bits"].append(variants.bits(schemes))
            for part in ("ranking", "held back"):
                found[part].append(losses(part, 0))
        row["bits"] = sum(found["bits"]) / len(sets)
        for part in ("ranking", "held back"):
            numbers = found[part][0] if len(sets) == 1 else torch.stack(found[part]).mean(1)
            key = part.replace(" ", "_")
            row[f"{key}_loss"], row[f"{key}_error"] = mean_and_error(numbers)
        rows.append(row)
    return rows


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
    chosen = sum(row["scheme"] == "int8" for row in layers)
    parts = [
        "# What each Linear costs in int4\n",
        f"{args.model_path}, groups of {args.groupsize}. Loss: {loss_name(args.metric)}, on "
        f"{what}: {sizes}. The first part ranks, the second one is held back to confirm. ± is one "
        "standard error.\n",
        f"Under the budget of {args.budget:.4f} bits a weight {chosen} of {len(layers)} Linears "
        "are chosen for int8.\n",
        models_table(models, args.metric),
        "## Layers, by the loss that int8 saves a megabyte\n",
        "Each is raised alone, everything else being int4. A Linear whose saving is within one or "
        "two standard errors of zero has no certain rank.\n",
    ]
    titles = ["rank", "layer", "scheme", "extra bytes", "saved", "±", "saved a MB"]
    rows = []
    for row in layers:
        numbers = [f"{row[key]:.6f}" for key in ("saved", "saved_error", "per_mb")]
        rows.append([row["rank"], row["name"], row["scheme"], row["extra_bytes"], *numbers])
    return "\n".join([*parts, table(titles, rows)])


def csv_rows(layers: list[dict], models: list[dict]) -> list[dict]:
    """Layers and models as rows with the same columns."""
    columns = dict.fromkeys(itertools.chain(*layers, *models))
    return [{column: row.get(column) for column in columns} for row in [*models, *layers]]


def draw(layers: list[dict], metric: str, path: Path) -> None:
    """Three charts: what int8 saves by block and role, by role, and over the bytes it costs."""
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


def write_all(args: Namespace, layers: list[dict], models: list[dict], sizes: str) -> list[Path]:
    """Write the report, its chart and the list of layers; the paths of the files."""
    text, report = report_text(args, layers, models, sizes), args.report_file
    reports = [report, report.with_suffix(".md" if report.suffix == ".png" else ".png")]
    for path in reports:
        drawing = functools.partial(draw, layers, args.metric)
        write_report(path, text, csv_rows(layers, models), drawing)
    if args.layers_file:
        names = [row["name"] for row in layers if row["scheme"] == "int8"]
        with replacing(args.layers_file) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return [*reports, *([args.layers_file] if args.layers_file else [])]


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_path", type=Path, required=True, help="a bf16 model.pth")
    add("--report_file", type=output_file, required=True, help="ends in .txt, .md, .csv or .png")
    add("--metric", default="kl", help="kl, perplexity, or the name of an lm-eval task")
    add("--text", type=Path, default=README, help="half of it ranks (default: README)")
    add("--include_path", type=Path, metavar="DIR", help="a folder with further lm-eval tasks")
    add("--limit", type=number(int, 2), default=8, help="sequences or documents of each half")
    add("--max_seq_length", type=number(int, 2), default=256, help="tokens of a sequence")
    add("--groupsize", type=int, default=32, choices=GROUP_SIZES, help="of int4")
    budget = "bits a weight of all Linears (default: those of quantize.py's hybrid)"
    add("--budget", type=number(float, 0, 16), metavar="BITS", help=budget)
    add("--layers_file", type=output_file, metavar="OUT", help="write the int8 layers, one a line")
    about = "chance choices of as many bytes to compare with (default: 10)"
    add("--random_choices", type=number(int, 2), default=10, metavar="N", help=about)
    add("--device", help="cpu, cuda, cuda:1, … (default: $DEVICE, else cuda if there is one)")
    return parser


def find_budget(args: Namespace, variants: Variants, hybrid: set[str]) -> float:
    """The bits a weight that may be used; `UserError` if int4 alone takes more."""
    names = [*variants.modules["int4"]]
    least = variants.bits(dict.fromkeys(names, "int4"))
    if args.budget is not None and args.budget < least:
        raise UserError(f"--budget {args.budget} is less than all int4 takes, {least:.4f} bits")
    in_hybrid = {name: "int8" if name in hybrid else "int4" for name in names}
    return variants.bits(in_hybrid) if args.budget is None else args.budget


def main(args: Namespace) -> None:
    check_suffix(args.report_file)
    if args.include_path and not args.include_path.is_dir():
        raise UserError(f"--include_path {args.include_path} is no folder; name the one with YAMLs")
    device = find_device(args.device)
    model, tokenizer = load(args.model_path, device, "bfloat16")
    if args.max_seq_length > model.args.block_size:
        raise UserError(f"--max_seq_length is over the model's context, {model.args.block_size}")
    on_text = args.metric in ("kl", "perplexity")
    parts = read_parts(args, tokenizer, device) if on_text else {}
    state = read_state(args, fingerprint(args, device))
    check_plain(model, args)
    if on_text:
        losses = TextLosses(model, parts, args.metric)
        count = len(parts["ranking"])
        sizes = f"2 parts of {count} sequences of {args.max_seq_length} tokens"
    else:
        losses = TaskLosses(model, tokenizer, args)
        sizes = f"2 parts of {len(losses.documents['ranking'])} documents"
    variants = make_variants(model, args.groupsize)
    hybrid = built_in_hybrid([*variants.modules["int4"]])
    args.budget = find_budget(args, variants, hybrid)
    found = measure(variants, losses, state, state_file(args.report_file))
    layers = rank(variants, found)
    room = args.budget * variants.weights / 8
    room -= variants.total(dict.fromkeys(variants.modules["int4"], "int4"))
    chosen = choose(layers, room)
    for row in layers:
        row["scheme"] = "int8" if row["name"] in chosen else "int4"
    choices = {"bf16": [set()], "all int8": [{*variants.modules["int8"]}]}
    choices |= {"built-in hybrid": [hybrid], "chosen": [chosen]}
    some = random_choices(layers, room, args.random_choices)
    choices[f"{len(some)} random choices, mean"] = some
    models = confirm(variants, losses, choices | {"all int4": [set()]})
    written = write_all(args, layers, models, sizes)
    state_file(args.report_file).unlink(missing_ok=True)
    print(models_table(models, args.metric), end="")
    best = ", ".join(f"{row['name']} ({shown(row['saved'])})" for row in layers[:3])
    print(f"most saved a byte: {best}\nwritten: {', '.join(map(str, written))}")


if __name__ == "__main__":
    run(main, make_parser())
