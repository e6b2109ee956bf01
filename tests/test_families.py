"""A published config.json means what it says, and a wrong one is refused by its own key."""

import json
import math
import time

import pytest
import torch

from cli import UserError
from conftest import CONFIG, write_checkpoint
from engine import load_model
from families import from_config, preset, preset_names, read_config
from model import Transformer

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
NAN, INF = float("nan"), float("inf")


def frequencies(change: dict) -> tuple[float, ...]:
    (kind,) = from_config(CONFIG | {"head_dim": 16} | change).kinds
    return kind.rope


# ------------------------------------------------------------------------------------------------
# What a file means


def test_frequencies_are_powers_of_the_base():
    expected = [500000.0 ** (-i / 16) for i in range(0, 16, 2)]
    assert frequencies({"rope_theta": 500000.0}) == pytest.approx(expected, rel=1e-6)
    assert frequencies({"rope_theta": 500000}) == frequencies({"rope_theta": 500000.0})


def test_frequencies_are_float32_to_the_last_bit():
    exponents = torch.arange(0, 16, 2, dtype=torch.float32) / 16
    assert frequencies({"rope_theta": 1.3e5}) == tuple((1.0 / 1.3e5**exponents).tolist())


def test_linear_scaling_divides_every_frequency():
    scaled = frequencies({"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert scaled == tuple(frequency / 4 for frequency in frequencies({}))


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    plain, scaled = frequencies({}), frequencies({"rope_scaling": LLAMA3})
    turns = [64 * frequency / (2 * math.pi) for frequency in plain]
    for before, after, count in zip(plain, scaled, turns, strict=True):
        if count >= 4:
            assert after == before
        elif count <= 1:
            assert after == pytest.approx(before / 8)
        else:
            assert before / 8 < after < before
    assert min(turns) < 1 < 4 < max(turns) and any(1 < count < 4 for count in turns)


def test_old_and_new_spelling_of_rope_scaling_are_the_same():
    new = frequencies({"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}})
    old = frequencies({"rope_theta": 500000.0, "rope_scaling": LLAMA3})
    assert new == old != frequencies({"rope_scaling": LLAMA3})


def windows(config: dict) -> list[int]:
    args = from_config(CONFIG | {"num_hidden_layers": 4} | config)
    return [args.kinds[kind].window for kind in args.layers]


def test_each_layer_has_the_window_that_its_family_gives_it():
    mistral = {"model_type": "mistral", "sliding_window": 100}
    assert windows(mistral) == [100] * 4
    assert windows(mistral | {"sliding_window": None}) == [0] * 4
    assert windows(mistral | {"sliding_window": 512}) == [0] * 4  # as long as the context
    assert windows({"sliding_window": 100, "use_sliding_window": True}) == [0] * 4  # a llama
    qwen = {"model_type": "qwen2", "sliding_window": 100, "max_window_layers": 3}
    assert windows(qwen) == [0] * 4
    assert windows(qwen | {"use_sliding_window": True}) == [0, 0, 0, 100]
    types = ["sliding_attention", "full_attention"] * 2
    olmo = {"model_type": "olmo3", "sliding_window": 100}
    assert windows(olmo) == [100, 100, 100, 0]
    assert windows(olmo | {"layer_types": types}) == [100, 0, 100, 0]


def test_a_window_leaves_the_context_as_long_as_it_is():
    args = from_config(CONFIG | {"model_type": "mistral", "sliding_window": 100})
    assert args.block_size == 512 and preset("mistral-7b-v0.1").block_size == 32768


def test_yarn_extends_the_context_and_longrope_is_cut_to_its_original_part():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert from_config(CONFIG | {"rope_scaling": yarn}).block_size == 2048
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    phi = CONFIG | {"model_type": "phi3", "rope_scaling": longrope}
    assert from_config(phi | {"original_max_position_embeddings": 128}).block_size == 128


def test_what_a_file_leaves_out_has_the_published_default():
    config = {k: v for k, v in CONFIG.items() if k not in ("rope_theta", "rms_norm_eps")}
    args = from_config({k: v for k, v in config.items() if k != "num_key_value_heads"})
    assert args.kinds[0].n_local_heads == args.kinds[0].n_head == 6
    assert args.kinds[0].head_dim == 8 and args.norm_eps == 1e-6 and not args.tied
    assert args.kinds[0].rope == from_config(CONFIG).kinds[0].rope
    nulls = dict.fromkeys(("head_dim", "rope_scaling", "rope_theta", "attention_bias"))
    assert from_config(CONFIG | nulls) == from_config(CONFIG)


def test_biases_are_those_of_the_family_and_its_flags():
    def biases(family: str, **flags: bool) -> tuple[str, ...]:
        return from_config(CONFIG | {"model_type": family, "head_dim": 8} | flags).biases

    everywhere = ("wqkv", "wo", "w1", "w2", "w3")
    assert biases("llama") == biases("ernie4_5") == biases("glm4", attention_bias=False) == ()
    assert biases("llama", attention_bias=True, mlp_bias=True) == everywhere
    assert biases("ernie4_5", use_bias=True) == everywhere
    assert biases("qwen2") == biases("glm4") == biases("seed_oss") == ("wqkv",)
    assert biases("seed_oss", attention_out_bias=True, attention_bias=False) == ("wo",)


def test_a_gemma_that_says_little_has_the_published_sizes():
    """As Gemma 3 4B is published: a wrapper whose text_config leaves out what is the default."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    args = from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    near, far = args.kinds
    assert (near.n_head, near.n_local_heads, near.head_dim, near.window) == (8, 4, 256, 1024)
    assert near.rope[1] == pytest.approx(1e4 ** (-1 / 128)) and far.window == 0
    assert far.rope[1] == pytest.approx(1e6 ** (-1 / 128) / 8) and near.scale == 1 / 16
    assert args.layers == ((0,) * 5 + (1,)) * 5 + (0,) * 4 and args.vocab_size == 262208
    assert args.tied and args.act == "gelu_tanh" and args.block_size == 131072


# ------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2', which is not supported"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], which is not supported"),
        ({"model_type": None}, "lacks model_type"),
        (
            {"model_type": "gpt_oss", "num_local_experts": 8},
            "num_local_experts is 8, of a 'gpt_oss' model with a mixture of experts, which is not",
        ),
        (
            {"model_type": "olmoe", "clip_qkv": 8.0},
            "clip_qkv is 8.0, of a 'olmoe' model with a clip of q, k and v, which is not",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 9},
            "num_experts_per_tok is 9, more than the 8 of num_local_experts",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 2**20, "num_experts_per_tok": 2},
            "num_local_experts is 1048576, not a count from 1 to 4096",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
            | {"moe_intermediate_size": 32, "mlp_only_layers": [2]},
            r"mlp_only_layers is \[2\], not a list of layers",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0, .* a cap on attention scores, which is not",
        ),
        (
            {"model_type": "qwen3_5", "text_config": {"linear_num_value_heads": 8}},
            "text_config.linear_num_value_heads is 8, of a 'qwen3_5' model with linear attention",
        ),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "mistral4"}},
            "text_config.model_type is 'mistral4', which is not supported",
        ),
        (
            {"model_type": "olmo3", "layer_types": ["full_attention", "chunked_attention"]},
            "layer_types is .*chunked_attention.*, not a list of 2 layers with full_attention or",
        ),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type is 'proportional'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type is \['linear'\]"),
        ({"rope_scaling": {"rope_type": {"a": 1}}}, "rope_type is {'a': 1}"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": []}, r"hidden_act is \[\]"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_the_network_is_not_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=f"^config.json:? .*{named}"):
        from_config(CONFIG | change)


COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
COUNTS += ("intermediate_size", "vocab_size", "max_position_embeddings", "head_dim")
COUNTS += ("sliding_window",)
NUMBERS = ("rms_norm_eps", "rope_theta")
ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")
ROPE_NUMBERS += ("original_max_position_embeddings",)
NO_COUNTS = (0, -1, 2.0, "64", True, [8], {}, NAN, INF, 2**70, 10**9)
NO_NUMBERS = (0, 0.0, -1.0, NAN, INF, -INF, True, "a", [1.0], 10**400, 1e-320)


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_what_is_no_count_is_refused_at_once(key, value):
    began, family = time.perf_counter(), {"model_type": "mistral"}  # the one with a window
    with pytest.raises(UserError, match=f"^config.json: {key} is .*, not a count .*; fetch"):
        from_config(CONFIG | family | {key: value})
    assert time.perf_counter() - began < 0.2


def test_a_window_that_the_family_does_not_use_is_not_read():
    assert from_config(CONFIG | {"sliding_window": 0}) == from_config(CONFIG)


@pytest.mark.parametrize("key", NUMBERS + ROPE_NUMBERS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:8])
def test_what_is_no_positive_number_is_refused(key, value):
    config, where = CONFIG | {key: value}, ""
    if key in ROPE_NUMBERS:
        config, where = CONFIG | {"rope_scaling": LLAMA3 | {key: value}}, "rope_scaling."
    with pytest.raises(
        UserError, match=f"^config.json: {where}{key} is .*, not a number .*; fetch"
    ):
        from_config(config)


@pytest.mark.parametrize(
    "key", ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"]
)
@pytest.mark.parametrize("value", ["yes", 1, []], ids=repr)
def test_what_is_no_flag_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key} is .*, not true or false"):
        from_config(CONFIG | {"model_type": "qwen3", key: value})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, which does not divide the 6 heads"),
        ({"num_key_value_heads": 12}, "num_key_value_heads is 12"),
        ({"hidden_size": 50}, "hidden_size is 50, which 6 heads do not divide"),
        ({"head_dim": 7}, "head_dim is 7, so a head has 7 dimensions, an odd number"),
        ({"hidden_size": 42}, "hidden_size is 42, so a head has 7 dimensions, an odd number"),
        ({"hidden_size": 2**24, "num_attention_heads": 2}, "hidden_size is 16777216"),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor is 4.0, not below high_freq_factor, 4.0",
        ),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "not below high_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0}},
            "beta_fast is 1.0, not above beta_slow, 1.0",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], not an object"),
        ({"rope_scaling": {"type": "linear"}}, "lacks rope_scaling.factor"),
        ({"rope_scaling": {"type": "longrope"}}, "lacks rope_scaling.short_factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 0, 1, 1]}},
            "rope_scaling.short_factor is .*, not a list of 4 positive numbers",
        ),
        (
            {"model_type": "phi3", "partial_rotary_factor": 0.4},
            "partial_rotary_factor is 0.4, so 3 of 8 dimensions turn",
        ),
        ({"model_type": "ministral3"}, "lacks rope_parameters.llama_4_scaling_beta"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers is .1., not a list of"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks .*low_freq_factor"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(change, named):
    with pytest.raises(UserError, match=f"^config.json:? .*{named}") as caught:
        from_config(CONFIG | {"num_key_value_heads": None} | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"]
)
@pytest.mark.parametrize("absent", ["left out", "null"])
def test_a_size_that_is_missing_is_named(key, absent):
    config = CONFIG | {key: None}
    if absent == "left out":
        del config[key]
    with pytest.raises(UserError, match=f"config.json lacks {key}; fetch the file again"):
        from_config(config)


def test_more_layers_than_the_file_holds_are_refused_before_they_are_made(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1024}))
    monkeypatch.setattr(Transformer, "__init__", None)  # cannot be called
    began = time.perf_counter()
    with pytest.raises(UserError, match="model.pth holds 2 layers, not 1024; .*config.json"):
        load_model(path, "cpu")
    assert time.perf_counter() - began < 0.5


def test_the_largest_sizes_of_a_file_take_no_memory(tmp_path):
    path = write_checkpoint(tmp_path)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 2**24)
    sizes |= {"num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | sizes))
    began = time.perf_counter()
    with pytest.raises(UserError, match="tok_embeddings.weight is float .300, 48., not float"):
        load_model(path, "cpu")
    assert time.perf_counter() - began < 0.5


def test_a_config_that_is_no_json_object_is_refused(tmp_path):
    for text in ("{", "[]", '{"hidden_size": ', "null", "1" * 5000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json"):
            read_config(tmp_path)


# ------------------------------------------------------------------------------------------------
# Presets


@pytest.mark.parametrize(
    "name, parameters",  # as published, in millions
    [
        ("llama-2-7b", 6738.4),
        ("llama-2-13b", 13015.9),
        ("llama-2-70b", 68976.6),
        ("codellama-7b", 6738.5),
        ("codellama-34b", 33744.0),
        ("llama-3-8b", 8030.3),
        ("llama-3-70b", 70553.7),
        ("llama-3.1-8b", 8030.3),
        ("llama-3.1-405b", 405853.4),
        ("llama-3.2-1b", 1235.8),
        ("llama-3.2-3b", 3212.7),
        ("mistral-7b", 7241.7),
        ("tinyllama-1.1b", 1100.0),
        ("smollm2-135m", 134.5),
        ("smollm2-360m", 361.8),
        ("smollm2-1.7b", 1711.4),
        ("stories15m", 15.2),
        ("stories260k", 0.26),
        ("gemma-3-4b", 3880.1),
        ("phi-4-mini", 3836.0),
        ("olmoe-1b-7b", 6919.2),
        ("qwen3-30b-a3b", 30532.1),
    ],
)
def test_presets_have_the_published_size(name, parameters):
    with torch.device("meta"):
        model = Transformer(preset(name))
    if model.args.tied:
        model.output.weight = model.tok_embeddings.weight
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=2e-3)


def test_every_preset_can_be_read():
    assert len(preset_names()) == 30
    contexts = {name: preset(name).block_size for name in preset_names()}
    assert contexts["mistral-7b-v0.1"] == contexts["mistral-7b"] == 32768
    assert contexts["llama-3.1-8b"] == 131072 and contexts["stories260k"] == 512


def test_a_folder_without_config_is_taken_by_its_name(tmp_path):
    for folder, name in (
        ("Llama-2-7b-chat-hf", "llama-2-7b"),
        ("Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("CodeLlama-7b-Python-hf", "codellama-7b-python"),
        ("stories260K", "stories260k"),
    ):
        (tmp_path / folder).mkdir()
        assert read_config(tmp_path / folder) == preset(name)
    (tmp_path / "my-model").mkdir()
    with pytest.raises(UserError, match="my-model has no config.json.*stories260k"):
        read_config(tmp_path / "my-model")
