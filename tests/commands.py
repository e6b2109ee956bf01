"""Command lines at the price of a fork: a server imports torch and the project once for all.

`[*python(), script, *flags]` behaves as `[sys.executable, script, *flags]` does, in a shell, too:
it is a client that hands its streams, folder, environment and limit of file sizes to a child of the
server, forwards signals, and ends as the child ends. The server runs no tensor operation, so it has
no threads that a fork would lose.

What has to start a Python of its own stays with `sys.executable`: blocked imports, another copy of
the scripts, and variables that a library reads when it is loaded.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
LOADED = ("generate", "quantize", "eval", "speculate", "prefill_cache", "tp", "ranges", "gptq")
LOADED += ("kernels", "mixture", "jsonl", "chat")
LOADED += ("torch.distributed.run", "torch._inductor.compile_fx")
FRESH = "huggingface_hub"  # reads HF_ENDPOINT and others when it is imported
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_script(script: str, *flags, stdin="", **options) -> subprocess.CompletedProcess:
    """Run a script of the project, such as "scripts/download.py", to its end, with texts."""
    options = dict(input=stdin, capture_output=True, text=True, timeout=120) | options
    return subprocess.run([*python(), ROOT / script, *map(str, flags)], **options)


def run_served(argv: list[str], cwd: Path, env: dict, timeout=60) -> subprocess.CompletedProcess:
    """Run `python *argv` without standard input and without a client, for hundreds of commands."""
    with (
        open(os.devnull) as null,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        socket.socket(socket.AF_UNIX) as server,
    ):
        server.settimeout(timeout)
        server.connect(python()[-1])
        socket.send_fds(server, [b"\n"], [null.fileno(), out.fileno(), err.fileno()])
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        request = {"closed": [], "argv": argv, "cwd": str(cwd), "env": env, "file_size": limit}
        server.sendall(json.dumps(request).encode() + b"\n")
        _, status = server.makefile()  # the child's process id, and how it ended
        texts = [file.seek(0) or file.read().decode(errors="replace") for file in (out, err)]
    return subprocess.CompletedProcess(argv, os.waitstatus_to_exitcode(int(status)), *texts)


@functools.cache
def python(root: Path = ROOT) -> tuple[str, ...]:
    """The first words of a command that the server of a copy runs; the first call starts it."""
    folder = tempfile.TemporaryDirectory(prefix="commands-")
    address = str(Path(folder.name, "socket"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    command = [sys.executable, __file__, "serve", str(listener.fileno()), str(root)]
    command.append(str(os.getpid()))
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # fewer to copy in forks
    subprocess.Popen(command, pass_fds=[listener.fileno()], start_new_session=True, env=env)
    listener.close()
    atexit.register(folder.cleanup)
    return sys.executable, "-IS", __file__, address


# ---- The server --------------------------------------------------------------------------------


def serve(listener: socket.socket, root: str, parent: int) -> None:
    """Fork a child for every client that calls, tell it how the child ends, and end it without.

    However the tests end, so does this: it is then another process's child.
    """
    sys.path.insert(0, root)
    for name in LOADED:
        importlib.import_module(name)
    for finalizer in weakref.finalize._registry:  # torch takes down its operators one by one
        finalizer.atexit = False
    atexit.unregister(sys.modules["torch._dynamo.utils"].dump_compile_times)
    gc.freeze()  # a child's collections leave these pages shared
    ended, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    children: dict[socket.socket, int] = {}  # process ids by client
    while os.getppid() == parent:
        for ready in select.select([listener, ended, *children], [], [], 1)[0]:
            if ready is listener:
                client, _ = listener.accept()
                with contextlib.suppress(OSError, ValueError):  # it may be gone already
                    children[client] = start(client)
            elif ready is ended:
                ended.recv(4096)
            else:  # a client has gone
                kill(children.pop(ready))
                ready.close()
        for client, child in [*children.items()]:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                tell(client, status)
                del children[client]
                client.close()
    for child in children.values():
        kill(child)


def tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.sendall(b"%d\n" % number)


def kill(child: int) -> None:
    for how in (os.killpg, os.kill):  # it may not lead its group yet
        with contextlib.suppress(ProcessLookupError):
            how(child, signal.SIGKILL)
    os.waitpid(child, 0)


def start(client: socket.socket) -> int:
    """Fork the child that a client asks for, and tell it the child's process id."""
    client.settimeout(10)
    _, streams, *_ = socket.recv_fds(client, 1, 3)
    request = json.loads(client.makefile().readline())
    child = os.fork()
    if child == 0:
        run_child(streams, **request)
    for stream in streams:
        os.close(stream)
    tell(client, child)
    return child


def run_child(
    streams: list, closed: list, argv: list, cwd: str, env: dict, file_size: list
) -> NoReturn:
    """Become `python *argv`, and end as it does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, tuple(file_size))
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in streams:
            with contextlib.suppress(OSError):  # the folder's own
                os.close(number)
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # that of the server, if it was asked for
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    unbuffered = "PYTHONUNBUFFERED" in env
    out = open(1, "wb", 0 if unbuffered else -1, closefd=False)
    options = dict(line_buffering=os.isatty(1), write_through=unbuffered)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(out, **options)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
    for number in closed:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    for name in [name for name in sys.modules if name.split(".")[0] == FRESH]:
        del sys.modules[name]
    sys.argv = argv
    try:
        if argv[0] == "-c":
            sys.path[0], code = "", argv.pop(1)
            exec(code, {"__name__": "__main__"})
        elif argv[0] == "-m":
            sys.path[0], sys.argv = os.getcwd(), argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.realpath(argv[0]))
            runpy.run_path(argv[0], run_name="__main__")
        end(0)
    except SystemExit as exit:
        if exit.code is not None and not isinstance(exit.code, int):
            print(exit.code, file=sys.stderr)
        end(exit.code & 0xFF if isinstance(exit.code, int) else int(exit.code is not None))
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        end(-signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)


def end(code: int) -> NoReturn:
    """End as the interpreter does, but do not take down its modules: that would copy every page."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream and not stream.closed:
                stream.flush()
        except OSError as error:
            print(f"Exception ignored in: {stream}\n{error!r}", file=sys.stderr)
            code = 120
    if code < 0:
        end_by(-code)
    os._exit(code & 0xFF)


def end_by(number: int) -> None:
    """End this process by a signal."""
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


# ---- The client --------------------------------------------------------------------------------


def call(address: str, argv: list[str]) -> int:
    """Have the server run a command line with what this process was given; its exit code."""
    closed = [i for i, s in enumerate((sys.stdin, sys.stdout, sys.stderr)) if s is None]
    while os.open(os.devnull, os.O_RDWR) < 3:  # something has to be sent in their places
        pass
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        request = {"closed": closed, "argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}
        request["file_size"] = resource.getrlimit(resource.RLIMIT_FSIZE)  # of `ulimit -f`
        server.sendall(json.dumps(request).encode() + b"\n")
        answers = server.makefile()
        child = int(answers.readline())
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        status = int(answers.readline())
    if os.WIFSIGNALED(status):
        end_by(os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
