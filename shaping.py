"""From tokens to text: penalties and biases, stop texts, streaming, log probabilities.

All of it goes through the arguments of `engine.generate` (`until`, `shape_logits`, `logprobs`), so
it works alike with and without a draft, alone and in a batch. `generate.py` and `jsonl.py` use it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine import PREFILL_CHUNK, Engine, Sampling, Token, send_tokens
from model import Transformer
from tokenizer import StreamDecoder, Tokenizer


def shape(logits: Tensor, ids: list[int], start: int, args: Namespace, ends: set[int]) -> Tensor:
    """Shape the logits `[V]` of the token after `ids`; the new text begins at `start`.

    The repetition penalty is that of Keskar et al. 2019 (arXiv 1909.05858) as in transformers,
    presence penalty and bias are OpenAI's; `ends` are the EOS ids.
    """
    logits = logits.float()

    def places(tokens) -> Tensor:
        return torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=logits.device)

    if args.repetition_penalty != 1:
        seen, penalty = places(ids), args.repetition_penalty
        scores = logits[seen]
        logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if args.presence_penalty:
        logits[places(ids[start:])] -= args.presence_penalty
    for token, bias in args.logit_bias:
        logits[token] += bias
    if len(ids) - start < args.min_new_tokens:
        logits[places(token for token in ends if token < len(logits))] = -torch.inf
    return logits


# ------------------------------------------------------------------------------------------------
# A text while it is generated


class Reply:
    """The text generated for one prompt: its tokens, its printable part, and why it ended.

    `args` holds its settings (see settings.py); `seed` overrides theirs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model: Transformer,
        prompt: list[int],
        args: Namespace,
        seed: int | None = None,
    ):
        self.tokenizer, self.prompt, self.args = tokenizer, prompt, args
        self.seed = args.seed if seed is None else seed
        self.room = model.max_seq_length + 1 - len(prompt)  # the last token is not fed
        self.tokens: list[Token] = []
        self.shown: list[str] = []
        self.held, self.ended_by = "", ""
        self.decoder = StreamDecoder(tokenizer, prompt)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        """The text so far, without what is held back."""
        return "".join(self.shown)

    def push(self, token: Token) -> str:
        """The text that a new token adds; what may begin a stop text is held back.

        The stop text that is complete first ends the text, wherever token boundaries are.
        """
        if self.args.logprobs is not None:  # another row may have asked for more
            token = token._replace(top=token.top[: self.args.logprobs])
        self.tokens.append(token)
        self.held += self.decoder.push(token.id)
        found = {stop: self.held.find(stop) for stop in self.args.stop}
        ends = [(place + len(stop), place) for stop, place in found.items() if place >= 0]
        if ends:
            self.ended_by, self.held = "stop", self.held[: min(ends)[1]]
            return self.show(len(self.held))
        if token.id in self.tokenizer.eos_ids:
            self.ended_by = "end of text"
        elif len(self.tokens) == min(self.args.max_new_tokens, self.room):
            full = len(self.tokens) < self.args.max_new_tokens
            self.ended_by = "full cache" if full else "max_new_tokens"
        return self.show(len(self.held) - self.unsettled())

    def unsettled(self) -> int:
        """How many of the characters held back may begin a stop text."""
        for n in range(len(self.held), 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.args.stop):
                return n
        return 0

    def show(self, count: int) -> str:
        """Release the first `count` characters held back."""
        shown, self.held = self.held[:count], self.held[count:]
        self.shown.append(shown)
        return shown

    def flush(self) -> str:
        """The rest of the text: what is held back, and U+FFFD for an incomplete character."""
        self.held += "" if self.ended_by == "stop" else self.decoder.flush()
        return self.show(len(self.held))

    def shaped(self) -> bool:
        """Whether any setting changes the logits."""
        args = self.args
        plain = (args.repetition_penalty, args.presence_penalty) == (1, 0)
        return not plain or bool(args.logit_bias or args.min_new_tokens)

    def shape_logits(self, ids: list[int], logits: Tensor) -> Tensor:
        if not self.shaped():
            return logits
        return shape(logits, ids, len(self.prompt), self.args, self.tokenizer.eos_ids)


def run_replies(
    decode: Callable[..., Iterator[list[Token | None]]], replies: list[Reply], start: int = 0
) -> Iterator[list[str | None]]:
    """Generate the replies, a row each; yields the text that each step adds to each.

    `decode` is `engine.generate` of an engine, or `speculate.speculate` of a speculator. The KV
    cache must hold the first `start` tokens of each prompt.
    """
    settings = [reply.args for reply in replies]
    asked = [args.logprobs for args in settings if args.logprobs is not None]
    steps = decode(
        [reply.prompt for reply in replies],
        [Sampling(args.temperature, args.top_k, args.top_p, args.min_p) for args in settings],
        max(args.max_new_tokens for args in settings),
        until=lambda row, _: bool(replies[row].ended_by),
        seeds=[reply.seed for reply in replies],
        start=start,
        logprobs=max(asked, default=None),
        shape_logits=hook(replies),
    )
    for tokens in steps:
        pairs = zip(replies, tokens, strict=True)
        yield [None if token is None else reply.push(token) for reply, token in pairs]


def hook(replies: list[Reply]) -> Callable[[int, list[int], Tensor], Tensor] | None:
    """The engine's `shape_logits`, if any reply needs it."""
    if not any(reply.prompt and reply.shaped() for reply in replies):
        return None
    return lambda row, ids, logits: replies[row].shape_logits(ids, logits)


# ------------------------------------------------------------------------------------------------
# Log probabilities


def score_prompt(engine: Engine, prompt: list[int], logprobs: int) -> list[Token]:
    """All tokens of a prompt but the first, with their log probabilities.

    Prefills row 0 of the KV cache again: `Engine.prefill` gives logits of the last position only.
    """
    model, tokens = engine.model, []
    for begin in range(0, len(prompt) - 1, PREFILL_CHUNK):
        ids = torch.tensor([prompt[begin : begin + PREFILL_CHUNK + 1]], device=model.device)
        places = torch.arange(ids.shape[1] - 1, device=model.device)[None]
        kv_len = model.kv_steps(begin + ids.shape[1] - 1)
        logits = engine.prefill_step(ids[:, :-1], begin + places, kv_len, places).logits[0]
        tokens += send_tokens(ids[0, 1:], logits, logprobs)()
    return tokens


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The characters of one token, \\x.. for incomplete UTF-8, or the name of a special token."""
    names = (name for name, i in tokenizer.special.items() if i == token)
    text = tokenizer.token_bytes(token).decode(errors="backslashreplace")
    return text or next(names, f"<{token}>")


def describe(tokenizer: Tokenizer, tokens: list[Token]) -> list[dict]:
    """Tokens with log probabilities, as JSON objects."""

    def record(token: int, logprob: float | None) -> dict:
        return {"id": token, "text": token_text(tokenizer, token), "logprob": logprob}

    tops = [[record(*pair) for pair in token.top] for token in tokens]
    return [
        record(token.id, token.logprob) | {"top": top}
        for token, top in zip(tokens, tops, strict=True)
    ]


def table(records: list[dict]) -> str:
    """Records of `describe` as a table, a token a line."""

    def quote(record: dict) -> str:
        return repr(record["text"]).replace(r"\\", "\\")

    width = max((len(quote(record)) for record in records), default=0)
    lines = []
    for record in records:
        top = "  ".join(f"{quote(each)} {each['logprob']:.3f}" for each in record["top"])
        lines.append(f"{record['logprob']:9.4f}  {quote(record):{width}}  {top}".rstrip())
    return "\n".join(lines)
