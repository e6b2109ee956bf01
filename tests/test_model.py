"""The network equals Hugging Face's on every family, and a checkpoint loads or says why not."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import kernels
from checkpoint import find_device, upload
from cli import UserError
from conftest import CONFIG, ROOT, random_model, seldom, write_checkpoint
from engine import load_model
from families import from_config
from linear import Linear, linear_for
from model import Transformer
from quantize import quantize
from scripts.convert_hf_checkpoint import convert

SHAPE = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=128,
    max_position_embeddings=256,
    initializer_range=0.2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
MODELS = {
    "llama": ("Llama", {}),
    "llama multi-head": ("Llama", dict(num_key_value_heads=4)),
    "llama tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama head_dim": ("Llama", dict(head_dim=32)),
    "llama 3 scaling": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama linear scaling": ("Llama", dict(rope_parameters=LINEAR)),
    "llama biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=32)),
}


def hf_model(family: str, options: dict) -> transformers.PreTrainedModel:
    """A random model of transformers with norms and biases that are not trivial."""
    torch.manual_seed(1)
    config = getattr(transformers, family + "Config")(**SHAPE | options)
    model = getattr(transformers, family + "ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model.requires_grad_(False)


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("name, shards", seldom(itertools.product(MODELS, (1, 3)), 3))
def test_logits_equal_transformers(name, shards, tmp_path):
    theirs = hf_model(*MODELS[name])
    theirs.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "100KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    ours = load_model(convert(tmp_path, torch.float32), "cpu", torch.float32)

    tokens = torch.randint(128, (2, 150), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(150).expand(2, 150)
    expected = theirs(tokens).logits
    ours.setup_caches(2, 200)
    assert worst(ours(tokens, positions, ours.kv_steps(150)).logits, expected) < 1e-4
    ours.setup_caches(2, 200)  # an empty cache again
    for t in range(150):
        column = slice(t, t + 1)
        logits = ours(tokens[:, column], positions[:, column], ours.kv_steps(t + 1)).logits
        assert worst(logits, expected[:, column]) < 1e-4, t


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_tied_embedding_is_one_tensor_in_every_precision(precision, tmp_path):
    path = write_checkpoint(tmp_path, CONFIG | {"tie_word_embeddings": True}, torch.bfloat16)
    state = torch.load(path)
    del state["output.weight"]
    torch.save(state, path)
    model = load_model(path, "cpu", precision)
    assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()


def test_separate_q_k_v_of_older_files_load(tmp_path):
    path = write_checkpoint(tmp_path)
    whole = torch.load(path)
    split = {}
    for name, tensor in whole.items():
        if name.endswith("wqkv.weight"):
            for part, rows in zip("qkv", tensor.split((48, 16, 16)), strict=True):
                split[name.replace("wqkv", "w" + part)] = rows.clone()
        else:
            split[name] = tensor
    torch.save(split | {"rope.freqs": torch.zeros(4)}, path)
    loaded = load_model(path, "cpu", torch.float32).state_dict()
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_loading_maps_the_file_and_copies_nothing(tmp_path):
    path = write_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = load_model(path, "cpu")
    starts = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert max(starts) - min(starts) < path.stat().st_size  # all lie in one mapping of the file
    with open("/proc/self/maps") as maps:
        mapped = [line.split()[0].split("-") for line in maps if str(path) in line]
    low, high = int(mapped[0][0], 16), int(mapped[-1][1], 16)
    assert all(low <= start < high for start in starts)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_is_what_was_asked_for(precision, tmp_path):
    model = load_model(write_checkpoint(tmp_path), "cpu", precision)
    model.setup_caches(1, 16)
    logits = model(torch.tensor([[1]]), torch.tensor([[0]]), 16).logits
    assert (
        logits.dtype == precision and model.layers[0].attention.kv_cache.k_cache.dtype == precision
    )


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda path: path.unlink(), "there is no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4000]), "not a whole state dict"),
        (lambda path: path.write_bytes(b""), "not a whole state dict"),
        (lambda path: path.write_text("hello"), "not a whole state dict"),
        (lambda path: torch.save([1, 2], path), "not a whole state dict"),
        (lambda path: torch.save({"model": {}}, path), "not a whole state dict"),
        (
            lambda path: torch.save({"output.weight": torch.eye(3).to_sparse()}, path),
            "not a whole state dict",
        ),
        (lambda path: torch.save({1: torch.ones(1)}, path), "not a whole state dict"),
        (lambda path: torch.save({}, path), "holds 0 layers, not 2"),
        (
            lambda path: torch.save(torch.load(path) | {"layers.2.x": torch.ones(1)}, path),
            "holds 3 layers, not 2",
        ),
        (
            lambda path: torch.save(
                {"layers.0.x": torch.ones(1), "layers.1.x": torch.ones(1)}, path
            ),
            "lacks the tensor tok_embeddings.weight",
        ),
        (
            lambda path: torch.save(random_model(CONFIG | {"vocab_size": 301}).state_dict(), path),
            r"tok_embeddings.weight is float \[301, 48\], not float \[300, 48\]",
        ),
        (
            lambda path: torch.save(torch.load(path) | {"extra.weight": torch.zeros(1)}, path),
            "extra.weight",
        ),
        (lambda path: (path.parent / "config.json").write_text("{"), "config.json as JSON"),
    ],
)
def test_a_checkpoint_that_does_not_load_says_why(damage, named, tmp_path):
    path = write_checkpoint(tmp_path)
    damage(path)
    with pytest.raises(UserError, match=named):
        load_model(path, "cpu")


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = write_checkpoint(tmp_path)
    torch.save({"tok_embeddings.weight": Path("code")}, path)
    with pytest.raises(UserError, match="not a whole state dict"):
        load_model(path, "cpu")


@pytest.mark.slow
def test_tables_of_positions_are_exact_whatever_kernels_mkl_picks():
    # 9 is what threads may see on CPUs with AVX-512 while the first call of MKL's vector math is
    # still working out the CPU's type. It leads to kernels that are off by 1e-4.
    code = """
import dataclasses, torch
from conftest import CONFIG, random_model
from model import query_scales, rotations
(kind,) = random_model(CONFIG).args.kinds
angles = torch.outer(torch.arange(513.0), torch.tensor(kind.rope)).double()
exact = torch.stack((angles.cos(), angles.sin()), -1)
assert (rotations(kind, 513) - exact).abs().max() < 1e-6
scales = query_scales(dataclasses.replace(kind, query_scale=(0.5, 8)), 513, torch.device("cpu"))
exact = 1 + 0.5 * (torch.arange(513) // 8 + 1).double().log()
assert (scales.flatten() - exact).abs().max() < 1e-6
"""
    variables = os.environ | {"MKL_VML_DEBUG_CPU_TYPE": "9"}
    options = {"cwd": ROOT / "tests", "env": variables, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr


def test_kv_steps_cover_what_is_filled_and_little_more():
    model = Transformer(from_config(CONFIG))
    model.max_seq_length = 8000
    for length in range(1, 8001):
        steps = model.kv_steps(length)
        assert length <= steps <= min(max(length + 63, length * 9 / 8), 8000)
    assert len({model.kv_steps(length) for length in range(1, 8001)}) < 60


def test_bytes_per_step_counts_weights_once_and_the_cache():
    model = random_model(CONFIG | {"tie_word_embeddings": True}, torch.bfloat16)
    model.output.weight = model.tok_embeddings.weight
    model.setup_caches(3, 64)
    weights = 2 * sum(p.numel() for p in model.parameters())
    per_position = 2 * 2 * 2 * 8 * 2  # layers, keys and values, KV heads, head_dim, bytes
    assert model.bytes_per_step(0) == weights
    assert model.bytes_per_step(10) == weights + 3 * 10 * per_position


@pytest.mark.skipif(
    not kernels.supported(),
    reason="promised for kernels.py alone, which needs the bf16 instructions of AVX-512",
)
@pytest.mark.parametrize("scheme", [None, "int8", "int8-activation", "int4"])
def test_logits_in_bf16_are_the_same_bits_for_one_token_and_for_several(scheme):
    """So greedy text with speculation is that without it, also between nearly equal tokens."""
    config = CONFIG | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = random_model(config | {"intermediate_size": 1536}, torch.bfloat16, scale=0.02)
    for name, linear in list(model.named_modules()):
        if scheme and isinstance(linear, Linear):
            tensors = quantize(linear.weight, scheme, 32)
            stored = linear_for(linear, tensors)
            stored.load_state_dict(tensors, assign=True)
            model.set_submodule(name, stored)
    model.bfloat16().pack_weights()
    ids = torch.randint(300, (1, 90), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(90)[None]
    outcomes = []
    for step in (1, 6, 30):
        model.setup_caches(1, 128)
        assert model.layers[0].attention.kv_cache.has_kernels
        parts = zip(ids.split(step, 1), positions.split(step, 1), strict=True)
        logits = [model(idx, pos, model.kv_steps(int(pos.max()) + 1)).logits for idx, pos in parts]
        outcomes.append(torch.cat(logits, 1))
    assert torch.equal(outcomes[0], outcomes[1]) and torch.equal(outcomes[0], outcomes[2])


def test_a_device_that_is_not_here_is_refused(monkeypatch):
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(UserError, match=name):
            find_device(name)
    monkeypatch.setenv("DEVICE", "tpu")
    with pytest.raises(UserError, match="tpu"):
        find_device(None)
    monkeypatch.setenv("DEVICE", "cpu")
    assert find_device(None) == torch.device("cpu")


def test_weights_arrive_whole_through_small_buffers():
    generator = torch.Generator().manual_seed(0)
    state = {
        "bf16": torch.randn(33, 20, generator=generator).bfloat16(),
        "int8": torch.randint(-128, 128, (7, 9), dtype=torch.int8, generator=generator),
        "a part": torch.randn(16, 8, generator=generator)[:, 3:],
        "number": torch.tensor(2.5),
    }
    state["the same"] = state["bf16"]
    before = dict(state)
    upload(state, torch.device("cpu"), stage=64)
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
        assert state[name].data_ptr() != tensor.data_ptr()
    assert state["the same"] is state["bf16"]
