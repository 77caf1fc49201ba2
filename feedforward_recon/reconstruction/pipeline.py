"""``reconstruct``: unordered images to poses, points and a lens, in one linear pass.

    features of each image -> pairs of similar images -> rotations that agree with all pairs
        -> a tree from the most central image -> poses along it -> tracks
        -> triangulation, adjustment, patches aligned, adjustment

Light3R-SfM's way (retrieval, shortest-path tree, pairs, accumulation), and what it leaves open:
refinement at tight thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.reconstruction.accumulation import accumulate
from feedforward_recon.reconstruction.agreement import agreeing
from feedforward_recon.reconstruction.comparisons import (
    Comparisons,
    Mapped,
    compared,
    edges_of,
    largest_part,
)
from feedforward_recon.reconstruction.pairs import PairDecoder, Pairs
from feedforward_recon.reconstruction.refinement import (
    FINE,
    ROUGH,
    Structure,
    near,
    refined,
    sharpened,
    triangulated,
    with_tracks,
)
from feedforward_recon.reconstruction.registration import agreeing_with, placed_by_points
from feedforward_recon.reconstruction.retrieval import pairs_with
from feedforward_recon.reconstruction.scene_graph import COSTS, TREES, Tree
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.reconstruction.tracks import tracks_of

# An image of whose observations fewer agree with its pose is placed anew, by the points of others.
WEAK_SHARE = 0.4
# Fewer that agree in the end do not vouch for a pose.
MIN_OBSERVATIONS = 15


@dataclass(frozen=True)
class Reconstructed:
    """What was made of N images.

    registered: bool [N]; reasons: why the others are not, '' for those that are. structure: poses,
    cameras and points. tree: along which they were put together. unrefined: poses [N, 4, 4] as
    accumulated.
    """

    registered: np.ndarray
    reasons: list[str]
    structure: Structure
    tree: Tree
    unrefined: np.ndarray


def reconstruct(shots: Sequence[Shot], decoder: PairDecoder, config: ReconstructionConfig,
                calibration: tuple[str, ...] = (), mapped: Mapped = map) -> Reconstructed:
    """Reconstruct encoded images.

    calibration: what of the cameras is refined, as in ``geometry.refine``.
    """
    return assembled(shots, compared(shots, decoder, config, mapped), config, calibration)


def assembled(shots: Sequence[Shot], comparisons: Comparisons, config: ReconstructionConfig,
              calibration: tuple[str, ...] = ()) -> Reconstructed:
    """The largest part of the images that pairs connect."""
    part = largest_part(len(shots), comparisons.pairs)
    pairs = agreeing(shots, {edge: pair for edge, pair in comparisons.pairs.items()
                              if edge[0] in part})
    part = largest_part(len(shots), pairs)
    tree = _tree(comparisons.S, pairs, sorted(part), config)
    placed = accumulate(shots, pairs, int(tree.order[0]), tree.edges)
    registered = placed.registered
    structure = _structure(shots, placed.T_map_cam, registered, pairs)
    if config.refine and len(structure.tracks):
        structure, registered = _refined(structure, shots, registered, comparisons, calibration,
                                         config)
    else:
        structure = near(structure, ROUGH[0].limit_px)
    return Reconstructed(registered, _reasons(registered, part), structure, tree,
                         placed.T_map_cam)


def _refined(structure: Structure, shots: Sequence[Shot], registered: np.ndarray,
             comparisons: Comparisons, calibration: tuple[str, ...], config: ReconstructionConfig
             ) -> tuple[Structure, np.ndarray]:
    """Poses and points that agree, and which images have enough of them."""
    before = structure.tracks.views(len(shots))
    structure = refined(structure, ROUGH, calibration)
    registered = registered & (structure.tracks.views(len(shots)) > WEAK_SHARE * before)
    structure, registered = _completed(_seen_by(structure, registered), shots, registered,
                                       comparisons, calibration, config)
    structure = refined(sharpened(structure, [shot.gray for shot in shots]), FINE, calibration)
    registered = registered & (structure.tracks.views(len(shots)) >= MIN_OBSERVATIONS)
    return _seen_by(structure, registered), registered


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
            comparisons.roll(missing)
            if comparisons.match(pairs_with(comparisons.S, missing, there, config.bridges)):
                continue
            break
        registered, T_map_cam = registered.copy(), structure.T_map_cam.copy()
        registered[list(found)] = True
        T_map_cam[list(found)] = np.stack(list(found.values()))
        seen = [shot.seen_by(camera) for shot, camera in
                zip(shots, structure.cameras, strict=True)]
        pairs = agreeing_with(T_map_cam, seen, registered, comparisons.matches)
        structure = refined(_structure(seen, T_map_cam, registered, pairs), ROUGH[1:],
                            calibration)
    return structure, registered


def _tree(S: np.ndarray, pairs: Pairs, part: list[int], config: ReconstructionConfig) -> Tree:
    """The tree from the image that is most similar to all others of its part."""
    edges = edges_of(pairs)
    root = part[int(np.argmax(S[np.ix_(part, part)].sum(1)))]
    return TREES[config.tree](len(S), edges, COSTS[config.cost](S[edges[:, 0], edges[:, 1]]),
                              root)


def _structure(shots: Sequence[Shot], T_map_cam: np.ndarray, registered: np.ndarray, pairs: Pairs
               ) -> Structure:
    tracks = tracks_of(shots, pairs.values())
    tracks = tracks.select(registered[tracks.image])
    return triangulated(T_map_cam, [shot.camera for shot in shots], tracks)


def _seen_by(structure: Structure, registered: np.ndarray) -> Structure:
    """The structure with what registered images see of it alone."""
    tracks = structure.tracks
    return with_tracks(structure, tracks.select(registered[tracks.image]))


def _reasons(registered: np.ndarray, part: set[int]) -> list[str]:
    return ['' if done else 'TOO_FEW_SHARED' if image in part else 'NO_OVERLAP'
            for image, done in enumerate(registered)]
