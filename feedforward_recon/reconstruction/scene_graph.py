"""The tree of pairs along which poses are put together (Light3R-SfM, section 3.3).

A pair costs the less the more similar its images are. In a shortest-path tree (Dijkstra) each
image is reached from the most central one at the lowest total cost; a minimum spanning tree has
the cheapest edges, and long ways. The cost decides between few long hops and many short ones:
docs/benchmarks.md, Trees of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

# Of a similarity S. The angle is a metric: where all pairs are edges it makes a star.
COSTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'linear': lambda S: 1 - S,
    'square': lambda S: (1 - S)**2,
    'angle': lambda S: np.arccos(np.clip(S, -1, 1)),
}
LEAST_COST = 1e-6  # sparse graphs take a cost of zero for no edge


@dataclass(frozen=True)
class Tree:
    """A tree over some of N images: parent [N], -1 for the root and for images outside.

    order: its images, parents before children, the root first. depth: edges to the root [N], -1
    outside.
    """

    parent: np.ndarray
    order: np.ndarray
    depth: np.ndarray

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(parent, child) of each edge, in the order of the tree."""
        return [(int(self.parent[child]), int(child)) for child in self.order[1:]]


def components(count: int, pairs: np.ndarray) -> list[np.ndarray]:
    """Images [n] of each connected part of a graph with edges [P, 2], the largest first."""
    graph = sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
    _, label = csgraph.connected_components(graph, directed=False)
    ends = np.cumsum(np.bincount(label))[:-1]
    parts = np.split(np.argsort(label, kind='stable'), ends)
    return sorted(parts, key=lambda part: (-len(part), part[0]))


def shortest_path_tree(count: int, pairs: np.ndarray, cost: np.ndarray, root: int) -> Tree:
    """The tree in which each image is reached from the root at the lowest total cost.

    pairs: edges [P, 2] between ``count`` images; cost: [P], not negative.
    """
    _, parent = csgraph.dijkstra(_graph(count, pairs, cost), directed=False, indices=root,
                                 return_predecessors=True)
    return _tree(parent, root)


def minimum_spanning_tree(count: int, pairs: np.ndarray, cost: np.ndarray, root: int) -> Tree:
    """The tree of the lowest sum of costs; arguments as for ``shortest_path_tree``."""
    spanning = csgraph.minimum_spanning_tree(_graph(count, pairs, cost))
    _, parent = csgraph.breadth_first_order(spanning, root, directed=False)
    return _tree(parent, root)


TREES = {'shortest': shortest_path_tree, 'spanning': minimum_spanning_tree}


def _graph(count: int, pairs: np.ndarray, cost: np.ndarray) -> sparse.csr_array:
    return sparse.coo_array((np.maximum(cost, LEAST_COST), (pairs[:, 0], pairs[:, 1])),
                            (count, count)).tocsr()


def _tree(predecessor: np.ndarray, root: int) -> Tree:
    """A tree of predecessors [N], negative for the root and for images outside."""
    parent = np.where(predecessor < 0, -1, predecessor)
    children: dict[int, list[int]] = {}
    for image in np.flatnonzero(parent >= 0).tolist():
        children.setdefault(int(parent[image]), []).append(image)
    order, depth = [root], np.full(len(parent), -1)
    depth[root] = 0
    for image in order:
        for child in children.get(image, []):
            depth[child] = depth[image] + 1
            order.append(child)
    return Tree(parent, np.array(order), depth)
