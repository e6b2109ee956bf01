"""Grids of 4 bits: exact where they can be, and best where it matters."""

import pytest
import torch

from linear import unpack_int4
from rounding import find_grid, quantize_int4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(groups, scale, zero):
    codes = ((groups - zero[:, None]) / scale[:, None]).round().clamp(-8, 7)
    return codes * scale[:, None] + zero[:, None]


def error(groups, grid, weights):
    return (weights * (rounded(groups, *grid) - groups).square()).sum(1)


def whole_range(groups):
    low, high = groups.aminmax(dim=1)
    scale = ((high - low) / 15).bfloat16().float()
    return scale, ((low + high + scale) / 2).bfloat16().float()


def test_weights_on_a_grid_of_16_levels_stay_as_they_are():
    codes = torch.randint(-8, 8, (200, 64), generator=torch.Generator().manual_seed(1))
    codes[:, 0], codes[:, 1] = -8, 7
    scale = (draw(200).abs() + 0.1).bfloat16().float() / 64
    zero = draw(200).bfloat16().float() / 64
    groups = codes * scale[:, None] + zero[:, None]
    assert torch.equal(rounded(groups, *find_grid(groups)), groups)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("known", [False, True])
def test_what_errors_cost_is_less_than_on_the_whole_range(size, known):
    groups = draw(500, size) * 0.02 + 0.01 * draw(500, 1, seed=1)
    inputs = draw(size, seed=2).square() if known else None
    costs = inputs if known else groups.square() + groups.square().mean(1, keepdim=True)
    found, plain = (
        error(groups, g, costs) for g in (find_grid(groups, inputs), whole_range(groups))
    )
    assert (found < 1.02 * plain).all()  # the fit ends in bf16
    assert found.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("value", [0.0, 0.125, -3.0, 1e-30])
def test_a_constant_group_is_kept(value):
    groups = torch.full((3, 32), value)
    for weights in (None, torch.rand(32), torch.zeros(32)):
        scale, zero = find_grid(groups, weights)
        assert (scale > 0).all() and zero.isfinite().all()
        assert torch.allclose(rounded(groups, scale, zero), groups, rtol=0.01, atol=1e-8)


def test_unknown_inputs_are_as_good_as_equal_ones():
    groups = draw(50, 64)
    unknown, equal = (find_grid(groups, weights) for weights in (torch.zeros(64), torch.ones(64)))
    assert torch.equal(torch.stack(unknown), torch.stack(equal))


def test_the_grid_is_what_is_stored_and_each_column_has_its_own_weight():
    weight, inputs = draw(7, 128) * 0.02, draw(128, seed=3).square()
    packed, grids = quantize_int4(weight, 32, inputs)
    codes = unpack_int4(packed).float().view(7, 4, 32)
    for group in range(4):
        columns = slice(32 * group, 32 * group + 32)
        scale, zero = find_grid(weight[:, columns], inputs[columns])
        assert torch.equal(grids[group].float(), torch.stack((scale, zero), -1))
        value = (codes[:, group] - 8) * scale[:, None] + zero[:, None]
        assert torch.equal(value, rounded(weight[:, columns], scale, zero))
