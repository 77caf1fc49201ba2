"""Large collections: in pieces, in place and elsewhere, the answers are those of one go."""

import dataclasses

import pytest
import torch
from test_model_networks import da3, difference, images, pi3, vggt

from feedforward_recon.model import da3 as da3_module
from feedforward_recon.model import layers
from feedforward_recon.model import vggt as vggt_module
from feedforward_recon.model.attention.registry import ATTENTION
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.layers import Block, BlockConfig, in_chunks
from feedforward_recon.model.predictor import NetworkPredictor

TOLERANCE = 1e-6
COUNT = 7
FAMILIES = [vggt, pi3, da3]


def answers(make, demand=None, **options):
    if demand is not None:
        options['demand'] = demand
    with torch.inference_mode():
        return make()(images(COUNT), **options)


def fields(said):
    """All but K: fields of view of random weights give focal lengths without bound."""
    return [f.name for f in dataclasses.fields(said) if f.name != 'K']


def dense_maps(said):
    """The fields of an answer that have one map per frame."""
    return [f.name for f in dataclasses.fields(said)
            if f.name.startswith(('depth', 'points', 'confidence', 'ray'))]


@pytest.fixture
def small_chunks(monkeypatch):
    """Two frames of 6 patches and their special tokens at a time, heads three."""
    monkeypatch.setattr(layers, 'CHUNK_TOKENS', 24)
    for module in (vggt_module, da3_module):
        monkeypatch.setattr(module, 'FRAMES_PER_CHUNK', 3)


@pytest.mark.parametrize('make', FAMILIES)
def test_chunks_of_frames_give_what_one_go_gives(make, small_chunks, monkeypatch):
    in_pieces, _ = answers(make)
    monkeypatch.undo()
    whole, _ = answers(make)
    for name in fields(whole):
        assert difference(getattr(in_pieces, name), getattr(whole, name)) <= TOLERANCE, name


@pytest.mark.parametrize('attention', ATTENTION)
def test_every_attention_works_in_chunks_and_remembers_the_same(attention, small_chunks,
                                                                 monkeypatch):
    in_pieces, remembered = answers(lambda: vggt(attention))
    monkeypatch.undo()
    whole, expected = answers(lambda: vggt(attention))
    assert difference(in_pieces.depth, whole.depth) <= TOLERANCE
    assert difference(in_pieces.T_cam_world, whole.T_cam_world) <= TOLERANCE
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(remembered.tensors()[name], tensor, rtol=1e-4, atol=1e-5,
                                   msg=name)


@pytest.mark.parametrize('make', FAMILIES)
def test_dense_maps_of_some_frames_are_those_of_all(make, small_chunks):
    whole, _ = answers(make)
    wanted = [4, 1]
    some, _ = answers(make, Demand(frames=wanted))
    for name in fields(whole):
        full, part = getattr(whole, name), getattr(some, name)
        expected = full[:, wanted] if name in dense_maps(whole) else full
        assert difference(part, expected) <= TOLERANCE, name


@pytest.mark.parametrize('make', FAMILIES)
def test_a_memory_that_is_not_wanted_is_not_kept(make):
    kept, memory = answers(make)
    dropped, same = answers(make, Demand(memory=False))
    name = 'points' if make is pi3 else 'depth'
    assert torch.equal(getattr(kept, name), getattr(dropped, name))
    states = same if isinstance(same, tuple) else same.states
    assert all(state.keys.numel() == 0 for state in states)
    states = memory if isinstance(memory, tuple) else memory.states
    assert all(state.keys.numel() > 0 for state in states)


def test_points_that_are_not_wanted_are_none():
    said, _ = answers(vggt, Demand(points=False))
    everything, _ = answers(vggt)
    assert said.points.shape == (1, 0, 28, 42, 3) and said.points_confidence.shape[1] == 0
    assert torch.equal(said.depth, everything.depth)


@pytest.mark.parametrize('make', FAMILIES)
def test_images_are_left_as_they_were(make, small_chunks):
    given = images(COUNT)
    before = given.clone()
    with torch.inference_mode():
        make()(given)
    assert torch.equal(given, before)


def test_a_block_takes_the_place_of_its_input_only_when_it_may(small_chunks):
    torch.manual_seed(0)
    block = Block(BlockConfig(16, 2)).eval()
    x = torch.rand(9, 6, 16)
    with torch.no_grad():
        expected = block(x)
        untouched = x.clone()
        assert torch.equal(x, untouched)
        again = block(x, reuse=True)
    assert again.data_ptr() == x.data_ptr()
    torch.testing.assert_close(again, expected)
    learning = block(untouched, reuse=True)
    assert learning.requires_grad and learning.data_ptr() != untouched.data_ptr()


def test_chunks_widen_when_their_results_do():
    """Under autocast the first block makes float32 of half precision."""
    x = torch.rand(5, 2).bfloat16()
    with torch.no_grad():
        doubled, = in_chunks(lambda part: (2 * part.float(),), (x,), 2, into=x)
    assert doubled.dtype == torch.float32 and torch.equal(doubled, 2 * x.float())


@pytest.mark.parametrize(('device', 'count', 'offload'), [
    ('cpu', 1000, False), ('cuda', 64, False), ('cuda', 65, True)])
def test_many_images_on_a_gpu_wait_in_main_memory(device, count, offload, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    caplog.set_level('INFO')
    demand = NetworkPredictor(vggt(), device)._demand(count, True)
    assert demand == Demand(points=False, offload=offload)
    if device == 'cuda':
        assert ('main memory' in caplog.text) is offload


@pytest.mark.parametrize('make', FAMILIES)
def test_cameras_alone_are_an_answer_too(make):
    whole, _ = answers(make)
    none, _ = answers(make, Demand(frames=[]))
    name = 'T_world_cam' if make is pi3 else 'T_cam_world'
    assert torch.equal(getattr(none, name), getattr(whole, name))
    assert all(getattr(none, field).shape[1] == 0 for field in dense_maps(whole))
