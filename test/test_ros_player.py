"""player_node over DDS: everything arrives, with equal stamps, in time; then it ends."""

import json
import time

import numpy as np
import pytest

from feedforward_recon.ros.playback import (
    SECOND_NS,
    PlayerConfig,
    SyntheticConfig,
    open_playback,
    rounds,
)

FRAMES, FPS = 6, 20.0
# What the launch files listen to by default.
IMAGE, INFO, DEPTH = 'camera/image_raw', 'camera/camera_info', 'camera/depth/image_raw'
ROOM = {'synthetic.width': 320, 'synthetic.height': 240, 'synthetic.frames': FRAMES,
        'synthetic.fps': FPS, 'start_delay_s': 0.5}


@pytest.fixture
def play(start_node):
    def start(source='synthetic:3', parameters=None, **options):
        return start_node('player_node', parameters={**ROOM, **(parameters or {}),
                                                     'source': source}, **options)
    return start


def truth():
    source = open_playback(PlayerConfig(source='synthetic:3', synthetic=SyntheticConfig(
        width=320, height=240, frames=FRAMES, fps=FPS)))
    return list(rounds(source, loop=False))


def stamps(messages):
    from feedforward_recon.ros.convert import stamp_ns

    return [stamp_ns(getattr(message, 'header', message)) for message in messages]


@pytest.mark.parametrize('reliable', [True, False])
def test_frames_arrive_as_they_were_rendered(play, probe, reliable):
    from geometry_msgs.msg import PoseStamped
    from sensor_msgs.msg import CameraInfo, Image

    from feedforward_recon.ros.convert import (
        camera_from_info,
        depth_metres,
        image_rgb,
        matrix_from_pose,
    )

    images, depths = (probe.collect(Image, name, reliable=reliable)
                      for name in (IMAGE, DEPTH))
    infos = probe.collect(CameraInfo, INFO, reliable=reliable)
    poses = probe.collect(PoseStamped, 'ground_truth')
    player = play(parameters={'reliable': reliable})
    assert probe.spin_until(lambda: not player.is_running(), 30), player.output
    assert player.wait(1) == 0
    probe.spin_until(lambda: len(images) == FRAMES, 1.0)
    frames = truth()
    expected = [frame.stamp_ns for frame in frames]
    sent = dict(zip(expected, frames, strict=True))
    for messages in (images, depths, infos, poses):
        assert messages and set(stamps(messages)) <= set(expected)
        assert not reliable or stamps(messages) == expected  # best effort may lose some
    for stamp, image in zip(stamps(images), images, strict=True):
        assert image.header.frame_id == 'camera_optical_frame'
        np.testing.assert_array_equal(image_rgb(image), sent[stamp].image)
    for stamp, depth in zip(stamps(depths), depths, strict=True):
        np.testing.assert_allclose(depth_metres(depth), sent[stamp].depth, atol=5.1e-4)
    for stamp, info in zip(stamps(infos), infos, strict=True):
        assert info.header.frame_id == 'camera_optical_frame'
        assert camera_from_info(info) == sent[stamp].camera
    for stamp, pose in zip(stamps(poses), poses, strict=True):
        np.testing.assert_allclose(matrix_from_pose(pose.pose), sent[stamp].T_map_cam, atol=1e-12)


def test_compressed_images_and_depth_follow_a_remapping(play, probe):
    from sensor_msgs.msg import CompressedImage

    from feedforward_recon.ros.convert import depth_metres, image_rgb

    images = probe.collect(CompressedImage, 'front/color/compressed')
    depths = probe.collect(CompressedImage, 'front/depth/compressedDepth')
    player = play(parameters={'image_transport': 'compressed'},
                  remap={IMAGE: '/front/color', DEPTH: '/front/depth'})
    assert probe.spin_until(lambda: len(images) == len(depths) == FRAMES, 30), player.output
    frame = truth()[0]
    error = np.abs(image_rgb(images[0]).astype(int) - frame.image)
    assert error.mean() < 3
    np.testing.assert_allclose(depth_metres(depths[0]), frame.depth, atol=5.1e-4)


def test_a_clock_leads_through_the_recording(play, probe):
    """Simulated time passes between images too, and never runs ahead of the next one."""
    from rosgraph_msgs.msg import Clock
    from sensor_msgs.msg import Image

    events = []
    probe.node.create_subscription(Clock, '/clock', lambda m: events.append(m.clock), 100)
    images = probe.collect(Image, IMAGE)
    player = play(parameters={'publish_clock': True, 'rate': 0.1, 'synthetic.frames': 4})
    assert probe.spin_until(lambda: not player.is_running(), 30), player.output
    assert probe.spin_until(lambda: len(images) == 4, 2)
    times = stamps(events)
    assert times == sorted(times)
    assert len(times) > 2 * len(images)
    assert times[-1] == stamps(images)[-1]


def test_a_node_that_is_seen_topic_by_topic_misses_nothing(play, probe):
    """The last subscriber is waited for, not the first."""
    from sensor_msgs.msg import Image

    images, arrived_s = probe.collect(Image, IMAGE), []
    probe.node.create_subscription(Image, IMAGE, lambda _: arrived_s.append(time.monotonic()), 10)
    player = play(parameters={'start_delay_s': 2.0})
    assert probe.spin_until(lambda: probe.node.count_publishers(f'/{IMAGE}'), 30), player.output
    probe.spin_for(0.5)
    came_s, depths = time.monotonic(), probe.collect(Image, DEPTH)
    assert probe.spin_until(lambda: len(images) == len(depths) == FRAMES, 30), player.output
    assert arrived_s[0] - came_s >= 2.0


def test_as_fast_as_it_is_taken_loses_nothing(play, probe):
    from sensor_msgs.msg import Image

    images = probe.collect(Image, IMAGE, depth=5)
    player = play(parameters={'rate': 0.0, 'synthetic.frames': 40, 'use_depth': False})
    assert probe.spin_until(lambda: not player.is_running(), 30), player.output
    probe.spin_until(lambda: len(images) == 40, 1.0)
    assert stamps(images) == [SECOND_NS + round(i * 1e9 / FPS) for i in range(40)]


def test_stamps_of_now_and_no_end_until_interrupted(play, probe):
    from sensor_msgs.msg import CameraInfo, Image

    images, infos = probe.collect(Image, IMAGE), probe.collect(CameraInfo, INFO)
    before_ns = probe.node.get_clock().now().nanoseconds
    player = play(parameters={'stamps': 'now', 'loop': True}, fresh=True)
    assert probe.spin_until(lambda: len(images) > FRAMES + 2, 30), player.output
    player.interrupt()
    assert player.wait(5) == 0
    found = stamps(images)
    assert found[0] >= before_ns and found == sorted(set(found))
    assert found[:FRAMES] == stamps(infos)[:FRAMES]


def test_a_folder_without_calibration_plays_without_camera_info(play, probe, walk_folder,
                                                                tmp_path):
    from sensor_msgs.msg import Image

    folder = tmp_path / 'bare'
    folder.mkdir()
    frames = json.loads((walk_folder / 'cameras.json').read_text())['frames'][:3]
    for frame in frames:
        name = frame['file']
        (folder / name.rsplit('/')[-1]).write_bytes((walk_folder / name).read_bytes())
    images = probe.collect(Image, IMAGE)
    player = play(str(folder))
    assert probe.spin_until(lambda: len(images) == 3, 30), player.output
    assert 'no calibration' in player.output
    assert not probe.node.get_publishers_info_by_topic(f'/{INFO}')


@pytest.mark.parametrize(('source', 'reason'), [('', 'set the parameter source'),
                                                ('/no/such/walk', 'found nothing')])
def test_a_bad_source_ends_with_one_sentence(play, source, reason):
    player = play(source)
    assert player.wait(20) == 1
    assert reason in player.output
    assert 'Traceback' not in player.output
