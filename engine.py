"""Prefill and decode: who runs a forward pass, how a token is drawn, and the loop around both.

A prompt is *prefilled*: its tokens go through the model at once and leave their keys and values in
the cache. Then tokens are *decoded* one a step, each step reading every weight once, so the speed
limit is the memory bus. The engine yields tokens and knows nothing of text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoint import check_path
from cli import UserError, optional
from families import read_config
from linear import FEW_ROWS, kernels_for
from model import Output, Transformer, TransformerBlock
from tokenizer import Tokenizer

cudagraph = optional("cudagraph")
NOT_FINITE = "the model gives logits that are NaN or infinite; is the checkpoint damaged, or "
NOT_FINITE += "--precision too narrow for it? Convert it again or try --precision float32"
PADDED = 0.75  # of embedding rows must have a token; published models have 98 % or more
PREFILL_CHUNK = 512  # bounds the activations, and the attention mask where there is one

# ------------------------------------------------------------------------------------------------
# Sampling


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 is argmax; top_k 0, top_p 1, min_p 0 filter nothing."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0
    min_p: float = 0.0


class Token(NamedTuple):
    """A new token; with log probabilities asked for, its own and the likeliest ones by id.

    They are the log-softmax of the raw logits: before `shape_logits`, temperature and filters.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, two `[B, K]`, for logits `[B, V]`.

    top-k keeps the K likeliest tokens, top-p (nucleus; Holtzman et al. 2020, arXiv 1904.09751) the
    smallest set with a total probability of at least p, min-p (Nguyen et al. 2024, arXiv
    2407.01082) those at least min_p times as likely as the likeliest. The likeliest token always
    stays; at temperature 0 it is alone.
    """
    if sampling.temperature < 1e-5:
        tokens = logits.max(-1, keepdim=True).indices  # the first, as of argmax, but faster
        return torch.ones_like(tokens, dtype=torch.float32), tokens
    logits = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1 and sampling.min_p == 0:
        tokens = torch.arange(logits.shape[-1], device=logits.device)
        return logits.softmax(-1), tokens.expand_as(logits)
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    logits, tokens = logits.topk(k)  # likeliest first
    probs = logits.softmax(-1)
    dropped = (probs.cumsum(-1) - probs >= sampling.top_p) | (probs < sampling.min_p * probs[:, :1])
    dropped[:, 0] = False
    probs = probs.masked_fill(dropped, 0)
    return probs / probs.sum(-1, keepdim=True), tokens


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index a row with probabilities proportional to weights `[B, K]`: `[B, 1]`.

    The largest of w / Exponential(1) falls on i with probability w_i / sum w (the Gumbel-max
    trick), and nothing waits for the device.
    """
    noise = torch.empty_like(weights).exponential_(generator=generator).clamp_(min=1e-20)
    return (weights / noise).argmax(-1, keepdim=True)


def sample(logits: Tensor, samplings: list[Sampling], generators: list[torch.Generator]) -> Tensor:
    """Draw one token a row, each by its own settings and generator: logits `[B, V]` -> `[B]`."""
    if len(set(samplings)) > 1:
        rows = zip(logits.split(1), samplings, generators, strict=True)
        return torch.cat([sample(row, [own], [generator]) for row, own, generator in rows])
    probs, tokens = candidates(logits, samplings[0])
    if probs.shape[1] > 1:
        pairs = zip(probs.split(1), generators, strict=True)
        tokens = tokens.gather(1, torch.cat([draw(*pair) for pair in pairs]))
    return tokens[:, 0]


def send(tensors: list[Tensor]) -> Callable[[], list[list]]:
    """Start copying tensors to the host; the returned function waits only for these copies."""
    if tensors[0].device.type != "cuda":
        return lambda: [tensor.tolist() for tensor in tensors]
    options = {"device": "cpu", "pin_memory": True}
    copies = [torch.empty_like(t, **options).copy_(t, non_blocking=True) for t in tensors]
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))
    return lambda: [arrived.synchronize(), *(copy.tolist() for copy in copies)][1:]


def send_tokens(ids: Tensor, logits: Tensor, logprobs: int | None) -> Callable[..., list[Token]]:
    """Send sampled ids `[N]`, and from raw logits `[N, V]` their log probs and the `logprobs` top.

    The returned function waits for them. It takes which rows are alive (default: all) and raises
    UserError if their logits are NaN or infinite.
    """
    sent = [ids, (logits.amax(-1).float() - logits.amin(-1)).isfinite()]
    if logprobs is not None:
        log_probs = logits.float().log_softmax(-1)
        own = log_probs.gather(1, ids.clamp(min=0).unsqueeze(1))[:, 0]
        sent += [own, *log_probs.topk(logprobs)]  # values, ids
    arrive = send(sent)

    def read(alive: list[bool] | None = None) -> list[Token]:
        found, finite, *rest = arrive()
        if not all(itertools.compress(finite, alive or [True] * len(finite))):
            raise UserError(NOT_FINITE)
        if not rest:
            return [Token(i) for i in found]
        own, values, tops = rest
        tops = [tuple(zip(*pair, strict=True)) for pair in zip(tops, values, strict=True)]
        return [Token(*token) for token in zip(found, own, tops, strict=True)]

    return read


# ------------------------------------------------------------------------------------------------
# Prefill and decode

Step = Callable[[Tensor, Tensor, int, "Tensor | None"], Output]  # as model.Transformer.forward


def compiled(function: Callable) -> Callable:
    """Compile for dynamic lengths: one graph serves every prompt and every filled length."""
    # Sizes that happen to be equal when a graph is made are not taken for one and the same.
    torch.fx.experimental._config.use_duck_shape = False
    torch._dynamo.config.recompile_limit = 64  # a graph for each mix of schemes in a block
    torch._dynamo.config.specialize_float = True  # `eps` is a constant, not a dynamic number
    options = {"size_asserts": False}  # what they check costs as much as small kernels
    return torch.compile(function, fullgraph=True, dynamic=True, options=options)


class Engine:
    """A model with its KV cache, and what runs a step of it.

    One fused kernel, or fused step, for the whole model if there is one, else the modules. On CUDA
    a decoding step is captured as a CUDA graph. What is not fused may be compiled: `compile`
    "block" is one transformer block that serves every layer, a short cold start; "whole" is the
    whole decoding step. Allocate the caches first; weights must not change afterwards, and another
    `setup_caches` needs another Engine.
    """

    def __init__(
        self, model: Transformer, compile: str | None = None, compile_prefill: bool = False
    ):
        self.model, self.compile_prefill = model, compile_prefill
        self.cache: Any = None  # a prefill_cache.PrefillCache of contexts that prompts begin with
        self.cached_tokens = 0  # of each prompt, those that the last prefill found in the caches
        model.pack_weights()
        kernels = kernels_for(model.device.type)
        fused = kernels.fuse(model) if kernels else None
        self.fused: Step | None = fused and (lambda *inputs: Output(*fused(*inputs)))
        self.decode_step: Step = self.fused or model
        self.sample = sample
        on_gpu = model.device.type == "cuda"
        self.prefill_step: Step = model if on_gpu else self.decode_step
        if compile == "block" and not self.fused:
            self.decode_step = functools.partial(model, block=compiled(TransformerBlock.forward))
        elif compile == "whole" and not self.fused:
            self.decode_step = compiled(model)
        if compile_prefill and model.args.mixture:
            raise UserError("--compile_prefill takes no mixture of experts; leave it out")
        if compile_prefill and self.prefill_step is model:
            self.prefill_step = functools.partial(model, block=compiled(TransformerBlock.forward))
        # On a GPU the next step is launched before the host has read the last one's tokens.
        self.launches_ahead, self.uncaptured_step = on_gpu, self.decode_step
        if on_gpu and cudagraph:
            captured = cudagraph.Captured(self.decode_step, model)
            self.decode_step = lambda *inputs: Output(*captured(*inputs))

    def decode(self, idx: Tensor, input_pos: Tensor, kv_len: int) -> Output:
        """Run the next token, or up to FEW_ROWS to verify, of each row: idx `[B, T]`.

        Batch-invariant on the CPU kernels: the same bits alone, in a batch or verified. On CUDA
        the next call overwrites the output.
        """
        return self.decode_step(idx, input_pos, kv_len, None)

    def prefill(self, prompts: list[list[int]], start: int = 0) -> Tensor:
        """Run each prompt's tokens from `start` on; logits `[B, V]` after the last of each.

        The cache must hold the first `start` tokens of every prompt, and each prompt but an empty
        one go further. Rows are padded on the right; padding stands at the cache's last slot. With
        start 0, the longest prefix that all prompts share is restored from the prefill cache.
        """
        if any(prompt and len(prompt) <= start for prompt in prompts):
            raise ValueError(f"a prompt has no token after the {start} that the cache holds")
        if self.cache and start == 0:
            start = self.cache.restore_prefix(prompts, self.model)
        self.cached_tokens = start
        padding, device = self.model.max_seq_length, self.model.device
        logits = torch.zeros((), device=device)
        for begin in range(start, max(map(len, prompts)), PREFILL_CHUNK):
            chunk = [prompt[begin : begin + PREFILL_CHUNK] for prompt in prompts]
            T = max(map(len, chunk))
            idx = [row + [0] * (T - len(row)) for row in chunk]
            pos = [[*range(begin, begin + len(row))] + [padding] * (T - len(row)) for row in chunk]
            last = [[max(len(row) - 1, 0)] for row in chunk]
            idx, pos, last = (torch.tensor(x, device=device) for x in (idx, pos, last))
            here = torch.tensor([[len(row) > 0] for row in chunk], device=device)
            output = self.prefill_step(idx, pos, self.model.kv_steps(begin + T), last)
            logits = torch.where(here, output.logits[:, 0], logits)
        return logits

    def rewind(self, length: int) -> int:
        """How many of the first `length` cached tokens can be kept."""
        return length  # keys and values stand at their positions

    def release(self) -> None:
        """Free the captured steps: NCCL waits at its end for every CUDA graph that it is in."""
        self.decode_step = self.uncaptured_step

    def warm_up(self, rows: int, verify: int = 1) -> float:
        """Compile and capture everything for batches of `rows` now; the seconds it took.

        Passes verify up to `verify` tokens a row.
        """
        model, began = self.model, time.perf_counter()
        if self.decode_step is self.fused:
            return 0.0
        many = FEW_ROWS + 1
        compile_kernels = getattr(kernels_for(model.device.type), "compile_kernels", None)
        for step, T in ((self.uncaptured_step, 1), (self.prefill_step, many)):
            if compile_kernels and step in (self.fused, model):  # in threads, before they are run
                compile_kernels(step, model, rows, T, prefill=T == many)
        # A graph is captured for each 8 tokens a row.
        passes = [(T, False) for T in sorted({1, *range(2, verify, 8), verify})]
        if self.compile_prefill:
            passes += [(1, True), (2, True)]
        if self.compile_prefill or self.launches_ahead:
            passes += [(many, True)]
        for T, prefill in passes:
            idx = torch.zeros(rows, T, dtype=torch.int64, device=model.device)
            input_pos = torch.full_like(idx, model.max_seq_length)  # the padding slot
            step, last = (self.prefill_step, idx[:, :1]) if prefill else (self.decode_step, None)
            for _ in range(2):  # compiled code may differ in its first call
                step(idx, input_pos, model.kv_steps(1), last)
        synchronize(model.device)
        return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def generate(
    engine: Engine,
    prompts: list[list[int]],
    sampling: Sampling | list[Sampling],
    max_new_tokens: int,
    *,
    until: Callable[[int, int], bool],
    seeds: list[int],
    start: int = 0,
    logprobs: int | None = None,
    shape_logits: Callable[[int, list[int], Tensor], Tensor] | None = None,
) -> Iterator[list[Token | None]]:
    """Yield the next token of every prompt, and None for those that have ended, until all have.

    A row ends with the token of which `until(row, id)` is true, with `max_new_tokens` or with a
    full cache; the row of an empty prompt has ended before it begins. `sampling` and `seeds` are a
    row's own, so its text never depends on its neighbours. `shape_logits(row, ids, logits [V])`
    returns the logits that a token is drawn by, after the tokens `ids`; with `logprobs` N a token
    carries its log probability and those of the N likeliest. The cache must hold the first `start`
    tokens of each prompt; afterwards it holds all tokens but the last.
    """
    model, rows = engine.model, range(len(prompts))
    samplings = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    generators = [torch.Generator(model.device).manual_seed(seed) for seed in seeds]
    texts, alive = [[*prompt] for prompt in prompts], [len(prompt) > 0 for prompt in prompts]
    places = [[len(text) or model.max_seq_length] for text in texts]  # nothing writes over others
    input_pos = torch.tensor(places, device=model.device)  # [B, 1]
    if not any(alive):
        return
    logits, ahead = engine.prefill(prompts, start), engine.launches_ahead and not shape_logits

    def decode(ids: Tensor) -> Tensor:
        """Logits `[B, V]` after tokens ids `[B]`, the last of each row."""
        filled = max(len(texts[row]) for row in rows if alive[row]) + ahead
        output = engine.decode(ids.unsqueeze(1), input_pos, model.kv_steps(filled))
        input_pos.add_(1).clamp_(max=model.max_seq_length)
        return output.logits[:, 0]

    for left in reversed(range(max_new_tokens)):
        shaped = logits.to(torch.float32, copy=True) if shape_logits else logits
        for row in itertools.compress(rows, alive) if shape_logits else ():
            shaped[row] = shape_logits(row, texts[row], logits[row].clone())
        ids = engine.sample(shaped, samplings, generators)  # [B]
        read = send_tokens(ids, logits, logprobs)
        roomy = [alive[row] and len(texts[row]) < model.max_seq_length for row in rows]
        if ahead and left and any(roomy):  # of no use only if `until` ends all rows now
            logits = decode(ids)
        tokens = read(alive)
        yield [tokens[row] if alive[row] else None for row in rows]
        for row in rows:
            texts[row].append(tokens[row].id)
            alive[row] = alive[row] and not until(row, tokens[row].id) and roomy[row]
        if not any(alive) or not left:
            return
        if not ahead:
            logits = decode(ids)


# ------------------------------------------------------------------------------------------------
# Loading


def load_model(
    path: Path, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, shard: Any = None
) -> Transformer:
    """The model in the file `path`, whose folder says what it is; `shard` is a `tp.Shard`."""
    check_path(path)
    return Transformer.from_checkpoint(path, read_config(path.parent), device, dtype, shard)


def load(
    path: Path, device: torch.device | str, precision: str, shard: Any = None
) -> tuple[Transformer, Tokenizer]:
    """The model in the file `path` and the tokenizer of its folder; UserError if they differ."""
    model = load_model(path, device, getattr(torch, precision), shard)
    tokenizer = Tokenizer.from_folder(path.parent)
    known, size = tokenizer.vocab_size, model.args.vocab_size
    if tokenizer.text_size > size or known < PADDED * size:
        raise UserError(
            f"the tokenizer in {path.parent} has {known} tokens and the model {size}; "
            "put the model's own tokenizer there"
        )
    return model, tokenizer


def allocate_cache(model: Transformer, rows: int, length: int) -> None:
    """Allocate the model's KV cache; UserError if it does not fit."""
    kinds = [layer.attention.kind for layer in model.layers]
    heads = sum(kind.n_local_heads * kind.head_dim for kind in kinds)
    size = 2 * rows * (length + 1) * heads * model.norm.weight.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        if model.device.type == "cpu" and size > memory:  # Linux would overcommit, and then kill
            raise RuntimeError
        model.setup_caches(rows, length)
    except RuntimeError:  # the allocator's
        raise UserError(
            f"there is no room for a KV cache of {rows} rows of {length} positions; "
            "lower --batch_size or --max_seq_length"
        ) from None
