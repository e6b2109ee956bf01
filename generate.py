"""Generates text from a prepared checkpoint: prompts, batches, chats, or requests as JSON.

    python generate.py --prompt "Hello, my name is"

Text goes to standard output, statistics to standard error. This file is the command line; engine.py
runs the model. `chat.py`, `jsonl.py`, `speculate.py`, `prefill_cache.py`, `tp.py` and `ranges.py`
are needed for their flags only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import resource
import statistics
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from checkpoint import DEFAULT_CHECKPOINT, default_checkpoint, find_device
from cli import (
    Parser,
    UserError,
    add_model_flags,
    bounded,
    json_object,
    named_path,
    optional,
    refuse,
    replaced,
)
from engine import FEW_ROWS, Engine, allocate_cache, generate, load, synchronize
from files import at_file, check_outputs, output_file, read_text, replacing
from linear import kernels_for
from model import Transformer
from process import run, world_size
from prompts import (
    check_prompt,
    initial_messages,
    read_context,
    read_stdin,
    tokenize,
    user_message,
)
from settings import Settings, add_text_flags, check_settings
from shaping import (
    Reply,
    describe,
    run_replies,
    score_prompt,
    table,
)
from tokenizer import Tokenizer

tp, speculation, prefill_cache = map(optional, ("tp", "speculate", "prefill_cache"))
chat, jsonl = map(optional, ("chat", "jsonl"))


def on_rank0(make):
    """What `make()` returns on rank 0, on every rank."""
    return tp.broadcast_from_rank0(make) if tp else make()


# ------------------------------------------------------------------------------------------------
# Prompts in, text and statistics out


def is_random_prompt(prompt: str) -> bool:
    """Whether --prompt asks for random tokens."""
    return prompt.isascii() and prompt.isdecimal()


def read_prompts(args: Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The prompts of the command line, as token ids."""
    if args.prompts_file:
        text = on_rank0(lambda: read_text(args.prompts_file))
        texts = [line for line in text.split("\n") if line.strip()]
        if not texts:
            raise UserError(f"--prompts_file {args.prompts_file} has no line with a prompt")
    elif is_random_prompt(args.prompt):
        generator = torch.Generator().manual_seed(args.seed)
        length = min(int(args.prompt[:20]), 2**24)  # longer than any context
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        return [read_context(args, tokenizer) + ids]
    else:
        text = args.prompt
        if text == "-":
            text = on_rank0(lambda: read_stdin(sys.stdin.read)).removesuffix("\n")
        texts = [text]
    return [
        tokenize(tokenizer, [*initial_messages(args), user_message(text)], args.chat)
        for text in texts
    ]


def note(args: Namespace, figures: str) -> None:
    """Print statistics, dimmed on a terminal; nothing with --quiet."""
    if not args.quiet:
        text = f"[{figures}]"
        print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr)


class Session:
    """One run of the command line: engine, speculator, tokenizer and flags."""

    def __init__(self, engine: Engine, speculator: Any, tokenizer: Tokenizer, args: Namespace):
        self.engine, self.speculator = engine, speculator
        self.tokenizer, self.args = tokenizer, args
        self.records: list[dict] = []  # the statistics of each run
        self.texts = 0  # generated so far: each takes the next seed

    @property
    def decode(self) -> Callable[..., Iterator]:
        """`engine.generate` or `speculate.speculate`, bound to what runs the model."""
        if self.speculator:
            return functools.partial(speculation.speculate, self.speculator)
        return functools.partial(generate, self.engine)

    def generate_and_print(self, prompts: list[list[int]], start: int = 0) -> list[Reply]:
        """Generate a text for each prompt; a batch of one is streamed."""
        args, tokenizer, model = self.args, self.tokenizer, self.engine.model
        padding = [[]] * (args.batch_size - len(prompts))  # another batch size would recompile
        seeds = itertools.count(args.seed + self.texts)
        pairs = zip(prompts + padding, seeds, strict=False)
        replies = [Reply(tokenizer, model, prompt, args, seed) for prompt, seed in pairs]
        self.texts += len(prompts)
        scores = []
        if args.prompt_logprobs:
            scores = [score_prompt(self.engine, prompt, args.logprobs or 0) for prompt in prompts]
        times = [time.perf_counter()]
        try:
            for texts in run_replies(self.decode, replies, start):
                times.append(time.perf_counter())
                if args.batch_size == 1:
                    print(texts[0], end="", flush=True)
        except KeyboardInterrupt:
            if not args.interactive:
                raise
        rest = [reply.flush() for reply in replies]
        if args.batch_size == 1:
            print(rest[0])
        replies = replies[: len(prompts)]
        self.records.append(self.measure(replies, times))
        if args.prompt_logprobs:
            self.records[-1]["prompt_logprobs"] = [describe(tokenizer, score) for score in scores]
        if args.logprobs is not None:
            texts = [describe(tokenizer, reply.tokens) for reply in replies]
            self.records[-1]["logprobs"] = texts
        if args.batch_size == 1:
            self.print_logprobs(0)
        return replies

    def print_logprobs(self, row: int) -> None:
        """Print the log probabilities of one row of the last run, a token a line."""
        for name in ("prompt_logprobs", "logprobs"):
            if name in self.records[-1]:
                print(f"{name}:\n{table(self.records[-1][name][row])}", file=sys.stderr)

    def measure(self, replies: list[Reply], times: list[float]) -> dict:
        """Print and return a run's statistics; `times` [s]: its start, and the end of each step."""
        model, steps = self.engine.model, len(times) - 2  # decoding steps: all but the prefill's
        record: dict = {"prompt_tokens": [len(reply.prompt) for reply in replies]}
        record["new_tokens"] = [len(reply.tokens) for reply in replies]
        cached = len(replies) * self.engine.cached_tokens
        record["prefilled_tokens"] = sum(record["prompt_tokens"]) - cached
        record["ended_by"] = [reply.ended_by or "Ctrl-C" for reply in replies]
        line = f"{sum(record['prompt_tokens'])} prompt tokens, {sum(record['new_tokens'])} new"
        line += f", ended by {', '.join(sorted(set(record['ended_by'])))}"
        if steps >= 0:
            record["first_token_s"] = times[1] - times[0]
            line += f"; first token {record['first_token_s'] * 1e3:.0f} ms"
        if steps > 0 and not self.speculator:
            record["tokens_per_s"] = steps / (times[-1] - times[1])
            first = max(record["prompt_tokens"]) + 1
            seen = sum(model.kv_steps(first + step) for step in range(steps)) / steps
            record["gb_per_s"] = model.bytes_per_step(seen) * record["tokens_per_s"] / 1e9
            line += "; {tokens_per_s:.1f} tokens/s, {gb_per_s:.1f} GB/s".format(**record)
        elif steps > 0:
            histogram = record["accepted"] = self.speculator.histogram
            accepted = sum(n * count for n, count in enumerate(histogram))
            record["tokens_per_s"] = steps / (times[-1] - times[1])
            record["mean_accepted"] = accepted / max(sum(histogram), 1)
            line += f"; {record['tokens_per_s']:.1f} tokens/s; steps that accepted 0 to "
            line += f"{len(histogram) - 1}: {histogram}, mean {record['mean_accepted']:.2f}"
        note(self.args, line)
        return record

    def complete(self, prompts: list[list[int]]) -> None:
        """Continue every prompt `num_samples` times, `batch_size` prompts at once."""
        args = self.args
        echo = not args.chat and not is_random_prompt(args.prompt)

        def decode(ids: list[int]) -> str:
            return self.tokenizer.decode(ids).removeprefix(args.prefill_context or "")

        for first in list(range(0, len(prompts), args.batch_size)) * args.num_samples:
            group = prompts[first : first + args.batch_size]
            if echo and args.batch_size == 1:
                print(decode(group[0]), end="", flush=True)
            replies = self.generate_and_print(group)
            for i, reply in enumerate(replies if args.batch_size > 1 else []):
                prompt = decode(reply.prompt) if echo else ""
                print(f"--- {first + i}\n{prompt}{reply.text}", flush=True)
                self.print_logprobs(i)


# ------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = add_model_flags(parser)
    about = "compile decoding: one block for all layers (default), or the whole step"
    add("--compile", nargs="?", const="block", choices=["block", "whole"], help=about)
    add("--compile_prefill", action="store_true", help="compile prefill, too")

    group = parser.add_argument_group("prompt")
    add, source = group.add_argument, group.add_mutually_exclusive_group()
    text = "a text, a number of random tokens, or - for standard input"
    source.add_argument("--prompt", default="Hello, my name is", help=text)
    source.add_argument("--prompts_file", type=named_path, help="prompts, one a line, in batches")
    source.add_argument("--interactive", action="store_true", help="chat on the terminal")
    text = "JSON requests on standard input, JSON records on standard output, one a line"
    source.add_argument("--jsonl", action="store_true", help=text)
    about = "apply the model's chat template (default: with --interactive)"
    add("--chat", action=BooleanOptionalAction, help=about)
    add("--system_prompt", default="", help="the system message of a chat")
    about = 'variables of the chat template, such as {"enable_thinking": false}'
    add("--template_args", type=json_object, default={}, metavar="JSON", help=about)
    add("--num_samples", type=bounded(int, 1, 10**6), default=1, help="times to run each prompt")
    text = "prompts run at once (default: 1, or the whole file)"
    add("--batch_size", type=bounded(int, 1, 4096), help=text)
    add_text_flags(parser)

    group = parser.add_argument_group("speculation")
    add, draft = group.add_argument, group.add_mutually_exclusive_group()
    text = "a draft model with the same vocabulary"
    draft.add_argument("--draft_checkpoint_path", type=named_path, metavar="PATH", help=text)
    text = "n-gram drafting: continue the latest earlier match of the last tokens"
    draft.add_argument("--prompt_lookup", action="store_true", help=text)
    text = "maximum draft length (default: 5)"
    add("--speculate_k", type=bounded(int, 1, FEW_ROWS - 1), metavar="K", help=text)

    add = parser.group("prefill cache")
    about = "a text that every prompt continues, or @FILE; it is prefilled once"
    add("--prefill_context", metavar="TEXT", help=about)
    about = "keep prefilled contexts in this folder"
    add("--prefill_cache", type=named_path, metavar="DIR", help=about)
    size, about = bounded(float, 0, 1e6), "limit in memory, and again on disk (default: 8)"
    add("--prefill_cache_gb", type=size, metavar="GB", help=about)

    add = parser.group("measurement")
    add("--profile", type=output_file, metavar="FILE", help="write a Chrome trace of the run")
    add("--json", type=output_file, metavar="FILE", help="write the statistics as JSON")
    add("--quiet", action="store_true", help="print no statistics")
    return parser


TOLD = ("messages", "add_generation_prompt", "bos_token", "eos_token")  # to a chat template


def context_text(value: str | None) -> str | None:
    """The text of --prefill_context, or of the file that it names; UserError if it is empty."""
    file = at_file(value)
    text = read_text(file) if file else value
    if text == "":
        raise UserError("--prefill_context: the context is empty; give a text or @FILE")
    return text


def with_defaults(args: Namespace) -> Namespace:
    """The flags, those filled in whose default depends on others; UserError if some contradict."""
    chat = args.interactive if args.chat is None else args.chat
    draft, batch = args.draft_checkpoint_path or args.prompt_lookup, (args.batch_size or 1) > 1
    talk, samples = args.interactive, args.num_samples > 1
    random = not (args.prompts_file or talk or args.jsonl) and is_random_prompt(args.prompt)
    cached = args.prefill_cache or args.prefill_cache_gb is not None
    taken = args.template_args.keys() & TOLD
    refuse(
        (args.system_prompt and not chat, "--system_prompt is for chats; add --chat"),
        (args.template_args and not chat, "--template_args is for chats; add --chat"),
        (
            taken,
            f"--template_args may not set {min(taken, default='')}, which the chat itself does",
        ),
        (chat and random, f"--prompt {args.prompt} is random tokens, not a chat; drop --chat"),
        (talk and batch, "--interactive is one conversation; leave --batch_size out"),
        (talk and samples, "--interactive is one conversation; leave --num_samples out"),
        (talk and args.prompt_logprobs, "--prompt_logprobs is for texts; leave --interactive out"),
        (args.jsonl and samples, "--jsonl makes one text a request; leave --num_samples out"),
        (draft and batch, "speculation is for one stream at a time; leave --batch_size out"),
        (draft and args.profile, "--profile shows plain decoding; leave speculation out"),
        (
            args.speculate_k and not draft,
            "--speculate_k needs --draft_checkpoint_path or --prompt_lookup; add one",
        ),
        (
            cached and not args.prefill_context,
            "--prefill_cache and --prefill_cache_gb go with --prefill_context; add it",
        ),
    )
    inputs = [args.prompts_file, args.prefill_cache, at_file(args.prefill_context)]
    models = args.checkpoint_path or DEFAULT_CHECKPOINT, args.draft_checkpoint_path
    check_outputs([args.profile, args.json], inputs, models)
    context = context_text(args.prefill_context)
    files = {"speculate": (draft, "speculation"), "chat": (talk, "--interactive")}
    files |= {"jsonl": (args.jsonl, "--jsonl"), "ranges": (args.profile, "--profile")}
    files["prefill_cache"] = (args.prefill_context, "--prefill_context")
    files["tp"] = (world_size() > 1, "torchrun")
    for name, (asked, flag) in files.items():
        if asked and optional(name) is None:
            raise UserError(f"{flag} needs {name}.py; put it beside generate.py")
    rows = args.batch_size or (None if args.prompts_file and not draft else 1)
    changes = {"chat": chat, "batch_size": rows, "prefill_context": context}
    return replaced(args, speculate_k=args.speculate_k or 5, **changes)


def start_engines(
    model: Transformer, draft: Transformer | None, args: Namespace
) -> tuple[Engine, Any]:
    """The model's Engine, and a Speculator if there is a draft; both warmed up."""
    engines = [Engine(each, args.compile, args.compile_prefill) for each in (model, draft) if each]
    if args.compile or args.compile_prefill or model.device.type == "cuda":
        for engine in engines:  # a draft catches up with FEW_ROWS at once, at most
            most = args.speculate_k + 1 if engine is engines[0] else FEW_ROWS
            engine.warm_up(args.batch_size, most if draft or args.prompt_lookup else 1)
    if not (draft or args.prompt_lookup):
        return engines[0], None
    size = model.args.vocab_size
    if draft:
        drafting = speculation.DraftModel(engines[1], size)
    else:
        drafting = speculation.PromptLookup(size, model.device)
    return engines[0], speculation.Speculator(engines[0], drafting, args.speculate_k, on_rank0)


def main(args: Namespace) -> None:
    args = with_defaults(args)
    alone = None if tp else (find_device(args.device), None)
    with tp.joined(args.device) if tp else contextlib.nullcontext(alone) as (device, shard):
        if shard and shard.rank:  # rank 0 writes the files
            args = replaced(args, profile=None, json=None)
        records, totals = run_all(args, device, shard)
    report(args, records, **totals)


def run_all(args: Namespace, device: torch.device, shard: Any) -> tuple[list[dict], dict]:
    """Load, warm up and generate: the statistics of each run, and those of the whole."""
    path = args.checkpoint_path or (tp.in_turn(default_checkpoint) if tp else default_checkpoint())
    cache = make_cache(args)
    kernels = kernels_for("cpu")
    if kernels and device.type == "cpu" and args.precision == "bfloat16":
        kernels.load()  # built once, before the clock starts
    began = time.perf_counter()
    model, tokenizer = load(path, device, args.precision, shard)
    tokenizer.template_args = args.template_args
    model.pack_weights()
    synchronize(device)
    load_s = time.perf_counter() - began

    check_settings(args, model)
    elsewhere = args.interactive or args.jsonl
    prompts = [] if elsewhere else read_prompts(args, tokenizer, model.args.vocab_size)
    args = replaced(args, batch_size=args.batch_size or len(prompts))
    if not args.prompts_file:
        prompts *= args.batch_size
    context = read_context(args, tokenizer)
    longest = max(map(len, prompts), default=0) + args.max_new_tokens
    longest = max(longest, len(context) + 2048, 8192 if args.jsonl else 0)
    length = args.max_seq_length or min(longest, model.args.block_size)
    if length > model.args.block_size:
        raise UserError(f"--max_seq_length is over the model's context, {model.args.block_size}")
    allocate_cache(model, args.batch_size, length)
    if context:
        check_prompt(context, model, "context")
    for prompt in prompts:
        check_prompt(prompt, model)
    draft = None
    if args.draft_checkpoint_path:
        options = (model, tokenizer, args.precision, shard)
        draft = speculation.load_draft(args.draft_checkpoint_path, *options)
    began = time.perf_counter()
    engine, speculator = start_engines(model, draft, args)
    warm_up_s = time.perf_counter() - began
    session = Session(engine, speculator, tokenizer, args)
    engines = speculator.engines if speculator else [engine]
    context_figures = prefill_context(args, cache, context, engines)

    run_session(session, prompts)
    communication = shard.cost(model, args.batch_size) if shard and not speculator else {}
    for each in engines:
        each.release()
    settings = {"checkpoint": str(path), "device": str(device), "torch": torch.__version__}
    settings |= {"precision": args.precision, "compile": args.compile}
    lookup = "prompt lookup" if args.prompt_lookup else ""
    settings |= {"draft": str(args.draft_checkpoint_path or lookup)}
    settings |= {name: getattr(args, name) for name in ("speculate_k", *Settings().defaults)}
    settings |= context_figures | communication
    return session.records, settings | {"load_s": load_s, "warm_up_s": warm_up_s}


def run_session(session: Session, prompts: list[list[int]]) -> None:
    """Chat, serve requests or complete the prompts; with --profile, write a trace."""
    args = session.args
    with contextlib.ExitStack() as stack:
        if args.profile:
            stack.enter_context(optional("ranges").traced(session.engine))
            profiler = stack.enter_context(torch.profiler.profile())
        if args.interactive:
            chat.converse(session, on_rank0)
        elif args.jsonl:
            record = jsonl.serve(session, on_rank0)
            record["tokens_per_s"] = record["new_tokens"] / max(record["seconds"], 1e-9)
            line = "{requests} requests, {errors} errors, {new_tokens} new tokens"
            note(args, line.format(**record))
            session.records.append(record)
        else:
            session.complete(prompts)
    if args.profile:
        with replacing(args.profile) as temporary:
            profiler.export_chrome_trace(str(temporary))


def make_cache(args: Namespace) -> Any:
    """The prefill cache, if there is a context."""
    if not args.prefill_context:
        return None
    gigabytes = 8 if args.prefill_cache_gb is None else args.prefill_cache_gb
    return prefill_cache.PrefillCache(int(gigabytes * 1e9), args.prefill_cache)


def prefill_context(args: Namespace, cache: Any, context: list[int], engines: list[Engine]) -> dict:
    """Prefill the context into a cache that the engines share; returns statistics."""
    if cache is None:
        return {}
    began, done = time.perf_counter(), 0
    for engine in engines:
        room = context[: engine.model.max_seq_length]
        done += cache.prefill_context(room, engine.model, Engine(engine.model).prefill)
    for engine in engines:
        engine.cache = cache
    ids = [cache.fingerprint(engine.model) for engine in engines]
    if len(engines) > 1 and not all(any(e.startswith(i) for e in cache.entries) for i in ids):
        sizes = "the contexts of model and draft do not fit --prefill_cache_gb together"
        print(f"warning: {sizes}; raise it, or one is prefilled every time", file=sys.stderr)
    figures = {"context_tokens": len(context), "context_prefilled_tokens": done}
    figures["context_s"] = time.perf_counter() - began
    line = "context: {} tokens, {} prefilled, {:.3f} s".format(*figures.values())
    note(args, line + (", of both models" if len(engines) > 1 else ""))
    return figures


def report(args: Namespace, records: list[dict], **totals) -> None:
    """Print the totals and, with --json, write all statistics to a file."""
    if torch.device(totals["device"]).type == "cuda":
        peak = torch.cuda.max_memory_allocated(totals["device"])
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = f"load {totals['load_s']:.2f} s, warm-up {totals['warm_up_s']:.2f} s"
    if speeds := [record["tokens_per_s"] for record in records if "tokens_per_s" in record]:
        line = f"median of {len(speeds)}: {statistics.median(speeds):.1f} tokens/s; {line}"
    note(args, f"{line}, peak memory {peak / 1e9:.2f} GB")
    if args.json:
        totals |= {"peak_memory_bytes": peak, "samples": records}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(totals, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, make_parser(), parallel=True)
