"""Evaluation: the scores are those of lm-eval's own adapter, for less work."""

import datetime
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

import cli
import eval as evaluation
import process
import tasks as task_errors
from commands import run_script
from conftest import CONFIG, ROOT, SPECIALS, random_model, seldom, write_checkpoint
from engine import load
from eval import Evaluator, windows
from test_generate import options_of
from tokenizer import Tokenizer

WINDOW = 100
STORY = "The llama went up the hill, and there it saw "
ENDINGS = ["a house.", "nothing at all", "x", "another llama, older than any other"]
TEXT = "It rained for days. Nobody went out, and the river rose above its banks. " * 5


# ---- One model, two adapters -------------------------------------------------------------------


def hf_copy() -> transformers.LlamaForCausalLM:
    """The random model of `conftest` as a model of transformers."""
    ids = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 258}
    config = transformers.LlamaConfig(**CONFIG, **ids, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).float().eval()
    head, (n_q, n_kv) = 8, (6 * 8, 2 * 8)

    def halves(rows):  # a head's rows, from neighbours that turn together to its two halves
        return rows.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)

    ours, state = random_model(CONFIG).state_dict(), {}
    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    for i in range(CONFIG["num_hidden_layers"]):
        layer, theirs = f"layers.{i}.", f"model.layers.{i}."
        q, k, v = ours[layer + "attention.wqkv.weight"].split([n_q, n_kv, n_kv])
        for name, rows in {"q": halves(q), "k": halves(k), "v": v}.items():
            state[f"{theirs}self_attn.{name}_proj.weight"] = rows
        for name, other in (
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            names[layer + name] = theirs + other
    state |= {f"{other}.weight": ours[f"{name}.weight"] for name, other in names.items()}
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["no_bos", "bos"])
def folder(request, tmp_path_factory):
    """A checkpoint whose tokenizer begins a text with BOS, or does not."""
    folder = write_checkpoint(tmp_path_factory.mktemp("eval")).parent
    if request.param:
        library = Library.from_file(str(folder / "tokenizer.json"))
        bos = (SPECIALS[0], 256)
        library.post_processor = TemplateProcessing(f"{bos[0]} $A", None, [bos])
        library.save(str(folder / "tokenizer.json"))
    return folder


def evaluator(path, batch_size=3, compile=False) -> Evaluator:
    return Evaluator(*load(path, torch.device("cpu"), "float32"), batch_size, WINDOW, compile)


@pytest.fixture(scope="module")
def ours(folder) -> Evaluator:
    return evaluator(folder / "model.pth")


@pytest.fixture(scope="module")
def hf(folder) -> HFLM:
    file = str(folder / "tokenizer.json")
    tokens = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2]}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **tokens)
    return HFLM(pretrained=hf_copy(), tokenizer=tokenizer, max_length=WINDOW, batch_size=1)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def agree(ours, theirs) -> None:
    """Log probabilities within 1e-3, and the same greedy flags."""
    assert [flag for _, flag in ours] == [flag for _, flag in theirs]
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-3)


# ---- Scores ------------------------------------------------------------------------------------


def test_log_probabilities_and_greedy_flags_are_those_of_hflm(ours, hf):
    pairs = [(STORY, ending) for ending in ENDINGS] + [(STORY.strip(), " b"), (STORY + "  ", "c")]
    pairs += [("", "no context"), ("a", "b"), ("Ünï ", "cödé \U0001f600"), (STORY, ENDINGS[0])]
    batch = requests("loglikelihood", pairs)
    agree(ours.loglikelihood(batch), hf.loglikelihood(batch))


def test_greedy_flags_are_true_where_greedy_decoding_gives_the_continuation(ours, hf):
    contexts = [[*STORY[:n].encode()] for n in range(1, 30)]
    cases = []
    for context in contexts:
        row = hf.model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False)
        cases += [(None, context, row[0, len(context) :].tolist()), (None, context, [1, 2])]
    scores = ours._loglikelihood_tokens(cases)
    agree(scores, hf._loglikelihood_tokens(cases))
    assert sum(flag for _, flag in scores) == len(contexts)


def test_long_contexts_lose_their_start_as_in_hflm(ours, hf):
    long = [TEXT[:n] for n in (WINDOW - 9, WINDOW - 8, WINDOW - 7, WINDOW + 1, 300)]
    batch = requests("loglikelihood", [(c, e) for c in long for e in (" ending.", "x", "y" * 99)])
    agree(ours.loglikelihood(batch), hf.loglikelihood(batch))


def test_pages_score_as_in_hflm(ours, hf):
    lengths = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, 300)
    batch = requests("loglikelihood_rolling", [(TEXT[:n],) for n in lengths])
    expected = hf.loglikelihood_rolling(batch)
    assert ours.loglikelihood_rolling(batch) == pytest.approx(expected, abs=1e-3)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)])) == [
        pytest.approx(x) for x in hf.loglikelihood_rolling(requests("", [("",)]))
    ]


def test_a_continuation_over_the_window_is_an_error_of_one_sentence(ours):
    with pytest.raises(cli.UserError, match="has 101 tokens and the window only 100"):
        ours.loglikelihood(requests("loglikelihood", [("a", "b" * 101)]))


def test_the_order_and_the_batch_change_nothing(checkpoint):
    pairs = [([*STORY.encode()][:n], [*ENDINGS[n % 4].encode()]) for n in range(2, 40)] * 2
    alone = evaluator(checkpoint, 1).score(pairs)
    for batch_size in (2, 8, 100):
        agree(evaluator(checkpoint, batch_size).score(pairs), alone)
    agree(evaluator(checkpoint).score(pairs[::-1])[::-1], alone)


def test_requests_with_the_same_context_prefill_it_once(checkpoint):
    ours, fed = evaluator(checkpoint), []
    contexts = [[*STORY.encode()], [*TEXT[:50].encode()]]
    endings = [[*ending.encode()] for ending in ENDINGS]
    pairs = [(context, ending) for ending in endings for context in contexts]
    ours.reserve(2, max(len(context) + len(ending) for context, ending in pairs) - 1)
    step = ours.engine.prefill_step

    def counting(idx, pos, *rest):
        fed.append((pos < ours.model.max_seq_length).sum().item())
        return step(idx, pos, *rest)

    ours.engine.prefill_step = counting
    ours.score(pairs)
    # An ending's last token is not fed; a context's last one is, with each ending.
    assert sum(fed) == sum(len(c) - 1 for c in contexts) + 2 * sum(map(len, endings))


# ---- New text ----------------------------------------------------------------------------------


def test_generated_text_is_that_of_hflm(ours, hf):
    prompts = [STORY, "a", "Twice", TEXT[:80], TEXT[:300]]
    free = hf.generate_until(
        requests("generate_until", [(p, {"max_gen_toks": 40}) for p in prompts])
    )
    assert len({*free}) > 1
    found = [re.search("[ -~]{1,2}", text[3:]) for text in free]  # not half a character
    stops = [match[0] for match in found if match]
    settings = [{"max_gen_toks": 40}, {"max_gen_toks": 40, "until": stops}]
    settings += [{"max_gen_toks": 5, "until": stops[0], "do_sample": False, "temperature": 0.0}]
    batch = requests("generate_until", [(p, s) for p in prompts for s in settings])
    expected = hf.generate_until(batch)
    assert ours.generate_until(batch) == expected
    assert any(len(short) < len(long) for long, short in zip(free, expected[1::3], strict=True))


def test_generation_ends_at_eos_and_at_a_special_token_that_is_a_stop(checkpoint):
    ours = evaluator(checkpoint)
    ask = requests("generate_until", [(STORY, {"max_gen_toks": 30})])
    ids = ours.tokenizer.encode(STORY)
    (text,), tokens = ours.generate_until(ask), []
    sampling = evaluation.Sampling(temperature=0)
    options = options_of()
    for (token,) in evaluation.generate(ours.engine, [ids], sampling, 30, **options):
        tokens.append(token.id)
    end = tokens[7]
    before = ours.tokenizer.decode(tokens[: tokens.index(end)])
    assert len(before) < len(text)
    ours.tokenizer.eos_ids = {end}
    assert ours.generate_until(ask) == [before]
    ours.tokenizer.eos_ids = set()
    ours.tokenizer.controls = {"<|stop|>": end}
    ask = requests("generate_until", [(STORY, {"max_gen_toks": 30, "until": ["<|stop|>"]})])
    assert ours.generate_until(ask) == [before]


def test_sampling_is_used_where_a_task_asks_for_it(checkpoint):
    ours = evaluator(checkpoint)
    settings = {"max_gen_toks": 20, "do_sample": True, "temperature": 1.5}
    batch = requests("generate_until", [(STORY, settings)] * 6)
    texts = ours.generate_until(batch)
    assert len({*texts}) > 1
    assert ours.generate_until(batch) == texts
    greedy = requests("generate_until", [(STORY, settings | {"do_sample": False})] * 4)
    assert len({*ours.generate_until(greedy)}) == 1


def test_room_for_new_text_that_is_more_than_the_window_is_an_error(checkpoint):
    ours = evaluator(checkpoint)
    for tokens in (0, WINDOW):
        with pytest.raises(cli.UserError, match=f"max_gen_toks {tokens} .* from 1 to {WINDOW - 1}"):
            ours.generate_until(requests("generate_until", [("a", {"max_gen_toks": tokens})]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"until": 7},
        {"until": [7]},
        {"until": ["a", {"a": 1}]},
        {"top_k": 1.5, "temperature": 1},
        {"top_k": -1},
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 2},
        {"top_p": -1},
        {"top_p": math.nan},
        {"top_p": [1]},
        {"min_p": 2},
        {"min_p": True},
    ],
    ids=str,
)
def test_a_value_that_the_flag_of_its_name_refuses_is_refused_in_a_task(wrong, checkpoint):
    batch = requests("generate_until", [("a", wrong)])
    name = next(iter(wrong))
    with pytest.raises(cli.UserError, match=f"^generation_kwargs of a task: {name}: ") as error:
        evaluator(checkpoint).generate_until(batch)
    assert str(error.value).endswith("; change its YAML")


def test_keys_of_any_kind_are_no_error_of_ours(checkpoint):
    """lm-eval's own, which `tasks.explaining` turns into a sentence."""
    kwargs = {1: 2, "until": ["a"], "since": datetime.date(2024, 1, 1)}
    with pytest.raises(TypeError) as error:
        evaluator(checkpoint).generate_until(requests("generate_until", [("a", kwargs)]))
    owners = [task_errors.owner_of(Path(entry.path)) for entry in error.traceback]
    assert [owner for owner in owners if owner][-1] == "lm-eval"


@pytest.mark.parametrize("page", [7, ["a"], None])
def test_a_page_that_is_no_text_is_an_error_of_one_sentence(page, ours):
    with pytest.raises(cli.UserError, match="a text of a task is .*; change its YAML"):
        ours.loglikelihood_rolling(requests("loglikelihood_rolling", [(page,)]))


# ---- Perplexity --------------------------------------------------------------------------------


def test_windows_are_those_of_lm_eval_and_keep_the_promised_context():
    for length in [*range(0, 25), 60]:
        ids = [-1, *range(length)]
        for window in (1, 2, 5, 8, 30):
            theirs = get_rolling_token_windows(ids[1:], -1, window, 1)
            assert [*windows(ids, window, window)] == [*map(make_disjoint_window, theirs)]
            for stride in range(1, window + 1):
                cut = [*windows(ids, window, stride)]
                assert [token for _, part in cut for token in part] == ids[1:]
                for context, part in cut:
                    assert len(context) + len(part) <= window + 1
                    assert context + part == ids[ids.index(context[0]) :][: len(context + part)]
                    assert len(context) >= min(ids.index(part[0]), window - stride)


@pytest.mark.parametrize("stride", seldom([7, 1, 50, 100, None], 3))
def test_perplexity_is_that_of_a_plain_computation(stride, checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--checkpoint_path", str(checkpoint), "--precision", "float32", "--device", "cpu"]
    flags += ["--perplexity", str(tmp_path / "text.txt"), "--max_seq_length", str(WINDOW)]
    flags += ["--output_path", str(tmp_path / "out" / "figures.json")]
    flags += ["--stride", str(stride)] if stride else []
    evaluation.main(evaluation.make_parser().parse_args(flags))
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())

    model, nats = hf_copy(), 0.0
    ids = [256, *Tokenizer.from_folder(checkpoint.parent).encode(TEXT)]
    stride = stride or WINDOW // 2
    for target in range(1, len(ids)):  # the pass that scores it ends at `end`
        passes = max(0, math.ceil((target - WINDOW) / stride))
        end = min(WINDOW + passes * stride, len(ids) - 1)
        seen = torch.tensor([ids[max(0, end - WINDOW) : target]])
        nats -= model(seen).logits[0, -1].log_softmax(-1)[ids[target]].item()
    assert figures["perplexity"] == pytest.approx(math.exp(nats / len(TEXT)), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-4)
    assert (figures["tokens"], figures["stride"]) == (len(TEXT), stride)
    assert f"window {WINDOW}, stride {stride}" in capsys.readouterr().out


@pytest.mark.slow
def test_perplexity_is_the_same_whatever_kernels_mkl_picks(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--checkpoint_path", checkpoint, "--precision", "float32", "--device", "cpu"]
    flags += ["--perplexity", tmp_path / "text.txt", "--output_path", tmp_path / "figures.json"]
    found, env = [], os.environ | {"MKL_VML_DEBUG_CPU_TYPE": "9"}  # as in test_model.py
    run_script("eval.py", *flags, check=True)
    found.append(json.loads((tmp_path / "figures.json").read_text())["perplexity"])
    command = [sys.executable, ROOT / "eval.py", *flags]
    subprocess.run(command, env=env, check=True, capture_output=True)
    found.append(json.loads((tmp_path / "figures.json").read_text())["perplexity"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# ---- Compilation -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_nothing_recompiles_whatever_the_lengths(batch_size, checkpoint):
    ours, plain = evaluator(checkpoint, batch_size, compile=True), evaluator(checkpoint, batch_size)
    ours.reserve(10, WINDOW)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in (1, 3, 20):
            pairs = [([7] * n, [9] * (1 + n % 5 * step)) for n in range(1, 20)]
            pairs += [([7] * 5, [*range(n)]) for n in range(1, 20)]
            agree(ours.score(pairs), plain.score(pairs))
        prompts = [(TEXT[:n], {"max_gen_toks": n % 7 + 1}) for n in range(1, 30)]
        texts = ours.generate_until(requests("generate_until", prompts))
    assert texts == plain.generate_until(requests("generate_until", prompts))


# ---- The command line --------------------------------------------------------------------------

TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_page": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "tiny_text": """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "{{page}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def tasks(tmp_path):
    """A folder of tasks that need no network."""
    rows = [
        {"query": STORY[: 10 + n], "choices": ENDINGS, "gold": n % 4, "page": TEXT[: 30 * n + 9]}
        for n in range(8)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    (tmp_path / "tasks").mkdir()
    for name, rest in TASKS.items():
        text = f"task: {name}\n{source}test_split: test{rest}"
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    return tmp_path / "tasks"


def test_tasks_give_the_metrics_that_hflm_gives(tasks, folder, hf, capsys, few_tasks):
    path = tasks.parent / "results.json"
    flags = ["--checkpoint_path", str(folder / "model.pth"), "--precision", "float32"]
    flags += ["--device", "cpu", "--tasks", "tiny_*", "--include_path", str(tasks), "--limit", "7"]
    flags += ["--max_seq_length", str(WINDOW), "--output_path", str(path)]
    evaluation.main(evaluation.make_parser().parse_args(flags))
    manager = TaskManager(include_path=tasks, include_defaults=False)
    theirs = simple_evaluate(model=hf, tasks=[*TASKS], task_manager=manager, limit=7)["results"]
    ours = json.loads(path.read_text())
    assert ours["results"].keys() == theirs.keys()
    for task, metrics in theirs.items():
        numbers = {name: x for name, x in metrics.items() if isinstance(x, float)}
        found = {name: ours["results"][task][name] for name in numbers}
        assert len(numbers) >= 1 and found == pytest.approx(numbers, rel=1e-5)
    assert ours["config"]["precision"] == "float32" and ours["config"]["max_seq_length"] == WINDOW
    table = capsys.readouterr().out
    assert all(task in table for task in TASKS)


def run_blocked(package: str, *flags: str) -> subprocess.CompletedProcess:
    """Run eval.py where a package is not installed."""
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(ROOT / "eval.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_without_lm_eval_tasks_say_how_to_get_it_and_perplexity_works(checkpoint, tmp_path):
    done = run_blocked("lm_eval", "--tasks", "hellaswag")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: --tasks needs the package lm-eval; pip install lm-eval==0.4.13\n"
    )
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--perplexity", str(tmp_path / "text.txt"), "--checkpoint_path", str(checkpoint)]
    done = run_blocked("lm_eval", *flags, "--device", "cpu")
    assert done.returncode == 0 and done.stdout.startswith("perplexity "), done.stderr


@pytest.mark.slow
def test_transformers_is_not_needed(checkpoint):
    code = f"""
import sys; sys.modules["transformers"] = None
from pathlib import Path; import torch
from lm_eval.api.instance import Instance
from eval import Evaluator, load
ours = Evaluator(*load(Path({str(checkpoint)!r}), torch.device("cpu"), "float32"), 2, 100)
ours.loglikelihood([Instance("loglikelihood", {{}}, ("a", "b"), 0)])
ours.loglikelihood_rolling([Instance("loglikelihood_rolling", {{}}, ("page",), 0)])
ours.generate_until([Instance("generate_until", {{}}, ("a", {{"max_gen_toks": 2}}), 0)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def mistake(flags: list[str], monkeypatch, capsys) -> str:
    """The one line that a wrong command line prints, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    monkeypatch.setattr(sys.stdin, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as exit:
        process.run(evaluation.main, evaluation.make_parser())
    assert exit.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_the_tasks_of_lm_eval_itself_are_there(checkpoint, monkeypatch, capsys):
    """The first that needs its data says that it cannot have them."""

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    flags = ["--tasks", "hellaswag", "--checkpoint_path", checkpoint, "--device", "cpu"]
    expected = "error: lm-eval cannot run hellaswag (ConnectionError: no network); check"
    assert mistake(flags, monkeypatch, capsys).startswith(expected)


def test_mistakes_are_one_line(checkpoint, tasks, tmp_path, monkeypatch, capsys, few_tasks):
    model = ["--checkpoint_path", checkpoint, "--device", "cpu"]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "text.txt").write_text(TEXT)
    for flags, words in (
        ([], "one of the arguments --tasks --perplexity is required"),
        (["--tasks", "tiny_page", "no_such", "--include_path", tasks, *model], "task 'no_such'"),
        (["--perplexity", tmp_path / "none.txt", *model], "cannot read"),
        (["--perplexity", tmp_path / "text.txt", "--limit", 3], "--limit goes with --tasks"),
        (["--tasks", "tiny_page", "--stride", 3], "goes with --perplexity"),
        (["--tasks", "tiny_page", "--include_path", tmp_path / "none"], "is no folder"),
        (["--perplexity", tmp_path / "empty.txt", *model], "is empty"),
        (["--perplexity", tmp_path / "text.txt", *model, "--max_seq_length", 513], "context, 512"),
        (["--perplexity", tmp_path / "text.txt", *model, "--stride", 513], "over the window, 512"),
    ):
        assert words in mistake(flags, monkeypatch, capsys)
    (tmp_path / "data.jsonl").unlink()
    flags = ["--tasks", "tiny_page", "--include_path", tasks, *model]
    assert "lm-eval cannot run tiny_page" in mistake(flags, monkeypatch, capsys)
