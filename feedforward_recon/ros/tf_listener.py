"""Reads /tf and /tf_static: the tree of frames, and who else sends transforms below the map."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.qos import DurabilityPolicy, QoSProfile

from feedforward_recon.ros.frames import Frames
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.tf_messages import TFMessage
from feedforward_recon.ros.tf_sent import SentTransforms

HEARD_S = 10.0  # whoever sent a transform so recently is taken to send it still


class TfListener:
    """Feeds the buffer of ``frames`` from TF, without what this node sends itself.

    sent: the transforms of this node. on_heard: called after every message.
    """

    def __init__(self, host: Host, frames: Frames, sent: SentTransforms,
                 on_heard: Callable[[], None]) -> None:
        self._host, self._frames, self._sent, self._on_heard = host, frames, sent, on_heard
        self._handles: list[Any] = []
        self._others: dict[str, float] = {}  # child of the map by others -> heard until when [s]

    def start(self) -> None:
        """Subscribe, where tf2_msgs is installed."""
        if TFMessage is None:
            return
        create = self._host.node.create_subscription
        latched = QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._handles = [
            create(TFMessage, '/tf', lambda m: self.take(m.transforms), QoSProfile(depth=100)),
            create(TFMessage, '/tf_static', lambda m: self.take(m.transforms, True), latched)]

    def stop(self) -> None:
        """Unsubscribe; who else sends below the map is forgotten."""
        while self._handles:
            self._host.node.destroy_subscription(self._handles.pop())
        self._others.clear()

    def take(self, transforms: list[Any], static: bool = False) -> None:
        """Add transforms to the tree, but those below the map: this node decides about these."""
        kept = []
        for stamped in transforms:
            if stamped in self._sent:
                continue
            if stamped.header.frame_id.lstrip('/') != self._frames.config.map_frame:
                kept.append(stamped)
            else:
                until_s = np.inf if static else time.monotonic() + HEARD_S
                self._others[stamped.child_frame_id.lstrip('/')] = until_s
        for sentence in self._frames.buffer.take(kept, static):
            self._host.notice('TF_REFUSED', sentence)
        self._on_heard()

    def others_send(self, child: str) -> bool:
        """Somebody else lately sent the transform from the map to this frame."""
        return self._others.get(child, 0.0) > time.monotonic()
