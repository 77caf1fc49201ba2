"""`ros2 run feedforward_recon player_node`: plays recorded or rendered frames as a camera does.

A folder, a video, a bag or a synthetic room becomes images, camera_info and, where there are
any, depth, right images with their camera_info, and ground_truth, with equal stamps, on the
topics that the launch files listen to. It ends by itself with exit code 0.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from numpy.typing import NDArray
from rclpy.duration import Duration
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from feedforward_recon.errors import ReconError
from feedforward_recon.geometry.stereo import StereoRig
from feedforward_recon.io import encode
from feedforward_recon.ros import parameters
from feedforward_recon.ros.camera_topics import CAMERA_TOPICS
from feedforward_recon.ros.convert import (
    depth_msg,
    fill,
    header_msg,
    image_msg,
    info_msg,
    pose_msg,
    stamp_msg,
)
from feedforward_recon.ros.playback import PlayerConfig, Timeline, open_playback, rounds
from feedforward_recon.types import Frame

CLOCK_STEP_S = 0.02
ACK_TIMEOUT_S, ACK_STEP_S = 10.0, 0.5
QUEUE = 20
IN_FLIGHT_BYTES = 4 << 20  # fits the shared memory of config/fastdds.xml, with depth


class PlayerNode(Node):
    """A camera whose images were recorded."""

    def __init__(self) -> None:
        super().__init__('player_node')
        self.config = parameters.declare(self, PlayerConfig).config
        self._source = open_playback(self.config)
        self._spinner = SingleThreadedExecutor()
        self._spinner.add_node(self)
        self._topics = dict(self._advertise())
        self.get_logger().info(self._source.describe())
        if not self._source.calibrated:
            self.get_logger().warning('the source has no calibration: no camera_info is sent')

    def _advertise(self) -> Iterator[tuple[str, Publisher]]:
        """The topics that this source can fill."""
        reliability = (ReliabilityPolicy.RELIABLE if self.config.reliable
                       else ReliabilityPolicy.BEST_EFFORT)
        qos = QoSProfile(depth=QUEUE, reliability=reliability)
        compressed = self.config.image_transport == 'compressed'
        type_ = CompressedImage if compressed else Image
        image, depth, right = (self.resolve_topic_name(CAMERA_TOPICS[kind])
                               for kind in ('image', 'depth', 'right/image'))
        yield 'image', self.create_publisher(
            type_, f'{image}/compressed' if compressed else image, qos)
        if self._source.calibrated:
            yield 'camera_info', self.create_publisher(
                CameraInfo, CAMERA_TOPICS['camera_info'], qos)
        if self._source.has_depth:
            yield 'depth', self.create_publisher(
                type_, f'{depth}/compressedDepth' if compressed else depth, qos)
        if self._source.has_right:
            yield 'right', self.create_publisher(
                type_, f'{right}/compressed' if compressed else right, qos)
            yield 'right_info', self.create_publisher(
                CameraInfo, CAMERA_TOPICS['right/camera_info'], qos)
        if self._source.has_poses:
            yield 'ground_truth', self.create_publisher(PoseStamped, 'ground_truth', QUEUE)
        if self.config.publish_clock:
            yield 'clock', self.create_publisher(Clock, '/clock', QUEUE)

    def play(self) -> int:
        """Send every frame at its time; the number sent. Raises InputError for bad frames."""
        frames = rounds(self._source, self.config.loop)
        first = list(islice(frames, 1))  # may take seconds to make: not once somebody waits for it
        self._wait_for_subscribers()
        timeline = Timeline(self.config.rate)
        sent = 0
        for frame in chain(first, frames):
            self._wait(timeline, frame.stamp_ns)
            if not rclpy.ok():
                break
            self._send(frame)
            sent += 1
            if not self.config.rate:
                self._pace(sent, frame.image.nbytes)
        self._settle(tuple(self._topics))
        return sent

    # -- time ------------------------------------------------------------------------------

    def _wait_for_subscribers(self) -> None:
        """Until somebody listens to the images, and the last one who came is there for a while.

        A node is seen topic by topic, may subscribe anew once it knows how this side publishes,
        and learns of a match a little later than this side.
        """
        if not self.config.wait_for_subscribers:
            return
        listeners, since_s = self._listeners(), time.monotonic()
        while rclpy.ok() and (not self._topics['image'].get_subscription_count()
                              or time.monotonic() < since_s + self.config.start_delay_s):
            self._spinner.spin_once(timeout_sec=CLOCK_STEP_S)
            if (found := self._listeners()) != listeners:
                listeners, since_s = found, time.monotonic()

    def _listeners(self) -> list[tuple[int, set[bytes]]]:
        """The subscriptions to each topic: how many match, and which the graph shows."""
        return [(publisher.get_subscription_count(), {
            bytes(endpoint.endpoint_gid)
            for endpoint in self.get_subscriptions_info_by_topic(publisher.topic_name)})
            for publisher in self._topics.values()]

    def _wait(self, timeline: Timeline, stamp_ns: int) -> None:
        """Until the frame is due; simulated time goes on meanwhile."""
        due_s = timeline.due(stamp_ns, time.monotonic())
        while rclpy.ok() and (left_s := due_s - time.monotonic()) > 0:
            self._tell_time(stamp_ns - round(left_s * self.config.rate * 1e9))
            self._spin_until(time.monotonic() + min(left_s, CLOCK_STEP_S))
        self._tell_time(stamp_ns)

    def _spin_until(self, end_s: float) -> None:
        """Serve parameters and the like until a time of the steady clock."""
        while rclpy.ok() and (left_s := end_s - time.monotonic()) > 0:
            self._spinner.spin_once(timeout_sec=left_s)

    def _pace(self, sent: int, image_bytes: int) -> None:
        """At full speed: let subscribers catch up before a queue runs over.

        Not after each frame, because Fast DDS acknowledges what fits into one packet (small
        images, every camera_info) only with its periodic heartbeat, after up to 3 s.
        """
        if sent % min(max(IN_FLIGHT_BYTES // image_bytes, 1), QUEUE // 2) == 0:
            self._settle(('image', 'depth', 'right'))

    def _settle(self, names: tuple[str, ...]) -> None:
        """Until subscribers have everything that was sent reliably on these topics."""
        if not self.config.reliable or not rclpy.ok():
            return
        end_s = time.monotonic() + ACK_TIMEOUT_S
        for name, publisher in self._topics.items():
            # In short steps, because nothing interrupts the wait.
            while name in names and rclpy.ok() \
                    and not publisher.wait_for_all_acked(Duration(seconds=ACK_STEP_S)):
                if time.monotonic() > end_s:
                    self.get_logger().warning(
                        f'{name}: expected an acknowledgement within {ACK_TIMEOUT_S:g} s, found '
                        'none; a subscriber hangs or the network loses large messages')
                    return

    def _tell_time(self, ns: int) -> None:
        if 'clock' in self._topics:
            self._topics['clock'].publish(Clock(clock=stamp_msg(ns)))

    # -- messages --------------------------------------------------------------------------

    def _send(self, frame: Frame) -> None:
        """Everything that belongs to a frame; what the image needs goes first."""
        stamp_ns = frame.stamp_ns
        if self.config.stamps == 'now':
            stamp_ns = self.get_clock().now().nanoseconds
        rig = self._send_right(frame, stamp_ns)
        if frame.camera is not None and 'camera_info' in self._topics:
            self._topics['camera_info'].publish(info_msg(
                frame.camera, self.config.frame_id, stamp_ns,
                None if rig is None else rig.calibration(right=False)))
        if frame.depth is not None and 'depth' in self._topics:
            self._topics['depth'].publish(self._depth(frame.depth, stamp_ns))
        if frame.T_map_cam is not None and 'ground_truth' in self._topics:
            self._topics['ground_truth'].publish(PoseStamped(
                header=header_msg(self.config.world_frame, stamp_ns),
                pose=pose_msg(frame.T_map_cam)))
        self._topics['image'].publish(self._image(frame.image, stamp_ns))

    def _send_right(self, frame: Frame, stamp_ns: int) -> StereoRig | None:
        """The right half of a pair with its calibration; returns the pair's cameras, if any."""
        if frame.right is None or frame.camera is None or 'right' not in self._topics:
            return None
        rig = StereoRig(frame.camera, frame.right.camera, frame.right.T_left_right)
        self._topics['right_info'].publish(info_msg(
            rig.right, f'right_{self.config.frame_id}', stamp_ns, rig.calibration(right=True)))
        self._topics['right'].publish(self._image(frame.right.image, stamp_ns))
        return rig

    def _image(self, image: NDArray[np.uint8], stamp_ns: int) -> Image | CompressedImage:
        if self.config.image_transport == 'raw':
            return image_msg(image, self.config.frame_id, stamp_ns)
        return self._compressed(encode.JPEG_FORMAT, encode.jpeg(image), stamp_ns)

    def _depth(self, depth_m: NDArray[np.float32], stamp_ns: int) -> Image | CompressedImage:
        if self.config.image_transport == 'raw':
            return depth_msg(depth_m, self.config.frame_id, stamp_ns, self.config.depth_encoding)
        return self._compressed(encode.DEPTH_FORMAT, encode.compressed_depth(depth_m), stamp_ns)

    def _compressed(self, format_: str, content: NDArray[np.uint8], stamp_ns: int
                    ) -> CompressedImage:
        message = CompressedImage(header=header_msg(self.config.frame_id, stamp_ns),
                                  format=format_)
        fill(message.data, content)
        return message


def main() -> None:
    """Play the source that the parameters name, once or for ever."""
    rclpy.init()
    try:
        with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
            node = PlayerNode()
            node.get_logger().info(f'{node.play()} frames sent')
    except ReconError as error:
        raise SystemExit(f'player_node: {error}') from None
    finally:
        rclpy.try_shutdown()


if __name__ == '__main__':
    main()
