"""The kernels for CPUs agree with floats, and a row has the same bits beside any others.

On a CPU without their instructions they run in portable C++ (tests/emulated): the same source, the
same arithmetic, slowly.
"""

import hashlib
import itertools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import kernels
from conftest import CONFIG, ROOT, random_model, write_checkpoint
from engine import Engine, Sampling, generate, load_model
from linear import Int4Linear, Linear, linear_for
from mixture import MixtureOfExperts
from model import Mixture, Transformer
from quantize import quantize
from reuse import CachedRows

SCHEMES = ["bf16", "int8", "int8-activation", "int4"]
SHAPES = [(32, 1), (64, 50), (160, 33), (576, 96), (1536, 31)]
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24, 33, 50)
BOUND = 3e-3  # of the norm: that y is rounded to bf16 makes half of it
SUPPORTED = kernels.supported
NATIVE = kernels.supported()
HEADER = ROOT / "tests" / "emulated" / "immintrin.h"
native = pytest.mark.skipif(not NATIVE, reason="needs the bf16 instructions of AVX-512")
pytestmark = pytest.mark.skipif(
    not NATIVE and platform.machine() != "x86_64", reason="the emulation needs AVX2"
)


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """The kernels, with threads; emulated where the CPU lacks the instructions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        if not NATIVE:
            version = hashlib.sha256(HEADER.read_bytes()).hexdigest()[:16]
            flags = f"-std=c++20 -O1 -fopenmp -mavx2 -mfma -DUNROLL= -DHEADER=0x{version}"
            patch.setattr(kernels, "FLAGS", f"{flags} -I{HEADER.parent}")
            patch.setattr(kernels, "supported", lambda: True)
            kernels.load.cache_clear()
        assert kernels.load()
        yield
    torch.set_num_threads(threads)
    if not NATIVE:
        kernels.load.cache_clear()


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


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width, height", SHAPES)
def test_products_agree_with_floats(scheme, width, height):
    linear, weight = make_linear(scheme, width, height)
    linear.pack_weights()
    assert linear.tiles is not None
    x = torch.randn(max(ROWS), width, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rows, prefill in itertools.product(ROWS, (False, True)):
        y, expected = linear(x[None, :rows], prefill)[0], F.linear(x[:rows].float(), weight)
        assert y.shape == expected.shape and y.dtype == torch.bfloat16
        bound = 0.02 if scheme == "int8-activation" else BOUND
        if prefill and scheme in ("int8", "int4"):
            bound += 2e-3  # there weights are rounded to bf16, too
        assert (y - expected).norm() / expected.norm() < bound, rows


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width, height", SHAPES)
@pytest.mark.parametrize("prefill", [False, True])
def test_a_row_gives_the_same_bits_alone_and_among_others(scheme, width, height, prefill):
    linear, _ = make_linear(scheme, width, height)
    linear.pack_weights()
    x = torch.randn(60, width, generator=torch.Generator().manual_seed(1)).bfloat16()
    whole = linear(x, prefill)
    for rows in ROWS:
        assert torch.equal(linear(x[:rows], prefill), whole[:rows]), rows
        assert torch.equal(linear(x[rows:], prefill), whole[rows:]), rows


def test_integers_are_multiplied_exactly():
    generator = torch.Generator().manual_seed(0)
    for rows, width, height in ((1, 32, 1), (3, 2048, 40), (12, 68, 33), (50, 5632, 64)):
        x = torch.randint(-127, 128, (rows, width), generator=generator)
        weight = torch.randint(-128, 128, (height, width), dtype=torch.int8, generator=generator)
        weight[0], x[0] = -128, 127  # the largest sums
        peaks, scales = torch.full((rows, 1), 127.0), torch.ones(height).bfloat16()
        op = torch.ops.tokenbus.linear_int8_activation
        y = op(x.bfloat16(), kernels.tile(weight, 4).contiguous(), scales, peaks)
        assert torch.equal(y, (x.double() @ weight.double().t()).float().bfloat16())


def test_activations_are_rounded_as_without_kernels():
    linear, _ = make_linear("int8-activation", 576, 96)
    x = torch.randn(9, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = linear(x)
    linear.pack_weights()
    assert linear.tiles is not None and torch.equal(linear(x), expected)
    op = torch.ops.tokenbus.linear_int8_activation
    assert torch.equal(op(x, linear.tiles, linear.grid, None), expected)


def test_int8_weights_keep_small_values_beside_large_ones():
    """x becomes 24-bit fixed point: each keeps its bits down to 2^-15 of the largest."""
    weight = torch.ones(1, 64, dtype=torch.int8)
    for exponent in (-90, -20, 0, 20, 100):
        x = torch.zeros(1, 64)
        x[0, 0], x[0, 1] = 2.0**exponent, -(2.0**exponent)
        x[0, 2] = 1.9921875 * 2.0 ** (exponent - 15)
        scales = torch.ones(1, dtype=torch.bfloat16)
        tiles = kernels.tile(weight, 4).contiguous()
        y = torch.ops.tokenbus.linear_int8(x.bfloat16(), tiles, scales, False)
        assert y.item() == x[0, 2].item(), exponent
    x[0, 3] = float("nan")
    y = torch.ops.tokenbus.linear_int8(x.bfloat16(), tiles, scales, False)
    assert y.isnan()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_infinite_and_missing_values_of_x(scheme):
    linear, _ = make_linear(scheme, 96, 48)
    linear.pack_weights()
    assert not linear(torch.zeros(1, 96).bfloat16()).any()
    broken = torch.full((2, 96), 1.0)
    broken[0, 5] = float("nan")
    y = linear(broken.bfloat16())
    assert y[1].isfinite().all() and y[0].isnan().all()


def attend(q, k, v, input_pos, window=0, sinks=None, scale=None):
    scale = scale or q.shape[-1] ** -0.5
    return torch.ops.tokenbus.attend(q, k, v, input_pos, scale, window, sinks)


@pytest.mark.parametrize("width", [2, 20, 30, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, group", [(1, 1), (3, 3), (2, 8)])
@pytest.mark.parametrize("window, with_sinks", [(0, False), (7, False), (20, True)])
def test_attention_agrees_with_floats(width, heads, group, window, with_sinks):
    generator = torch.Generator().manual_seed(width)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    for B, T, S in ((1, 1, 2), (1, 1, 17), (2, 5, 300), (1, 32, 77)):
        q, k, v = 3 * draw(B, T, heads * group, width), *draw(2, B, heads, S, width)
        k[:, :, -1] = v[:, :, -1] = float("nan")  # the padding slot is never read
        positions = torch.randint(S - 1, (B, T), generator=generator)
        sinks = draw(heads * group).float() if with_sinks else None
        y = attend(q, k, v, positions, window, sinks)
        scores = torch.einsum("bthgd,bhsd->bthgs", q.float().unflatten(2, (heads, -1)), k.float())
        places, last = torch.arange(S), positions[:, :, None]
        masked = (places > last) | (places <= last - window if window else places < 0)
        scores = scores.div(width**0.5).masked_fill(masked[:, :, None, None], -float("inf"))
        if with_sinks:  # one more key, whose value is 0
            more = sinks.view(1, 1, heads, group, 1).expand(B, T, -1, -1, -1)
            scores = torch.cat((scores, more), -1)
        probs = scores.softmax(-1)[..., :S]
        expected = torch.einsum("bthgs,bhsd->bthgd", probs, v.float().nan_to_num()).flatten(2)
        assert y.shape == expected.shape and (y - expected).norm() / expected.norm() < BOUND
        for t in range(T):
            one = attend(q[:, t : t + 1], k, v, positions[:, t : t + 1], window, sinks)
            assert torch.equal(one[:, 0], y[:, t])


def test_attention_scales_scores_as_it_is_told():
    q, k, v = torch.randn(3, 1, 1, 9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, positions = q[:, :, :1], torch.tensor([[7]])
    assert torch.equal(attend(q, k, v, positions, scale=0.5), attend(q * 4, k, v, positions))


def test_attention_survives_large_scores_and_skips_padding():
    q = torch.full((1, 2, 1, 64), 30.0).bfloat16()
    k, v = torch.full((2, 1, 1, 5, 64), 30.0).bfloat16()
    k[0, 0, 2] = -30
    y = attend(q, k, v, torch.tensor([[3, 4]]))  # 4 is the padding slot
    assert (y[0, 0] == 30).all() and not y[0, 1].any()


def test_operators_refuse_what_they_do_not_take():
    q, cache, at = torch.zeros(1, 1, 2, 31).bfloat16(), torch.zeros(1, 2, 9, 31), torch.zeros(1, 1)
    with pytest.raises(RuntimeError, match="attend takes even heads of up to 256"):
        attend(q, cache.bfloat16(), cache.bfloat16(), at.long())
    q, cache = torch.zeros(2, 1, 6, 32).bfloat16(), torch.zeros(1, 2, 9, 32).bfloat16()
    tables = torch.zeros(9, 16, 2)
    with pytest.raises(RuntimeError, match="rotate_write takes even heads of up to 256"):
        args = (torch.zeros(2, 1).long(), tables, None, None, 1e-5, cache, cache.clone())
        torch.ops.tokenbus.rotate_write(q, *args)


def test_a_weight_that_does_not_fit_is_refused():
    x = torch.zeros(1, 64).bfloat16()
    tiles = kernels.tile(torch.zeros(40, 96).bfloat16(), 2).contiguous()
    with pytest.raises(RuntimeError, match="has not been packed"):
        torch.ops.tokenbus.linear_bf16(x, tiles, 40, False)
    with pytest.raises(RuntimeError, match="has not been packed"):
        torch.ops.tokenbus.linear_bf16(torch.zeros(1, 96).bfloat16(), tiles, 80, False)
    strided = kernels.tile(torch.zeros(64, 96).bfloat16(), 2)
    with pytest.raises(RuntimeError, match="has not been packed"):
        torch.ops.tokenbus.linear_bf16(torch.zeros(1, 96).bfloat16(), strided, 64, False)


def in_huge_pages(address: int) -> bool:
    """Whether the memory there is mapped and may be backed by huge pages."""
    maps = re.split(r"^(?=\w+-\w+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    for text in maps[1:]:
        begin, end = (int(x, 16) for x in text.split()[0].split("-"))
        if begin <= address < end:
            return re.search(r"^VmFlags:.* hg\b", text, re.M) is not None
    return False


def test_packed_weights_lie_side_by_side_in_huge_pages_and_are_freed():
    memory = kernels.HugePages()
    first, second = memory.hold(torch.arange(100)), memory.hold(torch.ones(3, 5).t())
    assert first.equal(torch.arange(100)) and second.equal(torch.ones(5, 3))
    assert second.is_contiguous() and second.data_ptr() - first.data_ptr() == 832  # 13 lines of 64
    large = memory.hold(torch.zeros(memory.CHUNK + 1, dtype=torch.uint8))
    assert large.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    places = [first.data_ptr(), large.data_ptr()]
    known = Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert [in_huge_pages(place) for place in places] == [known, known]
    linear = Linear(64, 32).bfloat16().requires_grad_(False)
    linear.pack_weights()
    assert in_huge_pages(linear.tiles.data_ptr()) == known
    del large  # which is in a chunk of its own
    assert [in_huge_pages(place) for place in places] == [known, False]
    del first, second, memory
    assert not any(in_huge_pages(place) for place in places)


def packed_mixture(scheme: str) -> MixtureOfExperts:
    """Six experts of 64 by 48, two of them for a token, packed."""
    mixture = MixtureOfExperts(64, Mixture(6, 2, 96, renormalize=True), F.silu, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in mixture.requires_grad_(False).parameters():
        parameter.normal_(0, 0.1, generator=generator)
    for name, linear in list(mixture.bfloat16().named_children()):
        if isinstance(linear, Linear) and scheme != "bf16":
            tensors = quantize(linear.weight, scheme, 32)
            stored = linear_for(linear, tensors)
            stored.load_state_dict(tensors)
            setattr(mixture, name, stored.requires_grad_(False).bfloat16())
    for module in (mixture.router, mixture.w1, mixture.w3, mixture.w2):
        module.pack_weights()
    return mixture


def operands(mixture: MixtureOfExperts) -> list[torch.Tensor | None]:
    linears = mixture.w1, mixture.w3, mixture.w2
    return [tensor for linear in linears for tensor in (linear.tiles, linear.grid)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("prefill", [False, True])
def test_one_operator_runs_the_experts_as_their_linears_do_one_by_one(scheme, prefill):
    mixture = packed_mixture(scheme)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    chosen, shares = mixture.router(x, prefill)
    expected = mixture.by_expert(x, chosen, shares, prefill)
    y = mixture.by_operator(x, chosen, shares, prefill)
    assert y.dtype == torch.float32 and (y - expected).norm() < BOUND * expected.norm()
    for rows in ([3], [3, 4, 5], [*range(39, 20, -1)]):  # alone, together, in another order
        assert mixture.by_operator(x[rows], chosen[rows], shares[rows], prefill).equal(y[rows])
        assert mixture.router(x[rows], prefill)[1].equal(shares[rows])
    twice = chosen[:, :1].expand(-1, 2)  # a router never does, but who else calls it may
    expected = mixture.by_expert(x, twice, shares, prefill)
    found = mixture.by_operator(x, twice, shares, prefill)
    assert (found - expected).norm() < BOUND * expected.norm()
    alone = mixture.by_operator(x[:1], twice[:1], shares[:1], prefill)
    assert alone.equal(found[:1])
    many = torch.cat([x] * 14)  # more rows than go through the experts at once
    again = mixture.by_operator(many, *(t.repeat(14, 1) for t in (chosen, shares)), prefill)
    assert again.equal(y.repeat(14, 1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_operator_reads_no_expert_that_was_not_chosen(scheme):
    mixture = packed_mixture(scheme)
    x, shares = torch.randn(2, 64).bfloat16(), torch.full((2, 2), 0.5)
    chosen = torch.tensor([[1, 4], [4, 2]])
    expected = mixture.by_operator(x, chosen, shares, False)
    for tensor in filter(lambda tensor: tensor is not None, operands(mixture)):
        tensor[[0, 3, 5]] = -1 if tensor.dtype == torch.int8 else 255
        if tensor.dtype == torch.bfloat16:
            tensor[[0, 3, 5]] = float("nan")
    assert mixture.by_operator(x, chosen, shares, False).equal(expected)
    with pytest.raises(IndexError, match="there is no expert 6"):
        mixture.by_operator(x, chosen + 2, shares, False)


@pytest.mark.parametrize("name", ["attend", "rotate_write", "experts", "linear_float32", *SCHEMES])
def test_compilation_sees_the_shapes_and_what_is_written(name):
    """torch's own check: the fake implementation and the schema against the real one."""
    x, at = torch.randn(3, 64).bfloat16(), torch.tensor([[5, 6, 7]])
    caches = torch.randn(2, 1, 2, 9, 32).bfloat16().unbind()
    if name == "attend":
        args = (torch.randn(1, 3, 4, 32).bfloat16(), *caches, at, 0.2, 0, None)
    elif name == "rotate_write":
        norm = torch.randn(32).bfloat16()
        tables = torch.randn(9, 16, 2)
        args = (torch.randn(1, 3, 8, 32).bfloat16(), at, tables, norm, norm, 1e-5, *caches)
    elif name == "experts":
        mixture = packed_mixture("int4")
        args = (x, *mixture.router(x, False), *operands(mixture), False, False)
    elif name == "linear_float32":
        args = (x, packed_mixture("bf16").router.tiles, 6)
    else:
        linear, _ = make_linear(name, 64, 40)
        linear.pack_weights()
        rest = {"bf16": (40, False), "int8-activation": (linear.grid, torch.ones(3, 1))}
        rest |= {"int8": (linear.grid, True), "int4": (linear.grid, 40, False)}
        args = (x, linear.tiles, *rest[name])
    name = f"linear_{name.replace('-', '_')}" if name in SCHEMES else name
    op = getattr(torch.ops.tokenbus, name).default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_kernels_the_same_layers_run(scheme, monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: False)
    linear, weight = make_linear(scheme, 96, 48)
    linear.pack_weights()
    assert linear.tiles is None
    for rows in (1, 2, 9, 40):
        x = torch.randn(rows, 96).bfloat16()
        expected = F.linear(x.float(), weight)
        assert (linear(x) - expected).norm() / expected.norm() < 0.02


# ---- The whole model in one ----------------------------------------------------------------------

SHAPE = CONFIG | {"hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 64}
MIXED = ["int8", "int4", "bf16", "int8-activation"]  # of the Linears, one after the other
EXPERTS = SHAPE | {"moe_intermediate_size": 64, "num_experts": 6, "num_experts_per_tok": 2}
EXPERTS |= {"norm_topk_prob": True}
FAMILIES = {
    "llama": SHAPE,
    "qwen2, biases": SHAPE | {"model_type": "qwen2"},
    "qwen3, norms of q and k": SHAPE | {"model_type": "qwen3", "head_dim": 64},
    "qwen3_moe, one dense layer": EXPERTS
    | {"model_type": "qwen3_moe", "head_dim": 64, "mlp_only_layers": [1]},
    "olmoe, norms of all heads": EXPERTS | {"model_type": "olmoe"},
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


def modules(model: Transformer):
    """The step that goes module by module."""
    return model


def fused(model: Transformer):
    """The step that is one call; it has to be there."""
    step = Engine(model).fused
    assert step is not None
    return step


def logits_in_pieces(who, model, ids, size: int, prefill: bool, rows: int = 0) -> torch.Tensor:
    """The logits after all ids `[B, T]`, run `size` at a time, in a cache of `rows` or B rows."""
    model.setup_caches(max(rows, len(ids)), 64)
    step, logits = who(model), []
    for start in range(0, ids.shape[1], size):
        idx = ids[:, start : start + size]
        last = torch.arange(idx.shape[1]).expand_as(idx)
        logits.append(step(idx, start + last, 64, last if prefill else None).logits)
    return torch.cat(logits, 1).float()


def distance(model: Transformer, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The relative error of the whole; of a mixture, the median of the positions'.

    A router takes another expert where two are about even, and all that follows differs.
    """
    if model.args.mixture:
        return ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
    return (logits - expected).norm() / expected.norm()


IDS = torch.randint(300, (5, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schemes", [[scheme] for scheme in SCHEMES] + [MIXED], ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_of_a_whole_model_agrees_with_its_modules(family, schemes, monkeypatch):
    model, ids = quantized_model(FAMILIES[family], schemes), IDS[:2]
    with monkeypatch.context() as patch:  # plain PyTorch
        patch.setattr(kernels, "load", lambda: False)
        expected = logits_in_pieces(modules, model, ids, 40, True)
        assert Engine(model).fused is None
    for layer in [m for m in model.modules() if hasattr(m, "packed")]:
        layer.packed = None
    model.pack_weights()
    for size, prefill in ((40, True), (7, False)):
        whole = logits_in_pieces(fused, model, ids, size, prefill)
        parts = logits_in_pieces(modules, model, ids, size, prefill)
        bound = 0.05 if "int8-activation" in schemes else 0.03  # a bit decides what is rounded
        for other in (parts, expected):
            assert distance(model, whole, other) < bound, (size, prefill)
        assert (whole - parts).norm() < bound * parts.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_of_a_whole_model_is_as_exact_as_its_modules(family, monkeypatch):
    model, ids = quantized_model(FAMILIES[family], ["bf16"]), IDS[:2]
    exact = random_model(FAMILIES[family], scale=0.1)
    exact.load_state_dict(model.state_dict())
    expected = logits_in_pieces(modules, exact, ids, 40, True)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "load", lambda: False)
        errors = [distance(model, logits_in_pieces(modules, model, ids, 40, True), expected)]
    model.pack_weights()
    for size, prefill in ((40, True), (7, False), (1, False)):
        logits = logits_in_pieces(fused, model, ids, size, prefill)
        errors.append(distance(model, logits, expected))
    assert max(errors) < 0.05 and max(errors[1:]) < 1.2 * errors[0], errors


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NEAR = SHAPE | {"sliding_window": 7, "use_sliding_window": True}
OTHERS = {  # what the kernel of a whole model takes of other families, and what it does not
    "smollm3": (NEAR | {"no_rope_layers": [1, 0], "rope_scaling": YARN}, True),
    "phi3": (NEAR | {"partial_rotary_factor": 0.5}, True),
    "ministral3": (NEAR | {"rope_scaling": YARN | {"llama_4_scaling_beta": 0.5}}, False),
    "olmo3": (NEAR | {"layer_types": ["sliding_attention", "full_attention"]}, False),
    "gemma3_text": (NEAR | {"head_dim": 32, "final_logit_softcapping": 5.0}, False),
    "qwen2_moe": (EXPERTS | {"shared_expert_intermediate_size": 64}, False),
    "glm4_moe": (EXPERTS | {"num_experts": None, "n_routed_experts": 6}, False),
    "granite": (SHAPE | {"residual_multiplier": 0.5, "logits_scaling": 2.0}, False),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_run_on_the_same_operators(family, monkeypatch):
    config, fits = OTHERS[family]
    config = config | {"model_type": family, "tie_word_embeddings": False}
    model, ids = quantized_model(config, ["bf16"]), IDS[:2]
    exact = random_model(config, scale=0.1)
    exact.load_state_dict(model.state_dict())
    expected = logits_in_pieces(modules, exact, ids, 40, True)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "load", lambda: False)
        plain = distance(model, logits_in_pieces(modules, model, ids, 40, True), expected)
    model.setup_caches(2, 64)
    assert (Engine(model).fused is not None) == fits
    who = fused if fits else modules
    outcomes = [logits_in_pieces(who, model, ids, size, False) for size in (40, 7, 1)]
    assert distance(model, outcomes[0], expected) < 1.2 * plain < 0.1
    assert torch.equal(outcomes[0], outcomes[1]) and torch.equal(outcomes[0], outcomes[2])


@pytest.mark.slow
def test_a_compiled_block_calls_the_operator_of_a_mixture():
    config = OTHERS["qwen2_moe"][0] | {"model_type": "qwen2_moe", "tie_word_embeddings": False}
    model = quantized_model(config, ["int4"])
    model.setup_caches(1, 64)
    options = dict(until=lambda *_: False, seeds=[0])
    texts = []
    for compiled in ("block", None):
        engine = Engine(model, compiled)
        steps = generate(engine, [[5, 6, 7]], Sampling(0), 6, **options)
        texts.append([token.id for (token,) in steps])
        assert engine.fused is None and model.layers[0].feed_forward.has_operator(False, False)
    assert texts[0] == texts[1]


ODD = SHAPE | {"hidden_size": 100, "num_attention_heads": 5, "num_key_value_heads": 1}
ODD |= {"intermediate_size": 172}  # heads of 20, no width a multiple of 16: int4 does not fit
PATHS = [(who, schemes, SHAPE) for who in (fused, modules) for schemes in ([s] for s in SCHEMES)]
PATHS += [(who, [scheme], ODD) for who in (fused, modules) for scheme in SCHEMES[:3]]
PATHS += [(fused, MIXED, SHAPE), (fused, ["int8"], FAMILIES["qwen3, norms of q and k"])]
SPARSE = [config for config in FAMILIES.values() if "num_experts" in config]
PATHS += [(fused, [scheme], SPARSE[0]) for scheme in SCHEMES]
PATHS += [(modules, MIXED, SPARSE[0]), (modules, ["int4"], SPARSE[0]), (fused, ["int4"], SPARSE[1])]


@pytest.mark.parametrize(
    "who, schemes, config", PATHS, ids=lambda x: getattr(x, "__name__", None) or str(x)[:24]
)
def test_one_arithmetic_a_pass(who, schemes, config):
    """A prompt gives the same bits alone, in a batch and in any pieces; so do decoded tokens."""
    model = quantized_model(config, schemes)
    model.pack_weights()
    for prefill, sizes in ((True, (1, 5, 33)), (False, (1, 12, 32))):
        whole = logits_in_pieces(who, model, IDS, 40, prefill)
        for size in sizes:
            assert torch.equal(logits_in_pieces(who, model, IDS[:1], size, prefill), whole[:1])
            assert torch.equal(logits_in_pieces(who, model, IDS[1:4], size, prefill), whole[1:4])
    many = IDS[:1, :3].expand(50, 3)  # more rows than one block of any kernel
    assert torch.equal(logits_in_pieces(who, model, many, 1, False)[7:8], whole[:1, :3])


def test_a_prompt_of_few_tokens_and_one_of_many_share_their_arithmetic():
    """Behind any prefix hit: what the cache holds and what comes after it, however short."""
    for scheme in SCHEMES:
        model = quantized_model(SHAPE, [scheme])
        model.setup_caches(1, 64)
        engine, prompt = Engine(model), IDS[0].tolist()
        alone = engine.prefill([prompt])
        for known in (1, 8, 35, 39):
            engine.prefill([prompt[:known]])
            assert torch.equal(engine.prefill([prompt], known), alone), (scheme, known)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_decoding_wrote_is_kept_for_the_next_request_where_its_bits_are_a_prefills(scheme):
    def make() -> Engine:
        model = quantized_model(CONFIG | {"hidden_size": 64, "head_dim": 16}, [scheme])
        model.setup_caches(1, 64)
        return Engine(model)

    engine, prompt = make(), [*range(30, 50)]
    cached, exact = CachedRows(engine, 1), scheme in ("bf16", "int8-activation")
    options = dict(until=lambda *_: False, seeds=[0])
    new = [token.id for (token,) in generate(engine, [prompt], Sampling(0), 8, **options)]
    cached.keep(0, prompt, new)
    longer = [*prompt, *new, 7]
    assert cached.place([longer]) == ([0], len(prompt) + (7 if exact else 0))
    start = cached.place([longer])[1]
    assert engine.prefill([longer], start).equal(make().prefill([longer]))


def test_padding_and_the_choice_of_logits():
    model, ids = quantized_model(SHAPE, ["bf16"]), IDS[:2, :9]
    model.pack_weights()
    whole = logits_in_pieces(fused, model, ids, 9, True)
    model.setup_caches(2, 64)
    step, positions = fused(model), torch.arange(9).repeat(2, 1)
    positions[1, 5:] = 64  # the second row ends after five tokens
    output = step(ids, positions, 64, torch.tensor([[8], [4]]))
    logits = output.logits.float()
    assert logits.shape == (2, 1, 300) and output.hidden.shape == (2, 1, 192)
    assert torch.equal(model.output(output.hidden, True).float(), logits)
    assert torch.equal(logits[0, 0], whole[0, 8]) and torch.equal(logits[1, 0], whole[1, 4])
    for idx, pos in ((ids, positions[:1]), (ids[:, :0], positions[:, :0]), (ids[[0, 1, 0]],) * 2):
        with pytest.raises(RuntimeError, match="tokens, positions and cache differ in shape"):
            step(idx, pos, 64)
    for wrong in (-1, 65):
        with pytest.raises(RuntimeError, match=f"position {wrong} of a cache of 65"):
            step(ids[:, :1], torch.full((2, 1), wrong), 64)


def test_nothing_is_compiled_where_one_kernel_is_the_model():
    counters.clear()
    model = quantized_model(SHAPE, ["int8"])
    model.setup_caches(1, 64)
    engine = Engine(model, "block", compile_prefill=True)
    engine.warm_up(1, 6)
    assert engine.fused is not None and not counters["frames"]["total"]


def test_what_is_no_single_kernel_runs_by_modules():
    """A rank's part, whose collectives are hooks, and columns that kernels do not take."""
    for config, hooked in ((SHAPE, True), (SHAPE | {"intermediate_size": 90}, False)):
        model = quantized_model(config, ["bf16"])
        if hooked:
            model.layers[0].attention.wo.register_forward_hook(lambda _module, _x, y: y)
        model.setup_caches(2, 64)
        assert Engine(model).fused is None
        assert logits_in_pieces(modules, model, IDS[:2], 5, True).isfinite().all()


CACHE = """
import sys, torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from pathlib import Path
from engine import Engine, load_model

model = load_model(Path(sys.argv[1]), "cpu")
model.output.register_forward_hook(lambda _module, _x, y: y)  # as a rank's part has
model.setup_caches(1, 64)
Engine(model, "block").warm_up(1)
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
print(counters["inductor"]["fxgraph_cache_bypass"], counters["aot_autograd"]["autograd_cache_hit"])
"""


@native
@pytest.mark.slow
def test_a_second_process_finds_compiled_blocks_in_the_cache(tmp_path):
    path = write_checkpoint(tmp_path, SHAPE, torch.bfloat16)
    state = torch.load(path)
    for name, module in random_model(SHAPE).named_modules():
        if isinstance(module, Linear):
            tensors = quantize(state.pop(f"{name}.weight"), "int4", 32)
            state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    torch.save(state, path)
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CACHE, str(path)]
    results = []
    for _ in range(2):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append([int(word) for word in done.stdout.split()])
    (hits, misses, bypassed, _), second = results
    assert misses >= 1 and bypassed == 0
    assert second[:3] == [hits + misses, 0, 0] and second[3] == hits + misses


def test_other_cpus_are_left_alone(monkeypatch):
    monkeypatch.setattr(kernels, "supported", SUPPORTED)
    cpus = ["processor : 0\nflags : fpu avx2 fma\n", "Features : asimd\n", ""]
    for text in cpus:
        monkeypatch.setattr(kernels.Path, "read_text", lambda self, text=text: text)
        assert not kernels.supported()
    flags = " ".join(kernels.NEEDED)
    monkeypatch.setattr(kernels.Path, "read_text", lambda self: f"flags\t: fpu {flags}\n")
    assert kernels.supported()


def test_compiled_blocks_write_the_caches_in_place():
    """As a rank's do: nothing in the generated code copies a cache."""
    torch.compiler.reset()
    model = quantized_model(SHAPE, ["bf16"])
    model.output.register_forward_hook(lambda _module, _x, y: y)
    model.setup_caches(1, 64)
    engine, idx = Engine(model, "block"), torch.tensor([[5]])
    cache = model.layers[1].attention.kv_cache.k_cache
    _, sources = run_and_get_code(lambda: engine.decode(idx, idx, 64))
    code = "\n".join(sources)
    assert code.count("torch.ops.tokenbus.rotate_write.default(") == 1  # one block serves all
    assert "clone" not in code and "auto_functionalized" not in code
    assert cache[0, :, 5].any() and not cache[0, :, 6:].any()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_can_leave_memory_once_its_weights_are_packed(tmp_path):
    """Of a mapped file the system drops what is clean, and nothing of it is ever written."""
    shape = CONFIG | {"hidden_size": 384, "intermediate_size": 1024}
    path = write_checkpoint(tmp_path, shape, torch.bfloat16)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())  # what is on the disk is clean
    model = load_model(path, "cpu")
    model.setup_caches(1, 64)
    Engine(model).prefill([[1, 2, 3]])
    assert model.output.tiles is not None
    pages = dict.fromkeys(("Rss", "Private_Dirty", "Shared_Dirty"), 0)  # in kB
    mapping = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if "-" in key:
            mapping = line
        elif str(path) in mapping and key[:-1] in pages:
            pages[key[:-1]] += int(values[0])
    stored = sum(module.weight.nbytes for module in model.modules() if isinstance(module, Linear))
    assert pages["Rss"] * 1024 > 0.9 * stored
    assert pages["Private_Dirty"] == pages["Shared_Dirty"] == 0
