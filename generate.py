"""Generates text from a prepared checkpoint: prompts, batches of prompts, or a conversation.

    python generate.py --compile --prompt "Hello, my name is"

A prompt is *prefilled*: its tokens go through the model at once and leave their keys and values in
the cache. Then tokens are *decoded* one a step, each step reading every weight once, so the speed
limit is the memory bus. Text goes to standard output, figures to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator, Set
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import tp
from cli import Parser, UserError, add_model_flags, number, output_file, replacing, run
from linear import FEW_ROWS
from model import Transformer, TransformerBlock
from prefill_cache import PrefillCache, add_context_flags, make_cache
from ranges import traced
from tokenizer import StreamDecoder, Tokenizer

DEFAULT_CHECKPOINT = (
    Path(__file__).resolve().parent / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model.pth"
)
PREFILL_CHUNK = 512  # bounds the attention mask

# ------------------------------------------------------------------------------------------------
# Sampling


@dataclasses.dataclass
class Sampling:
    """How a token is drawn: temperature 0 is argmax; top_k 0, top_p 1, min_p 0 filter nothing."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, two `[B, K]`, for logits `[B, V]`.

    top-k keeps the K likeliest tokens, top-p (nucleus; Holtzman et al. 2020, arXiv 1904.09751) the
    fewest whose probabilities reach p, min-p (Nguyen et al. 2024, arXiv 2407.01082) those at least
    min_p times as likely as the likeliest. The likeliest token always stays; at temperature 0 it is
    alone.
    """
    if sampling.temperature < 1e-5:
        tokens = logits.max(-1, keepdim=True).indices  # the first, as of argmax, but faster
        return torch.ones_like(tokens, dtype=torch.float32), tokens
    logits = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and sampling.min_p == 0:
        return logits.softmax(-1), torch.arange(logits.shape[-1], device=logits.device).expand_as(
            logits
        )
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    logits, tokens = logits.topk(k)  # likeliest first
    probs = logits.softmax(-1)
    dropped = (probs.cumsum(-1) - probs >= sampling.top_p) | (probs < sampling.min_p * probs[:, :1])
    dropped[:, 0] = False
    probs = probs.masked_fill(dropped, 0)
    return probs / probs.sum(-1, keepdim=True), tokens


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index a row, as likely as its share of weights `[B, K]`: `[B, 1]`.

    The largest of w / Exponential(1) falls on i with probability w_i / sum w (the Gumbel-max
    trick), and nothing waits for the device.
    """
    noise = torch.empty_like(weights).exponential_(generator=generator).clamp_(min=1e-20)
    return (weights / noise).argmax(-1, keepdim=True)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token a row: logits `[B, V]` -> `[B]`."""
    probs, tokens = candidates(logits, sampling)
    return tokens.gather(-1, draw(probs, generator)).squeeze(-1)


# ------------------------------------------------------------------------------------------------
# Prefill and decode


class Engine:
    """A model with its KV cache, and the functions, compiled or not, that run it.

    `compile` "block" compiles one transformer block that serves every layer: a short cold start.
    "whole" compiles the whole decoding step, on CUDA into a CUDA graph. A model that is one kernel
    is not compiled at all. A decoding step takes up to `width` tokens a row; more are prefilled.
    """

    def __init__(
        self,
        model: Transformer,
        compile: str | None,
        compile_prefill: bool = False,
        width: int = 1,
    ):
        self.model, self.compile_prefill, self.width = model, compile_prefill, width
        self.cache: PrefillCache | None = None  # of contexts that prompts may begin with
        self.cached_tokens = 0  # of each prompt, those that the last prefill found done
        self.engines = [self]  # as of a `Speculator`
        model.prepare()
        self.fused = kernels.fuse(model)
        self.decode_step = self.prefill_step = self.fused or model
        if self.fused:  # nothing is left to compile
            return
        # Dynamic lengths: one graph serves every prompt and every filled length of the cache, if
        # sizes that happen to be equal when it is made are not taken for one and the same.
        torch.fx.experimental._config.use_duck_shape = False
        torch._dynamo.config.recompile_limit = 64  # a graph for each mix of schemes in a block
        torch._dynamo.config.specialize_float = True  # `eps` is a constant, not a dynamic number
        options = {"size_asserts": False}  # what they check costs as much as small kernels
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=True, options=options)
        if compile == "block":
            self.decode_step = functools.partial(model, block=compiled(TransformerBlock.forward))
        elif compile == "whole":
            options["triton.cudagraphs"] = model.freqs_cis.device.type == "cuda"
            self.decode_step = compiled(model)
        if compile_prefill:
            self.prefill_step = functools.partial(model, block=compiled(TransformerBlock.forward))

    def step(
        self, idx: Tensor, input_pos: Tensor, kv_len: int, last: Tensor | None = None
    ) -> Tensor:
        """Logits of tokens idx `[B, T]` at input_pos; the arguments are those of the model."""
        if idx.shape[1] > self.width:
            return self.prefill_step(idx, input_pos, kv_len, last)
        logits = self.decode_step(idx, input_pos, kv_len)
        return logits if last is None else logits.take_along_dim(last.unsqueeze(-1), 1)

    def warm_up(self, batch_size: int) -> float:
        """Compile everything now; the seconds it took."""
        model, device, began = self.model, self.model.freqs_cis.device, time.perf_counter()
        longest = FEW_ROWS + 1 if self.compile_prefill else self.width
        for T in {1, 2, self.width + 1, FEW_ROWS + 1} & {*range(longest + 1)}:
            idx = torch.zeros(batch_size, T, dtype=torch.int64, device=device)
            input_pos = torch.full_like(idx, model.max_seq_length)  # the spare slot
            last = None if T <= self.width else input_pos[:, :1] * 0
            for _ in range(3):  # a CUDA graph is compiled, recorded and replayed
                self.step(idx, input_pos, model.kv_steps(1), last)
        synchronize(device)
        return time.perf_counter() - began

    def prefill(self, prompts: list[list[int]], start: int = 0) -> Tensor:
        """Run each prompt's tokens from `start` on; logits `[B, V]` after the last of each.

        The cache must hold the first `start` tokens of every prompt, and every prompt go further.
        Rows are padded on the right; padding stands at the cache's spare slot. Of new prompts, what
        the prefill cache has of the beginning that all share is loaded from there.
        """
        if self.cache and start == 0:
            start = self.cache.resume(prompts, self.model)
        self.cached_tokens = start
        spare, device = self.model.max_seq_length, self.model.freqs_cis.device
        logits = torch.zeros((), device=device)
        for begin in range(start, max(map(len, prompts)), PREFILL_CHUNK):
            chunk = [prompt[begin : begin + PREFILL_CHUNK] for prompt in prompts]
            T = max(map(len, chunk))
            idx = [row + [0] * (T - len(row)) for row in chunk]
            pos = [[*range(begin, begin + len(row))] + [spare] * (T - len(row)) for row in chunk]
            last = [[max(len(row) - 1, 0)] for row in chunk]
            idx, pos, last = (torch.tensor(x, device=device) for x in (idx, pos, last))
            here = torch.tensor([[len(row) > 0] for row in chunk], device=device)
            chunk_logits = self.step(idx, pos, self.model.kv_steps(begin + T), last)[:, 0]
            logits = torch.where(here, chunk_logits, logits)
        return logits


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def generate(
    engine: Engine,
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: Set[int] = frozenset(),
    seed: int = 0,
    start: int = 0,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, and None for those that have ended, until all have.

    A row ends with a token of `eos_ids`, with `max_new_tokens` or with a full cache. The cache must
    hold the first `start` tokens of each prompt; afterwards it holds all tokens but the last.
    """
    model, device = engine.model, engine.model.freqs_cis.device
    generator = torch.Generator(device).manual_seed(seed)
    lengths, alive = [len(prompt) for prompt in prompts], [True] * len(prompts)
    input_pos = torch.tensor([[length] for length in lengths], device=device)  # [B, 1]
    logits = engine.prefill(prompts, start)
    while True:
        tokens = sample(logits, sampling, generator)  # [B]
        ids = tokens.tolist()
        yield [token if row_alive else None for token, row_alive in zip(ids, alive, strict=True)]
        max_new_tokens -= 1
        lengths = [length + 1 for length in lengths]
        for row, token in enumerate(ids):
            alive[row] &= token not in eos_ids and lengths[row] <= model.max_seq_length
        if not any(alive) or not max_new_tokens:
            return
        filled = max(length for length, row_alive in zip(lengths, alive, strict=True) if row_alive)
        logits = engine.step(tokens.unsqueeze(1), input_pos, model.kv_steps(filled))[:, 0]
        input_pos = (input_pos + 1).clamp(max=model.max_seq_length)


# ------------------------------------------------------------------------------------------------
# Speculation: a draft proposes tokens, one pass of the model judges them all


class DraftModel:
    """Proposes tokens with a model that is cheaper to run; `vocab_size` is the target's."""

    def __init__(self, engine: Engine, vocab_size: int):
        self.engine, self.vocab_size, self.engines = engine, vocab_size, [engine]
        self.known = 0  # so many tokens of the text, not more, are in the cache

    def begin(self, start: int) -> None:
        """A new text comes, whose first `start` tokens are those of the last one."""
        self.known = min(self.known, start)

    def propose(
        self, text: list[int], k: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Up to k tokens to follow `text`, `[k]`, and what each was drawn from, `[k, V]`."""
        model = self.engine.model
        # What was rejected stands behind the known tokens in the cache, to be written over.
        known = self.known = min(self.known, len(text) - 1)
        k = max(0, min(k, model.max_seq_length + 1 - len(text)))  # the last one is not fed
        if max(text[known:]) >= model.args.vocab_size:  # not in the draft's embedding
            k = 0
        q = model.freqs_cis.new_zeros(k, self.vocab_size)
        ids = torch.zeros(k, dtype=torch.int64, device=q.device)
        if k == 0:
            return ids, q
        logits = self.engine.prefill([text], known)
        for i, place in enumerate(range(len(text), len(text) + k)):
            probs, tokens = candidates(logits[:, : self.vocab_size], sampling)
            q[i].scatter_(0, tokens[0], probs[0])
            ids[i] = tokens[0].gather(0, draw(probs, generator)[0])[0]
            if i + 1 < k:
                position = torch.full((1, 1), place, device=q.device)
                kv_len = model.kv_steps(place + 1)
                logits = self.engine.step(ids[i].view(1, 1), position, kv_len)[:, 0]
        self.known = len(text) + k - 1
        return ids, q


class PromptLookup:
    """Proposes what followed the last few tokens where they stood before (Saxena 2023)."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size, self.device, self.engines = vocab_size, device, []
        self.begin(0)

    def begin(self, start: int) -> None:
        """A new text comes."""
        self.seen, self.follows = 1, {}  # where the latest token after each n-gram stands

    def propose(
        self, text: list[int], k: int, sampling: Sampling, generator: torch.Generator
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


def judge(p: Tensor, ids: Tensor, q: Tensor, generator: torch.Generator) -> Tensor:
    """Accept the first of the proposed tokens and draw one more, so that all are drawn from p.

    ids `[k]` were drawn from q `[k, V]`; p `[k + 1, V]` is what the model gives after each, and
    before the first. Token i is accepted with probability min(1, p/q); the first that is not is
    replaced by a draw from max(0, p - q); after the last, one is drawn from p. The result has the
    distribution p (Leviathan et al. 2023, arXiv 2211.17192, theorem 1). Returns `[k + 2]`: the
    number accepted, ids, and the token drawn.
    """
    chance = torch.rand(len(ids), device=p.device, generator=generator)
    at = ids.unsqueeze(1)
    accepted = chance * q.gather(1, at)[:, 0] < p[:-1].gather(1, at)[:, 0]
    count = accepted.long().cumprod(0).sum().view(1)
    p = p.index_select(0, count)
    rest = (p - F.pad(q, (0, 0, 0, 1)).index_select(0, count)).clamp_(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)  # rounding may leave nothing
    return torch.cat((count, ids, draw(rest, generator)[0]))


class Speculator:
    """A model and what drafts for it: up to k tokens a step, or fewer while that is faster.

    `fixed` always asks for k. Otherwise it asks for the number that gives the most tokens a second,
    by the share of proposals accepted of late and by what steps of 0, 1 and k cost in `warm_up`.
    """

    def __init__(self, engine: Engine, draft: DraftModel | PromptLookup, k: int, fixed: bool):
        self.engine, self.draft, self.k, self.fixed = engine, draft, k, fixed
        self.model, self.engines = engine.model, [engine, *draft.engines]
        self.costs = [1.0] * (k + 1)  # of a step with so many proposals
        self.histogram = [0] * (k + 1)  # steps of this text that accepted so many
        self.hits, self.trials, self.idle = 3.5, 5.0, 0  # a guess, until something is known

    def step(
        self, text: list[int], k: int, sampling: Sampling, generator: torch.Generator
    ) -> tuple[list[int], int]:
        """The next one to k + 1 tokens of `text`, and how many had been proposed."""
        model = self.engine.model
        ids, q = self.draft.propose(text, k, sampling, generator)
        idx = torch.cat((ids.new_tensor(text[-1:]), ids)).unsqueeze(0)  # [1, 1 + k]
        input_pos = torch.arange(len(text) - 1, len(text) + len(ids), device=q.device)
        logits = self.engine.step(idx, input_pos[None], model.kv_steps(len(text) + len(ids)))[0]
        probs, tokens = candidates(logits, sampling)
        p = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, tokens, probs)
        count, *new = judge(p, ids, q, generator).tolist()
        return new[:count] + new[-1:], len(ids)

    def choose(self) -> int:
        """How many tokens to ask for."""
        if self.fixed:
            return self.k
        rate = self.hits / self.trials
        tokens = itertools.accumulate(rate**k for k in range(self.k + 1))  # expected of a step
        speeds = [n / cost for n, cost in zip(tokens, self.costs, strict=True)]
        k = speeds.index(max(speeds))
        self.idle = 0 if k else self.idle + 1
        return 1 if self.idle % 16 == 15 else k  # now and then, look whether it pays again

    def saw(self, accepted: int, proposed: int) -> None:
        """Count a step's outcome; older ones fade."""
        self.histogram[accepted] += 1
        if proposed:
            self.hits = 0.9 * self.hits + accepted
            self.trials = 0.9 * self.trials + min(accepted + 1, proposed)

    def warm_up(self, sampling: Sampling) -> None:
        """Run every kind of step, and measure what those with 0, 1 and k proposals cost."""
        text, seconds = [0] * 8, {}
        if self.model.max_seq_length < len(text) + self.k:
            return
        generator = torch.Generator(self.model.freqs_cis.device)
        for k in (0, 1, self.k):
            times = []
            for known in (0, 7, 7, 7):  # the first compiles
                self.draft.begin(known)
                began = time.perf_counter()
                self.step(text, k, sampling, generator)
                times.append(time.perf_counter() - began)
            seconds[k] = statistics.median(times[1:])
        one, more = seconds[1], (seconds[self.k] - seconds[1]) / max(self.k - 1, 1)
        self.costs = tp.same(lambda: [seconds[0], *(one + more * i for i in range(self.k))])


def speculate(
    speculator: Speculator,
    prompts: list[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: Set[int] = frozenset(),
    seed: int = 0,
    start: int = 0,
) -> Iterator[list[int]]:
    """`generate` for a single prompt, the tokens drawn from the same distribution but faster."""
    engine, (prompt,) = speculator.engine, prompts
    generator = torch.Generator(engine.model.freqs_cis.device).manual_seed(seed)
    text = list(prompt)
    speculator.draft.begin(start)
    speculator.histogram = [0] * (speculator.k + 1)
    new = sample(engine.prefill([text], start), sampling, generator).tolist()
    while True:
        for token in new:
            text.append(token)
            yield [token]
            left = len(prompt) + max_new_tokens - len(text)
            room = engine.model.max_seq_length + 1 - len(text)
            if token in eos_ids or not min(left, room):
                return
        k = min(speculator.choose(), left - 1, room - 1)
        new, proposed = speculator.step(text, k, sampling, generator)
        speculator.saw(len(new) - 1, proposed)


# ------------------------------------------------------------------------------------------------
# Prompts in, text and figures out


def load(
    path: Path, device: torch.device, precision: str, shard: tp.Shard | None = None
) -> tuple[Transformer, Tokenizer]:
    """The model in the file `path` and the tokenizer of its folder; `UserError` if they differ."""
    model = Transformer.from_checkpoint(path, device, getattr(torch, precision), shard)
    tokenizer = Tokenizer.from_folder(path.parent)
    if tokenizer.text_size > model.args.vocab_size:
        raise UserError(
            f"the tokenizer in {path.parent} has {tokenizer.text_size} tokens, more than the "
            f"model's {model.args.vocab_size}; put the model's own tokenizer there"
        )
    return model, tokenizer


def default_checkpoint() -> Path:
    """The checkpoint of the default model, fetched and converted by a script if it is not there."""
    script = Path(__file__).resolve().parent / "scripts" / "default_model.py"
    if not DEFAULT_CHECKPOINT.exists():
        if not script.exists():
            raise UserError(
                "no --checkpoint_path was given, and scripts/ is not beside generate.py"
            )
        done = subprocess.run([sys.executable, str(script)], stdout=sys.stderr)
        if done.returncode:
            sys.exit(done.returncode)  # the script has said why
    return DEFAULT_CHECKPOINT


def tokenize(tokenizer: Tokenizer, messages: list[dict], chat: bool) -> list[int]:
    """The prompt that a conversation makes, in the model's chat format or as plain text."""
    if chat:
        return tokenizer.chat(messages)
    return tokenizer.encode("".join(message["content"] for message in messages))


def check_prompt(prompt: list[int], model: Transformer, what: str = "prompt") -> None:
    """Raise a `UserError` if the model cannot take this prompt."""
    if not prompt:
        raise UserError("the prompt is empty and this model has no BOS token; pass a text")
    if max(prompt) >= model.args.vocab_size:
        raise UserError(
            f"the {what} has the token {max(prompt)} and the model only {model.args.vocab_size}; "
            "put the model's own tokenizer beside it"
        )
    if len(prompt) > model.max_seq_length:
        raise UserError(
            f"the {what} has {len(prompt)} tokens and the cache {model.max_seq_length} positions; "
            f"shorten it or raise --max_seq_length, which may be up to {model.args.block_size}"
        )


def is_length(prompt: str) -> bool:
    """Whether --prompt asks for random tokens."""
    return prompt.isascii() and prompt.isdecimal()


def read_prompts(args: Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The prompts that the flags ask for, as token ids."""
    if args.prompts_file:
        try:
            lines = tp.same(lambda: args.prompts_file.read_text(encoding="utf-8-sig")).split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read --prompts_file {args.prompts_file} ({error}); pass a UTF-8 text file"
            ) from None
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise UserError(f"--prompts_file {args.prompts_file} has no line with a prompt")
    elif is_length(args.prompt):
        generator = torch.Generator().manual_seed(args.seed)
        length = min(int(args.prompt[:20]), 2**24)  # longer than any context
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        return [read_context(args, tokenizer) + ids]
    else:
        texts = [tp.same(sys.stdin.read).removesuffix("\n") if args.prompt == "-" else args.prompt]
    return [tokenize(tokenizer, [*opening(args), user(text)], args.chat) for text in texts]


def opening(args: Namespace) -> list[dict]:
    """The messages that every conversation starts with: the context, then the system prompt."""
    content = "\n\n".join(filter(None, (args.prefill_context, args.system_prompt)))
    return [{"role": "system", "content": content}] if content else []


def read_context(args: Namespace, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the context; a prompt's first letters may change the last of them.

    In the chat format they are what the conversations of two different users share.
    """
    if not args.prefill_context:
        return []
    if not args.chat:
        return tokenize(tokenizer, opening(args), chat=False)
    chats = [tokenize(tokenizer, [*opening(args), user(text)], chat=True) for text in ("a", "b")]
    return os.path.commonprefix(chats)


def user(text: str) -> dict:
    """A message of the user's, as chat templates want it."""
    return {"role": "user", "content": text}


TTY_LINE = 4095  # bytes: Linux drops what is longer on a line that the terminal itself edits


def edits_lines() -> bool:
    """Whether `input` has the keys of a shell and no limit on a line: that takes `readline`."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        import readline  # noqa: F401  its presence is all that `input` asks for
    except ImportError:
        return False
    return True


def read_line() -> str:
    """What the user types next: /quit at the end of the input, nothing after Ctrl-C."""
    whole = edits_lines() or not sys.stdin.isatty()
    try:
        text = input("> ")
    except EOFError:
        return "/quit"
    except KeyboardInterrupt:
        print()
        return ""
    if not whole and len(text.encode(errors="replace")) >= TTY_LINE:
        cut = f"the terminal may have cut this line at {TTY_LINE} bytes, so it was not used"
        print(f"{cut}; pipe the text in, or leave standard output alone", file=sys.stderr)
        return ""
    return text.strip()


class Session:
    """One run of the command line: what runs the model, its tokenizer, and the flags."""

    def __init__(self, engine: Engine | Speculator, tokenizer: Tokenizer, args: Namespace):
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.sampling = sampling_flags(args)
        self.records: list[dict] = []  # the figures of each answer

    def answer(
        self, prompts: list[list[int]], engine: Engine | Speculator, show: bool, start: int = 0
    ) -> tuple[list[list[int]], dict]:
        """Generate for each prompt and, if it is to `show`, print a single text as it is made.

        Returns the new tokens of each prompt, and the figures.
        """
        args, tokenizer = self.args, self.tokenizer
        padding = prompts[-1:] * (args.batch_size - len(prompts))  # another size would compile anew
        rows: list[list[int]] = [[] for _ in prompts]
        stream, show = StreamDecoder(tokenizer, prompts[0]), show and args.batch_size == 1
        options = (args.max_new_tokens, tokenizer.eos_ids, args.seed + len(self.records), start)
        run = speculate if isinstance(engine, Speculator) else generate
        times = [time.perf_counter()]
        try:
            for tokens in run(engine, prompts + padding, self.sampling, *options):
                times.append(time.perf_counter())
                for row, token in zip(rows, tokens, strict=False):
                    row += [] if token is None else [token]
                if show:
                    print(stream.push(tokens[0]), end="", flush=True)
        except KeyboardInterrupt:
            if not args.interactive:
                raise
        if show:
            print(stream.flush())
        return rows, self.measure(prompts, rows, times, engine)

    def measure(
        self,
        prompts: list[list[int]],
        rows: list[list[int]],
        times: list[float],
        engine: Engine | Speculator,
    ) -> dict:
        """Print and return the figures of an answer.

        `times`, in seconds, are those of the start and of the end of each step.
        """
        model, steps = engine.model, len(times) - 2  # decoding steps: all but the prefill's

        def ending(prompt: list[int], row: list[int]) -> str:
            if row and row[-1] in self.tokenizer.eos_ids:
                return "end of text"
            if len(row) == self.args.max_new_tokens:
                return "max_new_tokens"
            return "full cache" if len(prompt) + len(row) > model.max_seq_length else "Ctrl-C"

        record: dict = {"prompt_tokens": [*map(len, prompts)], "new_tokens": [*map(len, rows)]}
        target = engine.engine if isinstance(engine, Speculator) else engine
        done = len(prompts) * target.cached_tokens
        record["prefilled_tokens"] = sum(record["prompt_tokens"]) - done
        record["ended_by"] = [*map(ending, prompts, rows)]
        line = f"[{sum(record['prompt_tokens'])} prompt tokens, {sum(record['new_tokens'])} new"
        line += f", ended by {', '.join(sorted(set(record['ended_by'])))}"
        if steps >= 0:
            record["first_token_s"] = times[1] - times[0]
            line += f"; first token {record['first_token_s'] * 1e3:.0f} ms"
        if steps > 0:
            record["tokens_per_s"] = steps / (times[-1] - times[1])
            line += f"; {record['tokens_per_s']:.1f} tokens/s"
        if steps > 0 and isinstance(engine, Engine):
            first = max(record["prompt_tokens"]) + 1
            seen = sum(model.kv_steps(first + step) for step in range(steps)) / steps
            record["gb_per_s"] = model.bytes_per_step(seen) * record["tokens_per_s"] / 1e9
            line += f", {record['gb_per_s']:.1f} GB/s"
        if isinstance(engine, Speculator) and sum(engine.histogram):
            record["accepted"] = engine.histogram
            accepted = sum(n * count for n, count in enumerate(engine.histogram))
            record["mean_accepted"] = accepted / sum(engine.histogram)
            line += f"; steps that accepted 0 to {engine.k}: {engine.histogram}"
            line += f", mean {record['mean_accepted']:.2f}"
        print(line + "]", file=sys.stderr)
        return record

    def complete(self, prompts: list[list[int]]) -> None:
        """Continue every prompt `num_samples` times, `batch_size` prompts at once."""
        args = self.args
        echo = not args.chat and not is_length(args.prompt)

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids).removeprefix(args.prefill_context or "")

        for first in list(range(0, len(prompts), args.batch_size)) * args.num_samples:
            group = prompts[first : first + args.batch_size]
            if echo and args.batch_size == 1:
                print(decode(group[0]), end="", flush=True)
            rows, record = self.answer(group, self.engine, show=True)
            if args.batch_size > 1:
                for i, (prompt, row) in enumerate(zip(group, rows, strict=True), first):
                    text = decode(prompt + row) if echo else self.tokenizer.decode(row)
                    print(f"--- {i}\n{text}")
            if args.compare:
                self.compare(group, rows, record)
            self.records.append(record)

    def compare(self, prompts: list[list[int]], rows: list[list[int]], record: dict) -> None:
        """Generate again without the draft, and add the figures of that to `record`."""
        print("without speculation: ", end="", file=sys.stderr)
        alone, record["alone"] = self.answer(prompts, self.engine.engine, show=False)
        line = "with speculation"
        if "tokens_per_s" in record and "tokens_per_s" in record["alone"]:
            record["speedup"] = record["tokens_per_s"] / record["alone"]["tokens_per_s"]
            line += f" {record['speedup']:.2f} times as fast"
        if self.sampling.temperature == 0:  # otherwise other tokens are drawn
            record["same_text"] = alone == rows
            line += ", the same text" if alone == rows else ", another text"
        print(f"[{line}]", file=sys.stderr)

    def converse(self) -> None:
        """Talk until /quit or the end of the input; a turn prefills only what the cache lacks."""
        messages, cached = opening(self.args), []
        help = "/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer"
        print(help, file=sys.stderr)
        while True:
            text = tp.same(read_line)
            if text == "/quit":
                return
            if text == "/reset":
                messages, cached = opening(self.args), []
            if text in ("", "/reset"):
                continue
            try:
                prompt = tokenize(self.tokenizer, [*messages, user(text)], self.args.chat)
                check_prompt(prompt, self.engine.model)
            except UserError as error:
                print(f"{error}, or /reset", file=sys.stderr)
                continue
            known = os.path.commonprefix([cached, prompt[:-1]])  # it takes lists as well as paths
            (new,), record = self.answer([prompt], self.engine, True, len(known))
            cached = prompt + new[:-1] if new else known  # the last token was not fed to the model
            reply = {"role": "assistant", "content": self.tokenizer.decode(new)}
            messages += [user(text), reply]
            self.records.append(record)


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    text = "a text, the length of a random prompt, or - to read standard input"
    source.add_argument("--prompt", default="Hello, my name is", help=text)
    source.add_argument("--prompts_file", type=Path, help="prompts, one a line, run as a batch")
    source.add_argument("--interactive", action="store_true", help="talk with the model")
    add("--chat", action=BooleanOptionalAction, help="wrap prompts in the model's chat format")
    add("--system_prompt", default="", help="what a chat begins with")
    add("--num_samples", type=number(int, 1), default=1, help="times to run each prompt")
    add(
        "--batch_size",
        type=number(int, 1, 4096),
        help="rows a batch (default: 1, or the whole file)",
    )
    add("--max_new_tokens", type=number(int, 1), default=200)
    add(
        "--temperature",
        type=number(float, 0, 100),
        default=0.8,
        help="0: always the likeliest token",
    )
    add("--top_k", type=number(int, 0), default=200, help="draw from the K likeliest; 0: from all")
    share = number(float, 0, 1)
    add("--top_p", type=share, default=1.0, help="draw from the likeliest that add up to P")
    add("--min_p", type=share, default=0.0, help="drop what is under P times the likeliest")
    add("--seed", type=number(int, 0, 2**62), default=1234)
    add_context_flags(parser)
    draft = parser.add_mutually_exclusive_group()
    text = "speculate with this checkpoint of the same vocabulary"
    draft.add_argument("--draft_checkpoint_path", type=Path, help=text)
    text = "speculate with what followed the last tokens where they stood before"
    draft.add_argument("--prompt_lookup", action="store_true", help=text)
    add(
        "--speculate_k", type=number(int, 1, FEW_ROWS - 1), help="most tokens proposed (default: 5)"
    )
    add("--fixed_k", action="store_true", help="always propose K tokens, paying or not")
    add("--compare", action="store_true", help="run each prompt without speculation, too")
    add("--compile", nargs="?", const="block", choices=["block", "whole"], help="compile decoding")
    add("--compile_prefill", action="store_true", help="compile prefill, too")
    add(
        "--profile", type=output_file, metavar="FILE", help="write a chrome trace of the generation"
    )
    add("--json", type=output_file, metavar="FILE", help="write the figures as JSON")
    return parser


def check_flags(args: Namespace) -> None:
    """Fill in the flags whose default depends on others; `UserError` if some contradict."""
    args.chat = args.interactive if args.chat is None else args.chat
    args.speculating = bool(args.draft_checkpoint_path or args.prompt_lookup)
    if args.speculating and not args.batch_size:
        args.batch_size = 1
    if args.system_prompt and not args.chat:
        raise UserError("--system_prompt is for chats; add --chat")
    if args.interactive and (args.batch_size or 1) > 1:
        raise UserError("--interactive is one conversation; leave --batch_size out")
    if args.speculating and args.batch_size > 1:
        raise UserError("speculation is for one stream at a time; leave --batch_size out")
    if (args.speculate_k or args.fixed_k or args.compare) and not args.speculating:
        raise UserError(
            "--speculate_k, --fixed_k and --compare are for speculation; "
            "add --draft_checkpoint_path or --prompt_lookup"
        )
    if args.profile and args.speculating:
        raise UserError("--profile shows plain decoding; leave speculation out")
    if args.interactive and args.num_samples > 1:
        raise UserError("--interactive is one conversation; leave --num_samples out")
    if args.compare and args.interactive:
        raise UserError("--compare repeats prompts; use it without --interactive")


def sampling_flags(args: Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p)


def make_room(model: Transformer, rows: int, length: int) -> None:
    """Allocate the model's KV cache; `UserError` if it does not fit."""
    try:
        model.setup_caches(rows, length)
    except RuntimeError:  # the allocator's
        raise UserError(
            f"there is no room for a KV cache of {rows} rows of {length} positions; "
            "lower --batch_size or --max_seq_length"
        ) from None


def load_draft(
    model: Transformer, tokenizer: Tokenizer, args: Namespace, shard: tp.Shard | None = None
) -> Transformer:
    """The draft model, with a cache for what the model's holds; `UserError` if it fits ill."""
    device = model.freqs_cis.device
    draft, other = load(args.draft_checkpoint_path, device, args.precision, shard)
    if other.pieces != tokenizer.pieces:
        i = min(i for i, _ in other.pieces.items() ^ tokenizer.pieces.items())
        meanings = f"{other.pieces.get(i)!r} to the draft, {tokenizer.pieces.get(i)!r} to the model"
        raise UserError(f"token {i} is {meanings}; take a draft with the model's vocabulary")
    if draft.args.vocab_size < tokenizer.vocab_size:
        sizes = f"{draft.args.vocab_size} tokens and the vocabulary {tokenizer.vocab_size}"
        raise UserError(f"the draft's embedding has {sizes}; take a draft that knows them all")
    make_room(draft, 1, min(model.max_seq_length, draft.args.block_size))
    return draft


def start_engine(
    model: Transformer, draft: Transformer | None, args: Namespace
) -> Engine | Speculator:
    """What runs the model as the flags ask, warmed up."""
    options = (args.compile, args.compile_prefill, FEW_ROWS if args.speculating else 1)
    engines = [Engine(each, *options) for each in (model, draft) if each]
    if args.compile or args.compile_prefill:
        for engine in engines:
            engine.warm_up(args.batch_size)
    if not args.speculating:
        return engines[0]
    if draft:
        drafting = DraftModel(engines[1], model.args.vocab_size)
    else:
        drafting = PromptLookup(model.args.vocab_size, model.freqs_cis.device)
    speculator = Speculator(engines[0], drafting, args.speculate_k or 5, args.fixed_k)
    speculator.warm_up(sampling_flags(args))
    return speculator


def main(args: Namespace) -> None:
    check_flags(args)
    cache = make_cache(args)
    device, shard = tp.start(args.device)
    if shard and shard.rank:  # rank 0 writes the files
        args.profile = args.json = None
    path = args.checkpoint_path or tp.in_turn(default_checkpoint)
    began = time.perf_counter()
    model, tokenizer = load(path, device, args.precision, shard)
    model.prepare()
    synchronize(device)
    load_s = time.perf_counter() - began

    prompts = [] if args.interactive else read_prompts(args, tokenizer, model.args.vocab_size)
    args.batch_size = args.batch_size or (len(prompts) if args.prompts_file else 1)
    if not args.prompts_file:
        prompts *= args.batch_size
    context = read_context(args, tokenizer)
    longest = max(map(len, prompts), default=0) + args.max_new_tokens
    length = args.max_seq_length or min(max(longest, len(context) + 2048), model.args.block_size)
    if length > model.args.block_size:
        raise UserError(f"--max_seq_length is over the model's context, {model.args.block_size}")
    make_room(model, args.batch_size, length)
    if context:
        check_prompt(context, model, "context")
    for prompt in prompts:
        check_prompt(prompt, model)
    draft = load_draft(model, tokenizer, args, shard) if args.draft_checkpoint_path else None
    began = time.perf_counter()
    session = Session(start_engine(model, draft, args), tokenizer, args)
    warm_up_s = time.perf_counter() - began
    context_figures = remember(cache, context, session.engine.engines)

    work(session, prompts)
    plain = shard and not args.speculating
    communication = shard.cost(model, args.batch_size) if plain else {}
    tp.finish(shard)
    settings = {"checkpoint": str(path), "device": str(device), "torch": torch.__version__}
    settings |= {"precision": args.precision, "compile": args.compile}
    settings |= {"draft": str(args.draft_checkpoint_path or args.prompt_lookup or "")}
    settings |= {name: getattr(args, name) for name in ("speculate_k", "fixed_k", "seed")}
    settings |= dataclasses.asdict(session.sampling) | context_figures | communication
    report(args, session.records, **settings, load_s=load_s, warm_up_s=warm_up_s)


def work(session: Session, prompts: list[list[int]]) -> None:
    """Talk, or complete the prompts; with --profile write a trace of that."""
    args = session.args
    profiler = torch.profiler.profile() if args.profile else contextlib.nullcontext()
    ranges = traced(session.engine, globals()) if args.profile else contextlib.nullcontext()
    with ranges, profiler:
        if args.interactive:
            session.converse()
        else:
            session.complete(prompts)
    if args.profile:
        with replacing(args.profile) as temporary:
            profiler.export_chrome_trace(str(temporary))


def remember(cache: PrefillCache | None, context: list[int], engines: list[Engine]) -> dict:
    """Give the engines a cache that holds the context, if there is one; the figures of that."""
    if cache is None:
        return {}
    began, done = time.perf_counter(), 0
    for engine in engines:
        engine.cache = cache
        cache.fingerprint(engine.model)  # so that no file of another engine's is taken for stale
    for engine in engines:
        room = context[: engine.model.max_seq_length]
        done += cache.remember(room, engine.model, Engine(engine.model, None).prefill)
    if len(cache.entries) < len(engines) > 1:
        sizes = "the contexts of model and draft do not fit --prefill_cache_gb together"
        print(f"warning: {sizes}; raise it, or one is prefilled every time", file=sys.stderr)
    figures = {"context_tokens": len(context), "context_prefilled_tokens": done}
    figures["context_s"] = time.perf_counter() - began
    line = "[context: {} tokens, {} prefilled, {:.3f} s".format(*figures.values())
    print(line + (", of both models]" if len(engines) > 1 else "]"), file=sys.stderr)
    return figures


def report(args: Namespace, records: list[dict], **totals) -> None:
    """Print what the whole run took and, with --json, write all figures to a file."""
    if torch.device(totals["device"]).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = f"load {totals['load_s']:.2f} s, warm-up {totals['warm_up_s']:.2f} s"
    if speeds := [record["tokens_per_s"] for record in records if "tokens_per_s" in record]:
        line = f"median of {len(speeds)}: {statistics.median(speeds):.1f} tokens/s; {line}"
    print(f"[{line}, peak memory {peak / 1e9:.2f} GB]", file=sys.stderr)
    if args.json:
        totals |= {"peak_memory_bytes": peak, "samples": records}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(totals, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, make_parser())
