"""Where the node meets TF: transforms in, poses and one transform out.

A measured pose waits, bounded in time and number, until TF knows the frames at the stamp of its
image; then it is published without a transform. ``map -> odom`` is sent again on a timer, dated
into the future by a tolerance, because a correction holds on; without odometry only what was
measured is sent, at the image's stamp.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from rclpy.clock import Clock, ClockType
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import Imu

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.ros.convert import matrix_from_pose, stamp_ns, transform_msg
from feedforward_recon.ros.frames import BodyPose, Frames, OdometryScale
from feedforward_recon.ros.inputs import Arrival
from feedforward_recon.ros.tf_buffer import TransformBuffer, TransformError
from feedforward_recon.ros.tf_messages import TFMessage
from feedforward_recon.ros.worker import Job
from feedforward_recon.session.live import SessionInfo
from feedforward_recon.types import Estimate, Trajectory

if TYPE_CHECKING:
    from feedforward_recon.ros.node import CameraNode

WAITING_POSES = 64
HEARD_S = 10.0  # somebody who sent a transform so lately sends it still
STEADY = Clock(clock_type=ClockType.STEADY_TIME)


@dataclass(frozen=True)
class Waiting:
    """A measured pose that waits for TF until a moment of the steady clock."""

    arrival: Arrival
    estimate: Estimate
    info: SessionInfo
    until_s: float


class FirstPose(NamedTuple):
    """T_map_cam [4, 4] of an image, should it start the map, and what told where up is."""

    T_map_cam: np.ndarray
    up_source: str


class Positioning:
    """Transforms and poses of one node; lives on the executor's thread."""

    def __init__(self, node: CameraNode) -> None:
        self._node = node
        self.buffer = TransformBuffer()
        self.frames = Frames(node.config, self.buffer)
        self.metres_per_unit: float | None = None
        self._scale = OdometryScale()
        self._waiting: deque[Waiting] = deque()
        self._handles: list[Any] = []
        self._timer: Any = None
        self._camera_frame = ''
        self._correction: BodyPose | None = None
        self._corrected_s = 0.0
        self._first_image_s: float | None = None
        self._map_began = False
        self._others: dict[str, float] = {}  # children of the map by others: heard until when

    # -- life ------------------------------------------------------------------------------

    def start(self, config: NodeConfig) -> None:
        """Listen to TF, IMU and initial poses."""
        self.frames.config = config
        self._first_image_s = None
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
        self.frames.forget()
        self._others.clear()
        self._waiting.clear()
        self._correction = None

    def jumped(self, stamp: int) -> None:
        """Stamps jumped back: where things were means nothing now, who carries whom stays."""
        self.buffer.jumped(stamp)
        self._waiting.clear()
        self._correction = None

    def new_map(self) -> None:
        """Another map: its unit and its place are not yet known."""
        self._waiting.clear()
        self._map_began = False
        self._correction, self.metres_per_unit = None, None
        self._scale = OdometryScale()

    # -- messages --------------------------------------------------------------------------

    def _take_tf(self, message: Any, static: bool) -> None:
        """Everything but what hangs below the map: that is for us to say."""
        outputs, others = self._node.outputs, []
        for stamped in message.transforms:
            if outputs is not None and stamped in outputs.sent:
                continue
            if stamped.header.frame_id.lstrip('/') != self.frames.config.map_frame:
                others.append(stamped)
            else:
                until_s = np.inf if static else time.monotonic() + HEARD_S
                self._others[stamped.child_frame_id.lstrip('/')] = until_s
        for sentence in self.buffer.take(SimpleNamespace(transforms=others), static):
            self._node.notice('TF_REFUSED', sentence)
        self._flush()

    def take_odometry(self, message: Odometry, stamp: int) -> None:
        """Odometry is one more edge of the tree."""
        config = self.frames.config
        try:
            self.frames.take_odometry(message.header.frame_id or config.odom_frame,
                                      message.child_frame_id or config.base_frame,
                                      matrix_from_pose(message.pose.pose), stamp)
        except InputError as error:
            self._node.notice('ODOMETRY_REFUSED', str(error))
        self._flush()

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

    def first_pose(self, arrival: Arrival) -> FirstPose | None:
        """The pose of this image if it should start the map; None while TF may tell more.

        Where there is a map nothing waits. The pose comes along all the same: a late calibration
        may end that map on the worker at any moment.
        """
        self._camera_frame = arrival.frame_id
        if self._first_image_s is None:
            self._first_image_s = time.monotonic()
        if not self._node.health.keyframes and self._tf_may_come(arrival.frame_id):
            return None
        return FirstPose(*self.frames.first_pose(arrival.frame_id, arrival.stamp_ns,
                                                 arrival.depth is not None))

    def map_has(self, first: FirstPose) -> None:
        """The map has a keyframe since this image: say once what told where up is."""
        if not self._map_began:
            self._map_began = True
            self._node.get_logger().info(f'the map is upright by: {first.up_source}')

    def _tf_may_come(self, camera_frame: str) -> bool:
        """Somebody may tell of robot or odometry, and since the first image it was not long."""
        frames = self.frames
        if self._first_image_s is None \
                or time.monotonic() - self._first_image_s > frames.config.tf_wait_s:
            return False
        moving = self._publishers('/tf') - (TFMessage is not None)  # but ourselves
        return (not frames.knows_base(camera_frame)
                and moving + self._publishers('/tf_static') > 0) \
            or (not frames.knows_odometry(camera_frame) and moving + self._publishers('odom') > 0)

    def _publishers(self, topic: str) -> int:
        return self._node.count_publishers(self._node.resolve_topic_name(topic))

    def _odometry_is_announced(self) -> bool:
        """An odometry topic has a publisher that has said nothing yet."""
        odom = self._node.health.inputs.get('odom')
        return odom is not None and bool(odom.publishers) and not odom.messages

    # -- poses -----------------------------------------------------------------------------

    def measured(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> None:
        """Publish a measured pose as soon as TF knows its frames."""
        until_s = time.monotonic() + self.frames.config.tf_wait_s
        self._waiting.append(Waiting(arrival, estimate, info, until_s))
        self._flush()

    def _flush(self) -> None:
        """Publish what TF knows by now; what has waited long enough, without a transform."""
        while self._waiting:
            waiting = self._waiting[0]
            try:
                body = self._joined(waiting)
            except TransformError as error:
                if time.monotonic() < waiting.until_s and len(self._waiting) < WAITING_POSES:
                    return
                self._waiting.popleft()
                self._publish_alone(waiting, error)
            else:
                self._waiting.popleft()
                self._publish(waiting.arrival, body)

    def _joined(self, waiting: Waiting) -> BodyPose:
        """The robot's pose with the transform to send; raises TransformError until TF knows."""
        arrival, estimate = waiting.arrival, waiting.estimate
        if self._tf_may_come(arrival.frame_id):
            raise TransformError('the robot is not on TF yet', 'missing')
        auto = self.frames.config.tf_mode == 'auto'
        if auto and not self.frames.knows_odometry(arrival.frame_id) \
                and self._odometry_is_announced():
            raise TransformError('expected odometry, because its topic has a publisher, found '
                                 'no message yet; check that the driver sends it', 'missing')
        metres = waiting.info.metres_per_unit or self._odometry_scale(arrival, estimate)
        return self._body(arrival, estimate, metres)

    def _publish_alone(self, waiting: Waiting, late: TransformError) -> None:
        """The pose of a robot whose odometry is late: nothing else may be above the robot."""
        try:
            body = self.body(waiting.arrival, waiting.estimate, waiting.info)
        except TransformError as error:
            self._node.notice('TF_LATE', f'a pose was not published: {error}')
            return
        self._node.notice('TF_LATE', f'a pose was published without a transform: {late}')
        self._publish(waiting.arrival, body)

    def _publish(self, arrival: Arrival, body: BodyPose) -> None:
        outputs = self._node.outputs
        if outputs is None:
            return
        try:
            outputs.pose(body)
            self._node.posed(arrival)
            if body.child_frame and not self._scale_is_due(body.child_frame, arrival.frame_id):
                self._send(body, arrival.frame_id)
        except InputError as error:
            self._node.notice('POSE_REFUSED', f'a pose was not published: {error}')

    def _send(self, body: BodyPose, camera_frame: str) -> None:
        """Send the transform of a measured pose, unless TF has no place for it."""
        assert self._node.outputs is not None
        own = [t for t in self._node.outputs.own_body(body, camera_frame)
               if self._may_send(camera_frame, t.child_frame_id)]
        self._correction = None
        if self._may_send(self.frames.config.map_frame, body.child_frame):
            self._correction, self._corrected_s = body, time.monotonic()
            own.insert(0, self._transform(body, body.stamp_ns))
            self._look_for_others(body.child_frame, camera_frame)
        self._node.outputs.transforms(own)

    def _may_send(self, parent: str, child: str) -> bool:
        """TF has no other parent for the child."""
        conflict, loop = self.frames.conflict(parent, child), self.frames.loop(parent, child)
        self._node.notice('TWO_PARENTS', conflict)
        self._node.notice('TF_REFUSED', loop)
        return not (conflict or loop)

    def _look_for_others(self, child: str, camera_frame: str) -> None:
        """Somebody else places what we place below the map, or the robot, which hangs there."""
        map_frame = self.frames.config.map_frame
        for frame in {child, *self.buffer.ancestry(camera_frame)}:
            if self._others.get(frame, 0.0) > time.monotonic():
                self._node.notice(
                    'TWO_PUBLISHERS', f'somebody else sends {map_frame} -> {frame}, and this node '
                    f'sends {map_frame} -> {child}, so the robot jumps between two places; stop '
                    'the other one (AMCL, slam_toolbox, a second node, a bag with recorded TF, a '
                    'static_transform_publisher), or set tf_mode to none')

    def body(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> BodyPose:
        """The robot's pose for a camera's, with nothing for TF.

        Raises TransformError where TF does not know the mount of the camera at the stamp.
        """
        return self._body(arrival, estimate, info.metres_per_unit or self._scale.metres_per_unit,
                          alone=True)

    def _body(self, arrival: Arrival, estimate: Estimate, metres_per_unit: float | None, *,
              alone: bool = False) -> BodyPose:
        assert estimate.T_map_cam is not None and estimate.covariance is not None
        self.metres_per_unit = metres_per_unit
        return self.frames.body_pose(estimate.T_map_cam, estimate.covariance, arrival.frame_id,
                                     arrival.stamp_ns, metres_per_unit, alone=alone)

    def _odometry_scale(self, arrival: Arrival, estimate: Estimate) -> float | None:
        """Metres per unit of a monocular map, once odometry has told."""
        odom = self.frames.config.odom_frame
        if estimate.T_map_cam is None or not self.frames.knows_odometry(arrival.frame_id):
            return self._scale.metres_per_unit
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
        if (config.pose_timeout_s == 0 or age_s < config.pose_timeout_s) \
                and self._may_send(config.map_frame, body.child_frame):
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
