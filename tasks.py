"""Finds lm-eval tasks, and turns lm-eval's exceptions into one-line errors.

lm-eval reads task definitions, fetches data sets and renders templates. Its exceptions share no
base class: YAML, Jinja, PyArrow, HTTP and key errors all come through.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli import UserError

OURS = Path(__file__).resolve().parent


@contextlib.contextmanager
def explaining(names: list[str]) -> Iterator[None]:
    """Turn exceptions of lm-eval into UserErrors; those of this project's code pass, as bugs."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[2:]  # without this and the caller's
        owners = [owner for frame in frames if (owner := owner_of(Path(frame.filename)))]
        if owners and owners[-1] == "ours":
            raise
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        reasons = dict.fromkeys(" ".join(str(part).split())[:200] for part in (error, cause))
        what = f"lm-eval cannot run {', '.join(names)} ({type(error).__name__}: "
        what += f"{': '.join(reasons)})"
        raise UserError(f"{what}; check the task and that its data can be fetched") from None


def owner_of(file: Path) -> str:
    """Whose code a file is: this project's, lm-eval's, or neither (a library that both call)."""
    if file.parent in (OURS, OURS / "profiler_scripts"):
        return "ours"
    return "lm-eval" if "lm_eval" in file.parts else ""


def find(patterns: list[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names of the tasks that match the patterns."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        what = f"the task {patterns[0]} needs the package lm-eval"
        raise UserError(f"{what}; run `pip install lm-eval==0.4.13`") from None
    if include_path and not os.path.isdir(include_path):
        raise UserError(f"--include_path {include_path} is no folder; name the one with YAMLs")
    if include_path and not os.access(include_path, os.R_OK | os.X_OK):
        raise UserError(f"--include_path {include_path} may not be read by you")
    with explaining([f"the tasks of {include_path or 'its package'}"]):
        manager = TaskManager(include_path=include_path)
    for pattern in patterns:
        if not manager.match_tasks([pattern]):
            what = f"lm-eval knows no task {pattern!r}; `lm-eval ls tasks` lists them"
            raise UserError(f"{what}, --include_path DIR adds those of a folder")
    return manager, manager.match_tasks(patterns)
