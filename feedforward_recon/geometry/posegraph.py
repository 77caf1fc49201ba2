"""Pose graph optimisation over SE(3) or Sim(3): spreads the error of a loop over its way.

A node is (R, t, log s) with x_map = R (s x) + t. An edge measures (R, t, log s) of j seen from
i, translation in units of i. Sim(3) carries the scale drift of monocular maps (Strasdat et
al., "Scale Drift-Aware Large Scale Monocular SLAM", 2010); SE(3) keeps every scale at one.
Gauss-Newton with analytic Jacobians and Cauchy weights on the edges that are marked so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import spsolve

from feedforward_recon.geometry.transforms import hat, inverse, make_transform, so3_exp, so3_log


@dataclass(frozen=True)
class PoseGraphEdges:
    """Relative poses: i, j int [E]; T_i_j [E, 4, 4]; log_scale [E]; weight [E]; robust bool [E].

    weight multiplies the residuals (1 / standard deviation, in units of the translation).
    """

    i: np.ndarray
    j: np.ndarray
    T_i_j: np.ndarray
    log_scale: np.ndarray
    weight: np.ndarray
    robust: np.ndarray


@dataclass(frozen=True)
class PoseGraph:
    """Nodes T_map_cam [N, 4, 4] with scales [N]: x_map = T_map_cam (scale * x_cam)."""

    T_map_cam: np.ndarray
    scale: np.ndarray


def relative_edges(graph: PoseGraph, i: np.ndarray, j: np.ndarray,
                   weight: float = 1.0) -> PoseGraphEdges:
    """Edges that a graph satisfies exactly, to keep its shape."""
    T_i_j = inverse(graph.T_map_cam[i]) @ graph.T_map_cam[j]
    T_i_j[:, :3, 3] /= graph.scale[i][:, None]
    return PoseGraphEdges(i, j, T_i_j, np.log(graph.scale[j] / graph.scale[i]),
                          np.full(len(i), weight), np.zeros(len(i), bool))


def joined(a: PoseGraphEdges, b: PoseGraphEdges) -> PoseGraphEdges:
    """Both sets of edges."""
    return PoseGraphEdges(*(np.concatenate([getattr(a, name), getattr(b, name)])
                            for name in PoseGraphEdges.__dataclass_fields__))


def edge_residuals(graph: PoseGraph, edges: PoseGraphEdges
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals [E, 7] = (translation, rotation, log scale) and Jacobians [E, 7, 7] of i and j.

    Perturbation of a node: t += d_t, R <- R exp(d_r), log s += d_s.
    """
    T_i, T_j, s_i = graph.T_map_cam[edges.i], graph.T_map_cam[edges.j], graph.scale[edges.i]
    R_it = np.swapaxes(T_i[:, :3, :3], 1, 2)
    between = np.einsum('eij,ej->ei', R_it, T_j[:, :3, 3] - T_i[:, :3, 3]) / s_i[:, None]
    R_i_j = R_it @ T_j[:, :3, :3]
    turn = so3_log(np.swapaxes(edges.T_i_j[:, :3, :3], 1, 2) @ R_i_j)
    log_ratio = np.log(graph.scale[edges.j] / s_i)
    r = np.concatenate([between - edges.T_i_j[:, :3, 3], turn,
                        (log_ratio - edges.log_scale)[:, None]], 1)
    J_i, J_j = np.zeros((len(r), 7, 7)), np.zeros((len(r), 7, 7))
    J_j[:, :3, :3] = R_it / s_i[:, None, None]
    J_i[:, :3, :3] = -J_j[:, :3, :3]
    J_i[:, :3, 3:6] = hat(between)
    J_i[:, :3, 6] = -between
    J_r_inv = _right_jacobian_inverse(turn)
    J_j[:, 3:6, 3:6] = J_r_inv
    J_i[:, 3:6, 3:6] = -J_r_inv @ np.swapaxes(R_i_j, 1, 2)
    J_j[:, 6, 6], J_i[:, 6, 6] = 1, -1
    return r, J_i, J_j


def _right_jacobian_inverse(omega: np.ndarray) -> np.ndarray:
    """[E, 3, 3] of rotation vectors [E, 3] (Sola et al. 2018, eq. 144)."""
    theta = np.linalg.norm(omega, axis=1)
    small = theta < 1e-4
    t = np.where(small, 1.0, theta)
    c = np.where(small, 1 / 12, 1 / t**2 - (1 + np.cos(t)) / (2 * t * np.sin(t)))
    W = hat(omega)
    return np.eye(3) + 0.5 * W + c[:, None, None] * (W @ W)


def pose_graph_steps(graph: PoseGraph, edges: PoseGraphEdges, fixed: np.ndarray, *,
                     with_scale: bool, steps: int = 20,
                     robust_scale: float = 3.0) -> Iterator[PoseGraph]:
    """The graph that agrees best with its edges, step by step: the best so far after each.

    Nodes with ``fixed`` (bool [N]) stay. with_scale: scales may change (Sim(3)); otherwise they
    stay (SE(3)). The cost never rises.
    """
    free = np.zeros((len(fixed), 7), bool)
    free[~fixed] = True
    free[:, 6] &= with_scale
    columns = np.flatnonzero(free)
    cost, damping = _cost(graph, edges, robust_scale), 1e-6
    for _ in range(steps):
        H, g = _normal_equations(graph, edges, columns, robust_scale)
        delta = np.zeros(free.size)
        delta[columns] = -spsolve(H + damping * sparse.diags(H.diagonal() + 1e-9), g)
        trial = _moved(graph, delta.reshape(-1, 7))
        new = _cost(trial, edges, robust_scale)
        small = new <= cost and cost - new <= 1e-6 * cost
        if not new <= cost:  # nor where the equations are singular: NaN
            damping *= 100
        else:
            graph, cost, damping = trial, new, max(damping / 10, 1e-9)
        yield graph
        if small:
            break


def _weights(r: np.ndarray, edges: PoseGraphEdges, scale: float) -> np.ndarray:
    squares = (r**2).sum(1) * edges.weight**2
    return edges.weight**2 * np.where(edges.robust, 1 / (1 + squares / scale**2), 1.0)


def _cost(graph: PoseGraph, edges: PoseGraphEdges, scale: float) -> float:
    squares = (edge_residuals(graph, edges)[0]**2).sum(1) * edges.weight**2
    robust = scale**2 * np.log1p(squares / scale**2)
    return float(np.where(edges.robust, robust, squares).sum())


def _normal_equations(graph: PoseGraph, edges: PoseGraphEdges, columns: np.ndarray,
                      scale: float) -> tuple[sparse.csc_array, np.ndarray]:
    r, J_i, J_j = edge_residuals(graph, edges)
    count, n = len(r), len(graph.scale)
    root = np.sqrt(_weights(r, edges, scale))
    values = np.stack([J_i, J_j], 2) * root[:, None, None, None]  # [E, 7, 2, 7]
    nodes = np.stack([edges.i, edges.j], 1)
    rows = np.broadcast_to(np.arange(7 * count).reshape(count, 7, 1, 1), values.shape)
    cols = np.broadcast_to(7 * nodes[:, None, :, None] + np.arange(7), values.shape)
    J = sparse.csc_array((values.ravel(), (rows.ravel(), cols.ravel())), (7 * count, 7 * n))
    J = J[:, columns]
    return (J.T @ J).tocsc(), J.T @ (r * root[:, None]).ravel()


def _moved(graph: PoseGraph, delta: np.ndarray) -> PoseGraph:
    T = graph.T_map_cam
    R = T[:, :3, :3] @ so3_exp(delta[:, 3:6])
    return PoseGraph(make_transform(R, T[:, :3, 3] + delta[:, :3]),
                     graph.scale * np.exp(delta[:, 6]))
