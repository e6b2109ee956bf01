"""GGUF files of every architecture that is known give the model that transformers has.

`gguf_files.json` is what llama.cpp's own convert_hf_to_gguf.py wrote of the same tiny models: the
metadata word for word, and the names of the tensors. Here a file is written from them by the gguf
package, whose table of names is independent of ours.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from cli import UserError
from conftest import ROOT, seldom
from engine import load_model
from families import read_config
from linear import Int4Linear, Linear
from scripts import convert_gguf
from scripts.gguf_config import ARCHITECTURES
from test_family_logits import CASES, LENGTH, VOCABULARY, difference, logits_of, random_hf

FILES = json.loads((ROOT / "tests" / "gguf_files.json").read_text())
# What a GGUF file does not say, and llama.cpp takes for granted.
NO_WINDOW = dict(sliding_window=None)
QWEN = NO_WINDOW | dict(use_sliding_window=False)
SPARSE = dict(mlp_only_layers=[], decoder_sparse_step=1)
GRANTED = {
    "mistral": NO_WINDOW,
    "mixtral": NO_WINDOW,
    "ministral3": NO_WINDOW,
    "smollm3": QWEN | dict(no_rope_layers=[1, 1, 1, 0]),
    "qwen2": QWEN | dict(rope_parameters=CASES["qwen2"]["rope_parameters"] | dict(truncate=True)),
    "qwen3": QWEN,
    "qwen3_moe": QWEN | SPARSE,
    "qwen2_moe": QWEN | SPARSE | dict(norm_topk_prob=False),
    "olmoe": dict(norm_topk_prob=False, rms_norm_eps=1e-5),
    "gemma3_text": dict(query_pre_attn_scalar=32, layer_types=None, num_hidden_layers=6),
}
PERMUTED = ("llama", "mistral3", "granite", "granitemoe", "smollm3")
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 125)), "ab"]


def published_model(family: str) -> transformers.PreTrainedModel:
    options = CASES.get(family, dict(attention_bias=True, mlp_bias=True))  # a llama
    options = options | GRANTED.get(family, {})
    return random_hf(family, {key: value for key, value in options.items() if value is not None})


def plain_tensors(model: transformers.PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Its tensors under names that the gguf package knows, gate and up of experts apart."""
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        layer = name.partition(".mlp.")[0].partition(".block_sparse_moe.")[0]
        if name.endswith(("experts.gate_up_proj", "input_linear.weight")):
            for part, half in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                yield f"{layer}.mlp.experts.{part}_proj", half
        elif name.endswith(("experts.down_proj", "output_linear.weight")):
            yield f"{layer}.mlp.experts.down_proj", tensor
        else:
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
            yield name.replace("router.weight", "router.layer.weight"), tensor


def gguf_tensors(model, arch: str) -> Iterator[tuple[str, Tensor]]:
    """What llama.cpp's converter stores."""
    config, layers = model.config, model.config.num_hidden_layers
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(architecture, layers + 1)
    for name, tensor in plain_tensors(model):
        if arch in PERMUTED and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = tensor.unflatten(0, (heads, 2, -1))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        kind = "" if name.endswith((".weight", ".bias")) else ".weight"
        yield names.get_name(name + kind, (".weight", ".bias")), tensor
    rope = config.rope_parameters
    for kind in ("long", "short") if "short_factor" in rope else ():
        yield f"rope_factors_{kind}.weight", torch.tensor(rope[f"{kind}_factor"])


def write(path: Path, model, family: str, change: dict | None = None) -> Path:
    """A file with the recorded metadata, `change` in their places."""
    arch, metadata = (FILES[family][key] for key in ("architecture", "metadata"))
    writer = gguf.GGUFWriter(path, arch)
    types = [3] * 3 + [1] * 93
    tokens = {"model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "token_type": types}
    tokens |= {"merges": ["a b"], "eos_token_id": 2}
    values = {f"{arch}.{key}": value for key, value in (metadata | (change or {})).items()}
    values |= {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, tensor in gguf_tensors(model, arch):
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", seldom(FILES, 3))
def test_a_gguf_file_gives_the_logits_of_transformers(family, tmp_path):
    model = published_model(family)
    file = write(tmp_path / "a.gguf", model, family)
    names = {re.sub(r"^blk\.\d+", "blk.{}", t.name) for t in gguf.GGUFReader(file).tensors}
    assert sorted(names) == FILES[family]["tensors"]  # as llama.cpp's converter writes them
    path = convert_gguf.convert(file, tmp_path / "model", torch.float32)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ours = logits_of(load_model(path, "cpu", torch.float32), ids)
    assert difference(ours, model(ids).logits) < 1e-4


def test_every_architecture_and_each_of_its_families_is_tried():
    assert {file["architecture"] for file in FILES.values()} == {*ARCHITECTURES}
    families = {arch.family for arch in ARCHITECTURES.values()}
    families |= {arch.other[0] for arch in ARCHITECTURES.values() if arch.other[0]}
    assert families == {*FILES} == {*CASES, "llama"}


# A change of the metadata that the model's text must feel, for what only some families have.
FELT = [
    ("ministral3", "rope.scaling.yarn_log_multiplier"),
    ("ministral3", "rope.scaling.yarn_beta_slow"),
    ("ministral3", "attention.temperature_scale"),
    ("granite", "embedding_scale"),
    ("granite", "residual_scale"),
    ("granite", "logit_scale"),
    ("granite", "attention.scale"),
    ("olmo3", "rope.scaling.yarn_attn_factor"),
    ("olmo3", "attention.sliding_window"),
    ("olmo3", "attention.sliding_window_pattern"),
    ("gemma3_text", "final_logit_softcapping"),
    ("gemma3_text", "attention.sliding_window"),
    ("gemma3_text", "rope.freq_base_swa"),
    ("gemma3_text", "rope.scaling.factor"),
    ("phi3", "rope.scaling.attn_factor"),
    ("glm4_moe", "expert_weights_scale"),
    ("glm4_moe", "expert_weights_norm"),
    ("glm4_moe", "expert_used_count"),
]


@pytest.mark.parametrize("family, key", seldom(FELT, 3))
def test_no_key_of_the_metadata_is_overlooked(family, key, tmp_path):
    change = {bool: lambda v: not v, int: lambda v: v - 1, float: lambda v: v * 4}
    value = FILES[family]["metadata"][key]
    changed = [not v for v in value] if isinstance(value, list) else change[type(value)](value)
    model, args = published_model(family), []
    for folder, options in (("as it is", {}), ("changed", {key: changed})):
        file = write(tmp_path / f"{folder}.gguf", model, family, options)
        convert_gguf.convert(file, tmp_path / folder)
        args.append(read_config(tmp_path / folder))
    assert args[0] != args[1]


@pytest.mark.parametrize(
    "family, change, named",
    [
        ("qwen3_moe", {"expert_gating_func": 2}, "expert_gating_func is 2, and only 1"),
        ("glm4_moe", {"expert_gating_func": 1}, "expert_gating_func is 1, and only 2"),
        ("glm4_moe", {"expert_group_count": 4}, "expert_group_count is 4, which is not"),
        (
            "qwen3_moe",
            {"expert_feed_forward_length": None},
            "lacks qwen3moe.expert_feed_forward",
        ),
        ("qwen3_moe", {"expert_count": 9}, "lacks blk.0.ffn_down_exps.8.weight"),
        ("qwen3_moe", {"expert_count": 7}, "ffn_gate_inp.weight|also holds blk.0.ffn_down_exps.7"),
        ("olmoe", {"attention.clamp_kqv": 8.0}, "clamp_kqv is 8.0, and only"),
        ("phi3", {"rope.scaling.attn_factor": None}, "lacks phi3.rope.scaling.attn_factor"),
        ("olmo3", {"attention.sliding_window_pattern": [True]}, "has 1 items, not 4"),
        ("qwen3", {"rope.scaling.original_context_length": None}, "original_context_length"),
    ],
)
def test_what_a_file_of_a_family_cannot_mean_is_refused(family, change, named, tmp_path):
    file = write(tmp_path / "a.gguf", published_model(family), family, change)
    with pytest.raises(UserError, match=named):
        convert_gguf.convert(file, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_experts_of_a_gguf_file_are_quantized_one_by_one(tmp_path):
    model = published_model("qwen3_moe")
    file = write(tmp_path / "a.gguf", model, "qwen3_moe")
    made = load_model(convert_gguf.convert(file, tmp_path / "int4", mode="int4"), "cpu")
    plain = load_model(convert_gguf.convert(file, tmp_path / "plain"), "cpu")
    for name, linear in made.named_modules():
        if isinstance(linear, Linear):
            assert type(linear) is Int4Linear
            exact = plain.get_submodule(name).weight.float()
            error = (linear.dequantize().float() - exact).square().mean()
            assert error < exact.square().mean() / 50, name
