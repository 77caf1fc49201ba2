"""Publishes measured poses as soon as TF knows their frames.

A pose waits, bounded in time and number, until TF knows the frames at the stamp of its image;
then it is published without a transform.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from geometry_msgs.msg import TransformStamped

from feedforward_recon.errors import InputError
from feedforward_recon.ros.arrivals import Arrival
from feedforward_recon.ros.frames import BodyPose, Frames
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.map_scale import MapScale
from feedforward_recon.ros.map_start import MapStart
from feedforward_recon.ros.map_transform import MapTransform
from feedforward_recon.ros.outputs import PoseOutputs
from feedforward_recon.ros.tf_buffer import TransformError
from feedforward_recon.ros.tf_sent import SentTransforms
from feedforward_recon.session.live import SessionInfo
from feedforward_recon.types import Estimate

WAITING_POSES = 64


@dataclass(frozen=True)
class _WaitingPose:
    """A measured pose that waits for TF until a moment of the steady clock."""

    arrival: Arrival
    estimate: Estimate
    info: SessionInfo
    until_s: float


class PosePublisher:
    """Turns poses of the camera into poses of the robot and publishes them, with transforms.

    Silent until it is connected to the outputs of a configured node.
    """

    def __init__(self, host: Host, frames: Frames, start: MapStart, scale: MapScale,
                 transform: MapTransform, sent: SentTransforms) -> None:
        self._host, self._frames, self._start = host, frames, start
        self._scale, self._transform, self._sent = scale, transform, sent
        self._outputs: PoseOutputs | None = None
        self._waiting: deque[_WaitingPose] = deque()

    def connect(self, outputs: PoseOutputs | None) -> None:
        """Publish there from now on; None publishes nothing."""
        self._outputs = outputs

    def forget(self) -> None:
        """Poses that wait are not published, and no transform is sent again."""
        self._waiting.clear()
        self._transform.forget()

    def measured(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> None:
        """Publish a measured pose as soon as TF knows its frames."""
        until_s = time.monotonic() + self._frames.config.tf_wait_s
        self._waiting.append(_WaitingPose(arrival, estimate, info, until_s))
        self.flush()

    def flush(self) -> None:
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

    def send_again(self) -> None:
        """Send the correction of odometry once more, if there is one."""
        if self._outputs is not None:
            self._send(self._transform.again(), self._outputs)

    def body(self, arrival: Arrival, estimate: Estimate, info: SessionInfo) -> BodyPose:
        """The robot's pose for a camera's, with nothing for TF.

        Raises TransformError where TF does not know the mount of the camera at the stamp.
        """
        return self._body(arrival, estimate, self._scale.known(info), alone=True)

    def _joined(self, waiting: _WaitingPose) -> BodyPose:
        """The robot's pose with the transform to send; raises TransformError until TF knows."""
        arrival, estimate = waiting.arrival, waiting.estimate
        if self._start.tf_may_come(arrival.frame_id):
            raise TransformError('the robot is not on TF yet', 'missing')
        auto = self._frames.config.tf_mode == 'auto'
        if auto and not self._frames.knows_odometry(arrival.frame_id) \
                and self._start.odometry_is_announced():
            raise TransformError('expected odometry, because its topic has a publisher, found '
                                 'no message yet; check that the driver sends it', 'missing')
        metres = self._scale.measured(arrival, estimate, waiting.info)
        return self._body(arrival, estimate, metres)

    def _body(self, arrival: Arrival, estimate: Estimate, metres_per_unit: float | None, *,
              alone: bool = False) -> BodyPose:
        assert estimate.T_map_cam is not None and estimate.covariance is not None
        return self._frames.body_pose(estimate.T_map_cam, estimate.covariance, arrival.frame_id,
                                      arrival.stamp_ns, metres_per_unit, alone=alone)

    def _publish_alone(self, waiting: _WaitingPose, late: TransformError) -> None:
        """The pose of a robot whose odometry is late: nothing else may be above the robot."""
        try:
            body = self.body(waiting.arrival, waiting.estimate, waiting.info)
        except TransformError as error:
            self._host.notice('TF_LATE', f'a pose was not published: {error}')
            return
        self._host.notice('TF_LATE', f'a pose was published without a transform: {late}')
        self._publish(waiting.arrival, body)

    def _publish(self, arrival: Arrival, body: BodyPose) -> None:
        outputs = self._outputs
        if outputs is None:
            return
        try:
            outputs.pose(body)
            latency_ms = (time.monotonic_ns() - arrival.arrived_ns) / 1e6
            self._host.health.posed(latency_ms, self._host.now_ns())
            if body.child_frame and not self._scale.is_awaited(body.child_frame,
                                                               arrival.frame_id):
                self._send(self._transform.of_pose(body, arrival.frame_id), outputs)
        except InputError as error:
            self._host.notice('POSE_REFUSED', f'a pose was not published: {error}')

    def _send(self, transforms: list[TransformStamped], outputs: PoseOutputs) -> None:
        self._sent.add(transforms)  # before they come back on /tf
        outputs.transforms(transforms)
