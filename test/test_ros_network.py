"""Nodes with a feed-forward network, over real DDS.

Where the weights are random, poses mean nothing; parameters, windows, services and errors do.
"""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from ros_support.harness import missing_ros

if missing_ros():
    pytest.skip(missing_ros(), allow_module_level=True)

import torch
import yaml
from geometry_msgs.msg import PoseWithCovarianceStamped
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from ros_support.camera import FakeCamera, stamps, walk
from safetensors.torch import save_file
from std_srvs.srv import SetBool, Trigger

from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.model.configs import build
from feedforward_recon.ros.frames import T_BODY_OPTICAL
from feedforward_recon.session.map_folder import MAP_MARKER, NETWORK, load_map

QUICK = {'memory.slots': 8000, 'memory.cells': 2000, 'memory.samples': 20_000,
         'tf_wait_s': 0.2, 'info_wait_s': 0.5,
         'model': 'vggt-tiny', 'window': 6, 'anchors': 2}
DOCTOR = '/mapping_node/doctor'


@pytest.fixture(scope='module')
def frames():
    return walk(5, 60)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A file of weights for ``vggt-tiny`` that were never trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'vggt-tiny.safetensors'
    network = build('vggt-tiny')
    with torch.no_grad():  # fields of view about one radian, hardly any motion
        network.camera_head.pose_branch.fc2.weight.mul_(0.01)
        network.camera_head.pose_branch.fc2.bias.copy_(torch.tensor([0.0] * 6 + [0.25] * 3))
    save_file(network.state_dict(), path)
    return path


def doctor(probe):
    return json.loads(probe.call(Trigger, DOCTOR).message)


def set_parameters(probe, **values):
    request = SetParameters.Request(parameters=[
        Parameter(name, value=value).to_parameter_msg() for name, value in values.items()])
    return probe.call(SetParameters, '/mapping_node/set_parameters', request).results


def test_windows_are_filled_mapped_and_saved(start_node, probe, frames, weights, tmp_path):
    node = start_node('mapping_node', parameters={
        **QUICK, 'weights': weights, 'map': tmp_path / 'map', 'autostart': False})
    poses = probe.collect(PoseWithCovarianceStamped, '/pose')
    assert probe.change_state('/mapping_node', 'configure', 60), node.output
    assert probe.change_state('/mapping_node', 'activate')
    camera = FakeCamera(probe)
    assert camera.heard(), node.output
    # Progress, while nothing can be known yet.
    for frame in frames[:4]:
        camera.send(frame)
        probe.spin_for(0.1)
    report = doctor(probe)
    assert report['status'] == 'INITIALISING' and report['window'].endswith('views for a window')
    assert not poses
    # A window is full: the network has looked, whatever it has seen.
    for frame in frames[4:]:
        camera.send(frame)
        probe.spin_for(0.1)
        if doctor(probe)['keyframes']:
            break
    assert doctor(probe)['keyframes'] > 0, node.output
    probe.spin_until(lambda: poses, 5)
    told = stamps(poses)
    assert told and told == sorted(told) and set(told) <= {f.stamp_ns for f in frames}
    # The rest of the window is not lost when the map is saved.
    saved = probe.call(Trigger, '/mapping_node/save_map', timeout_s=60)
    assert saved.success, saved.message + node.output
    info = load_map(tmp_path / 'map').info
    assert info.keyframes > 0 and info.scale_source in ('depth', 'unknown')
    # Frozen and back, forgotten, and an orderly end while a network may be at work.
    for on in (True, False):
        assert probe.call(SetBool, '/mapping_node/set_localization_mode',
                          SetBool.Request(data=on), 60).success
    assert 'forgot the map' in probe.call(Trigger, '/mapping_node/reset').message
    assert doctor(probe)['keyframes'] == 0
    node.interrupt()
    assert node.wait(10) == 0, node.output


def test_what_cannot_be_configured_is_one_sentence(start_node, probe, weights, tmp_path):
    node = start_node('mapping_node', parameters={
        **QUICK, 'weights': tmp_path / 'none.safetensors', 'autostart': False},
        environment={'FEEDFORWARD_RECON_WEIGHTS': str(tmp_path)})
    for changes, sentence in (
            ({}, f'expected weights at {tmp_path / "none.safetensors"}, found no file'),
            ({'weights': '', 'model': 'vggt'}, 'run `ffrecon weights get vggt-1b`'),
            ({'model': 'vgt'}, 'did you mean vggt'),
            ({'model': 'vggt-tiny', 'weights': str(weights), 'device': 'cuda:99'},
             'expected'),
            ({'device': 'cpu', 'attention': 'sotfmax'}, 'did you mean softmax'),
            ({'attention': '', 'anchors': 6}, 'expected windows'),
            ({'model': 'compact'}, 'beside a feed-forward network')):
        assert all(result.successful for result in set_parameters(probe, **changes))
        assert not probe.change_state('/mapping_node', 'configure', 60)
        report = doctor(probe)
        assert [c['code'] for c in report['causes']] == ['CONFIGURE_FAILED'], report
        assert sentence in report['reason'] and '\n' not in report['reason'], report['reason']
        assert report['reason'] in node.output
        assert report['level'] == 'ERROR' and report['state'] == 'unconfigured'
    # Nothing of this was lasting.
    assert all(r.successful for r in set_parameters(probe, model='vggt-tiny', anchors=2))
    assert probe.change_state('/mapping_node', 'configure', 60), node.output


def with_empty_memory(folder, out):
    """A copy of a map whose network has written nothing: all zero, and signed anew."""
    shutil.copytree(folder, out)
    written = load_map(folder).fast_weights()
    replace(written, tensors={k: torch.zeros_like(t) for k, t in written.tensors.items()}
            ).save(out / NETWORK)
    described, data = yaml.safe_load((out / MAP_MARKER).read_text()), (out / NETWORK).read_bytes()
    described['files'][NETWORK] = {'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
    (out / MAP_MARKER).write_text(yaml.safe_dump(described))
    return out


def test_localize_asks_what_the_network_wrote(start_node, probe, tmp_path):
    """Mapped and saved by one process; another asks the fast weights alone, not the landmarks."""
    frames = walk(7, 40)
    shipped = {**QUICK, 'model': 'tiny-ttt', 'window': 8, 'map': tmp_path / 'map',
               'queue': 'offline', 'queue_size': 100}
    node = start_node('mapping_node', parameters=shipped)
    camera = FakeCamera(probe)
    assert camera.heard(), node.output
    for frame in frames:
        camera.send(frame)
        probe.spin_for(0.05)
    saved = probe.call(Trigger, '/mapping_node/save_map', timeout_s=60)
    assert saved.success and NETWORK in load_map(tmp_path / 'map').info.files, saved.message
    node.interrupt()
    assert node.wait(10) == 0, node.output
    asked = frames[20]
    true = T_BODY_OPTICAL @ inverse(frames[0].T_map_cam) @ asked.T_map_cam
    maps = {'map': True, with_empty_memory(tmp_path / 'map', tmp_path / 'empty').name: False}
    for folder, is_found in maps.items():
        node = start_node('localization_node', parameters={
            **shipped, 'map': tmp_path / folder, 'localize_with': 'network'})
        assert camera.heard(), node.output
        camera.send(asked)
        probe.spin_for(1.0)
        reply = probe.call(Trigger, '/localize', timeout_s=30)
        answer = json.loads(reply.message)
        assert reply.success is is_found, answer
        assert answer['asked'] == 'network'
        if is_found:
            assert answer['status'] == 'UNCERTAIN'
            found = np.array(answer['pose']['position'])
            assert np.linalg.norm(found - true[:3, 3]) < 0.7
        else:
            assert answer['reason'] == 'UNKNOWN_PLACE'
        node.interrupt()
        assert node.wait(10) == 0, node.output
