"""Mapped images that align the next window with the map: some of the last, and similar old ones.

Anchors among the newest images continue the walk. Anchors chosen by global descriptor close loops
when the camera comes back. Of each image its pixels and a coarse grid of
points are kept, and of at most ``OLD_IMAGES`` images, whatever the length of the walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from feedforward_recon.mapping.sources.window_geometry import Samples, samples
from feedforward_recon.types import FloatArray, Prediction

OLD_IMAGES = 100  # kept at most: 92 MB of 640x480 RGB pixels
# Share of the anchors that may be old images; the others continue the walk.
OLD_SHARE = 0.5
# Windows since an image was placed: newer ones have the drift of the last window, and made things
# worse (docs/experiments.md, Windows that come back to their start).
MIN_AGE = 3
# Cosine of two global descriptors, below which two images show other places; chosen by hand.
SIMILAR = 0.6
Poses = Callable[[int], FloatArray | None]


@dataclass(frozen=True)
class Anchor:
    """A mapped image.

    frame: its number in the mapper. window: number of the window that placed it.
    image: uint8 [H, W, 3], RGB. T_map_cam: [4, 4], where the window put it. samples: its points.
    variance: of its position (map units squared) and angle (rad squared).
    global_descriptor: None for an image that is no keyframe.
    """

    frame: int
    window: int
    image: np.ndarray
    T_map_cam: FloatArray
    samples: Samples
    variance: tuple[float, float]
    global_descriptor: np.ndarray | None = None


@dataclass(frozen=True)
class Anchors:
    """Mapped images with their present poses [N, 4, 4]; recent: mask [N] of the newest ones."""

    items: tuple[Anchor, ...]
    T_map_cam: FloatArray
    recent: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def select(self, mask: np.ndarray) -> Anchors:
        """Those of a mask [N]."""
        return Anchors(tuple(a for a, taken in zip(self.items, mask, strict=True) if taken),
                       self.T_map_cam[mask], self.recent[mask])

    @property
    def images(self) -> list[np.ndarray]:
        """Their pixels."""
        return [item.image for item in self.items]

    @property
    def samples(self) -> Samples:
        """Their points, where the cameras are now."""
        parts = [item.samples for item in self.items]
        return Samples(parts[0].px, *(np.concatenate([getattr(part, name) for part in parts])
                                      for name in ('points_cam', 'points_world', 'weight')))

    @property
    def variance(self) -> tuple[float, float]:
        """The largest variances among them."""
        position, angle = np.max([item.variance for item in self.items], 0)
        return float(position), float(angle)


class AnchorImages:
    """Images that may be anchors: those of the last window, and a bounded number of old ones."""

    def __init__(self) -> None:
        self._recent: list[Anchor] = []
        self._old: list[Anchor] = []
        self._window = 0

    def __len__(self) -> int:
        return len(self._recent)

    @property
    def images(self) -> list[tuple[int, np.ndarray]]:
        """The pixels of all, with the numbers of their frames, in the order of these."""
        kept = {item.frame: item.image for item in (*self._old, *self._recent)}
        return sorted(kept.items(), key=lambda item: item[0])

    def begin(self, anchors: Anchors | None) -> None:
        """A new window was placed; its images follow. anchors: those that it was aligned with."""
        self._window += 1
        again = {id(item) for item in anchors.items} if anchors is not None else set()
        left = [item for item in self._recent if id(item) not in again]
        self._old += [item for item in left if item.global_descriptor is not None]
        while len(self._old) > OLD_IMAGES:
            del self._old[_most_redundant(self._old)]
        # The newest of them overlap with the window before.
        self._recent = [] if anchors is None else list(anchors.select(anchors.recent).items)

    def add(self, frame: int, image: np.ndarray, prediction: Prediction,
            variance: tuple[float, float], global_descriptor: np.ndarray | None) -> None:
        """One image of the window that was begun, as a prediction [1] in the map places it."""
        self._recent.append(Anchor(frame, self._window, image, prediction.T_world_cam[0],
                                   samples(prediction), variance, global_descriptor))

    def chosen(self, count: int, descriptors: Iterable[np.ndarray], pose: Poses) -> Anchors:
        """At most ``count`` images, half of them old ones if any are similar to ``descriptors``.

        The others come from the later half of the last window, the last image among them.
        pose: where the mapper has a frame now, None where it does not know.
        """
        old = self._similar(int(count * OLD_SHARE), descriptors)
        last = len(self._recent) - 1
        index = np.unique(np.linspace(last, last // 2, count - len(old)).round().astype(int))
        items = [*old, *(self._recent[i] for i in index)]
        poses = [pose(item.frame) for item in items]
        T = np.stack([item.T_map_cam if T is None else T
                      for item, T in zip(items, poses, strict=True)])
        return Anchors(tuple(items), T, np.arange(len(items)) >= len(old))

    def _similar(self, count: int, descriptors: Iterable[np.ndarray]) -> list[Anchor]:
        """Old images most similar to any of some global descriptors, the most similar first.

        Not those of the windows just before: they have the same drift.
        """
        old = [item for item in self._old if item.window <= self._window - MIN_AGE]
        if not old or count < 1:
            return []
        known = np.stack(_global_descriptors(old))
        score = np.max([known @ one for one in descriptors], 0)
        order = np.argsort(-score, kind='stable')[:count]
        return [old[i] for i in order if score[i] >= SIMILAR]


def _global_descriptors(items: list[Anchor]) -> list[np.ndarray]:
    return [item.global_descriptor for item in items if item.global_descriptor is not None]


def _most_redundant(items: list[Anchor]) -> int:
    """Index of the newer of the two most similar images: the older one drifted less."""
    descriptors = np.stack(_global_descriptors(items))
    similarity = descriptors @ descriptors.T
    np.fill_diagonal(similarity, -1)
    return int(max(np.unravel_index(similarity.argmax(), similarity.shape)))
