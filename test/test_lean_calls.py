"""What a call of a network does not do: hold what nobody wants, and wait for its device."""

import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from small_network import SMALL

from feedforward_recon.model.attention import sparse, sparse_linear, ttt
from feedforward_recon.model.attention.base import Layout
from feedforward_recon.model.attention.blocks import cut
from feedforward_recon.model.attention.config import SparseLinearOptions, TttOptions
from feedforward_recon.model.attention.registry import ATTENTION
from feedforward_recon.model.attention.sparse_linear import replace_local
from feedforward_recon.model.attention.ttt import patch_grid_of
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.configs import network_of
from feedforward_recon.model.da3 import Da3Config
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.layers import GlobalBlock
from feedforward_recon.model.pi3 import Pi3Config
from feedforward_recon.model.ray_transformer import RayConfig, RayTransformer
from feedforward_recon.model.rope import patch_positions
from feedforward_recon.model.vit import VitConfig

VIT = VitConfig(32, 2, 8, grid=3, registers=0)
CONFIGS = {
    'vggt': SMALL, 'pi3': Pi3Config(VitConfig(32, 2, 2, grid=3), 4), 'ray': RayConfig(48, 2, 2),
    'da3': Da3Config(VIT, 4, (4, 5, 6, 7), DptConfig(64, 16, (8, 8, 8, 8), rectify_skip=False))}


def made(name, attention, device='cpu'):
    """A small network of a kind; everywhere: sparse_linear within images as well."""
    torch.manual_seed(0)
    everywhere = attention == 'everywhere'
    kind = 'sparse_linear' if everywhere else attention
    config = type(CONFIGS[name])(**{**vars(CONFIGS[name]), 'attention': kind})
    with torch.device(device):
        network = network_of(config, **({'ttt': TttOptions(steps=2)} if kind == 'ttt' else {}))
        return replace_local(network, SparseLinearOptions()) if everywhere else network


def asked(network, memory=None, device='cpu', **how):
    """One call with three images, in the way of its kind."""
    if isinstance(network, RayTransformer):
        images = torch.rand(1, 3, 3, 32, 48, device=device)
        K = torch.eye(3, device=device).expand(1, 3, 3, 3)
        return network(images, K, memory, **how)
    return network(torch.rand(1, 3, 3, 28, 42, device=device), memory, **how)


@pytest.mark.parametrize(('name', 'attention'), [
    *(('vggt', attention) for attention in ATTENTION),
    *((name, 'softmax') for name in ('pi3', 'da3', 'ray'))])
@torch.inference_mode()
def test_a_state_that_nobody_wants_is_gone_once_its_frames_have_read_it(name, attention):
    """Before the second half of the block, and so before the next layer has one of its own."""
    network, written, alive = made(name, attention), [], []

    def remember(layer, given, answer):
        written.append([weakref.ref(tensor) for tensor in answer[1].tensors().values()])

    def count(mlp, given):
        alive.append(sum(ref() is not None for refs in written for ref in refs))
    blocks = [block for block in network.modules() if isinstance(block, GlobalBlock)]
    for block in blocks:
        block.attn.register_forward_hook(remember)
        block.mlp.register_forward_pre_hook(count)
    _, before = asked(network)
    assert alive[-1] > 0 and len(written) == len(blocks)
    del before
    written.clear(), alive.clear()
    asked(network, demand=Demand(memory=False))
    assert len(written) == len(blocks) and set(alive) == {0}


@pytest.mark.parametrize('name', CONFIGS)
@torch.inference_mode()
def test_without_memory_the_answer_is_the_same_and_the_memory_given_comes_back(name):
    network = made(name, 'softmax')
    _, memory = asked(network)
    torch.manual_seed(1)
    answer, after = asked(network, memory)
    torch.manual_seed(1)
    lean, kept = asked(network, memory, demand=Demand(memory=False))
    assert after is not memory
    for found, given in zip(states_of(kept), states_of(memory), strict=True):
        assert found is given
    assert all(torch.equal(a, b) for a, b in zip(
        vars(lean).values(), vars(answer).values(), strict=True))


def states_of(memory):
    return memory if isinstance(memory, tuple) else memory.states


def on_host(positions, *, special):
    """The positions of the patches of these images, where they can be read."""
    count = len(positions) - special
    grid = {6: (2, 3), 24: (4, 6)}[count]
    return patch_positions(grid, special, torch.device('cpu'))


def blocks_on_meta(layout, special, side, device=None):
    """`cut` of positions whose values nobody can read."""
    positions = layout.positions
    known = positions if positions is None else on_host(positions, special=special)
    return replace(cut(Layout(known, layout.tokens), special, side, device), tokens=layout)


CASES = [(name, attention) for name in CONFIGS for attention in ATTENTION]


@pytest.mark.parametrize(('name', 'attention'), [*CASES, ('vggt', 'everywhere')])
@torch.inference_mode()
def test_a_call_reads_nothing_back_from_its_device(name, attention, monkeypatch):
    """Tensors of the device `meta` have no values: whoever asks for one, fails.

    But for positions of patches, which are asked for once for each size of images (below).
    """
    for module in (sparse, sparse_linear):
        monkeypatch.setattr(module, 'cut', blocks_on_meta)
    monkeypatch.setattr(ttt, 'patch_grid_of', lambda positions, special: patch_grid_of(
        on_host(positions, special=special), special))
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())  # knows no meta
    network = made(name, attention, 'meta').to('meta')  # pi3's constants have values
    answer, memory = asked(network, device='meta')
    assert next(iter(vars(answer).values())).is_meta
    asked(network, memory, 'meta', write=False)


def test_positions_are_asked_for_once_for_each_size():
    positions = patch_positions((5, 7), 3)
    assert patch_positions((5, 7), 3, torch.device('cpu')) is positions
    assert patch_positions((7, 5), 3) is not positions
    blocks = cut(Layout(positions, 38), 3, 4)
    assert cut(Layout(positions, 38), 3, 4) is blocks
    assert cut(Layout(positions.clone(), 38), 3, 4) is not blocks
    asked_before = patch_grid_of.cache_info().misses
    assert [patch_grid_of(positions, 3) for _ in range(3)] == [(5, 7)] * 3
    assert patch_grid_of.cache_info().misses <= asked_before + 1
