"""Measures how fast models decode, beside the speed that the memory bus allows.

    python scripts/benchmark.py --model tinyllama-1.1b --schemes bf16,int8,int4 --compile

Decoding a token reads every weight and the filled KV cache once, so bandwidth over bytes is the
ceiling. All candidates take turns within each repetition: what slows the machine down slows all of
them. The loop that is timed is `generate.generate`. The method is that of llama-bench
(https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentTypeError, Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli import Parser, UserError, add_checkpoint_flags, number, output_file, replacing, run
from generate import (
    Engine,
    Sampling,
    Speculator,
    default_checkpoint,
    generate,
    load,
    load_draft,
    speculate,
    start_engine,
    synchronize,
)
from linear import Linear
from model import PRESETS, ModelArgs, Transformer, find_device
from quantize import GROUP_SIZES
from scripts.bandwidth import cache_bytes, read_bandwidth
from scripts.candidates import (
    GGUF_TYPES,
    Case,
    HuggingFace,
    LlamaCpp,
    Ours,
    make,
    skeleton,
)
from scripts.random_weights import MARKERS, linears
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PEERS = {"llama.cpp": ("llama_cpp", "llama-cpp-python"), "transformers": ("transformers",) * 2}
VERIFIED = (2, 4, 8)  # tokens a speculative step judges
GREEDY = Sampling(temperature=0)
STORY = "Once upon a time, there was a"  # what speculation continues

# ------------------------------------------------------------------------------------------------
# The machine, and who else is using it


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """CPU seconds of all processes since boot, also of other virtual machines; None if unknown."""
    try:
        words = stat.read_text().split("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process, all threads, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Timing:
    """Seconds of a measurement's repetitions, and the CPU time others used meanwhile."""

    def __init__(self):
        self.seconds: list[float] = []
        self.foreign: float | None = 0.0

    @contextlib.contextmanager
    def clock(self, device: torch.device) -> Iterator[None]:
        """Time one repetition."""
        synchronize(device)
        busy, own, began = busy_seconds(), own_seconds(), time.perf_counter()
        yield
        synchronize(device)
        self.seconds.append(time.perf_counter() - began)
        own, after = own_seconds() - own, busy_seconds()
        known = busy is not None and after is not None and self.foreign is not None
        self.foreign = self.foreign + after - busy - own if known else None

    def disturbed(self) -> bool | None:
        """Whether others used over 5 % of a core; None if that is not known.

        The system counts in ticks of 10 ms, so two of them are allowed for.
        """
        if self.foreign is None:
            return None
        return self.foreign > 0.05 * sum(self.seconds) + 0.02

    def spread(self, amount: float) -> dict[str, float]:
        """Median, least and largest of `amount` over the seconds of each repetition."""
        rates = [amount / seconds for seconds in self.seconds]
        return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def any_disturbed(*timings: Timing) -> bool | None:
    marks = [timing.disturbed() for timing in timings]
    return None if None in marks else any(marks)


def machine(device: torch.device) -> str:
    """The machine in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        name = text.split("model name")[1].split("\n")[0].lstrip("\t :")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    words = f"{name}, {os.cpu_count()} logical cores, {pages / 2**30:.0f} GiB of memory"
    words += f", {cache_bytes() / 2**20:.0f} MiB of last-level cache, {platform.system()}"
    if device.type == "cuda":
        words += f"; {torch.cuda.get_device_name(device)}"
    return f"{words}; {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------
# Measurements


def loaders(cases: list[Case], args: Namespace, length: int) -> dict[str, Callable]:
    """What loads each candidate, by name."""
    table: dict[str, Callable] = {}
    for case in cases:
        table[case.scheme] = lambda c=case: Ours(make(c, args.device, length), args)
    host = torch.device("cpu")
    for case in cases:
        if "llama.cpp" in args.peers and (kind := GGUF_TYPES.get(case.scheme)):
            options = (kind, args.device, length)
            table[f"llama.cpp {kind}"] = lambda c=case, o=options: LlamaCpp(make(c, host, 1), *o)
    if "transformers" in args.peers:
        bf16 = dataclasses.replace(cases[0], scheme="bf16")
        table["transformers bf16"] = lambda: HuggingFace(make(bf16, host, 1), args.device)
    return table


def free_bytes(device: torch.device) -> int:
    """How much memory the device has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def needed_bytes(cases: list[Case], args: Namespace, length: int) -> int:
    """Memory for all candidates at once; weights are kept as stored and as kernels want them."""
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
    """Let the candidates take turns, `--runs` times after a warm-up, and keep the timings."""
    device, depths = args.device, args.depth
    for repetition in range(-1, args.runs):
        what = f"run {repetition + 1} of {args.runs}" if repetition >= 0 else "warm-up"
        print(what, file=sys.stderr)
        if repetition == 0:  # all before was warm-up
            for name in group:
                timings.pop(name)
        for name, candidate in group.items():
            kept = timings[name]
            with kept["prefill"].clock(device):
                next(candidate.tokens(prompt, 1, 0))
            for depth in depths:
                tokens = candidate.tokens([1] * (depth + 1), args.gen + 1, depth)
                next(tokens)  # fed the last token of the prompt, this is no decoding step
                with kept[f"decode at {depth}"].clock(device):
                    deque(tokens, maxlen=0)
            for count in (1, *VERIFIED) * 3:
                candidate.hold(depths[0])
                with kept[f"verify {count}"].clock(device):
                    candidate.forward([1] * count, depths[0])


def byte_row(name: str, model, depth: int, gen: int) -> dict:
    """What a decoding step of a model or candidate reads: the mean of `gen` steps from `depth`."""
    seen = sum(model.kv_steps(depth + 2 + step) for step in range(gen)) / gen
    read = model.bytes_per_step(seen)
    row = {"scheme": name, "depth": depth, "bytes_per_token": read, "megabytes": read / 1e6}
    return row | {"disturbed": False}


def speculation_flags(args: Namespace) -> tuple[Namespace, Tokenizer]:
    """The flags of generate.py that --draft stands for, and the checkpoint's tokenizer."""
    flags = Namespace(**vars(args) | vars(GREEDY), precision="bfloat16", batch_size=1)
    flags.draft_checkpoint_path = None if args.draft == "lookup" else Path(args.draft)
    flags.speculating, flags.speculate_k, flags.fixed_k = True, 5, False
    return flags, load(args.checkpoint_path, torch.device("meta"), "bfloat16")[1]


def speculation(model: Transformer, name: str, args: Namespace) -> dict:
    """Decoding of a text with and without --draft, in turns."""
    model.setup_caches(1, min(model.args.block_size, args.gen + 64))  # what was there is noise
    flags, tokenizer = speculation_flags(args)
    draft = load_draft(model, tokenizer, flags) if flags.draft_checkpoint_path else None
    speculator = start_engine(model, draft, flags)
    prompt, counts, histogram = tokenizer.encode(STORY), {}, [0] * (speculator.k + 1)
    timings = {"with": Timing(), "without": Timing()}
    for repetition in range(-1, args.runs):
        for key, engine in (("with", speculator), ("without", speculator.engine)):
            decode = speculate if isinstance(engine, Speculator) else generate
            tokens = decode(engine, [prompt], GREEDY, args.gen + 1, tokenizer.eos_ids)
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
# Starting, in processes of their own


def peak_bytes(device: torch.device) -> int:
    """The most memory in use so far: the allocator's on CUDA, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):  # ru_maxrss would begin at the parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start(text: str) -> None:
    """In a new process: load a case, make a first token, and print what that took as JSON."""
    words = json.loads(text)
    case, device = Case(**words["case"]), find_device(words["device"])
    torch.set_num_threads(words["threads"])
    began = time.perf_counter()
    model = make(case, device, words["length"])
    model.prepare()
    synchronize(device)
    load_s = time.perf_counter() - began
    began = time.perf_counter()
    engine = Engine(model, words["compile"], words["compile_prefill"])
    if words["compile"] or words["compile_prefill"]:
        engine.warm_up(1)
    next(generate(engine, [[1] * min(8, words["prompt"])], GREEDY, 1))
    first_s = time.perf_counter() - began
    next(generate(engine, [[1] * words["prompt"]], GREEDY, 1))  # for the peak
    print(json.dumps({"load_s": load_s, "first_s": first_s, "peak": peak_bytes(device)}))


def start_twice(case: Case, args: Namespace, length: int) -> dict:
    """Start a case with an empty compile cache and once more; the row of the table of starts."""
    quick = case if not case.made else dataclasses.replace(case, checkpoint=None)
    words = {"case": dataclasses.asdict(quick), "device": str(args.device), "length": length}
    words |= {key: getattr(args, key) for key in ("prompt", "compile", "compile_prefill")}
    words["threads"] = torch.get_num_threads()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts import benchmark as b; "
    command = [sys.executable, "-c", code + "b.start(sys.argv[1])", json.dumps(words)]
    timing, found = Timing(), []
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
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


# The columns of each table: what stands in them of a row.
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
    """A markdown table; rows that other processes disturbed are marked."""
    columns = TABLES[kind]
    lines = [[*columns], ["---"] + ["---:"] * (len(columns) - 1)]
    for row in rows:
        cells = [text.format_map(row) for text in columns.values()]
        lines.append([cells[0] + (" \\*" if row["disturbed"] else ""), *cells[1:]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def decode_rows(name: str, candidate, kept: dict[str, Timing], args: Namespace) -> list[dict]:
    """The row of each depth; bandwidth and ratios come when all is measured."""
    rows = []
    for depth in args.depth:
        timing = kept[f"decode at {depth}"]
        row = byte_row(name, candidate, depth, args.gen) | timing.spread(args.gen)
        rows.append(row | {"disturbed": timing.disturbed()})
    return rows


def prefill_row(name: str, kept: dict[str, Timing], args: Namespace) -> dict:
    """Time to the first token, prefill speed, and the cost of verification beside one token."""
    first, one = kept["prefill"], statistics.median(kept["verify 1"].seconds)
    verify = {n: kept[f"verify {n}"] for n in VERIFIED}
    row = {"scheme": name, "first_token_ms": statistics.median(first.seconds) * 1e3}
    row |= first.spread(args.prompt)
    row |= {f"verify_{n}": statistics.median(verify[n].seconds) / one for n in VERIFIED}
    return row | {"disturbed": any_disturbed(*kept.values())}


def notes(found: dict, args: Namespace) -> Iterator[str]:
    """What a reader of the tables has to know, a sentence or two each."""
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
    """Everything as markdown, to be pasted into benchmarks.md."""
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
    """An argparse type: names out of `known`, or whole numbers, with commas between."""

    def parse(text: str) -> list:
        items = list(dict.fromkeys(text.split(",")))
        if known is None:
            return sorted({number(int, low)(item) for item in items})
        for item in items:
            if item not in known:
                raise ArgumentTypeError(f"{item!r} is none of {', '.join(known)}")
        return items

    return parse


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--model", choices=PRESETS, help="random weights of this shape instead of a checkpoint")
    add("--schemes", type=several(MARKERS), help="default: all, or a quantized file as it is")
    add("--groupsize", type=int, default=32, choices=GROUP_SIZES, help="of int4 (default: 32)")
    add("--prompt", type=number(int, 1), default=512, help="tokens to prefill (default: 512)")
    add("--gen", type=number(int, 1), default=128, help="tokens to decode (default: 128)")
    add("--depth", type=several(), default=[0], help="positions filled before, such as 0,2048")
    add("--runs", type=number(int, 1), default=5, help="repetitions (default: 5)")
    add("--compile", nargs="?", const="block", choices=["block", "whole"], help="compile decoding")
    add("--compile_prefill", action="store_true", help="compile prefill, too")
    add("--draft", help="a checkpoint, or `lookup`: measure speculation, too")
    add("--peers", type=several(PEERS), default=[], help="llama.cpp,transformers: in the same run")
    add("--threads", type=number(int, 1), help="CPU threads (default: torch's)")
    add("--no-cold", action="store_true", help="no starts in new processes, no peak memory")
    add("--json", type=output_file, metavar="FILE", help="write the figures as JSON")
    add("--markdown", type=output_file, metavar="FILE", help="write the tables here, not to stdout")
    return parser


def find_cases(args: Namespace) -> list[Case]:
    """What the flags ask to measure; `UserError` where they contradict."""
    if args.model and args.checkpoint_path:
        raise UserError("--model makes random weights; leave it or --checkpoint_path out")
    if args.draft and not args.checkpoint_path:
        raise UserError("--draft needs weights that make sense; add --checkpoint_path")
    if args.model:
        shape, schemes, path = PRESETS[args.model], args.schemes or [*MARKERS], None
    else:
        path = args.checkpoint_path = args.checkpoint_path or default_checkpoint()
        model = Transformer.from_checkpoint(path, "meta")
        shape, schemes, path = model.args, args.schemes or [*MARKERS], str(path.resolve())
        if any(type(linear) is not Linear for linear in linears(model).values()):
            if args.schemes:
                raise UserError(f"{path} is quantized and runs as it is; leave --schemes out")
            schemes = ["as stored"]
    for flag, longest in (("--depth", max(args.depth)), ("--prompt", args.prompt)):
        if longest > shape.block_size:
            limit = f"the model's context of {shape.block_size} positions"
            raise UserError(f"{flag} {longest} is beyond {limit}; lower it")
    words = dataclasses.asdict(shape)
    return [Case(scheme, words, args.groupsize, path) for scheme in schemes]


def check_peers(cases: list[Case], args: Namespace) -> None:
    """Raise a `UserError` if a peer is not installed or cannot run the model."""
    for peer in args.peers:
        module, package = PEERS[peer]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--peers {peer} needs a package; install it by: pip install {package}")
    shape = ModelArgs(**cases[0].shape)
    if args.peers and (shape.biases or shape.qk_norm or cases[0].scheme == "as stored"):
        raise UserError("peers run Llama shapes that are not quantized; leave --peers out")
    odd = {linear.in_features % 32 for linear in linears(skeleton(cases[0])).values()} - {0}
    if "llama.cpp" in args.peers and odd and {case.scheme for case in cases} & {"int8", "int4"}:
        raise UserError("llama.cpp's blocks of 32 do not divide this shape; use --schemes bf16")


def cache_length(args: Namespace) -> int:
    """Cache positions for the prompt, and for what is decoded or verified at each depth."""
    return max(args.prompt, max(args.depth) + max(args.gen + 1, *VERIFIED))


def probe(device: torch.device) -> tuple[float, bool | None]:
    """The read bandwidth, and whether other processes took a part of it."""
    timing = Timing()
    with timing.clock(device):
        bandwidth = read_bandwidth(device)
    return bandwidth, timing.disturbed()


def run_all(cases: list[Case], found: dict, args: Namespace) -> None:
    """Load the candidates, let them take turns, and add their rows to `found`."""
    length = cache_length(args)
    if not args.no_cold:
        found["start"] = [start_twice(case, args, length) for case in cases]
    shape, generator = cases[0].shape, torch.Generator().manual_seed(0)
    prompt = torch.randint(shape["vocab_size"], (args.prompt,), generator=generator).tolist()
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
        torch._dynamo.reset()  # it keeps what it compiled
        gc.collect()


def main(args: Namespace) -> None:
    cases = find_cases(args)
    check_peers(cases, args)
    device = args.device = find_device(args.device)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    for case in cases[:1] if args.draft else []:  # known before hours of work are spent
        model = skeleton(case)
        model.setup_caches(1, 1)
        flags, tokenizer = speculation_flags(args)
        if flags.draft_checkpoint_path:
            load_draft(model, tokenizer, flags)
    before, disturbed = probe(device)
    rows = []
    for case in cases:
        model = skeleton(case)
        model.setup_caches(1, cache_length(args))
        rows += [byte_row(case.scheme, model, depth, args.gen) for depth in args.depth]
    for row in rows:
        row["best_tokens_per_s"] = before / row["bytes_per_token"]
    print(f"read bandwidth {before / 1e9:.1f} GB/s\n\n{table('ceiling', rows)}\n", flush=True)
    found = {"model": args.model or str(args.checkpoint_path), "machine": machine(device)}
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
