"""The interface for other programs: JSON requests in, JSON records out, one a line.

Pending requests run as a batch, up to --batch_size of them. Each has its own settings and seed, so
its text does not depend on the batch. A bad request is answered by an error record. docs/jsonl.md
describes the format.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from cli import UserError, parse_object
from files import LONGEST
from prompts import PROMPTS, check_prompt, read_context, requested_prompt
from reuse import CachedRows
from settings import Settings, check_settings
from shaping import Reply, describe, run_replies, score_prompt


def parse(line: str) -> dict:
    """Parse a line into a JSON object, whose id can be answered."""
    with contextlib.suppress(ValueError):
        request = parse_object(line)
        json.dumps(request.get("id"), allow_nan=False)
        return request
    raise UserError(f"this line is not a JSON object: {line.strip()[:60]!r}; send one a line")


class Server:
    """Answers requests; `session` is generate.py's, with an engine, a tokenizer and the flags."""

    def __init__(self, session: Any):
        self.session, self.args, self.tokenizer = session, session.args, session.tokenizer
        self.engine, self.settings = session.engine, Settings()
        context = len(read_context(self.args, self.tokenizer))
        self.cached = CachedRows(self.engine, self.args.batch_size, context)
        self.totals = {"requests": 0, "errors": 0, "new_tokens": 0, "seconds": 0.0}

    def write(self, name: Any, record: dict) -> None:
        self.totals["errors"] += "error" in record
        print(json.dumps({"id": name} | record), flush=True)

    def read(self, line: str) -> tuple[Any, Reply] | None:
        """The id and the `Reply` of a request; for a bad one an error record, and None."""
        request, model = {}, self.engine.model
        self.totals["requests"] += 1
        try:
            request = parse(line)
            values = {k: v for k, v in request.items() if k not in ("id", *PROMPTS)}
            args = self.settings.read(values, self.args)
            check_settings(args, model)
            prompt = requested_prompt(request, self.args, self.tokenizer)
            check_prompt(prompt, model)
        except UserError as error:
            return self.write(request.get("id"), {"error": str(error)})
        return request.get("id"), Reply(self.tokenizer, model, prompt, args)

    def run(self, requests: list[tuple[Any, Reply]]) -> None:
        """Run requests as a batch, a row each, and stream their records."""
        began, model = time.perf_counter(), self.engine.model
        empty = Reply(self.tokenizer, model, [], self.args)
        try:
            for pair in requests:
                self.score(*pair)
            rows, start = self.cached.place([reply.prompt for _, reply in requests])
            placed = dict(zip(rows, requests, strict=True))
            batch = [placed.get(row, (None, empty))[1] for row in range(self.args.batch_size)]
            for texts in run_replies(self.session.decode, batch, start):
                for row, (name, reply) in placed.items():
                    if texts[row] is not None:
                        self.tell(name, reply, texts[row], began)
            for row, (_, reply) in placed.items():
                self.cached.keep(row, reply.prompt, reply.ids)
        except UserError as error:
            self.cached.forget()
            for name in (name for name, reply in requests if not reply.ended_by):
                self.write(name, {"error": str(error)})
        self.totals["seconds"] += time.perf_counter() - began

    def score(self, name: Any, reply: Reply) -> None:
        """Write the log probabilities of a prompt's tokens, if requested."""
        if reply.args.prompt_logprobs:
            tokens = score_prompt(self.engine, reply.prompt, reply.args.logprobs or 0)
            self.cached.keep(0, reply.prompt[:-1])
            self.write(name, {"prompt_logprobs": describe(self.tokenizer, tokens)})

    def tell(self, name: Any, reply: Reply, text: str, began: float) -> None:
        """Write the text that a step added and, at its end, the final record."""
        text += reply.flush() if reply.ended_by else ""
        record = {"delta": text}
        if reply.args.logprobs is not None:
            record["tokens"] = describe(self.tokenizer, reply.tokens[-1:])
        if text or len(record) > 1:
            self.write(name, record)
        if reply.ended_by:
            self.totals["new_tokens"] += len(reply.tokens)
            prefilled = len(reply.prompt) - self.engine.cached_tokens
            last = {"text": reply.text, "reason": reply.ended_by, "prefilled_tokens": prefilled}
            last |= {"prompt_tokens": len(reply.prompt), "new_tokens": len(reply.tokens)}
            self.write(name, last | {"seconds": time.perf_counter() - began})


def read_lines(lines: SimpleQueue) -> None:
    """Put the lines of standard input into a queue, then None.

    Not by `sys.stdin`: a blocked thread would hold its lock when the program exits.
    """
    try:
        with open(sys.stdin.fileno(), "rb", closefd=False) as source:
            for line in iter(lambda: source.readline(LONGEST), b""):
                lines.put(line.decode(errors="replace"))
    finally:
        lines.put(None)


def waiting(lines: SimpleQueue, count: int) -> list[str | None]:
    """The next line and pending ones after it, up to `count`; None marks the end."""
    group = [lines.get()]
    while len(group) < count and group[-1] is not None and not lines.empty():
        group.append(lines.get())
    return group


def groups(count: int) -> Iterator[list[str | None]]:
    """Yield groups of pending lines. Reading starts with the first `next`: only rank 0 calls it."""
    lines = SimpleQueue()
    threading.Thread(target=read_lines, args=(lines,), daemon=True).start()
    while True:
        yield waiting(lines, count)


def serve(session: Any, agree: Callable[[Callable[[], list]], list]) -> dict:
    """Answer requests until the end of input; returns totals. `agree` broadcasts rank 0's lines."""
    server, found, group = Server(session), groups(session.args.batch_size), [""]
    while group[-1] is not None:
        group = agree(lambda: next(found))
        texts = [line for line in group if line and line.strip()]
        if requests := [request for request in map(server.read, texts) if request]:
            server.run(requests)
    return server.totals
