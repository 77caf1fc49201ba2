"""``ViewFollower``: poses of the frames between windows, in the map as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.mapping.keyframes import View
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.relocalisation import verified
from feedforward_recon.mapping.sources.features import Relocaliser, relocalise_lost
from feedforward_recon.mapping.tracking import Tracked, Tracker, is_well_supported
from feedforward_recon.model import Encoder

CELLS = 4  # per side of the image: coarse enough that a cell with texture has a landmark
# Share of the cells that landmarks must be seen in: with fewer, poses were 10 to 30 cm off
# (docs/experiments.md, Following a camera between windows).
MIN_SPREAD = 0.5
# Share of the landmarks seen in the best frame since the last window, below which the camera
# leaves what is mapped; chosen by hand.
LEAVING = 0.6


class ViewFollower:
    """Follows the camera by landmarks and leaves the map as it is.

    is_leaving: the camera sees much less of the map than at best since the last window.
    """

    def __init__(self, encoder: Encoder, relocalise: Relocaliser | None) -> None:
        self._encoder, self._relocalise = encoder, relocalise
        self._config = MapperConfig()
        self._tracker = Tracker(self._config.tracking)
        self._best = 0  # inliers since the last window
        self.is_leaving = True

    def start(self, config: MapperConfig) -> None:
        """There is a map."""
        self._config, self._tracker = config, Tracker(config.tracking)

    def window_ended(self) -> None:
        """More of the scene is mapped."""
        self._best = 0

    def follow(self, view: View, map_: GrowingMap, *, refresh: bool) -> Tracked | None:
        """Pose of a frame; None for a lost camera.

        refresh: match all landmarks in view again by descriptor, because flow drifts.
        """
        tracking = self._config.tracking
        tracked, moved = self._tracker.track(view, map_), True
        if tracked is None:
            features = self._encoder.encode(view.image)
            tracked, moved = relocalise_lost(view, features, map_, self._config,
                                             self._relocalise), False
        elif refresh:
            features = self._encoder.encode(view.image)
            tracked = verified(view, features, map_, tracked.fit.T_map_cam, tracking) or tracked
        if tracked is None:
            self.is_leaving = True
            return None
        self._tracker.accept(view, tracked.tracks, tracked.fit.T_map_cam, moved=moved)
        self._best = max(self._best, tracked.fit.count)
        sure = tracked.sure is not False and self._is_sure(view, tracked)
        self.is_leaving = not sure or tracked.fit.count < LEAVING * self._best
        return replace(tracked, extends=False, sure=sure)

    def _is_sure(self, view: View, tracked: Tracked) -> bool:
        """Enough inliers, spread over the image: a corner of it determines a pose badly."""
        cells = np.unique((CELLS * tracked.tracks.px / view.camera.size_wh).astype(int), axis=0)
        return is_well_supported(tracked.fit, self._config.tracking) \
            and len(cells) >= MIN_SPREAD * CELLS**2
