"""Tensor parallelism: one model on several processes, each with a slice of every matrix.

    torchrun --standalone --nproc_per_node=2 generate.py --compile --checkpoint_path …/model.pth

The slicing is Megatron-LM's (Shoeybi et al. 2019, arXiv 1909.08053): a rank computes its share of
heads, hidden units and logits (rows of `wqkv`, `w1`, `w3` and `output`) and multiplies heads and
hidden units by its columns of `wo` and `w2`. That takes two all-reduces a layer and one all-gather
of logits a step, by NCCL on CUDA and ROCm, by gloo on CPUs. Every rank then draws the same token.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import math
import os
import re
import sys
import threading
import time
import traceback
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import find_device
from cli import UserError, bounded
from linear import Int8ActivationLinear, Linear
from model import AllHeadsNorm, FeedForward, ModelArgs, Transformer
from process import variable, world_size

ops = torch.ops._c10d_functional  # unlike dist.all_reduce, torch.compile can trace them

BY_ROWS = ("wq", "wk", "wv", "wqkv", "w1", "w3", "output", "q", "k")  # q, k: of a FlatNorm
BY_COLUMNS = ("wo", "w2")
BEAT, SILENCE = 2, 20  # seconds between heartbeats, and without one until a rank counts as dead
FOREVER = datetime.timedelta(days=20)  # for a user to type a line

# ------------------------------------------------------------------------------------------------
# The ranks: init, shutdown, heartbeats, and values that rank 0 broadcasts


def init(name: str | None) -> tuple[torch.device, Shard | None]:
    """The device of this process and, under torchrun, its shard of the model.

    `name` is `--device`. Raises `UserError` if not all ranks join within TP_TIMEOUT seconds.
    """
    world = world_size()
    if world == 1:
        return find_device(name), None
    place = variable("LOCAL_RANK", 0, 2**20, 0)
    variable("MASTER_PORT", 0, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("WORLD_SIZE is set and MASTER_ADDR is not; start with torchrun")
    name = name or os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if ":" in name:
        raise UserError(f"each process has a device of its own; pass --device {name.split(':')[0]}")
    device = find_device(name if name == "cpu" else f"{name}:{place}")
    options: dict = {"timeout": datetime.timedelta(seconds=timeout())}
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        options["device_id"] = device
    try:
        dist.init_process_group(dist.get_default_backend_for_device(device), **options)
        shard = Shard(device)
        for task in ((send_heartbeats, shard, store()), (watch_heartbeats, shard)):
            threading.Thread(target=task[0], args=task[1:], daemon=True).start()
        return device, shard
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {world} processes did not find each other in {timeout():g} s "
            f"({str(error).partition(chr(10))[0]}); were all started, with the same addresses?"
        ) from None


def shutdown(shard: Shard | None) -> None:
    """Leave after a barrier, so that no rank takes another for dead."""
    if shard:
        dist.barrier()
        shard.done.set()
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(name: str | None) -> Iterator[tuple[torch.device, Shard | None]]:
    """`init`, then `shutdown` at the end of the block, or `leave` after an error.

    Engines, which hold CUDA graphs, must be locals of functions that the block calls.
    """
    device, shard = init(name)
    try:
        yield device, shard
    except BaseException as error:
        leave(shard, error)
        raise
    shutdown(shard)


def leave(shard: Shard | None, error: BaseException) -> None:
    """Leave after an error without a barrier, which the others may never reach.

    On exit NCCL would wait for the other ranks and for CUDA graphs, so it is aborted. gloo would
    not wait, but aborting it would make the others fail before this rank prints its error.
    """
    if shard:
        shard.done.set()
    if shard and shard.device.type != "cpu":
        traceback.clear_frames(error.__traceback__)  # frees engines and their graphs
        gc.collect()
        dist.distributed_c10d._abort_process_group()


def timeout() -> float:
    """Seconds that ranks wait for each other; a cold disk or a compiler may take minutes."""
    try:
        return bounded(float, 1, 1e6)(os.environ.get("TP_TIMEOUT", "600"))
    except ArgumentTypeError as error:
        raise UserError(f"the variable TP_TIMEOUT: {error}") from None


def store() -> dist.Store:
    """A new connection to this run's key-value store, which torchrun or rank 0 hosts.

    A blocking call blocks its connection, so each thread has its own, apart from the collectives'.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    tcp = dist.TCPStore(address, port, timeout=datetime.timedelta(seconds=SILENCE))
    return dist.PrefixStore(f"tp/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", tcp)


def send_heartbeats(shard: Shard, beats: dist.Store) -> None:
    """Send heartbeats, and record when each rank last sent one."""
    counts = [0] * shard.world
    while not shard.done.wait(BEAT):
        for rank in range(shard.world):
            try:
                count = beats.add(f"alive/{rank}", int(rank == shard.rank))
            except RuntimeError:  # the store is gone, and with it the process that hosts it
                return
            if count > counts[rank]:
                counts[rank], shard.heard[rank] = count, time.monotonic()


def watch_heartbeats(shard: Shard) -> None:
    """End this process when another rank falls silent: its collectives would never return.

    torchrun ends only its own ranks, and only when one dies. The process group's timeout is not
    enough: NCCL does not watch collectives that a CUDA graph replays, and a rank that waits for a
    typed line is in no collective. When the host of the store hangs, so does `send_heartbeats`, and
    all ranks fall silent.
    """
    while not shard.done.wait(BEAT):
        silent = [time.monotonic() - heard > SILENCE for heard in shard.heard]
        if any(silent) and not shard.done.is_set():
            rank = silent.index(True)
            print(f"error: rank {rank} is silent for {SILENCE} s", file=sys.__stderr__)
            os._exit(1)


def broadcast_from_rank0(make: Callable):
    """The JSON value that `make()` returns on rank 0, on every rank: a typed line, a measured time.

    Unlike a collective it waits without a timeout: a user may take hours.
    """
    if not dist.is_initialized():
        return make()
    shared, rank = store(), dist.get_rank()
    shared.set_timeout(FOREVER)
    key = f"shared/{shared.add(f'count/{rank}', 1)}"
    if rank == 0:
        shared.set(key, json.dumps(make()))
    return json.loads(shared.get(key))


def in_turn(make: Callable):
    """Run `make()` on one rank after another: the first does the work, the others find it done."""
    if not dist.is_initialized():
        return make()
    for rank in range(dist.get_world_size()):
        if rank == dist.get_rank():
            value = make()
        dist.barrier()
    return value


# ------------------------------------------------------------------------------------------------
# The shard of one rank


def check_sizes(args: ModelArgs, state: dict[str, Tensor], world: int, path: Path) -> None:
    """Raise a `UserError` with the world sizes that fit, unless `world` does."""
    counts = {"KV heads": math.gcd(*(kind.n_local_heads for kind in args.kinds))}
    counts |= {"heads": math.gcd(*(kind.n_head for kind in args.kinds))}
    counts["columns of w2"] = args.intermediate_size
    if args.mixture:
        counts["columns of an expert's w2"] = args.mixture.width
        counts["columns of the shared expert's w2"] = args.mixture.shared
    for key, tensor in state.items():
        if key.endswith(tuple(f".{name}.scales_and_zeros" for name in BY_COLUMNS)):
            counts[f"int4 groups of {key.removesuffix('.scales_and_zeros')}"] = tensor.shape[-3:][0]
    fitting = [n for n in range(1, counts["KV heads"] + 1) if not math.gcd(*counts.values()) % n]
    for what, count in counts.items():
        if count % world:
            raise UserError(
                f"{world} processes cannot share the {count} {what} of {path} evenly; "
                f"possible are {', '.join(map(str, fitting))}"
            )


class Shard:
    """One rank's part of a model: `slice_state` before loading, `add_collectives` after it."""

    def __init__(self, device: torch.device):
        self.device, self.rank, self.world = device, dist.get_rank(), dist.get_world_size()
        self.group, self.done = dist.group.WORLD.group_name, threading.Event()
        self.heard = [time.monotonic()] * self.world  # when each rank sent its last heartbeat

    def slice_state(self, model: Transformer, state: dict[str, Tensor], path: Path) -> Transformer:
        """This rank's model on the meta device; the tensors in `state` are replaced by its slices.

        It has fewer heads and hidden units, so its args are the rank's own. The embedding is
        replicated: a lookup costs nothing.
        """
        args = model.args
        check_sizes(args, state, self.world, path)
        with torch.device("meta"):
            model = Transformer(args.share(self.world))
            model.output = Linear(args.dim, len(self.vocabulary(args.vocab_size)))
        for key, tensor in state.items():
            layer = re.match(r"layers\.(\d+)\.", key)
            layer = model.layers[min(int(layer[1]), args.n_layer - 1) if layer else 0]
            stacked = ".feed_forward.w" in key and not isinstance(layer.feed_forward, FeedForward)
            state[key] = self.slice_tensor(key, tensor, layer.attention.heads, int(stacked))
        return model

    def share(self, size: int) -> int:
        """How many of `size` logits a rank computes: a multiple of 16, for the kernels."""
        return -(-size // (16 * self.world)) * 16

    def vocabulary(self, size: int) -> range:
        """The logits that this rank computes; the last rank may have fewer."""
        share = self.share(size)
        return range(size)[self.rank * share : (self.rank + 1) * share]

    def slice_tensor(
        self, key: str, tensor: Tensor, heads: tuple[int, int, int], leading: int = 0
    ) -> Tensor:
        """This rank's slice of a stored tensor: a view of the mapped file where possible.

        A stack of experts has `leading` dimensions before those of a Linear; every expert is
        sliced. A tensor with missing dimensions stays whole; `check_state` will name it.
        """
        name, _, kind = key.rpartition(".")
        layer = name.rpartition(".")[2]
        if layer in BY_ROWS:
            dim = int(kind == "scales_and_zeros")
        elif layer in BY_COLUMNS and kind in ("weight", "scales_and_zeros"):
            dim = int(kind == "weight")
        else:  # only rank 0 adds a bias, or the all-reduce would sum it
            once = layer in BY_COLUMNS and kind == "bias" and self.rank > 0
            return torch.zeros_like(tensor) if once else tensor
        dim += leading
        if tensor is None or tensor.dim() <= dim:
            return tensor
        size = tensor.shape[dim]
        if layer == "output":
            rows = self.vocabulary(size)
            return tensor.narrow(dim, rows.start, len(rows))
        parts = heads if layer == "wqkv" else (1,)  # q, k and v are sliced separately
        if size % (sum(parts) * self.world):
            return tensor
        parts = tensor.split([size * part // sum(parts) for part in parts], dim)
        parts = [part.chunk(self.world, dim)[self.rank] for part in parts]
        whole = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
        return whole.to(self.device).contiguous()

    def add_collectives(self, model: Transformer, tied: bool) -> None:
        """Add the collectives to a loaded model, as forward hooks."""
        size = model.args.vocab_size
        if tied:  # a view of the embedding, not a copy
            rows = self.vocabulary(size)
            part = model.tok_embeddings.weight[rows.start : rows.stop]
            model.output.weight = nn.Parameter(part, requires_grad=False)
        for module in summed(model):
            module.register_forward_hook(lambda _module, _x, y: self.reduce(y, "sum"))
        for linear in by_columns(model):
            if isinstance(linear, Int8ActivationLinear):
                linear.peak.register_forward_hook(lambda _module, _x, y: self.reduce(y, "max"))
        for norm in norms_of_all_heads(model):
            norm.mean.register_forward_hook(lambda _m, _x, y: self.reduce(y, "sum") / self.world)
        model.output.register_forward_hook(lambda _module, _x, y: self.gather(y, size))

    def reduce(self, x: Tensor, operation: str) -> Tensor:
        """All-reduce x by "sum" or "max"."""
        return ops.wait_tensor(ops.all_reduce(x, operation, self.group))

    def gather(self, x: Tensor, size: int) -> Tensor:
        """All-gather logits `[B, T, part]` of each rank into `[B, T, size]`."""
        x = F.pad(x, (0, self.share(size) - x.shape[-1])).contiguous()
        x = ops.wait_tensor(ops.all_gather_into_tensor(x, self.world, self.group))
        return x.unflatten(0, (self.world, -1)).movedim(0, 2).flatten(2)[..., :size]

    def cost(self, model: Transformer, rows: int) -> dict[str, float]:
        """Bytes and time of the collectives in a decoding step of `rows` rows, run alone."""
        like, size = model.norm.weight, model.args.vocab_size
        calls = [(self.gather, like.new_zeros(rows, 1, len(self.vocabulary(size))), size)]
        for _ in summed(model):
            calls.append((self.reduce, like.new_zeros(rows, 1, model.args.dim), "sum"))
        for linear in by_columns(model):
            if isinstance(linear, Int8ActivationLinear):
                times = model.args.mixture.chosen if linear.experts else 1
                peaks = torch.zeros(rows, 1, device=self.device)
                calls += [(self.reduce, peaks, "max")] * times
        calls += [
            (self.reduce, torch.zeros(rows, 1, 1, device=self.device), "sum")
            for _ in norms_of_all_heads(model)
        ]
        for step in range(11):
            if step == 1:  # step 0 warms up
                began = time.perf_counter()
            for function, x, option in calls:
                function(x, option)
            self.reduce(like.new_zeros(1), "sum").item()  # synchronizes with the device
        return {
            "communication_bytes_per_token": sum(x.nbytes for _, x, _ in calls),
            "communication_ms_per_token": (time.perf_counter() - began) * 100,
        }


def norms_of_all_heads(model: Transformer) -> list[AllHeadsNorm]:
    """The norms whose mean square is averaged over the ranks."""
    return [module for module in model.modules() if isinstance(module, AllHeadsNorm)]


def by_columns(model: Transformer) -> list[Linear]:
    """The Linears that are sliced by columns."""
    modules = model.named_modules()
    return [m for n, m in modules if n.endswith(BY_COLUMNS) and isinstance(m, Linear)]


def summed(model: Transformer) -> list[nn.Module]:
    """The modules whose outputs are all-reduced; experts are summed locally first."""
    ffns = [layer.feed_forward for layer in model.layers]
    ffns = [ffn.w2 if isinstance(ffn, FeedForward) else ffn for ffn in ffns]
    return [layer.attention.wo for layer in model.layers] + ffns
