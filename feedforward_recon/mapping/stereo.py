"""``StereoPair``: depth at pixels of the left image, from the right image of the same moment.

A block matcher looks along the rows of small images (Konolige 1998, as in OpenCV); what it finds
is refined at full size by optical flow, there and back, and must stay on its row. So each pixel
costs little, and only those that are asked for are refined.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from feedforward_recon.geometry.stereo import StereoRig
from feedforward_recon.mapping.matching import flow_there_and_back

# Width at which pixels are first looked for: 1 ms a pair, and still half a pixel exact at 1280.
COARSE_WIDTH = 320
# Farthest shift along a row, as a share of the width. A lens of 65 degrees sees 0.2 of it at four
# baselines; what is nearer gets its depth from motion.
MAX_SHIFT = 0.2
BLOCK = 9  # side of the matched blocks, coarse px: one smaller finds 5 % less; chosen by hand
UNIQUENESS = 10  # percent by which the best match must beat the second
LEFT_RIGHT = 1  # coarse px between the matches from left to right and from right to left
WINDOW = 15  # side of the window of the refinement, px, as in tracking
ROUNDTRIP_PX = 0.5  # there and back again; mismatches are off by more, see docs/experiments.md
# Off the row: a calibration is good to half a pixel, mismatches are anywhere in the window.
OFF_ROW_PX = 1.0


@dataclass(frozen=True, eq=False)
class StereoPair:
    """Gray images uint8 [H, W] as the cameras took them, and the cameras.

    noise_px: standard deviation of a disparity. min_disparity_px: a point with less is too far
    for a depth. inv_depth_shift: what 1/z is measured too large, 1/m (``stereo_shift``).
    """

    left: np.ndarray
    right: np.ndarray
    rig: StereoRig
    noise_px: float
    min_disparity_px: float
    inv_depth_shift: float = 0.0

    @property
    def inv_depth_noise(self) -> float:
        """Standard deviation of 1/z in 1/m: constant, as disparity is f b / z."""
        return self.noise_px / self.rig.gain_px

    def depth_at(self, px: np.ndarray) -> np.ndarray:
        """z-depth [N] in metres at pixels [N, 2] of the left image; 0 where none is found."""
        depth = np.zeros(len(px))
        in_left, z_ray = self.rig.rectified_px(px)
        rough = self._rough_disparity(in_left)
        rows = np.flatnonzero(np.isfinite(rough))
        if not len(rows):
            return depth
        disparity, good = self._refined(in_left[rows], rough[rows])
        disparity -= self.rig.shift_px + self.inv_depth_shift * self.rig.gain_px
        good &= disparity > self.min_disparity_px
        rows, disparity = rows[good], disparity[good]
        depth[rows] = self.rig.depth(disparity, z_ray[rows])
        return depth

    @cached_property
    def _rectified(self) -> tuple[np.ndarray, np.ndarray]:
        return self.rig.rectified(self.left, self.right)

    @cached_property
    def _levels(self) -> int:
        """How often the images are halved for the first search."""
        return max(0, round(np.log2(self.left.shape[1] / COARSE_WIDTH)))

    @cached_property
    def _coarse(self) -> np.ndarray:
        """Disparity in coarse pixels [h, w]; negative where unknown."""
        left, right = self._rectified
        for _ in range(self._levels):
            left, right = cv2.pyrDown(left), cv2.pyrDown(right)
        shifts = -(-int(MAX_SHIFT * left.shape[1]) // 16) * 16  # the matcher wants a multiple
        # Without a margin the matcher would leave out the left edge, where far points match.
        left, right = (cv2.copyMakeBorder(image, 0, 0, shifts, 0, cv2.BORDER_REPLICATE)
                       for image in (left, right))
        matcher = cv2.StereoBM.create(shifts, BLOCK)
        matcher.setUniquenessRatio(UNIQUENESS)
        matcher.setDisp12MaxDiff(LEFT_RIGHT)
        return matcher.compute(left, right)[:, shifts:] / np.float32(16)

    def _rough_disparity(self, px: np.ndarray) -> np.ndarray:
        """Disparity [N], px, from the first search at rectified pixels [N, 2]; NaN if none."""
        scale = 2**self._levels
        u, v = np.rint((px + 0.5) / scale - 0.5).astype(int).T
        height, width = self._coarse.shape
        inside = (u >= 0) & (v >= 0) & (u < width) & (v < height)
        found = self._coarse[np.where(inside, v, 0), np.where(inside, u, 0)]
        return np.where(inside & (found >= 0), found * scale, np.nan)

    def _refined(self, px: np.ndarray, rough: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Disparity [N] of rectified pixels [N, 2] at full size, and whether it can be trusted."""
        left, right = self._rectified
        guess = px - np.array([1, 0]) * rough[:, None]
        there, trip = flow_there_and_back(left, right, px, guess, window_px=WINDOW,
                                          levels=min(self._levels, 1), levels_back=0)
        shift = px - there
        return shift[:, 0], (trip < ROUNDTRIP_PX) & (np.abs(shift[:, 1]) < OFF_ROW_PX)
