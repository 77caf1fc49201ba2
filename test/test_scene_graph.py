"""Trees of pairs: what they promise, whatever the similarities."""

from __future__ import annotations

import numpy as np
import pytest

from feedforward_recon.reconstruction.retrieval import (
    Likeness,
    bridging_pairs,
    likely_pairs,
    pairs_with,
)
from feedforward_recon.reconstruction.scene_graph import (
    COSTS,
    TREES,
    components,
    minimum_spanning_tree,
    shortest_path_tree,
)


def walk_similarities(count, seed=0):
    """Of descriptors that drift along a walk."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(count, 40)) * 0.3
    steps[0] = rng.normal(size=40) * 3
    codes = np.cumsum(steps, 0)
    return Likeness(codes / np.linalg.norm(codes, axis=1, keepdims=True))


def complete(count):
    return np.array([(a, b) for a in range(count) for b in range(a + 1, count)])


def along(tree, pairs, cost, image):
    """Total cost from the root to an image."""
    of = {tuple(edge): c for edge, c in zip(pairs.tolist(), cost.tolist(), strict=True)}
    total = 0.0
    while tree.parent[image] >= 0:
        total += of[tuple(sorted((int(tree.parent[image]), image)))]
        image = int(tree.parent[image])
    return total


@pytest.mark.parametrize('make', TREES.values(), ids=TREES)
@pytest.mark.parametrize('cost', COSTS.values(), ids=COSTS)
def test_a_tree_reaches_each_image_once_parents_first(make, cost):
    similar = walk_similarities(25)
    pairs = likely_pairs(similar, 6)
    tree = make(25, pairs, cost(similar.of(pairs)), 3)
    assert tree.order[0] == 3 and sorted(tree.order) == list(range(25))
    assert len(tree.edges) == 24
    place = np.argsort(tree.order)
    known = {tuple(edge) for edge in pairs.tolist()}
    for parent, child in tree.edges:
        assert place[parent] < place[child] and tree.depth[child] == tree.depth[parent] + 1
        assert tuple(sorted((parent, child))) in known


def test_no_way_is_shorter_and_no_tree_is_cheaper():
    similar = walk_similarities(30)
    pairs = complete(30)
    cost = COSTS['linear'](similar.of(pairs))
    shortest, spanning = (make(30, pairs, cost, 0) for make in
                          (shortest_path_tree, minimum_spanning_tree))
    for image in range(30):
        assert along(shortest, pairs, cost, image) <= along(spanning, pairs, cost, image) + 1e-9
    sums = [sum(along(tree, pairs, cost, child) - along(tree, pairs, cost, parent)
                for parent, child in tree.edges) for tree in (shortest, spanning)]
    assert sums[1] < sums[0]
    assert shortest.depth.max() < spanning.depth.max()


def test_the_angle_makes_a_star_and_the_square_a_chain():
    """An angle is a metric, so no detour is shorter; squares of it prefer many short hops."""
    similar = walk_similarities(30)
    pairs = complete(30)
    depth = {name: shortest_path_tree(30, pairs, cost(similar.of(pairs)), 0).depth.max()
             for name, cost in COSTS.items()}
    assert depth['angle'] == 1 < depth['linear'] <= depth['square']


def test_parts_that_no_pair_connects_come_apart_and_are_bridged():
    pairs = np.array([(0, 1), (1, 2), (4, 5)])
    assert [part.tolist() for part in components(6, pairs)] == [[0, 1, 2], [4, 5], [3]]
    S = np.eye(6)
    S[2, 4] = S[4, 2] = 0.9
    S[3, 0] = S[0, 3] = 0.8
    similar = Likeness(np.linalg.cholesky(S))
    bridges = bridging_pairs(similar, components(6, pairs), 1)
    assert bridges.tolist() == [[0, 3], [2, 4]]  # one between the largest and each other part
    assert bridging_pairs(similar, components(6, pairs)[:1], 1).shape == (0, 2)


def test_each_image_is_compared_with_those_most_like_it():
    similar = walk_similarities(20)
    pairs = likely_pairs(similar, 4)
    assert (pairs[:, 0] < pairs[:, 1]).all() and len(np.unique(pairs, axis=0)) == len(pairs)
    chosen = {tuple(edge) for edge in pairs.tolist()}
    for image in range(20):
        others = [other for other in range(20) if other != image]
        alike = similar.of(np.array([(image, other) for other in others]))
        for row in np.argsort(-alike)[:4].tolist():
            assert tuple(sorted((image, others[row]))) in chosen
    assert likely_pairs(walk_similarities(2), 12).tolist() == [[0, 1]]
    assert likely_pairs(walk_similarities(1), 12).shape == (0, 2)


def test_images_are_compared_with_others_alone():
    similar = walk_similarities(12)
    pairs = pairs_with(similar, np.array([0, 5]), np.array([2, 7, 9]), 2)
    assert len(pairs) == 4
    assert all(len({a, b} & {0, 5}) == 1 and len({a, b} & {2, 7, 9}) == 1 for a, b in pairs)
