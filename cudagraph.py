"""Captures a decoding step as CUDA graphs: the host launches one graph a token, not every kernel.

Positions are read on the device and kernels get the whole cache, so one graph serves every length.
Also works on ROCm, where torch.cuda means HIP.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

BLOCK = 8  # tokens a row, if more than one, are padded to a multiple: the matmuls' tile


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that captures all graphs of a device: the allocator reuses memory per stream."""
    return torch.cuda.Stream(device)


class Graph(NamedTuple):
    """A captured step: fill the inputs, replay, read the outputs before the next replay."""

    idx: Tensor  # [B, width]
    input_pos: Tensor  # [B, width]
    replay: Callable[[], tuple[Tensor, ...]]


class Captured:
    """Runs `step`, capturing it on the first call with a shape; a prefill is never captured.

    There is one graph for one token a row, and one for each multiple of BLOCK; padding goes to the
    cache's last slot. The next call with the same shape overwrites the result. On a CPU, which has
    no graphs, the same steps run uncaptured. Allocate the caches first.
    """

    def __init__(self, step: Callable, model: nn.Module):
        self.step, self.padding = step, model.max_seq_length
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.pool = None  # the graphs share their intermediate memory

    def __call__(
        self, idx: Tensor, input_pos: Tensor, kv_len: int, last: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """As `model.Transformer.forward`; `kv_len` is ignored."""
        if last is not None:
            return self.step(idx, input_pos, kv_len, last)
        rows, tokens = idx.shape
        width = 1 if tokens == 1 else -(-tokens // BLOCK) * BLOCK
        if (rows, width) not in self.graphs:
            self.graphs[rows, width] = self.capture(rows, width, idx.device)
        graph = self.graphs[rows, width]
        graph.idx[:, :tokens].copy_(idx)
        graph.input_pos.fill_(self.padding)[:, :tokens].copy_(input_pos)
        return tuple(output[:, :tokens] for output in graph.replay())

    def capture(self, rows: int, width: int, device: torch.device) -> Graph:
        """Run the step uncaptured, so that it compiles and allocates; then capture it.

        A captured step may not wait for the device or copy from the host.
        """
        idx = torch.zeros(rows, width, dtype=torch.int64, device=device)
        input_pos = torch.full_like(idx, self.padding)

        def run() -> tuple[Tensor, ...]:
            return tuple(self.step(idx, input_pos, self.padding, None))

        if device.type != "cuda":
            return Graph(idx, input_pos, run)
        side, current = side_stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # freeing a kernel or a communicator would break the capture
        try:
            # thread_local: other threads (NCCL's watchdog) may call CUDA meanwhile.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=side, capture_error_mode="thread_local"
            ):
                outputs = run()
        finally:
            gc.enable()
        self.pool = graph.pool()
        return Graph(idx, input_pos, lambda: (graph.replay(), outputs)[1])
