"""The values that travel through the package.

Conventions (docs/conventions.md): OpenCV optical axes (x right, y down, z forward);
``T_a_b`` maps points from frame b to frame a; poses are float64 [4, 4]; depth is z-depth;
pixel centres lie at integer coordinates; stamps are integer nanoseconds; colours are RGB.
Map units are metres when ``SceneMap.metres_per_unit`` is 1.0, unknown when it is None.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from feedforward_recon.geometry.camera import Camera

FloatArray = NDArray[np.floating]


class Status(str, Enum):
    """What the system knows about the camera, one vocabulary everywhere (files, CLI, ROS)."""

    INITIALISING = 'INITIALISING'
    TRACKING = 'TRACKING'
    UNCERTAIN = 'UNCERTAIN'
    LOST = 'LOST'
    NOT_LOCALISED = 'NOT_LOCALISED'

    @property
    def has_pose(self) -> bool:
        """True for the states whose pose was measured."""
        return self in (Status.TRACKING, Status.UNCERTAIN)


@dataclass(frozen=True)
class RightImage:
    """What the right camera of a stereo pair saw at the moment of a frame.

    image: uint8 [H, W, 3] RGB, of the size of the left image. camera: its intrinsics.
    T_left_right: [4, 4] maps points of the right camera to the left one, metres.
    """

    image: NDArray[np.uint8]
    camera: Camera
    T_left_right: FloatArray


@dataclass(frozen=True)
class Frame:
    """One image as it came from a source.

    image: uint8 [H, W, 3] RGB.
    depth: float32 [H, W] z-depth in metres, 0 where unknown, or None.
    camera: intrinsics at the size of ``image``, or None when uncalibrated.
    camera_source: where these are from: 'given', or 'exif' (a focal length alone).
    T_map_cam: known pose [4, 4] (ground truth or given poses), or None.
    source: where the frame came from (file name, topic); used in messages and poses.json.
    right: the image of the right camera, where ``image`` is that of the left one, or None.
    """

    stamp_ns: int
    image: NDArray[np.uint8]
    depth: NDArray[np.float32] | None = None
    camera: Camera | None = None
    source: str = ''
    T_map_cam: FloatArray | None = None
    right: RightImage | None = None
    camera_source: str = 'given'


@dataclass(frozen=True)
class Features:
    """What the encoder says about one image.

    keypoints: float32 [N, 2] pixel coordinates (u, v) in the full-resolution image.
    descriptors: float32 [N, D], L2-normalised.
    confidence: float32 [N] in (0, 1]: how likely the descriptor is to match again.
    global_descriptor: float32 [G], L2-normalised, for retrieval of similar views.
    """

    keypoints: NDArray[np.float32]
    descriptors: NDArray[np.float32]
    confidence: NDArray[np.float32]
    global_descriptor: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.keypoints)

    def select(self, index: NDArray) -> Features:
        """Features at ``index`` (boolean mask or integer indices)."""
        return replace(self, keypoints=self.keypoints[index],
                       descriptors=self.descriptors[index], confidence=self.confidence[index])


@dataclass(frozen=True)
class Prediction:
    """What a feed-forward network says about N images, in a frame and a unit of its own.

    T_world_cam: float64 [N, 4, 4]. K: float64 [N, 3, 3], pixels of the images as given.
    depth: float32 [N, H, W] z-depth at the size of the images, 0 where nothing is said.
    confidence: float32 [N, H, W], at least 1 where there is depth; only ratios mean something.
    """

    T_world_cam: FloatArray
    K: FloatArray
    depth: NDArray[np.float32]
    confidence: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.T_world_cam)


@dataclass(frozen=True)
class Keyframe:
    """A frame that was kept: features and, where known, camera-frame points.

    points_cam: float32 [N, 3] points of ``features`` in this camera's frame, map units;
        NaN rows where the depth is not known (yet).
    """

    id: int
    stamp_ns: int
    camera: Camera
    T_map_cam: FloatArray
    features: Features
    points_cam: NDArray[np.float32]
    source: str = ''

    @property
    def has_point(self) -> NDArray[np.bool_]:
        """Mask [N] of features whose 3-D point is known."""
        return np.isfinite(self.points_cam[:, 2])


@dataclass(frozen=True)
class Estimate:
    """The answer to one image, from tracking or from the localizer.

    T_map_cam: float64 [4, 4], or None when there is no measured pose.
    covariance: [6, 6] of (x y z rx ry rz) of the camera in the map frame (translation in map
        units, rotation vector in radians, left perturbation), or None without a pose.
    score: share of the tested matches that agree with the pose, 0..1.
    runner_up: the best score of a pose that disagrees with the answer, 0..1.
    reason: short code that says why there is no pose, '' when there is one.
    camera: that of the image, in maps of photos and in merged ones; else None.
    """

    stamp_ns: int
    status: Status
    T_map_cam: FloatArray | None = None
    covariance: FloatArray | None = None
    inliers: int = 0
    score: float = 0.0
    runner_up: float = 0.0
    reason: str = ''
    latency_ms: float = 0.0
    is_keyframe: bool = False
    source: str = ''
    camera: Camera | None = None


@dataclass(frozen=True)
class Trajectory:
    """Stamped camera poses: stamps_ns int64 [N], T_map_cam float64 [N, 4, 4]."""

    stamps_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    T_map_cam: FloatArray = field(default_factory=lambda: np.zeros((0, 4, 4)))

    def __post_init__(self) -> None:
        """Refuse arrays whose lengths disagree."""
        if len(self.stamps_ns) != len(self.T_map_cam):
            raise ValueError(f'expected as many stamps as poses, found {len(self.stamps_ns)} '
                             f'stamps and {len(self.T_map_cam)} poses')

    def __len__(self) -> int:
        return len(self.stamps_ns)

    @staticmethod
    def of(posed: Iterable[tuple[int, FloatArray]]) -> Trajectory:
        """Stamped poses [4, 4], brought into the order of their stamps."""
        ordered = sorted(posed, key=lambda one: one[0])
        if not ordered:
            return Trajectory()
        return Trajectory(np.array([stamp_ns for stamp_ns, _ in ordered], np.int64),
                          np.stack([T_map_cam for _, T_map_cam in ordered]))

    @property
    def positions(self) -> FloatArray:
        """Camera centres in the map frame, [N, 3]."""
        return self.T_map_cam[:, :3, 3]

    def transformed(self, T_new_map: FloatArray, scale: float = 1.0) -> Trajectory:
        """The same camera motion in another frame: x_new = T_new_map (scale * x_map)."""
        poses = self.T_map_cam.copy()
        poses[:, :3, 3] *= scale
        return Trajectory(self.stamps_ns, T_new_map @ poses)


@dataclass(frozen=True)
class PointCloud:
    """Coloured points: xyz float32 [N, 3] in the map frame, rgb uint8 [N, 3]."""

    xyz: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    rgb: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3), np.uint8))

    def __len__(self) -> int:
        return len(self.xyz)
