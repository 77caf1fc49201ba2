"""Depth of a network is bent to where matches of placed views meet, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from feedforward_recon.geometry.depth_correction import (
    SparseDepth,
    corrected,
    corrected_views,
    sparse_depths,
)
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    so3_exp,
    transform_points,
)
from feedforward_recon.geometry.view_graph import PlacedViews, ViewPair

FOCAL_PX = 220.0
HEIGHT, WIDTH = 24, 32
ROW, COLUMN = np.mgrid[:HEIGHT, :WIDTH]
ROOM = 1.0 + 0.02 * COLUMN + 0.4 * (COLUMN > 20)  # log depth: a slanted wall, and a step behind it


def seen(truth, count, seed, *, noise=0.0, wrong=0.0):
    """Points of a log depth map at random cells."""
    rng = np.random.default_rng(seed)
    cells = np.stack([rng.integers(0, WIDTH, count), rng.integers(0, HEIGHT, count)], 1)
    said = truth[cells[:, 1], cells[:, 0]] + rng.normal(0, noise, count)
    false = rng.random(count) < wrong
    said[false] += rng.choice([-1.0, 1.0], false.sum())
    return SparseDepth(cells, said, np.full(count, max(noise, 0.02)))


@pytest.mark.parametrize('seed', range(3))
def test_what_is_wrong_over_the_whole_image_is_mended_between_the_matches(seed):
    bend = 0.5 + 0.3 * np.sin(COLUMN / 8) * np.cos(ROW / 10)
    said = corrected(ROOM + bend, seen(ROOM, 250, seed, noise=0.03, wrong=0.1))
    error = np.abs(said - ROOM)
    assert error.mean() < 0.03 < 5 * error.mean() < np.abs(bend).mean()


def test_a_correction_may_jump_where_depth_does_and_nowhere_else():
    wrong = 0.3 * (COLUMN > 20)  # what lies behind is too far, all of it
    points = seen(ROOM, 120, 0)
    jumped = corrected(ROOM + wrong, points) - ROOM
    level = corrected(1.0 + wrong - 0.3 * (COLUMN > 20), points) - ROOM
    at_the_step = np.abs(COLUMN - 20.5) < 1
    assert np.abs(jumped)[at_the_step].mean() < 0.03
    assert np.abs(level)[at_the_step].mean() > 0.05


def test_one_exact_point_says_the_unit_and_no_more():
    points = seen(ROOM - 0.7, 1, 0)
    np.testing.assert_allclose(corrected(ROOM, points), ROOM - 0.7, atol=1e-6)


def test_without_matches_depth_stays_as_it_is():
    assert corrected(ROOM, seen(ROOM, 0, 0)) is ROOM


def test_a_view_whose_points_want_another_unit_keeps_its_shape():
    """So does one with few points; both get the unit of the others."""
    few, none = seen(ROOM + 0.5, 20, 3), seen(ROOM, 0, 4)
    points = [seen(ROOM - 0.3, 200, 0), seen(ROOM - 0.25, 200, 1), seen(ROOM - 2.0, 200, 2), few,
              none]
    bent = 0.05 * np.sin(COLUMN / 8)
    said = corrected_views([ROOM + bent] * 5, points)
    assert np.abs(said[0] - (ROOM - 0.3)).mean() < 0.01
    for view in said[2:]:
        np.testing.assert_allclose(np.diff(view), np.diff(ROOM + bent), atol=1e-9)
        assert abs((view - ROOM).mean() - (said[1] - ROOM).mean()) < 0.1
    assert corrected_views([ROOM], [none])[0] is ROOM


def test_unsure_points_count_less():
    points = SparseDepth(np.array([[15, 12], [15, 12]]), ROOM[12, 15] + np.array([0.0, 0.4]),
                         np.array([0.02, 0.5]))
    assert corrected(ROOM, points)[12, 15] == pytest.approx(ROOM[12, 15], abs=0.01)


def test_matches_say_the_depth_of_both_views():
    rng = np.random.default_rng(0)
    points = rng.uniform((-1, -1, 3), (1, 1, 6), (200, 3))
    T = np.stack([np.eye(4), make_transform(so3_exp([0.0, 0.1, 0.0]), [0.4, 0.0, 0.1]),
                  make_transform(so3_exp([0.0, 0.1, 0.0]), [0.0, 0.0, 0.0]), np.eye(4)])
    views = PlacedViews(T, np.array([True, True, True, False]))
    xyz = [transform_points(inverse(pose), points) for pose in T]
    xy = [p[:, :2] / p[:, 2:] for p in xyz]
    pairs = [ViewPair(i, j, xy[i], xy[j], np.full(200, 0.5 / FOCAL_PX), np.ones(200))
             for i, j in ((0, 1), (0, 2), (1, 3))]
    pairs[0].xy_j[:20] += 0.1 * np.array([0.0, 1.0])  # wrong matches
    said = sparse_depths(pairs, views, FOCAL_PX)
    assert [len(x.log_depth) for x in said] == [180, 180, 0, 0]  # a turn says no depth
    for view in (0, 1):
        np.testing.assert_allclose(np.exp(said[view].log_depth), xyz[view][20:, 2], rtol=1e-6)
    far = xyz[0][20:, 2] > 4.5
    assert said[0].deviation[far].mean() > 1.1 * said[0].deviation[~far].mean()
