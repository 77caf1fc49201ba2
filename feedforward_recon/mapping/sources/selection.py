"""``ViewSelection``: which frames of a stream a network is shown."""

from __future__ import annotations

import cv2
import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.mapping.keyframes import KeyframePolicy, View
from feedforward_recon.mapping.matching import Tracks, follow

CORNERS = 300  # enough for a median motion; more cost time in every frame
CORNER_QUALITY = 0.01  # of the best corner (Shi and Tomasi 1994), the customary value
CORNER_SPACING = 1 / 40  # of the image width


class ViewSelection:
    """Which frames of a stream differ enough from the last view to be one.

    The rules are those of keyframes, on corners that are followed from frame to frame. An image
    without enough of them, such as a black one, is never a view.
    """

    def __init__(self, config: MapperConfig) -> None:
        self._tracking = config.tracking
        self._policy = KeyframePolicy(config.keyframes)
        self._tracks: Tracks | None = None

    def takes(self, view: View) -> bool:
        """Whether a frame, the next of the stream, is shown to the network."""
        gray, sharp = view.gray, self._policy.observe(view.sharpness)
        if self._tracks is not None:
            self._tracks = follow(self._tracks, gray, self._tracks.px, self._tracking)
            if not self._policy.wants(view, self._tracks, sharp):
                return False
        corners = cv2.goodFeaturesToTrack(gray, CORNERS, CORNER_QUALITY,
                                          CORNER_SPACING * gray.shape[1])
        if corners is None or len(corners) < self._tracking.min_inliers:
            return False
        self._tracks = Tracks(gray, np.arange(len(corners)), corners.reshape(-1, 2))
        self._policy.kept(view, self._tracks)
        return True
