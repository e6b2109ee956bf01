"""What the scripts share: user errors, flags, and atomic writes of files.

A user's mistake is a `UserError`: `run` prints one line and exits with code 2. Any other exception
is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEEPEST = 64  # objects and lists within each other in a JSON text
LONGEST = 2**28  # characters of a text: more than a day of evaluation
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
    for number in range(3):  # a file that took the place of one would get what is written there
        try:
            fit = number or fcntl.fcntl(0, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
            os.fstat(number)
        except OSError:
            fit = False
        if not fit:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
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
        return number(int, low, high)(text)
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
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
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


def read_text(path: Path) -> str:
    """The text of a file, a pipe or a device; UserError if it is none, or has no end."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(LONGEST)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        raise UserError(f"cannot read {path} ({error}); pass a UTF-8 text file") from None
    if len(text) == LONGEST:
        raise UserError(f"{path} has {LONGEST} characters or more; pass a shorter text")
    return text


def check_outputs(outputs: list[Path | None], inputs: list[Path | None]) -> None:
    """Raise a UserError if a file cannot be written, is read, too, or is to hold two things."""
    files = [Path(os.path.realpath(path)) for path in outputs if path and not is_stream(path)]
    read = [os.path.realpath(path) for path in inputs if path]
    for path in files:
        if str(path) in read or files.count(path) > 1:
            raise UserError(f"{path} is named for two things; name another file to write")
        if not is_writable(path):
            raise UserError(f"{path} cannot be written; name a file in a folder of yours")


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


def output_file(text: str) -> Path:
    """An argparse type: a path that can be written, known before hours of work are spent."""
    # A device is not resolved: /dev/stdout leads to a name that cannot be opened.
    path = Path(text) if is_stream(Path(text)) else Path(os.path.realpath(text))
    if not is_writable(path):
        raise argparse.ArgumentTypeError(
            f"{text!r:.300} cannot be written; name a file in a folder of yours"
        )
    return path


def is_writable(path: Path) -> bool:
    """Whether a file can be made or replaced at `path`, or a device there be written."""
    if is_stream(path):
        return os.access(path, os.W_OK)
    try:  # os.path, as pathlib raises on a loop of links and on a folder that is not to be read
        os.lstat(temporary_name(path))
    except FileNotFoundError:
        pass
    except OSError:  # a name too long, a file where a folder should be
        return False
    path = Path(os.path.realpath(path))
    folder = next(folder for folder in path.parents if os.path.lexists(folder))
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) and not os.path.isdir(path)


def temporary_name(path: Path) -> Path:
    """What a file is called while it is being made."""
    return path.with_name(f".{os.getpid()}-{path.name}")


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


def remove_dead(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders whose makers were killed: the living hold a lock."""
    with contextlib.suppress(OSError):
        paths = [folder / name for name in os.listdir(folder) if re.fullmatch(pattern, name)]
        for path in paths:
            with contextlib.suppress(OSError), locked(path, fcntl.LOCK_NB):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(path: Path, option: int = 0) -> Iterator[None]:
    """Hold a lock on a file or folder, which ends with the process however that does."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | option)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def temporary_folder(prefix: str = "tokenbus-") -> Iterator[Path]:
    """Yield a temporary folder; those that killed processes left are removed first."""
    try:
        place = Path(tempfile.gettempdir())
        remove_dead(place, rf"{prefix}\w{{8}}")
        made = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        reason = error.strerror or "there is none that can be written"
        what = f"cannot make a temporary folder ({reason})"
        raise UserError(f"{what}; set TMPDIR to a folder with room") from None
    with made as name, locked(Path(name)):
        yield Path(name)


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
        remove_dead(path.parent, rf"\.\d+-{re.escape(path.name)}")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666))
        os.utime(temporary, (0, 0))
        with locked(temporary):
            yield temporary
        if os.stat(temporary).st_mtime == 0:  # PyTorch's profiler fails without a word
            raise OSError("nothing was written")
        os.replace(temporary, path)
    finally:
        for file in (temporary, f"{temporary}.tmp"):  # the second is the profiler's
            with contextlib.suppress(OSError):
                os.unlink(file)
        with contextlib.suppress(OSError):
            for folder in missing:  # those still empty
                folder.rmdir()


@contextlib.contextmanager
def sending(path: Path) -> Iterator[Path]:
    """Yield a name in a folder of its own, whose bytes are written into `path` afterwards."""
    with temporary_folder() as folder:
        temporary = folder / path.name
        yield temporary
        sys.stdout.flush()
        own = own_output(path)  # continue after the text, even in a regular file
        target = path if own is None else os.dup(own)
        with temporary.open("rb") as source, open(target, "wb") as sink:
            shutil.copyfileobj(source, sink)
