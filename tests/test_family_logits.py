"""Every family equals Hugging Face's implementation, and no property of it can be left out.

Each case is a tiny random model with every property of its family away from the default: windows
shorter than the text, several kinds of layers, partial rotations, odd multipliers.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import families
import operators
from checkpoint import load_state
from conftest import seldom
from engine import Engine, Sampling, generate, load_model
from families import from_config
from linear import Linear, linear_for
from model import LayerKind, Mixture, ModelArgs, Transformer
from prefill_cache import PrefillCache
from quantize import quantize
from scripts.convert_hf_checkpoint import convert
from speculate import PromptLookup, Speculator, speculate

LENGTH, VOCABULARY = 40, 96
SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    rms_norm_eps=0.05,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
QWEN_WINDOW = dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)
CASES = {
    "mistral": dict(head_dim=32, sliding_window=7),
    "ministral3": dict(
        head_dim=32,
        sliding_window=9,
        rope_parameters=YARN
        | dict(original_max_position_embeddings=8, beta_fast=8.0, beta_slow=0.5)
        | dict(mscale=1.0, mscale_all_dim=0.5, llama_4_scaling_beta=0.3),
    ),
    "qwen2": QWEN_WINDOW | dict(rope_parameters=YARN | dict(truncate=False)),
    "qwen3": QWEN_WINDOW | dict(head_dim=32, rope_parameters=YARN, attention_bias=True),
    "smollm3": QWEN_WINDOW
    | dict(no_rope_layers=[1, 0, 1, 0], attention_bias=True, mlp_bias=True)
    | dict(rope_parameters=YARN | dict(attention_factor=1.3)),
    "granite": dict(
        attention_multiplier=0.4,
        embedding_multiplier=3.3,
        logits_scaling=2.7,
        residual_multiplier=0.45,
        attention_bias=True,
        mlp_bias=True,
    ),
    "phi3": dict(
        sliding_window=7,
        original_max_position_embeddings=48,
        rope_parameters=dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75)
        | dict(short_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 4.0], long_factor=[9.0] * 6),
    ),
    "seed_oss": dict(head_dim=32, attention_out_bias=True, mlp_bias=True),
    "ernie4_5": dict(head_dim=32, use_bias=True),
    "olmo2": dict(attention_bias=True),
    "olmo3": dict(
        sliding_window=5,
        attention_bias=True,
        rope_parameters=dict(
            full_attention=YARN | dict(attention_factor=1.2),
            sliding_attention=dict(rope_type="default", rope_theta=5e5),
        ),
    ),
    "gemma3_text": dict(
        head_dim=32,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
        query_pre_attn_scalar=24,
        final_logit_softcapping=3.0,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1e5, factor=2.0),
            sliding_attention=dict(rope_type="default", rope_theta=1e3),
        ),
    ),
    "glm4": dict(
        head_dim=32,
        attention_bias=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.25),
    ),
    "exaone4": dict(sliding_window=5, sliding_window_pattern=4),
    "mixtral": dict(
        head_dim=32, sliding_window=7, num_local_experts=6, num_experts_per_tok=3, rope_theta=1e3
    ),
    "qwen3_moe": dict(
        head_dim=32,
        use_sliding_window=True,
        sliding_window=5,
        rope_parameters=YARN,
        attention_bias=True,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "qwen2_moe": QWEN_WINDOW
    | dict(qkv_bias=True, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32)
    | dict(shared_expert_intermediate_size=64, norm_topk_prob=True, mlp_only_layers=[1]),
    "granitemoe": dict(
        attention_multiplier=0.4,
        embedding_multiplier=3.3,
        logits_scaling=2.7,
        residual_multiplier=0.45,
        attention_bias=True,
        num_local_experts=8,
        num_experts_per_tok=3,
    ),
    "glm4_moe": dict(
        head_dim=32,
        attention_bias=True,
        use_qk_norm=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e3, partial_rotary_factor=0.25),
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        moe_intermediate_size=32,
        first_k_dense_replace=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.7,
    ),
    "olmoe": dict(attention_bias=True, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True),
}


class Published(NamedTuple):
    """A model as transformers saves it, its logits, and what the converter makes of it."""

    folder: Path
    args: ModelArgs
    ids: Tensor  # [2, LENGTH]
    logits: Tensor  # [2, LENGTH, VOCABULARY]


def random_hf(family: str, options: dict) -> transformers.PreTrainedModel:
    """A model in which no norm and no bias is trivial."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SHAPE | options)
    model = AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        scale = 0.15 if parameter.ndim > 1 else 0.3
        mean = 1.0 if "norm" in name and family != "gemma3_text" else 0.0
        parameter.copy_(torch.randn_like(parameter) * scale + mean)
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def published(request, tmp_path_factory) -> Published:
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = random_hf(family, CASES[family])
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    convert(folder, torch.float32)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    args = from_config(json.loads((folder / "config.json").read_text()))
    return Published(folder, args, ids, model(ids).logits)


every_family = pytest.mark.parametrize("published", seldom(CASES, 4), indirect=True)


def logits_of(model: Transformer, ids: Tensor, size: int = LENGTH) -> Tensor:
    """The logits of ids `[B, T]`, run `size` tokens at a time."""
    model.setup_caches(len(ids), 50)
    places = torch.arange(ids.shape[1]).expand_as(ids)
    pieces = zip(ids.split(size, 1), places.split(size, 1), strict=True)
    return torch.cat([model(idx, pos, int(pos.max()) + 1).logits for idx, pos in pieces], 1)


def difference(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()


# ------------------------------------------------------------------------------------------------
# What every family gives


@every_family
def test_logits_equal_transformers_in_one_pass_token_by_token_and_alone(published):
    model = load_model(published.folder / "model.pth", "cpu", torch.float32)
    ids, expected = published.ids, published.logits
    assert difference(logits_of(model, ids), expected) < 1e-4
    assert difference(logits_of(model, ids, size=1), expected) < 1e-4
    for row in (0, 1):
        assert difference(logits_of(model, ids[row : row + 1], size=7), expected[row]) < 1e-4


@every_family
def test_prompts_of_several_lengths_continue_as_each_does_alone(published):
    model = load_model(published.folder / "model.pth", "cpu", torch.float32)
    prompts = [published.ids[0, :30].tolist(), published.ids[1, :3].tolist()]

    def texts(prompts: list[list[int]]) -> list[list[int]]:
        model.setup_caches(len(prompts), 45)
        options = dict(until=lambda _row, _id: False, seeds=[0] * len(prompts))
        steps = [*generate(Engine(model), prompts, Sampling(temperature=0), 12, **options)]
        return [[step[row].id for step in steps] for row in range(len(prompts))]

    assert texts(prompts) == [texts([prompt])[0] for prompt in prompts]


@every_family
def test_a_quantized_model_is_that_of_its_rounded_weights(published):
    model = load_model(published.folder / "model.pth", "cpu", torch.float32)
    exact = load_model(published.folder / "model.pth", "cpu", torch.float32)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, Linear):
            tensors = quantize(linear.weight, "int4", 32)
            stored = linear_for(linear, tensors)
            biases = {} if linear.bias is None else {"bias": linear.bias}
            stored.load_state_dict(tensors | biases, assign=True)
            model.set_submodule(name, stored.float())
            exact.get_submodule(name).weight = torch.nn.Parameter(stored.dequantize())
    expected = logits_of(exact, published.ids)
    assert difference(logits_of(model, published.ids), expected) < 1e-3
    assert difference(published.logits, expected) > 1e-2  # they are indeed rounded


# ------------------------------------------------------------------------------------------------
# Controls: what no property can be left out of

SIZES = {"dim", "n_layer", "vocab_size", "block_size", "intermediate_size", "tied"}
SIZES |= {"n_head", "n_local_heads", "head_dim", "mixture"}
SIZES |= {"experts", "width", "shared", "dense_layers"}  # without which no tensor fits


def left_out(args: ModelArgs) -> dict[str, ModelArgs]:
    """For every property away from its default: the same model without it."""
    plain = {}
    for field in dataclasses.fields(ModelArgs):
        value = getattr(args, field.name)
        if field.name not in SIZES | {"kinds", "layers"} and value != field.default:
            plain[field.name] = dataclasses.replace(args, **{field.name: field.default})
    for field in dataclasses.fields(LayerKind):
        values = {getattr(kind, field.name) for kind in args.kinds}
        if field.name not in SIZES | {"rope"} and values != {field.default}:
            kinds = [dataclasses.replace(k, **{field.name: field.default}) for k in args.kinds]
            plain[field.name] = dataclasses.replace(args, kinds=tuple(kinds))
    for field in dataclasses.fields(Mixture) if args.mixture else ():
        value = getattr(args.mixture, field.name)
        if field.name not in SIZES and value != field.default:
            default = value - 1 if field.name == "chosen" else field.default
            mixture = dataclasses.replace(args.mixture, **{field.name: default})
            plain[field.name] = dataclasses.replace(args, mixture=mixture)
    for i, kind in enumerate(args.kinds):
        head_dim = kind.head_dim
        whole = tuple(1e4 ** (-2 * j / head_dim) for j in range(head_dim // 2))
        if kind.rope != pytest.approx(whole):
            kinds = [*args.kinds]
            kinds[i] = dataclasses.replace(kind, rope=whole)
            plain[f"rope of kind {i}"] = dataclasses.replace(args, kinds=tuple(kinds))
    if len(args.kinds) > 1:
        plain["layers"] = dataclasses.replace(args, layers=(0,) * args.n_layer)
    return plain


def args_of(family: str) -> ModelArgs:
    return from_config({"model_type": family} | SHAPE | CASES[family])


CONTROLS = [(family, name) for family in CASES for name in left_out(args_of(family))]
BOTH, CHOICE = {"window", "layers", "norm_eps"}, {"chosen", "renormalize"}
PROPERTIES = {  # so that none is lost unseen
    "mistral": {"window", "norm_eps"},
    "ministral3": {"window", "norm_eps", "rope of kind 0", "rope_scale", "query_scale"},
    "qwen2": BOTH | {"rope of kind 0", "rope of kind 1", "rope_scale", "biases"},
    "qwen3": BOTH | {"rope of kind 0", "rope of kind 1", "rope_scale", "biases", "qk_norm"},
    "smollm3": BOTH | {"rope of kind 0", "rope of kind 1", "rope_scale", "biases"},
    "granite": {"norm_eps", "embed_scale", "residual_scale", "logit_scale", "scale", "biases"},
    "phi3": {"window", "norm_eps", "rope of kind 0", "rope_scale"},
    "seed_oss": {"norm_eps", "biases"},
    "ernie4_5": {"norm_eps", "biases", "rope of kind 0"},
    "olmo2": {"norm_eps", "norms", "qk_norm", "biases"},
    "olmo3": BOTH
    | {"norms", "qk_norm", "biases", "rope_scale", "rope of kind 0", "rope of kind 1"},
    "gemma3_text": BOTH
    | {"norms", "qk_norm", "biases", "act", "embed_scale", "logit_cap", "scale"}
    | {"rope of kind 0", "rope of kind 1"},
    "glm4": {"norm_eps", "norms", "biases", "rope of kind 0"},
    "exaone4": BOTH | {"norms", "qk_norm", "rope of kind 1"},
    "mixtral": {"window", "norm_eps", "rope of kind 0"} | CHOICE,
    "qwen3_moe": {"window", "norm_eps", "rope of kind 0", "rope_scale", "biases", "qk_norm"}
    | CHOICE,
    "qwen2_moe": BOTH | {"biases", "shared_gate"} | CHOICE,
    "granitemoe": {"norm_eps", "embed_scale", "residual_scale", "logit_scale", "scale", "biases"}
    | CHOICE,
    "glm4_moe": {"norm_eps", "biases", "qk_norm", "rope of kind 0"}
    | {"score", "factor", "biased"}
    | CHOICE,
    "olmoe": {"norm_eps", "qk_norm", "biases"} | CHOICE,
}


@pytest.mark.parametrize("family", CASES)
def test_a_case_has_every_property_of_its_family_away_from_the_default(family):
    assert left_out(args_of(family)).keys() == PROPERTIES[family]


@pytest.mark.parametrize("published, name", seldom(CONTROLS, 5), indirect=["published"])
def test_no_property_can_be_left_out(published, name):
    args = left_out(published.args)[name]
    model = Transformer(args).requires_grad_(False)
    for parameter in model.parameters():  # norms that the published model lacks
        torch.nn.init.ones_(parameter)
    state = load_state(published.folder / "model.pth")
    if args.tied:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, strict=False)
    assert difference(logits_of(model, published.ids), published.logits) > 1e-3


@pytest.mark.parametrize(
    "published, change",
    [
        ("ernie4_5", {"interleaved": False}),
        ("glm4", {"interleaved": False}),
        ("qwen3", {"interleaved": True}),
        ("phi3", {"interleaved": True}),
        ("gemma3_text", {"norm_offset": 0.0}),
    ],
    indirect=["published"],
)
def test_tensors_have_to_be_arranged_as_the_family_says(published, change, tmp_path, monkeypatch):
    for file in published.folder.iterdir():
        if file.name != "model.pth":
            (tmp_path / file.name).symlink_to(file)
    name = json.loads((tmp_path / "config.json").read_text())["model_type"]
    wrong = dataclasses.replace(families.FAMILIES[name], **change)
    monkeypatch.setitem(families.FAMILIES, name, wrong)
    model = load_model(convert(tmp_path, torch.float32), "cpu", torch.float32)
    assert difference(logits_of(model, published.ids), published.logits) > 1e-2


# ------------------------------------------------------------------------------------------------
# What the C++ of a whole model takes


def test_the_kernel_of_a_whole_model_takes_no_property_that_it_does_not_compute():
    taken = {family for family in CASES if operators.fusible(args_of(family))}
    assert taken == {"mistral", "qwen2", "qwen3", "smollm3", "phi3", "seed_oss", "ernie4_5"}
    computed = {"qk_norm", "biases", "norm_eps", "window", "scale", "rope_scale", "layers"}
    for family, name in CONTROLS:
        args, without = args_of(family), left_out(args_of(family))
        if len(without.keys() - computed - {"rope of kind 0", "rope of kind 1"}) == 1:
            assert not operators.fusible(args), (family, name)


def test_the_kernel_of_a_whole_model_takes_no_property_that_is_added_later():
    @dataclasses.dataclass(frozen=True)
    class Later(ModelArgs):
        novelty: float = 0.0

    args = args_of("qwen3")
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    assert operators.fusible(Later(**fields))
    assert not operators.fusible(Later(**fields, novelty=0.5))


# ------------------------------------------------------------------------------------------------
# What lies around the text model, and what may be missing from it


def wrapped(kind: str, text: dict) -> transformers.PreTrainedModel:
    """A tiny model with a vision tower around the text model."""
    torch.manual_seed(2)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=28)
    vision |= dict(num_attention_heads=2, patch_size=14, head_dim=8)
    vision |= {"model_type": "pixtral" if kind == "mistral3" else "siglip_vision_model"}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    options = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4} | tied
    config = CONFIG_MAPPING[kind](**options)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        parameter.requires_grad_(False).normal_(0.0, 0.15)
    return model.float().eval()


def rename(folder: Path, renamed: Callable[[str], str], extra: dict[str, Tensor]) -> None:
    """Rename the tensors of a folder, and put them into one file with some more."""
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    state = {renamed(name): tensor for name, tensor in state.items()} | extra
    save_file(state, folder / "model.safetensors")


def older_name(name: str) -> str:
    """As these checkpoints were published at first."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.replace("model.language_model.", "language_model.model.", 1)
    return name.removeprefix("model.") if "language_model" not in name else name


def newer_name(name: str) -> str:
    """As transformers 5 names its modules."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "model.language_model.", 1)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


@pytest.mark.parametrize("renamed", [older_name, newer_name])
@pytest.mark.parametrize(
    "kind, family", [("mistral3", "mistral"), ("mistral3", "ministral3"), ("gemma3", "gemma3_text")]
)
def test_the_text_model_is_taken_out_of_its_wrapper(kind, family, renamed, tmp_path, capsys):
    text = SHAPE | CASES[family] | {"model_type": family}
    text.pop("final_logit_softcapping", None)  # which their wrapper forgets
    model = wrapped(kind, text)
    model.save_pretrained(tmp_path)
    rename(tmp_path, renamed, {"mtp.layers.0.weight": torch.ones(3)})
    ours = load_model(convert(tmp_path, torch.float32), "cpu", torch.float32)
    notices = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert len(notices) == 1 and "tensors that are not of the text model" in notices[0]
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    assert difference(logits_of(ours, ids), model(input_ids=ids).logits) < 1e-4


def test_an_output_matrix_of_its_own_is_kept_although_the_configuration_ties_it(tmp_path):
    model = random_hf("granite", CASES["granite"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    ours = load_model(convert(tmp_path, torch.float32), "cpu", torch.float32)
    ids = torch.arange(3, 33)[None]
    assert difference(logits_of(ours, ids), model(ids).logits) < 1e-4


def test_longrope_ends_at_the_original_context_and_says_so(tmp_path, capsys):
    random_hf("phi3", CASES["phi3"]).save_pretrained(tmp_path)
    model = load_model(convert(tmp_path, torch.float32), "cpu", torch.float32)
    assert model.args.block_size == 48
    assert "[the context is 48 positions, not 64" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_of_embeddings_is_rounded_as_transformers_rounds_it(dtype):
    theirs = random_hf("gemma3_text", CASES["gemma3_text"] | {"hidden_size": 80}).to(dtype)
    args = dataclasses.replace(args_of("gemma3_text"), dim=80, embed_scale=math.sqrt(80))
    ours = Transformer(args).to(dtype).requires_grad_(False)
    ours.tok_embeddings.weight.copy_(theirs.model.embed_tokens.weight)
    ids = torch.arange(VOCABULARY)[None]
    assert torch.equal(ours.embed(ids), theirs.model.embed_tokens(ids))


# ------------------------------------------------------------------------------------------------
# What else runs a model


@pytest.mark.parametrize("published", ["ministral3", "phi3", "olmo3", "gemma3_text"], indirect=True)
def test_drafts_and_kept_contexts_change_no_text(published):
    """Windows are shorter than the text, so what is verified and restored lies partly outside."""
    model = load_model(published.folder / "model.pth", "cpu", torch.float32)
    prompt = [5, 6, 7, 8, 9, 10] * 4
    options = dict(until=lambda _row, _id: False, seeds=[0])

    def fresh_engine() -> Engine:
        model.setup_caches(1, 45)
        return Engine(model)

    def text(steps) -> list[int]:
        return [token.id for (token,) in steps]

    greedy = Sampling(temperature=0)
    expected = text(generate(fresh_engine(), [prompt], greedy, 16, **options))
    speculator = Speculator(fresh_engine(), PromptLookup(VOCABULARY, model.device), 4)
    speculator.draft_length = lambda: 4  # also where it does not pay
    assert text(speculate(speculator, [prompt], greedy, 16, **options)) == expected
    assert sum(speculator.histogram) > 0

    cache, engine = PrefillCache(2**30), fresh_engine()
    engine.prefill([prompt[:20]])
    cache.store(prompt[:20], model)
    engine = fresh_engine()  # with an empty cache
    engine.cache = cache
    assert text(generate(engine, [prompt], greedy, 16, **options)) == expected
    assert engine.cached_tokens == 20
