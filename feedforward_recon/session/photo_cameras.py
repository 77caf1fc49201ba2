"""Cameras of photos: which one is assumed, and what of it may be refined."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from feedforward_recon.config.photos import PhotoConfig
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


def guessed_camera(size_wh: tuple[int, int]) -> Camera:
    """The camera that is assumed of a photo: a focal length as long as its longer side."""
    width, _ = size_wh
    return Camera.from_fov(float(np.rad2deg(2 * np.arctan(0.5 * width / max(size_wh)))), size_wh)


def open_calibration(shots: Sequence[Shot]) -> tuple[str, ...]:
    """What of the cameras may be refined, as in ``geometry.refine``: of one that took all images.

    The focal length and radial distortion of one that was guessed, or of which EXIF tells the
    focal length; else radial distortion, of one that is said to have none.
    """
    cameras = {shot.camera for shot in shots}
    camera = shots[0].camera
    if len(cameras) > 1 or camera.is_distorted or camera.model != 'plumb_bob':
        return ()
    return ('radial',) if shots[0].camera_source == 'given' else ('focal', 'radial')


def camera_source_of(shots: Sequence[Shot], config: PhotoConfig) -> str:
    """As in ``SceneMap``; of several, that which is known least."""
    if config.reconstruction.refine and 'focal' in open_calibration(shots):
        return 'refined'
    sources = {shot.camera_source for shot in shots}
    return next(source for source in ('guessed', 'exif', 'given') if source in sources)


def _median(cameras: Sequence[Camera]) -> Camera:
    return sorted(cameras, key=lambda camera: camera.fx)[(len(cameras) - 1) // 2]
