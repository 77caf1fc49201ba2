"""Normal equations of bundle adjustment, and their solution by the Schur complement.

The points are eliminated (Triggs et al. 2000, section 6): with V = C^-T C^-1 of a point and the
mixed blocks W of its observations, the reduced camera system is U - (W C) (W C)^T. Points are
eliminated in blocks of neighbours: each block touches few keyframes, so its part is one small
dense matrix product. Arrays have their components first, as in ``bundle_rows``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from feedforward_recon.geometry.bundle_rows import (
    BundleProblem,
    BundleState,
    Rows,
    derivatives,
    robust_cost,
)

# Points per block. Blocks this small also keep each product below the size from which BLAS
# starts threads, which cost more than they save when other processes share the cores.
BLOCK = 40


class Elimination:
    """In what order points are eliminated: tables that stay the same over all iterations.

    free: the free poses [P]. seen: observations [F] by these, those of a block together; pose,
    point: index [F] of their free pose and point. blocks: per block its part of ``seen``, where
    those observations are in a dense [poses, points] of the block, and its free poses.
    """

    def __init__(self, problem: BundleProblem) -> None:
        self.free = np.flatnonzero(~problem.fixed)
        column = np.full(len(problem.fixed), -1)
        column[self.free] = np.arange(len(self.free))
        usable = np.flatnonzero(column[problem.pose_index] >= 0)
        rank = _neighbours(problem)[problem.point_index[usable]]
        together = np.argsort(rank, kind='stable')
        self.seen, rank = usable[together], rank[together]
        self.pose = column[problem.pose_index[self.seen]]
        self.point = problem.point_index[self.seen]
        ends = np.searchsorted(rank, np.arange(0, len(problem.points) + BLOCK, BLOCK))
        self.blocks = [self._block(slice(start, end), rank[start:end] % BLOCK)
                       for start, end in pairwise(ends.tolist()) if end > start]

    def _block(self, part: slice, column: np.ndarray
               ) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
        poses, row = np.unique(self.pose[part], return_inverse=True)
        return part, row, column, poses


def _neighbours(problem: BundleProblem) -> np.ndarray:
    """Rank [L] of the points by the first and the last keyframe that sees them."""
    count = len(problem.points)
    first, last = np.full(count, len(problem.fixed)), np.zeros(count, int)
    np.minimum.at(first, problem.point_index, problem.pose_index)
    np.maximum.at(last, problem.point_index, problem.pose_index)
    rank = np.empty(count, int)
    rank[np.lexsort((last, first))] = np.arange(count)
    return rank


@dataclass(frozen=True)
class System:
    """Normal equations of F observations by P free poses, of L points and m of the calibration.

    U: poses [6, 6, P]; V: points [3, 3, L]; W: mixed [6, 3, F]. by_pose [1 + m, 6, P], by_point
    [1 + m, 3, L]: the gradient, and what is mixed with the calibration; of that itself
    [m, 1 + m].
    """

    U: np.ndarray
    V: np.ndarray
    W: np.ndarray
    by_pose: np.ndarray
    by_point: np.ndarray
    calibration: np.ndarray


def linearise(problem: BundleProblem, order: Elimination, state: BundleState, rows: Rows
              ) -> System:
    """Gauss-Newton normal equations with the robust weights of the rows (no prior)."""
    _, weight, _ = robust_cost(problem, rows)
    D, by_calibration = derivatives(problem, state, rows)
    columns = np.concatenate([rows.r[None], by_calibration])
    weighted = D * weight[:, None]
    E = np.einsum('jio,jko->iko', weighted, D)  # D^T w D
    pull = np.einsum('jio,kjo->kio', weighted, columns)
    ER = np.einsum('ijo,jko->iko', E, rows.R)
    count, seen = len(problem.points), order.seen
    V = _sums(np.einsum('jio,jko->iko', rows.R, ER), problem.point_index, count)
    by_point = _sums(np.einsum('jio,kjo->kio', rows.R, pull), problem.point_index, count)
    p, E, ER, pull = (np.take(a, seen, -1) for a in (rows.p, E, ER, pull))
    HE = _cross(p, E)  # hat(p) E; by the pose both sides are multiplied with [I; hat(p)]
    turned = _cross(p, np.swapaxes(HE, 0, 1))
    U = np.concatenate([np.concatenate([E, np.swapaxes(HE, 0, 1)], 1),
                        np.concatenate([HE, turned], 1)])
    lever = np.swapaxes(_cross(p, np.swapaxes(pull, 0, 1)), 0, 1)
    free = len(order.free)
    return System(_sums(U, order.pose, free), V, np.concatenate([ER, _cross(p, ER)]),
                  _sums(np.concatenate([pull, lever], 1), order.pose, free), by_point,
                  np.einsum('mjo,kjo->mk', by_calibration * weight, columns))


def _cross(p: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cross products of p [3, F] with columns [3, n, F]."""
    (x, y, z), (a, b, c) = p, columns
    return np.stack([y * c - z * b, z * a - x * c, x * b - y * a])


def _sums(values: np.ndarray, index: np.ndarray, count: int) -> np.ndarray:
    """Sums [.., count] of values [.., O] with the same index [O]."""
    flat = values.reshape(math.prod(values.shape[:-1]), len(index))
    sums = [np.bincount(index, row, count) for row in flat]
    return np.array(sums, float).reshape(*values.shape[:-1], count)


def solve(order: Elimination, system: System, damping: float
          ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """One damped Gauss-Newton step: of free poses [P, 6], points [L, 3] and the calibration [m].

    None when the damping is too weak for a factorisation.
    """
    try:
        V_inv = np.linalg.inv(np.moveaxis(_damped(system.V, damping), -1, 0))
        C = np.ascontiguousarray(np.moveaxis(np.linalg.cholesky(V_inv), 0, -1))  # [3, 3, L]
        Z = np.einsum('ijo,jko->iko', system.W, np.take(C, order.point, -1))  # [6, 3, F]
        H = np.einsum('jil,kjl->kil', C, system.by_point)  # [1 + m, 3, L]
        S, b = _reduced(order, system, Z, H, damping)
        # Empty when every pose is held, which SciPy 1.11 cannot factor.
        step = -cho_solve(cho_factor(S, check_finite=False), b, check_finite=False) \
            if len(b) else b
    except np.linalg.LinAlgError:
        return None
    xi, change = step[:6 * len(order.free)].reshape(-1, 6), step[6 * len(order.free):]
    # Back-substitution: V dx = -(g + W^T xi + F ds).
    pull = np.einsum('ijo,io->jo', Z, np.take(xi.T, order.pose, 1))
    rhs = H[0] + _sums(pull, order.point, H.shape[-1]) + np.einsum('m,mil->il', change, H[1:])
    return xi, -np.einsum('ijl,jl->il', C, rhs).T, change


def _damped(blocks: np.ndarray, damping: float) -> np.ndarray:
    """Square blocks [n, n, ..] with larger diagonals."""
    out = blocks.copy()
    i = np.arange(len(blocks))
    out[i, i] += damping * out[i, i] + 1e-9
    return out


def _reduced(order: Elimination, system: System, Z: np.ndarray, H: np.ndarray, damping: float
             ) -> tuple[np.ndarray, np.ndarray]:
    """Reduced camera system S, b: free poses, then what is refined of the calibration."""
    n, extra = len(order.free), len(H) - 1
    S, b = np.zeros((6 * n + extra, 6 * n + extra)), np.zeros(6 * n + extra)
    S[:6 * n, :6 * n] = _poses(order, system, Z, damping)
    eliminated = np.einsum('ijo,kjo->kio', Z, np.take(H, order.point, -1))
    mixed = (system.by_pose - _sums(eliminated, order.pose, n)).transpose(2, 1, 0)
    b[:6 * n] = mixed[..., 0].ravel()
    if extra:
        own = system.calibration - np.einsum('mil,kil->mk', H[1:], H)
        own[:, 1:] += damping * np.diag(np.diag(system.calibration[:, 1:]))
        S[:6 * n, 6 * n:] = mixed[..., 1:].reshape(6 * n, extra)
        S[6 * n:, :6 * n] = S[:6 * n, 6 * n:].T
        S[6 * n:, 6 * n:], b[6 * n:] = own[:, 1:], own[:, 0]
    return S, b


def _poses(order: Elimination, system: System, Z: np.ndarray, damping: float) -> np.ndarray:
    """The part of the reduced camera system [6 P, 6 P] that is of poses alone."""
    n = len(order.free)
    pairs, i = np.zeros((n, n, 6, 6)), np.arange(n)
    pairs[i, i] = np.moveaxis(_damped(system.U, damping), -1, 0)
    by_observation = np.ascontiguousarray(np.moveaxis(Z, -1, 0))  # [F, 6, 3]
    for part, row, column, poses in order.blocks:
        count = len(poses)
        dense = np.zeros((count, 6, BLOCK, 3))
        dense[row, :, column] = by_observation[part]
        flat = dense.reshape(6 * count, 3 * BLOCK)
        pairs[poses[:, None], poses] -= (flat @ flat.T).reshape(count, 6, count, 6).swapaxes(1, 2)
    return pairs.swapaxes(1, 2).reshape(6 * n, 6 * n)
