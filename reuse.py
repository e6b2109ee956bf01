"""Prefix reuse in the KV cache: a prompt prefills only the part that no row holds.

A prompt shares a prefix with the previous turn of its conversation, or with other prompts that have
the same system prompt. For each row of the cache, the tokens it holds are tracked.
"""

from __future__ import annotations

import os

from engine import Engine
from linear import Int8ActivationLinear, Linear


class CachedRows:
    """The tokens that each row of an engine's KV cache holds, in LRU order.

    A prefix shorter than `least` is not reused: the prefill cache holds that many tokens anyway.
    """

    def __init__(self, engine: Engine, rows: int, least: int = 0):
        self.engine, self.least = engine, least
        self.decoded_alike = decodes_as_it_prefills(engine)
        self.tokens: dict[int, list[int]] = {row: [] for row in range(rows)}

    def forget(self) -> None:
        """Clear all rows after a failure: masked positions must not hold NaN."""
        self.tokens = {row: [] for row in self.tokens}
        for layer in self.engine.model.layers:
            layer.attention.kv_cache.k_cache.zero_()
            layer.attention.kv_cache.v_cache.zero_()

    def keep(self, row: int, prompt: list[int], new: list[int] = ()) -> None:
        """Record that row `row` holds a prompt and its continuation; it is now most recently used.

        Decoded tokens are reused only if a prefill would have written the same bits.
        """
        self.tokens.pop(row)
        self.tokens[row] = prompt + [*new[:-1]] if self.decoded_alike else prompt  # last: not fed

    def shared(self, row: int, prompt: list[int]) -> int:
        """Length of the prompt's prefix that a row holds; at least one token is left to feed."""
        return len(os.path.commonprefix([self.tokens[row], prompt[:-1]]))  # it takes lists, too

    def place(self, prompts: list[list[int]]) -> tuple[list[int], int]:
        """Assign a row to each prompt; returns the rows and the prefix length that all hold.

        A prompt takes the row with the longest common prefix or, if that is taken, the least
        recently used one, into which the prefix is copied. A batch has one start: the shortest.
        """
        rows, sources, start = [], [], self.engine.model.max_seq_length
        for prompt in prompts:
            sizes = {row: self.shared(row, prompt) for row in self.tokens}
            sources.append(max(sizes, key=sizes.get))
            free = [row for row in self.tokens if row not in rows]
            rows.append(sources[-1] if sources[-1] in free else free[0])
            start = min(start, sizes[sources[-1]])
        start = self.engine.rewind(start if start >= self.least else 0)
        for layer in self.engine.model.layers if rows != sources and start else ():
            for cache in (layer.attention.kv_cache.k_cache, layer.attention.kv_cache.v_cache):
                cache[rows, :, :start] = cache[sources, :, :start]
        return rows, start


def decodes_as_it_prefills(engine: Engine) -> bool:
    """Whether decoding writes the same bits into the KV cache as prefilling the same tokens.

    On the CPU kernels it does where both use the same arithmetic: bf16 and int8-activation.
    PyTorch's own operations are not batch-invariant.
    """
    linears = [module for module in engine.model.modules() if isinstance(module, Linear)]
    one_step = engine.fused and engine.fused is engine.prefill_step is engine.decode_step
    return bool(one_step) and {*map(type, linears)} <= {Linear, Int8ActivationLinear}
