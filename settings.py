"""What each text may have of its own: flags of generate.py, and keys of a request to jsonl.py.

They are declared once, as flags, and both kinds of values are checked by the same parser.
"""

from __future__ import annotations

import copy
import json
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from typing import Any

from cli import Parser, UserError, number
from model import Transformer


def add_text_flags(parser: ArgumentParser) -> None:
    """Declare what each text may have of its own: flags of generate.py, keys of a request."""
    add, share = parser.add_argument, number(float, 0, 1)
    add("--max_new_tokens", type=number(int, 1), default=200)
    text = "end no text before it has N new tokens, but by a stop text"
    add("--min_new_tokens", type=number(int, 0), default=0, metavar="N", help=text)
    text = "end a text where it says TEXT, which is not printed; may be given several times"
    add("--stop", type=stop_text, action="append", default=[], metavar="TEXT", help=text)
    text = "0: always the likeliest token"
    add("--temperature", type=number(float, 0, 100), default=0.8, help=text)
    add("--top_k", type=number(int, 0), default=200, help="draw from the K likeliest; 0: from all")
    text = "nucleus sampling: the smallest set with total probability of at least P"
    add("--top_p", type=share, default=1.0, metavar="P", help=text)
    text = "drop tokens less than P times as likely as the likeliest"
    add("--min_p", type=share, default=0.0, metavar="P", help=text)
    add("--seed", type=number(int, 0, 2**62), default=1234)
    text = "divide the scores of tokens of the prompt and the text by this (below 0: multiply)"
    add("--repetition_penalty", type=number(float, 0.01, 100), default=1.0, help=text)
    text = "subtract this from the scores of tokens of the text"
    add("--presence_penalty", type=number(float, -2, 2), default=0.0, help=text)
    text = "add VALUE to a token's score; may be given several times"
    options = dict(type=logit_bias, action="append", default=[], metavar="ID=VALUE", help=text)
    add("--logit_bias", **options)
    text = "log probabilities of the new tokens and, beside each, of the N likeliest"
    add("--logprobs", type=number(int, 0), metavar="N", help=text)
    text = "log probabilities of the prompt's tokens, too"
    add("--prompt_logprobs", action=BooleanOptionalAction, default=False, help=text)


def stop_text(value: str) -> str:
    """An argparse type: a text that is not empty."""
    if not value:
        raise ArgumentTypeError("an empty text stands everywhere; give a character at least")
    return value


def logit_bias(value: str) -> tuple[int, float]:
    """An argparse type: a token id and what its logit is raised by."""
    token, equals, bias = value.partition("=")
    if not equals:
        raise ArgumentTypeError(f"{value!r} is not ID=VALUE, such as 198=-100")
    return number(int, 0)(token), number(float, -100, 100)(bias)


def check_settings(args: Namespace, model: Transformer) -> None:
    """Raise a `UserError` if settings do not fit the model's vocabulary."""
    size = model.args.vocab_size
    if args.min_new_tokens > args.max_new_tokens:
        numbers = f"{args.min_new_tokens}, more than max_new_tokens, {args.max_new_tokens}"
        raise UserError(f"min_new_tokens is {numbers}; lower it or raise the other")
    for token, _ in args.logit_bias:
        if token >= size:
            raise UserError(f"logit_bias names the token {token}; the model has 0 to {size - 1}")
    if (args.logprobs or 0) > size:
        raise UserError(f"logprobs is {args.logprobs}, and the model has only {size} tokens")


class Settings(Parser):
    """A parser of these flags alone."""

    def __init__(self):
        super().__init__(None)
        add_text_flags(self)
        self.defaults = vars(self.parse_args([]))

    def error(self, message: str):
        raise UserError(message.removeprefix("argument --"))

    def read(self, values: dict, defaults: Namespace) -> Namespace:
        """The settings of a request; where it has none, those of the command line."""
        args, flags = copy.copy(defaults), []
        for key, value in values.items():
            if key not in self.defaults:
                raise UserError(f"there is no key {key!r}; docs/jsonl.md lists them")
            if self.defaults[key] == []:
                setattr(args, key, [])  # its own list, not one behind the command line's
            flags += as_flags(key, value)
        return self.parse_args(flags, args)


def as_flags(key: str, value: Any) -> list[str]:
    """A JSON value as flags: numbers, and where a flag may come several times, a list or object."""
    match key, value:
        case _, None:
            return []
        case "prompt_logprobs", bool():
            return [f"--{'' if value else 'no-'}{key}"]
        case "stop", list() if all(isinstance(text, str) for text in value):
            return [f"--{key}={text}" for text in value]
        case "logit_bias", dict():
            return [f"--{key}={token}={bias}" for token, bias in value.items()]
        case ("prompt_logprobs" | "stop" | "logit_bias", _) | (_, bool() | str() | list() | dict()):
            raise UserError(f"{key}: {json.dumps(value)} is of another type than it should be")
    return [f"--{key}={value}"]
