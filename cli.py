"""What the scripts share: user errors, flags, and files that are written whole or not at all.

A user's mistake is a `UserError`: `run` prints it as one line and exits with code 2. Anything else
that goes wrong is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake in the input; its text is one sentence: what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that answers a wrong flag with one line instead of the whole usage."""

    def __init__(self, description: str | None):
        super().__init__(description=(description or "").split("\n")[0], allow_abbrev=False)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


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
    precisions = ["bfloat16", "float16", "float32"]
    parser.add_argument("--precision", default="bfloat16", choices=precisions)
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


def read_json(path: Path) -> dict:
    """Read a JSON object; `UserError` if the file cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object; fetch the file again")
    return value


def output_file(text: str) -> Path:
    """An argparse type: a path that can be written, known before hours of work are spent."""
    path = Path(text).resolve()
    parent = next(folder for folder in path.parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written; name a file in a folder of yours"
        )
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed onto `path` only if the block succeeds."""
    path = path.resolve()  # of a link, the file it points to is replaced
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device or a pipe
            yield path
        else:
            yield temporary
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); is there room and permission?") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
