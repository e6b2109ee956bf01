"""Converters write tensor by tensor, quantized as quantize.py does it, and read fp8."""

import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

import cli
import process
import quantize
from cli import UserError
from conftest import ROOT, seldom
from engine import load_model
from scripts import convert_gguf, convert_hf_checkpoint
from test_convert import (
    K_PROJ,
    MODELS,
    SHAPE,
    assert_same,
    edit_config,
    edit_tensors,
    load,
    meta_state,
    publish,
    random_hf,
    write_gguf,
)

MODES = {
    "int8": "model_int8.pth",
    "int8-activation": "model_int8-activation.pth",
    "int4": "model_int4.g32.pth",
    "hybrid": "model_hybrid_int8_int4.g32.pth",
}


def quantized_afterwards(path: Path, mode: str, monkeypatch) -> Path:
    """What quantize.py makes of a model.pth."""
    flags = ["--checkpoint_path", path, "--mode", mode, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, flags)])
    process.run(quantize.main, quantize.make_parser())
    return path.with_name(MODES[mode])


@pytest.mark.parametrize("mode", seldom(MODES, 3))
@pytest.mark.parametrize(
    "name, source",
    [("llama biases", "sharded safetensors"), ("llama tied", "gguf"), ("qwen3", "bin")],
)
def test_converting_with_a_mode_gives_the_file_of_quantize(
    name, mode, source, tmp_path, monkeypatch
):
    # Every matrix is rounded in several pieces, whose ends are no ends of heads or of blocks.
    monkeypatch.setattr(convert_hf_checkpoint, "ROUNDED_AT_ONCE", 7 * 64)
    family, options = MODELS[name]
    model = random_hf(family, **options)
    if source == "gguf":
        file = write_gguf(tmp_path / "a.gguf", model, name.split()[0], Kind.F32)
        made = convert_gguf.convert(file, tmp_path / "ours", mode=mode)
        plain = convert_gguf.convert(file, tmp_path / "theirs")
    else:
        made = convert_hf_checkpoint.convert(publish(model, tmp_path / "ours", source), mode=mode)
        plain = convert_hf_checkpoint.convert(publish(model, tmp_path / "theirs", source))
    expected = quantized_afterwards(plain, mode, monkeypatch)
    assert made.name == expected.name and not made.with_name("model.pth").exists()
    ours, theirs = load(made), load(expected)
    assert [*ours] == [*theirs]
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and ours[key].equal(tensor), key
    wo = load_model(made, "cpu").layers[1].attention.wo  # mapped and assigned
    assert wo.weight.equal(theirs["layers.1.attention.wo.weight"])


# ------------------------------------------------------------------------------------------------
# Memory

# VmHWM is the most memory that the process has had; ru_maxrss would count the parent's as well.
# The first conversions load what is loaded once.
MEASURE = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from scripts import convert_gguf, convert_hf_checkpoint
convert_hf_checkpoint.ROUNDED_AT_ONCE = 2**16
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024
def convert(folder, source, mode):
    if source == "gguf":
        return convert_gguf.convert(folder / "a.gguf", folder, mode=mode)
    return convert_hf_checkpoint.convert(folder / source, mode=mode)
for source in ("safetensors", "bin", "gguf"):
    convert(Path({tiny!r}), source, "int4")
before = memory("VmRSS")
for source, mode in (("safetensors", "int4"), ("bin", "int8"), ("gguf", None)):
    path = convert(Path({folder!r}), source, mode)
    print(memory("VmHWM") - before, path.stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_below_twice_the_largest_tensor(tmp_path):
    sizes = dict(hidden_size=384, head_dim=96, num_key_value_heads=4, num_hidden_layers=10)
    config = transformers.LlamaConfig(**SHAPE | sizes | dict(intermediate_size=1536))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    for folder, published in (("tiny", random_hf().bfloat16()), ("large", model)):
        for source in ("safetensors", "bin"):
            publish(published, tmp_path / folder / source, source)
        write_gguf(tmp_path / folder / "a.gguf", published, "llama", Kind.BF16)
    folders = dict(tiny=str(tmp_path / "tiny"), folder=str(tmp_path / "large"))
    script = MEASURE.format(root=str(ROOT), **folders)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = max(parameter.nbytes for parameter in model.parameters())
    bound = 2 * largest + 11e6  # what rounding takes, however large the model is
    for line in done.stdout.splitlines():
        peak, total = map(int, line.split())
        assert peak < bound < total  # which any code that holds the state dict exceeds


# ------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "flags, named",
    [
        (
            ["--mode", "int4", "--groupsize", "128"],
            "--groupsize 128 does not divide the 64 columns",
        ),
        (["--mode", "int4-gptq"], "invalid choice: 'int4-gptq'"),
        (["--mode", "int8", "--precision", "float32"], "--mode int8 quantizes bfloat16"),
    ],
)
def test_a_mode_that_does_not_fit_is_one_line_and_leaves_no_file(flags, named, tmp_path):
    folder = publish(random_hf(), tmp_path / "model")
    before = sorted(folder.iterdir())
    parser = cli.Parser("")
    convert_hf_checkpoint.add_target_flags(parser)
    with pytest.raises(UserError, match=named) as caught:
        args = parser.parse_args(flags)
        precision = getattr(torch, args.precision)
        convert_hf_checkpoint.convert(folder, precision, args.mode, args.groupsize)
    assert "\n" not in str(caught.value) and sorted(folder.iterdir()) == before


def test_a_disk_without_room_is_named_before_anything_is_read(tmp_path, monkeypatch):
    folder = publish(random_hf(), tmp_path / "model")
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    reading = (pytest.fail("read") for _ in range(1))
    monkeypatch.setattr(convert_hf_checkpoint, "read_tensors", lambda *args: reading)
    with pytest.raises(UserError, match="cannot write 0.0 GB to .* 0.0 GB are free"):
        convert_hf_checkpoint.convert(folder)
    assert not list(folder.glob("*model.pth"))


def test_a_file_that_cannot_grow_is_a_user_error_and_leaves_the_old_one(tmp_path):
    folder = publish(random_hf(), tmp_path / "model")
    (folder / "model.pth").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match="cannot write"):
            convert_hf_checkpoint.convert(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in folder.glob("*.pth")] == ["model.pth"]
    assert (folder / "model.pth").read_bytes() == b"old"


# ------------------------------------------------------------------------------------------------
# Weights published in fp8

BLOCK = (24, 40)  # divides neither the rows nor the columns
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def publish_fp8(folder: Path) -> transformers.PreTrainedModel:
    """Publish a model with its blocks' Linears in fp8; the model with the values they stand for."""
    model = random_hf()
    publish(model, folder)
    state, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in state if "_proj.weight" in name]:
        weight = state[name]
        rows, columns = (
            torch.arange(n) // size for n, size in zip(weight.shape, BLOCK, strict=True)
        )
        scales = torch.rand(rows[-1] + 1, columns[-1] + 1) + 0.5
        state[name] = (weight * 100).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scales
        values[name] = state[name].float() * scales[rows][:, columns]
    save_file(state, folder / "model.safetensors")
    edit_config(folder, quantization_config=FP8 | {"weight_block_size": [*BLOCK]})
    model.load_state_dict(values, strict=False)
    return model


def split_scales(folder: Path) -> None:
    """Put the scales into a file of their own, as a shard may end between the two."""
    state = load_file(folder / "model.safetensors")
    scales = [name for name in state if name.endswith("_scale_inv")]
    save_file({name: state.pop(name) for name in scales}, folder / "model-2.safetensors")
    save_file(state, folder / "model-1.safetensors")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("split", [False, True])
def test_fp8_weights_are_multiplied_by_their_scales_and_rounded_once(split, tmp_path):
    model = publish_fp8(tmp_path / "model")
    if split:
        split_scales(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        path = convert_hf_checkpoint.convert(tmp_path / "model", dtype)
        assert_same(load(path), {name: t.to(dtype) for name, t in meta_state(model).items()})


def test_fp8_weights_are_quantized_as_the_bf16_model_would_be(tmp_path, monkeypatch):
    publish_fp8(tmp_path / "model")
    made = convert_hf_checkpoint.convert(tmp_path / "model", mode="int4")
    ours = {key: tensor.clone() for key, tensor in load(made).items()}
    plain = convert_hf_checkpoint.convert(tmp_path / "model")
    assert_same(ours, load(quantized_afterwards(plain, "int4", monkeypatch)))


SCALE = "model.layers.1.self_attn.k_proj.weight_scale_inv"
FP8_MISTAKES = {
    "gptq": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "'gptq'"),
    "compressed tensors": (
        lambda f: edit_config(f, quantization_config={"quant_method": "compressed-tensors"}),
        "quant_method is 'compressed-tensors', and of quantized weights only fp8 is read",
    ),
    "no method": (lambda f: edit_config(f, quantization_config={}), "quant_method is None"),
    "no object": (lambda f: edit_config(f, quantization_config="fp8"), "is 'fp8', not an object"),
    "a scale a tensor": (
        lambda f: edit_config(f, quantization_config=FP8 | {"weight_block_size": None}),
        "weight_block_size is None, not rows and columns of a block",
    ),
    "a block of nothing": (
        lambda f: edit_config(f, quantization_config=FP8 | {"weight_block_size": [128, 0]}),
        "weight_block_size is [128, 0]",
    ),
    "another block": (
        lambda f: edit_config(f, quantization_config=FP8 | {"weight_block_size": [64, 64]}),
        "ask for [1, 1]",
    ),
    "no scale": (
        lambda f: edit_tensors(f, lambda s: s.pop(SCALE)),
        "k_proj.weight is torch.float8_e4m3fn, no plain floats",
    ),
    "scales of floats": (
        lambda f: edit_tensors(f, lambda s: s.update({K_PROJ: s[K_PROJ].float()})),
        "k_proj.weight is torch.float32 and its scales torch.float32, no fp8",
    ),
    "a scale of nothing": (
        lambda f: edit_tensors(
            f, lambda s: s.update({"model.extra.weight_scale_inv": s[SCALE].clone()})
        ),
        "also holds model.extra.weight_scale_inv",
    ),
    "a NaN": (
        lambda f: edit_tensors(f, lambda s: s[SCALE].view(-1)[:1].fill_(float("nan"))),
        "k_proj.weight has values that are NaN or infinite in bfloat16",
    ),
    "scales without a configuration": (
        lambda f: edit_config(f, quantization_config=None),
        "also holds model.layers.0.mlp.down_proj.weight_scale_inv",
    ),
}


@pytest.mark.parametrize("mistake", FP8_MISTAKES)
def test_quantized_weights_that_are_not_understood_are_named(mistake, tmp_path):
    spoil, named = FP8_MISTAKES[mistake]
    publish_fp8(tmp_path / "model")
    spoil(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        convert_hf_checkpoint.convert(tmp_path / "model")
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before
