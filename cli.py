"""What the scripts share: user errors, flags, and files that are written whole or not at all.

A user's mistake is a `UserError`: `run` prints it as one line and exits with code 2. Anything else
that goes wrong is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
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

PRECISIONS = ("bfloat16", "float16", "float32")


class UserError(Exception):
    """A mistake in the input; its text is one sentence: what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that answers a wrong flag with one line instead of the whole usage."""

    def __init__(self, description: str | None):
        super().__init__(description=(description or "").split("\n")[0], allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def optional(name: str, *needed: str) -> Any:
    """The module `name`; None where its file, or one of what it needs, is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, *needed):
            raise
        return None


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """An argparse type: an int or a float between `low` and `high`, both included."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            bound = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {bound}")
        return value

    return parse


def json_object(text: str) -> dict:
    """An argparse type: a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        example = '{"enable_thinking": false}'
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no JSON object such as {example}")
    return value


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of every script that reads a checkpoint."""
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="a model.pth (default: SmolLM2-135M-Instruct)")
    add(
        "--device", help="cpu, cuda, cuda:1, mps, xpu (default: $DEVICE, else cuda if there is one)"
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of every script that runs a model."""
    add_checkpoint_flags(parser)
    parser.add_argument("--precision", default="bfloat16", choices=PRECISIONS)
    parser.add_argument("--max_seq_length", type=number(int, 2), help="positions in the KV cache")


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Run `main` on the parsed command line; exit with 2 on a `UserError`, with 130 on Ctrl-C."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    rank = int(os.environ.get("RANK", 0)) if several else 0
    if several:  # under torchrun a handler would wait for the others to go on
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:  # so that temporary files are removed
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if rank:  # only the first of several processes prints
        sys.stdout = sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout):  # a terminal may know fewer characters than a model
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main(parser.parse_args())
        sys.stdout.flush()
    except UserError as error:
        if rank:  # if it is everybody's, rank 0 says it and torchrun ends this process meanwhile
            time.sleep(5)
            sys.stderr = sys.__stderr__
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        if rank:  # a bug shows its traceback, on whichever rank it is
            sys.stderr = sys.__stderr__
        raise


def read_text(path: Path) -> str:
    """Read a text; `UserError` if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error})") from None


def read_json(path: Path) -> dict:
    """Read a JSON object; `UserError` if the file cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object; fetch the file again")
    return value


def own_output(path: Path) -> int | None:
    """The descriptor of standard output or error if `path` is that file, as /dev/stdout is."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def is_stream(path: Path) -> bool:
    """Whether to write into what is there: a device, a pipe, or this program's own output."""
    special = os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    return special or own_output(path) is not None


def output_file(text: str) -> Path:
    """An argparse type: a path that can be written, known before hours of work are spent."""
    if is_stream(Path(text)):  # not resolved: /dev/stdout leads to a name that cannot be opened
        path = Path(text)
        writable = os.access(path, os.W_OK)
    else:  # os.path, as pathlib raises on a loop of links and on a folder that is not to be read
        path = Path(os.path.realpath(text))
        folder = next(folder for folder in path.parents if os.path.lexists(folder))
        writable = folder.is_dir() and os.access(folder, os.W_OK) and not os.path.isdir(path)
    if not writable:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written; name a file in a folder of yours"
        )
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name for what is to be at `path`; it gets there if the block succeeds.

    A regular file is replaced by a rename, so it is whole or not there at all. A device or a pipe
    stays what it is and is sent the bytes: the block may itself rename what it writes.
    """
    try:
        with (sending if is_stream(path) else renaming)(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); is there room and permission?") from None


@contextlib.contextmanager
def renaming(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`, renamed onto it afterwards; of a link, onto where it leads."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        with contextlib.suppress(OSError):
            for folder in missing:  # none that something is in
                folder.rmdir()


@contextlib.contextmanager
def sending(path: Path) -> Iterator[Path]:
    """Yield a name in a folder of its own, whose bytes are written into `path` afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, path.name)
        yield temporary
        sys.stdout.flush()
        own = own_output(path)  # goes on where the text ends, even in a regular file
        target = path if own is None else os.dup(own)
        with temporary.open("rb") as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
