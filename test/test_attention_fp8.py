"""Eight-bit layers: how far they round, and that training does not notice."""

import copy

import pytest
import torch
from torch import nn

from feedforward_recon.model import fp8
from feedforward_recon.model.fp8 import (
    FakeFp8Linear,
    StoredFp8Conv,
    StoredFp8Linear,
    StoredFp8Matrices,
    fake_quantise,
    fake_quantised,
    fp8_product,
    linear_rows,
    multiplies_fp8,
    storage_note,
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


@pytest.mark.parametrize('conv', [
    nn.Conv2d(16, 8, 3, 2, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1, groups=16),
    nn.Conv2d(16, 8, 14, 14), nn.ConvTranspose2d(16, 8, 4, 4), nn.ConvTranspose2d(16, 8, 2, 2)])
def test_stored_convolutions_are_those_of_the_rounded_filters(conv):
    """Each output channel has a scale of its own, wherever the layer keeps its outputs."""
    outputs = 1 if isinstance(conv, nn.ConvTranspose2d) else 0
    with torch.no_grad():  # channels of very different sizes
        conv.weight.movedim(outputs, -1).mul_(torch.logspace(-3, 3, conv.out_channels))
        rounded = copy.deepcopy(conv)
        rows = conv.weight.movedim(outputs, 0).flatten(1)
        rounded.weight.movedim(outputs, 0).copy_(
            fake_quantise(rows).view_as(conv.weight.movedim(outputs, 0)))
    maps = torch.randn(2, 16, 28, 28, generator=torch.Generator().manual_seed(0))
    stored = StoredFp8Conv(conv)
    assert stored.weight.shape == conv.weight.shape and stored.weight.element_size() == 1
    torch.testing.assert_close(stored(maps), rounded(maps))


def test_stored_matrices_are_widened_with_the_scale_of_their_columns():
    matrices = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))
    rows = matrices.movedim(-1, 0).flatten(1)
    torch.testing.assert_close(StoredFp8Matrices(matrices)(),
                               fake_quantise(rows).unflatten(1, (3, 8)).movedim(0, -1))


@pytest.mark.parametrize('layer', [StoredFp8Linear(nn.Linear(64, 32)),
                                   StoredFp8Conv(nn.Conv2d(50, 8, 1))])
def test_stored_layers_answer_in_the_precision_of_autocast(layer):
    x = samples() if isinstance(layer, StoredFp8Linear) else samples()[None, :, None]
    with torch.autocast('cpu', torch.bfloat16):
        half = layer(x)
    assert half.dtype is layer(x.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x), rtol=0.02, atol=0.02)


# -- where products are of numbers in E4M3 (torch._scaled_mm also runs on a CPU) -------------


@pytest.fixture
def units(monkeypatch):
    """A CPU that says it has FP8 units; how often they were asked."""
    asked = []
    monkeypatch.setattr(fp8, 'multiplies_fp8', lambda device: device.type == 'cpu')
    monkeypatch.setattr(fp8, 'fp8_product',
                        lambda *given: asked.append(given) or fp8_product(*given))
    return asked


def rounded_reference(linear, x):
    with torch.no_grad():
        return fake_quantised(copy.deepcopy(linear))(x)


def test_products_in_fp8_are_those_of_rounded_weights_and_tokens(units):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    x = samples() * torch.logspace(-3, 3, 50)[:, None]  # tokens of very different sizes
    stored = StoredFp8Linear(linear)
    with torch.autocast('cpu', torch.bfloat16):
        said = stored(x.unflatten(0, (5, 10)))
    assert len(units) == 1 and said.dtype is torch.bfloat16 and said.shape == (5, 10, 32)
    expected = rounded_reference(linear, x)
    # What bfloat16 leaves of sum and bias: 8 bits.
    error = (said.flatten(0, 1).float() - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() < 2**-7
    widened = (stored(x) - expected).abs().amax(1) / expected.abs().amax(1)
    assert widened.max() > 2**-7  # tokens were rounded: this is another product


def test_some_rows_are_multiplied_alone(units):
    stored = StoredFp8Linear(nn.Linear(64, 48))
    x = samples().bfloat16()
    torch.testing.assert_close(linear_rows(stored, x, slice(16, 48)), stored(x)[:, 16:])
    assert len(units) == 2


def test_float32_and_odd_sizes_are_widened(units):
    StoredFp8Linear(nn.Linear(64, 32))(samples())
    for inputs, outputs in ((60, 32), (64, 24)):
        StoredFp8Linear(nn.Linear(inputs, outputs))(samples()[:, :inputs].bfloat16())
    assert not units


def test_a_cpu_has_no_units_and_this_is_said():
    assert not multiplies_fp8(torch.device('cpu'))
    assert storage_note(torch.device('cpu')) == (
        'weights are kept in fp8 and widened for each product: cpu has no FP8 units')


@pytest.mark.parametrize(('capability', 'refusal', 'expected'), [
    ((8, 6), None, False), ((8, 9), None, True), ((9, 0), None, True),
    ((9, 0), RuntimeError('scales must be numbers'), False)])
def test_a_gpu_has_units_if_it_can_be_seen_to_multiply(monkeypatch, capability, refusal, expected):
    def product(*_):
        if refusal is not None:
            raise refusal
    ones = torch.ones(16, 16)
    monkeypatch.setattr(torch, 'ones', lambda *_, **__: ones)  # there is no such GPU here
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    monkeypatch.setattr(fp8, 'fp8_product', product)
    multiplies_fp8.cache_clear()
    assert multiplies_fp8(torch.device('cuda:0')) is expected
    multiplies_fp8.cache_clear()
