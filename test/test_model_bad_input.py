"""What users get wrong with networks and weights: one clear sentence each, and exit code 2."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_network import SMALL
from torch import nn

from feedforward_recon.cli import main
from feedforward_recon.model import configs
from feedforward_recon.model.weights.registry import FOLDER_VARIABLE, package_folder


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine without fetched weights, where `vggt-tiny` is a network of a few layers."""
    monkeypatch.setitem(configs.CONFIGS, 'vggt-tiny', SMALL)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / 'weights'))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.chdir(tmp_path)


def walk(*sizes_hw):
    """A folder of noise images."""
    folder, rng = Path('walk'), np.random.default_rng(0)
    folder.mkdir()
    for index, size_hw in enumerate(sizes_hw):
        noise = rng.integers(0, 255, (*size_hw, 3)).astype(np.uint8)
        cv2.imwrite(f'{folder}/{index}.png', noise)
    return folder


def state(attention=None):
    """Random weights of the small network."""
    torch.manual_seed(0)
    return {key: tensor.clone() for key, tensor
            in configs.build('vggt-tiny', attention).state_dict().items()}


def refused(capsys, *arguments):
    """The one line in which the command refuses."""
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith('note:')]
    assert code == 2 and len(lines) == 1, err
    line = lines[0]
    assert line.startswith('error: ') and all(word in line for word in ('expected', 'found', ';'))
    assert '. ' not in line and 'Traceback' not in out
    return line


def refused_map(capsys, folder, *options):
    return refused(capsys, 'map', folder, '--out', 'map', '--model', 'vggt-tiny', *options)


class Mischief:
    """An object whose unpickling would call a function."""

    def __reduce__(self):
        return print, ('executed',)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def truncated_safetensors(path):
    save_file(state(), path)
    cut(path)


def truncated_pt(path):
    torch.save(state(), path)
    cut(path)


def of_another_model(path):
    save_file({'layer.weight': torch.zeros(3, 3)}, path)


def of_another_attention(path):
    save_file(state('ttt'), path)


def of_another_size(path):
    save_file({**state(), 'camera_head.trunk_norm.weight': torch.zeros(7)}, path)


def pickled_object(path):
    torch.save({'weight': Mischief()}, path)


def pickled_network(path):
    torch.save(nn.Linear(2, 2), path)


def web_page(path):
    path.write_text('<!DOCTYPE html><title>not found</title>', encoding='ascii')


def not_numbers(path):
    save_file({key: torch.full_like(tensor, torch.nan) for key, tensor in state().items()}, path)


FILES = [(truncated_safetensors, 'w.safetensors', 'damaged'), (truncated_pt, 'w.pt', 'damaged'),
         (of_another_model, 'w.safetensors', 'checkpoint of another model'),
         (of_another_attention, 'w.safetensors', 'or of another attention'),
         (of_another_size, 'w.safetensors', 'trunk_norm.weight [7] instead of [96]'),
         (pickled_object, 'w.pt', 'other Python objects, which are never loaded'),
         (pickled_network, 'w.pt', 'other Python objects, which are never loaded'),
         (web_page, 'w.pt', 'damaged'), (web_page, 'w.safetensors', 'damaged'),
         (web_page, 'w.onnx', 'expected weights as .safetensors')]


@pytest.mark.parametrize(('make', 'name', 'words'), FILES)
def test_weights_that_cannot_be_used(make, name, words, tmp_path, capsys):
    make(tmp_path / name)
    said = refused_map(capsys, walk((60, 80), (60, 80)), '--weights', f'./{name}')
    assert words in said and name in said
    assert not (tmp_path / 'map').exists()
    checked = main(['weights', 'check', f'./{name}', '--model', 'vggt-tiny'])
    out, err = capsys.readouterr()
    assert checked == 2 and words in err.splitlines()[-1] and 'executed' not in out + err


def test_weights_that_are_no_numbers(tmp_path, capsys):
    not_numbers(tmp_path / 'w.safetensors')
    said = refused_map(capsys, walk((60, 80), (60, 80)), '--weights', './w.safetensors')
    assert 'not finite' in said and 'check that the weights belong' in said


@pytest.mark.parametrize('command', ['get', 'check'])
def test_a_wrong_hash(command, tmp_path, capsys):
    content = bytearray((package_folder() / 'compact.safetensors').read_bytes())
    content[-1] ^= 1
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights' / 'compact.safetensors').write_bytes(content)
    assert 'expected SHA-256 f5da2afe' in refused(capsys, 'weights', command, 'compact')


def test_a_licence_that_nobody_accepted(tmp_path, capsys):
    said = refused(capsys, 'weights', 'get', 'vggt-1b')
    assert 'expected agreement to the licence of vggt-1b (CC BY-NC 4.0)' in said
    assert '--accept-licence' in said and not (tmp_path / 'weights').exists()


@pytest.mark.parametrize(('options', 'words'), [
    (('--model', 'vggt'), 'run `ffrecon weights get vggt-1b`'),
    (('--weights', 'no/such.pt'), 'found no file'),
    (('--weights', 'vgt-1b'), 'did you mean vggt-1b'),
    (('--model', 'vgt'), 'did you mean vggt'),
    (('--device', 'cuda:99'), "found 'cuda:99'; use cpu"), (('--device', 'warp'), "found 'warp'"),
    (('--attention', 'tttt'), 'did you mean ttt'), (('--attention', 'flash'), 'choose one of'),
    (('--model', 'vgg-t3', '--attention', 'flash', '--device', 'cuda:99'), 'cuda:99')])
def test_what_is_not_there(options, words, capsys):
    said = refused(capsys, 'map', walk((60, 80), (60, 80)), '--out', 'map', '--model', 'tiny',
                   *options)
    assert words in said


@pytest.mark.parametrize(('sizes_hw', 'words'), [
    ([(10, 12)] * 2, 'at least 14x14 pixels, the patch of the network, found 12x10'),
    ([(13, 300)] * 2, 'found 300x13'), ([(20, 900)] * 2, 'less elongated images'),
    ([(60, 80), (60, 80), (50, 80)], 'expected 80x60 pixels like 0.png, found 80x50')])
def test_images_that_no_network_can_see(sizes_hw, words, tmp_path, capsys):
    save_file(state(), tmp_path / 'w.safetensors')
    assert words in refused_map(capsys, walk(*sizes_hw), '--weights', './w.safetensors')
