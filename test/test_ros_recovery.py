"""Whatever happens around a mapping node, it lives, says why, and has right poses again.

One node in simulated time lives through nearly everything here; each test starts a map anew.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from ros_support.harness import NodeProcess, missing_ros, own_domain

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from geometry_msgs.msg import PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from ros_support.camera import CAMERA, OPTICAL, FakeCamera, stamps, walk
from ros_support.probe import Probe
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, Imu
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from feedforward_recon.geometry.transforms import inverse, make_transform, so3_exp
from feedforward_recon.ros.convert import (
    depth_msg,
    image_msg,
    info_msg,
    matrix_from_pose,
    matrix_from_transform,
    stamp_msg,
    transform_msg,
)
from feedforward_recon.ros.frames import R_BODY_OPTICAL, T_BODY_OPTICAL
from feedforward_recon.ros.tf_messages import TFMessage
from feedforward_recon.types import Frame

SECOND = 1_000_000_000
STEP_NS = SECOND // 10
START_NS = 1_700_000_000 * SECOND
NAME = '/mapping_node'
QUICK = {'memory.slots': 8000, 'memory.cells': 2000, 'memory.samples': 20_000,
         'info_wait_s': 0.5, 'tf_wait_s': 0.2, 'silence_s': 1.0}


@pytest.fixture(scope='module')
def frames():
    return walk(5, 24, every=2)


@pytest.fixture(scope='module')
def elsewhere():
    return walk(11, 4, every=2)


class Robot:
    """A mapping node in simulated time, its clock, and a camera that walks through a room."""

    def __init__(self, node, probe, *, info=True):
        self.node, self.probe = node, probe
        self.poses = probe.collect(PoseWithCovarianceStamped, '/pose', depth=1000)
        self.clock = probe.publisher(Clock, '/clock')
        self.now_ns = START_NS
        self.camera = FakeCamera(probe)
        self.sent, self.count = {}, {'image': 0, 'depth': 0}
        assert self.camera.ready(), node.output
        assert probe.spin_until(lambda: self._is_heard(info)), node.output
        probe.spin_for(0.2)
        self.count = self.heard()

    def heard(self):
        """How many images and depth images the node has received."""
        inputs = self.report()['inputs']
        return {kind: inputs[kind]['messages'] for kind in ('image', 'depth')}

    def _is_heard(self, info):
        """Send a black frame: a matched publisher may still lose its first messages."""
        self.send(Frame(0, np.zeros((240, 320, 3), np.uint8), np.zeros((240, 320), np.float32),
                        CAMERA), info=info)
        inputs = self.report()['inputs']
        return all(inputs[kind]['messages']
                   for kind in ('image', 'depth', *['camera_info'] * info))

    def wait(self, seconds):
        """Let simulated time pass, in steps as a simulator does."""
        for _ in range(max(1, round(seconds))):
            self.now_ns += int(seconds * SECOND / max(1, round(seconds)))
            self.clock.publish(Clock(clock=stamp_msg(self.now_ns)))

    def begin(self):
        """A new map, and old complaints are past."""
        self.wait(30)
        self.probe.spin_until(  # what is on its way would start the new map
            lambda: all(self.heard()[kind] >= self.count[kind] for kind in self.count), 2.0)
        assert self.call('reset').success
        self.sent = {}

    def send(self, frame, *, shift_ns=0, depth=True, info=True, frame_id=OPTICAL):
        """Send a frame stamped with the next moment (+ shift); returns the stamp."""
        self.wait(STEP_NS / SECOND)
        stamp, camera = self.now_ns + shift_ns, self.camera
        if info:
            camera.info.publish(info_msg(frame.camera, frame_id, stamp))
        if depth:
            camera.depth.publish(depth_msg(frame.depth, frame_id, stamp))
        camera.image.publish(image_msg(frame.image, frame_id, stamp))
        self.sent[stamp] = frame
        self.count['image'] += 1
        self.count['depth'] += depth
        return stamp

    def walk(self, frames, timeout_s=2.0, **how):
        """Send frames, each after the pose of the last; returns how many had a pose."""
        posed = 0
        for frame in frames:
            stamp = self.send(frame, **how)
            posed += self.probe.spin_until(lambda s=stamp: s in stamps(self.poses), timeout_s)
        return posed

    def errors(self, start=0):
        """How far each pose is from the truth, metres plus radians.

        start: which of the images since ``begin`` the map began with.
        """
        first = list(self.sent.values())[start]
        T_map_world = T_BODY_OPTICAL @ inverse(first.T_map_cam)
        errors = []
        for message, stamp in zip(self.poses, stamps(self.poses), strict=True):
            if stamp in self.sent:
                T = T_map_world @ self.sent[stamp].T_map_cam @ inverse(T_BODY_OPTICAL)
                off = inverse(T) @ matrix_from_pose(message.pose.pose)
                errors.append(np.linalg.norm(off[:3, 3]) + np.linalg.norm(off[:3, :3] - np.eye(3)))
        return np.array(errors)

    def call(self, service, on=None):
        """Call one of the node's own services."""
        type_, request = (Trigger, None) if on is None else (SetBool, SetBool.Request(data=on))
        return self.probe.call(type_, f'{NAME}/{service}', request)

    def report(self):
        """What ~/doctor tells; a node that died fails the test with its last words."""
        assert self.node.is_running(), self.node.output
        return json.loads(self.call('doctor').message)

    def codes(self):
        """What the node says is wrong now."""
        return [cause['code'] for cause in self.report()['causes']]

    def says(self, code):
        """True once the node names this cause; else fails with what it says instead."""
        named = self.probe.spin_until(lambda: code in self.codes(), 4.0)
        assert named, f'{code} not among {self.codes()}'
        return named

    def set(self, name, text):
        """Set a parameter of type string."""
        value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=str(text))
        request = SetParameters.Request(parameters=[Parameter(name=name, value=value)])
        result, = self.probe.call(SetParameters, f'{NAME}/set_parameters', request).results
        assert result.successful, result.reason


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
    """One node for all tests of this module."""
    with own_domain('recovery') as domain:
        log = tmp_path_factory.mktemp('recovery') / 'node.log'
        node = NodeProcess(domain, log, 'mapping_node',
                           parameters={**QUICK, 'use_sim_time': True})
        probe = Probe(domain)
        try:
            yield Robot(node, probe)
        finally:
            probe.close()
            node.kill()


@pytest.fixture
def robot(shared, frames):
    """The node with a new map; afterwards it must map again, and rightly."""
    shared.begin()
    yield shared
    assert shared.node.is_running(), shared.node.output
    shared.begin()
    assert shared.walk(frames[:3]) == 3, f'no pose any more: {shared.codes()}'
    assert shared.errors().max() < 0.02


# -- time ---------------------------------------------------------------------------------------

def test_a_camera_that_was_silent_for_half_a_minute_goes_on_in_its_map(robot, frames):
    assert robot.walk(frames[:6]) == 6
    robot.wait(30)
    assert robot.says('SILENT')
    assert robot.probe.spin_until(lambda: any(
        '/image has been silent for 30 s' in cause['sentence']
        for cause in robot.report()['causes'])), robot.report()['causes']
    count = len(robot.poses)
    robot.probe.spin_for(0.5)
    assert len(robot.poses) == count, 'a pose without an image'
    assert robot.walk(frames[6:]) == len(frames) - 6
    assert robot.errors().max() < 0.02
    assert robot.probe.spin_until(lambda: 'SILENT' not in robot.codes(), 4.0), \
        robot.report()['causes']


@pytest.mark.parametrize(('shift_s', 'code'), [(-10, 'STAMPS_JUMP_BACK'),
                                               (3600, 'STAMPS_JUMP_AHEAD')])
def test_stamps_that_jump_leave_the_poses_right(robot, frames, shift_s, code):
    assert robot.walk(frames[:4]) == 4
    assert robot.walk(frames[4:8], shift_ns=shift_s * SECOND) == 4
    assert robot.says(code)
    assert robot.walk(frames[8:]) == len(frames) - 8
    assert robot.errors().max() < 0.02


def test_a_bag_that_loops_starts_its_time_line_again(robot, frames):
    assert robot.walk(frames[:6]) == 6
    robot.now_ns -= 20 * SECOND
    robot.wait(0.1)
    robot.probe.spin_for(0.3)  # the clock goes back before an image does
    assert robot.walk(frames[:6]) == 6
    assert robot.says('STAMPS_JUMP_BACK')
    robot.now_ns += 40 * SECOND


# -- images -------------------------------------------------------------------------------------

def test_a_kidnapped_camera_is_lost_until_it_is_back(robot, frames, elsewhere):
    assert robot.walk(frames) == len(frames)
    assert robot.walk(elsewhere, timeout_s=0.5) == 0
    assert robot.says('LOST')
    assert robot.walk(frames[4:8]) >= 3
    assert robot.errors().max() < 0.02
    assert 'LOST' not in robot.codes()


def test_blurred_images_are_named_and_give_no_wrong_pose(robot, frames):
    assert robot.walk(frames[:3]) == 3
    robot.walk([replace(f, image=cv2.GaussianBlur(f.image, (0, 0), 8)) for f in frames[3:9]],
               timeout_s=0.3)
    assert robot.says('IMAGE_BLURRED')
    assert robot.errors().max() < 0.1


def test_black_images_in_between_are_survived(robot, frames):
    assert robot.walk(frames[:4]) == 4
    assert robot.walk([replace(f, image=np.zeros_like(f.image)) for f in frames[:6]],
                      timeout_s=0.3) == 0
    assert robot.says('IMAGE_BLACK')
    assert robot.walk(frames[2:6]) >= 3
    assert robot.errors().max() < 0.02


def test_depth_that_ends_leaves_a_metric_map(robot, frames):
    assert robot.walk(frames[:5]) == 5
    robot.walk(frames[5:] + frames[:4:-1], timeout_s=0.3, depth=False)
    assert robot.walk(frames[3:7], depth=False) == 4
    assert robot.says('SILENT')
    assert any('/depth' in cause['sentence'] for cause in robot.report()['causes'])
    assert robot.report()['scale_source'] == 'depth'
    assert robot.errors().max() < 0.05


def test_depth_of_half_the_size_is_scaled(robot, frames):
    small = [replace(f, depth=np.ascontiguousarray(f.depth[1::2, 1::2])) for f in frames[:5]]
    assert robot.walk(small) == 5
    assert robot.report()['scale_source'] == 'depth'
    assert robot.errors().max() < 0.05


def test_depth_of_other_proportions_is_refused_in_words(robot, frames):
    wide = [replace(f, depth=np.ascontiguousarray(f.depth[::2])) for f in frames[:3]]
    assert robot.walk(wide, timeout_s=0.3) == 0
    assert robot.says('IMAGE_REFUSED')
    assert any('register the depth' in cause['sentence'] for cause in robot.report()['causes'])


def test_asking_often_does_not_look_like_a_repeated_image(robot, frames):
    assert robot.walk(frames) == len(frames)
    for _ in range(8):
        robot.probe.call(Trigger, '/localize')
    assert 'IMAGE_REPEATED' not in robot.codes()


# -- other inputs -------------------------------------------------------------------------------

def test_poses_that_are_no_poses_are_refused_in_words(robot, frames):
    odometry = robot.probe.publisher(Odometry, '/odom')
    initial = robot.probe.publisher(PoseWithCovarianceStamped, '/initialpose')
    imu = robot.probe.publisher(Imu, '/imu', reliable=False)
    stamp = stamp_msg(robot.now_ns)
    bad = Odometry(child_frame_id='base_link')
    bad.header.frame_id, bad.header.stamp = 'odom', stamp
    hint = PoseWithCovarianceStamped()
    hint.header.frame_id = 'map'
    for message in (bad.pose.pose, hint.pose.pose):
        message.orientation.w = 0.0
        message.position.x = float('nan')
    felt = Imu()
    felt.linear_acceleration.x = float('nan')

    def refused():
        for publisher, message in ((odometry, bad), (initial, hint), (imu, felt)):
            publisher.publish(message)
        return {'ODOMETRY_REFUSED', 'INITIALPOSE_REFUSED'} <= set(robot.codes())

    assert robot.probe.spin_until(refused), robot.codes()
    assert robot.walk(frames[:4]) == 4
    assert robot.errors().max() < 0.02


# -- services -----------------------------------------------------------------------------------

def test_services_called_all_at_once_all_answer(robot, frames):
    assert robot.walk(frames[:4]) == 4
    robot.set('map', '/proc/never/a/map')
    node = robot.probe.node
    names = [f'{NAME}/{name}' for name in ('doctor', 'save_map', 'reset', 'load_map')]
    clients = [node.create_client(Trigger, name) for name in (*names, '/localize')]
    switches = [node.create_client(SetBool, f'{NAME}/{name}')
                for name in ('pause', 'set_localization_mode')]
    assert robot.probe.spin_until(lambda: all(
        c.service_is_ready() for c in (*clients, *switches)))
    calls = []
    for turn in range(6):
        calls += [c.call_async(Trigger.Request()) for c in clients]
        calls += [c.call_async(SetBool.Request(data=turn % 2 == 0)) for c in switches]
        robot.send(frames[4 + turn])
    assert robot.probe.spin_until(lambda: all(c.done() for c in calls), 20.0)
    assert all(call.result().message for call in calls)
    for client in (*clients, *switches):
        node.destroy_client(client)
    robot.call('pause', on=False)
    robot.call('set_localization_mode', on=False)


def test_a_hundred_resets_leave_nothing_behind(robot, frames):
    def resident_mb():
        return int(Path(f'/proc/{robot.node.pid}/statm').read_text().split()[1]) * 4096 / 1e6

    before = 0.0
    for turn in range(100):
        if turn % 3 == 0:
            robot.send(frames[turn % 4])
        assert robot.call('reset').success
        before = before or (resident_mb() if turn == 20 else 0.0)
    assert resident_mb() - before < 40


def damaged(folder, how, tmp_path):
    """A copy of a map folder with one thing wrong."""
    copy = tmp_path / how.replace(' ', '_')
    shutil.copytree(folder, copy)
    memory, described = copy / 'memory.safetensors', copy / 'map.yaml'
    if how == 'a truncated memory':
        memory.write_bytes(memory.read_bytes()[:1000])
    elif how == 'a flipped bit':
        content = bytearray(memory.read_bytes())
        content[-100] ^= 1
        memory.write_bytes(content)
    elif how == 'no memory':
        memory.unlink()
    elif how == 'a truncated description':
        described.write_bytes(described.read_bytes()[:200])
    elif how == 'a description that is no text':
        described.write_bytes(bytes(range(256)))
    elif how == 'an empty folder':
        shutil.rmtree(copy)
        copy.mkdir()
    elif how == 'a file':
        shutil.rmtree(copy)
        copy.write_text('a map')
    return copy


def test_maps_that_cannot_be_saved_or_loaded_leave_the_one_there_is(robot, frames, tmp_path):
    assert robot.walk(frames) == len(frames)
    (tmp_path / 'file').write_text('not a folder')
    for path in (tmp_path / 'file' / 'map', '', '/proc/never/map'):
        robot.set('map', path)
        reply = robot.call('save_map')
        assert not reply.success and 'expected' in reply.message, reply.message
    robot.set('map', tmp_path / 'map')
    saved = robot.call('save_map')
    assert saved.success, saved.message
    for how in ('a truncated memory', 'a flipped bit', 'no memory', 'a truncated description',
                'a description that is no text', 'an empty folder', 'a file'):
        robot.set('map', damaged(tmp_path / 'map', how, tmp_path))
        reply = robot.call('load_map')
        assert not reply.success and 'expected' in reply.message, (how, reply.message)
        assert 'internal' not in reply.message
    report = robot.report()
    assert report['mode'] == 'mapping' and report['keyframes'] > 0
    assert robot.walk(frames[-4:]) == 4
    assert robot.errors().max() < 0.02
    found = robot.probe.call(Trigger, '/localize')
    assert found.success, found.message


def test_a_query_is_answered_with_its_stamp_or_with_the_reason(robot, frames, elsewhere):
    poses = robot.probe.collect(PoseWithCovarianceStamped, '/query_pose')
    results = robot.probe.collect(String, '/query_result')
    query = robot.probe.publisher(Image, '/query_image')
    assert robot.probe.spin_until(query.get_subscription_count)

    def ask(message):
        count = len(results)
        query.publish(message)
        assert robot.probe.spin_until(lambda: len(results) > count), robot.node.output
        return json.loads(results[-1].data)

    assert ask(image_msg(frames[0].image, OPTICAL, 7))['reason'] == 'NO_MAP'
    assert robot.walk(frames) == len(frames)
    assert robot.call('set_localization_mode', on=True).success
    answer = ask(image_msg(frames[5].image, OPTICAL, 77))
    assert answer['stamp_ns'] == 77 and answer['pose'] is not None, answer
    assert robot.probe.spin_until(lambda: stamps(poses) == [77])
    refusal = ask(image_msg(elsewhere[0].image, OPTICAL, 78))
    assert refusal['stamp_ns'] == 78 and refusal['pose'] is None and refusal['reason']
    broken = image_msg(frames[5].image, OPTICAL, 79)
    broken.encoding = 'secret9'
    assert 'secret9' in ask(broken)['reason']
    small = image_msg(np.ascontiguousarray(frames[5].image[::2, ::2]), OPTICAL, 80)
    assert '160x120' in ask(small)['reason']
    assert stamps(poses) == [77]
    assert robot.call('set_localization_mode', on=False).success


# -- what needs a node of its own ---------------------------------------------------------------

@pytest.fixture
def fresh(start_node, probe):
    def started(parameters, *, info=True):
        node = start_node('mapping_node', parameters={**QUICK, **parameters,
                                                      'use_sim_time': True})
        return Robot(node, probe, info=info)
    return started


def test_a_late_calibration_starts_an_upright_map(fresh, frames):
    robot = fresh({}, info=False)
    assert robot.walk(frames[:4], info=False) > 0
    assert robot.says('INFO_MISSING')
    robot.sent = {}
    robot.send(frames[0])
    assert robot.says('CALIBRATION_LATE')
    robot.walk(frames[1:])
    assert robot.report()['camera_source'] == 'given'
    # The image that came with the calibration may have been used before it.
    errors = min((robot.errors(start)[1:] for start in (0, 1)), key=np.max)
    assert len(errors) > 5 and errors.max() < 0.02


def test_transforms_that_come_late_are_named_and_waited_for(fresh, frames, needs_tf):
    T_base_cam = make_transform(so3_exp(np.array([0, 0.2, 0.3])) @ R_BODY_OPTICAL,
                                np.array([0.3, 0, 0.2]))
    robot = fresh({'tf_mode': 'map_to_base'})
    sent = robot.probe.collect(TFMessage, '/tf')
    assert robot.walk(frames[:3], timeout_s=0.5) == 0
    assert robot.says('TF_MISSING') and robot.says('TF_LATE')
    sentences = ' '.join(cause['sentence'] for cause in robot.report()['causes'])
    assert 'base_link' in sentences and OPTICAL in sentences
    assert not sent
    static = robot.probe.publisher(TFMessage, '/tf_static', latched=True)
    static.publish(TFMessage(transforms=[transform_msg(T_base_cam, 'base_link', OPTICAL, 0)]))
    assert robot.probe.spin_until(lambda: 'TF_MISSING' not in robot.codes())
    assert robot.call('reset').success
    robot.sent = {}
    assert robot.walk(frames[3:9]) == 6
    T_map_world = inverse(frames[3].T_map_cam @ inverse(T_base_cam))
    T_map_base = T_map_world @ frames[8].T_map_cam @ inverse(T_base_cam)
    np.testing.assert_allclose(matrix_from_pose(robot.poses[-1].pose.pose), T_map_base, atol=0.01,
                               err_msg=str(robot.codes()))
    assert robot.probe.spin_until(lambda: len(sent) == 6)
    last = sent[-1].transforms[-1]
    assert (last.header.frame_id, last.child_frame_id) == ('map', 'base_link')
    np.testing.assert_allclose(matrix_from_transform(last), matrix_from_pose(
        robot.poses[-1].pose.pose), atol=1e-6)
