"""Parts of the nodes without DDS: pairing of depth, queues and threads."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from geometry_msgs.msg import TransformStamped

from feedforward_recon.config.node import NodeConfig
from feedforward_recon.errors import InputError
from feedforward_recon.ros import session_runner
from feedforward_recon.ros.arrivals import Arrival
from feedforward_recon.ros.depth_pairing import DepthPairing
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.host import Host
from feedforward_recon.ros.map_start import FirstPose
from feedforward_recon.ros.pose_publisher import WAITING_POSES
from feedforward_recon.ros.positioning import Positioning
from feedforward_recon.ros.topic_sources import TopicChoice, transports
from feedforward_recon.ros.worker import FrameQueue, Job, Worker

MS = 1_000_000

# -- pairing of depth ---------------------------------------------------------------------------

@pytest.mark.parametrize('depth_first', [True, False])
@pytest.mark.parametrize('period_ms', [100, 33, 16])
def test_images_get_the_depth_of_their_own_moment(depth_first, period_ms):
    """Also where the frames follow each other faster than the slop."""
    pairing, pairs = DepthPairing(20 * MS), []
    for index in range(20):
        stamp = index * period_ms * MS
        adds = [(pairing.add_depth, f'depth {index}'), (pairing.add_image, index)]
        for add, message in adds if depth_first else adds[::-1]:
            pairs += add(stamp, message)
    assert pairs == [(index, f'depth {index}') for index in range(20)]


def test_depth_that_lags_by_frames_still_meets_its_image():
    pairing, pairs = DepthPairing(5 * MS), []
    for index in range(20):
        pairs += pairing.add_image(index * 33 * MS, index)
        if index >= 3:
            pairs += pairing.add_depth((index - 3) * 33 * MS + 2 * MS, index - 3)
    assert pairs == [(index, index) for index in range(17)]


def test_a_slower_depth_camera_leaves_the_images_between_without():
    pairing, pairs = DepthPairing(5 * MS), []
    for index in range(20):
        pairs += pairing.add_image(index * 33 * MS, index)
        if index % 2 == 0:
            pairs += pairing.add_depth(index * 33 * MS, index)
    assert pairs == [(index, index if index % 2 == 0 else None) for index in range(19)]


@pytest.mark.parametrize(('gap_ms', 'pairs'), [(20, True), (21, False), (-20, True),
                                               (-21, False)])
def test_depth_within_the_slop_is_of_the_same_moment(gap_ms, pairs):
    pairing = DepthPairing(20 * MS)
    pairing.add_image(100 * MS, 'image')
    ready = pairing.add_depth((100 + gap_ms) * MS, 'depth')
    ready += pairing.add_depth(200 * MS, 'later') if not ready else []
    assert ready == [('image', 'depth' if pairs else None)]


def test_images_without_depth_wait_in_bounded_number_and_in_order():
    pairing = DepthPairing(5 * MS)
    ready = [pair for index in range(50)
             for pair in pairing.add_image(index * 33 * MS, index)]
    assert ready == [(index, None) for index in range(len(ready))]
    assert 0 < 50 - len(ready) <= 10


def test_after_the_time_went_back_nothing_of_the_future_is_paired():
    pairing = DepthPairing(20 * MS)
    pairing.add_depth(10_000 * MS, 'old depth')
    pairing.add_image(10_040 * MS, 'old image')
    pairing.forget_after(100 * MS)
    assert pairing.add_image(100 * MS, 'image') == []
    assert pairing.add_depth(100 * MS, 'depth') == [('image', 'depth')]


# -- poses and transforms -----------------------------------------------------------------------

SECOND, CAMERA = 1000 * MS, 'camera_optical_frame'


class RosNode:
    """What the parts of a node use of rclpy; timers run when the test says so."""

    def __init__(self):
        self.publishers, self.lines, self.timers = {'/tf': 1}, [], []

    def create_subscription(self, *_):
        return None

    def create_timer(self, _period_s, callback, **_):
        self.timers.append(callback)
        return SimpleNamespace()

    def resolve_topic_name(self, name):
        return name

    def count_publishers(self, topic):
        return self.publishers.get(topic, 0)

    def get_logger(self):
        return SimpleNamespace(info=self.lines.append)

    def get_clock(self):
        return SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=0))


class Robot:
    """Positioning of an active node; keeps what it publishes."""

    def __init__(self, **config):
        self.node, self.health, config = RosNode(), Health('node'), NodeConfig(**config)
        self.published, self.sent = [], []
        self.positioning = Positioning(
            Host(self.node, SimpleNamespace(config=config), self.health))
        self.positioning.connect(SimpleNamespace(), SimpleNamespace(
            pose=self.published.append, transforms=self.sent.extend))
        self.positioning.start(config)

    @property
    def buffer(self):
        return self.positioning.frames.buffer

    def first_pose(self, arrival):
        return self.positioning.map_start.first_pose(arrival)

    def look(self, stamp):
        """An image that is measured at once; False when it has to wait for TF."""
        arrival = Arrival(stamp, CAMERA, None, None, None, 0)
        if self.first_pose(arrival) is None:
            return False
        estimate = SimpleNamespace(T_map_cam=np.eye(4), covariance=np.eye(6))
        self.positioning.poses.measured(arrival, estimate, SimpleNamespace(metres_per_unit=1.0))
        return True

    def tick(self):
        for callback in self.node.timers:
            callback()

    def stamps(self):
        return [pose.stamp_ns for pose in self.published]

    def children(self):
        return [(t.header.frame_id, t.child_frame_id) for t in self.sent]

    def codes(self):
        return list(self.health.warnings)

    def mount(self):
        self.buffer.set('base_link', CAMERA, np.eye(4), 0, static=True)

    def drive(self, stamp):
        self.buffer.set('odom', 'base_link', np.eye(4), stamp)


def test_poses_that_wait_for_odometry_are_bounded_in_number_in_order_and_not_lost():
    robot = Robot(tf_wait_s=10.0)
    robot.mount()
    robot.drive(0)
    expected = [index * 30 * MS for index in range(1, 101)]
    assert all(robot.look(stamp) for stamp in expected)
    assert robot.stamps() == expected[:100 - WAITING_POSES + 1] and not robot.sent
    assert robot.codes() == ['TF_LATE']
    robot.drive(3000 * MS)
    robot.positioning.poses.flush()
    assert robot.stamps() == expected
    assert set(robot.children()) == {('map', 'odom')} and len(robot.sent) == WAITING_POSES - 1


@pytest.mark.parametrize(('topic', 'known'), [('/tf', False), ('/tf_static', False),
                                              ('odom', True), ('/tf', True)])
def test_a_map_waits_for_what_somebody_may_publish_and_not_for_ever(topic, known):
    robot = Robot(tf_wait_s=0.2)
    robot.node.publishers[topic] = robot.node.publishers.get(topic, 0) + 1
    if known:
        robot.mount()
    assert not robot.look(SECOND)
    time.sleep(0.25)
    assert robot.look(2 * SECOND) and robot.published


def test_a_map_that_is_there_or_a_tf_without_others_makes_no_image_wait():
    alone = Robot(tf_wait_s=10.0)
    assert alone.look(SECOND) and alone.children() == [
        ('map', CAMERA), (CAMERA, f'{CAMERA}_body')]
    mapped = Robot(tf_wait_s=10.0)
    mapped.node.publishers['/tf'] = 2
    mapped.health.keyframes = 1
    assert mapped.look(SECOND)


def test_what_made_the_map_upright_is_said_once_per_map():
    robot = Robot()
    start, lines = robot.positioning.map_start, robot.node.lines
    arrival = Arrival(SECOND, CAMERA, None, None, None, 0)
    first = robot.first_pose(arrival)
    robot.mount()
    for pose in (first, robot.first_pose(arrival), first):
        start.map_has(pose)
    assert lines == ['the map is upright by: level camera']
    robot.positioning.new_map()
    start.map_has(robot.first_pose(arrival))
    assert lines[1:] == ['the map is upright by: level base']


def test_a_correction_is_not_sent_on_when_its_frame_gets_another_parent():
    robot = Robot()
    robot.mount()
    robot.drive(SECOND)
    assert robot.look(SECOND)
    robot.tick()
    assert robot.children() == [('map', 'odom')] * 2
    robot.buffer.set('earth', 'odom', np.eye(4), SECOND)
    robot.tick()
    assert len(robot.sent) == 2 and 'TWO_PARENTS' in robot.codes()


@pytest.mark.parametrize(('parent', 'child', 'own', 'said'), [
    ('map', 'odom', False, True), ('map', 'base_link', False, True),
    ('map', 'odom', True, False), ('map', 'table', False, False)])
def test_who_else_sends_below_the_map_is_told_from_ourselves(parent, child, own, said):
    robot = Robot()
    robot.mount()
    if own:
        robot.drive(0)
        assert robot.look(0)
        heard = robot.sent.pop()
        assert (heard.header.frame_id, heard.child_frame_id) == (parent, child)
    else:
        heard = TransformStamped(child_frame_id=child)
        heard.header.frame_id = parent
    robot.positioning.listener.take([heard])
    robot.drive(SECOND)
    assert robot.look(SECOND)
    assert ('TWO_PUBLISHERS' in robot.codes()) == said
    assert robot.children() == [('map', 'odom')]


def test_the_body_that_we_name_below_the_camera_is_not_taken_from_somebody_else():
    robot = Robot()
    robot.buffer.set('hand', f'{CAMERA}_body', np.eye(4), SECOND)
    assert robot.look(SECOND)
    assert robot.children() == [('map', CAMERA)] and robot.codes() == ['TWO_PARENTS']


def test_a_node_without_outputs_publishes_nothing():
    robot = Robot()
    robot.positioning.disconnect()
    assert robot.look(SECOND)
    robot.tick()
    assert not robot.published and not robot.sent


# -- threads ------------------------------------------------------------------------------------

def test_a_live_queue_keeps_the_newest_and_counts_the_rest():
    queue = FrameQueue('live', 3)
    for frame in range(10):
        queue.put(frame)
    assert (len(queue), queue.dropped) == (3, 7)
    assert [queue.take() for _ in range(4)] == [7, 8, 9, None]


def test_an_offline_queue_makes_the_sender_wait_and_loses_nothing():
    queue, taken = FrameQueue('offline', 2), []
    sender = threading.Thread(target=lambda: [queue.put(i) for i in range(200)], daemon=True)
    sender.start()
    while sender.is_alive() or len(queue):
        assert len(queue) <= 2
        if (frame := queue.take()) is not None:
            taken.append(frame)
    assert taken == list(range(200)) and queue.dropped == 0


@pytest.mark.parametrize('release', [FrameQueue.close, FrameQueue.clear, FrameQueue.take])
def test_a_waiting_sender_is_let_go(release):
    queue = FrameQueue('offline', 1)
    queue.put(0)
    sender = threading.Thread(target=queue.put, args=(1,), daemon=True)
    sender.start()
    release(queue)
    sender.join(5)
    assert not sender.is_alive()


class Letters:
    """A mailbox that is read when the test says so."""

    def __init__(self):
        self.calls, self.came = [], threading.Semaphore(0)

    def post(self, call):
        self.calls.append(call)
        self.came.release()

    def read(self, count):
        """Wait for as many calls and make them."""
        for _ in range(count):
            assert self.came.acquire(timeout=5), 'no answer'
            self.calls.pop(0)()


def test_a_worker_survives_what_it_is_asked_and_says_what_went_wrong():
    letters, said = Letters(), []

    def fail(*_):
        raise ZeroDivisionError('no')

    worker = Worker('w', letters, FrameQueue('live', 5), fail,
                    lambda frame, answer, error: said.append((frame, answer, type(error))))
    worker.ask(Job(fail, lambda result, error: said.append((result, type(error)))))
    worker.offer('frame')
    worker.ask(Job(lambda: 7, lambda result, error: said.append((result, error))))
    worker.start()
    letters.read(3)
    assert said == [(None, ZeroDivisionError), (7, None), ('frame', None, ZeroDivisionError)]
    assert worker.stop(5)


def test_a_worker_that_stops_does_what_was_asked_for_before():
    letters, said, hold, started = Letters(), [], threading.Event(), threading.Event()
    worker = Worker('w', letters, FrameQueue('live', 5))

    def slow():
        started.set()
        hold.wait(5)
        return 'done'

    worker.ask(Job(slow, lambda result, error: said.append(result)))
    worker.ask(Job(lambda: 'the last', lambda result, error: said.append(result)))
    worker.start()
    assert started.wait(5) and not worker.stop(0.0)
    hold.set()
    letters.read(2)
    assert said == ['done', 'the last'] and worker.stop(5)


class FakeSession:
    """A session whose images are decoded already; bad ones are refused."""

    info, is_busy = SimpleNamespace(window='', keyframes=0), False

    def process(self, frame, T_map_first, *, finish_work, on_pose):
        if frame.image is None:
            raise InputError('expected an image, found none')
        estimate = SimpleNamespace(T_map_cam=np.eye(4), is_keyframe=False)
        on_pose(estimate)
        return estimate

    def late(self):
        return []

    def work(self):
        return False


@pytest.fixture
def runner(monkeypatch):
    """A running SessionRunner, its mailbox, and the names of the results it has handed on."""
    monkeypatch.setattr(session_runner, 'session_of', lambda config, wake: FakeSession())
    monkeypatch.setattr(session_runner, 'decoded_frame', lambda arrival, inputs: SimpleNamespace(
        image=arrival.image, depth=None))
    health, names, letters = Health('node'), [], Letters()
    health.pictures = SimpleNamespace(look=lambda image, depth: None)
    results = SimpleNamespace(**{name: lambda *_, name=name: names.append(name) for name in (
        'pose_known', 'image_used', 'image_refused', 'poses_found')})
    made = session_runner.SessionRunner(NodeConfig(), letters, health, results)
    yield made, letters, names
    made.close()


def offered(runner, image):
    runner.offer(Arrival(SECOND, CAMERA, image, None, None, 0), FirstPose(np.eye(4), 'imu'))


def test_a_pose_is_handed_on_before_its_image_is_done_and_bad_images_are_refused(runner):
    made, letters, names = runner
    offered(made, np.zeros((2, 2, 3), np.uint8))
    letters.read(2)
    assert names == ['pose_known', 'image_used']
    offered(made, None)
    letters.read(1)
    assert names[2:] == ['image_refused']


def test_after_a_runner_was_closed_only_jobs_are_answered(runner):
    made, letters, names = runner
    offered(made, np.zeros((2, 2, 3), np.uint8))
    assert letters.came.acquire(timeout=5), 'the image was not begun'
    letters.came.release()
    answers = []
    made.ask(lambda: 'done', lambda result, error: answers.append(result))
    made.close()
    letters.read(3)
    assert names == [] and answers == ['done']


# -- raw or compressed --------------------------------------------------------------------------

def test_the_best_source_that_is_published_is_chosen_and_not_in_a_hurry():
    raw, beside, itself = transports('/image', '/compressed', 'auto')
    assert (beside.topic, itself.topic) == ('/image/compressed', '/image')
    choice, published = TopicChoice([raw, beside, itself]), set()

    def look(now_s):
        return choice.look(published.__contains__, now_s)

    assert not look(0.0) and choice.chosen == raw
    published.add(beside)
    assert not look(1.0) and not look(1.2)
    published.add(raw)  # the driver had only begun
    assert not look(1.3)
    published.remove(raw)
    assert not look(2.0) and not look(2.3) and look(2.5) and choice.chosen == beside
    published.clear()
    assert not look(3.0) and not look(9.0) and choice.chosen == beside
    published.add(raw)
    assert look(9.1) and choice.chosen == raw


@pytest.mark.parametrize(('setting', 'topics'), [('raw', ['/image']),
                                                 ('compressed', ['/image/compressed'])])
def test_a_transport_that_was_set_is_kept(setting, topics):
    choice = TopicChoice(transports('/image', '/compressed', setting))
    assert [source.topic for source in choice.sources] == topics
    assert not any(choice.look(lambda _: False, float(now)) for now in range(5))
