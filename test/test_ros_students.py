"""Each network that ships maps a real kitchen over DDS, and a new process finds its way back."""

import json

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from geometry_msgs.msg import PoseWithCovarianceStamped
from ros_support.camera import FakeCamera, positions, stamps
from small_config import OFFLINE
from std_srvs.srv import Trigger

from feedforward_recon.geometry.align import align_points
from feedforward_recon.ros.playback import PlayerConfig, open_playback, rounds
from feedforward_recon.session.map_folder import NETWORK

EVERY, IMAGES, QUERIES = 2, 60, 10
NEAR_M = 0.12  # the camera goes about a metre, and a pose of the map is wrong by a few centimetres


@pytest.fixture(scope='module')
def kitchen(data_dir):
    """Its images with the stamps that a player gives them, without depth."""
    player = PlayerConfig(source=str(data_dir / '7scenes_redkitchen'), use_depth=False)
    return list(rounds(open_playback(player), loop=False))[:EVERY * IMAGES]


def true_positions(frames, stamps_ns):
    """Positions [N, 3] of images, by their stamps."""
    truth = {frame.stamp_ns: frame.T_map_cam[:3, 3] for frame in frames}
    return np.array([truth[stamp] for stamp in stamps_ns])


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'precision'), [
    ('tiny', 'full'), ('tiny-ttt', 'full'), ('tiny-sparse', 'full'), ('tiny-sla', 'full'),
    ('tiny-sla', 'fp8')])
def test_a_kitchen_is_mapped_saved_and_found_again(start_node, play, probe, kitchen, data_dir,
                                                   tmp_path, model, precision):
    settings = {**OFFLINE, 'model': model, 'precision': precision, 'map': tmp_path / 'map',
                'use_depth': False}
    node = start_node('mapping_node', parameters=settings)
    poses = play(str(data_dir / '7scenes_redkitchen'), IMAGES, step=EVERY, max_frames=IMAGES,
                 use_depth=False)
    saved = probe.call(Trigger, '/mapping_node/save_map', timeout_s=120)
    assert saved.success, saved.message + node.output
    mapped = positions(poses), true_positions(kitchen, stamps(poses))
    fit = align_points(*mapped, with_scale=True)
    assert len(poses) > IMAGES / 2 and fit.rmse < NEAR_M, node.output
    assert (tmp_path / 'map' / NETWORK).exists() == (model == 'tiny-ttt')
    node.interrupt()
    assert node.wait(15) == 0, node.output

    node = start_node('localization_node', parameters=settings)
    found = probe.collect(PoseWithCovarianceStamped, '/pose')
    camera = FakeCamera(probe, depth=False)
    assert camera.heard(), node.output
    asked = kitchen[2 * EVERY + 1::len(kitchen) // QUERIES]  # were not mapped
    assert camera.play(asked, found, timeout_s=20) >= 0.9 * len(asked), node.output
    off = fit.apply(positions(found)) - true_positions(kitchen, stamps(found))
    print(model, precision, len(poses), fit.rmse, np.linalg.norm(off, axis=1))
    assert np.median(np.linalg.norm(off, axis=1)) < NEAR_M
    reply = probe.call(Trigger, '/localize')
    assert reply.success, reply.message
    assert json.loads(reply.message)['stamp_ns'] == asked[-1].stamp_ns
