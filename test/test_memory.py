"""Laws of the scene memory: fixed size, exact saving, reads that change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import DIM, OracleScene, poses_around

from feedforward_recon.config.schema import MemoryConfig
from feedforward_recon.errors import MapError
from feedforward_recon.geometry.transforms import se3_exp, transform_points
from feedforward_recon.memory import MemoryWriter, SceneMemory
from feedforward_recon.memory.coordinate_mlp import CoordinateNetwork, initial_network

SMALL = MemoryConfig(hidden_dim=64, blocks=2, slots=1000, reservoir=4000, batch=256,
                     steps_per_keyframe=1, polish_steps=0)


def written(count: int, config: MemoryConfig = SMALL, seed: int = 0) -> MemoryWriter:
    scene = OracleScene.generate(seed)
    writer = MemoryWriter(config, DIM)
    for index, pose in enumerate(poses_around(count, seed)):
        writer.write(scene.keyframe(index, pose))
    return writer


def same(a: SceneMemory, b: SceneMemory) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_nbytes_do_not_depend_on_what_was_written(tmp_path):
    sizes = set()
    for count in (0, 2, 40):
        memory = written(count).snapshot()
        memory.save(tmp_path / 'm.safetensors')
        sizes.add((memory.nbytes, (tmp_path / 'm.safetensors').stat().st_size))
    assert len(sizes) == 1


def test_saving_and_loading_is_exact(tmp_path):
    memory = written(5).snapshot()
    memory.save(tmp_path / 'm.safetensors')
    loaded = SceneMemory.load(tmp_path / 'm.safetensors')
    assert same(memory, loaded)
    queries = OracleScene.generate(1).descriptors[:50]
    for ours, theirs in zip(memory.predict(queries), loaded.predict(queries), strict=True):
        assert np.array_equal(ours, theirs)


def test_reading_and_writing_leave_a_snapshot_untouched():
    writer = written(5)
    memory = writer.snapshot()
    before = {k: v.clone() for k, v in memory.tensors().items()}
    memory.predict(OracleScene.generate(0).descriptors)
    scene = OracleScene.generate(0)
    for index, pose in enumerate(poses_around(4, seed=9), start=5):
        writer.write(scene.keyframe(index, pose))
    assert all(torch.equal(before[k], v) for k, v in memory.tensors().items())
    assert not same(memory, writer.snapshot())


def test_the_same_writes_give_the_same_memory():
    assert same(written(6).snapshot(), written(6).snapshot())


def test_the_global_generator_is_left_alone():
    """Random numbers of others do not depend on whether a map is being written."""
    before = torch.get_rng_state()
    writer = written(3)
    writer.polish(2)
    memory = MemoryWriter.from_state(SMALL, writer.state()).snapshot()
    memory.predict(OracleScene.generate(0).descriptors)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_weights_are_those_of_pytorch():
    """A seed gives the weights that it gave when the global generator was seeded with it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = CoordinateNetwork(24, 16, 2).state_dict()
    found = initial_network(24, 16, 2, seed=5).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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


def test_a_full_table_keeps_what_was_seen_often():
    scene = OracleScene.generate(0)
    config = MemoryConfig(hidden_dim=32, blocks=1, slots=300, reservoir=1000, batch=64,
                          steps_per_keyframe=0)
    writer = MemoryWriter(config, DIM)
    for index in range(8):
        writer.write(scene.keyframe(index, np.eye(4)))
    often = writer.slots.descriptors[writer.slots.counts > 3].copy()
    for index, pose in enumerate(poses_around(10, seed=3, spread=1.0), start=8):
        writer.write(scene.keyframe(index, pose))
    kept = (often @ writer.slots.descriptors.T).max(1)
    assert len(often) > 100
    assert np.mean(kept > 0.95) > 0.95


def test_reanchoring_moves_slots_with_their_keyframes():
    writer = written(8)
    before = writer.snapshot()
    T_new_old = se3_exp(np.array([0.5, -0.2, 0.1, 0.1, 0.2, -0.3]))
    writer.reanchor({i: T_new_old @ pose for i, pose in enumerate(writer.poses)})
    after = writer.snapshot()
    moved = transform_points(T_new_old, before.points)
    assert np.abs(after.points - moved).max() < 1e-3


def test_better_points_of_keyframes_reach_what_was_written():
    """Written 20 % too near, as a map does that is refined later; then corrected."""
    scene = OracleScene.generate(0)
    writer, poses = MemoryWriter(SMALL, DIM), poses_around(12, 0)
    true = [scene.keyframe(index, pose) for index, pose in enumerate(poses)]

    def off():
        slots, samples = writer.slots, writer.reservoir
        ours = (slots.descriptors @ scene.descriptors.T).argmax(1)[slots.counts > 0]
        error = slots.map_points(writer.poses)[slots.counts > 0] - scene.points[ours]
        seen = np.stack([poses[k] for k in samples.keyframe_ids[:writer.filled]])
        points = np.einsum('nij,nj->ni', seen[:, :3, :3],
                           samples.points_cam[:writer.filled]) + seen[:, :3, 3]
        theirs = (samples.descriptors[:writer.filled].astype(np.float32)
                  @ scene.descriptors.T).argmax(1)
        return [float(np.percentile(np.linalg.norm(e, axis=1), 90))
                for e in (error, points - scene.points[theirs])]

    for keyframe in true:
        writer.write(replace(keyframe, points_cam=0.8 * keyframe.points_cam))
    counts, before = writer.slots.counts.copy(), off()
    for keyframe in true:
        writer.correct(keyframe)
    assert min(before) > 0.2 and max(off()) < 0.02
    np.testing.assert_array_equal(writer.slots.counts, counts)  # none is new, none is gone


def test_a_keyframe_without_points_corrects_nothing():
    scene, writer = OracleScene.generate(0), written(3)
    before, keyframe = writer.snapshot(), scene.keyframe(1, poses_around(3, 0)[1])
    writer.correct(replace(keyframe, points_cam=np.full_like(keyframe.points_cam, np.nan)))
    writer.correct(replace(keyframe, id=7))  # never written
    assert same(writer.snapshot(), before)


def test_the_network_learns_where_points_are():
    scene = OracleScene.generate(0, count=300)
    config = MemoryConfig(hidden_dim=128, blocks=2, slots=0, reservoir=8000, batch=512,
                          steps_per_keyframe=0, polish_steps=900)
    writer = MemoryWriter(config, DIM)
    for index, pose in enumerate(poses_around(20, seed=0)):
        writer.write(scene.keyframe(index, pose))
    writer.polish()
    memory = writer.snapshot()
    points, sigma_px = memory.predict(scene.descriptors)
    error = np.linalg.norm(points - scene.points, axis=1)
    seen = (writer.reservoir.descriptors[:writer.filled].astype(np.float32)
            @ scene.descriptors.T).max(0) > 0.8
    assert np.median(error[seen]) < 0.15
    sure = sigma_px < np.median(sigma_px)
    assert np.median(error[sure]) < np.median(error[~sure])


def test_the_reservoir_is_a_fair_sample_of_all_keyframes():
    writer = written(60, MemoryConfig(hidden_dim=32, blocks=1, slots=0, reservoir=2000, batch=64,
                                      steps_per_keyframe=0))
    assert writer.filled == 2000
    early = np.mean(writer.reservoir.keyframe_ids < 30)
    assert 0.4 < early < 0.6


@pytest.mark.parametrize('damage', ['missing', 'truncated', 'incomplete'])
def test_a_damaged_memory_is_refused_in_one_sentence(tmp_path, damage):
    path = tmp_path / 'm.safetensors'
    if damage == 'truncated':
        written(1).snapshot().save(path)
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == 'incomplete':
        from safetensors.torch import save_file
        save_file({'box': torch.zeros(2, 3)}, str(path))
    with pytest.raises(MapError, match='expected'):
        SceneMemory.load(path)
