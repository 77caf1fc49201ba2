"""The start of a map: how long images wait for TF, and the pose of the first one."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from feedforward_recon.ros.arrivals import Arrival
from feedforward_recon.ros.frames import Frames
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.tf_messages import TFMessage


class FirstPose(NamedTuple):
    """T_map_cam [4, 4] of an image, should it start the map.

    up_source: what the vertical was taken from, see ``Frames.first_pose``.
    """

    T_map_cam: np.ndarray
    up_source: str


class MapStart:
    """Decides when images may be used, and the pose that the first keyframe would get.

    camera_frame: optical frame of the newest image, '' before the first.
    """

    def __init__(self, host: Host, frames: Frames) -> None:
        self._host, self._frames = host, frames
        self.camera_frame = ''
        self._first_image_s: float | None = None  # steady clock, since the node is active
        self._map_began = False

    def start(self) -> None:
        """The node became active: images wait for TF again."""
        self._first_image_s = None

    def new_map(self) -> None:
        """Another map; the axes of one that is gone on with are fixed already."""
        self._map_began = self._host.health.keyframes > 0

    def first_pose(self, arrival: Arrival) -> FirstPose | None:
        """The pose of this image if it should start the map; None to leave the image out.

        Images are left out while TF may still connect the camera and there is no map. Where there
        is one they come with a pose all the same: a late calibration may end that map on the
        worker at any moment.
        """
        self.camera_frame = arrival.frame_id
        if self._first_image_s is None:
            self._first_image_s = time.monotonic()
        if not self._host.health.keyframes and self.tf_may_come(arrival.frame_id):
            return None
        return FirstPose(*self._frames.first_pose(arrival.frame_id, arrival.stamp_ns,
                                                  arrival.depth is not None
                                                  or arrival.right is not None))

    def map_has(self, first: FirstPose) -> None:
        """The map has a keyframe since this image: log once what the vertical was taken from."""
        if not self._map_began:
            self._map_began = True
            self._host.log.info(f'the map is upright by: {first.up_source}')

    def tf_may_come(self, camera_frame: str) -> bool:
        """Robot or odometry may still appear on TF: they have a publisher, and tf_wait_s runs."""
        frames = self._frames
        if self._first_image_s is None \
                or time.monotonic() - self._first_image_s > frames.config.tf_wait_s:
            return False
        moving = self._publishers('/tf') - (TFMessage is not None)  # without this node
        return (not frames.knows_base(camera_frame)
                and moving + self._publishers('/tf_static') > 0) \
            or (not frames.knows_odometry(camera_frame) and moving + self._publishers('odom') > 0)

    def odometry_is_announced(self) -> bool:
        """An odometry topic has a publisher that has sent nothing yet."""
        odom = self._host.health.inputs.get('odom')
        return odom is not None and bool(odom.connection.publishers) and not odom.traffic.messages

    def _publishers(self, topic: str) -> int:
        node = self._host.node
        return node.count_publishers(node.resolve_topic_name(topic))
