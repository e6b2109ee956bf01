"""The models of gpu_check.py, with random weights, and the modes: who runs their steps."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
import linear
import model
from engine import Engine, Sampling
from families import from_config, preset, preset_names
from linear import FEW_ROWS, Int8ActivationLinear
from model import ModelArgs, Transformer
from scripts.random_weights import empty_model, fill, linears

# fused: what Engine chooses. operators: modules on this project's operators. torch: modules on
# PyTorch's own operations. pdl: the fused step with programmatic dependent launch, on GPUs that
# have it. block: modules on the operators, in one compiled block. All but torch, the reference, are
# captured as CUDA graphs.
MODES = ("fused", "operators", "torch", "pdl", "block")
SCHEMES = ("bf16", "int8", "int8-activation", "int4 g32", "int4 g128")
GREEDY, WARM = Sampling(temperature=0), Sampling(temperature=0.8, top_k=50)
# Widths are multiples of 128, so that every scheme fits, and otherwise as odd as published ones.
SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def small(*sizes: int, **options) -> ModelArgs:
    """A model of two layers: dim, heads, KV heads, FFN width, and further config.json keys."""
    config = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 512}
    config |= {"max_position_embeddings": 512} | dict(zip(SIZES, sizes, strict=True))
    return from_config(config | options)


SMALL = {
    "llama": small(256, 8, 2, 640, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "qwen2": small(384, 6, 1, 512, model_type="qwen2"),
    "qwen3": small(256, 4, 2, 384, model_type="qwen3", head_dim=128),
    "tied": small(640, 10, 2, 896, tie_word_embeddings=True),
}
SHAPES = {name: preset(name) for name in preset_names()} | {"tiny": SMALL["llama"]}


def split_scheme(scheme: str) -> tuple[str, int]:
    """Scheme and group size of a name such as `int4 g128`; 32 by default."""
    kind, _, groupsize = scheme.partition(" g")
    return kind, int(groupsize or 32)


def build(args: ModelArgs, scheme: str, device: torch.device) -> Transformer:
    return fill(empty_model(args, *split_scheme(scheme)), device)


def has_kernels(device: torch.device) -> bool:
    """Whether the device should run this project's operators."""
    kernels = linear.kernels_for(device.type)
    return device.type == "cuda" and kernels is not None and kernels.supported(device)


@contextlib.contextmanager
def choosing(mode: str) -> Iterator[None]:
    """Within the block, caches and Engines are created for this mode."""
    kernels_for = linear.kernels_for

    def chosen(device: str) -> object:
        kernels = kernels_for(device)
        if mode == "fused" or kernels is None:
            return kernels
        fuse = functools.partial(kernels.fuse, pdl=True) if mode == "pdl" else lambda network: None
        parts = dict(pack=kernels.pack, take_cache=kernels.take_cache, fuse=fuse)
        return None if mode == "torch" else SimpleNamespace(**parts)

    with contextlib.ExitStack() as stack:
        for module in (linear, model, engine):
            stack.enter_context(patch.object(module, "kernels_for", chosen))
        if mode == "torch":
            stack.enter_context(patch.object(engine, "cudagraph", None))
        yield


def runner(started: Engine) -> str:
    """Who runs a decoding step of an engine: `fused`, `operators` or `torch`."""
    if started.fused:
        return "fused"
    packed = all(layer.tiles is not None for layer in linears(started.model).values())
    attends = all(layer.attention.kv_cache.has_kernels for layer in started.model.layers)
    return "operators" if packed and attends else "torch"


def expected_runner(network: Transformer, mode: str) -> str:
    """Who should run the steps of a mode on a device with kernels."""
    rounds = any(isinstance(x, Int8ActivationLinear) for x in linears(network).values())
    if mode in ("fused", "pdl"):
        return "operators" if rounds else "fused"  # the fused step does not round activations
    return "torch" if mode == "torch" else "operators"


def start(network: Transformer, mode: str, rows: int, length: int) -> Engine:
    """An engine on a new cache filled with noise, so that reads of unwritten slots show.

    Raises RuntimeError if a device with kernels runs another step than the mode's.
    """
    for layer in linears(network).values():  # another mode may have packed it
        layer.tiles = layer.grid = None
    with choosing(mode):
        network.setup_caches(rows, length)
        generator = torch.Generator(network.device).manual_seed(0)
        for layer in network.layers:
            for cache in layer.attention.kv_cache.buffers():
                cache.normal_(generator=generator)
        started = Engine(network, "block" if mode == "block" else None)
    found, expected = runner(started), expected_runner(network, mode)
    if has_kernels(network.device) and found != expected:
        raise RuntimeError(f"{found} runs where {expected} should")
    return started


def forward(engine: Engine, text: Tensor, begins: list[int], count: int) -> Tensor:
    """Logits `[B, count, V]` of `count` tokens a row of text `[B, T]`, from `begins` on."""
    device = engine.model.device
    pos = torch.tensor(begins).unsqueeze(1) + torch.arange(count)  # [B, count]
    idx = text[: len(begins)].gather(1, pos)
    kv_len = engine.model.kv_steps(max(begins) + count)
    step, last = engine.decode_step, None
    if count > FEW_ROWS:
        step, last = engine.prefill_step, torch.arange(count, device=device).expand_as(idx)
    logits = step(idx.to(device), pos.to(device), kv_len, last).logits
    return logits.clone()  # the next graph replay overwrites these


def endless(rows: int = 1) -> dict:
    """Options of `generate` for texts that end only by length."""
    return dict(until=lambda _row, _token: False, seeds=[0] * rows)
