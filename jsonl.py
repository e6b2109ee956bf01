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
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from cli import UserError
from prompts import check_prompt, initial_messages, read_context, tokenize, user_message
from reuse import CachedRows
from settings import Settings, check_settings
from shaping import Reply, describe, run_replies, score_prompt

PROMPTS = ("prompt", "messages", "ids")


def parse(line: str) -> dict:
    """The object that a line holds."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(request := json.loads(line), dict):
            return request
    raise UserError(f"this line is not a JSON object: {line.strip()[:60]!r}; send one a line")


def is_message(value: Any) -> bool:
    fields = [value.get(key) for key in ("role", "content")] if isinstance(value, dict) else [None]
    return all(isinstance(field, str) for field in fields)


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
            prompt = self.read_prompt(request)
            check_prompt(prompt, model)
        except UserError as error:
            return self.write(request.get("id"), {"error": str(error)})
        return request.get("id"), Reply(self.tokenizer, model, prompt, args)

    def read_prompt(self, request: dict) -> list[int]:
        before = initial_messages(self.args)
        match [(key, request[key]) for key in PROMPTS if key in request]:
            case [("prompt", str(text))]:
                return tokenize(self.tokenizer, [*before, user_message(text)], self.args.chat)
            case [("messages", [_, *_] as messages)] if all(map(is_message, messages)):
                return tokenize(self.tokenizer, [*before, *messages], chat=True)
            case [("ids", [*ids])] if all(type(i) is int and i >= 0 for i in ids):
                return ids
        kinds = "a text, messages (role and content, both texts) or ids (whole numbers)"
        raise UserError(f"a request has one of prompt, messages and ids: {kinds}")

    def run(self, requests: list[tuple[Any, Reply]]) -> None:
        """Run requests together, a row each, and write their records as they come."""
        began, empty = time.perf_counter(), Reply(self.tokenizer, self.engine.model, [], self.args)
        batch = [empty] * self.args.batch_size
        try:
            for name, reply in requests:
                self.score(name, reply)
            rows, start = self.cached.place([reply.prompt for _, reply in requests])
            for row, (_, reply) in zip(rows, requests, strict=True):
                batch[row] = reply
            for texts in run_replies(self.session.decode, batch, start):
                for row, (name, reply) in zip(rows, requests, strict=True):
                    if texts[row] is not None:
                        self.tell(name, reply, texts[row], began)
            for row, (_, reply) in zip(rows, requests, strict=True):
                self.cached.keep(row, reply.prompt, reply.ids)
        except UserError as error:
            self.cached.forget()
            for name, _ in (pair for pair in requests if not pair[1].ended_by):
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
            last = {"text": reply.text, "reason": reply.ended_by}
            last |= {"prompt_tokens": len(reply.prompt), "new_tokens": len(reply.tokens)}
            last |= {"prefilled_tokens": len(reply.prompt) - self.engine.cached_tokens}
            self.write(name, last | {"seconds": time.perf_counter() - began})


def read_lines(lines: SimpleQueue) -> None:
    """Put the lines of standard input into a queue as they come, then None.

    Not from `sys.stdin`, whose lock a thread that waits would still hold when the program ends.
    """
    with open(sys.stdin.fileno(), "rb", closefd=False) as source:
        for line in source:
            lines.put(line.decode(errors="replace"))
    lines.put(None)


def waiting(lines: SimpleQueue, count: int) -> list[str | None]:
    """The next line, and those that wait behind it: up to `count`, with None at the end."""
    group = [lines.get()]
    while len(group) < count and group[-1] is not None and not lines.empty():
        group.append(lines.get())
    return group


def serve(session: Any, agree: Callable[[Callable[[], list]], list]) -> dict:
    """Answer requests until their end; the totals. `agree` gives all ranks what the first read."""
    server, lines, group = Server(session), SimpleQueue(), [""]
    threading.Thread(target=read_lines, args=(lines,), daemon=True).start()
    while group[-1] is not None:
        group = agree(lambda: waiting(lines, session.args.batch_size))
        texts = [line for line in group if line and line.strip()]
        if requests := [request for request in map(server.read, texts) if request]:
            server.run(requests)
    return server.totals
