"""Descriptors are multiplied in few sizes, for each of which oneDNN keeps a product forever."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle import unit
from torch.utils._python_dispatch import TorchDispatchMode

from feedforward_recon.localization.slot_search import QUERIES, SlotSearch
from feedforward_recon.model.half_rows import half_rows
from feedforward_recon.reconstruction.pairs import KEYS, CompactPairs, mutual

DIM, SLOTS = 16, 600
COUNTS = range(1, 600, 7)  # of features


def descriptors(count, seed=0):
    """Unit vectors of ``count`` features, of which those of the same number are alike."""
    shared = np.random.default_rng(99).normal(size=(600, DIM))[:count]
    return unit(shared + 0.05 * np.random.default_rng(seed).normal(size=shared.shape)
                ).astype(np.float32)


class Products(TorchDispatchMode):
    """The sizes of all products of matrices within."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.sizes.add(tuple(tuple(matrix.shape) for matrix in args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('counts', [(300, 256), (0, 40), (1, 300), (511, 513)])
def test_rows_of_zeros_match_nothing(counts):
    a, b = (descriptors(count, seed) for seed, count in enumerate(counts))
    padded = mutual(half_rows(a, KEYS), half_rows(b, KEYS))
    plain = mutual(torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16())
    for name in ('feature_i', 'feature_j', 'distinct'):
        np.testing.assert_array_equal(getattr(padded, name), getattr(plain, name))
    assert len(padded) > 0.9 * min(counts) - 1


def test_pairs_of_images_are_multiplied_in_few_sizes():
    shots = [SimpleNamespace(features=SimpleNamespace(descriptors=descriptors(n)))
             for n in COUNTS]
    pairs = CompactPairs(shots, encoder=None)
    with Products() as products:
        for i in range(len(shots) - 1):
            pairs.match(i, i + 1)
    assert 0 < len(products.sizes) <= 5


def test_queries_of_a_map_are_multiplied_in_few_sizes():
    points = np.random.default_rng(0).normal(size=(SLOTS, 3))
    search = SlotSearch(torch.tensor(descriptors(SLOTS)), points, np.arange(SLOTS))
    with Products() as products:
        for count in COUNTS:
            nearest = search.compare(descriptors(count)).nearest()
            np.testing.assert_array_equal(nearest, np.arange(count))
    assert 0 < len(products.sizes) <= -(-max(COUNTS) // QUERIES)
