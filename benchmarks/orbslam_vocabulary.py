"""The vocabulary of visual words that ORB-SLAM3 needs: a tree over ORB descriptors (DBoW2).

Galvez-Lopez and Tardos, "Bags of binary words for fast place recognition" (T-RO 2012): k-means
over bits, level by level, where the centre of a cluster is the majority of each bit. The one
that ORB-SLAM3 is published with has to be downloaded; this one is trained on photos at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

BRANCHES, LEVELS = 10, 5
DESCRIPTORS, PER_IMAGE = 400_000, 1000
ROUNDS, SAMPLE = 8, 20_000  # of k-means; centres of a larger cluster come from a sample
CHUNK = 50_000


@dataclass
class Node:
    """A node of the tree: the rows of its descriptors, and the bits of its centre (0, 1) [256]."""

    rows: np.ndarray
    centre: np.ndarray
    children: list[Node] = field(default_factory=list)


def orb_descriptors(images: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors uint8 [N, 32] of all images together, and the image [N] of each."""
    detector = cv2.ORB_create(nfeatures=PER_IMAGE)
    found = [detector.detectAndCompute(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), None)[1]
             for path in images]
    image = np.concatenate([np.full(len(d), i) for i, d in enumerate(found) if d is not None])
    descriptors = np.concatenate([d for d in found if d is not None])
    kept = np.random.default_rng(0).permutation(len(descriptors))[:DESCRIPTORS]
    return descriptors[kept], image[kept]


def grown_tree(bits: np.ndarray) -> Node:
    """Tree of LEVELS levels over descriptors as bits uint8 (0, 1) [N, 256]."""
    rng = np.random.default_rng(0)
    root = Node(np.arange(len(bits)), np.zeros(bits.shape[1], np.uint8))
    level = [root]
    for _ in range(LEVELS):
        for node in level:
            if len(node.rows) > 1:
                node.children = _split(bits, node.rows, rng)
        level = [child for node in level for child in node.children]
    return root


def _split(bits: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> list[Node]:
    """At most BRANCHES clusters of the rows."""
    sample = bits[rng.choice(rows, SAMPLE, replace=False) if len(rows) > SAMPLE else rows]
    centres = sample[rng.choice(len(sample), min(BRANCHES, len(sample)), replace=False)]
    for _ in range(ROUNDS):
        nearest = _nearest(sample, centres)
        moved = np.stack([
            sample[nearest == i].mean(0) >= 0.5 if np.any(nearest == i) else centres[i]
            for i in range(len(centres))]).astype(np.uint8)
        if np.array_equal(moved, centres):
            break
        centres = moved
    nearest = np.concatenate([_nearest(bits[rows[start:start + CHUNK]], centres)
                              for start in range(0, len(rows), CHUNK)])
    return [Node(rows[nearest == i], centre) for i, centre in enumerate(centres)
            if np.any(nearest == i)]


def _nearest(bits: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The centre [N] that differs in the fewest bits."""
    signs = centres.astype(np.float32) * 2 - 1  # agreeing bits add 1, differing ones take 1
    return (bits.astype(np.float32) * 2 - 1).dot(signs.T).argmax(1)


def lines(root: Node, image: np.ndarray) -> Iterator[str]:
    """Lines of the text format of DBoW2: the header, then each node after its parent."""
    images = len(np.unique(image))
    yield f'{BRANCHES} {LEVELS} 0 0'
    queue = [(0, child) for child in root.children]
    for number, (parent, node) in enumerate(queue, 1):
        weight = 0.0 if node.children else np.log(images / len(np.unique(image[node.rows])))
        packed = ' '.join(map(str, np.packbits(node.centre)))
        yield f'{parent} {int(not node.children)} {packed} {weight:.6g}'
        queue += [(number, child) for child in node.children]  # grows while it is walked


def write_vocabulary(images: list[Path], path: Path) -> None:
    """Train on images and write the file; a newline at its end would be read as a node."""
    descriptors, image = orb_descriptors(images)
    root = grown_tree(np.unpackbits(descriptors, axis=1))
    partial = path.with_suffix('.partial')
    partial.write_text('\n'.join(lines(root, image)), encoding='ascii')
    partial.replace(path)
