"""Poses of a few views from matches of pairs and rough depths: `geometry.view_graph`."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from feedforward_recon.geometry import view_graph
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    pose_error,
    so3_exp,
    transform_points,
)
from feedforward_recon.geometry.view_graph import ViewPair, placed_views

FOCAL_PX = 220.0
VIEWS = 5


def scene(seed):
    """Poses T_world_view, the first the world, and points that all of them see."""
    rng = np.random.default_rng(seed)
    points = rng.uniform((-1.5, -1.0, 3.0), (1.5, 1.0, 6.0), (300, 3))
    T = [np.eye(4)]
    for _ in range(VIEWS - 1):
        T.append(make_transform(so3_exp(rng.normal(0, 0.12, 3)), rng.normal(0, 0.5, 3)))
    return np.stack(T), points


def pairs_of(T, points, seed, *, noise_px=0.3, wrong=0.0, depth=1.0, among=None):
    """Matches of all pairs; ``wrong``: share of random ones; depth: factor on all depths."""
    rng, found = np.random.default_rng(seed), []
    for i, j in among or list(combinations(range(len(T)), 2)):
        in_i, in_j = (transform_points(inverse(T[k]), points) for k in (i, j))
        xy_i, xy_j = (p[:, :2] / p[:, 2:] + rng.normal(0, noise_px / FOCAL_PX, (len(p), 2))
                      for p in (in_i, in_j))
        false = rng.random(len(points)) < wrong
        xy_j[false] = rng.uniform(-0.5, 0.5, (false.sum(), 2))
        found.append(ViewPair(i, j, xy_i, xy_j, np.full(len(points), noise_px / FOCAL_PX),
                              depth * in_i[:, 2] * np.exp(rng.normal(0, 0.1, len(points)))))
    return found


def errors(T, truth):
    """Largest error in degrees, of rotations and, where views are apart, of directions."""
    worst = 0.0
    for i, j in combinations(range(len(T)), 2):
        mine, true = inverse(T[i]) @ T[j], inverse(truth[i]) @ truth[j]
        _, angle_deg = pose_error(mine, true)
        a, b = mine[:3, 3], true[:3, 3]
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        worst = max(worst, angle_deg)
        if np.linalg.norm(b) > 0.4:
            worst = max(worst, np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    return worst


@pytest.mark.parametrize('seed', range(3))
def test_poses_are_those_of_the_matches(seed):
    T, points = scene(seed)
    found = placed_views(pairs_of(T, points, seed, noise_px=1e-3), VIEWS, FOCAL_PX)
    assert found.placed.all()
    assert np.allclose(found.T_world_view[0], np.eye(4))
    assert errors(found.T_world_view, T) < 0.05


@pytest.mark.parametrize('seed', range(3))
def test_wrong_matches_and_noise_do_little(seed):
    T, points = scene(seed)
    found = placed_views(pairs_of(T, points, seed, wrong=0.4), VIEWS, FOCAL_PX)
    assert found.placed.all() and errors(found.T_world_view, T) < 2.0


def test_all_views_together_are_better_than_a_tree():
    """Refining with all pairs beats what the pairs of one tree say."""
    worst = {'tree': [], 'all': []}
    for seed in range(4):
        T, points = scene(seed)
        pairs = pairs_of(T, points[:80], seed, noise_px=0.8)
        star = [pair for pair in pairs if pair.i == 0]
        for name, given in (('tree', star), ('all', pairs)):
            found = placed_views(given, VIEWS, FOCAL_PX)
            worst[name].append(errors(found.T_world_view, T))
    assert np.median(worst['all']) < 0.8 * np.median(worst['tree'])


def test_depth_gives_the_unit():
    T, points = scene(0)
    lengths = [np.linalg.norm(placed_views(pairs_of(T, points, 0, depth=factor), VIEWS, FOCAL_PX
                                           ).T_world_view[1:, :3, 3], axis=1)
               for factor in (1.0, 3.0)]
    assert np.allclose(lengths[0], np.linalg.norm(T[1:, :3, 3], axis=1), rtol=0.05)
    assert np.allclose(lengths[1], 3 * lengths[0], rtol=0.02)


def test_the_unit_is_that_of_all_pairs():
    """The tree goes along the pairs with the most matches, whose depths are off here."""
    T, points = scene(0)
    off = pairs_of(T, points, 0, depth=1.3, among=[(0, j) for j in range(1, VIEWS)])
    right = pairs_of(T, points[:150], 1, among=list(combinations(range(1, VIEWS), 2)))
    found = placed_views([*off, *right], VIEWS, FOCAL_PX).T_world_view
    lengths = np.linalg.norm(found[1:, :3, 3], axis=1) / np.linalg.norm(T[1:, :3, 3], axis=1)
    assert np.ptp(lengths) < 0.05 and 1.02 < lengths.mean() < 1.2


def test_the_gradient_is_that_of_the_robust_cost():
    T, points = scene(1)
    tolerance = 1 / FOCAL_PX
    edges = [view_graph.ViewEdge(pair, inverse(T[pair.i]) @ T[pair.j], 1.0, 0.1)
             for pair in pairs_of(T, points[:60], 1, noise_px=2.0)]
    near = view_graph._moved(T, np.random.default_rng(0).normal(0, 0.01, 6 * VIEWS))
    norms = [view_graph._Rows.of(edge, near, tolerance).norms for edge in edges]

    def rows(step):
        at = view_graph._moved(near, step)
        return [view_graph._Rows.of(edge, at, tolerance, norm)
                for edge, norm in zip(edges, norms, strict=True)]

    _, b = view_graph._normal_equations(rows(np.zeros(6 * VIEWS)), VIEWS)
    steps = 1e-6 * np.eye(6 * VIEWS)[6:]
    slope = [(sum(r.cost for r in rows(d)) - sum(r.cost for r in rows(-d))) / 4e-6 for d in steps]
    assert np.allclose(slope, b[6:], rtol=1e-3, atol=1e-2) and not b[:6].any()


def test_depth_that_is_wrong_over_half_of_the_image_does_not_turn_views():
    """Errors of a network's depth go together; only the unit may suffer."""
    T, points = scene(1)
    pairs = [ViewPair(p.i, p.j, p.xy_i, p.xy_j, p.deviation,
                      np.where(p.xy_i[:, 0] < 0, 0.6, 1.4) * p.depth_i)
             for p in pairs_of(T, points, 1)]
    assert errors(placed_views(pairs, VIEWS, FOCAL_PX).T_world_view, T) < 2.0


def test_a_view_that_matches_nothing_is_not_placed():
    T, points = scene(2)
    connected = [(0, 1), (1, 2), (0, 2), (2, 3)]
    found = placed_views(pairs_of(T, points, 2, among=connected), VIEWS, FOCAL_PX)
    assert found.placed.tolist() == [True, True, True, True, False]
    alone = placed_views([], VIEWS, FOCAL_PX)
    assert alone.placed.tolist() == [True] + [False] * (VIEWS - 1)


def test_a_turn_on_the_spot_keeps_its_place():
    T, points = scene(0)
    T[1] = make_transform(so3_exp(np.array([0.0, 0.2, 0.05])), np.zeros(3))
    found = placed_views(pairs_of(T, points, 0, noise_px=1e-3), VIEWS, FOCAL_PX)
    length, angle_deg = pose_error(found.T_world_view[1], T[1])
    assert angle_deg < 0.1 and length < 0.02


@pytest.mark.parametrize(('seed', 'length'), [(3, 0.05), (2, 0.1), (6, 0.2)])
def test_the_pair_with_most_matches_does_not_lead_all_astray(seed, length):
    """Hardly any parallax, and a step the wrong way: what is clear about the others decides."""
    T, points = scene(seed)
    astray = T.copy()
    astray[1, :3, 3] *= -length
    many = pairs_of(astray, points, seed, noise_px=0.6, wrong=0.3, among=[(0, 1)])
    few = [pair for pair in pairs_of(T, points[:80], seed) if (pair.i, pair.j) != (0, 1)]
    assert errors(placed_views(many + few, VIEWS, FOCAL_PX).T_world_view, T) < 3


def test_many_views_are_refined_with_sparse_equations(monkeypatch):
    T, points = scene(0)
    pairs = pairs_of(T, points, 0, wrong=0.2)
    full = placed_views(pairs, VIEWS, FOCAL_PX)
    monkeypatch.setattr(view_graph, 'DENSE', 0)
    few = placed_views(pairs, VIEWS, FOCAL_PX)
    assert np.allclose(few.T_world_view, full.T_world_view, atol=1e-6)
    assert np.array_equal(few.placed, full.placed)


def test_a_chain_of_hundreds_of_views_is_placed_along_its_pairs():
    """Each view matches the next two."""
    count = 400
    rng = np.random.default_rng(0)
    points = rng.uniform((-1.5, -1.0, 3.0), (1.5, 1.0, 6.0), (40, 3))
    step = make_transform(so3_exp(np.array([0.0, 2e-4, 0.0])), np.array([0.3, 0.1, 0.0]))
    step_2 = step @ step
    pairs = []
    for i in range(count):
        for j, T in ((i + 1, step), (i + 2, step_2)):
            if j < count:
                seen = transform_points(inverse(T), points)
                pairs.append(ViewPair(i, j, points[:, :2] / points[:, 2:],
                                      seen[:, :2] / seen[:, 2:],
                                      np.full(40, 1 / FOCAL_PX), points[:, 2]))
    placed = placed_views(pairs, count, FOCAL_PX)
    assert placed.placed.all()
    moved = inverse(placed.T_world_view[:-1]) @ placed.T_world_view[1:]
    assert np.allclose(moved, step, atol=1e-3)
