"""Keyframes as the mapper works on them, and the decision which frames become one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from functools import cached_property

import cv2
import numpy as np

from feedforward_recon.config.schema import CloudConfig, KeyframeConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.eight_bits import quantised, unit_length
from feedforward_recon.mapping.matching import Tracks
from feedforward_recon.mapping.stereo import StereoPair
from feedforward_recon.types import Features, Keyframe

# Relative step of depth around a pixel: slanted walls stay below, edges of objects are above.
DEPTH_EDGE = 0.04
DENSE = 0.95  # share of measured pixels with a measured neighbour; a Kinect has 0.99
# Share of features with depth; a Kinect gives 0.65 to 0.75 (docs/experiments.md, Sparse depth).
SPARSE_SHARE = 0.6
EVERY = 7  # rows and columns that are looked at: no sensor leaves out just every seventh
MIN_SAMPLES = 3  # depths within two pixels: with fewer, an edge looks like a surface
EARLIER_SESSION = -1  # frame number of keyframes that this session did not see
# Points kept of all keyframes, times those of the fused cloud: keyframes overlap, and several
# points are averaged in a voxel; chosen by hand.
CLOUD_FACTOR = 8
SHARPNESS_FRAMES = 15  # whose median tells what is sharp here: half a second at 30 Hz
# A keyframe that is not sharp is better than losing track: below this part of tracked_share.
URGENT = 0.5
# After max_gap frames this part of motion_share is enough; none at all stays none.
SLOW_MOTION = 0.2


@dataclass(frozen=True)
class View:
    """One frame as the pipeline needs it: gray image, camera, cleaned depth, sharpness.

    image: uint8 [H, W, 3], RGB; gray: uint8 [H, W]; depth: z in metres [H, W], 0 where unknown.
    index: number of the frame. T_given: pose that came with it, or that a network gave it.
    needs_depth: landmarks come from depth. knows_camera: the camera was given or refined, not
    guessed. stereo: gives depth where there is no depth image.
    """

    index: int
    stamp_ns: int
    image: np.ndarray
    gray: np.ndarray
    camera: Camera
    depth: np.ndarray | None
    sharpness: float
    source: str = ''
    T_given: np.ndarray | None = None
    needs_depth: bool = False
    knows_camera: bool = True
    stereo: StereoPair | None = None

    @property
    def has_depth(self) -> bool:
        """Some sensor says how far things are."""
        return self.depth is not None or self.stereo is not None

    @property
    def inv_depth_noise(self) -> float | None:
        """Standard deviation of 1/z where the sensor says so itself; None: see the settings."""
        return None if self.depth is not None or self.stereo is None \
            else self.stereo.inv_depth_noise

    def depth_at(self, px: np.ndarray) -> np.ndarray:
        """Sensor depth [N] at pixels [N, 2]; 0 where unknown, outside, or at a depth edge."""
        if not len(px) or not self.has_depth:
            return np.zeros(len(px))
        if self.depth is None:
            assert self.stereo is not None
            return self.stereo.depth_at(px)
        centre, size_wh = np.rint(px).astype(int), self.depth.shape[::-1]
        inside = ((centre >= 1) & (centre < np.array(size_wh) - 1)).all(1)
        read = _sparse_depth if self.has_sparse_depth else _dense_depth
        return np.where(inside, read(self.depth, centre), 0.0)

    @cached_property
    def has_sparse_depth(self) -> bool:
        """Measured pixels often lack a measured neighbour: lines, grids, scattered points."""
        if self.depth is None:
            return False
        lines = (self.depth[::EVERY] > 0, self.depth[:, ::EVERY].T > 0)
        return any((seen[:, :-1] & seen[:, 1:]).sum() < DENSE * seen[:, :-1].sum()
                   for seen in lines)


def _dense_depth(depth: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Median [N] of nine pixels that all agree: beside a hole a dense sensor is often wrong."""
    around = _around(depth, centre, 1)
    low, high = around.min(1), around.max(1)
    return np.where((low > 0) & (high - low < DEPTH_EDGE * high), np.median(around, 1), 0.0)


def _sparse_depth(depth: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Median of what was measured within one pixel, if all within two pixels agrees with it."""
    near, wide = (np.sort(np.where(around > 0, around, np.nan), 1)  # NaN last
                  for around in (_around(depth, centre, 1), _around(depth, centre, 2)))
    count, found = np.isfinite(near).sum(1), np.isfinite(wide).sum(1)
    rows, last = np.arange(len(centre)), np.maximum(count - 1, 0)
    median = (near[rows, last // 2] + near[rows, -(-last // 2)]) / 2
    low, high = wide[:, 0], wide[rows, np.maximum(found - 1, 0)]
    good = (count > 0) & (found >= MIN_SAMPLES) & (high - low < DEPTH_EDGE * high)
    return np.where(good, median, 0.0)


def _around(depth: np.ndarray, centre: np.ndarray, radius: int) -> np.ndarray:
    """Depth around pixels [N, 2] (u, v), [N, (2 radius + 1)^2]; at the border some repeat."""
    step = np.arange(-radius, radius + 1)
    u = np.clip(centre[:, :1] + step, 0, depth.shape[1] - 1)
    v = np.clip(centre[:, 1:] + step, 0, depth.shape[0] - 1)
    return depth[v[:, :, None], u[:, None, :]].reshape(len(centre), len(step)**2)


def sharpness(gray: np.ndarray) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) of gray uint8 [H, W] at half size.

    Falls with motion blur and defocus.
    """
    small = cv2.resize(gray, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(small, cv2.CV_32F).var())


@dataclass
class MapKeyframe:
    """A keyframe in the growing map.

    landmark: int [N], the landmark that each feature shows, -1 if none.
    rgb: uint8 [N, 3], colours of the features.
    points_cam: float64 [N, 3] sensor points of the features, camera frame, map units, NaN rows
    without depth.
    cloud_cam, cloud_rgb: [P, 3], sampled sensor points (camera frame) and colours for the cloud.
    inv_depth_noise: standard deviation of 1/z of its depth; None: that of the settings.
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
    inv_depth_noise: float | None = None

    @property
    def descriptors(self) -> np.ndarray:
        """Descriptors of the features, float32 [N, D], L2-normalised."""
        return unit_length(self.features.descriptors)

    @property
    def has_sparse_depth(self) -> bool:
        """The sensor measured something, but not most of what the features show."""
        return 0 < np.isfinite(self.points_cam[:, 2]).mean() < SPARSE_SHARE

    def pack(self, cloud_points: int) -> None:
        """Take a third of the bytes; at most ``cloud_points`` of the cloud stay.

        A descriptor in eight bits is off by about 1 % of its length, a point by 0.05 %.
        """
        descriptors = self.features.descriptors
        if descriptors.dtype != np.int8:
            self.features = replace(self.features, descriptors=quantised(descriptors))
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


class KeyframePacker:
    """Packs keyframes that only loop closure, relocalisation and the cloud still read.

    The clouds of all keyframes together are bounded: with twice the keyframes, each has half the
    points.
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
    """Decides which tracked frames become keyframes: new view, sharp, not too soon.

    The criteria are those of ORB-SLAM (Mur-Artal et al. 2015), tracked share and gap, and image
    motion.
    """

    def __init__(self, config: KeyframeConfig) -> None:
        self.config = config
        self._recent: deque[float] = deque(maxlen=SHARPNESS_FRAMES)
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
        """Whether a tracked frame becomes a keyframe; sharp: what ``observe`` said of it."""
        config, gap = self.config, view.index - self._frame
        if gap < config.min_gap:
            return False
        share, motion = self._since_keyframe(view, tracks)
        losing_tracks = share < URGENT * config.tracked_share
        due = (motion > config.motion_share or share < config.tracked_share
               or (gap >= config.max_gap and motion > SLOW_MOTION * config.motion_share))
        return losing_tracks or (due and sharp)

    def _since_keyframe(self, view: View, tracks: Tracks) -> tuple[float, float]:
        """Share of the keyframe's tracks still followed; their median motion / image width."""
        _, then, now = np.intersect1d(self._ids, tracks.ids, return_indices=True)
        if not len(now):
            return 0.0, 1.0
        motion_px = np.linalg.norm(tracks.px[now] - self._px[then], axis=1)
        return len(now) / len(self._ids), float(np.median(motion_px)) / view.camera.width
