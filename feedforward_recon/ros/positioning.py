"""Where the node meets TF: transforms, odometry, gravity and hints in, poses and transforms out.

TfListener, odometry, IMU -> Frames -> MapStart: pose of the first image
-> PosePublisher -> poses, MapTransform -> /tf
initialpose -> session
"""

from __future__ import annotations

from typing import Any

import numpy as np
from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Imu

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.ros.convert import matrix_from_pose, stamp_ns
from feedforward_recon.ros.frames import Frames
from feedforward_recon.ros.host import STEADY, Host
from feedforward_recon.ros.map_scale import MapScale
from feedforward_recon.ros.map_start import MapStart
from feedforward_recon.ros.map_transform import MapTransform
from feedforward_recon.ros.outputs import PoseOutputs
from feedforward_recon.ros.pose_publisher import PosePublisher
from feedforward_recon.ros.session_runner import SessionRunner
from feedforward_recon.ros.tf_buffer import TransformBuffer
from feedforward_recon.ros.tf_listener import TfListener
from feedforward_recon.ros.tf_sent import SentTransforms
from feedforward_recon.types import Trajectory


class Positioning:
    """Transforms and poses of one node; lives on the executor's thread, as long as the node.

    frames: the tree of frames. map_start: the first pose of a map. poses: publishes poses.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self.frames = Frames(host.config, TransformBuffer())
        sent = SentTransforms()
        self.map_start = MapStart(host, self.frames)
        self._scale = MapScale(host, self.frames, self._scale_found)
        self.listener = TfListener(host, self.frames, sent, lambda: self.poses.flush())
        self.poses = PosePublisher(host, self.frames, self.map_start, self._scale,
                                   MapTransform(host, self.frames, self.listener), sent)
        self._session: SessionRunner | None = None
        self._handles: list[Any] = []
        self._timer: Any = None

    @property
    def metres_per_unit(self) -> float | None:
        """Length of the map's unit, of the newest pose; None while it is unknown."""
        return self._scale.metres_per_unit

    # -- life ------------------------------------------------------------------------------

    def connect(self, session: SessionRunner, outputs: PoseOutputs) -> None:
        """The node is configured: hints and scales go to the session, poses to the outputs."""
        self._session = session
        self.poses.connect(outputs)

    def disconnect(self) -> None:
        """The node has neither session nor outputs any more."""
        self._session = None
        self.poses.connect(None)

    def start(self, config: NodeConfig) -> None:
        """Listen to TF, IMU and initial poses."""
        self.frames.config = config
        self.map_start.start()
        create = self._host.node.create_subscription
        self._handles = [
            create(Imu, 'imu', self._take_imu, qos_profile_sensor_data),
            create(PoseWithCovarianceStamped, 'initialpose', self._take_initial_pose, 10)]
        self.listener.start()
        self._timer = self._host.node.create_timer(1 / config.tf_rate_hz, self._tick,
                                                   clock=STEADY)

    def configure(self, config: NodeConfig) -> None:
        """Take over settings that changed while running."""
        self.frames.config = config
        if self._timer is not None:
            self._timer.timer_period_ns = int(1e9 / config.tf_rate_hz)

    def stop(self) -> None:
        """Stop listening; what was sent as correction is not sent again."""
        while self._handles:
            self._host.node.destroy_subscription(self._handles.pop())
        self.listener.stop()
        if self._timer is not None:
            self._host.node.destroy_timer(self._timer)
            self._timer = None
        self.frames.forget()
        self.poses.forget()

    def jumped(self, stamp: int) -> None:
        """Stamps jumped back to this one [ns]: poses of frames are void, the tree stays."""
        self.frames.buffer.jumped(stamp)
        self.poses.forget()

    def new_map(self) -> None:
        """Another map: its unit and its place are not yet known."""
        self.poses.forget()
        self.map_start.new_map()
        self._scale.new_map()

    def _tick(self) -> None:
        """Timer: poses that waited, and the correction again."""
        self.poses.flush()
        self.poses.send_again()

    # -- messages --------------------------------------------------------------------------

    def take_odometry(self, message: Odometry) -> None:
        """Odometry is one more edge of the tree."""
        config = self.frames.config
        try:
            self.frames.take_odometry(message.header.frame_id or config.odom_frame,
                                      message.child_frame_id or config.base_frame,
                                      matrix_from_pose(message.pose.pose),
                                      stamp_ns(message.header))
        except InputError as error:
            self._host.notice('ODOMETRY_REFUSED', str(error))
        self.poses.flush()

    def _take_imu(self, message: Imu) -> None:
        force = message.linear_acceleration
        self.frames.add_acceleration(message.header.frame_id,
                                     np.array([force.x, force.y, force.z]))

    def _take_initial_pose(self, message: PoseWithCovarianceStamped) -> None:
        host, map_frame = self._host, self.frames.config.map_frame
        if message.header.frame_id not in ('', map_frame):
            host.notice('INITIALPOSE_FRAME', f'expected an initialpose in {map_frame}, found one '
                        f'in {message.header.frame_id}; it is not used')
            return
        if self._session is None:
            return
        try:
            T_map_cam = self.frames.camera_pose(
                matrix_from_pose(message.pose.pose), self.map_start.camera_frame,
                stamp_ns(message.header), self.metres_per_unit)
        except InputError as error:
            host.notice('INITIALPOSE_REFUSED', f'the initialpose was not used: {error}')
            return
        self._session.change(lambda session: session.hint(T_map_cam))
        host.log.info('initialpose: looking there first')

    def _scale_found(self, metres_per_unit: float, uncertainty: float) -> None:
        if self._session is None or self._host.health.scale_source.startswith('odom'):
            return
        self._host.log.info(f'scale from odometry: {metres_per_unit:.4g} m per unit, '
                            f'uncertain by {100 * uncertainty:.1f} %')
        self._session.change(lambda session: session.set_odometry_scale(metres_per_unit))

    # -- what others ask -------------------------------------------------------------------

    def body_path(self, keyframes: Trajectory, camera_frame: str,
                  metres_per_unit: float | None) -> Trajectory:
        """Keyframes as poses of the robot, in metres where the scale is known."""
        if not len(keyframes):
            return keyframes
        newest = int(keyframes.stamps_ns[-1])
        T_body_cam = self.frames.body_of_camera(camera_frame, newest)
        metric = keyframes.transformed(np.eye(4), metres_per_unit or 1.0)
        return Trajectory(metric.stamps_ns, metric.T_map_cam @ inverse(T_body_cam))

    def tf_state(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """The TF mode in force, and pairs of frames that it needs and TF does not connect."""
        camera_frame = self.map_start.camera_frame
        if not camera_frame:
            return self.frames.config.tf_mode, ()
        return self.frames.mode(camera_frame), self.frames.missing(camera_frame)
