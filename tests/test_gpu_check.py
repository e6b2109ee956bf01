"""scripts/gpu_check.py runs on a CPU at tiny shapes, and what is wrong there does not pass."""

import functools
import json
import os
import subprocess
import sys
import time
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import cudagraph
import engine
import linear
import mixture
import model
import operators  # noqa: F401  their schemas
import process
from conftest import ROOT
from scripts import gpu_check, gpu_correctness, gpu_models, gpu_speed
from scripts.gpu_check import STAGES, TABLES, Stage
from scripts.gpu_models import MODES, SCHEMES, choosing, small

pytestmark = pytest.mark.slow  # stages in processes of their own

BUS = 10.0  # GB/s that the probe is said to find
CPU = torch.device("cpu")
# As gpu_models.SMALL, and smaller: bf16 is slow on most CPUs.
LLAMA = small(128, 4, 2, 128, vocab_size=96)
QWEN3 = small(128, 2, 2, 128, vocab_size=96, model_type="qwen3", head_dim=128)
SHORT = {
    gpu_correctness: {
        "NEW_TOKENS": 12, "REPLAYS": 2, "WIDTHS": (64, 256), "HEIGHTS": (17,), "ROWS": (1, 2, 9),
        "PREFILLS": (33,), "HEAD_SIZES": (64,), "HEADS": ((4, 2),), "POSITIONS": 70,
        "EXPERT": (64, 64),
    },
    gpu_speed: {
        "REPEATS": 2, "GEN": 4, "DEPTHS": (0, 64), "PREFILL": 48, "COPIES": 2, "TRACED": 2,
        "DEPTHS_ALONE": (40,), "MEMORY_LENGTH": 64,
    },
}  # fmt: skip


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Run the command line on the CPU: exit code, report, errors, and the rows."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # both are restored afterwards
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu_speed, "read_bandwidth", lambda device: BUS * 1e9)
    monkeypatch.setattr(gpu_check, "works", lambda device: True)  # collects garbage: takes long
    for module, values in SHORT.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    for name in ("qwen2", "tied"):
        monkeypatch.delitem(gpu_models.SMALL, name)
    monkeypatch.setitem(gpu_models.SMALL, "llama", LLAMA)
    monkeypatch.setitem(gpu_models.SMALL, "qwen3", QWEN3)
    monkeypatch.setitem(gpu_models.SHAPES, "tiny", LLAMA)

    def check(*flags):
        file = tmp_path / "rows.json"
        argv = ["gpu_check.py", "--device", "cpu", "--shapes", "tiny", "--json", str(file)]
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, flags)])
        code = 0
        try:
            process.run(gpu_check.main, gpu_check.make_parser())
        except SystemExit as exit:
            code = exit.code
        rows = json.loads(file.read_text())["rows"] if file.exists() else None
        return code, *capsys.readouterr(), rows

    return check


@pytest.fixture
def schemes(monkeypatch):
    """Choose the schemes that are checked."""

    def choose(*names):
        for module in (gpu_correctness, gpu_speed):
            monkeypatch.setattr(module, "SCHEMES", names)
        monkeypatch.setattr(gpu_correctness, "PRODUCTS", names)
        monkeypatch.setattr(gpu_speed, "MAIN", names)

    return choose


# ---- This project's operators in float64, for CPUs without the kernels: rounded to 16 bits, a row
# has the same bits beside any others.

MARKERS = {"int8": "scales", "int8-activation": "scales_a8", "int4": "scales_and_zeros"}


def float_product(scheme):
    """A product from the stored tensors, with what follows the weight: its grid, and peaks of x."""

    def product(x, packed, *rest):
        layer = linear.Linear(x.shape[1], len(packed))
        if scheme != "bf16":
            layer = linear.linear_for(layer, {MARKERS[scheme]: rest[0]})
            setattr(layer, MARKERS[scheme], torch.nn.Parameter(rest[0].double(), False))
        layer.weight = torch.nn.Parameter(packed, False)
        y = x.double()
        if scheme == "int8-activation":
            step = rest[1].clamp(min=1e-12) / 127
            y = (x.float() / step).round().double() * step.double()
        return (y @ layer.dequantize().double().t()).to(x.dtype)

    return product


def rotate_write(qkv, pos, freqs_cis, q_norm, k_norm, eps, k_cache, v_cache):
    kv = k_cache.shape[1]
    q, k, v = qkv.split((qkv.shape[2] - 2 * kv, kv, kv), 2)
    q, k = (
        gpu_correctness.exact_rotation(x, freqs_cis[pos], gain, eps).to(qkv.dtype)
        for x, gain in ((q, q_norm), (k, k_norm))
    )
    rows = torch.arange(len(pos)).unsqueeze(1)
    k_cache[rows, :, pos], v_cache[rows, :, pos] = k, v
    return q


def attend(q, k_cache, v_cache, *options):
    y = gpu_correctness.exact_attention(q, (k_cache, v_cache), *options)
    return y.nan_to_num().to(q.dtype)  # padding sees nothing


def experts(x, chosen, shares, *stacks):
    """One row and one expert after the other."""
    schemes = {torch.int8: "int8", torch.uint8: "int4"}

    def multiply(x, expert, packed, grid):
        product = float_product(schemes.get(packed.dtype, "bf16"))
        return product(x, packed[expert], None if grid is None else grid[expert])

    y = torch.zeros(x.shape, dtype=torch.float64)
    for i, slot in product(range(len(x)), range(chosen.shape[1])):
        row, expert = x[i : i + 1].double(), chosen[i, slot]
        h = torch.nn.functional.silu(multiply(row, expert, *stacks[:2]))
        h = h * multiply(row, expert, *stacks[2:4])
        y[i] += multiply(h, expert, *stacks[4:6])[0] * shares[i, slot]
    return y.float()


OPERATORS = {
    "experts": experts,
    "linear_bf16": float_product("bf16"),
    "linear_int8": float_product("int8"),
    "linear_int8_activation": float_product("int8-activation"),
    "linear_int4": float_product("int4"),
    "rotate_write": rotate_write,
    "attend": attend,
}


@pytest.fixture
def float_operators(monkeypatch):
    """Have the operators on the CPU, each replaced by what a test plants; no fused step."""
    planted = {}

    def register(library, name):
        def operator(*inputs):
            y = OPERATORS[name](*inputs)
            return planted[name](y, *inputs) if name in planted else y

        library.impl(name, operator, "CPU")

    kernels = SimpleNamespace(
        pack=lambda weight, grid=None: (weight, grid) if weight.dtype != torch.float32 else None,
        take_cache=lambda cache: cache.dtype != torch.float32,
        fuse=lambda network: None,
    )
    for module in (linear, mixture, model, engine):
        monkeypatch.setattr(module, "kernels_for", lambda device: kernels)
    with torch.library._scoped_library("tokenbus", "IMPL") as library:
        for name in OPERATORS:
            register(library, name)
        yield SimpleNamespace(planted=planted, kernels=kernels)


@pytest.fixture
def plant(monkeypatch):
    """Make every int8 product of PyTorch wrong in the way of a function of x and y."""

    def plant(spoil):
        right = linear.Int8Linear.matmul
        wrong = lambda s, x, prefill: spoil(x, right(s, x, prefill))  # noqa: E731
        monkeypatch.setattr(linear.Int8Linear, "matmul", wrong)

    return plant


def status_of(rows, stage):
    return {row["cell"]: row["status"] for row in rows if row["stage"] == stage}


# ---- The whole ---------------------------------------------------------------------------------


def test_every_stage_runs_and_every_cell_is_in_the_report(
    check, schemes, float_operators, monkeypatch
):
    schemes("int4 g32")
    monkeypatch.setattr(gpu_speed, "first_tokens", None)  # of other processes: see below
    done = lambda *_, **__: SimpleNamespace(  # noqa: E731
        returncode=0, stdout='### Check of old\n\nold table\n{"ran": "fused", "first_s": 1.5}'
    )
    monkeypatch.setattr(gpu_speed.subprocess, "run", done)
    code, out, err, rows = check("--modes", "fused,torch", "--before", ROOT)
    assert code == 0, err
    assert {row["stage"] for row in rows} == set(STAGES)
    assert {row["status"] for row in rows} == {"passed"}
    assert out.endswith(f"{len(rows)} passed, 0 skipped, 0 failed.\n")
    for name in TABLES:
        assert f"\n#### {name.capitalize()}\n" in out
    for name in ("llama", "qwen3"):
        assert f"\n| {name} | int4 g32 | fused | operators | 0.0" in out
        assert f"\n| {name} | int4 g32 | torch | torch | 0.0" in out
    for name in ("int4 g32", "attend 64", "rotate_write 64"):
        assert f"\n| {name} | bfloat16 | 0.0" in out and f"\n| {name} | float16 | 0.0" in out
    assert f"#### Before: {ROOT}\n\n### Check of old\n\nold table" in out
    assert f"torch {torch.__version__}" in out and out.count(f"| {BUS} |") == 2


def test_speed_is_beside_the_bytes_and_the_bandwidth(check):
    flags = ["--stages", "bandwidth-before,speed", "--modes", "fused"]
    code, out, err, rows = check(*flags)
    assert code == 0, err
    rows = [row for row in rows if row["stage"] == "speed"]
    assert [row["scheme"] for row in rows] == [*gpu_speed.MAIN, "int8-activation", "int4 g128"]
    for row in rows:
        assert row["prefill_tokens_per_s"] > 0
        assert all(row[f"verify_{n}"] > 0 for n in (2, 4, 8))
        network = gpu_models.build(LLAMA, row["scheme"], CPU)
        network.setup_caches(1, 320)
        assert [part["depth"] for part in row["depths"]] == [0, 64] and row["prompt"] == 48
        for part in row["depths"]:
            seen = part["depth"] + 2 + 1.5  # the mean of 4 steps
            assert part["MB_per_token"] == pytest.approx(network.bytes_per_step(seen) / 1e6)
            assert 0 < part["min"] <= part["tokens_per_s"] <= part["max"]
            share = part["tokens_per_s"] * part["MB_per_token"] * 1e6 / (BUS * 1e9)
            speed = f"| tiny | {row['scheme']} | fused | {row['ran']} | {part['depth']} | "
            (line,) = (line for line in out.splitlines() if line.startswith(speed))
            assert f" | {share:.2f} | – | passed |" in line


def test_products_are_timed_on_weights_in_turns(check, float_operators, schemes, monkeypatch):
    schemes("int8")
    seen = []
    float_operators.planted["linear_int8"] = lambda y, x, packed, *_: (
        seen.append(packed.data_ptr()) or y
    )
    monkeypatch.setattr(gpu_speed, "cold_bytes", lambda device: 1e9)
    code, out, err, rows = check("--stages", "bandwidth-before,products")
    assert code == 0, err
    # Of two cells, which may have the same memory, not more.
    assert sum(a == b for a, b in zip(seen, seen[1:], strict=False)) <= 4 < len(seen) // 20
    assert [row["what"] for row in rows[1:]] == ["wqkv", "wo", "w1", "w2", "output", "attend 40"]
    for row in rows[1:]:
        assert row["share_1"] == row["rows_1"] / BUS and row["ran"] == "operators"
    assert rows[1]["MB"] == (256 * 128 + 2 * 256) / 1e6  # codes and scales


def test_a_start_is_two_processes_of_which_the_first_has_empty_caches(check, monkeypatch):
    run, calls = subprocess.run, []

    def once(command, env, **options):
        """Run the first; what it prints is the second's, too."""
        calls.append((env["TRITON_CACHE_DIR"], os.path.exists(env["TRITON_CACHE_DIR"])))
        os.makedirs(env["TRITON_CACHE_DIR"], exist_ok=True)
        calls[0] += (run(command, env=env, **options),) if len(calls) == 1 else ()
        return calls[0][-1]

    monkeypatch.setattr(gpu_speed.subprocess, "run", once)
    code, _, err, (row,) = check("--stages", "start", "--modes", "fused")
    assert code == 0, err
    (first, had, _), (second, has) = calls
    assert first == second and not had and has
    assert 0 < row["cold_s"] == row["warm_s"] < row["cold_process_s"]


def test_another_checkout_is_measured_by_its_own_script(check, tmp_path):
    script = tmp_path / "old" / "scripts" / "gpu_check.py"
    script.parent.mkdir(parents=True)
    script.write_text("import sys; print('flags', *sys.argv[1:]); sys.exit(int(OUTCOME))")
    flags = ["--stages", "before", "--before", script.parents[1], "--budget", 100]
    for outcome, status in ((0, "passed"), (1, "passed"), (2, "failed")):
        script.write_text(f"import sys; print('flags', *sys.argv[1:]); sys.exit({outcome})")
        code, out, err, (row,) = check(*flags)
        assert row["status"] == status and code == (status == "failed"), err
        assert (
            "flags --device cpu --shapes tiny --budget 100 --stages bandwidth-before,speed" in out
        )
    code, _, err, _ = check("--before", tmp_path)
    assert code == 2 and err.startswith(
        "error: argument --before: there is no scripts/gpu_check.py"
    )


# ---- The modes ---------------------------------------------------------------------------------


def test_each_mode_chooses_who_runs_a_step(float_operators, monkeypatch):
    asked = []
    compiled = lambda function: asked.append("compiled") or function  # noqa: E731
    monkeypatch.setattr(engine, "compiled", compiled)

    def fuse(network, pdl=False):
        asked.extend(["dependent launch"] if pdl else [])
        return lambda *inputs: tuple(network(*inputs))

    float_operators.kernels.fuse = fuse
    network, found = gpu_models.build(LLAMA, "int8", CPU), {}
    for mode in (*MODES, *reversed(MODES)):  # whatever ran before
        asked.clear()
        started = gpu_models.start(network, mode, 1, 64)
        found.setdefault(mode, set()).add((gpu_models.runner(started), *asked))
    assert found == {
        "fused": {("fused",)},
        "operators": {("operators",)},
        "torch": {("torch",)},
        "pdl": {("fused", "dependent launch")},
        "block": {("operators", "compiled")},
    }
    with choosing("torch"):
        assert engine.cudagraph is None  # nor is a step captured
    assert engine.cudagraph is cudagraph


def test_another_step_than_asked_for_is_a_failure_where_kernels_are(check, schemes, monkeypatch):
    schemes("bf16")
    monkeypatch.setattr(gpu_models, "has_kernels", lambda device: True)
    for module in (linear, mixture, model, engine):
        monkeypatch.setattr(module, "kernels_for", lambda device: None)
    code, out, _, rows = check("--stages", "text", "--modes", "operators,fused")
    assert code == 1 and "text bf16 operators: RuntimeError: torch runs where operators" in out
    assert "text bf16 fused: RuntimeError: torch runs where" in out


# ---- What is wrong does not pass ---------------------------------------------------------------


def scaled(y, *_):
    return y * 1.1


def neighbourly(y, x, *_):
    return y * (1 + 1e-2 * (len(x) == 2))


def stray(y, *inputs):
    inputs[-1][0, 0, 3] = 9  # of the values' cache
    return y


@pytest.mark.parametrize(
    "name, spoil, note",
    [
        ("linear_int8", scaled, ": error, prefill"),
        ("linear_int4", neighbourly, "by 17, 2 rows"),
        ("linear_bf16", lambda y, x, *_: y - x[:, -1:] * 0.2, "over 0.0"),  # the last column
        ("linear_int8_activation", lambda y, *_: y.index_fill(1, torch.tensor(16), 0), "over 0.0"),
        ("attend", lambda y, q, k, v, pos, *_: y * (1 + 0.1 * (pos == 0))[..., None], "over 0.0"),
        ("attend", lambda y, *_: y * float("nan"), ": error"),
        ("attend", lambda y, q, *_: y * (1 + 4e-3 * (q.shape[1] == 32)), "bits: 4/2 heads"),
        ("experts", lambda y, x, *_: y * (1 + 1e-2 * (len(x) == 2)), "bits: 2 rows"),
        ("experts", lambda y, *_: y.index_fill(1, torch.tensor(63), 0), "over 0.0"),
        ("rotate_write", stray, "bits: 4/2"),
        ("rotate_write", lambda y, *_: y.flip(-1), ": error"),
    ],
)  # fmt: skip
def test_a_wrong_operator_fails_its_cells_alone(check, float_operators, name, spoil, note):
    float_operators.planted[name] = spoil
    code, out, err, rows = check("--stages", "operators")
    wrong = name.removeprefix("linear_").replace("_activation", "-activation")
    assert code == 1, err
    for row in rows:
        spoilt = row["operator"].split()[0] == wrong
        assert (row["status"] == "failed") == spoilt, row
        assert not spoilt or note in row["note"], row["note"]


def test_where_no_operator_is_the_cells_are_skipped_and_on_a_gpu_failed(check, monkeypatch):
    for module in (linear, mixture, model, engine):
        monkeypatch.setattr(module, "kernels_for", lambda device: None)
    for on_gpu, status in ((False, "skipped"), (True, "failed")):
        monkeypatch.setattr(gpu_correctness, "has_kernels", lambda device, on_gpu=on_gpu: on_gpu)
        code, _, _, rows = check("--stages", "operators")
        assert {row["status"] for row in rows} == {status} and code == on_gpu


def test_a_wrong_scale_fails_its_cells_alone(check, plant):
    plant(lambda x, y: y * 1.05)
    code, out, err, rows = check("--stages", "environment,logits", "--modes", "torch")
    assert code == 1
    assert status_of(rows, "logits") == {
        f"{name} {scheme} torch": "failed" if scheme == "int8" else "passed"
        for name, scheme in product(("llama", "qwen3"), SCHEMES)
    }
    assert "Failed:\n- logits llama int8 torch, qwen3 int8 torch: over the bound: prefill, d" in out


@pytest.mark.parametrize(
    "rows, over", [(1, "decode"), (2, "batch"), (5, "verify"), (60, "prefill")]
)
def test_each_kind_of_pass_is_checked(check, plant, schemes, rows, over):
    schemes("int8")
    plant(lambda x, y: y * 1.5 if len(x) == rows else y)
    code, _, err, found = check("--stages", "logits", "--modes", "torch")
    assert code == 1
    for row in found:
        wrong = {name for name in ("prefill", "decode", "verify", "batch") if row[name] > 0.03}
        # What a wrong prefill leaves in the cache spoils what attends to it.
        assert over in wrong and (rows == 60 or wrong == {over}), row
        assert over in row["note"] and row["status"] == "failed"


def test_a_step_that_gives_other_bits_when_repeated_fails(check, float_operators, schemes):
    schemes("int8")
    calls = iter(range(10**9))
    float_operators.planted["linear_int8"] = lambda y, *_: y * (1 + 0.004 * (next(calls) % 7 == 0))
    code, out, _, rows = check("--stages", "logits", "--modes", "operators")
    assert code == 1 and {row["replays"] for row in rows} == {"differ"}
    assert "int8 operators: a repeated step gives other bits" in out


def test_nan_never_passes(check, plant, schemes):
    schemes("int8")
    plant(lambda x, y: y * float("nan"))
    code, _, _, rows = check("--stages", "logits,text,waiting", "--modes", "torch")
    assert code == 1
    assert {row["status"] for row in rows} == {"failed"}


def test_a_text_that_differs_in_a_wide_gap_fails_and_in_a_near_tie_does_not(
    check, schemes, monkeypatch
):
    def third_is_wrong(engine, prompt, new):
        return [*new[:2], (new[2] + 1) % 96, *new[3:]]

    schemes("bf16")
    monkeypatch.setattr(gpu_correctness, "verified", third_is_wrong)
    flags = ["--stages", "text", "--modes", "torch"]
    code, out, _, (row,) = check(*flags)
    assert code == 1 and row["status"] == "failed" and row["batch_beside_alone"] == "equal"
    assert row["verify_beside_alone"].startswith("token 2, gap ")
    monkeypatch.setattr(gpu_correctness, "TIES", {"bf16": 100.0})
    code, out, _, (row,) = check(*flags)
    assert code == 0 and row["status"] == "passed" and row["note"] == "differs in near ties"


def test_texts_that_are_equal_but_not_the_likeliest_fail(check, schemes, monkeypatch):
    schemes("bf16")
    greedy = lambda engine, prompts: [[7] * 8 for _ in prompts]  # noqa: E731
    monkeypatch.setattr(gpu_correctness, "greedy", greedy)
    monkeypatch.setattr(gpu_correctness, "verified", lambda engine, prompt, new: new)
    code, _, _, (row,) = check("--stages", "text", "--modes", "torch")
    assert code == 1 and row["alone_beside_torch"] == row["verify_beside_alone"] == "equal"


def test_waiting_is_refused_in_the_loop_alone(monkeypatch):
    """Where a device may be waited for: the prompt, the capture; not once tokens are decoded."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(KeyError), gpu_correctness.no_waiting(torch.device("cuda")):
        raise KeyError
    assert modes == ["error", "default"]


def test_a_model_over_its_room_fails(check, monkeypatch):
    """The bound of Llama-2-70B in int4, with its memory said to be another."""
    peak = 45.9e9
    cuda = SimpleNamespace(
        reset_peak_memory_stats=lambda device: None, max_memory_allocated=lambda device: peak
    )
    monkeypatch.setitem(gpu_speed.ROOM, "tiny", 46.0)
    monkeypatch.setattr(gpu_speed, "free_bytes", lambda device: 80e9)
    monkeypatch.setattr(gpu_speed.torch, "cuda", cuda)
    build = gpu_speed.build
    monkeypatch.setattr(gpu_speed, "build", lambda args, scheme, _: build(args, scheme, CPU))
    measure = functools.partial(
        gpu_speed.measure_memory, torch.device("cuda"), "tiny", "int4 g32", "fused"
    )
    assert measure()["peak_GB"] == 45.9 and "status" not in measure()
    peak = 46.1e9
    assert measure()["status"] == "failed"
    monkeypatch.setattr(gpu_speed, "free_bytes", lambda device: 40e9)
    assert measure() == {"status": "skipped", "note": "needs 46.0 GB of memory"}


# ---- Cells and stages stand alone --------------------------------------------------------------


def broken(*_, **__):
    raise RuntimeError("a kernel is missing\nand more")


@pytest.mark.parametrize("part", ["labels", "a cell"])
def test_a_stage_that_raises_does_not_stop_the_others(check, monkeypatch, part):
    cells, measure, weight = STAGES["logits"]
    stage = Stage(broken, measure, weight) if part == "labels" else Stage(cells, broken, weight)
    monkeypatch.setitem(STAGES, "logits", stage)
    code, out, err, rows = check("--stages", "logits,bandwidth-after", "--modes", "torch")
    assert code == 1
    assert set(status_of(rows, "logits").values()) == {"failed"}
    assert len(status_of(rows, "logits")) == (1 if part == "labels" else 10)
    assert status_of(rows, "bandwidth-after") == {"": "passed"}
    assert "Traceback" in err and ": RuntimeError: a kernel is missing\n" in out


def test_without_time_the_rest_is_skipped_with_words(check):
    code, out, _, rows = check("--budget", 0.001)
    assert code == 0
    assert {row["stage"] for row in rows if row["status"] == "passed"} == {"environment"}
    assert {row["note"] for row in rows if row["status"] == "skipped"} == {"lack of time"}
    assert "Skipped:\n- bandwidth-before : lack of time\n- operators bf16 bfloat16, int8" in out
    assert out.endswith(f"1 passed, {len(rows) - 1} skipped, 0 failed.\n")


def sleepy(device, scheme="", mode=""):
    time.sleep(60)


def test_a_cell_that_takes_too_long_is_cut_off_and_its_time_is_a_share(check, monkeypatch):
    one = lambda args: [{"scheme": "bf16"}]  # noqa: E731
    monkeypatch.setitem(STAGES, "text", Stage(one, sleepy, 25))
    monkeypatch.setitem(STAGES, "bandwidth-after", STAGES["bandwidth-after"]._replace(weight=75))
    began = time.monotonic()
    code, out, _, rows = check("--stages", "text,bandwidth-after", "--budget", 4)
    assert time.monotonic() - began < 4
    assert code == 0 and "- text bf16: cut off after 1 s" in out
    assert status_of(rows, "bandwidth-after") == {"": "passed"}
    _, out, _, _ = check("--stages", "text", "--budget", 2)  # alone it has all the time
    assert "- text bf16: cut off after 2 s" in out


def die(device, scheme):
    os._exit(9)


def hang(device, scheme):
    """As a kernel that never ends: no signal reaches Python."""
    gpu_check.signal.pthread_sigmask(gpu_check.signal.SIG_BLOCK, [gpu_check.signal.SIGALRM])
    time.sleep(60)


@pytest.mark.parametrize("end", [die, hang])
def test_a_cell_that_takes_its_process_along_is_one_failure(monkeypatch, tmp_path, end):
    """As on a GPU, where the stages run in a process of their own."""
    cells = lambda args: [{"scheme": "int8"}, {"scheme": "bf16"}]  # noqa: E731

    def measure(device, scheme):
        return end(device, scheme) if scheme == "int8" else {}

    file = tmp_path / "rows.jsonl"
    file.touch()
    monkeypatch.setattr(gpu_check, "SPAWN", "fork")  # takes what is patched along
    monkeypatch.setattr(gpu_check, "HANGING", 0.2)
    monkeypatch.setitem(STAGES, "text", Stage(cells, measure, 10))
    monkeypatch.setitem(STAGES, "waiting", Stage(lambda args: [{}], lambda device: {}, 90))
    args = SimpleNamespace(stages=["text", "waiting"], modes=[], budget=10, device=CPU)
    gpu_check.supervise(args, file, time.time())
    first, second, last = gpu_check.recorded(file)
    assert first["note"] == "its process died or hung" and first["status"] == "failed"
    assert second["status"] == ("passed" if end is die else "skipped")  # the stage's time is up
    assert last["stage"] == "waiting" and last["status"] == "passed"


def test_a_device_that_no_longer_works_is_left_to_a_new_process(monkeypatch, tmp_path):
    lost = tmp_path / "lost"
    cells = lambda args: [{"scheme": "int8"}, {"scheme": "bf16"}]  # noqa: E731
    file = tmp_path / "rows.jsonl"
    file.touch()
    broken_once = lambda device: lost.exists() or lost.touch()  # noqa: E731
    monkeypatch.setattr(gpu_check, "works", broken_once)
    monkeypatch.setattr(gpu_check, "SPAWN", "fork")
    monkeypatch.setitem(STAGES, "text", Stage(cells, lambda device, scheme: {"at": os.getpid()}, 1))
    args = SimpleNamespace(stages=["text"], modes=[], budget=10, device=CPU)
    gpu_check.supervise(args, file, time.time())
    first, second = gpu_check.recorded(file)
    assert first["status"] == second["status"] == "passed" and first["at"] != second["at"]


def test_a_process_that_never_starts_well_is_a_failure(monkeypatch, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.touch()
    monkeypatch.setattr(gpu_check, "SPAWN", "fork")
    monkeypatch.setattr(gpu_check, "work", lambda *_: sys.exit(7))
    gpu_check.supervise(SimpleNamespace(budget=10), file, time.time())
    assert [(row["status"], row["note"]) for row in gpu_check.recorded(file)] == [
        ("failed", "it ended with 7")
    ]


# ---- The command line --------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_one_sentence_says_so(check):
    code, out, err, rows = check("--device", "cuda")
    assert code == 2 and out == "" and rows is None
    assert err == "error: there is no CUDA device; --device cpu --shapes tiny tries the script\n"


def test_large_shapes_on_a_cpu_are_refused(check):
    code, _, err, _ = check("--shapes", "llama-3-8b")
    assert code == 2 and err == "error: llama-3-8b takes hours on a CPU; add --shapes tiny\n"


def test_only_torch_is_needed():
    blocked = "tqdm tokenizers sentencepiece safetensors gguf lm_eval huggingface_hub transformers"
    code = "import runpy, sys; sys.modules |= dict.fromkeys(sys.argv.pop(1).split()); "
    code += "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = ["--device", "cpu", "--shapes", "tiny", "--stages", "environment"]
    command = [sys.executable, "-c", code, blocked, ROOT / "scripts" / "gpu_check.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 passed, 0 skipped, 0 failed." in done.stdout
