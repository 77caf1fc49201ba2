"""Laws of the overview: what is drawn lies where it should, whatever the frame of the map."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from feedforward_recon.console.viewer import (
    FOUND,
    PATH,
    REFUSED,
    draw_overview,
    estimate_up,
    save_overview,
    without_ceiling,
)
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import inverse, se3_exp
from feedforward_recon.synthetic import Room
from feedforward_recon.types import PointCloud, Trajectory


@pytest.fixture(scope='module')
def trajectory() -> Trajectory:
    poses = np.array(Room.generate(5).walk(200, seed=0))
    return Trajectory(np.arange(200), poses)


def room_cloud(n: int = 30_000) -> PointCloud:
    """A grey floor of 6 x 4 m, grey walls, and a yellow ceiling that must not be drawn."""
    rng = np.random.default_rng(0)
    xyz = rng.uniform((-3, -2, 0), (3, 2, 2.6), (n, 3))
    xyz[:n // 3, 2], xyz[n // 3:n // 2, 1] = 0, 2
    xyz[n // 2:n * 2 // 3, 0], xyz[n * 2 // 3:, 2] = -3, 2.6
    rgb = np.full((n, 3), 128, np.uint8)
    rgb[n * 2 // 3:] = 255, 255, 0
    return PointCloud(xyz.astype(np.float32), rgb)


def share(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    """Share of the picture (without the legend below it) that is nearly of a colour."""
    picture = image[:-100].astype(int)
    return float((np.abs(picture - colour).max(-1) < 25).mean())


@pytest.mark.parametrize('seed', range(6))
def test_up_is_found_in_any_frame(seed):
    room = Room.generate(seed)
    poses = np.array(room.walk(300, seed=0))
    T_new_world = se3_exp(np.random.default_rng(seed).normal(0, 2, 6))
    moved = Trajectory(np.arange(300), poses).transformed(T_new_world, 0.1)
    angle = np.rad2deg(np.arccos(np.clip(estimate_up(moved) @ T_new_world[:3, 2], -1, 1)))
    assert angle < 3


def test_up_of_a_straight_drive_with_a_tilted_camera():
    """A car that never turns leaves up open between two answers; the y axes decide."""
    poses = np.tile(np.eye(4), (50, 1, 1))
    poses[:, 2, 3] = np.arange(50)
    up = estimate_up(Trajectory(np.arange(50), poses))
    np.testing.assert_allclose(up, (0, -1, 0), atol=1e-6)


def test_ceiling_is_removed_and_floor_is_not(trajectory):
    cloud = room_cloud()
    kept = without_ceiling(cloud, trajectory, np.array([0, 0, 1.0]))
    assert kept.xyz[:, 2].max() < 2.3
    assert (kept.xyz[:, 2] == 0).sum() == (cloud.xyz[:, 2] == 0).sum()


def test_everything_is_drawn_and_the_ceiling_is_not(trajectory):
    image = draw_overview(room_cloud(), trajectory, trajectory.T_map_cam[::40],
                          trajectory.T_map_cam[20:60:20], width_px=800)
    assert image.shape[1] == 800
    assert image.dtype == np.uint8
    assert share(image, (255, 255, 0)) == 0
    assert share(image, (128, 128, 128)) > 0.2
    assert share(image, PATH) > 5e-4
    assert share(image, FOUND) > 1e-4
    assert share(image, REFUSED) > 5e-5


def test_near_points_hide_far_ones():
    """A green table above a red floor, whichever of the two comes first in the cloud."""
    grid = np.linspace(-1, 1, 100)
    xyz = np.stack(np.meshgrid(grid, grid, [0.8, 0.0]), -1).reshape(-1, 3).astype(np.float32)
    rgb = np.tile(np.uint8([[0, 255, 0], [255, 0, 0]]), (10_000, 1))
    for order in (slice(None), slice(None, None, -1), np.argsort(xyz[:, 2])):
        image = draw_overview(PointCloud(xyz[order], rgb[order]), Trajectory(), width_px=400)
        middle = image[100:150, 180:220].reshape(-1, 3)
        assert (middle[:, 1] > middle[:, 0]).all()


def test_picture_does_not_depend_on_the_frame_of_the_map(trajectory):
    """The same map in the first camera's frame and a tenth of the scale: the same picture."""
    cloud, up = room_cloud(), np.array([0, 0, 1.0])
    plain = draw_overview(cloud, trajectory, up=up, width_px=800)
    T = inverse(trajectory.T_map_cam[0])
    moved_cloud = PointCloud((0.1 * cloud.xyz @ T[:3, :3].T + T[:3, 3]).astype(np.float32),
                             cloud.rgb)
    moved = draw_overview(moved_cloud, trajectory.transformed(T, 0.1), up=T[:3, 2],
                          metres_per_unit=10.0, width_px=800)
    assert plain.shape == moved.shape
    same = min(np.abs(plain.astype(int) - other).mean() for other in (moved, np.concatenate([
        moved[:-46][::-1, ::-1], moved[-46:]])))
    assert same < 6


def test_picture_is_not_mirrored():
    """Heaps that lie counter-clockwise in the map lie so in the picture."""
    rng, colours = np.random.default_rng(0), 220 * np.eye(3, dtype=np.uint8)
    heaps = np.array([[0, 0, 0], [4, 0, 0], [4, 2, 0.0]])
    xyz = (heaps[:, None] + rng.uniform(-0.3, 0.3, (3, 2000, 3))).reshape(-1, 3)
    cloud = PointCloud(xyz.astype(np.float32), colours.repeat(2000, 0))
    image = draw_overview(cloud, Trajectory(), up=np.array([0, 0, 1.0]), width_px=600)
    centres = []
    for channel in range(3):
        others = np.delete(image, channel, 2).astype(int).max(2)
        rows, cols = np.nonzero(image[..., channel] > others + 100)
        centres.append((np.median(cols), -np.median(rows)))
    red, green, blue = np.array(centres)
    (ax, ay), (bx, by) = green - red, blue - red
    assert ax * by - ay * bx > 0


def test_file_is_a_png_of_that_picture(tmp_path, trajectory):
    path = tmp_path / 'overview.png'
    save_overview(path, room_cloud(3000), trajectory, title='a room', width_px=640)
    image = cv2.imread(str(path))[..., ::-1]
    np.testing.assert_array_equal(image, draw_overview(room_cloud(3000), trajectory,
                                                       title='a room', width_px=640))


@pytest.mark.parametrize(('cloud', 'frames'), [(PointCloud(), 200), (PointCloud(), 1),
                                               (room_cloud(3000), 0)])
def test_little_is_enough(cloud, frames, trajectory):
    part = Trajectory(trajectory.stamps_ns[:frames], trajectory.T_map_cam[:frames])
    assert draw_overview(cloud, part, metres_per_unit=None, width_px=400).std() > 1


def test_nothing_and_nowhere_are_refused(tmp_path, trajectory):
    with pytest.raises(InputError, match='expected a cloud or a trajectory'):
        save_overview(tmp_path / 'a.png', PointCloud(), Trajectory())
    with pytest.raises(InputError, match='expected a place to write'):
        save_overview(tmp_path / 'missing' / 'a.png', room_cloud(100), trajectory, width_px=200)
