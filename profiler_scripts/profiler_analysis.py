"""Breaks down the time of prefill and decoding by layer type, scheme and role.

    python profiler_scripts/profiler_analysis.py --model_path model.pth --output_file report.md
    python profiler_scripts/profiler_analysis.py --trace trace.json --output_file report.csv

Checkpoints run here, eagerly; traces come from `generate.py --profile`. Either way, time is
attributed to the ranges that ranges.py names. A range's self time excludes nested ranges, so every
microsecond counts once. On a GPU it is kernel time, attributed to the innermost range that launched
the kernel (they share a correlation id); on a CPU it is wall time. Compiled code has no ranges:
matmuls and attention are identified by operator name where they are separate calls, and the rest is
"Compiled block".
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import gzip
import io
import json
import re
import statistics
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import find_device
from cli import PRECISIONS, Parser, UserError, bounded, named_path
from engine import Engine, Sampling, generate, load_model
from files import check_outputs, output_file, read_bytes, replacing, temporary_folder
from process import run
from ranges import MARK, traced
from scripts.machine import read_bandwidth

PHASES = ("Prefill", "Decode")
COMPILED = "Compiled block"
TYPES = (
    *("Linear", "Attention", "Norm", "RoPE", "Embedding", "Sampling", "Communication"),
    *(COMPILED, "Other"),
)
ROLES = ("wqkv", "wo", "w1", "w3", "w2", "output")
ROTATION = "tokenbus::rotate_write"  # in place of the module, with operators
COMMUNICATION = ("c10d::", "_c10d_functional::", "nccl:", "gloo:")  # operator prefixes
IN_COMPILED = {  # operators in compiled code -> type and scheme
    "aten::_weight_int4pack_mm": ("Linear", "int4"),
    "aten::_weight_int4pack_mm_for_cpu": ("Linear", "int4"),
    "aten::_weight_int8pack_mm": ("Linear", "int8"),
    "aten::_int_mm": ("Linear", "int8-activation"),
    "aten::mm": ("Linear", "as floats"),
    "aten::addmm": ("Linear", "as floats"),
    "aten::_scaled_dot_product_flash_attention_for_cpu": ("Attention", "-"),
    "aten::_scaled_dot_product_flash_attention": ("Attention", "-"),
    "aten::_scaled_dot_product_efficient_attention": ("Attention", "-"),
    "aten::_scaled_dot_product_cudnn_attention": ("Attention", "-"),
}
RANGE = re.compile(rf"{MARK} ({'|'.join((*PHASES, *TYPES[:6]))}) (\S+) (\S+) (\d{{1,15}}) B")
LAUNCHES, KERNELS = ("cuda_runtime", "cuda_driver"), ("kernel", "gpu_memcpy", "gpu_memset")
OCCUPANCY = "est. achieved occupancy %"
MAKE = "make a trace with generate.py --profile"
LONGEST = 2**30  # bytes of a trace: more than any tool shows
SUFFIXES = (".txt", ".md", ".csv", ".png")

# ------------------------------------------------------------------------------------------------
# From a trace to times


@dataclasses.dataclass
class Tally:
    """Sums over ranges of one kind; times are in microseconds, as in a chrome trace."""

    count: int = 0
    us: float = 0.0
    size: int = 0  # bytes that had to be read
    occupied: float = 0.0  # occupancy in percent, times microseconds
    kernels: float = 0.0  # microseconds of kernels whose occupancy is known

    def __add__(self, other: Tally) -> Tally:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Tally(*(a + b for a, b in pairs))


Key = tuple[str, str, str, str]  # phase, type, scheme, role


@dataclasses.dataclass
class Profile:
    """The tallies of one checkpoint or trace, and steps and wall ms of each phase."""

    name: str
    tallies: dict[Key, Tally]
    steps: dict[str, int]
    wall_ms: dict[str, float]
    on_gpu: bool
    notes: list[str] = dataclasses.field(default_factory=list)

    def parts(self, phase: str, **wanted: str) -> list[Tally]:
        """The tallies of a phase, filtered by `kind`, `scheme` or `role`."""
        parts = []
        for (of, *rest), tally in self.tallies.items():
            known = dict(zip(("kind", "scheme", "role"), rest, strict=True))
            if of == phase and all(known[name] == value for name, value in wanted.items()):
                parts.append(tally)
        return parts

    def total(self, phase: str, **wanted: str) -> Tally:
        """The sum of `parts`."""
        return sum(self.parts(phase, **wanted), Tally())

    def gb_per_s(self, phase: str, **wanted: str) -> float | None:
        """Bytes read over the time taken; None unless the bytes of all parts are known."""
        parts, total = self.parts(phase, **wanted), self.total(phase, **wanted)
        known = total.us and all(part.size for part in parts)
        return total.size / total.us / 1e3 if known else None  # bytes/us are MB/s

    def compiled(self, phase: str) -> bool:
        return bool(self.parts(phase, kind=COMPILED))

    def step_ms(self, phase: str, **wanted: str) -> float:
        """Milliseconds a step, in total or of a part."""
        return self.total(phase, **wanted).us / 1e3 / self.steps[phase]


def read_trace(path: Path) -> list[dict]:
    """The events with a duration in a chrome trace (.json, .json.gz); `UserError` if it is none."""
    raw = read_bytes(path, MAKE, LONGEST)
    try:
        if path.suffix == ".gz":
            raw = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(LONGEST + 1)
        if len(raw) > LONGEST:
            raise ValueError(f"it unpacks to more than {LONGEST} bytes")
        events = json.loads(raw)["traceEvents"]
        return [checked(event) for event in events if event.get("ph") == "X"]
    except WRONG as error:
        what = f"cannot read {path} as a chrome trace ({type(error).__name__}: {error})"
        raise UserError(f"{what}; {MAKE}") from None


# Exceptions of reading and of `checked`.
WRONG = (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError)
WRONG += (RecursionError, OverflowError)


def checked(event: dict) -> dict:
    """An event whose values have the expected types; raises one of WRONG otherwise."""
    times = {key: float(event[key]) for key in ("ts", "dur")}
    if not all(abs(time) < 1e18 for time in times.values()) or times["dur"] < 0:
        raise ValueError(f"an event has the times {times}")
    args = {**event.get("args", {})}
    args |= {"correlation": str(args.get("correlation"))}
    args |= {OCCUPANCY: float(args[OCCUPANCY])} if OCCUPANCY in args else {}
    name, thread = event["name"] + "", f"{event.get('pid')} {event.get('tid')}"
    marked = event.get("cat") == "user_annotation" and name.startswith(MARK)
    if marked and not RANGE.fullmatch(name):
        raise ValueError(f"ranges.py gives no range the name {name[:80]!r}")
    return event | times | {"name": name, "thread": thread, "args": args}


def identify(event: dict, inside: str) -> tuple[str, str, str, int] | None:
    """Type, scheme, role and bytes of a range inside one of type `inside`; None if not a range.

    The type of a step is its phase.
    """
    name, category = event["name"], event.get("cat")
    if category == "user_annotation" and name.startswith(MARK):
        kind, scheme, module, size = RANGE.fullmatch(name).groups()
        return kind, scheme, module.rpartition(".")[2] if kind == "Linear" else "-", int(size)
    if category not in ("cpu_op", "user_annotation"):
        return None
    if name.startswith(COMMUNICATION):
        return "Communication", "-", "-", 0
    if name.startswith("Torch-Compiled Region"):
        return COMPILED, "-", "-", 0
    if inside == "Attention" and name == ROTATION:
        return "RoPE", "-", "-", 0
    if inside == COMPILED and name in IN_COMPILED:
        return *IN_COMPILED[name], "(compiled)", 0
    return None


@dataclasses.dataclass
class Range:
    """A range that is open during `walk`."""

    key: Key
    end: float
    own_us: float
    size: int


def walk(events: Iterable[dict]) -> Iterator[tuple[str, Range | dict, Key | None]]:
    """Go through one thread's events in time order.

    Yields `("closed", range, None)` for each range, with its self time, and for each kernel launch
    `("launch", event, key)`, attributed to `key`. Events between two steps, such as sampling,
    belong to the phase of the previous step; events before all steps, to none.
    """
    stack: list[Range] = []
    phase = None
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while stack and event["ts"] >= stack[-1].end:
            yield "closed", stack.pop(), None
        found = identify(event, stack[-1].key[1] if stack else "")
        if found and found[0] in PHASES:
            phase, found = found[0], ("Other", "-", "-", 0)
        if phase is None:
            continue
        if found:
            *what, size = found
            if stack:
                stack[-1].own_us -= event["dur"]
            end = event["ts"] + event["dur"]
            stack.append(Range((phase, *what), end, event["dur"], size))
        elif event.get("cat") in LAUNCHES:
            yield "launch", event, stack[-1].key if stack else (phase, "Other", "-", "-")
    yield from (("closed", left, None) for left in reversed(stack))


def analyse(events: list[dict], name: str) -> Profile:
    """Attribute the time in a trace; `UserError` if it has none of the ranges of ranges.py."""
    steps = [e for e in events if e["name"].startswith(tuple(f"{MARK} {p}" for p in PHASES))]
    if steps := [e for e in steps if e.get("cat") == "user_annotation"]:
        threads = {event["thread"] for event in steps}
    else:
        raise UserError(f"{name} has no step of a model in it; trace with generate.py --profile")
    kernels = [event for event in events if event.get("cat") in KERNELS]
    tallies: dict[Key, Tally] = collections.defaultdict(Tally)
    owners: dict[str, Key] = {}
    for thread in threads:
        for what, item, key in walk(event for event in events if event["thread"] == thread):
            if what == "launch":
                owners[item["args"]["correlation"]] = key
            else:
                tallies[item.key] += Tally(1, 0.0 if kernels else item.own_us, item.size)
    for kernel in kernels:
        args = kernel["args"]
        key = owners.get(args["correlation"])
        if key and "nccl" in kernel["name"].lower():
            key = (key[0], "Communication", "-", "-")
        if key:  # None before the first step
            occupancy = args.get(OCCUPANCY)
            known = 0.0 if occupancy is None else kernel["dur"]
            tallies[key] += Tally(0, kernel["dur"], 0, (occupancy or 0.0) * known, known)
    of_phase = {p: [e["dur"] for e in steps if e["name"].split()[1] == p] for p in PHASES}
    counts = {phase: len(found) for phase, found in of_phase.items() if found}
    walls = {phase: sum(found) / 1e3 for phase, found in of_phase.items() if found}
    return Profile(name, dict(tallies), counts, walls, bool(kernels))


# ------------------------------------------------------------------------------------------------
# Running a checkpoint


def timed_run(engine: Engine, prompt: list[int], max_new_tokens: int) -> list[float]:
    """Generate greedily; returns the times of the start and of each token, in seconds."""
    times = [time.perf_counter()]
    greedy = Sampling(temperature=0)
    options = {"until": lambda row, token: False, "seeds": [0]}
    for _ in generate(engine, [prompt], greedy, max_new_tokens, **options):
        times.append(time.perf_counter())
    return times


def profile_checkpoint(path: Path, device: torch.device, args: Namespace) -> Profile:
    """Run a checkpoint on a random prompt, first without, then with the profiler."""
    model = load_model(path, device, getattr(torch, args.precision))
    length = args.prompt_tokens + args.max_new_tokens
    if length > model.args.block_size:
        raise UserError(
            f"--prompt_tokens and --max_new_tokens make {length} positions and the context of "
            f"{path} is {model.args.block_size}; lower them"
        )
    model.setup_caches(1, length)
    engine = Engine(model, None)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.args.vocab_size, (args.prompt_tokens,), generator=generator)
    for _ in range(2):  # the first warms up
        times = timed_run(engine, prompt.tolist(), args.max_new_tokens)
    with traced(engine), torch.profiler.profile() as profiler:
        timed_run(engine, prompt.tolist(), args.max_new_tokens)
    with temporary_folder() as folder:
        trace = folder / "trace.json"
        with replacing(trace) as temporary:
            profiler.export_chrome_trace(str(temporary))
        profile = analyse(read_trace(trace), str(path))
    steps = [(b - a) * 1e3 for a, b in zip(times[1:], times[2:], strict=False)]
    profile.notes = [
        f"Run eagerly on {device}, {args.precision}: a prompt of {args.prompt_tokens} random "
        f"tokens, then {args.max_new_tokens - 1} decoding steps. Without the profiler the first "
        f"token took {(times[1] - times[0]) * 1e3:.2f} ms and a step "
        f"{statistics.median(steps):.2f} ms (median); what is over that below is the profiler's."
    ]
    return profile


def profile_trace(path: Path) -> Profile:
    """Attribute the time of an existing trace, and print what it cannot tell."""
    profile = analyse(read_trace(path), str(path))
    profile.notes = ["Read from a trace; that of another machine has another read bandwidth."]
    if any(kind == COMPILED for _, kind, _, _ in profile.tallies):
        profile.notes.append(
            f"Part of it ran compiled. Compiled code has no ranges: {COMPILED} is what it does "
            "outside of calls to operators that can be told (norms, rotations, activations, "
            "matrix products that were fused). Its products have no role and no bytes here."
        )
    return profile


# ------------------------------------------------------------------------------------------------
# From times to rows


def role_place(role: str) -> int:
    """The sort position of a role within a block; unknown roles come last."""
    return ROLES.index(role) if role in ROLES else len(ROLES)


def breakdown(profile: Profile, phase: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a phase: `(level, filter of the tallies)`. The types add up to the total."""
    keys = [key[1:] for key in profile.tallies if key[0] == phase]
    for kind in (kind for kind in TYPES if any(key[0] == kind for key in keys)):
        yield "type", {"kind": kind}
        if kind == "Linear":
            linears = [key for key in keys if key[0] == kind]
            for scheme in sorted({scheme for _, scheme, _ in linears}):
                yield "scheme", {"kind": kind, "scheme": scheme}
            for role in sorted({role for *_, role in linears}, key=role_place):
                yield "role", {"kind": kind, "role": role}
    yield "total", {}


def rows_of(profile: Profile, first: Profile, bandwidth: float | None) -> Iterator[dict]:
    """One dict a row: the columns of the CSV. Speed-ups are over `first`.

    If only one of two phases ran compiled, only totals are compared: parts of one are hidden in a
    compiled block of the other.
    """
    for phase, steps in profile.steps.items():
        total_us = profile.total(phase).us
        alike = profile.compiled(phase) == first.compiled(phase)
        for level, wanted in breakdown(profile, phase):
            tally, ms = profile.total(phase, **wanted), profile.step_ms(phase, **wanted)
            count, rate = (tally.count if wanted else steps), profile.gb_per_s(phase, **wanted)
            comparable = phase in first.steps and (alike or not wanted)
            base = first.step_ms(phase, **wanted) if comparable else 0
            yield {
                "model": profile.name,
                "phase": phase,
                "level": level,
                "layer_type": wanted.get("kind", "Total"),
                "scheme": wanted.get("scheme", ""),
                "role": wanted.get("role", ""),
                "count": count,
                "mean_ms": tally.us / 1e3 / max(1, count),
                "total_ms": tally.us / 1e3,
                "share_percent": 100 * tally.us / total_us if total_us else 0.0,
                "gb_per_s": rate,
                "bandwidth_percent": 100 * rate / bandwidth if rate and bandwidth else None,
                "occupancy_percent": tally.occupied / tally.kernels if tally.kernels else None,
                "step_ms": ms,
                "speed_up": base / ms if base and ms else None,
            }


def shown(value: object) -> str:
    """A cell as text: numbers with significant digits, None as a dash."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def table(titles: list[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table with aligned columns, so that it also reads as plain text."""
    cells = [titles, *([shown(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * max(3, width) for width in widths])
    padded = [[c.ljust(max(3, w)) for c, w in zip(row, widths, strict=True)] for row in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in padded) + "\n"


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV with a header."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def row_name(row: dict) -> str:
    if row["level"] in ("scheme", "role"):
        return f"· {row['layer_type']} {row[row['level']]}"
    return row["layer_type"]


def place_of(row: dict) -> tuple:
    """The sort key of a row: type, then its sum, schemes and roles; the total comes last."""
    kinds, levels = (*TYPES, "Total"), ("type", "scheme", "role", "total")
    type_and_level = kinds.index(row["layer_type"]), levels.index(row["level"])
    return *type_and_level, row["scheme"], role_place(row["role"])


def phase_section(profile: Profile, phase: str, rows: list[dict]) -> str:
    """One phase of one profile as a table."""
    steps, wall = profile.steps[phase], profile.wall_ms[phase]
    kind = "device time of kernels" if profile.on_gpu else "wall time"
    titles = ["layer type", "count", "mean (ms)", "total (ms)", "share (%)", "GB/s", "of read (%)"]
    names = ["count", "mean_ms", "total_ms", "share_percent", "gb_per_s", "bandwidth_percent"]
    if profile.on_gpu:
        titles, names = [*titles, "occupancy (%)"], [*names, "occupancy_percent"]
    cells = [[row_name(row), *(row[name] for name in names)] for row in rows]
    head = f"### {phase}: {steps} step{'s' * (steps > 1)}, {wall:.3f} ms on the host\n"
    return f"{head}\nTimes are {kind}.\n\n{table(titles, cells)}"


def comparison(profiles: list[Profile], rows: list[dict]) -> str:
    """Milliseconds a step of every profile side by side, with speed-ups over the first."""
    lines = [
        "## Side by side\n",
        f"Milliseconds a step, and how much faster that is than 1: {profiles[0].name}.\n",
    ]
    lines += [f"{i}: {profile.name}  " for i, profile in enumerate(profiles[1:], 2)]
    found = {(row["model"], row["phase"], row_name(row)): row for row in rows}
    for phase in PHASES:
        ordered = sorted((row for row in rows if row["phase"] == phase), key=place_of)
        names = list(dict.fromkeys(map(row_name, ordered)))
        cells = []
        for name in names:
            of = [found.get((profile.name, phase, name)) for profile in profiles]
            cells.append([name, *(row and row["step_ms"] for row in of)])
            cells[-1] += [row and row["speed_up"] for row in of[1:]]
        if cells:
            count = len(profiles)
            titles = [f"{i + 1} (ms)" for i in range(count)]
            titles += [f"{i + 1} (times as fast)" for i in range(1, count)]
            lines += [f"\n### {phase}\n", table(["layer type", *titles], cells)]
    return "\n".join(lines)


def report_text(profiles: list[Profile], rows: list[dict], bandwidth: float, device: str) -> str:
    """The whole report as Markdown."""
    parts = ["# Where the time goes\n"]
    parts.append(
        f"Read bandwidth of {device}, measured by summing 1 GiB: {bandwidth:.2f} GB/s. GB/s in the "
        "tables are the bytes of weights (of Attention: of cached keys and values) that had to be "
        "read, over the time taken; it means little where the arithmetic decides, as in a prefill. "
        "Rows with · are parts of the row above. Types add up to the total: time in nested ranges "
        "counts once. Other is what a step does in no range: residual sums, SiLU, the mask.\n"
    )
    for profile in profiles:
        parts.append(f"## {profile.name}\n")
        parts += [f"{note}\n" for note in profile.notes]
        for phase in profile.steps:
            own = [row for row in rows if row["model"] == profile.name and row["phase"] == phase]
            parts.append(phase_section(profile, phase, own))
    if len(profiles) > 1:
        parts.append(comparison(profiles, rows))
    return "\n".join(parts)


def draw(profiles: list[Profile], path: Path) -> None:
    """A bar for each profile and phase: milliseconds a step, stacked by layer type and scheme."""
    figure, axes = chart(2, 1, (10, 2.2 + 1.1 * len(profiles)))
    for axis, phase in zip(axes, PHASES, strict=True):
        shown_profiles = [profile for profile in profiles if phase in profile.steps]
        parts = {(k, s) for p in profiles for of, k, s, _ in p.tallies if of == phase}
        left = [0.0] * len(shown_profiles)
        names = [str(Path(*Path(p.name).parts[-2:])) for p in shown_profiles]
        for kind, scheme in sorted(parts, key=lambda part: (TYPES.index(part[0]), part[1])):
            ms = [p.step_ms(phase, kind=kind, scheme=scheme) for p in shown_profiles]
            label = f"{kind} {scheme}" if scheme != "-" else kind
            axis.barh(names, ms, left=left, label=label, color=color_of(kind, scheme))
            left = [a + b for a, b in zip(left, ms, strict=True)]
        for place, end in enumerate(left):
            axis.text(end, place, f" {end:.2f} ms", va="center")
        axis.set(title=phase, xlabel="milliseconds a step", xlim=(0, max(left, default=1) * 1.3))
        axis.invert_yaxis()
        if parts:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, format="png")


def color_of(kind: str, scheme: str) -> str:
    """The same colour for the same type and scheme in every chart."""
    schemes = {"int4": "#08306b", "int8": "#2171b5", "int8-activation": "#6baed6"}
    schemes |= {"as floats": "#9ecae1"}
    others = ["#c6dbef", "#e6550d", "#31a354", "#756bb1", "#e7298a", "#fdae6b", "#8c6d31"]
    others += ["#969696", "#d9d9d9"]
    if kind == "Linear":
        return schemes.get(scheme, others[0])
    return others[TYPES.index(kind)]


# ------------------------------------------------------------------------------------------------
# Files


def chart(rows: int, columns: int, size: tuple[float, float]):
    """An empty figure with its axes; `UserError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("charts need matplotlib; run `pip install matplotlib`") from None
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def reports(path: Path) -> list[Path]:
    """The paths of report and chart, of which one was asked for; checks both."""
    paths = [path, path.with_suffix(".md" if path.suffix == ".png" else ".png")]
    for file in paths:
        check_report(file)
    return paths


def check_report(path: Path) -> None:
    """Raise a `UserError` if the ending is no known format, or a chart cannot be drawn."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path.name} should end in one of {', '.join(SUFFIXES)}")
    if path.suffix == ".png":
        chart(1, 1, (1, 1))


def write_report(path: Path, text: str, rows: list[dict], draw_to: Callable[[Path], None]) -> None:
    """Write the report in the format given by its ending."""
    with replacing(path) as temporary:
        if path.suffix == ".png":
            draw_to(temporary)
        else:
            content = csv_text(rows) if path.suffix == ".csv" else text
            temporary.write_text(content, encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.group("model")
    add("--model_path", type=named_path, nargs="+", default=[], metavar="CKPT", help="run these")
    add("--device", help="cpu, cuda, cuda:1, … (default: $DEVICE, else cuda if available)")
    about = "of activations and unquantized weights (default: bfloat16)"
    add("--precision", default="bfloat16", choices=PRECISIONS, help=about)
    add = parser.group("measurement")
    add("--trace", type=named_path, nargs="+", default=[], metavar="FILE", help="read these traces")
    add("--output_file", type=output_file, required=True, help="ends in .txt, .md, .csv or .png")
    add("--prompt_tokens", type=bounded(int, 2), default=128, help="length of the random prompt")
    add("--max_new_tokens", type=bounded(int, 2), default=16, help="the first is the prefill's")
    return parser


def main(args: Namespace) -> None:
    check_report(args.output_file)
    check_outputs([args.output_file], args.trace, args.model_path)
    names = [*map(str, args.model_path), *map(str, args.trace)]
    if not names:
        raise UserError("pass --model_path with checkpoints, or --trace with traces, or both")
    if len(set(names)) < len(names):
        raise UserError("the same file is named twice in --model_path or --trace; name it once")
    device = find_device(args.device)
    profiles = [profile_trace(path) for path in args.trace]  # first, so that mistakes show at once
    profiles = [profile_checkpoint(path, device, args) for path in args.model_path] + profiles
    bandwidth = read_bandwidth(device) / 1e9  # GB/s
    rows = []
    for profile in profiles:
        fitting = bandwidth if profile.on_gpu == (device.type == "cuda") else None
        rows += rows_of(profile, profiles[0], fitting)
    text = report_text(profiles, rows, bandwidth, str(device))
    write_report(args.output_file, text, rows, lambda path: draw(profiles, path))
    for profile in profiles:
        spans = [f"{phase} {profile.step_ms(phase):.2f} ms a step" for phase in profile.steps]
        print(f"{profile.name}: {', '.join(spans)}")
    print(f"report: {args.output_file}")


if __name__ == "__main__":
    run(main, make_parser())
