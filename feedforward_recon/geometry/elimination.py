"""In what order bundle adjustment eliminates points, and where it keeps what is left of poses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import sparse

from feedforward_recon.geometry.bundle_rows import BundleProblem
from feedforward_recon.geometry.pose_tiles import PoseTiles, pose_order

# Free poses beyond which points are grouped, and poses in tiles. That is faster from 60 on, twice
# at 250 (docs/experiments.md, Photos); a map that grows refines at most 100 at once.
FEW_POSES = 100
# Points per block. Blocks this small also keep each product below the size from which BLAS
# starts threads, which cost more than they save when other processes share the cores.
BLOCK = 40
PIECE = 16_000  # observations of many poses whose derivatives stay in the cache of a core
AXES, SPREADS = 6, 10  # more make the blocks of points no smaller


class Elimination:
    """In what order points are eliminated: tables that stay the same over all iterations.

    free: the free poses [P], of many those near each other that share points. seen: observations
    [F] by these, those of a block together; pose, point: index [F] of their free pose and point.
    blocks: per block its part of ``seen``, where those observations are in a dense
    [poses, points] of the block, and its free poses. pieces: parts of all observations, and where
    these are in ``seen``. tiles: None for few poses.
    """

    def __init__(self, problem: BundleProblem) -> None:
        self.free = np.flatnonzero(~problem.fixed)
        self.tiles, rank = None, _neighbours(problem)
        usable = np.flatnonzero(~problem.fixed[problem.pose_index])
        if len(self.free) > FEW_POSES:
            seen = _visibility(problem)[self.free]
            shared = (seen @ seen.T).tocsr()
            nearby, rank = pose_order(shared), _grouped(seen)
            self.free, self.tiles = self.free[nearby], PoseTiles(shared[nearby][:, nearby])
        column = np.full(len(problem.fixed), -1)
        column[self.free] = np.arange(len(self.free))
        rank = rank[problem.point_index[usable]]
        together = np.argsort(rank, kind='stable')
        self.seen, rank = usable[together], rank[together]
        self.pose = column[problem.pose_index[self.seen]]
        self.point = problem.point_index[self.seen]
        self.blocks = self._blocks(rank, len(problem.points))
        self.pieces = self._pieces(len(problem.pose_index))

    def _blocks(self, rank: np.ndarray, count: int
                ) -> list[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        ends = np.searchsorted(rank, np.arange(0, count + BLOCK, BLOCK))
        return [self._block(slice(start, end), rank[start:end] % BLOCK)
                for start, end in pairwise(ends.tolist()) if end > start]

    def _block(self, part: slice, column: np.ndarray
               ) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray]:
        poses, row = np.unique(self.pose[part], return_inverse=True)
        return part, row, column, poses

    def _pieces(self, count: int) -> list[tuple[slice, np.ndarray]]:
        if self.tiles is None:
            return [(slice(0, count), np.arange(len(self.seen)))]
        place, starts = np.argsort(self.seen), range(0, count, PIECE)
        ends = np.searchsorted(self.seen[place], starts[1:])
        return [(slice(start, start + PIECE), np.sort(part))
                for start, part in zip(starts, np.split(place, ends), strict=True)]


def _neighbours(problem: BundleProblem) -> np.ndarray:
    """Rank [L] of the points by the first and the last keyframe that sees them."""
    count = len(problem.points)
    first, last = np.full(count, len(problem.fixed)), np.zeros(count, int)
    np.minimum.at(first, problem.point_index, problem.pose_index)
    np.maximum.at(last, problem.point_index, problem.pose_index)
    rank = np.empty(count, int)
    rank[np.lexsort((last, first))] = np.arange(count)
    return rank


def _visibility(problem: BundleProblem) -> sparse.csr_array:
    """Ones [poses, L] where a pose sees a point."""
    return sparse.csr_array(
        (np.ones(len(problem.pose_index)), (problem.pose_index, problem.point_index)),
        (len(problem.fixed), len(problem.points)))


def _grouped(seen: sparse.csr_array) -> np.ndarray:
    """Rank [L] of the points, those in a block that much the same poses see.

    Blocks are halves of halves, each divided where it is widest.
    """
    at, parts, done = _coordinates(seen), [np.arange(seen.shape[1])], []
    while parts:
        part = parts.pop()
        if len(part) <= BLOCK:
            done.append(part)
            continue
        widest = at[part].std(0).argmax()
        part = part[np.argsort(at[part, widest], kind='stable')]
        half = BLOCK * (-(-len(part) // BLOCK) // 2)
        parts += [part[half:], part[:half]]
    rank = np.empty(seen.shape[1], int)
    rank[np.concatenate(done)] = np.arange(len(rank))
    return rank


def _coordinates(seen: sparse.csr_array) -> np.ndarray:
    """Coordinates [L, AXES] of points, alike where the same poses see them.

    About the first singular vectors of a matrix [P, L] (Dhillon, "Co-clustering documents and
    words using bipartite spectral graph partitioning", KDD 2001), by a few steps of the power
    method.
    """
    poses, points = (np.sqrt(np.maximum(seen.sum(axis), 1.0)) for axis in (1, 0))
    scaled = (sparse.diags_array(1 / poses) @ seen @ sparse.diags_array(1 / points)).tocsr()
    across, X = scaled.T.tocsr(), np.random.default_rng(0).standard_normal((len(poses), AXES))
    for _ in range(SPREADS):
        # The first one is the same for all.
        X = np.linalg.qr(np.column_stack([poses, scaled @ (across @ X)]))[0][:, 1:]
    return (across @ X) / points[:, None]
