"""What a node listens to: from sensor messages to images that may be used.

Messages are only looked at here, on the executor's thread; decoding is the worker's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nav_msgs.msg import Odometry
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.ros.arrivals import DEFAULT_FRAME, Arrival
from feedforward_recon.ros.calibrations import Calibrations
from feedforward_recon.ros.convert import stamp_ns
from feedforward_recon.ros.depth_pairing import WAITING_IMAGES, DepthPairing
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.input_health import StampFault
from feedforward_recon.ros.meters import SECOND
from feedforward_recon.ros.milestones import about_camera
from feedforward_recon.ros.stereo import PairCalibration
from feedforward_recon.ros.subscriptions import SensorSubscriptions
from feedforward_recon.ros.topic_sources import first_message

WAITING_OFFLINE = 64  # images that may wait where none may be lost and no pose is urgent
REFUSED = (StampFault.ZERO, StampFault.EQUAL, StampFault.REVERSED)


def _slops(config: NodeConfig) -> dict[str, int]:
    """How far the stamps of an image and of its partner may be apart, ns."""
    return {'depth': int(config.depth_slop_ms * 1e6), 'right': int(config.stereo_slop_ms * 1e6)}


@dataclass(frozen=True)
class _Waiting:
    """An image that waits for its right one or for its calibration."""

    image: Any
    depth: Any | None
    arrived_ns: int


def _ignore(_: Any) -> None:
    """For handlers that are not given."""


@dataclass(frozen=True)
class InputHandlers:
    """Who gets what the inputs bring.

    on_frame: each usable image. on_jump: the stamp [ns] that the time line went back to.
    on_calibration: the camera is known, or known differently. on_odometry: every message.
    """

    on_frame: Callable[[Arrival], None]
    on_jump: Callable[[int], None] = _ignore
    on_calibration: Callable[[Camera], None] = _ignore
    on_odometry: Callable[[Odometry], None] = _ignore


class Inputs:
    """The inputs of an active node: images wait for depth, right image and calibration."""

    def __init__(self, node: Node, config: NodeConfig, health: Health, handlers: InputHandlers
                 ) -> None:
        self._node, self._config, self._health, self._handlers = node, config, health, handlers
        patience = WAITING_OFFLINE if config.queue == 'offline' else WAITING_IMAGES
        self._pairings = {kind: DepthPairing(slop_ns, patience)
                          for kind, slop_ns in _slops(config).items()}
        self._held: deque[tuple[_Waiting, Any | None]] = deque(maxlen=patience)
        self._calibrations = Calibrations(config, health)
        self._pair_calibration = PairCalibration(rectified=config.rectified)
        self._paired: set[str] = set()  # kinds of what some image had of its moment
        self._began_ns: int | None = None  # steady clock when images came, or came again
        self._subscriptions = SensorSubscriptions(
            node, config, health.inputs,
            {'image': self._image, 'camera_info': self._info, 'odom': self._odometry,
             'right_info': self._right_info,
             **{kind: partial(self._partner, kind) for kind in self._pairings}})

    def configure(self, config: NodeConfig) -> None:
        """Take over settings that changed while running."""
        self._config = config
        for kind, slop_ns in _slops(config).items():
            self._pairings[kind].slop_ns = slop_ns
        self._calibrations.configure(config)
        self._subscriptions.configure(config)

    def watch(self) -> None:
        """Look at who publishes; subscribe anew where topic or QoS have to change."""
        self._subscriptions.watch()

    def stop(self) -> None:
        """Unsubscribe."""
        self._subscriptions.stop()

    def camera(self, frame_id: str) -> Camera | None:
        """The calibration for images of a frame; the only one there is serves all."""
        return self._calibrations.camera(frame_id)

    # -- messages --------------------------------------------------------------------------

    def _received(self, kind: str, message: Any) -> StampFault | None:
        input_ = self._health.inputs[kind]
        size_wh = (message.width, message.height) if hasattr(message, 'width') else None
        nbytes = len(message.data) if hasattr(message, 'data') else 0
        if not input_.traffic.messages and kind in ('image', 'depth', 'right'):
            self._node.get_logger().info(first_message(kind, input_.topic, message))
        return input_.traffic.received(
            self._now_ns(), stamp_ns(message.header), size_wh=size_wh, nbytes=nbytes,
            frame_id=message.header.frame_id, jump_ns=int(self._config.jump_s * SECOND))

    def _image(self, message: Image | CompressedImage) -> None:
        began = not self._comes('image')
        fault, stamp = self._received('image', message), stamp_ns(message.header)
        if fault is StampFault.JUMP_BACK:
            for pairing in self._pairings.values():
                pairing.forget_after(stamp)
            self._held.clear()
            self._handlers.on_jump(stamp)
        if fault in REFUSED:
            return
        arrived_ns = time.monotonic_ns()
        self._began_ns = arrived_ns if began else self._began_ns
        if self._is_expected('depth'):
            self._pass_on(self._pairings['depth'].add_image(stamp, (message, arrived_ns)))
        else:
            self._pass_on([*self._pairings['depth'].give_up(), ((message, arrived_ns), None)])

    def _partner(self, kind: str, message: Image | CompressedImage) -> None:
        """A depth image, or a right image of a stereo pair."""
        fault, stamp = self._received(kind, message), stamp_ns(message.header)
        if fault is StampFault.JUMP_BACK:
            self._pairings[kind].forget_after(stamp)
        if fault not in REFUSED:
            ready = self._pairings[kind].add_depth(stamp, message)
            self._pass_on(ready) if kind == 'depth' else self._hold(ready)

    def _right_info(self, message: CameraInfo) -> None:
        self._received('right_info', message)
        self._pair_calibration.take_right(message)
        self._release()

    def _odometry(self, message: Odometry) -> None:
        if self._received('odom', message) not in REFUSED:
            self._handlers.on_odometry(message)

    def _info(self, message: CameraInfo) -> None:
        self._received('camera_info', message)
        self._pair_calibration.take_left(message)
        try:
            camera, before = self._calibrations.take(message)
        except InputError as error:
            self._notice('INFO_BAD', str(error))
            return
        if camera is not None and camera != before:
            # An autofocus changes the focal length all the time: only a new size is logged again.
            if before is None or before.size_wh != camera.size_wh:
                self._node.get_logger().info(
                    f'{self._health.inputs["camera_info"].topic}: {about_camera(camera)}')
            self._handlers.on_calibration(camera)
        self._release()

    # -- waiting for depth, right image and calibration ------------------------------------

    def _is_expected(self, kind: str) -> bool:
        """Depth or right images come; or somebody publishes them, so that a map should wait."""
        partner = self._health.inputs.get(kind)
        if partner is None:
            return False
        if not self._comes(kind) and self._waited_s() >= self._config.silence_s:
            return False
        return bool(partner.traffic.messages or self._subscriptions.is_published(kind))

    def _is_left_out(self, kind: str, partner: Any | None) -> bool:
        """An image without depth, or without its right one, that should not start a map.

        A metric map has to start with an image that has them, and none had so far.
        """
        if partner is not None:
            self._paired.add(kind)
        elif self._is_expected(kind):
            if kind == 'depth':
                self._notice('DEPTH_UNPAIRED', 'images come without depth of the same moment '
                             f'(within {self._config.depth_slop_ms:g} ms) and are used without; '
                             'synchronise the sensors or raise depth_slop_ms')
            else:
                self._notice('RIGHT_UNPAIRED', 'images come without a right image of the same '
                             f'moment (within {self._config.stereo_slop_ms:g} ms) and are used '
                             'without; synchronise the cameras or raise stereo_slop_ms')
            return kind not in self._paired and self._waited_s() < self._config.silence_s
        return False

    def _comes(self, kind: str) -> bool:
        """Something has arrived lately."""
        arrived_ns = self._health.inputs[kind].traffic.arrived_ns
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
            if self._is_left_out('depth', depth):
                continue
            waiting = _Waiting(image, depth, arrived_ns)
            if depth is None and self._is_expected('right'):
                self._hold(self._pairings['right'].add_image(stamp_ns(image.header), waiting))
            else:
                self._held.extend([*self._pairings['right'].give_up(), (waiting, None)])
        self._release()

    def _hold(self, pairs: list[tuple[_Waiting, Any | None]]) -> None:
        self._held.extend(pair for pair in pairs if not self._is_left_out('right', pair[1]))
        self._release()

    def _release(self) -> None:
        """Hand over the images whose calibration is known, or known to be missing."""
        while self._held:
            waiting, right = self._held[0]
            image, waited_s = waiting.image, self._waited_s()
            if self._calibrations.may_come(image, waited_s) or (
                    right is not None and not self._pair_calibration.is_complete
                    and waited_s < self._config.info_wait_s):
                return
            self._held.popleft()
            usable, camera = self._calibrations.camera_of(image)
            if usable:
                frame_id = (self._config.camera_frame or image.header.frame_id
                            or DEFAULT_FRAME)
                self._handlers.on_frame(Arrival(
                    stamp_ns(image.header), frame_id, image, waiting.depth, camera,
                    waiting.arrived_ns, self._pair_calibration.arrival(right)))
            if right is not None and self._pair_calibration.problem:
                self._notice('STEREO_CALIBRATION', 'right images are not used: '
                             f'{self._pair_calibration.problem}')

    def _notice(self, code: str, sentence: str) -> None:
        self._health.warn(code, sentence, self._now_ns())

    def _now_ns(self) -> int:
        return self._node.get_clock().now().nanoseconds
