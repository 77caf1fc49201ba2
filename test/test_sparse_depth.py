"""Depth as cameras really give it: with holes, sparse, of another size, late, in another unit."""

from __future__ import annotations

import logging
from dataclasses import replace

import cv2
import numpy as np
import pytest

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io.images import scaled_depth
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.preparation import is_in_another_unit
from feedforward_recon.synthetic import Room, render_walk

SIZE_WH = (320, 240)
CAMERA = Camera.from_fov(68.0, SIZE_WH)
FRAMES = 60
# Runs with dense depth scatter by as much when nothing but the order of the images changes.
SCATTER_M = 0.001
ROWS, COLUMNS = np.mgrid[:SIZE_WH[1], :SIZE_WH[0]]


# -- single pixels ------------------------------------------------------------------------------

def view(depth):
    gray = np.zeros(depth.shape, np.uint8)
    camera = Camera.from_fov(68.0, depth.shape[::-1])
    return View(0, 0, np.repeat(gray[..., None], 3, 2), gray, camera, depth.astype(np.float32),
                1.0)


def slanted():
    """A floor-like plane, 1.5 to 4.5 m away."""
    return 1.5 + 3.0 * ROWS / SIZE_WH[1]


@pytest.mark.parametrize(('name', 'kept', 'share'), [
    ('every second row and column', (ROWS % 2 == 0) & (COLUMNS % 2 == 0), 1.0),
    ('every second row', ROWS % 2 == 0, 1.0),
    ('every second column', COLUMNS % 2 == 1, 1.0),
    ('a tenth', np.random.default_rng(0).random(ROWS.shape) < 0.1, 0.35)])
def test_depth_is_read_from_the_neighbours_that_have_it(name, kept, share):
    px = np.random.default_rng(1).uniform((3, 3), np.array(SIZE_WH) - 4, (500, 2))
    depth = slanted()
    found = view(np.where(kept, depth, 0)).depth_at(px)
    seen = found > 0
    assert seen.mean() >= share, name
    true = depth[np.rint(px[:, 1]).astype(int), np.rint(px[:, 0]).astype(int)]
    # One pixel beside is 1.25 cm off on this plane.
    np.testing.assert_allclose(found[seen], true[seen], atol=0.013)


@pytest.mark.parametrize('step', [1, 2])
def test_at_an_edge_there_is_no_depth(step):
    depth = np.where(COLUMNS < 160, 1.0, 3.0) * ((ROWS % step == 0) & (COLUMNS % step == 0))
    edge = view(depth).depth_at(np.array([[159.0, 100], [160.0, 101]]))
    beside = view(depth).depth_at(np.array([[150.0, 100], [170.0, 101]]))
    assert edge.tolist() == [0, 0] and beside.tolist() == [1, 3]


def test_beside_a_hole_in_dense_depth_there_is_none():
    depth = np.full(ROWS.shape, 2.0)
    depth[80:160, 100:200] = 0
    found = view(depth).depth_at(np.array([[99.0, 100], [98.0, 100], [150.0, 79], [150.0, 78]]))
    assert found.tolist() == [0, 2, 0, 2]


def test_one_measurement_alone_is_not_believed():
    depth = np.zeros(ROWS.shape)
    depth[100, 100] = 2.0
    assert view(depth).depth_at(np.array([[100.0, 100]])).tolist() == [0]


def test_outside_of_the_image_there_is_no_depth():
    px = np.array([[0.0, 5], [-7, 5], [319, 5], [400, 5], [5, 0], [5, 239.4], [5, 5]])
    assert view(np.ones(ROWS.shape)).depth_at(px).tolist() == [0, 0, 0, 0, 0, 0, 1]


# -- the size -----------------------------------------------------------------------------------

@pytest.mark.parametrize('factor', [2, 4])
def test_smaller_depth_gives_each_pixel_a_measurement_nearby(factor):
    small = slanted()[factor // 2::factor, factor // 2::factor].astype(np.float32)
    found = scaled_depth(small, SIZE_WH, 'here')
    assert set(np.unique(found)) == set(np.unique(small))  # nothing is made up
    np.testing.assert_allclose(found, slanted(), atol=factor * 0.0126)


def test_depth_of_other_proportions_is_refused():
    with pytest.raises(InputError, match=r'here: expected depth of 320x240 .*found 100x60'):
        scaled_depth(np.ones((60, 100), np.float32), SIZE_WH, 'here')


# -- whole walks --------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def walks():
    """Two rooms, the second one walked backwards."""
    made = []
    for seed, way in ((7, 1), (3, -1)):
        room = Room.generate(seed)
        frames = list(render_walk(room, CAMERA, room.walk(240, seed=0, fps=10.0)[:FRAMES],
                                  fps=10.0, noise=1.0, seed=1))
        made.append([replace(frame, stamp_ns=other.stamp_ns)
                     for frame, other in zip(frames[::way], frames, strict=True)])
    return made


def mapped(frames, encoder):
    """Images with a pose while mapping, RMS error of the finished trajectory (no scale), map."""
    mapper = Mapper(MapperConfig(), encoder)
    tracked = sum(mapper.process(frame).T_map_cam is not None for frame in frames)
    scene = mapper.finish()
    true = {frame.stamp_ns: frame.T_map_cam[:3, 3] for frame in frames}
    path = scene.trajectory
    error_m = align_points(path.positions, np.array([true[int(s)] for s in path.stamps_ns]),
                           with_scale=False).rmse
    return tracked, error_m, scene


@pytest.fixture(scope='module')
def dense(walks, encoder):
    """Mean error with a measurement in every pixel."""
    runs = [mapped(frames, encoder) for frames in walks]
    assert all(tracked == FRAMES for tracked, _, _ in runs)
    return float(np.mean([error_m for _, error_m, _ in runs]))


def holes(frame, kept):
    return replace(frame, depth=np.where(kept, frame.depth, 0).astype(np.float32))


def blind_spots(frame):
    """Dark and shiny surfaces send no light back, or too much."""
    brightness = cv2.GaussianBlur(frame.image.mean(2).astype(np.float32), (0, 0), 2)
    low, high = np.percentile(brightness, (35, 75))
    return holes(frame, (brightness > low) & (brightness < high))


def chance(frame, share):
    rng = np.random.default_rng(frame.stamp_ns % 2**32)
    return holes(frame, rng.random(ROWS.shape) < share)


CASES = {
    'registered by projection': lambda f: holes(f, (ROWS % 2 == 0) & (COLUMNS % 2 == 0)),
    'a tenth of the pixels': lambda f: chance(f, 0.1),
    '60 % holes': lambda f: chance(f, 0.4),
    '16 lidar lines': lambda f: holes(f, ROWS % 15 == 7),
    'dark and shiny': blind_spots,
    'half the size': lambda f: replace(f, depth=scaled_depth(f.depth[1::2, 1::2], SIZE_WH, ''))}


@pytest.mark.parametrize('case', CASES)
def test_sparse_depth_maps_like_dense_depth(case, walks, encoder, dense):
    runs = [mapped([CASES[case](frame) for frame in frames], encoder) for frames in walks]
    assert all(tracked == FRAMES for tracked, _, _ in runs)
    assert np.mean([error_m for _, error_m, _ in runs]) <= 1.25 * dense + SCATTER_M
    assert all(scene.metres_per_unit == 1.0 for _, _, scene in runs)


def test_images_without_depth_go_on_in_a_metric_map(walks, encoder):
    frames = [frame if number < 20 else replace(frame, depth=None)
              for number, frame in enumerate(walks[0])]
    tracked, error_m, scene = mapped(frames, encoder)
    assert tracked == FRAMES and scene.metres_per_unit == 1.0 and error_m < 0.02


def test_depth_that_comes_with_the_third_image_makes_the_map_metric(walks, encoder):
    frames = [replace(frame, depth=None) if number < 2 else frame
              for number, frame in enumerate(walks[0])]
    tracked, error_m, scene = mapped(frames, encoder)
    assert tracked >= FRAMES - 2 and scene.scale_source == 'depth' and error_m < 0.02


def test_depth_that_comes_to_a_monocular_map_is_told_once_and_not_used(walks, encoder, caplog):
    frames = [replace(frame, depth=None) if number < 30 else frame
              for number, frame in enumerate(walks[0])]
    with caplog.at_level(logging.WARNING):
        _, _, scene = mapped(frames, encoder)
    assert scene.metres_per_unit is None
    assert len([r for r in caplog.records if 'stays monocular' in r.getMessage()]) == 1


# -- the unit -----------------------------------------------------------------------------------

@pytest.mark.parametrize(('factor', 'wrong'), [(1.0, False), (0.1, True), (1000.0, True)])
def test_centimetres_read_as_millimetres_are_noticed(factor, wrong, walks, encoder, caplog):
    frames = [replace(frame, depth=frame.depth * np.float32(factor)) for frame in walks[0][::6]]
    with caplog.at_level(logging.WARNING):
        mapper = Mapper(MapperConfig(), encoder)
        for frame in frames:
            mapper.process(frame)
    warnings = [record.getMessage() for record in caplog.records
                if 'cannot be in metres' in record.getMessage()]
    assert len(warnings) == wrong


def test_a_wall_close_by_is_no_wrong_unit():
    depth = np.full(ROWS.shape, 0.4)
    depth[:, 280:] = 2.0
    assert not is_in_another_unit(depth)
    assert not is_in_another_unit(np.zeros(ROWS.shape))
