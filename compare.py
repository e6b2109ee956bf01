"""Compares two checkpoints with the same vocabulary: are they still the same model?

The reference is another file of this project, or a published folder run by transformers. Both read
the same text, and their next-token distributions are compared at every position. The KL divergence
D(reference || checkpoint), in nats a token, is the cost of coding with the checkpoint if the
reference is right (Kullback & Leibler 1951). Log-softmax is computed in float64: in float32 it is
off by 1e-6, more than a wrong norm eps costs.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from cli import UserError
from engine import NOT_FINITE, Engine, Sampling, allocate_cache, generate, load
from model import Transformer
from tokenizer import Tokenizer

CHUNK = 128  # positions a pass; with 128k logits each they take 64 MB in float32
ROWS = 16  # positions compared at once, in float64
BLOCK = 64  # positions averaged for the standard error, as neighbours are correlated
PROMPT = 32  # tokens of the text that both continue without a --prompt

# ------------------------------------------------------------------------------------------------
# The two sides


class Ours:
    """A checkpoint of this project, one row at a time.

    Logits come from prefill passes; the continuation is decoded as generate.py does.
    """

    def __init__(self, path: Path, model: Transformer, tokenizer: Tokenizer, compile: bool):
        self.path, self.model, self.tokenizer, self.compile = path, model, tokenizer, compile
        self.vocab_size, self.context = model.args.vocab_size, model.args.block_size

    def reserve(self, length: int) -> None:
        """Allocate a cache of `length` positions."""
        allocate_cache(self.model, 1, length)
        self.engine = Engine(self.model, "block" if self.compile else None, self.compile)

    def logits(self, ids: list[int], begin: int, keep: int) -> Tensor:
        """Logits `[keep, V]` after the last `keep` of `ids`, tokens from position `begin` on."""
        end, device = begin + len(ids), self.model.device
        idx = torch.tensor([ids], device=device)  # [1, T]
        pos = torch.arange(begin, end, device=device)[None]
        last = torch.arange(len(ids) - keep, len(ids), device=device)[None]
        return self.engine.prefill_step(idx, pos, self.model.kv_steps(end), last).logits[0]

    def continuation(self, prompt: list[int], count: int, ends: set[int], size: int) -> list[int]:
        """Up to `count` greedy tokens after the prompt, from the first `size` ids."""

        def unpadded(_row: int, _ids: list[int], logits: Tensor) -> Tensor:
            logits[size:] = -math.inf
            return logits

        options = dict(until=lambda _row, token: token in ends, seeds=[0], shape_logits=unpadded)
        steps = generate(self.engine, [prompt], Sampling(temperature=0), count, **options)
        return [token.id for (token,) in steps]


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn exceptions of transformers into UserErrors: they share no base class."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        what = f"transformers cannot run the folder {path} ({reason})"
        raise UserError(f"{what}; fetch it again, or name a model.pth made of it") from None


class HuggingFace:
    """A published folder, run by transformers."""

    def __init__(self, path: Path, device: torch.device, precision: str):
        try:
            import transformers
        except ImportError:
            what = f"--against {path} is a folder, which needs the package transformers"
            raise UserError(f"{what}; pip install transformers, or name a file in it") from None
        self.path, self.tokenizer = path, Tokenizer.from_folder(path)
        options = {"dtype": getattr(torch, precision), "local_files_only": True}
        options |= {"trust_remote_code": False, "output_loading_info": True}
        from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
        transformers.logging.set_verbosity_error()  # errors are reported below
        with explaining(path):
            model, info = from_pretrained(path, **options)
            config = model.config.get_text_config()
            self.vocab_size = config.vocab_size
            self.context = getattr(config, "max_position_embeddings", None) or 2**24
        missing = sorted(info["missing_keys"])
        if missing:  # transformers fills them with random numbers
            raise UserError(f"{path} lacks the tensor {missing[0]}; fetch the folder again")
        self.model, self.cache = model.to(device).requires_grad_(False), None
        known = inspect.signature(model.forward).parameters  # `cache` in newer versions
        self.cache_name = "cache" if "cache" in known else "past_key_values"

    def reserve(self, length: int) -> None:
        """Does nothing: the cache of transformers grows."""

    def logits(self, ids: list[int], begin: int, keep: int) -> Tensor:
        """Logits `[keep, V]` after the last `keep` of `ids`, tokens from position `begin` on."""
        idx = torch.tensor([ids], device=self.model.device)
        self.cache = self.cache if begin else None
        with explaining(self.path):
            output = self.model(idx, use_cache=True, **{self.cache_name: self.cache})
            self.cache = getattr(output, self.cache_name)
            return output.logits[0, -keep:]

    def continuation(self, prompt: list[int], count: int, ends: set[int], size: int) -> list[int]:
        """Up to `count` greedy tokens after the prompt, from the first `size` ids."""
        (logits,), text = chunks(self, prompt, len(prompt) - 1), [*prompt]
        while len(text) < len(prompt) + count:
            text.append(logits[-1, :size].argmax().item())
            if text[-1] in ends:
                break
            logits = self.logits(text[-1:], len(text) - 1, 1)
        return text[len(prompt) :]


Side = Ours | HuggingFace


def open_reference(args: Namespace, device: torch.device, shard) -> Side:
    """Load --against on `device`, in --against_precision or else that of the checkpoint."""
    path, precision = args.against, args.against_precision or args.precision
    if os.path.isdir(path):
        return HuggingFace(path, device, precision)
    return Ours(path, *load(path, device, precision, shard), args.compile)


def common_vocabulary(sides: tuple[Side, Side], text: str) -> int:
    """The number of shared token ids, without padding; UserError if the vocabularies differ."""
    names = []
    for side in sides:
        controls = {i: name for name, i in side.tokenizer.controls.items()}
        names.append(side.tokenizer.pieces | controls)
    paths, advice = [side.path for side in sides], "compare checkpoints of one vocabulary"
    for i in sorted(names[0].keys() | names[1].keys()):
        mine, other = (known.get(i) for known in names)
        if mine != other:
            what = f"token {i} is {mine!r} in {paths[0]} and {other!r} in {paths[1]}"
            raise UserError(f"{what}; {advice}")
    sizes = [min(side.vocab_size, side.tokenizer.vocab_size) for side in sides]
    if sizes[0] != sizes[1]:
        what = f"{paths[0]} has logits for {sizes[0]} tokens and {paths[1]} for {sizes[1]}"
        raise UserError(f"{what}; {advice}")
    mine, other = (side.tokenizer.encode(text, bos=False) for side in sides)
    if mine != other:
        what = f"the tokenizers of {paths[0]} and {paths[1]} cut the text into different tokens"
        raise UserError(f"{what}; {advice}")
    return sizes[0]


# ------------------------------------------------------------------------------------------------
# Position by position


def chunks(side: Side, ids: list[int], first: int) -> Iterator[Tensor]:
    """Run tokens on an empty cache in chunks; yield logits `[N, V]` from position `first` on."""
    for begin in range(0, len(ids), CHUNK):
        part = ids[begin : begin + CHUNK]
        keep = min(len(part), begin + len(part) - first)
        logits = side.logits(part, begin, max(keep, 1))
        if not logits.isfinite().all():
            raise UserError(f"{side.path}: {NOT_FINITE}")
        if keep > 0:
            yield logits


class Measures(NamedTuple):
    """Metrics at each position, float64 `[N]` each."""

    kl: Tensor  # D(reference || checkpoint)
    nats: Tensor  # negative log probability of the text's next token
    reference_nats: Tensor
    difference: Tensor  # largest absolute difference of a logit
    agree: Tensor  # 1 where the argmax is the same


def measure(logits: Tensor, reference: Tensor, targets: Tensor) -> Measures:
    """Compare the logits `[N, V]` of both sides; targets `[N]` are the text's next tokens."""
    mine, other = logits.log_softmax(-1), reference.log_softmax(-1)
    # Not other.exp(): it may be MKL's, see `model.rotations`.
    kl = (reference.softmax(-1) * (other - mine)).sum(-1)
    nats = [-x.gather(-1, targets[:, None])[:, 0] for x in (mine, other)]
    agree = logits.argmax(-1) == reference.argmax(-1)
    return Measures(kl, *nats, (logits - reference).abs().amax(-1), agree.double())


def measures(sides: tuple[Side, Side], pairs: list, size: int) -> Measures:
    """Run both sides over `(context, continuation)` pairs and compare the continuations."""
    found, total = [], sum(len(continuation) for _, continuation in pairs)
    with tqdm(desc="comparing", total=total, unit="token") as bar:
        for context, continuation in pairs:
            ids, targets = context + continuation[:-1], torch.tensor(continuation)
            streams = [chunks(side, ids, len(context) - 1) for side in sides]
            for logits, reference in zip(*streams, strict=True):
                here, targets = targets.split([len(logits), len(targets) - len(logits)])
                device = logits.device if logits.device.type == "cuda" else "cpu"  # knows float64
                parts = [x[:, :size].to(device).split(ROWS) for x in (logits, reference)]
                for mine, other, at in zip(*parts, here.to(device).split(ROWS), strict=True):
                    found.append(torch.stack(measure(mine.double(), other.double(), at)).cpu())
                    bar.update(len(at))
    return Measures(*torch.cat(found, 1))


def standard_error(values: Tensor) -> float | None:
    """Standard error of the mean of values `[N]`, from block means; None for a single block.

    It is computed as for a ratio of sums, since the last block may be shorter.
    """
    blocks = values.split(BLOCK)
    if len(blocks) < 2:
        return None
    rest = torch.stack([(block - values.mean()).sum() for block in blocks])
    return math.sqrt(len(blocks) / (len(blocks) - 1) * rest.square().sum().item()) / len(values)


# ------------------------------------------------------------------------------------------------
# The comparison and its report


def compare(sides: tuple[Side, Side], text: str, pairs: list, args: Namespace) -> dict:
    """Compare `(checkpoint, reference)`; prints and returns the metrics."""
    ours, reference = sides
    size = common_vocabulary(sides, text)
    prompt = ours.tokenizer.encode(args.prompt) if args.prompt else sum(pairs[0], [])[: PROMPT + 1]
    length = max(len(context) + len(continuation) - 1 for context, continuation in pairs)
    count = args.max_new_tokens or 64
    length = max(length, len(prompt) + count)
    for side in sides:
        if length > side.context:
            what = f"the prompt has {len(prompt)} tokens, and with --max_new_tokens it is over"
            raise UserError(f"{what} the context of {side.path}, {side.context}; lower either")
        side.reserve(length)
    found, ends = measures(sides, pairs, size), ours.tokenizer.eos_ids
    texts = [side.continuation(prompt, count, ends, size) for side in sides]
    tokens = enumerate(zip(*texts, strict=False))
    figures = {
        "kl": found.kl.mean().item(),
        "kl_standard_error": standard_error(found.kl),
        "perplexity": found.nats.mean().exp().item(),
        "reference_perplexity": found.reference_nats.mean().exp().item(),
        "largest_logit_difference": found.difference.max().item(),
        "greedy_agreement": found.agree.mean().item(),
        "tokens": len(found.kl),
        "texts_part_at": next((i for i, (mine, other) in tokens if mine != other), None),
        "max_kl": args.max_kl,
    }
    figures |= {"verdict": verdict(figures)}
    report(figures, ours.tokenizer, texts)
    return figures | {"reference": str(reference.path)}


def exceeds(figures: dict) -> bool:
    return figures["max_kl"] is not None and figures["kl"] > figures["max_kl"]


def verdict(figures: dict) -> str:
    """The result in one line."""
    error = figures["kl_standard_error"]
    kl = f"{figures['kl']:.3g}" + ("" if error is None else f" ± {error:.1g}")
    if figures["largest_logit_difference"] == 0:
        return "the same, every logit is equal"
    if figures["max_kl"] is None:
        return f"not the same, KL {kl} nats a token (--max_kl sets a bound)"
    place = "over" if exceeds(figures) else "within"
    return f"{place} the bound, KL {kl} nats a token with --max_kl {figures['max_kl']:g}"


def report(figures: dict, tokenizer: Tokenizer, texts: list[list[int]]) -> None:
    """Print one line for each metric, and the verdict last."""
    place = figures["texts_part_at"]
    print(f"perplexity {figures['perplexity']:.4f}, ", end="")
    print(f"of the reference {figures['reference_perplexity']:.4f}, {figures['tokens']} tokens")
    print(f"largest logit difference {figures['largest_logit_difference']:.3g}")
    print(f"greedy agreement {figures['greedy_agreement']:.2%} of the tokens")
    if place is None:
        print(f"greedy texts are the same, {len(texts[0])} tokens")
    else:
        mine, other = (tokenizer.decode([text[place]]) for text in texts)
        print(f"greedy texts part at new token {place}, {mine!r} and in the reference {other!r}")
    print(f"verdict: {figures['verdict']}")
