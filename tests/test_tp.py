"""Tensor parallelism: two processes give what one gives, and end together, come what may."""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import quantize
import tp
from checkpoint import load_state
from cli import UserError
from commands import python
from conftest import CONFIG, ROOT, selected, write_checkpoint
from engine import load_model
from families import from_config, read_config
from model import Transformer
from tp_worker import run_case

pytestmark = pytest.mark.slow  # several processes each

BASE = CONFIG | {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 100000,
}
# Everything a family may add: biases of all Linears, norms of q and k, the embedding as output.
RICH = BASE | {
    "model_type": "qwen3",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
# Norms over all heads, of which a rank has some; norms after attention and FFN; scales and caps.
OTHERS = {
    "olmo": BASE | {"model_type": "olmo3", "sliding_window": 20, "attention_bias": True},
    "gemma": BASE
    | {"model_type": "gemma3_text", "sliding_window": 20, "final_logit_softcapping": 2.0}
    | {"head_dim": 32, "tie_word_embeddings": False},
    "granite": BASE
    | {"model_type": "granite", "embedding_multiplier": 3.0}
    | {"residual_multiplier": 0.5, "logits_scaling": 2.0},
    "phi": BASE
    | {"model_type": "phi3", "partial_rotary_factor": 0.5}
    | {"original_max_position_embeddings": BASE["max_position_embeddings"]},
    "experts": BASE
    | {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 64, "num_hidden_layers": 3, "mlp_only_layers": [1]},
}
PAGES = """
task: tp_pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
# Spares the reading of lm-eval's thousands of task definitions.
FEW_TASKS = """
import functools, runpy, sys
import lm_eval.tasks as tasks
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MODES = ["int8", "int8-activation", "int4", "hybrid", "int4-gptq"]
GREEDY = ("--temperature", "0", "--precision", "float32", "--device", "cpu")
PAIR = ("--standalone", "--nproc_per_node=2")


def environment(**variables) -> dict:
    return os.environ | {"PYTHONUNBUFFERED": "1"} | variables


def torchrun(*flags, new=(False, False)) -> tuple[str, ...]:
    """A launcher. It and its ranks are forks, or `new` processes where a signal is to meet them."""
    launcher = (sys.executable,) if new[0] else python()
    ranks = () if new[1] else ("--no-python", *python())
    return *launcher, "-m", "torch.distributed.run", *flags, *ranks


def launch(*command, stdin="", launcher=None, **variables) -> subprocess.CompletedProcess:
    with started(*command, launcher=launcher or torchrun(*PAIR), **variables) as process:
        out, err = process.communicate(stdin, timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextlib.contextmanager
def started(*command, launcher, **variables) -> Iterator[subprocess.Popen]:
    """A launcher that is told to end, with its ranks, if the test has not seen it end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [*launcher, *map(str, command)]
    process = subprocess.Popen(command, text=True, env=environment(**variables), **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def alone(*command, stdin="") -> subprocess.CompletedProcess:
    return launch(*command, stdin=stdin, launcher=python())


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def write_rich(folder: Path, dtype=torch.float32) -> Path:
    path = write_checkpoint(folder, RICH, dtype)
    state = torch.load(path)
    del state["output.weight"]  # it is the embedding
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of every scheme, with and without what a family may add."""
    folder = tmp_path_factory.mktemp("tp")
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    for path in (write_checkpoint(folder / "base", BASE), write_rich(folder / "rich")):
        for mode in MODES:
            flags = ["--checkpoint_path", str(path), "--mode", mode, "--device", "cpu"]
            if mode == "int4-gptq":
                flags += ["--calibration_file", str(text), "--calibration_seq_length", "64"]
            quantize.main(quantize.make_parser().parse_args(flags))
    return folder


# ---- Two processes give what one gives ---------------------------------------------------------


@pytest.fixture(scope="module")
def outcomes(folder) -> list[tuple]:
    """Every case with its outcome on one process, on rank 0 and on rank 1."""
    paths = [sorted((folder / name).glob("*.pth")) for name in ("base", "rich")]
    cases = [(str(path), rows, None) for path in paths[0] + paths[1] for rows in (1, 3)]
    rich = {path.stem: str(path) for path in paths[1]}
    mixed = rich["model_hybrid_int8_int4.g32"]  # int8 and int4 in one block
    cases += [(mixed, 3, "block"), (rich["model_int8-activation"], 3, "block")]
    cases += [(rich["model"], 1, "whole")]
    others = {name: str(write_checkpoint(folder / name, OTHERS[name])) for name in OTHERS}
    cases += [(path, 3, None) for path in others.values()]
    (folder / "cases.json").write_text(json.dumps(cases))
    done = launch(ROOT / "tests" / "tp_worker.py", folder / "cases.json", folder / "results")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(folder / f"results.{rank}") for rank in (0, 1)]
    return [
        (case, run_case(*case[:2], None), *both) for case, *both in zip(cases, *ranks, strict=True)
    ]


def test_two_processes_give_the_tokens_and_logits_of_one(outcomes):
    for case, one, first, second in outcomes:
        assert first["tokens"] == second["tokens"] == one["tokens"], case
        torch.testing.assert_close(first["logits"], one["logits"], atol=1e-4, rtol=0)
        assert torch.equal(first["logits"], second["logits"]), case


def test_a_rank_holds_half_of_every_matrix(outcomes):
    for case, one, *ranks in outcomes:
        matrices = [name for name in one["sizes"] if name.endswith((".weight", "_zeros"))]
        matrices = [name for name in matrices if name.startswith("layers.") and "norm" not in name]
        matrices = [name for name in matrices if "router" not in name]  # each rank chooses for all
        assert len(matrices) >= 8
        for name in matrices:
            halves = [rank["sizes"][name] * 2 for rank in ranks]
            assert halves == [one["sizes"][name]] * 2, (case, name)
        vocabulary = [rank["sizes"]["output.weight"] for rank in ranks]
        assert sum(vocabulary) == one["sizes"]["output.weight"]
        assert max(vocabulary) < 0.54 * sum(vocabulary)  # 160 of 300 tokens


def test_a_rank_reads_its_rows_from_the_mapped_file_and_copies_only_columns(folder):
    """In the file's own precision rows stay where they are mapped; a tied output is a view."""
    path = write_rich(folder / "bf16", torch.bfloat16)
    state = load_state(path)
    shard = object.__new__(tp.Shard)  # rank 1 of 2, without the other
    shard.device, shard.rank, shard.world, shard.group = torch.device("cpu"), 1, 2, None
    shard.done = threading.Event()
    with torch.device("meta"):
        model = Transformer(read_config(path.parent))
    parts = dict(state)
    shard.slice_state(model, parts, path)
    for name in ("w1", "w3"):
        key = f"layers.0.feed_forward.{name}.weight"
        assert parts[key].data_ptr() == state[key][64:].data_ptr()
        assert torch.equal(parts[key], state[key][64:])
    key = "layers.1.feed_forward.w2.weight"
    assert torch.equal(parts[key], state[key][:, 64:]) and parts[key].is_contiguous()
    assert parts[key].untyped_storage().nbytes() == state[key].nbytes // 2
    q, k, v = state["layers.0.attention.wqkv.weight"].split([128, 64, 64])
    expected = torch.cat([q[64:], k[32:], v[32:]])
    assert torch.equal(parts["layers.0.attention.wqkv.weight"], expected)
    assert not parts["layers.0.attention.wo.bias"].any()  # rank 0 adds it
    loaded = load_model(path, "cpu", torch.float32, shard)
    embedding, output = loaded.tok_embeddings.weight, loaded.output.weight
    assert output.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
    assert torch.equal(output, embedding[160:])


# ---- The commands ------------------------------------------------------------------------------


def test_generate_prints_once_what_one_process_prints(folder):
    figures = folder / "figures.json"
    flags = ("--checkpoint_path", folder / "rich" / "model_int8-activation.pth", *GREEDY)
    flags = (ROOT / "generate.py", *flags, "--max_new_tokens", 12, "--prompt", "-")
    done = launch(*flags, "--json", figures, stdin="A text\nof two lines\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone(*flags, stdin="A text\nof two lines\n").stdout
    assert done.stderr.count("tokens/s, ") == 1 and done.stderr.count("[median of 1") == 1
    record = json.loads(figures.read_text())
    # Two layers, two sums each of 128 floats and two maxima of one; 160 logits of the rank's own.
    assert record["communication_bytes_per_token"] == 4 * (2 * 2 * (128 + 1) + 160)
    assert 0 < record["communication_ms_per_token"] < 10000


def test_requests_get_the_same_records(folder):
    flags = (ROOT / "generate.py", "--checkpoint_path", folder / "base" / "model_int4.g32.pth")
    flags += (*GREEDY, "--jsonl", "--max_new_tokens", 5)
    lines = '{"id": 1, "prompt": "A text"}\nnonsense\n{"id": 2, "prompt": "A text, and"}\n{"id'
    done, expected = (how(*flags, stdin=lines) for how in (launch, alone))
    assert done.returncode == 0, done.stderr
    pairs = zip(
        *(map(json.loads, each.stdout.splitlines()) for each in (done, expected)), strict=True
    )
    for one, other in pairs:
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert '"id": 2, "text"' in done.stdout


def test_a_conversation_is_the_same(folder):
    flags = (ROOT / "generate.py", "--checkpoint_path", folder / "base" / "model_int4.g32.pth")
    flags += (*GREEDY, "--interactive", "--max_new_tokens", 8)
    turns = "Hello\nAnd?\n/reset\nHello\n"
    done = launch(*flags, stdin=turns)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone(*flags, stdin=turns).stdout and done.stdout.count("> ") >= 4


@pytest.mark.parametrize("draft", ["a smaller model", "lookup"])
def test_speculation_and_the_prefill_cache_work_with_both_models_shared(folder, tmp_path, draft):
    flags = ["--checkpoint_path", folder / "base" / "model.pth", "--max_new_tokens", 24, *GREEDY]
    flags += ["--prompt", " ab ab ab ab", "--prefill_context", "ab ab cd " * 9]
    expected = alone(ROOT / "generate.py", *flags)
    assert expected.returncode == 0, expected.stderr
    file, cache = tmp_path / "figures.json", tmp_path / "cache"
    flags += ["--prefill_cache", cache, "--json", file, "--speculate_k", 3]
    flags += ["--num_samples", 2]
    more = ["--prompt_lookup"]
    if draft != "lookup":
        small = write_checkpoint(tmp_path / "small", BASE | {"num_hidden_layers": 1})
        more = ["--draft_checkpoint_path", small, "--compile"]
    shared = launch(ROOT / "generate.py", *flags, *more)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout == expected.stdout * 2
    figures = json.loads(file.read_text())
    models = 1 if draft == "lookup" else 2
    assert figures["context_prefilled_tokens"] == models * figures["context_tokens"]
    assert len(list(cache.iterdir())) == 2 * models  # each rank keeps its own part of each model
    accepted = figures["samples"][0]["accepted"]
    assert sum(accepted) > 0 and (draft != "lookup" or sum(accepted[1:]) > 0)


def test_eval_scores_the_same_and_writes_once(folder):
    """Both of what eval.py measures; a page of a task is scored like a text cut without overlap."""
    (folder / "data.jsonl").write_text(json.dumps({"page": (folder / "text.txt").read_text()}))
    (folder / "page.yaml").write_text(PAGES.format(folder / "data.jsonl"))
    flags = (ROOT / "eval.py", "--checkpoint_path", folder / "rich" / "model.pth", *GREEDY[2:])
    flags += ("--max_seq_length", 100, "--output_path", folder / "scores.json")
    text = ("--perplexity", folder / "text.txt", "--stride", 100)
    task = ("--tasks", "tp_pages", "--include_path", folder)
    scores = []
    pair = torchrun(*PAIR)
    for kind, launcher in ((text, python()), (text, pair), (task, (*pair, "-c", FEW_TASKS))):
        done = launch(*flags, *kind, launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("perplexity" if kind == text else "bits_per_byte") == 1
        scores.append(json.loads((folder / "scores.json").read_text()))
    one, two, page = scores
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
    assert two["tokens"] == one["tokens"] == 900
    bits = page["results"]["tp_pages"]["bits_per_byte,none"]
    assert bits == pytest.approx(one["bits_per_byte"], rel=1e-5)


# ---- Several machines, and what goes wrong -----------------------------------------------------


def nodes(*command, new=((False, False),) * 2) -> Iterator[contextlib.AbstractContextManager]:
    """Two launchers of one process each, as on two machines; `new` as of `torchrun`, for each."""
    flags = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1")
    flags += (f"--master_port={free_port()}",)
    for rank in (0, 1):
        launcher = torchrun(*flags, f"--node_rank={rank}", new=new[rank])
        yield started(ROOT / "generate.py", *command, launcher=launcher)


def children(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_two_machines_give_the_text_of_one(folder):
    flags = ("--checkpoint_path", folder / "base" / "model_hybrid_int8_int4.g32.pth", *GREEDY)
    flags += ("--max_new_tokens", 12)
    first, second = nodes(*flags)
    with first as first, second as second:
        outs = [process.communicate(timeout=120) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outs
    assert outs[0][0] == alone(ROOT / "generate.py", *flags).stdout
    assert outs[1][0] == "" and "tokens/s" not in outs[1][1]


@pytest.fixture(scope="module")
def endless(folder) -> Path:
    """A model that never says the EOS token."""
    path = write_checkpoint(folder / "endless", BASE)
    state = torch.load(path)
    state["output.weight"][258] = 0
    torch.save(state, path)
    return path


ENDLESS = ("--max_new_tokens", 90000, "--max_seq_length", 95000, *GREEDY)


def test_a_killed_rank_ends_the_others(endless):
    flags = (ROOT / "generate.py", "--checkpoint_path", endless, *ENDLESS)
    with started(*flags, launcher=torchrun(*PAIR, new=(True, False))) as process:
        assert process.stdout.read(40)  # it is generating
        os.kill(children(process)[1], signal.SIGKILL)
        began = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode != 0 and time.monotonic() - began < 30


# Machine 0 keeps the store that the signs of life go through.
BLOWS = [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)]


def strike(endless: Path, node: int, blow: signal.Signals) -> tuple[int, str, float]:
    """Kill or stop one of two machines: how the other ends, and after how many seconds."""
    new = [(False, False), (False, False)]
    new[node] = (True, blow == signal.SIGSTOP)
    first, second = nodes("--checkpoint_path", endless, *ENDLESS, new=new)
    with first as first, second as second:
        assert first.stdout.read(40)
        struck, other = (first, second) if node == 0 else (second, first)
        victims = [*children(struck), *([struck.pid] if node == 0 else [])]
        for victim in victims:
            os.kill(victim, blow)
        began = time.monotonic()
        try:
            _, err = other.communicate(timeout=60)
        finally:
            if blow == signal.SIGSTOP:
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
        return other.returncode, err, time.monotonic() - began


@pytest.fixture(scope="module", autouse=True)
def struck(request, endless) -> Iterator[dict[tuple, concurrent.futures.Future]]:
    """Every blow with what comes of it: dealt while the other tests run, as most is waiting."""
    python()  # the threads are to find one server
    blows = BLOWS if selected(request, "blow") else []
    with concurrent.futures.ThreadPoolExecutor(len(BLOWS)) as pool:
        yield {blow: pool.submit(strike, endless, *blow) for blow in blows}


@pytest.mark.parametrize("node, blow", BLOWS)
def test_a_machine_that_dies_or_hangs_ends_the_other(struck, node, blow):
    code, err, seconds = struck[node, blow].result()
    assert code != 0 and seconds < 30
    assert blow == signal.SIGKILL or "is silent for 20 s" in err


def test_a_rank_leaves_together_or_after_an_error_at_once_without_its_graphs(monkeypatch):
    """NCCL waits for graphs and for the others at the end of the process."""
    left, held = [], []

    class Graph:
        pass

    def work(fails: bool) -> None:
        graph = Graph()
        held.append(weakref.ref(graph))
        if fails:
            raise UserError("the logits are NaN")

    def abort() -> None:
        left.append("at once" if held[-1]() is None else "with a graph")

    def enter(name: str) -> tuple:
        shard = types.SimpleNamespace(device=torch.device(name), done=threading.Event())
        return shard.device, shard

    monkeypatch.setattr(tp, "init", enter)
    monkeypatch.setattr(tp, "shutdown", lambda shard: left.append("together"))
    monkeypatch.setattr(tp.dist.distributed_c10d, "_abort_process_group", abort)
    for name, fails in (("cuda", False), ("cpu", True), ("cuda", True)):
        ends = pytest.raises(UserError, match="NaN") if fails else contextlib.nullcontext()
        with ends, tp.joined(name) as (_, shard):
            work(fails)
        assert shard.done.is_set() == fails
    assert left == ["together", "at once"]


def test_a_missing_rank_is_waited_for_only_so_long(folder):
    flags = (ROOT / "generate.py", "--checkpoint_path", folder / "base" / "model.pth")
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(free_port()), "TP_TIMEOUT": "3"}
    began = time.monotonic()
    done = launch(*flags, *GREEDY, launcher=python(), **variables)
    assert time.monotonic() - began < 60
    assert done.returncode == 2 and "2 processes did not find each other in 3 s" in done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    variables["TP_TIMEOUT"] = "soon"
    done = launch(*flags, *GREEDY, launcher=python(), **variables)
    assert done.returncode == 2 and "TP_TIMEOUT" in done.stderr and done.stderr.count("\n") == 1


def test_a_mistake_is_said_once(folder):
    path = write_checkpoint(folder / "odd", CONFIG | {"num_key_value_heads": 3})
    done = launch(ROOT / "generate.py", "--checkpoint_path", path, *GREEDY)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    reason = f"2 processes cannot share the 3 KV heads of {path} evenly; possible are 1, 3"
    assert done.returncode != 0 and done.stdout == "" and lines == [f"error: {reason}"]
    assert "exitcode  : 2" in done.stderr and 'generate.py", line' not in done.stderr


@pytest.mark.parametrize(
    "changes, groups, world, sentence",
    [
        (
            {},
            None,
            3,
            "3 processes cannot share the 2 KV heads of a/model.pth evenly; possible are 1, 2",
        ),
        (
            {"num_key_value_heads": 6},
            None,
            4,
            "the 6 KV heads of a/model.pth evenly; possible are 1, 2, 3, 6",
        ),
        (
            {"intermediate_size": 97},
            None,
            2,
            "the 97 columns of w2 of a/model.pth evenly; possible are 1",
        ),
        (
            {},
            3,
            2,
            "the 3 int4 groups of layers.0.feed_forward.w2 of a/model.pth evenly; possible are 1",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_and_fitting_ones_named(
    changes, groups, world, sentence
):
    args = from_config(CONFIG | changes)
    state = {"layers.0.feed_forward.w2.scales_and_zeros": torch.zeros(groups or 1, 4, 2)}
    with pytest.raises(UserError, match=re.escape(sentence) + "$"):
        tp.check_sizes(args, state if groups else {}, world, Path("a/model.pth"))


def test_what_fits_is_accepted():
    args = from_config(CONFIG)
    state = {"layers.0.feed_forward.w2.scales_and_zeros": torch.zeros(4, 4, 2)}
    assert [tp.check_sizes(args, state, n, Path()) for n in (1, 2)] == [None, None]
