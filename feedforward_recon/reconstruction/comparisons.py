"""``Comparisons``: which images were compared with which, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.reconstruction.pairs import (
    Edge,
    FeatureMatches,
    PairDecoder,
    PairGeometry,
    Pairs,
)
from feedforward_recon.reconstruction.retrieval import (
    bridging_pairs,
    likely_pairs,
    similarities,
)
from feedforward_recon.reconstruction.scene_graph import components
from feedforward_recon.reconstruction.shots import Shot

Mapped = Callable[[Callable, Iterable], Iterable]  # like the built-in ``map``, on several cores


class Comparisons:
    """Which images were compared, and what came of it.

    S: similarities [N, N]; matches and pairs by i < j.
    """

    def __init__(self, decoder: PairDecoder, descriptors: np.ndarray, mapped: Mapped) -> None:
        self.S = similarities(descriptors)
        self.matches: dict[Edge, FeatureMatches] = {}
        self.pairs: dict[Edge, PairGeometry] = {}
        self._decoder, self._descriptors, self._mapped = decoder, descriptors, mapped
        self._rolls: dict[int, np.ndarray] = {}  # [N] at which it is most like each

    def match(self, wanted: np.ndarray) -> int:
        """Compare pairs i < j [P, 2]; returns how many are new."""
        new = [edge for edge in map(tuple, wanted.tolist()) if edge not in self.matches]
        batches = [new[start:start + self._decoder.batch]
                   for start in range(0, len(new), self._decoder.batch)]
        found = chain.from_iterable(self._mapped(self._compared, batches))
        for edge, (matches, pair) in zip(new, found, strict=True):
            self.matches[edge] = matches
            if pair is not None:
                self.pairs[edge] = pair
        return len(new)

    def roll(self, images: np.ndarray) -> None:
        """From now on some images are compared as if their camera had been held in any way.

        Those that were compared in vain and look more alike when rolled can be compared again.
        """
        new = [image for image in images.tolist() if image not in self._rolls]
        found = chain.from_iterable(self._mapped(self._rolled, [[image] for image in new]))
        for image, rolled in zip(new, found, strict=True):
            likeness = rolled @ self._descriptors.T
            self._rolls[image] = likeness.argmax(0)
            self.S[image] = self.S[:, image] = likeness.max(0)
            self.S[image, image] = -1.0
        in_vain = [edge for edge in self.matches if edge not in self.pairs
                   and not set(edge).isdisjoint(new) and any(self._roll(*edge))]
        for edge in in_vain:
            del self.matches[edge]

    def _rolled(self, images: list[int]) -> list[np.ndarray]:
        return [self._decoder.rolled(image) for image in images]

    def _roll(self, i: int, j: int) -> tuple[int, int]:
        """How i and j are rolled when they are compared; one is not."""
        if i in self._rolls:
            return int(self._rolls[i][j]), 0
        return 0, int(self._rolls[j][i]) if j in self._rolls else 0

    def _compared(self, edges: list[Edge]) -> list[tuple[FeatureMatches, PairGeometry | None]]:
        matches = [self._matched(*edge) for edge in edges]
        return list(zip(matches, self._decoder.decode(edges, matches), strict=True))

    def _matched(self, i: int, j: int) -> FeatureMatches:
        roll_i, roll_j = self._roll(i, j)
        if roll_j:
            return self._decoder.match(j, i, roll_j).swapped
        return self._decoder.match(i, j, roll_i)


def compared(shots: Sequence[Shot], decoder: PairDecoder, config: ReconstructionConfig,
             mapped: Mapped = map) -> Comparisons:
    """Similar images compared; where they fall apart, the smaller parts also rolled."""
    done = Comparisons(decoder, np.stack([shot.features.global_descriptor for shot in shots]),
                       mapped)
    done.match(likely_pairs(done.S, config.neighbours))
    parts = components(len(shots), edges_of(done.pairs))
    if len(parts) > 1:
        done.roll(np.concatenate(parts[1:]))
        done.match(likely_pairs(done.S, config.neighbours))
        done.match(bridging_pairs(done.S, components(len(shots), edges_of(done.pairs)),
                                  config.bridges))
    return done


def edges_of(pairs: Pairs) -> np.ndarray:
    """Images i < j [P, 2] of pairs."""
    return np.array(list(pairs), int).reshape(-1, 2)


def largest_part(count: int, pairs: Pairs) -> set[int]:
    """The most of ``count`` images that pairs connect."""
    return set(components(count, edges_of(pairs))[0].tolist())
