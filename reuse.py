"""What the KV cache still holds of earlier texts, so that the next prompt prefills only the rest.

A prompt shares its first tokens with the text before it in a conversation, and with its siblings
behind a system prompt. Each row of the cache remembers the tokens that it holds.
"""

from __future__ import annotations

import os

from engine import Engine
from linear import Int8ActivationLinear, Linear


class CachedRows:
    """The rows of an engine's KV cache, and the tokens that each holds, the most recent last.

    Fewer than `least` shared tokens do not count: the prefill cache has so many of each prompt.
    """

    def __init__(self, engine: Engine, rows: int, least: int = 0):
        self.engine, self.least = engine, least
        self.decoded_alike = decodes_as_it_prefills(engine)
        self.tokens: dict[int, list[int]] = {row: [] for row in range(rows)}

    def forget(self) -> None:
        """Empty all rows, after a failure: NaN would spoil what is masked, too."""
        self.tokens = {row: [] for row in self.tokens}
        for layer in self.engine.model.layers:
            layer.attention.kv_cache.k_cache.zero_()
            layer.attention.kv_cache.v_cache.zero_()

    def keep(self, row: int, prompt: list[int], new: list[int] = ()) -> None:
        """Row `row`, now the one used most recently, holds a prompt and what followed it.

        What decoding wrote counts where a prefill would have written the same.
        """
        self.tokens.pop(row)
        self.tokens[row] = prompt + [*new[:-1]] if self.decoded_alike else prompt  # last: not fed

    def shared(self, row: int, prompt: list[int]) -> int:
        """How many first tokens of a prompt a row holds; one at least is left to be fed."""
        return len(os.path.commonprefix([self.tokens[row], prompt[:-1]]))  # it takes lists, too

    def place(self, prompts: list[list[int]]) -> tuple[list[int], int]:
        """A row for each prompt, and how many first tokens of all of them these rows now hold.

        A prompt takes the row that shares most with it or, where another prompt has that, the one
        used least recently. A batch starts at one position: the least that any of them shares.
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
    """Whether decoding writes the same bits into the KV cache as a prefill of the same tokens.

    On the CPU kernels it does where both use one arithmetic: in bf16 and int8-activation. PyTorch's
    own operations promise nothing for another number of rows.
    """
    linears = [module for module in engine.model.modules() if isinstance(module, Linear)]
    one_step = engine.fused and engine.fused is engine.prefill_step is engine.decode_step
    return bool(one_step) and {*map(type, linears)} <= {Linear, Int8ActivationLinear}
