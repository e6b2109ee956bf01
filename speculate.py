"""Speculative decoding: a draft proposes a few tokens, one pass of the model verifies them all.

The output has exactly the model's distribution (Leviathan et al. 2023, arXiv 2211.17192): greedy
text is the text without a draft. A draft is a cheaper model, or the text itself (n-gram drafting).
How many tokens are proposed follows the acceptance rate and the bytes that a step reads, never a
clock, so the same seed gives the same text again, on every rank.
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

# What verifying one more token costs, in units of a decoding step. For four tokens of TinyLlama's
# shape it was 0.02 in bf16, 0.09 in int8 and 0.14 in int4 (benchmarks.md, "verify 4").
VERIFIED_ROW = 0.08

Hook = Callable[[int, list[int], Tensor], Tensor]  # as `shape_logits` of engine.generate


def shaped(logits: Tensor, text: list[int], ids: Tensor, hook: Hook | None) -> Tensor:
    """Logits `[N, V]` as the hook wants them after text, text + ids[:1], …, in N rows."""
    if hook is None:
        return logits
    known = [text + ids[:i].tolist() for i in range(len(logits))]
    return torch.stack([hook(0, *pair) for pair in zip(known, logits.clone(), strict=True)])


def step_cost(model: Transformer) -> int:
    """What a decoding step costs, in bytes: decoding is memory-bound, so those that it reads.

    PyTorch's own operations for quantized weights on CPUs are not: as if the weights were floats.
    """
    cost, size = model.bytes_per_step(0), model.norm.weight.element_size()
    linears = [(m, 1) for m in model.modules() if isinstance(m, Linear) and not m.experts]
    for mixture in (m for m in model.modules() if hasattr(m, "expert")):  # each chosen one
        linears += [(linear, model.args.mixture.chosen) for linear in mixture.expert(0)]
    for linear, count in linears if model.device.type == "cpu" else ():
        if linear.tiles is None:
            stored = sum(tensor.nbytes for tensor in linear.parameters())
            cost += count * max(0, linear.in_features * linear.out_features * size - stored)
    return cost


class DraftModel:
    """Proposes tokens with a model that is cheaper to run; `vocab_size` is the target's."""

    def __init__(self, engine: Engine, vocab_size: int):
        self.engine, self.vocab_size = engine, vocab_size
        self.known = 0  # so many tokens of the text, not more, are in the cache

    def proposal_cost(self) -> int:
        return step_cost(self.engine.model)

    def begin(self, start: int) -> None:
        """A new text comes, whose first `start` tokens are those of the last one."""
        self.known = self.engine.rewind(min(self.known, start))

    def propose(
        self,
        text: list[int],
        k: int,
        sampling: Sampling,
        generator: torch.Generator,
        hook: Hook | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Up to k tokens to follow `text`, `[k]`, and what each was drawn from, `[k, V]`."""
        model = self.engine.model
        # What was rejected stands behind the known tokens in the cache, to be overwritten.
        known = self.known = self.engine.rewind(min(self.known, len(text) - 1))
        k = max(0, min(k, model.max_seq_length + 1 - len(text)))  # the last one is not fed
        if max(text[known:]) >= model.args.vocab_size:  # not in the draft's embedding
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
        """Logits `[1, V]` after tokens idx `[1, T]` that stand at `start` and behind."""
        input_pos = torch.arange(start, start + idx.shape[1], device=idx.device)[None]
        kv_len = self.engine.model.kv_steps(start + idx.shape[1])
        return self.engine.decode(idx, input_pos, kv_len).logits[:, -1]


def load_draft(
    path: Path, model: Transformer, tokenizer: Tokenizer, precision: str, shard: Any = None
) -> Transformer:
    """The draft in the file `path`, with a cache for what the model's holds; UserError if it is
    not one for this model."""
    draft, other = load(path, model.device, precision, shard)
    if other.pieces != tokenizer.pieces:
        i = min(i for i, _ in other.pieces.items() ^ tokenizer.pieces.items())
        meanings = f"{other.pieces.get(i)!r} to the draft, {tokenizer.pieces.get(i)!r} to the model"
        raise UserError(f"token {i} is {meanings}; take a draft with the model's vocabulary")
    if draft.args.vocab_size < tokenizer.vocab_size:
        sizes = f"{draft.args.vocab_size} tokens and the vocabulary {tokenizer.vocab_size}"
        raise UserError(f"the draft's embedding has {sizes}; take a draft that knows them all")
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
        """A new text comes."""
        self.seen, self.follows = 1, {}  # where the latest token after each n-gram stands

    def propose(
        self,
        text: list[int],
        k: int,
        sampling: Sampling,
        generator: torch.Generator,
        hook: Hook | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `DraftModel.propose`, in one-hot distributions; none where nothing is repeated."""
        for place in range(self.seen, len(text)):
            for n in (3, 2):
                self.follows[tuple(text[max(place - n, 0) : place])] = place
        self.seen = max(self.seen, len(text))
        places = (self.follows.get(tuple(text[-n:])) for n in (3, 2))
        place = next((place for place in places if place), None)
        found = [] if place is None else text[place : place + k]
        while place is not None and len(found) < k:  # it goes on into what it proposes
            found += found[: k - len(found)]
        ids = torch.tensor(found, dtype=torch.int64, device=self.device)
        q = torch.zeros(len(ids), self.vocab_size, device=self.device)
        return ids, q.scatter_(1, ids.unsqueeze(1), 1.0)


def verify(p: Tensor, ids: Tensor, q: Tensor, generator: torch.Generator) -> Tensor:
    """Accept the first of the proposed tokens and draw one more, so that all are drawn from p.

    ids `[k]` were drawn from q `[k, V]`; p `[k + 1, V]` is what the model gives after each, and
    before the first. Token i is accepted with probability min(1, p/q); the first that is not is
    replaced by a draw from max(0, p - q); after the last, one is drawn from p. The result has the
    distribution p (Leviathan et al. 2023, arXiv 2211.17192, theorem 1). Returns `[k + 1]`: the
    accepted ids, the token drawn, and -1 in the places left.
    """
    chance = torch.rand(len(ids), device=p.device, generator=generator)
    at = ids.unsqueeze(1)
    accepted = chance * q.gather(1, at)[:, 0] < p[:-1].gather(1, at)[:, 0]
    count = accepted.long().cumprod(0).sum().view(1)
    p = p.index_select(0, count)
    rest = (p - F.pad(q, (0, 0, 0, 1)).index_select(0, count)).clamp_(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)  # rounding may leave nothing
    places = torch.arange(len(ids) + 1, device=ids.device)
    result = F.pad(ids, (0, 1)).masked_fill(places > count, -1)
    return result.scatter(0, count, draw(rest, generator)[0])


class Speculator:
    """A model and what drafts for it: up to k tokens a step, or fewer while that is faster.

    The draft length is the one with the most expected tokens a second, by the acceptance rate of
    late and the cost of a step in bytes. A proposal costs what the draft reads over what the target
    reads, and VERIFIED_ROW for its verification.
    """

    def __init__(
        self,
        engine: Engine,
        draft: DraftModel | PromptLookup,
        k: int,
        agree: Callable[[Callable[[], float]], float] = lambda make: make(),
    ):
        """`agree` gives all ranks of tensor parallelism the value of one: they hold other bytes."""
        self.engine, self.draft, self.k = engine, draft, k
        self.engines = [engine] + ([draft.engine] if draft.engine else [])
        share = agree(lambda: draft.proposal_cost() / step_cost(engine.model))
        self.costs = [1 + n * (share + VERIFIED_ROW) for n in range(k + 1)]  # of n proposals
        self.begin(0)

    def begin(self, start: int) -> None:
        """A new text comes, whose first `start` tokens are those of the last one."""
        self.draft.begin(start)
        self.histogram = [0] * (self.k + 1)  # steps of this text that accepted so many
        self.hits, self.trials, self.idle = 3.5, 5.0, 0  # a guess, until something is known

    def draft_length(self) -> int:
        """How many tokens to ask for."""
        rate = self.hits / self.trials
        tokens = itertools.accumulate(rate**k for k in range(self.k + 1))  # expected of a step
        speeds = [n / cost for n, cost in zip(tokens, self.costs, strict=True)]
        k = speeds.index(max(speeds))
        self.idle = 0 if k else self.idle + 1
        may_pay = self.costs[1] < 2  # if every proposal were accepted
        return 1 if may_pay and self.idle % 16 == 15 else k  # look whether it pays again

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
        """The next one to k + 1 tokens of `text`, and how many had been proposed."""
        model = self.engine.model
        ids, q = self.draft.propose(text, k, sampling, generator, hook)
        idx = torch.cat((ids.new_tensor(text[-1:]), ids)).unsqueeze(0)  # [1, 1 + k]
        input_pos = torch.arange(len(text) - 1, len(text) + len(ids), device=q.device)
        kv_len = model.kv_steps(len(text) + len(ids))
        logits = self.engine.decode(idx, input_pos[None], kv_len).logits[0]  # [1 + k, V]
        probs, tokens = candidates(shaped(logits, text, ids, hook), sampling)
        p = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, tokens, probs)
        new = send_tokens(verify(p, ids, q, generator), logits, logprobs)()
        return [token for token in new if token.id >= 0], len(ids)


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
    """`engine.generate` for a single prompt: the same distribution, in fewer steps."""
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
