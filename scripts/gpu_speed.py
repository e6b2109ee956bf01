"""Speed measurements of gpu_check.py: single matmuls, whole steps, starts, memory.

Each measurement takes a device and the labels of a cell, and returns a row of the report.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import find_device
from engine import Engine, generate, synchronize
from files import temporary_folder
from model import KVCache, ModelArgs
from scripts.gpu_models import (
    GREEDY,
    SCHEMES,
    SHAPES,
    build,
    endless,
    forward,
    has_kernels,
    runner,
    split_scheme,
    start,
)
from scripts.machine import cache_bytes, free_bytes, read_bandwidth
from scripts.random_weights import linears, random_linear

ROOT = Path(__file__).resolve().parents[1]
REPEATS, PATIENCE = 5, 4.0  # repetitions of a measurement; none starts after PATIENCE seconds
WIDTHS = (1, 2, 4, 8)  # rows of a matmul, tokens in a verify pass


def bandwidth(device: torch.device) -> dict:
    return {"GB_per_s": read_bandwidth(device) / 1e9}


def timings(device: torch.device, work: Callable, prepare: Callable = lambda: None) -> list[float]:
    """Seconds of `work` on what `prepare` returns, for each repetition."""
    times, end = [], time.perf_counter() + PATIENCE
    while len(times) <= REPEATS and (len(times) < 2 or time.perf_counter() < end):
        prepared = prepare()
        synchronize(device)
        began = time.perf_counter()
        work(prepared)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return times[1:]  # the first warms up


# ------------------------------------------------------------------------------------------------
# Matmuls and attention alone

DEPTHS_ALONE = (512, 8192, 32768)  # positions that attention reads
COPIES = 128  # at most, of a weight or a cache
REPLAYS = 20  # in one timing, so that host overhead is small


def replayable(device: torch.device, work: Callable[[], object]) -> Callable[[], object]:
    """`work` as a CUDA graph, so that host launches are not timed; on a CPU unchanged."""
    if device.type != "cuda":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def cold_bytes(device: torch.device) -> int:
    """Bytes to cycle through so that no read hits a cache: 4 times the last-level cache."""
    if device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return 4 * cache_bytes()


def rates(device: torch.device, size: int, works: dict[int, Callable[[], object]]) -> dict:
    """GB/s of each of `works`, which read `size` bytes, by rows."""
    found, times = {}, REPLAYS if device.type == "cuda" else 1
    for rows, work in works.items():
        replay = replayable(device, work)
        seconds = timings(device, lambda _, replay=replay: [replay() for _ in range(times)])
        found[f"rows_{rows}"] = size * times / median(seconds) / 1e9
    return found


def matrices(args: ModelArgs) -> dict[str, tuple[int, int]]:
    """Width and height of each matrix of a layer, and of the output matrix."""
    kind, ffn = args.kinds[0], args.intermediate_size
    q, kv = kind.n_head * kind.head_dim, kind.n_local_heads * kind.head_dim
    found = {"wqkv": (args.dim, q + 2 * kv), "wo": (q, args.dim), "w1": (args.dim, ffn)}
    return found | {"w2": (ffn, args.dim), "output": (args.dim, args.vocab_size)}


def measure_product(device: torch.device, shape: str, what: str, scheme: str) -> dict:
    """GB/s of one matmul, or of attention at a depth, for 1 to 8 rows."""
    if what.startswith("attend"):
        return measure_attend(device, SHAPES[shape], int(what.split()[1]))
    size, options = matrices(SHAPES[shape])[what], (device, torch.bfloat16)
    linear = random_linear(size, *split_scheme(scheme), *options)
    stored = sum(p.nbytes for p in linear.parameters())
    copies = [linear]
    while len(copies) < COPIES and (len(copies) < 2 or len(copies) * stored < cold_bytes(device)):
        copies.append(random_linear(size, *split_scheme(scheme), *options))
    for linear in copies:
        linear.pack_weights()
    if has_kernels(device) and copies[0].tiles is None:
        return {"status": "failed", "note": "no operator takes it"}

    def work(rows: int) -> Callable[[], object]:
        x = torch.randn(rows, size[0], device=device).bfloat16()
        return lambda: [linear.matmul(x, False) for linear in copies]

    row = {"MB": stored / 1e6, "ran": "operators" if copies[0].tiles is not None else "torch"}
    return row | rates(device, stored * len(copies), {rows: work(rows) for rows in WIDTHS})


def measure_attend(device: torch.device, args: ModelArgs, depth: int) -> dict:
    """GB/s of the keys and values that a layer's attention reads, with the last rows at `depth`."""
    kind, like = args.kinds[0], torch.empty(0, device=device, dtype=torch.bfloat16)
    caches = [KVCache(1, kind, depth + 1, like)]
    if not caches[0].has_kernels:
        status = "failed" if has_kernels(device) else "skipped"
        return {"status": status, "note": "no operator takes it"}
    stored = caches[0].k_cache[:, :, :depth].nbytes * 2
    while len(caches) < COPIES and len(caches) * stored < cold_bytes(device):
        caches.append(KVCache(1, kind, depth + 1, like))

    def work(rows: int) -> Callable[[], object]:
        q = torch.randn(1, rows, kind.n_head, kind.head_dim, device=device).bfloat16()
        pos = torch.arange(depth - rows, depth, device=device).unsqueeze(0)
        scale = kind.head_dim**-0.5
        attend = torch.ops.tokenbus.attend
        return lambda: [attend(q, c.k_cache, c.v_cache, pos, scale, 0, None) for c in caches]

    row = {"MB": stored / 1e6, "ran": "operators"}
    return row | rates(device, stored * len(caches), {rows: work(rows) for rows in WIDTHS})


def product_cells(args: Namespace) -> Iterator[dict]:
    for scheme, what in product(SCHEMES, matrices(SHAPES[args.shapes[0]])):
        yield {"shape": args.shapes[0], "what": what, "scheme": scheme}
    for depth in DEPTHS_ALONE:
        yield {"shape": args.shapes[0], "what": f"attend {depth}", "scheme": "bf16"}


# ------------------------------------------------------------------------------------------------
# Whole steps

DEPTHS, PREFILL, GEN = (0, 2048, 8192), 512, 64
MAIN = ("bf16", "int8", "int4 g32")


def decoding(engine: Engine, depth: int) -> dict:
    """Tokens/s of `generate` after `depth` positions, and the bytes that a step reads."""
    model = engine.model

    def begin() -> Iterator:
        tokens = generate(engine, [[1] * (depth + 1)], GREEDY, GEN + 1, start=depth, **endless())
        next(tokens)  # the prompt's last token
        return tokens

    times = timings(model.device, list, begin)
    seen = sum(depth + 2 + step for step in range(GEN)) / GEN
    steps = GEN - engine.launches_ahead  # the first ran before the clock started
    speeds = {"tokens_per_s": steps / median(times)}
    speeds |= {"min": steps / max(times), "max": steps / min(times)}
    return {"depth": depth, "MB_per_token": model.bytes_per_step(seen) / 1e6} | speeds


def measure_speed(device: torch.device, shape: str, scheme: str, mode: str) -> dict:
    """Warm-up, decoding at each depth, prefill, verify passes and peak memory of a model."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    model, prompt = build(SHAPES[shape], scheme, device), [1] * PREFILL
    engine = start(model, mode, 1, max(DEPTHS) + 2 * GEN)
    row: dict = {"ran": runner(engine), "warm_up_s": engine.warm_up(1, max(WIDTHS))}
    row["depths"] = [decoding(engine, depth) for depth in DEPTHS]
    times = timings(device, next, lambda: generate(engine, [prompt], GREEDY, 1, **endless()))
    row |= {"prompt": PREFILL, "prefill_tokens_per_s": PREFILL / median(times)}
    row["prefill_by_matmuls"] = median(times) / matmul_seconds(model) if scheme == "bf16" else None
    tokens = torch.ones(1, max(WIDTHS), dtype=torch.int64)
    passes = [timings(device, lambda _, n=n: forward(engine, tokens, [0], n)) for n in WIDTHS]
    one, *more = map(median, passes)
    row |= {f"verify_{n}": several / one for n, several in zip(WIDTHS[1:], more, strict=True)}
    return row | {"peak_GB": torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None}


def matmul_seconds(model: torch.nn.Module) -> float:
    """Seconds of PyTorch's bf16 matmuls of a prompt's activations with every matrix."""
    weights = [linear.weight for name, linear in linears(model).items() if name != "output"]
    x = {w.shape[1]: torch.randn(PREFILL, w.shape[1], device=w.device).to(w) for w in weights}
    return median(timings(model.device, lambda _: [F.linear(x[w.shape[1]], w) for w in weights]))


def speed_cells(args: Namespace) -> Iterator[dict]:
    """Cells, most informative first: the last ones are measured only if time is left."""
    first = args.shapes[:1]
    cells = itertools.chain(
        product(args.shapes, ("fused",), MAIN),
        product(first, ("pdl", "operators", "block", "torch"), MAIN),
        product(args.shapes, ("fused",), [s for s in SCHEMES if s not in MAIN]),
    )
    for shape, mode, scheme in cells:
        yield {"shape": shape, "scheme": scheme, "mode": mode}


# ------------------------------------------------------------------------------------------------
# The kernels of a step

TRACED = 8  # steps


def measure_kernels(device: torch.device, shape: str, scheme: str, mode: str) -> dict:
    """Launches and microseconds a step of each kernel (on a CPU: operation), slowest first."""
    model = build(SHAPES[shape], scheme, device)
    engine, token = start(model, mode, 1, 512), torch.ones(1, 1, dtype=torch.int64, device=device)
    engine.warm_up(1)
    activity = torch.profiler.ProfilerActivity
    activity = activity.CUDA if device.type == "cuda" else activity.CPU
    with torch.profiler.profile(activities=[activity]) as trace:
        for at in range(TRACED):
            engine.decode(token, torch.full_like(token, at), model.kv_steps(at + 1))
        synchronize(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [e for e in trace.key_averages() if getattr(e, key) > 0]
    launches = sum(event.count for event in events) / TRACED / len(model.layers)
    row: dict = {"ran": runner(engine), "launches_per_layer": launches, "launches": []}
    for event in sorted(events, key=lambda event: -getattr(event, key))[:12]:
        times = {"launches": event.count / TRACED, "us_per_step": getattr(event, key) / TRACED}
        row["launches"].append({"kernel": event.key[:60]} | times)
    return row


def kernel_cells(args: Namespace) -> Iterator[dict]:
    for mode, scheme in (*product(["fused", "pdl"], MAIN), ("block", "bf16")):
        yield {"shape": args.shapes[0], "scheme": scheme, "mode": mode}


# ------------------------------------------------------------------------------------------------
# The first token of a new process

STARTS = {"fused": "12, 3", "block": "25, 10"}  # target seconds, cold and warm


def first_tokens(device: str, shape: str, scheme: str, mode: str) -> dict:
    """Seconds to build a model, then to its first and second token, started as in generate.py."""
    began, where = time.perf_counter(), find_device(device)
    model = build(SHAPES[shape], scheme, where)
    synchronize(where)
    loaded = time.perf_counter()
    engine = start(model, mode, 1, 512)
    engine.warm_up(1)
    tokens = generate(engine, [[1] * 8], GREEDY, 2, **endless())
    seconds = []
    for _ in tokens:
        synchronize(where)
        seconds.append(time.perf_counter() - loaded)
    row = {"ran": runner(engine), "made_s": loaded - began}
    return row | dict(zip(("first_s", "second_s"), seconds, strict=True))


def measure_start(device: torch.device, shape: str, scheme: str, mode: str) -> dict:
    """Seconds from a model in memory to its first token, in new processes: caches cold, then warm.

    The weights are drawn on the device, not read from a file.
    """
    code = f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); from scripts import gpu_speed; "
    code += "print(json.dumps(gpu_speed.first_tokens(*sys.argv[1:])))"
    command, row = [sys.executable, "-c", code, str(device), shape, scheme, mode], {}
    with temporary_folder() as folder:
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        env = os.environ | {name: f"{folder}/{name}" for name in names}
        for kind in ("cold", "warm"):
            began = time.perf_counter()
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            row |= {"ran": found["ran"], f"{kind}_s": found["first_s"]}
            row |= {f"{kind}_process_s": time.perf_counter() - began}
    return row | {"target": STARTS[mode]}


def start_cells(args: Namespace) -> Iterator[dict]:
    for mode, shape in product(("fused", "block"), dict.fromkeys(("tiny", args.shapes[0]))):
        yield {"shape": shape, "scheme": "int4 g32", "mode": mode}


# ------------------------------------------------------------------------------------------------
# A large model in memory

ROOM = {"llama-2-70b": 46.0}  # GB that a model may take, in int4 g32 with a cache of MEMORY_LENGTH
MEMORY_LENGTH = 4096


def measure_memory(device: torch.device, shape: str, scheme: str, mode: str) -> dict:
    """Peak GB of building a model, a prefill and a step: no weight may exist twice."""
    room, on_gpu = ROOM.get(shape, math.inf), device.type == "cuda"
    if on_gpu and shape in ROOM and free_bytes(device) < room * 1e9:
        return {"status": "skipped", "note": f"needs {room} GB of memory"}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    model = build(SHAPES[shape], scheme, device)
    engine = start(model, mode, 1, MEMORY_LENGTH)
    list(generate(engine, [[1] * min(PREFILL, MEMORY_LENGTH - 2)], GREEDY, 2, **endless()))
    read = model.bytes_per_step(MEMORY_LENGTH) + model.tok_embeddings.weight.nbytes
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None
    row = {"ran": runner(engine), "stored_GB": read / 1e9, "peak_GB": peak}
    if peak is not None and peak >= room:
        return row | {"status": "failed", "note": f"takes {room} GB or more"}
    return row


def memory_cells(args: Namespace) -> Iterator[dict]:
    shape = "tiny" if args.shapes == ["tiny"] else "llama-2-70b"
    yield {"shape": shape, "scheme": "int4 g32", "mode": "fused"}


# ------------------------------------------------------------------------------------------------
# Another checkout, measured by its own script


def measure_before(device: torch.device, checkout: str, shapes: str, seconds: str) -> dict:
    """The report of another checkout's gpu_check.py for the speed stage, run in a new process."""
    flags = ["--device", str(device), "--shapes", shapes, "--budget", seconds]
    flags += ["--stages", "bandwidth-before,speed"]
    command = [sys.executable, f"{checkout}/scripts/gpu_check.py", *flags]
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, text=True)
    row = {"code": done.returncode, "report": done.stdout}
    if done.returncode not in (0, 1) or not done.stdout:  # 1: a cell failed
        return row | {"status": "failed", "note": f"it ended with code {done.returncode}"}
    return row
