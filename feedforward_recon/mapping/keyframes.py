"""Keyframes as the mapper works on them, and the decision which frames become one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import cv2
import numpy as np

from feedforward_recon.config import CloudConfig, KeyframeConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.types import Features, Keyframe

DEPTH_EDGE = 0.04
MIN_SAMPLES = 3  # measurements within two pixels, to tell an edge from a surface
CLOUD_FACTOR = 8  # points kept for the cloud, times those that are shown


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
        """Sensor depth [N] at pixels [N, 2]; 0 where unknown, outside, or at a depth edge.

        The median of what was measured within one pixel. Where some of the nine are missing
        (registered, sparse or holed depth), all that was measured within two pixels has to
        agree, or an edge would go unseen.
        """
        if self.depth is None or not len(px):
            return np.zeros(len(px))
        height, width = self.depth.shape
        centre = np.rint(px).astype(int)
        inside = ((centre >= 1) & (centre < (width - 1, height - 1))).all(1)
        near = np.sort(_around(self.depth, centre, 1), 1)  # NaN last
        count = np.isfinite(near).sum(1)
        rows, middle = np.arange(len(px)), np.maximum(count - 1, 0)
        depth = (near[rows, middle // 2] + near[rows, -(-middle // 2)]) / 2
        low, high = near[:, 0].copy(), near[rows, middle]
        holed = np.flatnonzero(inside & (count > 0) & (count < near.shape[1]))
        wide = np.sort(_around(self.depth, centre[holed], 2), 1)
        found = np.isfinite(wide).sum(1)
        low[holed] = np.where(found >= MIN_SAMPLES, wide[:, 0], np.nan)
        high[holed] = wide[np.arange(len(wide)), found - 1]
        return np.where(inside & (high - low < DEPTH_EDGE * high), depth, 0.0)


def _around(depth: np.ndarray, centre: np.ndarray, radius: int) -> np.ndarray:
    """What was measured around pixels [N, 2] (u, v), [N, (2 radius + 1)^2]; NaN if nothing."""
    step = np.arange(-radius, radius + 1)
    u = np.clip(centre[:, :1] + step, 0, depth.shape[1] - 1)
    v = np.clip(centre[:, 1:] + step, 0, depth.shape[0] - 1)
    found = depth[v[:, :, None], u[:, None, :]].reshape(len(centre), len(step)**2).astype(float)
    found[found <= 0] = np.nan
    return found


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
    features.descriptors: int8 in a packed keyframe (see ``pack``); ``descriptors`` reads both.
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

    @property
    def descriptors(self) -> np.ndarray:
        """Descriptors of the features, float32 [N, D], L2-normalised."""
        packed = self.features.descriptors
        if packed.dtype != np.int8:
            return packed
        values = packed.astype(np.float32)
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1)

    def pack(self, cloud_points: int) -> None:
        """Take a third of the bytes; at most ``cloud_points`` of the cloud stay.

        A descriptor in eight bits is off by about 1 % of its length, a point by 0.05 %.
        """
        descriptors = self.features.descriptors
        if descriptors.dtype != np.int8:
            largest = np.abs(descriptors).max(1, keepdims=True, initial=1e-9)
            self.features = replace(
                self.features, descriptors=np.rint(descriptors * (127 / largest)).astype(np.int8))
            self.points_cam = self.points_cam.astype(np.float32)
            self.landmark = self.landmark.astype(np.int32)
        step = -(-len(self.cloud_cam) // cloud_points)
        if step > 1 or self.cloud_cam.dtype != np.float16:
            self.cloud_cam = self.cloud_cam[::max(step, 1)].astype(np.float16)
            self.cloud_rgb = self.cloud_rgb[::max(step, 1)].copy()

    def exported(self, T_map_cam: np.ndarray, points_cam: np.ndarray) -> Keyframe:
        """The immutable value that memories and files take."""
        return Keyframe(self.id, self.stamp_ns, self.camera, T_map_cam.copy(),
                        replace(self.features, descriptors=self.descriptors),
                        points_cam.astype(np.float32), self.source)


class Archive:
    """Packs keyframes that only loops, lost cameras and the cloud still look at.

    All clouds together keep to a few times what is shown of them: with twice the keyframes,
    each has half the points.
    """

    def __init__(self, config: CloudConfig) -> None:
        self._budget = CLOUD_FACTOR * config.max_points
        self._packed, self._share = 0, 0

    def pack(self, keyframes: list[MapKeyframe], count: int) -> None:
        """Pack the first ``count`` keyframes."""
        share = max(1, self._budget >> len(keyframes).bit_length())
        if share != self._share:
            self._packed, self._share = 0, share
        for keyframe in keyframes[self._packed:max(count, 0)]:
            keyframe.pack(share)
        self._packed = max(self._packed, count)


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
