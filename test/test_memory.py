"""Laws of the scene memory: fixed size, exact saving, reads that change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import DIM, OracleScene, poses_around, shifted, unit
from safetensors.torch import save_file

from feedforward_recon.config.schema import MemoryConfig
from feedforward_recon.errors import MapError
from feedforward_recon.geometry.transforms import se3_exp, transform_points
from feedforward_recon.memory import MemoryWriter, SceneMemory
from feedforward_recon.memory.coordinate_network import ENOUGH
from feedforward_recon.memory.slots import SAME_DESCRIPTOR, SAME_VIEW

SMALL = MemoryConfig(slots=1000, cells=20_000, samples=10_000)
FEW_SLOTS = replace(SMALL, slots=300)


def written(count: int, config: MemoryConfig = SMALL, seed: int = 0) -> MemoryWriter:
    scene = OracleScene.generate(seed)
    writer = MemoryWriter(config, DIM)
    for index, pose in enumerate(poses_around(count, seed)):
        writer.write(scene.keyframe(index, pose))
    return writer


def same(a: SceneMemory, b: SceneMemory) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def sure(memory: SceneMemory, descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The answers of the network that several cells agree on: which of the rows, and points."""
    points, votes = memory.network.read(descriptors)
    best = np.flatnonzero(votes > 1.5 * ENOUGH)  # one cell has ENOUGH at most
    return best, points[best]


def slot_errors(writer: MemoryWriter, scene: OracleScene) -> np.ndarray:
    used = writer.slots.counts > 0
    ours = (writer.slots.descriptors[used] @ scene.descriptors.T).argmax(1)
    return np.linalg.norm(writer.slots.map_points(writer.poses)[used] - scene.points[ours], axis=1)


def network_errors(writer: MemoryWriter, scene: OracleScene) -> np.ndarray:
    which, points = sure(writer.snapshot(), scene.descriptors)
    assert len(which) > 100
    return np.linalg.norm(points - scene.points[which], axis=1)


def test_nbytes_do_not_depend_on_what_was_written(tmp_path):
    sizes = set()
    for count in (0, 2, 40):
        memory = written(count).snapshot()
        memory.save(tmp_path / 'm.safetensors')
        sizes.add((memory.nbytes, (tmp_path / 'm.safetensors').stat().st_size))
    assert len(sizes) == 1


def test_nbytes_are_those_of_slots_and_cells():
    """6 bytes of a point, 1 of a count or weight, and the descriptor of a slot."""
    memory = MemoryWriter(replace(SMALL, tables=3), DIM).snapshot()
    rest = 6 * 4 + 4 + 32  # box, typical depth and keys
    assert memory.nbytes == SMALL.slots * (DIM + 7) + 3 * SMALL.cells * 7 + rest


def test_saving_and_loading_is_exact(tmp_path):
    memory = written(5).snapshot()
    memory.save(tmp_path / 'm.safetensors')
    loaded = SceneMemory.load(tmp_path / 'm.safetensors')
    assert same(memory, loaded)
    queries = OracleScene.generate(0).descriptors[:50]
    for ours, theirs in zip(memory.network.read(queries), loaded.network.read(queries),
                            strict=True):
        assert np.array_equal(ours, theirs)


def test_reading_and_writing_leave_a_snapshot_untouched():
    writer = written(5)
    memory = writer.snapshot()
    before = {k: v.clone() for k, v in memory.tensors().items()}
    memory.network.read(OracleScene.generate(0).descriptors)
    scene = OracleScene.generate(0)
    for index, pose in enumerate(poses_around(4, seed=9), start=5):
        writer.write(scene.keyframe(index, pose))
    writer.reanchor({0: se3_exp(np.array([0.5, 0, 0, 0, 0, 0]))})
    assert all(torch.equal(before[k], v) for k, v in memory.tensors().items())
    assert not same(memory, writer.snapshot())


def test_the_same_writes_give_the_same_memory():
    assert same(written(6).snapshot(), written(6).snapshot())


def test_a_writer_goes_on_where_it_was_saved():
    whole, scene = written(6), OracleScene.generate(0)
    half = MemoryWriter.from_state(SMALL, written(3).state())
    for index, pose in list(enumerate(poses_around(6, 0)))[3:]:
        half.write(scene.keyframe(index, pose))
    assert same(half.snapshot(), whole.snapshot())
    assert whole.state().keys() == half.state().keys()
    assert all(torch.equal(value, half.state()[name]) for name, value in whole.state().items())


def test_the_global_generator_is_left_alone():
    """Random numbers of others do not depend on whether a map is being written."""
    before = torch.get_rng_state()
    memory = MemoryWriter.from_state(SMALL, written(3).state()).snapshot()
    memory.network.read(OracleScene.generate(0).descriptors)
    assert torch.equal(torch.get_rng_state(), before)


def test_slots_hold_the_true_points():
    scene = OracleScene.generate(0)
    memory = written(20).snapshot()
    likeness = memory.descriptors.numpy() @ scene.descriptors.T
    error = np.linalg.norm(memory.points - scene.points[likeness.argmax(1)], axis=1)
    assert np.percentile(error, 95) < 0.02


def test_repeated_views_fuse_instead_of_filling_the_table():
    scene = OracleScene.generate(0)
    writer = MemoryWriter(SMALL, DIM)
    for index in range(6):
        writer.write(scene.keyframe(index, np.eye(4)))
    counts = writer.slots.counts
    assert (counts == 6).sum() > 0.9 * (counts > 0).sum()


@pytest.mark.parametrize('has_room', [True, False])
def test_a_landmark_that_looks_different_gets_another_slot_while_there_is_room(has_room):
    first = OracleScene.generate(0).keyframe(0, np.eye(4))
    before, count = first.features.descriptors, len(first.features)
    other = np.roll(before, 1, axis=0)
    other = unit(other - np.sum(other * before, 1, keepdims=True) * before)
    cosine = (SAME_DESCRIPTOR + SAME_VIEW) / 2
    turned = unit(cosine * before + np.sqrt(1 - cosine**2) * other)
    writer = MemoryWriter(replace(SMALL, slots=2 * count if has_room else count), DIM)
    writer.write(first)
    writer.write(replace(first, id=1, features=replace(first.features, descriptors=turned)))
    counts = writer.slots.counts
    assert (counts == (1 if has_room else 2)).all()


def test_a_full_table_keeps_what_was_seen_often():
    """What new places take of a keyframe's slots are those that were seen least."""
    scene, elsewhere = OracleScene.generate(0, count=450), np.array([50.0, 0, 0])
    often = OracleScene(scene.points[::2], scene.descriptors[::2])
    writer = MemoryWriter(FEW_SLOTS, DIM)
    for index in range(8):
        writer.write((scene if index < 3 else often).keyframe(index, np.eye(4)))
    before = kept_of(writer, scene)
    other = shifted(OracleScene.generate(1), elsewhere)
    for index, pose in enumerate(poses_around(4, seed=1), start=8):
        writer.write(other.keyframe(index, moved(pose, elsewhere)))
    after = kept_of(writer, scene)
    seldom = np.arange(len(scene.points)) % 2 == 1
    assert before[seldom].sum() > 100 and before[~seldom].sum() > 100
    assert 50 < after[~seldom].sum() < 200
    assert after[seldom].sum() < 0.1 * after[~seldom].sum()


def kept_of(writer: MemoryWriter, scene: OracleScene) -> np.ndarray:
    """Mask of the points of a scene that have a slot."""
    likeness = scene.descriptors @ writer.snapshot().descriptors.numpy().T
    return likeness.max(1) > 0.9


def test_a_full_table_goes_on_taking_in_new_places():
    """Of ten places, of which three fill the table, each has its share in the end."""
    places, views, apart = 10, 5, 50.0
    writer = MemoryWriter(FEW_SLOTS, DIM)
    for place in range(places):
        offset = np.array([place * apart, 0, 0])
        scene = shifted(OracleScene.generate(place), offset)
        for view, pose in enumerate(poses_around(views, seed=place)):
            writer.write(scene.keyframe(place * views + view, moved(pose, offset)))
    memory = writer.snapshot()
    share = np.bincount(np.rint(memory.points[:, 0] / apart).astype(int), minlength=places)
    assert share.sum() > 0.9 * FEW_SLOTS.slots
    assert share.max() < 2 * share.min()
    for place in (0, places - 1):
        scene = OracleScene.generate(place)
        features, _ = scene.features(np.eye(4), seed=99)
        likeness = (features.descriptors @ memory.descriptors.numpy().T).max(1)
        assert (likeness > 0.9).sum() >= 10


def moved(pose: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """A pose with its camera centre moved by ``offset`` [3]."""
    result = pose.copy()
    result[:3, 3] += offset
    return result


def test_reanchoring_moves_slots_and_answers_with_their_keyframes():
    writer, scene = written(8), OracleScene.generate(0)
    before = writer.snapshot()
    T_new_old = se3_exp(np.array([0.5, -0.2, 0.1, 0.1, 0.2, -0.3]))
    writer.reanchor({i: T_new_old @ pose for i, pose in enumerate(writer.poses)})
    after = writer.snapshot()
    moved_slots = transform_points(T_new_old, before.points)
    assert np.abs(after.points - moved_slots).max() < 1e-3
    which, points = sure(before, scene.descriptors)
    there, now = sure(after, scene.descriptors)
    assert len(which) > 100 and np.mean(np.isin(which, there)) > 0.95
    both = np.isin(there, which)
    expected = transform_points(T_new_old, points[np.searchsorted(which, there[both])])
    assert np.percentile(np.linalg.norm(now[both] - expected, axis=1), 99) < 5e-3


def test_reanchoring_a_few_keyframes_moves_what_they_saw_alone():
    """Halves of a map that share nothing: one moves, the other stays."""
    writer = MemoryWriter(SMALL, DIM)
    scenes = [OracleScene.generate(seed) for seed in (0, 1)]
    poses = poses_around(10, 0)
    for index, pose in enumerate(poses):
        writer.write(scenes[index % 2].keyframe(index, pose))
    shift = np.array([0.0, 3.0, 0.0])
    writer.reanchor({i: moved(poses[i], shift) for i in range(1, 10, 2)})
    for scene in (scenes[0], shifted(scenes[1], shift)):
        error = network_errors(writer, scene)
        assert np.percentile(error, 90) < 0.02
    memory = writer.snapshot()
    truth = np.concatenate([scenes[0].points, scenes[1].points + shift])
    likeness = memory.descriptors.numpy() @ np.concatenate([s.descriptors for s in scenes]).T
    error = np.linalg.norm(memory.points - truth[likeness.argmax(1)], axis=1)
    assert np.percentile(error, 95) < 0.02


def test_better_points_of_keyframes_reach_what_was_written():
    """Written 10 % too near, as a map does that is refined later; then corrected."""
    scene = OracleScene.generate(0)
    writer, poses = MemoryWriter(SMALL, DIM), poses_around(12, 0)
    true = [scene.keyframe(index, pose) for index, pose in enumerate(poses)]

    def off() -> list[float]:
        return [float(np.percentile(errors(writer, scene), 90))
                for errors in (slot_errors, network_errors)]

    for keyframe in true:
        writer.write(replace(keyframe, points_cam=0.9 * keyframe.points_cam))
    counts, before = writer.slots.counts.copy(), off()
    for keyframe in true:
        writer.correct(keyframe)
    assert min(before) > 0.1 and max(off()) < 0.02
    np.testing.assert_array_equal(writer.slots.counts, counts)  # none is new, none is gone


def test_a_keyframe_that_was_not_written_corrects_nothing():
    scene, writer = OracleScene.generate(0), written(3)
    before, keyframe = writer.snapshot(), scene.keyframe(1, poses_around(3, 0)[1])
    writer.correct(replace(keyframe, id=7))
    assert same(writer.snapshot(), before)


def test_renumbering_keeps_slots_and_answers():
    """Of twelve keyframes three stay; what the others saw is where it was."""
    scene, writer = OracleScene.generate(0), written(12)
    slots, points = writer.snapshot().points, sure(writer.snapshot(), scene.descriptors)[0]
    writer.renumber(np.array([1, 4, 9]))
    assert len(writer.poses) == 3
    assert np.abs(writer.snapshot().points - slots).max() < 1e-3
    now = sure(writer.snapshot(), scene.descriptors)[0]
    assert np.mean(np.isin(points, now)) > 0.95
    assert np.percentile(network_errors(writer, scene), 90) < 0.02


def test_the_network_outlives_the_slots():
    """Ten times more points than slots: what has no slot any more still has an answer."""
    scene = OracleScene.generate(0)
    memory = written(20, replace(SMALL, slots=50)).snapshot()
    slots = (scene.descriptors @ memory.descriptors.numpy().T).max(1)
    which, points = sure(memory, scene.descriptors)
    unknown = slots[which] < 0.7
    assert unknown.sum() > 500
    error = np.linalg.norm(points - scene.points[which], axis=1)
    assert np.percentile(error[unknown], 90) < 0.02


@pytest.mark.parametrize('config', [replace(SMALL, slots=0), replace(SMALL, cells=0)])
def test_either_half_may_be_missing(tmp_path, config):
    memory = written(3, config).snapshot()
    memory.save(tmp_path / 'm.safetensors')
    assert same(SceneMemory.load(tmp_path / 'm.safetensors'), memory)
    votes = memory.network.read(OracleScene.generate(0).descriptors)[1]
    assert len(memory.points) == (0 if not config.slots else (memory.slot_counts > 0).sum())
    assert bool((votes > 0).any()) == (config.cells > 0)


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'incomplete'])
def test_a_damaged_memory_is_refused_in_one_sentence(tmp_path, damage):
    path = tmp_path / 'm.safetensors'
    if damage == 'truncated':
        written(1).snapshot().save(path)
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == 'incomplete':
        save_file({'box': torch.zeros(2, 3)}, str(path))
    with pytest.raises(MapError, match='expected') as error:
        SceneMemory.load(path)
    assert '\n' not in str(error.value)


def test_a_network_of_other_keys_is_refused_in_one_sentence():
    """By what reads it alone: the slots are as good as ever."""
    memory = written(3).snapshot()
    other = replace(memory, keys=memory.keys.roll(1))
    assert np.array_equal(other.points, memory.points)
    with pytest.raises(MapError, match='expected a coordinate network with keys') as error:
        _ = other.network
    assert '\n' not in str(error.value)
