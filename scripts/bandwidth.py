"""The read bandwidth of a device: the ceiling of decoding, which reads every weight a token."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from generate import synchronize


def cache_bytes() -> int:
    """Bytes of the CPU's last-level caches, all of them; 64 MiB where the system does not say."""
    found: dict[tuple[int, str], int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        with contextlib.suppress(OSError, ValueError):
            level, cpus, size = (
                (index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
            found[int(level), cpus] = int(size.removesuffix("K")) * 1024
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or 1 << 26


def probe_bytes(device: torch.device) -> int:
    """How much the bandwidth probe reads at once: far more than the caches hold."""
    if device.type == "cuda":
        return min(4 << 30, torch.cuda.mem_get_info(device)[0] // 2)
    return max(8 * cache_bytes(), 1 << 28)


# Every way of reading a buffer is limited by something on some machine; the fastest one counts.
READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of int64": lambda x: x.view(torch.int64).sum(),
    "sum of float32": lambda x: x.sum(),
    "dot of float32": lambda x: torch.dot(*x.view(2, -1)),
    "max of float32": lambda x: x.amax(),
    "matrix times vector": lambda x: x.view(-1, 1024) @ x[:1024],
}


def read_bandwidth(device: torch.device) -> float:
    """The bytes a second that all threads together read from memory: the best of five tries."""
    buffer = torch.ones(probe_bytes(device) // 8192 * 2048, device=device)  # written: really there
    best = float("inf")
    for _ in range(6):  # the first warms up
        for read in READERS.values():
            synchronize(device)
            began = time.perf_counter()
            read(buffer)
            synchronize(device)
            best = min(best, time.perf_counter() - began)
    return buffer.nbytes / best
