"""The comparison with reference outputs notices what it should, and says so in one line."""

import sys

import numpy as np
import pytest
import torch

from benchmarks import golden
from feedforward_recon.model.configs import build

SHAPE = (1, 2, 3, 28, 42)


@pytest.fixture(scope='module')
def reference():
    """Outputs of `vggt-tiny`, filled by the rule, under the names of a reference file."""
    model = build('vggt-tiny', device='meta')
    golden.fill(model)
    random = np.random.Generator(np.random.PCG64(3))
    images = torch.from_numpy(random.random(SHAPE, dtype=np.float32))
    with torch.inference_mode():
        arrays = golden.vggt_arrays(model, images, {})
    return {'image_seed': np.int64(3), 'image_shape': np.array(SHAPE), 'config': 'vggt-tiny',
            **{name: arrays[name].numpy() for name in ('depth', 'pose_enc', 'world_points')}}


def run(monkeypatch, capsys, path, model='vggt-tiny', *more):
    monkeypatch.setattr(sys, 'argv', ['golden.py', str(path), '--model', model, *more])
    status = golden.main()
    out, err = capsys.readouterr()
    assert len((out + err).strip().splitlines()) == 1
    return status, out + err


def saved(tmp_path, arrays):
    np.savez(tmp_path / 'reference.npz', **arrays)
    return tmp_path / 'reference.npz'


def test_equal_outputs_pass(reference, tmp_path, monkeypatch, capsys):
    status, line = run(monkeypatch, capsys, saved(tmp_path, reference))
    assert status == 0 and line.startswith('ok: vggt-tiny') and '3 arrays' in line


def test_the_confidence_of_another_shape_may_differ_by_an_axis(reference, tmp_path, monkeypatch,
                                                               capsys):
    path = saved(tmp_path, {**reference, 'depth': reference['depth'][..., None]})
    assert run(monkeypatch, capsys, path)[0] == 0


@pytest.mark.parametrize('value', [1.001, np.nan])
def test_one_wrong_value_fails(reference, tmp_path, monkeypatch, capsys, value):
    depth = reference['depth'].copy()
    depth[np.unravel_index(depth.argmax(), depth.shape)] *= value
    status, line = run(monkeypatch, capsys, saved(tmp_path, {**reference, 'depth': depth}))
    assert status == 1 and line.startswith('FAILED') and '(depth)' in line


def test_tolerance_is_the_users(reference, tmp_path, monkeypatch, capsys):
    path = saved(tmp_path, {**reference, 'depth': reference['depth'] * 1.001})
    assert run(monkeypatch, capsys, path)[0] == 1
    assert run(monkeypatch, capsys, path, 'vggt-tiny', '--tolerance', '1e-2')[0] == 0


@pytest.mark.parametrize(('change', 'model', 'word'), [
    ({}, 'tinny', 'did you mean tiny'),
    ({'depth': np.zeros(3)}, 'vggt-tiny', 'is it the right'),
    ({'image_seed': None}, 'vggt-tiny', 'no image_seed'),
    ({'depth': None, 'pose_enc': None, 'world_points': None}, 'vggt-tiny',
     'expected arrays of vggt-tiny'),
    ({}, 'tiny', 'published elsewhere, found tiny')])
def test_files_that_do_not_fit_are_refused(reference, tmp_path, monkeypatch, capsys, change,
                                           model, word):
    arrays = {key: value for key, value in {**reference, **change}.items() if value is not None}
    status, line = run(monkeypatch, capsys, saved(tmp_path, arrays), model)
    assert status == 1 and word in line


@pytest.mark.parametrize('content', [None, b'', b'PK', b'no arrays'])
def test_what_is_no_file_of_arrays_is_refused(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / 'no.npz'
    if content is not None:
        path.write_bytes(content)
    status, line = run(monkeypatch, capsys, path)
    assert status == 1 and 'no.npz' in line


def test_the_file_says_the_size_of_the_network(reference, tmp_path, monkeypatch, capsys):
    path = saved(tmp_path, reference)
    assert run(monkeypatch, capsys, path, 'vggt')[1].startswith('ok: vggt-tiny')
    file = golden.read(path)
    assert golden.model_of(file, 'vgg-t3') == 'vgg-t3'  # another attention
    assert golden.model_of(file, 'pi3') == 'pi3' and golden.model_of(file, 'ttt') == 'ttt'


def test_the_rule_depends_on_the_name_and_the_shape():
    assert np.array_equal(golden.rule('a.weight', (3, 4)), golden.rule('a.weight', (3, 4)))
    assert not np.array_equal(golden.rule('a.weight', (3, 4)), golden.rule('b.weight', (3, 4)))
    large = {key: golden.rule(key, shape) for key, shape in (
        ('x.gamma', (9999,)), ('norm.weight', (9999,)), ('fc.bias', (9999,)),
        ('cls_token', (1, 1, 9999)), ('fc.weight', (50, 400)))}
    spread = {key: (round(float(x.mean()), 2), round(float(x.std()), 2))
              for key, x in large.items()}
    assert spread == {'x.gamma': (0.2, 0.05), 'norm.weight': (1.0, 0.1), 'fc.bias': (0.0, 0.05),
                      'cls_token': (0.0, 0.05), 'fc.weight': (0.0, 0.05)}
    assert all(x.dtype == np.float32 for x in large.values())
