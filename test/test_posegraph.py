"""Pose graphs: exact Jacobians, loops spread their error, scale drift is undone."""

from dataclasses import replace

import numpy as np
import pytest

from feedforward_recon.geometry.posegraph import (
    PoseGraph,
    PoseGraphEdges,
    edge_residuals,
    joined,
    pose_graph_steps,
    relative_edges,
)
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    pose_error,
    se3_exp,
    so3_exp,
)


def optimised(*arguments, **options):
    """The last of the steps."""
    *_, best = pose_graph_steps(*arguments, **options)
    return best


def ring(count=40):
    """Cameras on a circle, looking outwards."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    R = so3_exp(np.stack([0 * angle, angle, 0 * angle], -1))
    return PoseGraph(make_transform(R, 2 * np.stack([np.sin(angle), 0 * angle,
                                                     np.cos(angle)], -1)), np.ones(count))


def closing_edge(graph, log_scale=0.0):
    i, j = np.array([0]), np.array([len(graph.scale) - 1])
    T = inverse(graph.T_map_cam[i]) @ graph.T_map_cam[j]
    return PoseGraphEdges(i, j, T, np.array([log_scale]), np.ones(1), np.zeros(1, bool))


def drifted(true, seed=0, noise=0.01, growth=1.0):
    """Odometry edges of a ring with noise and growing scale, and the graph they dead-reckon."""
    rng = np.random.default_rng(seed)
    n = len(true.scale)
    edges = relative_edges(true, np.arange(n - 1), np.arange(1, n))
    T = edges.T_i_j @ se3_exp(noise * rng.standard_normal((n - 1, 6)))
    edges = replace(edges, T_i_j=T, log_scale=np.full(n - 1, np.log(growth)))
    pose, scale = [true.T_map_cam[0]], [1.0]
    for k in range(n - 1):
        step = T[k].copy()
        step[:3, 3] *= scale[-1]
        pose.append(pose[-1] @ step)
        scale.append(scale[-1] * growth)
    return PoseGraph(np.stack(pose), np.array(scale)), edges


def first_fixed(graph):
    return np.arange(len(graph.scale)) == 0


def test_jacobians_equal_numeric_differences():
    rng = np.random.default_rng(1)
    graph = PoseGraph(se3_exp(rng.normal(0, 0.7, (6, 6))), np.exp(rng.normal(0, 0.3, 6)))
    edges = relative_edges(graph, np.array([0, 1, 4]), np.array([2, 3, 5]))
    edges = replace(edges, T_i_j=edges.T_i_j @ se3_exp(rng.normal(0, 0.2, (3, 6))))
    r, J_i, J_j = edge_residuals(graph, edges)
    h = 1e-7
    for nodes, J in ((edges.i, J_i), (edges.j, J_j)):
        for column in range(7):
            d = h * np.eye(7)[column]
            T, s = graph.T_map_cam.copy(), graph.scale.copy()
            T[nodes, :3, 3] += d[:3]
            T[nodes, :3, :3] = T[nodes, :3, :3] @ so3_exp(d[3:6])
            s[nodes] *= np.exp(d[6])
            numeric = (edge_residuals(PoseGraph(T, s), edges)[0] - r) / h
            np.testing.assert_allclose(J[:, :, column], numeric, atol=1e-5)


def test_a_consistent_graph_does_not_move():
    graph = ring()
    edges = joined(relative_edges(graph, np.arange(39), np.arange(1, 40)), closing_edge(graph))
    result = optimised(graph, edges, first_fixed(graph), with_scale=True)
    np.testing.assert_allclose(result.T_map_cam, graph.T_map_cam, atol=1e-9)
    np.testing.assert_allclose(result.scale, 1, atol=1e-9)


def test_a_loop_removes_most_of_the_drift():
    true = ring()
    start, odometry = drifted(true, noise=0.02)
    edges = joined(odometry, closing_edge(true))
    result = optimised(start, edges, first_fixed(true), with_scale=False)
    before = pose_error(start.T_map_cam, true.T_map_cam)[0]
    after = pose_error(result.T_map_cam, true.T_map_cam)[0]
    assert after.max() < 0.5 * before.max() and after[-1] < 0.05
    np.testing.assert_array_equal(result.scale, 1)
    np.testing.assert_array_equal(result.T_map_cam[0], start.T_map_cam[0])


def test_scale_drift_is_undone():
    true = ring()
    start, odometry = drifted(true, noise=0.0, growth=1.02)
    assert pose_error(start.T_map_cam, true.T_map_cam)[0].max() > 0.5
    edges = joined(odometry, replace(closing_edge(true), weight=np.array([10.0])))
    result = optimised(start, edges, first_fixed(true), with_scale=True, steps=50)
    distance, _ = pose_error(result.T_map_cam, true.T_map_cam)
    assert distance[-1] < 0.05 and result.scale[-1] == pytest.approx(1, abs=0.05)
    assert distance.max() < 0.6 * pose_error(start.T_map_cam, true.T_map_cam)[0].max()


def test_a_wrong_robust_edge_is_overruled():
    true = ring()
    good = relative_edges(true, np.arange(39), np.arange(1, 40))
    skip = relative_edges(true, np.arange(38), np.arange(2, 40))
    wrong = replace(closing_edge(true), T_i_j=se3_exp(np.array([[3.0, 1, 0, 0.5, 0, 0]])),
                    robust=np.ones(1, bool), weight=np.full(1, 50.0))
    edges = joined(joined(replace(good, weight=np.full(39, 50.0)),
                          replace(skip, weight=np.full(38, 50.0))), wrong)
    result = optimised(true, edges, first_fixed(true), with_scale=False)
    assert pose_error(result.T_map_cam, true.T_map_cam)[0].max() < 0.1
