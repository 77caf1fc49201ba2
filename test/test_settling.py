"""Lengths without a sensor: a map has settled when refinement leaves it as it was."""

import numpy as np
import pytest

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.pnp import PoseFit
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.sources.settling import AGAIN, HELD, Settling
from feedforward_recon.mapping.tracking import Tracked

POINTS = np.random.default_rng(0).uniform((-1, -1, 2), (1, 1, 4), (200, 3))


class Drive:
    """A map of 200 points that grows by a keyframe and is refined, again and again."""

    def __init__(self):
        self.map = GrowingMap(MapperConfig(), 4)
        self.settling = Settling(self.map.config.tracking)

    def keyframe(self, refined=lambda points: points, moved=0.0):
        """Add a keyframe; then ``refined`` changes the points, and the keyframe moves."""
        map_ = self.map
        map_.keyframes.append(None)
        step = np.eye(4)
        step[0, 3] = 0.05 * len(map_)
        map_.T_map_cam = np.concatenate([map_.T_map_cam, step[None]])
        if len(map_) == 1:
            map_.landmarks.add(0, POINTS, np.zeros((200, 4), np.float32),
                               np.zeros((200, 3), np.uint8))
            map_.landmarks.set_points_map(np.arange(200), POINTS, map_.T_map_cam)
        nothing = np.zeros((200, 2))
        map_.landmarks.observe(np.arange(200), len(map_) - 1, nothing, nothing, nothing[:, 0], 1.0)
        self.settling.keyframe_added(map_)
        points = map_.landmarks.points_map(np.arange(200), map_.T_map_cam)
        map_.landmarks.set_points_map(np.arange(200), refined(points), map_.T_map_cam)
        map_.T_map_cam[-1, 0, 3] += moved

    def has_settled(self, inliers=200):
        fit = PoseFit(np.eye(4), np.eye(6), np.arange(200) < inliers)
        tracks = Tracks(np.zeros((2, 2), np.uint8), np.arange(200), np.zeros((200, 2)))
        return self.settling.has_settled(Tracked(tracks, fit), self.map)


def settled(drive):
    """How many keyframes it takes until a map that nothing changes has settled."""
    for keyframes in range(20):
        if drive.has_settled():
            return keyframes
        drive.keyframe()
    raise AssertionError('never')


def calm():
    drive = Drive()
    assert settled(drive) == AGAIN
    for _ in range(10):
        drive.keyframe()
        assert drive.has_settled()
    return drive


def noisy(share):
    factors = np.random.default_rng(1).uniform(1 - share, 1 + share, (200, 1))
    return lambda points: points * factors


@pytest.mark.parametrize('change', [{'refined': noisy(0.5)}, {'moved': 0.2}],
                         ids=['depths', 'place'])
def test_a_refinement_that_changes_the_map_unsettles_it_until_others_do_not(change):
    drive = calm()
    for _ in range(3):  # one alone may be a loop that was closed
        drive.keyframe(**change)
    assert 3 <= settled(drive) <= 10


def test_the_more_a_map_has_changed_the_longer_it_takes():
    little, much = calm(), calm()
    little.keyframe(moved=0.1)
    much.keyframe(moved=0.3)
    assert 0 < settled(little) < settled(much)


def test_a_place_is_measured_by_the_depth_around_it():
    drive = calm()
    drive.keyframe(moved=0.03)  # of about 3
    assert drive.has_settled()


def test_another_unit_for_all_lengths_changes_nothing():
    drive = calm()
    for _ in range(5):
        drive.keyframe(refined=lambda points: 1.2 * points)
        assert drive.has_settled()


@pytest.mark.parametrize('few', [10, 80])
def test_few_landmarks_unsettle_it(few):
    drive = calm()
    assert not drive.has_settled(inliers=few)  # too few, or less than half of the 200
    assert settled(drive) == AGAIN


def test_a_camera_that_stands_is_sure_again_after_a_while():
    drive = calm()
    assert not drive.has_settled(inliers=10)
    assert not any(drive.has_settled() for _ in range(AGAIN * HELD - 1))
    assert drive.has_settled()


def test_keyframes_without_landmarks_tell_nothing():
    drive = calm()
    drive.map.landmarks.alive[:] = False
    assert not drive.has_settled()
