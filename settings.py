"""Settings of a single text: flags of generate.py, and keys of a request to jsonl.py.

They are declared once, as flags; requests are checked by the same parser.
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from typing import Any

from cli import Parser, UserError, bounded, replaced
from model import Transformer


def add_text_flags(parser: Parser) -> None:
    """Declare the settings of a text: flags of generate.py, and keys of a request."""
    add, share = parser.group("length and stops"), bounded(float, 0, 1)
    about = "maximum number of new tokens (default: 200)"
    add("--max_new_tokens", type=bounded(int, 1), default=200, metavar="N", help=about)
    about = "no end-of-text token before N new tokens; stop texts still end a text"
    add("--min_new_tokens", type=bounded(int, 0), default=0, metavar="N", help=about)
    about = "end before this text, which is not printed; may be given several times"
    add("--stop", type=stop_text, action="append", default=[], metavar="TEXT", help=about)

    add = parser.group("sampling")
    about = "0: greedy (default: 0.8)"
    add("--temperature", type=bounded(float, 0, 100), default=0.8, metavar="T", help=about)
    about = "keep the K likeliest tokens; 0: all (default: 200)"
    add("--top_k", type=bounded(int, 0), default=200, metavar="K", help=about)
    about = "nucleus sampling: the smallest set with total probability of at least P (default: 1)"
    add("--top_p", type=share, default=1.0, metavar="P", help=about)
    about = "drop tokens less than P times as likely as the likeliest (default: 0)"
    add("--min_p", type=share, default=0.0, metavar="P", help=about)
    about = "seed of the first text; each text has the next (default: 1234)"
    add("--seed", type=bounded(int, 0, 2**62), default=1234, metavar="N", help=about)
    about = "divide positive logits of tokens seen so far by R, multiply negative ones (default: 1)"
    options = dict(type=bounded(float, 0.01, 100), default=1.0, metavar="R", help=about)
    add("--repetition_penalty", **options)
    about = "subtract P from the logits of tokens generated so far (default: 0)"
    options = dict(type=bounded(float, -2, 2), default=0.0, metavar="P", help=about)
    add("--presence_penalty", **options)
    about = "add VALUE to a token's logit; may be given several times"
    options = dict(type=logit_bias, action="append", default=[], metavar="ID=VALUE", help=about)
    add("--logit_bias", **options)

    add = parser.group("log probabilities")
    about = "of each new token, and of the N likeliest beside it"
    add("--logprobs", type=bounded(int, 0), metavar="N", help=about)
    about = "of the prompt's tokens"
    add("--prompt_logprobs", action=BooleanOptionalAction, default=False, help=about)


def stop_text(value: str) -> str:
    """An argparse type: a text that is not empty."""
    if not value:
        raise ArgumentTypeError("an empty text would stop at once; give at least one character")
    return value


def logit_bias(value: str) -> tuple[int, float]:
    """An argparse type: a token id and its bias."""
    token, equals, bias = value.partition("=")
    if not equals:
        raise ArgumentTypeError(f"{value!r} is not ID=VALUE, such as 198=-100")
    return bounded(int, 0)(token), bounded(float, -100, 100)(bias)


def check_settings(args: Namespace, model: Transformer) -> None:
    """Raise a `UserError` if settings do not fit the model's vocabulary."""
    size = model.args.vocab_size
    if args.min_new_tokens > args.max_new_tokens:
        numbers = f"{args.min_new_tokens}, more than max_new_tokens, {args.max_new_tokens}"
        raise UserError(f"min_new_tokens is {numbers}; lower it or raise the other")
    for token, _ in args.logit_bias:
        if token >= size:
            raise UserError(f"logit_bias names token {token}; the model's are 0 to {size - 1}")
    if (args.logprobs or 0) > size:
        raise UserError(f"logprobs is {args.logprobs}, but the model has only {size} tokens")


class Settings(Parser):
    """A parser of these flags alone."""

    def __init__(self):
        super().__init__(None)
        add_text_flags(self)
        self.defaults = vars(self.parse_args([]))

    def error(self, message: str):
        raise UserError(message.removeprefix("argument --"))

    def read(self, values: dict, defaults: Namespace) -> Namespace:
        """The settings of a request; the command line's are the defaults."""
        flags = []
        for key, value in values.items():
            if key not in self.defaults:
                raise UserError(f"there is no key {key!r}; docs/jsonl.md lists them")
            flags += as_flags(key, value)
        own = {key: [] for key in values if self.defaults[key] == []}  # not the command line's list
        return self.parse_args(flags, replaced(defaults, **own))


def as_flags(key: str, value: Any) -> list[str]:
    """A JSON value as flags: a number, or a list or object where a flag may be repeated."""
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
            raise UserError(f"{key}: {json.dumps(value)} has the wrong type; see docs/jsonl.md")
    return [f"--{key}={value}"]
