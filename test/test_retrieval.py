"""Neighbours among many photos: as if all had been compared with all, without a matrix of all."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from oracle import CAMERA, unit

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.reconstruction import completion, pipeline, retrieval
from feedforward_recon.reconstruction.comparisons import Comparisons, compared
from feedforward_recon.reconstruction.completion import ASKED, completed
from feedforward_recon.reconstruction.pairs import FeatureMatches
from feedforward_recon.reconstruction.parts import Part, PhotoSet, part_of, structure_of
from feedforward_recon.reconstruction.pipeline import assembled
from feedforward_recon.reconstruction.retrieval import (
    EXACT,
    Likeness,
    bridging_pairs,
    likely_pairs,
    pairs_with,
)
from feedforward_recon.reconstruction.scene_graph import components
from feedforward_recon.reconstruction.shots import ROLLS, Shot
from feedforward_recon.types import Features

COUNT, MANY, SIZE = 60, 3000, 24
NEEDS = 'needs the extra [photos]'


def clustered(count, seed=0, size=SIZE):
    """Descriptors of places that 20 images show each."""
    rng = np.random.default_rng(seed)
    places = rng.normal(size=(count // 20, size))
    return unit(places[rng.integers(len(places), size=count)]
                + 0.3 * rng.normal(size=(count, size)))


def rolls_of(descriptors, image):
    rng = np.random.default_rng(100 + image)
    turned = unit(rng.normal(size=(ROLLS, descriptors.shape[1])))
    return np.concatenate([descriptors[image:image + 1], turned[1:]])


class Matrix:
    """All similarities at once, as the definition has it."""

    def __init__(self, descriptors, rolled):
        self.S = descriptors @ descriptors.T
        self.roll = np.zeros((len(descriptors), len(descriptors), 2), int)
        for image in rolled:
            alike = rolls_of(descriptors, image) @ descriptors.T
            self.S[image] = self.S[:, image] = alike.max(0)
        for image in sorted(rolled, reverse=True):  # of two, the first is rolled to compare them
            alike = rolls_of(descriptors, image) @ descriptors.T
            self.roll[image] = np.stack([alike.argmax(0), np.zeros(len(self.S))], 1)
            self.roll[:, image] = self.roll[image, :, ::-1]
        np.fill_diagonal(self.S, -np.inf)

    def nearest(self, images, others, count):
        best = np.argsort(-self.S[np.ix_(images, others)], axis=1)[:, :count]
        return {(image, other) for image, row in zip(images.tolist(), others[best].tolist(),
                                                     strict=True) for other in row}


def similarities(descriptors, rolled=()):
    similar = Likeness(descriptors)
    for image in rolled:
        similar.roll(image, rolls_of(descriptors, image))
    return similar


def as_set(pairs):
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    return set(map(tuple, pairs.tolist()))


@pytest.mark.parametrize('rolled', [(), (40, 3, 17, 51, 8)], ids=['upright', 'rolled'])
@pytest.mark.parametrize('block', [7, 512])
def test_blocks_say_what_a_matrix_of_all_says(monkeypatch, block, rolled):
    monkeypatch.setattr(retrieval, 'BLOCK', block)
    descriptors = unit(np.random.default_rng(0).normal(size=(COUNT, SIZE)))
    similar, truth = similarities(descriptors, rolled), Matrix(descriptors, rolled)
    pairs = np.array([(a, b) for a in range(COUNT) for b in range(COUNT) if a < b])
    np.testing.assert_allclose(similar.of(pairs), truth.S[tuple(pairs.T)], atol=1e-6)
    assert np.array_equal(similar.rolls(pairs), truth.roll[pairs[:, 0], pairs[:, 1]])
    images, others = np.arange(0, COUNT, 2), np.r_[np.arange(0, COUNT, 3), 8, 17, 40]
    found, alike = similar.nearest(images, others, 4)
    assert as_set(found) == truth.nearest(images, others, 4)
    np.testing.assert_allclose(alike, similar.of(found), atol=1e-6)
    found, alike = similar.nearest(others, others, COUNT)
    np.testing.assert_allclose(alike, truth.S[tuple(found.T)], atol=1e-6)
    S = np.where(np.isfinite(truth.S), truth.S, 0)
    rng = np.random.default_rng(1)
    for some in (np.r_[rng.choice(COUNT, 6, replace=False), rolled].astype(int)
                 for _ in range(20)):
        some = np.unique(some)
        assert similar.central(some) == some[S[np.ix_(some, some)].sum(1).argmax()]


@pytest.mark.parametrize('block', [7, 512])
def test_bridges_are_the_most_similar_pairs_between_parts(monkeypatch, block):
    monkeypatch.setattr(retrieval, 'BLOCK', block)
    descriptors = clustered(COUNT)
    parts = np.split(np.random.default_rng(0).permutation(COUNT), [30, 45, 58, 59])
    expected = set()
    for part in parts[1:]:
        between = (descriptors @ descriptors.T)[np.ix_(parts[0], part)]
        row, column = np.unravel_index(np.argsort(-between, axis=None)[:5], between.shape)
        expected |= {tuple(sorted(pair)) for pair in
                     zip(parts[0][row].tolist(), part[column].tolist(), strict=True)}
    assert as_set(bridging_pairs(Likeness(descriptors), parts, 5)) == expected


def test_fewer_others_than_neighbours_and_none_at_all():
    similar, none = Likeness(clustered(COUNT)), np.zeros(0, int)
    assert as_set(pairs_with(similar, np.array([1, 2]), np.array([2, 5]), 30)) == {
        (1, 2), (1, 5), (2, 5)}
    for images, others, count in ((none, np.arange(3), 2), (np.arange(3), none, 2),
                                  (np.arange(3), np.arange(9), 0)):
        assert pairs_with(similar, images, others, count).shape == (0, 2)
    assert similar.of(np.zeros((0, 2), int)).shape == (0,)
    assert similar.rolls(np.zeros((0, 2), int)).shape == (0, 2)


def test_an_index_finds_nearly_all_neighbours_and_the_same_ones_each_time(monkeypatch):
    pytest.importorskip('faiss', reason=NEEDS)
    monkeypatch.setattr(Likeness, '_compared', None)
    descriptors, every = clustered(MANY), np.arange(MANY)
    similar = Likeness(descriptors)
    pairs, alike = similar.nearest(every, every, 12)
    truth = Matrix(descriptors, ()).nearest(every, every, 12)
    assert len(as_set(pairs) & truth) > 0.95 * len(truth)
    assert (pairs[:, 0] != pairs[:, 1]).all() and np.bincount(pairs[:, 0]).max() == 12
    np.testing.assert_allclose(alike, similar.of(pairs), atol=1e-6)
    again = Likeness(descriptors).nearest(every, every, 12)
    assert np.array_equal(pairs, again[0]) and np.array_equal(alike, again[1])


def test_few_images_are_looked_for_without_an_index(monkeypatch):
    monkeypatch.setattr(retrieval, '_index', None)
    descriptors = clustered(MANY)
    few, every = np.arange(0, MANY, 100), np.arange(MANY)
    found, _ = Likeness(descriptors).nearest(few, every, 12)
    assert as_set(found) == Matrix(descriptors, ()).nearest(few, every, 12)


def test_a_rolled_image_is_found_by_an_index_at_its_best_roll():
    pytest.importorskip('faiss', reason=NEEDS)
    descriptors, every = clustered(MANY), np.arange(MANY)
    similar = Likeness(descriptors)
    close = descriptors[1000] + 0.02 * np.random.default_rng(0).normal(size=(ROLLS - 1, SIZE))
    similar.roll(7, np.concatenate([descriptors[7:8], unit(close)]))
    pairs, alike = similar.nearest(every, every, 12)
    own = pairs[:, 0] == 7
    assert own.sum() == 12 == len(np.unique(pairs[own, 1]))
    assert 1000 in pairs[own, 1]
    np.testing.assert_allclose(alike[own], similar.of(pairs[own]), atol=1e-6)


def test_without_the_extra_many_are_compared_in_blocks_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'faiss', None)
    assert len(Likeness(clustered(EXACT))) == EXACT and not caplog.records
    descriptors, every = clustered(MANY), np.arange(MANY)
    similar = Likeness(descriptors)
    for _ in range(2):
        found, _ = similar.nearest(every, every, 12)
    assert as_set(found) == Matrix(descriptors, ()).nearest(every, every, 12)
    assert len(caplog.records) == 1
    assert 'pip install faiss-cpu' in caplog.text


def test_no_matrix_of_all_images_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, 'faiss', None)
    descriptors, every = clustered(MANY, size=8), np.arange(MANY)
    tracemalloc.start()
    similar = similarities(descriptors, range(0, MANY, 300))
    pairs = likely_pairs(similar, 12)
    similar.of(pairs)
    similar.rolls(pairs)
    similar.central(every)
    bridging_pairs(similar, [every[:1500], every[1500:2500], every[2500:]], 30)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * MANY**2  # bytes; half of a matrix of float32


class Strangers:
    """Pairs of images of which no two show the same."""

    batch = 1

    def __init__(self, descriptors):
        self._descriptors, self.asked, self.looked = descriptors, 0, 0

    def rolled(self, image):
        self.looked += 1
        return rolls_of(self._descriptors, image)

    def match(self, i, j, roll=0):
        self.asked += 1
        none = np.zeros(0, int)
        return FeatureMatches(none, none, none.astype(bool))

    def decode(self, edges, matches):
        return [None] * len(edges)


def empty_shots(descriptors):
    nothing = np.zeros((0, 2), np.float32)
    return [Shot(Features(nothing, nothing, nothing[:, 0], descriptor), CAMERA, nothing,
                 np.zeros((0, 3), np.uint8), np.zeros((2, 2), np.uint8), (2, 2))
            for descriptor in descriptors]


def test_thousands_of_strangers_are_compared_and_given_up(monkeypatch):
    descriptors = clustered(2500)
    shots, decoder, config = empty_shots(descriptors), Strangers(descriptors), \
        ReconstructionConfig()
    comparisons = compared(shots, decoder, config)
    assert decoder.looked < 2500
    # Alike upright or rolled, with the first part, and what was in vain upright once more.
    assert 2500 * config.neighbours / 2 < decoder.asked < 2500 * 3 * config.neighbours
    parts = []
    monkeypatch.setattr(pipeline, 'part_of', lambda *given: (parts.append(1), part_of(*given))[1])
    monkeypatch.setattr(completion, 'part_of', None)
    done = assembled(PhotoSet(shots, comparisons, config))
    assert len(parts) == 2 and len(done) == 1 and done[0].registered.sum() == 1


def test_a_small_part_is_compared_with_few_of_many_others():
    descriptors = clustered(300)
    shots, decoder = empty_shots(descriptors), Strangers(descriptors)
    photos = PhotoSet(shots, Comparisons(decoder, descriptors), ReconstructionConfig())
    every, registered = np.ones(300, bool), np.arange(300) < 3
    part = Part(registered, structure_of(shots, np.tile(np.eye(4), (300, 1, 1)), registered, {}),
                {0, 1, 2}, part_of(photos, every).tree, np.tile(np.eye(4), (300, 1, 1)))
    completed(photos, part, every)
    assert decoder.asked == 3 * 3 * ASKED
    S = Matrix(descriptors, range(3, 300)).S[3:, :3].max(1)
    asked = {j for i, j in photos.comparisons.matches}
    assert asked == {3 + int(image) for image in np.argsort(-S)[:3 * ASKED]}


def test_parts_are_sorted_by_size_then_by_their_first_image():
    pairs = np.array([(0, 8), (2, 5), (5, 7), (1, 6)])
    assert [part.tolist() for part in components(9, pairs)] == [[2, 5, 7], [0, 8], [1, 6], [3],
                                                                [4]]
