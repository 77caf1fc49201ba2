"""Frames on two processes give what one process gives."""

import dataclasses
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_attention_laws import ALL, POSITIONS, TOKENS, TttOptions, call, make, tokens

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.registry import attention_factory
from feedforward_recon.model.backbone import SPECIAL, BackboneConfig
from feedforward_recon.model.collection import CollectionNetwork
from feedforward_recon.model.distributed import (
    AcrossProcesses,
    DistributedCollectionNetwork,
    gather_frames,
    own_frames,
    predict_distributed,
    sequence_parallel,
)
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.predictor import NetworkPredictor
from feedforward_recon.model.vggt import Vggt, VggtConfig
from feedforward_recon.model.vit import VitConfig

FRAMES = 5  # an odd number: the shares differ
WINDOWS = [(0, 1), (3, 2), (4, 0)], [(1, 4)]  # of photos, in two batches
CASES = [(name, 1) for name in ALL] + [('ttt', 2)]


NETWORK = VggtConfig(BackboneConfig(VitConfig(32, 2, 2, grid=3), 4, (0, 1, 2, 3)),
                     DptConfig(64, 16, (8, 8, 16, 16)))


def network_of(name, alignment=0):
    torch.manual_seed(3)
    backbone = dataclasses.replace(NETWORK.backbone, alignment=alignment)
    network = Vggt(dataclasses.replace(NETWORK, backbone=backbone),
                   attention_factory(name, special=SPECIAL)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        last = network.camera_head.pose_branch.fc2  # its angles of view are to be positive
        last.weight[-2:], last.bias[-2:] = 0, 0.25
    return network


def images():
    return torch.rand(1, FRAMES, 3, 28, 42, generator=torch.Generator().manual_seed(4))


def said_together(network):
    """What all processes say of one scene."""
    with torch.no_grad():
        answer, memory = predict_distributed(network, own_frames(images()))
    return {'pose_encodings': gather_frames(answer.pose_encodings, 2),
            'depth': gather_frames(answer.depth), 'points': gather_frames(answer.points),
            'camera_tokens': memory.camera_tokens}


def said_of_photos(kind, align):
    """What a network says of windows of a collection, and what it encoded."""
    network = kind(NetworkPredictor(network_of('softmax', alignment=2)), align=align)
    photos = np.random.default_rng(0).integers(0, 256, (FRAMES, 28, 42, 3), np.uint8)
    placed = [network.prepared(photo) for photo in photos]
    collection = network.collected(placed, [np.eye(3)] * FRAMES)
    said = [one for windows in WINDOWS for one in collection.predict(windows)]
    return {'tokens': network.encoded(placed).numpy(),
            **{name: np.stack([getattr(one, name) for one in said])
               for name in ('T_world_cam', 'K', 'depth', 'confidence')}}


def refusal_of_one_photo():
    network = DistributedCollectionNetwork(NetworkPredictor(network_of('softmax')))
    with pytest.raises(ConfigError) as error:
        network.collected([network.prepared(np.zeros((28, 42, 3), np.uint8))], [np.eye(3)])
    return str(error.value)


def layer_of(name, steps):
    return make(name, ttt=TttOptions(steps=steps))


def share_of_a_process(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank,
                            world_size=2)
    frames = tokens(FRAMES).unflatten(1, (FRAMES, TOKENS))
    own = own_frames(frames).flatten(1, 2)
    found = {}
    for name, steps in CASES:
        layer = layer_of(name, steps)
        with sequence_parallel(layer), torch.no_grad():
            out, state = layer(own, layer.empty_state(2), positions=POSITIONS,
                               frames=own.shape[1] // TOKENS, tokens_per_frame=TOKENS, write=True)
        found[name, steps] = gather_frames(out, 1), state.tensors()
    for name in ALL:
        found[name] = said_together(network_of(name))
    found['aligned'] = said_together(network_of('softmax', alignment=2))
    for align in (False, True):
        found['photos', align] = said_of_photos(DistributedCollectionNetwork, align)
    found['refusal'] = refusal_of_one_photo()
    torch.save(found, f'{results}.{rank}')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    results = tmp_path_factory.mktemp('processes') / 'found.pt'
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(share_of_a_process, (port, str(results)), nprocs=2)
    return [torch.load(f'{results}.{rank}', weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(('name', 'steps'), CASES)
def test_two_processes_equal_one(two_processes, name, steps):
    expected, state = call(layer_of(name, steps), tokens(FRAMES))
    found, tensors = two_processes[0][name, steps]
    torch.testing.assert_close(found, expected)
    for key, tensor in state.tensors().items():
        torch.testing.assert_close(tensors[key], tensor, msg=key)


@pytest.mark.parametrize('name', [*ALL, 'aligned'])
def test_whole_networks_on_two_processes_equal_one(two_processes, name):
    network = network_of('softmax', alignment=2) if name == 'aligned' else network_of(name)
    with torch.no_grad():
        answer, memory = network(images())
    expected = {**vars(answer), 'camera_tokens': memory.camera_tokens}
    for key, found in two_processes[0][name].items():
        error = (found - expected[key]).abs().max() / expected[key].abs().max()
        assert error <= 1e-5, key


@pytest.mark.parametrize('align', [False, True])
def test_photos_on_two_processes_are_encoded_and_decoded_as_on_one(two_processes, align):
    expected = said_of_photos(CollectionNetwork, align)
    for key, value in expected.items():
        for found in two_processes:  # all know all answers
            error = np.abs(found['photos', align][key] - value).max() / np.abs(value).max()
            assert error <= 1e-5, key
    other = two_processes[0]['photos', not align]['depth']
    assert not np.allclose(expected['depth'], other, rtol=1e-3)  # the alignment does something


def test_fewer_photos_than_processes_are_one_sentence(two_processes):
    assert 'at least as many images as processes, found 1 for 2' in two_processes[1]['refusal']


def test_without_a_process_group_the_sentence_says_what_to_do():
    with pytest.raises(ConfigError, match='start with torchrun'):
        AcrossProcesses()
