"""The reduced camera system of many poses, stored and factored where poses share points.

Poses are ordered so that those which share points are near each other (Cuthill and McKee,
"Reducing the bandwidth of sparse symmetric matrices", 1969), and the matrix is cut into square
tiles of ``TILE`` poses. Tiles without an entry are neither stored nor computed with; of the others
there is a dense product each, so that a matrix that is full after all costs what it costs LAPACK.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import sparse
from scipy.linalg import solve_triangular
from scipy.sparse import csgraph

TILE = 16  # poses; from 8 to 32 the time is much the same
SIDE = 6 * TILE


def pose_order(seen: sparse.csr_array) -> np.ndarray:
    """An order [P] in which poses that share points are near; seen: which pose sees which [P, L].
    """
    return csgraph.reverse_cuthill_mckee((seen @ seen.T).tocsr(), symmetric_mode=True)


class PoseTiles:
    """Which tiles of the lower triangle are stored, also those that a factorisation fills.

    count: of poses. tile: number [T, T] of each tile, -1 where there is none. groups: poses that
    share points, rising, one array for each block that is eliminated.
    """

    def __init__(self, count: int, groups: Iterable[np.ndarray]) -> None:
        self.count = count
        tiles = -(-count // TILE)
        filled = np.eye(tiles, dtype=bool)
        for poses in groups:
            rows = np.unique(poses // TILE)
            filled[rows[:, None], rows] = True
        for k in range(tiles):
            rows = k + np.flatnonzero(filled[k:, k])
            filled[rows[:, None], rows] = True
        self.tile = np.where(np.tril(filled), np.cumsum(np.tril(filled)).reshape(filled.shape), 0)
        self.tile -= 1

    def __len__(self) -> int:
        return int(self.tile.max(initial=-1)) + 1

    def zeros(self) -> np.ndarray:
        """Blocks [.., 6, 6] of no system."""
        return np.zeros((len(self) * TILE * TILE, 6, 6))

    def places(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Where the blocks of poses row >= column are stored, [n]."""
        tile = self.tile[row // TILE, column // TILE]
        return (tile * TILE + row % TILE) * TILE + column % TILE

    def solved(self, blocks: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The solution of S x = b [6 P, m]; blocks: of S, see ``places``.

        Raises LinAlgError where S is not positive definite.
        """
        tiles = self._matrices(blocks)
        x = np.zeros((len(self.tile) * SIDE, b.shape[1]))
        x[:len(b)] = b
        x = x.reshape(-1, SIDE, b.shape[1])
        panels = [self._eliminated(tiles, x, k) for k in range(len(self.tile))]
        for k, (corner, rows, panel) in reversed(list(enumerate(panels))):
            left = x[k] - panel @ x[rows].reshape(-1, b.shape[1])
            x[k] = solve_triangular(corner, left, trans=1, lower=True, check_finite=False)
        return x.reshape(-1, b.shape[1])[:len(b)]

    def _matrices(self, blocks: np.ndarray) -> np.ndarray:
        """Tiles [n, 6 TILE, 6 TILE]; rows beyond the last pose are those of an identity."""
        tiles = blocks.reshape(-1, TILE, TILE, 6, 6).swapaxes(2, 3).reshape(-1, SIDE, SIDE)
        beyond = np.arange(6 * self.count, len(self.tile) * SIDE) % SIDE
        tiles[self.tile[-1, -1], beyond, beyond] = 1.0
        return tiles

    def _eliminated(self, tiles: np.ndarray, x: np.ndarray, k: int
                    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One step of Cholesky and of forward substitution: L_kk, the tiles below, their L^T."""
        rows = k + 1 + np.flatnonzero(self.tile[k + 1:, k] >= 0)
        corner = np.linalg.cholesky(tiles[self.tile[k, k]])
        below = tiles[self.tile[rows, k]].reshape(-1, SIDE).T
        panel = solve_triangular(corner, below, lower=True, check_finite=False)
        x[k] = solve_triangular(corner, x[k], lower=True, check_finite=False)
        x[rows] -= (panel.T @ x[k]).reshape(x[rows].shape)
        product = (panel.T @ panel).reshape(len(rows), SIDE, len(rows), SIDE)
        a, b = np.tril_indices(len(rows))
        tiles[self.tile[rows[a], rows[b]]] -= product[a, :, b]
        return corner, rows, panel
