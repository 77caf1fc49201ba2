"""Keyframes as the mapper works on them, and the decision which frames become one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import cv2
import numpy as np

from feedforward_recon.config import KeyframeConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.types import Features, Keyframe

DEPTH_EDGE = 0.04


@dataclass(frozen=True)
class View:
    """One frame as the pipeline needs it: gray image, camera, cleaned depth, sharpness."""

    index: int
    stamp_ns: int
    image: np.ndarray
    gray: np.ndarray
    camera: Camera
    depth: np.ndarray | None
    sharpness: float
    source: str = ''
    T_given: np.ndarray | None = None

    def depth_at(self, px: np.ndarray) -> np.ndarray:
        """Sensor depth [N] at pixels [N, 2]; 0 where unknown, outside, or at a depth edge."""
        if self.depth is None:
            return np.zeros(len(px))
        height, width = self.depth.shape
        u, v = np.rint(px).astype(int).T if len(px) else np.zeros((2, 0), int)
        inside = (u >= 1) & (v >= 1) & (u < width - 1) & (v < height - 1)
        u, v = np.where(inside, u, 1), np.where(inside, v, 1)
        dv, du = np.mgrid[-1:2, -1:2].reshape(2, 9)
        around = self.depth[v[:, None] + dv, u[:, None] + du]  # [N, 9]
        low, high = around.min(1), around.max(1)
        good = inside & (low > 0) & (high - low < DEPTH_EDGE * high)
        return np.where(good, np.median(around, 1), 0.0)


def sharpness(gray: np.ndarray) -> float:
    """Variance of the Laplacian at half size: falls with motion blur and defocus."""
    small = cv2.resize(gray, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(small, cv2.CV_32F).var())


@dataclass
class MapKeyframe:
    """A keyframe in the growing map.

    landmark: int [N], the landmark that each feature shows, -1 if none.
    rgb: uint8 [N, 3], colours of the features.
    points_cam: float64 [N, 3] sensor points of the features, NaN rows without depth.
    cloud_cam, cloud_rgb: sampled sensor points and colours for the cloud.
    """

    id: int
    frame: int
    stamp_ns: int
    camera: Camera
    features: Features
    points_cam: np.ndarray
    landmark: np.ndarray
    rgb: np.ndarray
    source: str = ''
    cloud_cam: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    cloud_rgb: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.uint8))

    def exported(self, T_map_cam: np.ndarray, points_cam: np.ndarray) -> Keyframe:
        """The immutable value that memories and files take."""
        return Keyframe(self.id, self.stamp_ns, self.camera, T_map_cam.copy(), self.features,
                        points_cam.astype(np.float32), self.source)


class KeyframePolicy:
    """Decides which tracked frames are kept: new view, sharp, not too soon."""

    def __init__(self, config: KeyframeConfig) -> None:
        self.config = config
        self._recent: deque[float] = deque(maxlen=15)
        self._frame = 0
        self._ids = np.zeros(0, int)
        self._px = np.zeros((0, 2))

    def observe(self, sharpness_value: float) -> bool:
        """Note the sharpness of a frame; True if it is as sharp as its neighbours."""
        self._recent.append(sharpness_value)
        return sharpness_value >= self.config.min_sharpness * float(np.median(self._recent))

    def kept(self, view: View, tracks: Tracks) -> None:
        """This frame became a keyframe: motion is counted from it."""
        self._frame, self._ids, self._px = view.index, tracks.ids, tracks.px

    def wants(self, view: View, tracks: Tracks, sharp: bool) -> bool:
        """Keep this frame?"""
        config, gap = self.config, view.index - self._frame
        if gap < config.min_gap:
            return False
        share, motion = self._since_keyframe(view, tracks)
        starving = share < 0.5 * config.tracked_share
        due = (motion > config.motion_share or share < config.tracked_share
               or (gap >= config.max_gap and motion > 0.2 * config.motion_share))
        return starving or (due and sharp)

    def _since_keyframe(self, view: View, tracks: Tracks) -> tuple[float, float]:
        """Share of the keyframe's tracks still followed; their median motion / image width."""
        _, then, now = np.intersect1d(self._ids, tracks.ids, return_indices=True)
        if not len(now):
            return 0.0, 1.0
        motion_px = np.linalg.norm(tracks.px[now] - self._px[then], axis=1)
        return len(now) / len(self._ids), float(np.median(motion_px)) / view.camera.width
