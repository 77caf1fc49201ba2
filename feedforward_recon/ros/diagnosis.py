"""Judges the health of a node: what is wrong, most likely cause first, a clear sentence each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from feedforward_recon.mapping.preparation import WRONG_UNIT
from feedforward_recon.ros.health import Health, InfoState
from feedforward_recon.ros.input_health import (
    CALIBRATIONS,
    InputHealth,
    StampFault,
    is_recent,
)
from feedforward_recon.ros.meters import SECOND

OFFSET_NS = 10 * SECOND
PERSISTENT = 5  # consecutive images with a fault before it is reported
RMEM_MAX = Path('/proc/sys/net/core/rmem_max')
VGA_BYTES = 640 * 480 * 3
PROFILES = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')


@dataclass(frozen=True)
class Diagnosis:
    """A code for programs, a sentence for people; ``blocking`` ones leave no pose at all.

    about: the topic or frames that are meant, where one code may hold for several.
    certain: it does not come and go by itself, so the log need not wait whether it stays.
    """

    code: str
    sentence: str
    blocking: bool = False
    about: str = ''
    certain: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Tells apart what may hold at the same time."""
        return self.code, self.about


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
class _Case:
    """What every rule judges: the health at one moment."""

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
        since_ns = max(input_.connection.published_ns or 0, self.health.active_since_ns)
        return self.now_ns - since_ns >= self.silence_ns

    def misses(self, input_: InputHealth) -> bool:
        """Something would be better if messages of this input came.

        Depth and right images only serve mapping. Odometry serves the transform map -> odom, and
        the scale where depth does not tell it.
        """
        health, depth = self.health, self.health.inputs.get('depth')
        if input_.kind in ('depth', 'right', 'right_info'):
            return health.mode == 'mapping'
        if input_.kind == 'odom':
            metric = health.scale_source != 'unknown' or (
                depth is not None and depth.traffic.messages)
            return health.tf_mode == 'map_to_odom' or not metric
        return True

    @property
    def image(self) -> InputHealth | None:
        return self.health.inputs.get('image')


def diagnose(health: Health, now_ns: int, *, silence_s: float = 3.0,
             transport: Transport | None = None) -> list[Diagnosis]:
    """What is wrong now, blocking and likely causes first; empty if nothing, or not active.

    silence_s: an input is missed after so many seconds without a message.
    """
    if health.state != 'active':
        failed = health.state == 'unconfigured' and health.reason
        return [Diagnosis('CONFIGURE_FAILED', health.reason, True)] if failed else []
    case = _Case(health, now_ns, int(silence_s * SECOND), transport or Transport())
    found = [diagnosis for rule in RULES for diagnosis in rule(case)]
    found.sort(key=lambda diagnosis: not diagnosis.blocking)
    return found if found and found[0].blocking else [*found, *_tracking(case)]


def _pause(case: _Case) -> Iterator[Diagnosis]:
    if case.health.paused:
        yield Diagnosis('PAUSED', 'paused, images are not used; call ~/pause with false to go on',
                        certain=True)


def _map(case: _Case) -> Iterator[Diagnosis]:
    if case.health.mode == 'localization' and not case.health.has_map:
        yield Diagnosis('NO_MAP', 'expected a map to localise in, found none; start with '
                        'map:=FOLDER, or set the parameter map to a map folder and call '
                        '~/load_map', True, certain=True)


def _clock(case: _Case) -> Iterator[Diagnosis]:
    if case.health.use_sim_time and not case.health.clock_running:
        yield Diagnosis('NO_CLOCK', 'use_sim_time is true but nothing publishes /clock; start the '
                        'simulation, play the bag with --clock, or set use_sim_time to false',
                        True)


def _arrival(case: _Case) -> Iterator[Diagnosis]:
    for input_ in case.inputs:
        if not case.misses(input_):
            continue
        if input_.traffic.arrived_ns is None:
            if case.waited_long:
                yield from _never(case, input_)
        elif input_.kind not in CALIBRATIONS:
            yield from _no_longer(case, input_)


def _no_longer(case: _Case, input_: InputHealth) -> Iterator[Diagnosis]:
    """An input that has come; now it is silent, or some of it is lost."""
    topic, connection, traffic = input_.topic, input_.connection, input_.traffic
    silent_ns = case.now_ns - (traffic.arrived_ns or 0)
    if silent_ns >= case.silence_ns:
        why = 'its publisher is gone' if connection.publishers == () else \
            'the driver hangs or the connection is cut'
        yield Diagnosis('SILENT', f'{topic} has been silent for {silent_ns / SECOND:.0f} s; {why}',
                        input_.needed, topic)
    if is_recent(connection.lost_ns, case.now_ns):
        yield Diagnosis('FRAMES_LOST', f'{connection.lost} messages of {topic} were lost on the '
                        f'way; {case.transport.advice(traffic.nbytes or VGA_BYTES)}',
                        input_.needed and connection.lost > traffic.messages, topic)


def _never(case: _Case, input_: InputHealth) -> Iterator[Diagnosis]:
    """An input of which nothing has arrived yet."""
    topic, connection = input_.topic, input_.connection
    if not connection.publishers:
        if input_.needed:
            yield Diagnosis('NO_PUBLISHER', _about_nobody(topic, connection.alternatives), True,
                            topic)
        return
    if not case.waits_long(input_):
        return
    names = ', '.join(publisher.node for publisher in connection.publishers)
    unheard = connection.reliable and not any(p.reliable for p in connection.publishers)
    if connection.unmatched or unheard:
        yield Diagnosis('QOS', f'{topic} is published by {names} as best effort but subscribed to '
                        'as reliable, so nothing can arrive; set image_qos to auto', input_.needed,
                        topic)
    elif input_.kind in ('image', 'depth', 'right'):
        yield Diagnosis('LARGE_IMAGES_LOST', f'{topic} is published by {names} but nothing '
                        'arrives: the publisher sends nothing, or large images are lost on the '
                        f'way; {case.transport.advice(VGA_BYTES)}', input_.needed, topic)
    else:
        yield Diagnosis('NOTHING_SENT', f'{topic} is published by {names} but nothing arrives; '
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


def _stamps(case: _Case) -> Iterator[Diagnosis]:
    for input_ in case.inputs:
        if input_.kind in CALIBRATIONS:
            continue
        traffic = input_.traffic
        for fault, sentence in STAMPS.items():
            if is_recent(traffic.fault_ns.get(fault), case.now_ns):
                yield Diagnosis(f'STAMPS_{fault.value}', f'{input_.topic}: {sentence} '
                                f'({traffic.faults[fault]} times)',
                                fault is StampFault.ZERO and input_.needed, input_.topic)
        if traffic.stamp_ns and abs(traffic.offset_ns) > OFFSET_NS \
                and case.health.clock_running:
            yield Diagnosis('CLOCK_OFFSET', _about_offset(
                input_.topic, traffic.offset_ns, case.health.use_sim_time), about=input_.topic)


STAMPS = {
    StampFault.ZERO: 'stamps are zero; the driver must set header.stamp',
    StampFault.EQUAL: 'several messages carry the same stamp; they are used once',
    StampFault.REVERSED: 'stamps go back and forth; late messages are left out',
    StampFault.JUMP_BACK: 'stamps jumped back; the time line started again (a bag that loops, '
                          'or a clock that was set)',
    StampFault.JUMP_AHEAD: 'stamps jumped ahead of the clock; a clock was set, or two publishers '
                           'share the topic',
}


def _about_offset(topic: str, offset_ns: int, use_sim_time: bool) -> str:
    side = 'behind' if offset_ns > 0 else 'ahead of'
    text = (f'stamps of {topic} are {abs(offset_ns) / SECOND:.0f} s {side} the '
            'clock of this node; ')
    return text + ('the bag plays without --clock, or another /clock is running'
                   if use_sim_time else
                   'for a bag or simulation set use_sim_time to true and play with --clock, '
                   'between machines synchronise the clocks (chrony)')


def _calibration(case: _Case) -> Iterator[Diagnosis]:
    health, image = case.health, case.image
    info = health.inputs.get('camera_info')
    topic = info.topic if info else 'camera_info'
    image_wh = image.traffic.size_wh if image else None
    size = f'{image_wh[0]}x{image_wh[1]}' if image_wh else 'unknown'
    if health.camera_info is InfoState.MISSING:
        yield Diagnosis('INFO_MISSING', f'no calibration on {topic}, so the field of view is '
                        'guessed; remap camera_info or start the driver with a calibration file')
    elif health.camera_info is InfoState.ZERO:
        yield Diagnosis('INFO_ZERO', f'{topic} holds an all-zero calibration, so the field of '
                        'view is guessed; run camera_calibration and give the file to the driver')
    elif health.camera_info is InfoState.OTHER_SIZE and health.info_wh:
        yield Diagnosis('INFO_OTHER_SIZE', f'{topic} is for {health.info_wh[0]}x'
                        f'{health.info_wh[1]} images, but the images are {size}; calibrate at '
                        'this size or remap', True)


def _transforms(case: _Case) -> Iterator[Diagnosis]:
    for parent, child in case.health.tf_missing:
        yield Diagnosis('TF_MISSING', f'TF does not connect {parent} and {child}; start '
                        'robot_state_publisher, the odometry or a static_transform_publisher, or '
                        'set base_frame, odom_frame and camera_frame', True,
                        f'{parent}, {child}')
    image = case.image
    if image is not None and image.traffic.messages and image.traffic.frame_id == '':
        yield Diagnosis('FRAME_ID_EMPTY', f'{image.topic} has an empty header.frame_id; set '
                        'camera_frame to the optical frame of the camera')


def _registration(case: _Case) -> Iterator[Diagnosis]:
    image, depth = case.image, case.health.inputs.get('depth')
    if image is None or depth is None:
        return
    image_frame, depth_frame = image.traffic.frame_id, depth.traffic.frame_id
    if not image_frame or not depth_frame or image_frame == depth_frame:
        return
    yield Diagnosis('DEPTH_UNREGISTERED', f'{depth.topic} is in the frame {depth_frame}, the '
                    f'images are in {image_frame}: depth that is not registered to the image '
                    'gives wrong points; switch on the registration of the driver (a topic such '
                    'as aligned_depth_to_color or depth_registered), or set use_depth to false')


def _pictures(case: _Case) -> Iterator[Diagnosis]:
    topics = {kind: input_.topic for kind, input_ in case.health.inputs.items()}
    for code, times in case.health.pictures.faults.items():
        if times >= PERSISTENT:
            kind = 'depth' if code.startswith('DEPTH') else 'image'
            yield Diagnosis(f'IMAGE_{code}' if kind == 'image' else code,
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


def _sizes(case: _Case) -> Iterator[Diagnosis]:
    for input_ in case.inputs:
        before, now = input_.traffic.size_before, input_.traffic.size_wh
        if is_recent(input_.traffic.size_changed_ns, case.now_ns) and before and now:
            yield Diagnosis('SIZE_CHANGED', f'{input_.topic} changed from {before[0]}x{before[1]} '
                            f'to {now[0]}x{now[1]}; a map needs one size: set it in the driver, '
                            'or call reset to start a new map', about=input_.topic)


def noticed(health: Health, now_ns: int) -> list[Diagnosis]:
    """What happened lately, in any state of the node."""
    return [Diagnosis(warned.code, warned.sentence, certain=True)
            for warned in health.warnings.values() if is_recent(warned.last_ns, now_ns)]


def _noticed(case: _Case) -> Iterator[Diagnosis]:
    yield from noticed(case.health, case.now_ns)


def _tracking(case: _Case) -> Iterator[Diagnosis]:
    """Last resort: the inputs are fine, and still there is no pose."""
    status = case.health.status
    reason = f' ({case.health.reason})' if case.health.reason else ''
    if case.health.frames and case.waited_long and status in TRACKING \
            and not case.health.paused:
        yield Diagnosis(status, TRACKING[status].format(reason), True)


TRACKING = {
    'INITIALISING': 'the map has not started{}; move the camera sideways past textured things',
    'LOST': 'the camera is lost{}; go back to a place that was mapped',
    'NOT_LOCALISED': 'the camera is not found in the map{}; show it a place that was mapped, or '
                     'give an initialpose',
}

RULES: tuple[Callable[[_Case], Iterator[Diagnosis]], ...] = (
    _map, _pause, _clock, _arrival, _stamps, _calibration, _transforms, _registration, _pictures,
    _sizes, _noticed)
