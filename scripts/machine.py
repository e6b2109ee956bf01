"""Measures the machine: read bandwidth, timings, memory, and CPU use by other processes."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import synchronize


def cache_bytes() -> int:
    """Total bytes of the CPU's last-level caches; 64 MiB if the system does not say."""
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
    """Size of the bandwidth probe's buffer: far more than the caches hold."""
    if device.type == "cuda":
        return min(4 << 30, torch.cuda.mem_get_info(device)[0] // 2)
    return max(8 * cache_bytes(), 1 << 28)


# Each way to read a buffer has a bottleneck on some machine; the fastest one counts.
READERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum of int64": lambda x: x.view(torch.int64).sum(),
    "sum of float32": lambda x: x.sum(),
    "dot of float32": lambda x: torch.dot(*x.view(2, -1)),
    "max of float32": lambda x: x.amax(),
    "matrix times vector": lambda x: x.view(-1, 1024) @ x[:1024],
}


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that all threads together read from memory: the best of five tries."""
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


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """CPU seconds of all processes since boot, plus steal time (other VMs); None if unknown."""
    try:
        words = stat.read_text().split("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process, all threads, and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Timing:
    """Seconds of each repetition, and the CPU time that other processes used meanwhile."""

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
        """Whether other processes used over 5 % of a core; None if unknown.

        The system counts in ticks of 10 ms, so two of them are tolerated.
        """
        if self.foreign is None:
            return None
        return self.foreign > 0.05 * sum(self.seconds) + 0.02

    def spread(self, amount: float) -> dict[str, float]:
        """Median, minimum and maximum of `amount` a second over the repetitions."""
        rates = [amount / seconds for seconds in self.seconds]
        return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def any_disturbed(*timings: Timing) -> bool | None:
    marks = [timing.disturbed() for timing in timings]
    return None if None in marks else any(marks)


def probe(device: torch.device) -> tuple[float, bool | None]:
    """The read bandwidth, and whether other processes disturbed the measurement."""
    timing = Timing()
    with timing.clock(device):
        bandwidth = read_bandwidth(device)
    return bandwidth, timing.disturbed()


def free_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: the allocator's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError):  # ru_maxrss would start at the parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
