"""A command line that the server runs behaves as it does in a Python of its own."""

import os
import signal
import subprocess
import sys

import pytest

from commands import python

WAIT = "print('ready', flush=True); import time; time.sleep(60)"


def both(script: str) -> list[subprocess.CompletedProcess]:
    """How a shell script ends that has $PYTHON in it, with a Python of its own and with ours."""
    ends = []
    for command in ((sys.executable,), python()):
        env = os.environ | {"PYTHON": " ".join(command)}
        options = dict(env=env, input="a\nb\n", capture_output=True, text=True, timeout=60)
        ends.append(subprocess.run(["bash", "-c", script], **options))
    return ends


@pytest.mark.parametrize(
    "script",
    [
        "$PYTHON -c 'import sys; print(sys.argv, sys.stdin.read())' x -y",
        "$PYTHON -m json.tool --compact",
        "cd /; A=b $PYTHON -c 'import os; print(os.getcwd(), os.environ[\"A\"])'",
        "$PYTHON -c 'import sys; sys.exit(7)'",
        "$PYTHON -c 'import sys; sys.exit(-1)'",
        "$PYTHON -c 'import sys; sys.exit(\"said\")'",
        "$PYTHON -c 'raise KeyboardInterrupt' 2> /dev/null",
        "$PYTHON -c 'import atexit; atexit.register(print, 1); print(2)'",
        "$PYTHON -c 'import sys; print(sys.stdin, sys.stdout, file=sys.stderr)' <&- >&-",
        "unset PYTHONUNBUFFERED; $PYTHON -c 'print(5)' 2> /dev/null > /dev/full",
        "PYTHONUNBUFFERED=1 $PYTHON -c 'print(5)' 2> /dev/null > /dev/full",
        "$PYTHON -c 'while True: print(5)' 2> /dev/null | head -c 1",
    ],
)
def test_streams_and_exit_codes_are_those_of_a_new_process(script):
    script = f"set -o pipefail; {script}; echo $?"
    new, forked = both(script)
    assert (new.stdout, new.stderr) == (forked.stdout, forked.stderr)


def test_an_exception_is_a_traceback_and_exit_code_1():
    done = subprocess.run([*python(), "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.endswith("\nZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_script(number):
    command = [*python(), "-c", WAIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == -number


def test_a_script_ends_with_the_process_that_stands_for_it():
    command = [*python(), "-c", WAIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == b""  # closed by the script's end, long before its own
