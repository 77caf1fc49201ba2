"""Whatever a camera driver does wrong: the node lives, sends no false pose, names the cause."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from ros_support.harness import NodeProcess, missing_ros, own_domain

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from geometry_msgs.msg import PoseWithCovarianceStamped
from ros_support.camera import OPTICAL, FakeCamera, stamps, walk
from ros_support.probe import Probe
from std_srvs.srv import Trigger

from feedforward_recon.ros.convert import depth_msg, image_msg, info_msg, stamp_ns
from feedforward_recon.ros.fields import header_msg

SECOND = 1_000_000_000
QUICK = {'memory.slots': 8000, 'memory.cells': 2000, 'memory.samples': 20_000,
         'silence_s': 4.0, 'tf_wait_s': 0.2}


@pytest.fixture(scope='module')
def frames():
    return walk(5, 40, every=2)


class Robot:
    """A mapping node, and a driver whose every message may be spoiled."""

    def __init__(self, node, probe, **driver):
        self.node, self.probe = node, probe
        self.poses = probe.collect(PoseWithCovarianceStamped, '/pose')
        self.camera = FakeCamera(probe, **driver)
        assert self.camera.ready() and probe.is_known_to('/mapping_node'), node.output

    def report(self):
        """What ~/doctor tells."""
        return json.loads(self.probe.call(Trigger, '/mapping_node/doctor').message)

    def codes(self):
        """What the node says is wrong now."""
        return [cause['code'] for cause in self.report()['causes']]

    def says(self, code, timeout_s=8.0):
        """True once the node names this cause; fails loudly when it dies or does not."""
        end = time.monotonic() + timeout_s
        while code not in (found := self.codes()):
            assert self.node.is_running(), self.node.output
            assert time.monotonic() < end, f'{code} not among {found}\n{self.node.output}'
            self.probe.spin_for(0.2)
        return True

    def send(self, frame, *, shift_ns=0, image=None, depth=None, info=None):
        """Send a frame stamped now (+ shift); the hooks spoil a message and return it."""
        stamp = 0 if shift_ns is None else time.time_ns() + shift_ns
        camera, frame_id = self.camera, self.camera.frame_id
        if camera.info is not None:
            message = info_msg(frame.camera, frame_id, stamp)
            camera.info.publish(info(message) if info else message)
        if camera.depth is not None:
            message = depth_msg(frame.depth, frame_id, stamp)
            camera.depth.publish(depth(message) if depth else message)
        message = image_msg(frame.image, frame_id, stamp)
        camera.image.publish(image(message) if image else message)
        return stamp

    def stream(self, frames, hz=10.0, **spoiled):
        """Send frames at a rate; returns their stamps."""
        sent = []
        for frame in frames:
            sent.append(self.send(frame, **spoiled))
            self.probe.spin_for(1 / hz)
        self.probe.spin_for(0.3)
        return sent

    def posed(self, sent):
        """How many of these stamps got a pose."""
        return len(set(stamps(self.poses)) & set(sent))

    def recovers(self, frames, timeout_s=10.0):
        """Right images give poses again, in a new map."""
        assert self.probe.call(Trigger, '/mapping_node/reset').success
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.posed(self.stream(frames[:3])):
                return True
        raise AssertionError(f'no pose after the fault: {self.codes()}\n{self.node.output}')


@pytest.fixture(scope='module')
def robot(tmp_path_factory):
    """One node that has to live through all faults of this module."""
    with own_domain('faults') as domain, pytest.MonkeyPatch.context() as patch:
        for name, value in domain.environment.items():
            patch.setenv(name, value)
        log = tmp_path_factory.mktemp('faults') / 'node.log'
        node, probe = NodeProcess(domain, log, 'mapping_node', parameters=QUICK), Probe(domain)
        try:
            yield Robot(node, probe)
        finally:
            probe.close()
            node.kill()


@pytest.fixture(autouse=True)
def survives(request, frames):
    """After each fault the node is alive and maps again."""
    yield
    if 'robot' in request.fixturenames:
        robot = request.getfixturevalue('robot')
        assert robot.node.is_running(), robot.node.output
        assert robot.recovers(frames)


def refill(value):
    """A hook that fills an image with one gray level."""
    def spoil(message):
        message.data = bytes([value]) * len(message.data)
        return message
    return spoil


def with_(**fields):
    """A hook that sets fields of a message."""
    def spoil(message):
        for name, value in fields.items():
            setattr(message, name, value)
        return message
    return spoil


def test_a_driver_that_starts_long_after_the_node_is_mapped_with_all_it_sends(robot, frames):
    robot.probe.spin_for(4.5)
    assert robot.posed(robot.stream(frames + frames[::-1])) > 10
    report = robot.report()
    assert report['causes'] == []
    assert (report['camera_source'], report['scale_source']) == ('given', 'depth')


@pytest.mark.parametrize(('value', 'code'), [(0, 'IMAGE_BLACK'), (255, 'IMAGE_WHITE'),
                                             (128, 'IMAGE_FLAT')])
def test_empty_images(robot, frames, value, code):
    sent = robot.stream(frames[:8], image=refill(value))
    assert robot.says(code)
    assert robot.posed(sent) == 0


def test_a_repeated_image(robot, frames):
    robot.stream([frames[0]] * 8)
    assert robot.says('IMAGE_REPEATED')


@pytest.mark.parametrize('value', [0.0, np.nan])
def test_depth_without_measurements(robot, frames, value):
    empty = [replace(f, depth=np.full_like(f.depth, value)) for f in frames[:8]]
    robot.stream(empty)
    assert robot.says('DEPTH_EMPTY')


def test_images_whose_depth_comes_too_late_are_used_without(robot, frames):
    """Thrice in step, so that a metric map starts; then depth is 200 ms off."""
    def late(message):
        message.header = header_msg(OPTICAL, stamp_ns(message.header) + SECOND // 5)
        return message

    assert robot.probe.call(Trigger, '/mapping_node/reset').success
    assert robot.posed(robot.stream(frames[:3])) > 0
    sent = robot.stream(frames[3:16], hz=3.0, depth=late)
    assert robot.says('DEPTH_UNPAIRED')
    assert robot.posed(sent) >= 10  # the last ones may still wait for their depth
    assert robot.report()['scale_source'] == 'depth'


def test_depth_in_another_frame_is_called_unregistered(robot, frames):
    def elsewhere(message):
        message.header.frame_id = 'depth_optical_frame'
        return message

    robot.stream(frames[:4], depth=elsewhere)
    assert robot.says('DEPTH_UNREGISTERED')


def test_depth_in_centimetres_is_called_wrong(robot, frames):
    robot.stream([replace(f, depth=f.depth / np.float32(10)) for f in frames[:8]])
    assert robot.says('DEPTH_UNIT')


@pytest.mark.parametrize(('spoil', 'words'), [
    (with_(encoding='secret9'), 'secret9'), (with_(step=7), 'image'),
    (with_(data=b'short'), 'image')])
def test_images_that_cannot_be_decoded(robot, frames, spoil, words):
    sent = robot.stream(frames[:4], image=spoil)
    assert robot.says('IMAGE_REFUSED')
    assert robot.posed(sent) == 0
    assert any(words in cause['sentence'] for cause in robot.report()['causes'])


def test_another_resolution(robot, frames):
    robot.stream(frames[:4])
    small = [replace(f, image=np.ascontiguousarray(f.image[::2, ::2]),
                     depth=np.ascontiguousarray(f.depth[::2, ::2]),
                     camera=f.camera.resized((160, 120))) for f in frames[4:8]]
    sent = robot.stream(small)
    assert robot.says('SIZE_CHANGED')
    assert robot.posed(sent) == 0


def test_a_calibration_of_another_size(robot, frames):
    robot.stream(frames[:4], info=with_(width=640, height=480))
    assert robot.says('INFO_OTHER_SIZE')


def test_zero_stamps(robot, frames):
    robot.stream(frames[:4], shift_ns=None)
    assert robot.says('STAMPS_ZERO')
    assert robot.posed([0]) == 0


def test_equal_stamps(robot, frames):
    stamp = robot.stream(frames[:4])[-1]
    for frame in frames[4:7]:
        robot.camera.image.publish(image_msg(frame.image, OPTICAL, stamp))
    assert robot.says('STAMPS_EQUAL')
    assert stamps(robot.poses).count(stamp) <= 1


@pytest.mark.parametrize(('shift_s', 'code'), [
    (-0.9, 'STAMPS_REVERSED'), (-10, 'STAMPS_JUMP_BACK'), (3600, 'STAMPS_JUMP_AHEAD'),
    (3600, 'CLOCK_OFFSET'), (-3600, 'CLOCK_OFFSET')])
def test_stamps_that_jump(robot, frames, shift_s, code):
    robot.stream(frames[:4])
    robot.stream(frames[4:8], shift_ns=int(shift_s * SECOND))
    assert robot.says(code)


def test_an_empty_frame_id(robot, frames):
    robot.camera.frame_id = ''
    robot.stream(frames[:4])
    robot.camera.frame_id = OPTICAL
    assert robot.says('FRAME_ID_EMPTY')


def test_silence(robot, frames):
    robot.stream(frames[:4])
    assert robot.says('SILENT')


def test_a_lost_camera_is_not_given_a_pose(robot, frames):
    robot.stream(frames[:12])
    sent = robot.stream(walk(23, 8))
    assert robot.says('LOST')
    assert robot.posed(sent) <= 1


def test_many_resets(robot, frames):
    for index in range(20):
        robot.send(frames[index % len(frames)])
        assert robot.probe.call(Trigger, '/mapping_node/reset').success


# Calibration: each case needs a node that has seen no other


@pytest.fixture
def fresh(start_node, probe):
    def started(info_wait_s=4.0, **driver):
        parameters = {**QUICK, 'info_wait_s': info_wait_s}
        return Robot(start_node('mapping_node', parameters=parameters), probe, **driver)
    return started


def test_no_calibration_and_then_a_late_one(fresh, probe, frames):
    robot = fresh(info_wait_s=0.5, info=False)
    assert robot.posed(robot.stream(frames)) > 0
    assert robot.says('INFO_MISSING')
    robot.camera = FakeCamera(probe)
    assert robot.camera.ready()
    robot.stream(frames[:6])
    assert robot.says('CALIBRATION_LATE')
    assert 'INFO_MISSING' not in robot.codes()


def test_an_all_zero_calibration(fresh, frames):
    robot = fresh()
    sent = robot.stream(frames, info=with_(k=np.zeros(9), p=np.zeros(12)))
    assert robot.says('INFO_ZERO')
    assert robot.posed(sent) > 0


def test_best_effort_publishers_are_heard(fresh, frames):
    robot = fresh(reliable=False)
    # On a busy machine best effort loses images of this size; some stream comes through.
    assert any(robot.posed(robot.stream(frames)) > 10 for _ in range(4))
