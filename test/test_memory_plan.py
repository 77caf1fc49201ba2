"""Windows that main memory has no room for are foreseen, and in which precision they run."""

import numpy as np
import pytest
import torch
from small_network import SMALL

from feedforward_recon.errors import TooManyImagesError
from feedforward_recon.model import memory_plan
from feedforward_recon.model import predictor as module
from feedforward_recon.model.configs import build, network_of
from feedforward_recon.model.memory_plan import (
    WindowNeed,
    available_bytes,
    check_room,
    window_need,
)
from feedforward_recon.model.predictor import NetworkPredictor, half_of_generation, half_precision

SIZE_HW = (392, 518)


def need_of(name, half=True, given_hw=SIZE_HW):
    return window_need(build(name, device='meta'), SIZE_HW, given_hw, half=half)


def test_as_many_fit_as_are_needed_for():
    need = WindowNeed(1000, 10, 50)
    for images in (1, 7, 8, 9, 40):
        assert need.fits(need.of(images)) == images
        assert need.fits(need.of(images) - 1) == images - 1
    assert need.fits(5) == 0


def test_what_a_view_of_vggt_adds_is_what_was_measured():
    """Beyond the weights 4 views took 1.68 GB (benchmarks/results/window_memory.json)."""
    network = build('vggt-1b', device='meta')
    weights = sum(4 * p.numel() for p in network.parameters())
    need = need_of('vggt-1b')
    assert 1.68e9 < need.of(4) - weights < 1.25 * 1.68e9


@pytest.mark.parametrize('name', ['vggt', 'vgg-t3', 'pi3', 'speed3r', 'da3', 'lite3r-vggt'])
def test_more_images_larger_ones_and_wider_numbers_need_more(name):
    need = need_of(name)
    assert need.of(33) > need.of(32) > need.of(2) > 1e8
    assert need_of(name, half=False).of(32) > need.of(32)
    assert need_of(name, given_hw=(1080, 1920)).of(32) > need.of(32)


def test_windows_of_a_small_network_are_not_planned():
    assert need_of('tiny') is None


def test_free_memory_is_what_the_system_says(tmp_path, monkeypatch):
    file = tmp_path / 'meminfo'
    monkeypatch.setattr(memory_plan, 'MEMORY', file)
    assert available_bytes(torch.device('cpu')) is None
    file.write_text('MemTotal: 9 kB\nMemAvailable:   12 kB\n')
    assert available_bytes(torch.device('cpu')) == 12 * 1024
    check_room(WindowNeed(0, 1), 10**9, None)  # where nothing says it, nothing is refused


def test_a_window_that_does_not_fit_is_refused_before_it_is_computed(monkeypatch):
    predictor = NetworkPredictor(network_of(SMALL))
    images = [np.zeros((60, 80, 3), np.uint8)] * 5
    need = window_need(predictor.network, (42, 56), (60, 80), half=False)
    monkeypatch.setattr(module, 'available_bytes', lambda device: need.of(3))
    monkeypatch.setattr(predictor.network, 'forward', lambda *_, **__: pytest.fail('computed'))
    with pytest.raises(TooManyImagesError, match='5 images at once need') as caught:
        predictor.predict(images)
    assert caught.value.fits == 3


def test_two_bytes_are_those_that_a_gpu_multiplies(monkeypatch):
    assert [half_of_generation(major) for major in (6, 7, 8, 9)] == [
        None, torch.float16, torch.bfloat16, torch.bfloat16]
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    network, gpu = network_of(SMALL), torch.device('cuda')
    assert half_precision(network, gpu) == torch.float16
    # Sums over all tokens of a scene go beyond what float16 can hold.
    linear = type(SMALL)(**{**vars(SMALL), 'attention': 'sparse_linear'})
    assert half_precision(network_of(linear), gpu) is None
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    assert half_precision(network_of(linear), gpu) == torch.bfloat16
    assert half_precision(network, torch.device('cpu')) is None
