"""Requests in, records out, a JSON object a line: how another program drives the model.

Requests that wait on standard input run together, up to --batch_size of them. Each has settings
and a seed of its own, so its text does not depend on the group. A request that is wrong gets an
error as its record. docs/jsonl.md shows both ends.
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

from cli import LONGEST, UserError
from prompts import PROMPTS, check_prompt, read_context, requested_prompt
from reuse import CachedRows
from settings import Settings, check_settings
from shaping import Reply, describe, run_replies, score_prompt


def parse(line: str) -> dict:
    """The object that a line holds."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(request := json.loads(line), dict):
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
        """The id and the text to be made of a request; an error record and None if it is wrong."""
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
        """Run requests together, a row each, and write their records as they come."""
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
        """Write the log probabilities of a prompt's tokens, if they are asked for."""
        if reply.args.prompt_logprobs:
            tokens = score_prompt(self.engine, reply.prompt, reply.args.logprobs or 0)
            self.cached.keep(0, reply.prompt[:-1])
            self.write(name, {"prompt_logprobs": describe(self.tokenizer, tokens)})

    def tell(self, name: Any, reply: Reply, text: str, began: float) -> None:
        """Write what a step has added to a text and, once it has ended, the last record."""
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
    """Put the lines of standard input into a queue as they come, then None.

    Not from `sys.stdin`, whose lock a thread that waits would still hold when the program ends.
    """
    try:
        with open(sys.stdin.fileno(), "rb", closefd=False) as source:
            for line in iter(lambda: source.readline(LONGEST), b""):
                lines.put(line.decode(errors="replace"))
    finally:
        lines.put(None)


def waiting(lines: SimpleQueue, count: int) -> list[str | None]:
    """The next line, and those that wait behind it: up to `count`, with None at the end."""
    group = [lines.get()]
    while len(group) < count and group[-1] is not None and not lines.empty():
        group.append(lines.get())
    return group


def groups(count: int) -> Iterator[list[str | None]]:
    """What waits on standard input, again and again; nothing is read before the first is asked for,
    so that of several ranks only the one that asks does read."""
    lines = SimpleQueue()
    threading.Thread(target=read_lines, args=(lines,), daemon=True).start()
    while True:
        yield waiting(lines, count)


def serve(session: Any, agree: Callable[[Callable[[], list]], list]) -> dict:
    """Answer requests until their end; the totals. `agree` gives all ranks what the first read."""
    server, found, group = Server(session), groups(session.args.batch_size), [""]
    while group[-1] is not None:
        group = agree(lambda: next(found))
        texts = [line for line in group if line and line.strip()]
        if requests := [request for request in map(server.read, texts) if request]:
            server.run(requests)
    return server.totals
