"""``Comparisons``: which images were compared with which, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.reconstruction.pairs import (
    Comparison,
    Edge,
    FeatureMatches,
    PairDecoder,
    PairGeometry,
    Pairs,
    compare,
    look_rolled,
)
from feedforward_recon.reconstruction.retrieval import (
    bridging_pairs,
    likely_pairs,
    similarities,
)
from feedforward_recon.reconstruction.scene_graph import components
from feedforward_recon.reconstruction.shots import Shot

Mapped = Callable[[Callable, Iterable], Iterable]  # like the built-in ``map``, perhaps elsewhere


class Comparisons:
    """Which images were compared, and what came of it.

    S: similarities [N, N]; matches and pairs by i < j. comparing, rolling: what maps ``compare``
    and ``look_rolled``.
    """

    def __init__(self, decoder: PairDecoder, descriptors: np.ndarray, comparing: Mapped = map,
                 rolling: Mapped = map) -> None:
        self.S = similarities(descriptors)
        self.matches: dict[Edge, FeatureMatches] = {}
        self.pairs: dict[Edge, PairGeometry] = {}
        self._descriptors, self._batch = descriptors, decoder.batch
        self._compared = partial(comparing, partial(compare, decoder))
        self._looks = partial(rolling, partial(look_rolled, decoder))
        self._rolls: dict[int, np.ndarray] = {}  # [N], at which an image is most like each

    def match(self, wanted: np.ndarray) -> int:
        """Compare pairs i < j [P, 2]; returns how many are new."""
        new = [Comparison(i, j, *self._roll(i, j)) for i, j in wanted.tolist()
               if (i, j) not in self.matches]
        batches = [new[start:start + self._batch] for start in range(0, len(new), self._batch)]
        found = chain.from_iterable(self._compared(batches))
        for one, (matches, pair) in zip(new, found, strict=True):
            self.matches[one.i, one.j] = matches
            if pair is not None:
                self.pairs[one.i, one.j] = pair
        return len(new)

    def roll(self, images: np.ndarray) -> None:
        """From now on some images are compared as if their camera had been held in any way.

        Those that were compared in vain and look more alike when rolled can be compared again.
        """
        new = [image for image in images.tolist() if image not in self._rolls]
        for image, rolled in zip(new, self._looks(new), strict=True):
            likeness = rolled @ self._descriptors.T
            self._rolls[image] = likeness.argmax(0)
            self.S[image] = self.S[:, image] = likeness.max(0)
            self.S[image, image] = -1.0
        in_vain = [edge for edge in self.matches if edge not in self.pairs
                   and not set(edge).isdisjoint(new) and any(self._roll(*edge))]
        for edge in in_vain:
            del self.matches[edge]

    def _roll(self, i: int, j: int) -> tuple[int, int]:
        """How i and j are rolled when they are compared; one is not."""
        if i in self._rolls:
            return int(self._rolls[i][j]), 0
        return 0, int(self._rolls[j][i]) if j in self._rolls else 0


def compared(shots: Sequence[Shot], decoder: PairDecoder, config: ReconstructionConfig,
             comparing: Mapped = map, rolling: Mapped = map) -> Comparisons:
    """Similar images compared; where they fall apart, the smaller parts also rolled."""
    done = Comparisons(decoder, np.stack([shot.features.global_descriptor for shot in shots]),
                       comparing, rolling)
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
