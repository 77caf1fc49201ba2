"""Eight-bit layers: how far they round, and that training does not notice."""

import copy

import torch
from torch import nn

from feedforward_recon.model.fp8 import (
    FakeFp8Linear,
    StoredFp8Linear,
    fake_quantise,
    fake_quantised,
    linear_rows,
    stored_in_fp8,
    unquantised,
)


def samples():
    return torch.randn(50, 64, generator=torch.Generator().manual_seed(0))


def test_normal_values_keep_three_bits_after_the_first():
    x = samples()
    scale = x.abs().amax(-1, keepdim=True) / 448
    normal = x.abs() >= scale * 2**-6  # below, E4M3 is subnormal: absolute steps
    error = (fake_quantise(x) - x).abs()
    assert (error[normal] <= x.abs()[normal] * 2**-4 * 1.0001).all()
    assert (error[~normal] <= (scale * 2**-10 * 1.0001).expand_as(x)[~normal]).all()


def test_rounding_twice_is_rounding_once():
    once = fake_quantise(samples())
    torch.testing.assert_close(fake_quantise(once), once, rtol=1e-6, atol=1e-7)


def test_gradients_pass_straight_through():
    x = samples().requires_grad_()
    fake_quantise(x).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * fake_quantise(x).detach())


def test_rows_of_zeros_stay_zero():
    assert torch.equal(fake_quantise(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_a_network_is_quantised_and_restored_with_the_same_parameters():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    plain, before = network(samples()), copy.deepcopy(network.state_dict())
    rounded = fake_quantised(network)(samples())
    assert isinstance(network[0], FakeFp8Linear)
    assert 0 < (rounded - plain).abs().max() < 0.1
    network.load_state_dict(before)
    assert torch.equal(unquantised(network)(samples()), plain)


def test_stored_weights_take_a_quarter_and_answer_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    rounded = copy.deepcopy(network)
    with torch.no_grad():
        for layer in (rounded[0], rounded[2]):
            layer.weight.copy_(fake_quantise(layer.weight))
    expected = rounded(samples())
    stored = stored_in_fp8(network)
    torch.testing.assert_close(stored(samples()), expected)
    assert stored[0].weight.element_size() == 1
    again = stored_in_fp8(nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)))
    again.load_state_dict(stored.state_dict())
    assert torch.equal(again(samples()), stored(samples()))


def test_some_rows_are_those_rows():
    for linear in (nn.Linear(64, 12), FakeFp8Linear(64, 12), StoredFp8Linear(nn.Linear(64, 12))):
        torch.testing.assert_close(linear_rows(linear, samples(), slice(4, 8)),
                                   linear(samples())[:, 4:8])
