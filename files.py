"""Files: read whatever may be in their place, and written whole or not at all.

A file is written under a temporary name beside it and renamed. A device or a pipe gets the bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cli import UserError, named_path, parse_object

LONGEST = 2**28  # characters of a text: more than a day of evaluation
AGAIN = "fetch the file again"
# What a checkpoint is read with, or made of; a name may be new, and still change what is read.
BESIDE = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
BESIDE += ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
BESIDE += ("vocab.json", "merges.txt")
WEIGHTS = (".safetensors", ".bin", ".index.json")


def read_bytes(path: Path, advice: str = AGAIN, longest: int = LONGEST) -> bytes:
    """Read a regular file; `UserError` if it cannot be read or has more than `longest` bytes."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait, a device go on
            raise UserError(f"{path} is not a regular file; {advice}")
        if (size := os.stat(path).st_size) > longest:
            raise UserError(f"{path} has {size} bytes, over the limit of {longest}; {advice}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {advice}") from None


def read_json(path: Path, advice: str = AGAIN) -> dict:
    """Read a JSON object; `UserError` if the file holds none or cannot be read."""
    try:
        return parse_object(read_bytes(path, advice).decode())
    except ValueError as error:
        raise UserError(f"cannot read {path} as JSON ({error}); {advice}") from None


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


def at_file(value: str | None) -> Path | None:
    """The FILE of a value @FILE."""
    return Path(value[1:]) if value and value.startswith("@") else None


def files_of(checkpoint: Path) -> list[Path]:
    """A checkpoint, a file or a folder, and what it is read with: other files of its folder."""
    if not os.path.isdir(checkpoint):
        return [checkpoint, *(checkpoint.with_name(name) for name in BESIDE)]
    names = [*BESIDE]
    with contextlib.suppress(OSError):
        names += [name for name in os.listdir(checkpoint) if name.endswith(WEIGHTS)]
    return [checkpoint, *(checkpoint / name for name in names)]


def check_outputs(
    outputs: list[Path | None], inputs: list[Path | None], checkpoints: Iterable[Path | None] = ()
) -> None:
    """Raise a UserError if a file cannot be written, is also an input, or is written twice."""
    files = [Path(os.path.realpath(path)) for path in outputs if path and not is_stream(path)]
    inputs = [*inputs, *(file for path in checkpoints if path for file in files_of(path))]
    read = [Path(os.path.realpath(path)) for path in inputs if path]
    for path in files:
        if sum(path in (other, *other.parents) for other in files + read) > 1:
            raise UserError(
                f"{path} is read by this run, or written twice; name another file to write"
            )
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
    path = named_path(text)
    path = path if is_stream(path) else Path(os.path.realpath(path))
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
    return (
        os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK) and not os.path.isdir(path)
    )


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
                shutil.rmtree(path) if os.path.isdir(path) else path.unlink()


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
    missing = [folder for folder in path.parents if not os.path.exists(folder)]
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
