"""Motions of pairs, and the rotations that many pairs agree on."""

from __future__ import annotations

import numpy as np
import pytest

from feedforward_recon.geometry.epipolar import checked, motion_between, moved_along
from feedforward_recon.geometry.rotation_averaging import averaged_rotations, turns_left
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    rotation_angle_rad,
    so3_exp,
    transform_points,
)

TOLERANCE = 2 / 500  # two pixels at a focal length of 500


def views(T_a_b, *, wrong=0.0, noise=0.3 / 500, count=300, seed=0):
    """Normalised coordinates [M, 2] of a scene in two views; a share of them of other things."""
    rng = np.random.default_rng(seed)
    points = rng.uniform((-2, -1.5, 3), (2, 1.5, 8), (count, 3))
    xy = [p[:, :2] / p[:, 2:] + rng.normal(0, noise, (count, 2))
          for p in (points, transform_points(inverse(T_a_b), points))]
    others = rng.permutation(count)[:round(wrong * count)]
    xy[1][others] = rng.uniform(-0.5, 0.5, (len(others), 2))
    right = np.ones(count, bool)
    right[others] = False
    return *xy, points, right


def pose(rotation, translation):
    return make_transform(so3_exp(np.array(rotation)), np.array(translation, float))


@pytest.mark.parametrize('wrong', [0.0, 0.5])
def test_a_motion_is_found_among_wrong_matches(wrong):
    T = pose((0.05, -0.2, 0.1), (1.0, 0.2, -0.1))
    xy_a, xy_b, points, right = views(T, wrong=wrong)
    motion = motion_between(xy_a, xy_b, TOLERANCE, seed=0)
    assert np.rad2deg(rotation_angle_rad(motion.T_a_b[:3, :3].T @ T[:3, :3])) < 0.7
    unit = T[:3, 3] / np.linalg.norm(T[:3, 3])
    assert motion.T_a_b[:3, 3] @ unit > np.cos(np.deg2rad(3))
    assert motion.inliers[right].mean() > 0.95 and motion.inliers[~right].sum() < 10
    # Points are right up to the unit, which is the length of the step.
    scale = np.linalg.norm(T[:3, 3])
    off = np.linalg.norm(scale * motion.points - points, axis=1)[motion.inliers & right]
    assert np.median(off / points[motion.inliers & right, 2]) < 0.03


def test_views_from_one_place_are_a_turn():
    T = pose((0.02, 0.3, -0.05), (0, 0, 0))
    xy_a, xy_b, _, right = views(T, wrong=0.3)
    motion = motion_between(xy_a, xy_b, TOLERANCE, seed=0)
    assert not motion.T_a_b[:3, 3].any()
    assert np.rad2deg(rotation_angle_rad(motion.T_a_b[:3, :3].T @ T[:3, :3])) < 0.2
    assert motion.inliers[right].mean() > 0.95
    assert np.isnan(motion.points).all()


def test_the_same_image_twice_is_a_turn_by_nothing():
    xy, *_ = views(np.eye(4))
    motion = motion_between(xy, xy, TOLERANCE, seed=0)
    assert not motion.T_a_b[:3, 3].any() and motion.inliers.all()
    assert rotation_angle_rad(motion.T_a_b[:3, :3]) < 1e-6


def test_matches_of_nothing_agree_on_nothing():
    rng = np.random.default_rng(0)
    motion = motion_between(*rng.uniform(-0.5, 0.5, (2, 200, 2)), TOLERANCE, seed=0)
    assert motion is None or motion.inliers.sum() < 40


def test_a_known_rotation_gives_the_direction_of_a_small_step():
    """With 1/50 of the depth between views, a pair alone mixes up turns and steps."""
    T = pose((0.02, 0.05, 0.0), (0.1, 0.02, 0.0))
    unit, off_deg = T[:3, 3] / np.linalg.norm(T[:3, 3]), []
    for seed in range(8):
        xy_a, xy_b, _, right = views(T, wrong=0.3, noise=0.5 / 500, seed=seed)
        alone = motion_between(xy_a, xy_b, TOLERANCE, seed=0)
        near = alone.inliers
        motion = moved_along(T[:3, :3], alone.T_a_b[:3, 3], xy_a[near], xy_b[near], TOLERANCE)
        assert motion.inliers[right[near]].mean() > 0.9
        off_deg.append([np.rad2deg(np.arccos(m.T_a_b[:3, 3] @ unit)) for m in (alone, motion)])
    before, after = np.median(off_deg, 0)
    assert after < 2 and after < 0.5 * before


def test_a_motion_is_checked_in_front_of_both_cameras():
    T = pose((0, 0, 0), (1.0, 0, 0))
    xy_a, xy_b, *_ = views(T, noise=0.0)
    assert checked(T, xy_a, xy_b, TOLERANCE).inliers.all()
    behind = T.copy()
    behind[:3, 3] *= -1
    assert not checked(behind, xy_a, xy_b, TOLERANCE).inliers.any()


def graph(count, wrong, seed=0):
    """True rotations and measured ones of a ring with chords; a share of the chords is wrong."""
    rng = np.random.default_rng(seed)
    R = so3_exp(rng.normal(0, 1.0, (count, 3)))
    R = R[0].T @ R
    i, j = np.array([(a, b) for a in range(count) for b in range(a + 1, count)
                     if b - a < 4 or rng.uniform() < 0.2]).T
    R_i_j = np.swapaxes(R[i], 1, 2) @ R[j] @ so3_exp(rng.normal(0, np.deg2rad(0.3), (len(i), 3)))
    bad = np.flatnonzero(j - i > 1)
    bad = rng.permutation(bad)[:round(wrong * len(i))]
    R_i_j[bad] = so3_exp(rng.normal(0, 1.0, (len(bad), 3))) @ R_i_j[bad]
    return R, i, j, R_i_j, bad


def test_rotations_agree_with_most_pairs():
    R, i, j, R_i_j, bad = graph(30, wrong=0.25)
    start = np.tile(np.eye(3), (30, 1, 1))
    for k in range(1, 30):  # along the ring, whose error adds up
        start[k] = start[k - 1] @ R_i_j[(i == k - 1) & (j == k)][0]
    found = averaged_rotations(start, i, j, R_i_j, np.ones(len(i)))
    assert np.array_equal(found[0], start[0])
    error = np.rad2deg(rotation_angle_rad(np.swapaxes(found, 1, 2) @ R))
    assert error.max() < 0.6 < np.rad2deg(rotation_angle_rad(np.swapaxes(start, 1, 2) @ R)).max()
    left = np.rad2deg(np.linalg.norm(turns_left(found, i, j, R_i_j), axis=1))
    assert left[bad].min() > 5 > np.delete(left, bad).max()
