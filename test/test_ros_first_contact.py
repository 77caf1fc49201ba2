"""What a user meets first: wrong topics, compressed cameras, no map; the log says why."""

import json
import time
from dataclasses import replace

import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from ros_support.camera import CAMERA, OPTICAL, FakeCamera, stamps, walk
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_srvs.srv import SetBool, Trigger

from feedforward_recon.io.encode import DEPTH_FORMAT, JPEG_FORMAT, compressed_depth, jpeg
from feedforward_recon.ros.convert import header_msg, info_msg
from feedforward_recon.ros.doctor import main

NAME = '/mapping_node'
QUICK = {'memory.slots': 8000, 'memory.cells': 2000, 'memory.samples': 20_000,
         'tf_wait_s': 0.2, 'info_wait_s': 0.5, 'silence_s': 1.0}


@pytest.fixture(scope='module')
def frames():
    return walk(5, 40)


def lines(node, *words):
    """Lines of the log with all of these words."""
    return [line for line in node.output.splitlines() if all(word in line for word in words)]


def says(probe, node, *words, timeout_s=15.0):
    """True once the log has a line with all of these words."""
    assert probe.spin_until(lambda: lines(node, *words), timeout_s), node.output
    return True


def report(probe, name=NAME):
    return json.loads(probe.call(Trigger, f'{name}/doctor').message)


# -- the log ------------------------------------------------------------------------------------

def test_a_wrong_topic_is_told_once_with_the_right_ones_and_so_is_its_end(start_node, probe,
                                                                          frames):
    raw = probe.publisher(Image, '/camera/image_raw')
    probe.publisher(CompressedImage, '/rear/image_raw/compressed')
    node = start_node('mapping_node', parameters=QUICK)
    assert says(probe, node, 'NO_PUBLISHER: nobody publishes /image')
    probe.spin_for(2.0)
    (line,) = lines(node, 'NO_PUBLISHER')
    assert 'ERROR' in line
    assert '/camera/image_raw' in line and '/rear/image_raw/compressed' in line
    assert raw.get_subscription_count() == 0
    camera = FakeCamera(probe)
    assert camera.heard(), node.output
    assert lines(node, 'first image on /image: 320x240 rgb8')
    assert says(probe, node, 'NO_PUBLISHER is over (/image)')
    assert len(lines(node, 'NO_PUBLISHER')) == 2


def test_a_missing_calibration_is_told_once_and_so_is_its_end(start_node, probe, frames):
    node = start_node('mapping_node', parameters=QUICK)
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    camera = FakeCamera(probe, info=False)
    assert camera.heard(), node.output
    camera.play(frames[:8], poses, timeout_s=0.3)
    assert says(probe, node, 'INFO_MISSING: no calibration on /camera_info')
    camera.info = probe.publisher(CameraInfo, '/camera_info')
    assert camera.ready()
    camera.play(frames[8:12], poses, timeout_s=0.3)
    assert says(probe, node, '/camera_info: calibration of 320x240 images')
    assert says(probe, node, 'INFO_MISSING is over')
    assert len(lines(node, 'INFO_MISSING')) == 2
    assert len(lines(node, 'calibration of 320x240')) == 1


def test_being_lost_and_found_is_a_line_each(start_node, probe, frames):
    node = start_node('mapping_node', parameters=QUICK)
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    camera = FakeCamera(probe)
    assert camera.heard(), node.output
    assert camera.play(frames[:10], poses) >= 5, node.output
    assert len(lines(node, 'the map has started; camera: given, scale: depth')) == 1
    shown = Film(camera, frames[9].stamp_ns)
    elsewhere = walk(11, 6)
    assert probe.spin_until(lambda: shown(elsewhere) and lines(node, 'LOST: '), 20), node.output
    assert probe.spin_until(lambda: shown(frames[4:9]) and lines(node, 'LOST is over'), 20), \
        node.output
    assert lines(node, 'LOST is over: the camera was found again')
    assert len(lines(node, 'LOST')) == 2


class Film:
    """Shows frames over and over, with stamps that go on, one every 0.2 s."""

    def __init__(self, camera, stamp_ns):
        self.camera, self.stamp_ns, self.count, self.due_s = camera, stamp_ns, 0, 0.0

    def __call__(self, frames):
        if time.monotonic() >= self.due_s:
            self.due_s = time.monotonic() + 0.2
            self.stamp_ns += 200_000_000
            self.count += 1
            back_and_forth = [*frames, *frames[-2:0:-1]]
            self.camera.send(replace(back_and_forth[self.count % len(back_and_forth)],
                                     stamp_ns=self.stamp_ns))
        return True


# -- compressed cameras -------------------------------------------------------------------------

class CompressedCamera:
    """Publishes compressed images and depth only, and a calibration once, before all."""

    def __init__(self, probe, topic='/image/compressed'):
        self.probe = probe
        self.image = probe.publisher(CompressedImage, topic)
        self.depth = probe.publisher(CompressedImage, '/depth/compressedDepth')
        self.info = probe.publisher(CameraInfo, '/camera_info', latched=True)
        self.info.publish(info_msg(CAMERA, OPTICAL, 1))

    def ready(self):
        """A node listens to images and depth, and has the calibration."""
        return self.probe.spin_until(lambda: self.image.get_subscription_count()
                                     and self.depth.get_subscription_count()
                                     and self.info.get_subscription_count())

    def play(self, frames, poses):
        """Send frames, each after the last one's pose came; returns how many had a pose."""
        answered = 0
        for frame in frames:
            before, header = len(poses), header_msg(OPTICAL, frame.stamp_ns)
            self.depth.publish(CompressedImage(
                header=header, format=DEPTH_FORMAT, data=compressed_depth(frame.depth).tobytes()))
            self.image.publish(CompressedImage(
                header=header, format=JPEG_FORMAT, data=jpeg(frame.image).tobytes()))
            answered += self.probe.spin_until(lambda before=before: len(poses) > before, 2.0)
        return answered


@pytest.mark.parametrize('topic', ['/image/compressed', '/image'])
def test_a_camera_with_compressed_images_alone_is_mapped_without_a_setting(
        start_node, probe, frames, topic):
    """Also where the compressed topic itself was given, as if it were raw."""
    camera = CompressedCamera(probe, topic)
    node = start_node('mapping_node', parameters=QUICK)
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    assert says(probe, node, f'image: listening to {topic} (CompressedImage)')
    assert says(probe, node, 'depth: listening to /depth/compressedDepth')
    assert camera.ready() and probe.is_known_to(NAME)
    assert camera.play(frames[:10], poses) >= 8, node.output
    told = report(probe)
    assert told['inputs']['image']['topic'] == topic
    assert told['inputs']['depth']['topic'] == '/depth/compressedDepth'
    assert (told['camera_source'], told['scale_source']) == ('given', 'depth')
    assert {c['code'] for c in told['causes']} <= {'CLOCK_OFFSET', 'SILENT', 'NO_TF2_MSGS'}


def test_raw_images_are_preferred_as_soon_as_there_are_any(start_node, probe, frames):
    compressed = CompressedCamera(probe)
    node = start_node('mapping_node', parameters={**QUICK, 'use_depth': False})
    assert says(probe, node, 'image: listening to /image/compressed')
    raw = probe.publisher(Image, '/image')
    assert says(probe, node, 'image: listening to /image (Image)')
    assert probe.spin_until(lambda: raw.get_subscription_count() == 1
                            and compressed.image.get_subscription_count() == 0)
    assert report(probe)['inputs']['image']['topic'] == '/image'
    probe.spin_for(1.5)
    assert len(lines(node, 'image: listening to')) == 2


def test_raw_keeps_to_raw_and_says_how_to_hear_the_compressed(start_node, probe):
    CompressedCamera(probe)
    node = start_node('mapping_node', parameters={**QUICK, 'image_transport': 'raw'})
    assert says(probe, node, 'NO_PUBLISHER: nobody publishes /image, but /image/compressed is',
                'image_transport auto or compressed')


def test_the_doctor_finds_the_compressed_images_beside_and_names_the_setting(
        probe, frames, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['doctor'])
    CompressedCamera(probe, '/camera/image_raw/compressed')
    main(['--json', '--seconds', '4', '--image-topic', '/camera/image_raw'])
    told = json.loads(capsys.readouterr().out)
    assert told['inputs']['image']['topic'] == '/camera/image_raw/compressed'
    assert 'NO_PUBLISHER' not in [cause['code'] for cause in told['causes']]
    assert any('/camera/image_raw/compressed' in note and 'image_transport:=auto' in note
               for note in told['notes']), told['notes']
    main(['--seconds', '4', '--image-topic', '/camera/image_raw'])
    assert 'image_transport:=auto' in ' '.join(capsys.readouterr().out.split())


# -- localisation without a map -----------------------------------------------------------------

def test_localising_without_a_map_says_so_at_once(start_node, probe):
    node = start_node('localization_node', parameters=QUICK)
    assert says(probe, node, 'ERROR', 'NO_MAP: expected a map to localise in, found none',
                'map:=FOLDER')
    told = report(probe, '/localization_node')
    assert told['state'] == 'active' and told['level'] == 'ERROR'
    assert told['causes'][0]['code'] == 'NO_MAP'
    seen = probe.collect(DiagnosticArray, '/diagnostics')
    assert probe.spin_until(lambda: seen)
    assert 'expected a map to localise in' in seen[-1].status[0].message


def test_a_map_folder_that_is_not_there_leaves_the_node_unconfigured_and_says_what_to_do(
        start_node, probe, tmp_path):
    node = start_node('localization_node', parameters={**QUICK, 'map': tmp_path / 'nothing'})
    assert says(probe, node, 'expected a map folder', str(tmp_path / 'nothing'))
    assert says(probe, node, 'the node stays unconfigured',
                'ros2 lifecycle set /localization_node configure')
    assert probe.state('/localization_node') == 'unconfigured'
    told = report(probe, '/localization_node')
    assert [cause['code'] for cause in told['causes']] == ['CONFIGURE_FAILED']


# -- localize -----------------------------------------------------------------------------------

def test_localize_sends_no_pose_again_and_says_how_old_the_image_is(start_node, probe, frames):
    node = start_node('mapping_node', parameters={**QUICK, 'refine.window': 3,
                                               'silence_s': 4.0})
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    camera = FakeCamera(probe)
    assert camera.heard(), node.output
    used = frames[::2]
    # A first message that DDS lost is repaired after 3 s: the map may start later.
    assert camera.play(used, poses) >= len(used) - 5, node.output
    probe.spin_for(1.5)
    told_before = stamps(poses)
    assert told_before[-1] == used[-1].stamp_ns
    for _ in range(3):
        reply = probe.call(Trigger, '/localize')
        assert reply.success, reply.message
        told = json.loads(reply.message)
        assert told['pose'] is not None and told['stamp_ns'] == used[-1].stamp_ns
        assert told['age_s'] > 1.5
    probe.spin_for(0.5)
    assert stamps(poses) == told_before
    # An image that was not used yet has its pose once.
    assert probe.call(SetBool, f'{NAME}/pause', SetBool.Request(data=True)).success
    camera.send(frames[-1])
    assert probe.spin_until(lambda: json.loads(probe.call(Trigger, '/localize').message)[
        'stamp_ns'] == frames[-1].stamp_ns)
    probe.call(Trigger, '/localize')
    probe.spin_for(0.5)
    assert stamps(poses) == [*told_before, frames[-1].stamp_ns]
