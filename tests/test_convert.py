"""Converted checkpoints hold the published weights in Meta's layout, and bad ones are named."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from cli import UserError
from commands import python
from conftest import ROOT, seldom
from engine import load_model
from families import from_config, read_config
from scripts import convert_gguf, convert_hf_checkpoint
from tokenizer import Tokenizer

SHAPE = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=300,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    initializer_range=0.2,
)
MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(head_dim=32)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=32)),
}

# ------------------------------------------------------------------------------------------------
# What is published


def random_hf(family: str = "Llama", **options) -> transformers.PreTrainedModel:
    """A random model in which no norm and no bias is trivial."""
    torch.manual_seed(3)
    settings = SHAPE | options
    if family == "Qwen2":
        del settings["head_dim"]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model.requires_grad_(False)


def publish(model, folder: Path, kind: str = "safetensors") -> Path:
    """Save as it lies on the hub: safetensors or bin, in one file or in several."""
    if "safetensors" in kind:
        model.save_pretrained(folder, max_shard_size="40KB" if "sharded" in kind else "1GB")
        return folder
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2]}
    shards["pytorch_model-00002-of-00002.bin"] = names[1::2]
    for file, held in shards.items():
        torch.save({name: state[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def interleaved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Meta's order, row by row: 2i is row i of the head, 2i + 1 is row i + head_dim/2."""
    rows = []
    for head in range(0, len(tensor), head_dim):
        for i in range(head_dim // 2):
            rows += [head + i, head + i + head_dim // 2]
    return tensor[rows]


def meta_state(model) -> dict[str, torch.Tensor]:
    """What `model.pth` has to hold, spelled out."""
    hf, head_dim = model.state_dict(), model.model.layers[0].self_attn.head_dim
    state = {
        "tok_embeddings.weight": hf["model.embed_tokens.weight"],
        "norm.weight": hf["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        state["output.weight"] = hf["lm_head.weight"]
    renamed = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for i in range(model.config.num_hidden_layers):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            for source, target in renamed.items():
                if f"{old}{source}.{kind}" in hf:
                    state[f"{new}{target}.{kind}"] = hf[f"{old}{source}.{kind}"]
            if f"{old}self_attn.q_proj.{kind}" in hf:
                q, k, v = (hf[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv")
                fused = torch.cat([interleaved(q, head_dim), interleaved(k, head_dim), v])
                state[f"{new}attention.wqkv.{kind}"] = fused
        for norm in ("q_norm", "k_norm"):
            if f"{old}self_attn.{norm}.weight" in hf:
                weight = interleaved(hf[f"{old}self_attn.{norm}.weight"], head_dim)
                state[f"{new}attention.{norm}.weight"] = weight
    return state


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def assert_same(state: dict, expected: dict) -> None:
    assert type(state) is dict and state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)


def assert_logits(path: Path, model) -> None:
    """The network reads what was converted as transformers reads what was published."""
    ours = load_model(path, "cpu", torch.float32)
    ours.setup_caches(2, 64)
    idx = torch.randint(0, model.config.vocab_size, (2, 40))
    logits = ours(idx, torch.arange(40).expand(2, 40), ours.kv_steps(40)).logits
    expected = model(idx).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


# ------------------------------------------------------------------------------------------------
# From Hugging Face


@pytest.mark.parametrize("kind", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_arrives_at_its_place(name, kind, tmp_path):
    family, options = MODELS[name]
    model = random_hf(family, **options)
    folder = publish(model, tmp_path / "model", kind)
    assert ("sharded" in kind) == (len(list(folder.glob("*-of-*"))) > 1)
    path = convert_hf_checkpoint.convert(folder, torch.float32)
    assert path == folder / "model.pth"
    assert_same(load(path), meta_state(model))
    assert_logits(path, model)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_values_are_rounded_once(precision, tmp_path):
    model, dtype = random_hf(), getattr(torch, precision)
    folder = publish(model, tmp_path / "model")
    command = [*python(), ROOT / "scripts" / "convert_hf_checkpoint.py"]
    command += ["--checkpoint_dir", folder, "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == str(folder / "model.pth")
    state = load(folder / "model.pth")
    assert_same(state, {name: t.to(dtype) for name, t in meta_state(model).items()})


def test_bfloat16_is_the_default(tmp_path):
    state = load(convert_hf_checkpoint.convert(publish(random_hf(), tmp_path / "model")))
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_what_is_computed_or_there_twice_is_left_out(tmp_path):
    model = random_hf(tie_word_embeddings=True)
    folder = publish(model, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.rotary_emb.inv_freq"] = torch.ones(8)
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, folder / "model.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(1)}, folder / "consolidated.safetensors")
    assert_same(load(convert_hf_checkpoint.convert(folder, torch.float32)), meta_state(model))
    # An index may have been left out of the folder, too.
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert_same(load(convert_hf_checkpoint.convert(folder, torch.float32)), meta_state(model))


def edit_tensors(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_index(folder: Path, file) -> None:
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(content))


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
MISTAKES = {
    "missing tensor": ("safetensors", lambda f: edit_tensors(f, lambda s: s.pop(K_PROJ)), K_PROJ),
    "unknown tensor": (
        "safetensors",
        lambda f: edit_tensors(f, lambda s: s.update({"model.extra": torch.ones(1)})),
        "model.extra",
    ),
    "sparse": (
        "bin",
        lambda f: torch.save(
            torch.load(f / "pytorch_model.bin") | {K_PROJ: torch.ones(32, 64).to_sparse()},
            f / "pytorch_model.bin",
        ),
        f"{K_PROJ} is torch.float32, no plain floats",
    ),
    "wrong shape": (
        "safetensors",
        lambda f: edit_tensors(f, lambda s: s.update({K_PROJ: torch.ones(16, 64)})),
        K_PROJ,
    ),
    "no float": (
        "safetensors",
        lambda f: edit_tensors(f, lambda s: s.update({K_PROJ: s[K_PROJ].to(torch.int8)})),
        K_PROJ,
    ),
    "truncated safetensors": (
        "sharded safetensors",
        lambda f: truncate(sorted(f.glob("*.safetensors"))[-1]),
        "of-",
    ),
    "missing shard": (
        "sharded safetensors",
        lambda f: sorted(f.glob("*.safetensors"))[1].unlink(),
        "model-00002-of-",
    ),
    "truncated bin": ("bin", lambda f: truncate(f / "pytorch_model.bin"), "pytorch_model.bin"),
    "missing bin shard": (
        "sharded bin",
        lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink(),
        "pytorch_model-00002-of-00002.bin",
    ),
    "code in a bin": (
        "bin",
        lambda f: torch.save({"a": Path("/")}, f / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
    "no state dict": ("bin", lambda f: torch.save([1], f / "pytorch_model.bin"), "model.bin"),
    "index without a map": (
        "sharded bin",
        lambda f: (f / "pytorch_model.bin.index.json").write_text("{}"),
        "index.json",
    ),
    "file of the index": (
        "sharded bin",
        lambda f: edit_index(f, 7),
        "weight_map has 7 for",
    ),
    "absolute path in the index": (
        "sharded bin",
        lambda f: edit_index(f, str(f / "pytorch_model-00001-of-00002.bin")),
        "weight_map has '/",
    ),
    "path out of the folder in the index": (
        "sharded bin",
        lambda f: edit_index(f, "../pytorch_model-00001-of-00002.bin"),
        r"weight_map has '../pytorch",
    ),
    "empty index": (
        "sharded bin",
        lambda f: (f / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}'),
        "index.json",
    ),
    "names that are none": (
        "bin",
        lambda f: torch.save({1: torch.ones(1)}, f / "pytorch_model.bin"),
        "lacks lm_head.weight",
    ),
    "a NaN": (
        "safetensors",
        lambda f: edit_tensors(f, lambda s: s[K_PROJ].view(-1)[5:6].fill_(float("nan"))),
        f"{K_PROJ} has values that are NaN or infinite in bfloat16",
    ),
    "an infinity": (
        "safetensors",
        lambda f: edit_tensors(f, lambda s: s["model.norm.weight"][2:3].fill_(float("-inf"))),
        "model.norm.weight has values that are NaN or infinite",
    ),
    "more layers than the file": (
        "safetensors",
        lambda f: edit_config(f, num_hidden_layers=1024),
        "lacks model.layers.10.",
    ),
    "layers without end": (
        "safetensors",
        lambda f: edit_config(f, num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000, not a count",
    ),
    "a vocabulary that no file holds": (
        "safetensors",
        lambda f: edit_config(f, vocab_size=2**24, hidden_size=2**24, intermediate_size=2**24),
        "model.embed_tokens.weight is [300, 64], and",
    ),
    "no weights": ("safetensors", lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "no config": ("safetensors", lambda f: (f / "config.json").unlink(), "config.json"),
    "no folder": ("safetensors", shutil.rmtree, "download"),
    "quantized": (
        "safetensors",
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config.quant_method is 'gptq', and of quantized weights only fp8 is read",
    ),
    # The weights are gone as well: a family must be refused before they are looked at.
    "unknown family": (
        "safetensors",
        lambda f: (edit_config(f, model_type="gemma2"), (f / "model.safetensors").unlink()),
        "gemma2",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_checkpoint_is_named_and_nothing_is_written(mistake, tmp_path):
    kind, spoil, named = MISTAKES[mistake]
    folder = publish(random_hf(), tmp_path / "model", kind)
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        convert_hf_checkpoint.convert(folder)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


GATE_UP = "model.layers.1.mlp.gate_up_proj.weight"


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda s: s.update({GATE_UP: torch.ones(191, 64)}), "lacks model.layers.1.mlp.gate_proj"),
        (lambda s: s.update({GATE_UP: torch.ones(190, 64)}), r"gate_proj.weight is \[95, 64\]"),
        (lambda s: s.pop("model.layers.0.self_attn.qkv_proj.weight"), "lacks .*qkv_proj"),
        (lambda s: s.pop("model.embed_tokens.weight"), "lacks model.embed_tokens.weight"),
    ],
)
def test_fused_and_tied_tensors_that_do_not_fit_are_named(change, named, tmp_path):
    shape = {key: SHAPE[key] for key in SHAPE if key != "head_dim"}
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**shape, pad_token_id=0))
    folder = publish(model, tmp_path / "model")
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=named):
        convert_hf_checkpoint.convert(folder)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    folder = publish(random_hf(), tmp_path / "model")
    (folder / "model.pth").write_bytes(b"old")

    def fill_disk(state, file):
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:  # as the archive does when it is closed
            raise RuntimeError("unexpected pos 64 vs 0\nand more lines")

    monkeypatch.setattr(torch, "save", fill_disk)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="No space left on device.* is there room"):
        convert_hf_checkpoint.convert(folder)
    assert (folder / "model.pth").read_bytes() == b"old" and sorted(folder.iterdir()) == before


def test_a_value_beyond_the_precision_is_named(tmp_path):
    folder = publish(random_hf(), tmp_path / "model")
    edit_tensors(folder, lambda s: s[K_PROJ].view(-1)[5:6].fill_(1e6))
    with pytest.raises(UserError, match="k_proj.weight .* infinite in float16"):
        convert_hf_checkpoint.convert(folder, torch.float16)
    assert convert_hf_checkpoint.convert(folder, torch.bfloat16).exists()


@pytest.mark.parametrize("script", ["convert_hf_checkpoint.py", "convert_gguf.py"])
def test_a_mistake_is_one_line_and_exit_code_2(script, tmp_path):
    command = [*python(), ROOT / "scripts" / script, "--checkpoint_dir", "nowhere"]
    command += ["--gguf", "none.gguf"] if "gguf" in script else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# GGUF files as llama.cpp's converter writes them

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": BYTES + ["ab", "<|im_start|>", "<|im_end|>"],
    "token_type": [1] * 257 + [3, 3],
    "merges": ["a b"],
    "bos_token_id": 257,
    "eos_token_id": 258,
}


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def add_metadata(writer, config, extra: dict) -> None:
    """The keys that llama.cpp's converter writes; `extra` comes last and may replace any."""
    rope = config.rope_parameters
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
    }
    if getattr(config, "head_dim", None):
        values |= {"attention.key_length": config.head_dim}
        values |= {"attention.value_length": config.head_dim}
        values |= {"rope.dimension_count": config.head_dim}
    values = {f"{writer.arch}.{key}": value for key, value in values.items()}
    values |= {f"tokenizer.ggml.{key}": value for key, value in TOKENS.items()}
    for key, value in (values | extra).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)


def write_gguf(path: Path, model, arch: str, kind=Kind.F32, extra=None, tensors=None) -> Path:
    """Write the model as llama.cpp's converter does: norms and biases stay in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    add_metadata(writer, config, extra or {})
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # as LlamaModel.permute there
            halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        values = tensor.float().numpy()
        here = kind if values.ndim > 1 else Kind.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(values, here), raw_dtype=here)
    for name, (values, raw_dtype) in (tensors or {}).items():
        writer.add_tensor(name, values, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def requantized(model, kind):
    """The model with the values that are left of its matrices after quantization."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            values = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
            parameter.data = torch.from_numpy(values.copy())
    model.tie_weights()
    return model


def arch_of(name: str) -> str:
    return "llama" if name == "mistral" else name.split()[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_gives_what_the_published_files_give(name, tmp_path):
    family, options = MODELS[name]
    options = options | dict(rope_theta=500000.0)
    model = random_hf(family, **options)
    file = write_gguf(tmp_path / "a.gguf", model, arch_of(name))
    path = convert_gguf.convert(file, tmp_path / "ours", torch.float32)
    theirs = convert_hf_checkpoint.convert(publish(model, tmp_path / "theirs"), torch.float32)
    assert_same(load(path), load(theirs))
    assert_logits(path, model)
    ours, expected = (read_config(tmp_path / folder) for folder in ("ours", "theirs"))
    # GGUF does not know Mistral's window, shorter or longer
    assert ours == dataclasses.replace(expected, block_size=256)


KINDS = [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]


@pytest.mark.parametrize("kind", seldom(KINDS, 3, lambda kind: kind.name))
@pytest.mark.parametrize("name", ["llama tied", "qwen2"])
def test_quantized_weights_become_floats_again(name, kind, tmp_path):
    family, options = MODELS[name]
    # Once with an embedding so large that it is read in more than one piece.
    rows = 20000 if kind == Kind.Q4_0 else 300
    model = random_hf(family, **options, vocab_size=rows)
    extra = {"tokenizer.ggml.token_type": [1] * 257 + [3] * (rows - 257)}
    extra["tokenizer.ggml.tokens"] = [*TOKENS["tokens"], *map("[PAD{}]".format, range(rows - 259))]
    file = write_gguf(tmp_path / "a.gguf", model, arch_of(name), kind, extra)
    state = load(convert_gguf.convert(file, tmp_path / "model", torch.float32))
    assert_same(state, meta_state(requantized(model, kind)))


def test_the_configuration_is_written_as_published(tmp_path):
    model = random_hf(tie_word_embeddings=True)
    folder = tmp_path / "model"
    extra = {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.eot_token_id": 257,
        "tokenizer.ggml.eom_token_id": 258,
    }
    convert_gguf.convert(write_gguf(tmp_path / "a.gguf", model, "llama", extra=extra), folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5  # in float32 it is 9.999999747378752e-06
    assert config["tie_word_embeddings"] is True and config["torch_dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"]) == (257, 258)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [258, 257]
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokens["chat_template"] == "{{ messages }}"
    assert (tokens["bos_token"], tokens["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.pth",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight, wave length by wave length."""
    divisors = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * theta ** (i / head_dim)
        smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
        inside = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wave < 8192 / 4 else factor if wave > 8192 else inside)
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_in_the_divisors(factor, tmp_path):
    scaling = dict(rope_type="llama3", rope_theta=500000.0, factor=factor)
    scaling |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    scaling |= dict(original_max_position_embeddings=8192)
    model = random_hf(rope_parameters=scaling, head_dim=64)
    divisors = {"rope_freqs.weight": (llama3_divisors(64, 5e5, factor), None)}
    file = write_gguf(tmp_path / "a.gguf", model, "llama", tensors=divisors)
    convert_gguf.convert(file, tmp_path / "model")
    (ours,) = read_config(tmp_path / "model").kinds
    (expected,) = from_config(model.config.to_dict()).kinds
    assert ours.rope == pytest.approx(expected.rope, rel=1e-5) and ours.rope[-1] < expected.rope[0]


def test_linear_scaling_is_kept(tmp_path):
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = write_gguf(tmp_path / "a.gguf", random_hf(), "llama", extra=extra)
    convert_gguf.convert(file, tmp_path / "model")
    (scaled,) = read_config(tmp_path / "model").kinds
    (plain,) = from_config(random_hf().config.to_dict()).kinds
    assert scaled.rope == tuple(frequency / 4 for frequency in plain.rope)


UNKNOWN_KIND = {"blk.0.attn_x.weight": (np.ones((2, 2), np.int8), None)}
GGUF_MISTAKES = {
    "architecture": (dict(arch="gemma2"), "gemma2"),
    "split": (dict(extra={"split.count": 2}), "merge"),
    "mixture of experts": (
        dict(arch="qwen2", extra={"qwen2.expert_count": 8}),
        "expert_count is 8, of a 'qwen2' model with a mixture of experts",
    ),
    "gating of experts": (dict(extra={"llama.expert_gating_func": 2}), "gating_func is 2"),
    "partial rotation": (dict(extra={"llama.rope.dimension_count": 8}), "rotary_factor is 0.5"),
    "cap on scores": (dict(extra={"llama.attn_logit_softcapping": 50.0}), "softcapping is 50.0"),
    "longrope without factors": (
        dict(extra={"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}),
        "scaling.type is 'longrope'",
    ),
    "yarn from nowhere": (
        dict(extra={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}),
        "lacks llama.rope.scaling.original_context_length",
    ),
    "other divisors": (
        dict(tensors={"rope_freqs.weight": (np.array([1, 5, 2, 3, 1, 1, 1, 8], np.float32), None)}),
        "rope_freqs",
    ),
    "unknown tensor": (dict(tensors=UNKNOWN_KIND), "blk.0.attn_x.weight"),
    "missing tensor": (dict(extra={"llama.block_count": 3}), "blk.2.attn_k.weight"),
    "wrong shape": (dict(extra={"llama.feed_forward_length": 64}), "blk.0.ffn_"),
    "no context length": (dict(extra={"llama.context_length": None}), "context_length"),
    "tokenizer": (dict(extra={"tokenizer.ggml.model": "rwkv"}), "rwkv"),
    "pre-tokenizer": (dict(extra={"tokenizer.ggml.pre": "tekken"}), "tekken"),
    "merges": (dict(extra={"tokenizer.ggml.merges": ["never seen"]}), "merges"),
    "a merge without a space": (
        dict(extra={"tokenizer.ggml.merges": ["a b", "ab"]}),
        "merge 'ab' has no space",
    ),
    "merges that are numbers": (dict(extra={"tokenizer.ggml.merges": [1]}), "ggml.merges is"),
    "layers without end": (
        dict(extra={"llama.block_count": 10**9}),
        "llama.block_count is 1000000000, not a count",
    ),
    "no heads": (dict(extra={"llama.attention.head_count": 0}), "head_count is 0, not a count"),
    "heads by layer": (
        dict(extra={"llama.attention.head_count": [4, 4]}),
        r"head_count is \[4, 4\], not a count",
    ),
    "text for heads": (dict(extra={"llama.attention.head_count": "4"}), "head_count is '4'"),
    "text for KV heads": (dict(extra={"llama.attention.head_count_kv": "2"}), "count_kv is '2'"),
    "no dimensions": (dict(extra={"llama.embedding_length": 0}), "embedding_length is 0"),
    "odd heads": (dict(extra={"llama.attention.head_count_kv": 3}), "head_count_kv is 3"),
    "text for eps": (
        dict(extra={"llama.attention.layer_norm_rms_epsilon": "small"}),
        "layer_norm_rms_epsilon is 'small', not a number",
    ),
    "NaN for eps": (
        dict(extra={"llama.attention.layer_norm_rms_epsilon": float("nan")}),
        "layer_norm_rms_epsilon is nan, not a number",
    ),
    "infinite rope": (dict(extra={"llama.rope.freq_base": float("inf")}), "freq_base is inf"),
    "empty matrix": (
        dict(tensors={"blk.0.attn_x.weight": (np.ones((2, 0), np.float32), None)}),
        "blk.0.attn_x.weight has no values",
    ),
    "EOS beyond the tokens": (
        dict(extra={"tokenizer.ggml.eos_token_id": 259}),
        "eos_token_id is 259, not the id of one of 259 tokens",
    ),
    "BOS that is a text": (dict(extra={"tokenizer.ggml.bos_token_id": "<s>"}), "bos_token_id is"),
    "too few token types": (
        dict(extra={"tokenizer.ggml.token_type": [1, 1, 3]}),
        "token_type is .* 3 items, not 259",
    ),
    "tokens that are numbers": (dict(extra={"tokenizer.ggml.tokens": [1, 2]}), "ggml.tokens is"),
    "too few scores": (
        dict(extra={"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, 1.0]}),
        "scores is .* 2 items, not 259",
    ),
    "a template that is no text": (
        dict(extra={"tokenizer.chat_template": 3}),
        "chat_template is 3",
    ),
    "a flag that is none": (dict(extra={"tokenizer.ggml.add_bos_token": 3}), "add_bos_token is 3"),
    "a NaN": (
        dict(tensors={"output_norm.weight": (np.full(64, np.nan, np.float32), None)}, drop="norm"),
        "output_norm.weight has values that are NaN or infinite",
    ),
}


@pytest.mark.parametrize("mistake", GGUF_MISTAKES)
def test_a_gguf_that_is_not_understood_is_refused(mistake, tmp_path):
    options, named = GGUF_MISTAKES[mistake]
    options, model = {"arch": "llama"} | options, random_hf()
    if name := options.pop("drop", None):
        delattr(model.model, name)
    file = write_gguf(tmp_path / "a.gguf", model, **options)
    with pytest.raises(UserError, match=named) as caught:
        convert_gguf.convert(file, tmp_path / "model")
    assert "\n" not in str(caught.value) and not (tmp_path / "model").exists()


def test_an_unknown_quantization_is_named(tmp_path):
    model = random_hf()
    del model.model.layers[1].mlp.up_proj.weight
    raw = np.zeros((96, 2 * 40), np.uint8)  # 40 bytes for each block of 32
    tensors = {"blk.1.ffn_up.weight": (raw, Kind.Q8_1)}
    file = write_gguf(tmp_path / "a.gguf", model, "llama", tensors=tensors)
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight is Q8_1"):
        convert_gguf.convert(file, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4" * 100, "header", "half", "nearly"])
def test_a_file_that_is_no_whole_gguf_is_refused(content, tmp_path):
    file = tmp_path / "a.gguf"
    if isinstance(content, str):
        write_gguf(file, random_hf(), "llama")
        size = file.stat().st_size
        keep = {"header": 3000, "half": size // 2, "nearly": size - 1}[content]
        content = file.read_bytes()[:keep]
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.gguf"):
        convert_gguf.convert(file, tmp_path / "model")
    assert list(tmp_path.iterdir()) == [file]


def test_one_part_of_several_is_refused_by_its_name(tmp_path):
    file = write_gguf(tmp_path / "a-00002-of-00003.gguf", random_hf(), "llama")
    with pytest.raises(UserError, match="merge"):
        convert_gguf.convert(file, tmp_path / "model")


def test_model_pth_comes_last(tmp_path, monkeypatch):
    """Where model.pth is, the folder is whole."""
    file = write_gguf(tmp_path / "a.gguf", random_hf(), "llama")
    write_bytes = Path.write_bytes

    def fail(path, content):
        if "tokenizer.json" in path.name:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises((OSError, UserError)):
        convert_gguf.convert(file, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.pth"))
    assert not list((tmp_path / "model").glob(".*"))


# ------------------------------------------------------------------------------------------------
# Tokenizers out of a GGUF file

CORPUS = [path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))]
TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock; we'LL see.",
    "  two  spaces\tand\n\n\r\nnew lines  \n",
    "naïve café \u00e9 e\u0301 \ufb01 \u00a0 Straße 世界 \U0001f600\u200d\U0001f680",
    "def f(x):\n    return x + 1  # 3.14159",
    "<|im_start|>user\nhi<|im_end|>\n<tool> <s></s> <0x41>",
    "in two words: qzqz qzqzq 128 1285",
    *"".join(CORPUS).splitlines()[:300],
]
# The word patterns as published in the tokenizer.json of Llama 3 and of Qwen 2.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def published_tokenizer(pre: str) -> tokenizers.Tokenizer:
    """A trained tokenizer put together as the published one of this kind is."""
    level = pre_tokenizers.ByteLevel
    words = {"llama-bpe": LLAMA3_WORDS, "qwen2": QWEN2_WORDS}.get(pre)
    # Trained on larger words than it is to see, so that cutting them otherwise gives other tokens.
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=level.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"] | {"Ġqzqz": len(model["vocab"])}  # a word that no merges lead to
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer.model = models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if words:
        split = pre_tokenizers.Split(Regex(words), "isolated")
        steps = [split, level(add_prefix_space=False, use_regex=False)]
    else:
        steps = [level(add_prefix_space=False, use_regex=True)]
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), *steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def metadata_of(tokenizer: tokenizers.Tokenizer, pre: str) -> dict:
    """The keys under tokenizer.ggml that llama.cpp's converter makes of a tokenizer.json."""
    content = json.loads(tokenizer.to_str())
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.get)
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [{None: 1, True: 3, False: 4}[special.get(token)] for token in tokens],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_a_byte_level_tokenizer_comes_back(pre, tmp_path):
    published = published_tokenizer(pre)
    extra = metadata_of(published, pre)
    file = write_gguf(tmp_path / "a.gguf", random_hf(vocab_size=1000), "llama", extra=extra)
    folder = convert_gguf.convert(file, tmp_path / "model").parent
    ours = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = [published.token_to_id("<|im_start|>")] if pre == "llama-bpe" else []
    for text in TEXTS:
        ids = published.encode(text).ids
        assert ours.encode(text, add_special_tokens=False).ids == ids
        assert ours.encode(text).ids == bos + ids
        for skip in (True, False):
            same = ours.decode(ids, skip_special_tokens=skip)
            assert same == published.decode(ids, skip_special_tokens=skip)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("Hello 123") == bos + published.encode("Hello 123").ids
    assert tokenizer.eos_ids == {published.token_to_id("<|im_end|>")}


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> sentencepiece.SentencePieceProcessor:
    """A trained SentencePiece model with the settings of Llama 2's."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(CORPUS).splitlines()),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|im_end|>"],
        user_defined_symbols=["<tool>", "two\u2581words"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


@pytest.mark.parametrize("space_prefix", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(space_prefix, sentencepiece_model, tmp_path):
    published = sentencepiece_model
    kinds = {"is_unknown": 2, "is_control": 3, "is_unused": 5, "is_byte": 6}
    types, tokens = [], [published.id_to_piece(i) for i in range(len(published))]
    for i, token in enumerate(tokens):
        kind = next((kind for test, kind in kinds.items() if getattr(published, test)(i)), 1)
        if token in ("<tool>", "two\u2581words"):
            kind, tokens[i] = 4, token.replace("\u2581", " ")
        types.append(kind)
    values = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [published.get_score(i) for i in range(len(tokens))],
        "token_type": types,
        "merges": None,
        "bos_token_id": published.bos_id(),
        "eos_token_id": published.eos_id(),
        "add_space_prefix": space_prefix,
    }
    extra = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    file = write_gguf(tmp_path / "a.gguf", random_hf(vocab_size=1000), "llama", extra=extra)
    folder = convert_gguf.convert(file, tmp_path / "model").parent
    model_file = str(folder / "tokenizer.model")
    ours = sentencepiece.SentencePieceProcessor(model_file=model_file)
    special = ("bos_id", "eos_id", "unk_id", "pad_id")
    assert [getattr(ours, x)() for x in special] == [getattr(published, x)() for x in special]
    if not space_prefix:
        # Without a space put before it, a text is cut as after a space of its own.
        assert not ours.encode("Hello", out_type=str)[0].startswith("\u2581")
        assert ours.encode(" Hello there") == published.encode("Hello there")
        return
    for text in TEXTS:
        ids = published.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == published.decode(ids)
    tokenizer = Tokenizer.from_folder(folder)
    expected = [published.bos_id(), *published.encode("Hello there")]
    assert tokenizer.encode("Hello there") == expected
    assert tokenizer.eos_ids == {published.eos_id()}
