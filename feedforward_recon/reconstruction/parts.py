"""``Part``: images that pairs connect, put together along a tree and roughly refined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.reconstruction.accumulation import accumulate
from feedforward_recon.reconstruction.agreement import agreeing
from feedforward_recon.reconstruction.comparisons import Comparisons, edges_of, largest_part
from feedforward_recon.reconstruction.pairs import Pairs
from feedforward_recon.reconstruction.refinement import (
    ROUGH,
    Structure,
    near,
    refined,
    triangulated,
    with_tracks,
)
from feedforward_recon.reconstruction.scene_graph import COSTS, TREES, Tree
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.reconstruction.tracks import tracks_of

# An image of whose observations fewer agree with its pose is placed anew, by the points of others.
WEAK_SHARE = 0.4


@dataclass(frozen=True)
class PhotoSet:
    """Images that were compared, and how they are reconstructed.

    calibration: what of their cameras is refined, as in ``geometry.refine``.
    """

    shots: Sequence[Shot]
    comparisons: Comparisons
    config: ReconstructionConfig
    calibration: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.shots)


@dataclass(frozen=True)
class Part:
    """Images that pairs connect, on their own.

    registered: bool [N], which have a pose. structure: what they show. connected: images that
    pairs connect. tree: along which they were put together. accumulated: poses [N, 4, 4] from
    that alone.
    """

    registered: np.ndarray
    structure: Structure
    connected: set[int]
    tree: Tree
    accumulated: np.ndarray


def part_of(photos: PhotoSet, among: np.ndarray) -> Part:
    """The largest part of some images [N] that pairs connect, roughly refined."""
    shots = photos.shots
    pairs = {(i, j): pair for (i, j), pair in photos.comparisons.pairs.items()
             if among[i] and among[j]}
    connected = _largest(among, pairs)
    pairs = agreeing(shots, {edge: pair for edge, pair in pairs.items() if edge[0] in connected})
    connected = _largest(among, pairs)
    tree = _tree(photos, pairs, np.array(sorted(connected)))
    placed = accumulate(shots, pairs, int(tree.order[0]), tree.edges,
                        photos.config.accumulation)
    registered = placed.registered
    structure = structure_of(shots, placed.T_map_cam, registered, pairs)
    if photos.config.refine and len(structure.tracks):
        before = structure.tracks.views(len(shots))
        structure = refined(structure, ROUGH, photos.calibration)
        registered = registered & (structure.tracks.views(len(shots)) > WEAK_SHARE * before)
        structure = seen_by(structure, registered)
    else:
        structure = near(structure, ROUGH[0].limit_px)
    return Part(registered, structure, connected, tree, placed.T_map_cam)


def _largest(among: np.ndarray, pairs: Pairs) -> set[int]:
    """The most of some images [N] that pairs connect; one of them, where there are no pairs."""
    if not pairs:
        return {int(np.argmax(among))}
    return largest_part(len(among), pairs)


def structure_of(shots: Sequence[Shot], T_map_cam: np.ndarray, registered: np.ndarray, pairs: Pairs
               ) -> Structure:
    """The tracks of pairs of registered images, triangulated."""
    tracks = tracks_of(shots, pairs.values())
    tracks = tracks.select(registered[tracks.image])
    return triangulated(T_map_cam, [shot.camera for shot in shots], tracks)


def seen_by(structure: Structure, registered: np.ndarray) -> Structure:
    """The structure with what registered images see of it alone."""
    tracks = structure.tracks
    return with_tracks(structure, tracks.select(registered[tracks.image]))


def _tree(photos: PhotoSet, pairs: Pairs, part: np.ndarray) -> Tree:
    """The tree from the image that is most similar to all others of its part [n]."""
    similar, config, edges = photos.comparisons.similar, photos.config, edges_of(pairs)
    return TREES[config.tree](len(photos), edges, COSTS[config.cost](similar.of(edges)),
                              similar.central(part))
