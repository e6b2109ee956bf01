"""Speculation: the same greedy text, draws from the same distribution, in fewer passes."""

import functools
import itertools
import json
import os
import random
import shlex
import shutil
import subprocess
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import speculate as speculate_module
from commands import python
from conftest import CONFIG, ROOT, random_model, seldom, write_checkpoint
from engine import Engine, Sampling, candidates, generate, sample
from linear import FEW_ROWS, Linear, linear_for
from quantize import quantize
from speculate import DraftModel, PromptLookup, Speculator, speculate
from test_generate import PROMPTS, command, options_of, run_rows

GREEDY = Sampling(temperature=0)
CONFIG = CONFIG | {"hidden_size": 64, "head_dim": 16}  # so that groups of 32 fit
OTHER = CONFIG | {"num_hidden_layers": 1}
REPEATING = [5, 6, 7, 8, 9, 10] * 5
CPU = torch.device("cpu")


def engine(config=CONFIG, length=256, model=None, compile=None) -> Engine:
    model = model or random_model(config)
    model.setup_caches(1, length)
    return Engine(model, compile)


def store(model, name: str, scheme: str) -> None:
    """Put one Linear of the model into this scheme."""
    linear = model.get_submodule(name)
    tensors = quantize(linear.weight, scheme, 32)
    stored = linear_for(linear, tensors)
    stored.load_state_dict(tensors, assign=True)
    stored.float().requires_grad_(False).pack_weights()
    model.set_submodule(name, stored)


def quantized(scheme: str):
    """The model of CONFIG with every Linear in this scheme."""
    model = random_model(CONFIG)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, Linear):
            store(model, name, scheme)
    return model


DRAFTS = {
    "itself": lambda: DraftModel(engine(), 300),
    "int8": lambda: DraftModel(engine(model=quantized("int8")), 300),
    "int4": lambda: DraftModel(engine(model=quantized("int4")), 300),
    "a stranger": lambda: DraftModel(engine(OTHER), 300),
    "a larger embedding": lambda: DraftModel(engine(OTHER | {"vocab_size": 320}), 300),
    "a smaller embedding": lambda: DraftModel(engine(OTHER | {"vocab_size": 290}), 300),
    "a short context": lambda: DraftModel(engine(length=20), 300),
    "lookup": lambda: PromptLookup(300, CPU),
}


def run(speculator, prompt, n=40, sampling=GREEDY, **options) -> list[int]:
    tokens = speculate(speculator, [prompt], sampling, n, **options_of(**options))
    return [token.id for (token,) in tokens]


class Fixed(Speculator):
    """Always asks for k tokens, whether they pay or not."""

    def draft_length(self) -> int:
        return self.k


# ---- Greedy text -------------------------------------------------------------------------------


@functools.cache
def text_without_a_draft(*prompt: int) -> list[int]:
    return run_rows(engine(), [list(prompt)], n=24)[0]


@pytest.mark.parametrize("draft, fixed", seldom(itertools.product(DRAFTS, (True, False)), 3))
def test_greedy_text_is_that_without_a_draft(draft, fixed):
    target, drafting = engine(), DRAFTS[draft]()
    for k in (1, 4):
        speculator = (Fixed if fixed else Speculator)(target, drafting, k)
        for prompt in [*PROMPTS, REPEATING]:
            assert run(speculator, prompt, n=24) == text_without_a_draft(*prompt)


@pytest.mark.parametrize("scheme", ["int8", "int8-activation", "int4"])
def test_greedy_text_of_quantized_models_is_that_without_a_draft(scheme):
    target, alone = (engine(model=quantized(scheme)) for _ in range(2))
    for drafting in (DraftModel(engine(model=quantized("int4")), 300), PromptLookup(300, CPU)):
        speculator = Fixed(target, drafting, 4)
        for prompt in [*PROMPTS, REPEATING]:
            assert run(speculator, prompt, n=24) == run_rows(alone, [prompt], n=24)[0]


def test_a_draft_that_is_the_target_is_always_right():
    for sampling in (GREEDY, Sampling(1.0, 0), Sampling(0.7, 50, 0.9, 0.02)):
        speculator = Fixed(engine(), DRAFTS["itself"](), 4)
        run(speculator, PROMPTS[0], n=41, sampling=sampling)
        assert speculator.histogram == [0, 0, 0, 0, 8]  # 1 + 8 * 5 tokens


def test_lookup_finds_what_was_there():
    lookup, none = PromptLookup(300, CPU), (GREEDY, torch.Generator())
    ids, q = lookup.propose([1, 2, 3, 4, 5, 9, 2, 3], 2, *none)
    assert ids.tolist() == [4, 5] and q.argmax(1).tolist() == [4, 5] and q.sum() == 2
    assert lookup.propose([1, 2, 3, 4, 5, 9, 2, 3, 7], 2, *none)[0].tolist() == []
    lookup.begin(0)
    assert lookup.propose([1, 2, 1, 2, 1], 5, *none)[0].tolist() == [2, 1, 2, 1, 2]
    latest = [1, 2, 3, 8, 1, 2, 4, 9, 1, 2]
    lookup.begin(0)
    assert lookup.propose(latest, 1, *none)[0].tolist() == [4]
    lookup.begin(0)  # three tokens that match weigh more than two that are nearer
    assert lookup.propose([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1, *none)[0].tolist() == [3]


def test_a_text_ends_at_eos_within_a_block_at_the_limit_and_with_the_cache():
    speculator = Fixed(engine(), DRAFTS["itself"](), 5)
    whole = run(speculator, PROMPTS[0])
    for eos in set(whole):
        assert run(speculator, PROMPTS[0], eos_ids={eos}) == whole[: whole.index(eos) + 1]
    for n in range(1, 9):
        assert run(speculator, PROMPTS[0], n=n) == whole[:n]
    for length in range(len(PROMPTS[0]), 24):
        small = Fixed(engine(length=length), DRAFTS["itself"](), 5)
        assert run(small, PROMPTS[0]) == whole[: length + 1 - len(PROMPTS[0])]


def test_a_conversation_continues_both_caches():
    speculator = Fixed(engine(), DRAFTS["int8"](), 5)
    text = list(PROMPTS[0])
    for turn in range(4):
        start = max(len(text) - 1, 0) if turn else 0
        new = run(speculator, text + [7, 8], n=10, start=start)
        assert new == run_rows(engine(), [text + [7, 8]], n=10)[0]
        text += [7, 8, *new]


def test_the_draft_computes_nothing_twice():
    """With everything accepted it is fed each token once, but for none at all."""
    drafting = DRAFTS["itself"]()
    fed, step = [], drafting.engine.decode_step
    drafting.engine.decode_step = lambda idx, pos, *rest: (
        fed.extend(pos[0].tolist()),
        step(idx, pos, *rest),
    )[1]
    speculator = Fixed(engine(), drafting, 3)
    new = run(speculator, PROMPTS[0], n=21)
    assert fed == list(range(len(PROMPTS[0]) + len(new) - 2))


def test_the_drafts_cache_is_right_after_rejections_however_many_were_asked_for():
    """Steps without proposals, at which the text outgrows what was rejected, included."""
    drafting, target = DRAFTS["a stranger"](), engine()
    speculator, text = Fixed(target, drafting, 5), list(PROMPTS[0])
    target.prefill([text])
    for k in (5, 0, 0, 1, 5, 5, 0, 3, 0, 0, 0, 0, 0, 0, 2, 0):
        new, proposed = speculator.step(text, k, GREEDY, torch.Generator())
        text += [token.id for token in new]
        assert proposed == k
        fresh = engine(OTHER)
        fresh.prefill([text])
        known = min(drafting.known, len(text) - 1)
        for one, other in zip(drafting.engine.model.layers, fresh.model.layers, strict=True):
            caches = (layer.attention.kv_cache.k_cache[0, :, :known] for layer in (one, other))
            torch.testing.assert_close(*caches, atol=1e-5, rtol=0)


# ---- The distribution --------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's statistic over its degrees of freedom: about 1 if counts were drawn from probs."""
    expected = counts.sum() * probs
    kept = expected > 0
    assert counts[~kept].sum() == 0
    return (((counts - expected) ** 2)[kept] / expected[kept]).sum().item() / (
        kept.sum().item() - 1
    )


def verify(p: torch.Tensor, *rest) -> torch.Tensor:
    """With distributions over all tokens."""
    return speculate_module.verify(p, torch.arange(p.shape[1]).expand_as(p), *rest)


def verified(verify, n: int) -> tuple[float, float]:
    """Statistics of the first token that comes out, and of the second after one was accepted."""
    generator = torch.Generator().manual_seed(3)
    p, q = torch.rand(2, 3, 5, generator=generator).pow(3).unbind()
    p, q = p / p.sum(1, keepdim=True), (q / q.sum(1, keepdim=True))[:2]
    first, second = torch.zeros(5), torch.zeros(5)
    for ids in torch.stack([row.multinomial(n, True, generator=generator) for row in q], 1):
        out = [token for token in verify(p, ids, q, generator).tolist() if token >= 0]
        first[out[0]] += 1
        if len(out) > 1:
            second[out[1]] += 1
    return chi_square(first, p[0]), chi_square(second, p[1])


def test_what_is_accepted_or_drawn_instead_has_the_targets_distribution():
    assert max(verified(verify, 8000)) < 3.5  # exceeded once in 100 if right: chi-square, 4 degrees


@pytest.mark.slow
def test_the_chi_square_test_would_notice_a_wrong_residual():
    """Two plausible mistakes: not taking q off, and taking off the row after."""

    def wrong(shift, p, ids, q, generator):
        result = verify(p, ids, q, generator)
        count = int((result >= 0).sum()) - 1
        rest = p[count].clone()
        if count < len(ids) and shift:
            rest = (rest - q[(count + shift) % len(q)]).clamp(min=0)
        result[count] = rest.multinomial(1, generator=generator)
        return result

    assert max(verified(functools.partial(wrong, 0), 8000)) > 10
    assert max(verified(functools.partial(wrong, 1), 8000)) > 10


TINY = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY = CONFIG | TINY | {"head_dim": 4, "intermediate_size": 8, "vocab_size": 6}


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(1.3, 0), Sampling(0.9, 5, 0.95, 0.05)])
def test_sampled_texts_have_the_targets_distribution(sampling):
    """All 216 texts of three tokens, against the product of the model's probabilities."""
    draft_config = TINY | {"num_hidden_layers": 1}
    target, drafting = engine(TINY, 16), DraftModel(engine(draft_config, 16), 6)
    prompt, probs = [1, 2], torch.zeros(6, 6, 6)
    for text in itertools.product(range(6), repeat=3):
        ids = torch.tensor([prompt + [*text]])
        logits = target.model(ids, torch.arange(5)[None], 16).logits[0, 1:4]
        p = torch.zeros(3, 6).scatter_(1, *reversed(candidates(logits, sampling)))
        probs[text] = p[0, text[0]] * p[1, text[1]] * p[2, text[2]]
    assert abs(probs.sum() - 1) < 1e-5
    speculator, counts = Fixed(target, drafting, 2), torch.zeros(6, 6, 6)
    for seed in range(1000):
        counts[tuple(run(speculator, prompt, 3, sampling, seed=seed))] += 1
    common = probs > 5 / 1000  # rarer texts are counted together
    cells = [torch.cat((x[common], x[~common].sum().view(1))) for x in (counts, probs)]
    assert len(cells[0]) > 20 and chi_square(*cells) < 1.6


def test_equal_distributions_leave_nothing_to_draw_from_and_still_give_a_token():
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    q = p[:1] * (1 + 1e-3)  # as rounding may have it: rejected now and then, and p - q is below 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        tokens = verify(p, torch.tensor([1]), q, generator).tolist()
        assert tokens[0] in (0, 1) and tokens[1] in (-1, 0, 1)


def test_a_token_of_probability_0_is_never_accepted():
    p, q = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        assert verify(p, torch.tensor([0]), q, generator).tolist() == [1, -1]


# ---- How many are asked for --------------------------------------------------------------------


def test_as_many_are_asked_for_as_pay():
    speculator = Speculator(engine(), PromptLookup(300, CPU), 4)
    speculator.costs = [1.0, 1.1, 1.2, 1.3, 1.4]
    assert speculator.draft_length() == 4
    for _ in range(50):
        speculator.record(0, 4)
    asked = [speculator.draft_length() for _ in range(32)]
    assert sorted(asked) == [0] * 30 + [1] * 2  # not at all, but it looks now and then
    for _ in range(50):
        speculator.record(1, 1)
    assert speculator.draft_length() == 4
    speculator.costs = [1.0, 1.5, 2.5, 3.5, 4.5]
    assert speculator.draft_length() == 1
    speculator.costs = [1.0, 2.5, 3.5, 4.5, 5.5]
    assert speculator.draft_length() == 0


def test_steps_without_proposals_say_nothing_about_the_draft():
    speculator = Speculator(engine(), PromptLookup(300, CPU), 4)
    before = speculator.hits, speculator.trials
    for _ in range(10000):
        speculator.record(0, 0)
    assert (speculator.hits, speculator.trials) == before


def test_costs_are_those_of_bytes():
    """A proposal costs what the draft reads, in units of what the target reads; lookup is free.

    Quantized weights that PyTorch's own operations multiply on a CPU cost what floats do.
    """
    target = engine()
    size = target.model.bytes_per_step(0)
    row = 1 / 32  # of float32, a bit a weight
    stranger = DRAFTS["a stranger"]()
    shares = {"itself": 1, "int8": 1, "int4": 1, "lookup": 0}
    shares["a stranger"] = stranger.engine.model.bytes_per_step(0) / size
    assert 0.3 < shares["a stranger"] < 0.8
    for name, share in shares.items():
        costs = Speculator(target, DRAFTS[name](), 3).costs
        assert costs == pytest.approx([1 + k * (share + row) for k in range(4)], rel=0.01), name


def test_ranks_agree_on_a_cost_that_each_would_put_differently():
    speculator = Speculator(engine(), DRAFTS["itself"](), 2, agree=lambda make: make() / 2)
    assert speculator.costs[1] == pytest.approx(1.5 + 1 / 64, rel=0.01)


def test_a_draft_that_can_never_pay_is_never_asked():
    speculator = Speculator(engine(), DRAFTS["int4"](), 4)
    assert {speculator.draft_length() for _ in range(100)} == {0}


@pytest.mark.parametrize("draft", ["int8", "a stranger", "lookup"])
def test_a_seed_gives_the_same_text_again_however_long_steps_take(draft, monkeypatch):
    """Nothing in it goes by a clock: texts drawn on a slow and on a fast machine are the same."""
    sampling, texts = Sampling(0.9, 50), []
    for seconds in (0.0, 0.02):
        target, drafting = engine(), DRAFTS[draft]()
        for slow in {target, drafting.engine} - {None}:
            step = slow.decode_step
            slow.decode_step = lambda *a, s=step, t=seconds: (time.sleep(t), s(*a))[1]
        texts.append(run(Speculator(target, drafting, 4), REPEATING, n=24, sampling=sampling))
    assert texts[0] == texts[1]


# ---- What is said of every token ---------------------------------------------------------------


@pytest.mark.parametrize("draft", ["int8", "lookup"])
def test_log_probabilities_are_those_of_plain_decoding(draft):
    options = options_of(logprobs=3)
    plain = [t for (t,) in generate(engine(), [REPEATING], GREEDY, 20, **options)]
    speculator = Fixed(engine(), DRAFTS[draft](), 4)
    found = [t for (t,) in speculate(speculator, [REPEATING], GREEDY, 20, **options)]
    assert [t.id for t in plain] == [t.id for t in found] and len(plain) == 20
    for one, other in zip(plain, found, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [i for i, _ in one.top] == [i for i, _ in other.top]


@pytest.mark.parametrize("draft", ["itself", "int8", "lookup"])
def test_a_hook_shapes_the_same_text_with_a_draft_and_without(draft):
    """Odd and even tokens take turns: the hook sees what came before, proposals too."""

    def alternate(row, ids, logits):
        same = torch.arange(len(logits)) % 2 == ids[-1] % 2
        return logits.masked_fill(same, -torch.inf)

    options = dict(shape_logits=alternate)
    expected = run_rows(engine(), [REPEATING], n=24, **options)[0]
    speculator = Fixed(engine(), DRAFTS[draft](), 4)
    assert run(speculator, REPEATING, n=24, **options) == expected
    text = REPEATING[-1:] + expected
    assert all((a + b) % 2 for a, b in itertools.pairwise(text))
    assert expected != run_rows(engine(), [REPEATING], n=24)[0]


# ---- Compiled ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "whole"])
def test_nothing_recompiles_whatever_is_proposed_and_accepted(mode):
    torch.compiler.reset()
    target, alone = engine(compile=mode), engine()
    drafting = DraftModel(engine(compile=mode, model=quantized("int8")), 300)
    for each in (target, drafting.engine):
        each.warm_up(1, 10)
    with torch.compiler.set_stance("fail_on_recompile"):
        for k, fixed in ((1, True), (4, True), (9, False)):
            for draft in (drafting, PromptLookup(300, CPU)):
                speculator = (Fixed if fixed else Speculator)(target, draft, k)
                for prompt in [*PROMPTS, REPEATING]:
                    expected = run_rows(alone, [prompt], n=12)[0]
                    assert run(speculator, prompt, n=12) == expected


def test_a_step_waits_for_the_device_once():
    """The only values that come back to the host are the tokens, at the end of `step`."""

    class Watch(TorchDispatchMode):
        items = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.items += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    generator = torch.Generator().manual_seed(0)
    for draft in ("int8", "lookup"):
        speculator = Fixed(engine(), DRAFTS[draft](), 4)
        with Watch() as watch:
            speculator.step(REPEATING, 4, Sampling(0.8, 20, 0.9), generator)
        assert watch.items == 0  # tolist() of the result is not counted, an item() would be
        with Watch() as watch:
            sample(torch.randn(1, 9), [GREEDY], [generator]).item()
        assert watch.items == 1


# ---- The command line --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A model.pth, and another folder with a draft of the same vocabulary."""
    folder = tmp_path_factory.mktemp("speculation")
    return write_checkpoint(folder / "target", CONFIG), write_checkpoint(folder / "draft", OTHER)


@pytest.fixture
def run_cli(monkeypatch, capsys, checkpoints):
    common = ("--checkpoint_path", checkpoints[0], "--device", "cpu", "--precision", "float32")
    return functools.partial(command, monkeypatch, capsys, *common)


@pytest.mark.parametrize("flags", [["--prompt_lookup"], ["--draft_checkpoint_path"]])
def test_the_command_prints_the_same_text_and_how_it_was_made(
    run_cli, checkpoints, tmp_path, flags
):
    flags = [*flags, *checkpoints[1:]] if "draft" in flags[0] else flags
    common = ("--temperature", 0, "--max_new_tokens", 30, "--prompt", "ab ab ab ab ab ab")
    _, expected, _ = run_cli(*common)
    file = tmp_path / "figures.json"
    more = ("--speculate_k", 3, "--num_samples", 2, "--json", file)
    code, out, err = run_cli(*common, *flags, *more)
    assert code == 0 and out == expected * 2
    assert err.count("steps that accepted 0 to 3") == 2
    for record in json.loads(file.read_text())["samples"]:
        assert record["tokens_per_s"] > 0 and len(record["accepted"]) == 4
        made = sum((n + 1) * count for n, count in enumerate(record["accepted"]))
        assert made + 1 >= record["new_tokens"][0]


def test_prompts_of_a_file_are_run_one_by_one(run_cli, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("ab ab\ncd cd cd\nx\n")
    common = ("--temperature", 0, "--max_new_tokens", 9, "--prompts_file", file)
    _, expected, _ = run_cli(*common, "--batch_size", 1)
    code, out, err = run_cli(*common, "--prompt_lookup")
    assert code == 0 and out == expected and err.count("steps that accepted") == 3


def test_a_conversation_speculates(run_cli, checkpoints):
    flags = ("--interactive", "--temperature", 0, "--max_new_tokens", 12)
    _, expected, _ = run_cli(*flags, stdin="hello\nhello again\n/reset\nhello\n/quit\n")
    draft = ("--draft_checkpoint_path", checkpoints[1])
    code, out, err = run_cli(*flags, *draft, stdin="hello\nhello again\n/reset\nhello\n/quit\n")
    assert code == 0 and out == expected and err.count("steps that accepted") == 3


def test_a_context_is_prefilled_once_for_the_model_and_for_the_draft(
    run_cli, checkpoints, tmp_path
):
    file = tmp_path / "figures.json"
    common = ("--temperature", 0, "--max_new_tokens", 9, "--prompt", " and so", "--json", file)
    context = ("--prefill_context", "It was " * 20)
    _, expected, _ = run_cli(*common, *context)
    flags = (*common, *context, "--prefill_cache", tmp_path / "cache", "--num_samples", 2)
    for times in (2, 0):  # the second process finds both models' files
        code, out, err = run_cli(*flags, "--draft_checkpoint_path", checkpoints[1])
        assert code == 0 and out == expected * 2, err
        figures = json.loads(file.read_text())
        assert figures["context_prefilled_tokens"] == times * figures["context_tokens"]
        assert all(record["prefilled_tokens"] < 20 for record in figures["samples"])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert run_cli(*flags, "--prompt_lookup")[1] == expected * 2
    flags += ("--prefill_cache_gb", 0.0001, "--draft_checkpoint_path", checkpoints[1])
    code, out, err = run_cli(*flags)  # room for one of the two, 0.09 and 0.05 MB
    assert code == 0 and out == expected * 2 and "do not fit --prefill_cache_gb together" in err


def test_wrong_flags_and_drafts_are_one_line(run_cli, checkpoints, tmp_path):
    small = write_checkpoint(tmp_path / "small", OTHER | {"vocab_size": 257})
    other = shutil.copytree(checkpoints[1].parent, tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(content))
    for flags, words in (
        (["--prompt_lookup", "--batch_size", 2], "one stream at a time"),
        (["--speculate_k", 3], "--draft_checkpoint_path or --prompt_lookup"),
        (["--prompt_lookup", "--speculate_k", FEW_ROWS], "from 1 to 31"),
        (["--prompt_lookup", "--draft_checkpoint_path", checkpoints[1]], "not allowed with"),
        (["--draft_checkpoint_path", tmp_path / "none.pth"], "there is no checkpoint"),
        (["--draft_checkpoint_path", other / "model.pth"], "the model's vocabulary"),
        (["--draft_checkpoint_path", small], "the draft's embedding has 257 tokens"),
        (["--prompt_lookup", "--profile", tmp_path / "t.json"], "leave speculation out"),
        (["--interactive", "--num_samples", 2], "leave --num_samples out"),
    ):
        code, out, err = run_cli(*flags)
        assert code == 2 and words in err and err.count("\n") == 1 and not out, (flags, err)


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("scripts/speculate_*.sh")), ids=lambda s: s.stem
)
def test_the_recipes_pass_flags_that_exist(script, tmp_path):
    """`python` and `torchrun` are replaced by what parses the flags and stops."""
    check = "import json, sys, generate; sys.argv[0] = 'generate.py'; "
    check += "print(json.dumps(vars(generate.make_parser().parse_args()), default=str))"
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/bash\nwhile [[ $1 != generate.py ]]; do shift; done\nshift\n"
        f'exec {shlex.join(python())} -c {shlex.quote(check)} "$@"\n'
    )
    stand_in.chmod(0o755)
    (tmp_path / "torchrun").symlink_to(stand_in)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL": "some/model"}
    (tmp_path / "scripts").mkdir()
    env["CDPATH"] = str(tmp_path)  # in which a shell looks for what `cd` is told
    command, options = (
        [f"scripts/{script.name}", "--seed", "7"],
        dict(capture_output=True, text=True),
    )
    done = subprocess.run(command, env=env, cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr
    flags = json.loads(done.stdout)
    assert flags["seed"] == 7 and flags["speculate_k"] >= 5
    assert flags["checkpoint_path"].startswith("some/model/model")
    assert flags["draft_checkpoint_path"].endswith("model_int4.g32.pth")


@pytest.mark.slow
def test_every_mix_of_schemes_compiles():
    """As in a custom hybrid: nearly every block has other schemes, and one function runs all."""
    torch.compiler.reset()
    config = CONFIG | {"num_hidden_layers": 12}
    models = [random_model(config) for _ in range(2)]
    choice = random.Random(0)
    for name, linear in list(models[0].named_modules()):
        if isinstance(linear, Linear):
            scheme = choice.choice(["int8", "int4"])
            for model in models:
                store(model, name, scheme)
    kinds = [tuple(type(m) for m in layer.modules()) for layer in models[0].layers]
    assert len(set(kinds)) > 8  # more than the compiler's own limit
    compiled = engine(model=models[0], compile="block")
    expected = run_rows(engine(model=models[1]), [PROMPTS[0]], n=6)
    assert run_rows(compiled, [PROMPTS[0]], n=6) == expected
