"""The C++ is built once, a damaged library is built anew, and what fails is one line.

A stand-in of one line takes the place of `kernels.cpp`, so that this runs on any CPU.
"""

import errno
import os
import pwd
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kernels
from commands import python
from conftest import ROOT

pytestmark = [
    pytest.mark.slow,  # compilers
    pytest.mark.skipif(sys.platform != "linux", reason="built on Linux alone"),
]

FLAGS = "-DANSWER=42"
TWICE = """
import ctypes, sys, torch, kernels
from pathlib import Path

for _ in range(2):
    print(kernels.load_extension(Path(sys.argv[1]), sys.argv[2]))
print(ctypes.CDLL(*torch.ops.loaded_libraries).answer())
"""
BUILDING = "building kernels for this CPU, once ...\n"


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return ANSWER; }\n')
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(source: Path, **variables) -> subprocess.Popen:
    """A process that loads the stand-in twice and asks it for its answer, in a bare shell."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [*python(), "-c", TWICE, source, FLAGS]
    variables["TORCH_EXTENSIONS_DIR"] = os.environ["TORCH_EXTENSIONS_DIR"]
    env = {"PATH": os.environ["PATH"]} | variables
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def compiler_script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def line_of(capfd) -> str:
    """What was printed after the word that a build begins: one line."""
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(BUILDING), err
    line = err.removeprefix(BUILDING)
    assert line.startswith("slower than it could be: no kernels for this CPU; ")
    assert line.endswith("\n") and line.count("\n") == 1
    return line


def test_a_library_is_built_once(source, cache, capfd, monkeypatch):
    assert kernels.load_extension(source, FLAGS)
    assert capfd.readouterr().err == BUILDING
    monkeypatch.setenv("CXX", "/nowhere/compiler")  # needs none any more
    assert kernels.load_extension(source, FLAGS)
    assert capfd.readouterr() == ("", "")
    assert len(list(cache.iterdir())) == 1  # nothing else is left


DAMAGES = {
    "cut short": lambda whole, other: whole[: len(whole) // 2],
    "empty": lambda whole, other: b"",
    "zeros at the end": lambda whole, other: whole[:-4096] + bytes(4096),
    "no library": lambda whole, other: b"#!/bin/sh\n",
    "built with other flags": lambda whole, other: other,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_anew(source, cache, damage):
    assert kernels.load_extension(source, FLAGS)
    (library,) = cache.iterdir()
    assert kernels.load_extension(source, "-DANSWER=7")
    (other,) = set(cache.iterdir()) - {library}
    content = DAMAGES[damage](library.read_bytes(), other.read_bytes())
    library.unlink()  # this process has it mapped
    library.write_bytes(content)
    process = start(source)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "True\nTrue\n42\n" and err == BUILDING  # the second time it is there


def test_a_library_that_the_loader_refuses_is_built_anew(source, cache, capfd, monkeypatch):
    """As one that was linked with another system's libraries."""
    missing = source.with_name("libmissing.so")
    subprocess.run(["c++", "-shared", "-o", missing, "-x", "c++", os.devnull], check=True)
    needs = f"c++ -Wl,--no-as-needed -L{shlex.quote(str(source.parent))} -lmissing"
    monkeypatch.setenv("CXX", needs)
    assert not kernels.load_extension(source, FLAGS)
    (library,) = cache.iterdir()
    line = line_of(capfd)
    assert f"cannot load {library}, just built (libmissing.so: cannot open shared object" in line
    assert "set CXX to another compiler or TORCH_EXTENSIONS_DIR to another folder" in line
    monkeypatch.delenv("CXX")
    assert kernels.load_extension(source, FLAGS)
    assert list(cache.iterdir()) == [library]


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("/nowhere/compiler", "No such file or directory"),
        ("/bin/false", "exit status 1, no message"),
        ("/bin/true", "exit status 0, no message"),
        ("/bin/cat", "unrecognized option|invalid option|illegal option"),
        ('c++ "', "No closing quotation"),
    ],
)
def test_what_is_no_compiler_is_named(source, cache, capfd, monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    assert not kernels.load_extension(source, FLAGS)
    line = line_of(capfd)
    assert f"; {compiler} cannot build {source} (" in line
    assert any(word in line for word in reason.split("|"))
    assert line.endswith("); install g++ 10 or newer, or set CXX to one\n")
    assert list(cache.iterdir()) == []


def test_without_a_compiler_there_are_no_kernels(cache, capfd, monkeypatch):
    monkeypatch.setattr(kernels, "supported", lambda: True)
    monkeypatch.setenv("CXX", "/bin/false")
    assert kernels.load.__wrapped__() is False  # not what was found before
    assert f"/bin/false cannot build {kernels.SOURCE} (" in line_of(capfd)


def test_without_any_compiler_the_line_says_what_to_install(source, capfd, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert not kernels.load_extension(source, FLAGS)
    assert f"; g++ cannot build {source} (No such file or directory); install" in line_of(capfd)


def test_the_first_error_of_the_compiler_is_quoted(source, capfd, monkeypatch):
    header = source.with_name("header.h")
    header.write_text("\nint wrong = nothing;\n")
    source.write_text('#include "header.h"\nint also_wrong = nothing;\n')
    assert not kernels.load_extension(source, FLAGS)
    assert f"({header}:2:13: error: " in line_of(capfd)
    assert not kernels.load_extension(source, "-mno-such-instructions")
    assert "-mno-such-instructions" in line_of(capfd)
    source.write_text("int right = 1;\n")
    monkeypatch.setenv("CXX", "c++ -lnowhere")
    assert not kernels.load_extension(source, "")
    assert "lnowhere" in line_of(capfd)  # the linker's words, not that it failed


@pytest.mark.parametrize("folder", ["/sys", "answer.cpp/folder"])  # not even root's
def test_a_cache_that_cannot_be_written_is_named(source, capfd, monkeypatch, folder):
    folder = source.parent / folder
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    assert not kernels.load_extension(source, FLAGS)
    line = line_of(capfd)
    assert f"; cannot write {folder}/tokenbus_" in line
    assert line.endswith("); set TORCH_EXTENSIONS_DIR to a folder that can be written\n")


def test_a_full_disk_is_not_blamed_on_the_compiler(source, cache, tmp_path, capfd, monkeypatch):
    error = f"ld: final link failed: {os.strerror(errno.ENOSPC)}"
    monkeypatch.setenv("CXX", compiler_script(tmp_path, f"echo '{error}' >&2; exit 1"))
    assert not kernels.load_extension(source, FLAGS)
    line = line_of(capfd)
    assert f"; cannot write {cache}/tokenbus_" in line and f"({error}); set TORCH" in line


def test_a_folder_in_the_place_of_the_library_is_named(source, cache, capfd):
    assert kernels.load_extension(source, FLAGS)
    (library,) = cache.iterdir()
    library.unlink()
    library.mkdir()
    capfd.readouterr()
    assert not kernels.load_extension(source, FLAGS)
    assert f"; cannot write {library} (Is a directory); set TORCH" in line_of(capfd)
    assert list(cache.iterdir()) == [library]


def test_without_a_home_folder_the_cache_has_to_be_named(source, capfd, monkeypatch):
    def unknown(user):
        raise KeyError(user)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as in a container with a user of its own
    assert kernels.load_extension(source, FLAGS)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    capfd.readouterr()
    assert not kernels.load_extension(source, FLAGS)
    err = capfd.readouterr().err
    assert err.endswith("no home folder; set TORCH_EXTENSIONS_DIR to a folder for the library\n")


def test_without_its_source_the_file_is_named(source, capfd):
    source.unlink()
    assert not kernels.load_extension(source, FLAGS)
    err = capfd.readouterr().err
    assert str(source) in err and err.count("\n") == 1


def test_a_prompt_on_standard_input_is_left_to_its_reader(source, tmp_path, monkeypatch):
    prompt, seen = tmp_path / "prompt", tmp_path / "seen"
    prompt.write_text("Once upon a time")
    monkeypatch.setenv("CXX", compiler_script(tmp_path, f'cat >> "{seen}"; exec c++ "$@"'))
    usual = os.dup(0)
    try:
        with prompt.open() as file:
            os.dup2(file.fileno(), 0)
        assert kernels.load_extension(source, FLAGS)
    finally:
        os.dup2(usual, 0)
        os.close(usual)
    assert seen.read_text() == ""


def test_a_library_is_on_disk_before_it_gets_its_name(source, cache, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(handle):
        fsync(handle)
        events.append((os.fstat(handle).st_ino, os.fstat(handle).st_size))

    def recorded_replace(old, new):
        events.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    assert kernels.load_extension(source, FLAGS)
    (library,) = cache.iterdir()
    (file, rename, folder) = events
    assert file == (library.stat().st_ino, library.stat().st_size) and rename == "rename"
    assert folder[0] == cache.stat().st_ino


def test_of_two_processes_one_builds_and_the_other_waits(source, cache, tmp_path):
    log = tmp_path / "log"
    compiler = compiler_script(tmp_path, f'echo >> "{log}"; sleep 2; exec c++ "$@"')
    both = [start(source, CXX=compiler) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert out == "True\nTrue\n42\n" and err in ("", BUILDING), err
    assert log.read_text() == "\n\n"  # compiled and linked
    assert len(list(cache.iterdir())) == 1


def test_what_a_killed_build_leaves_is_removed(source, cache, tmp_path):
    process = start(source, CXX=compiler_script(tmp_path, "exec sleep 60"))
    deadline = time.monotonic() + 60
    while not list(cache.glob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(list(cache.iterdir())) == 1
    assert kernels.load_extension(source, FLAGS)
    (library,) = cache.iterdir()
    assert library.is_file()


def test_a_library_shares_the_threads_of_torch(tmp_path):
    """It finds torch's headers and libraries, and runs on the OpenMP that torch has loaded."""
    source = tmp_path / "threads.cpp"
    source.write_text(
        "#include <ATen/Parallel.h>\n#include <omp.h>\n"
        'extern "C" int answer() { return 10 * at::get_num_threads() + omp_get_max_threads(); }\n'
    )
    script = TWICE.replace("for _", "torch.set_num_threads(3)\nfor _")
    command = [*python(), "-c", script, source, "-std=c++20 -fopenmp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "True\nTrue\n33\n", done.stderr
