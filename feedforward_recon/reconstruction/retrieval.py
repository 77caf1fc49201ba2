"""Which images may show the same: similarities of their global descriptors.

No matrix of all images is held. Neighbours are exact, in blocks, among up to EXACT images; beyond,
faiss finds nearly all of them (inverted lists, by k-means from a fixed seed).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

EXACT = 2000  # images; a search for fewer, or among fewer, needs no index
BLOCK = 512  # images that are compared at once with as many others
# Lists of the index, by the root of the number of images, and how many are searched; rounds of
# k-means, and its seed: docs/experiments.md, Neighbours among many photos.
LISTS, SEARCHED, ROUNDS, SEED = 4, 16, 10, 0


class Likeness:
    """How alike images are: cosines of their global descriptors, unit vectors [N, G].

    Of a rolled image the roll at which it is most like the other one counts; of two, the rolls of
    the one that was rolled last.
    """

    def __init__(self, descriptors: np.ndarray) -> None:
        self._upright = np.asarray(descriptors, np.float32)
        self._rolled: dict[int, np.ndarray] = {}
        self._turn = np.full(len(descriptors), -1)  # which was rolled first, second, ..
        self._faiss = _faiss() if len(descriptors) > EXACT else None

    def __len__(self) -> int:
        return len(self._upright)

    def roll(self, image: int, rolled: np.ndarray) -> None:
        """From now on an image looks like any of ``rolled`` [R, G]; once for each."""
        self._turn[image] = len(self._rolled)
        self._rolled[image] = rolled

    def upright(self, images: np.ndarray) -> np.ndarray:
        """Those of some images [n] that were not rolled."""
        return images[self._turn[images] < 0]

    def central(self, images: np.ndarray) -> int:
        """The image that is most like all of some images [n] together."""
        upright = self.upright(images)
        own = self._upright[upright]
        total = np.zeros(len(self))
        total[upright] = own @ own.sum(0) - (own * own).sum(1)
        for rolled in _blocks(np.setdiff1d(images, upright)):
            for block in _blocks(images):
                S = self._between(rolled, block)
                S[rolled[:, None] == block] = 0.0
                total[rolled] += S.sum(1)
                total[block] += np.where(self._turn[block] < 0, S.sum(0), 0.0)
        return int(images[np.argmax(total[images])])

    def of(self, pairs: np.ndarray) -> np.ndarray:
        """Similarities float32 [P] of pairs [P, 2] of different images."""
        found = np.zeros(len(pairs), np.float32)
        for rows in _blocks(np.arange(len(pairs))):
            i, j = pairs[rows].T
            found[rows] = np.einsum('pg,pg->p', self._upright[i], self._upright[j])
        for rows in _blocks(self._with_rolled(pairs)):
            last = self._turn[pairs[rows]].argmax(1)
            found[rows] = self._looks(pairs[rows], last).max(1)
        return found

    def rolls(self, pairs: np.ndarray) -> np.ndarray:
        """At which roll the images of pairs [P, 2] are most alike [P, 2]; one is upright."""
        found = np.zeros((len(pairs), 2), int)
        for rows in _blocks(self._with_rolled(pairs)):
            first = (self._turn[pairs[rows]] >= 0).argmax(1)
            found[rows, first] = self._looks(pairs[rows], first).argmax(1)
        return found

    def _with_rolled(self, pairs: np.ndarray) -> np.ndarray:
        return np.flatnonzero((self._turn[pairs] >= 0).any(1))

    def _looks(self, pairs: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Cosines [P, R] of the rolls of one image of each pair, 0 or 1 [P], with the other."""
        row = np.arange(len(pairs))
        rolled = np.stack([self._rolled[image] for image in pairs[row, which].tolist()])
        return np.einsum('prg,pg->pr', rolled, self._upright[pairs[row, 1 - which]])

    def nearest(self, images: np.ndarray, others: np.ndarray, count: int
                ) -> tuple[np.ndarray, np.ndarray]:
        """Pairs [P, 2] of images [n] and the ``count`` of others [m] most like each; how much [P].

        Where both are more than EXACT, nearly all of them; others are upright then.
        """
        index = None
        if self._faiss is not None and min(len(images), len(others)) > EXACT:
            index = _index(self._faiss, self._upright[others])
        found = [(np.zeros((0, 2), int), np.zeros(0, np.float32))]
        for block in _blocks(images):
            found.append(self._compared(block, others, count) if index is None
                         else self._looked_up(index, block, others, count))
        pairs, alike = zip(*found, strict=True)
        return np.concatenate(pairs), np.concatenate(alike)

    def _compared(self, images: np.ndarray, others: np.ndarray, count: int
                  ) -> tuple[np.ndarray, np.ndarray]:
        """As ``nearest``, of a block of images."""
        found, alike = np.zeros((len(images), 0), int), np.zeros((len(images), 0), np.float32)
        for block in _blocks(others):
            alike = np.concatenate([alike, self._between(images, block)], 1)
            found = np.concatenate([found, np.tile(block, (len(images), 1))], 1)
            best = np.argpartition(-alike, min(count, alike.shape[1]) - 1, axis=1)[:, :count]
            found, alike = (np.take_along_axis(of, best, 1) for of in (found, alike))
        pairs = np.stack([np.repeat(images, found.shape[1]), found.ravel()], 1)
        other = pairs[:, 0] != pairs[:, 1]
        return pairs[other], alike.ravel()[other]

    def _between(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Similarities [n, m] of two blocks; of an image with itself the least of all."""
        S = self._upright[images] @ self._upright[others].T
        for one, other, seen in ((images, others, S), (others, images, S.T)):
            rows = np.flatnonzero(self._turn[one] >= 0)
            if len(rows):
                looks = np.stack([self._rolled[image] for image in one[rows].tolist()])
                best = (looks @ self._upright[other].T).max(1)
                last = self._turn[one[rows], None] > self._turn[other]
                seen[rows] = np.where(last, best, seen[rows])
        S[images[:, None] == others] = -np.inf
        return S

    def _looked_up(self, index: Any, images: np.ndarray, others: np.ndarray, count: int
                   ) -> tuple[np.ndarray, np.ndarray]:
        """As ``nearest``, of a block of images, by an index of the others."""
        looks = [self._rolled.get(image, self._upright[image:image + 1])
                 for image in images.tolist()]
        alike, row = index.search(np.concatenate(looks), count + 1)  # an image also finds itself
        image = np.repeat(images, [len(look) * (count + 1) for look in looks])
        pairs, alike = np.stack([image, others[row.ravel()]], 1), alike.ravel()
        good = np.flatnonzero((row.ravel() >= 0) & (pairs[:, 0] != pairs[:, 1]))
        good = good[np.argsort(-alike[good], kind='stable')]
        _, once = np.unique(pairs[good] @ [len(self), 1], return_index=True)
        rows = good[once][_most_of_each(pairs[good[once], 0], alike[good[once]], count)]
        return pairs[rows], alike[rows]


def likely_pairs(similar: Likeness, neighbours: int) -> np.ndarray:
    """Pairs i < j [P, 2] of which one is among the ``neighbours`` most similar of the other."""
    return pairs_with(similar, np.arange(len(similar)), np.arange(len(similar)), neighbours)


def pairs_with(similar: Likeness, images: np.ndarray, others: np.ndarray, neighbours: int
               ) -> np.ndarray:
    """Pairs i < j [P, 2] of each of ``images`` [n] and the ``others`` most like it."""
    return _once(similar.nearest(images, others, neighbours)[0])


def bridging_pairs(similar: Likeness, parts: list[np.ndarray], neighbours: int) -> np.ndarray:
    """Pairs i < j [P, 2] of the first part [n] of the images and each other one, the most similar.

    The first is to be the largest; pairs of all parts with each other would be too many.
    """
    part = np.zeros(len(similar), int)
    for number, images in enumerate(parts):
        part[images] = number
    pairs, alike = similar.nearest(np.flatnonzero(part), parts[0], neighbours)
    return _once(pairs[_most_of_each(part[pairs[:, 0]], alike, neighbours)])


def _once(pairs: np.ndarray) -> np.ndarray:
    return np.unique(np.sort(pairs, 1), axis=0)


def _most_of_each(group: np.ndarray, alike: np.ndarray, count: int) -> np.ndarray:
    """Rows of the ``count`` most alike of each group [P]."""
    order = np.lexsort((-alike, group))
    _, first, size = np.unique(group[order], return_index=True, return_counts=True)
    return order[np.arange(len(order)) - np.repeat(first, size) < count]


def _blocks(of: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(of), BLOCK):
        yield of[start:start + BLOCK]


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        log.warning('comparing each of more than %d images with all others, which takes longer '
                    'than an index; pip install faiss-cpu', EXACT)
        return None
    return faiss


def _index(faiss: Any, descriptors: np.ndarray) -> Any:
    """Inverted lists of unit vectors [m, G]."""
    count, size = descriptors.shape
    lists = int(LISTS * np.sqrt(count))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = SEED, ROUNDS, 1
    index.nprobe = SEARCHED
    index.train(descriptors)
    index.add(descriptors)
    return index
