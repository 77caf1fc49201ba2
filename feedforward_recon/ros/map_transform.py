"""The transforms that this node sends: one below the map, and a body where TF has none."""

from __future__ import annotations

import time

from geometry_msgs.msg import TransformStamped

from feedforward_recon.ros.convert import transform_msg
from feedforward_recon.ros.frames import BodyPose, Frames
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.tf_listener import TfListener


class MapTransform:
    """What to send on TF for measured poses; nothing that would give a frame two parents.

    ``map -> odom`` is sent again on a timer, dated into the future by a tolerance, because a
    correction holds on. Without odometry only what was measured is sent, at the image's stamp.
    """

    def __init__(self, host: Host, frames: Frames, listener: TfListener) -> None:
        self._host, self._frames, self._listener = host, frames, listener
        self._correction: BodyPose | None = None
        self._corrected_s = 0.0  # steady clock

    def forget(self) -> None:
        """What was sent so far is not sent again."""
        self._correction = None

    def of_pose(self, body: BodyPose, camera_frame: str) -> list[TransformStamped]:
        """The transforms of a measured pose, as far as TF has a place for them."""
        own = [t for t in _named_body(body, camera_frame)
               if self._may_send(camera_frame, t.child_frame_id)]
        self._correction = None
        if self._may_send(self._frames.config.map_frame, body.child_frame):
            self._correction, self._corrected_s = body, time.monotonic()
            own.insert(0, self._below_map(body, body.stamp_ns))
            self._look_for_others(body.child_frame, camera_frame)
        return own

    def again(self) -> list[TransformStamped]:
        """The correction of odometry once more, while its last pose is not too old."""
        config, body = self._frames.config, self._correction
        if body is None or body.child_frame != config.odom_frame:
            return []
        age_s = time.monotonic() - self._corrected_s
        if (config.pose_timeout_s and age_s >= config.pose_timeout_s) \
                or not self._may_send(config.map_frame, body.child_frame):
            return []
        return [self._below_map(body, self._host.now_ns() + int(config.tf_tolerance_s * 1e9))]

    def _may_send(self, parent: str, child: str) -> bool:
        """TF has no other parent for the child."""
        conflict, loop = self._frames.conflict(parent, child), self._frames.loop(parent, child)
        self._host.notice('TWO_PARENTS', conflict)
        self._host.notice('TF_REFUSED', loop)
        return not (conflict or loop)

    def _look_for_others(self, child: str, camera_frame: str) -> None:
        """Warn where somebody else places below the map what this node places there."""
        map_frame = self._frames.config.map_frame
        for frame in {child, *self._frames.buffer.ancestry(camera_frame)}:
            if self._listener.others_send(frame):
                self._host.notice(
                    'TWO_PUBLISHERS', f'somebody else sends {map_frame} -> {frame}, and this node '
                    f'sends {map_frame} -> {child}, so the robot jumps between two places; stop '
                    'the other one (AMCL, slam_toolbox, a second node, a bag with recorded TF, a '
                    'static_transform_publisher), or set tf_mode to none')

    def _below_map(self, body: BodyPose, stamp_ns: int) -> TransformStamped:
        return transform_msg(body.T_map_child, self._frames.config.map_frame, body.child_frame,
                             stamp_ns)


def _named_body(body: BodyPose, camera_frame: str) -> list[TransformStamped]:
    """The body frame that this node names below the camera where TF has no base."""
    if body.from_tf or not body.child_frame:
        return []
    return [transform_msg(body.T_cam_body, camera_frame, body.body_frame, body.stamp_ns)]
