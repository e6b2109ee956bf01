"""Checks correctness and speed on a CUDA machine in one command.

    python scripts/gpu_check.py --markdown report.md --json report.json

Needs only torch: weights are random and made on the device. Correctness (gpu_correctness.py) comes
first, then speed (gpu_speed.py). A failing cell is reported and the next one runs, in a new process
if the device was lost; cells that do not fit into `--budget` are skipped. The exit code is 1 if
anything failed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import traceback
from argparse import ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import find_device
from cli import Parser, UserError, bounded, replaced
from engine import synchronize
from files import check_outputs, output_file, replacing, temporary_folder
from linear import kernels_for
from process import run
from scripts import gpu_correctness as correctness
from scripts import gpu_speed as speed
from scripts.gpu_models import MODES, SHAPES, has_kernels

# ------------------------------------------------------------------------------------------------
# Stages and their cells


def environment(device: torch.device) -> dict:
    facts = f"Python {platform.python_version()}, torch {torch.__version__}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        facts += f", triton {importlib.metadata.version('triton')}"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts += f", CUDA {torch.version.cuda or torch.version.hip}; {card.name}, capability "
        facts += f"{card.major}.{card.minor}, {card.multi_processor_count} SMs, "
        facts += f"{card.total_memory / 1e9:.1f} GB, {card.L2_cache_size / 2**20:.0f} MiB of L2"
        kernels = kernels_for("cuda")
        name = kernels.__name__ if has_kernels(device) else "none"
        facts += f"; kernels of this project: {name}"
    return {"facts": facts}


def before_cells(args: Namespace) -> Iterator[dict]:
    if args.before:
        seconds = args.budget * STAGES["before"].weight / total_weight(args)
        shapes = ",".join(args.shapes)
        yield {"checkout": str(args.before), "shapes": shapes, "seconds": f"{seconds:.0f}"}


def one_cell(args: Namespace) -> list[dict]:
    return [{}]


def has_dependent_launch(device: torch.device) -> bool:
    """Whether the device has programmatic dependent launch: sm_90 and newer."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


class Stage(NamedTuple):
    cells: Callable[[Namespace], Iterable[dict[str, str]]]  # the labels of each cell
    measure: Callable[..., dict]  # (device, labels of a cell) -> row
    weight: float  # share of the budget; 0: never skipped


STAGES = {
    "environment": Stage(one_cell, environment, 0),
    "bandwidth-before": Stage(one_cell, speed.bandwidth, 30),  # includes starting the process
    "operators": Stage(correctness.operator_cells, correctness.check_operator, 90),
    "logits": Stage(correctness.logits_cells, correctness.check_logits, 110),
    "text": Stage(correctness.scheme_cells, correctness.check_texts, 40),
    "waiting": Stage(correctness.scheme_cells, correctness.check_waiting, 20),
    "products": Stage(speed.product_cells, speed.measure_product, 40),
    "speed": Stage(speed.speed_cells, speed.measure_speed, 110),
    "before": Stage(before_cells, speed.measure_before, 90),
    "kernels": Stage(speed.kernel_cells, speed.measure_kernels, 20),
    "start": Stage(speed.start_cells, speed.measure_start, 60),
    "memory": Stage(speed.memory_cells, speed.measure_memory, 25),
    "bandwidth-after": Stage(one_cell, speed.bandwidth, 8),
}
USABLE = 0.97  # of the budget; the rest starts Python and writes the report
HANGING = 20  # seconds past its limit after which a hanging cell's process is ended


def total_weight(args: Namespace) -> float:
    return sum(STAGES[name].weight for name in args.stages)


def deadline(name: str, args: Namespace) -> float:
    """Seconds after which no cell of a stage may run.

    Stages share the budget by weight; time that one leaves goes to those after it.
    """
    if not STAGES[name].weight:
        return float("inf")
    names = args.stages[: args.stages.index(name) + 1]
    until_then = sum(STAGES[name].weight for name in names)
    return USABLE * args.budget * until_then / total_weight(args)


class OutOfTime(BaseException):
    """Raised in a cell whose time is up; not an `Exception`, so that compilers do not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after `seconds`; later end the process if it still hangs.

    Python handles no signal while it waits for a kernel that never ends.
    """

    def stop(*_):
        raise OutOfTime

    seconds = min(max(seconds, 1e-3), 1e6)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + HANGING, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def failure(error: Exception) -> dict:
    """Print the traceback; returns the row of the failed cell."""
    traceback.print_exception(error)
    words = f"{type(error).__name__}: {error}".split("\n")[0]
    return {"status": "failed", "note": words[:200]}


def measured(measure: Callable[[], dict], left: float) -> dict:
    """A cell's results and status: passed, failed or, after `left` seconds, skipped."""
    began = time.perf_counter()
    try:
        with time_limit(left):
            row = {"status": "passed"} | measure()
    except OutOfTime:
        row = {"status": "skipped", "note": f"cut off after {left:.0f} s"}
    except Exception as error:
        row = failure(error)
    return row | {"seconds": time.perf_counter() - began}


def run_stage(name: str, args: Namespace, began: float, done: Collection) -> Iterator[dict]:
    """Yield a row for each cell, also if it raises or no time is left.

    Before a cell runs, a row is yielded for the case that its process does not survive.
    """
    stage, shortest = STAGES[name], {}  # seconds of a cell, by its mode
    try:
        for labels in stage.cells(args):
            cell, mode = " ".join(labels.values()), labels.get("mode")
            row = {"stage": name, "cell": cell} | labels
            if (name, cell) in done or mode and mode not in args.modes:
                continue
            left = began + deadline(name, args) - time.time()
            if left <= shortest.get(mode, 0):
                yield row | {"status": "skipped", "note": "lack of time"}
                continue
            yield row | {"status": "failed", "note": "its process died or hung"}
            row |= measured(functools.partial(stage.measure, args.device, **labels), left)
            shortest[mode] = min(row["seconds"], shortest.get(mode, row["seconds"]))
            print(f"{name} {cell}: {row['status']}, {row['seconds']:.1f} s", file=sys.stderr)
            yield row
    except Exception as error:
        yield {"stage": name, "cell": "as a whole"} | failure(error)


# ------------------------------------------------------------------------------------------------
# The process that runs the stages

SPAWN = "spawn"  # start method: CUDA does not survive a fork
LOST = 3  # its exit code when the device no longer works


def recorded(file: Path) -> list[dict]:
    """The last row of each cell, from a file with one row a line."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return list({(row["stage"], row["cell"]): row for row in rows}.values())


def works(device: torch.device) -> bool:
    """Free memory; whether the device still works: an illegal access ends the CUDA context."""
    torch._dynamo.reset()  # frees what it compiled, and the model with it
    gc.collect()
    try:
        torch.cuda.empty_cache()
        synchronize(device)
    except RuntimeError:
        return False
    return True


def work(args: Namespace, file: Path, began: float) -> None:
    """Run the stages and append each row to the file; cells with a row there are not run again."""
    done = {(row["stage"], row["cell"]) for row in recorded(file)}
    if not has_dependent_launch(args.device):
        args = replaced(args, modes=[mode for mode in args.modes if mode != "pdl"])
    for name in args.stages:
        for row in run_stage(name, args, began, done):
            with file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            if "seconds" in row and not works(args.device):
                sys.exit(LOST)


def supervise(args: Namespace, file: Path, began: float) -> None:
    """Run `work` in a process, and in a new one whenever it dies."""
    code, size = 1, -1
    while code and file.stat().st_size > size and time.time() - began < args.budget:
        size = file.stat().st_size
        process = multiprocessing.get_context(SPAWN).Process(target=work, args=(args, file, began))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        code = process.exitcode
    if code:
        row = {"stage": "process", "cell": "", "status": "failed", "note": f"it ended with {code}"}
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------------------------------------
# The report

# The columns of each table: keys of a row and their formats. A table not named after a stage has a
# row for each part that the stage's rows hold under that name.
TABLES = {
    "environment": "facts",
    "bandwidth": "stage GB_per_s:.1f",
    "operators": "operator dtype error:.4f prefill:.4f bound bits cases",
    "logits": "model scheme mode ran prefill:.4f decode:.4f verify:.4f batch:.4f bound replays",
    "text": "scheme mode ran torch_beside_float32:.3f alone_beside_torch batch_beside_alone "
    "verify_beside_alone tie:.2f",
    "waiting": "scheme mode ran steps",
    "products": "shape what scheme ran MB:.1f rows_1:.0f rows_2:.0f rows_4:.0f rows_8:.0f "
    "share_1:.2f share_2:.2f share_4:.2f share_8:.2f",
    "depths": "shape scheme mode ran depth tokens_per_s:.1f min:.1f max:.1f MB_per_token:.1f "
    "share_of_bandwidth:.2f target",
    "speed": "shape scheme mode ran prompt prefill_tokens_per_s:.0f prefill_by_matmuls:.2f "
    "verify_2:.2f verify_4:.2f verify_8:.2f warm_up_s:.1f peak_GB:.2f",
    "launches": "shape scheme mode ran launches_per_layer:.1f kernel launches us_per_step:.1f",
    "start": "shape scheme mode ran cold_s:.1f warm_s:.1f target cold_process_s:.1f "
    "warm_process_s:.1f",
    "memory": "shape scheme mode ran stored_GB:.2f peak_GB:.2f",
}
NOTES = """`ran` is who ran the steps: the fused step, modules on this project's operators, or
modules on PyTorch's own operations. Errors of operators are in root mean squares of a row of
float64's; errors of logits are relative to float32 on the CPU, and gaps in standard deviations of
its logits. `rows 1` to `rows 8` are GB/s of products of so many rows. Shares are of the best
bandwidth measured. A verify pass costs so many times one token, a prefill so many times its matmuls
in bf16 by PyTorch. A start is in seconds from a model in memory, its weights drawn on the device,
to the first token of a new process, with empty compile caches (cold) and filled ones (warm)."""
# Target share of the bandwidth at depth 0, on the shape of Llama-3-8B.
TARGETS = {"bf16": 0.85, "int8": 0.75, "int4 g32": 0.65}


def table(columns: str, rows: list[dict]) -> str:
    keys = [column.partition(":")[::2] for column in f"{columns} status note".split()]
    lines = [[key.replace("_per_", "/").replace("_", " ") for key, _ in keys], ["---"] * len(keys)]
    for row in rows:
        found = [(row.get(key), form) for key, form in keys]
        lines.append(["–" if value is None else format(value, form) for value, form in found])
    return "\n".join(f"| {' | '.join(x.replace('|', '/') for x in line)} |" for line in lines)


def add_shares(rows: list[dict]) -> None:
    """Add each measured speed's share of the best bandwidth to the rows."""
    best = max((row.get("GB_per_s", 0) for row in rows), default=0)
    for row in rows if best else []:
        for n in speed.WIDTHS:
            if f"rows_{n}" in row:
                row[f"share_{n}"] = row[f"rows_{n}"] / best
        for part in row.get("depths", []):
            share = part["tokens_per_s"] * part["MB_per_token"] / 1e3 / best
            part["share_of_bandwidth"] = share
            if (row["shape"], row["mode"], part["depth"]) == ("llama-3-8b", "fused", 0):
                part["target"] = TARGETS.get(row["scheme"])


def listing(rows: list[dict], status: str) -> str:
    """The cells with this status, one line for each reason."""
    groups = defaultdict(list)
    for row in rows:
        if row["status"] == status:
            groups[row["stage"], row["note"]].append(row["cell"])
    lines = [f"- {stage} {', '.join(of)}: {note}" for (stage, note), of in groups.items()]
    return "\n".join([f"{status.capitalize()}:", *lines]) if lines else ""


def report(rows: list[dict], device: torch.device) -> str:
    """The report as markdown: tables, then skipped and failed cells."""
    add_shares(rows)
    ran = [row for row in rows if row["status"] != "skipped"]
    parts = [f"### Check of {device}"]
    for kind, columns in TABLES.items():
        chosen = [row for row in ran if row["stage"].startswith(kind)]
        chosen += [row | part for row in ran for part in row.get(kind, [])]
        parts += [f"#### {kind.capitalize()}", table(columns, chosen)] if chosen else []
    for row in ran:
        if "report" in row:
            parts += [f"#### Before: {row['checkout']}", row["report"].strip()]
    counts = Counter(row["status"] for row in rows)
    parts += [NOTES, listing(rows, "skipped"), listing(rows, "failed")]
    parts.append(", ".join(f"{counts[s]} {s}" for s in ("passed", "skipped", "failed")) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------
# The command line


def several(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: comma-separated names out of `known`, in the order of `known`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def checkout(text: str) -> Path:
    """An argparse type: a checkout with its own gpu_check.py."""
    path = Path(os.path.realpath(text))
    if not os.path.isfile(path / "scripts" / "gpu_check.py"):
        raise ArgumentTypeError(f"there is no scripts/gpu_check.py in {text!r}; name a checkout")
    return path


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.group("measurement")
    add("--budget", type=bounded(float, 0), default=540, help="seconds in total (default: 540)")
    add("--device", default="cuda", help="cuda, cuda:1; cpu with --shapes tiny tries the script")
    add("--stages", type=several(STAGES), default=[*STAGES], help=f"of {', '.join(STAGES)}")
    add("--modes", type=several(MODES), default=[*MODES], help=f"of {', '.join(MODES)}")
    shapes = ["llama-3-8b", "llama-2-7b"]
    add("--shapes", type=several(SHAPES), default=shapes, help="for speed: PRESETS or tiny")
    add("--before", type=checkout, metavar="DIR", help="also run the speed stage of this checkout")
    add = parser.group("output")
    add("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    add("--markdown", type=output_file, metavar="FILE", help="also write the report here")
    return parser


def main(args: Namespace) -> None:
    check_outputs([args.json, args.markdown], [])
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no CUDA device; --device cpu --shapes tiny tries the script")
    args, began = replaced(args, device=find_device(args.device)), time.time()
    if args.device.type == "cpu" and args.shapes != ["tiny"]:
        raise UserError(f"{args.shapes[0]} takes hours on a CPU; add --shapes tiny")
    if not args.before:
        args = replaced(args, stages=[name for name in args.stages if name != "before"])
    with temporary_folder() as folder:  # compile cold
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
        file = folder / "rows.jsonl"
        file.touch()
        try:
            (work if args.device.type == "cpu" else supervise)(args, file, began)
        except OSError as error:
            raise UserError(
                f"cannot write {file} ({error}); set TMPDIR to a folder with room"
            ) from None
        rows = recorded(file)
    text, found = report(rows, args.device), {"device": str(args.device), "rows": rows}
    print(text, end="")
    for file, content in ((args.markdown, text), (args.json, json.dumps(found, indent=2) + "\n")):
        if file:
            with replacing(file) as temporary:
                temporary.write_text(content, encoding="utf-8")
    if any(row["status"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(main, make_parser())
