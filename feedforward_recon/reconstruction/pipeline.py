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
from feedforward_recon.reconstruction.comparisons import Comparisons, Mapped, compared
from feedforward_recon.reconstruction.completion import MIN_OBSERVATIONS, completed, with_blurred
from feedforward_recon.reconstruction.pairs import PairDecoder
from feedforward_recon.reconstruction.parts import part_of, seen_by
from feedforward_recon.reconstruction.refinement import FINE, Structure, refined, sharpened
from feedforward_recon.reconstruction.scene_graph import Tree
from feedforward_recon.reconstruction.shots import Shot


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
    """The largest part of the images that pairs connect, and what is found beside it."""
    part = part_of(shots, comparisons, np.ones(len(shots), bool), config, calibration)
    structure, registered = part.structure, part.registered
    if config.refine and len(structure.tracks):
        structure, registered = completed(part, shots, comparisons, calibration, config)
        structure = refined(sharpened(structure, [shot.gray for shot in shots]), FINE,
                            calibration)
        registered = registered & (structure.tracks.views(len(shots)) >= MIN_OBSERVATIONS)
        structure, registered = with_blurred(seen_by(structure, registered), shots, registered,
                                              comparisons, config.seed)
    return Reconstructed(registered, _reasons(registered, part.connected), structure, part.tree,
                         part.unrefined)


def _reasons(registered: np.ndarray, part: set[int]) -> list[str]:
    return ['' if done else 'TOO_FEW_SHARED' if image in part else 'NO_OVERLAP'
            for image, done in enumerate(registered)]
