"""Stereo pairs over DDS: from a bag, from a real drive, and from a camera that loses its half."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from ros_support.camera import (
    CAMERA,
    OPTICAL,
    START_NS,
    FakeCamera,
    position_error_m,
    stamps,
)
from sensor_msgs.msg import CameraInfo, Image
from small_config import OFFLINE

from feedforward_recon.geometry.stereo import StereoRig
from feedforward_recon.geometry.transforms import make_transform, so3_exp
from feedforward_recon.io.bag_writer import write_bag
from feedforward_recon.io.stereo import beside
from feedforward_recon.ros.convert import image_msg, info_msg
from feedforward_recon.ros.playback import PlayerConfig, open_playback, rounds
from feedforward_recon.synthetic import Room, right_image
from feedforward_recon.types import Frame

SETTINGS = {**OFFLINE, 'silence_s': 1.5}
BASELINE_M = 0.12
MOUNTED = make_transform(so3_exp(np.array([0.01, -0.02, 0.01])), np.array([0.12, 0.002, 0.001]))


@lru_cache
def room():
    """Painting its walls takes longer than showing them."""
    return Room.generate(5)


@lru_cache
def pairs(*, mounted=False):
    """Twenty pairs; mounted: neither camera looks along the other."""
    frames, T_left_right = [], MOUNTED if mounted else None
    for index, pose in enumerate(room().walk(240, seed=0, fps=10.0)[:40:2]):
        right = right_image(room(), CAMERA, pose, BASELINE_M, T_left_right=T_left_right)
        frames.append(Frame(START_NS + index * 2 * 10**8, room().render(CAMERA, pose)[0], None,
                            CAMERA, f'{index}', pose, right))
    return frames


class StereoCamera(FakeCamera):
    """Publishes pairs: left image, right image and the calibration of both.

    baseline_m: what the calibration says. late_ns: by how much right images are stamped too late.
    """

    def __init__(self, probe, node, baseline_m):
        super().__init__(probe, depth=False)
        self.node, self.baseline_m, self.late_ns = node, baseline_m, 0
        self.right = probe.publisher(Image, '/right/image')
        self.right_info = probe.publisher(CameraInfo, '/right/camera_info')
        self.diagnostics = probe.collect(DiagnosticArray, '/diagnostics')

    def topics(self):
        """What both cameras publish."""
        return {**super().topics(), 'right': self.right, 'right_info': self.right_info}

    def black(self):
        """A pair that shows nothing."""
        right = right_image(room(), CAMERA, np.eye(4), BASELINE_M)
        return replace(super().black(), depth=None, right=right)

    def told(self):
        """Keys and values of the newest diagnostics of the node."""
        found = [{pair.key: pair.value for pair in status.values} for message in self.diagnostics
                 for status in message.status if 'mapping_node' in status.name]
        return found[-1] if found else {}

    def says(self, code, timeout_s=10.0):
        """True once the diagnostics name a cause."""
        return self.probe.spin_until(lambda: code in str(self.told()), timeout_s)

    def send(self, frame, change=None):
        """Publish one frame with its right half, if it has one."""
        if frame.right is not None:
            pair = StereoRig(frame.camera, frame.right.camera, beside(BASELINE_M))
            R, P = pair.calibration(right=True)
            P[0, 3] = -P[0, 0] * self.baseline_m
            stamp_ns = frame.stamp_ns + self.late_ns
            self.right_info.publish(info_msg(pair.right, OPTICAL, stamp_ns, (R, P)))
            self.right.publish(image_msg(frame.right.image, OPTICAL, stamp_ns))
        super().send(frame, change)


@pytest.fixture
def camera(start_node, probe, request):
    node = start_node('mapping_node', parameters={**SETTINGS, 'queue': 'live', 'queue_size': 50})
    camera = StereoCamera(probe, node, getattr(request, 'param', BASELINE_M))
    assert camera.heard(), node.output
    return camera


def test_a_bag_of_pairs_becomes_a_metric_map(start_node, play, tmp_path):
    """Neither camera looks along the other: R and P of CameraInfo say how they stand."""
    pytest.importorskip('rosbags', reason='bags need the extra [bag]')
    frames = pairs(mounted=True)
    write_bag(tmp_path / 'bag', frames)
    node = start_node('mapping_node', parameters=SETTINGS)
    poses = play(tmp_path / 'bag', len(frames))
    assert stamps(poses) == [f.stamp_ns for f in frames], node.output
    assert position_error_m(poses, frames) < 0.03
    node.wait_for_output('scale: stereo')
    assert 'subscribing as' not in node.output, 'what is on its way meanwhile would be lost'


def test_a_real_drive_is_in_metres_over_dds(start_node, play, data_dir):
    folder = str(data_dir / 'kitti_seq2')
    frames = list(rounds(open_playback(PlayerConfig(source=folder)), loop=False))
    node = start_node('mapping_node', parameters=SETTINGS)
    poses = play(folder, len(frames))
    assert len(poses) == len(frames) == 51, node.output
    assert position_error_m(poses, frames) < 2.6  # before corrections: 5 % of the 52 m


def test_a_camera_that_loses_its_right_half_goes_on_in_metres(camera, probe):
    """First its right images are of other moments, then there are none."""
    frames = pairs()
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    assert camera.play(frames[:6], poses) == 6
    assert probe.spin_until(lambda: camera.told().get('scale_source') == 'stereo'), camera.told()
    camera.late_ns = 6 * 10**7
    for frame in frames[6:12]:
        camera.send(frame)
        probe.spin_for(0.3)
    assert camera.says('RIGHT_UNPAIRED'), camera.told()
    probe.spin_for(SETTINGS['silence_s'])
    for frame in frames[12:]:
        camera.send(replace(frame, right=None))
        probe.spin_for(0.3)
    # Nothing waits for ever, and none comes twice or after a later one.
    assert probe.spin_until(lambda: len(poses) == len(frames)), camera.node.output
    assert stamps(poses) == sorted(set(stamps(poses)))
    assert stamps(poses)[-1] == frames[-1].stamp_ns
    assert camera.says('SILENT')
    assert camera.told()['scale_source'] == 'stereo'
    assert position_error_m(poses, frames) < 0.03


@pytest.mark.parametrize('camera', [-BASELINE_M], indirect=True)
def test_swapped_cameras_are_told_and_the_left_one_is_used_alone(camera, probe):
    for frame in pairs()[:8]:
        camera.send(frame)
        probe.spin_for(0.2)
    assert camera.says('STEREO_CALIBRATION'), camera.told()
    camera.node.wait_for_output('swap the images or the sign of the baseline')
    assert camera.told()['scale_source'] == 'unknown'
