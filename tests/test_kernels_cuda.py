"""The Triton kernels, without a GPU: in the interpreter, and as compiled for GPUs.

Triton is told of the interpreter by an environment variable when it loads, so each file has a
process.
"""

import subprocess
import sys

import pytest

from conftest import ROOT

pytest.importorskip("triton", reason="Triton comes for Linux alone")


pytestmark = pytest.mark.slow  # minutes of an interpreter and a compiler


@pytest.mark.parametrize("cases", ["interpreted_kernels.py", "compiled_kernels.py"])
def test_every_case_passes(cases):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        ROOT / "tests" / cases,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
