"""The transformer's training: losses mean something, runs resume, the shipped weights work."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from feedforward_recon.model import configs
from feedforward_recon.model.backbone import BackboneConfig
from feedforward_recon.model.configs import build
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.predictor import load_predictor
from feedforward_recon.model.vggt import VggtConfig
from feedforward_recon.model.vit import PATCH, VitConfig
from feedforward_recon.model.weights.registry import CHECKPOINTS, located
from feedforward_recon.training import transformer_data as data
from feedforward_recon.training import transformer_losses as losses
from feedforward_recon.training.muon import Muon
from feedforward_recon.training.transformer import (
    TransformerTrainer,
    TransformerTraining,
    held_out_scores,
)
from feedforward_recon.training.transformer_scores import baseline, errors

MICRO = VggtConfig(BackboneConfig(VitConfig(32, 4, 1, grid=8), 4, (0, 1, 2, 3)),
                   DptConfig(64, 8, (8, 8, 8, 8)), camera_depth=1, point_head=False)
SHIPPED = ('tiny', 'tiny-ttt')


@pytest.fixture(scope='module')
def room():
    """The views of one room that no network was trained on."""
    return data.views_of(9500)


@pytest.fixture
def windows(room):
    return data.draw_windows([room], np.random.default_rng(0), 3, 4, 84)


@pytest.fixture
def views_folder(room, tmp_path):
    """A folder as `ffrecon-train views` writes it, with one room for both purposes."""
    folder = tmp_path / 'views'
    folder.mkdir()
    for kind in data.FIRST_ROOM:
        np.savez(folder / f'{kind}0000.npz', **vars(room))
    return folder


@pytest.fixture
def micro(monkeypatch):
    monkeypatch.setitem(configs.CONFIGS, 'micro', MICRO)
    monkeypatch.setitem(configs.CONFIGS, 'micro-ttt', replace(MICRO, attention='ttt'))


def samples(windows, name):
    half = PATCH // losses.SAMPLES
    return getattr(windows, name)[:, :, half // 2::half, half // 2::half]


@pytest.mark.parametrize('change', [lambda windows: windows, data.mirrored])
def test_points_of_all_views_are_in_the_frame_of_the_first(windows, change):
    """A point that two views see has one place: matched patches have near points."""
    windows = change(windows)
    again = data.normalised_windows(windows.images, windows.depth, windows.K,
                                    windows.T_cam_world)
    assert torch.allclose(again.points, windows.points, atol=1e-4)
    target, visible = losses.matching_patches(windows)
    middle = windows.points[:, :, PATCH // 2::PATCH, PATCH // 2::PATCH].flatten(2, 3)
    batch, i, j, patch = visible.nonzero(as_tuple=True)
    assert len(patch) > 100
    apart = (middle[batch, i, patch] - middle[batch, j, target[visible]]).norm(dim=-1)
    # Within half a patch of each other in the image, so within that much of a view in space.
    assert apart.median() < 0.15 < middle.flatten(0, 2).std()
    assert torch.allclose(windows.T_cam_world[:, 0], torch.eye(4), atol=1e-5)
    assert torch.allclose(windows.points[:, 0].norm(dim=-1).mean((1, 2)), torch.ones(3),
                          atol=1e-5)


def test_losses_are_zero_for_the_truth_and_positive_otherwise(windows):
    truth = losses.camera_target(windows)
    assert losses.camera_loss(truth.expand(4, -1, -1, -1), truth) == 0
    points, depth = samples(windows, 'points'), samples(windows, 'depth')
    assert losses.patch_loss(points, depth, windows) == 0
    assert losses.confident_loss(torch.zeros(5), torch.ones(5)) == 0
    for index in range(9):
        wrong = truth.clone()
        wrong[..., index] += 0.1
        assert losses.camera_loss(wrong.expand(4, -1, -1, -1), truth) > 0
    assert losses.patch_loss(points + 0.1, depth, windows) > 0
    assert losses.patch_loss(points, depth * 1.1, windows) > 0
    assert losses.confident_loss(torch.full((5,), 0.1), torch.ones(5)) > 0


def test_doubt_pays_for_large_errors_only():
    for error, pays in ((0.05, False), (1.0, True)):
        errors_, doubt = torch.full((4,), error), 1 + 1e-3
        sure = losses.confident_loss(errors_, torch.full((4,), doubt))
        assert (losses.confident_loss(errors_, torch.ones(4)) < sure) == pays


def test_targets_do_not_depend_on_the_size_of_the_scene(windows):
    larger = data.normalised_windows(
        windows.images, 7 * windows.depth, windows.K,
        torch.cat((torch.cat((windows.T_cam_world[..., :3, :3],
                              7 * windows.T_cam_world[..., :3, 3:]), -1),
                   windows.T_cam_world[..., 3:, :]), -2))
    for name in ('depth', 'points', 'T_cam_world'):
        assert torch.allclose(getattr(larger, name), getattr(windows, name), atol=1e-5)
    assert torch.allclose(larger.scale, 7 * torch.ones(3), atol=1e-4)


def test_matching_features_lower_the_matching_loss(windows):
    """Features that name the place in the room match; those that name the pixel do not."""
    middle = windows.points[:, :, PATCH // 2::PATCH, PATCH // 2::PATCH].flatten(2, 3)
    generator = torch.Generator().manual_seed(0)
    waves = middle @ torch.randn(3, 64, generator=generator) * 4
    by_place = torch.cat((waves.sin(), waves.cos()), -1)
    by_pixel = by_place[:, :1].expand_as(by_place)
    truth = losses.matching_patches(windows)

    def loss(features):
        return losses.match_loss(losses.feature_logits(features), *truth)
    assert loss(by_place) < 0.7 * loss(by_pixel)


def test_muon_moves_all_directions_alike():
    matrix = torch.nn.Parameter(torch.zeros(8, 8))
    matrix.grad = torch.diag(torch.logspace(-1, 1, 8))
    optimiser = Muon([matrix])
    optimiser.param_groups[0]['lr'] = 1.0
    optimiser.step()
    moved = torch.linalg.svdvals(matrix.detach())
    assert moved.max() < 3 * moved.min() and (matrix.diagonal() < 0).all()


def settings(views_folder, out, **changes):
    return TransformerTraining(**{
        'views': str(views_folder), 'out': str(out), 'model': 'micro', 'steps': 4,
        'views_per_step': 8, 'save_every': 2, 'validate_every': 100, **changes})


def test_a_resumed_run_ends_with_the_same_weights(micro, monkeypatch, views_folder, tmp_path):
    monkeypatch.setattr(TransformerTrainer, '_validate', lambda self: None)
    through = TransformerTrainer(settings(views_folder, tmp_path / 'a'))
    list(through.run())
    halted = TransformerTrainer(settings(views_folder, tmp_path / 'b'))
    for step in halted.run():
        if step == 3:  # the last state that was saved is that of step 2
            break
    again = TransformerTrainer(settings(views_folder, tmp_path / 'b'))
    assert again.step == 2
    list(again.run())
    untouched = build('micro').state_dict()
    for name, tensor in through.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    assert not torch.equal(untouched['aggregator.global_blocks.0.attn.qkv.weight'],
                           again.network.state_dict()['aggregator.global_blocks.0.attn.qkv.weight'])


def test_other_attention_takes_over_what_is_shared(micro, views_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    one = TransformerTrainer(settings(views_folder, tmp_path / 'a', steps=1))
    one._step()
    one._export()
    file = tmp_path / 'a' / 'micro.safetensors'
    other = TransformerTrainer(settings(views_folder, tmp_path / 'b', model='micro-ttt',
                                        start=str(file), teacher=str(file)))
    key = 'aggregator.global_blocks.1.attn.qkv.weight'
    assert torch.equal(other.network.state_dict()[key],
                       one.network.state_dict()[key].half().float())
    assert '24 are new' in caplog.text and '16 left out' in caplog.text
    assert np.isfinite(sum(other._step().values()))
    # A network that began as its teacher says the same, apart from the rounding of the file.
    same = TransformerTrainer(settings(views_folder, tmp_path / 'c', start=str(file),
                                       teacher=str(file)))
    assert same._step()['teacher'] < 0.01 * other._step()['teacher']


def test_scores_of_the_truth_and_of_no_answer(windows):
    perfect = errors(windows.T_cam_world, 3 * windows.depth, windows).scores()
    assert perfect.rotation_deg < 0.1 and perfect.direction_deg < 0.1
    assert perfect.auc30 > 99 and perfect.abs_rel < 1e-5
    none = baseline(windows).scores()
    assert none.direction_deg == pytest.approx(90) and none.auc30 == 0
    assert none.rotation_deg > 1 and none.abs_rel > 0.1


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_weights_beat_the_baseline_in_a_room_never_seen(name, room):
    assert located(CHECKPOINTS[name]) is not None
    network = load_predictor(name).network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    scores, without = held_out_scores(network, [room], batches=1)
    assert scores.rotation_deg < 0.7 * without.rotation_deg
    assert scores.direction_deg < 0.7 * without.direction_deg
    assert scores.abs_rel < 0.8 * without.abs_rel
