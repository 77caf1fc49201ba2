"""Weights are loaded completely and exactly, or refused in one sentence that says why."""

import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from feedforward_recon.errors import CheckpointError, ConfigError
from feedforward_recon.model.attention.registry import attention_factory
from feedforward_recon.model.backbone import BackboneConfig
from feedforward_recon.model.configs import build, load
from feedforward_recon.model.da3 import Da3, Da3Config
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.vggt import Vggt, VggtConfig
from feedforward_recon.model.vit import VitConfig
from feedforward_recon.model.weights.checkpoints import expected_tensors, load_weights, match_keys


def vggt(attention='softmax', device='meta'):
    config = VggtConfig(BackboneConfig(VitConfig(16, 2, 1, grid=2), 4, (0, 1, 2, 3)),
                        DptConfig(32, 8, (4, 4, 4, 4)))
    with torch.device(device):
        return Vggt(config, attention_factory(attention)).eval()


def da3():
    config = Da3Config(VitConfig(16, 1, 8, grid=2, registers=0), 4, (4, 5, 6, 7),
                       DptConfig(32, 8, (4, 4, 4, 4), rectify_skip=False))
    with torch.device('meta'):
        return Da3(config, attention_factory('softmax', special=1)).eval()


def weights(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.05 * torch.randn(shape, generator=generator)
            for key, shape in expected_tensors(model).items()}


def save(tensors, path):
    if path.suffix == '.safetensors':
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def sentence(caught):
    """The message, after checking that it is one line that says what was expected."""
    text = str(caught.value)
    assert 'expected' in text and 'found' in text and '\n' not in text
    return text


@pytest.mark.parametrize('name', ['w.safetensors', 'w.pt'])
def test_every_tensor_arrives(tmp_path, name):
    stored = weights(vggt())
    model = vggt()
    report = load_weights(model, save(stored, tmp_path / name))
    assert report.fits and len(report.sources) == len(stored)
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())
    answer, _ = model(torch.rand(1, 2, 3, 28, 28))
    assert torch.isfinite(answer.depth).all()


def test_half_precision_files_become_float32(tmp_path):
    stored = {key: tensor.half() for key, tensor in weights(vggt()).items()}
    model = vggt()
    load_weights(model, save(stored, tmp_path / 'w.safetensors'))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_tensors_are_mapped_rather_than_copied(tmp_path):
    """Writing into the loaded network must not change the file either."""
    path = save(weights(vggt()), tmp_path / 'w.safetensors')
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    model = vggt()
    load_weights(model, path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_parts_that_we_do_not_have_are_left_out(tmp_path):
    stored = weights(vggt())
    stored['track_head.tracker.weight'] = torch.zeros(2)
    stored['aggregator.patch_embed.mask_token'] = torch.zeros(1, 16)
    report = load_weights(vggt(), save(stored, tmp_path / 'w.safetensors'))
    assert len(report.ignored) == 2


@pytest.mark.parametrize('name', ['tiny', 'vggt-tiny'])
def test_a_network_is_loaded_by_name(name, tmp_path):
    stored = weights(build(name, attention='ttt', device='meta'))
    path = save(stored, tmp_path / 'w.safetensors')
    network = load(name, path, attention='ttt')
    assert not network.training
    assert all(torch.equal(t, stored[key]) for key, t in network.state_dict().items())
    with pytest.raises(CheckpointError, match='missing'):
        load(name, path)


@pytest.mark.parametrize('device', ['cuda:99', 'warp', 'cuda:x', 'meta', 'mps:9'])
def test_devices_that_are_not_there_are_refused(tmp_path, device):
    with pytest.raises(ConfigError) as caught:
        load('tiny', tmp_path / 'w.safetensors', device=device)
    assert device in sentence(caught)


@pytest.mark.parametrize('name', ['conv', 'conf'])
def test_short_convolution_has_two_names(tmp_path, name):
    stored = {key.replace('short_conv_qkv.2.conv', f'short_conv_qkv.2.{name}'): tensor
              for key, tensor in weights(vggt('ttt')).items()}
    model = vggt('ttt')
    load_weights(model, save(stored, tmp_path / 'w.safetensors'))
    key = 'aggregator.global_blocks.1.attn.short_conv_qkv.2.{}.weight'
    assert torch.equal(model.state_dict()[key.format('conv')], stored[key.format(name)])


@pytest.mark.parametrize('level', [0, 3])
def test_a_shared_norm_needs_one_of_its_names(tmp_path, level):
    stored = {key: tensor for key, tensor in weights(da3()).items()
              if '_aux.' not in key or '.2.' not in key.partition('conv2_aux.')[2]
              or f'conv2_aux.{level}.2.' in key}
    model = da3()
    load_weights(model, save(stored, tmp_path / 'w.safetensors'))
    norm = model.head.scratch.output_conv2_aux[3][2].weight
    assert torch.equal(norm, stored[f'model.head.scratch.output_conv2_aux.{level}.2.weight'])
    without = {key: t for key, t in stored.items() if f'conv2_aux.{level}.2.' not in key}
    report = match_keys(da3(), {key: tuple(t.shape) for key, t in without.items()})
    assert len(report.missing) == 8 and not report.unexpected


def test_the_prefix_may_be_missing(tmp_path):
    bare = {key.removeprefix('model.'): tensor for key, tensor in weights(da3()).items()
            if 'conv2_aux.0.2.' not in key}
    assert load_weights(da3(), save(bare, tmp_path / 'w.safetensors')).fits


def test_constants_of_pi3_may_be_missing():
    shapes = expected_tensors(build('pi3', device='meta'))
    without = {key: shape for key, shape in shapes.items() if not key.startswith('image_')}
    assert len(shapes) - len(without) == 2
    assert match_keys(build('pi3', device='meta'), without).fits


def test_speed3r_names_its_blocks_apart():
    model = build('speed3r', device='meta')
    published = {}
    for key, shape in expected_tensors(model).items():
        root, _, rest = key.partition('.')
        if root == 'decoder':
            index, _, rest = rest.partition('.')
            root = f'{("local", "global")[int(index) % 2]}_decoder.{int(index) // 2}'
        published[f'{root}.{rest}' if rest else root] = shape
    assert published['global_decoder.17.attn.gate.0.weight'] == (32, 1024)
    assert not any(key.startswith('decoder') or key == 'register_token' for key in published)
    assert match_keys(model, published).fits


def test_the_report_is_exact(tmp_path):
    stored = weights(vggt())
    gone = 'camera_head.trunk_norm.bias'
    del stored[gone]
    stored['camera_head.extra'] = torch.zeros(3)
    stored['aggregator.camera_token'] = torch.zeros(1, 2, 1, 8)
    report = match_keys(vggt(), {key: tuple(t.shape) for key, t in stored.items()})
    assert report.missing == [gone] and report.unexpected == ['camera_head.extra']
    assert report.misshapen == [('aggregator.camera_token', (1, 2, 1, 16), (1, 2, 1, 8))]
    with pytest.raises(CheckpointError) as caught:
        load_weights(vggt(), save(stored, tmp_path / 'w.safetensors'))
    assert all(word in sentence(caught) for word in (
        '1 missing', gone, '1 unexpected', 'extra', 'camera_token [1, 2, 1, 8] instead'))


@pytest.mark.parametrize(('key', 'shape'), [
    ('camera_head.extra', (3,)), ('aggregator.camera_token', (1, 2, 1, 8)),
    ('camera_head.trunk_norm.bias', None)])
def test_one_wrong_tensor_is_enough_to_refuse(tmp_path, key, shape):
    stored = {**weights(vggt()), key: torch.zeros(shape or 1)}
    if shape is None:
        del stored[key]
    with pytest.raises(CheckpointError, match=key):
        load_weights(vggt(), save(stored, tmp_path / 'w.safetensors'))


def test_a_refused_file_leaves_the_network_untouched(tmp_path):
    stored, model = weights(vggt()), vggt(device='cpu')
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    del stored['camera_head.trunk_norm.bias']
    with pytest.raises(CheckpointError):
        load_weights(model, save(stored, tmp_path / 'w.safetensors'))
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_the_checkpoint_of_another_model_is_refused(tmp_path):
    path = save(weights(da3()), tmp_path / 'w.safetensors')
    with pytest.raises(CheckpointError) as caught:
        load_weights(vggt(), path)
    assert 'another model' in sentence(caught) and 'more)' in sentence(caught)
    assert len(sentence(caught)) < 600


@pytest.mark.parametrize('name', ['w.safetensors', 'w.pt'])
@pytest.mark.parametrize('share', [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, name, share):
    path = save(weights(vggt()), tmp_path / name)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError) as caught:
        load_weights(vggt(), path)
    assert 'damaged' in sentence(caught) and '. ' not in sentence(caught)


@pytest.mark.parametrize('name', ['w.safetensors', 'w.pt'])
def test_a_page_in_the_place_of_weights_is_damaged(tmp_path, name):
    (tmp_path / name).write_text('<!DOCTYPE html><title>not found</title>', encoding='ascii')
    with pytest.raises(CheckpointError) as caught:
        load_weights(vggt(), tmp_path / name)
    assert 'damaged' in sentence(caught)


@pytest.mark.parametrize('options', [{}, {'_use_new_zipfile_serialization': False}])
def test_checkpoints_of_a_training_and_old_files_are_read(tmp_path, options):
    stored = weights(vggt())
    torch.save({'model': stored, 'optim': None, 'step': 7}, tmp_path / 'last.pt', **options)
    model = vggt()
    load_weights(model, tmp_path / 'last.pt')
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())


def test_the_hash_is_checked_first(tmp_path):
    path = save(weights(vggt()), tmp_path / 'w.safetensors')
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    load_weights(vggt(), path, sha256=right.upper())
    with pytest.raises(CheckpointError) as caught:
        load_weights(vggt(), path, sha256='0' * 64)
    assert 'SHA-256 0000' in sentence(caught) and right[:16] in sentence(caught)


class Mischief:
    """An object whose unpickling would call a function."""

    def __reduce__(self):
        return print, ('executed',)


def test_pickles_are_never_run(tmp_path, capsys):
    zipped, plain = tmp_path / 'w.pt', tmp_path / 'w.pth'
    torch.save({'weight': Mischief()}, zipped)
    plain.write_bytes(pickle.dumps({'weight': Mischief()}))
    for path in (zipped, plain):
        with pytest.raises(CheckpointError) as caught:
            load_weights(vggt(), path)
        assert 'never loaded' in sentence(caught)
    assert 'executed' not in capsys.readouterr().out


@pytest.mark.parametrize('content', [{'model': {'w': 1}}, {'net': {'w': torch.zeros(1)}},
                                     [torch.zeros(1)], 7])
def test_only_plain_state_dicts_are_accepted(tmp_path, content):
    path = tmp_path / 'w.pt'
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(vggt(), path)
    assert 'state dict' in sentence(caught)


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path):
    for path in (tmp_path / 'no.safetensors', tmp_path / 'w.onnx'):
        if path.suffix == '.onnx':
            path.write_bytes(b'x')
        with pytest.raises(CheckpointError) as caught:
            load_weights(vggt(), path)
        assert path.name in sentence(caught)
