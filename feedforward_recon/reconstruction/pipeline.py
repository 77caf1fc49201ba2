"""``reconstruct``: unordered images to poses, points and a lens, in one linear pass.

    features of each image -> pairs of similar images -> rotations that agree with all pairs
        -> a tree from the most central image -> poses along it -> tracks
        -> triangulation, adjustment, tracks anew of all matches that agree with the poses,
           adjustment, patches aligned, adjustment

Light3R-SfM's way (retrieval, shortest-path tree, pairs, accumulation), and what it leaves open:
refinement at tight thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.model.seconds import Seconds
from feedforward_recon.reconstruction.comparisons import Mapped, compared
from feedforward_recon.reconstruction.completion import (
    MIN_OBSERVATIONS,
    MIN_PART,
    completed,
    with_blurred,
)
from feedforward_recon.reconstruction.pairs import PairDecoder
from feedforward_recon.reconstruction.parts import Part, PhotoSet, part_of, seen_by
from feedforward_recon.reconstruction.refinement import FINE, Structure, refined, sharpened
from feedforward_recon.reconstruction.shots import Shot


@dataclass(frozen=True)
class Reconstructed:
    """What was made of N images.

    registered: bool [N]; reasons: why the others are not, '' for those that are. structure: poses,
    cameras and points. part: what it started from.
    """

    registered: np.ndarray
    reasons: list[str]
    structure: Structure
    part: Part


def reconstruct(shots: Sequence[Shot], decoder: PairDecoder, config: ReconstructionConfig,
                calibration: tuple[str, ...] = (), comparing: Mapped = map,
                rolling: Mapped = map, seconds: Seconds | None = None) -> list[Reconstructed]:
    """Reconstruct encoded images; calibration: as in ``PhotoSet``; others: as ``Comparisons``.

    Images that nothing connects with the others have a reconstruction of their own; the largest
    is the first. seconds: those of pairs and refinement are added.
    """
    seconds = seconds or Seconds()
    with seconds.of('pairs'):
        comparisons = compared(shots, decoder, config, comparing, rolling)
    with seconds.of('refinement'):
        return assembled(PhotoSet(shots, comparisons, config, calibration))


def assembled(photos: PhotoSet) -> list[Reconstructed]:
    """One reconstruction after the other, of what the ones before it left."""
    done = [_assembled(photos, np.ones(len(photos), bool))]
    left = ~done[0].registered
    while left.sum() >= MIN_PART:
        another = _assembled(photos, left)
        if another.registered.sum() < MIN_PART:
            break
        done.append(another)
        left = left & ~another.registered
    return sorted(done, key=lambda one: -one.registered.sum())


def _assembled(photos: PhotoSet, among: np.ndarray) -> Reconstructed:
    """The largest part of some images [N], and what is found beside it."""
    part = part_of(photos, among)
    structure, registered = part.structure, part.registered
    if photos.config.refine and len(structure.tracks):
        structure, registered = completed(photos, part, among)
        structure = refined(sharpened(structure, [shot.gray for shot in photos.shots]), FINE,
                            photos.calibration)
        registered = registered & (structure.tracks.views(len(photos)) >= MIN_OBSERVATIONS)
        structure, registered = with_blurred(photos, seen_by(structure, registered), registered,
                                             among)
    return Reconstructed(registered, _reasons(registered, part.connected), structure, part)


def _reasons(registered: np.ndarray, part: set[int]) -> list[str]:
    return ['' if done else 'TOO_FEW_SHARED' if image in part else 'NO_OVERLAP'
            for image, done in enumerate(registered)]
