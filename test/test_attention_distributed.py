"""Frames on two processes give what one process gives."""

import socket

import pytest
import torch
import torch.distributed as dist
from test_attention_laws import ALL, POSITIONS, TOKENS, TttOptions, call, make, tokens

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.registry import attention_factory
from feedforward_recon.model.backbone import SPECIAL, BackboneConfig
from feedforward_recon.model.distributed import (
    AcrossProcesses,
    gather_frames,
    own_frames,
    predict_distributed,
    sequence_parallel,
)
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.vggt import Vggt, VggtConfig
from feedforward_recon.model.vit import VitConfig

FRAMES = 5  # an odd number: the shares differ
CASES = [(name, 1) for name in ALL] + [('ttt', 2)]


NETWORK = VggtConfig(BackboneConfig(VitConfig(32, 2, 2, grid=3), 4, (0, 1, 2, 3)),
                     DptConfig(64, 16, (8, 8, 16, 16)))


def network_of(name):
    torch.manual_seed(3)
    network = Vggt(NETWORK, attention_factory(name, special=SPECIAL)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def images():
    return torch.rand(1, FRAMES, 3, 28, 42, generator=torch.Generator().manual_seed(4))


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
        with torch.no_grad():
            answer, memory = predict_distributed(network_of(name), own_frames(images()))
        found[name] = {'pose_encodings': gather_frames(answer.pose_encodings, 2),
                       'depth': gather_frames(answer.depth),
                       'points': gather_frames(answer.points),
                       'camera_tokens': memory.camera_tokens}
    if rank == 0:
        torch.save(found, results)
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    results = tmp_path_factory.mktemp('processes') / 'found.pt'
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(share_of_a_process, (port, str(results)), nprocs=2)
    return torch.load(results)


@pytest.mark.parametrize(('name', 'steps'), CASES)
def test_two_processes_equal_one(two_processes, name, steps):
    expected, state = call(layer_of(name, steps), tokens(FRAMES))
    found, tensors = two_processes[name, steps]
    torch.testing.assert_close(found, expected)
    for key, tensor in state.tensors().items():
        torch.testing.assert_close(tensors[key], tensor, msg=key)


@pytest.mark.parametrize('name', ALL)
def test_whole_networks_on_two_processes_equal_one(two_processes, name):
    with torch.no_grad():
        answer, memory = network_of(name)(images())
    expected = {**vars(answer), 'camera_tokens': memory.camera_tokens}
    for key, found in two_processes[name].items():
        error = (found - expected[key]).abs().max() / expected[key].abs().max()
        assert error <= 1e-5, key


def test_without_a_process_group_the_sentence_says_what_to_do():
    with pytest.raises(ConfigError, match='start with torchrun'):
        AcrossProcesses()
