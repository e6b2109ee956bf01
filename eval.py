"""Evaluates a checkpoint: lm-eval tasks, perplexity of a text, or comparison with a reference.

    python eval.py --tasks hellaswag winogrande --limit 100
    python eval.py --perplexity book.txt
    python eval.py --perplexity book.txt --checkpoint_path model_int8.pth --against model.pth

A task asks for the log probability of a continuation after a context (such as four endings of one
story), for that of a whole page, or for generated text. Scores match those of lm-eval's own adapter
for Hugging Face models (HFLM), but requests that share a context prefill it once.

lm-eval is Gao et al. 2024, https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import compare
import tasks
import tp
from checkpoint import DEFAULT_CHECKPOINT, default_checkpoint, find_device
from cli import PRECISIONS, Parser, UserError, add_model_flags, bounded, named_path
from engine import NOT_FINITE, PREFILL_CHUNK, Engine, Sampling, allocate_cache, generate, load
from files import check_outputs, output_file, read_text, replacing
from model import Transformer
from process import run
from settings import Settings
from tokenizer import StreamDecoder, Tokenizer

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
except ImportError:  # not needed by --perplexity
    lm_eval, TemplateLM = None, object

Pair = tuple[list[int], list[int]]  # the token ids of a context and of its continuation
Score = tuple[float, bool]  # log probability of a continuation, and whether it is the greedy one

# ------------------------------------------------------------------------------------------------
# Cutting texts and grouping requests


def windows(ids: list[int], window: int, stride: int) -> Iterator[Pair]:
    """Cut a text into a context and a continuation for each pass of `window` tokens.

    Every token after the first is in exactly one continuation. Tokens of the first pass see
    everything before them. Each further pass advances by `stride`; its tokens see at least
    `window - stride` before them. stride = window is how lm-eval cuts a page.
    """
    begin, end = 1, min(1 + window, len(ids))
    while begin < end:
        yield ids[max(0, end - 1 - window) : begin], ids[begin:end]
        begin, end = end, min(end + stride, len(ids))


def by_context(pairs: list[Pair]) -> list[list[int]]:
    """Group the indices of pairs by context, longest first.

    Sorting by both lengths reduces padding: a tenth less, on the tasks tried, than sorting by the
    exact context length.
    """
    groups = collections.defaultdict(list)
    for i, (context, _) in enumerate(pairs):
        # A context of one token, such as the BOS of every page, is not worth sharing.
        groups[tuple(context), i if len(context) == 1 else None].append(i)
    for group in groups.values():
        group.sort(key=lambda i: -len(pairs[i][1]))

    def size(group: list[int]) -> tuple[int, int]:
        return len(pairs[group[0]][0]) // 8, sum(len(pairs[i][1]) for i in group)

    return sorted(groups.values(), key=size, reverse=True)


def batches(items: list, size: int, title: str) -> Iterator[list]:
    """Batches of `size` items, the last one possibly shorter, with a progress bar."""
    for begin in tqdm(range(0, len(items), size), title, unit="batch"):
        yield items[begin : begin + size]


def generation_settings(kwargs: dict) -> dict:
    """`sampling`, `until` and `max_gen_toks` of a task's `generation_kwargs`.

    UserError if a value is out of the bounds that the flag of its name has.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    settings, default = normalize_gen_kwargs(kwargs), vars(Sampling(temperature=0.0, top_k=0))
    given = {name: settings[name] for name in default if settings.get(name) is not None}
    stops = [stop for stop in settings["until"] if stop]
    try:
        if odd := [stop for stop in stops if not isinstance(stop, str)]:
            raise UserError(f"until: {odd[0]!r:.60} is not a text")
        flags = [f"--{name}={value}" for name, value in given.items()]
        found = Settings().parse_args(flags, Namespace(**default))
    except UserError as error:
        raise UserError(f"generation_kwargs of a task: {error}; change its YAML") from None
    sampling = Sampling(**{name: getattr(found, name) for name in default})
    return {"sampling": sampling, "until": stops, "max_gen_toks": settings["max_gen_toks"]}


# ------------------------------------------------------------------------------------------------
# The model that lm-eval calls


class Evaluator(TemplateLM):
    """lm-eval's interface to a model; tokenization, BOS and truncation follow lm-eval's HFLM.

    One exception: the name of a special token in a document is text here, as everywhere else.
    `max_length` is the window: no token is predicted from more tokens than that.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        batch_size: int,
        max_length: int,
        compile: bool = False,
    ):
        super().__init__()
        self.model, self.tokenizer, self.compile = model, tokenizer, compile
        self.batch_size, self.max_length, self.rows = batch_size, max_length, 0
        self.engine: Engine | None = None  # created with the cache

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.names.get("eos_token")
        return self.tokenizer.controls.get(eos, min(self.tokenizer.eos_ids, default=0))

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one: BOS, else EOS."""
        bos_id = self.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def tok_encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"a text of a task is {text!r:.60}; change its YAML or its data")
        return self.tokenizer.encode(text, bos=add_special_tokens is not False)

    def reserve(self, requests: int, length: int) -> int:
        """Allocate `length` cache positions; return the batch size, the same for all batches.

        Compiled code is specialized to the cache's shape, so it is compiled again with a new cache.
        """
        rows = min(requests, self.batch_size)
        if rows != self.rows or length > self.model.max_seq_length:
            self.rows, self.engine = rows, None  # it holds the old cache
            allocate_cache(self.model, rows, length)
            if self.compile:
                torch.compiler.reset()
            options = ("block" if self.compile else None, self.compile)
            self.engine = Engine(self.model, *options)
            if self.compile:
                self.engine.warm_up(rows)
        return rows

    def score(self, pairs: list[Pair]) -> list[Score]:
        """Score each continuation after its context of at least one token.

        A batch holds one context a row. Its continuations run in turn, each overwriting the last in
        the cache: attention never reads beyond a row's positions.
        """
        if not pairs:
            return []
        groups, scores = by_context(pairs), {}
        longest = max(len(context) + len(continuation) for context, continuation in pairs)
        rows = self.reserve(len(groups), longest - 1)
        for batch in batches(groups, rows, "scoring"):
            padding = [[]] * (rows - len(batch))
            # A context's last token is fed with each continuation: it predicts the first token.
            contexts = [pairs[group[0]][0][:-1] for group in batch] + padding
            lengths = done = [*map(len, contexts)]
            if max(sum(map(len, pairs[group[0]])) for group in batch) <= PREFILL_CHUNK // rows:
                done = [0] * rows  # short: fed with the first continuations
            else:
                self.engine.prefill(contexts)
            for turn in itertools.zip_longest(*batch):  # a request for each row, or None
                tokens = [[] if i is None else pairs[i][0][-1:] + pairs[i][1] for i in turn]
                tokens = [
                    c[n:] + row for c, n, row in zip(contexts, done, tokens + padding, strict=True)
                ]
                scores.update(zip(turn, self.follow(done, lengths, tokens), strict=False))
                done = lengths
        return [scores[i] for i in range(len(pairs))]

    def follow(self, starts: list[int], contexts: list[int], rows: list[list[int]]) -> list[Score]:
        """Score the tokens of each row that come after its context and one more token.

        A row goes to position `starts` of the cache: 0, or after its context if that was prefilled.
        `contexts` are the context lengths, whether in the cache or at the start of the row.
        """
        spare, device = self.model.max_seq_length, self.model.device
        totals, greedy = [0.0] * len(rows), [True] * len(rows)
        step = max(1, PREFILL_CHUNK // len(rows))  # bounds the logits
        for begin in range(0, max(map(len, rows)) - 1, step):
            fed = [row[:-1][begin : begin + step] for row in rows]
            counts = [*map(len, fed)]
            first, T = [start + begin for start in starts], max(counts)
            ranges = [range(i, i + n) for i, n in zip(first, counts, strict=True)]
            idx = [row + [0] * (T - len(row)) for row in fed]
            pos = [[*places] + [spare] * (T - len(places)) for places in ranges]
            idx, pos = (torch.tensor(x, device=device) for x in (idx, pos))  # [B, T]
            filled = max(places.stop for places in ranges if places)
            scored = [
                [i for i in places if i >= n] for places, n in zip(ranges, contexts, strict=True)
            ]
            counts, width = [*map(len, scored)], max(map(len, scored))
            last = [
                [i - place for i in places] + [0] * (width - len(places))
                for places, place in zip(scored, first, strict=True)
            ]
            last = torch.tensor(last, dtype=torch.int64, device=device)  # [B, W]
            here = torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]
            output = self.engine.prefill_step(idx, pos, self.model.kv_steps(filled), last)
            logits = output.logits[here].float()  # [B, W, V] -> [N, V]
            next_tokens = [
                row[i + 1 - start]
                for start, row, places in zip(starts, rows, scored, strict=True)
                for i in places
            ]
            targets = torch.tensor(next_tokens, device=device)  # [N]
            # Not logsumexp(): its exp() may be MKL's, see `model.rotations`.
            log_probs = -F.cross_entropy(logits, targets, reduction="none")
            if not log_probs.isfinite().all():
                raise UserError(NOT_FINITE)
            hits = (logits.argmax(1) == targets).cpu().split(counts)
            for row, part in enumerate(log_probs.cpu().double().split(counts)):
                totals[row] += part.sum().item()
                greedy[row] &= hits[row].all().item()
        return [*zip(totals, greedy, strict=True)]

    def _loglikelihood_tokens(self, requests: list[tuple], **_) -> list[Score]:
        """Score `(texts, context, continuation)`; too long a context is truncated from the left."""
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens and the window only "
                    f"{self.max_length}; raise --max_seq_length or leave this task out"
                )
            room = self.max_length + 1 - len(continuation)  # the last token is not fed
            pairs.append(((context or [self.prefix_token_id])[-room:], continuation))
        return self.score(pairs)

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """Log probabilities of whole pages, each token with up to `max_length` tokens before it."""
        pages = []
        for request in requests:
            ids = [self.prefix_token_id, *self.tok_encode(request.args[0])]
            pages.append([*windows(ids, self.max_length, self.max_length)])
        scores = iter(self.score([*itertools.chain(*pages)]))
        return [sum(next(scores)[0] for _ in page) for page in pages]

    def generate_until(self, requests: list) -> list[str]:
        """Generate after each context, batched by equal settings, longest first."""
        groups, texts = collections.defaultdict(list), {}
        for i, request in enumerate(requests):
            groups[repr(request.args[1])].append(i)
        for group in groups.values():
            settings = generation_settings(requests[group[0]].args[1])
            room = self.max_length - settings["max_gen_toks"]
            if not 0 < room < self.max_length:
                raise UserError(
                    f"max_gen_toks {settings['max_gen_toks']} of a task should be from 1 to "
                    f"{self.max_length - 1}; raise --max_seq_length or leave this task out"
                )
            prompts = {}
            for i in group:
                ids = self.tok_encode(requests[i].args[0]) or [self.prefix_token_id]
                prompts[i] = ids[-room:]
            group.sort(key=lambda i: -len(prompts[i]))
            rows = self.reserve(len(group), len(prompts[group[0]]) + settings["max_gen_toks"])
            for batch in batches(group, rows, "generating"):
                answers = self.complete([prompts[i] for i in batch], settings, seeds=batch)
                texts.update(zip(batch, answers, strict=True))
        return [texts[i] for i in range(len(requests))]

    def complete(self, prompts: list[list[int]], settings: dict, seeds: list[int]) -> list[str]:
        """The text after each prompt until a stop string, an EOS token or `max_gen_toks` tokens."""
        stops = settings["until"]
        ends = self.tokenizer.eos_ids | {self.tokenizer.controls.get(stop) for stop in stops}
        streams, texts = [StreamDecoder(self.tokenizer) for _ in prompts], [""] * len(prompts)

        def until(row: int, token: int) -> bool:
            texts[row] += "" if token in ends else streams[row].push(token)
            return token in ends or any(stop in texts[row] for stop in stops)

        padding = self.rows - len(prompts)
        options = dict(until=until, seeds=[*seeds, *[0] * padding])
        prompts = prompts + [[]] * padding
        size, sampling = settings["max_gen_toks"], settings["sampling"]
        for _ in generate(self.engine, prompts, sampling, size, **options):
            pass
        for i, stream in enumerate(streams):
            texts[i] += stream.flush()
            for stop in stops:
                texts[i] = texts[i].split(stop)[0]
        return texts


# ------------------------------------------------------------------------------------------------
# Tasks, perplexity, comparison


def run_tasks(evaluator: Evaluator, args: Namespace) -> dict:
    """Run lm-eval's tasks and print its tables; returns its results."""
    from lm_eval.utils import make_table

    manager, names = tasks.find(args.tasks, args.include_path)
    options = {"limit": args.limit, "num_fewshot": args.num_fewshot, "log_samples": False}
    with tasks.explaining(names):
        results = lm_eval.simple_evaluate(evaluator, tasks=names, task_manager=manager, **options)
    results = results or {}  # under torchrun, lm-eval returns them on one rank only
    for part in ("results", "groups"):
        if results.get(part):
            print(make_table(results, part))
    return results


def read_passes(evaluator: Evaluator, args: Namespace) -> tuple[str, list[Pair], dict]:
    """The text of --perplexity, the passes over it, and their window and stride.

    Each token is scored once, with at least window - stride tokens before it (or all, if there are
    fewer), and the first after BOS.
    """
    text = read_text(args.perplexity)
    ids = evaluator.tok_encode(text, add_special_tokens=False)
    if not ids:
        raise UserError(f"--perplexity {args.perplexity} is empty; give a file with text")
    window = evaluator.max_length
    stride = args.stride or (window + 1) // 2
    if stride > window:
        raise UserError(f"--stride {stride} is over the window, {window}; lower it")
    passes = [*windows([evaluator.prefix_token_id, *ids], window, stride)]
    return text, passes, {"window": window, "stride": stride}


def perplexity(evaluator: Evaluator, args: Namespace) -> dict:
    """Print the perplexity of a text file; returns the metrics.

    Perplexity is exp of the mean negative log probability of the file's tokens.
    """
    text, passes, cut = read_passes(evaluator, args)
    tokens = sum(len(continuation) for _, continuation in passes)
    nats = -sum(log_prob for log_prob, _ in evaluator.score(passes))
    value, bits = math.exp(nats / tokens), nats / math.log(2) / len(text.encode())
    print(f"perplexity {value:.4f} over {tokens} tokens of {args.perplexity}, ", end="")
    print(f"{bits:.4f} bits a byte (window {cut['window']}, stride {cut['stride']})")
    return {"perplexity": value, "tokens": tokens, "bits_per_byte": bits} | cut


def against(evaluator: Evaluator, path: Path, args: Namespace, shard: tp.Shard | None) -> dict:
    """Compare the checkpoint with --against on a text; returns the metrics."""
    name, own = args.against_device, evaluator.model.device
    if name and shard:
        raise UserError("--against_device is of one process; leave it out under torchrun")
    reference = compare.open_reference(args, find_device(name) if name else own, shard)
    if reference.context < evaluator.max_length:
        if args.max_seq_length:
            what = f"the context of {args.against}, {reference.context}"
            raise UserError(f"--max_seq_length is over {what}; lower it")
        evaluator.max_length = reference.context
    text, passes, cut = read_passes(evaluator, args)
    ours = compare.Ours(path, evaluator.model, evaluator.tokenizer, args.compile)
    return compare.compare((ours, reference), text, passes, args) | cut


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add_model_flags(parser)(
        "--compile", action="store_true", help="compile one transformer block for all layers"
    )
    group = parser.add_argument_group("measurement")
    add, what = group.add_argument, group.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="lm-eval tasks, such as arc_*")
    what.add_argument("--perplexity", type=named_path, metavar="FILE", help="perplexity of a text")
    add("--stride", type=bounded(int, 1), help="of --perplexity (default: half of the window)")
    add("--batch_size", type=bounded(int, 1), default=8, help="contexts in a batch (default: 8)")
    add("--output_path", type=output_file, metavar="FILE", help="write the results as JSON")
    add = parser.group("tasks")
    add("--limit", type=bounded(int, 1), help="documents of each task (default: all)")
    add("--num_fewshot", type=bounded(int, 0), help="examples before each document")
    add("--include_path", type=named_path, metavar="DIR", help="a folder with task definitions")
    add = parser.group("comparison")
    add(
        "--against",
        type=named_path,
        metavar="FILE_OR_FOLDER",
        help="reference checkpoint or Hugging Face folder, compared on the text of --perplexity: "
        "KL(reference || checkpoint)",
    )
    add("--against_device", help="device of the reference (default: the checkpoint's)")
    add("--against_precision", choices=PRECISIONS, help="of the reference (default: --precision)")
    add("--max_kl", type=bounded(float, 0), help="exit with 1 if the KL divergence is over this")
    add("--prompt", help="what both continue greedily (default: the start of the text)")
    add("--max_new_tokens", type=bounded(int, 1), help="of --against (default: 64)")
    return parser


def check_flags(args: Namespace) -> None:
    """Raise a UserError if a flag has no effect without another."""
    if args.stride and args.tasks:
        raise UserError("--stride goes with --perplexity; leave it out")
    goes_with = dict.fromkeys(("limit", "num_fewshot", "include_path"), "tasks")
    only = ("against_device", "against_precision", "max_kl", "prompt", "max_new_tokens")
    goes_with |= dict.fromkeys(only, "against")
    for name, other in goes_with.items():
        if getattr(args, name) is not None and not getattr(args, other):
            raise UserError(f"--{name} goes with --{other}; leave it out")
    if args.tasks and lm_eval is None:
        raise UserError("--tasks needs the package lm-eval; pip install lm-eval==0.4.13")
    if args.against and not args.perplexity:
        raise UserError("--against needs a text; pass --perplexity FILE")
    checkpoints = args.checkpoint_path or DEFAULT_CHECKPOINT, args.against
    check_outputs([args.output_path], [args.perplexity], checkpoints)
    if args.prompt == "":
        raise UserError("--prompt is empty; give a text, or leave it out")


def main(args: Namespace) -> None:
    check_flags(args)
    with tp.joined(args.device) as (device, shard):
        results, settings = evaluate(args, device, shard)
    if shard and shard.rank:  # rank 0 writes and sets the exit code: torchrun would end the others
        return
    if args.output_path:
        results["config"] = results.get("config", {}) | settings
        with replacing(args.output_path) as temporary:
            temporary.write_text(json.dumps(results, indent=2, default=str), encoding="utf-8")
    if args.against and compare.exceeds(results):
        sys.exit(1)


def evaluate(args: Namespace, device: torch.device, shard: tp.Shard | None) -> tuple[dict, dict]:
    """The results that the flags ask for, and the settings they were measured with."""
    path = args.checkpoint_path or tp.in_turn(default_checkpoint)
    model, tokenizer = load(path, device, args.precision, shard)
    window = args.max_seq_length or model.args.block_size
    if window > model.args.block_size:
        raise UserError(f"--max_seq_length is over the model's context, {model.args.block_size}")
    evaluator = Evaluator(model, tokenizer, args.batch_size, window, args.compile)
    if args.against:
        results = against(evaluator, path, args, shard)
    else:
        results = run_tasks(evaluator, args) if args.tasks else perplexity(evaluator, args)
    evaluator.engine = None  # frees its CUDA graphs, for which NCCL would wait
    settings = {"model": str(path), "device": str(device), "precision": args.precision}
    settings |= {"max_seq_length": evaluator.max_length, "batch_size": args.batch_size}
    return results, settings


if __name__ == "__main__":
    run(main, make_parser(), parallel=True)
