"""What is known of every token and how a text is steered: log probabilities, stops, penalties."""

import functools
import itertools
import json
import random
import re
import tracemalloc
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

import engine as engine_module
from checkpoint import default_checkpoint
from conftest import CONFIG, ROOT, random_model
from engine import Engine, Sampling, Token, candidates, generate, load_model
from linear import Linear
from scripts.convert_hf_checkpoint import convert
from settings import Settings
from shaping import Reply, describe, run_replies, score_prompt, shape, table, token_text
from speculate import DraftModel, PromptLookup, speculate
from test_generate import command, engine
from test_model import MODELS, hf_model
from test_speculation import REPEATING, TINY, Fixed, chi_square, quantized
from test_speculation import engine as make_engine

CPU = torch.device("cpu")


def settings(**values) -> Namespace:
    return Settings().read(values, Namespace(**Settings().defaults))


class Words:
    """A tokenizer whose tokens are these bytes; the last one ends a text."""

    def __init__(self, pieces: list[bytes]):
        self.pieces, self.lead, self.special = pieces, b"", {}
        self.eos_ids = {len(pieces)}

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token] if token < len(self.pieces) else b""


@pytest.fixture
def run_cli(monkeypatch, capsys, checkpoint):
    common = ("--checkpoint_path", checkpoint, "--device", "cpu", "--precision", "float32")
    return functools.partial(command, monkeypatch, capsys, *common)


# ---- Log probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_log_probabilities_equal_transformers(name, tmp_path):
    theirs = hf_model(*MODELS[name])
    theirs.save_pretrained(tmp_path)
    model = load_model(convert(tmp_path, torch.float32), "cpu", torch.float32)
    model.setup_caches(1, 200)
    engine, prompt = Engine(model), [3, 90, 17, 5, 44, 21]
    tokens = score_prompt(engine, prompt, 3)
    options = dict(until=lambda *_: False, seeds=[0], logprobs=3)
    tokens += [token for (token,) in generate(engine, [prompt], Sampling(0.9), 20, **options)]
    ids = [prompt[0], *(token.id for token in tokens)]
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + 20
    rows = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    for token, row in zip(tokens, rows, strict=False):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_log_probabilities_of_a_scheme_are_those_of_its_dequantized_weights(scheme):
    model, reference = quantized(scheme), quantized(scheme)
    for name, linear in list(reference.named_modules()):
        if isinstance(linear, Linear):
            plain = Linear(linear.in_features, linear.out_features)
            plain.weight.data = linear.dequantize()
            reference.set_submodule(name, plain)
    found, expected = [], []
    for each, tokens in ((model, found), (reference.requires_grad_(False), expected)):
        each.setup_caches(1, 128)
        tokens += score_prompt(Engine(each), REPEATING, 3)
        options = dict(until=lambda *_: False, seeds=[0], logprobs=3)
        steps = generate(Engine(each), [REPEATING], Sampling(0), 12, **options)
        tokens += [token for (token,) in steps]
    for one, other in zip(found, expected, strict=True):
        assert one.id == other.id and one.logprob == pytest.approx(other.logprob, abs=1e-2)
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-2)


def test_a_long_prompt_is_scored_in_pieces(monkeypatch):
    prompt = list(range(20, 90))
    whole = score_prompt(engine(), prompt, 2)
    monkeypatch.setattr("shaping.PREFILL_CHUNK", 16)
    pieces = score_prompt(engine(), prompt, 2)
    assert [token.id for token in pieces] == prompt[1:]
    for one, other in zip(whole, pieces, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert score_prompt(engine(), [7], 2) == []


def test_log_probabilities_are_printed_and_in_the_json(run_cli, tmp_path):
    file, flags = tmp_path / "figures.json", ("--max_new_tokens", 6, "--temperature", 0)
    _, plain, quiet = run_cli("--prompt", "Hello", *flags)
    more = ("--logprobs", 2, "--prompt_logprobs", "--json", file)
    for draft in ((), ("--prompt_lookup",)):
        code, out, err = run_cli("--prompt", "Hello", *flags, *more, *draft)
        assert code == 0 and out == plain
        (record,) = json.loads(file.read_text())["samples"]
        (prompt,), (new,) = record["prompt_logprobs"], record["logprobs"]
        assert [token["text"] for token in prompt] == list("ello") and len(new) == 6
        for token in new:  # greedy
            assert token["logprob"] == token["top"][0]["logprob"] > token["top"][1]["logprob"]
        lines = [line.split()[0] for line in err.splitlines() if re.match(r" +-\d", line)]
        assert lines == [f"{token['logprob']:.4f}" for token in prompt + new]
    assert "logprobs" not in quiet


def test_a_batch_prints_the_log_probabilities_of_each_row(run_cli, tmp_path):
    file = tmp_path / "figures.json"
    prompts = tmp_path / "prompts"
    prompts.write_text("ab\nabc\nx\n")
    flags = ("--prompts_file", prompts, "--logprobs", 1, "--max_new_tokens", 3, "--json", file)
    code, out, err = run_cli(*flags, "--temperature", 0)
    (record,) = json.loads(file.read_text())["samples"]
    assert code == 0 and [len(row) for row in record["logprobs"]] == [3, 3, 3]
    assert err.count("logprobs:") == 3


def test_nothing_is_computed_that_is_not_asked_for():
    """Neither log probabilities nor a hook: the loop is the one without them."""
    asked = []

    def decode(prompts, sampling, n, **options):
        asked.append(options)
        return iter([[Token(0)]])

    def ask(**values):
        (reply,) = [Reply(Words([b"a"]), engine().model, [1], settings(**values))]
        assert list(run_replies(decode, [reply])) == [["a"]]
        return asked[-1]["logprobs"], asked[-1]["shape_logits"] is not None

    assert ask() == ask(stop=["x"]) == (None, False)
    assert ask(logprobs=0) == (0, False) and ask(presence_penalty=1) == (None, True)


def test_tokens_that_are_no_text_have_names():
    tokenizer = Words([b"a\n", "é".encode()[:1], b"\\"])
    tokenizer.special = {"<end>": 3}
    assert [token_text(tokenizer, i) for i in range(5)] == ["a\n", r"\xc3", "\\", "<end>", "<4>"]
    tokens = [Token(0, -0.5, ((1, -2.0), (3, -3.0))), Token(1, -1.25)]
    lines = table(describe(tokenizer, tokens)).splitlines()
    assert lines == [r"  -0.5000  'a\n'   '\xc3' -2.000  '<end>' -3.000", r"  -1.2500  '\xc3'"]


# ---- Stop texts ----------------------------------------------------------------------------------

TEXTS = ["abcabcabd", "aaaab", "x\n\nUser: y", "héé wörld 😀!😀", "no stop here"]
STOPS = [
    ["abd"],
    ["cab", "abcabd"],
    ["aab", "b"],
    ["\n\nUser:"],
    ["éé", "é w", "😀😀", "😀!😀"],
    ["zzz"],
]


def until_first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The reference, a character at a time: what is before the stop text that is complete first."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_stop_text_is_found_across_token_borders_and_never_shown(text, stops):
    expected, stopped = until_first_stop(text, stops)
    chooser, model = random.Random(1), SimpleNamespace(max_seq_length=999)
    for _ in range(20):  # the same bytes in other tokens
        data, pieces = text.encode(), []
        while data:
            size = chooser.choice([1, 1, 2, 3, 7])
            pieces, data = [*pieces, data[:size]], data[size:]
        reply, shown = Reply(Words(pieces), model, [], settings(stop=stops)), ""
        for token in range(len(pieces)):
            shown += reply.push(Token(token))
            if reply.ended_by:
                break
            known = b"".join(pieces[: token + 1]).decode(errors="ignore")
            starts = [
                n for n in range(len(known) + 1) if any(s.startswith(known[n:]) for s in stops)
            ]
            assert shown == known[: min(starts)]  # all but what may begin a stop text
        assert (reply.ended_by == "stop") == stopped
        assert shown + reply.flush() == expected == reply.text


def test_a_long_stop_text_takes_its_own_length_of_memory():
    stop, model = "ab" * 10**4, SimpleNamespace(max_seq_length=999)
    tracemalloc.start()
    reply = Reply(Words([b"c", b"ab"]), model, [], settings(stop=[stop]))
    shown = "".join(reply.push(Token(i)) for i in (1, 1, 0, 1, 1))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shown == "ababc" and most < 10**6


def test_what_was_held_back_is_shown_if_the_text_ends_otherwise():
    words, model = Words([b"a", b"b", "é".encode()[:1]]), SimpleNamespace(max_seq_length=999)
    for ids, rest in (([0, 1, 3], "ab"), ([0, 1, 2, 3], "ab\ufffd")):
        reply = Reply(words, model, [], settings(stop=["abc"]))
        assert "".join(reply.push(Token(i)) for i in ids) + reply.flush() == rest == reply.text
        assert reply.ended_by == "end of text"


def test_why_a_text_ended():
    def reason(room: int, **values) -> str:
        reply = Reply(
            Words([b"a"]), SimpleNamespace(max_seq_length=room), [1, 2], settings(**values)
        )
        while not reply.ended_by:
            reply.push(Token(0))
        return f"{reply.ended_by} after {len(reply.tokens)}"

    assert reason(9, max_new_tokens=3) == "max_new_tokens after 3"
    assert reason(9, max_new_tokens=8) == "max_new_tokens after 8"
    assert reason(9, max_new_tokens=9) == "full cache after 8"
    assert reason(9, stop=["aa"]) == "stop after 2"


def test_the_command_ends_where_a_stop_text_would_begin(run_cli, tmp_path):
    flags, file = (
        ("--prompt", "ab ab ab", "--temperature", 0, "--max_new_tokens", 40),
        tmp_path / "f",
    )
    text = run_cli(*flags)[1].removesuffix("\n")
    stop = text[20:23]
    assert len(stop) == 3 and stop not in text[8:20]
    expected = text[: text.index(stop, 8)] + "\n"
    for more in ((), ("--prompt_lookup",), ("--batch_size", 2)):
        code, out, err = run_cli(*flags, *more, "--stop", "never", "--stop", stop, "--json", file)
        (record,) = json.loads(file.read_text())["samples"]
        assert code == 0 and set(record["ended_by"]) == {"stop"} and "ended by stop" in err
        assert out == expected if "--batch_size" not in more else out.count(expected) == 2


def test_a_conversation_goes_on_from_what_was_printed(run_cli, tmp_path, checkpoint):
    """A stop text within an accepted run, too: the next turn knows nothing of it."""
    flags = ("--temperature", 0, "--max_new_tokens", 24)
    turns = "hello hello\nand then?\n/quit\n"
    whole = run_cli("--interactive", *flags, stdin=turns)[1]
    stop = whole.removeprefix("> ")[6:8]
    flags += ("--stop", stop)
    _, plain, _ = run_cli("--interactive", *flags, stdin=turns)
    first, second = [answer.removesuffix("\n") for answer in plain.split("> ")[1:3]]
    assert stop not in first + second and first == whole.removeprefix("> ")[:6]
    for draft in (("--prompt_lookup",), ("--draft_checkpoint_path", checkpoint)):
        assert run_cli("--interactive", *flags, *draft, stdin=turns)[1] == plain
    said = [("user", "hello hello"), ("assistant", first), ("user", "and then?")]
    model, tokenizer = engine_module.load(checkpoint, "cpu", "float32")
    model.setup_caches(1, 512)
    ids = tokenizer.chat([{"role": role, "content": content} for role, content in said])
    reply = Reply(tokenizer, model, ids, settings(stop=[stop], temperature=0, max_new_tokens=24))
    for _ in run_replies(functools.partial(generate, Engine(model)), [reply]):
        pass
    reply.flush()
    assert reply.text == second


def test_a_stop_text_within_an_accepted_run_leaves_both_caches_right():
    words, prompt = Words([f"<{i}>".encode() for i in range(300)]), [5, 9, 200, 31, 7]
    speculator = Fixed(make_engine(), DraftModel(make_engine(), 300), 6)  # all is accepted

    def text(decode, prompt: list[int], start=0, **values) -> Reply:
        args = settings(temperature=0, max_new_tokens=20, **values)
        reply = Reply(words, speculator.engine.model, prompt, args)
        for _ in run_replies(decode, [reply], start):
            pass
        return reply

    ids = text(functools.partial(generate, make_engine()), prompt).ids
    stop = f"{ids[3]}><{ids[4]}"  # the first token comes of the prefill, the next seven of one step
    cut = text(functools.partial(speculate, speculator), prompt, stop=[stop])
    assert cut.text == "".join(f"<{i}>" for i in ids[:3]) + "<" and cut.ended_by == "stop"
    assert cut.ids == ids[:5] and speculator.histogram[6] == 1
    longer = [*prompt, *ids[:4], 7, 8]
    expected = text(functools.partial(generate, make_engine()), longer)
    found = text(functools.partial(speculate, speculator), longer, len(prompt) + 4)
    assert found.ids == expected.ids and speculator.histogram[6] == 2


# ---- Penalties, bias, least length ---------------------------------------------------------------


def test_scores_are_shaped_as_transformers_shapes_them():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 7, 40):
        ids = torch.randint(50, (length,), generator=generator).tolist()
        scores = torch.randn(1, 50, generator=generator) * 5
        for values, processor in (
            (dict(repetition_penalty=1.3), RepetitionPenaltyLogitsProcessor(1.3)),
            (dict(repetition_penalty=0.7), RepetitionPenaltyLogitsProcessor(0.7)),
            (dict(min_new_tokens=9), MinNewTokensLengthLogitsProcessor(1, 9, [3, 4])),
            (
                dict(logit_bias={"7": -3.5, "9": 100}),
                SequenceBiasLogitsProcessor([[[7], -3.5], [[9], 100.0]]),
            ),
        ):
            expected = LogitsProcessorList([processor])(torch.tensor([ids]), scores.clone())[0]
            found = shape(scores[0].clone(), ids, 1, settings(**values), {3, 4})
            torch.testing.assert_close(found, expected)


def test_a_hook_may_be_finer_than_the_models_numbers():
    """As with a draft: rounded to bf16, the two scores are equal and the first would win."""

    def hook(row, ids, logits):
        return (
            torch.zeros(len(logits))
            .index_fill(0, torch.tensor([10]), 1)
            .index_fill(0, FINER, 1.001)
        )

    model = random_model(CONFIG, torch.bfloat16)
    model.setup_caches(1, 64)
    options = dict(until=lambda *_: False, seeds=[0], shape_logits=hook)
    ((token,),) = generate(Engine(model), [[5, 9]], Sampling(0), 1, **options)
    assert token.id == FINER.item()


FINER = torch.tensor([200])


def test_the_presence_penalty_counts_new_tokens_once_and_the_prompts_not():
    found = shape(torch.zeros(6), [0, 1, 2, 3, 3, 3], 2, settings(presence_penalty=1.5), set())
    assert found.tolist() == [0, 0, -1.5, -1.5, 0, 0]


def test_penalized_greedy_text_is_that_of_transformers(tmp_path):
    theirs = hf_model(*MODELS["llama"])
    theirs.save_pretrained(tmp_path)
    model = load_model(convert(tmp_path, torch.float32), "cpu", torch.float32)
    model.setup_caches(1, 200)
    prompt, words = [3, 90, 17, 90, 3], Words([b"x"] * 128)
    plain, penalized = [], []
    for texts, penalty in ((plain, 1.0), (penalized, 1.4)):
        words.eos_ids = {plain[4]} if plain else set()
        args = settings(
            temperature=0, repetition_penalty=penalty, min_new_tokens=12, max_new_tokens=30
        )
        reply = Reply(words, model, prompt, args)
        for _ in run_replies(functools.partial(generate, Engine(model)), [reply]):
            pass
        texts += reply.ids
        options = dict(eos_token_id=[*words.eos_ids] or None, min_new_tokens=12, pad_token_id=0)
        options |= dict(repetition_penalty=penalty, max_new_tokens=30, do_sample=False)
        expected = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert reply.ids == expected
    assert plain != penalized and len(penalized) >= 12


SHAPES = {
    "repetition": dict(repetition_penalty=1.5),
    "presence": dict(presence_penalty=1.5),
    "bias": dict(logit_bias={"171": -100, "93": 3}),
    "least length": dict(min_new_tokens=15),
    "all": dict(repetition_penalty=1.2, presence_penalty=1, logit_bias={"9": 2}, min_new_tokens=15),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shaped_greedy_text_is_the_same_with_a_draft(name):
    words = Words([b"x"] * 300)
    target, plain = make_engine(), make_engine()

    def text(decode, **values) -> list[int]:
        reply = Reply(
            words, target.model, REPEATING, settings(temperature=0, max_new_tokens=24, **values)
        )
        for _ in run_replies(decode, [reply]):
            pass
        return reply.ids

    first = text(functools.partial(generate, plain))
    words.eos_ids = {first[5]} if "min_new_tokens" in SHAPES[name] else set()
    expected = text(functools.partial(generate, plain), **SHAPES[name])
    assert len(expected) >= 15 and expected != first
    for draft in (DraftModel(make_engine(), 300), PromptLookup(300, CPU)):
        speculator = Fixed(target, draft, 4)
        assert text(functools.partial(speculate, speculator), **SHAPES[name]) == expected


def test_shaped_samples_with_a_draft_have_the_shaped_distribution():
    """All 216 texts of three tokens; an end of text would come first but for min_new_tokens."""
    target = make_engine(TINY, 16)
    draft = DraftModel(make_engine(TINY | {"num_hidden_layers": 1}, 16), 6)
    words, prompt = Words([b"x"] * 5), [1, 2]
    values = dict(temperature=0.7, top_k=0, repetition_penalty=1.5, presence_penalty=2)
    args = settings(**values, logit_bias={"4": 1.5}, min_new_tokens=3, max_new_tokens=3)
    sampling, probs = Sampling(0.7, 0), torch.zeros(6, 6, 6)
    for text in itertools.product(range(6), repeat=3):
        ids = [*prompt, *text]
        logits = target.model(torch.tensor([ids]), torch.arange(5)[None], 16).logits[0, 1:4]
        shaped = [shape(row.clone(), ids[: 2 + i], 2, args, {5}) for i, row in enumerate(logits)]
        p = torch.zeros(3, 6).scatter_(1, *reversed(candidates(torch.stack(shaped), sampling)))
        probs[text] = p[range(3), list(text)].prod()
    assert abs(probs.sum() - 1) < 1e-5 and probs[5].sum() == 0
    speculator, counts = Fixed(target, draft, 2), torch.zeros(6, 6, 6)
    for seed in range(200):
        reply = Reply(words, target.model, prompt, args, seed)
        for _ in run_replies(functools.partial(speculate, speculator), [reply]):
            pass
        counts[tuple(reply.ids)] += 1
    order = probs.flatten().argsort()  # rare texts are counted together, in a dozen bins
    bins = (probs.flatten()[order].cumsum(0) * 12 - 1e-4).long()
    cells = [torch.zeros(12).scatter_add_(0, bins, x.flatten()[order]) for x in (counts, probs)]
    assert chi_square(*cells) < 2.2


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--stop", ""], "--stop: an empty text"),
        (["--logit_bias", "7"], "'7' is not ID=VALUE"),
        (["--logit_bias", "x=1"], "'x' is not a whole number"),
        (["--logit_bias", "7=1000"], "from -100 to 100"),
        (["--logit_bias", "300=1"], "token 300; the model's are 0 to 299"),
        (["--logprobs", "301"], "the model has only 300 tokens"),
        (["--repetition_penalty", "0"], "--repetition_penalty"),
        (["--presence_penalty", "3"], "from -2 to 2"),
        (["--interactive", "--prompt_logprobs"], "leave --interactive out"),
    ],
)
def test_a_wrong_setting_is_one_sentence(run_cli, flags, words):
    code, out, err = run_cli(*flags)
    assert code == 2 and words in err and err.count("\n") == 1 and out == ""


# ---- A constraint of a user's own ----------------------------------------------------------------


def test_the_example_of_a_json_schema_gives_what_the_schema_says(monkeypatch, capsys):
    pytest.importorskip("llguidance", reason="the example needs `pip install llguidance`")
    default_checkpoint()
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/constraints.md").read_text(), re.S
    )
    monkeypatch.chdir(ROOT)
    exec(example, {})
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"city", "country"} and answer["city"] == "Paris"
