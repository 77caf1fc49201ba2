"""Which transform to send, and which body's pose to publish (REP-103, REP-105).

The core knows one thing: T_map_cam of an optical frame. Here it becomes the one transform that
connects ``map`` with the tree of the camera - with odom, the robot's root or the camera itself -
and the pose of a body whose x axis points forward. The rotation between optical and
body axes comes from TF where there is one, and from ``R_BODY_OPTICAL`` once where there is none.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.geometry.transforms import hat, inverse, make_transform
from feedforward_recon.ros.tf_buffer import TransformBuffer, TransformError

# Optical axes (x right, y down, z forward) seen in body axes (x forward, y left, z up).
R_BODY_OPTICAL = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
T_BODY_OPTICAL = make_transform(R_BODY_OPTICAL, np.zeros(3))
GRAVITY_MPS2 = (9.3, 10.3)  # norm of an acceleration that is gravity alone
UNKNOWN_VARIANCE = 1e6


@dataclass(frozen=True)
class BodyPose:
    """A measured pose as it is published.

    T_map_body: pose [4, 4] of ``body_frame``, x forward; covariance: [6, 6] of (position,
    rotation about the map's axes). child_frame, T_map_child: what TF gets; '' sends nothing.
    T_cam_body is known from TF if ``from_tf``.
    """

    stamp_ns: int
    T_map_body: np.ndarray
    covariance: np.ndarray
    body_frame: str
    child_frame: str
    T_map_child: np.ndarray
    T_cam_body: np.ndarray
    from_tf: bool


class Frames:
    """Answers what TF and odometry say about the frames of camera, robot and map."""

    def __init__(self, config: NodeConfig, buffer: TransformBuffer) -> None:
        self.config = config
        self.buffer = buffer
        self._up: tuple[str, np.ndarray] | None = None
        self._odometry_seen = False

    def forget(self) -> None:
        """The node stops listening: the robot may come back with another odometry, or none."""
        self.buffer.clear()
        self._odometry_seen = False

    # -- the tree --------------------------------------------------------------------------

    def child_frame(self, camera_frame: str) -> str:
        """The frame that hangs below the map: the root of the tree that the camera is in.

        Odometry that was known once stays the child: while it is late or silent nothing can be
        sent, because the robot hangs below it.
        """
        config = self.config
        self._odometry_seen |= self.knows_odometry(camera_frame)
        if config.tf_mode == 'none':
            return ''
        if config.tf_mode == 'map_to_odom':
            return config.odom_frame
        if config.tf_mode == 'map_to_base':
            return self._below((config.map_frame, config.odom_frame), config.base_frame)
        if config.tf_mode == 'auto' and self._odometry_seen \
                and not self.knows_odometry(camera_frame):
            return config.odom_frame
        return self._below((config.map_frame,), camera_frame)

    def _below(self, tops: tuple[str, ...], frame: str) -> str:
        """The uppermost frame above a frame that is below the tops."""
        while (parent := self.buffer.parent_of(frame)) is not None and parent not in tops:
            frame = parent
        return frame

    def conflict(self, parent: str, child: str) -> str:
        """Why parent -> child would give the child a second parent on TF, or ''."""
        other = self.buffer.parent_of(child, on_tf=True)
        if other in (None, parent):
            return ''
        mode = '' if self.config.tf_mode == 'auto' else 'set tf_mode to auto, or '
        return (f'{parent} -> {child} is not sent, because TF has {other} -> {child} and a frame '
                f'has one parent; {mode}stop the publisher of {other} -> {child}')

    def loop(self, parent: str, child: str) -> str:
        """Why parent -> child would make a loop on TF, or ''."""
        if child not in self.buffer.ancestry(parent):
            return ''
        return (f'{parent} -> {child} is not sent, because TF has {parent} below {child}; stop '
                f'the publisher of {self.buffer.parent_of(parent)} -> {parent}')

    def mode(self, camera_frame: str) -> str:
        """The mode in force, as ``tf_mode`` names it."""
        child = self.child_frame(camera_frame)
        if not child:
            return 'none'
        if child == self.config.odom_frame:
            return 'map_to_odom'
        return 'map_to_base' if self.knows_base(camera_frame) else 'map_to_camera'

    def knows_base(self, camera_frame: str) -> bool:
        """TF connects the camera with the robot."""
        return self.buffer.can(self.config.base_frame, camera_frame)

    def knows_odometry(self, camera_frame: str) -> bool:
        """TF or the odometry topic connect the camera with the frame of odometry."""
        return self.buffer.can(self.config.odom_frame, camera_frame)

    def take_odometry(self, parent: str, child: str, T_parent_child: np.ndarray, stamp_ns: int
                      ) -> None:
        """A message of an odometry topic: one more edge of the tree, where TF has none.

        It hangs the top of the tree that TF has above the child, so that no frame loses the
        parent that TF gives it. Raises InputError for what is no transform.
        """
        above = [child]
        while (frame := self.buffer.parent_of(above[-1], on_tf=True)) is not None:
            above.append(frame)
        if parent.lstrip('/') in above[1:]:
            return
        T_child_top = self.buffer.lookup_near(child, above[-1], stamp_ns)
        self.buffer.set(parent, above[-1], T_parent_child @ T_child_top, stamp_ns, on_tf=False)

    def is_driven(self, child_frame: str, camera_frame: str) -> bool:
        """Something below the child of the map moves the robot: its lengths are metres.

        A joint between robot and camera does not count.
        """
        if child_frame == self.config.odom_frame:
            return True
        body = self.config.base_frame if self.knows_base(camera_frame) else camera_frame
        return self.buffer.can(child_frame, body) \
            and self.buffer.moves(child_frame, body)

    def missing(self, camera_frame: str) -> tuple[tuple[str, str], ...]:
        """Pairs of frames that the chosen mode needs connected and TF does not connect."""
        config = self.config
        needed = {'map_to_odom': [(config.odom_frame, config.base_frame),
                                  (config.base_frame, camera_frame)],
                  'map_to_base': [(config.base_frame, camera_frame)]}.get(config.tf_mode, [])
        return tuple(pair for pair in needed if not self.buffer.can(*pair))

    # -- the start of a map ----------------------------------------------------------------

    def add_acceleration(self, imu_frame: str, acceleration: np.ndarray) -> None:
        """An accelerometer reading [3], m/s^2; kept while it is gravity alone."""
        norm = float(np.linalg.norm(acceleration))
        if GRAVITY_MPS2[0] < norm < GRAVITY_MPS2[1]:
            self._up = (imu_frame, acceleration / norm)

    def first_pose(self, camera_frame: str, stamp_ns: int, metric: bool
                   ) -> tuple[np.ndarray, str]:
        """T_map_cam [4, 4] of the camera that starts a map with z up, and its source of "up".

        The source is imu, odometry, level base or level camera. x points where the body
        looks. The origin is in the body where lengths are known, else in the camera.
        """
        T_body_cam = self.body_of_camera(camera_frame, stamp_ns)
        R_map_body, source = self._levelled(camera_frame, stamp_ns, T_body_cam)
        T_map_cam = make_transform(R_map_body, np.zeros(3)) @ T_body_cam
        if not metric:
            T_map_cam[:3, 3] = 0
        return T_map_cam, source

    def body_of_camera(self, camera_frame: str, stamp_ns: int) -> np.ndarray:
        """T_body_cam [4, 4]: from TF, or the one rotation between optical and body axes.

        A mount that moves, and that TF does not know at the stamp, is taken as nearest to it.
        """
        if not self.knows_base(camera_frame):
            return T_BODY_OPTICAL
        return self.buffer.lookup_near(self.config.base_frame, camera_frame, stamp_ns)

    def _levelled(self, camera_frame: str, stamp_ns: int, T_body_cam: np.ndarray
                  ) -> tuple[np.ndarray, str]:
        """R_map_body [3, 3] with z up and no yaw, from the best source there is, and that source.

        Of odometry the sample nearest to the stamp will do: roll and pitch change slowly.
        """
        if self._up is not None:
            imu_frame, up_imu = self._up
            try:
                T_cam_imu = self.buffer.lookup(camera_frame, imu_frame, stamp_ns)
                return _from_up(T_body_cam[:3, :3] @ T_cam_imu[:3, :3] @ up_imu), 'imu'
            except TransformError:
                pass  # the IMU is not in the tree: the next best source answers
        try:
            T_odom_cam = self.buffer.lookup_near(self.config.odom_frame, camera_frame, stamp_ns)
            return _without_yaw((T_odom_cam @ inverse(T_body_cam))[:3, :3]), 'odometry'
        except TransformError:
            return np.eye(3), 'level base' if self.knows_base(camera_frame) else 'level camera'

    # -- poses -----------------------------------------------------------------------------

    def body_pose(self, T_map_cam: np.ndarray, covariance: np.ndarray, camera_frame: str,
                  stamp_ns: int, metres_per_unit: float | None, *, alone: bool = False
                  ) -> BodyPose:
        """A measured camera pose as robot pose and transform, at the stamp of the image.

        alone: the pose of the robot without a transform, which needs less of TF.
        Raises TransformError while TF does not know what it needs at that stamp.
        """
        scale = metres_per_unit or 1.0
        T_map_cam, covariance = _scaled(T_map_cam, covariance, scale)
        base = self.config.base_frame
        from_tf = self.knows_base(camera_frame) or self.config.tf_mode == 'map_to_base'
        T_cam_body = self.buffer.lookup(camera_frame, base, stamp_ns) if from_tf \
            else inverse(T_BODY_OPTICAL)
        if metres_per_unit is None:  # metres and units of unknown length do not add up
            T_cam_body = make_transform(T_cam_body[:3, :3], np.zeros(3))
        child = '' if alone else self.child_frame(camera_frame)
        T_cam_child = self.buffer.lookup(camera_frame, child, stamp_ns) if child else np.eye(4)
        if metres_per_unit is None and not self.is_driven(child, camera_frame):
            T_cam_child = make_transform(T_cam_child[:3, :3], np.zeros(3))
        return BodyPose(stamp_ns, T_map_cam @ T_cam_body,
                        _moved_covariance(covariance, T_map_cam, T_cam_body),
                        base if from_tf else f'{camera_frame}_body', child,
                        T_map_cam @ T_cam_child, T_cam_body, from_tf)

    def camera_pose(self, T_map_body: np.ndarray, camera_frame: str, stamp_ns: int,
                    metres_per_unit: float | None) -> np.ndarray:
        """T_map_cam in map units of a body pose in metres: a hint from outside.

        While the unit of the map is unknown, poses and hints are of the camera's centre.
        """
        T_body_cam = self.body_of_camera(camera_frame, stamp_ns)
        if metres_per_unit is None:
            T_body_cam = make_transform(T_body_cam[:3, :3], np.zeros(3))
        T_map_cam = T_map_body @ T_body_cam
        T_map_cam[:3, 3] /= metres_per_unit or 1.0
        return T_map_cam


class OdometryScale:
    """Metres per unit of a monocular map, from how far odometry says that the camera moved.

    Ratios of displacements over at least ``BASELINE_M``; their median holds once it is certain
    to ``CERTAIN``, and then stays, because poses in different units cannot be compared.
    """

    BASELINE_M = 0.2
    STEP_M = BASELINE_M / 5  # a robot that stands would repeat its last displacement
    CERTAIN = 0.03
    FEWEST = 15

    def __init__(self) -> None:
        self._path: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=200)
        self._ratios: deque[float] = deque(maxlen=200)
        self.metres_per_unit: float | None = None
        self.uncertainty = np.inf

    def add(self, position_map: np.ndarray, position_odom: np.ndarray) -> bool:
        """Camera positions [3] of one moment, map units and metres; True once it is certain."""
        if self._path and np.linalg.norm(position_odom - self._path[-1][1]) < self.STEP_M:
            return False
        self._path.append((position_map, position_odom))
        for old_map, old_odom in reversed(self._path):
            metres = float(np.linalg.norm(position_odom - old_odom))
            if metres >= self.BASELINE_M:
                units = float(np.linalg.norm(position_map - old_map))
                if units > 0:
                    self._ratios.append(metres / units)
                break
        if self.metres_per_unit is not None or len(self._ratios) < self.FEWEST:
            return False
        median = float(np.median(self._ratios))
        spread = 1.4826 * float(np.median(np.abs(np.array(self._ratios) - median)))
        # Neighbouring displacements overlap: about one in five is new evidence.
        self.uncertainty = spread / median / np.sqrt(len(self._ratios) / 5)
        if self.uncertainty < self.CERTAIN:
            self.metres_per_unit = median
        return self.metres_per_unit is not None


def _from_up(up: np.ndarray) -> np.ndarray:
    """R_map_body without yaw, for the direction of up [3] in the body."""
    forward = np.array([1.0, 0, 0]) - up[0] * up
    if np.linalg.norm(forward) < 1e-3:  # looking straight up or down: any heading will do
        forward = np.array([0, 1.0, 0]) - up[1] * up
    forward /= np.linalg.norm(forward)
    return np.stack([forward, np.cross(up, forward), up])


def _without_yaw(R_world_body: np.ndarray) -> np.ndarray:
    """Roll and pitch alone of a body in a world with z up."""
    return _from_up(R_world_body[2])


def _scaled(T: np.ndarray, covariance: np.ndarray, scale: float
            ) -> tuple[np.ndarray, np.ndarray]:
    T, gain = T.copy(), np.diag([scale] * 3 + [1.0] * 3)
    T[:3, 3] *= scale
    return T, gain @ covariance @ gain


def _moved_covariance(covariance: np.ndarray, T_map_cam: np.ndarray, T_cam_body: np.ndarray
                      ) -> np.ndarray:
    """Covariance [6, 6] of the body: a turn of the camera moves a body that sits off it."""
    lever = T_map_cam[:3, :3] @ T_cam_body[:3, 3]
    J = np.eye(6)
    J[:3, 3:] = -hat(lever)
    moved = J @ covariance @ J.T
    return 0.5 * (moved + moved.T)
