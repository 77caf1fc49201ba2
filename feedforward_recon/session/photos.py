"""``reconstruct_frames``: unordered photos become a map, as ``map_frames`` makes it of a walk.

run = reconstruct_frames(open_source('photos/', SourceOptions(mixed_sizes=True, use_exif=True)))
saved = run.save('maps/church')
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.errors import InputError, MapError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.mapping.scene_map import Stats
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.model.collection import CollectionNetwork
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.predictor import NetworkPredictor
from feedforward_recon.model.preprocess import PreparedImage
from feedforward_recon.reconstruction.comparisons import Mapped
from feedforward_recon.reconstruction.decoders import pair_decoder, pair_network
from feedforward_recon.reconstruction.pipeline import Reconstructed, reconstruct
from feedforward_recon.reconstruction.scene import growing_map, scene_map
from feedforward_recon.reconstruction.shots import Photo, Shot, shot_of
from feedforward_recon.session.offline import Progress, ProgressBar, Run, quiet
from feedforward_recon.session.photo_cameras import like_others
from feedforward_recon.types import Frame, Trajectory

AT_ONCE = 64  # images that are in memory with their colours
# A guessed focal length that changes by less (its logarithm) was good enough; times that all is
# done, at most.
CLOSE, ATTEMPTS = 0.05, 3


def reconstruct_frames(frames: Iterable[Frame], config: PhotoConfig | None = None,
                       encoder: CompactEncoder | None = None, *,
                       predictor: NetworkPredictor | None = None, workers: int = 0,
                       total: int = 0, progress: Progress = quiet) -> Run:
    """Reconstruct images in any order, and write the scene memory.

    predictor: the network of ``reconstruction.decoder`` transformer.
    workers: images and pairs that are worked on at once; 0: as many as there are cores. total: how
    many images there are, for the progress.
    Raises InputError for an image that cannot be used, MapError where no images show the same,
    ConfigError or CheckpointError for a network that does not do what the settings say.
    """
    config = config or PhotoConfig()
    network = pair_network(config.reconstruction, predictor)
    encoder = encoder or CompactEncoder.load(config=config.encoder)
    started = time.perf_counter()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        reading = _Reading(frames)
        with progress('features', total) as bar:
            shots, photos, truth = _encoded(reading, encoder, config.encoder.max_pixels, pool,
                                             bar, network.prepared if network else None)
        if len(shots) < 2:
            found = f'{len(photos)}' if len(photos) < 2 else f'{len(photos)} copies of one'
            raise InputError(f'expected at least two different images, found {found}; one alone '
                             'has no depth: give more views of the same place')
        with progress('pairs', 0) as bar:
            # A network takes all cores itself.
            at_once = _counting(map if network else pool.map, bar)
            shots, done = _reconstructed(shots, config, encoder, at_once, network)
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


def _reconstructed(shots: list[Shot], config: PhotoConfig, encoder: CompactEncoder,
                   mapped: Mapped, network: CollectionNetwork | None
                   ) -> tuple[list[Shot], Reconstructed]:
    """The reconstruction, and the images as they were seen in it.

    Where the focal length was guessed far off, all is done again with the one that was found:
    motions of pairs are as wrong as it was.
    """
    collection = network.collected([shot.prepared for shot in shots if shot.prepared]
                                   ) if network else None
    for attempt in range(ATTEMPTS):
        calibration = open_calibration(shots)
        decoder = pair_decoder(shots, encoder, config.reconstruction, collection)
        done = reconstruct(shots, decoder,
                           config.reconstruction, calibration, mapped)
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

    The focal length and radial distortion of one that was guessed, or of which EXIF tells the
    focal length; else radial distortion, of one that is said to have none.
    """
    cameras = {shot.camera for shot in shots}
    camera = shots[0].camera
    if len(cameras) > 1 or camera.is_distorted or camera.model != 'plumb_bob':
        return ()
    return ('radial',) if shots[0].camera_source == 'given' else ('focal', 'radial')


def _camera_source(shots: Sequence[Shot], config: PhotoConfig) -> str:
    """As in ``SceneMap``; of several, that which is known least."""
    if config.reconstruction.refine and 'focal' in open_calibration(shots):
        return 'refined'
    sources = {shot.camera_source for shot in shots}
    return next(source for source in ('guessed', 'exif', 'given') if source in sources)


def _encoded(frames: Iterable[Frame], encoder: Encoder, max_pixels: int,
             pool: ThreadPoolExecutor, bar: ProgressBar,
             prepare: Callable[[np.ndarray], PreparedImage] | None
             ) -> tuple[list[Shot], list[Photo], list[tuple[int, Any]]]:
    """Different frames as shots, all frames, and the stamped poses that came with them."""
    def shot(frame: Frame) -> Shot:
        height, width = frame.image.shape[:2]
        return shot_of(frame, frame.camera or guessed_camera((width, height)), encoder, max_pixels,
                       camera_source=frame.camera_source if frame.camera else 'guessed',
                       prepare=prepare)

    shots, photos, truth = [], [], []
    known: dict[bytes, int] = {}
    image, content = None, b''
    for batch in _batches(frames, AT_ONCE):
        truth += [(f.stamp_ns, f.T_map_cam) for f in batch if f.T_map_cam is not None]
        new = []
        for frame in batch:
            if frame.image is not image:  # links to one file share it
                image = frame.image
                content = hashlib.sha256(image.tobytes()).digest()
            if content not in known:
                known[content] = len(known)
                new.append(frame)
            photos.append(Photo(frame.stamp_ns, frame.source, known[content]))
        shots += list(pool.map(shot, new))
        for _ in batch:
            bar.advance()
    return like_others(shots), photos, truth


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
        for batch in mapped(function, items):
            for _ in batch:
                bar.advance()
            yield batch

    return counted
