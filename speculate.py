"""Speculative decoding: a draft proposes a few tokens, one pass of the target verifies them all.

The output has exactly the target's distribution (Leviathan et al. 2023, arXiv 2211.17192), so
greedy text is the same with and without a draft. A draft is a cheaper model, or the text itself
(n-gram drafting). The draft length follows the acceptance rate and the bytes that a step reads,
never a clock: a seed gives the same text in every run and on every rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UserError
from engine import (
    FEW_ROWS,
    Engine,
    Sampling,
    Token,
    allocate_cache,
    candidates,
    draw,
    load,
    sample,
    send_tokens,
)
from linear import Linear
from model import Transformer
from tokenizer import Tokenizer

# Verifying one more token takes about as long as reading so many bits of every weight, however many
# a weight has. With four tokens and TinyLlama's shape it was 0.9 in bf16 and int8, and 1.4 in int4
# (benchmarks.md, "The shape of TinyLlama", verify 4).
VERIFIED_BITS = 1.0

Hook = Callable[[int, list[int], Tensor], Tensor]  # as `shape_logits` of engine.generate


def shaped(logits: Tensor, text: list[int], ids: Tensor, hook: Hook | None) -> Tensor:
    """Logits `[N, V]` after text, text + ids[:1], …, each row as the hook returns it."""
    if hook is None:
        return logits
    known = [text + ids[:i].tolist() for i in range(len(logits))]
    return torch.stack([hook(0, *pair) for pair in zip(known, logits.clone(), strict=True)])


def step_cost(model: Transformer) -> int:
    """The cost of a decoding step, in bytes read: decoding is memory-bound.

    PyTorch's own operations for quantized weights on CPUs are not: they count as unquantized.
    """
    cost, size = model.bytes_per_step(0), model.norm.weight.element_size()
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    for linear in linears if model.device.type == "cpu" else ():
        if linear.tiles is None:
            matrices = linear.experts or 1
            stored = sum(tensor.nbytes for tensor in linear.parameters()) // matrices
            floats = linear.in_features * linear.out_features * size
            chosen = model.args.mixture.chosen if linear.experts else 1
            cost += chosen * max(0, floats - stored)
    return cost


def row_cost(model: Transformer) -> float:
    """The cost of verifying one more token in the same step, in the same bytes."""
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    chosen = model.args.mixture.chosen if model.args.mixture else 1
    weights = (m.in_features * m.out_features * (chosen if m.experts else 1) for m in linears)
    return VERIFIED_BITS / 8 * sum(weights)


class DraftModel:
    """Drafts with a cheaper model; `vocab_size` is the target's."""

    def __init__(self, engine: Engine, vocab_size: int):
        self.engine, self.vocab_size = engine, vocab_size
        self.known = 0  # tokens of the text that are in the cache

    def proposal_cost(self) -> int:
        return step_cost(self.engine.model)

    def begin(self, start: int) -> None:
        """Begin a text whose first `start` tokens are those of the previous one."""
        self.known = self.engine.rewind(min(self.known, start))

    def propose(
        self,
        text: list[int],
        k: int,
        sampling: Sampling,
        generator: torch.Generator,
        hook: Hook | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draft up to k tokens after `text`: ids `[k]`, and the distributions `[k, V]`."""
        model = self.engine.model
        # Rejected tokens stay in the cache behind the known ones, and are overwritten.
        known = self.known = self.engine.rewind(min(self.known, len(text) - 1))
        k = max(0, min(k, model.max_seq_length + 1 - len(text)))  # the last token is not fed
        if max(text[known:]) >= model.args.vocab_size:  # beyond the draft's embedding
            k = 0
        q = torch.zeros(k, self.vocab_size, device=model.device)
        ids = torch.zeros(k, dtype=torch.int64, device=model.device)
        if k == 0:
            return ids, q
        if len(text) - known > FEW_ROWS:
            logits = self.engine.prefill([text], known)
        else:
            logits = self.decode(torch.tensor([text[known:]], device=model.device), known)
        for i in range(k):
            logits = logits[:, : self.vocab_size]
            logits = F.pad(logits, (0, self.vocab_size - logits.shape[1]), value=-torch.inf)
            if hook:
                logits = hook(0, text + ids[:i].tolist(), logits[0].clone())[None]
            probs, tokens = candidates(logits, sampling)
            q[i].scatter_(0, tokens[0], probs[0])
            ids[i] = tokens[0].gather(0, draw(probs, generator)[0])[0]
            if i + 1 < k:
                logits = self.decode(ids[i].view(1, 1), len(text) + i)
        self.known = len(text) + k - 1
        return ids, q

    def decode(self, idx: Tensor, start: int) -> Tensor:
        """Logits `[1, V]` after tokens idx `[1, T]` at positions `start` and on."""
        input_pos = torch.arange(start, start + idx.shape[1], device=idx.device)[None]
        kv_len = self.engine.model.kv_steps(start + idx.shape[1])
        return self.engine.decode(idx, input_pos, kv_len).logits[:, -1]


def load_draft(
    path: Path, model: Transformer, tokenizer: Tokenizer, precision: str, shard: Any = None
) -> Transformer:
    """Load a draft, with a KV cache as long as the model's; UserError if vocabularies differ."""
    draft, other = load(path, model.device, precision, shard)
    if other.pieces != tokenizer.pieces:
        i = min(i for i, _ in other.pieces.items() ^ tokenizer.pieces.items())
        meanings = f"{other.pieces.get(i)!r} in the draft, {tokenizer.pieces.get(i)!r} in the model"
        raise UserError(f"token {i} is {meanings}; use a draft with the model's vocabulary")
    if draft.args.vocab_size < tokenizer.vocab_size:
        sizes = f"{draft.args.vocab_size} tokens and the vocabulary {tokenizer.vocab_size}"
        raise UserError(f"the draft's embedding has {sizes}; use a draft with all of them")
    allocate_cache(draft, 1, min(model.max_seq_length, draft.args.block_size))
    return draft


class PromptLookup:
    """n-gram drafting: proposes what followed the latest earlier match of the last 3 or 2 tokens.

    The idea is Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
    """

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size, self.device, self.engine = vocab_size, device, None
        self.begin(0)

    def proposal_cost(self) -> int:
        return 0

    def begin(self, start: int) -> None:
        """Begin a new text."""
        self.seen, self.follows = 1, {}  # where the latest token after each n-gram stands

    def propose(
        self,
        text: list[int],
        k: int,
        sampling: Sampling,
        generator: torch.Generator,
        hook: Hook | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `DraftModel.propose`, with one-hot distributions; no tokens without a match."""
        for place in range(self.seen, len(text)):
            for n in (3, 2):
                self.follows[tuple(text[max(place - n, 0) : place])] = place
        self.seen = max(self.seen, len(text))
        places = (self.follows.get(tuple(text[-n:])) for n in (3, 2))
        place = next((place for place in places if place), None)
        found = [] if place is None else text[place : place + k]
        while place is not None and len(found) < k:  # the match runs into its own continuation
            found += found[: k - len(found)]
        ids = torch.tensor(found, dtype=torch.int64, device=self.device)
        q = torch.zeros(len(ids), self.vocab_size, device=self.device)
        return ids, q.scatter_(1, ids.unsqueeze(1), 1.0)


def verify(p: Tensor, tokens: Tensor, ids: Tensor, q: Tensor, generator: torch.Generator) -> Tensor:
    """Accept a prefix of the draft and draw one more token, so that all are distributed as p.

    ids `[k]` were drawn from q `[k, V]`; p and tokens `[k + 1, K]`, as `candidates` gives them, are
    the target's distributions before each and after the last. Token i is accepted with probability
    min(1, p/q); the first rejected one is replaced by a draw from max(0, p - q); if all are
    accepted, one more is drawn from p (Leviathan et al. 2023, arXiv 2211.17192, theorem 1). Returns
    `[k + 1]`: the accepted ids, the drawn token, then -1.
    """
    chance = torch.rand(len(ids), device=p.device, generator=generator)
    at = ids.unsqueeze(1)
    likely = p[:-1].masked_fill(tokens[:-1] != at, 0).sum(1)
    accepted = chance * q.gather(1, at)[:, 0] < likely
    count = accepted.long().cumprod(0).sum().view(1)
    rest = (p - F.pad(q.gather(1, tokens[:-1]), (0, 0, 0, 1))).index_select(0, count).clamp_(min=0)
    p, tokens = p.index_select(0, count), tokens.index_select(0, count)
    rest = torch.where(rest.sum() > 0, rest, p)  # p = q up to rounding
    places = torch.arange(len(ids) + 1, device=ids.device)
    result = F.pad(ids, (0, 1)).masked_fill(places > count, -1)
    return result.scatter(0, count, tokens.gather(1, draw(rest, generator))[0])


class Speculator:
    """A target and its draft: up to k tokens a step, fewer where that is faster.

    The draft length maximizes the expected tokens a second, from the recent acceptance rate and the
    cost of a step. A drafted token costs what the draft reads and what verifying it takes.
    """

    def __init__(
        self,
        engine: Engine,
        draft: DraftModel | PromptLookup,
        k: int,
        agree: Callable[[Callable[[], float]], float] = lambda make: make(),
    ):
        """`agree` broadcasts rank 0's value: the shards of the ranks differ in size."""
        self.engine, self.draft, self.k = engine, draft, k
        self.engines = [engine] + ([draft.engine] if draft.engine else [])
        model = engine.model
        more = agree(lambda: (draft.proposal_cost() + row_cost(model)) / step_cost(model))
        self.costs = [1 + n * more for n in range(k + 1)]  # by draft length
        self.begin(0)

    def begin(self, start: int) -> None:
        """Begin a text whose first `start` tokens are those of the previous one."""
        self.draft.begin(start)
        self.histogram = [0] * (self.k + 1)  # steps of this text, by accepted tokens
        self.hits, self.trials, self.idle = 3.5, 5.0, 0  # the prior of the acceptance rate

    def draft_length(self) -> int:
        """The number of tokens to draft next."""
        rate = self.hits / self.trials
        tokens = itertools.accumulate(rate**k for k in range(self.k + 1))  # expected a step
        speeds = [n / cost for n, cost in zip(tokens, self.costs, strict=True)]
        k = speeds.index(max(speeds))
        self.idle = 0 if k else self.idle + 1
        may_pay = self.costs[1] < 2  # if every token were accepted
        return 1 if may_pay and self.idle % 16 == 15 else k  # probe the acceptance rate again

    def record(self, accepted: int, proposed: int) -> None:
        """Update the decayed acceptance rate."""
        self.histogram[accepted] += 1
        if proposed:
            self.hits = 0.9 * self.hits + accepted
            self.trials = 0.9 * self.trials + min(accepted + 1, proposed)

    def step(
        self,
        text: list[int],
        k: int,
        sampling: Sampling,
        generator: torch.Generator,
        logprobs: int | None = None,
        hook: Hook | None = None,
    ) -> tuple[list[Token], int]:
        """The next 1 to k + 1 tokens of `text`, and how many were drafted."""
        model = self.engine.model
        ids, q = self.draft.propose(text, k, sampling, generator, hook)
        idx = torch.cat((ids.new_tensor(text[-1:]), ids)).unsqueeze(0)  # [1, 1 + k]
        input_pos = torch.arange(len(text) - 1, len(text) + len(ids), device=q.device)
        kv_len = model.kv_steps(len(text) + len(ids))
        logits = self.engine.decode(idx, input_pos[None], kv_len).logits[0]  # [1 + k, V]
        hooked = shaped(logits, text, ids, hook)
        new = verify(*candidates(hooked, sampling), ids, q, generator)
        return [t for t in send_tokens(new, logits, logprobs)() if t.id >= 0], len(ids)


def speculate(
    speculator: Speculator,
    prompts: list[list[int]],
    sampling: Sampling | list[Sampling],
    max_new_tokens: int,
    *,
    until: Callable[[int, int], bool],
    seeds: list[int],
    start: int = 0,
    logprobs: int | None = None,
    shape_logits: Hook | None = None,
) -> Iterator[list[Token]]:
    """`engine.generate` for one prompt: the same distribution in fewer steps."""
    engine, (prompt,), (seed,) = speculator.engine, prompts, seeds
    (sampling,) = sampling if isinstance(sampling, list) else [sampling]
    generator = torch.Generator(engine.model.device).manual_seed(seed)
    text = list(prompt)
    if not text or max_new_tokens < 1:
        return
    speculator.begin(start)
    logits = engine.prefill([text], start)
    hooked = shaped(logits, text, torch.empty(0), shape_logits)
    ids = sample(hooked, [sampling], [generator])
    new = send_tokens(ids, logits, logprobs)()
    while True:
        for token in new:
            text.append(token.id)
            yield [token]
            left = len(prompt) + max_new_tokens - len(text)
            room = engine.model.max_seq_length + 1 - len(text)
            if until(0, token.id) or not min(left, room):
                return
        k = min(speculator.draft_length(), left - 1, room - 1)
        new, proposed = speculator.step(text, k, sampling, generator, logprobs, shape_logits)
        speculator.record(len(new) - 1, proposed)
