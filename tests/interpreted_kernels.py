"""The Triton kernels in the interpreter, against float64 and the project's own path.

test_kernels_cuda.py runs this in a process of its own: the interpreter is chosen when Triton loads.
"""

import interpreter  # noqa: F401  # isort: skip  (before Triton)
import copy

import pytest
import torch
import torch.nn.functional as F

import kernels_cuda
import linear as linear_file
import matmul_cuda
import mixture as mixture_file
import model as model_file
from conftest import CONFIG, random_model
from linear import Int8ActivationLinear, Linear, linear_for
from matmul_cuda import Weight, dequantized, linear, product, product_of_codes
from mixture import MixtureOfExperts
from model import Mixture, RMSNorm, apply_rotary_emb
from quantize import quantize

BF16, FP16 = torch.bfloat16, torch.float16
BOUNDS = {BF16: 4e-3, FP16: 5e-4}  # of the norm: x and the weights are exact, y is rounded


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The code of a GPU with 2 SMs, PTX included, served to the CPU."""
    kernels_cuda.register("CPU")
    with pytest.MonkeyPatch.context() as patch:
        for file in (kernels_cuda, matmul_cuda):
            patch.setattr(file, "target", lambda device: ("cuda", 2))
        patch.setattr(kernels_cuda, "supported", lambda device: True)
        for file in (linear_file, mixture_file):
            patch.setattr(file, "kernels_for", lambda device: kernels_cuda)
        yield


def close(y, exact, bound) -> bool:
    return ((y.double() - exact).norm() / exact.norm()).item() < bound


def stored(scheme: str, width: int, height: int, dtype, bias=False) -> tuple[Weight, torch.Tensor]:
    """A random weight as it is stored, and its exact value; `scheme` is `int4 g32`, say."""
    generator = torch.Generator().manual_seed(width + height)
    plain = Linear(width, height, bias)
    kind, _, group = scheme.partition(" g")
    tensors = {"weight": torch.randn(height, width, generator=generator)}
    if kind != "bf16":
        tensors = quantize(tensors["weight"], kind, int(group or 0))
    if bias:
        tensors["bias"] = torch.randn(height, generator=generator)
    module = linear_for(plain, tensors)
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False).to(dtype)
    grids = [getattr(module, n, None) for n in ("scales", "scales_a8", "scales_and_zeros")]
    grid = next((grid.data for grid in grids if grid is not None), None)
    return Weight(kind, module.weight.data, grid, module.bias), module.double().dequantize()


INT4 = [f"int4 g{group}" for group in (32, 64, 128, 256)]
CASES = [("bf16", 576, 35), ("int8", 576, 35), ("int4 g32", 576, 35), ("int4 g64", 576, 5)]
CASES = [(*case, dtype) for case in CASES for dtype in (BF16, FP16)]
CASES += [(scheme, 2048, 16, BF16) for scheme in ("bf16", "int8", *INT4)]
CASES += [(scheme, 14336, 3, BF16) for scheme in ("bf16", "int4 g32")]
CASES += [("bf16", 8, 1, BF16), ("int8", 16, 9, BF16), ("int4 g32", 32, 2, BF16)]


@pytest.mark.parametrize("scheme, width, height, dtype", CASES)
def test_a_product_is_exact_and_a_row_has_the_same_bits_alone(scheme, width, height, dtype):
    weight, exact = stored(scheme, width, height, dtype)
    x = torch.randn(32, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = linear(x, weight)
    assert y.dtype == dtype and close(y, x.double() @ exact.t(), BOUNDS[dtype])
    for rows in (slice(13, 14), slice(0, 3), slice(7, 16)):
        assert linear(x[rows], weight).equal(y[rows])


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4 g32"])
def test_norm_gate_bias_and_residual_are_part_of_a_product(scheme):
    weight, exact = stored(scheme, 160, 21, BF16, bias=True)
    gate, gate_exact = stored(scheme, 160, 21, BF16, bias=True)
    norm = RMSNorm(160, 1e-5).requires_grad_(False).bfloat16()
    generator = torch.Generator().manual_seed(2)
    norm.weight.normal_(1, 0.2, generator=generator)
    x, add = (torch.randn(9, n, generator=generator).bfloat16() for n in (160, 21))
    normed = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    normed *= norm.weight.double()
    up, down = F.linear(normed, exact, weight.bias.double()), x.double() @ exact.t()
    silu = F.silu(F.linear(normed, gate_exact, gate.bias.double()))
    assert close(linear(x, weight, norm=norm), up, 0.005)
    assert close(linear(x, weight, norm=norm, gate=gate), silu * up, 0.007)
    down = down + weight.bias.double() + add.double()
    assert close(linear(x, weight, add=add), down, 0.004)
    both = linear(x, weight, norm=norm, gate=gate)
    assert linear(x[4:5], weight, norm=norm, gate=gate).equal(both[4:5])


@pytest.mark.parametrize("scheme", ["int8", *INT4])
def test_prefill_multiplies_by_the_dequantized_weight(scheme, monkeypatch):
    """A part of it at a time where the whole would take much memory."""
    weight, exact = stored(scheme, 512 if "256" in scheme else 384, 21, BF16)
    x = torch.randn(2, exact.shape[1], generator=torch.Generator().manual_seed(3)).bfloat16()
    rounded = dequantized(x, weight, range(21))
    assert (rounded.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert close(rounded, exact, 2e-3)  # half of the last of 8 bits
    whole = product(x, weight, prefill=True)
    assert whole.equal(F.linear(x, rounded))
    assert dequantized(x, weight, range(5, 19)).equal(rounded[5:19])
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, w, out: (sizes.append(w.nbytes), mm(x, w, out=out)))
    monkeypatch.setattr(matmul_cuda, "SCRATCH", 10 * 2 * x.shape[1] + 7)
    assert close(product(x, weight, prefill=True), whole.double(), 1e-3)
    assert len(sizes) == 3 and max(sizes) <= matmul_cuda.SCRATCH


def test_int8_activations_are_rounded_once_and_summed_as_integers():
    weight, _ = stored("int8-activation", 576, 24, BF16)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(40, 576, generator=generator) * torch.logspace(-3, 3, 40).unsqueeze(1)
    x[5] = 0
    x = x.bfloat16()
    step = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    codes = (x.float() / step).round().double() @ weight.packed.double().t()
    expected = (codes.float() * step * weight.grid.float()).bfloat16()
    for rows in (1, 9, 40):  # 40: by torch's own product
        y = product_of_codes(x[:rows], weight.packed, weight.grid, None)
        assert y.equal(expected[:rows])
    x[0, 3] = float("nan")
    for rows in (1, 9, 40):
        y = product_of_codes(x[:rows], weight.packed, weight.grid, None)
        assert y[0].isnan().all() and y[1:].equal(expected[1:rows])


# ---- Experts -------------------------------------------------------------------------------------

OPTIONS = Mixture(experts=8, chosen=3, width=32, renormalize=True)


def random_experts(scheme: str, served: bool, dtype=BF16) -> MixtureOfExperts:
    """Experts of 96 columns; w2 is int8 in the scheme `mixed`, the others int4."""
    mixture = MixtureOfExperts(96, OPTIONS, F.silu, None)
    generator = torch.Generator().manual_seed(8)
    for parameter in mixture.requires_grad_(False).parameters():
        parameter.normal_(0, 0.1, generator=generator)
    for name in ("w1", "w3", "w2"):
        kind = {"mixed": "int8" if name == "w2" else "int4"}.get(scheme, scheme)
        if kind != "bf16":
            tensors = quantize(getattr(mixture, name).weight, kind, 32)
            new = linear_for(getattr(mixture, name), tensors)
            new.load_state_dict(tensors, assign=True)
            setattr(mixture, name, new.requires_grad_(False))
    mixture.to(dtype)
    if served:
        for module in (mixture.router, mixture.w1, mixture.w3, mixture.w2):
            module.pack_weights()
    return mixture


EXPERTS = [("bf16", BF16, 0.007), ("bf16", FP16, 0.001), ("int8", BF16, 0.007)]
EXPERTS += [("int4", BF16, 0.009), ("mixed", BF16, 0.009), ("int8-activation", BF16, 0.012)]


@pytest.mark.parametrize("scheme, dtype, bound", EXPERTS)
def test_the_chosen_experts_are_three_launches_after_the_router_and_give_what_the_modules_give(
    scheme, dtype, bound, launches
):
    """No other expert is read, and a row has the same bits alone."""
    mixture, plain = (random_experts(scheme, served, dtype) for served in (True, False))
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(9)).to(dtype)
    chosen, shares = mixture.router(x, False)
    others = [i for i in range(8) if i not in chosen]
    for floats in (mixture.w1, mixture.w3, mixture.w2):
        values = next(p for p in reversed([*floats.parameters()]) if p.is_floating_point())
        values[others] = float("nan")
    launches.clear()
    y = mixture(x, False)
    rounding = ["quantize_kernel"] * (scheme == "int8-activation")
    products = [*rounding, "linear_kernel"] * 2
    assert launches == ["linear_kernel", *products, "sum_experts_kernel"] and len(others) > 1
    usual = plain.by_row(x, chosen, shares).double()
    exact = copy.deepcopy(plain).double().by_row(x.double(), chosen, shares)
    if scheme == "int8-activation":  # what enters a product is rounded by definition
        exact = usual
    assert y.dtype == dtype and close(y, exact, bound) and close(usual, exact, bound)
    assert close(y, plain.by_expert(x, chosen, shares, False).double(), 1.5 * bound)
    assert mixture(x[1:], False).equal(y[1:])


def test_experts_are_added_in_the_order_of_their_numbers():
    """Whatever order their shares have; in float32 that decides the last bits."""
    mixture = random_experts("bf16", True)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(9)).bfloat16()
    chosen, shares = mixture.router(x, False)
    y = mixture.by_operator(x, chosen, shares, False)
    order = [2, 0, 1]
    assert mixture.by_operator(x, chosen[:, order], shares[:, order], False).equal(y)
    parts = [mixture.by_operator(x, chosen[:, [i]], torch.ones(2, 1), False) for i in range(3)]
    total, parts = torch.zeros_like(y), torch.stack(parts, 1)  # [2, 3, dim]
    for i in range(3):
        place = chosen.argsort(1)[:, i : i + 1]
        part = parts.take_along_dim(place.unsqueeze(-1), 1)[:, 0]
        total += part * shares.take_along_dim(place, 1)
    assert y.equal(total)


def test_experts_without_an_operator_go_the_plain_way():
    """Another activation, two schemes in one launch, rounded inputs of one alone, or a hook."""
    assert random_experts("int4", True).has_operator(False, gpu=True)
    mixture = random_experts("bf16", True)
    handle = mixture.w2.register_forward_hook(lambda *_: None)
    assert not mixture.has_operator(False, gpu=True)
    handle.remove()
    assert mixture.has_operator(False, gpu=True) and not mixture.has_operator(True, gpu=True)
    odd = random_experts("int8-activation", True)
    handle = odd.w2.peak.register_forward_hook(lambda *_: None)
    assert not odd.has_operator(False, gpu=True)
    handle.remove()
    mixture.act = F.gelu
    assert not mixture.has_operator(False, gpu=True)
    mixture.act, mixture.w3 = F.silu, random_experts("int8", True).w3
    assert not mixture.has_operator(False, gpu=True)
    mixture.w3, mixture.w2 = mixture.w1, odd.w2
    assert not mixture.has_operator(False, gpu=True)


# ---- Attention -----------------------------------------------------------------------------------

ATTENTION = [  # H, KV, D, S, window, sinks
    (8, 2, 64, 130, 0, True),
    (6, 2, 48, 99, 40, False),
    (4, 4, 128, 70, 0, False),
]


@pytest.mark.parametrize("heads, kv_heads, head_dim, length, window, sinks", ATTENTION)
def test_attention_is_exact_for_every_position(
    heads, kv_heads, head_dim, length, window, sinks
):  # fmt: skip
    """Rows at the padding slot see nothing, no row reads it, and none depends on its neighbours."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, kv_heads, length + 1, head_dim)
    k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    k[:, :, -1] = v[:, :, -1] = float("nan")
    sink = torch.randn(heads, generator=generator) if sinks else None
    rows = [[0, 1, 31, 32, length - 1], [63, length, 5, length, length - 2]]
    positions = torch.tensor(rows)
    q = torch.randn(2, 5, heads, head_dim, generator=generator).bfloat16()
    y = kernels_cuda.attend(q, k, v, positions, 0.2, window, sink).view(q.shape)
    for b in range(2):
        for t, position in enumerate(rows[b]):
            if position == length:
                assert not y[b, t].any()
                continue
            seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
            ks, vs = (
                c[b, :, seen].double().repeat_interleave(heads // kv_heads, 0) for c in (k, v)
            )
            scores = torch.einsum("hd,hld->hl", q[b, t].double(), ks) * 0.2
            if sinks:
                scores = torch.cat((scores, sink.double().unsqueeze(1)), 1)
            weights = scores.softmax(1)[:, : ks.shape[1]]
            assert close(y[b, t], torch.einsum("hl,hld->hd", weights, vs), 6e-3), (b, t)
    alone = kernels_cuda.attend(q[:1, 4:], k[:1], v[:1], positions[:1, 4:], 0.2, window, sink)
    assert alone.view(heads, head_dim).equal(y[0, 4])


def test_attention_takes_a_batch_in_turns_where_its_splits_would_take_much(monkeypatch, launches):
    """And gives the same bits: the memory of the partial sums is bounded, for any batch."""
    generator = torch.Generator().manual_seed(6)
    k, v = (torch.randn(4, 1, 71, 32, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(3, 2, 2, 32, generator=generator).bfloat16()
    positions = torch.tensor([[3, 4], [60, 61], [30, 70]])
    whole = kernels_cuda.attend(q, k, v, positions, 0.2, 0, None)
    assert launches == ["attend_kernel", "merge_kernel"]
    launches.clear()
    taken, launch = [], kernels_cuda.launch

    def sized(kernel, grid, *args, **constants):
        if kernel is kernels_cuda.attend_kernel:
            taken.append(args[5].nbytes + args[6].nbytes)
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(kernels_cuda, "launch", sized)
    monkeypatch.setattr(kernels_cuda, "SCRATCH", 20000)  # of two rows: 17408 bytes
    assert kernels_cuda.attend(q, k, v, positions, 0.2, 0, None).equal(whole)
    assert launches == ["attend_kernel", "merge_kernel"] * 2 and max(taken) <= 20000
    monkeypatch.setattr(kernels_cuda, "SCRATCH", 1)
    assert kernels_cuda.attend(q, k, v, positions, 0.2, 0, None).equal(whole)


def test_attention_of_a_prefill_is_that_of_decoding():
    generator = torch.Generator().manual_seed(6)
    k, v = (torch.randn(1, 1, 61, 64, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(1, 40, 2, 64, generator=generator).bfloat16()
    positions, sinks = torch.arange(10, 50)[None], torch.zeros(2)
    positions[0, 20] = 60  # padding
    many = kernels_cuda.attend(q, k, v, positions, 0.125, 32, sinks)
    few = kernels_cuda.attend(q[:, 16:24], k, v, positions[:, 16:24], 0.125, 32, sinks)
    assert close(many[:, 16:24], few.double(), 5e-3) and not many[0, 20].any()


@pytest.mark.parametrize("normed", [False, True])
def test_rotating_writes_keys_and_values_where_they_stand(normed):
    generator = torch.Generator().manual_seed(7)
    qkv = torch.randn(2, 2, 8, 24, generator=generator).bfloat16()  # 4 heads, 2 KV heads
    caches = [torch.zeros(3, 2, 11, 24).bfloat16() for _ in range(2)]
    angles = torch.randn(11, 12, generator=generator)
    table = torch.stack((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([[4, 5], [0, 10]])
    norms = [RMSNorm(24, 1e-6).requires_grad_(False).bfloat16() for _ in range(2)]
    for norm in norms:
        norm.weight.normal_(1, 0.2, generator=generator)
    gains = [norm.weight if normed else None for norm in norms]
    q = kernels_cuda.rotate_write(qkv, positions, table, *gains, 1e-6, *caches)
    apply = [norm.float() if normed else (lambda x: x) for norm in norms]
    parts = qkv.float().split((4, 2, 2), dim=2)
    want = [apply_rotary_emb(f(x), table[positions]) for f, x in zip(apply, parts[:2], strict=True)]
    rows = torch.arange(2).unsqueeze(1)
    assert close(q, want[0].double(), 3e-3)
    assert close(caches[0][rows, :, positions], want[1].double(), 3e-3)
    assert caches[1][rows, :, positions].equal(qkv[:, :, 6:])
    assert all(cache.count_nonzero() == 2 * 2 * 2 * 24 for cache in caches)


# ---- The project's own models --------------------------------------------------------------------

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 70}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}


def build(family: str, scheme: str):
    """A model of two layers; `mixed` is int8 attention, int4 FFN and a bf16 output."""
    model = random_model(CONFIG | SMALL | FAMILIES[family])
    for name, module in [*model.named_modules()]:
        kind = scheme
        if scheme == "mixed":
            kind = "int8" if "attention" in name else "int4"
        kept = kind == "bf16" or name == "output" and (model.args.tied or scheme == "mixed")
        if isinstance(module, Linear) and not kept:
            tensors = quantize(module.weight.data, kind, 32)
            if module.bias is not None:
                tensors["bias"] = module.bias.data
            new = linear_for(module, tensors)
            new.load_state_dict(tensors, assign=True)
            model.set_submodule(name, new)
    if model.args.tied:
        model.output.weight = model.tok_embeddings.weight
    return model.requires_grad_(False).bfloat16()


def served(model, monkeypatch):
    """The model with its weights and caches served by the kernels."""
    for file in (linear_file, model_file):
        monkeypatch.setattr(file, "kernels_for", lambda device: kernels_cuda)
    model.pack_weights()
    model.setup_caches(1, 48)
    monkeypatch.undo()
    return model


@pytest.fixture
def launches(monkeypatch):
    names, launch = [], matmul_cuda.launch

    def counted(kernel, *args, **constants):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **constants)

    with pytest.MonkeyPatch.context() as patch:
        for file in (kernels_cuda, matmul_cuda):
            patch.setattr(file, "launch", counted)
        yield names


MODELS = [("llama", "int4"), ("qwen2", "int8"), ("qwen3", "bf16"), ("qwen3", "mixed")]
TEXT = torch.arange(40)[None] * 7 % 70


def prefilled(model):
    model.setup_caches(1, 48)
    model(TEXT[:, :37], torch.arange(37)[None], 48)
    return model


def caches(model) -> list[torch.Tensor]:
    return [b for name, b in model.named_buffers() if "cache" in name and "freqs" not in name]


@torch.inference_mode()
@pytest.mark.parametrize("family, scheme", [*MODELS, ("llama", "int8-activation")])
def test_a_model_by_the_kernels_is_the_model(family, scheme, monkeypatch, launches):
    """By operators and by the fused step, 3 tokens at once and one by one."""
    monkeypatch.setattr(linear_file, "kernels_for", lambda device: None)
    monkeypatch.setattr(model_file, "kernels_for", lambda device: None)
    plain, true = prefilled(build(family, scheme)), prefilled(build(family, scheme).float())
    model = served(build(family, scheme), monkeypatch)
    for cache, filled in zip(caches(model), caches(plain), strict=True):
        cache.copy_(filled)
    idx, pos = TEXT[:, 37:], torch.arange(37, 40)[None]
    want, usual = (m(idx, pos, 48) for m in (true, plain))
    bound = 2 * (usual.logits - want.logits).norm() / want.logits.norm() + 0.002
    assert close(model(idx, pos, 48).logits, want.logits.double(), bound)
    step = kernels_cuda.fuse(model)
    if scheme == "int8-activation":
        assert step is None
        return
    launches.clear()
    logits, hidden = step(idx, pos, 48)
    assert len(launches) == 2 * 7 + 1, launches
    assert close(logits, want.logits.double(), bound)
    assert close(hidden, want.hidden.double(), 0.05)
    assert step(idx[:, 1:2], pos[:, 1:2], 48)[0].equal(logits[:, 1:2])


@torch.inference_mode()
def test_the_fused_step_refuses_what_it_does_not_know(monkeypatch):
    model = served(build("qwen3", "bf16"), monkeypatch)
    assert kernels_cuda.fuse(model)
    args = model.args
    for field, value in dict(
        residual_scale=0.5, act="gelu", logit_cap=30.0, qk_norm="flat"
    ).items():
        model.args = args.share(1)
        object.__setattr__(model.args, field, value)
        assert kernels_cuda.fuse(model) is None, field
    model.args = args
    handle = model.layers[0].attention.wo.register_forward_hook(lambda *_: None)
    assert kernels_cuda.fuse(model) is None
    handle.remove()
    assert kernels_cuda.fuse(model)
    model.output.tiles = None
    assert kernels_cuda.fuse(model) is None


def test_a_weight_is_served_as_it_is_stored_or_not_at_all():
    """No second copy of a weight; what has no kernel is told by None."""
    assert kernels_cuda.can_launch(torch.device("cpu"))
    for scheme in ("bf16", "int8", "int4 g32"):
        weight, _ = stored(scheme, 96, 5, BF16)
        packed, grid = kernels_cuda.pack(weight.packed, weight.grid)
        assert packed is weight.packed and grid is weight.grid
    assert kernels_cuda.pack(torch.zeros(4, 12).bfloat16()) is None  # 24 bytes
    assert kernels_cuda.pack(torch.zeros(4, 16)) is None  # float32
    assert kernels_cuda.pack(torch.zeros(4, 24, dtype=torch.int8), torch.ones(4).bfloat16()) is None
    codes, grid = torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 4, 2).bfloat16()
    assert kernels_cuda.pack(codes, grid) is None  # groups of 16
    assert Int8ActivationLinear(16, 4).scales_a8 is not None  # what `fuse` knows it by
    assert kernels_cuda.take_cache(torch.zeros(1, 1, 2, 512).bfloat16())
    assert not kernels_cuda.take_cache(torch.zeros(1, 1, 2, 64))
    assert not kernels_cuda.take_cache(torch.zeros(1, 1, 2, 576).bfloat16())
