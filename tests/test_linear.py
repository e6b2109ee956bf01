"""Every way of storing a weight multiplies as its float reference does, for any number of rows."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from linear import Int4Linear, Linear, int_matmul, linear_for, pack_int4, unpack_int4
from quantize import dequantize, quantize

SCHEMES = ["int8", "int8-activation", "int4"]
# Relative error of the products: what rounding in the precision of x allows, and, where x itself is
# rounded to int8, what that costs (half a step of 1/127 of a row's maximum).
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def stored_linear(scheme, width, height, dtype, bias=True) -> Linear:
    torch.manual_seed(width)
    plain = Linear(width, height, bias)
    plain.weight.data.normal_()
    tensors = quantize(plain.weight.data, scheme, 32)
    if bias:
        tensors["bias"] = plain.bias.data.normal_()
    linear = linear_for(plain, tensors)
    linear.load_state_dict(tensors, assign=True)
    linear = linear.requires_grad_(False).to(dtype)
    linear.pack_weights()
    return linear


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width, height", [(96, 48), (64, 50), (256, 64)])
def test_kernels_agree_with_the_float_reference(scheme, dtype, width, height):
    linear = stored_linear(scheme, width, height, dtype)
    weight, bias = linear.float().dequantize(), linear.bias.float()
    linear = stored_linear(scheme, width, height, dtype)
    bound = 0.02 if scheme == "int8-activation" else BOUNDS[dtype]
    for rows in (*range(1, 10), 31, 32, 33, 64, 65, 200):
        x = torch.randn(1, rows, width).to(dtype)
        y, expected = linear(x), F.linear(x.float(), weight, bias)
        assert y.shape == (1, rows, height) and y.dtype == dtype
        assert (y.float() - expected).norm() / expected.norm() < bound, rows


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_int8_activations_are_rounded_once_and_then_exact(rows):
    linear = stored_linear("int8-activation", 96, 48, torch.float32, bias=False)
    x = torch.randn(rows, 96) * torch.logspace(-3, 3, rows).unsqueeze(1)
    step = x.abs().amax(1, keepdim=True) / 127
    expected = (x / step).round() @ linear.weight.float().t() * step * linear.scales_a8
    assert torch.allclose(linear(x), expected, rtol=1e-6, atol=0)


def test_a_row_of_zeros_gives_the_bias():
    for scheme in SCHEMES:
        linear = stored_linear(scheme, 96, 48, torch.float32)
        assert torch.allclose(linear(torch.zeros(1, 96))[0], linear.bias, atol=1e-6), scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_compiled_graphs_serve_all_numbers_of_rows(scheme):
    linear = stored_linear(scheme, 96, 48, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=True)
    one = torch.compile(linear, fullgraph=True)
    x = torch.randn(1, 200, 96)
    compiled(x[:, :7]), compiled(x[:, :50]), one(x[:, :1])
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 31, 32, 33, 64, 65, 200):
            expected = linear(x[:, :rows])
            assert torch.allclose(compiled(x[:, :rows]), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(one(x[:, :1]), linear(x[:, :1]), rtol=1e-4, atol=1e-4)


def test_int4_codes_pack_and_unpack():
    codes = torch.randint(16, (6, 64), dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.shape == (6, 32) and unpack_int4(packed).equal(codes)
    assert packed[0, 0] == codes[0, 0] * 16 + codes[0, 1]  # the even column in the high half


def test_int4_value_is_code_minus_8_times_scale_plus_zero():
    linear = Int4Linear(64, 2, groups=2)
    codes = torch.arange(128, dtype=torch.uint8).view(2, 64) % 16
    grid = torch.tensor([[[1.0, 10.0], [2.0, 20.0]], [[3.0, 30.0], [4.0, 40.0]]])  # [group, out, 2]
    linear.load_state_dict({"weight": pack_int4(codes), "scales_and_zeros": grid}, assign=True)
    weight = linear.dequantize()
    assert weight[1, 3] == (3 - 8) * 2.0 + 20.0 and weight[1, 35] == (3 - 8) * 4.0 + 40.0


def test_rounding_errors_are_bounded():
    torch.manual_seed(0)
    weight, linear = torch.randn(64, 256), Linear(256, 64)
    row_step = weight.abs().amax(1, keepdim=True) / 127
    for scheme in ("int8", "int8-activation"):
        error = (dequantize(linear, quantize(weight, scheme, 32)) - weight).abs()
        assert (error <= row_step * 1.01).all()  # half a step, and bf16's rounding of the scale
    errors = {}
    for size in (32, 64, 128, 256):
        error = dequantize(linear, quantize(weight, "int4", size)) - weight
        groups = weight.view(64, -1, size)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        plain = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
        errors[size] = error.square().mean()
        assert errors[size] < (plain - groups).square().mean()  # clipping is searched for
    assert errors[32] < errors[64] < errors[128] < errors[256]


def test_weights_that_are_4_bit_already_stay_as_they_are():
    torch.manual_seed(0)
    codes = torch.randint(16, (8, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * 0.25 - 2).flatten(1)
    assert dequantize(Linear(128, 8), quantize(weight, "int4", 32)).equal(weight)


def test_constant_and_zero_weights_quantize():
    for value in (0.0, 1.0, -3.0):
        weight = torch.full((16, 64), value)
        for scheme in SCHEMES:
            result = dequantize(Linear(64, 16), quantize(weight, scheme, 32))
            assert torch.allclose(result, weight, rtol=1e-2, atol=1e-6), (scheme, value)


@pytest.mark.parametrize("width", [2, 30, 86, 100, 576])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("compiler", [False, True])
def test_int8_of_any_width_needs_no_kernels(width, dtype, compiler, monkeypatch):
    """A rank's slice of 86 columns, say, which neither our kernels nor PyTorch's own one take."""
    if not compiler:
        monkeypatch.setattr(kernels, "load", lambda: False)
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(40, width, generator=generator)
    linear = linear_for(Linear(width, 40), tensors := quantize(weight, "int8", 32))
    linear.load_state_dict(tensors, assign=True)
    linear.requires_grad_(False).to(dtype).pack_weights()
    for rows in (1, 2, 8, 33):
        x = torch.randn(rows, width, generator=generator).to(dtype)
        expected = x.float() @ (tensors["weight"].float() * tensors["scales"].float()[:, None]).t()
        assert (linear(x).float() - expected).norm() / expected.norm() < 0.01


def test_integers_are_multiplied_exactly_where_a_device_has_only_floats():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 5000), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (40, 5000), dtype=torch.int8, generator=generator)
    x[0], weight[0] = 127, -128  # the largest sums
    assert torch.equal(int_matmul(x, weight).long(), x.long() @ weight.long().t())


def test_packing_twice_packs_once(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: False)
    linear = Int4Linear(64, 32, groups=2).requires_grad_(False)
    linear.pack_weights()
    first = linear.packed
    linear.pack_weights()
    assert first is not None and linear.packed is first
