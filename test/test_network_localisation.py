"""Localising against the fast weights of a network, whatever the network predicts."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from small_network import SMALL

from feedforward_recon.cli import main
from feedforward_recon.errors import DegenerateError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import (
    inverse,
    make_transform,
    pose_error,
    so3_exp,
    spanning_poses,
    transform_points,
)
from feedforward_recon.localization import network_localizer
from feedforward_recon.localization.network_link import align_cameras
from feedforward_recon.localization.network_localizer import (
    NetworkLocalizer,
    SavedFastWeights,
    write_keyframes,
)
from feedforward_recon.localization.scene_network import (
    RaySceneNetwork,
    VggtSceneNetwork,
    load_network_memory,
    unsupported_reason,
)
from feedforward_recon.model.configs import CONFIGS, build, network_of
from feedforward_recon.model.predictor import NetworkPredictor
from feedforward_recon.model.ray_transformer import RayConfig
from feedforward_recon.session.map_folder import NETWORK, load_map
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Estimate, Prediction, Status

CAMERA = Camera.from_fov(68.0, (160, 120))
SCALE = 0.4  # units of the oracle's world per metre


# -- a network that knows the answers ------------------------------------------------------


class Oracle:
    """Exact depth and noisy cameras in a world of its own; its memory is what it was shown.

    noise: metres and radians. limit: images that fit into memory.
    """

    novelty = 0.01

    def __init__(self, frames, noise=0.0, limit=1000, seed=0):
        self.known = {frame.image.tobytes(): frame for frame in frames}
        self.noise, self.limit, self.rng = noise, limit, np.random.default_rng(seed)
        self.T_net_map = make_transform(so3_exp(np.array([0.5, -1, 0.3])), np.array([3, -2, 1.0]))
        self.writes = 0

    def write(self, images, K=None):
        self.writes += 1
        return self.predict(images), tuple(images)

    def query(self, image, memory, K=None):
        return self.predict([image]), self.novelty

    def predict(self, images):
        if len(images) > self.limit:
            raise MemoryError(f'{len(images)} images')
        frames = [self.known[image.tobytes()] for image in images]
        shake = self.noise * self.rng.normal(size=(2, len(images), 3))
        T = np.stack([frame.T_map_cam for frame in frames])
        T = T @ make_transform(so3_exp(shake[0]), shake[1])
        T = self.T_net_map @ T
        T[:, :3, 3] *= SCALE
        depth = SCALE * np.stack([frame.depth for frame in frames])
        return Prediction(T, np.repeat(CAMERA.K[None], len(T), 0), depth.astype(np.float32),
                          np.full_like(depth, 2, np.float32))


@pytest.fixture(scope='module')
def frames():
    room = Room.generate(7)
    return list(render_walk(room, CAMERA, room.walk(90, seed=0)[:60:2]))


@pytest.fixture(scope='module')
def points(frames):
    """Landmarks: some pixels of every fifth frame, in the map."""
    v, u = np.mgrid[10:120:20, 10:160:20].reshape(2, -1)
    rays = np.stack([u, v, np.ones_like(u)], 1) @ np.linalg.inv(CAMERA.K).T
    return np.concatenate([transform_points(f.T_map_cam, rays * f.depth[v, u, None])
                           for f in frames[::5]])


def linked(frames, points, oracle):
    return write_keyframes(oracle, frames[::3], frames[1::3], points, 2.0)


def bare(frame):
    return replace(frame, T_map_cam=None, depth=None)


def test_an_exact_network_answers_in_the_map(frames, points):
    memory, link = linked(frames, points, Oracle(frames))
    assert link.keyframes == len(memory) == 10 and link.checked == 10
    assert link.scale == pytest.approx(1 / SCALE) and link.agreement > 0.8
    oracle = Oracle(frames)
    localizer = NetworkLocalizer(oracle, memory, link, points)
    for frame in frames[2::3]:
        answer = localizer.localize(bare(frame))
        assert answer.status is Status.UNCERTAIN and answer.source == frame.source
        distance, degrees = pose_error(answer.T_map_cam, frame.T_map_cam)
        assert distance < 1e-6 and degrees < 1e-5
    assert oracle.writes == 0


def test_without_other_images_of_the_walk_nothing_is_known_of_novelty(frames, points):
    memory, link = write_keyframes(Oracle(frames), frames, [], points, 2.0)
    assert len(memory) == len(frames) == link.keyframes
    stranger = Oracle(frames)
    stranger.novelty = 1.5
    answer = NetworkLocalizer(stranger, memory, link, points).localize(bare(frames[0]))
    assert answer.status is Status.UNCERTAIN


def test_the_covariance_is_that_of_the_errors(frames, points):
    _, link = linked(frames, points, Oracle(frames, noise=0.05))
    assert np.sqrt(link.covariance[[0, 5], [0, 5]]) == pytest.approx(0.05, rel=0.4)
    assert link.recognised


def test_a_full_device_means_fewer_keyframes_and_says_so(frames, points, caplog):
    memory, link = linked(frames, points, Oracle(frames, limit=6))
    assert link.keyframes == len(memory) == 5 and 'out of memory' in caplog.text
    assert link.position < 1e-6 and memory[0] is frames[0].image
    with pytest.raises(MemoryError):
        linked(frames, points, Oracle(frames, limit=2))


def test_a_wrong_pose_is_refused(frames, points):
    """The network is sure of itself, but its depth belongs to another place."""
    memory, link = linked(frames, points, Oracle(frames))
    lost = Oracle(frames)
    lost.T_net_map = lost.T_net_map @ make_transform(so3_exp(np.array([0, 2.0, 0])), np.ones(3))
    answer = NetworkLocalizer(lost, memory, link, points).localize(bare(frames[2]))
    assert answer.status is Status.NOT_LOCALISED and answer.T_map_cam is None
    assert answer.reason in ('DEPTH_DISAGREES', 'NO_LANDMARKS_IN_VIEW')
    unknown = NetworkLocalizer(Oracle(frames), memory, replace(link, position=99.0), points)
    assert unknown.localize(bare(frames[2])).reason == 'MAP_NOT_RECOGNISED'
    elsewhere = Oracle(frames)
    elsewhere.novelty = 0.04
    answer = NetworkLocalizer(elsewhere, memory, link, points).localize(bare(frames[2]))
    assert answer.reason == 'UNKNOWN_PLACE' and answer.T_map_cam is None


@pytest.mark.parametrize('status', [Status.TRACKING, Status.NOT_LOCALISED])
def test_the_landmarks_have_the_last_word(frames, points, status):
    memory, link = linked(frames, points, Oracle(frames))
    hints = []

    class Landmarks:
        camera = CAMERA

        def localize(self, frame, hint):
            hints.append(hint)
            return Estimate(0, status, reason='TOO_FEW_INLIERS')
    localizer = NetworkLocalizer(Oracle(frames), memory, link, points, Landmarks())
    answer = localizer.localize(replace(bare(frames[2]), camera=None))
    assert answer.status is status and answer.T_map_cam is None
    np.testing.assert_allclose(hints[0], frames[2].T_map_cam, atol=1e-6)


def test_the_link_ignores_a_few_wrong_cameras(frames):
    T = np.stack([frame.T_map_cam for frame in frames])
    seen = inverse(Oracle(frames).T_net_map) @ T
    seen[:5, :3, 3] += 2.0
    T_map_net, scale = align_cameras(seen, T)
    assert scale == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(T_map_net, Oracle(frames).T_net_map, atol=0.01)


def test_a_straight_walk_is_enough_and_standing_still_is_not():
    T = np.repeat(np.eye(4)[None], 5, 0)
    with pytest.raises(DegenerateError, match='use a walk that moves'):
        align_cameras(T, T)
    T[:, 2, 3] = np.arange(5)
    T_map_net, scale = align_cameras(T, T)
    assert scale == pytest.approx(1)
    np.testing.assert_allclose(T_map_net, np.eye(4), atol=1e-9)
    turning = np.stack([make_transform(so3_exp(np.array([0, a, 0])), np.zeros(3))
                        for a in (0, 0.5, 1)])
    np.testing.assert_allclose(align_cameras(turning, turning, 2.0)[0], np.eye(4), atol=1e-9)
    with pytest.raises(DegenerateError, match='at least 3 cameras'):
        align_cameras(T[:2], T[:2])


def test_a_network_that_does_not_know_how_it_moves_gets_its_scale_from_depth(frames, points):
    oracle = Oracle(frames)

    def still(images):
        prediction = Oracle.predict(oracle, images)
        T = prediction.T_world_cam.copy()
        T[:, :3, 3] = 0
        return replace(prediction, T_world_cam=T)
    oracle.predict = still
    _, link = linked(frames, points, oracle)
    assert link.scale_source == 'depth' and link.scale == pytest.approx(1 / SCALE, rel=0.02)
    assert 0.1 < link.position < 2 and link.angle < 1e-6


def test_few_keyframes_are_a_part_of_more_and_reach_the_ends(frames):
    T = np.repeat(np.eye(4)[None], 9, 0)
    T[:, 0, 3] = np.arange(9)
    assert spanning_poses(T, 3, 1.0).tolist() == [0, 8, 4]
    every = spanning_poses(T, 20, 1.0)
    assert every[:3].tolist() == [0, 8, 4] and len(set(every)) == 9
    assert sorted(spanning_poses(T[[0, 0, 0]], 3, 1.0)) == [0, 1, 2]


# -- a real network with random weights ----------------------------------------------------


@pytest.fixture(scope='module')
def small():
    """A VGGT of a few layers whose cameras hardly move."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, 'vggt-tiny', SMALL)
        yield cramped()


def cramped():
    torch.manual_seed(0)
    network = build('vggt-tiny', 'ttt')
    with torch.no_grad():
        network.camera_head.pose_branch.fc2.weight.mul_(0.01)
        network.camera_head.pose_branch.fc2.bias.copy_(torch.tensor([0.0] * 6 + [0.25] * 3))
    return network


@pytest.fixture(scope='module')
def weights(small, tmp_path_factory):
    return saved_weights(small, tmp_path_factory.mktemp('weights') / 'small.safetensors')


def saved_weights(network, file):
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, file)
    return file


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (60, 80, 3)).astype(np.uint8) for _ in range(40)]


def scene_network(kind, small):
    """A network as what is asked."""
    if kind == 'vggt':
        return VggtSceneNetwork(NetworkPredictor(small))
    torch.manual_seed(0)
    ray = network_of(RayConfig(dim=32, heads=4, depth=3, attention='ttt'))
    return RaySceneNetwork(NetworkPredictor(ray), ray)


@pytest.mark.parametrize('kind', ['vggt', 'tiny'])
def test_a_query_knows_whether_it_was_written(small, images, kind):
    network = scene_network(kind, small)
    _, memory = network.write(images[:20])
    again = network.state_from(memory.tensors())
    written, other = (network.query(image, again)[1] for image in (images[3], images[30]))
    assert -1e-6 < written < 0.2 * other


@pytest.mark.parametrize('kind', ['vggt', 'tiny'])
def test_the_memory_has_a_fixed_size_and_queries_leave_it_alone(small, images, kind):
    network, sizes = scene_network(kind, small), []
    for count in (35, 40):
        _, memory = network.write(images[:count])
        before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
        answers, novelties = zip(*(network.query(images[i], memory) for i in (3, 1, 3)),
                                 strict=True)
        assert novelties[0] == novelties[2] and -1e-6 < min(novelties) < 2
        assert all(torch.equal(before[name], t) for name, t in memory.tensors().items())
        # What is asked in between changes nothing.
        np.testing.assert_array_equal(answers[0].T_world_cam, answers[2].T_world_cam)
        np.testing.assert_array_equal(answers[0].depth, answers[2].depth)
        assert not np.array_equal(answers[0].T_world_cam, answers[1].T_world_cam)
        sizes.append(memory.nbytes)
    assert sizes[0] == sizes[1]


def test_networks_without_a_fixed_size_say_why_not(small):
    assert unsupported_reason(small) == ''
    assert 'softmax attention grows' in unsupported_reason(build('vggt-tiny', 'softmax'))
    assert 'Pi3 has no cameras' in unsupported_reason(build('pi3-small', device='meta'))


def command(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def folder(weights, walk_folder, tmp_path_factory):
    """A map whose network says nonsense, so that any similarity will do."""
    out = tmp_path_factory.mktemp('maps') / 'map'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_localizer, 'align_cameras', lambda *_: (np.eye(4), 1.0))
        assert command('map', walk_folder, '--out', out, '--model', 'vggt-tiny', '--weights',
                       weights, '--attention', 'ttt', '--window', 4, '--anchors', 1,
                       '--no-refine', '--step', 5) == 0
    return out


def test_a_map_is_asked_as_it_was_written(folder, weights, walk_folder, points, tmp_path,
                                          capsys):
    memory = load_map(folder).fast_weights()
    assert (memory.model, memory.attention, memory.weights) == ('vggt-tiny', 'ttt', '')
    memory.save(tmp_path / 'again.safetensors')
    again = SavedFastWeights.load(tmp_path / 'again.safetensors')
    assert again.link == memory.link
    frames = [np.full((60, 80, 3), value, np.uint8) for value in (9, 200)]
    answers = []
    for kept in (memory, again):
        network = load_network_memory(kept, 'vggt-tiny', weights=str(weights))
        asked = network.localizer(kept, points)
        answers.append([asked.network.query(image, asked.state) for image in frames])
    for (a, new_a), (b, new_b) in zip(*answers, strict=True):
        assert np.array_equal(a.T_world_cam, b.T_world_cam) and np.array_equal(a.depth, b.depth)
        assert new_a == new_b
    capsys.readouterr()
    assert command('localize', folder, walk_folder, '--model', 'vggt-tiny', '--weights', weights,
                   '--no-refine', '--step', 10, '--json') in (0, 1)
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == 3 and {e['status'] for e in entries} <= {'UNCERTAIN', 'NOT_LOCALISED'}
    assert command('info', folder) == 0
    shown = capsys.readouterr().out
    assert NETWORK in shown and 'vggt-tiny (ttt, full)' in shown


def test_another_network_is_refused_in_one_sentence(folder, weights, walk_folder, tmp_path,
                                                    capsys):
    network = cramped()
    with torch.no_grad():
        network.camera_head.empty_pose_tokens += 1
    other = saved_weights(network, tmp_path / 'other.safetensors')
    for options, sentence in (
            (('--model', 'vggt', '--weights', weights), 'expected model vggt-tiny'),
            (('--model', 'vggt-tiny', '--weights', other), 'which wrote those of this map'),
            (('--no-refine',), 'add --model')):
        assert command('localize', folder, walk_folder, *options) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and sentence in error[0]


def test_a_damaged_memory_is_refused(folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / 'map')
    (damaged / NETWORK).write_bytes((folder / NETWORK).read_bytes()[:-1])
    with pytest.raises(MapError, match='truncated'):
        load_map(damaged).fast_weights()
    with pytest.raises(MapError, match='expected the fast weights of a network'):
        SavedFastWeights.load(damaged / 'memory.safetensors')


def test_a_map_without_a_network_says_how_to_make_one(folder, walk_folder, tmp_path, capsys):
    plain = shutil.copytree(folder, tmp_path / 'map')
    (plain / NETWORK).unlink()
    described = yaml.safe_load((plain / 'map.yaml').read_text())
    del described['files'][NETWORK]
    (plain / 'map.yaml').write_text(yaml.safe_dump(described))
    assert command('localize', plain, walk_folder, '--model', 'vggt-tiny') == 2
    assert 'map with --model' in capsys.readouterr().err
