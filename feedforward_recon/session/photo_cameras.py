"""Cameras of photos that say less about theirs than others do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.reconstruction.shots import Shot

log = logging.getLogger(__name__)


def like_others(shots: Sequence[Shot]) -> list[Shot]:
    """Shots, of which those with a guessed camera get the one that EXIF names of their size.

    The median one, where it names several; where it names none, they stay as they are.
    """
    named = {size_wh: _median([shot.camera for shot in shots if shot.size_wh == size_wh
                               and shot.camera_source == 'exif'])
             for size_wh in {shot.size_wh for shot in shots if shot.camera_source == 'exif'}}
    lacks = [shot.camera_source == 'guessed' and shot.size_wh in named for shot in shots]
    if any(lacks):
        log.warning('%d of %d photos have no focal length in EXIF; taken to be the median of '
                    'those of their size', sum(lacks), len(shots))
    return [replace(shot.seen_by(named[shot.size_wh]), camera_source='exif') if lack else shot
            for shot, lack in zip(shots, lacks, strict=True)]


def _median(cameras: Sequence[Camera]) -> Camera:
    return sorted(cameras, key=lambda camera: camera.fx)[(len(cameras) - 1) // 2]
