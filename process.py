"""How a script starts and ends: its streams, its rank, signals, and the one line of an error.

A user's mistake is a `UserError`: `run` prints one line and exits with code 2. Any other exception
is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cli import UserError, bounded


class OutputError(Exception):
    """Standard output cannot be written; its text is the sentence to print."""


class Output:
    """Standard output, whose failures are `OutputError`s: no part of the program can mend them."""

    def __init__(self, stream: Any):
        self.stream = stream

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # where the exit flushes what is left
            what = f"cannot write standard output ({error.strerror})"
            raise OutputError(f"{what}; send it to a place with room") from None

    def write(self, text: str) -> int:
        with self.explaining():
            return self.stream.write(text)

    def flush(self) -> None:
        with self.explaining():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Diagnostics:
    """Standard error: a text that it does not take is lost, which is no reason to end.

    `midline` says whether the last line is open, as that of a progress bar is.
    """

    def __init__(self, stream: Any):
        self.stream, self.midline = stream, False

    def write(self, text: str) -> int:
        self.midline = not text.endswith("\n") if text else self.midline
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def open_streams() -> None:
    """Make the standard streams fit to use; UserError if there is no standard output."""
    for descriptor in range(3):  # a file that took the place of one would get what is written there
        try:
            fit = descriptor or fcntl.fcntl(0, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
            os.fstat(descriptor)
        except OSError:
            fit = False
        if not fit:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    if sys.stdout is None:
        raise UserError("standard output is closed; send it to a file or to /dev/null")
    sys.stdin = sys.stdin or open(os.devnull)
    for stream in (sys.stdin, sys.stdout):  # a terminal may know fewer characters than a model
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stdout = Output(sys.stdout)


def variable(name: str, low: int, high: int, default: int | None = None) -> int:
    """A variable that torchrun sets, as a whole number; UserError if it is none or missing."""
    text = os.environ.get(name, default)
    if text is None:
        raise UserError(f"WORLD_SIZE is set and {name} is not; start with torchrun, or unset it")
    try:
        return bounded(int, low, high)(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"the variable {name}: {error}; torchrun sets it, or unset it") from None


def world_size() -> int:
    """How many processes run this command line together."""
    return variable("WORLD_SIZE", 1, 2**20, 1)


def join_ranks(parallel: bool) -> int:
    """This process's rank; only rank 0 prints. UserError if there are several in vain."""
    world = world_size()
    rank = variable("RANK", 0, world - 1 if world > 1 else 2**20, 0 if world == 1 else None)
    if world == 1:
        for ending in (signal.SIGTERM, signal.SIGHUP):  # so that temporary files are removed
            if signal.getsignal(ending) == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(ending, leave)
        return 0
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would wait for the others to go on
    if rank:
        sys.stdout = open(os.devnull, "w")
        sys.stderr = Diagnostics(sys.stdout)
    if not parallel:
        what = f"this script is of one process, and the variable WORLD_SIZE is {world}"
        raise UserError(f"{what}; run it without torchrun")
    return rank


def leave(ending: int, _frame: Any) -> None:
    """A signal handler: end by an exception, as a shell says it; further signals change nothing."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + ending)


def tell_torchrun(text: str) -> None:
    """Put a text where torchrun's report of a failed rank ends, below its own traceback.

    https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(file), exist_ok=True)
            report = {"message": {"message": text, "extraInfo": extra}}
            Path(file).write_text(json.dumps(report), encoding="utf-8")


def run(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    parallel: bool = False,
) -> None:
    """Run `main` on the parsed command line; exit with 2 on a `UserError`, with 130 on Ctrl-C.

    `parallel` scripts may be started by torchrun.
    """
    rank, sys.stderr = 0, Diagnostics(sys.stderr or open(os.devnull, "w"))
    try:
        open_streams()
        rank = join_ranks(parallel)
        main(parser.parse_args())
        sys.stdout.flush()
    except (UserError, OutputError) as error:
        if rank:  # usually all ranks fail alike: rank 0 prints, torchrun ends this one meanwhile
            time.sleep(5)
            sys.stderr = Diagnostics(sys.__stderr__)
        text = f"error: {printable(str(error))}"
        print("\n" * sys.stderr.midline + text, file=sys.stderr)
        tell_torchrun(text)
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
