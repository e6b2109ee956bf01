"""Four families at full depth: every scheme, draft, cache and score, beside transformers.

A mixture of experts, a model with four norms a layer, one with fused rows and partial rotations,
and one with norms over all heads: what runs these runs the other families, too.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import quantize as cli_quantize
from conftest import SPECIALS, seldom, write_tokenizer
from engine import Engine, Sampling, generate, load, load_model
from eval import Evaluator
from linear import Linear
from model import Transformer
from prefill_cache import PrefillCache
from ranges import MARK, traced
from scripts.convert_hf_checkpoint import convert
from speculate import DraftModel, PromptLookup, Speculator, speculate
from test_eval import ENDINGS, STORY, agree, requests
from test_family_logits import CASES, difference, logits_of, random_hf

FAMILIES = ("qwen3_moe", "gemma3_text", "phi3", "olmo3")
SIZES = dict(vocab_size=300, max_position_embeddings=256, rms_norm_eps=1e-5, bos_token_id=256)
SIZES |= dict(eos_token_id=258, pad_token_id=258)
MODES = ("int8", "int8-activation", "int4", "hybrid")
GLOBS = ("layers.0.attention.wqkv", "layers.*.feed_forward.w2", "layers.1.*")
PROMPT = [5, 6, 7, 8, 9, 10] * 6  # longer than every window
GREEDY = Sampling(temperature=0)


class Checkpoint(NamedTuple):
    """A model of transformers, as float32 and in every scheme."""

    hf: transformers.PreTrainedModel
    exact: Path
    modes: dict[str, Path]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    case = CASES[request.param] | SIZES
    if request.param == "phi3":
        case |= dict(original_max_position_embeddings=256)
    hf = random_hf(request.param, case)
    for parameter in hf.parameters():
        parameter.copy_(parameter.bfloat16())
    hf.save_pretrained(folder / "exact")
    write_tokenizer(folder / "exact")
    exact = convert(folder / "exact", torch.float32)
    copy.deepcopy(hf).bfloat16().save_pretrained(folder)
    write_tokenizer(folder)
    path, modes = convert(folder, torch.bfloat16), {}
    for mode in MODES:
        flags = ["--checkpoint_path", str(path), "--mode", mode, "--device", "cpu"]
        flags += ["--critical_layers", *GLOBS] if mode == "hybrid" else []
        before = {*folder.glob("*.pth")}
        cli_quantize.main(cli_quantize.make_parser().parse_args(flags))
        (modes[mode],) = {*folder.glob("*.pth")} - before
    return Checkpoint(hf, exact, {"bf16": path} | modes)


def ids() -> Tensor:
    return torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))


def text(steps, row: int = 0) -> list[int]:
    return [step[row].id for step in steps]


def greedy(engine: Engine, prompts: list[list[int]], n: int = 16) -> list[list[int]]:
    options = dict(until=lambda _row, _id: False, seeds=[0] * len(prompts))
    steps = [*generate(engine, prompts, GREEDY, n, **options)]
    return [text(steps, row) for row in range(len(prompts))]


def fresh(model: Transformer, rows: int = 1) -> Engine:
    model.setup_caches(rows, 120)
    return Engine(model)


def deviation(logits: Tensor, expected: Tensor) -> float:
    """Root mean square over that of the logits: single ones jump where another expert is chosen."""
    return ((logits - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_float32_gives_the_logits_of_transformers(checkpoint):
    exact = load_model(checkpoint.exact, "cpu", torch.float32)
    assert difference(logits_of(exact, ids()), checkpoint.hf(ids()).logits) < 1e-4


@pytest.mark.parametrize("mode", seldom(["bf16", *MODES], 3))
def test_a_scheme_gives_the_logits_of_its_rounded_weights_in_float32(checkpoint, mode):
    exact = load_model(checkpoint.modes["bf16"], "cpu", torch.float32)
    stored = load_model(checkpoint.modes[mode], "cpu", torch.float32)
    for name, linear in stored.named_modules():
        if isinstance(linear, Linear):
            weight = linear.dequantize().float()
            exact.get_submodule(name).weight = torch.nn.Parameter(weight, False)
    expected = logits_of(exact, ids())
    rounded = mode == "int8-activation"  # which rounds its inputs, too: 0.026 of Qwen3-MoE
    assert deviation(logits_of(stored, ids()), expected) < (0.05 if rounded else 1e-5)
    fast = load_model(checkpoint.modes[mode], "cpu")  # in bf16, by the kernels if there are any
    fast.pack_weights()
    for size in (40, 1):  # one pass, and token by token; 0.008 to 0.023, 0.033 with rounded inputs
        assert deviation(logits_of(fast, ids(), size).float(), expected) < (
            0.06 if rounded else 0.04
        )


@pytest.mark.parametrize("mode", ["bf16", "int4"])
def test_drafts_batches_and_kept_contexts_change_no_text(checkpoint, mode):
    model = load_model(checkpoint.modes[mode], "cpu", torch.float32)
    (expected,) = greedy(fresh(model), [PROMPT])
    options = dict(until=lambda _row, _id: False, seeds=[0])
    cheap = load_model(checkpoint.modes["int8"], "cpu", torch.float32)
    for draft in (DraftModel(fresh(cheap), 300), PromptLookup(300, model.device)):
        speculator = Speculator(fresh(model), draft, 4)
        speculator.draft_length = lambda: 4  # also where it does not pay
        assert text(speculate(speculator, [PROMPT], GREEDY, 16, **options)) == expected
        assert sum(speculator.histogram) > 0
    prompts = [PROMPT, PROMPT[:3]]
    alone = [greedy(fresh(model), [prompt])[0] for prompt in prompts]
    assert greedy(fresh(model, 2), prompts) == alone
    cache, engine = PrefillCache(2**30), fresh(model)
    engine.prefill([PROMPT[:20]])
    cache.store(PROMPT[:20], model)
    engine = fresh(model)
    engine.cache = cache
    assert greedy(engine, [PROMPT]) == [expected] and engine.cached_tokens == 20


def test_scores_are_those_of_lm_evals_own_adapter(checkpoint):
    ours = Evaluator(*load(checkpoint.exact, torch.device("cpu"), "float32"), 3, 100, False)
    tokens = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2]}
    file = str(checkpoint.exact.parent / "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **tokens)
    hf = HFLM(pretrained=checkpoint.hf, tokenizer=tokenizer, max_length=100, batch_size=1)
    batch = requests("loglikelihood", [(STORY, ending) for ending in ENDINGS])
    agree(ours.loglikelihood(batch), hf.loglikelihood(batch))


@pytest.mark.slow
def test_after_the_warm_up_nothing_is_compiled_whatever_the_length(checkpoint):
    model = load_model(checkpoint.exact, "cpu", torch.float32)
    prompts = [PROMPT[:3], PROMPT[:20], PROMPT]
    expected = [greedy(fresh(model), [prompt]) for prompt in prompts]
    torch.compiler.reset()
    model.setup_caches(1, 120)
    engine = Engine(model, "block")
    engine.warm_up(1)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [greedy(engine, [prompt]) for prompt in prompts] == expected


def test_a_profile_names_every_matrix_that_a_token_reads(checkpoint):
    model = load_model(checkpoint.modes["int4"], "cpu", torch.float32)
    engine = fresh(model)
    with profile(activities=[ProfilerActivity.CPU]) as found, traced(engine):
        greedy(engine, [PROMPT[:9]], 4)
    names = {event.key for event in found.key_averages() if event.key.startswith(MARK)}
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert linears == {name.split()[3] for name in names if name.split()[1] == "Linear"}
    kinds = {name.split()[1] for name in names}
    assert kinds >= {"Prefill", "Decode", "Sampling", "Attention", "Norm", "RoPE"}
