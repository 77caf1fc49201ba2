"""``reconstruct_frames``: unordered photos become a map, as ``map_frames`` makes it of a walk.

run = reconstruct_frames(open_source('photos/', SourceOptions(mixed_sizes=True)))
saved = run.save('maps/church')
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.errors import InputError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.scene_map import Stats
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import CompactEncoder, scaled_down
from feedforward_recon.reconstruction.comparisons import Mapped
from feedforward_recon.reconstruction.pairs import CompactPairs
from feedforward_recon.reconstruction.pipeline import Reconstructed, reconstruct
from feedforward_recon.reconstruction.scene import growing_map, scene_map
from feedforward_recon.reconstruction.shots import (
    EncodedImage,
    Photo,
    Shot,
    encoded_image,
    taken_by,
)
from feedforward_recon.session.engines import threads
from feedforward_recon.session.offline import Progress, ProgressBar, Run, quiet
from feedforward_recon.session.partial import PartialWork
from feedforward_recon.types import Frame, Trajectory

AT_ONCE = 64  # images that are in memory with their colours
# A guessed focal length that changes by less (its logarithm) was good enough; times that all is
# done, at most.
CLOSE, ATTEMPTS = 0.05, 3


def reconstruct_frames(frames: Iterable[Frame], config: PhotoConfig | None = None,
                       encoder: Encoder | None = None, *, engine: Mapped | None = None,
                       work: PartialWork | None = None, total: int = 0,
                       progress: Progress = quiet) -> Run:
    """Reconstruct images in any order, and write the scene memory.

    engine: where images are encoded and compared (``session.engines``); default: threads, as many
    as there are cores. work: where what is worked out is kept for a run that goes on with it;
    default: nowhere. total: how many images there are, for the progress.
    Raises InputError for an image that cannot be used, for workers that die, and where ``work``
    cannot be written, MapError where no images show the same.
    """
    config = config or PhotoConfig()
    encoder = encoder or CompactEncoder.load(config=config.encoder)
    started = time.perf_counter()
    if work is not None:
        work.begin(config, encoder)
    with nullcontext(engine) if engine else threads() as running:
        reading = _Reading(frames)
        with progress('features', total) as bar:
            shots, photos, truth = _encoded(reading, encoder, config.encoder.max_pixels,
                                            work.images(running) if work else running, bar)
        if len(shots) < 2:
            found = f'{len(photos)}' if len(photos) < 2 else f'{len(photos)} copies of one'
            raise InputError(f'expected at least two different images, found {found}; one alone '
                             'has no depth: give more views of the same place')
        with progress('pairs', 0) as bar:
            shots, done = _reconstructed(shots, config, lambda shots: _counting(
                work.pairs(running, shots) if work else running, bar))
    if done.registered.sum() < 2 or not len(done.structure.tracks):
        raise MapError('expected images that show the same place from different sides, found none '
                       f'among {len(shots)}; take them closer together')
    map_ = growing_map(done, shots, config.mapper)
    scene = scene_map(map_, done, photos, _camera_source(shots, config))
    writer = MemoryWriter(config.memory, encoder.dim)
    for keyframe in scene.keyframes:
        writer.write(keyframe)
    mapped = time.perf_counter()
    memory = writer.snapshot()
    return Run(scene, writer, memory, Stats(len(photos), len(scene.keyframes)),
               Trajectory.of(truth), mapped - started - reading.seconds, reading.seconds,
               time.perf_counter() - mapped, encoder, config.mapper)


def _reconstructed(shots: list[Shot], config: PhotoConfig,
                   comparing: Callable[[list[Shot]], Mapped]) -> tuple[list[Shot], Reconstructed]:
    """The reconstruction, and the images as they were seen in it.

    comparing: what compares pairs of some shots.
    Where the focal length was guessed far off, all is done again with the one that was found:
    motions of pairs are as wrong as it was.
    """
    for attempt in range(ATTEMPTS):
        calibration = open_calibration(shots)
        decoder = CompactPairs([shot.without_pixels() for shot in shots],
                               config.reconstruction.seed)
        done = reconstruct(shots, decoder, config.reconstruction, calibration, comparing(shots))
        scale = done.structure.cameras[0].fx / shots[0].camera.fx
        if 'focal' not in calibration or abs(np.log(scale)) < CLOSE or attempt + 1 == ATTEMPTS:
            break
        shots = [shot.seen_by(shot.camera.with_lens(scale, 0.0)) for shot in shots]
    return shots, done


def guessed_camera(size_wh: tuple[int, int]) -> Camera:
    """The camera that is assumed of a photo: a focal length as long as its longer side."""
    width, _ = size_wh
    return Camera.from_fov(float(np.rad2deg(2 * np.arctan(0.5 * width / max(size_wh)))), size_wh)


def open_calibration(shots: Sequence[Shot]) -> tuple[str, ...]:
    """What of the cameras may be refined, as in ``geometry.refine``: of one that took all images.

    The focal length and radial distortion of a guessed one; else radial distortion, of one that
    is said to have none.
    """
    cameras = {shot.camera for shot in shots}
    camera = shots[0].camera
    if len(cameras) > 1 or camera.is_distorted or camera.model != 'plumb_bob':
        return ()
    return ('focal', 'radial') if shots[0].is_guessed else ('radial',)


def _camera_source(shots: Sequence[Shot], config: PhotoConfig) -> str:
    """As in ``SceneMap``; 'guessed' as soon as one camera is."""
    if not any(shot.is_guessed for shot in shots):
        return 'given'
    found = config.reconstruction.refine and 'focal' in open_calibration(shots)
    return 'refined' if found else 'guessed'


def _encoded(frames: Iterable[Frame], encoder: Encoder, max_pixels: int, engine: Mapped,
             bar: ProgressBar) -> tuple[list[Shot], list[Photo], list[tuple[int, Any]]]:
    """Different frames as shots, all frames, and the stamped poses that came with them."""
    shots: list[Shot] = []
    photos, truth = [], []
    known: dict[str, int] = {}
    encode = partial(_encode, encoder)
    for batch in _batches(frames, AT_ONCE):
        truth += [(f.stamp_ns, f.T_map_cam) for f in batch if f.T_map_cam is not None]
        new: dict[str, Frame] = {}
        for frame in batch:
            content = _content(frame.image)
            if content not in known:
                known[content] = len(known)
                new[content] = frame
            photos.append(Photo(frame.stamp_ns, frame.source, known[content]))
        images = [(content, scaled_down(frame.image, max_pixels))
                  for content, frame in new.items()]
        shots += map(_shot, new.values(), new, engine(encode, images))
        for _ in batch:
            bar.advance()
    return shots, photos, truth


def _content(image: np.ndarray) -> str:
    """A name for the pixels of an image."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _encode(encoder: Encoder, named: tuple[str, np.ndarray]) -> EncodedImage:
    return encoded_image(named[1], encoder)


def _shot(frame: Frame, content: str, image: EncodedImage) -> Shot:
    height, width = frame.image.shape[:2]
    return taken_by(frame.camera or guessed_camera((width, height)), image, frame, content,
                    is_guessed=frame.camera is None)


class _Reading:
    """Frames, and how long they were waited for."""

    def __init__(self, frames: Iterable[Frame]) -> None:
        self._frames, self.seconds = frames, 0.0

    def __iter__(self) -> Iterator[Frame]:
        remaining = iter(self._frames)
        while True:
            before = time.perf_counter()
            frame = next(remaining, None)
            self.seconds += time.perf_counter() - before
            if frame is None:
                return
            yield frame


def _batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    remaining = iter(frames)
    while batch := list(islice(remaining, size)):
        yield batch


def _counting(mapped: Callable, bar: ProgressBar) -> Callable:
    def counted(function: Callable, items: Iterable) -> Iterator:
        for result in mapped(function, items):
            bar.advance()
            yield result

    return counted
