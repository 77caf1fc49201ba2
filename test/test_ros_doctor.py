"""The doctor over real DDS: it names the fault, also when nothing runs at all."""

import json
import sys
import threading
import time

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy', reason='ros: rclpy is not installed')

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402
from sensor_msgs.msg import CameraInfo, Image  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from feedforward_recon.ros.doctor import main  # noqa: E402


@pytest.fixture(autouse=True)
def domain(ros_domain, monkeypatch):
    """A domain of its own."""
    monkeypatch.setattr('sys.argv', ['doctor'])
    return str(ros_domain.id)


class Driver:
    """A camera driver at 20 Hz in a thread; ``change`` spoils what it sends."""

    def __init__(self, pixels, change):
        self.context = rclpy.Context()
        rclpy.init(context=self.context)
        self.node = rclpy.create_node('driver', context=self.context)
        self.pixels, self.change = pixels, change
        self.images = self.node.create_publisher(Image, '/camera/image_raw', 5)
        self.infos = self.node.create_publisher(CameraInfo, '/camera/camera_info', 5)
        self.count = 0
        self.node.create_timer(0.05, self.send)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.thread = threading.Thread(target=self.executor.spin, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.executor.shutdown()
        self.thread.join(5)
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def send(self):
        pixels = self.pixels[self.count % len(self.pixels)]
        self.count += 1
        height, width = pixels.shape[:2]
        image = Image(height=height, width=width, encoding='rgb8', step=3 * width,
                      data=pixels.tobytes())
        k = [100.0, 0, width / 2, 0, 100.0, height / 2, 0, 0, 1.0]
        info = CameraInfo(height=height, width=width, k=np.array(k),
                          distortion_model='plumb_bob', d=[0.0] * 5)
        for message in (image, info):
            message.header.stamp = self.node.get_clock().now().to_msg()
            message.header.frame_id = 'camera_optical_frame'
        self.change(image, info)
        self.images.publish(image)
        self.infos.publish(info)


@pytest.fixture
def driver(room_frames):
    def started(change=lambda image, info: None):
        return Driver([frame.image for frame in room_frames], change)
    return started


def examined(capsys, *arguments):
    """Exit code and JSON report of the doctor; where tf2_msgs is missing that is no news."""
    code = main(['--json', '--seconds', '2', *arguments])
    told = json.loads(capsys.readouterr().out)
    told['codes'] = [c['code'] for c in told['causes'] if c['code'] != 'NO_TF2_MSGS']
    return code, told


CAMERA = ('--image-topic', '/camera/image_raw', '--camera-info-topic', '/camera/camera_info')


def test_nothing_runs(capsys, domain):
    code, told = examined(capsys)
    assert code == 1
    assert told['codes'] == ['NO_NODES', 'NO_PUBLISHER']
    assert f'domain {domain};' in told['causes'][0]['sentence']
    assert 'no topic of this type exists' in told['causes'][1]['sentence']
    assert 'numpy' in told['environment'] and told['conversions']
    assert main(['--seconds', '1']) == 1
    said = capsys.readouterr().out
    assert 'NO_NODES' in said and 'nobody publishes /image' in said


def test_a_good_camera_has_no_fault(capsys, driver):
    with driver():
        _, told = examined(capsys, *CAMERA)
    assert told['codes'] == []
    image = told['inputs']['image']
    assert image['messages'] > 10
    assert image['rate_hz'] == pytest.approx(20, abs=5)
    assert image['size'] == '160x120' and image['frame_id'] == 'camera_optical_frame'
    assert image['publishers'] == [{'node': 'driver', 'reliability': 'reliable'}]
    assert told['camera_info'] == 'GOOD'


def test_a_wrong_topic_names_the_right_one(capsys, driver):
    with driver():
        code, told = examined(capsys)
    assert (code, told['codes']) == (1, ['NO_PUBLISHER'])
    assert '/camera/image_raw' in told['causes'][0]['sentence']


def blacken(image, info):
    image.data = bytes(len(image.data))


def uncalibrate(image, info):
    info.k = np.zeros(9)


def halve(image, info):
    info.width, info.height = 80, 60


def anonymous(image, info):
    image.header.frame_id = ''


def age(image, info):
    image.header.stamp.sec -= 3600


def unstamp(image, info):
    image.header.stamp.sec = image.header.stamp.nanosec = 0


def cipher(image, info):
    image.encoding = 'secret9'


@pytest.mark.parametrize(('change', 'code'), [
    (blacken, 'IMAGE_BLACK'), (uncalibrate, 'INFO_ZERO'), (halve, 'INFO_OTHER_SIZE'),
    (anonymous, 'FRAME_ID_EMPTY'), (age, 'CLOCK_OFFSET'), (unstamp, 'STAMPS_ZERO'),
    (cipher, 'IMAGE_REFUSED')])
def test_faults_of_a_camera_are_named(capsys, driver, change, code):
    with driver(change):
        exit_code, told = examined(capsys, *CAMERA)
    assert exit_code == 1
    assert code in told['codes']


def test_a_library_that_cannot_be_imported_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch', None)
    _, told = examined(capsys)
    assert told['codes'][0] == 'LIBRARY_MISSING'
    assert 'Python cannot import torch' in told['causes'][0]['sentence']


def send_static(node, *edges):
    """Latch one unit transform per (parent, child) on /tf_static."""
    from geometry_msgs.msg import TransformStamped
    from tf2_msgs.msg import TFMessage

    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    message = TFMessage()
    for parent, child in edges:
        edge = TransformStamped(child_frame_id=child)
        edge.header.frame_id, edge.transform.rotation.w = parent, 1.0
        message.transforms.append(edge)
    node.create_publisher(TFMessage, '/tf_static', latched).publish(message)


@pytest.mark.usefixtures('needs_tf')
def test_the_missing_edge_of_tf_is_named(capsys, driver):
    with driver() as camera:
        send_static(camera.node, ('base_link', 'arm'))
        _, told = examined(capsys, *CAMERA, '--tf-mode', 'map_to_odom')
        assert told['codes'] == ['TF_MISSING', 'TF_MISSING']
        assert 'odom and base_link' in told['causes'][0]['sentence']
        assert 'base_link and camera_optical_frame' in told['causes'][1]['sentence']
        send_static(camera.node, ('odom', 'base_link'), ('base_link', 'camera_optical_frame'))
        _, told = examined(capsys, *CAMERA)
    assert (told['codes'], told['tf_mode']) == ([], 'map_to_odom')


def test_the_report_of_a_running_node_is_added(capsys, driver):
    with driver() as camera:
        def answer(_, response):
            response.success = False
            response.message = json.dumps({'level': 'ERROR', 'summary': 'no map', 'causes': [
                {'code': 'NO_MAP', 'sentence': 'no map; load one'}]})
            return response

        camera.node.create_service(Trigger, '/mapping_node/doctor', answer)
        code, told = examined(capsys, *CAMERA)
    assert (code, told['codes']) == (1, ['NO_MAP'])
    assert told['causes'][-1]['sentence'] == '/mapping_node/doctor: no map; load one'


@pytest.mark.slow
def test_a_node_that_does_not_answer_is_named(capsys, driver):
    with driver() as camera:
        camera.node.create_service(Trigger, '/mapping_node/doctor',
                                   lambda _, response: time.sleep(8) or response)
        _, told = examined(capsys, *CAMERA)
    assert 'NODE_SILENT' in told['codes']


@pytest.mark.parametrize('arguments', [['--seconds', '0'], ['--tf-mode', 'odom'], ['--zzz']])
def test_bad_arguments_are_one_line(capsys, arguments):
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith('error: ')
