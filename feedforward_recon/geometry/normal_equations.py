"""Normal equations of bundle adjustment, and their solution by the Schur complement.

The points are eliminated (Triggs et al. 2000, section 6): with V = C^-T C^-1 of a point and the
mixed blocks W of its observations, the reduced camera system is U - (W C) (W C)^T. Points are
eliminated in blocks of neighbours: each block touches few keyframes, so its part is one small
dense matrix product. Of many poses, the system is stored and factored in the tiles of
``pose_tiles``. Arrays have their components first, as in ``bundle_rows``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from feedforward_recon.geometry.bundle_rows import (
    BundleProblem,
    BundleState,
    Rows,
    derivatives,
    piece_of,
    robust_cost,
)
from feedforward_recon.geometry.elimination import BLOCK, Elimination
from feedforward_recon.geometry.pose_tiles import PoseTiles


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
    free, count, index = len(order.free), len(problem.pose_index), problem.point_index
    columns = 1 + len(problem.calibration)
    V, by_point = np.empty((3, 3, count)), np.empty((columns, 3, count))
    W, U = np.empty((6, 3, len(order.seen))), np.zeros((6, 6, free))
    by_pose, own = np.zeros((columns, 6, free)), np.zeros((columns - 1, columns))
    for part, place in order.pieces:
        terms = _terms(*piece_of(problem, rows, part), state, order.seen[place] - part.start)
        V[..., part], by_point[..., part], W[..., place] = terms.V, terms.by_point, terms.W
        U += _sums(terms.U, order.pose[place], free)
        by_pose += _sums(terms.by_pose, order.pose[place], free)
        own += terms.calibration
    return System(U, _sums(V, index, len(problem.points)), W, by_pose,
                  _sums(by_point, index, len(problem.points)), own)


def _terms(problem: BundleProblem, rows: Rows, state: BundleState, seen: np.ndarray) -> System:
    """What each observation adds; to what is of poses, those of ``seen`` [f] alone."""
    _, weight, _ = robust_cost(problem, rows)
    D, by_calibration = derivatives(problem, state, rows)
    columns = np.concatenate([rows.r[None], by_calibration])
    weighted = D * weight[:, None]
    E = np.einsum('jio,jko->iko', weighted, D)  # D^T w D
    pull = np.einsum('jio,kjo->kio', weighted, columns)
    ER = np.einsum('ijo,jko->iko', E, rows.R)
    V = np.einsum('jio,jko->iko', rows.R, ER)
    by_point = np.einsum('jio,kjo->kio', rows.R, pull)
    p, E, ER, pull = (np.take(a, seen, -1) for a in (rows.p, E, ER, pull))
    HE = _cross(p, E)  # hat(p) E; by the pose both sides are multiplied with [I; hat(p)]
    turned = _cross(p, np.swapaxes(HE, 0, 1))
    U = np.concatenate([np.concatenate([E, np.swapaxes(HE, 0, 1)], 1),
                        np.concatenate([HE, turned], 1)])
    lever = np.swapaxes(_cross(p, np.swapaxes(pull, 0, 1)), 0, 1)
    return System(U, V, np.concatenate([ER, _cross(p, ER)]), np.concatenate([pull, lever], 1),
                  by_point, np.einsum('mjo,kjo->mk', by_calibration * weight, columns))


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
        step = _reduced_step(order, system, Z, H, damping)
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


def _reduced_step(order: Elimination, system: System, Z: np.ndarray, H: np.ndarray,
                  damping: float) -> np.ndarray:
    """The step of the reduced camera system: free poses, then what is refined of the calibration.

    Raises LinAlgError where that is not positive definite.
    """
    n = 6 * len(order.free)
    eliminated = np.einsum('ijo,kjo->kio', Z, np.take(H, order.point, -1))
    mixed = system.by_pose - _sums(eliminated, order.pose, len(order.free))
    mixed = np.ascontiguousarray(mixed.transpose(2, 1, 0)).reshape(n, len(H))
    own = system.calibration - np.einsum('mil,kil->mk', H[1:], H)
    own[:, 1:] += damping * np.diag(np.diag(system.calibration[:, 1:]))
    if order.tiles is not None:
        return _tiled_step(order.tiles, _tiled(order, order.tiles, system, Z, damping), mixed, own)
    S, b = np.zeros((n + len(own), n + len(own))), np.zeros(n + len(own))
    S[:n, :n] = _poses(order, system, Z, damping)
    S[:n, n:], S[n:, :n], S[n:, n:] = mixed[:, 1:], mixed[:, 1:].T, own[:, 1:]
    b[:n], b[n:] = mixed[:, 0], own[:, 0]
    # Empty when every pose is held, which SciPy 1.11 cannot factor.
    return -_solved(S, b) if len(b) else b


def _solved(S: np.ndarray, b: np.ndarray) -> np.ndarray:
    return cho_solve(cho_factor(S, check_finite=False), b, check_finite=False)


def _tiled_step(tiles: PoseTiles, blocks: np.ndarray, mixed: np.ndarray, own: np.ndarray
                ) -> np.ndarray:
    """The step of a system whose poses are in tiles: these are eliminated, too."""
    x = tiles.solved(blocks, mixed)
    left = own - mixed[:, 1:].T @ x
    change = -_solved(left[:, 1:], left[:, 0]) if len(own) else own[:, 0]
    return np.concatenate([-x[:, 0] - x[:, 1:] @ change, change])


def _tiled(order: Elimination, tiles: PoseTiles, system: System, Z: np.ndarray, damping: float
           ) -> np.ndarray:
    """The blocks of the reduced camera system that are of poses alone, see ``PoseTiles``."""
    blocks, i = tiles.zeros(), np.arange(len(order.free))
    blocks[tiles.places(i, i)] = np.moveaxis(_damped(system.U, damping), -1, 0)
    for poses, product in _products(order, Z):
        row, column = np.tril_indices(len(poses))
        place = tiles.places(poses[row], poses[column])
        stored = place >= 0  # the others share no point of the block: zeros
        blocks[place[stored]] -= product[row[stored], :, column[stored]]
    return blocks


def _poses(order: Elimination, system: System, Z: np.ndarray, damping: float) -> np.ndarray:
    """The part of the reduced camera system [6 P, 6 P] that is of poses alone."""
    n = len(order.free)
    pairs, i = np.zeros((n, n, 6, 6)), np.arange(n)
    pairs[i, i] = np.moveaxis(_damped(system.U, damping), -1, 0)
    for poses, product in _products(order, Z):
        pairs[poses[:, None], poses] -= product.swapaxes(1, 2)
    return pairs.swapaxes(1, 2).reshape(6 * n, 6 * n)


def _products(order: Elimination, Z: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Per block of points its free poses [c], and what is subtracted from them [c, 6, c, 6]."""
    by_observation = np.ascontiguousarray(np.moveaxis(Z, -1, 0))  # [F, 6, 3]
    for part, row, column, poses in order.blocks:
        count = len(poses)
        dense = np.zeros((count, 6, BLOCK, 3))
        dense[row, :, column] = by_observation[part]
        flat = dense.reshape(6 * count, 3 * BLOCK)
        yield poses, (flat @ flat.T).reshape(count, 6, count, 6)
