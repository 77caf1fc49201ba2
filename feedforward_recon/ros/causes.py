"""Why a node has no pose: the likely causes, most likely first, one clear sentence each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from feedforward_recon.mapping.preparation import WRONG_UNIT
from feedforward_recon.ros.health import (
    RECENT_NS,
    SECOND,
    Health,
    InfoState,
    InputHealth,
    StampFault,
)

OFFSET_NS = 10 * SECOND
PERSISTENT = 5  # consecutive images with a fault before it is reported
RMEM_MAX = Path('/proc/sys/net/core/rmem_max')
VGA_BYTES = 640 * 480 * 3
PROFILES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')


@dataclass(frozen=True)
class Cause:
    """A code for programs, a sentence for people; ``blocking`` ones leave no pose at all.

    about: the topic or frames that are meant, where one code may stand for several causes.
    certain: it does not come and go by itself, so the log need not wait whether it stays.
    """

    code: str
    sentence: str
    blocking: bool = False
    about: str = ''
    certain: bool = False


@dataclass(frozen=True)
class Transport:
    """What decides whether large messages arrive on this machine.

    profile: the Fast DDS profile in use, '' if none. rmem_max: largest UDP receive buffer in
    bytes, None where the system does not say.
    """

    rmw: str = 'rmw_fastrtps_cpp'
    profile: str = ''
    rmem_max: int | None = None

    @classmethod
    def here(cls, rmw: str) -> Transport:
        """The transport of this process, with the middleware that rclpy reports."""
        profile = next((os.environ[name] for name in PROFILES if os.environ.get(name)), '')
        limit = int(RMEM_MAX.read_text()) if RMEM_MAX.exists() else None
        return cls(rmw, profile, limit)

    def advice(self, nbytes: int) -> str:
        """What to do where images of so many bytes are lost."""
        steps = []
        if 'fastrtps' in self.rmw and not self.profile:
            steps.append(f'export {PROFILES[0]} and {PROFILES[1]} with the path of config/'
                         'fastdds.xml of this package before the camera driver starts')
        if self.rmem_max is not None and self.rmem_max < 4 * nbytes:
            steps.append(f'net.core.rmem_max is {self.rmem_max} bytes, less than four images: '
                         f'run `sudo sysctl -w net.core.rmem_max={max(16 * nbytes, 1 << 26)}`')
        steps.append('let the driver publish reliably or set image_transport to compressed')
        return '; '.join(steps)


@dataclass(frozen=True)
class _Look:
    """What every rule looks at."""

    health: Health
    now_ns: int
    silence_ns: int
    transport: Transport

    @property
    def inputs(self) -> list[InputHealth]:
        """The needed ones first."""
        return sorted(self.health.inputs.values(), key=lambda input_: not input_.needed)

    @property
    def waited_long(self) -> bool:
        return self.now_ns - self.health.active_since_ns >= self.silence_ns

    def waits_long(self, input_: InputHealth) -> bool:
        """Its publisher has been there for a while, and we have listened as long."""
        since_ns = max(input_.published_ns or 0, self.health.active_since_ns)
        return self.now_ns - since_ns >= self.silence_ns

    def misses(self, input_: InputHealth) -> bool:
        """Something would be better if messages of this input came.

        Depth only serves mapping. Odometry serves the transform map -> odom, and the scale where
        depth does not tell it.
        """
        health, depth = self.health, self.health.inputs.get('depth')
        if input_.kind == 'depth':
            return health.mode == 'mapping'
        if input_.kind == 'odom':
            metric = health.scale_source != 'unknown' or (depth is not None and depth.messages)
            return health.tf_mode == 'map_to_odom' or not metric
        return True

    @property
    def image(self) -> InputHealth | None:
        return self.health.inputs.get('image')


def causes(health: Health, now_ns: int, *, silence_s: float = 3.0,
           transport: Transport | None = None) -> list[Cause]:
    """Likely causes of trouble now, most likely first; empty when all is well or not active."""
    if health.state != 'active':
        failed = health.state == 'unconfigured' and health.reason
        return [Cause('CONFIGURE_FAILED', health.reason, True)] if failed else []
    look = _Look(health, now_ns, int(silence_s * SECOND), transport or Transport())
    found = [cause for rule in RULES for cause in rule(look)]
    found.sort(key=lambda cause: not cause.blocking)
    return found if found and found[0].blocking else [*found, *_tracking(look)]


def _pause(look: _Look) -> Iterator[Cause]:
    if look.health.paused:
        yield Cause('PAUSED', 'paused, images are not used; call ~/pause with false to go on',
                    certain=True)


def _map(look: _Look) -> Iterator[Cause]:
    if look.health.mode == 'localization' and not look.health.has_map:
        yield Cause('NO_MAP', 'expected a map to localise in, found none; start with map:=FOLDER, '
                    'or set the parameter map to a map folder and call ~/load_map', True,
                    certain=True)


def _clock(look: _Look) -> Iterator[Cause]:
    if look.health.use_sim_time and not look.health.clock_running:
        yield Cause('NO_CLOCK', 'use_sim_time is true but nothing publishes /clock; start the '
                    'simulation, play the bag with --clock, or set use_sim_time to false', True)


def _arrival(look: _Look) -> Iterator[Cause]:
    for input_ in look.inputs:
        if not look.misses(input_):
            continue
        if input_.arrived_ns is None:
            if look.waited_long:
                yield from _never(look, input_)
        elif input_.kind != 'camera_info':  # a single one is enough
            yield from _no_longer(look, input_)


def _no_longer(look: _Look, input_: InputHealth) -> Iterator[Cause]:
    """An input that has come; now it is silent, or some of it is lost."""
    topic, silent_ns = input_.topic, look.now_ns - (input_.arrived_ns or 0)
    if silent_ns >= look.silence_ns:
        why = 'its publisher is gone' if input_.publishers == () else \
            'the driver hangs or the connection is cut'
        yield Cause('SILENT', f'{topic} has been silent for {silent_ns / SECOND:.0f} s; {why}',
                    input_.needed, topic)
    if input_.recently('lost', look.now_ns):
        yield Cause('FRAMES_LOST', f'{input_.lost} messages of {topic} were lost on the way; '
                    f'{look.transport.advice(input_.nbytes or VGA_BYTES)}',
                    input_.needed and input_.lost > input_.messages, topic)


def _never(look: _Look, input_: InputHealth) -> Iterator[Cause]:
    """An input of which nothing has arrived yet."""
    topic = input_.topic
    if not input_.publishers:
        if input_.needed:
            yield Cause('NO_PUBLISHER', _about_nobody(topic, input_.alternatives), True, topic)
        return
    if not look.waits_long(input_):
        return
    names = ', '.join(publisher.node for publisher in input_.publishers)
    best_effort = [p for p in input_.publishers if not p.reliable]
    if input_.unmatched or (input_.reliable and len(best_effort) == len(input_.publishers)):
        yield Cause('QOS', f'{topic} is published by {names} as best effort but subscribed to '
                    'as reliable, so nothing can arrive; set image_qos to auto', input_.needed,
                    topic)
    elif input_.kind in ('image', 'depth'):
        yield Cause('LARGE_IMAGES_LOST', f'{topic} is published by {names} but nothing arrives: '
                    'the publisher sends nothing, or large images are lost on the way; '
                    f'{look.transport.advice(input_.nbytes or VGA_BYTES)}', input_.needed, topic)
    else:
        yield Cause('NOTHING_SENT', f'{topic} is published by {names} but nothing arrives; '
                    'check that the driver sends it', input_.needed, topic)


def _about_nobody(topic: str, others: tuple[str, ...]) -> str:
    """What to do where nobody publishes the images; others: topics that have some."""
    if f'{topic}/compressed' in others:
        return (f'nobody publishes {topic}, but {topic}/compressed is published; listen to that '
                'with image_transport auto or compressed')
    if others:
        return f'nobody publishes {topic}; remap it to one of these: {", ".join(others[:4])}'
    return (f'nobody publishes {topic}, and no topic of this type exists; start the camera '
            'driver, with the same ROS_DOMAIN_ID')


def _stamps(look: _Look) -> Iterator[Cause]:
    for input_ in look.inputs:
        if input_.kind == 'camera_info':  # of whatever time, one serves all images
            continue
        for fault, sentence in STAMPS.items():
            if input_.recently(fault, look.now_ns):
                yield Cause(f'STAMPS_{fault.value}', f'{input_.topic}: {sentence} '
                            f'({input_.faults[fault]} times)',
                            fault is StampFault.ZERO and input_.needed, input_.topic)
        if input_.stamp_ns and abs(input_.offset_ns) > OFFSET_NS \
                and look.health.clock_running:
            yield Cause('CLOCK_OFFSET', _about_offset(input_, look.health.use_sim_time),
                        about=input_.topic)


STAMPS = {
    StampFault.ZERO: 'stamps are zero; the driver must set header.stamp',
    StampFault.EQUAL: 'several messages carry the same stamp; they are used once',
    StampFault.REVERSED: 'stamps go back and forth; late messages are left out',
    StampFault.JUMP_BACK: 'stamps jumped back; the time line started again (a bag that loops, '
                          'or a clock that was set)',
    StampFault.JUMP_AHEAD: 'stamps jumped ahead of the clock; a clock was set, or two publishers '
                           'share the topic',
}


def _about_offset(input_: InputHealth, use_sim_time: bool) -> str:
    side = 'behind' if input_.offset_ns > 0 else 'ahead of'
    text = (f'stamps of {input_.topic} are {abs(input_.offset_ns) / SECOND:.0f} s {side} the '
            'clock of this node; ')
    return text + ('the bag plays without --clock, or another /clock is running'
                   if use_sim_time else
                   'for a bag or simulation set use_sim_time to true and play with --clock, '
                   'between machines synchronise the clocks (chrony)')


def _calibration(look: _Look) -> Iterator[Cause]:
    health, image = look.health, look.image
    info = health.inputs.get('camera_info')
    topic = info.topic if info else 'camera_info'
    images_wh = f'{image.size_wh[0]}x{image.size_wh[1]}' if image and image.size_wh else 'unknown'
    if health.camera_info is InfoState.MISSING:
        yield Cause('INFO_MISSING', f'no calibration on {topic}, so the field of view is '
                    'guessed; remap camera_info or start the driver with a calibration file')
    elif health.camera_info is InfoState.ZERO:
        yield Cause('INFO_ZERO', f'{topic} holds an all-zero calibration, so the field of view '
                    'is guessed; run camera_calibration and give the file to the driver')
    elif health.camera_info is InfoState.OTHER_SIZE and health.info_wh:
        yield Cause('INFO_OTHER_SIZE', f'{topic} is for {health.info_wh[0]}x{health.info_wh[1]} '
                    f'images, but the images are {images_wh}; calibrate at this size or remap',
                    True)


def _transforms(look: _Look) -> Iterator[Cause]:
    for parent, child in look.health.tf_missing:
        yield Cause('TF_MISSING', f'TF does not connect {parent} and {child}; start '
                    'robot_state_publisher, the odometry or a static_transform_publisher, or '
                    'set base_frame, odom_frame and camera_frame', True,
                    f'{parent}, {child}')
    image = look.image
    if image is not None and image.messages and image.frame_id == '':
        yield Cause('FRAME_ID_EMPTY', f'{image.topic} has an empty header.frame_id; set '
                    'camera_frame to the optical frame of the camera')


def _registration(look: _Look) -> Iterator[Cause]:
    image, depth = look.image, look.health.inputs.get('depth')
    if image is None or depth is None or not image.frame_id or not depth.frame_id \
            or image.frame_id == depth.frame_id:
        return
    yield Cause('DEPTH_UNREGISTERED', f'{depth.topic} is in the frame {depth.frame_id}, the '
                f'images are in {image.frame_id}: depth that is not registered to the image gives '
                'wrong points; switch on the registration of the driver (a topic such as '
                'aligned_depth_to_color or depth_registered), or set use_depth to false')


def _pictures(look: _Look) -> Iterator[Cause]:
    topics = {kind: input_.topic for kind, input_ in look.health.inputs.items()}
    for code, times in look.health.pictures.faults.items():
        if times >= PERSISTENT:
            kind = 'depth' if code.startswith('DEPTH') else 'image'
            yield Cause(f'IMAGE_{code}' if kind == 'image' else code,
                        f'the last {times} images of {topics.get(kind, kind)} '
                        f'{PICTURES[code]}')


PICTURES = {
    'BLACK': 'are black; remove the lens cap, switch the light on or raise the exposure',
    'WHITE': 'are white; lower the exposure',
    'FLAT': 'have a single colour; check the encoding and the driver',
    'BLURRED': 'are blurred; focus the lens, clean it or shorten the exposure',
    'REPEATED': 'are identical; the driver repeats one image, or the simulation stands still',
    'DEPTH_EMPTY': 'hold no measurement (all 0 or NaN); check the range of the sensor and its '
                   'projector, or set use_depth to false',
    'DEPTH_UNIT': f'hold values that {WRONG_UNIT}; check the unit of the depth camera',
}


def _sizes(look: _Look) -> Iterator[Cause]:
    for input_ in look.inputs:
        if input_.recently('size', look.now_ns) and input_.size_before and input_.size_wh:
            before, now = input_.size_before, input_.size_wh
            yield Cause('SIZE_CHANGED', f'{input_.topic} changed from {before[0]}x{before[1]} to '
                        f'{now[0]}x{now[1]}; a map needs one size: set it in the driver, or call '
                        'reset to start a new map', about=input_.topic)


def noticed(health: Health, now_ns: int) -> list[Cause]:
    """What happened lately, in any state of the node."""
    return [Cause(warned.code, warned.sentence, certain=True)
            for warned in health.warnings.values() if abs(now_ns - warned.last_ns) <= RECENT_NS]


def _noticed(look: _Look) -> Iterator[Cause]:
    yield from noticed(look.health, look.now_ns)


def _tracking(look: _Look) -> Iterator[Cause]:
    """Last resort: the inputs are fine, and still there is no pose."""
    status = look.health.status
    reason = f' ({look.health.reason})' if look.health.reason else ''
    if look.health.frames and look.waited_long and status in TRACKING \
            and not look.health.paused:
        yield Cause(status, TRACKING[status].format(reason), True)


TRACKING = {
    'INITIALISING': 'the map has not started{}; move the camera sideways past textured things',
    'LOST': 'the camera is lost{}; go back to a place that was mapped',
    'NOT_LOCALISED': 'the camera is not found in the map{}; show it a place that was mapped, or '
                     'give an initialpose',
}

RULES: tuple[Callable[[_Look], Iterator[Cause]], ...] = (
    _map, _pause, _clock, _arrival, _stamps, _calibration, _transforms, _registration, _pictures,
    _sizes, _noticed)
