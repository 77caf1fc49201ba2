"""Scenes to train on: one walk in every format is one scene; what moves is in no window."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import lru_cache

import cv2
import numpy as np
import pytest
import torch

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, quat_xyzw_from_matrix, transform_points
from feedforward_recon.synthetic import Room, lighting
from feedforward_recon.synthetic.moving import MovingThings
from feedforward_recon.training import (
    colmap_scenes,
    covisible_views,
    rgbd_scenes,
    room_files,
    room_views,
    windows,
)
from feedforward_recon.training.covisible_views import CovisibleViews
from feedforward_recon.training.depth_source import DepthSource
from feedforward_recon.training.photo_source import PhotoSource
from feedforward_recon.training.room_files import room_source
from feedforward_recon.training.scene_folders import photo_sources
from feedforward_recon.training.virtual_camera import whole_view
from feedforward_recon.training.windows import WindowStream, drawn_window

WALKED, VIEWS, SIZE_WH = 7, 9, (160, 120)
CAMERA = Camera(*SIZE_WH, 120.0, 121.0, 80.5, 58.0)
WHOLE = whole_view(CAMERA, SIZE_WH)
FORMATS = ('colmap', 'freiburg', 'kitchen')


@pytest.fixture(scope='module')
def in_even_light():
    """Rooms without shadows: they take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lighting, 'irradiance', lambda *given: np.ones((2, 2, 3), np.float32))
        yield


@pytest.fixture(scope='module')
def walk(in_even_light, tmp_path_factory):
    """A room's file with the views of a walk, and its arrays.

    The last but one is nearly the first one, the last one is turned by 60 degrees.
    """
    room = Room.generate(5)
    room = replace(room, pyramids={}, faces=[replace(face, texels_per_m=face.texels_per_m / 4)
                                             for face in room.faces])
    T = np.stack(room.walk(WALKED, 5, 2.0))
    T = np.concatenate([T, T[[0, 3]]])
    for view, turn in ((-2, (0, 0.04, 0)), (-1, (0, 0, np.pi / 3))):
        T[view, :3, :3] = T[view, :3, :3] @ cv2.Rodrigues(np.array(turn))[0]
    images, depth = zip(*(room.render(CAMERA, pose) for pose in T), strict=True)
    arrays = {'image': np.stack(images), 'depth': np.stack(depth), 'T_world_cam': T,
              'K': np.tile(CAMERA.K, (VIEWS, 1, 1))}
    file = tmp_path_factory.mktemp('rooms') / 'train0000.npz'
    np.savez(file, **arrays)
    return file, arrays


@pytest.fixture(scope='module')
def scenes(walk, tmp_path_factory):
    """A folder with the walk in every format."""
    root = tmp_path_factory.mktemp('scenes')
    for name, write in zip(FORMATS, (write_colmap_scene, write_tum, write_7scenes), strict=True):
        write(root / name, walk[1])
    (root / 'notes').mkdir()
    return root


def write_rgbd(image, depth, arrays, view, units_per_m):
    for file in (image, depth):
        file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(image), arrays['image'][view][..., ::-1])
    stored = np.rint(arrays['depth'][view] * units_per_m)
    cv2.imwrite(str(depth), stored.astype(np.uint16))


def write_calibration(folder, camera=CAMERA, model='plumb_bob', count=5):
    (folder / 'calibration.yaml').write_text(
        f'image_width: {camera.width}\nimage_height: {camera.height}\n'
        f'distortion_model: {model}\n'
        f'distortion_coefficients: {{data: {[0.0] * count}}}\n'
        f'camera_matrix: {{data: {camera.K.ravel().tolist()}}}\n')


def write_tum(folder, arrays):
    lists = {'rgb': '', 'depth': '', 'groundtruth': ''}
    for view, T in enumerate(arrays['T_world_cam']):
        write_rgbd(folder / f'rgb/{view}.png', folder / f'depth/{view}.png', arrays, view, 5000)
        numbers = (*T[:3, 3], *quat_xyzw_from_matrix(T[:3, :3]))
        for name, rest in (('rgb', f'rgb/{view}.png'), ('depth', f'depth/{view}.png'),
                           ('groundtruth', ' '.join(f'{x:.9f}' for x in numbers))):
            lists[name] += f'{1 + view / 2:.3f} {rest}\n'
    for name, text in lists.items():
        (folder / f'{name}.txt').write_text(text)
    write_calibration(folder)


def write_7scenes(folder, arrays):
    for view, T in enumerate(arrays['T_world_cam']):
        stem = folder / f'seq-0{1 + view // 4}' / f'frame-{view % 4:06d}'
        write_rgbd(stem.with_suffix('.color.png'), stem.with_suffix('.depth.png'), arrays, view,
                   1000)
        np.savetxt(stem.with_suffix('.pose.txt'), T)
    write_calibration(folder)


def write_colmap_scene(folder, arrays):
    """Tracks of random pixels of all views, where the depth of the others agrees."""
    (folder / 'images').mkdir(parents=True)
    rng, rows = np.random.default_rng(0), [[] for _ in range(VIEWS)]
    points = []
    for view, T in enumerate(arrays['T_world_cam']):
        cv2.imwrite(str(folder / f'images/{view}.png'), arrays['image'][view][..., ::-1])
        px = rng.integers(4, 116, (60, 2))
        world = transform_points(T, CAMERA.unproject(
            px.astype(float), arrays['depth'][view][px[:, 1], px[:, 0]]))
        for other, pose in enumerate(arrays['T_world_cam']):
            uv, z, inside = WHOLE.seen(transform_points(inverse(pose), world))
            u, v = np.where(inside[:, None], uv, 0).round().astype(int).T
            seen = inside & (np.abs(arrays['depth'][other][v, u] - z) < 0.02 * z)
            rows[other] += [(*uv[k], len(points) + k) for k in np.flatnonzero(seen)]
        points += world.tolist()
    poses = dict(enumerate(inverse(arrays['T_world_cam'])))
    write_model(folder / 'sparse/0', 'PINHOLE', (CAMERA.fx, CAMERA.fy, CAMERA.cx + 0.5,
                                                 CAMERA.cy + 0.5), poses, rows, points)


def write_model(folder, model, parameters, T_cam_world, rows, points):
    """A COLMAP text model; rows: (u, v, point) of each image, pixel centres at integers."""
    folder.mkdir(parents=True)
    words = ' '.join(map(repr, map(float, parameters)))
    (folder / 'cameras.txt').write_text(f'1 {model} {SIZE_WH[0]} {SIZE_WH[1]} {words}\n')
    tracks = [[] for _ in points]
    lines = []
    for view, T in T_cam_world.items():
        x, y, z, w = quat_xyzw_from_matrix(T[:3, :3])
        pose = ' '.join(f'{float(a):.12f}' for a in (w, x, y, z, *T[:3, 3]))
        lines += [f'{view + 1} {pose} 1 {view}.png',
                  ' '.join(f'{u + 0.5:.9f} {v + 0.5:.9f} {p + 1}' for u, v, p in rows[view])]
        for number, (_, _, p) in enumerate(rows[view]):
            tracks[p].append(f'{view + 1} {number}')
    (folder / 'images.txt').write_text('\n'.join(lines) + '\n')
    (folder / 'points3D.txt').write_text(''.join(
        f'{p + 1} {" ".join(f"{float(a):.12f}" for a in xyz)} 0 0 0 0 {" ".join(track)}\n'
        for p, (xyz, track) in enumerate(zip(points, tracks, strict=True)) if track))


@pytest.fixture
def sources(walk, scenes):
    """The walk as a source of every kind, by name."""
    pytest.importorskip('pycolmap', reason='needs the extra [offline]')
    return {'room': room_source(walk[0]),
            **{source.name: source for source in photo_sources(scenes, [])[0]}}


# One scene in every format


def test_each_format_is_recognised_and_others_are_left_alone(sources, scenes):
    assert list(sources) == ['room', *FORMATS]
    kinds = [type(source) for source in sources.values()]
    assert kinds == [DepthSource, PhotoSource, DepthSource, DepthSource]
    kept, held_out = photo_sources(scenes, ['kitchen'])
    assert [s.name for s in kept] == ['colmap', 'freiburg']
    assert [s.name for s in held_out] == ['kitchen']


@pytest.mark.parametrize('name', FORMATS)
def test_a_view_is_the_same_in_every_format(sources, walk, name):
    source, arrays = sources[name], walk[1]
    assert source.size_wh == SIZE_WH
    for view in range(VIEWS):
        assert np.array_equal(source.image(view), arrays['image'][view])
        np.testing.assert_allclose(source.camera(view).K, CAMERA.K, atol=1e-6)
        np.testing.assert_allclose(source.pose(view), arrays['T_world_cam'][view], atol=1e-6)
        seen = source.points(view, WHOLE, 200, np.random.default_rng(view))
        u, v = seen.pixels.round().astype(int).T
        exact = np.abs(seen.pixels - np.stack([u, v], 1)).max(1) < 1e-4  # tracks lie between, too
        assert exact.sum() >= 8
        assert np.abs(seen.depth - arrays['depth'][view][v, u])[exact].max() < 1e-3


@pytest.mark.parametrize('name', ['freiburg', 'kitchen'])
def test_a_window_is_the_same_in_every_format(sources, name):
    for seed in range(3):
        one, other = (drawn_window(sources[kind], np.random.default_rng(seed), 3, (96, 80))
                      for kind in ('room', name))
        for what in ('images', 'known', 'seen'):
            assert torch.equal(getattr(one, what), getattr(other, what)), what
        for what in ('K', 'T_world_cam', 'pixels', 'depth', 'queries', 'found'):
            torch.testing.assert_close(getattr(one, what), getattr(other, what), atol=2e-3,
                                       rtol=1e-3)


def test_tracks_of_a_model_match_where_the_room_does(sources, walk):
    """In a window as the images are, places of one point are those that depth and poses say."""
    window = drawn_window(sources['colmap'], np.random.default_rng(0), 3, SIZE_WH, varied=False)
    own = window.pixels[0, 0], window.points[0, 0]
    T = torch.linalg.inv(window.T_world_cam[0, 1])
    row = (own[0][None] - window.queries[0, 0][:, None]).norm(dim=-1).argmin(1)
    there = own[1][row] @ T[:3, :3].T + T[:3, 3]
    at = there[:, :2] / there[:, 2:] * window.K[0, 1].diagonal()[:2] + window.K[0, 1, :2, 2]
    seen = window.seen[0, 0, 1]
    assert seen.sum() >= 10
    assert (at - window.found[0, 0, 1])[seen].abs().max() < 0.01


@pytest.mark.parametrize(('model', 'lens'), [
    ('SIMPLE_PINHOLE', ()), ('PINHOLE', ()), ('SIMPLE_RADIAL', (-0.1,)), ('RADIAL', (-0.1, 0.02)),
    ('OPENCV', (-0.1, 0.02, 1e-3, -2e-3)),
    ('FULL_OPENCV', (-0.1, 0.02, 1e-3, -2e-3, 0.01, 0.02, 0.01, 0.0))])
@pytest.mark.parametrize('binary', [False, True])
def test_tracks_stand_at_their_points_through_every_lens(tmp_path, monkeypatch, model, lens,
                                                         binary):
    """Also in images that are reduced, and in binary models."""
    pycolmap = pytest.importorskip('pycolmap', reason='needs the extra [offline]')
    monkeypatch.setattr(colmap_scenes, 'LARGEST_PX', SIZE_WH[0] // 2)
    focal = (120.0,) if model.startswith('SIMPLE') or model == 'RADIAL' else (120.0, 123.0)
    parameters = (*focal, 81.0, 58.5, *lens)
    points = np.random.default_rng(0).uniform((-0.8, -0.6, 2), (0.8, 0.6, 3), (20, 3))
    camera = pycolmap.Camera(model=model, width=SIZE_WH[0], height=SIZE_WH[1], params=parameters)
    uv = np.array(camera.img_from_cam(points)) - 0.5
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/0.png'), np.zeros((120, 160, 3), np.uint8))
    place = tmp_path / 'sparse/0'
    write_model(place, model, parameters, {0: np.eye(4)},
                [[(*px, k) for k, px in enumerate(uv)]], points)
    if binary:
        pycolmap.Reconstruction(str(place)).write_binary(str(place))
        for file in place.glob('*.txt'):
            file.unlink()
    scene = colmap_scenes.read_colmap(tmp_path)
    assert scene.image(0).shape == (60, 80, 3) and scene.cameras[0].size_wh == (80, 60)
    own = scene.cameras[0].unproject(scene.uv, scene.depth)
    np.testing.assert_allclose(own, points[scene.point_id - 1], atol=2e-4)
    assert len(own) == 20


@pytest.mark.parametrize(('name', 'focal', 'distorted'), [
    ('rgbd_dataset_freiburg1_desk', 517.3, True), ('fr2_xyz', 520.9, True),
    ('freiburg3_office', 535.4, False), ('heads', 585.0, False)])
def test_published_cameras_are_known(tmp_path, name, focal, distorted):
    views = small_recording(tmp_path / name, (640, 480))
    camera = views.view(0).camera
    assert camera.fx == focal and camera.is_distorted == distorted
    assert len(views) == 2


def small_recording(folder, size_wh):
    """Two frames of a recording: 7-Scenes where it is called heads, else TUM."""
    arrays = {'image': np.full((2, *size_wh[::-1], 3), 90, np.uint8),
              'depth': np.full((2, *size_wh[::-1]), 2.0),
              'T_world_cam': np.tile(np.eye(4), (2, 1, 1))}
    write, read = (write_7scenes, rgbd_scenes.seven_scenes_views) if folder.name == 'heads' else \
        (write_tum, rgbd_scenes.tum_views)
    write(folder, arrays)
    (folder / 'calibration.yaml').unlink()
    return read(folder)


def test_images_of_two_sizes_are_refused_when_they_are_met(tmp_path):
    views = small_recording(tmp_path / 'fr1', (640, 480))
    cv2.imwrite(str(tmp_path / 'fr1/rgb/1.png'), np.zeros((240, 320, 3), np.uint8))
    with pytest.raises(InputError, match=r'\(640, 480\) like .* found \(320, 240\); use one'):
        views.view(1)


def test_the_longest_tracks_of_an_image_are_read(tmp_path, monkeypatch):
    pytest.importorskip('pycolmap', reason='needs the extra [offline]')
    monkeypatch.setattr(colmap_scenes, 'MOST_TRACKS', 3)
    points = np.column_stack([np.arange(6) / 10, np.zeros(6), np.full(6, 2.0)])
    uv = CAMERA.project(points)
    rows = [[(*px, k) for k, px in enumerate(uv)], [(*uv[k], k) for k in (5, 1, 3)]]
    (tmp_path / 'images').mkdir()
    for view in range(2):
        cv2.imwrite(str(tmp_path / f'images/{view}.png'), np.zeros((120, 160, 3), np.uint8))
    write_model(tmp_path / 'sparse/0', 'SIMPLE_PINHOLE', (120.0, 81.0, 58.5),
                dict.fromkeys(range(2), np.eye(4)), rows, points)
    scene = colmap_scenes.read_colmap(tmp_path)
    assert sorted(scene.point_id[scene.tracks(0)]) == [2, 4, 6]


def test_only_frames_with_a_pose_are_views_and_not_all_of_a_long_recording(tmp_path, walk,
                                                                           monkeypatch):
    write_7scenes(tmp_path, walk[1])
    (tmp_path / 'seq-01/frame-000001.pose.txt').write_text('nan ' * 16)
    views = rgbd_scenes.seven_scenes_views(tmp_path)
    assert len(views) == VIEWS - 1
    np.testing.assert_allclose(views.view(1).T_world_cam, walk[1]['T_world_cam'][2])
    monkeypatch.setattr(rgbd_scenes, 'MOST_VIEWS', 4)
    some = rgbd_scenes.seven_scenes_views(tmp_path)
    assert len(some) == 4
    for k, view in enumerate((0, 3, 5, 7)):
        np.testing.assert_allclose(some.view(k).T_world_cam, walk[1]['T_world_cam'][view])


def test_stored_values_that_mean_nothing_are_no_depth(tmp_path, walk):
    arrays = {**walk[1], 'depth': walk[1]['depth'].copy()}
    arrays['depth'][:, :60], arrays['depth'][:, 60:80] = 65.535, 0
    write_7scenes(tmp_path / 'hall', arrays)
    source, = photo_sources(tmp_path, [])[0]
    seen = source.points(0, WHOLE, 500, np.random.default_rng(0))
    assert len(seen.depth) > 50 and seen.pixels[:, 1].min() >= 80 and seen.depth.max() < 10


def spoilt(folder, how):
    """The walk's folder after one thing was done to it."""
    if how == 'no truth':
        (folder / 'groundtruth.txt').unlink()
    elif how == 'no depth':
        (folder / 'depth.txt').unlink()
    elif how == 'no camera':
        (folder / 'calibration.yaml').unlink()
    elif how == 'fisheye':
        write_calibration(folder, model='equidistant', count=4)
        text = (folder / 'calibration.yaml').read_text().replace('[0.0,', '[0.1,')
        (folder / 'calibration.yaml').write_text(text)
    elif how == 'no image':
        (folder / 'images/3.png').unlink()
    elif how == 'no tracks':
        (folder / 'sparse/0/points3D.txt').write_text('')
        lines = (folder / 'sparse/0/images.txt').read_text().split('\n')
        lines[1::2] = [''] * len(lines[1::2])
        (folder / 'sparse/0/images.txt').write_text('\n'.join(lines))
    elif how == 'no model':
        (folder / 'sparse/0/cameras.txt').write_text('1 PINHOLE many\n')
    elif how == 'fish lens':
        (folder / 'sparse/0/cameras.txt').write_text(
            '1 OPENCV_FISHEYE 160 120 120 121 81 58.5 0 0 0 0\n')


@pytest.mark.parametrize(('write', 'name', 'how', 'words'), [
    (write_tum, 'hall', 'no truth', 'with depth and a pose in .*found 0 among 9; check'),
    (write_tum, 'hall', 'no depth', 'with depth and a pose in .*found 0 among 9; check'),
    (write_tum, 'hall', 'no camera', 'or freiburg1, 2 or 3 in its name, found neither'),
    (write_tum, 'fr1', 'no camera', r'\(640, 480\) as published .*found \(160, 120\); give'),
    (write_7scenes, 'hall', 'no camera', r'\(640, 480\) as published .*found \(160, 120\)'),
    (write_tum, 'hall', 'fisheye', 'found fisheye; undistort'),
    (write_colmap_scene, 'hall', 'no image', 'found no 3.png; restore'),
    (write_colmap_scene, 'hall', 'no tracks', 'points with tracks .*found none; triangulate'),
    (write_colmap_scene, 'hall', 'no model', 'expected a COLMAP model in .*; write it again'),
    (write_colmap_scene, 'hall', 'fish lens', 'found OPENCV_FISHEYE; undistort')])
def test_scenes_that_cannot_be_used_are_one_sentence(tmp_path, walk, write, name, how, words):
    if write is write_colmap_scene:
        pytest.importorskip('pycolmap', reason='needs the extra [offline]')
    write(tmp_path / name, walk[1])
    spoilt(tmp_path / name, how)
    with pytest.raises(InputError, match=words) as caught:
        photo_sources(tmp_path, [])[0][0].image(0)
    assert '\n' not in str(caught.value)


# Windows by covisibility


@pytest.mark.parametrize('name', ['room', 'colmap', 'freiburg'])
def test_neighbours_in_a_window_differ_by_5_to_45_degrees(sources, walk, name):
    T = walk[1]['T_world_cam']
    depth = np.median(walk[1]['depth'], axis=(1, 2))
    drawn = [sources[name].window(np.random.default_rng(seed), 2 + seed % 3)
             for seed in range(90)]
    assert all(len(set(views)) == len(views) for views in drawn)
    assert len({tuple(views) for views in drawn}) > 20
    for views in drawn:
        for k in range(1, len(views)):
            assert any(4.5 < angle(T, depth, views[k], before) < 47 for before in views[:k])


def angle(T, depth, i, j):
    """Degrees of the turn between two views, or at which they look at a point between them."""
    turn = np.linalg.norm(cv2.Rodrigues(T[i, :3, :3].T @ T[j, :3, :3])[0])
    apart = np.linalg.norm(T[i, :3, 3] - T[j, :3, 3])
    return np.degrees(max(turn, 2 * np.arctan(apart / (depth[i] + depth[j]))))


def test_sideways_steps_count_as_other_views_and_the_same_view_does_not():
    T = np.tile(np.eye(4), (4, 1, 1))
    T[1:, 0, 3] = 0.5, 5.0, 0.01
    belong = CovisibleViews.of(np.ones((4, 4), bool), T, np.full(4, 2.0)).belong
    assert belong[0].tolist() == [False, True, False, False]  # 14, 103 and 0.3 degrees
    shared = np.zeros((4, 4), bool)
    assert not CovisibleViews.of(shared, T, np.full(4, 2.0)).belong.any()


def test_views_that_share_nothing_are_in_no_window_together():
    belong = np.kron(np.eye(2, dtype=bool), np.ones((4, 4), bool)) & ~np.eye(8, dtype=bool)
    views = CovisibleViews(belong)
    for seed in range(20):
        drawn = views.drawn(np.random.default_rng(seed), 4)
        assert len(set(drawn // 4)) == 1 and len(set(drawn)) == 4
    assert views.drawn(np.random.default_rng(0), 5) is None


def test_a_view_that_looks_elsewhere_shares_nothing(walk):
    arrays = {k: v[:2].copy() for k, v in walk[1].items()}
    arrays['T_world_cam'][1] = arrays['T_world_cam'][0] @ np.diag([-1.0, 1, -1, 1])
    views = covisible_views.seen_shares(covisible_views.PosedDepth(
        *(torch.from_numpy(arrays[k]).float() for k in ('depth', 'K', 'T_world_cam'))))
    assert np.diag(views).min() > 0.95 and views[0, 1] == views[1, 0] == 0


def test_a_stream_says_when_no_scene_has_a_window(sources, monkeypatch):
    monkeypatch.setattr(windows, 'VIEWS', (VIEWS + 1,))
    monkeypatch.setattr(windows, 'MOST_DRAWS', 5)
    with pytest.raises(InputError, match='10 overlapping views that differ by 5 to 45 degrees'):
        WindowStream([sources['freiburg']], [], 1.0, 0).batch((0,), 8)


def test_a_stream_of_photos_of_another_shape_alone_cuts_them(sources, monkeypatch):
    monkeypatch.setattr(windows, 'VIEWS', (2,))
    monkeypatch.setattr(windows, 'SIZES_WH', ((384, 128),))
    batch = WindowStream([sources['freiburg']], [], 1.0, 0).batch((0,), 2)
    assert batch.images.shape == (1, 2, 3, 128, 384)


# Rooms in memory


def test_only_a_few_rooms_are_in_memory(walk, tmp_path, monkeypatch):
    assert room_files.opened_room.cache_info().maxsize == room_files.OPEN_ROOMS
    monkeypatch.setattr(room_files, 'opened_room',
                        lru_cache(maxsize=2)(room_files.opened_room.__wrapped__))
    rooms, alive, drawn = [], [], []
    for index in range(4):
        file = tmp_path / f'train{index:04d}.npz'
        file.write_bytes(walk[0].read_bytes())
        rooms.append(room_source(file))
    for turn in range(2):
        for room in rooms:
            drawn.append(drawn_window(room, np.random.default_rng(0), 3, (96, 80)))
            if turn == 0:
                alive.append(weakref.ref(room_files.opened_room(room._views.file)['image']))
    del room
    gc.collect()
    assert sum(ref() is not None for ref in alive) == 0  # opened twice: the first are all gone
    assert room_files.opened_room.cache_info().currsize == 2
    assert all(torch.equal(w.images, drawn[0].images) and torch.equal(w.found, drawn[0].found)
               for w in drawn)


def test_a_damaged_room_is_one_sentence(tmp_path):
    np.savez(tmp_path / 'train0000.npz', image=np.zeros(3))
    with pytest.raises(InputError, match='remove it and run `ffrecon-train views` again'):
        room_source(tmp_path / 'train0000.npz').image(0)


# What moves


def test_nothing_in_a_window_depends_on_what_moves(walk, tmp_path):
    """Whatever depth it has: no point, no match and no choice of views."""
    moving = np.zeros(walk[1]['depth'].shape, bool)
    for view in range(VIEWS):
        moving[view, 20:80, 10 + 12 * view:60 + 12 * view] = True
    rooms = []
    for index, factor in enumerate((1.0, 0.5)):
        depth = np.where(moving, factor * walk[1]['depth'], walk[1]['depth'])
        file = tmp_path / f'train{index:04d}.npz'
        np.savez(file, **{**walk[1], 'depth': depth, 'moving': np.packbits(moving, axis=-1)})
        rooms.append(room_source(file))
    assert np.array_equal(rooms[0].covisible.belong, rooms[1].covisible.belong)
    for seed in range(4):
        views = rooms[0].window(np.random.default_rng(seed), 3)
        one, other = (drawn_window(room, np.random.default_rng(seed), 3, SIZE_WH, varied=False)
                      for room in rooms)
        for what in vars(one):
            assert torch.equal(getattr(one, what), getattr(other, what)), what
        for k, view in enumerate(views):
            for at, there in ((one.pixels[0, k], one.known[0, k]),
                              *((one.found[0, i, k], one.seen[0, i, k]) for i in range(3))):
                u, v = at[there].round().long().unbind(-1)
                assert not moving[view][v, u].any()
        assert one.known.sum() > 300 and one.seen.sum() > 50


def test_views_with_things_that_move_say_where(in_even_light, monkeypatch):
    """Everywhere else they are those of the room without them."""
    for name, value in (('WALK_VIEWS', 3), ('PLACES', 1), ('VIEWS_PER_PLACE', 2), ('COARSER', 8)):
        monkeypatch.setattr(room_views, name, value)
    with_things, without = (room_views.views_of(9000, 64, things=n) for n in (2, 0))
    moving = np.unpackbits(with_things.moving, axis=-1, count=64).astype(bool)
    assert moving.shape == (5, 64, 64) and not without.moving.any()
    assert 0.02 < moving.mean() < 0.6 and (moving.any((1, 2))).sum() >= 4
    walk = slice(0, 3)  # places are looked at from a distance that may be another one
    nearer = with_things.depth[walk] < without.depth[walk]
    assert np.array_equal(with_things.T_world_cam[walk], without.T_world_cam[walk])
    assert not (nearer & ~moving[walk]).any() and nearer[moving[walk]].mean() > 0.9
    still = ~cv2.dilate(moving[0].astype(np.uint8), np.ones((5, 5))).astype(bool)
    assert np.array_equal(with_things.image[0][still], without.image[0][still])


def test_things_that_move_stay_on_the_floor_of_the_room_before_the_cameras(in_even_light):
    room = Room.generate(9000)
    poses = np.stack(room.walk(4, 0, 2.0))
    things = MovingThings.drawn(room, 2, np.random.default_rng(0))
    for group in things.before(poses, np.random.default_rng(1)):
        corners = np.concatenate([things.room.surfaces[face].corners for face in group.faces])
        there = transform_points(group.T_world_object, np.tile(corners, (4, 1, 1)))
        assert np.allclose(there[..., 2].min(1), 0) and len(group.faces) == 6
        assert (np.abs(there[..., :2]) <= room.size[:2] / 2 + 1e-9).all()
        own = transform_points(inverse(poses), there).mean(1)
        assert (own[:, 2] > 0).all() and len(np.unique(there[:, 0, 0].round(2))) == 4


def test_a_share_of_the_rooms_has_things_that_move():
    assert not any(room_views.things_in(seed, 0.0) for seed in range(50))
    counts = [room_views.things_in(seed, 0.4) for seed in range(300)]
    assert 0.3 < np.mean([n > 0 for n in counts]) < 0.5 and {*counts} == {0, 1, 2, 3}
