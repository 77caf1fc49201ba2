"""Pairs put together by all their points (Light3R-SfM, sec. 3.3): what must hold exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from oracle import CAMERA, OracleScene

from feedforward_recon.geometry.align import align_points_robust
from feedforward_recon.geometry.transforms import inverse, se3_exp, transform_points
from feedforward_recon.reconstruction.accumulation import MIN_SHARED, accumulate
from feedforward_recon.reconstruction.pairs import PairGeometry
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.types import Features

COUNT, POINTS = 5, 60
CHAIN = [(k, k + 1) for k in range(COUNT - 1)]
WORLD = OracleScene.generate(0, count=POINTS).points
POSES = np.stack([se3_exp(np.r_[0.4 * k, 0.1 * k**2, 0.05 * k, 0, -0.1 * k, 0.02 * k])
                  for k in range(COUNT)])
EVERY = np.arange(POINTS)
NONE = Features(np.zeros((POINTS, 2), np.float32), np.zeros((POINTS, 4), np.float32),
                np.ones(POINTS, np.float32), np.zeros(4, np.float32))
SHOTS = [Shot(NONE, CAMERA, np.zeros((POINTS, 2)), np.zeros((POINTS, 3), np.uint8),
              np.zeros((2, 2), np.uint8), (2, 2))] * COUNT


def pair_of(i, j, unit=1.0, confidence=20.0, off=None):
    """What images i and j say; off: the frame of the pair [4, 4] in that of image i."""
    off = np.eye(4) if off is None else off
    T_pair_map = inverse(POSES[i] @ off)
    T = T_pair_map @ POSES[j]
    T[:3, 3] *= unit
    points = unit * transform_points(T_pair_map, WORLD)
    return PairGeometry(i, j, EVERY, EVERY, T, points, np.full(POINTS, confidence),
                        has_depth=True)


def units():
    drawn = np.random.default_rng(0).uniform(0.2, 5.0, len(CHAIN))
    return dict(zip(CHAIN, drawn, strict=True))


def poses_in(unit):
    """The true poses in the frame and the unit of the first pair."""
    T = POSES.copy()
    T[:, :3, 3] *= unit
    return T


@pytest.mark.parametrize(('way', 'scales'), [('similarity', units()), ('depth', units()),
                                             ('rigid', dict.fromkeys(CHAIN, 1.0))])
def test_a_chain_of_pairs_is_recovered_exactly(way, scales):
    pairs = {edge: pair_of(*edge, unit) for edge, unit in scales.items()}
    done = accumulate(SHOTS, pairs, 0, CHAIN, way)
    assert done.registered.all()
    np.testing.assert_allclose(done.T_map_cam, poses_in(scales[0, 1]), atol=1e-9)


@pytest.mark.parametrize('way', ['similarity', 'rigid'])
def test_a_pair_need_not_agree_with_the_pose_of_its_first_image(way):
    pairs = {edge: pair_of(*edge) for edge in CHAIN}
    pairs[2, 3] = pair_of(2, 3, off=se3_exp(np.r_[0.3, -0.1, 0.2, 0.1, 0.2, -0.3]))
    done = accumulate(SHOTS, pairs, 0, CHAIN, way)
    np.testing.assert_allclose(done.T_map_cam, POSES, atol=1e-9)
    # Where depths alone are compared, the image that the pair adds is as much off.
    assert not np.allclose(accumulate(SHOTS, pairs, 0, CHAIN).T_map_cam[3], POSES[3], atol=0.1)


def test_rigid_keeps_the_unit_of_each_pair():
    scales = units()
    pairs = {edge: pair_of(*edge, unit) for edge, unit in scales.items()}
    done = accumulate(SHOTS, pairs, 0, CHAIN, 'rigid')
    assert done.registered.all()
    for (_, child), unit in scales.items():
        points = done.known(child).points  # of the pair that placed it
        np.testing.assert_allclose(np.linalg.norm(np.diff(points, axis=0), axis=1),
                                   unit * np.linalg.norm(np.diff(WORLD, axis=0), axis=1))


@pytest.mark.parametrize('way', ['similarity', 'rigid'])
@pytest.mark.parametrize(('share', 'confidence'), [(0.5, 0.1), (0.2, 50.0)])
def test_wrong_points_move_nothing_where_they_are_unsure_or_few(way, share, confidence):
    pairs, rng = {edge: pair_of(*edge) for edge in CHAIN}, np.random.default_rng(0)
    wrong = rng.random(POINTS) < share
    for edge in CHAIN[1:]:
        points = pairs[edge].points + wrong[:, None] * rng.normal(0, 3.0, (POINTS, 3))
        sure = np.where(wrong, confidence, 20.0)
        pairs[edge] = replace(pairs[edge], points=points, confidence=sure)
    done = accumulate(SHOTS, pairs, 0, CHAIN, way)
    np.testing.assert_allclose(done.T_map_cam, POSES, atol=1e-9)


def test_points_count_by_the_logarithm_of_the_confidence_that_both_have():
    rng = np.random.default_rng(0)
    first, second = (rng.uniform(5.0, 100.0, POINTS) for _ in range(2))
    pairs = {(0, 1): replace(pair_of(0, 1), confidence=first)}
    noisy = pair_of(1, 2)
    noisy = replace(noisy, confidence=second, points=noisy.points
                    + rng.normal(0, 0.1, (POINTS, 3)))
    done = accumulate(SHOTS[:3], {**pairs, (1, 2): noisy}, 0, CHAIN[:2], 'similarity')
    fit = align_points_robust(noisy.points, WORLD, 0.5 * np.log(first * second), with_scale=True)
    np.testing.assert_allclose(done.T_map_cam[2], fit.apply_to_poses(noisy.T_i_j), atol=1e-9)
    # Points stay with the first that said them; confidence is the geometric mean.
    np.testing.assert_allclose(done.known(1).confidence, np.sqrt(first * second))
    np.testing.assert_allclose(done.known(1).points, WORLD, atol=1e-9)
    np.testing.assert_array_equal(done.known(2).confidence, second)
    np.testing.assert_allclose(done.known(2).points, fit.apply(noisy.points), atol=1e-9)


@pytest.mark.parametrize('way', ['similarity', 'rigid'])
def test_what_the_first_image_did_not_know_it_learns(way):
    few = pair_of(0, 1)
    half = EVERY[::2]
    few = replace(few, feature_i=half, feature_j=half, points=few.points[half],
                  confidence=few.confidence[half])
    done = accumulate(SHOTS[:3], {(0, 1): few, (1, 2): pair_of(1, 2)}, 0, CHAIN[:2], way)
    known = done.known(1)
    np.testing.assert_allclose(known.points, WORLD, atol=1e-9)
    np.testing.assert_allclose(known.confidence, 20.0)


@pytest.mark.parametrize('way', ['similarity', 'rigid'])
@pytest.mark.parametrize('shared', ['few', 'on one line'])
def test_an_image_that_its_points_do_not_place_stays_out(way, shared):
    pairs = {(0, 1): pair_of(0, 1), (1, 2): pair_of(1, 2)}
    pair = pairs[1, 2]
    if shared == 'few':
        sure = np.where(EVERY < MIN_SHARED - 1, 20.0, 0.1)
        pairs[1, 2] = replace(pair, confidence=sure)
    else:
        pairs[1, 2] = replace(pair, points=np.outer(np.arange(1.0, POINTS + 1), [0.1, 0.2, 1.0]))
    done = accumulate(SHOTS[:3], pairs, 0, CHAIN[:2], way)
    assert done.registered.tolist() == [True, True, False]
