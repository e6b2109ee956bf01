"""Measures decoding speed against the limit of the memory bus.

    python scripts/benchmark.py --model tinyllama-1.1b --schemes bf16,int8,int4 --compile

Decoding a token reads every weight and the filled KV cache once, so the ceiling is bandwidth over
bytes. All candidates take turns within each repetition, so that disturbances hit all of them. The
timed loop is `engine.generate`. The method is that of llama-bench
(https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench).
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import DEFAULT_CHECKPOINT, default_checkpoint, find_device
from cli import Parser, UserError, add_checkpoint_flags, bounded, named, refuse, replaced
from engine import Engine, generate, load_model, synchronize
from families import preset_names
from files import check_outputs, output_file, replacing, temporary_folder
from linear import Linear
from model import Transformer
from process import run
from quantize import GROUP_SIZES
from scripts.candidates import (
    GGUF_TYPES,
    GREEDY,
    Case,
    HuggingFace,
    LlamaCpp,
    Ours,
    gguf_architecture,
    greedy,
    make,
    skeleton,
)
from scripts.machine import Timing, any_disturbed, free_bytes, machine, peak_bytes, probe
from scripts.random_weights import MARKERS, linears
from speculate import DraftModel, PromptLookup, Speculator, load_draft, speculate
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"llama.cpp": ("llama_cpp", "llama-cpp-python"), "transformers": ("transformers",) * 2}
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
VERIFIED = (2, 4, 8)  # tokens in a verify pass
PROPOSED = 5  # maximum draft length
STORY = "Once upon a time, there was a"  # the prompt for speculation

# ------------------------------------------------------------------------------------------------
# Measurements


def loaders(cases: list[Case], args: Namespace, length: int) -> dict[str, Callable]:
    """A function that loads each candidate, by name."""
    table: dict[str, Callable] = {}
    packed = not (args.compile or args.compile_prefill)
    for case in cases:
        table[case.scheme] = lambda c=case: Ours(make(c, args.device, length, packed), args)
    host = torch.device("cpu")
    for case in cases:
        if "llama.cpp" in args.peers and (kind := GGUF_TYPES.get(case.scheme)):
            options = (kind, args.device, length)
            table[f"llama.cpp {kind}"] = lambda c=case, o=options: LlamaCpp(make(c, host, 1), *o)
    if "transformers" in args.peers:
        bf16 = dataclasses.replace(cases[0], scheme="bf16")
        table["transformers bf16"] = lambda: HuggingFace(make(bf16, host, 1), args.device)
    return table


def needed_bytes(cases: list[Case], args: Namespace, length: int) -> int:
    """Memory for all candidates at once; weights are kept as stored and packed for the kernels."""
    total = 0
    for case in cases:
        model = skeleton(case)
        model.setup_caches(1, length)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        size += model.bytes_per_step(length) - model.bytes_per_step(0)
        twice = case.scheme == "int4" or args.device.type == "cpu"
        total += size * (1 + twice + ("llama.cpp" in args.peers))
        total += size * (case.scheme == "bf16" and "transformers" in args.peers)
    return int(1.2 * total)


def measure(group: dict, prompt: list[int], args: Namespace, timings: dict) -> None:
    """Run the candidates in turn, `--runs` times after a warm-up, and record the timings."""
    device, depths = args.device, args.depth
    for repetition in range(-1, args.runs):
        what = f"run {repetition + 1} of {args.runs}" if repetition >= 0 else "warm-up"
        print(what, file=sys.stderr)
        if repetition == 0:  # end of warm-up
            for name in group:
                timings.pop(name)
        for name, candidate in group.items():
            kept = timings[name]
            with kept["prefill"].clock(device):
                next(candidate.tokens(prompt, 1, 0))
            for depth in depths:
                tokens = candidate.tokens([1] * (depth + 1), args.gen + 1, depth)
                next(tokens)  # feeds the prompt's last token: not a decoding step
                with kept[f"decode at {depth}"].clock(device):
                    deque(tokens, maxlen=0)
            for count in (1, *VERIFIED) * 3:
                candidate.hold(depths[0])
                with kept[f"verify {count}"].clock(device):
                    candidate.forward([1] * count, depths[0])


def byte_row(name: str, model, depth: int, gen: int) -> dict:
    """Bytes that a decoding step reads: the mean of `gen` steps from `depth`."""
    seen = sum(model.kv_steps(depth + 2 + step) for step in range(gen)) / gen
    read = model.bytes_per_step(seen)
    row = {"scheme": name, "depth": depth, "bytes_per_token": read, "megabytes": read / 1e6}
    return row | {"disturbed": False}


def start_engine(model: Transformer, args: Namespace) -> Engine:
    """The engine that the flags ask for, warmed up for speculation."""
    engine = Engine(model, args.compile, args.compile_prefill)
    if args.compile or args.compile_prefill:
        engine.warm_up(1, max(VERIFIED))
    return engine


def speculation(model: Transformer, name: str, args: Namespace) -> dict:
    """Decode a text with and without --draft, in turns."""
    model.setup_caches(1, min(model.args.block_size, args.gen + 64))  # the old cache holds noise
    tokenizer = Tokenizer.from_folder(args.checkpoint_path.parent)
    if args.draft == "lookup":
        draft = PromptLookup(model.args.vocab_size, args.device)
    else:
        drafting = load_draft(Path(args.draft), model, tokenizer, "bfloat16")
        draft = DraftModel(start_engine(drafting, args), model.args.vocab_size)
    speculator = Speculator(start_engine(model, args), draft, PROPOSED)
    options = {"until": lambda row, token: token in tokenizer.eos_ids, "seeds": [0]}
    prompt, counts, histogram = tokenizer.encode(STORY), {}, [0] * (speculator.k + 1)
    timings = {"with": Timing(), "without": Timing()}
    for repetition in range(-1, args.runs):
        for key, engine in (("with", speculator), ("without", speculator.engine)):
            decode = speculate if isinstance(engine, Speculator) else generate
            tokens = decode(engine, [prompt], GREEDY, args.gen + 1, **options)
            next(tokens)
            timing = timings[key] if repetition >= 0 else Timing()
            with timing.clock(args.device):
                counts[key] = sum(1 for _ in tokens)
        histogram = [a + b for a, b in zip(histogram, speculator.histogram, strict=True)]
    speeds = {key: timings[key].spread(counts[key]) for key in timings}
    return {
        "scheme": name,
        "draft": args.draft,
        **speeds["with"],
        "without": speeds["without"]["median"],
        "ratio": speeds["with"]["median"] / speeds["without"]["median"],
        "mean_accepted": sum(i * n for i, n in enumerate(histogram)) / max(sum(histogram), 1),
        "disturbed": any_disturbed(*timings.values()),
    }


# ------------------------------------------------------------------------------------------------
# Cold and warm starts in new processes


def start(text: str) -> None:
    """In a new process: load a case, generate a first token, and print the timings as JSON."""
    words = json.loads(text)
    case, device = Case(**words["case"]), find_device(words["device"])
    torch.set_num_threads(words["threads"])
    began = time.perf_counter()
    compiles = words["compile"] or words["compile_prefill"]
    model = make(case, device, words["length"], packed=not compiles)
    model.pack_weights()
    synchronize(device)
    load_s = time.perf_counter() - began
    began = time.perf_counter()
    engine = Engine(model, words["compile"], words["compile_prefill"])
    if compiles:
        engine.warm_up(1)
    next(greedy(engine, [1] * min(8, words["prompt"]), 1))
    first_s = time.perf_counter() - began
    next(greedy(engine, [1] * words["prompt"], 1))  # for peak memory
    print(json.dumps({"load_s": load_s, "first_s": first_s, "peak": peak_bytes(device)}))


def start_twice(case: Case, args: Namespace, length: int) -> dict:
    """Start a case twice, first with an empty compile cache; returns a row of the start table."""
    quick = case if not case.made else dataclasses.replace(case, random=True)
    words = {"case": dataclasses.asdict(quick), "device": str(args.device), "length": length}
    words |= {key: getattr(args, key) for key in ("prompt", "compile", "compile_prefill")}
    words["threads"] = torch.get_num_threads()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts import benchmark as b; "
    command = [sys.executable, "-c", code + "b.start(sys.argv[1])", json.dumps(words)]
    timing, found = Timing(), []
    with temporary_folder() as folder:
        env = os.environ | dict.fromkeys(CACHES, str(folder))
        for _ in range(2):
            with timing.clock(args.device):
                done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(
                    f"a new process with {case.scheme} ended with code {done.returncode}; is there "
                    "memory enough? --no-cold does without it"
                )
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        "scheme": case.scheme,
        "load_s": found[1]["load_s"],
        "cold_s": found[0]["first_s"],
        "second_s": found[1]["first_s"],
        "peak_memory_mb": found[1]["peak"] / 1e6,
        "disturbed": timing.disturbed(),
    }


# ------------------------------------------------------------------------------------------------
# The report


# The columns of each table: title -> format of a row.
TABLES = {
    "ceiling": {
        "scheme": "{scheme}",
        "depth": "{depth}",
        "MB per token": "{megabytes:.1f}",
        "best possible tokens/s": "{best_tokens_per_s:.1f}",
    },
    "decode": {
        "decoding": "{scheme}",
        "depth": "{depth}",
        "tokens/s": "{median:.1f}",
        "min": "{min:.1f}",
        "max": "{max:.1f}",
        "ratio": "{ratio:.2f}",
        "MB per token": "{megabytes:.1f}",
        "best possible": "{best_tokens_per_s:.1f}",
        "of the bus": "{bus_share:.2f}",
    },
    "prefill": {
        "prefill": "{scheme}",
        "first token ms": "{first_token_ms:.1f}",
        "tokens/s": "{median:.1f}",
        "min": "{min:.1f}",
        "max": "{max:.1f}",
        **{f"verify {count}": f"{{verify_{count}:.2f}}" for count in VERIFIED},
    },
    "start": {
        "start": "{scheme}",
        "load s": "{load_s:.2f}",
        "cold s": "{cold_s:.2f}",
        "second process s": "{second_s:.2f}",
        "peak memory MB": "{peak_memory_mb:.0f}",
    },
    "speculation": {
        "speculation": "{scheme}",
        "draft": "{draft}",
        "tokens/s": "{median:.1f}",
        "without": "{without:.1f}",
        "ratio": "{ratio:.2f}",
        "mean accepted": "{mean_accepted:.2f}",
    },
}


def table(kind: str, rows: list[dict]) -> str:
    """A markdown table; rows disturbed by other processes are marked."""
    columns = TABLES[kind]
    lines = [[*columns], ["---"] + ["---:"] * (len(columns) - 1)]
    for row in rows:
        cells = [text.format_map(row) for text in columns.values()]
        lines.append([cells[0] + (" \\*" if row["disturbed"] else ""), *cells[1:]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def decode_rows(name: str, candidate, kept: dict[str, Timing], args: Namespace) -> list[dict]:
    """A row for each depth; bandwidth and ratios are added after all measurements."""
    rows = []
    for depth in args.depth:
        timing = kept[f"decode at {depth}"]
        row = byte_row(name, candidate, depth, args.gen) | timing.spread(args.gen)
        rows.append(row | {"disturbed": timing.disturbed()})
    return rows


def prefill_row(name: str, kept: dict[str, Timing], args: Namespace) -> dict:
    """Time to first token, prefill speed, and verify passes relative to one token."""
    first, one = kept["prefill"], statistics.median(kept["verify 1"].seconds)
    verify = {n: kept[f"verify {n}"] for n in VERIFIED}
    row = {"scheme": name, "first_token_ms": statistics.median(first.seconds) * 1e3}
    row |= first.spread(args.prompt)
    row |= {f"verify_{n}": statistics.median(verify[n].seconds) / one for n in VERIFIED}
    return row | {"disturbed": any_disturbed(*kept.values())}


def notes(found: dict, args: Namespace) -> Iterator[str]:
    """Notes that explain the tables."""
    yield (
        f"Decoding: {args.gen} tokens after `depth` positions, median, min and max of {args.runs} "
        "runs in which the candidates took turns; ratio to the first at that depth. Of the bus: "
        "bytes a token reads (weights and KV) times tokens/s, over the read bandwidth."
    )
    yield (
        f"First token: prefill of {args.prompt} tokens and choosing one. Verify N: a pass of N "
        f"tokens at depth {args.depth[0]}, in units of a pass of one."
    )
    if found["start"]:
        yield (
            "Starts, in processes of their own: load (reading the file, or making random weights); "
            "then compiling, if asked for, and the first token of a short prompt, with an empty "
            "compile cache and once more; peak memory, of the second, with the whole prompt."
        )
    if not found["together"]:
        yield (
            "The candidates did not fit into memory at once, so each was measured on its own after "
            "the other; ratios carry whatever changed meanwhile."
        )
    rows = [row for rows in found.values() if isinstance(rows, list) for row in rows]
    marks = [row["disturbed"] for row in rows] + [found["bandwidth_disturbed"]]
    if None in marks:
        yield "Whether other processes disturbed this could not be checked (no /proc/stat)."
    elif any(marks):
        yield "\\* Other processes used over 5 % of a core meanwhile; measure again without them."


def report(found: dict, args: Namespace) -> str:
    """The report as markdown, to be pasted into benchmarks.md."""
    before, after = (found[f"bandwidth_{when}"] / 1e9 for when in ("before", "after"))
    mark = " \\*" if found["bandwidth_disturbed"] else ""
    lines = [
        f"### {found['model']} on {args.device}",
        found["machine"] + ". " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()) + ".",
        f"```\n{found['command']}\n```",
        f"Read bandwidth: {before:.1f} GB/s before, {after:.1f} GB/s after{mark}.",
    ]
    kinds = ("decode", "prefill", "start", "speculation")
    lines += [table(kind, found[kind]) for kind in kinds if found[kind]]
    return "\n\n".join([*lines, *notes(found, args)]) + "\n"


# ------------------------------------------------------------------------------------------------
# The command line


def several(known: dict | None = None, low: int = 0) -> Callable[[str], list]:
    """An argparse type: comma-separated names out of `known`, or whole numbers."""

    def parse(text: str) -> list:
        items = list(dict.fromkeys(text.split(",")))
        if known is None:
            return sorted({bounded(int, low)(item) for item in items})
        for item in items:
            if item not in known:
                raise ArgumentTypeError(f"{item!r} is none of {', '.join(known)}")
        return items

    return parse


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add, about = add_checkpoint_flags(parser), "random weights of this shape, not a checkpoint"
    add("--model", choices=preset_names(), help=about)
    add("--schemes", type=several(MARKERS), help="default: all, or a quantized file as is")
    add("--groupsize", type=int, default=32, choices=GROUP_SIZES, help="of int4 (default: 32)")
    add = parser.group("measurement")
    add("--prompt", type=bounded(int, 1), default=512, help="tokens to prefill (default: 512)")
    add("--gen", type=bounded(int, 1, 2**20), default=128, help="tokens to decode (default: 128)")
    add("--depth", type=several(), default=[0], help="filled positions, such as 0,2048")
    add("--runs", type=bounded(int, 1), default=5, help="repetitions (default: 5)")
    add("--compile", nargs="?", const="block", choices=["block", "whole"], help="compile decoding")
    add("--compile_prefill", action="store_true", help="also compile prefill")
    add("--draft", type=named, help="a checkpoint, or `lookup`: also measure speculation")
    add("--peers", type=several(PEERS), default=[], help="llama.cpp,transformers: in the same run")
    add("--threads", type=bounded(int, 1, 4096), help="CPU threads (default: torch's)")
    add("--no-cold", action="store_true", help="skip starts in new processes and peak memory")
    add = parser.group("output")
    add("--json", type=output_file, metavar="FILE", help="write the results as JSON")
    add("--markdown", type=output_file, metavar="FILE", help="write the tables here, not to stdout")
    return parser


def find_cases(args: Namespace) -> list[Case]:
    """The cases that the flags ask for; `UserError` if they contradict each other."""
    schemes, source = args.schemes or [*MARKERS], {"preset": args.model, "random": True}
    if not args.model:
        path = args.checkpoint_path
        source, model = {"checkpoint": str(path.resolve())}, load_model(path, "meta")
        if any(type(linear) is not Linear for linear in linears(model).values()):
            if args.schemes:
                raise UserError(f"{path} is quantized and runs as it is; leave --schemes out")
            schemes = ["as stored"]
    cases = [Case(scheme, args.groupsize, **source) for scheme in schemes]
    context = cases[0].args.block_size
    for flag, longest in (("--depth", max(args.depth)), ("--prompt", args.prompt)):
        if longest > context:
            limit = f"the model's context of {context} positions"
            raise UserError(f"{flag} {longest} is beyond {limit}; lower it")
    return cases


def check_peers(cases: list[Case], args: Namespace) -> None:
    """Raise a `UserError` if a peer is not installed or cannot run the model."""
    for peer in args.peers:
        module, package = PEERS[peer]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--peers {peer} needs a package; install it by: pip install {package}")
    known = {"llama.cpp": gguf_architecture(cases[0].args)}
    known["transformers"] = known["llama.cpp"] == "llama"
    if not all(map(known.get, args.peers)) or (args.peers and cases[0].scheme == "as stored"):
        raise UserError(
            "peers run Llama shapes that are not quantized, and llama.cpp mixtures of OLMoE and "
            "Qwen3; leave --peers out"
        )
    odd = {linear.in_features % 32 for linear in linears(skeleton(cases[0])).values()} - {0}
    if "llama.cpp" in args.peers and odd and {case.scheme for case in cases} & {"int8", "int4"}:
        raise UserError("llama.cpp's blocks of 32 do not divide this shape; use --schemes bf16")


def cache_length(args: Namespace) -> int:
    """Cache positions for the prompt, and for decoding and verifying at each depth."""
    return max(args.prompt, max(args.depth) + max(args.gen + 1, *VERIFIED))


def run_all(cases: list[Case], found: dict, args: Namespace) -> None:
    """Load and measure the candidates, and add their rows to `found`."""
    length = cache_length(args)
    if not args.no_cold:
        found["start"] = [start_twice(case, args, length) for case in cases]
    size, generator = cases[0].args.vocab_size, torch.Generator().manual_seed(0)
    prompt = torch.randint(size, (args.prompt,), generator=generator).tolist()
    table = loaders(cases, args, length)
    found["together"] = needed_bytes(cases, args, length) < free_bytes(args.device)
    timings: dict = defaultdict(lambda: defaultdict(Timing))
    for names in [[*table]] if found["together"] else [[name] for name in table]:
        group = {name: table[name]() for name in names}
        measure(group, prompt, args, timings)
        for name, candidate in group.items():
            found["decode"] += decode_rows(name, candidate, timings[name], args)
            found["prefill"].append(prefill_row(name, timings[name], args))
            if isinstance(candidate, LlamaCpp):
                candidate.close()
            elif args.draft and isinstance(candidate, Ours):
                found["speculation"].append(speculation(candidate.model, name, args))
        del group, candidate
        torch._dynamo.reset()  # frees what it compiled
        gc.collect()


def main(args: Namespace) -> None:
    given = args.checkpoint_path
    refuse(
        (args.model and given, "--model makes random weights; leave it or --checkpoint_path out"),
        (args.draft and not given, "--draft needs real weights; add --checkpoint_path"),
    )
    drafts = [Path(args.draft)] if args.draft not in (None, "lookup") else []
    checkpoints = [given or (None if args.model else DEFAULT_CHECKPOINT), *drafts]
    check_outputs([args.json, args.markdown], [], checkpoints)
    path = given or (None if args.model else default_checkpoint())
    args = replaced(args, checkpoint_path=path)
    cases = find_cases(args)
    check_peers(cases, args)
    device = find_device(args.device)
    args = replaced(args, device=device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.draft not in (None, "lookup"):  # fails before hours of work
        model = skeleton(cases[0])
        model.setup_caches(1, 1)
        tokenizer = Tokenizer.from_folder(args.checkpoint_path.parent)
        load_draft(Path(args.draft), model, tokenizer, "bfloat16")
    before, disturbed = probe(device)
    rows = []
    for case in cases:
        model = skeleton(case)
        model.setup_caches(1, cache_length(args))
        rows += [byte_row(case.scheme, model, depth, args.gen) for depth in args.depth]
    for row in rows:
        row["best_tokens_per_s"] = before / row["bytes_per_token"]
    print(f"read bandwidth {before / 1e9:.1f} GB/s\n\n{table('ceiling', rows)}\n", flush=True)
    found = {"model": args.model or str(path), "machine": machine(device)}
    found["command"] = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    packages = ["torch", *(PEERS[peer][1] for peer in args.peers)]
    found["versions"] = {"Python": platform.python_version()} | {p: version(p) for p in packages}
    found |= {key: [] for key in ("decode", "prefill", "start", "speculation")}
    run_all(cases, found, args)
    after, again = probe(device)
    found |= {"bandwidth_before": before, "bandwidth_after": after, "ceiling": rows}
    found["bandwidth_disturbed"] = None if disturbed is None else disturbed or again
    firsts = {row["depth"]: row["median"] for row in reversed(found["decode"])}
    for row in found["decode"]:
        row["ratio"] = row["median"] / firsts[row["depth"]]
        row["best_tokens_per_s"] = max(before, after) / row["bytes_per_token"]
        row["bus_share"] = row["median"] / row["best_tokens_per_s"]
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        with replacing(args.markdown) as temporary:
            temporary.write_text(report(found, args), encoding="utf-8")
    else:
        print(report(found, args), end="")


if __name__ == "__main__":
    run(main, make_parser())
