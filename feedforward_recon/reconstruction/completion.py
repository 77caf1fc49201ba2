"""What pairs alone could not place is added to a structure: by its points.

Other parts are placed as a whole, then images one by one. A pair of images that show little but a
plane allows two motions; what many images say together decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.reconstruction.comparisons import Comparisons
from feedforward_recon.reconstruction.parts import Part, part_of, seen_by, structure_of
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


def completed(part: Part, shots: Sequence[Shot], comparisons: Comparisons,
               calibration: tuple[str, ...], config: ReconstructionConfig
               ) -> tuple[Structure, np.ndarray]:
    """The structure with what its points can place: other parts as a whole, single images.

    Those that are not found are compared with more of the registered ones.
    """
    structure, registered = part.structure, part.registered
    while not registered.all():
        found = _placed(structure, shots, registered, comparisons, calibration, config)
        larger, kept = _extended(structure, found, shots, registered, comparisons, calibration,
                                 config)
        if kept.sum() > registered.sum():
            structure, registered = larger, kept
            continue
        comparisons.roll(np.flatnonzero(~registered))
        if not _compared_more(comparisons, np.flatnonzero(~registered), registered, config):
            break
    return structure, registered


def with_blurred(structure: Structure, shots: Sequence[Shot], registered: np.ndarray,
                  comparisons: Comparisons, seed: int) -> tuple[Structure, np.ndarray]:
    """The structure with images whose patches cannot be aligned; they move no point."""
    found = placed_by_points(structure, shots, registered, comparisons.matches, seed)
    registered = registered.copy()
    registered[list(found)] = True
    return with_placed(structure, found, shots), registered


def _extended(structure: Structure, found: dict[int, np.ndarray], shots: Sequence[Shot],
              registered: np.ndarray, comparisons: Comparisons, calibration: tuple[str, ...],
              config: ReconstructionConfig) -> tuple[Structure, np.ndarray]:
    """The structure with images that were found, and which then have enough observations."""
    if not found:
        return structure, registered
    _compared_more(comparisons, np.array(sorted(found)), registered, config)
    registered, T_map_cam = registered.copy(), structure.T_map_cam.copy()
    registered[list(found)] = True
    T_map_cam[list(found)] = np.stack(list(found.values()))
    seen = [shot.seen_by(camera) for shot, camera in zip(shots, structure.cameras, strict=True)]
    pairs = agreeing_with(T_map_cam, seen, registered, comparisons.matches)
    structure = refined(structure_of(seen, T_map_cam, registered, pairs), ROUGH[1:], calibration)
    registered = registered & (structure.tracks.views(len(shots)) >= MIN_OBSERVATIONS)
    return seen_by(structure, registered), registered


def _placed(structure: Structure, shots: Sequence[Shot], registered: np.ndarray,
            comparisons: Comparisons, calibration: tuple[str, ...], config: ReconstructionConfig
            ) -> dict[int, np.ndarray]:
    """Poses of images that are not registered: of the largest part of them, or one by one."""
    other = part_of(shots, comparisons, ~registered, config, calibration)
    if other.registered.sum() >= MIN_PART:
        found = placed_together(structure, other.structure, shots, registered, other.registered,
                                comparisons.matches, config.seed)
        if found:
            return found
    alone = placed_by_points(structure, shots, registered, comparisons.matches, config.seed)
    return {image: placed.T_map_cam for image, placed in alone.items()}


def _compared_more(comparisons: Comparisons, images: np.ndarray, registered: np.ndarray,
                   config: ReconstructionConfig) -> int:
    """Compare images with the registered ones that are most like them; returns how many pairs."""
    return comparisons.match(pairs_with(comparisons.S, images, np.flatnonzero(registered),
                                        config.bridges))
