"""Checks a CUDA machine in one command: are the logits right, is greedy text the same, how fast.

    python scripts/gpu_check.py --markdown report.md --json report.json

Needs torch alone: weights are random and made on the device. A failing cell is reported and the
next one runs; what would not fit into `--budget` is skipped. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib.metadata
import json
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from argparse import ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import find_device
from cli import Parser, UserError, number, output_file, replacing, run
from engine import Engine, Sampling, generate, synchronize
from families import from_config, preset, preset_names
from linear import FEW_ROWS, Linear
from model import ModelArgs, Transformer
from scripts.machine import read_bandwidth
from scripts.random_weights import empty_model, fill, linears

GREEDY = Sampling(temperature=0)
MODES = ("eager", "block", "whole")  # --compile's; on CUDA `whole` is a CUDA graph
SCHEMES = ("bf16", "int8", "int8-activation", "int4 g32", "int4 g128")
# Widths are multiples of 128, so that every scheme fits, and as odd as published ones otherwise.
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def small(*sizes: int, **options) -> ModelArgs:
    """A model of two layers: dim, heads, KV heads and FFN width, and what its config.json adds."""
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 512}
    config |= {"max_position_embeddings": 512} | dict(zip(SIZES, sizes, strict=True))
    return from_config(config | options)


SMALL = {
    "llama": small(256, 8, 2, 640, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "qwen2": small(384, 6, 1, 512, model_type="qwen2"),
    "qwen3": small(256, 4, 2, 384, model_type="qwen3", head_dim=128),
    "tied": small(640, 10, 2, 896, tie_word_embeddings=True),
}
SHAPES = {name: preset(name) for name in preset_names()} | {"tiny": SMALL["llama"]}

# ------------------------------------------------------------------------------------------------
# Models, and their float32 reference


def build(args: ModelArgs, scheme: str, device: torch.device) -> Transformer:
    kind, _, groupsize = scheme.partition(" g")
    return fill(empty_model(args, kind, int(groupsize or 32)), device)


def start(model: Transformer, mode: str, rows: int, length: int) -> Engine:
    """An engine on a new cache full of noise: reading what was not written would show."""
    model.setup_caches(rows, length)
    generator = torch.Generator(model.device).manual_seed(0)
    for layer in model.layers:
        for cache in layer.attention.kv_cache.buffers():
            cache.normal_(generator=generator)
    return Engine(model, None if mode == "eager" else mode)


def forward(engine: Engine, text: Tensor, begins: list[int], count: int) -> Tensor:
    """Logits `[B, count, V]` of `count` tokens a row of text `[B, T]`, from `begins` on."""
    device = engine.model.device
    pos = torch.tensor(begins).unsqueeze(1) + torch.arange(count)  # [B, count]
    idx = text[: len(begins)].gather(1, pos)
    kv_len = engine.model.kv_steps(max(begins) + count)
    step, last = engine.decode_step, None
    if count > FEW_ROWS:
        step, last = engine.prefill_step, torch.arange(count, device=device).expand_as(idx)
    logits = step(idx.to(device), pos.to(device), kv_len, last).logits
    return logits.clone()  # a CUDA graph writes the next ones over these


def float_model(model: Transformer) -> Transformer:
    """The model in float32 on the CPU, its weights dequantized in float32."""
    model = copy.deepcopy(model).cpu().float()
    for name, linear in linears(model).items():
        plain = Linear(linear.in_features, linear.out_features)
        plain.weight, plain.bias = nn.Parameter(linear.dequantize()), linear.bias
        model.set_submodule(name, plain)
    return model.requires_grad_(False)


def float_logits(model: Transformer, text: Tensor) -> Tensor:
    """The reference: logits `[B, T, V]` of text `[B, T]`, in one pass."""
    model.setup_caches(*text.shape)
    return model(text, torch.arange(text.shape[1]).expand_as(text), text.shape[1]).logits


def random_text(rows: int, length: int) -> Tensor:
    vocabulary = min(args.vocab_size for args in SMALL.values())
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------
# Correctness: logits beside the reference

# The largest error of a position's logits, ‖logits - reference‖ / ‖reference‖: three times that of
# bf16 on a CPU.
BOUNDS = dict.fromkeys(SCHEMES, 0.03) | {"int8-activation": 0.09}
PROMPT, SHORTER, TEXT = 60, 47, 72  # tokens; decoding crosses 64 positions, where kv_len changes
LENGTH, VERIFIED = 256, 5  # positions of the cache, tokens of a verify pass


def error(logits: Tensor, expected: Tensor) -> float:
    """The largest relative error of all positions; NaN if there is a NaN."""
    logits = logits.float().cpu()
    return ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def check_logits(device: torch.device, model: str, scheme: str, mode: str) -> dict:
    """The error of each kind of pass: prefill, decoding, verifying, and a padded batch's."""
    network, text = build(SMALL[model], scheme, device), random_text(2, TEXT)
    expected, bound = float_logits(float_model(network), text), BOUNDS[scheme]
    first, verified = expected[:1], slice(PROMPT, PROMPT + 2 * VERIFIED)
    engine = start(network, mode, 1, LENGTH)
    errors = {"prefill": error(forward(engine, text, [0], PROMPT), first[:, :PROMPT])}
    forward(engine, text.roll(1, 1), [PROMPT], VERIFIED)  # rejected: decoding writes over it
    steps = [forward(engine, text, [at], 1) for at in range(PROMPT, TEXT)]
    errors["decode"] = error(torch.cat(steps, 1), first[:, PROMPT:])
    passes = [forward(engine, text, [PROMPT + at], VERIFIED) for at in (0, VERIFIED)]
    errors["verify"] = error(torch.cat(passes, 1), first[:, verified])
    engine = start(network, mode, 2, LENGTH)
    steps = [engine.prefill([text[0, :PROMPT].tolist(), text[1, :SHORTER].tolist()]).clone()]
    for i in range(TEXT - PROMPT):
        steps.append(forward(engine, text, [PROMPT + i, SHORTER + i], 1)[:, 0])
    rows = [row[n - 1 :][: len(steps)] for row, n in zip(expected, (PROMPT, SHORTER), strict=True)]
    errors["batch"] = error(torch.stack(steps, 1), torch.stack(rows))
    over = [name for name, value in errors.items() if not value <= bound]  # NaN is over it
    verdict = {"status": "failed", "note": f"over the bound: {', '.join(over)}"} if over else {}
    return errors | {"bound": bound} | verdict


def correctness_cells(args: Namespace) -> Iterator[dict]:
    """Eager first, then the Llama: compiling takes the time."""
    for modes in (MODES[:1], MODES[1:]):
        for model, scheme, mode in product(SMALL, SCHEMES, modes):
            yield {"model": model, "scheme": scheme, "mode": mode}


# ------------------------------------------------------------------------------------------------
# Greedy text: the same however it is made

# The largest gap between two logits that rounding may exchange, in standard deviations of logits.
TIES = {scheme: 3 * bound for scheme, bound in BOUNDS.items()}
NEW_TOKENS = 48


def endless(rows: int = 1) -> dict:
    """What `generate` takes for texts that end with their length alone."""
    return dict(until=lambda _row, _token: False, seeds=[0] * rows)


def greedy(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    steps = generate(engine, prompts, GREEDY, NEW_TOKENS, **endless(len(prompts)))
    return [[token.id for token in row] for row in zip(*steps, strict=True)]


def verified(engine: Engine, prompt: list[int], new: list[int]) -> list[int]:
    """The likeliest tokens when `new` is verified, a few tokens a pass."""
    picks = engine.prefill([prompt]).argmax(-1).tolist()
    text = torch.tensor([prompt + new])
    for at in range(len(prompt), text.shape[1] - VERIFIED, VERIFIED):
        picks += forward(engine, text, [at], VERIFIED)[0].argmax(-1).tolist()
    return picks


def gaps(reference: Transformer, prompt: list[int], new: list[int]) -> Tensor:
    """How far each new token's float32 logit is below the largest, in standard deviations."""
    logits = float_logits(reference, torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
    return (logits.amax(-1) - chosen) / logits.std(-1)


def difference(
    reference: Transformer, prompt: list[int], expected: list[int], found: list[int]
) -> tuple[str, float]:
    """The first token in which two texts differ, in words, and the gap of the two logits there."""
    pairs = zip(expected, found, strict=False)  # a verified text may end earlier
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return "equal", 0.0
    a, b = (gaps(reference, prompt, text[: at + 1])[at] for text in (expected, found))
    return f"token {at}, gap {abs(a - b):.3f}", abs(a - b).item()


def check_texts(device: torch.device, scheme: str, mode: str) -> dict:
    """Eager text beside float32, the mode's beside eager's, its batch and verify beside its own."""
    model, tie = build(SMALL["llama"], scheme, device), TIES[scheme]
    reference, text = float_model(model), random_text(2, 40)
    prompts = [text[0].tolist(), text[1, :27].tolist()]
    engine = start(model, "eager", 1, LENGTH)
    eager = [greedy(engine, [prompt])[0] for prompt in prompts]
    engine = start(model, mode, 1, LENGTH)
    alone = [greedy(engine, [prompt])[0] for prompt in prompts]
    verify = [verified(engine, *pair) for pair in zip(prompts, alone, strict=True)]
    batch = greedy(start(model, mode, 2, LENGTH), prompts)
    off = max(gaps(reference, *pair).max() for pair in zip(prompts, eager, strict=True)).item()
    row, worst = {"tie": tie, "eager_beside_float32": off}, [off]
    pairs = {"alone_beside_eager": (eager, alone), "batch_beside_alone": (alone, batch)}
    for name, texts in (pairs | {"verify_beside_alone": (alone, verify)}).items():
        found = [difference(reference, *each) for each in zip(prompts, *texts, strict=True)]
        row[name] = "; ".join(dict.fromkeys(words for words, _ in found))
        worst += [gap for _, gap in found]
    if not all(gap <= tie for gap in worst):
        return row | {"status": "failed", "note": "a gap is too wide for a near tie"}
    return row | ({"note": "differs in near ties"} if any(worst[1:]) else {})


def text_cells(args: Namespace) -> Iterator[dict]:
    for modes in (MODES[:1], MODES[1:]):
        for scheme, mode in product(SCHEMES, modes):
            yield {"scheme": scheme, "mode": mode}


# ------------------------------------------------------------------------------------------------
# Speed

DEPTH, PREFILL, GEN, REPEATS = 2048, 512, 64, 5
WIDTHS = (1, 2, 4, 8)  # tokens of a verify pass
FIRST = (*product(MODES[1:], ["bf16"]), *product(MODES[1:], ["int8", "int4 g32"]))
LAST = (*product(MODES[1:], ["int8-activation"]), *product(MODES[:1], ["bf16", "int8", "int4 g32"]))


def timings(device: torch.device, work: Callable, prepare=lambda: None) -> list[float]:
    """The seconds that `work` takes on what `prepare` returns, in each of the repetitions."""
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        prepared = prepare()
        synchronize(device)
        began = time.perf_counter()
        work(prepared)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return times[1:]


def decoding(engine: Engine, depth: int) -> dict:
    """Tokens/s of `generate` after `depth` positions, and the bytes that a step reads."""
    model = engine.model

    def begin() -> Iterator:
        tokens = generate(engine, [[1] * (depth + 1)], GREEDY, GEN + 1, start=depth, **endless())
        next(tokens)  # the prompt's last token
        return tokens

    times = timings(model.device, list, begin)
    seen = sum(model.kv_steps(depth + 2 + step) for step in range(GEN)) / GEN
    speeds = {"tokens_per_s": GEN / median(times), "min": GEN / max(times), "max": GEN / min(times)}
    return {"depth": depth, "MB_per_token": model.bytes_per_step(seen) / 1e6} | speeds


def measure_speed(device: torch.device, shape: str, scheme: str, mode: str) -> dict:
    """Compile time, decoding at two depths, prefill, verify passes, and peak memory of a model."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    length = min(SHAPES[shape].block_size, DEPTH + 256)
    # The whole model is compiled for one token alone: each further shape takes as long again.
    widths = WIDTHS[:1] if mode == "whole" else WIDTHS
    model, prompt = build(SHAPES[shape], scheme, device), [1] * min(PREFILL, length)
    engine = start(model, mode, 1, length)
    row: dict = {
        "compile_s": engine.warm_up(1, verify=mode == "block") if mode != "eager" else None
    }
    row["depths"] = [decoding(engine, depth) for depth in (0, min(DEPTH, length - GEN - 1))]
    times = timings(device, next, lambda: generate(engine, [prompt], GREEDY, 1, **endless()))
    row |= {"prompt": len(prompt), "prefill_tokens_per_s": len(prompt) / median(times)}
    tokens = torch.ones(1, max(widths), dtype=torch.int64)
    passes = [timings(device, lambda _, n=n: forward(engine, tokens, [0], n)) for n in widths]
    one, *more = map(median, passes)
    row |= {f"verify_{n}": several / one for n, several in zip(widths[1:], more, strict=True)}
    return row | {"peak_GB": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None}


def speed_cells(args: Namespace) -> Iterator[dict]:
    """The most informative first; what comes last is measured if time is left."""
    for shape, (mode, scheme) in (*product(args.shapes, FIRST), *product(args.shapes, LAST)):
        yield {"shape": shape, "scheme": scheme, "mode": mode}


# ------------------------------------------------------------------------------------------------
# The machine


def environment(device: torch.device) -> dict:
    facts = f"Python {platform.python_version()}, torch {torch.__version__}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        facts += f", triton {importlib.metadata.version('triton')}"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts += f", CUDA {torch.version.cuda or torch.version.hip}; {card.name}, capability "
        facts += f"{card.major}.{card.minor}, {card.multi_processor_count} SMs, "
        facts += f"{card.total_memory / 1e9:.1f} GB, {card.L2_cache_size / 2**20:.0f} MiB of L2"
    return {"facts": facts}


def bandwidth(device: torch.device) -> dict:
    return {"GB_per_s": read_bandwidth(device) / 1e9}


# ------------------------------------------------------------------------------------------------
# Stages and their cells


LAST_SHARE = 0.97  # of the budget, for the last stage that was asked for; the rest starts Python
# The labels of a stage's cells, what measures a cell, given a device and its labels, and the share
# of the budget after which no cell of the stage goes on.
STAGES: dict[str, tuple[Callable[[Namespace], Iterable[dict]], Callable[..., dict], float]] = {
    "environment": (lambda args: [{}], environment, float("inf")),
    "bandwidth-before": (lambda args: [{}], bandwidth, 0.05),
    "correctness": (correctness_cells, check_logits, 0.38),
    "text": (text_cells, check_texts, 0.5),
    "speed": (speed_cells, measure_speed, 0.95),
    "bandwidth-after": (lambda args: [{}], bandwidth, LAST_SHARE),
}


class OutOfTime(BaseException):
    """Raised in a cell whose time is up; no `Exception`, so that compilers let it through."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds."""

    def stop(*_):
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), 1e6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def failure(error: Exception) -> dict:
    """Print the traceback; what a row says of it."""
    traceback.print_exception(error)
    words = f"{type(error).__name__}: {error}".split("\n")[0]
    return {"status": "failed", "note": words[:200]}


def measured(measure: Callable[[], dict], left: float) -> dict:
    """A cell's figures and status: passed, failed or, if it takes more than `left`, skipped."""
    began = time.perf_counter()
    try:
        with time_limit(left):
            row = {"status": "passed"} | measure()
    except OutOfTime:
        row = {"status": "skipped", "note": f"cut off after {left:.0f} s"}
    except Exception as error:
        row = failure(error)
    return row | {"seconds": time.perf_counter() - began}


def run_stage(name: str, args: Namespace, began: float) -> Iterator[dict]:
    """Yield a row a cell, also for one that raises or for which no time is left."""
    cells, measure, share = STAGES[name]
    share = max(share, LAST_SHARE) if name == args.stages[-1] else share
    shortest: dict[str | None, float] = {}  # seconds of a cell, by its mode
    try:
        for labels in cells(args):
            cell, mode = " ".join(labels.values()), labels.get("mode")
            row = {"stage": name, "cell": cell} | labels
            if mode and mode not in args.modes:
                continue
            left = began + share * args.budget - time.perf_counter()
            if left <= shortest.get(mode, 0):
                yield row | {"status": "skipped", "note": "lack of time"}
                continue
            row |= measured(functools.partial(measure, args.device, **labels), left)
            shortest[mode] = min(row["seconds"], shortest.get(mode, row["seconds"]))
            print(f"{name} {cell}: {row['status']}, {row['seconds']:.1f} s", file=sys.stderr)
            yield row
            torch._dynamo.reset()  # it keeps what it compiled, and the model with it
            gc.collect()
            torch.cuda.empty_cache()
    except Exception as error:
        yield {"stage": name, "cell": "as a whole"} | failure(error)


# ------------------------------------------------------------------------------------------------
# The report

# The columns of each table: keys of a row and how they are formatted.
TABLES = {
    "environment": "facts",
    "bandwidth": "stage GB_per_s:.1f",
    "correctness": "model scheme mode prefill:.4f decode:.4f verify:.4f batch:.4f bound",
    "text": "scheme mode eager_beside_float32:.3f alone_beside_eager batch_beside_alone "
    "verify_beside_alone tie:.2f",
    "decode": "shape scheme mode depth tokens_per_s:.1f min:.1f max:.1f MB_per_token:.1f "
    "share_of_bandwidth:.2f",
    "speed": "shape scheme mode prompt prefill_tokens_per_s:.0f verify_2:.2f verify_4:.2f "
    "verify_8:.2f compile_s:.1f peak_GB:.2f",
}
NOTES = """Errors are relative to float32 on the CPU. Gaps are in standard deviations of its logits.
Verify passes cost so many times one token; the share is of the best bandwidth measured."""


def table(columns: str, rows: list[dict]) -> str:
    keys = [column.partition(":")[::2] for column in f"{columns} status note".split()]
    lines = [[key.replace("_per_", "/").replace("_", " ") for key, _ in keys], ["---"] * len(keys)]
    for row in rows:
        found = [(row.get(key), form) for key, form in keys]
        lines.append(["–" if value is None else format(value, form) for value, form in found])
    return "\n".join(f"| {' | '.join(x.replace('|', '/') for x in line)} |" for line in lines)


def decode_rows(rows: list[dict]) -> list[dict]:
    """A row for each depth of each model, with its share of the bandwidth."""
    best = max((row.get("GB_per_s", 0) for row in rows), default=0)
    parts = [row | part for row in rows for part in row.get("depths", [])]
    for part in parts if best else []:
        part["share_of_bandwidth"] = part["tokens_per_s"] * part["MB_per_token"] / 1e3 / best
    return parts


def listing(rows: list[dict], status: str) -> str:
    """Which cells have this status, and why, a line for each reason."""
    groups = defaultdict(list)
    for row in rows:
        if row["status"] == status:
            groups[row["stage"], row["note"]].append(row["cell"])
    lines = [f"- {stage} {', '.join(of)}: {note}" for (stage, note), of in groups.items()]
    return "\n".join([f"{status.capitalize()}:", *lines]) if lines else ""


def report(rows: list[dict], device: torch.device) -> str:
    """Everything as markdown: the tables, then what was skipped and what failed."""
    ran = [row for row in rows if row["status"] != "skipped"]
    parts = [f"### Check of {device}"]
    for kind, columns in TABLES.items():
        chosen = [row for row in ran if row["stage"].startswith(kind)]
        chosen = decode_rows(ran) if kind == "decode" else chosen
        parts += [f"#### {kind.capitalize()}", table(columns, chosen)] if chosen else []
    counts = Counter(row["status"] for row in rows)
    parts += [NOTES, listing(rows, "skipped"), listing(rows, "failed")]
    parts.append(", ".join(f"{counts[s]} {s}" for s in ("passed", "skipped", "failed")) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


# ------------------------------------------------------------------------------------------------
# The command line


def several(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of the `known` names, with commas between, in the order known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--budget", type=number(float, 0), default=540, help="seconds for everything (540)")
    add("--device", default="cuda", help="cuda, cuda:1; cpu with --shapes tiny tries the script")
    add("--stages", type=several(STAGES), default=[*STAGES], help=f"of {', '.join(STAGES)}")
    add("--modes", type=several(MODES), default=[*MODES], help=f"of {', '.join(MODES)}")
    shapes = ["llama-3-8b", "llama-2-7b"]
    add("--shapes", type=several(SHAPES), default=shapes, help="for speed: PRESETS or tiny")
    add("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    add("--markdown", type=output_file, metavar="FILE", help="write the report here, too")
    return parser


def main(args: Namespace) -> None:
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("there is no CUDA device; --device cpu --shapes tiny tries the script")
    args.device, began = find_device(args.device), time.perf_counter()
    if args.device.type == "cpu" and args.shapes != ["tiny"]:
        raise UserError(f"{args.shapes[0]} takes hours on a CPU; add --shapes tiny")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # compile cold
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        rows = [row for name in args.stages for row in run_stage(name, args, began)]
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
