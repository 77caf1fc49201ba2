"""Training windows: what they say of images, cameras, depth and matches agrees."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.synthetic import Room
from feedforward_recon.training.photo_source import PhotoSource
from feedforward_recon.training.posed import read_scene
from feedforward_recon.training.room_files import room_source
from feedforward_recon.training.scene_folders import photo_sources
from feedforward_recon.training.virtual_camera import Variation, varied_view, whole_view
from feedforward_recon.training.windows import WindowStream, batched, drawn_window, mirrored

VIEWS, SIDE = 8, 160
LENS = Camera(SIDE, SIDE, 150.0, 150.0, 79.5, 79.5, (-0.1, 0.02, 0.0, 0.0))
STRAIGHT = Camera(SIDE, SIDE, 150.0, 150.0, 79.5, 79.5)
TOLERANCE_PX = 1.0  # depth is that of the nearest pixel


@pytest.fixture(scope='module')
def room_views():
    """Poses, images and depth of a walk, of a camera without distortion."""
    room = Room.generate(5)
    T = np.stack(room.walk(VIEWS, 5, 3.0))
    images, depth = zip(*(room.render(STRAIGHT, pose) for pose in T), strict=True)
    return T, np.stack(images), np.stack(depth)


@pytest.fixture(scope='module')
def room(room_views, tmp_path_factory):
    """The walk as a file of room views."""
    T, images, depth = room_views
    file = tmp_path_factory.mktemp('rooms') / 'train0000.npz'
    np.savez(file, image=images, depth=depth.astype(np.float16), T_world_cam=T,
             K=np.tile(STRAIGHT.K, (VIEWS, 1, 1)), group=np.repeat([0, 1], VIEWS // 2))
    return room_source(file)


@pytest.fixture(scope='module')
def photo_folder(room_views, tmp_path_factory):
    """The walk as photos of a lens with distortion, with tracks of random scene points."""
    T, images, depth = room_views
    folder = tmp_path_factory.mktemp('photos') / 'walk'
    (folder / 'images').mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(8, SIDE - 8, (VIEWS, 120, 2))
    points = np.concatenate([transform_points(T[i], STRAIGHT.unproject(
        px.astype(float), depth[i][px[:, 1], px[:, 0]].astype(float)))
        for i, px in enumerate(pixels)])
    tracks = {'image_index': [], 'uv': [], 'depth': [], 'point_id': []}
    for i, pose in enumerate(T):
        own = transform_points(inverse(pose), points)
        uv = LENS.project(np.where(own[:, 2:] > 0.1, own, (0.0, 0.0, 1.0)))
        straight = STRAIGHT.project(np.where(own[:, 2:] > 0.1, own, (0.0, 0.0, 1.0))).round()
        inside = (own[:, 2] > 0.1) & (np.abs(straight - 79.5) < 78).all(1)
        inside &= (np.abs(uv - 79.5) < 79).all(1)
        at = np.where(inside[:, None], straight, 0).astype(int)
        inside &= np.abs(depth[i][at[:, 1], at[:, 0]] - own[:, 2]) < 0.02 * own[:, 2]
        rows = np.flatnonzero(inside)
        tracks['image_index'] += [i] * len(rows)
        tracks['uv'] += (uv[rows] + 0.5).tolist()
        tracks['depth'] += own[rows, 2].tolist()
        tracks['point_id'] += rows.tolist()
        cv2.imwrite(str(folder / 'images' / f'{i:04d}.png'), images[i][..., ::-1])
    K = LENS.K.copy()
    K[:2, 2] += 0.5
    frames = [{'file': f'images/{i:04d}.png', 'K': K.tolist(),
               'distortion': list(LENS.distortion), 'T_world_camera': pose.tolist()}
              for i, pose in enumerate(T)]
    (folder / 'cameras.json').write_text(json.dumps({'frames': frames}))
    np.savez(folder / 'tracks.npz', image_index=np.array(tracks['image_index'], np.int32),
             uv=np.array(tracks['uv'], np.float32), depth=np.array(tracks['depth'], np.float32),
             point_id=np.array(tracks['point_id'], np.int32))
    return folder


@pytest.fixture(scope='module')
def photos(photo_folder):
    """The photos as a source."""
    return PhotoSource('walk', read_scene(photo_folder))


def projected(window, view):
    """Pixels [B, N, P, 2] of all known points in one view of their windows, and their depth."""
    T = torch.linalg.inv(window.T_world_cam[:, view])
    own = torch.einsum('brc,bnpc->bnpr', T[:, :3, :3], window.points) + T[:, None, None, :3, 3]
    K = window.K[:, view, None, None]
    pixels = own[..., :2] / own[..., 2:] * K[..., [0, 1], [0, 1]] + K[..., :2, 2]
    return pixels, own[..., 2]


@pytest.mark.parametrize('kind', ['room', 'photos'])
@pytest.mark.parametrize('seed', range(3))
def test_depth_poses_and_matches_agree(request, kind, seed):
    source = request.getfixturevalue(kind)
    window = drawn_window(source, np.random.default_rng(seed), 3, (128, 96))
    assert window is not None and window.images.shape == (1, 3, 3, 96, 128)
    assert torch.allclose(window.T_world_cam[0, 0], torch.eye(4), atol=1e-5)
    found, checked = 0, 0
    for j in range(3):
        pixels, _ = projected(window, j)
        own = (pixels[:, j] - window.pixels[:, j]).norm(dim=-1)[window.known[:, j]]
        assert own.max() < 1e-2  # a view's points are where it says
        for i in range(3):
            at = (window.pixels[0, i][None] - window.queries[0, i][:, None]).norm(dim=-1)
            row = at.argmin(1)
            seen = window.seen[0, i, j]
            error = (pixels[0, i, row] - window.found[0, i, j]).norm(dim=-1)[seen]
            found, checked = found + int(seen.sum()), checked + int((error < TOLERANCE_PX).sum())
    assert found > 40 and checked > 0.97 * found


def test_images_show_what_points_say(room_views, room):
    """Colours at the pixels of points that are matched are alike; elsewhere they are not."""
    window = drawn_window(room, np.random.default_rng(1), 3, (128, 96))
    smooth = torch.nn.functional.avg_pool2d(window.images[0], 3, 1, 1)

    def colours(view, pixels):
        x, y = pixels.round().long().unbind(-1)
        return smooth[view, :, y.clamp(0, 95), x.clamp(0, 127)].T

    differences, chance = [], []
    for i in range(3):
        for j in range(3):
            seen = window.seen[0, i, j]
            here = colours(i, window.queries[0, i][seen])
            there = colours(j, window.found[0, i, j][seen])
            differences.append((here - there).abs().mean(1))
            chance.append((here - there.roll(7, 0)).abs().mean(1))
    assert torch.cat(differences).median() < 0.4 * torch.cat(chance).median()


def test_a_virtual_camera_sees_points_where_its_image_shows_them(room_views):
    """The image that a turned camera sees of the room is the one it would have taken."""
    T, images, _ = room_views
    rng = np.random.default_rng(2)
    view = varied_view(STRAIGHT, (96, 80), Variation(0.1, 1.3), rng)
    taken = Camera.from_matrix(view.K, view.size_wh)
    true, _ = Room.generate(5).render(taken, view.pose(T[0]))
    seen = view.looked_through(images[0], STRAIGHT)
    assert np.abs(true.astype(float) - seen).mean() < 12
    shifted = np.abs(np.roll(true, 6, 1).astype(float) - seen).mean()
    assert shifted > 1.5 * np.abs(true.astype(float) - seen).mean()


def test_points_behind_what_a_room_shows_are_not_seen(room_views, room):
    T, _, depth = room_views
    pixels = np.random.default_rng(0).integers(4, SIDE - 4, (50, 2))
    rays = STRAIGHT.unproject(pixels.astype(float), depth[2][pixels[:, 1], pixels[:, 0]])
    for factor, share in ((1.0, 1.0), (1.3, 0.0), (0.7, 0.0)):
        at, seen = room.found(2, whole_view(STRAIGHT, (SIDE, SIDE)),
                              transform_points(T[2], factor * rays))
        assert seen.mean() == share
        assert np.allclose(at, pixels, atol=1e-3)


@pytest.mark.parametrize('real', [LENS, STRAIGHT])
def test_a_whole_view_is_the_image_as_it_is(real):
    view = whole_view(real, (128, 96))
    points = np.array([[0.0, 0.0, 2.0], [0.3, -0.1, 2.0], [0.0, 0.0, -1.0], [5.0, 0.0, 1.0]])
    pixels, depth, visible = view.seen(points)
    assert visible.tolist() == [True, True, False, False]
    assert np.allclose(pixels[0], (63.5, 47.5)) and depth[1] == 2.0
    assert np.isclose(view.K[0, 0] / real.fx, 128 / SIDE)


def test_the_mirrored_window_is_a_window(room):
    window = drawn_window(room, np.random.default_rng(0), 3, (128, 96))
    twin = mirrored(window)
    for view in range(3):
        pixels, _ = projected(twin, view)
        known = twin.known[:, view]
        assert (pixels[:, view] - twin.pixels[:, view]).norm(dim=-1)[known].max() < 1e-2
    assert torch.allclose(torch.linalg.det(twin.T_world_cam[..., :3, :3]), torch.ones(1, 3))
    back = mirrored(twin)
    assert torch.allclose(back.T_world_cam, window.T_world_cam)
    assert torch.equal(back.images, window.images)


def test_batches_follow_from_their_number(room, photos):
    streams = [WindowStream([photos], [room], 0.5, seed=3) for _ in range(2)]
    first, second = (stream.batch((7, 0, 0), 8) for stream in streams)
    assert torch.equal(first.images, second.images) and torch.equal(first.found, second.found)
    other = streams[0].batch((7, 0, 1), 8)
    assert other.images.shape != first.images.shape or not torch.equal(other.images, first.images)
    distance = (first.rays * first.depth[..., None]).norm(dim=-1)[:, 0]
    for row, known in zip(distance, first.known[:, 0], strict=True):
        assert abs(float(row[known].median()) - 1) < 1e-4  # the unit
    assert batched([first, first]).images.shape[0] == 2 * first.images.shape[0]


def test_views_that_share_no_tracks_are_no_window(photo_folder):
    scene = read_scene(photo_folder)
    alone = type(scene)(**{**vars(scene), 'point_id': np.arange(len(scene.point_id))})
    assert PhotoSource('alone', alone).window(np.random.default_rng(0), 2) is None


def test_folders_without_scenes_are_one_sentence(tmp_path, photo_folder):
    with pytest.raises(InputError, match='found none; give another folder'):
        photo_sources(tmp_path, [])
    with pytest.raises(InputError, match="found \\['hall'\\]; choose of \\['walk'\\]"):
        photo_sources(photo_folder.parent, ['hall'])
    with pytest.raises(InputError, match='to train on, found none'):
        photo_sources(photo_folder.parent, ['walk'])
