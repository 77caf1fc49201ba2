"""The renderer in torch shows what the one in NumPy shows; covisibility, motion, appearance.

On the CPU: no test here needs a GPU, and none says anything about one.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, make_transform
from feedforward_recon.synthetic import Room, batch, torch_render
from feedforward_recon.synthetic.appearance import Appearance, defocused, exposed, motion_blurred
from feedforward_recon.synthetic.batch import render_batch, renderer_for
from feedforward_recon.synthetic.covisibility import PosedDepth, covisible
from feedforward_recon.synthetic.layout import Box
from feedforward_recon.synthetic.lighting import first_hit
from feedforward_recon.synthetic.room import box_faces
from feedforward_recon.synthetic.torch_render import TorchRoom
from feedforward_recon.synthetic.views import MovingFaces, Shots

CPU = torch.device('cpu')
CAMERA = Camera.from_fov(65, (160, 120))
DISTORTED = Camera(160, 120, 100, 102, 79, 60.5, (-0.28, 0.07, 1e-3, -5e-4))
FISHEYE = Camera(160, 120, 85, 85, 80, 59.5, (0.02, -0.01, 0.003, -0.001), 'fisheye')
# Share of pixels, at edges of surfaces, that rounding may give to another surface.
AT_EDGES = 0.005


@pytest.fixture(scope='module')
def room() -> Room:
    return Room.generate(3)


@pytest.fixture(scope='module')
def poses(room: Room) -> np.ndarray:
    return np.stack(room.walk(24, seed=0, fps=3.0)[::3])


def by_torch(room, cameras, poses, moving=()):
    every = [cameras] * len(poses) if isinstance(cameras, Camera) else cameras
    return TorchRoom(room, CPU).render(Shots(room, every, poses, moving))


def assert_alike(one, other):
    """Surfaces and depth of two renderings agree but at edges, colours by a grey level."""
    assert (one.surface != other.surface).float().mean() < AT_EDGES
    assert ((one.depth / other.depth - 1).abs() > 1e-4).float().mean() < AT_EDGES
    difference = (one.image.float() - other.image.float()).abs()
    assert difference.mean() < 0.3
    assert (difference > 2).float().mean() < AT_EDGES


@pytest.mark.parametrize('camera', [CAMERA, DISTORTED, FISHEYE])
def test_torch_shows_what_numpy_shows(room, poses, camera):
    views = by_torch(room, camera, poses)
    assert_alike(views, render_batch(room, camera, poses))
    assert views.image.dtype == torch.uint8 and views.image.shape == (len(poses), 3, 120, 160)
    assert (views.surface >= 0).all() and not views.moving.any()


def test_each_view_has_its_own_camera_however_many_are_rendered_at_once(
        room, poses, monkeypatch):
    cameras = [Camera.from_fov(fov, (160, 120)) for fov in np.linspace(40, 85, len(poses))]
    together = by_torch(room, cameras, poses)
    monkeypatch.setattr(torch_render, 'PIXELS_AT_ONCE', 3 * 160 * 120)
    in_parts = by_torch(room, cameras, poses)
    for name in ('image', 'depth', 'surface', 'K', 'T_world_cam'):
        assert torch.equal(getattr(together, name), getattr(in_parts, name)), name
    assert_alike(together, render_batch(room, cameras, poses))


def test_outside_the_room_there_is_nothing(room):
    T = make_transform(np.eye(3), np.array([0, 0, 10.0]))[None]
    for views in (by_torch(room, CAMERA, T), render_batch(room, CAMERA, T)):
        assert (views.surface == -1).all() and not views.moving.any()
        assert not views.depth.any() and not views.image.any()


# Moving faces


@pytest.fixture(scope='module')
def crossing(room, poses):
    """A box that crosses the view: the room with it, where it is in each view, its faces."""
    half = np.array([0.2, 0.15, 0.3])
    rest = Box('object', np.array([0, 0, 1.0]), half)
    places = []
    for index, T in enumerate(poses):
        offset = np.array([0.5 * np.cos(index), 0.1, 1.1])
        places.append(Box('object', T[:3, :3] @ offset + T[:3, 3], half, 0.4 * index))
    faces = box_faces(np.random.default_rng(5), [rest])
    first = len(room.faces)
    T_rest = make_transform(np.eye(3), rest.centre)
    motion = np.stack([make_transform(b.R_world_box, b.centre) @ inverse(T_rest) for b in places])
    return (replace(room, faces=[*room.faces, *faces], pyramids={}), places,
            MovingFaces(range(first, first + 6), motion))


@pytest.mark.parametrize('render', [by_torch, lambda *a: render_batch(*a[:3], moving=a[3])])
def test_a_moved_box_is_where_a_room_with_the_box_there_shows_it(room, poses, crossing, render):
    with_box, places, moving = crossing
    views = render(with_box, CAMERA, poses, [moving])
    for index, place in enumerate(places):
        faces = box_faces(np.random.default_rng(5), [place])
        there = replace(with_box, faces=[*room.faces, *faces])
        _, depth, nearest = there.seen(there.surfaces, CAMERA, poses[index])
        assert (nearest >= len(room.faces)).mean() > 0.01
        assert (views.surface[index].numpy() != nearest).mean() < AT_EDGES
        assert (np.abs(views.depth[index].numpy() / depth - 1) > 1e-4).mean() < AT_EDGES
        assert np.array_equal(views.moving[index].numpy(),
                              views.surface[index].numpy() >= len(room.faces))


def test_several_things_move_each_its_own_way(room, poses, crossing):
    with_box, _, moving = crossing
    lifted = np.tile(make_transform(np.eye(3), np.array([0, 0, 0.1])), (len(poses), 1, 1))
    groups = [moving, MovingFaces(range(6, 12), lifted)]
    views = by_torch(with_box, CAMERA, poses, groups)
    assert_alike(views, render_batch(with_box, CAMERA, poses, moving=groups))
    moves = np.isin(views.surface.numpy(), [*range(6, 12), *moving.faces])
    assert np.array_equal(views.moving.numpy(), moves)
    assert not np.isin(views.surface.numpy(), range(6, 12)).all(0).any()


# Covisibility


def test_a_pixel_is_seen_where_depth_and_rays_say_so(room, poses):
    near = poses[2], poses[3]
    views = by_torch(room, [CAMERA, Camera.from_fov(75, (160, 120))], np.stack(near))
    a, b = (PosedDepth(views.depth[i], views.K[i], views.T_world_cam[i]) for i in (0, 1))
    found = covisible(a, b)
    seen = found.seen.numpy()
    assert 0.3 < seen.mean() < 0.95
    pixels, z = found.pixels.numpy(), found.z.numpy()
    inverse_depth = cv2.remap(1 / b.depth.numpy(), *np.moveaxis(pixels, -1, 0),
                              cv2.INTER_LINEAR)
    # OpenCV rounds places to 1/32 pixel, so the median says 1e-4 and all say 1e-2.
    assert np.median(np.abs(z * inverse_depth - 1)[seen]) < 1e-4
    inside = ((pixels >= 0) & (pixels <= (159, 119))).all(-1) & (z > 0)
    free = unhidden(room, views, near[1])
    # The others are within a pixel of an edge.
    assert (seen == (inside & free)).mean() > 0.97
    assert (inside & ~free).mean() > 0.01 and not seen[~inside].any()


def unhidden(room, views, T_world_other):
    """Whether nothing stands between another camera and the points of the first view, by rays."""
    rows, columns = np.indices((120, 160))
    points = CAMERA.unproject(np.stack([columns, rows], -1).reshape(-1, 2),
                              views.depth[0].numpy().ravel())
    T = views.T_world_cam[0].numpy()
    points = points @ T[:3, :3].T + T[:3, 3]
    origin = np.tile(T_world_other[:3, 3], (len(points), 1))
    return (first_hit(origin, points - origin, room.boxes) > 1 - 1e-3).reshape(120, 160)


def test_depth_of_one_view_is_that_of_another_one(room, poses):
    """To 1e-4 wherever the pixels around the place there show the same surface as here."""
    views = by_torch(room, CAMERA, poses[2:4])
    a, b = (PosedDepth(views.depth[i], views.K[i], views.T_world_cam[i]) for i in (0, 1))
    seen = covisible(a, b, 0.01).seen.numpy()
    columns, rows = np.moveaxis(np.floor(covisible(a, b).pixels.numpy()), -1, 0).astype(int)
    there = views.surface[1].numpy()
    whole = seen.copy()
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        around = there[np.clip(rows + down, 0, 119), np.clip(columns + right, 0, 159)]
        whole &= around == views.surface[0].numpy()
    assert whole.sum() > 0.85 * seen.sum()
    assert covisible(a, b, 1e-4).seen.numpy()[whole].all()
    same = covisible(a, a, 1e-4)
    assert same.seen.float().mean() > 0.99
    assert torch.allclose(same.z, a.depth, rtol=1e-5)


def test_unknown_depth_is_never_seen(room, poses):
    views = by_torch(room, CAMERA, poses[:1])
    a = PosedDepth(views.depth, views.K, views.T_world_cam)
    holes = a.depth.clone()
    holes[:, 30:60] = 0
    assert not covisible(replace(a, depth=holes), a).seen[:, 30:60].any()
    # Another camera sees this one, so that where nothing is known would be in its image.
    behind = make_transform(np.eye(3), np.array([0, 0, -0.3]))
    b = replace(a, T_world_cam=a.T_world_cam @ torch.from_numpy(behind))
    assert not covisible(replace(a, depth=holes), b, 10).seen[:, 30:60].any()
    assert not covisible(a, replace(a, depth=holes)).seen[:, 31:59].any()
    assert covisible(a, replace(a, depth=holes)).seen[:, :29].float().mean() > 0.98


# Appearance


@pytest.fixture
def images():
    return torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(1))


def taken(images, seed):
    generator = torch.Generator().manual_seed(seed)
    return Appearance.drawn(1, len(images), generator).applied(images, generator)


def test_a_seed_decides_how_images_look(images):
    assert torch.equal(taken(images, 1), taken(images, 1))
    assert (taken(images, 1) - taken(images, 2)).abs().mean() > 0.01
    assert taken(images, 1).min() >= 0 and taken(images, 1).max() <= 1


def test_views_that_are_sharp_still_and_even_stay_as_they_are(images):
    zero, one = torch.zeros(4), torch.ones(4)
    plain = Appearance(zero, torch.zeros(4, 2), one, one, torch.ones(4, 3), zero)
    same = plain.applied(images, torch.Generator())
    assert torch.allclose(same, images, atol=2e-3)


def test_views_of_one_window_differ_less_than_windows():
    drawn = Appearance.drawn(40, 4, torch.Generator().manual_seed(0))
    for setting in (drawn.gamma, drawn.gain.mean(1), drawn.saturation, drawn.noise):
        each = setting.view(40, 4)
        assert each.std(1).mean() < 0.5 * each.mean(1).std()
    assert 0.3 < (drawn.defocus_px == 0).float().mean() < 0.7


def test_no_saturation_is_grey(images):
    zero, one = torch.zeros(4), torch.ones(4)
    grey = Appearance(zero, torch.zeros(4, 2), zero, one, torch.ones(4, 3), zero)
    seen = grey.applied(images, torch.Generator())
    assert torch.allclose(seen, images.mean(1, keepdim=True).expand_as(images), atol=2e-3)


def spread(image):
    """Standard deviations (right, down) of a blurred point, pixels."""
    weights = image / image.sum()
    rows, columns = torch.meshgrid(*map(torch.arange, image.shape), indexing='ij')
    return [((weights * (at - (weights * at).sum())**2).sum()**0.5).item()
            for at in (columns.float(), rows.float())]


def test_blur_is_as_wide_as_said():
    point = torch.zeros(3, 3, 41, 41)
    point[:, :, 20, 20] = 1
    soft = defocused(point, torch.tensor([0.0, 1.0, 2.0]))
    assert [pytest.approx(spread(view[1]), abs=0.02) for view in soft] == [
        [0, 0], [1, 1], [2, 2]]
    moved = motion_blurred(point, torch.tensor([[0.0, 0], [8, 0], [0, 4]]))
    along, across = spread(moved[1, 0])
    assert along == pytest.approx(np.std(np.linspace(-4, 4, 9)), abs=0.05) and across < 0.05
    assert spread(moved[2, 0])[1] > 1
    assert torch.allclose(moved.sum((2, 3)), torch.ones(3, 3), atol=1e-4)


def test_light_and_noise_are_as_said(images):
    one = torch.ones(1)
    dark = exposed(images, one, torch.tensor([0.5, 0.25, 1.0])[:, None, None], torch.zeros(1))
    ratio = (dark / images.clamp(min=1e-3)).mean((0, 2, 3))
    assert ratio.tolist() == pytest.approx([0.5, 0.25, 1.0], abs=1e-3)
    grey = torch.full((2, 3, 64, 64), 0.5)
    even = Appearance(torch.zeros(2), torch.zeros(2, 2), torch.ones(2), torch.ones(2),
                      torch.ones(2, 3), torch.tensor([0.0, 0.02]))
    noisy = even.applied(grey, torch.Generator().manual_seed(0))
    assert noisy[0].std() < 1e-3 and noisy[1].std().item() == pytest.approx(0.02, rel=0.05)


# Which renderer


def test_a_cpu_gets_the_numpy_renderer(room, poses, monkeypatch):
    monkeypatch.setattr(TorchRoom, 'render', None)
    views = render_batch(room, CAMERA, poses[:2], device='cpu')
    for index in range(2):
        image, depth = room.render(CAMERA, poses[index])
        assert np.array_equal(views.image[index].permute(1, 2, 0).numpy(), image)
        assert np.array_equal(views.depth[index].numpy(), depth)


def test_other_devices_get_torch_and_keep_the_room(room, poses, monkeypatch):
    asked = []

    class Fake:
        render = staticmethod(lambda shots: shots)

    monkeypatch.setattr(batch, '_on_device', lambda *key: asked.append(key) or Fake)
    shots = Shots(room, [CAMERA], poses[:1])
    assert renderer_for('cuda:1')(shots) is shots
    assert asked == [(room, torch.device('cuda', 1))]


@pytest.mark.parametrize('change', [
    {'cameras': [CAMERA]}, {'cameras': [CAMERA, Camera.from_fov(65, (80, 60))]},
    {'moving': [MovingFaces([0], np.eye(4)[None])]},
    {'moving': [MovingFaces([10**6], np.stack([np.eye(4)] * 2))]},
    {'cameras': [], 'T_world_cam': np.zeros((0, 4, 4))}])
def test_shots_that_do_not_fit_together_are_refused(room, poses, change):
    fitting = {'cameras': [CAMERA, CAMERA], 'T_world_cam': poses[:2]}
    Shots(room, **fitting)
    with pytest.raises(InputError, match='expected'):
        Shots(room, **{**fitting, **change})
