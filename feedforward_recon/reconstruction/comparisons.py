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
)
from feedforward_recon.reconstruction.retrieval import (
    Likeness,
    bridging_pairs,
    likely_pairs,
)
from feedforward_recon.reconstruction.scene_graph import components
from feedforward_recon.reconstruction.shots import Shot

Mapped = Callable[[Callable, Iterable], Iterable]  # like the built-in ``map``, perhaps elsewhere


class Comparisons:
    """Which images were compared, and what came of it.

    similar: how alike they look; matches and pairs by i < j. comparing, rolling: what maps
    ``compare`` and the decoder's ``rolled``.
    """

    def __init__(self, decoder: PairDecoder, descriptors: np.ndarray, comparing: Mapped = map,
                 rolling: Mapped = map) -> None:
        self.similar = Likeness(descriptors)
        self.matches: dict[Edge, FeatureMatches] = {}
        self.pairs: dict[Edge, PairGeometry] = {}
        self._batch = decoder.batch
        self._compared = partial(comparing, partial(compare, decoder))
        self._looks = partial(rolling, decoder.rolled)

    def match(self, wanted: np.ndarray) -> int:
        """Compare pairs i < j [P, 2]; returns how many are new."""
        edges = np.array([edge for edge in map(tuple, wanted.tolist())
                          if edge not in self.matches], int).reshape(-1, 2)
        new = [Comparison(*edge, *roll) for edge, roll in
               zip(edges.tolist(), self.similar.rolls(edges).tolist(), strict=True)]
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
        new = self.similar.upright(images)
        for image, rolled in zip(new.tolist(), self._looks(new.tolist()), strict=True):
            self.similar.roll(image, rolled)
        in_vain = np.array([edge for edge in self.matches if edge not in self.pairs], int)
        in_vain = in_vain.reshape(-1, 2)[np.isin(in_vain, new).reshape(-1, 2).any(1)]
        for i, j in in_vain[self.similar.rolls(in_vain).any(1)].tolist():
            del self.matches[i, j]


def compared(shots: Sequence[Shot], decoder: PairDecoder, config: ReconstructionConfig,
             comparing: Mapped = map, rolling: Mapped = map) -> Comparisons:
    """Similar images compared; where they fall apart, the smaller parts also rolled."""
    done = Comparisons(decoder, np.stack([shot.features.global_descriptor for shot in shots]),
                       comparing, rolling)
    done.match(likely_pairs(done.similar, config.neighbours))
    parts = components(len(shots), edges_of(done.pairs))
    if len(parts) > 1:
        done.roll(np.concatenate(parts[1:]))
        done.match(likely_pairs(done.similar, config.neighbours))
        parts = components(len(shots), edges_of(done.pairs))
        done.match(bridging_pairs(done.similar, parts, config.bridges))
    return done


def edges_of(pairs: Pairs) -> np.ndarray:
    """Images i < j [P, 2] of pairs."""
    return np.array(list(pairs), int).reshape(-1, 2)


def largest_part(count: int, pairs: Pairs) -> set[int]:
    """The most of ``count`` images that pairs connect."""
    return set(components(count, edges_of(pairs))[0].tolist())
