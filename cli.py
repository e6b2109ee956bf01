"""What command lines have in common: user errors, flags, and the files that may be left out."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEPEST = 64  # objects and lists within each other in a JSON text
PRECISIONS = ("bfloat16", "float16", "float32")


class UserError(Exception):
    """A user's mistake, in one sentence: what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage.

    Its help shows the first line and the commands of a script's docstring.
    """

    def __init__(self, doc: str | None):
        first, *lines = (doc or "").split("\n")
        commands = [line[2:] for line in lines if line.startswith(("    python ", "    torchrun "))]
        epilog = "\n".join(["examples:", *commands]) if commands else None
        options = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        super().__init__(description=first, epilog=epilog, **options)

    def group(self, title: str) -> Callable[..., argparse.Action]:
        """A named part of the help, as the method that adds a flag to it."""
        return self.add_argument_group(title).add_argument

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def optional(name: str, *needed: str) -> Any:
    """The module `name`, or None if its file or a package it needs is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, *needed):
            raise
        return None


def bounded(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` to `high`, inclusive."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            bound = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r:.80} is not {noun} {bound}")
        return value

    return parse


def replaced(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """A copy of parsed flags with changes; the original stays as typed."""
    return argparse.Namespace(**vars(args) | changes)


def refuse(*contradictions: tuple[Any, str]) -> None:
    """Raise a `UserError` for the first row of a table that holds: `(condition, sentence)`."""
    for holds, sentence in contradictions:
        if holds:
            raise UserError(sentence)


def json_object(text: str) -> dict:
    """An argparse type: a JSON object."""
    try:
        return parse_object(text)
    except ValueError:
        example = '{"enable_thinking": false}'
        problem = f"{text!r:.80} is no JSON object such as {example}"
        raise argparse.ArgumentTypeError(problem) from None


def parse_object(text: str) -> dict:
    """The object that a JSON text holds; ValueError if it holds none.

    One that is nested so deep that nothing else here could go through it counts as none.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level = [value] if isinstance(value, dict) else []
    if not level:
        raise ValueError("it holds no object")
    for _ in range(DEEPEST):
        parts = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return value


def named(text: str) -> str:
    """An argparse type: a name that a UTF-8 report can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = f"the name {text!r:.300} is not UTF-8; give it another"
        raise argparse.ArgumentTypeError(problem) from None
    return text


def named_path(text: str) -> Path:
    """An argparse type: a path; an empty one would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give a path")
    return Path(named(text))


def add_checkpoint_flags(parser: Parser) -> Callable[..., argparse.Action]:
    """Declare the flags of every script that reads a checkpoint; returns the group's `add`."""
    add = parser.group("model")
    add("--checkpoint_path", type=named_path, help="a model.pth (default: SmolLM2-135M-Instruct)")
    about = "cpu, cuda, cuda:1, mps, xpu (default: $DEVICE, else cuda if available)"
    add("--device", help=about)
    return add


def add_model_flags(parser: Parser) -> Callable[..., argparse.Action]:
    """Declare the flags of every script that runs a model; returns the group's `add`."""
    add = add_checkpoint_flags(parser)
    about = "of activations and unquantized weights (default: bfloat16)"
    add("--precision", default="bfloat16", choices=PRECISIONS, help=about)
    about = "positions in the KV cache (default: 2048, or what prompts need; eval.py: the context)"
    add("--max_seq_length", type=bounded(int, 2), help=about)
    return add
