"""Furniture that the map has several times, or that stands elsewhere too, tells no place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import CAMERA, DIM, OracleScene, poses_around, unit

from feedforward_recon.config.schema import LocalizerConfig, MemoryConfig
from feedforward_recon.geometry.transforms import pose_error, se3_exp
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.localization.slot_search import (
    GATHERED,
    SlotSearch,
    by_region,
    paired_cosines,
)
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.synthetic.office import aisle_walk, office
from feedforward_recon.types import Status

CONFIG = LocalizerConfig(network_candidates=0)
PITCH_M = 9.0  # of the copies: a view into one does not show the next


class NoEncoder:
    """Stands in where features are given."""

    name, sha256, dim = 'none', '0', DIM

    def encode(self, image, max_keypoints=None):
        raise AssertionError('expected features, found an image')


def copy_of(scene: OracleScene, number: int, likeness_noise: float) -> OracleScene:
    """The same things at another place, nearly alike."""
    rng = np.random.default_rng(number)
    noisy = unit(scene.descriptors + likeness_noise * rng.normal(size=scene.descriptors.shape))
    return OracleScene(scene.points + (number * PITCH_M, 0, 0), noisy)


def joined(*scenes: OracleScene) -> OracleScene:
    return OracleScene(np.concatenate([scene.points for scene in scenes]),
                       np.concatenate([scene.descriptors for scene in scenes]))


def at(number: int, pose: np.ndarray) -> np.ndarray:
    """The pose as seen from copy ``number``."""
    return se3_exp(np.array([number * PITCH_M, 0, 0, 0, 0, 0])) @ pose


def localizer_of(world: OracleScene, places: int, cells: int = 0,
                 config: LocalizerConfig = CONFIG) -> Localizer:
    """A memory of views into the first places of a world."""
    writer = MemoryWriter(MemoryConfig(slots=6000, cells=cells, samples=20_000), DIM)
    for index in range(4 * places):
        place, pose = index // 4, poses_around(1, seed=index)[0]
        writer.write(world.keyframe(index, at(place, pose)))
    return Localizer(writer.snapshot(), NoEncoder(), config)


@pytest.fixture(scope='module')
def cubicle():
    return OracleScene.generate(0, count=500)


@pytest.fixture(scope='module')
def row(cubicle):
    """Three mapped copies; the first is the most like a fourth, which is not mapped."""
    return localizer_of(joined(*(copy_of(cubicle, number, noise) for number, noise in
                                 enumerate((0.02, 0.08, 0.08)))), places=3)


@pytest.mark.parametrize('seed', range(3))
def test_a_cubicle_that_was_not_mapped_is_not_taken_for_a_mapped_one(row, cubicle, seed):
    pose = poses_around(1, seed=40 + seed)[0]
    features, _ = copy_of(cubicle, 3, 0.02).features(at(3, pose), seed=seed)
    estimate = row.localize_features(features, CAMERA).estimate
    assert estimate.status is Status.NOT_LOCALISED
    assert estimate.reason == 'AMBIGUOUS'


def test_who_knows_the_cubicle_is_believed(row, cubicle):
    """A pose from outside decides between places that look alike, and only between those."""
    pose = poses_around(1, seed=44)[0]
    features, _ = copy_of(cubicle, 0, 0.02).features(pose, seed=1)
    nearby = pose @ se3_exp(np.array([0.02, 0, 0, 0, 0.01, 0]))
    estimate = row.localize_features(features, CAMERA, nearby).estimate
    assert pose_error(estimate.T_map_cam, pose)[0] < 0.02
    elsewhere = row.localize_features(features, CAMERA, at(5, pose)).estimate
    assert elsewhere.reason == 'AMBIGUOUS'


def test_like_furniture_in_rooms_of_their_own_is_found(cubicle):
    """A third of what is seen is in every place; the rest says which one it is."""
    rooms = [joined(copy_of(OracleScene(cubicle.points[::3], cubicle.descriptors[::3]), n, 0.05),
                    copy_of(OracleScene.generate(10 + n, count=500), n, 0.0)) for n in range(3)]
    localizer = localizer_of(joined(*rooms), places=3)
    for number in range(3):
        pose = at(number, poses_around(1, seed=60 + number)[0])
        features, _ = rooms[number].features(pose, seed=number)
        found = localizer.localize_features(features, CAMERA).estimate.T_map_cam
        assert pose_error(found, pose)[0] < 0.02


def test_the_network_tells_places_apart_that_slots_cannot():
    """A sixth of what is seen is there once: too little for slots, all that the network hears.

    In a fourth place, which was not mapped, that sixth is new, and nobody answers.
    """
    furniture, things = OracleScene.generate(0, count=1500), 300
    rooms = [joined(copy_of(furniture, number, 0.03), copy_of(
        OracleScene.generate(20 + number, count=things), number, 0.0)) for number in range(4)]
    world = joined(*rooms[:3])
    slots = localizer_of(world, places=3)
    both = localizer_of(world, places=3, cells=60_000, config=LocalizerConfig())
    told = []
    for query in range(12):
        number = query % 4
        pose = at(number, poses_around(1, seed=80 + query)[0])
        features, _ = rooms[number].features(pose, seed=query)
        assert slots.localize_features(features, CAMERA).estimate.reason == 'AMBIGUOUS'
        found = both.localize_features(features, CAMERA).estimate
        if found.T_map_cam is not None:
            assert pose_error(found.T_map_cam, pose)[0] < 0.02 and number < 3
            told.append(query)
    assert len(told) > 4


def test_a_chair_is_no_room(cubicle):
    """One thing that the map has once stands in another room: nothing else agrees."""
    chair = OracleScene(cubicle.points[::5], cubicle.descriptors[::5])
    localizer = localizer_of(joined(cubicle, OracleScene.generate(1, count=1500)), places=1)
    pose = poses_around(1, seed=70)[0]
    features, _ = joined(chair, OracleScene.generate(2, count=1500)).features(pose, seed=3)
    estimate = localizer.localize_features(features, CAMERA).estimate
    assert estimate.inliers >= CONFIG.min_inliers  # enough agree, for who only counts them
    assert estimate.reason == 'AMBIGUOUS'


def test_a_copy_that_was_mapped_from_another_side_is_a_rival_too(cubicle):
    """Two thirds of it look too little alike by themselves; around the rival's pose they count."""
    one, other = copy_of(cubicle, 0, 0.02), copy_of(cubicle, 1, 0.06)
    descriptors = other.descriptors.copy()
    changed = np.arange(len(descriptors)) % 3 > 0
    descriptors[changed] = copy_of(cubicle, 1, 0.16).descriptors[changed]
    localizer = localizer_of(joined(one, OracleScene(other.points, descriptors)), places=2)
    pose = poses_around(1, seed=80)[0]
    features, _ = copy_of(cubicle, 3, 0.02).features(at(3, pose), seed=1)
    assert localizer.localize_features(features, CAMERA).estimate.reason == 'AMBIGUOUS'


def test_what_is_far_speaks_for_a_place_though_a_rival_beside_it_sees_it_too(cubicle):
    """Half a metre aside the near things are again; the far ones are the same, not others."""
    rng = np.random.default_rng(5)
    near = OracleScene(cubicle.points[:150], cubicle.descriptors[:150])
    beside = OracleScene(near.points + (0.6, 0, 0), unit(
        near.descriptors + 0.02 * rng.normal(size=near.descriptors.shape)))
    far = OracleScene(rng.uniform((-40, -25, 60), (40, 25, 80), (400, 3)),
                      unit(rng.normal(size=(400, DIM))))
    world = joined(near, beside, far)
    localizer = localizer_of(world, places=1)
    for seed in range(3):
        pose = poses_around(1, seed=90 + seed)[0]
        features, _ = world.features(pose, seed=seed)
        found = localizer.localize_features(features, CAMERA).estimate.T_map_cam
        assert pose_error(found, pose)[0] < 0.05


def test_the_search_finds_the_nearest_slots_and_all_that_are_alike():
    rng = np.random.default_rng(0)
    points, slots = rng.normal(size=(700, 3)), unit(rng.normal(size=(700, DIM)))
    queries = unit(slots[rng.integers(700, size=50)] + 0.1 * rng.normal(size=(50, DIM)))
    among = rng.permutation(700)[:600]
    similar = SlotSearch(torch.from_numpy(slots), points, among).compare(queries)
    cosines = np.full((50, 700), -1.0)
    cosines[:, among] = queries @ slots[among].T
    nearest = similar.nearest()
    assert np.allclose(cosines[np.arange(50), nearest], cosines.max(1), atol=0.01)
    asked = np.arange(0, 50, 2)
    found = set(zip(*similar.alike(asked, least=0.4, margin=0.4), strict=True))
    # Half precision may decide the pairs at the limit otherwise.
    limit = np.maximum(cosines[asked].max(1) - 0.4, 0.4)[:, None]
    assert set(zip(*np.nonzero(cosines[asked] > limit + 0.01), strict=True)) <= found
    assert found <= set(zip(*np.nonzero(cosines[asked] > limit - 0.01), strict=True))


def test_cosines_of_pairs_are_those_of_the_vectors():
    rng = np.random.default_rng(0)
    a, b = unit(rng.normal(size=(300, DIM))), unit(rng.normal(size=(200, DIM)))
    rows, columns = rng.integers(300, size=GATHERED + 77), rng.integers(200, size=GATHERED + 77)
    np.testing.assert_allclose(paired_cosines(a, rows, b, columns),
                               (a @ b.T)[rows, columns], atol=1e-6)
    assert not len(paired_cosines(a, rows[:0], b, columns[:0]))


@pytest.mark.parametrize('count', [0, 1, 256, 1000])
def test_regions_hold_each_slot_once_and_are_compact(count):
    points = np.random.default_rng(0).uniform(size=(count, 3))
    order = by_region(points, 128)
    assert sorted(order) == list(range(count))
    for start in range(0, count - 1, 128):
        extent = np.ptp(points[order[start:start + 128]], axis=0)
        assert np.prod(extent) <= max(0.5, 1.0 * (count <= 128))


def test_an_office_repeats_itself_and_its_walk_is_free():
    room = office(0, cubicles=3)
    kinds = [[(box.kind, *np.round(box.centre - (x, 0, 0), 6)) for box in room.boxes]
             for x in (-1.8, 0.0, 1.8)]
    shared = set(kinds[0]) & set(kinds[1]) & set(kinds[2])
    assert len(shared) >= 15  # the furniture of a cubicle, seen from each of them
    poses = aisle_walk(room, 40, seed=0)
    assert room.clearance(np.stack([pose[:3, 3] for pose in poses])).min() > 0.3
