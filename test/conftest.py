"""Fixtures shared by all tests."""

import json
import os
from pathlib import Path

import pytest
from ros_support.harness import NodeProcess, missing_ros, own_domain
from ros_support.skips import SkipReport

from feedforward_recon.geometry.camera import Camera

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get('FFRECON_DATA', REPOSITORY.parent / 'shared' / 'data'))


def pytest_configure(config):
    config.pluginmanager.register(SkipReport({
        'data:': DATA.is_dir(), 'ros:': not (missing_ros() or missing_ros('tf2_msgs'))}))


def pytest_collection_modifyitems(items):
    """Files of real nodes first: they take minutes, and nobody should wait for one at the end."""
    items.sort(key=lambda item: not item.path.name.startswith(('test_ros_', 'test_bag')))


@pytest.fixture(scope='session')
def data_dir():
    """Folder of the real image sets: FFRECON_DATA, or shared/data beside the repository."""
    if not DATA.is_dir():
        pytest.skip(f'data: no real image sets at {DATA}; set FFRECON_DATA')
    return DATA


@pytest.fixture(scope='session')
def golden_dir():
    """Folder of the reference outputs: FFRECON_GOLDEN, or shared/golden beside the repository."""
    folder = Path(os.environ.get('FFRECON_GOLDEN', REPOSITORY.parent / 'shared' / 'golden'))
    if not folder.is_dir():
        pytest.skip(f'golden: no reference outputs at {folder}; set FFRECON_GOLDEN')
    return folder


@pytest.fixture(scope='session')
def room_camera():
    """A small camera for synthetic views."""
    return Camera.from_fov(70.0, (160, 120))


@pytest.fixture(scope='session')
def room_frames(room_camera):
    """Twelve frames of a walk through a synthetic room, with depth and exact poses."""
    from feedforward_recon.synthetic import Room, render_walk

    room = Room.generate(5)
    return list(render_walk(room, room_camera, room.walk(12, seed=1)))


@pytest.fixture(scope='session')
def encoder():
    """The encoder that ships with the package; it keeps nothing between images."""
    from feedforward_recon.model.compact import CompactEncoder

    return CompactEncoder.load()


@pytest.fixture(scope='session')
def room_walk():
    """Eighty frames of 320x240 at 10 Hz through a room, with depth, camera and exact poses."""
    from feedforward_recon.synthetic import Room, render_walk

    room, camera = Room.generate(7), Camera.from_fov(68.0, (320, 240))
    return list(render_walk(room, camera, room.walk(240, seed=0, fps=10.0)[:80], fps=10.0,
                            noise=1.0, seed=1))


@pytest.fixture(scope='session')
def walk_folder(tmp_path_factory):
    """Thirty RGB-D frames of 320x240 with exact poses, as a folder with cameras.json."""
    import cv2
    import numpy as np

    from feedforward_recon.synthetic import Room, render_walk

    folder, room = tmp_path_factory.mktemp('walk'), Room.generate(5)
    camera = Camera.from_fov(70.0, (320, 240))
    entries = []
    for index, frame in enumerate(render_walk(room, camera, room.walk(90, seed=1)[:30])):
        for name, pixels in (('images', frame.image[..., ::-1]),
                             ('depth', np.rint(1000 * frame.depth).astype(np.uint16))):
            (folder / name).mkdir(exist_ok=True)
            assert cv2.imwrite(str(folder / name / f'{index:03d}.png'), pixels)
        entries.append({'file': f'images/{index:03d}.png', 'depth': f'depth/{index:03d}.png',
                        'timestamp': frame.stamp_ns / 1e9, 'K': camera.K.tolist(),
                        'T_world_camera': frame.T_map_cam.tolist()})
    (folder / 'cameras.json').write_text(json.dumps({'frames': entries}))
    return folder


@pytest.fixture
def ros_domain(request, monkeypatch):
    """A ROS domain of its own, also for what the test itself creates; skips without rclpy."""
    if missing_ros():
        pytest.skip(missing_ros())
    with own_domain(request.node.nodeid) as domain:
        for name, value in domain.environment.items():
            monkeypatch.setenv(name, value)
        yield domain


@pytest.fixture
def needs_tf():
    """Skips where the message of /tf could not be generated."""
    if missing_ros('tf2_msgs'):
        pytest.skip(missing_ros('tf2_msgs'))


@pytest.fixture
def start_node(ros_domain, tmp_path):
    """Start a node (NodeProcess arguments) in the test's domain; killed at the end."""
    started = []

    def start(module, *arguments, **options):
        log = tmp_path / f'{len(started)}_{module.rsplit(".", 1)[-1]}.log'
        started.append(NodeProcess(ros_domain, log, module, *arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def play(start_node, probe):
    """Play a source to a node that listens; what it answers to `count` images."""
    from geometry_msgs.msg import PoseWithCovarianceStamped
    from ros_support.camera import OPTICAL

    from feedforward_recon.ros.camera_topics import CAMERA_TOPICS

    def run(source, count, **parameters):
        poses = probe.collect(PoseWithCovarianceStamped, '/pose', depth=1000)
        assert probe.is_known_to(probe.publisher_of('/pose'))
        player = start_node('player_node', parameters={
            'source': source, 'rate': 0.0, 'frame_id': OPTICAL, **parameters},
            remap={topic: name for name, topic in CAMERA_TOPICS.items()})
        assert probe.spin_until(lambda: not player.is_running(), 60), player.output
        assert player.wait(1) == 0, player.output
        arrived = -1
        while arrived < len(poses) < count:  # everything was sent; the node may still compute
            arrived = len(poses)
            probe.spin_until(lambda: len(poses) == count, 10)
        return poses
    return run


@pytest.fixture
def probe(ros_domain):
    """The test's own node, in the test's domain."""
    from ros_support.probe import Probe

    probe = Probe(ros_domain)
    yield probe
    probe.close()
