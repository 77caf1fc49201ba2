"""Networks behind the protocol of a predictor: pixels of the original, poses, refusals."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_network import SMALL

from feedforward_recon.cli import main
from feedforward_recon.errors import CheckpointError, InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model import configs
from feedforward_recon.model import predictor as module
from feedforward_recon.model.attention.registry import ATTENTION
from feedforward_recon.model.configs import build, network_of
from feedforward_recon.model.da3 import Da3Reconstruction
from feedforward_recon.model.pi3 import Pi3Reconstruction
from feedforward_recon.model.pose_encoding import decode_cameras, encode_cameras, rigid_inverse
from feedforward_recon.model.predictor import (
    NetworkPredictor,
    as_prediction,
    check_images,
    is_out_of_memory,
    load_predictor,
    preparation,
)
from feedforward_recon.model.preprocess import crop, longest_side, match_pixels
from feedforward_recon.model.ray_transformer import RayConfig
from feedforward_recon.model.vggt import Reconstruction
from feedforward_recon.model.vit import PATCH
from feedforward_recon.model.weights.checkpoints import expected_tensors


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 255, (60, 80, 3)).astype(np.uint8) for _ in range(3)]


@pytest.fixture
def small(monkeypatch):
    """A network of a few layers with random weights, under the name `vggt-tiny`."""
    monkeypatch.setitem(configs.CONFIGS, 'vggt-tiny', SMALL)
    torch.manual_seed(0)
    network = build('vggt-tiny')
    with torch.no_grad():  # depth about 1, fields of view about one radian, hardly any motion
        network.camera_head.pose_branch.fc2.weight.mul_(0.01)
        network.camera_head.pose_branch.fc2.bias.copy_(torch.tensor([0.0] * 6 + [0.25] * 3))
    return network


@pytest.fixture
def weights(small, tmp_path):
    """The small network's weights in a file."""
    file = tmp_path / 'small.safetensors'
    save_file({name: tensor.clone() for name, tensor in small.state_dict().items()}, file)
    assert set(expected_tensors(small)) == set(small.state_dict())
    return file


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name))
               for name in ('T_world_cam', 'K', 'depth', 'confidence'))


def test_answers_are_about_the_images_as_given_and_repeat(small, images):
    predictor = NetworkPredictor(small)
    first, memory = predictor.predict(images)
    again, _ = predictor.predict(images)
    assert same(first, again) and memory is not None
    assert first.depth.shape == first.confidence.shape == (3, 60, 80)
    assert first.T_world_cam.shape == (3, 4, 4) and first.T_world_cam.dtype == np.float64
    R = first.T_world_cam[:, :3, :3]
    np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.eye(3)[None].repeat(3, 0), atol=1e-12)
    assert (first.depth > 0).all() and (first.confidence >= 1).all()
    np.testing.assert_allclose(first.K[:, :2, 2], [[39.5, 29.5]] * 3, atol=1e-4)


def test_looking_without_writing_leaves_the_memory_alone(small, images):
    predictor = NetworkPredictor(small)
    _, memory = predictor.predict(images)
    before = {name: tensor.clone() for name, tensor in memory.tensors().items()}
    answer, after = predictor.predict(images[:1], memory, write=False)
    assert len(answer) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in after.tensors().items())


@pytest.mark.parametrize('attention', list(ATTENTION))
def test_a_network_that_is_told_intrinsics_keeps_the_same_laws(attention, images):
    torch.manual_seed(0)
    network = network_of(RayConfig(dim=48, heads=2, depth=2, attention=attention))
    predictor = NetworkPredictor(network)
    K = np.array([[70.0, 0, 41], [0, 72, 28], [0, 0, 1]])
    first, memory = predictor.predict(images, K=K)
    assert same(first, predictor.predict(images, K=K)[0])
    assert first.depth.shape == first.confidence.shape == (3, 60, 80)
    np.testing.assert_allclose(first.K, [K] * 3, rtol=1e-5)
    R = first.T_world_cam[:, :3, :3]
    np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.eye(3)[None].repeat(3, 0), atol=1e-12)
    assert (first.depth > 0).all() and (first.confidence >= 1).all()
    np.testing.assert_allclose(first.T_world_cam[0], np.eye(4), atol=1e-6)
    before = [tensor.clone() for tensor in tensors_of(memory)]
    answer, after = predictor.predict(images[:1], memory, write=False, K=K)
    assert len(answer) == 1 and after.written == 3
    assert before and all(map(torch.equal, before, tensors_of(after)))
    # Another lens is another answer; without one it is a usual one.
    assert not np.allclose(predictor.predict(images, K=K * [[2], [2], [1]])[0].depth, first.depth)
    guessed = predictor.predict(images)[0].K
    np.testing.assert_allclose(guessed[:, :2, 2], [[39.5, 29.5]] * 3, atol=1e-4)


def tensors_of(memory):
    return [tensor for state in memory.states for tensor in state.tensors().values()]


@pytest.mark.parametrize('size_hw', [(60, 80), (97, 61), (400, 300)])
@pytest.mark.parametrize('prepare', [crop, match_pixels, longest_side])
def test_depth_comes_back_to_the_pixels_it_belongs_to(prepare, size_hw):
    """A ramp over the image: what the network sees at a place is said of that place."""
    height, width = size_hw
    placed = prepare([np.zeros((height, width, 3), np.uint8)])
    rows, columns = placed[0].image.shape[:2]
    v, u = np.mgrid[:rows, :columns]
    (sx, sy), (left, top) = placed[0].scale_xy, placed[0].offset_xy
    x, y = (u - left + 0.5) / sx - 0.5, (v - top + 0.5) / sy - 0.5
    depth = torch.from_numpy((1000 + x + 3 * y).astype(np.float32))[None]
    K = torch.tensor([[50.0, 0, columns / 2], [0, 50, rows / 2], [0, 0, 1]])[None]
    answer = (torch.eye(4)[None], K, depth, torch.ones_like(depth))
    prediction = as_prediction(answer, placed, size_hw)
    v, u = np.mgrid[:height, :width]
    known = prediction.depth[0] > 0
    inner = np.s_[10:-10, 10:-10] if prepare is not crop else np.s_[height // 2:height // 2 + 1]
    assert known[inner].all()
    inside = known.copy()
    inside &= (np.minimum(u, width - 1 - u) > 5) & (np.minimum(v, height - 1 - v) > 5)
    if prepare is crop:  # what was cut off ends in the middle of a pixel
        inside &= np.roll(known, 5, 0) & np.roll(known, -5, 0)
    np.testing.assert_allclose(prediction.depth[0][inside], (1000 + u + 3 * v)[inside], atol=0.3)
    assert prediction.K[0, 0, 0] == pytest.approx(50 / sx)


def test_every_kind_of_network_says_the_same_things(images):
    for name in ('pi3', 'da3'):
        answer = module.read(said_by(name))
        assert [tuple(x.shape) for x in answer] == [(1, 2, 4, 4), (1, 2, 3, 3), (1, 2, 28, 42),
                                                    (1, 2, 28, 42)]
        assert (answer[3] >= 1).all()
        # DA3 says T_cam_world, pi3 T_world_cam.
        sign = -1 if name == 'da3' else 1
        assert answer[0][0, 0, :3, 3].tolist() == [sign, 2 * sign, 3 * sign]


def said_by(name):
    torch.manual_seed(0)
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([1.0, 2, 3])
    T = pose.expand(1, 2, 4, 4)
    depth = torch.rand(1, 2, 28, 42) + 1
    if name == 'da3':
        K = torch.eye(3).expand(1, 2, 3, 3)
        return Da3Reconstruction(torch.zeros(1, 2, 9), T, K, depth, depth, depth, depth)
    v, u = torch.meshgrid(torch.arange(28.0), torch.arange(42.0), indexing='ij')
    rays = torch.stack([(u - 21) / 30, (v - 14) / 30, torch.ones_like(u)], -1)
    points = rays * depth[..., None]
    return Pi3Reconstruction(points, points, torch.randn(1, 2, 28, 42), T)


@pytest.mark.parametrize(('name', 'expected_hw'), [
    ('vggt', (392, 518)), ('pi3', (434, 574)), ('speed3r', (448, 560)), ('da3', (378, 504))])
def test_networks_get_images_of_the_sizes_that_they_were_trained_with(name, expected_hw):
    prepare = preparation(build(name, device='meta'))
    assert prepare([np.zeros((480, 640, 3), np.uint8)])[0].image.shape[:2] == expected_hw


WAYS = {'vggt': crop, 'pi3': match_pixels, 'da3': longest_side}


def true_answer(name, camera, depth, T_world_cam):
    """What a perfect network of that kind says about views of a camera; in its own way.

    depth: [N, H, W]; T_world_cam: [N, 4, 4].
    """
    size_hw, T = depth.shape[-2:], torch.from_numpy(T_world_cam)[None]
    if name == 'pi3':
        v, u = np.mgrid[:size_hw[0], :size_hw[1]]
        points = torch.from_numpy(np.stack(
            [camera.unproject(np.stack((u, v), -1).reshape(-1, 2), z.ravel()) for z in depth]))
        points = points.view(1, len(depth), *size_hw, 3)
        return Pi3Reconstruction(points, points, torch.zeros(points.shape[:-1]), T)
    K = torch.from_numpy(camera.K).expand(1, len(depth), 3, 3)
    inward = rigid_inverse(T) if name == 'vggt' else T
    encodings = encode_cameras(inward, K, size_hw)
    pose, K = decode_cameras(encodings, size_hw)  # the network only says the encoding
    z = torch.from_numpy(depth)[None]
    if name == 'vggt':
        return Reconstruction(encodings[None], pose, K, z, z, z, z)
    return Da3Reconstruction(encodings, rigid_inverse(pose), K, z, z, z, z)


@pytest.mark.parametrize('name', ['vggt', 'pi3', 'da3'])
@pytest.mark.parametrize('size_wh', [(160, 120), (97, 63), (60, 80)])
def test_true_answers_give_the_true_cameras(name, size_wh):
    """Camera of the original -> of the prepared image -> as the network says it -> original."""
    camera = Camera.from_fov(70.0, size_wh)
    placed = WAYS[name]([np.zeros((size_wh[1], size_wh[0], 3), np.uint8)])
    rows, columns = placed[0].image.shape[:2]
    (sx, sy), (left, top) = placed[0].scale_xy, placed[0].offset_xy
    seen = Camera(columns, rows, camera.fx * sx, camera.fy * sy,
                  (camera.cx + 0.5) * sx - 0.5 + left, (camera.cy + 0.5) * sy - 0.5 + top)
    depth = 1 + np.random.default_rng(0).random((1, rows, columns))
    said = true_answer(name, seen, depth, np.eye(4)[None])
    K = placed[0].original_K(module.read(said)[1][0, 0].numpy())
    np.testing.assert_allclose(K, camera.K, rtol=0, atol=1e-6)
    # The first and the last column end half a pixel beyond their centres: that is the view.
    edges = Camera.from_matrix(K, size_wh).normalise(
        np.array([[-0.5, camera.cy], [size_wh[0] - 0.5, camera.cy]]))
    np.testing.assert_allclose(np.rad2deg(np.arctan(edges[:, 0])), [-35, 35], atol=1e-9)


@pytest.mark.parametrize('name', ['vggt', 'pi3', 'da3'])
def test_a_network_that_sees_the_room_as_it_is_gives_its_points(name, room_camera, room_frames):
    """Depth, camera and pose together put every pixel of the room where it is."""
    frames = room_frames[:2]
    placed = WAYS[name]([frame.image for frame in frames])
    rows, columns = placed[0].image.shape[:2]
    seen = room_camera.resized((columns, rows))
    u, v = np.meshgrid(np.arange(columns), np.arange(rows))
    (sx, sy), size_hw = placed[0].scale_xy, frames[0].depth.shape
    near = ((v + 0.5) / sy).astype(int), ((u + 0.5) / sx).astype(int)
    depth = np.stack([frame.depth[near].astype(float) for frame in frames])
    T = np.stack([frame.T_map_cam for frame in frames])
    found = as_prediction(tuple(x[0] for x in module.read(true_answer(name, seen, depth, T))),
                          placed, size_hw)
    np.testing.assert_allclose(found.T_world_cam, T, atol=1e-6)
    v, u = np.mgrid[:size_hw[0], :size_hw[1]]
    pixels = np.stack((u, v), -1).reshape(-1, 2)
    for frame, K, z in zip(frames, found.K, found.depth, strict=True):
        expected = room_camera.unproject(pixels, frame.depth.ravel())
        points = Camera.from_matrix(K, room_camera.size_wh).unproject(pixels, z.ravel())
        error = np.linalg.norm(points - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.median(error) < 1e-4 and np.quantile(error, 0.8) < 0.02


@pytest.mark.parametrize(('error', 'expected'), [
    (MemoryError(), True), (torch.cuda.OutOfMemoryError('CUDA out of memory.'), True),
    (RuntimeError('[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: '
                  'you tried to allocate 8 bytes.'), True),
    (RuntimeError('shapes cannot be multiplied'), False), (ValueError('out of memory'), False)])
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_full_device_is_a_memory_error_and_a_bug_is_a_bug(small, images, monkeypatch):
    predictor = NetworkPredictor(small)
    for error, raised in ((RuntimeError('CUDA out of memory'), MemoryError),
                          (RuntimeError('shapes differ'), RuntimeError)):
        def fail(*_, error=error, **__):
            raise error
        monkeypatch.setattr(predictor, '_run', fail)
        with pytest.raises(raised, match=r'too many for cpu|shapes differ'):
            predictor.predict(images)


def test_images_that_do_not_fit_are_refused(images):
    with pytest.raises(InputError, match='one size, found 80x50, 80x60'):
        check_images([images[0], images[1][:50]])
    with pytest.raises(InputError, match=f'at least {PATCH}x{PATCH} pixels'):
        check_images([images[0][:13]])
    with pytest.raises(InputError, match='found none'):
        check_images([])


def test_a_network_that_describes_no_camera_is_refused():
    placed = crop([np.zeros((60, 80, 3), np.uint8)])
    maps = torch.ones(1, *placed[0].image.shape[:2])
    for bad in (torch.full((1, 3, 3), np.nan), -torch.eye(3)[None]):
        with pytest.raises(CheckpointError, match='expected cameras'):
            as_prediction((torch.eye(4)[None], bad, maps, maps), placed, (60, 80))


def test_weights_load_from_a_file_as_they_were(small, weights, images):
    loaded = load_predictor('vggt-tiny', weights=str(weights))
    got, expected = (p.predict(images)[0] for p in (loaded, NetworkPredictor(small)))
    # Another alignment in memory may choose another kernel.
    np.testing.assert_allclose(got.depth, expected.depth, rtol=1e-5)
    np.testing.assert_allclose(got.T_world_cam, expected.T_world_cam, atol=1e-6)


def test_other_weights_are_refused(weights):
    with pytest.raises(CheckpointError, match='expected weights of Vggt'):
        load_predictor('vggt-tiny', 'ttt', weights=str(weights))


def map_command(walk, out, *extra):
    return main(['map', str(walk), '--out', str(out), '--step', '5', *map(str, extra)])


@pytest.mark.parametrize('shipped', [False, True])
def test_the_command_maps_with_a_network(weights, walk_folder, tmp_path, capsys, shipped):
    """With random weights the map is nonsense, but it is a map, and honest about its scale."""
    network = ('--model', 'tiny') if shipped else ('--model', 'vggt-tiny', '--weights', weights)
    code = map_command(walk_folder, tmp_path / 'm', *network, '--window', 4, '--anchors', 1,
                       '--mono', '--json')
    out, err = capsys.readouterr()
    assert code == 0, err
    summary = json.loads(out)
    assert summary['metres_per_unit'] is None and summary['frames'] == 6
    assert (tmp_path / 'm' / 'memory.safetensors').is_file()
    assert len(json.loads((tmp_path / 'm' / 'poses.json').read_text())) == 6


@pytest.mark.parametrize(('options', 'sentence'), [
    (('--model', 'tiny', '--device', 'cuda:99'), "found 'cuda:99'"),
    (('--model', 'vgt'), 'did you mean vggt'),
    (('--attention', 'ttt'), 'expected --attention beside a feed-forward network'),
    (('--model', 'tiny', '--attention', 'magic'), "found 'magic'; choose one of"),
    (('--model', 'tiny', '--weights', 'no/such.pt'), 'expected weights at no/such.pt'),
    (('--model', 'tiny', '--anchors', 9, '--window', 9), 'expected windows'),
    (('--model', 'tiny', '--poses', 'given'), 'leave one of --poses and --model out')])
def test_the_command_refuses_in_one_sentence(options, sentence, walk_folder, tmp_path, capsys):
    assert map_command(walk_folder, tmp_path / 'm', *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and sentence in error[0]
