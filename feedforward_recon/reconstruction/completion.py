"""What pairs alone could not place is added to a structure: by its points.

Other parts are placed as a whole, then images one by one. A pair of images that show little but a
plane allows two motions; what many images say together decides. So do the poses, once they are
refined, of which matches belong to a track.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from feedforward_recon.reconstruction.pairs import Edge, PairGeometry, Pairs
from feedforward_recon.reconstruction.parts import (
    Part,
    PhotoSet,
    part_of,
    seen_by,
    structure_of,
)
from feedforward_recon.reconstruction.refinement import ROUGH, Structure, refined
from feedforward_recon.reconstruction.registration import (
    agreeing_with,
    placed_by_points,
    placed_together,
    with_placed,
)
from feedforward_recon.reconstruction.retrieval import pairs_with
from feedforward_recon.reconstruction.shots import Shot

# Fewer that agree in the end do not vouch for a pose.
MIN_OBSERVATIONS = 15
MIN_PART = 3  # images that are placed together
MIN_CROSSING = 2  # pairs that agree with how they were placed
ASKED = 10  # images that are compared with a part, for each one of it


def completed(photos: PhotoSet, part: Part, among: np.ndarray) -> tuple[Structure, np.ndarray]:
    """What a part shows, and which of some images [N] have a pose, with those its points place.

    Images that are not found are compared with more of the registered ones. Tracks are made anew.
    """
    structure, registered = part.structure, part.registered
    while (missing := among & ~registered).any():
        found = _found(photos, structure, registered, missing)
        larger, kept = _extended(photos, structure, registered, found)
        if kept.sum() > registered.sum():
            structure, registered = larger, kept
            continue
        photos.comparisons.roll(np.flatnonzero(missing))
        if not _compared_more(photos, np.flatnonzero(missing), registered):
            break
    if structure is part.structure:  # else its tracks have been made anew with what was added
        return _retraced(photos, structure, registered)
    return structure, registered


def with_blurred(photos: PhotoSet, structure: Structure, registered: np.ndarray,
                 among: np.ndarray) -> tuple[Structure, np.ndarray]:
    """The structure with images whose patches cannot be aligned; they move no point."""
    found = placed_by_points(structure, photos.shots, registered, among & ~registered,
                             photos.comparisons.matches, photos.config.seed)
    registered = registered.copy()
    registered[list(found)] = True
    return with_placed(structure, found, photos.shots), registered


def _found(photos: PhotoSet, structure: Structure, registered: np.ndarray, missing: np.ndarray
           ) -> dict[int, np.ndarray]:
    """Poses of missing images [N]: of the largest part of them together, or one by one."""
    shots, matches, seed = photos.shots, photos.comparisons.matches, photos.config.seed
    other = part_of(photos, missing)
    if other.registered.sum() >= MIN_PART:
        together = placed_together(structure, other.structure, shots, registered,
                                   other.registered, matches, seed)
        if together:
            return together
    alone = placed_by_points(structure, shots, registered, missing, matches, seed)
    return {image: placed.T_map_cam for image, placed in alone.items()}


def _extended(photos: PhotoSet, structure: Structure, registered: np.ndarray,
              found: dict[int, np.ndarray]) -> tuple[Structure, np.ndarray]:
    """The structure with images that were found, and which then have enough observations."""
    if not found:
        return structure, registered
    _compared_more(photos, np.array(sorted(found)), registered)
    before, registered = registered, registered.copy()
    T_map_cam = structure.T_map_cam.copy()
    registered[list(found)] = True
    T_map_cam[list(found)] = np.stack(list(found.values()))
    larger = replace(structure, T_map_cam=T_map_cam)
    seen, pairs = _agreeing(photos, larger, registered)
    if _crossing(pairs, found) < min(MIN_CROSSING, len(found)):
        return structure, before
    return _with_pairs(photos, larger, registered, seen, pairs)


def _retraced(photos: PhotoSet, structure: Structure, registered: np.ndarray
              ) -> tuple[Structure, np.ndarray]:
    """The structure of all matches that agree with its poses, and who is registered then.

    The tracks before are of what agreed with the motion of one pair, which is known less well.
    Where an image that saw enough would be lost, all stays as it was.
    """
    enough = registered & (structure.tracks.views(len(photos)) >= MIN_OBSERVATIONS)
    anew, kept = _with_pairs(photos, structure, registered,
                             *_agreeing(photos, structure, registered))
    return (anew, kept) if kept[enough].all() else (structure, registered)


def _agreeing(photos: PhotoSet, structure: Structure, registered: np.ndarray
              ) -> tuple[list[Shot], dict[Edge, PairGeometry]]:
    """The images as refined cameras see them, and pairs with the matches that agree with poses."""
    seen = [shot.seen_by(camera) if known else shot for shot, camera, known in
            zip(photos.shots, structure.cameras, registered, strict=True)]
    return seen, agreeing_with(structure.T_map_cam, seen, registered, photos.comparisons.matches)


def _with_pairs(photos: PhotoSet, structure: Structure, registered: np.ndarray,
                seen: Sequence[Shot], pairs: Pairs) -> tuple[Structure, np.ndarray]:
    """The structure of tracks of these pairs, refined; images that see little of it are out."""
    structure = refined(structure_of(seen, structure.T_map_cam, registered, pairs), ROUGH[1:],
                        photos.calibration)
    registered = registered & (structure.tracks.views(len(photos)) >= MIN_OBSERVATIONS)
    return seen_by(structure, registered), registered


def _crossing(pairs: Pairs, found: Collection[int]) -> int:
    """How many pairs connect images that were found with others."""
    return sum((i in found) != (j in found) for i, j in pairs)


def _compared_more(photos: PhotoSet, images: np.ndarray, registered: np.ndarray) -> int:
    """Compare images with the registered ones that are most like them; returns how many pairs.

    A small part asks few of many others: so that thousands of small parts are no more work.
    """
    comparisons, others = photos.comparisons, np.flatnonzero(registered)
    few = ASKED * len(others)
    if len(images) > few:
        pairs, alike = comparisons.similar.nearest(images, others, 1)
        images = np.sort(pairs[np.argsort(-alike, kind='stable')[:few], 0])
    return comparisons.match(pairs_with(comparisons.similar, images, others,
                                        photos.config.bridges))
