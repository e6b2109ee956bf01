"""Builds a library of PyTorch operators from one C++ file, once, and keeps it in a cache folder.

A library is checked before it is loaded: one that is cut short, foreign or of another version is
built again. Whatever fails is one line on standard error, and the caller goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

PREFIX = "tokenbus_"  # of libraries in the cache


def load_extension(source: Path, flags: str) -> bool:
    """Load the library of a C++ file, built first unless the cache holds it; whether that worked.

    If not, one line on standard error says what failed, where, and what to do.
    """
    try:
        load_or_build(source, flags)
    except (OSError, RuntimeError) as error:
        print(f"slower than it could be: no kernels for this CPU; {error}", file=sys.stderr)
        return False
    return True


def load_or_build(source: Path, flags: str) -> None:
    """Load the library from the cache, or build it there: one process does, others wait."""
    version = (torch.__version__, torch.version.git_version, torch.compiled_with_cxx11_abi())
    key = hashlib.sha256(repr((source.read_bytes(), flags, version)).encode()).digest()
    library = cache_folder() / f"{PREFIX}{key.hex()[:16]}.so"
    with contextlib.suppress(OSError):
        load_sealed(library, key)
        with contextlib.suppress(OSError):
            handle = os.open(library.parent, os.O_RDONLY)
            take_cache(handle, library.parent, fcntl.LOCK_NB)
            os.close(handle)
        return
    print("building kernels for this CPU, once ...", file=sys.stderr)
    try:
        with build_folder(library.parent) as folder:
            with contextlib.suppress(OSError):  # built by another process meanwhile
                return load_sealed(library, key)
            built = compile_library(source, flags, folder)
            seal(built, key)
            os.replace(built, library)
    except OSError as error:
        advice = "set TORCH_EXTENSIONS_DIR to a folder that can be written"
        raise RuntimeError(f"cannot write {library} ({error.strerror}); {advice}") from None
    try:
        load_sealed(library, key)
    except OSError as error:
        reason = error.__cause__ or error
        advice = "set CXX to another compiler or TORCH_EXTENSIONS_DIR to another folder"
        raise RuntimeError(f"cannot load {library}, just built ({reason}); {advice}") from None


def cache_folder() -> Path:
    """Where libraries are kept."""
    try:
        folder = os.environ.get("TORCH_EXTENSIONS_DIR")
        return Path(folder) if folder else Path.home() / ".cache" / "torch_extensions"
    except RuntimeError:
        raise RuntimeError(
            "no home folder; set TORCH_EXTENSIONS_DIR to a folder for the library"
        ) from None


def take_cache(handle: int, cache: Path, option: int = 0) -> None:
    """Lock a cache folder until its handle is closed; remove the folders of builds that died."""
    with contextlib.suppress(OSError):  # some network file systems have no locks: all build
        fcntl.flock(handle, fcntl.LOCK_EX | option)  # released when a process dies, however it does
        for abandoned in cache.glob(f".{PREFIX}*"):
            shutil.rmtree(abandoned, ignore_errors=True)


@contextlib.contextmanager
def build_folder(cache: Path) -> Iterator[Path]:
    """Yield a temporary folder in the cache while no other process builds there."""
    cache.mkdir(parents=True, exist_ok=True)
    handle = os.open(cache, os.O_RDONLY)
    try:
        take_cache(handle, cache)
        options = {"prefix": f".{PREFIX}", "dir": cache, "ignore_cleanup_errors": True}
        with tempfile.TemporaryDirectory(**options) as folder:
            yield Path(folder)
        with contextlib.suppress(OSError):  # not every file system can
            os.fsync(handle)  # makes the rename durable
    finally:
        os.close(handle)


def compile_library(source: Path, flags: str, folder: Path) -> Path:
    """Compile and link in a temporary folder; RuntimeError quotes a compiler that fails.

    OpenMP is left out of linking: its symbols come from the runtime that torch has loaded.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "g++"
    torch_folder = Path(torch.__file__).parent
    object_file, built = folder / "kernels.o", folder / "kernels.so"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = (abi, "-isystem", torch_folder / "include")
    libraries = (f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu")
    for arguments in (
        (*flags.split(), "-w", "-fPIC", *includes, "-c", source, "-o", object_file),
        ("-shared", object_file, *libraries, "-o", built),
    ):
        if reason := compiler_error(compiler, arguments, folder):
            if os.strerror(errno.ENOSPC) in reason:  # no other compiler helps
                raise OSError(errno.ENOSPC, reason)
            advice = "install g++ 10 or newer, or set CXX to one"
            raise RuntimeError(f"{compiler} cannot build {source} ({reason}); {advice}")
    return built


def compiler_error(compiler: str, arguments: tuple, folder: Path) -> str:
    """Run the compiler; the first line that says what went wrong, or "" if nothing did."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "errors": "replace"}
    options["env"] = os.environ | {"LC_ALL": "C", "TMPDIR": str(folder)}
    try:
        done = subprocess.run([*shlex.split(compiler), *arguments], **options)
    except (OSError, ValueError) as error:  # there is none, or quotes in CXX do not match
        return getattr(error, "strerror", None) or str(error)
    if done.returncode == 0 and arguments[-1].exists():
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    errors = [line for line in lines if "error:" in line and not line.startswith("collect2:")]
    return (errors or lines or [f"exit status {done.returncode}, no message"])[0]


def seal(library: Path, key: bytes) -> None:
    """Append a checksum, which the loader ignores, and wait until the file is on disk."""
    with library.open("r+b") as file:
        file.write(hashlib.sha256(file.read() + key).digest())
        file.flush()
        os.fsync(file.fileno())


def load_sealed(library: Path, key: bytes) -> None:
    """Load a library; OSError if it is not whole, not of this key, or the loader refuses it.

    Loading a file that was cut short kills the process (SIGBUS), hence the checksum.
    """
    content = library.read_bytes() if library.is_file() else b""
    if content[-32:] != hashlib.sha256(content[:-32] + key).digest():
        raise OSError(f"{library} is damaged")
    torch.ops.load_library(library)
