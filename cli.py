"""What the scripts share: user errors, flags, and atomic writes of files.

A user's mistake is a `UserError`: `run` prints one line and exits with code 2. Any other exception
is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
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


def named_path(text: str) -> Path:
    """An argparse type: a path; an empty one would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give a path")
    return Path(text)


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
    about = "positions in the KV cache (default: what the prompts need)"
    add("--max_seq_length", type=number(int, 2), help=about)
    return add


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Run `main` on the parsed command line; exit with 2 on a `UserError`, with 130 on Ctrl-C."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = int(os.environ.get("RANK", 0)) if several else 0
    if several:  # under torchrun a Python handler would wait for a collective to return
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:  # by an exception, so that temporary files are removed
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if rank:  # only rank 0 prints
        sys.stdout = sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout):  # a terminal may not encode every character
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main(parser.parse_args())
        sys.stdout.flush()
    except UserError as error:
        if rank:  # usually all ranks fail alike: rank 0 prints, torchrun ends this one meanwhile
            time.sleep(5)
            sys.stderr = sys.__stderr__
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        if rank:  # a bug shows its traceback, on whichever rank it is
            sys.stderr = sys.__stderr__
        raise


def printable(text: str) -> str:
    """A text as one line: names in it may break lines, or hold what controls a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_bytes(path: Path) -> bytes:
    """Read a file of a checkpoint folder; `UserError` if it cannot be read."""
    try:
        if os.path.exists(path) and not path.is_file():  # a pipe would wait, a device never end
            raise UserError(f"{path} is not a regular file; fetch the file again")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); fetch the file again") from None


def read_json(path: Path) -> dict:
    """Read a JSON object; `UserError` if the file holds none or cannot be read."""
    try:
        return parse_object(read_bytes(path).decode())
    except ValueError as error:
        raise UserError(f"cannot read {path} as JSON ({error}); fetch the file again") from None


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Keep the logs of libraries off standard error, where Python's streams do not reach them."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def own_output(path: Path) -> int | None:
    """The descriptor of standard output or error if `path` names it, such as /dev/stdout."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def is_stream(path: Path) -> bool:
    """Whether to write into `path` as it is: a device, a pipe, or this program's own output."""
    special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return special or own_output(path) is not None


def temporary_name(path: Path) -> Path:
    """What `path` is called while it is written."""
    return path.with_name(f".{os.getpid()}-{path.name}")


def name_fits(path: Path) -> bool:
    """Whether a file may have this name, as far as the system knows before it is there."""
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENOENT
    return True


def output_file(text: str) -> Path:
    """An argparse type: a writable path, checked before hours of work are spent."""
    if is_stream(Path(text)):  # not resolved: /dev/stdout leads to a name that cannot be opened
        path = Path(text)
        writable = os.access(path, os.W_OK)
    else:  # os.path, as pathlib raises on a loop of links and on a folder that is not to be read
        path = Path(os.path.realpath(text))
        folder = next(folder for folder in path.parents if os.path.lexists(folder))
        writable = folder.is_dir() and os.access(folder, os.W_OK) and not os.path.isdir(path)
        writable = writable and name_fits(temporary_name(path))
    if not writable:
        raise argparse.ArgumentTypeError(
            f"{text!r:.300} cannot be written; name a file in a folder of yours"
        )
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what the block writes there ends up at `path` if it succeeds.

    A regular file is replaced atomically, by a rename. A device or a pipe gets the bytes copied, as
    the block may itself rename what it writes.
    """
    try:
        with (sending if is_stream(path) else renaming)(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); is there room and permission?") from None


@contextlib.contextmanager
def renaming(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`, renamed to it afterwards; a link is followed."""
    path = Path(os.path.realpath(path))
    if os.path.isdir(path):  # before anything is written
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    temporary = temporary_name(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        with contextlib.suppress(OSError):
            for folder in missing:  # those still empty
                folder.rmdir()


@contextlib.contextmanager
def sending(path: Path) -> Iterator[Path]:
    """Yield a name in a temporary folder, whose bytes are copied to `path` afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, path.name)
        yield temporary
        sys.stdout.flush()
        own = own_output(path)  # continue after the text, even in a regular file
        target = path if own is None else os.dup(own)
        with temporary.open("rb") as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
