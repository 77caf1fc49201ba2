"""Laws of the coordinate network: its sums are exact, whatever was written, moved or forgotten."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import DIM, OracleScene, poses_around, shifted, unit

from feedforward_recon.errors import CheckpointError
from feedforward_recon.geometry.transforms import se3_exp
from feedforward_recon.memory.coordinate_network import (
    AGREEMENT,
    ENOUGH,
    PROBES,
    CellSums,
    CoordinateNetwork,
    agreed,
    quantise_weights,
)
from feedforward_recon.memory.keys import (
    CANDIDATES,
    CODES,
    TABLES,
    keys_for,
    load_keys,
    random_keys,
)
from feedforward_recon.memory.network_writer import PER_KEYFRAME, NetworkWriter, fair_share
from feedforward_recon.memory.scene_memory import box_around, quantise_points
from feedforward_recon.types import Keyframe

CELLS, MANY_CELLS, ROOM = 3000, 20_000, 1_000_000
KEYS = random_keys(DIM).first(4)
NAMES = ('count', 'points', 'squares', 'depths')


def writer(cells: int = CELLS, capacity: int = ROOM) -> NetworkWriter:
    return NetworkWriter(cells, capacity, KEYS)


def keyframes(count: int, seed: int = 0) -> list[Keyframe]:
    """Views of one scene; confidence differs, so that it matters which are kept."""
    scene = OracleScene.generate(seed)
    made = [scene.keyframe(index, pose) for index, pose in enumerate(poses_around(count, seed))]
    return [with_confidence(keyframe, seed=index) for index, keyframe in enumerate(made)]


def with_confidence(keyframe: Keyframe, seed: int) -> Keyframe:
    confidence = np.random.default_rng(seed).uniform(0, 1, len(keyframe.features))
    return replace(keyframe, features=replace(keyframe.features,
                                              confidence=confidence.astype(np.float32)))


def copy(sums: CellSums) -> dict[str, np.ndarray]:
    return {name: getattr(sums, name).copy() for name in NAMES}


def assert_same(sums: CellSums, expected: CellSums | dict[str, np.ndarray]) -> None:
    """Bit by bit."""
    for name, values in (expected if isinstance(expected, dict) else copy(expected)).items():
        found = getattr(sums, name)
        assert found.dtype == np.int64 == values.dtype
        np.testing.assert_array_equal(found, values, err_msg=name)


def restored(of: NetworkWriter) -> NetworkWriter:
    again = NetworkWriter(of.cells, of.capacity, of.keys)
    again.restore(of.state())
    return again


def network(of: NetworkWriter) -> CoordinateNetwork:
    """What is read, quantised as in a scene memory."""
    points, weights = of.sums.means()
    box = box_around(points[weights > 0])
    return CoordinateNetwork(of.keys, quantise_points(points, weights > 0, box),
                             quantise_weights(weights), box.astype(np.float64),
                             of.sums.typical_depth)


# Sums


def test_what_is_removed_leaves_no_trace():
    net, views = writer(), keyframes(5)
    for keyframe in views[:4]:
        net.write(keyframe)
    before = copy(net.sums)
    net.write(views[4])
    assert net.sums.count.sum() > before['count'].sum()
    net.remove(4)
    assert_same(net.sums, before)
    for index in range(4):
        net.remove(index)
    net.remove(77)  # wrote nothing
    assert_same(net.sums, CellSums(KEYS.tables, CELLS))
    assert net.filled == 0


@pytest.mark.parametrize('seed', range(3))
def test_the_order_of_writes_does_not_matter(seed):
    forward, shuffled, views = writer(), writer(), keyframes(6)
    for keyframe in views:
        forward.write(keyframe)
    for index in np.random.default_rng(seed).permutation(6):
        shuffled.write(views[index])
    assert_same(shuffled.sums, forward.sums)
    assert all(torch.equal(value, shuffled.state()[name])
               for name, value in forward.state().items())


def test_two_halves_merged_are_the_whole():
    whole, left, right, views = writer(), writer(), writer(), keyframes(6)
    for index, keyframe in enumerate(views):
        whole.write(keyframe)
        if index < 3:
            left.write(keyframe)
        else:
            right.write(replace(keyframe, id=index - 3))
    left.merge(right)
    assert_same(left.sums, whole.sums)
    assert list(left.samples) == list(range(6))
    assert_same(restored(left).sums, whole.sums)


def test_writing_a_keyframe_again_replaces_it():
    net, once, views = writer(), writer(), keyframes(3)
    for keyframe in views:
        net.write(replace(keyframe, points_cam=1.3 * keyframe.points_cam))
        net.write(keyframe)
        once.write(keyframe)
    assert_same(net.sums, once.sums)


def test_a_move_there_and_back_changes_nothing():
    net, views = writer(), keyframes(5)
    for keyframe in views:
        net.write(keyframe)
    before = copy(net.sums)
    T = se3_exp(np.array([0.31, -0.2, 0.17, 0.3, 0.2, -0.1]))
    net.move({keyframe.id: T @ keyframe.T_map_cam for keyframe in views} | {99: T})
    assert not np.array_equal(net.sums.points, before['points'])
    np.testing.assert_array_equal(net.sums.count, before['count'])
    net.move({keyframe.id: keyframe.T_map_cam for keyframe in views})
    assert_same(net.sums, before)


def test_a_moved_keyframe_is_as_if_written_there():
    net, there, views = writer(), writer(), keyframes(4)
    poses = poses_around(4, seed=8)
    for keyframe, pose in zip(views, poses, strict=True):
        net.write(keyframe)
        there.write(replace(keyframe, T_map_cam=pose))
    net.move(dict(enumerate(poses)))
    assert_same(net.sums, there.sums)


def test_later_changes_of_what_was_handed_in_do_not_matter():
    net, keyframe = writer(), keyframes(1)[0]
    pose, points = keyframe.T_map_cam.copy(), keyframe.points_cam.copy()
    net.write(replace(keyframe, T_map_cam=pose, points_cam=points))
    moved = se3_exp(np.array([0.3, 0, 0, 0, 0, 0]))
    net.move({0: moved})
    for array in (pose, points, moved):
        array += 1.0
    net.remove(0)
    assert_same(net.sums, CellSums(KEYS.tables, CELLS))


@pytest.mark.parametrize('seed', range(12))
def test_sums_are_those_of_the_samples_whatever_happened(seed):
    """Random writes, moves, corrections, removals, new numbers, in little room."""
    rng = np.random.default_rng(seed)
    net, views = writer(500, capacity=int(rng.integers(1000, 4000))), keyframes(8, seed)
    done = set()
    for _ in range(40):
        net = apply_one(net, views, rng, done)
        assert net.filled <= net.capacity
        assert_same(net.sums, restored(net).sums)
        assert net.sums.count[0].sum() == net.filled == net.sums.depths[1]
    assert len(done) == 7


def apply_one(net: NetworkWriter, views: list[Keyframe], rng: np.random.Generator,
              done: set[str]) -> NetworkWriter:
    """A random thing that happens to a writer; ``done`` notes what it was."""
    keyframe = views[rng.integers(len(views))]
    pose = se3_exp(rng.normal(0, 0.3, 6))
    what = str(rng.choice(['write', 'write', 'write', 'move', 'correct', 'remove', 'renumber',
                           'restore', 'merge']))
    if what == 'write':
        net.write(replace(keyframe, T_map_cam=pose))
    elif what == 'move':
        net.move({int(index): pose @ keyframe.T_map_cam for index in rng.integers(0, 8, 3)})
    elif what == 'correct':
        net.correct(replace(keyframe, points_cam=rng.uniform(0.8, 1.2) * keyframe.points_cam))
    elif what == 'remove':
        net.remove(keyframe.id)
    elif what == 'renumber':
        count = max(net.samples, default=0) + 1
        poses = np.stack([se3_exp(rng.normal(0, 0.3, 6)) for _ in range(4)])
        net.renumber(poses, rng.integers(0, 4, count),
                     np.stack([se3_exp(rng.normal(0, 0.1, 6)) for _ in range(count)]))
    elif what == 'restore':
        net = restored(net)
    else:
        other = NetworkWriter(net.cells, net.capacity, net.keys)
        other.write(keyframe)
        net.merge(other)
    done.add(what)
    return net


def test_corrections_reach_open_keyframes_alone():
    """What an earlier session wrote stays: its features are not all there any more."""
    net, better, views = writer(), writer(), keyframes(3)
    good = [replace(keyframe, points_cam=1.1 * keyframe.points_cam) for keyframe in views]
    for keyframe, corrected in zip(views, good, strict=True):
        net.write(keyframe)
        better.write(corrected)
    saved, before = restored(net), copy(net.sums)
    for corrected in good:
        net.correct(corrected)
        saved.correct(corrected)
    assert_same(net.sums, better.sums)
    assert_same(saved.sums, before)


def test_renumbering_keeps_where_points_are():
    """Two keyframes become one: the sums are the same but for the rounding of points."""
    net, views = writer(), keyframes(4)
    for keyframe in views:
        net.write(keyframe)
    before, poses = copy(net.sums), np.stack([keyframe.T_map_cam for keyframe in views])
    anchor = np.array([0, 0, 1, 1])
    kept = poses[[0, 3]]
    net.renumber(kept, anchor, np.linalg.inv(kept)[anchor] @ poses)
    assert sorted(net.samples) == [0, 1]
    np.testing.assert_array_equal(net.sums.count, before['count'])
    off = np.abs(net.sums.points - before['points']) / np.maximum(before['count'], 1)[..., None]
    assert off.max() <= 1  # step, a millimetre
    before = copy(net.sums)
    net.correct(views[0])  # number 0 has what two keyframes wrote by now
    assert_same(net.sums, before)


def test_points_without_end_stay_numbers():
    """Farther than the sums reach: written at their end, and taken away again."""
    sums = CellSums(1, 4)
    points, depths = np.full((3, 3), 1e30), np.full(3, 1e30)
    sums.add(np.zeros((3, 1), int), points, depths)
    assert sums.squares[0, 0] > 0 and np.isfinite(sums.means()[0]).all()
    sums.add(np.zeros((3, 1), int), points, depths, -1)
    assert_same(sums, CellSums(1, 4))


def test_no_cells_and_no_points_are_no_error():
    none, net, keyframe = writer(0), writer(), keyframes(1)[0]
    none.write(keyframe)
    assert none.filled == 0 and none.sums.typical_depth == 1.0
    points, votes = network(none).read(keyframe.features.descriptors)
    assert points.shape == (len(votes), 3) and not votes.any()
    net.write(replace(keyframe, points_cam=np.full_like(keyframe.points_cam, np.nan)))
    assert_same(net.sums, CellSums(KEYS.tables, CELLS))


# Capacity


def test_capacity_is_respected_and_shared_fairly():
    net, views = writer(capacity=2000), keyframes(9)
    for keyframe in views:
        net.write(keyframe)
        assert net.filled <= 2000
    lengths = np.array([len(samples) for samples in net.samples.values()])
    assert sorted(net.samples) == list(range(9))
    # The last may not have been thinned yet; the others are even.
    assert lengths.min() > 0.8 * np.median(lengths)
    assert np.ptp(np.sort(lengths)[:-1]) < 0.3 * np.median(lengths)
    assert net.filled > 0.7 * 2000


def test_the_surest_samples_stay():
    roomy, tight, views = writer(), writer(capacity=1000), keyframes(4)
    for keyframe in views:
        roomy.write(keyframe)
        tight.write(keyframe)
    for index, samples in tight.samples.items():
        kept = len(samples)
        assert 0 < kept < len(roomy.samples[index])
        best = np.argsort(-views[index].features.confidence)[:kept]
        np.testing.assert_array_equal(samples.points_cam, views[index].points_cam[best])


def test_a_keyframe_writes_so_many_samples_at_most():
    net, keyframe = writer(), keyframes(1)[0]
    assert len(keyframe.features) > PER_KEYFRAME
    net.write(keyframe)
    assert net.filled == PER_KEYFRAME


def test_the_state_is_bounded_by_the_capacity():
    """A long walk: samples are 20 bytes each, and a keyframe adds no more than its pose."""
    net, views = writer(capacity=1500), keyframes(6)
    sizes = []
    for index in range(24):
        net.write(replace(views[index % 6], id=index))
        sizes.append(sum(value.nbytes for value in net.state().values()))
    bytes_of_sample, bytes_of_keyframe = 2 * KEYS.tables + 12, 8 + 8 + 128
    assert max(sizes) <= 1500 * bytes_of_sample + 24 * bytes_of_keyframe + 8


@pytest.mark.parametrize(('lengths', 'total', 'expected'),
                         [([10, 10, 10], 30, 10), ([10, 10, 10], 29, 9), ([2, 50, 50], 42, 20),
                          ([5], 100, 5), ([], 10, 0), ([7, 7], 0, 0)])
def test_a_fair_share_is_the_largest_that_fits(lengths, total, expected):
    assert fair_share(np.array(lengths, int), total) == expected


# Keys


@pytest.mark.parametrize('cells', [1, 7, 3000, 65_536, 200_000])
def test_places_are_cells(cells):
    places = KEYS.places(unit(np.random.default_rng(0).normal(size=(200, DIM))), PROBES, cells)
    assert places.shape == (200, KEYS.tables, PROBES)
    assert places.min() >= 0 and places.max() < cells


def test_the_first_probe_is_what_is_written():
    descriptors = unit(np.random.default_rng(1).normal(size=(300, DIM)))
    for cells in (50, 40_000):
        np.testing.assert_array_equal(KEYS.places(descriptors, PROBES, cells)[..., 0],
                                      KEYS.places(descriptors, 1, cells)[..., 0])


def test_probes_are_the_best_pairs_of_the_best_codes():
    """Against all pairs of a table, one by one; many cells keep most pairs apart."""
    descriptors, cells = unit(np.random.default_rng(2).normal(size=(20, DIM))), 1 << 30
    weight, bias = KEYS.weight.numpy().astype(float), KEYS.bias.numpy()
    halves = np.einsum('nd,thcd->nthc', descriptors, weight) + bias
    halves[halves < np.sort(halves, axis=-1)[..., -CANDIDATES, None]] = -np.inf
    pairs = (halves[:, :, 0, :, None] + halves[:, :, 1, None, :]).reshape(20, KEYS.tables, -1)
    best = np.argsort(-pairs, axis=-1)[..., :PROBES]
    every_pair = {int(pair): CODES * (int(pair) // CODES) + int(pair) % CODES
                  for pair in np.unique(best)}
    cell_of = {pair: (number * 2_654_435_761 & 0xFFFFFFFF) * cells >> 32
               for pair, number in every_pair.items()}
    expected = np.vectorize(cell_of.__getitem__)(best)
    np.testing.assert_array_equal(KEYS.places(descriptors, PROBES, cells), expected)


def test_few_cells_are_filled_evenly():
    """The pairs of codes spread over 1000 cells as if by chance."""
    first, second = (torch.from_numpy(x.reshape(1, -1)) for x in np.mgrid[:CODES, :CODES])
    count = np.bincount(KEYS._cells(first, second, 1000).ravel(), minlength=1000)
    mean = CODES**2 / 1000
    assert 0.5 * mean < count.min() and count.max() < 1.5 * mean


def test_a_descriptor_with_noise_keeps_a_place():
    rng = np.random.default_rng(3)
    descriptors = unit(rng.normal(size=(400, DIM)))
    noisy = unit(descriptors + 0.05 * rng.normal(size=descriptors.shape))
    written = KEYS.places(descriptors, 1, ROOM)
    found = (KEYS.places(noisy, PROBES, ROOM) == written).any(-1)
    others = (KEYS.places(np.roll(noisy, 1, 0), PROBES, ROOM) == written).any(-1)
    assert found.mean() > 0.6 and others.mean() < 0.01


def test_keys_are_what_they_were_and_saved_exactly(tmp_path):
    """Networks of random keys go on being read: a seed gives the same ones everywhere."""
    half = replace(random_keys(16), weight=random_keys(16).weight.half().float())
    half.save(tmp_path / 'keys.safetensors')
    loaded = load_keys(tmp_path / 'keys.safetensors')
    assert loaded.sha256 == half.sha256 != random_keys(16, seed=1).sha256
    assert random_keys(16).sha256 == random_keys(16).sha256
    assert random_keys(16).first(2).sha256 != random_keys(16).sha256


def test_shipped_keys_fit_the_shipped_encoder(encoder):
    keys = keys_for(encoder.dim, TABLES)
    assert keys.tables == TABLES and keys.dim == encoder.dim
    assert keys.sha256 != random_keys(encoder.dim).sha256
    assert keys_for(DIM, 3).sha256 == random_keys(DIM).first(3).sha256


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'of another shape'])
def test_damaged_keys_are_refused_in_one_sentence(tmp_path, damage):
    path = tmp_path / 'keys.safetensors'
    if damage != 'missing':
        keys = random_keys(16)
        (keys if damage == 'truncated' else keys.first(2)).save(path)
    if damage == 'truncated':
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match='expected keys') as error:
        load_keys(path)
    assert '\n' not in str(error.value)


# Reading


def test_agreed_finds_what_most_share_and_ignores_the_rest():
    rng = np.random.default_rng(0)
    truth = rng.uniform(-3, 3, (50, 1, 3))
    near = truth + rng.uniform(-0.2, 0.2, (50, 6, 3)) * AGREEMENT
    far = rng.uniform(-3, 3, (50, 10, 3))
    order = rng.permutation(16)
    points = torch.from_numpy(np.concatenate([near, far], 1)[:, order].astype(np.float32))
    weight = torch.ones(50, 16)
    found, votes = agreed(points, weight)
    np.testing.assert_allclose(found, near.mean(1), atol=1e-4)
    np.testing.assert_array_equal(votes, 6)


def test_agreed_weighs():
    """Two sure ones against three that are not; what weighs nothing is not there."""
    points = torch.tensor([[[0.0, 0, 0], [0, 0, 0.01], [1, 0, 0], [1, 0, 0], [1, 0, 0],
                            [2, 0, 0]]])
    found, votes = agreed(points, torch.tensor([[3.0, 1, 1, 1, 1, 0]]))
    np.testing.assert_allclose(found[0], (0, 0, 0.0025), atol=1e-6)
    assert votes.item() == 4
    between = torch.tensor([[[0.0, 0, 0], [0, 0, 0.75], [0, 0, 1.5]]]) * AGREEMENT
    assert agreed(between, torch.tensor([[1.0, 0, 1]]))[1].item() == 1
    nothing, votes = agreed(points, torch.zeros(1, 6))
    assert votes.item() == 0 and torch.isfinite(nothing).all()


def test_agreed_does_not_depend_on_where_the_origin_is():
    rng = np.random.default_rng(1)
    points = torch.from_numpy(rng.uniform(0, 0.05, (40, 8, 3)).astype(np.float32))
    weight = torch.from_numpy(rng.uniform(0, 5, (40, 8)).astype(np.float32))
    here, votes = agreed(points, weight)
    there, votes_there = agreed(points + 64, weight)
    np.testing.assert_allclose(there - 64, here, atol=1e-3)
    assert np.mean(np.isclose(votes, votes_there, atol=1e-3)) > 0.9


@pytest.fixture(scope='module')
def known() -> tuple[OracleScene, NetworkWriter]:
    scene, net = OracleScene.generate(0), writer(MANY_CELLS)
    for index, pose in enumerate(poses_around(15, seed=0)):
        net.write(scene.keyframe(index, pose))
    return scene, net


def test_what_was_written_is_read_back_near_its_point(known):
    """From a new view; most of them to a centimetre."""
    scene, net = known
    pose = poses_around(1, seed=70)[0]
    features, points_cam = scene.features(pose, seed=5)
    truth = points_cam @ pose[:3, :3].T + pose[:3, 3]
    points, votes = network(net).read(features.descriptors)
    right = np.linalg.norm(points - truth, axis=1) < 0.01
    assert right.mean() > 0.75
    assert np.median(votes[right]) > 2 * np.median(votes[~right])


def test_votes_are_calibrated(known):
    """The more votes, the more answers are right; with many, nearly all."""
    scene, net = known
    features, points_cam = scene.features(np.eye(4), seed=11, descriptor_noise=0.12)
    points, votes = network(net).read(features.descriptors)
    right = np.linalg.norm(points - points_cam, axis=1) < 0.02
    share = [right[(low < votes) & (votes <= high)].mean()
             for low, high in ((0, 2), (2, 4), (4, 7), (7, np.inf))]
    assert share == sorted(share)
    assert share[0] < 0.3 and share[-1] > 0.95


def test_unknown_descriptors_get_few_votes(known):
    scene, net = known
    strangers = OracleScene.generate(55).descriptors
    _, known_votes = network(net).read(scene.features(np.eye(4), seed=1)[0].descriptors)
    _, votes = network(net).read(strangers)
    assert np.percentile(votes, 95) < np.median(known_votes)


def test_an_empty_network_has_no_votes():
    points, votes = network(writer()).read(unit(np.random.default_rng(0).normal(size=(20, DIM))))
    assert not votes.any() and np.isfinite(points).all()
    points, votes = network(writer()).read(np.zeros((0, DIM), np.float32))
    assert points.shape == (0, 3) and votes.shape == (0,)


def test_what_is_in_two_places_has_few_votes():
    """The same things 20 m apart: silence; other things beside them are known as before."""
    twice, once, net = OracleScene.generate(0, 300), OracleScene.generate(1, 300), writer(40_000)
    offset = np.array([20.0, 0, 0])
    for index, pose in enumerate(poses_around(8, seed=0)):
        there = pose.copy()
        there[:3, 3] += offset
        net.write(twice.keyframe(3 * index, pose))
        net.write(shifted(twice, offset).keyframe(3 * index + 1, there))
        net.write(once.keyframe(3 * index + 2, pose))
    votes_twice, votes_once = (network(net).read(scene.features(np.eye(4), seed=3)[0].descriptors
                                                 )[1] for scene in (twice, once))
    several = 1.5 * ENOUGH  # one cell has ENOUGH at most, by which other things may have been
    assert np.mean(votes_once > several) > 0.5
    assert np.mean(votes_twice > several) < 0.05
    assert np.median(votes_twice) < 0.5 * np.median(votes_once)


def test_a_cell_that_spreads_says_nothing():
    sums, near, far = CellSums(1, 3), np.array([[1.0, 2, 3]]), np.array([[3.0, 2, 3]])
    zero, one = np.zeros((1, 1), int), np.ones((1, 1), int)
    for _ in range(9):
        sums.add(zero, near, near[:, 2])
        sums.add(one, near, near[:, 2])
        sums.add(one, far, far[:, 2])
    points, weights = sums.means()
    np.testing.assert_allclose(points[0, 0], near[0], atol=1e-3)
    assert weights[0].tolist() == [ENOUGH, 0, 0]


def test_weights_are_kept_in_a_byte():
    levels = quantise_weights(np.array([0.0, 1e-6, 1.0, float(ENOUGH)]))
    assert levels.dtype == torch.uint8
    assert levels.tolist() == [0, 1, 255 // ENOUGH, 255]


def test_more_keyframes_than_samples_leave_the_newest():
    """A walk without end: as many keyframes as there may be samples keep one each."""
    scene = OracleScene.generate(0)
    one = scene.keyframe(0, np.eye(4))
    few = replace(one, points_cam=np.where(np.arange(len(one.points_cam))[:, None] < 1,
                                           one.points_cam, np.nan))
    writer = NetworkWriter(50, 20, keys_for(DIM, 4))
    for index in range(30):
        writer.write(replace(few, id=index))
    assert sorted(writer.samples) == list(range(10, 30))
    assert writer.sums.count.sum() == 4 * 20


def test_a_keyframe_that_lost_its_points_corrects_nothing():
    scene = OracleScene.generate(0)
    keyframe = scene.keyframe(0, np.eye(4))
    writer = NetworkWriter(50, 1000, keys_for(DIM, 4))
    writer.write(keyframe)
    before = writer.sums.points.copy()
    writer.correct(replace(keyframe, points_cam=np.full_like(keyframe.points_cam, np.nan)))
    np.testing.assert_array_equal(writer.sums.points, before)
