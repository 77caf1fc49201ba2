"""One pass over all images: as the network sees them together, in chunks and in processes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_reconstruction import CONFIG, SETTINGS, as_files, error_of, views
from test_transformer_pairs import of_kind

from benchmarks.common import REPOSITORY
from benchmarks.joint import cut
from feedforward_recon.cli import main
from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.errors import ConfigError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.model import configs, joint_plan, ray_cameras
from feedforward_recon.model.attention.config import SparseLinearOptions
from feedforward_recon.model.attention.sparse_linear import replace_local
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.joint import JointNetwork, pass_alone
from feedforward_recon.model.joint_pass import ViewInputs, joint_cells
from feedforward_recon.model.joint_plan import JointPlan, MemoryNeed, available_bytes, pass_bytes
from feedforward_recon.model.joint_processes import SharedPass, joined_processes, shares
from feedforward_recon.model.predictor import NetworkPredictor
from feedforward_recon.model.ray_cameras import similar_pairs
from feedforward_recon.model.ray_stem import RayStem
from feedforward_recon.model.ray_transformer import SPECIAL, CellMaps, RayConfig
from feedforward_recon.model.seconds import Seconds
from feedforward_recon.reconstruction.decoders import pair_network
from feedforward_recon.session.photos import reconstruct_frames
from feedforward_recon.types import Frame

JOINT = dataclasses.replace(CONFIG, reconstruction=ReconstructionConfig(decoder='joint'))
CAMERA = Camera.from_fov(70.0, (320, 240))
SIZE_HW = (96, 128)
SHAPE = RayConfig(dim=32, heads=2, depth=2, attention='ttt')


def small(attention='ttt', **options):
    """A small network with the shipped stem, whose random weights do something."""
    torch.manual_seed(0)
    network = configs.network_of(dataclasses.replace(SHAPE, attention=attention), **options)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    network.stem.load_state_dict(RayStem.shipped().state_dict())
    return NetworkPredictor(network)


def tiny(attention):
    """The shipped network; with another attention its states are random, the rest is trained."""
    torch.manual_seed(0)
    trained, network = configs.load('tiny'), configs.build('tiny', attention)
    network.load_state_dict(trained.state_dict(), strict=False)
    return NetworkPredictor(network)


def vggt():
    """A network of the kind of VGGT whose angles of view are positive."""
    predictor = of_kind('vggt-tiny')
    last = predictor.network.camera_head.pose_branch.fc2
    last.weight.data[-2:], last.bias.data[-2:] = 0, 0.25
    return predictor


@pytest.fixture(scope='module')
def photos():
    return views(5)


def inputs(predictor, photos, count):
    """The first photos, prepared as ``preprocess`` would, and intrinsics."""
    network = JointNetwork(predictor)
    placed = [network.prepared(frame.image) for frame in photos[:count]]
    return network, placed, [CAMERA.K] * count


@pytest.mark.parametrize('attention', ['ttt', 'softmax', 'hybrid'])
def test_a_pass_is_what_the_network_says_of_all_images(photos, attention):
    predictor = tiny(attention)
    network, placed, K = inputs(predictor, photos, 4)
    whole, _ = predictor.predict([frame.image for frame in photos[:4]], K=CAMERA.K)
    pairs = [(0, 1), (3, 2), (1, 3)]
    for (i, j), said in zip(pairs, network.collected(placed, K).predict(pairs), strict=True):
        T = inverse(whole.T_world_cam[i]) @ whole.T_world_cam[j]
        np.testing.assert_allclose(inverse(said.T_world_cam[0]) @ said.T_world_cam[1], T,
                                   atol=1e-4)
        # Pixels of the prepared image, of one as large: 320x240 has its shape.
        rows = np.linspace(20, 220, 9).astype(int)
        small_rows = np.round((rows + 0.5) * placed[i].scale_xy[1] - 0.5).astype(int)
        near = whole.depth[i][rows, 160] / said.depth[0][small_rows, 128] - 1
        assert np.median(np.abs(near)) < 0.02


@torch.inference_mode()
@pytest.mark.parametrize('attention', ['ttt', 'softmax', 'latent', 'sparse'])
def test_the_size_of_chunks_changes_nothing(photos, attention):
    predictor = small(attention)
    _, placed, K = inputs(predictor, photos, 7)
    seen = ViewInputs(placed, np.stack([image.prepared_K(k)
                                        for image, k in zip(placed, K, strict=True)]))
    by_chunk = [joint_cells(predictor.network, seen, chunk, Seconds()) for chunk in (1, 3, 7)]
    for name, value in vars(by_chunk[2]).items():
        for other in by_chunk[:2]:
            assert torch.allclose(getattr(other, name), value, rtol=1e-4, atol=1e-4), name


@torch.inference_mode()
def test_every_image_is_seen_before_the_next_layer(photos):
    """What the first image says changes with the last one, which another chunk holds."""
    predictor = small()
    _, placed, K = inputs(predictor, photos, 5)
    own = np.stack([image.prepared_K(k) for image, k in zip(placed, K, strict=True)])
    both = [joint_cells(predictor.network, ViewInputs(placed[:count], own[:count]), 2, Seconds())
            for count in (4, 5)]
    assert not torch.allclose(both[0].points[0, 0], both[1].points[0, 0], atol=1e-3)


def test_a_map_is_made_of_one_pass(photos):
    """Poses that matches say need no training, so that random states will do."""
    run = reconstruct_frames(photos, JOINT, predictor=tiny('ttt'))[0]
    assert len(run.scene.trajectory) == len(photos)
    assert error_of(run, photos)[0] < 0.01
    assert list(run.seconds) == ['features', 'reading', 'stem', 'joint pass', 'heads', 'matching',
                                 'poses', 'depth', 'pairs', 'refinement', 'scene memory']
    assert all(seconds >= 0 for seconds in run.seconds.values())


def test_images_of_which_intrinsics_are_found_are_seen_again(photos):
    predictor = tiny('ttt')
    network, placed, K = inputs(predictor, photos, 3)
    first = network.collected(placed, K)
    wider = [CAMERA.with_lens(0.8, 0.0).K] * 3
    again = network.told(first, wider).predict([(0, 1)])[0]
    assert again.K[0, 0, 0] == pytest.approx(0.8 * first.predict([(0, 1)])[0].K[0, 0, 0])


def test_other_kinds_see_all_images_at_once_too(photos):
    predictor = vggt()
    network = JointNetwork(predictor)
    placed = [network.prepared(frame.image) for frame in photos[:3]]
    collection = network.collected(placed, [CAMERA.K] * 3)
    assert network.told(collection, [np.eye(3)] * 3) is collection
    said = collection.predict([(0, 2), (1, 2)])
    whole, _ = predictor.predict([frame.image for frame in placed])
    for window, pair in zip([(0, 2), (1, 2)], said, strict=True):
        np.testing.assert_allclose(pair.T_world_cam, whole.T_world_cam[list(window)], atol=1e-5)
        np.testing.assert_allclose(pair.depth, whole.depth[list(window)], rtol=1e-4, atol=1e-5)


def test_many_views_are_compared_by_one_vector_each(monkeypatch):
    """Eight places, of which each view shows one; blocks of views change nothing."""
    torch.manual_seed(0)
    places = torch.randn(8, 24, 6, 8)
    order = torch.randperm(80) % 8
    shown = torch.nn.functional.normalize(places[order] + 0.3 * torch.randn(80, 24, 6, 8), dim=1)
    words = torch.nn.functional.normalize(torch.randn(5, 24), dim=1)
    pairs = similar_pairs(shown, words)
    nearest = [(i, j) for i, j in pairs if order[i] == order[j]]
    assert {i for pair in nearest for i in pair} == set(range(80))
    assert len(pairs) <= 80 * len(ray_cameras.RANKS)
    monkeypatch.setattr(ray_cameras, 'BLOCK', 7)
    assert similar_pairs(shown, words) == pairs
    # Ten views of each place: of nine others, ranks 0, 1, 2, 4 and 8 are of the same.
    assert len(nearest) >= 0.6 * len(pairs)


def shared_pass(predictor, count):
    """What a pass over photos says, by this process or by all of the group, and the poses."""
    found = {}

    def kept(views_, seconds):
        said = pass_(views_, seconds)
        found.update(vars(said) if isinstance(said, CellMaps)
                     else dict(zip(('T', 'K', 'depth', 'confidence'), said, strict=True)))
        return said
    pass_ = SharedPass(predictor) if dist.is_initialized() else partial(pass_alone, predictor)
    network = JointNetwork(predictor, kept)
    placed = [network.prepared(frame.image) for frame in views(5)[:count]]
    said = network.collected(placed, [CAMERA.K] * count).predict([(0, k) for k in range(1, count)])
    return {name: value.numpy() for name, value in found.items()}, np.stack(
        [inverse(one.T_world_cam[0]) @ one.T_world_cam[1] for one in said])


def small_sla():
    """A small network with sparse attentions, also within images."""
    predictor = small('sparse_linear')
    torch.manual_seed(1)
    replace_local(predictor.network, SparseLinearOptions(window=2, kept=2), SPECIAL)
    return predictor


NETWORKS = {'ttt': lambda: small(chunk_tokens=800), 'sla': small_sla, 'vggt': vggt}
COUNTS = {'ttt': 14, 'sla': 5, 'vggt': 5}  # of images: two chunks each, or uneven shares
ROUNDING = {'ttt': 0.0, 'sla': 1e-5, 'vggt': 1e-5}  # as shares of the largest value


def share_of_a_process(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank,
                            world_size=2)
    found = {}
    if rank:  # its own machine has hardly any memory left; the first process decides
        joint_plan.available_bytes = lambda device: 10**6
    for name, made in NETWORKS.items():
        predictor = made()
        if rank:
            SharedPass(predictor).help_out()
            continue
        found[name] = shared_pass(predictor, COUNTS[name])
        with pytest.raises(ConfigError, match='at least as many images as processes, found 1'):
            shared_pass(predictor, 1)
        SharedPass(predictor).end()
    if not rank:
        torch.save(found, results)
    with pytest.raises(ConfigError, match=r'several processes can share.* found Pi3'):
        SharedPass(of_kind('pi3'))
    dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    results = tmp_path_factory.mktemp('processes') / 'found.pt'
    torch.multiprocessing.spawn(share_of_a_process, (free_port(), str(results)), nprocs=2)
    return torch.load(results, weights_only=False)


@pytest.mark.parametrize('name', NETWORKS)
def test_two_processes_say_what_one_says(two_processes, name):
    expected, poses = shared_pass(NETWORKS[name](), COUNTS[name])
    found, others = two_processes[name]
    for key, value in expected.items():
        assert np.abs(found[key] - value).max() <= ROUNDING[name] * np.abs(value).max(), key
    if name != 'sla':  # poses of tiny follow from matches, of which rounding may make others
        assert np.abs(poses - others).max() <= ROUNDING[name]


def leader_without_memory(rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    predictor = small()
    with joined_processes(predictor) as leads:
        assert leads, 'a pass that failed came to its end'
        predictor.network.encode = lambda images: (_ for _ in ()).throw(MemoryError)
        shared_pass(predictor, 5)


def test_a_pass_that_fails_ends_the_processes_that_wait_for_it():
    """As torchrun does: once one of them has ended with an error, the others are ended."""
    started = torch.multiprocessing.spawn(leader_without_memory, (free_port(),), nprocs=2,
                                          join=False)
    try:
        with pytest.raises(torch.multiprocessing.ProcessRaisedException, match='too little '
                           'memory; give fewer images'):
            started.join(timeout=60)
    finally:
        for process in started.processes:
            process.kill()


@pytest.mark.parametrize(('images', 'processes', 'sizes'), [
    (12, 2, [10, 2]), (40, 3, [15, 15, 10]), (6, 2, [5, 1]), (5, 2, [3, 2]), (9, 3, [3, 3, 3])])
def test_processes_share_whole_chunks_where_there_are_enough(images, processes, sizes):
    own = shares(images, processes, 5)
    assert [len(part) for part in own] == sizes
    assert np.array_equal(np.concatenate(own), np.arange(images))


PEAK = """
import sys, torch
from test_joint import SIZE_HW, small
from benchmarks.common import forget_peak, memory_bytes
from feedforward_recon.model.joint_pass import ViewInputs, joint_cells
from feedforward_recon.model.preprocess import PreparedImage
from feedforward_recon.model.seconds import Seconds
import numpy as np
network = small().network
def views(count):
    image = PreparedImage(np.zeros((*SIZE_HW, 3), np.uint8), (1.0, 1.0))
    return ViewInputs([image] * count, np.tile(np.diag([100.0, 100.0, 1.0]), (count, 1, 1)))
with torch.inference_mode():
    joint_cells(network, views(40), 20, Seconds())
    before = forget_peak()
    joint_cells(network, views(int(sys.argv[1])), 20, Seconds())
    print(memory_bytes('VmHWM') - before)
"""


def test_memory_is_what_the_plan_foresees():
    counts = 100, 300
    paths = {'PYTHONPATH': os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / 'test')))}
    peaks = [int(subprocess.run([sys.executable, '-c', PEAK, str(count)], check=True,
                                env={**os.environ, **paths}, capture_output=True, text=True
                                ).stdout) for count in counts]
    _, per_image = pass_bytes(small().network, SIZE_HW, 20)
    assert 0.4 < (peaks[1] - peaks[0]) / (counts[1] - counts[0]) / per_image < 1.4


def test_a_plan_says_how_many_images_would_fit():
    need = MemoryNeed('main', 10**9, 10**7, 3 * 10**9)
    assert need.fits == 200
    JointPlan(200, 5, 1, (need,)).check()
    with pytest.raises(ConfigError, match=r'expected 3\.0 GB of main memory for one pass over '
                       r'201 images, found 3\.0 GB free; 200 images would fit'):
        JointPlan(201, 5, 1, (need,)).check()
    said = str(JointPlan(150, 5, 2, (need, MemoryNeed('cuda:0', 0, 1, None))))
    assert said == ('one pass over 150 images, 5 at a time, shared by 2 processes: expected to '
                    'need 2.5 GB of main memory (3.0 GB free) and 0.0 GB of cuda:0 memory')
    JointPlan(10**9, 5, 1, (MemoryNeed('main', 0, 1, None),)).check()  # nothing says what is free


def test_plans_grow_as_the_network_does(monkeypatch):
    per_image = {name: pass_bytes(small(name).network, SIZE_HW, 5)[1]
                 for name in ('ttt', 'softmax')}
    assert per_image['softmax'] > per_image['ttt']  # keys and values of all images are kept
    assert pass_bytes(small().network, (192, 256), 5)[1] > 3 * per_image['ttt']
    assert available_bytes(torch.device('cpu')) > 10**8


def test_what_does_not_fit_is_said_before_anything_is_computed(photos, monkeypatch):
    monkeypatch.setattr(joint_plan, 'available_bytes', lambda device: 10**8)
    predictor, said = tiny('ttt'), []
    monkeypatch.setattr(predictor.network.stem, 'forward', lambda *_: pytest.fail('computed'))
    monkeypatch.setattr(CompactEncoder, 'encode', lambda *_: pytest.fail('encoded'))
    with pytest.raises(ConfigError, match=r'over 14 images, found 0\.1 GB free; \d+ images'):
        reconstruct_frames(photos, JOINT, predictor=predictor, total=14, say=said.append)
    assert said[0].startswith('one pass over 14 images, 1 at a time')
    network, placed, K = inputs(predictor, photos, 3)
    with pytest.raises(ConfigError, match=r'one pass over 3 images'):
        network.collected(placed, K)


def test_plans_count_all_processes_of_a_machine(monkeypatch):
    alone = joint_plan.joint_plan(small().network, 200, SIZE_HW)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    together = joint_plan.joint_plan(small().network, 200, SIZE_HW, 8)
    # Of what is said each has all, of tokens a share.
    assert alone.needs[0].of(200) < together.needs[0].of(200) < 4.5 * alone.needs[0].of(200)


def test_no_more_images_are_worked_on_at_a_time_than_there_are_or_than_fit(monkeypatch):
    network = small().network
    assert joint_plan.chunk_of(network, SIZE_HW, 3) == 3
    assert joint_plan.chunk_of(network, SIZE_HW, 1000) > 3
    monkeypatch.setattr(joint_plan, 'available_bytes', lambda device: 4 * 2 * 96 * 128 * 2000)
    assert joint_plan.chunk_of(network, SIZE_HW, 1000) == 2


def test_time_that_grows_with_the_square_is_one_sentence(caplog):
    JointNetwork(small())
    network = configs.network_of(dataclasses.replace(SHAPE, attention='ttt'))
    JointNetwork(NetworkPredictor(replace_local(network, SparseLinearOptions(), SPECIAL)))
    assert not caplog.records  # what is compared within images does not count
    JointNetwork(small('softmax'))
    assert 'grows with the square' in caplog.records[0].getMessage()


def test_the_network_is_asked_in_one_pass_where_settings_say_so():
    network = pair_network(JOINT.reconstruction, small())
    assert isinstance(network, JointNetwork) and not network.decodes
    both = ReconstructionConfig(decoder='joint', latent_alignment=True)
    with pytest.raises(ConfigError, match=r'expected one of reconstruction\.decoder joint and'):
        pair_network(both, small())
    with pytest.raises(ConfigError, match='decoder joint, found none; choose one with --model'):
        pair_network(JOINT.reconstruction, None)


@pytest.fixture(scope='module')
def folder(photos, tmp_path_factory):
    return as_files(photos, tmp_path_factory.mktemp('photos'))


def test_the_command_maps_with_one_pass(folder, tmp_path, capsys, monkeypatch):
    passes, plain = [], JointNetwork.collected
    monkeypatch.setattr(JointNetwork, 'collected', lambda self, images, K: (
        passes.append(len(images)), plain(self, images, K))[1])
    weights = tmp_path / 'ttt.safetensors'
    save_file(tiny('ttt').network.state_dict(), weights)
    assert main(['reconstruct', str(folder), *SETTINGS, '--joint', '--model', 'tiny',
                 '--attention', 'ttt', '--weights', str(weights), '--workers', '1',
                 '--out', str(tmp_path / 'map'), '--json']) == 0
    said, told = capsys.readouterr()
    summary = json.loads(said)
    assert summary['tracked'] == 14 and passes == [14]
    assert {'reading', 'joint pass', 'saving'} <= set(summary['seconds'])
    assert 'note: one pass over 14 images, 5 at a time: expected to need' in told


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['--joint'], 'expected a feed-forward network beside --joint'),
    (['--joint', '--model', 'tiny', '--set', 'reconstruction.latent_alignment=true'],
     'leave the latter out')])
def test_what_one_pass_needs_is_one_sentence(folder, tmp_path, capsys, arguments, sentence):
    assert main(['reconstruct', str(folder), '--out', str(tmp_path / 'map'), *arguments]) != 0
    assert sentence in capsys.readouterr().err.replace('\n', ' ')
    assert not (tmp_path / 'map').exists()


def test_processes_without_a_joint_pass_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main(['reconstruct', str(folder), '--out', str(tmp_path / 'map')]) != 0
    assert 'expected --joint in 2 processes' in capsys.readouterr().err


def test_an_image_of_the_second_walk_shows_the_same_where_its_camera_says():
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    smaller = cut(Frame(0, image, camera=CAMERA), np.random.default_rng(1))
    assert smaller.image.shape == (216, 288, 3) and smaller.camera.size_wh == (288, 216)
    moved = np.array([CAMERA.cx - smaller.camera.cx, CAMERA.cy - smaller.camera.cy]).astype(int)
    x, y = 100, 90
    assert (smaller.image[y - moved[1], x - moved[0]] == image[y, x]).all()
