"""The localizer finds known places, refuses unknown ones, and never changes the memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import CAMERA, DIM, OracleScene, poses_around, unit

from feedforward_recon.config.schema import LocalizerConfig, MemoryConfig
from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import pose_error, se3_exp
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.localization.slot_search import SlotSearch
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.types import Features, Frame, Status

CONFIG = LocalizerConfig(network_candidates=0)


class StubEncoder:
    """Answers with prepared features."""

    name, sha256, dim = 'stub', '0', DIM

    def __init__(self, features: Features | None = None) -> None:
        self.features = features

    def encode(self, image: np.ndarray, max_keypoints: int | None = None) -> Features:
        assert self.features is not None
        return self.features


@pytest.fixture(scope='module')
def memory():
    scene = OracleScene.generate(0)
    writer = MemoryWriter(MemoryConfig(slots=2000, cells=2000, samples=10_000), DIM)
    for index, pose in enumerate(poses_around(15, seed=0)):
        writer.write(scene.keyframe(index, pose))
    return writer.snapshot()


@pytest.fixture(scope='module')
def localizer(memory):
    return Localizer(memory, StubEncoder(), CONFIG)


def test_held_out_views_are_found(localizer):
    scene = OracleScene.generate(0)
    for seed, pose in enumerate(poses_around(10, seed=50)):
        features, _ = scene.features(pose, seed=1000 + seed)
        estimate = localizer.localize_features(features, CAMERA).estimate
        assert estimate.status is Status.TRACKING
        distance, angle_deg = pose_error(estimate.T_map_cam, pose)
        assert distance < 0.01
        assert angle_deg < 0.2
        assert estimate.score > 0.5 > estimate.runner_up


def test_what_was_seen_once_is_found_where_what_was_confirmed_is_not(memory):
    pose = poses_around(1, seed=77)[0]
    features, _ = OracleScene.generate(0).features(pose, seed=5)
    localizer = Localizer(memory, StubEncoder(), CONFIG)
    expected = localizer.localize_features(features, CAMERA).estimate.T_map_cam
    shown = localizer._searches[-1].compare(features.descriptors).nearest()
    counts = torch.full_like(memory.slot_counts, 2) * (memory.slot_counts > 0)
    counts[memory.occupied[shown]] = 1
    localizer = Localizer(replace(memory, slot_counts=counts), StubEncoder(), CONFIG)
    assert np.array_equal(localizer.localize_features(features, CAMERA).estimate.T_map_cam,
                          expected)


def test_half_wrong_matches_do_not_move_the_pose(localizer):
    scene = OracleScene.generate(0)
    pose = poses_around(1, seed=77)[0]
    features, _ = scene.features(pose, seed=5)
    rng = np.random.default_rng(0)
    wrong = rng.permutation(len(features))[:len(features) // 2]
    keypoints = features.keypoints.copy()
    keypoints[wrong] = rng.uniform((0, 0), CAMERA.size_wh, (len(wrong), 2))
    spoilt = Features(keypoints, features.descriptors, features.confidence,
                      features.global_descriptor)
    estimate = localizer.localize_features(spoilt, CAMERA).estimate
    distance, angle_deg = pose_error(estimate.T_map_cam, pose)
    assert distance < 0.02
    assert angle_deg < 0.4


def test_where_few_of_the_surest_features_agree_all_are_asked(memory, monkeypatch):
    """And nowhere else: it costs as much as all the rest."""
    scene, pose = OracleScene.generate(0), poses_around(1, seed=50)[0]
    features, _ = scene.features(pose, seed=1000)
    asked, compare = [], SlotSearch.compare
    monkeypatch.setattr(SlotSearch, 'compare', lambda self, queries: (
        asked.append(len(queries)), compare(self, queries))[1])
    localizer = Localizer(memory, StubEncoder(), replace(CONFIG, slot_queries=100))
    for wrong, expected in ((0, [100]), (92, [100, len(features)])):
        descriptors = features.descriptors.copy()
        descriptors[:wrong] = unit(np.random.default_rng(0).normal(size=(wrong, DIM)))
        asked.clear()
        found = localizer.localize_features(replace(features, descriptors=descriptors), CAMERA)
        assert asked == expected
        assert pose_error(found.estimate.T_map_cam, pose)[0] < 0.02


@pytest.mark.parametrize('seed', range(5))
def test_another_place_is_refused(localizer, seed):
    features, _ = OracleScene.generate(100 + seed).features(np.eye(4), seed=seed)
    estimate = localizer.localize_features(features, CAMERA).estimate
    assert estimate.status is Status.NOT_LOCALISED
    assert estimate.T_map_cam is None
    assert estimate.reason


def test_a_place_that_exists_twice_is_ambiguous(memory):
    scene = OracleScene.generate(0)
    pose = poses_around(1, seed=3)[0]
    views = (pose, pose @ se3_exp(np.array([0.4, 0, 0, 0, 0.2, 0])))
    halves = [OracleScene(scene.points[side::2], scene.descriptors[side::2])
              .features(view, seed=side)[0] for side, view in enumerate(views)]
    count = min(map(len, halves))
    left, right = (half.select(np.arange(count)) for half in halves)
    mixed = Features(np.concatenate([left.keypoints, right.keypoints]),
                     np.concatenate([left.descriptors, right.descriptors]),
                     np.ones(2 * count, np.float32), left.global_descriptor)
    mixed = mixed.select(np.random.default_rng(0).permutation(2 * count))
    estimate = Localizer(memory, StubEncoder(), CONFIG).localize_features(mixed, CAMERA).estimate
    assert estimate.status is Status.NOT_LOCALISED
    assert estimate.reason == 'AMBIGUOUS'


def test_nothing_to_see_is_refused(localizer):
    nothing = Features(np.zeros((0, 2), np.float32), np.zeros((0, DIM), np.float32),
                       np.zeros(0, np.float32), np.zeros(4, np.float32))
    assert localizer.localize_features(nothing, CAMERA).estimate.reason == 'TOO_FEW_FEATURES'


def test_random_descriptors_are_refused(localizer):
    rng = np.random.default_rng(0)
    noise = Features(rng.uniform((0, 0), CAMERA.size_wh, (500, 2)).astype(np.float32),
                     unit(rng.normal(size=(500, DIM))), np.ones(500, np.float32),
                     np.zeros(4, np.float32))
    assert localizer.localize_features(noise, CAMERA).estimate.status is Status.NOT_LOCALISED


def test_a_wrong_hint_does_not_change_the_answer(localizer):
    scene = OracleScene.generate(0)
    pose = poses_around(1, seed=60)[0]
    features, _ = scene.features(pose, seed=3)
    hint = se3_exp(np.array([2.0, 0, 0, 0, 1.0, 0])) @ pose
    estimate = localizer.localize_features(features, CAMERA, hint).estimate
    assert pose_error(estimate.T_map_cam, pose)[0] < 0.01


def test_covariance_is_consistent(localizer):
    """Normalised estimation error squared: neither tiny nor huge (chi-square, 3 dof)."""
    scene = OracleScene.generate(0)
    nees = []
    for seed, pose in enumerate(poses_around(20, seed=200)):
        features, _ = scene.features(pose, seed=seed, pixel_noise=1.0)
        estimate = localizer.localize_features(features, CAMERA).estimate
        assert np.all(np.linalg.eigvalsh(estimate.covariance) > 0)
        error = estimate.T_map_cam[:3, 3] - pose[:3, 3]
        nees.append(error @ np.linalg.solve(estimate.covariance[:3, :3], error))
    assert 0.1 < np.median(nees) < 10


def test_localising_is_deterministic_and_leaves_the_memory_alone(memory, localizer):
    before = {k: v.clone() for k, v in memory.tensors().items()}
    features, _ = OracleScene.generate(0).features(np.eye(4), seed=1)
    first, second = (localizer.localize_features(features, CAMERA).estimate for _ in range(2))
    assert np.array_equal(first.T_map_cam, second.T_map_cam)
    assert all(torch.equal(before[k], v) for k, v in memory.tensors().items())


def test_stamp_and_source_travel_with_the_answer(memory):
    features, _ = OracleScene.generate(0).features(np.eye(4), seed=1)
    frame = Frame(123, np.zeros((240, 320, 3), np.uint8), camera=CAMERA, source='a.png')
    estimate = Localizer(memory, StubEncoder(features), CONFIG).localize(frame)
    assert (estimate.stamp_ns, estimate.source) == (123, 'a.png')
    assert estimate.latency_ms > 0


def test_a_query_without_a_camera_is_an_error(localizer):
    with pytest.raises(InputError, match='--fov'):
        localizer.localize(Frame(0, np.zeros((240, 320, 3), np.uint8)))
