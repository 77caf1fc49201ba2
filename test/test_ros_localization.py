"""localization_node over real DDS: the way back into a saved map, and what must be refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

from geometry_msgs.msg import PoseWithCovarianceStamped
from ros_support.camera import OPTICAL, FakeCamera, positions, stamps, walk
from sensor_msgs.msg import PointCloud2
from small_config import SMALL
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.ros.convert import image_msg
from feedforward_recon.ros.frames import T_BODY_OPTICAL
from feedforward_recon.ros.pointcloud import cloud_from_msg
from feedforward_recon.session.live import LiveSession

QUICK = {'tf_wait_s': 0.2, 'info_wait_s': 0.5}


@pytest.fixture(scope='module')
def frames():
    return walk(5, 50)


@pytest.fixture(scope='module')
def saved(frames, tmp_path_factory):
    session = LiveSession(SMALL, CompactEncoder.load())
    for frame in frames[::2]:
        session.process(frame, T_BODY_OPTICAL)
    return session.save(tmp_path_factory.mktemp('ros') / 'map')()


@pytest.fixture(scope='module')
def true_positions(frames):
    """Position of the camera in the map, by stamp."""
    T_map_world = T_BODY_OPTICAL @ inverse(frames[0].T_map_cam)
    return {f.stamp_ns: (T_map_world @ f.T_map_cam)[:3, 3] for f in frames}


def test_images_are_found_in_the_map_and_other_places_are_not(start_node, probe, frames, saved,
                                                              true_positions):
    node = start_node('localization_node', parameters={**QUICK, 'map': saved.path,
                                                       'cloud_period_s': 0.2}, fresh=True)
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    clouds = probe.collect(PointCloud2, '/cloud_map', latched=True)
    answers = probe.collect(PoseWithCovarianceStamped, '/query_pose')
    results = probe.collect(String, '/query_result')
    camera = FakeCamera(probe, depth=False)
    assert camera.heard(), node.output
    between = frames[1:40:4]
    assert camera.play(between, poses) >= len(between) - 1, node.output
    truth = np.array([true_positions[s] for s in stamps(poses)])
    assert np.median(np.linalg.norm(positions(poses) - truth, axis=1)) < 0.02
    assert probe.spin_until(lambda: clouds and len(cloud_from_msg(clouds[-1])) > 1000)

    before = {p.name: p.read_bytes() for p in saved.path.iterdir()}
    other = walk(11, 3)
    count = len(poses)
    for frame in other:
        camera.send(replace(frame, stamp_ns=frame.stamp_ns + 10**10))
    probe.spin_for(1.0)
    assert len(poses) == count, 'a pose in a place that was never mapped'
    reply = probe.call(Trigger, '/localize')
    assert not reply.success
    refusal = json.loads(reply.message)
    assert refusal['pose'] is None and refusal['reason'] and refusal['status'] == 'NOT_LOCALISED'

    # Programs ask with images of their own and recognise the answer by its stamp.
    query = probe.publisher(type(image_msg(frames[0].image, OPTICAL, 0)), '/query_image')
    assert probe.spin_until(query.get_subscription_count)
    stamp = frames[21].stamp_ns + 7
    query.publish(image_msg(frames[21].image, OPTICAL, stamp))
    assert probe.spin_until(lambda: answers and results), node.output
    assert stamps(answers) == [stamp]
    np.testing.assert_allclose(positions(answers)[0], true_positions[frames[21].stamp_ns],
                               atol=0.03)
    query.publish(image_msg(other[0].image, OPTICAL, stamp + 1))
    assert probe.spin_until(lambda: len(results) == 2)
    assert json.loads(results[-1].data)['stamp_ns'] == stamp + 1
    assert len(answers) == 1
    assert before == {p.name: p.read_bytes() for p in saved.path.iterdir()}
    assert len(clouds) == 1, 'a cloud that does not change is latched, not repeated'

    # A loaded map is gone on with when localisation ends; nothing of it is lost meanwhile.
    mode = probe.call(SetBool, '/localization_node/set_localization_mode',
                      SetBool.Request(data=False))
    assert mode.success and mode.message == 'mode is mapping'
    assert probe.call(Trigger, '/localize').message
    node.terminate()
    assert node.wait(5) == 0, node.output


def test_a_map_that_is_saved_and_loaded_gives_the_same_pose(start_node, probe, frames, saved):
    first = start_node('localization_node', parameters={**QUICK, 'map': saved.path})
    camera = FakeCamera(probe, depth=False)
    replies = []
    for node in (first, None):
        if node is None:
            first.interrupt()
            first.wait(5)
            node = start_node('localization_node', parameters={**QUICK})
            assert probe.wait_for_state('/localization_node', 'active')
            empty = probe.call(Trigger, '/localization_node/load_map')
            assert not empty.success and "parameter 'map'" in empty.message
            set_parameter(probe, '/localization_node', 'map', str(saved.path))
            assert probe.call(Trigger, '/localization_node/load_map').success
        assert camera.heard(), node.output
        camera.send(frames[21])
        probe.spin_for(1.0)
        reply = probe.call(Trigger, '/localize')
        assert reply.success, reply.message
        replies.append(json.loads(reply.message)['pose'])
    assert replies[0] == replies[1]


def set_parameter(probe, node, name, value):
    from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
    from rcl_interfaces.srv import SetParameters

    text = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
    request = SetParameters.Request(parameters=[Parameter(name=name, value=text)])
    result = probe.call(SetParameters, f'{node}/set_parameters', request).results[0]
    assert result.successful, result.reason


def test_without_a_usable_map_the_node_says_so_and_stays(start_node, probe, tmp_path):
    node = start_node('localization_node', parameters={**QUICK, 'map': tmp_path / 'nothing'})
    node.wait_for_output('expected a map folder')
    assert probe.state('/localization_node') == 'unconfigured'
    reply = probe.call(Trigger, '/localize')
    assert not reply.success and 'configure' in reply.message
    assert node.is_running()
