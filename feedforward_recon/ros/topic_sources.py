"""Which topic an input is read from: raw or compressed, whichever is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rclpy.node import Node
from sensor_msgs.msg import CompressedImage, Image

ALONE_S = 0.4  # compressed images are taken once nobody has published raw ones for this long


@dataclass(frozen=True)
class TopicSource:
    """A topic that an input may be read from, and the type of its messages."""

    topic: str
    type: type

    def is_published(self, node: Node) -> bool:
        """Somebody publishes images of this type on this topic."""
        name = f'sensor_msgs/msg/{self.type.__name__}'
        return any(endpoint.topic_type == name
                   for endpoint in node.get_publishers_info_by_topic(self.topic))


def transports(topic: str, ending: str, setting: str) -> list[TopicSource]:
    """What images may be read from, best first: raw, or compressed beside the topic or on it."""
    raw, beside = TopicSource(topic, Image), TopicSource(topic + ending, CompressedImage)
    return {'raw': [raw], 'compressed': [beside],
            'auto': [raw, beside, TopicSource(topic, CompressedImage)]}[setting]


class TopicChoice:
    """Chooses the source of one input: the first of ``sources`` that somebody publishes.

    The first of all is taken at once, another only after it was the best for ALONE_S: a driver
    does not advertise all of its topics at the same time.
    """

    def __init__(self, sources: Sequence[TopicSource]) -> None:
        self.sources = sources
        self.chosen = sources[0]
        self._since_s: float | None = None  # since when a source that is not chosen is the best

    def look(self, is_published: Callable[[TopicSource], bool], now_s: float) -> bool:
        """Choose again; True when another source is chosen. now_s: seconds of a steady clock."""
        if len(self.sources) == 1:
            return False
        best = next(filter(is_published, self.sources), self.chosen)
        if best == self.chosen:
            self._since_s = None
            return False
        self._since_s = now_s if self._since_s is None else self._since_s
        if best != self.sources[0] and now_s - self._since_s < ALONE_S:
            return False
        self.chosen, self._since_s = best, None
        return True

    def any_published(self, node: Node) -> bool:
        """Somebody publishes one of the sources."""
        return any(source.is_published(node) for source in self.sources)


def first_message(kind: str, topic: str, message: Any) -> str:
    """The first image or depth image of a topic, in one line."""
    if isinstance(message, CompressedImage):
        return f'first {kind} on {topic}: {message.format}'
    return f'first {kind} on {topic}: {message.width}x{message.height} {message.encoding}'
