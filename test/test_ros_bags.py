"""Bags and real walks through mapping_node over DDS, and the way back in a new process."""

import json

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)
pytest.importorskip('rosbags', reason='bags need the extra [bag]')

from ros_support.camera import OPTICAL, position_error_m, stamps, walk
from small_config import OFFLINE
from std_srvs.srv import Trigger

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.io.bag_writer import write_bag
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.ros.convert import matrix_from_pose, matrix_from_transform
from feedforward_recon.ros.frames import T_BODY_OPTICAL
from feedforward_recon.ros.playback import PlayerConfig, open_playback, rounds
from feedforward_recon.ros.tf_messages import TFMessage
from feedforward_recon.session.live import LiveSession


@pytest.fixture(scope='module')
def frames():
    return walk(5, 50, every=2)


@pytest.mark.parametrize(('storage', 'transport'), [
    ('sqlite3', 'raw'), pytest.param('mcap', 'compressed', marks=pytest.mark.slow)])
def test_a_bag_becomes_a_map_and_a_new_process_finds_its_way_back(
        start_node, play, probe, needs_tf, frames, tmp_path, storage, transport):
    bag, packed = tmp_path / 'bag', {'image_transport': transport}
    write_bag(bag, frames, storage, compressed=transport == 'compressed')
    settings = {**OFFLINE, **packed, 'depth_transport': transport, 'map': tmp_path / 'map'}
    node = start_node('mapping_node', parameters=settings)
    transforms = probe.collect(TFMessage, '/tf', depth=1000)
    poses = play(bag, len(frames), **packed)

    # Every image of the bag has its pose, true to the centimetre, also on TF.
    recorded = [f.stamp_ns for f in frames]
    assert stamps(poses) == recorded, node.output
    assert position_error_m(poses, frames) < 0.03
    # A pose and its transform are two messages: the one may be here before the other.
    probe.spin_until(lambda: len(transforms) == len(recorded), 10)
    sent = [t for message in transforms for t in message.transforms if t.child_frame_id == OPTICAL]
    assert stamps(sent) == recorded
    np.testing.assert_allclose(matrix_from_transform(sent[-1]), matrix_from_pose(
        poses[-1].pose.pose) @ T_BODY_OPTICAL, atol=1e-6)

    # Saved, loaded again, and loaded in a process of its own: the same pose to the last bit.
    for service in ('save_map', 'load_map'):
        answer = probe.call(Trigger, f'/mapping_node/{service}', timeout_s=30)
        assert answer.success, answer.message
    before = newest_image_localized(probe)
    node.interrupt()
    assert node.wait(5) == 0, node.output
    other = start_node('localization_node', parameters=settings)
    found = play(bag, len(frames), **packed)
    assert len(found) >= 0.9 * len(frames), other.output
    assert newest_image_localized(probe) == before
    T_map_world = T_BODY_OPTICAL @ inverse(frames[0].T_map_cam)
    np.testing.assert_allclose(before['position'],
                               (T_map_world @ frames[-1].T_map_cam)[:3, 3], atol=0.05)


def newest_image_localized(probe):
    reply = probe.call(Trigger, '/localize')
    assert reply.success, reply.message
    return json.loads(reply.message)['pose']


def test_a_real_kitchen_is_mapped_over_dds(start_node, play, data_dir):
    folder, stretch = str(data_dir / '7scenes_redkitchen'), {'step': 2, 'max_frames': 60}
    frames = list(rounds(open_playback(PlayerConfig(source=folder, **stretch)), loop=False))
    node = start_node('mapping_node', parameters=OFFLINE)
    poses = play(folder, len(frames), **stretch)
    assert len(poses) >= 0.95 * len(frames), node.output
    assert set(stamps(poses)) <= {f.stamp_ns for f in frames}
    assert position_error_m(poses, frames) < 0.05

    # Nothing is lost on the way: the same images give the core the same poses.
    session = LiveSession(MapperConfig(), CompactEncoder.load())
    for frame, pose in zip(frames[:20], poses, strict=False):
        direct = session.process(frame, T_BODY_OPTICAL).T_map_cam
        np.testing.assert_allclose(matrix_from_pose(pose.pose.pose) @ T_BODY_OPTICAL, direct,
                                   atol=1e-9)
