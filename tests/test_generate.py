"""Generation: the text is the model's, whatever the batch, the cache and the compiler."""

import contextlib
import fcntl
import functools
import io
import json
import os
import pty
import select
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import build_cpp
import engine as engine_module
import files
import generate as cli_generate
import process
from cli import UserError
from commands import python
from conftest import CONFIG, ROOT, random_model, write_checkpoint
from engine import Engine, Sampling, candidates, generate, load_model, sample
from model import Transformer

GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 9, 200, 31, 7], [77], list(range(20, 90)), [3, 3, 3]]


def make_engine(batch_size=1, length=256, config=CONFIG, compile=None, **options) -> Engine:
    model = random_model(config)
    model.setup_caches(batch_size, length)
    return Engine(model, compile, **options)


engine = make_engine


def options_of(eos_ids=frozenset(), seed=0, rows=1, **options) -> dict:
    """What `generate` takes by name, from what tests usually say."""
    seeds = [seed + i for i in range(rows)]
    return dict(until=lambda _row, token: token in eos_ids, seeds=seeds) | options


def run_rows(engine, prompts, n=40, sampling=GREEDY, **options) -> list[list[int]]:
    rows, options = [[] for _ in prompts], options_of(rows=len(prompts), **options)
    for step in generate(engine, prompts, sampling, n, **options):
        for row, token in zip(rows, step, strict=True):
            row += [] if token is None else [token.id]
    return rows


def greedy_by_full_forward(prompt: list[int], n: int) -> list[int]:
    """The reference: every token from a forward pass over everything before it."""
    model, tokens = random_model(CONFIG), list(prompt)
    for _ in range(n):
        model.setup_caches(1, 256)
        positions = torch.arange(len(tokens)).unsqueeze(0)
        logits = model(torch.tensor([tokens]), positions, 256).logits
        tokens.append(logits[0, -1].argmax().item())
    return tokens[len(prompt) :]


# ---- Text --------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_full_forward_passes():
    for prompt in PROMPTS:
        assert run_rows(engine(), [prompt]) == [greedy_by_full_forward(prompt, 40)]


def test_a_batch_gives_each_prompt_what_it_gives_alone():
    alone = [run_rows(engine(), [prompt])[0] for prompt in PROMPTS]
    assert run_rows(engine(len(PROMPTS)), PROMPTS) == alone


def test_long_prompts_prefill_in_chunks(monkeypatch):
    whole = run_rows(engine(4), PROMPTS)
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 16)
    assert run_rows(engine(4), PROMPTS) == whole


def test_rows_end_at_eos_and_the_others_go_on():
    rows = run_rows(engine(4), PROMPTS)
    eos = rows[0][6]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    assert len(expected[0]) < 40
    assert run_rows(engine(4), PROMPTS, eos_ids={eos}) == expected


def test_generation_fills_the_cache_to_its_last_position_and_no_further():
    longer = run_rows(engine(4), PROMPTS, n=100)
    rows = run_rows(engine(4, length=80), PROMPTS, n=100)
    assert [len(p) + len(r) for p, r in zip(PROMPTS, rows, strict=True)] == [81, 81, 81, 81]
    assert rows == [long[: len(row)] for long, row in zip(longer, rows, strict=True)]


def test_a_prompt_as_long_as_the_cache_gives_one_token():
    assert run_rows(engine(length=70), [PROMPTS[2]]) == [greedy_by_full_forward(PROMPTS[2], 1)]


def test_one_new_token_is_one_step():
    assert run_rows(engine(), [PROMPTS[0]], n=1) == [greedy_by_full_forward(PROMPTS[0], 1)]


def test_a_continued_cache_gives_what_a_new_prefill_gives():
    used = engine()
    first = run_rows(used, [PROMPTS[2]], n=10)[0]
    longer = PROMPTS[2] + first[:9] + [11, 12, 13]  # the last new token was never fed
    assert run_rows(used, [longer], start=79) == run_rows(engine(), [longer])


def test_what_an_earlier_prompt_left_in_the_cache_is_never_seen():
    used = engine()
    run_rows(used, [PROMPTS[2]], n=100)
    assert run_rows(used, [PROMPTS[0]]) == run_rows(engine(), [PROMPTS[0]])


def test_golden_greedy_tokens():
    golden = (
        "117 93 209 93 64 248 117 93 199 248 236 212 125 4 254 106 155 101 212 182 254 212 230 232"
    )
    assert run_rows(engine(), [PROMPTS[0]], n=24) == [[int(token) for token in golden.split()]]


def test_known_story_of_stories260k(tmp_path):
    data = ROOT.parent / "shared" / "data" / "stories260K"
    if not data.exists():
        pytest.skip("stories260K is not beside this folder")
    model, vocabulary = read_llama2c(data, tmp_path)
    model.setup_caches(1, 256)
    tokens = run_rows(Engine(model, None), [[1]], n=24)[0]
    text = b"".join(vocabulary[token] for token in tokens).decode().replace("\u2581", " ")
    expected = "Once upon a time, there was a little girl named Lily. She loved to play outside in"
    assert text.strip().startswith(expected[: len(text.strip())]) and len(tokens) == 24


def read_llama2c(data: Path, folder: Path) -> tuple[Transformer, list[bytes]]:
    """The model and vocabulary of a llama2.c export: version 0, int32 header, float32 tensors."""
    raw = (data / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, _ = struct.unpack("7i", raw[:28])
    floats = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    state, offset = {}, 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal offset
        count = torch.Size(shape).numel()
        offset += count
        return floats[offset - count : offset].view(shape)

    state["tok_embeddings.weight"] = take(vocab, dim)
    kv = dim // heads * kv_heads
    for name, *shape in (
        ("attention_norm", dim),
        ("attention.wq", dim, dim),
        ("attention.wk", kv, dim),
        ("attention.wv", kv, dim),
        ("attention.wo", dim, dim),
        ("ffn_norm", dim),
        ("feed_forward.w1", hidden, dim),
        ("feed_forward.w2", dim, hidden),
        ("feed_forward.w3", hidden, dim),
    ):
        for i, tensor in enumerate(take(layers, *shape)):
            state[f"layers.{i}.{name}.weight"] = tensor.clone()
    state["norm.weight"] = take(dim)
    (folder / "stories260K").mkdir()
    torch.save(state, folder / "stories260K" / "model.pth")
    raw, vocabulary = (data / "tok512.bin").read_bytes()[4:], []
    while raw:
        length = struct.unpack("i", raw[4:8])[0]
        vocabulary.append(raw[8 : 8 + length])
        raw = raw[8 + length :]
    path = folder / "stories260K" / "model.pth"
    return load_model(path, "cpu", torch.float32), vocabulary


def broken(config: dict = CONFIG, value=float("nan")) -> Engine:
    """An engine whose model gives a logit of this value after token 77 alone."""
    model = random_model(config)
    model.tok_embeddings.weight.data[77, 0] = value
    model.setup_caches(2, 64)
    return Engine(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_the_text(value):
    with pytest.raises(UserError, match="logits that are NaN or infinite"):
        run_rows(broken(value=value), [[5, 77]], n=3)  # after the prefill
    decoded = engine_module.generate(
        broken(value=value),
        [[5, 9]],
        GREEDY,
        3,
        **options_of(shape_logits=lambda row, ids, logits: logits.index_fill(0, SEVEN, 1e30)),
    )
    assert next(decoded)[0].id == 77
    with pytest.raises(UserError, match="logits that are NaN or infinite"):
        next(decoded)  # decoding says it with the token, and waits for nothing more


SEVEN = torch.tensor([77])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_logit_that_is_not_finite_is_enough(value):
    logits = torch.zeros(2, 300)
    logits[1, 7] = value
    read = engine_module.send_tokens(torch.tensor([3, 4]), logits, None)
    assert [token.id for token in read([True, False])] == [3, 4]  # of a row that has ended
    with pytest.raises(UserError, match="logits that are NaN or infinite"):
        read([False, True])


def test_a_row_that_has_ended_cannot_end_the_others():
    def until(row, token):
        return row == 0

    steps = run_rows(broken(), [[5, 9], [3, 4]], n=4, until=until, shape_logits=seven_in_row_0)
    assert [len(row) for row in steps] == [1, 4] and steps[0] == [77]  # fed on, and NaN from then


def seven_in_row_0(row, ids, logits):
    logits[77 if row == 0 else 5] = 1e30  # in place: the raw logits stay as they are
    return logits


def test_a_damaged_checkpoint_prints_nothing_and_ends_with_code_2(run_cli, tmp_path):
    path = write_checkpoint(tmp_path)
    state = torch.load(path)
    state["layers.1.feed_forward.w2.weight"][3, 5] = float("nan")
    torch.save(state, path)
    for flags in ((), ("--prompt_lookup",)):
        code, out, err = run_cli("--checkpoint_path", path, "--prompt", "ab", *flags)
        assert code == 2 and "logits that are NaN or infinite" in err and out == "ab"


# ---- Rows of their own, records of every token ---------------------------------------------------


def test_a_rows_text_never_depends_on_its_neighbours():
    """Sampled text, too: each row has its own generator, settings and end."""
    samplings = [Sampling(1.0, 0), GREEDY, Sampling(0.7, 20, 0.9, 0.01), Sampling(1.0, 0)]
    alone = []
    for i, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True)):
        alone += run_rows(engine(), [prompt], n=20, sampling=sampling, seed=5 + i)
    assert run_rows(engine(4), PROMPTS, n=20, sampling=samplings, seed=5) == alone
    some = [PROMPTS[3], [], PROMPTS[1]]  # an empty prompt has ended before it begins
    options = dict(n=20, sampling=[samplings[3], GREEDY, samplings[1]], seeds=[8, 0, 0])
    assert run_rows(engine(3), some, **options) == [alone[3], [], alone[1]]
    assert alone[0] != run_rows(engine(), [PROMPTS[0]], n=20, sampling=samplings[0], seed=6)[0]


def test_a_hook_changes_a_copy_of_the_raw_logits():
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(CONFIG, dtype)
        model.setup_caches(1, 64)
        options = options_of(logprobs=1, shape_logits=lambda *x: seven_in_row_0(*x).float())
        ((token,),) = generate(Engine(model), [[5, 9]], GREEDY, 1, **options)
        assert token.id == 77 and token.logprob < -0.1 and token.top[0][0] != 77


def hear(heard, row, token):
    heard.append(token)


def test_nothing_comes_of_empty_prompts_and_until_hears_every_token():
    assert run_rows(engine(2), [[], []]) == [[], []]
    for n, length in ((3, 256), (40, 7)):  # the last token by the limit, or by the full cache
        heard: list[int] = []
        rows = run_rows(
            engine(length=length), [[5, 9, 3]], n=n, until=functools.partial(hear, heard)
        )
        assert rows == [heard] and len(heard) == min(n, 5)
    with pytest.raises(ValueError, match="no token after the 3"):
        engine().prefill([[1, 2, 3]], 3)


def test_each_row_ends_by_its_own_limit():
    limits, counts = [3, 9, 1, 5], [0] * 4

    def until(row, token):
        counts[row] += 1
        return counts[row] == limits[row]

    rows = run_rows(engine(4), PROMPTS, until=until)
    assert [len(row) for row in rows] == limits == counts


def test_log_probabilities_are_those_of_the_raw_logits():
    tokens, text = [], list(PROMPTS[0])
    options = options_of(logprobs=4, shape_logits=lambda row, ids, logits: logits.flip(0))
    for (token,) in generate(engine(), [text], Sampling(0.7, 10), 12, **options):
        tokens.append(token)
    ids = torch.tensor([text + [token.id for token in tokens]])
    model = random_model(CONFIG)
    model.setup_caches(1, 64)
    logits = model(ids, torch.arange(ids.shape[1])[None], 64).logits[0, len(text) - 1 : -1]
    for token, row in zip(tokens, logits.double().log_softmax(-1), strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        values, ids = row.topk(4)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [p for _, p in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    plain = next(generate(engine(), [text], GREEDY, 1, **options_of()))[0]
    assert plain.logprob is None and plain.top == ()


# ---- Sampling ----------------------------------------------------------------------------------


def reference_distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[float]:
    """The same rules one token at a time, in float64."""
    weights = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p and kept:
            break
        if weights[i] >= min_p * weights[order[0]]:
            kept.append(i)
        mass += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


SETTINGS = [
    dict(),
    dict(temperature=0.5),
    dict(top_k=3),
    dict(top_k=1000),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(temperature=1.7, top_k=6, top_p=0.8, min_p=0.1),
    dict(top_p=0.0),
    dict(min_p=1.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampling_draws_from_the_distribution_asked_for(settings):
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(3)) * 2
    sampling = Sampling(**dict(temperature=1.0, top_k=0) | settings)
    probs, tokens = candidates(logits, sampling)
    full = torch.zeros(2, 10).scatter(-1, tokens, probs)
    expected = torch.tensor([reference_distribution(row, **settings) for row in logits])
    assert torch.allclose(full, expected.float(), atol=1e-6)

    draws, generator = 20000, torch.Generator().manual_seed(4)
    drawn = sample(logits[:1].expand(draws, 10), [sampling] * draws, [generator] * draws)
    counts = torch.bincount(drawn, minlength=10).double()
    mean = expected[0].double() * draws
    assert counts[mean == 0].sum() == 0
    seen = mean > 0
    chi_square = ((counts - mean)[seen] ** 2 / mean[seen]).sum().item()
    assert chi_square < 33.0  # 9 degrees of freedom: exceeded once in 7000


def test_temperature_zero_is_argmax():
    logits = torch.randn(50, 300)
    assert sample(logits, [GREEDY] * 50, [torch.Generator()] * 50).equal(logits.argmax(-1))


def test_the_seed_decides_the_text():
    runs = [run_rows(engine(), [[5, 9]], sampling=Sampling(1.0), seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


# ---- Compilation -------------------------------------------------------------------------------


# Sizes that are equal, to each other or to a number of cache positions, must not be taken for one.
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 128}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, batch_size, shape",
    [
        ("block", 1, {}),
        ("block", 3, WIDE),
        ("block", 1, WIDE),
        ("whole", 1, WIDE),
        ("whole", 3, {}),
    ],
)
def test_nothing_recompiles_after_warm_up_and_the_text_is_the_same(mode, batch_size, shape):
    torch.compiler.reset()
    engine = functools.partial(make_engine, config=CONFIG | shape)
    compiled = engine(batch_size, length=256, compile=mode, compile_prefill=True)
    compiled.warm_up(batch_size)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in [*range(1, 16), 63, 64, 65, 127, 200]:
            prompts = [list(range(length)), [7] * max(1, length // 2), [9]][:batch_size]
            assert run_rows(compiled, prompts, 9) == run_rows(engine(batch_size), prompts, 9)
        for settings in SETTINGS:
            sampling = Sampling(**dict(temperature=1.0, top_k=0) | settings)
            run_rows(compiled, [[5, 6]] * batch_size, 5, sampling=sampling)
        start = [1] * 40
        for turn in range(1, 6):  # a conversation: each turn continues the cache
            run_rows(compiled, [start * turn] * batch_size, n=5, start=40 * turn - 38)


@pytest.mark.slow
def test_compiled_functions_serve_every_layer_once():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = engine(compile="block")
    compiled.warm_up(1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- The command line --------------------------------------------------------------------------


def command(monkeypatch, capsys, *flags, stdin="") -> tuple[int, str, str]:
    """Run generate.py in this process: its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
    monkeypatch.delenv("DEVICE", raising=False)
    code = 0
    try:
        process.run(cli_generate.main, cli_generate.make_parser())
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def run_cli(monkeypatch, capsys, checkpoint):
    common = ("--checkpoint_path", checkpoint, "--device", "cpu", "--precision", "float32")

    def run(*flags, stdin=""):
        return command(monkeypatch, capsys, *common, *flags, stdin=stdin)

    return run


def test_a_prompt_is_printed_with_its_continuation(run_cli, tmp_path):
    figures = tmp_path / "figures.json"
    flags = ("--temperature", "0", "--max_new_tokens", "12", "--json", figures)
    code, out, err = run_cli("--prompt", "Hello", *flags, "--num_samples", "2")
    assert code == 0
    first, second, _ = out.split("\n")
    assert out.startswith("Hello") and first == second
    record = json.loads(figures.read_text())
    assert record["device"] == "cpu" and record["load_s"] > 0 and record["peak_memory_bytes"] > 0
    for figures in record["samples"]:
        assert figures["prompt_tokens"] == [5] and figures["new_tokens"] == [12]
        assert figures["ended_by"] == ["max_new_tokens"]
        assert figures["tokens_per_s"] > 0 and figures["gb_per_s"] > 0
    assert "tokens/s" in err and "peak memory" in err


def test_the_time_of_loading_is_without_the_build_of_kernels(
    monkeypatch, capsys, checkpoint, tmp_path
):
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])

    def takes(seconds: float, what: Callable) -> Callable:
        def call(*args, **options):
            now[0] += seconds
            return what(*args, **options)

        return call

    built = types.SimpleNamespace(load=takes(100, lambda: True))
    monkeypatch.setattr(cli_generate, "time", clock)
    monkeypatch.setattr(cli_generate, "kernels_for", lambda device: built)
    monkeypatch.setattr(cli_generate, "load", takes(3, cli_generate.load))
    monkeypatch.setattr(Transformer, "pack_weights", takes(2, lambda model: None))
    flags = ("--checkpoint_path", checkpoint, "--device", "cpu", "--max_new_tokens", 1)
    code, _, err = command(monkeypatch, capsys, *flags, "--json", tmp_path / "figures.json")
    assert code == 0, err
    assert json.loads((tmp_path / "figures.json").read_text())["load_s"] == 5 and now[0] > 100


def test_the_chat_template_is_told_what_template_args_say(monkeypatch, capsys, tmp_path):
    path = write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] += "{% if short %}{% else %}<think>{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    flags = ["--checkpoint_path", path, "--device", "cpu", "--precision", "float32", "--chat"]
    flags += ["--max_new_tokens", 1, "--json", tmp_path / "figures.json"]
    lengths = []
    for told in ("{}", '{"short": true}'):
        code, _, err = command(monkeypatch, capsys, *flags, "--template_args", told)
        assert code == 0, err
        lengths += json.loads((tmp_path / "figures.json").read_text())["samples"][0][
            "prompt_tokens"
        ]
    assert lengths[0] == lengths[1] + len("<think>")


def test_prompt_from_standard_input_and_of_random_tokens(run_cli):
    flags = ("--temperature", "0", "--max_new_tokens", "5")
    typed, piped = (
        run_cli("--prompt", "abc", *flags),
        run_cli("--prompt", "-", *flags, stdin="abc\n"),
    )
    assert typed[:2] == piped[:2] and typed[0] == 0
    code, _, err = run_cli("--prompt", "37", *flags)
    assert code == 0 and "37 prompt tokens, 5 new" in err


def test_prompts_file_rows_equal_single_prompts(run_cli, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\na longer prompt\nthree\n")
    flags = ("--temperature", "0", "--max_new_tokens", "9")
    alone = [run_cli("--prompt", p, *flags)[1] for p in ("one", "a longer prompt", "three")]
    for batch in ((), ("--batch_size", "2")):
        code, out, _ = run_cli("--prompts_file", file, *flags, *batch)
        expected = "".join(f"--- {i}\n{text}" for i, text in enumerate(alone))
        assert code == 0 and out == expected


def test_same_seed_same_text(run_cli):
    texts = [run_cli("--seed", seed, "--max_new_tokens", "20")[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_profile_writes_a_trace(run_cli, tmp_path):
    code, _, _ = run_cli("--max_new_tokens", "3", "--profile", tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert code == 0 and any("linear" in event.get("name", "") for event in events)


def test_conversation_prefills_only_what_is_new(run_cli, tmp_path):
    figures = tmp_path / "figures.json"
    turns = "Hello there\nAnd then?\n/reset\nHello there\n/quit\nnever read\n"
    flags = ("--temperature", "0", "--max_new_tokens", "10", "--json", figures)
    code, out, _ = run_cli("--interactive", *flags, stdin=turns)
    first, second, third = json.loads(figures.read_text())["samples"]
    assert code == 0
    assert first["prefilled_tokens"] == first["prompt_tokens"][0]
    assert second["prefilled_tokens"] < second["prompt_tokens"][0] - first["prompt_tokens"][0]
    assert third["prompt_tokens"] == first["prompt_tokens"]


def test_conversation_says_that_the_context_is_full_and_goes_on(run_cli, tmp_path):
    turns = "x" * 100 + "\nhi\n/quit\n"
    code, out, err = run_cli("--interactive", "--max_seq_length", "90", stdin=turns)
    assert code == 0 and "90 positions" in err and "/reset" in err and "full cache" in err


def test_no_chat_conversation_continues_the_text(run_cli, tmp_path):
    figures = tmp_path / "figures.json"
    flags = ("--interactive", "--no-chat", "--json", figures, "--max_new_tokens", "4")
    assert run_cli(*flags, stdin="abc\nde\n")[0] == 0
    first, second = json.loads(figures.read_text())["samples"]
    assert first["prompt_tokens"] == [3] and second["prompt_tokens"][0] >= 5


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--checkpoint_path", "nowhere/model.pth"], "there is no checkpoint nowhere/model.pth"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--prompt", "x" * 600], "600 tokens"),
        (["--prompt", "hello", "--max_seq_length", "4"], "--max_seq_length"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompts_file", "nowhere.txt"], "nowhere.txt"),
        (["--max_seq_length", "513"], "context, 512"),
        (["--temperature", "-1"], "--temperature: '-1' is not a number from 0 to 100"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "from 0 to 100"),
        (["--seed", "9" * 30], "--seed"),
        (["--prompt", "9" * 5000], "tokens and the cache 512 positions"),
        (["--prompt", "0"], "prompt is empty"),
        (["--batch_size", "10000"], "from 1 to 4096"),
        (["--json", "/dev/null/figures.json"], "cannot be written"),
        (["--json", "."], "cannot be written"),
        (["--profile", ""], "the name is empty"),
        (["--checkpoint_path", "."], "is a folder"),
        (["--top_p", "1.5"], "from 0 to 1"),
        (["--min_p", "2"], "from 0 to 1"),
        (["--top_k", "-3"], "--top_k"),
        (["--top_k", "some"], "whole number"),
        (["--max_new_tokens", "0"], "at least 1"),
        (["--system_prompt", "Be brief."], "--chat"),
        (["--interactive", "--batch_size", "2"], "--batch_size"),
        (["--precision", "int3"], "int3"),
        (["--no_such_flag"], "no_such_flag"),
        (["--checkpoint_path", "x" * 300], "File name too long"),
        (["--chat", "--prompt", "5"], "drop --chat"),
        (["--template_args", '{"a": 1}'], "--template_args is for chats; add --chat"),
        (["--chat", "--template_args", "[1]"], "'[1]' is no JSON object"),
        (["--chat", "--template_args", "{a: 1}"], "'{a: 1}' is no JSON object"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run_cli, flags, named):
    code, out, err = run_cli(*flags)
    assert code == 2 and named in err and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_cache_that_does_not_fit_into_memory_is_said(run_cli, monkeypatch):
    def full(*sizes):
        raise torch.OutOfMemoryError("allocator")

    monkeypatch.setattr(Transformer, "setup_caches", full)
    code, _, err = run_cli("--batch_size", "3")
    assert code == 2 and "KV cache of 3 rows of 512 positions" in err and err.count("\n") == 1


def test_the_wrong_tokenizer_is_noticed(run_cli, tmp_path):
    small = write_checkpoint(tmp_path, CONFIG | {"vocab_size": 100})
    code, _, err = run_cli("--checkpoint_path", small)
    assert code == 2 and "tokenizer" in err and "100" in err


def test_a_missing_tokenizer_is_noticed(run_cli, tmp_path):
    path = write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    code, _, err = run_cli("--checkpoint_path", path)
    assert code == 2 and str(tmp_path) in err and err.count("\n") == 1


@pytest.mark.parametrize("flag, key", [("--json", "samples"), ("--profile", "traceEvents")])
def test_a_pipe_and_a_link_are_written_to_and_not_replaced(run_cli, tmp_path, flag, key):
    (tmp_path / "link").symlink_to(tmp_path / "real.json")
    assert run_cli("--max_new_tokens", "2", flag, tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert key in json.loads((tmp_path / "real.json").read_text())
    os.mkfifo(tmp_path / "pipe")
    with tempfile.TemporaryFile() as received:  # a trace is more than a pipe holds
        reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=received)
        assert run_cli("--max_new_tokens", "2", flag, tmp_path / "pipe")[0] == 0
        assert reader.wait(timeout=30) == 0
        received.seek(0)
        assert key in json.load(received)
    assert (tmp_path / "pipe").is_fifo()
    assert {file.name for file in tmp_path.iterdir()} == {"link", "real.json", "pipe"}


@pytest.mark.parametrize("flag", ["--json", "--profile"])
def test_a_device_stays_a_device(run_cli, tmp_path, flag):
    null = make_device(tmp_path / "null", 3)
    assert run_cli("--max_new_tokens", "2", flag, null)[0] == 0
    assert null.is_char_device() and list(tmp_path.iterdir()) == [null]


def test_a_device_that_is_full_is_one_sentence(run_cli, tmp_path):
    full = make_device(tmp_path / "full", 7)
    code, _, err = run_cli("--max_new_tokens", "2", "--json", full)
    assert code == 2 and f"cannot write {full}" in err and "Traceback" not in err


def make_device(path: Path, minor: int) -> Path:
    """A device node of our own like /dev/null (3) or /dev/full (7); skips without the right to."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        path.open("wb").close()
    except PermissionError:
        pytest.skip("only root makes devices, and only where the file system takes them")
    return path


def test_a_library_that_renames_what_it_writes_reaches_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    with files.replacing(tmp_path / "pipe") as temporary:
        other = temporary.with_name(temporary.name + ".tmp")
        other.write_text("whole")
        other.replace(temporary)
    assert reader.communicate(timeout=30)[0] == b"whole"
    assert (tmp_path / "pipe").is_fifo()


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("old")
    for name in ("pipe", "file"):  # nobody reads the pipe: to open it would hang
        with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / name) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "file").read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"pipe", "file"}


@pytest.mark.parametrize("sink", ["| cat >", ">", ">>"])
def test_figures_on_standard_output_follow_the_text(checkpoint, tmp_path, sink):
    """A redirected standard output is a regular file, too, and the text in it must not be lost."""
    flags = f"--checkpoint_path {checkpoint} --prompt Hello --max_new_tokens 2 --json /dev/stdout"
    line = f"{' '.join(python())} {ROOT}/generate.py --device cpu {flags} {sink} {tmp_path}/out"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out").read_text()
    assert text.startswith("Hello") and json.loads(text[text.index("\n{") :])["samples"]


def test_a_loop_of_links_is_one_sentence(run_cli, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    code, _, err = run_cli("--max_new_tokens", "1", "--json", tmp_path / "loop" / "figures.json")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_prompts_are_lines_and_nothing_else_divides_them(run_cli, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\x0cstill one\r\ntwo\u2028still two\n".encode())
    _, out, _ = run_cli("--prompts_file", file, "--max_new_tokens", "1")
    assert [line for line in out.split("\n") if line.startswith("---")] == ["--- 0", "--- 1"]
    assert "\n--- 1\ntwo" in out and "\n" + "one\x0cstill one" in out


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    path = write_checkpoint(tmp_path, CONFIG | {"max_position_embeddings": 100000})
    flags = ["--checkpoint_path", path, "--interactive", "--max_new_tokens", "90000"]
    process = subprocess.Popen(
        [*python(), ROOT / "generate.py", *flags, "--temperature", "0", "--device", "cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # `&` in a shell ignores it
    )
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    assert process.stdout.read(40)  # the answer is under way
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    out, err = process.communicate(b"/quit\n", timeout=60)
    assert process.returncode == 0, err.decode()
    assert b"Ctrl-C" in err.splitlines()[-2]


class Terminal:
    """generate.py --interactive on a terminal of its own; its answers say what arrived.

    They are the errors of a chat template, so nothing is generated: the text's length and its end.
    """

    TEMPLATE = "{% set t = messages[-1].content %}{{ raise_exception(t | length ~ ':' ~ t[-20:]) }}"

    def __init__(self, folder: Path, command=None, stdout=None):
        path = write_checkpoint(folder / "checkpoint")
        (path.parent / "chat_template.jinja").write_text(self.TEMPLATE)
        (folder / "home").mkdir()
        self.home, self.errors, self.shown = folder / "home", folder / "errors", b""
        self.keys, terminal = pty.openpty()
        flags = ["--checkpoint_path", path, "--device", "cpu", "--interactive"]
        env = os.environ | {"HOME": str(self.home), "TERM": "xterm", "LC_ALL": "C.UTF-8"}
        env["TORCH_EXTENSIONS_DIR"] = str(build_cpp.cache_folder())  # the kernels are there already
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*python(), *(command or [ROOT / "generate.py"]), *flags],
                stdin=terminal,
                stdout=stdout or terminal,
                stderr=errors,
                cwd=self.home,
                env=env,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # for Ctrl-C
            )
        os.close(terminal)
        self.wait("Ctrl-C stops an answer")
        time.sleep(0.5)  # the prompt comes next

    def wait(self, text: str) -> str:
        """Wait for a text on standard error; everything that is there."""
        for _ in range(600):
            if select.select([self.keys], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):  # the program has ended
                    self.shown += os.read(self.keys, 65536)
            if text in (said := self.errors.read_text()):
                return said
        raise AssertionError(f"{text!r} is not in {said!r}")

    def type(self, text: str) -> None:
        data = text.encode()
        while data:  # as a person's terminal: it takes what has been shown before it sends more
            data = data[os.write(self.keys, data[:1000]) :]
            while select.select([self.keys], [], [], 0.01)[0]:
                self.shown += os.read(self.keys, 65536)

    def end(self) -> int:
        self.type("\x04")  # Ctrl-D
        code = self.process.wait(timeout=30)
        os.close(self.keys)
        return code


def test_a_terminal_has_whole_lines_and_the_keys_of_a_shell(tmp_path):
    terminal = Terminal(tmp_path)
    terminal.type("x" * 9990 + "the end\u00fc\u4e16!\r")  # as one paste
    terminal.wait("(10000:" + "x" * 10 + "the end\u00fc\u4e16!)")
    assert b"> " in terminal.shown
    terminal.type("Gr\u00fce \u4e16\x1b[D\x1b[D\x1b[D\u00df\r")  # two to the left, then a letter
    terminal.wait("(7:Gr\u00fc\u00dfe \u4e16)")
    terminal.type("\x1b[A!\r")  # the line before, with one more letter
    terminal.wait("(8:Gr\u00fc\u00dfe \u4e16!)")
    terminal.shown = b""
    terminal.type("\x7f" * 3 + "\x15")  # there is nothing to erase: the prompt stays
    assert b"\b" not in terminal.shown and b"\x1b[K" not in terminal.shown
    terminal.type("given up\x03")  # Ctrl-C
    time.sleep(0.5)
    terminal.type("a\tb\r")  # a tab is a tab; the error shows it as a space
    terminal.wait("(3:a b)")
    terminal.type("\x1b[200~first\nsecond\nthird\x1b[201~")  # a paste of several lines
    terminal.type("!\r")
    terminal.wait("(19:first second third!)")
    terminal.type("/nonsense\r")
    terminal.wait("there is no command /nonsense")
    assert terminal.end() == 0
    assert "given up" not in terminal.errors.read_text()
    assert not list(terminal.home.iterdir())  # no history on the disk


def test_a_line_that_the_terminal_has_cut_is_not_used(tmp_path):
    with (tmp_path / "out").open("wb") as out:  # no keys of a shell, so the terminal's own limit
        terminal = Terminal(tmp_path, stdout=out)
        terminal.type("x" * 10000 + "\n")
        said = terminal.wait("the terminal may have cut this line at 4095 bytes")
        terminal.type("y" * 4000 + "\n")
        said = terminal.wait("(4000:")
        assert "(4095:" not in said and said.count("cut this line") == 1
        assert terminal.end() == 0


def test_a_python_without_readline_talks_all_the_same(tmp_path):
    code = f"import sys, runpy; sys.modules['readline'] = None; sys.path[0] = {str(ROOT)!r}"
    code += f"; runpy.run_path({str(ROOT / 'generate.py')!r}, run_name='__main__')"
    terminal = Terminal(tmp_path, command=["-c", code])
    terminal.type("hello\n")
    said = terminal.wait("(5:hello)")
    assert "readline" not in said
    terminal.type("x" * 5000 + "\n")
    terminal.wait("cut this line")
    assert terminal.end() == 0


@pytest.mark.slow
def test_only_torch_and_the_tokenizers_library_are_imported(checkpoint):
    """Everything else is blocked; a tokenizer.json needs `tokenizers` and nothing more."""
    blocked = ("sentencepiece", "gguf", "safetensors", "huggingface_hub", "transformers", "tqdm")
    lines = [f"sys.modules[{name!r}] = None" for name in blocked + ("lm_eval", "matplotlib")]
    flags = ["generate.py", "--checkpoint_path", str(checkpoint), "--max_new_tokens", "2"]
    code = f"import sys, runpy; {'; '.join(lines)}; sys.argv = {flags}; sys.path[0] = {str(ROOT)!r}"
    code += f"; runpy.run_path({str(ROOT / 'generate.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_closed_pipe_is_no_error(checkpoint):
    line = f"{' '.join(python())} {ROOT}/generate.py --checkpoint_path {checkpoint} | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, env=os.environ
    )
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
