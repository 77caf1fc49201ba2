"""The training of the memory's keys: the loss falls, runs resume, keys load, errors are said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from feedforward_recon.memory.keys import load_keys
from feedforward_recon.training import memory
from feedforward_recon.training.cli import main as train
from feedforward_recon.training.memory import MemoryTrainer, MemoryTraining
from feedforward_recon.training.memory_scenes import MemoryScene

DIM, POINTS, VIEWS, NOISE = 16, 300, 8, 0.1


def scene(seed):
    """Points before a row of cameras, each with a descriptor of its own that views disturb.

    Descriptors differ between views in a few directions alone: there is something to learn.
    """
    rng = np.random.default_rng(seed)
    points = rng.uniform((-2, -2, 3), (2, 2, 6), (POINTS, 3))
    own = rng.normal(size=(POINTS, DIM))
    T_cam_world = np.tile(np.eye(4), (VIEWS, 1, 1))
    T_cam_world[:, 0, 3] = np.linspace(-0.5, 0.5, VIEWS)
    noise = NOISE * rng.normal(size=(VIEWS, POINTS, DIM))
    noise[..., :4] *= 15
    descriptors = own + noise
    descriptors /= np.linalg.norm(descriptors, axis=-1, keepdims=True)
    view = np.repeat(np.arange(VIEWS), POINTS)
    return MemoryScene(descriptors.reshape(-1, DIM).astype(np.float16),
                       np.tile(points, (VIEWS, 1)).astype(np.float32), view.astype(np.int32),
                       rng.random(len(view)) < 0.2, T_cam_world, np.full(VIEWS, 300.0))


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(memory, 'ROUNDS', 2)
    monkeypatch.setattr(memory, 'read_memory_scenes',
                        lambda rooms, photos, cache: map(scene, range(rooms)))


def trainer(out, **changes):
    out.mkdir(exist_ok=True)
    return MemoryTrainer(MemoryTraining(**{
        'out': str(out), 'rooms': 9, 'steps': 6, 'samples': 600, 'queries': 100, 'save_every': 2,
        **changes}))


def test_the_loss_falls_in_scenes_never_trained_on(tmp_path):
    training = trainer(tmp_path, steps=200, save_every=200, learning_rate=0.2)
    before = training.validate()
    list(training.run())
    after = training.validate()
    assert after['loss'] < 0.9 * before['loss']
    assert after['same cell'] > 1.5 * before['same cell']
    assert json.loads((tmp_path / 'log.jsonl').read_text())['step'] == 200


def test_a_resumed_run_ends_with_the_same_keys(tmp_path):
    through = trainer(tmp_path / 'a')
    assert list(through.run()) == [1, 2, 3, 4, 5, 6]
    for step in trainer(tmp_path / 'b').run():
        if step == 3:  # the last state that was saved is that of step 2
            break
    again = trainer(tmp_path / 'b')
    assert again.step == 2
    list(again.run())
    assert torch.equal(through.weight, again.weight) and torch.equal(through.bias, again.bias)
    assert (tmp_path / 'a' / 'log.jsonl').read_text() == (tmp_path / 'b' / 'log.jsonl').read_text()
    untouched = trainer(tmp_path / 'c')
    assert not torch.equal(untouched.weight, again.weight)


def test_the_saved_keys_are_those_that_were_trained(tmp_path):
    training = trainer(tmp_path)
    list(training.run())
    keys = load_keys(tmp_path / 'keys.safetensors')
    assert keys.dim == DIM
    assert torch.equal(keys.weight, training.weight.detach().half().float())
    assert torch.equal(keys.bias, training.bias.detach().half().float())
    places = keys.places(scene(0).descriptors, 1, 500)
    assert places.min() >= 0 and places.max() < 500


def test_too_few_scenes_are_one_sentence(tmp_path, monkeypatch, capsys):
    assert train(['memory', '--out', str(tmp_path), '--rooms', '1']) == 2
    monkeypatch.undo()
    photos = tmp_path / 'photos'
    photos.mkdir()
    assert train(['memory', '--out', str(tmp_path), '--photos', str(photos)]) == 2
    few, none = capsys.readouterr().err.splitlines()
    assert few.startswith('error: expected at least 2 scenes, found 1')
    assert none.startswith(f'error: expected scenes with a tracks.npz in {photos}, found none')
