"""Frames on two processes give what one process gives."""

import socket

import pytest
import torch
import torch.distributed as dist
from test_attention_laws import ALL, POSITIONS, TOKENS, TttOptions, call, make, tokens

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.distributed import (
    AcrossProcesses,
    gather_frames,
    own_frames,
    sequence_parallel,
)

FRAMES = 5  # an odd number: the shares differ
CASES = [(name, 1) for name in ALL] + [('ttt', 2)]


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


def test_without_a_process_group_the_sentence_says_what_to_do():
    with pytest.raises(ConfigError, match='start with torchrun'):
        AcrossProcesses()
