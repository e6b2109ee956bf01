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
from torch import Tensor

import tp
from cli import Parser, UserError, add_model_flags, number, output_file, replacing, run
from linear import FEW_ROWS
from model import Transformer, TransformerBlock
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
        tokens = logits.argmax(-1, keepdim=True)
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
    "whole" compiles the whole decoding step, on CUDA into a CUDA graph. A decoding step takes up to
    `width` tokens a row; more are prefilled.
    """

    def __init__(
        self,
        model: Transformer,
        compile: str | None,
        compile_prefill: bool = False,
        width: int = 1,
    ):
        self.model, self.compile_prefill, self.width = model, compile_prefill, width
        self.decode_step = self.prefill_step = model
        # Dynamic lengths: one graph serves every prompt and every filled length of the cache, if
        # sizes that happen to be equal when it is made are not taken for one and the same.
        torch.fx.experimental._config.use_duck_shape = False
        torch._dynamo.config.recompile_limit = 64  # a graph for each mix of schemes in a block
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=True)
        if compile == "block":
            self.decode_step = functools.partial(model, block=compiled(TransformerBlock.forward))
        elif compile == "whole":
            mode = "default" if model.freqs_cis.device.type == "cpu" else "reduce-overhead"
            self.decode_step = compiled(model, mode=mode)
        if compile_prefill:
            self.prefill_step = functools.partial(model, block=compiled(TransformerBlock.forward))

    def step(
        self, idx: Tensor, input_pos: Tensor, kv_len: int, last: Tensor | None = None
    ) -> Tensor:
        """Logits of tokens idx `[B, T]` at input_pos; the arguments are those of the model."""
        if idx.shape[1] > self.width:
            return self.prefill_step(idx, input_pos, kv_len, last)
        logits = self.decode_step(idx, input_pos, kv_len)
        return logits if last is None else logits.take_along_dim(last[:, None, None], 1)

    def warm_up(self, batch_size: int) -> float:
        """Compile everything now; the seconds it took."""
        model, device, began = self.model, self.model.freqs_cis.device, time.perf_counter()
        longest = FEW_ROWS + 1 if self.compile_prefill else self.width
        for T in {1, 2, self.width + 1, FEW_ROWS + 1} & {*range(longest + 1)}:
            idx = torch.zeros(batch_size, T, dtype=torch.int64, device=device)
            input_pos = torch.full_like(idx, model.max_seq_length)  # the spare slot
            last = None if T <= self.width else input_pos.new_zeros(batch_size)
            for _ in range(3):  # a CUDA graph is compiled, recorded and replayed
                self.step(idx, input_pos, model.kv_steps(1), last)
        synchronize(device)
        return time.perf_counter() - began

    def prefill(self, prompts: list[list[int]], start: int = 0) -> Tensor:
        """Run each prompt's tokens from `start` on; logits `[B, V]` after the last of each.

        The cache must hold the first `start` tokens of every prompt, and every prompt go further.
        Rows are padded on the right; padding stands at the cache's spare slot.
        """
        spare, device = self.model.max_seq_length, self.model.freqs_cis.device
        logits = torch.zeros((), device=device)
        for begin in range(start, max(map(len, prompts)), PREFILL_CHUNK):
            chunk = [prompt[begin : begin + PREFILL_CHUNK] for prompt in prompts]
            T = max(map(len, chunk))
            idx = [row + [0] * (T - len(row)) for row in chunk]
            pos = [[*range(begin, begin + len(row))] + [spare] * (T - len(row)) for row in chunk]
            last = [max(len(row) - 1, 0) for row in chunk]
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


def check_prompt(prompt: list[int], model: Transformer) -> None:
    """Raise a `UserError` if the model cannot take this prompt."""
    if not prompt:
        raise UserError("the prompt is empty and this model has no BOS token; pass a text")
    if max(prompt) >= model.args.vocab_size:
        raise UserError(
            f"the prompt has the token {max(prompt)} and the model only {model.args.vocab_size}; "
            "put the model's own tokenizer beside it"
        )
    if len(prompt) > model.max_seq_length:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the cache {model.max_seq_length} positions; "
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
        length = min(int(args.prompt), 2**24)  # longer than any context
        return [torch.randint(vocab_size, (length,), generator=generator).tolist()]
    else:
        texts = [tp.same(sys.stdin.read).removesuffix("\n") if args.prompt == "-" else args.prompt]
    return [tokenize(tokenizer, [*opening(args), user(text)], args.chat) for text in texts]


def opening(args: Namespace) -> list[dict]:
    """The messages that every conversation starts with."""
    return [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []


def user(text: str) -> dict:
    """A message of the user's, as chat templates want it."""
    return {"role": "user", "content": text}


def answer(
    engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]], args: Namespace, **kwargs
) -> tuple[list[list[int]], list[float]]:
    """Generate for each prompt, printing a single text as it is made.

    Returns the new tokens of each and the times, in seconds, of the start and of each step's end.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    stream = StreamDecoder(tokenizer, prompts[0])
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    limits = (args.max_new_tokens, tokenizer.eos_ids)
    times = [time.perf_counter()]
    try:
        for tokens in generate(engine, prompts, sampling, *limits, **kwargs):
            times.append(time.perf_counter())
            for row, token in zip(rows, tokens, strict=True):
                row += [] if token is None else [token]
            if len(prompts) == 1:
                print(stream.push(tokens[0]), end="", flush=True)
    except KeyboardInterrupt:
        if not args.interactive:
            raise
    if len(prompts) == 1:
        print(stream.flush())
    return rows, times


def measure(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    rows: list[list[int]],
    times: list[float],
    args: Namespace,
) -> dict:
    """Print and return the figures of one `answer`."""
    model, steps = engine.model, len(times) - 2  # decoding steps: all but the prefill's

    def ending(prompt: list[int], row: list[int]) -> str:
        if row and row[-1] in tokenizer.eos_ids:
            return "end of text"
        if len(row) == args.max_new_tokens:
            return "max_new_tokens"
        return "full cache" if len(prompt) + len(row) > model.max_seq_length else "Ctrl-C"

    record: dict = {"prompt_tokens": [*map(len, prompts)], "new_tokens": [*map(len, rows)]}
    record["ended_by"] = [*map(ending, prompts, rows)]
    line = f"[{sum(record['prompt_tokens'])} prompt tokens, {sum(record['new_tokens'])} new"
    line += f", ended by {', '.join(sorted(set(record['ended_by'])))}"
    if steps >= 0:
        record["first_token_s"] = times[1] - times[0]
        line += f"; first token {record['first_token_s'] * 1e3:.0f} ms"
    if steps > 0:
        first = max(record["prompt_tokens"]) + 1
        seen = sum(model.kv_steps(first + step) for step in range(steps)) / steps
        record["tokens_per_s"] = steps / (times[-1] - times[1])
        record["gb_per_s"] = model.bytes_per_step(seen) * record["tokens_per_s"] / 1e9
        line += f"; {record['tokens_per_s']:.1f} tokens/s, {record['gb_per_s']:.1f} GB/s"
    print(line + "]", file=sys.stderr)
    return record


def complete(
    engine: Engine, tokenizer: Tokenizer, prompts: list[list[int]], batch_size: int, args: Namespace
) -> list[dict]:
    """Continue every prompt `num_samples` times, `batch_size` prompts at once; figures of each."""
    records = []
    echo = not args.chat and not is_length(args.prompt)
    for first in list(range(0, len(prompts), batch_size)) * args.num_samples:
        group = prompts[first : first + batch_size]
        if echo and batch_size == 1:
            print(tokenizer.decode(group[0]), end="", flush=True)
        padding = group[-1:] * (batch_size - len(group))  # another batch size would compile anew
        seed = args.seed + len(records)
        rows, times = answer(engine, tokenizer, group + padding, args, seed=seed)
        if batch_size > 1:
            for i, prompt in enumerate(group):
                text = tokenizer.decode(prompt + rows[i] if echo else rows[i])
                print(f"--- {first + i}\n{text}")
        records.append(measure(engine, tokenizer, group, rows[: len(group)], times, args))
    return records


def read_line() -> str:
    """What the user types next: /quit at the end of the input, nothing after Ctrl-C."""
    try:
        return input("> ").strip()
    except EOFError:
        return "/quit"
    except KeyboardInterrupt:
        print()
        return ""


def converse(engine: Engine, tokenizer: Tokenizer, args: Namespace) -> list[dict]:
    """Talk until /quit or the end of the input; each turn prefills only what the cache lacks."""
    messages, cached, records = opening(args), [], []
    print("/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        text = tp.same(read_line)
        if text == "/quit":
            return records
        if text == "/reset":
            messages, cached = opening(args), []
        if text in ("", "/reset"):
            continue
        try:
            prompt = tokenize(tokenizer, [*messages, user(text)], args.chat)
            check_prompt(prompt, engine.model)
        except UserError as error:
            print(f"{error}, or /reset", file=sys.stderr)
            continue
        known = os.path.commonprefix([cached, prompt[:-1]])  # it takes lists as well as paths
        where = {"start": len(known), "seed": args.seed + len(records)}
        (new,), times = answer(engine, tokenizer, [prompt], args, **where)
        cached = prompt + new[:-1] if new else known  # the last token was not fed to the model
        messages += [user(text), {"role": "assistant", "content": tokenizer.decode(new)}]
        records.append(measure(engine, tokenizer, [prompt], [new], times, args))
        records[-1]["prefilled_tokens"] = len(prompt) - len(known)


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
    add("--compile", nargs="?", const="block", choices=["block", "whole"], help="compile decoding")
    add("--compile_prefill", action="store_true", help="compile prefill, too")
    add(
        "--profile", type=output_file, metavar="FILE", help="write a chrome trace of the generation"
    )
    add("--json", type=output_file, metavar="FILE", help="write the figures as JSON")
    return parser


def main(args: Namespace) -> None:
    args.chat = args.interactive if args.chat is None else args.chat
    if args.system_prompt and not args.chat:
        raise UserError("--system_prompt is for chats; add --chat")
    if args.interactive and (args.batch_size or 1) > 1:
        raise UserError("--interactive is one conversation; leave --batch_size out")
    device, shard = tp.start(args.device)
    if shard and shard.rank:  # rank 0 writes the files
        args.profile = args.json = None
    path = args.checkpoint_path or tp.in_turn(default_checkpoint)
    began = time.perf_counter()
    model, tokenizer = load(path, device, args.precision, shard)
    synchronize(device)
    load_s = time.perf_counter() - began

    prompts = [] if args.interactive else read_prompts(args, tokenizer, model.args.vocab_size)
    batch_size = args.batch_size or (len(prompts) if args.prompts_file else 1)
    if not args.prompts_file:
        prompts *= batch_size
    longest = max(map(len, prompts), default=0) + args.max_new_tokens
    length = args.max_seq_length or min(max(longest, 2048), model.args.block_size)
    if length > model.args.block_size:
        raise UserError(f"--max_seq_length is over the model's context, {model.args.block_size}")
    try:
        model.setup_caches(batch_size, length)
    except RuntimeError:  # the allocator's
        raise UserError(
            f"there is no room for a KV cache of {batch_size} rows of {length} positions; "
            "lower --batch_size or --max_seq_length"
        ) from None
    for prompt in prompts:
        check_prompt(prompt, model)
    engine = Engine(model, args.compile, args.compile_prefill)
    compile_s = engine.warm_up(batch_size) if args.compile or args.compile_prefill else 0.0

    profiler = torch.profiler.profile() if args.profile else contextlib.nullcontext()
    with profiler:
        if args.interactive:
            records = converse(engine, tokenizer, args)
        else:
            records = complete(engine, tokenizer, prompts, batch_size, args)
    communication = shard.cost(model, batch_size) if shard else {}
    tp.finish(shard)
    if args.profile:
        with replacing(args.profile) as temporary:
            profiler.export_chrome_trace(str(temporary))
    settings = {"checkpoint": str(path), "device": str(device), "torch": torch.__version__}
    settings |= {"precision": args.precision, "compile": args.compile} | communication
    report(args, records, **settings, load_s=load_s, compile_s=compile_s)


def report(args: Namespace, records: list[dict], **totals) -> None:
    """Print what the whole run took and, with --json, write all figures to a file."""
    if torch.device(totals["device"]).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = f"load {totals['load_s']:.2f} s, compile {totals['compile_s']:.2f} s"
    if speeds := [record["tokens_per_s"] for record in records if "tokens_per_s" in record]:
        line = f"median of {len(speeds)}: {statistics.median(speeds):.1f} tokens/s; {line}"
    print(f"[{line}, peak memory {peak / 1e9:.2f} GB]", file=sys.stderr)
    if args.json:
        totals |= {"peak_memory_bytes": peak, "samples": records}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(totals, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, make_parser())
