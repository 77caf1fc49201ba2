"""Slots of a memory that are like the features of an image, and where else in the map they are.

One matrix product compares all features with all slots. Slots lie in it by regions of the map,
so the largest value of each region is cheap and says which few regions hold anything like a
feature; only those are looked into.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from feedforward_recon.model.half_rows import half_rows

# Slots of a region. Fewer make more maxima to compare, more make the regions that are looked into
# larger: 128 to 512 cost the same within 1 ms of a query.
REGION = 256
QUERIES = 128  # features of an image are multiplied in multiples of so many
GATHERED = 1024  # pairs of vectors that are compared at a time: 0.4 MB each side


class SlotSearch:
    """Descriptors of slots in half precision, ordered by region of the map.

    descriptors [V, D] and points [V, 3] of all slots; among: index [N] of those that are searched.
    """

    def __init__(self, descriptors: torch.Tensor, points: np.ndarray, among: np.ndarray) -> None:
        ordered = among[by_region(points[among], REGION)]
        # The last region is filled up with its last slot.
        self._slots = np.concatenate([ordered, ordered[-1:].repeat(-len(ordered) % REGION)])
        self._keys = descriptors[torch.from_numpy(self._slots)].to(torch.bfloat16)

    def compare(self, queries: np.ndarray) -> Similarities:
        """Cosines of descriptors [Q, D] with the slots."""
        # Slots as rows: twice as fast as the other way round, here and in the maxima.
        cosines = (self._keys @ half_rows(queries, QUERIES).T)[:, :len(queries)]
        blocks = cosines.reshape(-1, REGION, len(queries))
        # Positive bfloat16 are ordered as their bits: as integers, maxima take a quarter.
        best = blocks.view(torch.int16).amax(1).view(torch.bfloat16)
        return Similarities(self._slots, blocks, best)


@dataclass(frozen=True)
class Similarities:
    """Cosines of Q features with the slots of R regions, exact to 0.004.

    slots: index [R * REGION] of the slot at each place; blocks: bfloat16 [R, REGION, Q]; best:
    largest value of each region, bfloat16 [R, Q]; where none is positive, any of them.
    """

    slots: np.ndarray
    blocks: torch.Tensor
    best: torch.Tensor

    def nearest(self) -> np.ndarray:
        """The most similar slot [Q] of each feature."""
        region = self.best.max(0).indices
        place = self.blocks[region, :, torch.arange(len(region))].max(1).indices
        return self.slots[(region * REGION + place).numpy()]

    def alike(self, features: np.ndarray, least: float, margin: float
              ) -> tuple[np.ndarray, np.ndarray]:
        """Slots about as similar as the best: of ``features`` [N], all pairs (row, slot).

        A slot counts with a cosine of at least ``least`` and at most ``margin`` below the best.
        """
        column = torch.from_numpy(features)
        best = self.best[:, column]
        limit = (best.max(0).values.float() - margin).clamp(min=least).to(best.dtype)
        region, row = torch.nonzero(best >= limit, as_tuple=True)
        inside = self.blocks[region, :, column[row]] >= limit[row, None]
        pair, place = torch.nonzero(inside, as_tuple=True)
        return row[pair].numpy(), self.slots[(region[pair] * REGION + place).numpy()]


def paired_cosines(a: np.ndarray, rows: np.ndarray, b: np.ndarray, columns: np.ndarray
                   ) -> np.ndarray:
    """Cosines [N] of unit vectors a[rows[i]] and b[columns[i]].

    A few at a time, so that what is gathered stays in the cache: a third of the time.
    """
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), GATHERED):
        part = slice(start, start + GATHERED)
        np.einsum('nd,nd->n', a[rows[part]], b[columns[part]], out=cosines[part])
    return cosines


def by_region(points: np.ndarray, size: int) -> np.ndarray:
    """Order [V] of points [V, 3] in which each run of ``size`` is a region of space.

    Halved along the longest side again and again, as a k-d tree is built.
    """
    whole = [np.arange(len(points))]
    done: list[np.ndarray] = []
    while whole:
        part = whole.pop()
        if len(part) <= size:
            done.append(part)
            continue
        axis = np.ptp(points[part], axis=0).argmax()
        first = size * (len(part) // (2 * size) or 1)
        ordered = part[np.argpartition(points[part, axis], first)]
        whole += [ordered[first:], ordered[:first]]
    return np.concatenate(done) if done else np.zeros(0, np.int64)
