"""scripts/gpu_check.py runs on a CPU at tiny shapes, and what is wrong there does not pass."""

import json
import subprocess
import sys
import time
from itertools import product

import pytest
import torch

import cli
import kernels
import linear
from conftest import ROOT
from scripts import gpu_check
from scripts.gpu_check import MODES, SCHEMES, STAGES, TABLES, small

BUS = 10.0  # GB/s that the probe is said to find
CPU = torch.device("cpu")
# As gpu_check.SMALL, and smaller: bf16 is slow on most CPUs.
SMALL = {
    "llama": small(128, 4, 2, 128, vocab_size=96),
    "qwen2": small(128, 4, 1, 128, vocab_size=96, model_type="qwen2"),
    "qwen3": small(128, 2, 2, 128, vocab_size=96, model_type="qwen3", head_dim=128),
    "tied": small(128, 4, 4, 128, vocab_size=96, tie_word_embeddings=True),
}


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Run the command line on the CPU, eagerly: exit code, report, errors, and the rows."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # both are restored afterwards
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_check, "read_bandwidth", lambda device: BUS * 1e9)
    short = {"REPEATS": 2, "GEN": 8, "NEW_TOKENS": 16, "DEPTH": 64, "PREFILL": 48}
    short |= {"SMALL": SMALL, "SHAPES": gpu_check.SHAPES | {"tiny": SMALL["llama"]}}
    for name, value in short.items():
        monkeypatch.setattr(gpu_check, name, value)

    def check(*flags):
        file = tmp_path / "rows.json"
        argv = ["gpu_check.py", "--device", "cpu", "--shapes", "tiny", "--modes", "eager"]
        monkeypatch.setattr(sys, "argv", [*argv, "--json", str(file), *map(str, flags)])
        code = 0
        try:
            cli.run(gpu_check.main, gpu_check.make_parser())
        except SystemExit as exit:
            code = exit.code
        rows = json.loads(file.read_text())["rows"] if file.exists() else None
        return code, *capsys.readouterr(), rows

    return check


@pytest.fixture
def plant(monkeypatch):
    """Make every int8 product wrong in the way of a function of x and y."""

    def plant(spoil):
        right = linear.Int8Linear.matmul
        monkeypatch.setattr(kernels, "fuse", lambda model: None)  # would not call it
        wrong = lambda s, x, prefill: spoil(x, right(s, x, prefill))  # noqa: E731
        monkeypatch.setattr(linear.Int8Linear, "matmul", wrong)

    return plant


def status_of(rows, stage):
    return {row["cell"]: row["status"] for row in rows if row["stage"] == stage}


# ---- The whole ---------------------------------------------------------------------------------


def test_every_stage_runs_and_every_cell_is_in_the_report(check, tmp_path):
    code, out, err, rows = check("--markdown", tmp_path / "report.md")
    assert code == 0, err
    assert out == (tmp_path / "report.md").read_text()
    assert {row["stage"] for row in rows} == set(STAGES)
    assert {row["status"] for row in rows} == {"passed"}
    assert out.endswith(f"{len(rows)} passed, 0 skipped, 0 failed.\n")
    for model, scheme in product(SMALL, SCHEMES):
        assert f"\n| {model} | {scheme} | eager | 0.0" in out
    assert [*status_of(rows, "text")] == [f"{scheme} eager" for scheme in SCHEMES]
    for kind in TABLES:
        assert f"\n#### {kind.capitalize()}\n" in out
    assert f"torch {torch.__version__}" in out and out.count(f"| {BUS} |") == 2


def test_speed_is_beside_the_bytes_and_the_bandwidth(check):
    code, out, err, rows = check("--stages", "bandwidth-before,speed")
    assert code == 0, err
    for row in (row for row in rows if row["stage"] == "speed"):
        assert row["prefill_tokens_per_s"] > 0 and row["compile_s"] is None
        assert all(row[f"verify_{n}"] > 0 for n in (2, 4, 8))
        model = gpu_check.build(SMALL["llama"], row["scheme"], CPU)
        model.setup_caches(1, 320)
        assert [part["depth"] for part in row["depths"]] == [0, 64] and row["prompt"] == 48
        for part, seen in zip(row["depths"], (64, 128), strict=True):
            assert part["MB_per_token"] == pytest.approx(model.bytes_per_step(seen) / 1e6)
            assert 0 < part["min"] <= part["tokens_per_s"] <= part["max"]
            share = part["tokens_per_s"] * part["MB_per_token"] * 1e6 / (BUS * 1e9)
            speed = f"| tiny | {row['cell'].removeprefix('tiny ').removesuffix(' eager')} | eager "
            speed += f"| {part['depth']} | {part['tokens_per_s']:.1f} | "
            (line,) = (line for line in out.splitlines() if line.startswith(speed))
            assert f" | {share:.2f} | passed |" in line


def test_each_mode_is_what_runs_its_cells(check, monkeypatch):
    """Every mode's cells ask for its compilation; compiling itself is tested with the Engine."""
    asked = []

    class Recorder(gpu_check.Engine):
        def __init__(self, model, compile):
            asked.append(compile)
            super().__init__(model, None)

    monkeypatch.setattr(gpu_check, "Engine", Recorder)
    monkeypatch.setattr(gpu_check, "SMALL", {"llama": SMALL["llama"]})
    monkeypatch.setattr(gpu_check, "SCHEMES", ("bf16",))
    for mode in MODES:
        asked.clear()
        code, _, err, rows = check("--modes", mode, "--stages", "correctness,speed")
        assert code == 0, err
        assert {row["mode"] for row in rows} == {mode}
        assert set(asked) == {None if mode == "eager" else mode}


# ---- What is wrong does not pass ---------------------------------------------------------------


def test_a_wrong_scale_fails_its_cells_alone(check, plant):
    plant(lambda x, y: y * 1.05)
    code, out, err, rows = check("--stages", "environment,correctness")
    assert code == 1
    found = status_of(rows, "correctness")
    assert found == {
        f"{model} {scheme} eager": "failed" if scheme == "int8" else "passed"
        for model, scheme in product(SMALL, SCHEMES)
    }
    cells = ", ".join(f"{model} int8 eager" for model in SMALL)
    assert f"Failed:\n- correctness {cells}: over the bound: prefill, decode" in out


@pytest.mark.parametrize(
    "rows, over", [(1, "decode"), (2, "batch"), (5, "verify"), (60, "prefill")]
)
def test_each_kind_of_pass_is_checked(check, plant, monkeypatch, rows, over):
    monkeypatch.setattr(gpu_check, "SCHEMES", ("int8",))
    plant(lambda x, y: y * 1.5 if len(x) == rows else y)
    code, _, err, found = check("--stages", "correctness")
    assert code == 1
    for row in found:
        wrong = {name for name in ("prefill", "decode", "verify", "batch") if row[name] > 0.03}
        # What a wrong prefill leaves in the cache spoils what attends to it.
        assert over in wrong and (rows == 60 or wrong == {over}), row
        assert over in row["note"] and row["status"] == "failed"


def test_nan_never_passes(check, plant, monkeypatch):
    monkeypatch.setattr(gpu_check, "SCHEMES", ("int8",))
    plant(lambda x, y: y * float("nan"))
    code, _, _, rows = check("--stages", "correctness,text")
    assert code == 1
    assert {row["status"] for row in rows} == {"failed"}


def test_a_text_that_differs_in_a_wide_gap_fails_and_in_a_near_tie_does_not(check, monkeypatch):
    def third_is_wrong(engine, prompt, new):
        return [*new[:2], (new[2] + 1) % 96, *new[3:]]

    monkeypatch.setattr(gpu_check, "SCHEMES", ("bf16",))
    monkeypatch.setattr(gpu_check, "verified", third_is_wrong)
    code, out, _, (row,) = check("--stages", "text")
    assert code == 1 and row["status"] == "failed" and row["batch_beside_alone"] == "equal"
    assert row["verify_beside_alone"].startswith("token 2, gap ")
    monkeypatch.setattr(gpu_check, "TIES", {"bf16": 100.0})
    code, out, _, (row,) = check("--stages", "text")
    assert code == 0 and row["status"] == "passed" and row["note"] == "differs in near ties"


def test_texts_that_are_equal_but_not_the_likeliest_fail(check, monkeypatch):
    monkeypatch.setattr(gpu_check, "SCHEMES", ("bf16",))
    monkeypatch.setattr(gpu_check, "greedy", lambda engine, prompts: [[7] * 8 for _ in prompts])
    monkeypatch.setattr(gpu_check, "verified", lambda engine, prompt, new: new)
    code, _, _, (row,) = check("--stages", "text")
    assert code == 1 and row["alone_beside_eager"] == row["verify_beside_alone"] == "equal"


# ---- Cells and stages stand alone --------------------------------------------------------------


def broken(*_, **__):
    raise RuntimeError("a kernel is missing\nand more")


@pytest.mark.parametrize("part", ["labels", "a cell"])
def test_a_stage_that_raises_does_not_stop_the_others(check, monkeypatch, part):
    labels, measure, share = STAGES["correctness"]
    stage = (broken, measure, share) if part == "labels" else (labels, broken, share)
    monkeypatch.setitem(STAGES, "correctness", stage)
    code, out, err, rows = check("--stages", "correctness,bandwidth-after")
    assert code == 1
    assert set(status_of(rows, "correctness").values()) == {"failed"}
    assert len(status_of(rows, "correctness")) == (1 if part == "labels" else 20)
    assert status_of(rows, "bandwidth-after") == {"": "passed"}
    assert "Traceback" in err and ": RuntimeError: a kernel is missing\n" in out


def test_without_time_the_rest_is_skipped_with_words(check):
    code, out, _, rows = check("--budget", 0.001)
    assert code == 0
    assert {row["stage"] for row in rows if row["status"] == "passed"} == {"environment"}
    assert {row["note"] for row in rows if row["status"] == "skipped"} == {"lack of time"}
    assert "Skipped:\n- bandwidth-before : lack of time\n- correctness llama bf16 eager," in out
    assert out.endswith(f"1 passed, {len(rows) - 1} skipped, 0 failed.\n")


def test_a_cell_that_takes_too_long_is_cut_off(check, monkeypatch):
    def one(args):
        return [{"scheme": "bf16"}]

    monkeypatch.setitem(STAGES, "text", (one, lambda device, scheme: time.sleep(60), 0.5))
    began = time.monotonic()
    code, out, _, rows = check("--stages", "text,bandwidth-after", "--budget", 4)
    assert time.monotonic() - began < 4
    assert code == 0 and "- text bf16: cut off after 2 s" in out
    assert status_of(rows, "bandwidth-after") == {"": "passed"}
    _, out, _, _ = check("--stages", "text", "--budget", 1)  # alone it has all the time
    assert "- text bf16: cut off after 1 s" in out


# ---- The command line --------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_one_sentence_says_so(check):
    code, out, err, rows = check("--device", "cuda")
    assert code == 2 and out == "" and rows is None
    assert err == "error: there is no CUDA device; --device cpu --shapes tiny tries the script\n"


def test_large_shapes_on_a_cpu_are_refused(check):
    code, _, err, _ = check("--shapes", "llama-3-8b")
    assert code == 2 and err == "error: llama-3-8b takes hours on a CPU; add --shapes tiny\n"


@pytest.mark.slow
def test_only_torch_is_needed():
    blocked = "tqdm tokenizers sentencepiece safetensors gguf lm_eval huggingface_hub transformers"
    code = "import runpy, sys; sys.modules |= dict.fromkeys(sys.argv.pop(1).split()); "
    code += "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--device", "cpu", "--shapes", "tiny", "--stages", "environment"]
    command = [sys.executable, "-c", code, blocked, ROOT / "scripts" / "gpu_check.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 passed, 0 skipped, 0 failed." in done.stdout
