"""Rotations that agree with those measured between pairs, however many of these are wrong.

Iteratively re-weighted least squares on the turns that are left (Chatterjee and Govindu,
"Efficient and Robust Large-Scale Rotation Averaging", ICCV 2013): first the sum of errors, which
single wrong pairs do not pull far, then Geman-McClure weights, which forget them.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from feedforward_recon.geometry.transforms import so3_exp, so3_log

L1_STEPS, STEPS = 10, 30  # the first ones minimise the sum of errors; it converges in about 20
SIGMA = np.deg2rad(1.0)  # of the Geman-McClure weights; pairs are good to about a degree
LEAST = np.deg2rad(0.1)  # error below which all count the same in the sum of errors
CONVERGED = 1e-5  # radians


def averaged_rotations(R: np.ndarray, i: np.ndarray, j: np.ndarray, R_i_j: np.ndarray,
                       weight: np.ndarray) -> np.ndarray:
    """Rotations [N, 3, 3] that agree best with those of pairs, R_i_j [E, 3, 3].

    R: to start from; the first stays. i, j: [E], the pairs connect all; weight: [E].
    """
    free = np.arange(1, len(R))
    rows = np.repeat(np.arange(len(i)), 2)
    A = sparse.csc_array((np.tile([-1.0, 1.0], len(i)), (rows, np.stack([i, j], 1).ravel())),
                         (len(i), len(R)))[:, free]
    for step in range(STEPS):
        left = turns_left(R, i, j, R_i_j)
        size = np.linalg.norm(left, axis=1)
        robust = 1 / np.maximum(size, LEAST) if step < L1_STEPS \
            else (SIGMA**2 / (SIGMA**2 + size**2))**2
        scaled = A * (weight * robust)[:, None]
        turn = np.zeros((len(R), 3))
        H = sparse.csc_array(A.T @ scaled + 1e-9 * sparse.eye(len(free)))
        turn[free] = splu(H).solve(scaled.T @ left)
        R = so3_exp(turn) @ R
        if step > L1_STEPS and np.abs(turn).max(initial=0.0) < CONVERGED:
            break
    return R


def turns_left(R: np.ndarray, i: np.ndarray, j: np.ndarray, R_i_j: np.ndarray) -> np.ndarray:
    """Rotation vectors [E, 3] by which measured rotations of j are off, in the common frame."""
    return so3_log(R[i] @ R_i_j @ np.swapaxes(R[j], 1, 2))
