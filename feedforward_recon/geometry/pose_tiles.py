"""The reduced camera system of many poses, stored and factored where poses share points.

Poses are ordered so that those which share points are near each other (Cuthill and McKee,
"Reducing the bandwidth of sparse symmetric matrices", 1969), and the matrix is cut into square
tiles of ``TILE`` poses. Tiles without an entry are neither stored nor computed with; tiles that
are full together are one dense matrix, so that a room where all images show the same costs
little more than with LAPACK.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.linalg import solve_triangular
from scipy.sparse import csgraph

TILE = 16  # poses; from 8 to 48 the time is much the same
TOGETHER = 8  # columns of tiles that are eliminated in one step, at most
SIDE = 6 * TILE


def pose_order(shared: sparse.csr_array) -> np.ndarray:
    """An order [P] in which poses that share points are near; shared: [P, P], 0 where none."""
    return csgraph.reverse_cuthill_mckee(shared, symmetric_mode=True)


class PoseTiles:
    """Which tiles of the lower triangle are stored, also those that a factorisation fills.

    shared: entries [P, P] where poses share points. count: of poses. tile: number [T, T] of each
    tile, -1 where there is none. steps: the columns of tiles that are eliminated together, and
    the rows of tiles below them.
    """

    def __init__(self, shared: sparse.csr_array) -> None:
        self.count = shared.shape[0]
        filled = np.eye(-(-self.count // TILE), dtype=bool)
        row, column = shared.nonzero()
        filled[row // TILE, column // TILE] = True
        for k in range(len(filled)):
            rows = k + np.flatnonzero(filled[k:, k])
            filled[rows[:, None], rows] = True
        filled = np.tril(filled)
        self.tile = np.where(filled, np.cumsum(filled).reshape(filled.shape), 0) - 1
        self.steps = _steps(filled)

    def __len__(self) -> int:
        return int(self.tile.max(initial=-1)) + 1

    def zeros(self) -> np.ndarray:
        """The blocks [.., 6, 6] of a system without entries."""
        return np.zeros((len(self) * TILE * TILE, 6, 6))

    def places(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Where the blocks of poses row >= column are stored, [n]; negative where not at all."""
        tile = self.tile[row // TILE, column // TILE]
        return (tile * TILE + row % TILE) * TILE + column % TILE

    def solved(self, blocks: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The solution of S x = b [6 P, m]; blocks: of S, see ``places``.

        Raises LinAlgError where S is not positive definite.
        """
        tiles, width = self._matrices(blocks), b.shape[1]
        x = np.zeros((len(self.tile), SIDE, width))
        x.reshape(-1, width)[:len(b)] = b
        factors = [self._eliminated(tiles, x, *step) for step in self.steps]
        for (columns, rows), (corner, panel) in zip(self.steps[::-1], factors[::-1], strict=True):
            left = x[columns].reshape(-1, width) - panel @ x[rows].reshape(-1, width)
            x[columns] = solve_triangular(corner, left, trans=1, lower=True,
                                          check_finite=False).reshape(-1, SIDE, width)
        return x.reshape(-1, width)[:len(b)]

    def _matrices(self, blocks: np.ndarray) -> np.ndarray:
        """Tiles [n, SIDE, SIDE]; rows beyond the last pose are those of an identity."""
        tiles = blocks.reshape(-1, TILE, TILE, 6, 6).swapaxes(2, 3).reshape(-1, SIDE, SIDE)
        beyond = np.arange(6 * self.count, len(self.tile) * SIDE) % SIDE
        tiles[-1, beyond, beyond] = 1.0
        return tiles

    def _eliminated(self, tiles: np.ndarray, x: np.ndarray, columns: np.ndarray,
                    rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One step of Cholesky and of forward substitution: L of the columns, L^T of the rows."""
        side, width = len(columns) * SIDE, x.shape[2]
        own = tiles[self.tile[columns[:, None], columns]].swapaxes(1, 2).reshape(side, side)
        corner = np.linalg.cholesky(own)  # which reads the lower triangle
        below = tiles[self.tile[rows[:, None], columns]].transpose(1, 3, 0, 2).reshape(side, -1)
        right = np.column_stack([below, x[columns].reshape(side, width)])
        right = solve_triangular(corner, right, lower=True, check_finite=False)
        panel, x[columns] = right[:, :-width], right[:, -width:].reshape(-1, SIDE, width)
        x[rows] -= (panel.T @ right[:, -width:]).reshape(-1, SIDE, width)
        product = (panel.T @ panel).reshape(len(rows), SIDE, len(rows), SIDE)
        i, j = np.tril_indices(len(rows))
        tiles[self.tile[rows[i], rows[j]]] -= product[i, :, j]
        return corner, panel


def _steps(filled: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Columns next to each other with tiles in the same rows, and these rows."""
    steps, start = [], 0
    for end in range(1, len(filled) + 1):
        if (end == len(filled) or end - start == TOGETHER
                or (filled[end:, end] != filled[end:, start]).any()):
            steps.append((np.arange(start, end), end + np.flatnonzero(filled[end:, start])))
            start = end
    return steps
