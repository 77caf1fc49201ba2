"""The coordinate network: descriptors in, the points of the map they belong to out.

A layer of fixed keys (``Keys``) and, at the cells they name, values that are written at test time
(a product-key memory, Lample et al. 2019). A value is a mean over all that was written into its
cell, so the state is a handful of sums: any order gives the same, two halves add up to the whole,
and what was written can be taken away again. Sums are integers, so that all this is exact.

    write   descriptor -> one cell in each table: count, sum of points, sum of their squares
    read    descriptor -> a few likely cells in each table -> the point most of them agree on

A cell into which different things fell spreads far and says nothing; so the network knows by
itself what the map has only once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.memory.keys import Keys

STEPS_PER_UNIT = 1024  # of points: a millimetre
# Points beyond 16 km of the origin are written there: sums of the squares of ten thousand fit.
FARTHEST = 2**24
PROBES = 6  # cells of each table that are read
# In typical depths: cells that spread farther say nothing; what agrees with each other is nearer;
# spread within which a cell is as good as exact. These, PROBES and others: docs/experiments.md, A
# coordinate network that is written once.
MOST_SPREAD, AGREEMENT, EXACT = 0.06, 0.03, 0.015
POINT_LEVELS = 65535  # largest uint16: 0.15 mm in a box of 10 m
ENOUGH = 5  # observations after which a cell is not trusted more
WEIGHT_LEVELS = 255 / ENOUGH


class CellSums:
    """Sums over all that was written: count [T, C], points [T, C, 3], squares [T, C].

    depths: sum of the depths of all samples, in steps, and how many there are [2].
    """

    def __init__(self, tables: int, cells: int) -> None:
        self.count = np.zeros((tables, cells), np.int64)
        self.points = np.zeros((tables, cells, 3), np.int64)
        self.squares = np.zeros((tables, cells), np.int64)
        self.depths = np.zeros(2, np.int64)

    def add(self, cells: NDArray[np.integer], points: NDArray[np.floating],
            depths: NDArray[np.floating], sign: int = 1) -> None:
        """Add points [N, 3] (map units) with these depths [N] to cells [N, T], or take them away.

        sign: 1 or -1. Taking away what was added leaves exactly what was there.
        """
        steps = _steps(points)
        squares = np.square(steps).sum(1)
        for table in range(len(self.count)):
            place = cells[:, table]
            np.add.at(self.count[table], place, sign)
            np.add.at(self.squares[table], place, sign * squares)
            for axis in range(3):
                np.add.at(self.points[table, :, axis], place, sign * steps[:, axis])
        self.depths += sign * np.array([_steps(depths).sum(), len(steps)])

    def merge(self, other: CellSums) -> None:
        """Add all that was written into ``other``, in the same map frame."""
        for name in ('count', 'points', 'squares', 'depths'):
            getattr(self, name)[...] += getattr(other, name)

    @property
    def typical_depth(self) -> float:
        """Mean depth of the samples, map units; 1 without any."""
        total, count = self.depths
        return float(total / STEPS_PER_UNIT / count) if count > 0 and total > 0 else 1.0

    def means(self) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Points [T, C, 3] of the cells in map units, and what they weigh [T, C], 0 to ENOUGH."""
        count = np.maximum(self.count, 1)
        mean = self.points / count[..., None]
        spread = np.maximum(self.squares / count - np.square(mean).sum(-1), 0)
        unit = (self.typical_depth * STEPS_PER_UNIT)**2
        weight = np.minimum(self.count, ENOUGH) / (1 + spread / (EXACT**2 * unit))
        useful = spread < MOST_SPREAD**2 * unit
        return mean / STEPS_PER_UNIT, np.where(useful, weight, 0).astype(np.float32)


def _steps(values: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.rint(values.astype(np.float64) * STEPS_PER_UNIT
                   ).clip(-FARTHEST, FARTHEST).astype(np.int64)


def quantise_weights(weight: NDArray[np.floating]) -> torch.Tensor:
    """uint8 of cell weights; what weighs anything stays above 0."""
    levels = np.ceil(weight * WEIGHT_LEVELS).clip(0, 255)
    return torch.from_numpy(levels.astype(np.uint8))


@dataclass(frozen=True)
class CoordinateNetwork:
    """A written network, for reading.

    points: uint16 levels [T, C, 3] inside the box [2, 3] (lowest corner and size); weights:
    uint8 [T, C], 0 for cells that say nothing. typical_depth: of the scene, map units.
    """

    keys: Keys
    points: torch.Tensor
    weights: torch.Tensor
    box: NDArray[np.float64]
    typical_depth: float

    @cached_property
    def _values(self) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        return self.points.reshape(-1, 3).numpy(), self.weights.reshape(-1).numpy()

    def read(self, descriptors: NDArray[np.floating]
             ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Points float64 [N, 3] (map units) of descriptors [N, D], and votes [N] for them.

        Votes: the weights of all cells that agree on the point; 0 where the network says nothing.
        """
        tables, cells = self.weights.shape
        if not len(descriptors) or not cells:
            return np.zeros((len(descriptors), 3)), np.zeros(len(descriptors), np.float32)
        place = self.keys.places(descriptors, PROBES, cells) \
            + cells * np.arange(tables)[None, :, None]
        place = place.reshape(len(descriptors), -1)
        levels, weights = self._values
        weight = torch.from_numpy(weights[place].astype(np.float32) / WEIGHT_LEVELS)
        low, size = self.box
        step = size / POINT_LEVELS / self.typical_depth
        relative = levels[place].astype(np.float32) * step.astype(np.float32)
        point, votes = agreed(torch.from_numpy(relative), weight)
        return low + self.typical_depth * point.numpy().astype(np.float64), votes.numpy()


def agreed(points: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The point [N, 3] that most of points [N, M, 3] with weights [N, M] agree on, and its votes.

    Points in typical depths: those within AGREEMENT of the one with the most votes are averaged.
    """
    off = points - points.mean(1, keepdim=True)  # differences of large numbers lose digits
    square = off.square().sum(-1)
    distance = square[:, :, None] + square[:, None] - 2 * (off @ off.mT)
    near = (distance < AGREEMENT**2) * weight[:, None]
    votes, best = (near.sum(-1) * (weight > 0)).max(1)
    chosen = near[torch.arange(len(points)), best]
    mean = (chosen[..., None] * points).sum(1) / chosen.sum(1, keepdim=True).clamp(min=1e-9)
    return mean, votes
