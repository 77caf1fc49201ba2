"""Where the node meets TF: transforms in, poses and one transform out.

A measured pose waits, bounded in time and number, until TF knows the frames at the stamp of its
image. ``map -> odom`` is sent again on a timer, dated into the future by a tolerance, because a
correction holds on; without odometry only what was measured is sent, at the image's stamp.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from rclpy.clock import Clock, ClockType
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Imu

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.live import SessionInfo
from feedforward_recon.node_config import NodeConfig
from feedforward_recon.ros.convert import matrix_from_pose, stamp_ns, transform_msg
from feedforward_recon.ros.frames import BodyPose, Frames, OdometryScale
from feedforward_recon.ros.inputs import Arrival
from feedforward_recon.ros.tf_buffer import TransformBuffer, TransformError
from feedforward_recon.ros.tf_messages import TFMessage
from feedforward_recon.ros.worker import Job
from feedforward_recon.types import Estimate, Trajectory

if TYPE_CHECKING:
    from feedforward_recon.ros.node import CameraNode

WAITING_POSES = 64
STEADY = Clock(clock_type=ClockType.STEADY_TIME)


@dataclass(frozen=True)
class Waiting:
    """A measured pose that waits for TF until a moment of the steady clock."""

    arrival: Arrival
    estimate: Estimate
    info: SessionInfo
    until_s: float


class Positioning:
    """Transforms and poses of one node; lives on the executor's thread."""

    def __init__(self, node: CameraNode) -> None:
        self._node = node
        self.buffer = TransformBuffer()
        self.frames = Frames(node.config, self.buffer)
        self.metres_per_unit: float | None = None
        self._scale = OdometryScale()
        self._waiting: deque[Waiting] = deque(maxlen=WAITING_POSES)
        self._handles: list[Any] = []
        self._timer: Any = None
        self._camera_frame = ''
        self._correction: BodyPose | None = None
        self._corrected_s = 0.0
        self._started_s = 0.0
        self._up_source = ''

    # -- life ------------------------------------------------------------------------------

    def start(self, config: NodeConfig) -> None:
        """Listen to TF, IMU and initial poses."""
        self.frames.config = config
        self._started_s = time.monotonic()
        create = self._node.create_subscription
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._handles = [
            create(Imu, 'imu', self._take_imu, qos_profile_sensor_data),
            create(PoseWithCovarianceStamped, 'initialpose', self._take_initial_pose, 10)]
        if TFMessage is not None:
            self._handles += [
                create(TFMessage, '/tf', lambda m: self._take_tf(m, False), QoSProfile(depth=100)),
                create(TFMessage, '/tf_static', lambda m: self._take_tf(m, True), latched)]
        self._timer = self._node.create_timer(1 / config.tf_rate_hz, self._tick, clock=STEADY)

    def configure(self, config: NodeConfig) -> None:
        """Take over settings that changed while running."""
        self.frames.config = config
        if self._timer is not None:
            self._timer.timer_period_ns = int(1e9 / config.tf_rate_hz)

    def stop(self) -> None:
        """Stop listening; what was sent as correction is not sent again."""
        while self._handles:
            self._node.destroy_subscription(self._handles.pop())
        if self._timer is not None:
            self._node.destroy_timer(self._timer)
            self._timer = None
        self.clear()

    def clear(self) -> None:
        """The clock jumped: what TF said before means nothing now."""
        self.buffer.clear()
        self._waiting.clear()
        self._correction = None

    def new_map(self) -> None:
        """Another map: its unit and its place are not yet known."""
        self._waiting.clear()
        self._correction, self.metres_per_unit = None, None
        self._scale = OdometryScale()

    # -- messages --------------------------------------------------------------------------

    def _take_tf(self, message: Any, static: bool) -> None:
        """Everything but what hangs below the map: that is for us to say."""
        others = [t for t in message.transforms
                  if t.header.frame_id.lstrip('/') != self.frames.config.map_frame]
        for sentence in self.buffer.take(SimpleNamespace(transforms=others), static):
            self._node.notice('TF_REFUSED', sentence)
        self._flush()

    def take_odometry(self, message: Odometry, stamp: int) -> None:
        """Odometry is one more edge of the tree."""
        config = self.frames.config
        try:
            self.buffer.set(message.header.frame_id or config.odom_frame,
                            message.child_frame_id or config.base_frame,
                            matrix_from_pose(message.pose.pose), stamp)
        except InputError as error:
            self._node.notice('ODOMETRY_REFUSED', str(error))

    def _take_imu(self, message: Imu) -> None:
        force = message.linear_acceleration
        self.frames.felt_gravity(message.header.frame_id, np.array([force.x, force.y, force.z]))

    def _take_initial_pose(self, message: PoseWithCovarianceStamped) -> None:
        node, map_frame = self._node, self.frames.config.map_frame
        if message.header.frame_id not in ('', map_frame):
            node.notice('INITIALPOSE_FRAME', f'expected an initialpose in {map_frame}, found one '
                        f'in {message.header.frame_id}; it is not used')
            return
        session, worker = node.session, node.worker
        if session is None or worker is None:
            return
        try:
            T_map_cam = self.frames.camera_pose(
                matrix_from_pose(message.pose.pose), self._camera_frame,
                stamp_ns(message.header), self.metres_per_unit)
        except InputError as error:
            node.notice('INITIALPOSE_REFUSED', f'the initialpose was not used: {error}')
            return
        worker.ask(Job(lambda: session.hint(T_map_cam), lambda *_: None))
        node.get_logger().info('initialpose: looking there first')

    # -- the start of a map ----------------------------------------------------------------

    def first_pose(self, arrival: Arrival) -> np.ndarray | None:
        """T_map_cam if this image should start the map; None while TF may still tell more."""
        self._camera_frame = arrival.frame_id
        if self._tf_may_come(arrival.frame_id):
            return None
        T_map_cam, source = self.frames.first_pose(arrival.frame_id, arrival.stamp_ns,
                                                   arrival.depth is not None)
        if source != self._up_source:
            self._up_source = source
            self._node.get_logger().info(f'the map is upright by: {source}')
        return T_map_cam

    def _tf_may_come(self, camera_frame: str) -> bool:
        """Somebody publishes TF, the robot is not in it yet, and we have not waited long."""
        if self.frames.knows_base(camera_frame) \
                or time.monotonic() - self._started_s > self.frames.config.tf_wait_s:
            return False
        node = self._node
        others = node.count_publishers('/tf') - 1 + node.count_publishers('/tf_static')
        return others > 0

    # -- poses -----------------------------------------------------------------------------

    def measured(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> None:
        """Publish a measured pose as soon as TF knows its frames."""
        until_s = time.monotonic() + self.frames.config.tf_wait_s
        self._waiting.append(Waiting(arrival, estimate, info, until_s))
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            waiting = self._waiting[0]
            try:
                self._publish(waiting)
            except TransformError as error:
                if time.monotonic() < waiting.until_s:
                    return
                self._node.notice('TF_LATE', f'a pose was not published: {error}')
            except InputError as error:
                self._node.notice('POSE_REFUSED', f'a pose was not published: {error}')
            if self._waiting:
                self._waiting.popleft()

    def _publish(self, waiting: Waiting) -> None:
        arrival, outputs = waiting.arrival, self._node.outputs
        if outputs is None:
            return
        if self._tf_may_come(arrival.frame_id):
            raise TransformError('the robot is not on TF yet', 'missing')
        body = self.body(arrival, waiting.estimate, waiting.info)
        outputs.pose(body)
        self._node.posed(arrival)
        if body.child_frame and not self._scale_is_due(body.child_frame, arrival.frame_id):
            self._correction, self._corrected_s = body, time.monotonic()
            outputs.transforms([self._transform(body, body.stamp_ns),
                                *outputs.own_body(body, arrival.frame_id)])

    def body(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> BodyPose:
        """The robot's pose for a camera's; raises TransformError while TF lacks frames."""
        assert estimate.T_map_cam is not None and estimate.covariance is not None
        self.metres_per_unit = info.metres_per_unit or self._odometry_scale(arrival, estimate)
        return self.frames.body_pose(estimate.T_map_cam, estimate.covariance, arrival.frame_id,
                                     arrival.stamp_ns, self.metres_per_unit)

    def _odometry_scale(self, arrival: Arrival, estimate: Estimate) -> float | None:
        """Metres per unit of a monocular map, once odometry has told."""
        odom = self.frames.config.odom_frame
        if estimate.T_map_cam is None or not self.buffer.can(odom, arrival.frame_id):
            return None
        T_odom_cam = self.buffer.lookup(odom, arrival.frame_id, arrival.stamp_ns)
        if self._scale.add(estimate.T_map_cam[:3, 3], T_odom_cam[:3, 3]):
            self._tell_scale()
        return self._scale.metres_per_unit

    def _tell_scale(self) -> None:
        session, worker, metres = self._node.session, self._node.worker, \
            self._scale.metres_per_unit
        if session is None or worker is None or metres is None:
            return
        if not self._node.health.scale_source.startswith('odom'):
            self._node.get_logger().info(
                f'scale from odometry: {metres:.4g} m per unit, '
                f'uncertain by {100 * self._scale.uncertainty:.1f} %')
            worker.ask(Job(lambda: session.set_odometry_scale(metres), lambda *_: None))

    def _scale_is_due(self, child_frame: str, camera_frame: str) -> bool:
        """Map -> odom mixes the map's unit with metres: it has to wait for the scale."""
        config = self.frames.config
        due = self.metres_per_unit is None and self.frames.is_driven(child_frame, camera_frame)
        if due:
            step = 'drive some decimetres' if child_frame == config.odom_frame \
                else f'set odom_frame to {child_frame}'
            self._node.notice('SCALE_UNKNOWN', f'no {config.map_frame} -> {child_frame} yet: the '
                              f'scale of a monocular map comes from odometry; {step}')
        return due

    def _transform(self, body: BodyPose, stamp: int) -> Any:
        return transform_msg(body.T_map_child, self.frames.config.map_frame, body.child_frame,
                             stamp)

    def _tick(self) -> None:
        """Timer: poses that waited, and the correction again."""
        self._flush()
        config, body, outputs = self.frames.config, self._correction, self._node.outputs
        if body is None or outputs is None or body.child_frame != config.odom_frame:
            return
        age_s = time.monotonic() - self._corrected_s
        if config.pose_timeout_s == 0 or age_s < config.pose_timeout_s:
            stamp = self._node.now_ns() + int(config.tf_tolerance_s * 1e9)
            outputs.transforms([self._transform(body, stamp)])

    def body_path(self, keyframes: Trajectory, camera_frame: str,
                  metres_per_unit: float | None) -> Trajectory:
        """Keyframes as poses of the robot, in metres where the scale is known."""
        if not len(keyframes):
            return keyframes
        newest = int(keyframes.stamps_ns[-1])
        T_body_cam = self.frames.body_of_camera(camera_frame, newest)
        metric = keyframes.transformed(np.eye(4), metres_per_unit or 1.0)
        return Trajectory(metric.stamps_ns, metric.T_map_cam @ inverse(T_body_cam))

    def state(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The mode in force and what it lacks, for the diagnostics."""
        if not self._camera_frame:
            return self.frames.config.tf_mode, ()
        return self.frames.mode(self._camera_frame), self.frames.missing(self._camera_frame)
