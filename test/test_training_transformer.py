"""The transformer's training: losses mean something, runs resume, the shipped weights work."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_training import (
    SIZE_WH,
    plane_windows,
    training_folders,
    use_small_windows,
)

from benchmarks.pose_accuracy import VIEWS, Answer, Errors, relative, still
from feedforward_recon.errors import ReconError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model.distributed import own_device
from feedforward_recon.model.pose_encoding import rigid_inverse
from feedforward_recon.model.predictor import load_predictor
from feedforward_recon.model.ray_stem import RayStem
from feedforward_recon.model.ray_transformer import CellMaps
from feedforward_recon.model.weights.registry import CHECKPOINTS, located
from feedforward_recon.training import room_views, transformer
from feedforward_recon.training import transformer_losses as losses
from feedforward_recon.training.depth_source import DepthSource
from feedforward_recon.training.muon import Muon
from feedforward_recon.training.photo_source import PhotoSource
from feedforward_recon.training.room_files import room_source
from feedforward_recon.training.scene_folders import photo_sources
from feedforward_recon.training.transformer import TransformerTrainer, TransformerTraining
from feedforward_recon.training.transformer_scores import pose_errors
from feedforward_recon.training.windows import drawn_window, mirrored
from feedforward_recon.types import Frame

SHIPPED = ('tiny', 'tiny-ttt', 'tiny-sparse', 'tiny-sla')
PARTS = ('depth', 'point', 'scale', 'turn', 'place', 'coarse', 'fine', 'guide')


@pytest.fixture(scope='module')
def room_file(tmp_path_factory):
    """The views of one room that no network was trained on."""
    file = tmp_path_factory.mktemp('room') / 'train0000.npz'
    np.savez(file, **vars(room_views.views_of(9500, 128)))
    return file


@pytest.fixture(scope='module')
def folders(room_file, tmp_path_factory):
    """Rooms as `ffrecon-train views` writes them, and the walk as two scenes of posed photos."""
    return training_folders(room_file, tmp_path_factory.mktemp('training'))


@pytest.fixture(scope='module')
def micro():
    """A small network of that name, and small windows that are drawn in no time."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_windows(patch)
        yield


def settings(folders, out, **changes):
    return TransformerTraining(**{
        'photos': str(folders / 'photos'), 'rooms': str(folders / 'rooms'), 'held_out': 'yard',
        'out': str(out), 'model': 'micro', 'steps': 4, 'views_per_step': 4, 'save_every': 2,
        'validate_every': 100, **changes})


# -- windows with a truth that is known everywhere -----------------------------------------


def truth(windows):
    """What a network that knows everything says of them."""
    def as_map(x):
        return x.unflatten(2, (SIZE_WH[1] // 8, SIZE_WH[0] // 8))
    sure, waves = torch.ones_like(as_map(windows.depth)), waves_of(windows.points)
    return CellMaps(as_map(windows.depth.log()), as_map(windows.points), sure, sure,
                    as_map(waves).movedim(-1, 2), torch.zeros(1, 3, 1, 12, 16))


def waves_of(points):
    """Descriptors of length 1 that name places."""
    generator = torch.Generator().manual_seed(0)
    angles = points @ torch.randn(3, 64, generator=generator) * 4
    return torch.nn.functional.normalize(torch.cat((angles.sin(), angles.cos()), -1), dim=-1)


def test_losses_are_zero_for_the_truth_and_positive_otherwise():
    windows = plane_windows()
    right = truth(windows)
    for name, value in losses.geometry_losses(right, windows).items():
        assert value.abs() < 2e-5, name
    turn = torch.from_numpy(cv2.Rodrigues(np.array([0.0, 0.1, 0.0]))[0]).float()
    for change, counts in (
            ({'log_depth': right.log_depth + 0.1 * torch.randn(right.log_depth.shape)}, 'depth'),
            ({'points': 1.1 * right.points}, 'point'), ({'points': right.points @ turn}, 'turn'),
            ({'points': right.points + 0.1}, 'place'),
            ({'log_depth': right.log_depth + 1, 'points': right.points * np.e}, 'scale')):
        said = losses.geometry_losses(replace(right, **change), windows)
        assert said[counts] > 1e-2, counts
    # Another unit is an error of scale alone.
    assert all(said[name].abs() < 2e-5 for name in ('depth', 'point', 'turn', 'place'))


def test_doubt_pays_for_large_errors_only():
    windows = plane_windows()
    right = truth(windows)
    for error, pays in ((0.05, False), (0.5, True)):
        signs = torch.ones_like(right.log_depth)
        signs[..., ::2] = -1
        off = replace(right, log_depth=right.log_depth + error * signs)
        sure, unsure = (losses.geometry_losses(replace(
            off, depth_confidence=torch.full_like(signs, doubt)), windows)['depth']
            for doubt in (1.001, 1.0))
        assert (unsure < sure) == pays


def test_descriptors_that_name_places_lower_the_matching_loss():
    """Those that name the pixel do not."""
    windows = plane_windows()
    by_place = truth(windows)
    by_pixel = replace(by_place, descriptors=by_place.descriptors[:, :1].expand(-1, 3, -1, -1, -1))
    sharp = torch.tensor(3.0)
    assert losses.coarse_loss(by_place, windows, sharp) \
        < 0.7 * losses.coarse_loss(by_pixel, windows, sharp)


def test_a_fit_of_points_finds_the_motion():
    windows = plane_windows()
    own = windows.rays * windows.depth[..., None]
    R, t = losses.rigid_fit(own, windows.points, torch.ones(own.shape[:-1]))
    torch.testing.assert_close(R, windows.T_world_cam[..., :3, :3], atol=1e-4, rtol=0)
    torch.testing.assert_close(t, windows.T_world_cam[..., :3, 3], atol=1e-4, rtol=0)


# -- windows of photos and rooms ------------------------------------------------------------


@pytest.mark.parametrize('change', [lambda windows: windows, mirrored])
@pytest.mark.parametrize('kind', ['photos', 'room'])
def test_a_point_that_two_views_see_has_one_place(folders, room_file, kind, change):
    source = room_source(room_file) if kind == 'room' else \
        photo_sources(folders / 'photos', [])[0][0]
    assert isinstance(source, (DepthSource, PhotoSource))
    rng, checked = np.random.default_rng(1), 0
    for _ in range(4):
        windows = change(drawn_window(source, rng, 2, (128, 96)))
        assert torch.allclose(windows.T_world_cam[:, 0], torch.eye(4), atol=1e-5)
        for i, j in ((0, 1), (1, 0)):
            rows = windows.seen[0, i, j].nonzero()[:, 0]
            same = (windows.pixels[0, i][None] == windows.queries[0, i, rows][:, None]).all(-1)
            world = windows.points[0, i][same.int().argmax(1)]
            T = rigid_inverse(windows.T_world_cam)[0, j]
            there = world @ T[:3, :3].T + T[:3, 3]
            at = there[:, :2] / there[:, 2:] * windows.K[0, j].diagonal()[:2] \
                + windows.K[0, j, :2, 2]
            # Depth is stored in half precision: a thousandth is a fraction of a pixel.
            assert ((at - windows.found[0, i, j, rows]).abs() < 0.3).all()
            checked += len(rows)
    assert checked > 60


@pytest.mark.parametrize('kind', ['photos', 'room'])
def test_lengths_do_not_depend_on_the_unit_of_a_scene(folders, room_file, kind, tmp_path):
    windows = []
    for unit in (1.0, 8.0):
        if kind == 'room':
            with np.load(room_file) as found:
                arrays = dict(found)
            arrays['depth'] = (arrays['depth'] * np.float16(unit)).astype(np.float16)
            arrays['T_world_cam'][:, :3, 3] *= unit
            np.savez(tmp_path / f'{unit}.npz', **arrays)
            source = room_source(tmp_path / f'{unit}.npz')
        else:
            source = photo_sources(folders / 'photos', [])[0][0]
            scene = source._scene
            T = scene.T_world_cam.copy()
            T[:, :3, 3] *= unit
            source = PhotoSource('hall', replace(scene, T_world_cam=T, depth=scene.depth * unit))
        windows.append(drawn_window(source, np.random.default_rng(2), 2, (128, 96)))
    one, other = windows
    torch.testing.assert_close(one.T_world_cam, other.T_world_cam, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.depth[one.known], other.depth[other.known], atol=1e-4,
                               rtol=1e-4)
    distance = (one.rays * one.depth[..., None]).norm(dim=-1)[:, 0][one.known[:, 0]]
    assert distance.median() == pytest.approx(1, abs=1e-5)


# -- the trainer ----------------------------------------------------------------------------


def test_muon_moves_all_directions_alike():
    matrix = torch.nn.Parameter(torch.zeros(8, 8))
    matrix.grad = torch.diag(torch.logspace(-1, 1, 8))
    optimiser = Muon([matrix])
    optimiser.param_groups[0]['lr'] = 1.0
    optimiser.step()
    moved = torch.linalg.svdvals(matrix.detach())
    assert moved.max() < 3 * moved.min() and (matrix.diagonal() < 0).all()


@pytest.fixture
def in_plain_light(monkeypatch):
    """Images are trained on as they are."""
    monkeypatch.setattr(transformer, 'photographed', lambda windows, generator: windows)


def parts_of(trainer, windows):
    with torch.no_grad():
        parts = trainer.losses(windows, torch.Generator().manual_seed(0))
    assert tuple(parts) == PARTS
    return parts


@pytest.fixture(scope='module')
def begun(micro, folders, tmp_path_factory):
    """Parts of the loss before and after some steps on one batch, and the weights then."""
    trainer = TransformerTrainer(settings(folders, tmp_path_factory.mktemp('begun'), steps=1000,
                                          learning_rate=3e-3, warm_up=1))
    windows = plane_windows()
    first = parts_of(trainer, windows)
    for _ in range(40):
        trainer.learn([windows])
    return first, parts_of(trainer, windows), trainer.network.state_dict()


@pytest.mark.parametrize('part', PARTS)
def test_steps_on_one_batch_lower_every_part_of_the_loss(begun, part):
    first, then, _ = begun
    assert then[part] < 0.7 * first[part]


@pytest.mark.parametrize('part', PARTS)
def test_a_step_along_a_part_of_the_loss_lowers_it(begun, in_plain_light, folders, tmp_path,
                                                   monkeypatch, part):
    """Where the network is not all wrong: beyond some error a turn counts as wrong, no more."""
    trainer = TransformerTrainer(settings(folders, tmp_path, learning_rate=1e-4, warm_up=1))
    trainer.network.load_state_dict(begun[2])
    windows, whole = plane_windows(), trainer.losses
    before = parts_of(trainer, windows)[part]
    monkeypatch.setattr(trainer, 'losses', lambda *given: {part: whole(*given)[part]})
    trainer.learn([windows])
    monkeypatch.setattr(trainer, 'losses', whole)
    assert parts_of(trainer, windows)[part] < before


def test_a_resumed_run_ends_with_the_same_weights(micro, folders, tmp_path):
    asked = {'accumulate': 2}
    through = TransformerTrainer(settings(folders, tmp_path / 'a', **asked))
    untouched = {k: t.clone() for k, t in through.network.state_dict().items()}
    assert list(through.run()) == [1, 2, 3, 4]
    halted = TransformerTrainer(settings(folders, tmp_path / 'b', **asked))
    for step in halted.run():
        if step == 3:  # the last state that was saved is that of step 2
            break
    again = TransformerTrainer(settings(folders, tmp_path / 'b', **asked))
    assert again.step == 2
    list(again.run())
    for name, tensor in through.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    for name, tensor in through.average.state_dict().items():
        assert torch.equal(tensor, again.average.state_dict()[name]), name
    key = 'global_blocks.0.attn.qkv.weight'
    assert not torch.equal(untouched[key], again.network.state_dict()[key])
    assert not torch.equal(through.average.state_dict()[key],
                           through.network.state_dict()[key])


def test_the_stem_stays_that_of_the_encoder(micro, folders, tmp_path):
    trainer = TransformerTrainer(settings(folders, tmp_path, steps=3))
    list(trainer.run())
    shipped = RayStem.shipped().state_dict()
    for name, tensor in trainer.network.stem.state_dict().items():
        assert torch.equal(tensor, shipped[name]), name
        if tensor.is_floating_point():
            assert torch.equal(trainer.average.state_dict()[f'stem.{name}'], tensor), name


def test_accumulated_batches_give_their_mean_gradient(micro, in_plain_light, folders, tmp_path,
                                                      monkeypatch):
    trainer = TransformerTrainer(settings(folders, tmp_path))
    whole, given = trainer.losses, []
    monkeypatch.setattr(trainer, 'losses', lambda windows, generator: (
        given.append(generator.get_state()), whole(windows, generator))[1])
    batches = [plane_windows(), trainer.stream.batch((0, 0, 0), 4)]
    report = trainer._gradient(batches)
    together = [p.grad.clone() for p in trainer._parameters() if p.grad is not None]
    alone, totals = [], []
    for windows, state in zip(batches, list(given), strict=True):
        generator = torch.Generator()
        generator.set_state(state)
        trainer.network.zero_grad()
        parts = whole(windows, generator)
        torch.stack(list(parts.values())).sum().backward()
        alone.append([p.grad.clone() for p in trainer._parameters() if p.grad is not None])
        totals.append(float(parts['depth'].detach()))
    assert len(together) == len(alone[0]) > 50
    for a, b, mean in zip(*alone, together, strict=True):
        torch.testing.assert_close((a + b) / 2, mean, rtol=1e-4, atol=1e-6)
    assert report['depth'] == pytest.approx(np.mean(totals), rel=1e-5)


def test_a_run_writes_the_best_weights_and_another_starts_from_them(micro, folders, tmp_path,
                                                                    caplog):
    caplog.set_level(logging.INFO)
    one = TransformerTrainer(settings(folders, tmp_path / 'a', steps=1))
    list(one.run())
    file = tmp_path / 'a' / 'micro.safetensors'
    stored = load_file(file)
    for name, tensor in one.average.state_dict().items():
        assert torch.equal(stored[name], tensor.half()), name
    other = TransformerTrainer(settings(folders, tmp_path / 'b', start=str(file)))
    key = 'global_blocks.1.attn.qkv.weight'
    assert torch.equal(other.network.state_dict()[key], stored[key].float())
    assert '; 0 are new, 0 left out' in caplog.text
    lines = (tmp_path / 'a' / 'log.jsonl').read_text().splitlines()
    held_out = json.loads(lines[-1])['held_out']
    assert set(held_out) == {'yard', 'held_out0000'} and all(held_out.values())


def test_weights_are_written_where_nothing_is_held_out(micro, folders, tmp_path):
    asked = settings(folders, tmp_path, rooms='', held_out='', steps=2, validate_every=1)
    trainer = TransformerTrainer(asked)
    list(trainer.run())
    stored = load_file(tmp_path / 'micro.safetensors')
    for name, tensor in trainer.average.state_dict().items():
        assert torch.equal(stored[name], tensor.half()), name


@pytest.mark.parametrize(('device', 'own'), [
    ('cuda', 'cuda:1'), ('cuda:0', 'cuda:0'), ('cpu', 'cpu')])
def test_processes_have_a_gpu_each(monkeypatch, device, own):
    assert own_device(torch.device(device)) == torch.device(device)
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert own_device(torch.device(device)) == torch.device(own)


@pytest.mark.parametrize(('changes', 'words'), [
    ({'photos': 'nowhere'}, 'expected folders with cameras.json and'),
    ({'held_out': 'hall,yard'}, 'to train on, found none'),
    ({'held_out': 'cellar'}, r"found \['cellar'\]; choose of \['hall', 'yard'\]"),
    ({'rooms': 'nowhere'}, 'run `ffrecon-train views` first'),
    ({'model': 'vggt-tiny'}, "of the kind of tiny, found 'vggt-tiny'; choose tiny"),
    ({'model': 'tinny'}, 'did you mean tiny'), ({'device': 'cuda:99'}, "found 'cuda:99'"),
    ({'start': 'no/such.safetensors'}, 'weights to start from in no/such.safetensors')])
def test_settings_that_do_not_fit_are_one_sentence(micro, folders, tmp_path, changes, words):
    changes = {key: str(tmp_path / value) if value == 'nowhere' else value
               for key, value in changes.items()}
    with pytest.raises(ReconError, match=words) as caught:
        TransformerTrainer(settings(folders, tmp_path / 'out', **changes))
    said = str(caught.value)
    assert said.startswith('expected ') and 'found' in said and ';' in said and '\n' not in said


# -- what is shipped ------------------------------------------------------------------------


def test_scores_of_the_truth_and_of_no_answer():
    T = rigid_inverse(plane_windows().T_world_cam)
    rotation, direction = pose_errors(T, T)
    assert rotation.max() < 0.1 and direction.max() < 0.1 and len(rotation) == 3
    rotation, direction = pose_errors(torch.eye(4).expand_as(T), T)
    assert rotation.min() > 1 and torch.allclose(direction, torch.full((3,), 90.0).double())


def frame_of(room, view):
    """A view of a room, cut to 4:3."""
    whole, (width, height) = room.camera(view), room.size_wh
    top = height // 8
    rows = slice(top, top + 3 * height // 4)
    camera = Camera(width, 3 * height // 4, whole.fx, whole.fy, whole.cx, whole.cy - top)
    return Frame(view, np.ascontiguousarray(room.image(view)[rows]), camera=camera,
                 T_map_cam=room.pose(view), depth=room.depth(view)[rows].astype(np.float32))


def medians(windows, predict):
    """Of the degrees of rotation and of direction, and of the depth errors."""
    errors = Errors()
    for frames in windows:
        said = predict(frames)
        errors.add(frames, Answer(relative(said.T_world_cam), said.depth))
    return np.array([np.median(part) for part in vars(errors).values()])


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_weights_beat_the_baseline_in_a_room_never_seen(name, room_file):
    assert located(CHECKPOINTS[name]) is not None
    predictor = load_predictor(name)
    assert {p.dtype for p in predictor.network.parameters()} == {torch.float32}
    room, rng = room_source(room_file), np.random.default_rng(0)
    drawn = [views for _ in range(4) if (views := room.window(rng, VIEWS)) is not None]
    windows = [[frame_of(room, int(view)) for view in views] for views in drawn]
    found = medians(windows, lambda frames: predictor.predict(
        [frame.image for frame in frames], K=frames[0].camera.K)[0])
    assert (found < np.array([0.7, 0.7, 0.8]) * medians(windows, still)).all(), found
