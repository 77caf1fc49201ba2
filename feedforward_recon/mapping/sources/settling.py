"""``Settling``: whether the lengths in a map that was made without a sensor can be trusted."""

from __future__ import annotations

from feedforward_recon.config.schema import TrackingConfig
from feedforward_recon.mapping.backlog import ROUNDS
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.tracking import Tracked, is_well_supported

# Keyframes after which it has settled: those after which it is refined as a whole for the first
# time, and for the second where it lost its camera before.
SETTLED, AFTER_LOSS = ROUNDS[:2]
# Keyframes that it needs to settle again after few landmarks held the camera, and no more than it
# had: docs/experiments.md, Hard walks.
AGAIN = 12
# Images in a row that older landmarks must hold instead: they are still seen just after such a
# stretch, while a camera that came back, or stands, keeps seeing them; chosen by hand.
HELD = 30


class Settling:
    """What happened to a map so far. Lengths go wrong where few landmarks carry them on."""

    def __init__(self, config: TrackingConfig) -> None:
        self._config = config
        self._until = SETTLED
        self._weak_from = 0  # keyframes that there were before the weak stretch
        self._held = 0  # images in a row since that older landmarks held

    def lost(self, map_: GrowingMap) -> None:
        """The camera was lost."""
        if len(map_) < AFTER_LOSS:
            self._until = max(self._until, AFTER_LOSS)

    def has_settled(self, tracked: Tracked, map_: GrowingMap) -> bool:
        """Take a tracked frame, and say whether lengths are right around it."""
        if len(map_) < self._until and self._sees_older(tracked, map_):
            self._held += 1
        else:
            self._held = 0
        if len(map_) >= SETTLED and not is_well_supported(tracked.fit, self._config):
            if len(map_) >= self._until:
                self._weak_from = len(map_)
            self._until = max(self._until, len(map_) + min(len(map_), AGAIN))
        elif self._held >= HELD:
            self._until = len(map_)
        return len(map_) >= self._until

    def _sees_older(self, tracked: Tracked, map_: GrowingMap) -> bool:
        """Whether as many landmarks as any place needs are from before the weak stretch."""
        table, ids = map_.landmarks, tracked.tracks.ids
        older = table.has_point[ids] & (table.anchor[ids] < self._weak_from)
        return int(older.sum()) >= self._config.relocalise_inliers
