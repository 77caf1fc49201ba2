"""``reconstruct``: unordered images to poses, points and a lens, in one linear pass.

    features of each image -> pairs of similar images -> rotations that agree with all pairs
        -> a tree from the most central image -> poses along it -> tracks
        -> triangulation, adjustment, patches aligned, adjustment

Light3R-SfM's way (retrieval, shortest-path tree, pairs, accumulation), and what it leaves open:
refinement at tight thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.geometry.rotation_averaging import averaged_rotations, turns_left
from feedforward_recon.reconstruction.accumulation import Accumulation, Pairs, accumulate
from feedforward_recon.reconstruction.pairs import PairDecoder, PairGeometry, with_rotation
from feedforward_recon.reconstruction.refinement import (
    FINE,
    ROUGH,
    Structure,
    refined,
    sharpened,
    triangulated,
)
from feedforward_recon.reconstruction.retrieval import (
    bridging_pairs,
    likely_pairs,
    similarities,
)
from feedforward_recon.reconstruction.scene_graph import (
    COSTS,
    TREES,
    Tree,
    components,
    minimum_spanning_tree,
)
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.reconstruction.tracks import tracks_of

# A pair whose rotation is this far from what the others say together is wrong, or of another place
# that looks the same.
MAX_TURN = np.deg2rad(5.0)
ENOUGH_MATCHES = 300  # a pair with more is not surer of its rotation

Mapped = Callable[[Callable, Iterable], Iterable]  # like the built-in ``map``, on several cores


@dataclass(frozen=True)
class Reconstructed:
    """What was made of N images.

    registered: bool [N]; reasons: why the others are not, '' for those that are. structure: poses,
    cameras and points. pairs: that agree. tree: along which they were put together. unrefined:
    poses [N, 4, 4] as accumulated.
    """

    registered: np.ndarray
    reasons: list[str]
    structure: Structure
    pairs: Pairs
    tree: Tree
    unrefined: np.ndarray


def reconstruct(shots: Sequence[Shot], decoder: PairDecoder, config: ReconstructionConfig,
                calibration: tuple[str, ...] = (), mapped: Mapped = map) -> Reconstructed:
    """Reconstruct encoded images.

    calibration: what of the cameras is refined, as in ``geometry.refine``.
    """
    S = similarities(np.stack([shot.features.global_descriptor for shot in shots]))
    pairs = _verified(decoder, S, config, mapped)
    part = _largest_part(len(shots), pairs)
    pairs = _agreeing(shots, {edge: pair for edge, pair in pairs.items() if edge[0] in part})
    part = _largest_part(len(shots), pairs)
    tree = _tree(S, pairs, sorted(part), config)
    placed = accumulate(shots, pairs, int(tree.order[0]), tree.edges)
    structure = _structure(shots, placed, pairs)
    if config.refine and len(structure.tracks):
        structure = refined(structure, ROUGH, calibration)
        structure = refined(sharpened(structure, [shot.gray for shot in shots]), FINE,
                            calibration)
    return Reconstructed(placed.registered, _reasons(placed, part), structure, pairs, tree,
                          placed.T_map_cam)


def _verified(decoder: PairDecoder, S: np.ndarray, config: ReconstructionConfig, mapped: Mapped
              ) -> dict[tuple[int, int], PairGeometry]:
    """Pairs of similar images that show the same, and pairs that join what falls apart."""
    pairs: dict[tuple[int, int], PairGeometry] = {}

    def decode(wanted: np.ndarray) -> None:
        new = [edge for edge in map(tuple, wanted.tolist()) if edge not in pairs]
        found = mapped(lambda edge: decoder.decode(*edge), new)
        pairs.update({(pair.i, pair.j): pair for pair in found if pair is not None})

    decode(likely_pairs(S, config.neighbours))
    parts = components(len(S), _edges(pairs))
    if len(parts) > 1:
        decode(bridging_pairs(S, parts, config.bridges))
    return pairs


def _largest_part(count: int, pairs: Pairs) -> set[int]:
    return set(components(count, _edges(pairs))[0].tolist())


def _edges(pairs: Pairs) -> np.ndarray:
    return np.array(list(pairs), int).reshape(-1, 2)


def _agreeing(shots: Sequence[Shot], pairs: Pairs) -> dict[tuple[int, int], PairGeometry]:
    """Connected pairs with rotations that agree with all others; the others are gone."""
    if not pairs:
        return {}
    images, edges = np.unique(_edges(pairs), return_inverse=True)
    i, j = edges.reshape(-1, 2).T
    sizes = np.minimum([len(pair) for pair in pairs.values()], ENOUGH_MATCHES)
    R_i_j = np.stack([pair.T_i_j[:3, :3] for pair in pairs.values()])
    start = minimum_spanning_tree(len(images), np.stack([i, j], 1), 1 / sizes, 0)
    R = np.tile(np.eye(3), (len(images), 1, 1))
    measured = {(a, b): R for a, b, R in zip(i.tolist(), j.tolist(), R_i_j, strict=True)}
    for a, b in start.edges:
        R[b] = R[a] @ (measured[a, b] if (a, b) in measured else measured[b, a].T)
    R = averaged_rotations(R, i, j, R_i_j, np.sqrt(sizes))
    left = np.linalg.norm(turns_left(R, i, j, R_i_j), axis=1)
    better = [with_rotation(pair, shots, R[a].T @ R[b]) for pair, a, b, turn in
              zip(pairs.values(), i, j, left, strict=True) if turn < MAX_TURN]
    return {(pair.i, pair.j): pair for pair in better if pair is not None}


def _tree(S: np.ndarray, pairs: Pairs, part: list[int], config: ReconstructionConfig) -> Tree:
    """The tree from the image that is most similar to all others of its part."""
    edges = _edges(pairs)
    root = part[int(np.argmax(S[np.ix_(part, part)].sum(1)))]
    return TREES[config.tree](len(S), edges, COSTS[config.cost](S[edges[:, 0], edges[:, 1]]),
                              root)


def _structure(shots: Sequence[Shot], placed: Accumulation, pairs: Pairs) -> Structure:
    tracks = tracks_of(shots, pairs.values())
    tracks = tracks.select(placed.registered[tracks.image])
    return triangulated(Structure(placed.T_map_cam, [shot.camera for shot in shots], tracks,
                                  np.zeros((tracks.count, 3)), np.zeros(0)))


def _reasons(placed: Accumulation, part: set[int]) -> list[str]:
    return ['' if done else 'TOO_FEW_SHARED' if image in part else 'NO_OVERLAP'
            for image, done in enumerate(placed.registered)]
