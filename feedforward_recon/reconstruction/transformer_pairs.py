"""Pairs from a feed-forward network that sees two images at once, as Light3R-SfM decodes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from scipy.ndimage import map_coordinates

from feedforward_recon.geometry.pnp import pnp_ransac
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.preprocess import PreparedImage
from feedforward_recon.reconstruction.pairs import (
    MIN_DISTINCT,
    MIN_SHARE,
    CompactPairs,
    Edge,
    FeatureMatches,
    PairGeometry,
    with_motion,
)
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.types import Prediction

PNP_PX = 4.0  # corners of both images are off, and so is the depth of one
# These networks are trained with C e - 0.2 log C, which is least for an error e of 0.2 / C.
LOSS_WEIGHT = 0.2


class PairPredictions(Protocol):
    """What a network says about pairs of a collection (``model.collection.Collection``)."""

    placed: Sequence[PreparedImage]

    def predict(self, windows: Sequence[Sequence[int]]) -> list[Prediction]:
        """Poses and depth of each window, in a frame and a unit of its own."""


class TransformerPairs:
    """Pairs whose motion and depth a network says, at the features that match."""

    def __init__(self, shots: Sequence[Shot], encoder: CompactEncoder,
                 predictions: PairPredictions, batch: int, seed: int = 0) -> None:
        self.batch = batch
        self._shots, self._predictions, self._seed = shots, predictions, seed
        self._compact = CompactPairs(shots, encoder, seed)

    def rolled(self, image: int) -> np.ndarray:
        """Global descriptors [ROLLS, G] of an image as it is, and with the camera rolled."""
        return self._compact.rolled(image)

    def match(self, i: int, j: int, roll: int = 0) -> FeatureMatches:
        """Features of images i and j that are the most similar of each other."""
        return self._compact.match(i, j, roll)

    def decode(self, edges: Sequence[Edge], matches: Sequence[FeatureMatches]
               ) -> list[PairGeometry | None]:
        """The motions of pairs, in one batch (see ``PairDecoder``).

        The network is not asked about images with hardly a match.
        """
        asked = [edge for edge, found in zip(edges, matches, strict=True)
                 if found.distinct.sum() >= MIN_DISTINCT]
        said = dict(zip(asked, self._predictions.predict(asked) if asked else (), strict=True))
        return [self._decoded(edge, found, said[edge]) if edge in said else None
                for edge, found in zip(edges, matches, strict=True)]

    def _decoded(self, edge: Edge, matches: FeatureMatches, said: Prediction
                 ) -> PairGeometry | None:
        tried = [with_motion(edge, matches, self._shots, T)
                 for T in self._motions(edge, matches, said)]
        best = max((pair for pair in tried if pair is not None), key=len, default=None)
        if best is None or len(best) < MIN_SHARE * matches.distinct.sum():
            return None
        return best if best.is_turn else self._with_depth(best, said)

    def _motions(self, edge: Edge, matches: FeatureMatches, said: Prediction
                 ) -> Iterator[np.ndarray]:
        """Poses T_i_j: the network's own, and that of its points of i in image j."""
        yield inverse(said.T_world_cam[0]) @ said.T_world_cam[1]
        points, _ = self._points(edge[0], said, 0, matches.feature_i)
        known = matches.distinct & np.isfinite(points[:, 2])
        shot = self._shots[edge[1]]
        fit = pnp_ransac(points[known], shot.features.keypoints[matches.feature_j[known]],
                         shot.camera, PNP_PX, self._seed)
        if fit is not None:
            yield fit.T_map_cam

    def _with_depth(self, pair: PairGeometry, said: Prediction) -> PairGeometry:
        """The pair with the network's points.

        A depth that the other image contradicts is at least as wrong as they differ.
        """
        points, sure_i = self._points(pair.i, said, 0, pair.feature_i)
        others, sure_j = self._points(pair.j, said, 1, pair.feature_j)
        with np.errstate(invalid='ignore', divide='ignore'):
            differ = np.abs(np.log(transform_points(pair.T_i_j, others)[:, 2] / points[:, 2]))
            confidence = 1 / np.maximum(LOSS_WEIGHT / np.minimum(sure_i, sure_j), differ)
        return replace(pair, points=points, confidence=np.nan_to_num(confidence), has_depth=True)

    def _points(self, image: int, said: Prediction, which: int, feature: np.ndarray
                ) -> tuple[np.ndarray, np.ndarray]:
        """Points [M, 3] of features in the frame of their image, NaN where unknown; confidence."""
        shot, placed = self._shots[image], self._predictions.placed[image]
        px = ((shot.features.keypoints[feature] + 0.5) * placed.scale_xy - 0.5
              + placed.offset_xy)
        depth, sure = (_sampled(values[which], px) for values in (said.depth, said.confidence))
        return depth[:, None] * np.column_stack([shot.xy[feature], np.ones(len(px))]), sure


def _sampled(values: np.ndarray, px: np.ndarray) -> np.ndarray:
    """Values [H, W] between pixels [M, 2]; NaN beside those that are 0, and outside."""
    known = np.where(values > 0, values, np.nan)
    return map_coordinates(known, px[:, ::-1].T, order=1, cval=np.nan).astype(float)
