"""A camera driver as tests need it: publishes rendered frames, rightly or wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import Trigger

from feedforward_recon.geometry.align import align_points
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.ros.convert import depth_msg, image_msg, info_msg
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame

CAMERA = Camera.from_fov(70.0, (320, 240))
FPS = 10.0
OPTICAL = 'camera_optical_frame'
START_NS = 1_700_000_000_000_000_000


@lru_cache
def _film(seed: int, every: int) -> tuple[list[Frame], Iterator[Frame]]:
    """Frames of a walk that were rendered so far, and those that were not."""
    room = Room.generate(seed)
    steps = room.walk(240, seed=0, fps=FPS)[::every]
    return [], render_walk(room, CAMERA, steps, fps=FPS / every, noise=1.0, seed=1)


def walk(seed: int = 5, poses: int = 60, *, every: int = 1) -> list[Frame]:
    """Frames of a room with depth and exact poses, stamped like a clock of today."""
    rendered, rest = _film(seed, every)
    rendered += islice(rest, max(0, -(-poses // every) - len(rendered)))
    return [replace(frame, stamp_ns=START_NS + frame.stamp_ns)
            for frame in rendered[:-(-poses // every)]]


class FakeCamera:
    """Publishes frames one at a time and waits until each was answered.

    depth, info: also publish those. change: last touch on (image, info) messages.
    """

    def __init__(self, probe: Any, namespace: str = '', *, depth: bool = True, info: bool = True,
                 reliable: bool = True, frame_id: str = OPTICAL) -> None:
        """Advertise the topics."""
        self.probe, self.frame_id = probe, frame_id
        name = f'{namespace}/' if namespace else '/'
        self.namespace = name
        self.image = probe.publisher(Image, f'{name}image', reliable=reliable)
        self.depth = probe.publisher(Image, f'{name}depth', reliable=reliable) if depth else None
        self.info = probe.publisher(CameraInfo, f'{name}camera_info', reliable=reliable) \
            if info else None

    def topics(self) -> dict[str, Any]:
        """What is published, by the name that the node has for it."""
        topics = {'image': self.image, 'depth': self.depth, 'camera_info': self.info}
        return {kind: topic for kind, topic in topics.items() if topic is not None}

    def ready(self, timeout_s: float = 20.0) -> bool:
        """True once a node listens to everything that is published, as it is published."""
        return self.probe.spin_until(lambda: all(map(self._is_heard, self.topics().values())),
                                     timeout_s)

    def heard(self) -> bool:
        """True once the node has counted a message of every kind and knows who listens to it.

        A matched publisher may still lose its first messages: black frames of the past go first.
        """
        if not self.ready():
            return False
        node, black = self.probe.publisher_of(f'{self.namespace}pose'), self.black()
        for number in range(40):
            self.send(replace(black, stamp_ns=black.stamp_ns + number * 10**7))
            if self.probe.spin_until(lambda: self._has_counted(node), 0.5):
                return self.probe.is_known_to(node)
        return False

    def black(self) -> Frame:
        """A frame of two seconds before the others that shows nothing."""
        return Frame(START_NS - 2 * 10**9, np.zeros((240, 320, 3), np.uint8),
                     np.zeros((240, 320), np.float32), CAMERA)

    def _has_counted(self, node: str) -> bool:
        """The node tells of messages of every kind."""
        inputs = json.loads(self.probe.ask(Trigger, f'{node}/doctor').message)['inputs']
        return all(inputs[kind]['messages'] for kind in self.topics())

    def _is_heard(self, publisher: Any) -> bool:
        listeners = self.probe.node.get_subscriptions_info_by_topic(publisher.topic_name)
        wanted = publisher.qos_profile.reliability
        return publisher.get_subscription_count() > 0 and bool(listeners) and all(
            listener.qos_profile.reliability == wanted for listener in listeners)

    def send(self, frame: Frame, change: Callable[[Any], Any] | None = None) -> None:
        """Publish one frame: calibration, depth, image."""
        if self.info is not None:
            self.info.publish(info_msg(frame.camera, self.frame_id, frame.stamp_ns))
        if self.depth is not None:
            self.depth.publish(depth_msg(frame.depth, self.frame_id, frame.stamp_ns))
        image = image_msg(frame.image, self.frame_id, frame.stamp_ns)
        self.image.publish(change(image) if change else image)

    def play(self, frames: list[Frame], poses: list[Any], *, timeout_s: float = 3.0) -> int:
        """Send frames, each after the last one's pose came; returns how many had a pose."""
        answered = 0
        for frame in frames:
            before = len(poses)
            self.send(frame)
            answered += self.probe.spin_until(
                lambda before=before: len(poses) > before, timeout_s)
        return answered


def positions(messages: list[Any]) -> np.ndarray:
    """Positions [N, 3] of PoseWithCovarianceStamped messages."""
    points = [message.pose.pose.position for message in messages]
    return np.array([[p.x, p.y, p.z] for p in points])


def position_error_m(messages: list[Any], frames: list[Frame]) -> float:
    """RMS distance of poses and true positions of frames after one rotation and shift."""
    true = {f.stamp_ns: f.T_map_cam[:3, 3] for f in frames if f.T_map_cam is not None}
    return align_points(positions(messages), np.array([true[s] for s in stamps(messages)]),
                        with_scale=False).rmse


def stamps(messages: list[Any]) -> list[int]:
    """Header stamps, nanoseconds."""
    return [m.header.stamp.sec * 1_000_000_000 + m.header.stamp.nanosec for m in messages]
