"""The kernels for CPUs agree with floats, and a row has the same bits beside any others."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import kernels
from conftest import CONFIG, ROOT, random_model, write_checkpoint
from generate import Engine
from linear import Int4Linear, Linear, linear_for
from model import Transformer, TransformerBlock
from quantize import quantize

SCHEMES = ["bf16", "int8", "int8-activation", "int4"]
SHAPES = [(32, 1), (96, 48), (64, 50), (160, 33), (576, 96), (1536, 31), (2048, 64)]
ROWS = (*range(1, 10), 11, 12, 13, 24, 25, 31, 32, 33, 48, 100)
BOUND = 3e-3  # of the norm: that y is rounded to bf16 makes half of it
needs_kernels = pytest.mark.skipif(
    not kernels.supported(), reason="needs the bf16 instructions of AVX-512"
)


@pytest.fixture(autouse=True, scope="module")
def loaded():
    kernels.load()


def make_linear(scheme: str, width: int, height: int) -> tuple[Linear, torch.Tensor]:
    """A Linear in bf16, and its weight in float32."""
    generator = torch.Generator().manual_seed(width + height)
    linear = Linear(width, height).requires_grad_(False).bfloat16()
    linear.weight.normal_(generator=generator)
    if scheme != "bf16":
        tensors = quantize(linear.weight, scheme, 32)
        linear = linear_for(linear, tensors)
        linear.load_state_dict(tensors, assign=True)
    linear.requires_grad_(False).bfloat16()
    if isinstance(linear, Int4Linear):  # dequantize in float32: bf16 would round what is compared
        codes = torch.stack((linear.weight >> 4, linear.weight & 15), -1).view(height, -1, 32)
        grid = linear.scales_and_zeros.float().transpose(0, 1).unsqueeze(2)
        return linear, ((codes.float() - 8) * grid[..., 0] + grid[..., 1]).flatten(1)
    scales = getattr(linear, "scales", getattr(linear, "scales_a8", torch.ones(1)))
    return linear, linear.weight.float() * scales.float().unsqueeze(-1)


def test_where_the_cpu_has_the_instructions_the_kernels_are_there():
    assert kernels.load() == kernels.supported()


@needs_kernels
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width, height", SHAPES)
def test_products_agree_with_floats(scheme, width, height):
    linear, weight = make_linear(scheme, width, height)
    linear.prepare()
    assert linear.tiles is not None
    x = torch.randn(max(ROWS), width, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rows in ROWS:
        y, expected = linear(x[None, :rows])[0], F.linear(x[:rows].float(), weight)
        assert y.shape == expected.shape and y.dtype == torch.bfloat16
        bound = 0.02 if scheme == "int8-activation" else BOUND
        if rows > kernels.FEW_ROWS and scheme in ("int8", "int4"):
            bound += 2e-3  # there weights are rounded to bf16, too
        assert (y - expected).norm() / expected.norm() < bound, rows


@needs_kernels
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width, height", SHAPES)
def test_a_row_gives_the_same_bits_alone_and_among_others(scheme, width, height):
    linear, _ = make_linear(scheme, width, height)
    linear.prepare()
    x = torch.randn(32, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = linear(x)
    for rows in range(1, 32):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
        assert torch.equal(linear(x[rows:]), whole[rows:]), rows


@needs_kernels
def test_integers_are_multiplied_exactly():
    generator = torch.Generator().manual_seed(0)
    for rows, width, height in ((1, 32, 1), (3, 2048, 40), (12, 68, 33), (50, 5632, 64)):
        x = torch.randint(-127, 128, (rows, width), generator=generator)
        weight = torch.randint(-128, 128, (height, width), dtype=torch.int8, generator=generator)
        weight[0], x[0] = -128, 127  # the largest sums
        peaks, scales = torch.full((rows, 1), 127.0), torch.ones(height).bfloat16()
        op = torch.ops.tokenbus.linear_int8_activation
        y = op(x.bfloat16(), kernels.pack(weight, 4), scales, peaks)
        assert torch.equal(y, (x.double() @ weight.double().t()).float().bfloat16())


@needs_kernels
def test_activations_are_rounded_as_without_kernels():
    linear, _ = make_linear("int8-activation", 576, 96)
    x = torch.randn(9, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = linear(x)
    linear.prepare()
    assert linear.tiles is not None and torch.equal(linear(x), expected)
    op = torch.ops.tokenbus.linear_int8_activation
    assert torch.equal(op(x, linear.tiles, linear.grid, None), expected)


@needs_kernels
def test_int8_weights_keep_small_values_beside_large_ones():
    """x becomes whole numbers of 24 bits: each keeps its bits down to 2^-15 of the largest."""
    weight = torch.ones(1, 64, dtype=torch.int8)
    for exponent in (-90, -20, 0, 20, 100):
        x = torch.zeros(1, 64)
        x[0, 0], x[0, 1] = 2.0**exponent, -(2.0**exponent)
        x[0, 2] = 1.9921875 * 2.0 ** (exponent - 15)
        scales = torch.ones(1, dtype=torch.bfloat16)
        y = torch.ops.tokenbus.linear_int8(x.bfloat16(), kernels.pack(weight, 4), scales)
        assert y.item() == x[0, 2].item(), exponent
    x[0, 3] = float("nan")
    assert torch.ops.tokenbus.linear_int8(x.bfloat16(), kernels.pack(weight, 4), scales).isnan()


@needs_kernels
@pytest.mark.parametrize("scheme", SCHEMES)
def test_infinite_and_missing_values_of_x(scheme):
    linear, _ = make_linear(scheme, 96, 48)
    linear.prepare()
    assert not linear(torch.zeros(1, 96).bfloat16()).any()
    broken = torch.full((2, 96), 1.0)
    broken[0, 5] = float("nan")
    y = linear(broken.bfloat16())
    assert y[1].isfinite().all() and (scheme == "int8-activation" or y[0].isnan().all())


@needs_kernels
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("heads, group", [(1, 1), (3, 3), (2, 8), (4, 5)])
def test_attention_agrees_with_floats(width, heads, group):
    generator = torch.Generator().manual_seed(width)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    for B, T, S in ((1, 1, 2), (1, 1, 17), (2, 5, 300), (1, 32, 77)):
        q, k, v = 3 * draw(B, T, heads * group, width), *draw(2, B, heads, S, width)
        positions = torch.randint(S - 1, (B, T), generator=generator)
        y = torch.ops.tokenbus.attend(q, k, v, positions)
        scores = torch.einsum("bthgd,bhsd->bthgs", q.float().unflatten(2, (heads, -1)), k.float())
        hidden = torch.arange(S) > positions[:, :, None]
        scores = (scores / width**0.5).masked_fill(hidden[:, :, None, None], -float("inf"))
        expected = torch.einsum("bthgs,bhsd->bthgd", scores.softmax(-1), v.float()).flatten(2)
        assert y.shape == expected.shape and (y - expected).norm() / expected.norm() < BOUND
        for t in range(T):
            one = torch.ops.tokenbus.attend(q[:, t : t + 1], k, v, positions[:, t : t + 1])
            assert torch.equal(one[:, 0], y[:, t])


@needs_kernels
def test_attention_survives_large_scores_and_skips_padding():
    q = torch.full((1, 2, 1, 64), 30.0).bfloat16()
    k, v = torch.full((2, 1, 1, 5, 64), 30.0).bfloat16()
    k[0, 0, 2] = -30
    y = torch.ops.tokenbus.attend(q, k, v, torch.tensor([[3, 4]]))  # 4 is the spare slot
    assert (y[0, 0] == 30).all() and not y[0, 1].any()


@needs_kernels
def test_a_weight_that_does_not_fit_is_refused():
    x = torch.zeros(1, 64).bfloat16()
    tiles = kernels.pack(torch.zeros(40, 96).bfloat16(), 2)
    with pytest.raises(RuntimeError, match="has not been packed"):
        torch.ops.tokenbus.linear(x, tiles, 40)
    with pytest.raises(RuntimeError, match="has not been packed"):
        torch.ops.tokenbus.linear(torch.zeros(1, 96).bfloat16(), tiles, 80)


@needs_kernels
@pytest.mark.parametrize("name", ["attend", *SCHEMES])
def test_compilation_sees_the_shapes(name):
    """torch's own check: the fake implementation against the real one."""
    x = torch.randn(3, 64).bfloat16()
    if name == "attend":
        cache = torch.randn(1, 2, 9, 32).bfloat16()
        args = (torch.randn(1, 3, 4, 32).bfloat16(), cache, cache, torch.tensor([[5, 6, 7]]))
    else:
        linear, _ = make_linear(name, 64, 40)
        linear.prepare()
        rest = {"bf16": (40,), "int8-activation": (linear.grid, torch.ones(3, 1))}
        rest |= {"int8": (linear.grid,), "int4": (linear.grid, 40)}
        args = (x, linear.tiles, *rest[name])
    op = {"attend": "attend", "bf16": "linear"}.get(name, f"linear_{name.replace('-', '_')}")
    op = getattr(torch.ops.tokenbus, op).default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_kernels_the_same_layers_run(scheme, monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: False)
    linear, weight = make_linear(scheme, 96, 48)
    linear.prepare()
    assert linear.tiles is None
    for rows in (1, 2, 9, 40):
        x = torch.randn(rows, 96).bfloat16()
        expected = F.linear(x.float(), weight)
        assert (linear(x) - expected).norm() / expected.norm() < 0.02


# ---- The whole model in one ----------------------------------------------------------------------

SHAPE = CONFIG | {"hidden_size": 192, "num_attention_heads": 6}
MIXED = ["int8", "int4", "bf16", "int8-activation"]  # of the Linears, one after the other
FAMILIES = {
    "llama": SHAPE,
    "qwen2, biases": SHAPE | {"model_type": "qwen2"},
    "qwen3, norms of q and k": SHAPE | {"model_type": "qwen3", "head_dim": 64},
    "every bias": SHAPE | {"attention_bias": True, "mlp_bias": True},
}


def quantized_model(config: dict, schemes: list[str]) -> Transformer:
    """A random model in bf16 whose Linears are stored by these schemes, in turn."""
    model = random_model(config, torch.bfloat16, 0.1)
    names = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    for name, scheme in zip(names, itertools.cycle(schemes)):
        linear = model.get_submodule(name)
        if scheme != "bf16":
            tensors = quantize(linear.weight, scheme, 32)
            new = linear_for(linear, tensors)
            new.load_state_dict(tensors | ({"bias": linear.bias} if new.bias is not None else {}))
            model.set_submodule(name, new.requires_grad_(False).bfloat16())
    return model


def logits_in_parts(model: Transformer, ids: torch.Tensor, split: int, block=None) -> torch.Tensor:
    """The logits of ids `[B, T]`, passed to the model `split` at a time."""
    model.setup_caches(len(ids), 64)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    parts = zip(ids.split(split, 1), positions.split(split, 1), strict=True)
    return torch.cat([model(idx, pos, 64, block=block) for idx, pos in parts], 1).float()


@needs_kernels
@pytest.mark.parametrize("schemes", [[scheme] for scheme in SCHEMES] + [MIXED])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_of_a_whole_model_agrees_with_its_modules(family, schemes):
    model = quantized_model(FAMILIES[family], schemes)
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logits_in_parts(model, ids, 40)  # plain PyTorch
    assert model.kernel is None
    model.prepare()
    assert model.kernel is not None
    for split in (40, 7, 1):  # prefill, and passes of a few tokens
        whole = logits_in_parts(model, ids, split)
        modules = logits_in_parts(model, ids, split, TransformerBlock.forward)
        bound = 0.05 if "int8-activation" in schemes else 0.03  # a bit decides what is rounded
        for other in (modules, expected):
            assert (whole - other).norm() / other.norm() < bound, split
    assert torch.equal(whole, logits_in_parts(model, ids, 7))  # a row's bits, alone or not


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_of_a_whole_model_is_as_exact_as_its_modules(family):
    model = quantized_model(FAMILIES[family], ["bf16"])
    exact = random_model(FAMILIES[family], scale=0.1)
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logits_in_parts(exact, ids, 40)
    errors = [(logits_in_parts(model, ids, 40) - expected).norm()]  # of plain PyTorch
    model.prepare()
    errors += [(logits_in_parts(model, ids, split) - expected).norm() for split in (40, 7, 1)]
    assert max(errors) < 0.05 * expected.norm() and max(errors[1:]) < 1.2 * errors[0], errors


@needs_kernels
def test_padding_and_the_choice_of_logits():
    model = quantized_model(SHAPE, ["bf16"])
    model.prepare()
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = logits_in_parts(model, ids, 9)
    model.setup_caches(2, 64)
    positions = torch.arange(9).repeat(2, 1)
    positions[1, 5:] = 64  # the second row ends after five tokens
    last = torch.tensor([[8], [4]])
    logits = model(ids, positions, 64, last).float()
    assert logits.shape == (2, 1, 300)
    assert torch.equal(logits[0, 0], whole[0, 8]) and torch.equal(logits[1, 0], whole[1, 4])
    for idx, pos in ((ids, positions[:1]), (ids[:, :0], positions[:, :0]), (ids[[0, 1, 0]],) * 2):
        with pytest.raises(RuntimeError, match="tokens, positions and cache differ in shape"):
            model(idx, pos, 64)
    for wrong in (-1, 65):
        with pytest.raises(RuntimeError, match=f"position {wrong} of a cache of 65"):
            model(ids[:, :1], torch.full((2, 1), wrong), 64)


@needs_kernels
def test_nothing_is_compiled_where_one_kernel_is_the_model():
    counters.clear()
    model = quantized_model(SHAPE, ["int8"])
    engine = Engine(model, "block", compile_prefill=True)
    model.setup_caches(1, 64)  # also after it, as `eval.py` does
    engine.warm_up(1)
    kernel = model.kernel
    assert kernel is not None and not counters["frames"]["total"]
    model.setup_caches(2, 64)
    assert model.kernel is not None and model.kernel is not kernel


@needs_kernels
def test_small_heads_and_parts_of_models_run_by_modules():
    for config, whole in ((SHAPE | {"num_attention_heads": 12}, True), (SHAPE, False)):
        model = quantized_model(config, ["bf16"])
        model.whole = whole
        model.prepare()
        ids = torch.randint(300, (2, 5))
        assert logits_in_parts(model, ids, 5).isfinite().all()
        assert model.kernel is None and not model.fusible


CACHE = """
import sys, torch
from torch._dynamo.utils import counters
from pathlib import Path
from generate import Engine
from model import Transformer

for path in map(Path, sys.argv[1:]):
    model = Transformer.from_checkpoint(path)
    model.whole = False  # as a rank's part, which no single kernel runs
    model.setup_caches(1, 64)
    Engine(model, "block").warm_up(1)
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
print(counters["inductor"]["fxgraph_cache_bypass"], counters["aot_autograd"]["autograd_cache_hit"])
"""


@needs_kernels
def test_a_second_process_finds_compiled_blocks_in_the_cache(tmp_path):
    paths = [write_checkpoint(tmp_path / "a", SHAPE, torch.bfloat16)]
    state = torch.load(paths[0])
    for name, module in random_model(SHAPE).named_modules():
        if isinstance(module, Linear):
            tensors = quantize(state.pop(f"{name}.weight"), "int4", 32)
            state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    torch.save(state, tmp_path / "a" / "model_int4.pth")
    paths.append(tmp_path / "a" / "model_int4.pth")
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CACHE, *map(str, paths)]
    results = []
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append([int(word) for word in done.stdout.split()])
    (hits, misses, bypassed, _), second = results
    assert misses >= len(paths) and bypassed == 0
    assert second[:3] == [hits + misses, 0, 0] and second[3] == hits + misses


def test_other_cpus_are_left_alone(monkeypatch):
    cpus = ["processor : 0\nflags : fpu avx2 fma\n", "Features : asimd\n", ""]
    for text in cpus:
        monkeypatch.setattr(kernels.Path, "read_text", lambda self, text=text: text)
        assert not kernels.supported()
    flags = " ".join(kernels.NEEDED)
    monkeypatch.setattr(kernels.Path, "read_text", lambda self: f"flags\t: fpu {flags}\n")
    assert kernels.supported()
