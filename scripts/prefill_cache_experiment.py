"""Measures what a prefilled context saves: time to first token with and without the cache.

    python scripts/prefill_cache_experiment.py --contexts context/*.txt --runs 10 --output FILE

For each context, runs without the cache, from memory and from disk alternate, so that disturbances
hit all three. Prints a table; --output also writes it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import DEFAULT_CHECKPOINT, default_checkpoint, find_device
from cli import Parser, UserError, add_model_flags, bounded, named_path
from engine import Engine, Sampling, generate, load, synchronize
from files import check_outputs, output_file, read_text, replacing, temporary_folder
from prefill_cache import PrefillCache
from process import run
from tokenizer import Tokenizer

KINDS = ("without", "from memory", "from disk")
BYTES = 2**40  # a budget that is never reached
COLUMNS = (
    "context tokens",
    *(f"first token {kind}, ms" for kind in KINDS),
    "ratio, memory",
    "ratio, disk",
    "stored, MB",
    "store, ms",
    "load from disk, ms",
    *(f"whole text {kind}, ms" for kind in KINDS[:2]),
    *(f"tokens/s {kind}" for kind in KINDS[:2]),
)


def timed(engine: Engine, prompt: list[int], count: int) -> tuple[list[int], dict[str, float]]:
    """Greedy text after a prompt, and its timings: seconds, and decoded tokens a second."""
    device, tokens = engine.model.device, []
    synchronize(device)
    times = [time.perf_counter()]
    options = {"until": lambda row, token: False, "seeds": [0]}
    for (token,) in generate(engine, [prompt], Sampling(temperature=0), count, **options):
        times.append(time.perf_counter())
        tokens.append(token.id)
    figures = {"first": times[1] - times[0], "all": times[-1] - times[0]}
    return tokens, figures | {"speed": (len(tokens) - 1) / (times[-1] - times[1])}


def stored(
    engine: Engine, context: list[int], folder: Path
) -> tuple[PrefillCache, dict[str, float]]:
    """A cache with the context in memory, its file in `folder`, and seconds to store and load."""
    model, seconds = engine.model, {}
    cache = PrefillCache(BYTES, folder)
    cache.prefill_context(context, model, engine.prefill)
    synchronize(model.device)

    def load() -> None:
        entry = PrefillCache(BYTES, folder).lookup(context, model, 0)
        if entry is None:
            raise UserError(f"{folder} does not keep the context; set TMPDIR to a folder with room")
        entry.load_into(model)

    for name, action in (("store", lambda: cache.store(context, model)), ("load", load)):
        began = time.perf_counter()
        action()
        synchronize(model.device)
        seconds[name] = time.perf_counter() - began
    cache.folder = None  # the runs measure memory and disk separately
    return cache, seconds


def measure(
    engine: Engine, context: list[int], prompt: list[int], args: argparse.Namespace
) -> dict[str, list[float]]:
    """All metrics of one context: lists of one value a run."""
    found: dict[str, list[float]] = {}
    for attempt in range(args.runs + 1):  # the first warms up
        with temporary_folder() as folder:
            engine.cache = None
            kept, seconds = stored(engine, context, folder)
            texts = {}
            for kind in KINDS:
                # As in a new process: nothing in memory, not even the fingerprint.
                new = PrefillCache(BYTES, folder)
                engine.cache = {"without": None, "from memory": kept, "from disk": new}[kind]
                texts[kind], figures = timed(engine, context + prompt, args.max_new_tokens)
                seconds |= {f"{name} {kind}": value for name, value in figures.items()}
        if texts["from memory"] != texts["from disk"]:
            raise RuntimeError("the texts from memory and from disk differ")
        seconds["same text"] = float(texts["without"] == texts["from memory"])
        for name, value in seconds.items() if attempt else ():
            found.setdefault(name, []).append(value)
    size = engine.model.layers[0].attention.kv_cache.k_cache[0, :, 0].nbytes
    found["bytes"] = [2.0 * size * len(engine.model.layers) * len(context)]
    return found


def cell(values: list[float], scale: float = 1e3) -> str:
    """The median and, for more than one value, the smallest and the largest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    text = f"{middle * scale:.1f}"
    return f"{text} ({low * scale:.1f}–{high * scale:.1f})" if len(values) > 1 else text


def row(length: int, found: dict[str, list[float]]) -> list[str]:
    """One line of the table."""
    median = {name: statistics.median(values) for name, values in found.items()}
    cells = [str(length), *(cell(found[f"first {kind}"]) for kind in KINDS)]
    cells += [f"{median['first without'] / median[f'first {kind}']:.1f}" for kind in KINDS[1:]]
    cells += [f"{median['bytes'] / 1e6:.1f}", cell(found["store"]), cell(found["load"])]
    cells += [cell(found[f"all {kind}"]) for kind in KINDS[:2]]
    return cells + [cell(found[f"speed {kind}"], 1) for kind in KINDS[:2]]


def read_contexts(paths: list[Path], tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each file, shortest first."""
    contexts = [tokenizer.encode(read_text(path)) for path in paths]
    if not all(contexts):
        raise UserError("a file of --contexts is empty; pass files with text")
    return sorted(contexts, key=len)


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = add_model_flags(parser)
    add("--compile", action="store_true", help="compile one transformer block for all layers")
    add = parser.group("measurement")
    files = sorted((Path(__file__).resolve().parents[1] / "context").glob("*.txt"))
    about = "text files, one context each (default: context/*.txt)"
    add("--contexts", type=named_path, nargs="+", default=files, metavar="FILE", help=about)
    add("--prompt", default="In one sentence:", help="what follows each context")
    add("--runs", type=bounded(int, 1), default=10, help="runs of each kind, after one to warm up")
    add("--max_new_tokens", type=bounded(int, 2), default=32, help="of each run (default: 32)")
    add("--output", type=output_file, metavar="FILE", help="write the table")
    return parser


def main(args: argparse.Namespace) -> None:
    check_outputs([args.output], args.contexts, [args.checkpoint_path or DEFAULT_CHECKPOINT])
    path, device = args.checkpoint_path or default_checkpoint(), find_device(args.device)
    model, tokenizer = load(path, device, args.precision)
    prompt = tokenizer.encode(args.prompt, bos=False)
    contexts = read_contexts(args.contexts, tokenizer)
    if not prompt:
        raise UserError("--prompt is empty; give a text")
    needed = len(contexts[-1]) + len(prompt) + args.max_new_tokens
    length = args.max_seq_length or min(needed, model.args.block_size)
    if needed > length or length > model.args.block_size:
        raise UserError(
            f"the longest context needs a cache of {needed} positions; leave it out, or give "
            f"--max_seq_length up to the model's context, {model.args.block_size}"
        )
    model.setup_caches(1, length)
    engine = Engine(model, "block" if args.compile else None)
    if args.compile:
        engine.warm_up(1)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    same = []
    for context in contexts:
        found = measure(engine, context, prompt, args)
        lines.append("| " + " | ".join(row(len(context), found)) + " |")
        same.append(f"{len(context)}: {'yes' if min(found['same text']) else 'no'}")
        print(f"{len(context)} tokens done", file=sys.stderr)
    where = f"{path.parent.name}/{path.name}, {args.precision}, {device}"
    where += f", torch {torch.__version__}, {torch.get_num_threads()} threads, {args.runs} runs"
    lines += ["", f"{where}, {len(prompt)} prompt tokens, {args.max_new_tokens} new ones."]
    lines += [f"Same text as without the cache, by context: {', '.join(same)}."]
    print("\n".join(lines))
    if args.output:
        with replacing(args.output) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, make_parser())
