"""What a node listens to: from sensor messages to frames that may be used.

Every sensor input takes the reliability of its publishers: a best-effort subscriber would match
all of them, but loses large images between processes (docs/ros.md). Images are taken raw or
compressed, as they are published. Messages are only looked at here; decoding is the worker's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.ros.convert import camera_from_info, stamp_ns
from feedforward_recon.ros.events import subscription_events
from feedforward_recon.ros.health import (
    SECOND,
    Health,
    InfoState,
    InputHealth,
    Publisher,
    StampFault,
    info_state,
)
from feedforward_recon.ros.milestones import about_camera
from feedforward_recon.ros.sources import Choice, Source, first_message, transports

WAITING_IMAGES = 8
PATIENT = 64  # where nothing may be lost and nobody waits for a pose
DEFAULT_FRAME = 'camera_optical_frame'
REFUSED = (StampFault.ZERO, StampFault.EQUAL, StampFault.REVERSED)


@dataclass(frozen=True)
class Arrival:
    """An image that may be used, with what belongs to it.

    camera: None while there is no calibration. frame_id: optical frame of the camera.
    arrived_ns: steady clock when the image came.
    """

    stamp_ns: int
    frame_id: str
    image: Image | CompressedImage
    depth: Image | CompressedImage | None
    camera: Camera | None
    arrived_ns: int


class DepthPairing:
    """Brings images and depth of one moment together; both must come in order.

    Images wait for their depth until a later depth image shows that there is none, and never
    more than ``patience`` of them. Each depth image serves one image, the nearest that waits:
    frames may follow each other faster than the slop. Stamps are nanoseconds.
    """

    def __init__(self, slop_ns: int, patience: int = WAITING_IMAGES) -> None:
        self.slop_ns, self.patience = slop_ns, patience
        self._images: deque[tuple[int, Any]] = deque()
        self._depths: deque[tuple[int, Any]] = deque(maxlen=patience)

    def forget_after(self, stamp: int) -> None:
        """The time line went back to a stamp: what waits with later ones is of the past."""
        for waiting in (self._images, self._depths):
            kept = [entry for entry in waiting if entry[0] <= stamp]
            waiting.clear()
            waiting.extend(kept)

    def add_image(self, stamp: int, image: Any) -> list[tuple[Any, Any | None]]:
        """Take an image; returns what is ready, as (image, depth or None)."""
        self._images.append((stamp, image))
        return self._ready()

    def add_depth(self, stamp: int, depth: Any) -> list[tuple[Any, Any | None]]:
        """Take a depth image; returns what is ready, as (image, depth or None)."""
        self._depths.append((stamp, depth))
        return self._ready()

    def _ready(self) -> list[tuple[Any, Any | None]]:
        ready = []
        while self._images:
            stamp, image = self._images[0]
            near = self._nearest(stamp)
            if near is not None:
                ready.append((image, near[1]))
                while self._depths.popleft() is not near:
                    pass
            elif len(self._images) > self.patience \
                    or (self._depths and self._depths[-1][0] > stamp + self.slop_ns):
                ready.append((image, None))
            else:
                break
            self._images.popleft()
        return ready

    def _nearest(self, stamp: int) -> tuple[int, Any] | None:
        """The depth for the oldest image, unless a younger one has the better claim to it."""
        near = min(self._depths, key=lambda depth: abs(depth[0] - stamp), default=None)
        if near is None:
            return None
        gap_ns = min(abs(near[0] - waiting) for waiting, _ in self._images)
        return near if abs(near[0] - stamp) == gap_ns <= self.slop_ns else None


class Inputs:
    """Subscriptions of a node while it is active.

    on_frame: gets each usable image. on_jump: the stamps went back, to this one. on_calibration:
    the camera is known, or known differently. on_odometry: gets every Odometry message.
    """

    def __init__(self, node: Node, config: NodeConfig, health: Health, *,
                 on_frame: Callable[[Arrival], None], on_jump: Callable[[int], None],
                 on_calibration: Callable[[Camera], None],
                 on_odometry: Callable[[Odometry], None]) -> None:
        self._node, self._config, self._health = node, config, health
        self._on_frame, self._on_jump = on_frame, on_jump
        self._on_calibration, self._on_odometry = on_calibration, on_odometry
        self._pairing = DepthPairing(int(config.depth_slop_ms * 1e6),
                                     PATIENT if config.queue == 'offline' else WAITING_IMAGES)
        self._held: deque[tuple[Any, Any | None, int]] = deque(maxlen=WAITING_IMAGES)
        self._cameras: dict[str, Camera] = {}
        self._subscriptions: dict[str, Any] = {}
        self._depth_paired = False  # some image had depth of its moment
        self._began_ns: int | None = None  # steady clock when images came, or came again
        self._choices = {kind: Choice(sources) for kind, sources in self._wanted().items()}
        self._latched = False  # how CameraInfo is subscribed to
        health.camera_info, health.info_wh = InfoState.UNKNOWN, None
        health.inputs.clear()
        for kind, choice in self._choices.items():
            topic = choice.chosen.topic
            health.inputs[kind] = InputHealth(topic, kind, needed=kind == 'image',
                                              reliable=self._reliable(topic))
            self._subscribe(kind)

    def _now_ns(self) -> int:
        return self._node.get_clock().now().nanoseconds

    def configure(self, config: NodeConfig) -> None:
        """Take over settings that changed while running."""
        self._config = config
        self._pairing.slop_ns = int(config.depth_slop_ms * 1e6)

    # -- subscriptions ---------------------------------------------------------------------

    def _wanted(self) -> dict[str, list[Source]]:
        """Kind -> what it may be read from, best first."""
        config = self._config
        # Remapping first: a rule for `image` has to hold for `image/compressed` as well.
        topic = {name: self._node.resolve_topic_name(name)
                 for name in ('image', 'camera_info', 'depth', 'odom')}
        wanted = {'image': transports(topic['image'], '/compressed', config.image_transport),
                  'camera_info': [Source(topic['camera_info'], CameraInfo)],
                  'odom': [Source(topic['odom'], Odometry)]}
        if config.use_depth:
            wanted['depth'] = transports(topic['depth'], '/compressedDepth',
                                         config.depth_transport)
        return wanted

    def _reliable(self, topic: str) -> bool:
        if self._config.image_qos != 'auto':
            return self._config.image_qos == 'reliable'
        publishers = self._node.get_publishers_info_by_topic(topic)
        return bool(publishers) and all(
            p.qos_profile.reliability == ReliabilityPolicy.RELIABLE for p in publishers)

    def _subscribe(self, kind: str) -> None:
        source, input_ = self._choices[kind].chosen, self._health.inputs[kind]
        everything = self._config.queue == 'offline' and input_.reliable
        latched = kind == 'camera_info' and self._latched
        qos = QoSProfile(
            history=HistoryPolicy.KEEP_ALL if everything else HistoryPolicy.KEEP_LAST, depth=10,
            reliability=ReliabilityPolicy.RELIABLE if input_.reliable
            else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE)
        handler = {'image': self._image, 'camera_info': self._info, 'depth': self._depth,
                   'odom': self._odometry}[kind]
        self._subscriptions[kind] = self._node.create_subscription(
            source.type, source.topic, handler, qos,
            event_callbacks=subscription_events(
                lambda total: input_.lost_total(total, self._now_ns()),
                lambda total: setattr(input_, 'unmatched', total)))

    def watch(self) -> None:
        """Look at who publishes; subscribe anew where topic or QoS have to change."""
        for kind, input_ in self._health.inputs.items():
            self._choose(kind)
            found = self._node.get_publishers_info_by_topic(input_.topic)
            input_.published(tuple(
                Publisher(p.node_name, p.qos_profile.reliability == ReliabilityPolicy.RELIABLE)
                for p in found), self._now_ns())
            reliable = self._reliable(input_.topic)
            if found and reliable != input_.reliable:
                self._node.get_logger().info(
                    f'{input_.topic}: subscribing as {"reliable" if reliable else "best effort"}'
                    ', like its publishers')
                self._subscribe_anew(kind, reliable)
            if kind == 'camera_info' and found:
                self._follow_durability(found)
            if not found and not input_.messages and input_.needed:
                input_.alternatives = self._alternatives()

    def _subscribe_anew(self, kind: str, reliable: bool) -> None:
        self._node.destroy_subscription(self._subscriptions.pop(kind))
        self._health.inputs[kind].resubscribed(reliable)
        self._subscribe(kind)

    def _choose(self, kind: str) -> None:
        """Read an input from where it is published, raw before compressed."""
        choice, input_ = self._choices[kind], self._health.inputs[kind]
        if not choice.look(lambda source: source.is_published(self._node), time.monotonic()):
            return
        chosen, raw = choice.chosen, choice.sources[0]
        input_.topic, input_.published_ns = chosen.topic, None
        why = '' if chosen == raw else f'; nobody publishes raw images on {raw.topic}'
        self._node.get_logger().info(
            f'{kind}: listening to {chosen.topic} ({chosen.type.__name__}){why}')
        self._subscribe_anew(kind, self._reliable(chosen.topic))

    def _follow_durability(self, publishers: list[Any]) -> None:
        """A calibration that was sent once, before we came, is only heard by latched listeners."""
        latched = all(p.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
                      for p in publishers)
        if latched != self._latched:
            self._latched = latched
            self._subscribe_anew('camera_info', self._health.inputs['camera_info'].reliable)

    def _alternatives(self) -> tuple[str, ...]:
        """Topics with images, raw or compressed, that somebody publishes."""
        names = {f'sensor_msgs/msg/{type_.__name__}' for type_ in (Image, CompressedImage)}
        return tuple(sorted(topic for topic, types in self._node.get_topic_names_and_types()
                            if names.intersection(types) and self._node.count_publishers(topic)
                            and not topic.endswith('/compressedDepth')))

    def stop(self) -> None:
        """Unsubscribe."""
        while self._subscriptions:
            self._node.destroy_subscription(self._subscriptions.popitem()[1])

    # -- messages --------------------------------------------------------------------------

    def _received(self, kind: str, message: Any) -> StampFault | None:
        size_wh = (message.width, message.height) if hasattr(message, 'width') else None
        nbytes = len(message.data) if hasattr(message, 'data') else 0
        if not self._health.inputs[kind].messages and kind in ('image', 'depth'):
            self._node.get_logger().info(
                first_message(kind, self._health.inputs[kind].topic, message))
        return self._health.inputs[kind].received(
            self._now_ns(), stamp_ns(message.header), size_wh=size_wh, nbytes=nbytes,
            frame_id=message.header.frame_id, jump_ns=int(self._config.jump_s * SECOND))

    def _image(self, message: Image | CompressedImage) -> None:
        began = not self._comes('image')
        fault = self._received('image', message)
        if fault is StampFault.JUMP_BACK:
            self._pairing.forget_after(stamp_ns(message.header))
            self._held.clear()
            self._on_jump(stamp_ns(message.header))
        if fault in REFUSED:
            return
        arrived_ns = time.monotonic_ns()
        self._began_ns = arrived_ns if began else self._began_ns
        if self._depth_is_expected():
            self._pass_on(self._pairing.add_image(stamp_ns(message.header),
                                                  (message, arrived_ns)))
        else:
            self._pass_on([((message, arrived_ns), None)])

    def _depth(self, message: Image | CompressedImage) -> None:
        fault = self._received('depth', message)
        if fault is StampFault.JUMP_BACK:
            self._pairing.forget_after(stamp_ns(message.header))
        if fault not in REFUSED:
            self._pass_on(self._pairing.add_depth(stamp_ns(message.header), message))

    def _depth_is_expected(self) -> bool:
        """Depth comes; or somebody publishes it, so that a map should wait a while for it."""
        depth = self._health.inputs.get('depth')
        if depth is None:
            return False
        if not self._comes('depth') and self._waited_s() >= self._config.silence_s:
            return False
        return bool(depth.messages or self._choices['depth'].any_published(self._node))

    def _first_depth_may_come(self) -> bool:
        """No image had depth yet, and a metric map has to start with one that has."""
        return not self._depth_paired and self._waited_s() < self._config.silence_s

    def _comes(self, kind: str) -> bool:
        """Something has arrived lately."""
        arrived_ns = self._health.inputs[kind].arrived_ns
        return arrived_ns is not None \
            and self._now_ns() - arrived_ns < self._config.silence_s * SECOND

    def _waited_s(self) -> float:
        """Steady seconds since images came, or came again after a silence.

        The driver may start long after the node, and start again: an image that arrives before
        its calibration or depth does not mean that there is none.
        """
        return 0.0 if self._began_ns is None else (time.monotonic_ns() - self._began_ns) / SECOND

    def _pass_on(self, pairs: list[tuple[Any, Any | None]]) -> None:
        for (image, arrived_ns), depth in pairs:
            self._depth_paired |= depth is not None
            if depth is None and self._depth_is_expected():
                self._notice('DEPTH_UNPAIRED', 'images come without depth of the same moment '
                             f'(within {self._config.depth_slop_ms:g} ms) and are used without; '
                             'synchronise the sensors or raise depth_slop_ms')
                if self._first_depth_may_come():
                    continue
            self._held.append((image, depth, arrived_ns))
        self._release()

    def _release(self) -> None:
        """Hand over the images whose calibration is known, or known to be missing."""
        while self._held:
            image, depth, arrived_ns = self._held[0]
            if self._info_may_come(image):
                return
            self._held.popleft()
            usable, camera = self._camera_of(image)
            if usable:
                frame_id = (self._config.camera_frame or image.header.frame_id
                            or DEFAULT_FRAME)
                self._on_frame(Arrival(stamp_ns(image.header), frame_id, image, depth, camera,
                                       arrived_ns))

    # -- calibration -----------------------------------------------------------------------

    def _info(self, message: CameraInfo) -> None:
        self._received('camera_info', message)
        try:
            camera = camera_from_info(message, self._config.rectified)
        except InputError as error:
            self._notice('INFO_BAD', str(error))
            return
        health = self._health
        health.info_wh = camera.size_wh if camera else (message.width, message.height)
        health.camera_info = InfoState.ZERO if camera is None else info_state(
            camera.K.ravel().tolist(), camera.size_wh, health.inputs['image'].size_wh)
        before = self._cameras.get(message.header.frame_id)
        if camera is not None and camera != before:
            self._cameras[message.header.frame_id] = camera
            if before is None or before.size_wh != camera.size_wh:  # an autofocus changes the rest
                self._node.get_logger().info(
                    f'{health.inputs["camera_info"].topic}: {about_camera(camera)}')
            self._on_calibration(camera)
        self._release()

    def camera(self, frame_id: str) -> Camera | None:
        """The calibration for images of a frame; the only one there is serves all."""
        if frame_id not in self._cameras and len(self._cameras) == 1:
            return next(iter(self._cameras.values()))
        return self._cameras.get(frame_id)

    def _info_may_come(self, image: Image | CompressedImage) -> bool:
        """No calibration yet, and we have not waited long for one."""
        return (self.camera(image.header.frame_id) is None
                and self._health.camera_info is InfoState.UNKNOWN
                and self._waited_s() < self._config.info_wait_s)

    def _camera_of(self, image: Image | CompressedImage) -> tuple[bool, Camera | None]:
        """May the image be used, and with which camera? None is guessed."""
        health, camera = self._health, self.camera(image.header.frame_id)
        if camera is None:
            if health.camera_info is InfoState.UNKNOWN:
                health.camera_info = InfoState.MISSING
            return True, None
        size_wh = (image.width, image.height) if hasattr(image, 'width') else camera.size_wh
        health.camera_info = info_state(camera.K.ravel().tolist(), camera.size_wh, size_wh)
        return health.camera_info is InfoState.GOOD, camera

    # -- odometry --------------------------------------------------------------------------

    def _odometry(self, message: Odometry) -> None:
        if self._received('odom', message) not in REFUSED:
            self._on_odometry(message)

    def _notice(self, code: str, sentence: str) -> None:
        self._health.warn(code, sentence, self._now_ns())
