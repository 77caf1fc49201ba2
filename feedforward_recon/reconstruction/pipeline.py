"""``reconstruct``: unordered images to poses, points and a lens, in one linear pass.

    features of each image -> pairs of similar images -> rotations that agree with all pairs
        -> a tree from the most central image -> poses along it -> tracks
        -> triangulation, adjustment, patches aligned, adjustment

Light3R-SfM's way (retrieval, shortest-path tree, pairs, accumulation), and what it leaves open:
refinement at tight thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.geometry.rotation_averaging import averaged_rotations, turns_left
from feedforward_recon.reconstruction.accumulation import Pairs, accumulate
from feedforward_recon.reconstruction.pairs import (
    Matches,
    PairDecoder,
    PairGeometry,
    with_rotation,
)
from feedforward_recon.reconstruction.refinement import (
    FINE,
    ROUGH,
    Structure,
    refined,
    sharpened,
    triangulated,
)
from feedforward_recon.reconstruction.registration import (
    agreeing_with,
    placed_by_points,
)
from feedforward_recon.reconstruction.retrieval import (
    bridging_pairs,
    likely_pairs,
    pairs_with,
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
# An image of whose observations fewer agree with its pose is placed anew, by the points of others.
WEAK_SHARE = 0.4
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
    return assembled(shots, compared(shots, decoder, config, mapped), config, calibration)


def compared(shots: Sequence[Shot], decoder: PairDecoder, config: ReconstructionConfig,
             mapped: Mapped = map) -> Comparisons:
    """Similar images compared, and the most similar ones of parts that fall apart."""
    S = similarities(np.stack([shot.features.global_descriptor for shot in shots]))
    done = Comparisons(decoder, S, mapped)
    done.match(likely_pairs(S, config.neighbours))
    parts = components(len(S), _edges(done.pairs))
    if len(parts) > 1:
        done.match(bridging_pairs(S, parts, config.bridges))
    return done


def assembled(shots: Sequence[Shot], comparisons: Comparisons, config: ReconstructionConfig,
              calibration: tuple[str, ...] = ()) -> Reconstructed:
    """The largest part of the images that pairs connect."""
    part = _largest_part(len(shots), comparisons.pairs)
    pairs = _agreeing(shots, {edge: pair for edge, pair in comparisons.pairs.items()
                              if edge[0] in part})
    part = _largest_part(len(shots), pairs)
    tree = _tree(comparisons.S, pairs, sorted(part), config)
    placed = accumulate(shots, pairs, int(tree.order[0]), tree.edges)
    structure, registered = _structure(shots, placed.T_map_cam, placed.registered, pairs), \
        placed.registered
    if config.refine and len(structure.tracks):
        before = np.bincount(structure.tracks.image, minlength=len(shots))
        structure = refined(structure, ROUGH, calibration)
        agree = np.bincount(structure.tracks.image, minlength=len(shots))
        registered = registered & (agree > WEAK_SHARE * before)
        structure, registered = _completed(structure, shots, registered, comparisons, calibration,
                                           config)
        structure = refined(sharpened(structure, [shot.gray for shot in shots]), FINE,
                            calibration)
    return Reconstructed(registered, _reasons(registered, part), structure, pairs, tree,
                         placed.T_map_cam)


def _completed(structure: Structure, shots: Sequence[Shot], registered: np.ndarray,
               comparisons: Comparisons, calibration: tuple[str, ...], config: ReconstructionConfig
               ) -> tuple[Structure, np.ndarray]:
    """The structure with images that only its points can place, a few at a time.

    Those that are not found are compared with more of the registered ones.
    """
    while not registered.all():
        found = placed_by_points(structure, shots, registered, comparisons.matches, config.seed)
        if not found:
            missing, there = np.flatnonzero(~registered), np.flatnonzero(registered)
            if comparisons.match(pairs_with(comparisons.S, missing, there, config.bridges)):
                continue
            break
        registered, T_map_cam = registered.copy(), structure.T_map_cam.copy()
        registered[list(found)] = True
        T_map_cam[list(found)] = np.stack(list(found.values()))
        pairs = agreeing_with(T_map_cam, shots, registered, comparisons.matches)
        more = _structure(shots, T_map_cam, registered, pairs)
        structure = refined(replace(more, cameras=structure.cameras), ROUGH[1:], calibration)
    return structure, registered


class Comparisons:
    """Which images were compared, and what came of it.

    S: similarities [N, N]; matches and pairs by i < j.
    """

    def __init__(self, decoder: PairDecoder, S: np.ndarray, mapped: Mapped) -> None:
        self.S = S
        self.matches: dict[tuple[int, int], Matches] = {}
        self.pairs: dict[tuple[int, int], PairGeometry] = {}
        self._decoder, self._mapped = decoder, mapped

    def match(self, wanted: np.ndarray) -> int:
        """Compare pairs i < j [P, 2]; returns how many are new."""
        new = [edge for edge in map(tuple, wanted.tolist()) if edge not in self.matches]
        for edge, (matches, pair) in zip(new, self._mapped(self._compared, new), strict=True):
            self.matches[edge] = matches
            if pair is not None:
                self.pairs[edge] = pair
        return len(new)

    def _compared(self, edge: tuple[int, int]) -> tuple[Matches, PairGeometry | None]:
        matches = self._decoder.match(*edge)
        return matches, self._decoder.decode(*edge, matches)


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


def _structure(shots: Sequence[Shot], T_map_cam: np.ndarray, registered: np.ndarray, pairs: Pairs
               ) -> Structure:
    tracks = tracks_of(shots, pairs.values())
    tracks = tracks.select(registered[tracks.image])
    return triangulated(Structure(T_map_cam, [shot.camera for shot in shots], tracks,
                                  np.zeros((tracks.count, 3)), np.zeros(0)))


def _reasons(registered: np.ndarray, part: set[int]) -> list[str]:
    return ['' if done else 'TOO_FEW_SHARED' if image in part else 'NO_OVERLAP'
            for image, done in enumerate(registered)]
