"""``Settling``: whether the lengths in a map that was made without a sensor can be trusted.

Nothing in one image tells: landmarks at wrong depths hold a camera as firmly as right ones. But
every keyframe adds parallax, and where lengths were wrong the refinement that follows it moves
them; where they are right it leaves the map as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.geometry.bundle_rows import MIN_DEPTH
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.tracking import Tracked, is_well_supported

# What is left of a change after one more keyframe. Of all changes there may be left 2 % for the
# place of the newest keyframe, a share of the depth around it; for depths 3 % as a mean (median
# deviation from their common change), so that the noise of a few is none. With these values and
# some around them no pose was false in 96 hard walks (docs/experiments.md, When lengths are
# right).
LEFT = 0.7
CALM_PLACES, CALM_DEPTHS = 0.02, 0.03 / (1 - LEFT)
MOST = 0.1  # that a change counts: a keyframe without landmarks, or in another place; by hand
# Keyframes after few landmarks held the camera: lengths may go on differently; by hand.
AGAIN = 3
# Images in a row that count as a keyframe: the camera stands, or all it sees is known; by hand.
HELD = 30


class Settling:
    """How much the last keyframes changed the map around them."""

    def __init__(self, config: TrackingConfig) -> None:
        self._config = config
        self._newest: _Newest | None = None
        self._left = np.zeros(2)  # of changes by the keyframes before it: of places, of depths
        self._keyframes = 0  # since few landmarks held the camera
        self._images = 0  # since the last keyframe

    def keyframe_added(self, map_: GrowingMap) -> None:
        """There is a new keyframe, and the map is not refined yet."""
        if self._newest is not None:
            self._left += self._newest.change(map_)
        self._newest = _Newest.of(map_)
        self._one_more()

    def has_settled(self, tracked: Tracked, map_: GrowingMap) -> bool:
        """Take a tracked frame, and say whether lengths are right around it."""
        self._images += 1
        if not is_well_supported(tracked.fit, self._config):
            self._keyframes = self._images = 0
        elif self._images >= HELD:
            self._one_more()
        if self._newest is None or self._keyframes < AGAIN:
            return False
        places, depths = self._left + self._newest.change(map_)
        return bool(places < CALM_PLACES and depths < CALM_DEPTHS)

    def _one_more(self) -> None:
        self._left *= LEFT
        self._keyframes += 1
        self._images = 0


@dataclass(frozen=True)
class _Newest:
    """The newest keyframe as it was before the map was refined.

    position: [3], map frame. ids, log_depth: its landmarks and their z-depths in it, [n].
    """

    keyframe: int
    position: np.ndarray
    ids: np.ndarray
    log_depth: np.ndarray

    @classmethod
    def of(cls, map_: GrowingMap) -> _Newest:
        newest, table = len(map_) - 1, map_.landmarks
        ids = table.seen_by(newest)
        ids = ids[table.has_point[ids]]
        return cls(newest, map_.T_map_cam[newest, :3, 3].copy(), ids,
                   _log_depth(map_, newest, ids))

    def change(self, map_: GrowingMap) -> np.ndarray:
        """Shares [2] by which its place and the depths around it differ now, at most ``MOST``."""
        kept = map_.landmarks.has_point[self.ids]
        if not kept.any():
            return np.full(2, MOST)
        now = _log_depth(map_, self.keyframe, self.ids[kept])
        change = now - self.log_depth[kept]
        moved = np.linalg.norm(map_.T_map_cam[self.keyframe, :3, 3] - self.position)
        return np.minimum([moved / np.exp(np.median(now)),
                           np.median(np.abs(change - np.median(change)))], MOST)


def _log_depth(map_: GrowingMap, keyframe: int, ids: np.ndarray) -> np.ndarray:
    # One that came to lie behind the keyframe has changed for sure.
    return np.log(np.maximum(map_.depths(keyframe, ids), MIN_DEPTH))
