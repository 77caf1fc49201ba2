"""``Comparisons``: which images were compared with which, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.reconstruction.pairs import (
    Edge,
    FeatureMatches,
    PairDecoder,
    PairGeometry,
    Pairs,
    compare,
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

    S: similarities [N, N]; matches and pairs by i < j.
    """

    def __init__(self, decoder: PairDecoder, S: np.ndarray, mapped: Mapped) -> None:
        self.S = S
        self.matches: dict[Edge, FeatureMatches] = {}
        self.pairs: dict[Edge, PairGeometry] = {}
        self._compare, self._mapped = partial(compare, decoder), mapped

    def match(self, wanted: np.ndarray) -> int:
        """Compare pairs i < j [P, 2]; returns how many are new."""
        new = [edge for edge in map(tuple, wanted.tolist()) if edge not in self.matches]
        for edge, (matches, pair) in zip(new, self._mapped(self._compare, new), strict=True):
            self.matches[edge] = matches
            if pair is not None:
                self.pairs[edge] = pair
        return len(new)


def compared(shots: Sequence[Shot], decoder: PairDecoder, config: ReconstructionConfig,
             mapped: Mapped = map) -> Comparisons:
    """Similar images compared, and the most similar ones of parts that fall apart."""
    S = similarities(np.stack([shot.features.global_descriptor for shot in shots]))
    done = Comparisons(decoder, S, mapped)
    done.match(likely_pairs(S, config.neighbours))
    parts = components(len(S), edges_of(done.pairs))
    if len(parts) > 1:
        done.match(bridging_pairs(S, parts, config.bridges))
    return done


def edges_of(pairs: Pairs) -> np.ndarray:
    """Images i < j [P, 2] of pairs."""
    return np.array(list(pairs), int).reshape(-1, 2)


def largest_part(count: int, pairs: Pairs) -> set[int]:
    """The most of ``count`` images that pairs connect."""
    return set(components(count, edges_of(pairs))[0].tolist())
