"""Subscriptions to the camera and the odometry, with topic and QoS as they are published.

Every input takes the reliability of its publishers: a best-effort subscriber would match all of
them, but loses large images between processes (docs/ros.md). Images are taken raw or compressed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.ros.events import subscription_events
from feedforward_recon.ros.input_health import (
    CALIBRATIONS,
    Connection,
    InputHealth,
    Publisher,
)
from feedforward_recon.ros.topic_sources import TopicChoice, TopicSource, transports


class SensorSubscriptions:
    """The subscriptions of a node to its inputs; follows their publishers when asked to look.

    inputs: filled with the health of each input by kind: image, camera_info, odom and, where they
    are used, depth, right (image) and right_info. takers: kind -> what takes its messages.
    """

    def __init__(self, node: Node, config: NodeConfig, inputs: dict[str, InputHealth],
                 takers: Mapping[str, Callable[[Any], None]]) -> None:
        self._node, self._config = node, config
        self._inputs, self._takers = inputs, takers
        self._handles: dict[str, Any] = {}
        self._latched: set[str] = set()  # kinds of CameraInfo subscribed to as transient local
        self._choices = {kind: TopicChoice(sources) for kind, sources in self._sources().items()}
        inputs.clear()
        for kind, choice in self._choices.items():
            topic = choice.chosen.topic
            inputs[kind] = InputHealth(topic, kind, needed=kind == 'image',
                                       connection=Connection(reliable=self._reliable(topic)))
            self._subscribe(kind)

    def configure(self, config: NodeConfig) -> None:
        """Take over settings that changed while running."""
        self._config = config

    def stop(self) -> None:
        """Unsubscribe."""
        while self._handles:
            self._node.destroy_subscription(self._handles.popitem()[1])

    def is_published(self, kind: str) -> bool:
        """Somebody publishes one of the topics that an input may be read from."""
        return self._choices[kind].any_published(self._node)

    def _sources(self) -> dict[str, list[TopicSource]]:
        """Kind -> what it may be read from, best first."""
        config = self._config
        # Remapping first: a rule for `image` has to hold for `image/compressed` as well.
        topic = {name: self._node.resolve_topic_name(name)
                 for name in ('image', 'camera_info', 'depth', 'odom', 'right/image',
                              'right/camera_info')}
        sources = {'image': transports(topic['image'], '/compressed', config.image_transport),
                   'camera_info': [TopicSource(topic['camera_info'], CameraInfo)],
                   'odom': [TopicSource(topic['odom'], Odometry)]}
        if config.use_depth:
            sources['depth'] = transports(topic['depth'], '/compressedDepth',
                                          config.depth_transport)
        if config.use_stereo:
            sources['right'] = transports(topic['right/image'], '/compressed',
                                          config.image_transport)
            sources['right_info'] = [TopicSource(topic['right/camera_info'], CameraInfo)]
        return sources

    def _reliable(self, topic: str) -> bool:
        """How to ask for messages: like the publishers; before there are any, as is expected.

        Where nothing may be lost a sender finds its final subscriber: subscribing anew loses
        what is on its way.
        """
        if self._config.image_qos != 'auto':
            return self._config.image_qos == 'reliable'
        publishers = self._node.get_publishers_info_by_topic(topic)
        return all(map(_is_reliable, publishers)) if publishers \
            else self._config.queue == 'offline'

    def _subscribe(self, kind: str) -> None:
        source, connection = self._choices[kind].chosen, self._inputs[kind].connection
        everything = self._config.queue == 'offline' and connection.reliable
        latched = kind in self._latched
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_ALL if everything else HistoryPolicy.KEEP_LAST, depth=10,
            reliability=ReliabilityPolicy.RELIABLE if connection.reliable
            else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE)
        self._handles[kind] = self._node.create_subscription(
            source.type, source.topic, self._takers[kind], qos,
            event_callbacks=subscription_events(
                lambda total: connection.lost_total(total, self._now_ns()),
                lambda total: setattr(connection, 'unmatched', total)))

    def _subscribe_anew(self, kind: str, reliable: bool) -> None:
        self._node.destroy_subscription(self._handles.pop(kind))
        self._inputs[kind].connection.resubscribed(reliable)
        self._subscribe(kind)

    # -- following the publishers ----------------------------------------------------------

    def watch(self) -> None:
        """Look at who publishes; subscribe anew where topic or QoS have to change."""
        for kind, input_ in self._inputs.items():
            self._choose(kind)
            connection = input_.connection
            found = self._node.get_publishers_info_by_topic(input_.topic)
            connection.published(tuple(Publisher(p.node_name, _is_reliable(p)) for p in found),
                                 self._now_ns())
            reliable = self._reliable(input_.topic)
            if found and reliable != connection.reliable:
                self._node.get_logger().info(
                    f'{input_.topic}: subscribing as {"reliable" if reliable else "best effort"}'
                    ', like its publishers')
                self._subscribe_anew(kind, reliable)
            if kind in CALIBRATIONS and found:
                self._follow_durability(kind, found)
            if not found and not input_.traffic.messages and input_.needed:
                connection.alternatives = self._alternatives()

    def _choose(self, kind: str) -> None:
        """Read an input from where it is published, raw before compressed."""
        choice, input_ = self._choices[kind], self._inputs[kind]
        if not choice.look(lambda source: source.is_published(self._node), time.monotonic()):
            return
        chosen, raw = choice.chosen, choice.sources[0]
        input_.topic, input_.connection.published_ns = chosen.topic, None
        why = '' if chosen == raw else f'; nobody publishes raw images on {raw.topic}'
        self._node.get_logger().info(
            f'{kind}: listening to {chosen.topic} ({chosen.type.__name__}){why}')
        self._subscribe_anew(kind, self._reliable(chosen.topic))

    def _follow_durability(self, kind: str, publishers: list[Any]) -> None:
        """A calibration that was sent once, before we came, only reaches latched subscribers."""
        latched = all(p.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
                      for p in publishers)
        if latched != (kind in self._latched):
            self._latched ^= {kind}
            self._subscribe_anew(kind, self._inputs[kind].connection.reliable)

    def _alternatives(self) -> tuple[str, ...]:
        """Topics with images, raw or compressed, that somebody publishes."""
        names = {f'sensor_msgs/msg/{type_.__name__}' for type_ in (Image, CompressedImage)}
        return tuple(sorted(topic for topic, types in self._node.get_topic_names_and_types()
                            if names.intersection(types) and self._node.count_publishers(topic)
                            and not topic.endswith('/compressedDepth')))

    def _now_ns(self) -> int:
        return self._node.get_clock().now().nanoseconds


def _is_reliable(endpoint: Any) -> bool:
    return endpoint.qos_profile.reliability == ReliabilityPolicy.RELIABLE
