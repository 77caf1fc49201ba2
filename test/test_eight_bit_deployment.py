"""Networks whose weights are kept in eight bits: how much they take, say and are asked for."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_network import SMALL

from feedforward_recon.cli import main
from feedforward_recon.config.network import PRECISIONS
from feedforward_recon.config.node import NodeConfig, each_setting
from feedforward_recon.console.options import MODEL_FLAGS, NetworkOptions
from feedforward_recon.errors import ConfigError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error
from feedforward_recon.localization import network_localizer
from feedforward_recon.model import fp8
from feedforward_recon.model.configs import CONFIGS, build, load
from feedforward_recon.model.fp8 import network_bytes, precision_of, stored_in_fp8
from feedforward_recon.model.predictor import load_predictor
from feedforward_recon.model.weights.checkpoints import load_weights
from feedforward_recon.session.map_folder import load_map
from feedforward_recon.session.networks import load_network
from feedforward_recon.synthetic import Room, render_walk

CAMERA = Camera.from_fov(68.0, (256, 192))


def command(*arguments):
    return main([str(argument) for argument in arguments])


def one_error(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize('name', ['tiny', 'tiny-ttt', 'vggt-tiny', 'da3-small', 'vggt-1b'])
def test_a_network_takes_a_quarter_of_its_bytes(name):
    network = build(name, device='meta')
    full = network_bytes(network)
    assert full >= 4 * sum(p.numel() for p in network.parameters())
    assert 0.25 < network_bytes(stored_in_fp8(network)) / full <= 0.27


def test_a_file_is_loaded_into_eight_bits_layer_by_layer(monkeypatch, caplog):
    """The same network as one that is converted afterwards, which was empty when it was."""
    kept = []

    def coded(weight, outputs, code=fp8.stored_weights):
        kept.append(weight.device.type)
        return code(weight, outputs)
    monkeypatch.setattr(fp8, 'stored_weights', coded)
    with caplog.at_level(logging.INFO):
        network = load('tiny-ttt', precision='fp8')
    assert kept == sorted(kept, reverse=True) and set(kept) == {'meta', 'cpu'}
    assert 'kept in fp8 and widened for each product' in caplog.text
    expected = stored_in_fp8(load('tiny-ttt')).state_dict()
    assert network.state_dict().keys() == expected.keys()
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == expected[name].dtype and tensor.device.type == 'cpu'
        assert torch.equal(tensor.float(), expected[name].float()), name
    assert (precision_of(network), precision_of(load('tiny-ttt'))) == ('fp8', 'full')


def test_weights_in_half_precision_are_taken_too(tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, 'vggt-tiny', SMALL)
    torch.manual_seed(0)
    halves = {name: t.half() for name, t in build('vggt-tiny').state_dict().items()}
    save_file(halves, tmp_path / 'w.safetensors')
    network = build('vggt-tiny', device='meta')
    load_weights(network, tmp_path / 'w.safetensors', fp8=True)
    assert not any(tensor.is_meta for tensor in network.state_dict().values())


def test_tiny_says_nearly_the_same_in_eight_bits():
    """Measured here: depth 1.0 % off in the mean, poses of neighbours 0.05 degrees."""
    room = Room.generate(7)
    images = [f.image for f in render_walk(room, CAMERA, room.walk(90, seed=0)[:10:5])]
    full, eight = (load_predictor('tiny', precision=p).predict(images, K=CAMERA.K)[0]
                   for p in PRECISIONS)
    seen = (full.depth > 0) & (eight.depth > 0)
    assert seen.mean() > 0.9
    error = np.abs(eight.depth[seen] / full.depth[seen] - 1)
    assert 0 < error.mean() < 0.02
    for a, b in zip(eight.T_world_cam, full.T_world_cam, strict=True):
        metres, degrees = pose_error(a, b)
        assert metres < 0.01 and degrees < 0.2


# -- commands and nodes --------------------------------------------------------------------


def test_precisions_are_named_once():
    assert PRECISIONS == fp8.PRECISIONS
    node, = (s for s in each_setting(NodeConfig()) if s.name == 'precision')
    assert node.value == 'full' and node.spec.metadata['choices'] == PRECISIONS
    assert MODEL_FLAGS['precision'].name == '--precision'
    for chosen in PRECISIONS:
        loaded = load_network(NetworkOptions(model='tiny', precision=chosen))
        assert precision_of(loaded.windows.predictor.network) == chosen
    with pytest.raises(ConfigError, match=r"expected full or fp8 as precision .*'int4'"):
        load('tiny', precision='int4')


@pytest.mark.parametrize(('options', 'sentence'), [
    (('--precision', 'fp8'), 'expected --precision beside a feed-forward network'),
    (('--model', 'tiny', '--precision', 'fp4'), 'expected full or fp8 as precision')])
def test_commands_refuse_other_precisions_in_one_sentence(options, sentence, walk_folder,
                                                          tmp_path, capsys):
    for name in ('map', 'reconstruct'):
        assert command(name, walk_folder, '--out', tmp_path / 'm', *options,
                       *(['--set', 'reconstruction.decoder=transformer']
                         if name == 'reconstruct' and '--model' in options else [])) == 2
        assert sentence in one_error(capsys)


def test_photos_are_reconstructed_in_eight_bits(walk_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert command('reconstruct', walk_folder, '--out', tmp_path / 'm', '--model', 'tiny',
                       '--precision', 'fp8', '--set', 'reconstruction.decoder=transformer',
                       '--step', 5, '--max-frames', 4) == 0
    assert 'weights are kept in fp8' in caplog.text
    assert load_map(tmp_path / 'm').info.keyframes > 0


@pytest.fixture(scope='module')
def fast_map(walk_folder, tmp_path_factory):
    """A map with the fast weights of a network in eight bits, linked whatever it says."""
    out = tmp_path_factory.mktemp('maps') / 'map'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_localizer, 'align_cameras', lambda *_: (np.eye(4), 1.0))
        assert command('map', walk_folder, '--out', out, '--model', 'tiny-ttt', '--precision',
                       'fp8', '--window', 4, '--anchors', 1, '--no-refine', '--step', 5) == 0
    return out


def test_a_map_remembers_the_precision_of_its_network(fast_map, walk_folder, capsys, caplog):
    assert load_map(fast_map).fast_weights().precision == 'fp8'
    assert command('info', fast_map) == 0
    assert 'tiny-ttt (ttt, fp8)' in capsys.readouterr().out
    ask = ('localize', fast_map, walk_folder, '--model', 'tiny-ttt', '--no-refine', '--step', 10)
    with caplog.at_level(logging.INFO):
        assert command(*ask) in (0, 1)
    assert 'weights are kept in fp8' in caplog.text
    capsys.readouterr()
    assert command(*ask, '--precision', 'full') == 2
    assert 'expected the network in precision fp8, which wrote the fast weights of this map, ' \
        'found full; choose that, or map again' in one_error(capsys)
    assert command('localize', fast_map, walk_folder, '--precision', 'fp8') == 2
    assert 'add --model' in one_error(capsys)
