"""profiler_scripts/: every microsecond is counted once and where it belongs, and the Linears that
are chosen for int8 are those that need it."""

import csv
import gzip
import json
import subprocess
import sys
import time

import lm_eval.tasks
import pytest
import torch

import engine
import generate
import process
import quantize
from cli import UserError
from conftest import CONFIG, ROOT, write_checkpoint
from engine import load_model
from linear import Int4Linear, Int8Linear, Linear
from profiler_scripts import layer_accuracy_analysis as accuracy
from profiler_scripts import layer_identification as identification
from profiler_scripts import losses as losses_module
from profiler_scripts import profiler_analysis as profiling
from ranges import scheme_of, title, traced
from tokenizer import Tokenizer

pytestmark = pytest.mark.slow  # traces, and models quantized layer by layer

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
QWEN = CONFIG | SHAPE | {"model_type": "qwen2", "tie_word_embeddings": True}
PARTS = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
NAMES = [f"layers.{i}.{part}" for i in range(2) for part in PARTS] + ["output"]
SENSITIVE = "layers.1.feed_forward.w2"
TEXT = "".join(f"In the year {n * n} the llama saw {n} hills, or {n * 7 % 13}. " for n in range(60))
CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script on a command line: its exit code, standard output and standard error."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        code = 0
        try:
            process.run(script.main, script.make_parser())
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bf16 checkpoint with one Linear that int4 ruins, and a text."""
    path = write_checkpoint(tmp_path_factory.mktemp("profiled") / "model", QWEN, torch.bfloat16)
    state = torch.load(path)
    state[f"{SENSITIVE}.weight"][:, ::32] = 8  # stretches the grid of each group for nothing, as
    state["layers.1.feed_forward.w3.weight"][::32] = 0  # the inputs of these columns are always 0
    del state["output.weight"]  # it is the embedding
    torch.save(state, path)
    (path.parent / "text.txt").write_text(TEXT)
    return path.parent


def rows_of(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- Handmade traces ---------------------------------------------------------------------------


def event(name, ts, dur, cat="user_annotation", tid=1, **args):
    return dict(ph="X", name=name, ts=ts, dur=dur, cat=cat, pid=1, tid=tid, args=args)


def analysed(*events):
    return profiling.analyse([profiling.checked(e) for e in events], "handmade")


def milliseconds(profile, phase="Decode"):
    types = {kind for of, kind, _, _ in profile.tallies if of == phase}
    return {kind: pytest.approx(profile.step_ms(phase, kind=kind)) for kind in types}


WQKV = title("Linear", "int4", "layers.0.attention.wqkv", 500_000)
STEP = [  # one step of 1000 us, not in the order of time
    event(title("RoPE", name="apply_rotary_emb"), 1250, 50),
    event(title("Decode"), 1000, 1000),
    event(title("Attention", name="layers.0.attention", size=20_000), 1100, 400),
    event(WQKV, 1150, 100),
    event(title("Linear", "int8", "layers.0.feed_forward.w1", 900_000), 1600, 300),
    event("aten::mm", 1610, 280, "cpu_op"),  # within a range: its time is the range's
    event(title("Sampling", name="sample"), 2010, 50),  # after the step, of its phase
    event("somebody else's", 1000, 900),
    event(WQKV, 1100, 700, tid=2),  # another thread's
    event(title("Sampling", name="sample"), 10, 50),  # before all steps
]


def test_own_time_of_nested_ranges_counts_once():
    profile = analysed(*STEP)
    expected = {"Linear": 0.4, "Attention": 0.25, "RoPE": 0.05, "Sampling": 0.05, "Other": 0.3}
    assert milliseconds(profile) == expected
    assert profile.total("Decode").us == pytest.approx(1050) and profile.steps == {"Decode": 1}
    assert profile.step_ms("Decode", scheme="int4") == pytest.approx(0.1)
    assert profile.step_ms("Decode", role="w1") == pytest.approx(0.3)
    assert profile.gb_per_s("Decode", role="wqkv") == pytest.approx(5)  # 500 kB in 100 us
    assert profile.gb_per_s("Decode", kind="Linear") == pytest.approx(3.5)
    assert profile.gb_per_s("Decode", kind="Attention") == pytest.approx(0.08)
    assert profile.gb_per_s("Decode", kind="RoPE") is None


def test_rows_add_up_and_know_the_bandwidth():
    profile = analysed(*STEP, event(title("Decode"), 3000, 500))
    rows = list(profiling.rows_of(profile, profile, bandwidth=10.0))
    of = {(row["level"], row["layer_type"], row["scheme"] + row["role"]): row for row in rows}
    assert sum(r["share_percent"] for r in rows if r["level"] == "type") == pytest.approx(100)
    linear, total = of["type", "Linear", ""], of["total", "Total", ""]
    assert linear["count"] == 2 and linear["mean_ms"] == pytest.approx(0.2)
    assert linear["share_percent"] == pytest.approx(100 * 400 / 1550)
    assert of["role", "Linear", "wqkv"]["bandwidth_percent"] == pytest.approx(50)
    assert total["count"] == 2 and total["mean_ms"] == pytest.approx(1.55 / 2)
    assert total["total_ms"] == pytest.approx(1.55)


def test_of_compiled_code_what_can_be_told_is_told():
    region = event("Torch-Compiled Region: 0/0", 100, 600, "cpu_op")
    inside = [
        event("aten::_weight_int4pack_mm_for_cpu", 200, 150, "cpu_op"),
        event("aten::mm", 400, 100, "cpu_op"),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 550, 20, "cpu_op"),
    ]
    output = event(title("Linear", "int8", "output", 1000), 800, 100)
    profile = analysed(event(title("Decode"), 0, 1000), region, *inside, output)
    expected = {"Linear": 0.35, "Attention": 0.02, "Compiled block": 0.33, "Other": 0.3}
    assert milliseconds(profile) == expected
    assert profile.step_ms("Decode", scheme="int4", role="(compiled)") == pytest.approx(0.15)
    assert profile.gb_per_s("Decode", role="output") and not profile.gb_per_s(
        "Decode", kind="Linear"
    )
    eager = analysed(event(title("Decode"), 0, 2000), event(WQKV, 0, 700))
    rows = {row["layer_type"]: row for row in profiling.rows_of(profile, eager, None)}
    assert rows["Total"]["speed_up"] == pytest.approx(2)
    assert rows["Linear"]["speed_up"] is None  # 0.7 ms of all of it over 0.35 ms of a part


def test_communication_is_what_collectives_take():
    step, wo = event(title("Decode"), 0, 100), event(title("Linear", "int8", "wo", 9), 10, 50)
    reduce = event("c10d::allreduce_", 40, 15, "cpu_op")
    wait = event("_c10d_functional::wait_tensor", 70, 20, "cpu_op")
    expected = {"Linear": 0.035, "Communication": 0.035, "Other": 0.03}
    assert milliseconds(analysed(step, wo, reduce, wait)) == expected


def test_kernels_belong_to_the_range_that_launched_them():
    def launch(ts, correlation, cat="cuda_runtime"):
        return event("cudaLaunchKernel", ts, 2, cat, correlation=correlation)

    def kernel(ts, dur, correlation, name="k", cat="kernel", **args):
        return event(name, ts, dur, cat, tid=7, correlation=correlation, **args)

    occupancy = profiling.OCCUPANCY
    profile = analysed(
        *STEP,
        *(launch(1160, 1), launch(1200, 2, "cuda_driver"), launch(1400, 3), launch(1950, 4)),
        *(launch(2500, 5), launch(20, 6), launch(1700, 7)),
        kernel(5000, 30, 1, **{occupancy: 50}),  # long after its range has ended
        kernel(5030, 10, 2, **{occupancy: 90}),
        kernel(5040, 20, 3),
        kernel(5060, 5, 4, cat="gpu_memcpy"),
        kernel(5065, 7, 5, cat="gpu_memset"),  # launched after the step
        kernel(30, 1000, 6),  # launched before the first step
        kernel(5072, 40, 7, "ncclDevKernel_AllReduce_Sum_bf16"),
        kernel(5200, 1000, 99),  # of another thread
    )
    expected = {"Linear": 0.04, "Attention": 0.02, "Communication": 0.04, "Other": 0.012}
    expected |= {"RoPE": 0, "Sampling": 0}
    assert profile.on_gpu and milliseconds(profile) == expected
    (row,) = (r for r in profiling.rows_of(profile, profile, None) if r["scheme"] == "int4")
    assert row["occupancy_percent"] == pytest.approx(60) and row["count"] == 1


# ---- Real traces -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hybrid(folder):
    """The same model with w2 and output in int8 and all else in int4."""
    flags = ["--mode", "hybrid", "--critical_layers", "layers.*.w2", "output"]
    parser = quantize.make_parser()
    quantize.main(parser.parse_args(["--checkpoint_path", str(folder / "model.pth"), *flags]))
    return folder / "model_custom_hybrid_int8_int4.g32.pth"


def test_checkpoints_side_by_side(run, folder, hybrid, tmp_path):
    models, sizes = [folder / "model.pth", hybrid], ["--prompt_tokens", 20, "--max_new_tokens", 4]
    flags = ["--model_path", *models, "--device", "cpu", *sizes]
    code, out, err = run(profiling, *flags, "--output_file", tmp_path / "new" / "report.csv")
    assert code == 0 and str(hybrid) in out, err
    rows = rows_of(tmp_path / "new" / "report.csv")
    for model in models:
        for phase, steps in (("Prefill", 1), ("Decode", 3)):
            own = [row for row in rows if (row["model"], row["phase"]) == (str(model), phase)]
            found = {(row["level"], row["layer_type"] + row["scheme"] + row["role"]) for row in own}
            kinds = {"Linear", "Attention", "Norm", "RoPE", "Embedding", "Sampling", "Other"}
            assert {name for level, name in found if level == "type"} == kinds
            roles = {f"Linear{role}" for role in ("wqkv", "wo", "w1", "w2", "w3", "output")}
            assert {name for level, name in found if level == "role"} == roles
            for level, group in (("type", None), ("scheme", "Linear"), ("role", "Linear")):
                parts = [row for row in own if row["level"] == level]
                whole = sum(
                    float(row["share_percent"])
                    for row in own
                    if row["level"] == "type" and group in (None, row["layer_type"])
                )
                assert sum(float(row["share_percent"]) for row in parts) == pytest.approx(whole)
                assert group or whole == pytest.approx(100)
            counts = {row["role"]: int(row["count"]) for row in own if row["level"] == "role"}
            assert counts == dict.fromkeys(counts, 2 * steps) | {"output": steps}
            schemes = {row["scheme"] for row in own if row["level"] == "scheme"}
            assert schemes == ({"int4", "int8"} if model == hybrid else {"bf16"})
    totals = {row["model"]: row for row in rows if (row["phase"], row["level"]) == DECODE_TOTAL}
    first, second = (totals[str(model)] for model in models)
    ratio = float(first["step_ms"]) / float(second["step_ms"])
    assert float(second["speed_up"]) == pytest.approx(ratio) and float(first["speed_up"]) == 1


DECODE_TOTAL = ("Decode", "total")
COMPILED = ["--compile", "--precision", "float32"]  # where a fused step serves, none is compiled


def test_the_time_of_linears_is_the_wall_time_they_take(folder, monkeypatch, tmp_path, run):
    """Each is made to take at least 2 ms."""
    forward, spent = Linear.forward, []

    def slow(self, x, prefill=False):
        began = time.perf_counter()
        time.sleep(0.002)
        y = forward(self, x, prefill)
        spent.append(time.perf_counter() - began)
        return y

    monkeypatch.setattr(Linear, "forward", slow)
    flags = ["--model_path", folder / "model.pth", "--device", "cpu", "--max_new_tokens", 3]
    report = tmp_path / "report.csv"
    assert run(profiling, *flags, "--prompt_tokens", 8, "--output_file", report)[0] == 0
    rows = rows_of(report)
    linear = sum(
        float(row["total_ms"])
        for row in rows
        if row["level"] == "type" and row["layer_type"] == "Linear"
    )
    total = sum(float(row["total_ms"]) for row in rows if row["level"] == "total")
    last_run = 1e3 * sum(spent[-3 * len(NAMES) :])  # prefill and two steps, profiled
    assert 3 * len(NAMES) * 2 <= last_run <= linear <= total
    assert linear == pytest.approx(last_run, rel=0.15)


def test_a_compressed_trace_is_unpacked_only_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "LONGEST", 2**16)
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(bytes(2**20)))
    with pytest.raises(UserError, match="unpacks to more than 65536 bytes"):
        profiling.read_trace(tmp_path / "t.json.gz")


@pytest.mark.parametrize("compile", [[], COMPILED], ids=["eager", "compiled"])
def test_traces_of_generate_are_read(run, hybrid, tmp_path, compile):
    trace = tmp_path / "trace.json"
    flags = ["--checkpoint_path", hybrid, "--device", "cpu", "--max_new_tokens", "5", *compile]
    code, text, err = run(generate, *flags, "--prompt", "A llama", "--profile", trace)
    assert code == 0, err
    if not compile:
        assert text == run(generate, *flags, "--prompt", "A llama")[1]
    for ending in ("md", "csv", "png"):
        report = tmp_path / f"report.{ending}"
        code, _, err = run(profiling, "--trace", trace, "--device", "cpu", "--output_file", report)
        assert code == 0, err
    assert (tmp_path / "report.png").read_bytes().startswith(PNG)
    rows, text = rows_of(tmp_path / "report.csv"), (tmp_path / "report.md").read_text()
    decode = {row["layer_type"]: row for row in rows if row["phase"] == "Decode"}
    assert int(decode["Total"]["count"]) == 4 and "### Decode: 4 steps" in text
    prefill = {row["layer_type"] for row in rows if row["phase"] == "Prefill"}
    assert "RoPE" in prefill and "Compiled block" not in prefill  # it ran eagerly either way
    assert ("Compiled block" in decode) == bool(compile) == ("ran compiled" in text)
    assert ("RoPE" in decode) != bool(compile)
    roles = {row["role"] for row in rows if (row["phase"], row["level"]) == ("Decode", "role")}
    assert "output" in roles and ("wqkv" in roles) != bool(compile)


def test_nothing_of_the_ranges_stays(folder):
    model = load_model(folder / "model.pth", "cpu")
    model.setup_caches(1, 64)
    running = engine.Engine(model)
    before = dict(vars(running))
    with pytest.raises(ZeroDivisionError), traced(running):
        running.prefill([[1, 2, 3]])
        assert running.decode_step is not before["decode_step"]
        raise ZeroDivisionError
    assert {**vars(running), "cached_tokens": 0} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_ranges_end_when_a_module_raises(folder):
    model = load_model(folder / "model.pth", "cpu")
    model.setup_caches(1, 64)
    running = engine.Engine(model)
    with traced(running), torch.profiler.profile() as profiler:
        with pytest.raises(IndexError):
            running.prefill([[10**6]])  # not in the embedding
        running.prefill([[1, 2, 3]])
    steps = [e for e in profiler.events() if e.name == title("Prefill")]
    assert len(steps) == 2 and steps[0].time_range.end <= steps[1].time_range.start
    embedding = title("Embedding", name="tok_embeddings")
    assert sum(e.name == embedding for e in profiler.events()) == 2


def test_ranges_compile_nothing_anew_and_survive_compilation(folder):
    torch.compiler.reset()
    model = load_model(folder / "model.pth", "cpu", torch.float32)
    model.setup_caches(1, 64)
    running, cold = engine.Engine(model, "block"), engine.Engine(model, "block")
    prompt, options = [5, 9, 200], {"until": lambda _row, _id: False, "seeds": [0]}
    greedy = engine.Sampling(temperature=0)

    def text(engine_):
        return [step[0].id for step in engine.generate(engine_, [prompt], greedy, 4, **options)]

    running.warm_up(1)
    expected = text(running)
    with torch.compiler.set_stance("fail_on_recompile"), traced(running):
        assert text(running) == expected
    torch.compiler.reset()
    with traced(cold):
        assert text(cold) == expected


# ---- What int4 costs ---------------------------------------------------------------------------


def flags_of(folder, report, *more):
    flags = ["--model_path", folder / "model.pth", "--text", folder / "text.txt", "--device", "cpu"]
    return [*flags, "--max_seq_length", 48, "--limit", 4, "--report_file", report, *more]


@pytest.fixture(scope="module")
def analysis(folder):
    """A finished analysis in folder: layers.csv, layers.png and layers.txt."""
    flags = flags_of(folder, folder / "layers.csv", "--layers_file", folder / "layers.txt")
    accuracy.main(accuracy.make_parser().parse_args([*map(str, flags)]))
    return folder / "layers.csv"


@pytest.fixture(scope="module")
def variants(folder):
    return accuracy.make_variants(load_model(folder / "model.pth", "cpu"), 32)


def text_losses(folder, model, metric="kl"):
    args = accuracy.make_parser().parse_args([*map(str, flags_of(folder, folder / "x.md"))])
    parts = accuracy.read_parts(args, Tokenizer.from_folder(folder), CPU)
    return accuracy.TextLosses(model, parts, metric)


def test_the_divergence_of_an_unchanged_model_is_zero(folder, variants):
    variants.use(dict.fromkeys(NAMES, "bf16"))
    losses = text_losses(folder, variants.model)
    for part in ("ranking", "held back"):
        assert losses(part).tolist() == [0.0] * 4
    variants.use({SENSITIVE: "int4"})
    assert losses("ranking").min() > 0


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_logits_that_are_not_finite_are_never_ranked(folder, metric):
    model = load_model(folder / "model.pth", "cpu")
    model.norm.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="logits that are NaN or infinite"):
        text_losses(folder, model, metric)("ranking")


def test_the_divergence_is_the_textbooks(monkeypatch):
    reference, logits = torch.randn(2, 5, 300) * 3
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    whole = losses_module.divergence(logits, *losses_module.likeliest(reference))
    assert whole == pytest.approx(expected)
    monkeypatch.setattr(losses_module, "TOP", 100)  # the tail as one event: less, but not much
    lumped = losses_module.divergence(logits, *losses_module.likeliest(reference))
    assert 0.9 * expected < lumped < expected


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_starting_at_a_block_gives_what_a_whole_run_gives(folder, variants, metric):
    variants.use(dict.fromkeys(NAMES, "bf16"))
    losses = text_losses(folder, variants.model, metric)
    variants.use(dict.fromkeys(NAMES, "int4"))
    losses.remember("ranking")
    for name, start in {"layers.0.attention.wo": 0, SENSITIVE: 1, "output": 2}.items():
        variants.use({name: "int8"})
        assert losses("ranking", start).tolist() == losses("ranking").tolist()
        variants.use({name: "int4"})


def test_perplexity_is_that_of_eval(folder, variants):
    variants.use(dict.fromkeys(NAMES, "bf16"))
    losses = text_losses(folder, variants.model, "perplexity")
    (batch,) = losses.batches["ranking"]
    tokenizer = Tokenizer.from_folder(folder)
    scorer = losses_module.Evaluator(variants.model, tokenizer, 1, 48)
    pairs = [(row[:1].tolist(), row[1:].tolist()) for row in batch]
    scores = [-log_prob / 48 for log_prob, _ in scorer.score(pairs)]
    variants.model.setup_caches(len(batch), 48)
    assert losses("ranking").tolist() == pytest.approx(scores, rel=0.02)  # bf16


def test_a_sensitive_layer_ranks_first_and_is_confirmed(analysis):
    rows = rows_of(analysis)
    layers = [row for row in rows if row["row"] == "layer"]
    assert [int(row["rank"]) for row in layers] == [*range(1, len(NAMES) + 1)]
    assert {row["name"] for row in layers} == set(NAMES) and layers[0]["name"] == SENSITIVE
    assert float(layers[0]["saved"]) > 3 * float(layers[0]["saved_error"]) > 0
    worth = [float(row["saved"]) / int(row["extra_bytes"]) for row in layers]
    assert worth == sorted(worth, reverse=True)
    loss = {row["name"]: float(row["held_back_loss"]) for row in rows if row["row"] == "model"}
    assert loss["bf16"] == 0 < loss["all int8"] < loss["chosen"] < loss["all int4"]
    assert loss["chosen"] < loss["built-in hybrid"]  # of no fewer bytes
    bits = {row["name"]: float(row["bits"]) for row in rows if row["row"] == "model"}
    assert bits["chosen"] <= bits["built-in hybrid"] and bits["bf16"] == 16
    assert loss["chosen"] < loss["10 random choices, mean"] < loss["all int4"]
    assert bits["all int4"] < bits["10 random choices, mean"] <= bits["built-in hybrid"]
    assert analysis.with_suffix(".png").read_bytes().startswith(PNG)
    assert not [*analysis.parent.glob("*.state.json")]


def test_the_list_makes_the_checkpoint_that_was_measured(run, folder, analysis):
    listed = (folder / "layers.txt").read_text().split()
    rows = {row["name"]: row for row in rows_of(analysis)}
    assert listed and {n for n in NAMES if rows[n]["scheme"] == "int8"} == set(listed)
    flags = ["--mode", "hybrid", "--critical_layers", f"@{folder / 'layers.txt'}"]
    label = ["--label", "_listed_"]
    code, out, err = run(quantize, "--checkpoint_path", folder / "model.pth", *flags, *label)
    assert code == 0, err
    assert f"{float(rows['chosen']['bits']):.2f} bits a weight" in out
    made = load_model(folder / "model_listed_custom_hybrid_int8_int4.g32.pth", "cpu")
    for name in NAMES:
        assert type(made.get_submodule(name)) is (Int8Linear if name in listed else Int4Linear)
    losses = text_losses(folder, load_model(folder / "model.pth", "cpu"))
    losses.model = made
    measured = float(rows["chosen"]["held_back_loss"])
    assert losses("held back").mean().item() == pytest.approx(measured, rel=1e-3)


def test_three_levels_are_chosen_and_written_at_once(run, folder, tmp_path):
    report, listed = tmp_path / "three.csv", tmp_path / "three.txt"
    flags = ["--groupsize", 64, "--budget", 5.2, "--layers_file", listed, "--quantize"]
    code, out, err = run(accuracy, *flags_of(folder, report, *flags))
    assert code == 0, err
    rows = rows_of(report)
    schemes = {row["name"]: row["scheme"] for row in rows if row["row"] == "layer"}
    assert set(schemes.values()) == {"int4", "int4.g32", "int8"} and len(schemes) == len(NAMES)
    models = {row["name"]: row for row in rows if row["row"] == "model"}
    path = folder / "model_custom_hybrid_int8_int4.g64.pth"
    written, chosen = models[f"written, {path.name}"], models["chosen"]
    assert written["bits"] == chosen["bits"] and float(chosen["bits"]) <= 5.2
    loss = {name: float(row["held_back_loss"]) for name, row in models.items()}
    assert loss["chosen"] < loss["chosen, int8 alone"] < loss["all int4"]
    assert loss[f"written, {path.name}"] < loss["all int4"]
    made = load_model(path, "cpu")
    path.unlink()
    groups = {"int4": 64, "int4.g32": 32}
    for name, scheme in schemes.items():
        assert getattr(made.get_submodule(name), "groupsize", None) == groups.get(scheme)
    lines = listed.read_text().split()
    assert {line.partition("=")[::2] for line in lines} == {
        (name, "" if scheme == "int8" else scheme)
        for name, scheme in schemes.items()
        if scheme != "int4"
    }


def test_where_nothing_fits_the_checkpoint_is_int4(run, folder, tmp_path):
    flags = ["--budget", 5.0, "--quantize", "--random_choices", 2]
    assert run(accuracy, *flags_of(folder, tmp_path / "none.csv", *flags))[0] == 0
    path = folder / "model_int4.g32.pth"
    assert {type(m) for m in load_model(path, "cpu").modules() if isinstance(m, Linear)} == {
        Int4Linear
    }
    path.unlink()


@pytest.mark.parametrize(
    "room, chosen",
    [
        (0, {}),
        (10, {"a": "int4.g32"}),
        (19, {"a": "int4.g32"}),  # b fits no more
        (30, {"a": "int4.g32", "b": "int8"}),
        (110, {"a": "int8"}),  # raised a second time, for 2 a byte more
        (130, {"a": "int8", "b": "int8"}),
    ],
)
def test_what_saves_most_a_byte_is_taken_first(room, chosen):
    moves = [
        accuracy.Move("a", "int4.g32", 10, 50.0),
        accuracy.Move("a", "int8", 110, 250.0),
        accuracy.Move("b", "int4.g32", 10, -1.0),
        accuracy.Move("b", "int8", 20, 30.0),
    ]
    assert accuracy.choose(moves, room) == chosen


def test_the_budget_is_kept_to_the_byte(run, folder, analysis, tmp_path):
    layers = [row for row in rows_of(analysis) if row["row"] == "layer"]
    best = layers[:3]
    weights = sum(identification_rows(folder).values())
    int4 = next(float(r["bits"]) for r in rows_of(analysis) if r["name"] == "all int4")
    exact = int4 + 8 * sum(int(row["extra_bytes"]) for row in best) / weights
    for budget, taken in ((exact + 1e-9, 3), (exact - 1e-6, 2)):
        report = tmp_path / "budget.csv"
        code, _, err = run(accuracy, *flags_of(folder, report, "--budget", budget))
        assert code == 0, err
        rows = rows_of(report)
        chosen = {row["name"] for row in rows if row["row"] == "layer" and row["scheme"] == "int8"}
        assert {row["name"] for row in best[:taken]} <= chosen
        assert (best[2]["name"] in chosen) == (taken == 3)
        (bits,) = (float(row["bits"]) for row in rows if row["name"] == "chosen")
        assert bits <= budget and (taken == 2 or len(chosen) == 3)


def identification_rows(folder) -> dict[str, int]:
    """Weights of each Linear, biases not counted."""
    state = torch.load(folder / "model.pth")
    tied = {"output.weight": state["tok_embeddings.weight"]}
    return {name: (tied | state)[f"{name}.weight"].numel() for name in NAMES}


def test_an_interrupted_analysis_goes_on_where_it_stopped(run, folder, tmp_path, monkeypatch):
    reports, measured = [tmp_path / "whole.md", tmp_path / "resumed.md"], []
    call = accuracy.TextLosses.__call__

    def counting(self, part, start=0):
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append((part, start))
        return call(self, part, start)

    monkeypatch.setattr(accuracy.TextLosses, "__call__", counting)
    stop = -1
    assert run(accuracy, *flags_of(folder, reports[0]))[0] == 0
    all_measured = measured.copy()
    measured.clear()
    stop = 5
    assert run(accuracy, *flags_of(folder, reports[1]))[0] == 130
    state = accuracy.state_file(reports[1])
    assert len(json.loads(state.read_text())["losses"]) == 5 and not reports[1].exists()

    code, _, err = run(accuracy, *flags_of(folder, reports[1], "--groupsize", 64))
    assert code == 2 and "groupsize" in err and err.count("\n") == 1  # another's work is not lost
    stop = -1
    code, _, err = run(accuracy, *flags_of(folder, reports[1]))
    assert code == 0 and "after 4 of 11 trials" in err
    assert measured == all_measured and not state.exists()
    assert reports[1].read_text() == reports[0].read_text()


def test_losses_that_no_run_measures_are_damaged_and_refused_before_the_trials(
    run, folder, tmp_path, monkeypatch
):
    report = tmp_path / "r.md"
    state = accuracy.state_file(report)
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "read_state", lambda args, of, count: seen.append(of) or stop())
        stop = iter([]).__next__
        with pytest.raises(StopIteration):
            run(accuracy, *flags_of(folder, report))
    monkeypatch.setattr(accuracy, "make_variants", None)  # nothing is measured
    for row in ("NaN", "1e999", "1" + "0" * 400, "9" * 5000, "1, 2, 3", ""):
        row = row if row in ("1, 2, 3", "") else f"1, 2, 3, {row}"
        state.write_text(f'{{"of": {json.dumps(seen[0])}, "losses": {{"": [{row}]}}}}')
        code, _, err = run(accuracy, *flags_of(folder, report))
        assert code == 2 and err.splitlines()[-1].endswith("delete it to start anew"), (row, err)
        assert not report.exists()


def test_a_task_of_lm_eval_ranks(run, folder, tmp_path, monkeypatch, few_tasks):
    monkeypatch.chdir(tmp_path)  # data_files of a task are relative to the working directory
    pages = [TEXT[i * 40 : i * 40 + 60] for i in range(8)]
    rows = [{"q": page[:40], "choices": [page[40:], "no"], "gold": 0} for page in pages]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "choice.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ntest_split: test\n"
        "dataset_kwargs:\n  data_files:\n    test: rows.jsonl\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: gold\ndoc_to_choice: choices\n"
        "metric_list: [{metric: acc}]\n"
    )
    flags = flags_of(folder, tmp_path / "task.csv", "--metric", "tiny_choice", "--max_seq_length")
    del flags[(text := flags.index("--text")) : text + 2]  # the task has its own
    code, _, err = run(accuracy, *flags, 128, "--include_path", tmp_path)
    assert code == 0, err
    rows = rows_of(tmp_path / "task.csv")
    assert len([row for row in rows if row["row"] == "layer"]) == len(NAMES)
    accuracies = {-float(row["ranking_loss"]) for row in rows if row["row"] == "model"}
    assert accuracies <= {0.0, 0.25, 0.5, 0.75, 1.0}  # of four documents
    scorer = losses_module.Evaluator(*engine.load(folder / "model.pth", CPU, "bfloat16"), 8, 128)
    manager = lm_eval.tasks.TaskManager(include_path=tmp_path)
    expected = lm_eval.simple_evaluate(scorer, tasks=["tiny_choice"], task_manager=manager, limit=4)
    (own,) = (float(row["ranking_loss"]) for row in rows if row["name"] == "bf16")
    assert own == -expected["results"]["tiny_choice"]["acc,none"]


# ---- Which layers there are --------------------------------------------------------------------


def test_every_linear_is_listed(run, folder, hybrid, analysis):
    code, out, err = run(identification, "--model_path", hybrid)
    assert code == 0, err
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    listed = {cells[0]: cells for cells in lines if cells and cells[0] in NAMES}
    model = load_model(hybrid, "cpu")
    assert [*listed] == NAMES
    whole = sum(parameter.nbytes for parameter in model.parameters())
    for name, (_, shape, parameters, size, scheme, share) in listed.items():
        linear = model.get_submodule(name)
        assert shape == f"{linear.out_features} x {linear.in_features}"
        weights = linear.in_features * linear.out_features
        assert int(parameters) - weights == (linear.out_features if "wqkv" in name else 0)
        assert int(size) == sum(tensor.nbytes for tensor in linear.parameters())
        assert scheme == scheme_of(linear) == ("int8" if name[-2:] in ("w2", "ut") else "int4")
        assert float(share) == pytest.approx(100 * int(size) / whole, abs=0.01)
    assert "the embedding itself" not in out  # here it is a tensor of its own


@pytest.mark.parametrize("ending", ["csv", "md", "txt"])
def test_a_ranking_is_listed_too(run, folder, analysis, ending, tmp_path):
    report = analysis
    if ending != "csv":
        report = tmp_path / f"report.{ending}"
        assert run(accuracy, *flags_of(folder, report))[0] == 0
    code, out, err = run(
        identification, "--model_path", folder / "model.pth", "--report_file", report
    )
    assert code == 0 and "the embedding itself" in out, err
    (line,) = (line for line in out.splitlines() if SENSITIVE in line)
    assert [cell.strip() for cell in line.split("|")][7:9] == ["1", "int8"]


def test_the_scripts_run_from_any_folder(tmp_path):
    """Together, since each alone would import torch again."""
    code = "import runpy, sys\nfor script in sys.argv[1:]: runpy.run_path(script)"
    scripts = [*map(str, (ROOT / "profiler_scripts").glob("*.py"))]
    assert len(scripts) == 4
    done = subprocess.run([sys.executable, "-c", code, *scripts], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


# ---- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, named",
    [
        (profiling, ["--output_file", "r.md"], "--model_path"),
        (profiling, ["--model_path", "{model}", "--output_file", "r.pdf"], ".png"),
        (profiling, ["--model_path", "nowhere.pth", "--output_file", "r.md"], "nowhere.pth"),
        (profiling, ["--model_path", "{model}", "{model}", "--output_file", "r.md"], "twice"),
        (profiling, ["--trace", "nowhere.json", "--output_file", "r.md"], "nowhere.json"),
        (profiling, ["--trace", "{model}", "--output_file", "r.md"], "chrome trace"),
        (profiling, ["--trace", "{folder}/config.json", "--output_file", "r.md"], "traceEvents"),
        (profiling, ["--trace", "{folder}/empty.json", "--output_file", "r.md"], "no step"),
        (
            profiling,
            ["--model_path", "{model}", "--output_file", "r.md", "--max_new_tokens", "1000"],
            "1128 positions",
        ),
        (accuracy, ["--report_file", "r.md"], "--model_path"),
        (accuracy, ["--model_path", "{model}", "--report_file", "r.html"], ".csv"),
        (accuracy, ["--model_path", "{hybrid}", "--report_file", "r.md"], "quantized already"),
        (
            accuracy,
            ["--model_path", "{model}", "--report_file", "r.md", "--groupsize", "128"],
            "--groupsize 32 or 64 fits",
        ),
        (
            accuracy,
            ["--model_path", "{model}", "--report_file", "r.md", "--budget", "4.5"],
            "5.0000 bits",
        ),
        (
            accuracy,
            ["--model_path", "{model}", "--report_file", "r.md", "--text", "nowhere.txt"],
            "nowhere.txt",
        ),
        (
            accuracy,
            ["--model_path", "{model}", "--report_file", "r.md", "--text", "{folder}/empty.json"],
            "more text",
        ),
        (
            accuracy,
            ["--model_path", "{model}", "--report_file", "r.md", "--metric", "no_such_task"],
            "no_such_task",
        ),
        (
            accuracy,
            ["--model_path", "{model}", "--report_file", "r.md", "--quantize", "--metric", "x"],
            "--text",
        ),
        (
            accuracy,
            ["--model_path", "{model}", "--report_file", "r.md", "--max_seq_length", "9999"],
            "512",
        ),
        (identification, [], "--model_path"),
        (identification, ["--model_path", "nowhere.pth"], "nowhere.pth"),
        (
            identification,
            ["--model_path", "{model}", "--report_file", "{folder}/config.json"],
            "no ranking",
        ),
    ],
)
def test_a_mistake_is_one_line(
    run, folder, hybrid, tmp_path, monkeypatch, few_tasks, script, flags, named
):
    monkeypatch.chdir(tmp_path)
    (folder / "empty.json").write_text('{"traceEvents": []}')
    places = dict(model=folder / "model.pth", folder=folder, hybrid=hybrid)
    code, out, err = run(script, *(flag.format(**places) for flag in flags))
    lines = [line for line in err.split("\n")[:-1] if "matrix/s" not in line]  # a progress bar
    assert code == 2 and len(lines) == 1 and named in lines[0] and out == "", err
    assert not [*tmp_path.iterdir()]


def test_a_ranking_of_another_model_is_refused(folder, tmp_path):
    report = tmp_path / "other.md"
    report.write_text("| rank | layer | scheme | saved |\n| 1 | layers.0.x | int4 | 0.5 |\n")
    with pytest.raises(UserError, match="another model"):
        identification.add_ranking([{"layer": "output"}], report)
