"""scripts/benchmark.py measures what it says, on shapes small enough to say it of."""

import ast
import itertools
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import families
import kernels
import process
from conftest import CONFIG, ROOT, write_checkpoint
from engine import Engine, load_model
from families import from_config, preset
from linear import Int4Linear, Int8ActivationLinear, Int8Linear, Linear
from quantize import quantize
from scripts import benchmark, candidates, convert_gguf, machine
from scripts.candidates import Case, make
from scripts.machine import Timing
from speculate import DraftModel

CPU = torch.device("cpu")
TINY = CONFIG | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
TINY |= {"max_position_embeddings": 128}
SHAPES = {"tiny": TINY, "tied": TINY | {"tie_word_embeddings": True}}
MIXTURE = TINY | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
MIXTURE |= {"moe_intermediate_size": 64}
SHAPE = CONFIG | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
SCHEMES = ["bf16", "int8", "int8-activation", "int4"]
BUS = 1e9  # what the probe is said to find
SHORT = ["--prompt", "20", "--gen", "4", "--runs", "2", "--no-cold"]


@pytest.fixture(autouse=True)
def presets(monkeypatch, tmp_path_factory):
    """Shapes `tiny`, `tied` and `mixture` beside those that there are."""
    file = tmp_path_factory.mktemp("presets") / "presets.json"
    file.write_text(
        json.dumps(json.loads(families.PRESETS.read_text()) | SHAPES | {"mixture": MIXTURE})
    )
    monkeypatch.setattr(families, "PRESETS", file)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line; exit code, output, errors and figures."""
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: BUS)

    def run(*flags):
        argv = ["benchmark.py", "--device", "cpu", "--json", str(tmp_path / "found.json"), *flags]
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        code = 0
        try:
            process.run(benchmark.main, benchmark.make_parser())
        except SystemExit as exit:
            code = exit.code
        file = tmp_path / "found.json"
        return code, *capsys.readouterr(), json.loads(file.read_text()) if file.exists() else None

    return run


def case(scheme: str, shape: str = "tiny") -> Case:
    return Case(scheme, 32, preset=shape, random=True)


def step_bytes(scheme: str, kv_len: float) -> float:
    """Counted by hand, of both shapes: the matrices, the norms and `kv_len` positions."""
    shape = preset("tiny")
    (kind,) = shape.kinds
    qkv = (kind.n_head + 2 * kind.n_local_heads) * kind.head_dim
    matrices = [(qkv, shape.dim), (shape.dim, shape.dim), (shape.dim, shape.intermediate_size)]
    matrices += 2 * [(shape.intermediate_size, shape.dim)]
    matrices = matrices * shape.n_layer + [(shape.vocab_size, shape.dim)]
    weights, rows = sum(out * into for out, into in matrices), sum(out for out, _ in matrices)
    stored = {"bf16": 2 * weights, "int4": weights / 2 + weights / 32 * 4}
    stored["int8"] = stored["int8-activation"] = weights + 2 * rows
    norms = 2 * shape.dim * (2 * shape.n_layer + 1)
    cache = 2 * 2 * shape.n_layer * kind.n_local_heads * kind.head_dim * kv_len
    return stored[scheme] + norms + cache


# ---- The whole ---------------------------------------------------------------------------------


def test_every_scheme_is_measured_at_every_depth(run):
    flags = ["--model", "tiny", "--depth", "0,100", *SHORT]
    code, out, err, found = run(*flags)
    assert code == 0, err
    assert out.startswith("read bandwidth 1.0 GB/s\n\n| scheme | depth | MB per token | best poss")
    for column in [*benchmark.TABLES["decode"], *benchmark.TABLES["prefill"]]:
        assert f"| {column} " in out
    assert "--depth 0,100" in found["command"] and torch.__version__ == found["versions"]["torch"]
    assert found["command"] in out and found["machine"] in out
    places = [(row["scheme"], row["depth"]) for row in found["decode"]]
    assert places == [*itertools.product(SCHEMES, (0, 100))]
    for row, bound in zip(found["decode"], found["ceiling"], strict=True):
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["bytes_per_token"] == bound["bytes_per_token"]
        assert bound["best_tokens_per_s"] == BUS / bound["bytes_per_token"]
        assert row["bus_share"] == pytest.approx(row["median"] * row["bytes_per_token"] / BUS)
    assert [row["ratio"] for row in found["decode"][:2]] == [1, 1]
    for row in found["prefill"]:
        assert row["first_token_ms"] > 0 and 0 < row["min"] <= row["median"] <= row["max"]
        assert all(row[f"verify_{count}"] > 0 for count in (2, 4, 8))
    assert found["start"] == [] and "peak memory" not in out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_per_token_are_those_of_the_model(scheme, shape):
    model = make(case(scheme, shape), CPU, 128)
    row = benchmark.byte_row(scheme, model, depth=70, gen=4)  # of 128 positions, 128 are looked at
    assert row["bytes_per_token"] == model.bytes_per_step(128) == step_bytes(scheme, 128)
    empty = candidates.skeleton(case(scheme, shape))
    empty.setup_caches(1, 128)
    assert benchmark.byte_row(scheme, empty, depth=70, gen=4) == row


def test_a_mixture_is_measured_and_its_chosen_experts_are_counted(run):
    code, out, err, found = run("--model", "mixture", "--schemes", "bf16,int4", *SHORT)
    assert code == 0, err
    expert, tokens = 3 * 64 * 64, found["decode"][0]["bytes_per_token"]
    dense = preset("mixture").n_layer * expert * 6  # what a token does not choose of 8
    whole = sum(t.nbytes for t in candidates.skeleton(case("bf16", "mixture")).parameters())
    embedding, cache = 2 * 300 * 64, 2 * 2 * 2 * 2 * 16 * 20
    assert tokens == whole - embedding - 2 * dense + cache
    assert [row["scheme"] for row in found["decode"]] == ["bf16", "int4"]


@pytest.mark.parametrize("shape", ["tiny", "tied", "mixture"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_kept_for_the_kernels_alone_are_the_same_model(scheme, shape):
    texts, sizes = [], []
    for packed in (False, True):
        model = make(case(scheme, shape), CPU, 128, packed)
        model.setup_caches(1, 128)
        texts.append([token.id for (token,) in candidates.greedy(Engine(model), [1, 2, 3], 12)])
        storages = {t.untyped_storage() for t in model.layers[0].parameters() if t.ndim > 1}
        sizes.append(sum(storage.nbytes() for storage in storages))
        empty = candidates.skeleton(case(scheme, shape))
        empty.setup_caches(1, 128)
        assert model.bytes_per_step(0) == empty.bytes_per_step(0)
    assert texts[0] == texts[1]
    if kernels.supported():
        assert sizes[1] < sizes[0] / 5  # the router stays, and scales that kernels share


LARGE = MIXTURE | {"hidden_size": 512, "num_experts": 64, "moe_intermediate_size": 512}
PEAK = """
import sys
sys.path[:0] = [".", "tests"]
import torch, families
from families import from_config
from scripts import candidates
from scripts.machine import peak_bytes
from test_benchmark import LARGE, CPU, case
candidates.preset = lambda name: from_config(LARGE)
before = peak_bytes(CPU)
model = candidates.make(case("int4"), CPU, 64, packed=True)
print(peak_bytes(CPU) - before, sum(t.nbytes for t in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the peak of /proc")
def test_a_mixture_in_int4_is_made_without_a_copy_in_floats():
    options = dict(cwd=ROOT, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", PEAK], **options)
    assert done.returncode == 0, done.stderr
    peak, stored = map(int, done.stdout.split())
    assert stored > 50e6 and peak < 2.2 * stored + 60e6  # with floats it is 4.5 times


def test_the_tables_can_go_to_a_file(run, tmp_path):
    file = tmp_path / "tables.md"
    code, out, err, _ = run("--model", "tied", "--schemes", "int8", "--markdown", file, *SHORT)
    assert code == 0, err
    assert file.read_text().startswith("### tied on cpu\n") and "| decoding |" in file.read_text()
    assert "| decoding |" not in out and "best possible" in out


def test_without_memory_for_all_each_is_measured_alone(run, monkeypatch):
    alive = []

    class Counted(benchmark.Ours):
        def __init__(self, *args):
            alive.append(self)
            super().__init__(*args)

        def tokens(self, *args):
            assert alive[-1] is self  # what came before is no longer measured
            return super().tokens(*args)

    monkeypatch.setattr(benchmark, "Ours", Counted)
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 0)
    code, out, err, found = run("--model", "tiny", "--schemes", "bf16,int8", *SHORT)
    assert code == 0, err
    assert [row["scheme"] for row in found["decode"]] == ["bf16", "int8"]
    assert not found["together"] and "did not fit into memory at once" in out


def test_what_is_timed_are_as_many_steps_as_asked_for(run, monkeypatch):
    """At the end of the context, too, behind which the cache goes on."""
    places, real = [], Engine.decode

    def decode(self, idx, input_pos, kv_len):
        if idx.shape[1] == 1:
            places.append(input_pos.item())
        return real(self, idx, input_pos, kv_len)

    monkeypatch.setattr(Engine, "decode", decode)
    flags = ["--model", "tiny", "--schemes", "bf16", "--depth", "50,128", "--prompt", "20"]
    code, _, err, _ = run(*flags, "--gen", "12", "--runs", "1", "--no-cold")
    assert code == 0, err
    # The token that stands at the depth is prefilled; the last three are verifications.
    turn = [*range(51, 63), *range(129, 141), 50, 50, 50]
    assert places == 2 * turn  # a warm-up and a run


def test_candidates_take_turns_and_the_warm_up_is_not_kept():
    turns = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def tokens(self, prompt, n, start):
            turns.append(self.name)
            return iter(range(n))

        def hold(self, start):
            pass

        def forward(self, ids, start):
            turns.append(self.name)

    timings = defaultdict(lambda: defaultdict(Timing))
    args = Namespace(device=CPU, depth=[0, 5], gen=3, runs=4)
    benchmark.measure({"a": Fake("a"), "b": Fake("b")}, [1, 2], args, timings)
    assert [name for name, _ in itertools.groupby(turns)] == ["a", "b"] * 5
    for kept in timings.values():
        counts = {key: len(timing.seconds) for key, timing in kept.items()}
        assert counts.pop("prefill") == counts.pop("decode at 0") == counts.pop("decode at 5") == 4
        assert counts == {f"verify {count}": 12 for count in (1, 2, 4, 8)}


# ---- Models ------------------------------------------------------------------------------------

CLASSES = dict(zip(SCHEMES, (Linear, Int8Linear, Int8ActivationLinear, Int4Linear), strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_are_stored_as_the_scheme_says(scheme):
    model = make(case(scheme), CPU, 128)
    dtype = {"bf16": torch.bfloat16, "int4": torch.uint8}.get(scheme, torch.int8)
    for linear in candidates.linears(model).values():
        assert type(linear) is CLASSES[scheme] and linear.weight.dtype == dtype
        spread = linear.dequantize().float().std() * linear.in_features**0.5
        assert 0.8 < spread < 1.2
    idx = torch.tensor([[5, 9, 7]])
    logits = model(idx, torch.arange(3)[None], 64).logits
    assert logits.isfinite().all() and 0.1 < logits.float().std() < 10


def test_random_tied_weights_are_one_tensor():
    model = make(case("bf16", "tied"), CPU, 8)
    assert model.output.weight is model.tok_embeddings.weight


def test_large_random_tensors_have_no_equal_rows():
    tensor = torch.empty(4096, 512, dtype=torch.uint8)
    candidates.noise(tensor, lambda x: x.random_(256))
    assert tensor.unique(dim=0).shape == tensor.shape


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "m", SHAPE, torch.bfloat16)


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory) -> Path:
    """An int8 copy of the checkpoint, in a folder of its own."""
    folder = tmp_path_factory.mktemp("quantized") / "m"
    write_checkpoint(folder, SHAPE, torch.bfloat16)
    state = torch.load(folder / "model.pth")
    for name in [name for name in state if state[name].ndim == 2 and "tok" not in name]:
        tensors = quantize(state.pop(name), "int8", 32)
        state |= {f"{name.removesuffix('.weight')}.{key}": t for key, t in tensors.items()}
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def test_a_checkpoint_is_quantized_as_quantize_does(checkpoint, quantized):
    stored = load_model(quantized, "cpu").state_dict()
    made = make(Case("int8", 32, checkpoint=str(checkpoint)), CPU, 128).state_dict()
    assert stored.keys() == made.keys()
    assert all(torch.equal(stored[name], made[name]) for name in stored)


def test_a_quantized_checkpoint_runs_as_it_is(run, quantized):
    code, out, err, found = run("--checkpoint_path", quantized, *SHORT)
    assert code == 0, err
    (row,) = found["decode"]
    model = load_model(quantized, "cpu")
    model.setup_caches(1, 64)
    assert row["scheme"] == "as stored" and row["bytes_per_token"] <= model.bytes_per_step(64)
    assert row["bytes_per_token"] > model.bytes_per_step(0)


@pytest.mark.parametrize("draft", ["lookup", "itself"])
def test_speculation_is_measured_beside_plain_decoding(run, checkpoint, draft, monkeypatch):
    monkeypatch.setattr(DraftModel, "proposal_cost", lambda self: 0)  # else it could not pay
    draft = checkpoint if draft == "itself" else draft
    flags = ["--checkpoint_path", checkpoint, "--schemes", "bf16", "--draft", draft, *SHORT]
    code, out, err, found = run(*flags, "--gen", "24")
    assert code == 0, err
    (row,) = found["speculation"]
    assert row["ratio"] == pytest.approx(row["median"] / row["without"]) and row["median"] > 0
    assert (row["mean_accepted"] > 0) == (draft == checkpoint)
    mark = " \\*" if row["disturbed"] else ""
    assert f"| bf16{mark} | {draft} |" in out


# ---- The machine -------------------------------------------------------------------------------


def test_the_probe_streams_more_than_the_caches_hold(monkeypatch):
    sizes = []

    def recorded(buffer):
        sizes.append(buffer.nbytes)
        return buffer[:1]  # would be the fastest

    monkeypatch.setattr(machine, "READERS", {"sum of int64": machine.READERS["sum of int64"]})
    found = machine.read_bandwidth(CPU)
    monkeypatch.setattr(machine, "READERS", {"none": recorded})
    machine.read_bandwidth(CPU)
    assert 1e8 < found < 1e13
    assert set(sizes) == {machine.probe_bytes(CPU)} and sizes[0] >= 8 * machine.cache_bytes()


@pytest.mark.parametrize("name", machine.READERS)
def test_every_reader_reads_the_whole_buffer(name):
    """Whatever is changed, at the start or the end, its result is another one."""
    found = []
    for place in (slice(0), 0, 1500, -1):
        buffer = torch.ones(4096)
        buffer[place] = 3.0
        found.append(machine.READERS[name](buffer).tolist())
    assert found[0] not in found[1:]


def test_busy_time_is_read_from_the_system(tmp_path):
    tick, file = os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    file.write_text("cpu  100 20 30 9999 555 4 5 6 100 20\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert machine.busy_seconds(file) == 165 / tick
    assert machine.busy_seconds(tmp_path / "none") is None


@pytest.mark.parametrize(
    "busy, expected", [([7.0, 7.5], True), ([7.0, 7.01], False), ([None, None], None)]
)
def test_a_row_is_marked_if_others_used_the_processor(monkeypatch, busy, expected):
    monkeypatch.setattr(machine, "busy_seconds", iter(busy).__next__)
    timing = Timing()
    with timing.clock(CPU):
        pass
    assert timing.disturbed() is expected and len(timing.seconds) == 1


def test_what_this_process_uses_is_not_held_against_it(monkeypatch):
    monkeypatch.setattr(machine, "busy_seconds", lambda: machine.own_seconds())
    timing = Timing()
    with timing.clock(CPU):
        sum(range(3_000_000))
        subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert timing.disturbed() is False


@pytest.mark.parametrize(
    "busy, sign, note",
    [
        (lambda: next(clock) * 100.0, " \\*", "Other processes used over 5 %"),
        (lambda: None, "", "could not be checked"),
        (lambda: 0.0, "", "first token of a short prompt"),
    ],
    ids=["disturbed", "unknown", "quiet"],
)
def test_marks_are_shown_and_explained(run, monkeypatch, busy, sign, note):
    monkeypatch.setattr(machine, "busy_seconds", busy)
    code, out, err, _ = run("--model", "tiny", "--schemes", "int8", *SHORT)
    assert code == 0 and f"| int8{sign} | 0 |" in out, err
    assert (note in out) == (note != "first token of a short prompt")
    assert ("Other processes" in out) == bool(sign)


clock = itertools.count()


def test_the_probe_needs_no_package_but_torch():
    """So it runs where little is installed."""
    code = "import sys; old = {*sys.modules}; import scripts.machine; print({*sys.modules} - old)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in ast.literal_eval(done.stdout)}
    packages = {"gguf", "safetensors", "tokenizers", "sentencepiece", "lm_eval"}
    assert "torch" in loaded and not loaded & packages


# ---- Starts ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_starts_are_timed_in_new_processes_that_share_a_cache(monkeypatch, tmp_path):
    folders, real = [], subprocess.run
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def recorded(command, env, **options):
        folder = Path(env["TORCHINDUCTOR_CACHE_DIR"])
        before = len([*folder.rglob("*")])
        done = real(command, env=env, **options)
        folders.append((folder, before, len([*folder.rglob("*")])))
        return done

    monkeypatch.setattr(benchmark.subprocess, "run", recorded)
    args = Namespace(device=CPU, prompt=20, compile="block", compile_prefill=False)
    row = benchmark.start_twice(case("int8", "stories260k"), args, 64)
    compiled = not kernels.supported()  # they need no compilation
    assert row["second_s"] > 0 and row["load_s"] > 0
    assert row["cold_s"] > row["second_s"] or not compiled
    assert 100 < row["peak_memory_mb"] < 5000
    (cold, second) = folders
    assert cold[0] == second[0] and cold[1] == 0
    assert cold[2] <= second[1] and (cold[2] > 0) == compiled
    assert not [*tmp_path.iterdir()]  # the cache is gone
    assert "| start | load s | cold s | second process s | peak memory MB |" in benchmark.table(
        "start", [row]
    )


def test_a_start_that_fails_is_told_in_one_line(run, monkeypatch):
    killed = subprocess.CompletedProcess([], -9, "")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **_: killed)
    code, _, err, found = run("--model", "tiny", "--schemes", "int8", *SHORT[:-1])
    assert code == 2 and "int8 ended with code -9" in err and found is None


def test_starts_stand_in_the_report_unless_they_are_left_out(run, monkeypatch):
    row = {"load_s": 1.0, "cold_s": 9.0, "second_s": 2.0, "peak_memory_mb": 300}
    row["disturbed"] = False
    monkeypatch.setattr(benchmark, "start_twice", lambda case, *_: row | {"scheme": case.scheme})
    code, out, err, found = run("--model", "tiny", "--schemes", "bf16,int4", *SHORT[:-1])
    assert code == 0 and "| int4 | 1.00 | 9.00 | 2.00 | 300 |" in out, err
    assert [row["scheme"] for row in found["start"]] == ["bf16", "int4"]


# ---- Peers -------------------------------------------------------------------------------------


def tokens_of(candidate) -> list[int]:
    tokens = candidate.tokens([5, 99, 200, 7, 31, 12], 8, 0)
    return [token[0].id if isinstance(token, list) else token for token in tokens]


def our_tokens() -> list[int]:
    model = make(case("bf16"), CPU, 64).float()
    model.setup_caches(1, 64)
    return tokens_of(benchmark.Ours(model, Namespace(compile=None, compile_prefill=False)))


def test_transformers_runs_the_same_model():
    peer = candidates.HuggingFace(make(case("bf16"), CPU, 1), CPU)
    peer.model.float()  # in bf16 near ties may fall either way
    assert tokens_of(peer) == our_tokens()
    assert len(set(our_tokens())) > 3
    assert peer.bytes_per_step(9) == step_bytes("bf16", 9)


def test_transformers_is_measured_in_the_same_run(run):
    flags = ["--model", "tiny", "--schemes", "bf16", "--peers", "transformers", *SHORT]
    code, out, err, found = run(*flags, "--depth", "0,50")
    assert code == 0, err
    assert [row["scheme"] for row in found["decode"][2:]] == 2 * ["transformers bf16"]
    assert len(found["prefill"]) == 2 and "transformers" in found["versions"]


@pytest.mark.parametrize("scheme", candidates.GGUF_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gguf_file_holds_the_same_weights(scheme, shape, tmp_path):
    model = make(case(scheme, shape), CPU, 1)
    read = candidates.write_gguf(tmp_path / "m.gguf", model, candidates.GGUF_TYPES[scheme])
    reader, meta = convert_gguf.open_gguf(tmp_path / "m.gguf")
    meta.values["tokenizer.ggml.tokens"] = [*map(str, range(300))]  # a file for speed has none
    config = convert_gguf.build_config(meta, reader, torch.bfloat16) | {"model_type": "llama"}
    assert from_config(config) == preset("tiny")  # the output matrix is a tensor of its own
    names = {tensor.name for tensor in reader.tensors}
    found = convert_gguf.read_tensors(tmp_path / "m.gguf", reader, torch.float32, "llama", names)
    found = {name: tensor for _, name, tensor in found}
    attention = model.layers[1].attention
    wqkv = attention.wqkv.dequantize().float()
    for name, weight in {
        "blk.1.attn_q": wqkv[:64],
        "blk.1.attn_k": wqkv[64:96],
        "blk.1.attn_v": wqkv[96:],
        "blk.1.attn_output": attention.wo.dequantize().float(),
        "blk.0.ffn_down": model.layers[0].feed_forward.w2.dequantize().float(),
        "output": model.output.dequantize().float(),
    }.items():
        error = (found[f"{name}.weight"] - weight).square().mean() / weight.square().mean()
        # A block of Q4_0 without the code 0 is rounded to another grid: one in eight.
        assert error < {"bf16": 1e-12, "int8": 1e-4, "int4": 2e-3}[scheme], name
    stored = {tensor.name: tensor.data.nbytes for tensor in reader.tensors}
    assert read == sum(stored.values()) - stored["token_embd.weight"]


def test_the_gguf_file_of_a_mixture_holds_the_experts_of_a_matrix_as_one(tmp_path):
    model = make(case("bf16", "mixture"), CPU, 1)
    read = candidates.write_gguf(tmp_path / "m.gguf", model, "BF16")
    reader, meta = convert_gguf.open_gguf(tmp_path / "m.gguf")
    assert meta.text("general.architecture") == "qwen3moe"
    stored = {tensor.name: tensor.data.nbytes for tensor in reader.tensors}
    experts = sum(size for name, size in stored.items() if "_exps" in name)
    assert experts == 3 * 8 * 64 * 64 * 2 * len(model.layers)
    assert read == sum(stored.values()) - stored["token_embd.weight"] - experts * 6 // 8
    wanted = ["blk.1.ffn_down_exps.3.weight", "blk.0.ffn_gate_exps.7.weight"]
    options = (reader, torch.bfloat16, "qwen3moe", wanted)
    found = {name: x for _, name, x in convert_gguf.read_tensors(tmp_path / "m.gguf", *options)}
    first, second = (layer.feed_forward for layer in model.layers[:2])
    assert found[wanted[0]].equal(second.w2.weight[3])
    assert found[wanted[1]].equal(first.w1.weight[7])


def test_llama_cpp_runs_the_same_mixture():
    pytest.importorskip("llama_cpp")
    for scheme, kind in candidates.GGUF_TYPES.items():
        peer = candidates.LlamaCpp(make(case(scheme, "mixture"), CPU, 1), kind, CPU, 64)
        assert len(set(tokens_of(peer))) > 1 and peer.weight_bytes > 0
        peer.close()


def test_llama_cpp_runs_the_same_model(run):
    pytest.importorskip("llama_cpp")
    peer = candidates.LlamaCpp(make(case("bf16"), CPU, 1), "BF16", CPU, 64)
    assert tokens_of(peer)[:4] == our_tokens()[:4]  # later ones may be near ties in bf16
    peer.hold(40)
    state = peer.forward([3, 4], 40)
    peer.hold(40)
    assert peer.forward([3, 4], 40) == state and len(state) == 2
    peer.close()
    flags = ["--model", "tiny", "--schemes", "bf16,int8,int4", "--peers", "llama.cpp", *SHORT]
    code, out, err, found = run(*flags, "--depth", "0,50")
    assert code == 0, err
    names = {row["scheme"] for row in found["decode"]}
    assert {"llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0"} < names


# ---- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "lama"], ["lama", "tinyllama-1.1b", "stories15m"]),
        (["--model", "tiny", "--schemes", "int8,int3"], ["int3", "int8-activation"]),
        (["--model", "tiny", "--draft", "lookup"], ["--draft", "--checkpoint_path"]),
        (["--model", "tiny", "--depth", "0,129"], ["--depth 129", "context of 128"]),
        (["--model", "tiny", "--depth", "-3"], ["'-3'", "whole number"]),
        (["--model", "tiny", "--prompt", "129"], ["--prompt 129", "context of 128"]),
        (["--model", "tiny", "--peers", "vllm"], ["vllm", "llama.cpp"]),
        (["--model", "tiny", "--peers", "absent"], ["pip install absent-package"]),
        (["--model", "tiny", "--checkpoint_path", "x"], ["--model", "--checkpoint_path"]),
        (["--checkpoint_path", "nowhere/model.pth"], ["nowhere/model.pth"]),
        (["--model", "stories260k", "--schemes", "int4", "--prompt", "9"], ["--groupsize 32"]),
        (["--model", "tiny", "--runs", "0"], ["--runs", "'0'"]),
    ],
)
def test_mistakes_are_one_line(run, monkeypatch, flags, words):
    monkeypatch.setitem(benchmark.PEERS, "absent", ("no_such_module", "absent-package"))
    if "--prompt" not in flags:
        flags = [*flags, "--prompt", "20"]
    code, out, err, found = run(*flags)
    assert code == 2 and out == "" and found is None
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_a_draft_that_fits_ill_is_refused_at_once(run, checkpoint, tmp_path):
    flags = ["--checkpoint_path", checkpoint, *SHORT]
    code, out, err, _ = run(*flags, "--draft", tmp_path / "model.pth")
    assert code == 2 and out == "" and "there is no checkpoint" in err
    other = write_checkpoint(tmp_path / "other", SHAPE, torch.bfloat16)
    file = other.with_name("tokenizer.json")
    words = json.loads(file.read_text())
    words["model"]["vocab"] |= {
        "a": words["model"]["vocab"]["b"],
        "b": words["model"]["vocab"]["a"],
    }
    file.write_text(json.dumps(words))
    code, out, err, _ = run(*flags, "--draft", other)
    assert code == 2 and out == "" and "the model's vocabulary" in err


def test_a_quantized_checkpoint_refuses_schemes(run, quantized):
    code, _, err, _ = run("--checkpoint_path", quantized, "--schemes", "int4", *SHORT)
    assert code == 2 and "quantized" in err and err.count("\n") == 1
