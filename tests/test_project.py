"""Promises of the README that are not about one file: size, layers, and commands that work."""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

from checkpoint import DEFAULT_CHECKPOINT
from commands import python as commands_of
from commands import run_script
from conftest import ROOT
from files import read_json

# A file imports only from lower floors.
FLOORS = [
    {"cli", "operators", "matmul_cuda", "chat_template"},
    {"files", "process", "build_cpp"},
    {"tasks", "kernels", "kernels_cuda", "cudagraph", "checkpoint", "keys"},
    {"linear", "tokenizer"},
    {"mixture"},
    {"model"},
    {"kinds"},
    {"families"},
    {"engine"},
    {"speculate", "prefill_cache", "tp", "ranges", "gptq", "rounding", "calibration"},
    {"prompts", "settings", "shaping", "reuse"},
    {"chat", "jsonl"},
    {"generate", "quantize", "compare"},
    {"eval", "scripts", "profiler_scripts"},
]
CORE = ("tokenizer", "linear", "model", "engine")  # from a prompt's text to its next token
CORE_LINES, FILE_LINES, CPP_LINES = 1000, 450, 850  # each file's, but the core's together
SHORT = {"families": 200, "mixture": 120}  # what a reader takes in at once
LEFT_OUT = ("speculate", "prefill_cache", "tp", "ranges", "operators", "kernels", "build_cpp")
LEFT_OUT += ("kernels_cuda", "matmul_cuda", "cudagraph", "chat", "jsonl", "mixture")


def scripts() -> list[Path]:
    """Every Python file but the tests."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("profiler_scripts/*.py")]
    assert len(files) >= 25
    return files


def code_lines(source: str) -> int:
    """Lines that hold code: not blank, no comment, no docstring."""
    docs = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    thin = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in thin | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def test_code_lines_are_counted_right():
    code = ["x = 1  # why", "def f():", '    s = """a', "", '    b"""', "    return (", "s", ")"]
    source = "\n".join(
        ['"""Doc."""', "", "# comment", *code[:2], '    """Two', '    lines."""', *code[2:]]
    )
    assert code_lines(source) == len(code)


def test_from_text_to_the_next_token_is_few_lines():
    counts = {name: code_lines((ROOT / f"{name}.py").read_text()) for name in CORE}
    assert sum(counts.values()) < CORE_LINES, counts
    assert f"under {CORE_LINES} lines of code" in (ROOT / "README.md").read_text()


def test_no_file_is_long():
    counts = {file.name: code_lines(file.read_text()) for file in scripts()}
    assert max(counts.values()) <= FILE_LINES, counts
    assert all(counts[f"{name}.py"] <= bound for name, bound in SHORT.items()), counts
    lines = [line.strip() for line in (ROOT / "kernels.cpp").read_text().splitlines()]
    assert sum(bool(line) and not line.startswith("//") for line in lines) <= CPP_LINES


def imported(file: Path) -> set[str]:
    """The modules that a file names in its imports, those within functions included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "optional":
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def test_every_file_imports_only_from_lower_floors():
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    for file in scripts():
        if file.name == "setup.py":
            continue
        own = floor_of[file.stem if file.parent == ROOT else file.parent.name]
        for name in imported(file) & floor_of.keys():
            within = file.parent != ROOT and floor_of[name] == own  # scripts share code
            assert floor_of[name] < own or within, f"{file.name} imports {name}"


def test_nothing_imports_the_command_line():
    for file in scripts():
        assert "generate" not in imported(file), file


# ---- What the README and docs/ say -------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
README_LINES = 180


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_readme_knows_how_long_the_files_are():
    rows = re.findall(r"^\| (`.*?) \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 12
    for files, lines in rows:
        names = re.findall(r"`(\w+\.py)`", files)
        cpp = (ROOT / "kernels.cpp").read_text().splitlines() if "kernels.cpp" in files else []
        count = sum(bool(line.strip()) and not line.strip().startswith("//") for line in cpp)
        count += sum(code_lines((ROOT / name).read_text()) for name in names)
        assert abs(count - int(lines)) <= count / 20, (files, count)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, heading = target.partition("#")
        text = (page.parent / file).read_text() if file else page.read_text()
        names = [line.lstrip("# ").lower().replace(" ", "-") for line in text.splitlines()]
        assert not heading or heading in names, target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks.md"], ids=lambda page: page.name)
def test_a_row_of_a_table_has_a_cell_for_each_column(page):
    columns = 0
    for line in page.read_text().splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not bars or not columns or bars == columns, line
        columns = bars


def test_the_tests_named_for_exactness_exist():
    names = re.findall(r"(\w+\.py)?::(\w+)", (ROOT / "docs" / "exactness.md").read_text())
    assert len(names) >= 15
    file = ""
    for name, test in names:
        file = name or file
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)


def blocks() -> list[list[str]]:
    """The lines of each bash block of the README and docs/, each line where it stands first."""
    found, seen = [], set()
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line for line in block.splitlines() if line and line not in seen]
            seen.update(lines)
            found.append(lines)
    return found


def commands() -> list[str]:
    return [line for block in blocks() for line in block]


# Commands that need a hub, a reader's file or a new environment, and where each is run.
ELSEWHERE = {
    "pip install": ".ci/run",
    "python -m pytest": ".ci/run",
    "scripts/prepare.sh": "test_prepare_downloads_and_converts_from_any_folder",
    "python scripts/convert_gguf.py": "test_convert.py",
}


def test_commands_run_elsewhere_are_indeed_run_there():
    tests = "".join(file.read_text() for file in ROOT.glob("tests/test_*.py"))
    ci = (ROOT / ".ci" / "run").read_text()
    assert "def test_prepare_downloads_and_converts_from_any_folder" in tests
    for command in commands():
        if command.startswith(("pip install -r requirements-dev", "python -m pytest")):
            assert command.removeprefix("pip install ") in ci


def runnable() -> list[str]:
    return [line for line in commands() if not line.startswith(tuple(ELSEWHERE))]


def test_the_readme_has_commands():
    assert len(runnable()) >= 8


def copy_scripts(folder: Path) -> Path:
    """Copy what a clone has, but for checkpoints and tests."""
    names = ["*.py", "*.cpp", "*.json", "*.txt", "*.md", "*/*.py", "*/*.sh", "*/*.txt"]
    for file in (file for name in names for file in ROOT.glob(name)):
        if file.parent.name not in ("tests", "checkpoints"):
            copy = folder / file.relative_to(ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(file, copy)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the scripts, with the default model (made once, from the package index)."""
    subprocess.run([sys.executable, ROOT / "scripts" / "default_model.py"], check=True)
    folder = copy_scripts(tmp_path_factory.mktemp("clone"))
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def short_clone(clone, tmp_path_factory) -> Path:
    """A clone whose default model has two of its layers: commands do all that they do, sooner."""
    folder = copy_scripts(tmp_path_factory.mktemp("short"))
    path = folder / DEFAULT_CHECKPOINT.relative_to(ROOT)
    ignored = shutil.ignore_patterns("*.pth")
    shutil.copytree(DEFAULT_CHECKPOINT.parent, path.parent, ignore=ignored)
    config = read_json(path.with_name("config.json")) | {"num_hidden_layers": 2}
    path.with_name("config.json").write_text(json.dumps(config))
    state = torch.load(DEFAULT_CHECKPOINT, mmap=True)
    kept = {name: t for name, t in state.items() if not re.match(r"layers\.([2-9]|\d\d)", name)}
    torch.save(kept, path)
    return folder


BIN = Path(sys.executable).parent


def run_in(folder: Path, *command: str, stdin: str = "", bin=BIN) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DEVICE")}
    env["PATH"] = f"{bin}:{BIN}:{env['PATH']}"
    options = dict(cwd=folder, input=stdin, capture_output=True, text=True, env=env)
    return subprocess.run(command, **options)


@pytest.mark.slow
def test_the_first_command_of_the_readme_prints_what_stands_there(clone):
    command = next(line for line in runnable() if "generate.py" in line)
    done = run_in(clone, "bash", "-c", command)
    assert done.returncode == 0 and "tokens/s" in done.stderr, done.stderr
    assert f"```\n{done.stdout}[37 prompt tokens, 8 new" in (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def outcomes(short_clone, tmp_path_factory) -> dict[str, subprocess.CompletedProcess]:
    """Every command with how it ended; those of a block that quantizes first."""
    python, text = tmp_path_factory.mktemp("bin") / "python", "What is a llama?\nWhy?\n/quit\n"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(commands_of(short_clone))} "$@"\n')
    python.chmod(0o755)
    ordered = sorted(blocks(), key=lambda block: not any("quantize.py" in line for line in block))
    lines = [line for block in ordered for line in block if line in runnable()]
    options = dict(stdin=text, bin=python.parent)
    return {line: run_in(short_clone, "bash", "-c", line, **options) for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("command", runnable(), ids=lambda command: command[:60])
def test_a_command_of_the_readme_works(command, outcomes):
    done = outcomes[command]
    assert done.returncode == 0, done.stderr
    if "generate.py" in command and "quantize.py" not in command:
        # what follows random tokens may be one long word
        assert len(done.stdout) > 20 and "tokens/s" in done.stderr


@pytest.fixture(scope="module")
def core_alone(clone, tmp_path_factory) -> Path:
    """A copy without what can be left out."""
    folder = tmp_path_factory.mktemp("core") / "copy"
    shutil.copytree(clone, folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LEFT_OUT:
        (folder / f"{name}.py").unlink()
    (folder / "kernels.cpp").unlink()
    return folder


@pytest.mark.slow
def test_everything_else_can_be_left_out(core_alone):
    flags = ["--prompt", "The capital of France is", "--max_new_tokens", "1", "--temperature", "0"]
    done = run_in(core_alone, sys.executable, "generate.py", "--precision", "float32", *flags)
    assert done.stdout == "The capital of France is Paris\n", done.stderr


EACH = """
import json, runpy, sys
for flags in json.loads(sys.argv[1]):
    sys.argv = ["generate.py", *flags]
    try:
        runpy.run_path("generate.py", run_name="__main__")
    except SystemExit as exit:
        print(exit.code)
"""


def test_a_flag_says_which_file_it_needs(core_alone):
    flags = {"speculate": ["--prompt_lookup"], "prefill_cache": ["--prefill_context", "It was"]}
    flags |= {"ranges": ["--profile", "never.json"], "chat": ["--interactive"]}
    flags["jsonl"] = ["--jsonl"]
    done = run_in(core_alone, sys.executable, "-c", EACH, json.dumps([*flags.values()]))
    assert done.stdout == "2\n" * len(flags), done.stderr
    for name, line in zip(flags, done.stderr.splitlines(), strict=True):
        assert line.startswith("error: ") and f"needs {name}.py" in line
    assert not (core_alone / "never.json").exists()


def test_the_greedy_text_of_the_default_model(clone):
    """In float32, where rounding does not decide; the sentence is what the model has learned."""
    flags = ["--prompt", "The capital of France is", "--max_new_tokens", "1", "--temperature", "0"]
    done = run_script("generate.py", "--precision", "float32", *flags)
    assert done.stdout == "The capital of France is Paris\n", done.stderr


@pytest.mark.slow
def test_the_python_example_of_the_readme_works(clone):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = run_in(clone, sys.executable, "-c", example)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_modules_can_be_installed(clone, tmp_path):
    flags = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    done = run_in(clone, sys.executable, *flags, ".")
    assert done.returncode == 0, done.stderr
    installed = {file.name for file in tmp_path.iterdir() if file.is_file()}
    assert installed == {f.name for e in ("py", "cpp", "json") for f in ROOT.glob(f"*.{e}")} - {
        "setup.py"
    }
