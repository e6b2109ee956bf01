"""Prompts as token ids: texts and conversations, the shared context, and what a model accepts."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from cli import UserError
from model import Transformer
from tokenizer import Tokenizer


def read_stdin(read: Callable[[int], str]) -> str:
    """What `read` gives of standard input; UserError if it does not end, as /dev/zero."""
    text = read(2**26)
    if len(text) == 2**26:
        raise UserError("standard input is longer than any context; pass a text of this model's")
    return text


def user_message(text: str) -> dict:
    """A user message, as chat templates expect it."""
    return {"role": "user", "content": text}


def initial_messages(args: Namespace) -> list[dict]:
    """The first message of every conversation: the context, then the system prompt."""
    content = "\n\n".join(filter(None, (args.prefill_context, args.system_prompt)))
    return [{"role": "system", "content": content}] if content else []


def tokenize(tokenizer: Tokenizer, messages: list[dict], chat: bool) -> list[int]:
    """Tokenize a conversation, in the model's chat format or as plain text."""
    if chat:
        return tokenizer.chat(messages)
    return tokenizer.encode("".join(message["content"] for message in messages))


def read_context(args: Namespace, tokenizer: Tokenizer) -> list[int]:
    """The tokens of the context; the last of them may merge with the start of a prompt.

    In the chat format they are the common prefix of two conversations.
    """
    if not args.prefill_context:
        return []
    if not args.chat:
        return tokenize(tokenizer, initial_messages(args), chat=False)
    chats = [
        tokenize(tokenizer, [*initial_messages(args), user_message(text)], chat=True)
        for text in ("a", "b")
    ]
    return os.path.commonprefix(chats)


PROMPTS = ("prompt", "messages", "ids")  # a request has one of these keys


def requested_prompt(request: dict, args: Namespace, tokenizer: Tokenizer) -> list[int]:
    """The prompt of a request to jsonl.py; `UserError` unless there is exactly one."""

    def is_message(value: Any) -> bool:
        texts = [value.get(k) for k in ("role", "content")] if isinstance(value, dict) else [None]
        return all(isinstance(text, str) for text in texts)

    match [(key, request[key]) for key in PROMPTS if key in request]:
        case [("prompt", str(text))]:
            messages = [*initial_messages(args), user_message(text)]
            return tokenize(tokenizer, messages, args.chat)
        case [("messages", [_, *_] as messages)] if all(map(is_message, messages)):
            return tokenize(tokenizer, [*initial_messages(args), *messages], chat=True)
        case [("ids", [*ids])] if all(type(i) is int and i >= 0 for i in ids):
            return ids
    kinds = "a string, messages with role and content, or integers"
    raise UserError(f"a request has exactly one of prompt, messages and ids: {kinds}")


def check_prompt(prompt: list[int], model: Transformer, what: str = "prompt") -> None:
    """Raise a `UserError` if the model cannot run this prompt."""
    if not prompt:
        raise UserError("the prompt is empty and this model has no BOS token; pass a text")
    if max(prompt) >= model.args.vocab_size:
        raise UserError(
            f"the {what} has token {max(prompt)}, the model has {model.args.vocab_size} tokens; "
            "put the model's own tokenizer beside it"
        )
    if len(prompt) > model.max_seq_length:
        raise UserError(
            f"the {what} has {len(prompt)} tokens and the cache {model.max_seq_length} positions; "
            f"shorten it or raise --max_seq_length, which may be up to {model.args.block_size}"
        )
