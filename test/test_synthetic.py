"""Laws of the synthetic rooms: geometry, determinism, safe walks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, so3_log
from feedforward_recon.synthetic import Room, render, render_walk
from feedforward_recon.synthetic.lighting import first_hit

CAMERA = Camera.from_fov(65, (320, 240))
DISTORTED = Camera(320, 240, 200, 205, 158, 121, (-0.28, 0.07, 1e-3, -5e-4))
FISHEYE = Camera(320, 240, 170, 170, 160, 119, (0.02, -0.01, 0.003, -0.001), 'fisheye')


@pytest.fixture(scope='module')
def room() -> Room:
    return Room.generate(3)


@pytest.fixture(scope='module')
def poses(room: Room) -> list[np.ndarray]:
    return room.walk(150, seed=0)


def sample(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Bilinear values of an image at pixels [N, 2]."""
    maps = pixels.astype(np.float32)[:, None]
    return cv2.remap(image.astype(np.float32), maps[..., 0], maps[..., 1], cv2.INTER_LINEAR,
                     borderMode=cv2.BORDER_REPLICATE)[:, 0]


def transfer(room: Room, camera_a: Camera, T_a: np.ndarray, camera_b: Camera, T_b: np.ndarray):
    """Pixels of view A seen in view B: depth there by geometry and by B, and both colours."""
    image_a, depth_a = room.render(camera_a, T_a)
    image_b, depth_b = room.render(camera_b, T_b)
    pixels_a = np.stack(np.meshgrid(np.arange(4, camera_a.width - 4, 5),
                                    np.arange(4, camera_a.height - 4, 5)), -1).reshape(-1, 2)
    columns, rows = pixels_a.T
    points = camera_a.unproject(pixels_a, depth_a[rows, columns])
    T_b_a = inverse(T_b) @ T_a
    points_b = points @ T_b_a[:3, :3].T + T_b_a[:3, 3]
    pixels_b = camera_b.project(points_b)
    inside = np.isfinite(pixels_b).all(1)
    inside[inside] = ((pixels_b[inside] > 3) & (pixels_b[inside] < np.array(camera_b.size_wh) - 4)
                      ).all(1)
    found = pixels_b[inside]
    return (points_b[inside, 2], sample(depth_b, found), sample(image_a, pixels_a[inside]),
            sample(image_b, found))


@pytest.mark.parametrize(('camera_a', 'camera_b'), [
    (CAMERA, CAMERA), (CAMERA, DISTORTED), (DISTORTED, FISHEYE)])
def test_depth_and_colour_agree_between_views(room, poses, camera_a, camera_b):
    z, depth, colour_a, colour_b = transfer(room, camera_a, poses[20], camera_b, poses[29])
    assert len(z) > 500
    same = np.abs(z / depth - 1) < 0.01
    # What disagrees is occluded or at an edge.
    assert same.mean() > 0.93
    assert np.median(np.abs(colour_a - colour_b)[same]) < 6
    wrong = colour_b[np.random.default_rng(0).permutation(len(colour_b))]
    assert np.abs(colour_a - colour_b).mean() < 0.4 * np.abs(colour_a - wrong).mean()


def test_depth_of_a_known_wall(room):
    """Looking straight at the wall y = size/2 from above the furniture, z is the distance."""
    T = np.eye(4)
    T[:3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]])
    T[:3, 3] = 0, 0, room.size[2] - 0.05
    narrow = Camera.from_fov(2, (31, 21))
    _, depth = room.render(narrow, T)
    np.testing.assert_allclose(depth, room.size[1] / 2, atol=1e-4)


def test_depth_is_that_of_the_first_surface_on_the_ray(room, poses):
    """Rays cast through the solid boxes, one by one, end where the drawn rectangles say."""
    columns, rows = np.meshgrid(np.arange(5, 320, 9), np.arange(5, 240, 9))
    rays = CAMERA.unproject(np.stack([columns, rows], -1).reshape(-1, 2), np.ones(columns.size))
    for T in poses[::30]:
        _, depth = room.render(CAMERA, T)
        z = depth[rows, columns].ravel()
        directions = rays @ T[:3, :3].T
        on_surface = room.clearance(T[:3, 3] + directions * z[:, None])
        assert np.abs(on_surface).max() < 1e-3
        first = first_hit(np.tile(T[:3, 3], (len(rays), 1)), directions, room.boxes)
        assert (z <= first + 1e-3).mean() > 0.995, 'but for pixels at the very edges'


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
def test_near_surfaces_hide_far_ones(order):
    near, far = (render.Surface(np.array([-s, -s, s]), np.array([2 * s, 0, 0]),
                                np.array([0, 2 * s, 0])) for s in (1.0, 2.0))
    surfaces = [(near, far)[i] for i in order]
    nearest, inverse_depth, _ = render.rasterise(surfaces, CAMERA, np.eye(4))
    assert (nearest == order.index(0)).all()
    np.testing.assert_allclose(inverse_depth, 1.0, rtol=1e-5)


def test_texture_lies_right_side_up_on_its_surface():
    """A texture whose red is u and green is v shows at each pixel the u and v of its point."""
    u, v = np.meshgrid((np.arange(200) + 0.5) / 200, (np.arange(100) + 0.5) / 100)
    texture = np.stack([255 * u, 255 * v, 0 * u], -1).astype(np.uint8)
    surface = render.Surface(np.array([-1, -0.5, 2.0]), np.array([1.8, 0, 0.6]),
                             np.array([0, 1.1, 0.0]))
    nearest, inverse_depth, planes = render.rasterise([surface], CAMERA, np.eye(4))
    colours = render.shade(surface, render.pyramid(texture), planes[0], CAMERA,
                           (slice(0, 240), slice(0, 320)))
    rows, columns = np.nonzero(nearest == 0)
    points = CAMERA.unproject(np.stack([columns, rows], -1), 1 / inverse_depth[rows, columns])
    offsets = points - surface.corner
    expected = np.stack([offsets @ side / (side @ side)
                         for side in (surface.side_u, surface.side_v)], -1) * 255
    assert len(rows) > 10_000
    assert np.abs(colours[rows, columns, :2] - expected).max() < 5


@pytest.mark.parametrize(('distance', 'low', 'high'), [(0.15, 35, 128), (9.37, 0, 8)])
def test_fine_patterns_are_sharp_when_near_and_grey_when_far(distance, low, high):
    """A checkerboard of 2 mm: 3 pixels per square near by, 20 squares per pixel far away."""
    board = (np.indices((1500, 1500)).sum(0) % 2 * 255).astype(np.uint8)
    surface = render.Surface(np.array([-1.5, -1.5, distance]), np.array([3.0, 0, 0]),
                             np.array([0, 3.0, 0]))
    camera = Camera(64, 64, 250, 250, 31.7, 31.2)
    _, _, planes = render.rasterise([surface], camera, np.eye(4))
    window = slice(0, 64), slice(0, 64)
    levels = render.pyramid(np.dstack([board] * 3))
    image = render.shade(surface, levels, planes[0], camera, window)
    assert low <= image.std() <= high


@pytest.mark.parametrize('camera', [CAMERA, DISTORTED, FISHEYE])
def test_every_pixel_sees_something(room, poses, camera):
    assert all((room.render(camera, T)[1] > 0.05).all() for T in poses[::30])


def test_seed_decides_everything(room, poses):
    again = Room.generate(3)
    np.testing.assert_array_equal(again.walk(150, seed=0), poses)
    for T in poses[::70]:
        for a, b in zip(room.render(CAMERA, T), again.render(CAMERA, T), strict=True):
            np.testing.assert_array_equal(a, b)


def test_order_of_views_does_not_matter(room, poses):
    """Textures are made on first use; which view comes first must not change them."""
    again = Room.generate(3)
    for T in poses[::-70]:
        again.render(CAMERA, T)
    np.testing.assert_array_equal(again.render(CAMERA, poses[70])[0],
                                  room.render(CAMERA, poses[70])[0])


def test_other_seeds_give_other_rooms_and_walks(room, poses):
    other = Room.generate(4)
    assert not np.allclose(other.size, room.size)
    assert not np.allclose(room.walk(150, seed=1), poses)


@pytest.mark.parametrize('n_frames', [1, 30, 150, 900])
@pytest.mark.parametrize('seed', [0, 11, 12])
def test_walk_is_safe_smooth_and_closed(seed, n_frames):
    room = Room.generate(seed)
    T = np.array(room.walk(n_frames, seed=0))
    assert len(T) == n_frames
    assert room.clearance(T[:, :3, 3]).min() > 0.2
    loop = np.concatenate([T, T[:1]])
    steps = np.linalg.norm(np.diff(loop[:, :3, 3], axis=0), axis=1)
    turns = np.linalg.norm(so3_log(np.swapaxes(loop[:-1, :3, :3], 1, 2) @ loop[1:, :3, :3]),
                           axis=1)
    assert steps.max() < 0.06
    assert np.rad2deg(turns).max() < 5
    up_in_camera = T[:, 2, 1]
    assert (up_in_camera < -0.8).all(), 'the camera stands upright: its y axis points down'


def test_walk_refuses_nonsense(room):
    with pytest.raises(InputError, match='n_frames >= 1'):
        room.walk(0, seed=0)


def test_held_out_views_are_near_but_not_on_the_walk(room, poses):
    views = np.array(room.held_out_views(poses, 40, seed=5))
    walk = np.array(poses)
    distance = np.linalg.norm(views[:, None, :3, 3] - walk[None, :, :3, 3], axis=-1).min(1)
    assert distance.max() <= 0.2
    assert np.median(distance) > 0.03
    assert room.clearance(views[:, :3, 3]).min() > 0.1
    np.testing.assert_array_equal(views, room.held_out_views(poses, 40, seed=5))


def test_held_out_views_of_another_room_are_refused(room):
    """A walk beyond the walls has no free space beside it."""
    outside = np.eye(4)
    outside[:3, 3] = 50, 0, 1
    with pytest.raises(InputError, match='free space of room 3'):
        room.held_out_views([outside], 3, seed=0)


def test_frames_carry_truth_and_seeded_noise(room, poses):
    clean = list(render_walk(room, CAMERA, poses[:3]))
    assert [f.source for f in clean] == [f'synthetic/{i:06d}' for i in range(3)]
    assert [f.stamp_ns for f in clean] == [0, 66_666_667, 133_333_333]
    np.testing.assert_array_equal(clean[2].T_map_cam, poses[2])
    np.testing.assert_array_equal(clean[1].image, room.render(CAMERA, poses[1])[0])
    noisy, same = (list(render_walk(room, CAMERA, poses[:3], noise=4.0, exposure_drift=0.1,
                                    seed=9)) for _ in range(2))
    np.testing.assert_array_equal(noisy[2].image, same[2].image)
    error = noisy[0].image.astype(float) - clean[0].image
    assert 3 < error.std() < 8


def test_images_are_sharp_but_not_aliased(room, poses):
    """Rendering at twice the size and averaging gives nearly the same image."""
    image, _ = room.render(CAMERA, poses[0])
    large, _ = room.render(CAMERA.resized((640, 480)), poses[0])
    averaged = cv2.resize(large, (320, 240), interpolation=cv2.INTER_AREA)
    assert np.abs(image.astype(float) - averaged).mean() < 6
    assert cv2.Laplacian(image, cv2.CV_32F).std() > 4
