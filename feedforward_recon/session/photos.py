"""``reconstruct_frames``: unordered photos become maps, as ``map_frames`` makes one of a walk.

run, *others = reconstruct_frames(open_source('photos/', SourceOptions(mixed_sizes=True)))
saved = run.save('maps/church')
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain

import numpy as np

from feedforward_recon.config.photos import PhotoConfig
from feedforward_recon.errors import InputError, MapError
from feedforward_recon.mapping.scene_map import Stats
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model.collection import Collection, PairNetwork
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.joint import JointNetwork
from feedforward_recon.model.predictor import NetworkPredictor
from feedforward_recon.model.seconds import Seconds
from feedforward_recon.reconstruction.comparisons import Mapped
from feedforward_recon.reconstruction.decoders import pair_decoder, pair_network
from feedforward_recon.reconstruction.pipeline import Reconstructed, reconstruct
from feedforward_recon.reconstruction.scene import growing_map, scene_map
from feedforward_recon.reconstruction.shots import Photo, Shot
from feedforward_recon.session.engines import threads
from feedforward_recon.session.offline import Progress, ProgressBar, Run, quiet
from feedforward_recon.session.partial import PartialWork
from feedforward_recon.session.photo_cameras import camera_source_of, open_calibration
from feedforward_recon.session.photo_reading import PhotosRead, read_photos
from feedforward_recon.types import Frame, Trajectory

log = logging.getLogger(__name__)
# Bytes of main memory: of an image for each feature beside its descriptor; of a pair, with what is
# left of it when rotations agree; of an image while tracks are refined, and of all that was not
# told apart: together what 96 images took more than 24 (docs/experiments.md).
FEATURE, PAIR, REFINED = 40, 60_000, 4_000_000
# A guessed focal length that changes by less (its logarithm) was good enough; times that all is
# done, at most.
CLOSE, ATTEMPTS = 0.05, 3


def reconstruct_frames(frames: Iterable[Frame], config: PhotoConfig | None = None,
                       encoder: CompactEncoder | None = None, *,
                       predictor: NetworkPredictor | None = None, engine: Mapped | None = None,
                       work: PartialWork | None = None, total: int = 0,
                       progress: Progress = quiet,
                       say: Callable[[str], None] = log.info) -> list[Run]:
    """Reconstruct images in any order, and write the scene memory.

    Images that nothing connects with the others have a map of their own. The first is the largest,
    and knows why the others are not in it.
    predictor: the network of ``reconstruction.decoder`` transformer. engine: where images are
    encoded and compared (``session.engines``); default: threads, as many as there are cores.
    work: where what is worked out is kept for a run that goes on with it; default: nowhere. total:
    how many images there are, for the progress and for the plan of a joint pass, which is told to
    ``say`` before it begins.
    Raises InputError for an image that cannot be used, for workers that die, and where ``work``
    cannot be written, MapError where no images show the same, ConfigError or CheckpointError for
    a network that does not do what the settings say, ConfigError where one pass over so many
    images would not fit the memory.
    """
    config = config or PhotoConfig()
    encoder = encoder or CompactEncoder.load(config=config.encoder)
    network = pair_network(config.reconstruction, predictor)
    seconds = network.seconds if network else Seconds()
    if isinstance(network, JointNetwork) and total:
        frames = _planned(frames, network, config, encoder.dim, total, say)
    started = time.perf_counter()
    if work is not None:
        work.begin(config, encoder)
    with nullcontext(engine) if engine else threads() as running:
        with progress('features', total) as bar, seconds.of('features'):
            read = read_photos(frames, encoder, config.encoder.max_pixels,
                               work.images(running) if work else running, bar,
                               network.prepared if network else None)
        seconds.add({'features': -read.reading_s, 'reading': read.reading_s})
        _check_enough(read)
        with progress('pairs', 0) as bar:
            shots, parts = _Pairs(config, encoder, running, work, network, bar, seconds
                                  ).reconstructed(read.shots)
    if parts[0].registered.sum() < 2 or not len(parts[0].structure.tracks):
        raise MapError('expected images that show the same place from different sides, found none '
                       f'among {len(shots)}; take them closer together')
    spent = time.perf_counter() - started - read.reading_s
    photos = [read.photos] + [[photo for photo in read.photos if part.registered[photo.shot]]
                              for part in parts[1:]]
    return [_run(done, shots, seen, read, config, encoder, spent, seconds)
            for done, seen in zip(parts, photos, strict=True)]


def _planned(frames: Iterable[Frame], network: JointNetwork, config: PhotoConfig, dim: int,
             total: int, say: Callable[[str], None]) -> Iterable[Frame]:
    """The same frames, once their pass is known to fit; the first says how large they are."""
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        return []
    height, width = network.prepared(first.image).image.shape[:2]
    pixels = min(config.encoder.max_pixels, first.image.shape[0] * first.image.shape[1])
    kept = config.encoder.max_keypoints * (FEATURE + 4 * dim) + pixels + 3 * height * width \
        + config.reconstruction.neighbours * PAIR + REFINED
    plan = network.plan(total, (height, width), kept)
    say(str(plan))
    plan.check()
    return chain([first], remaining)


def _check_enough(read: PhotosRead) -> None:
    count = len(read.photos)
    if len(read.shots) < 2:
        found = f'{count}' if count < 2 else f'{count} copies of one'
        raise InputError(f'expected at least two different images, found {found}; one alone '
                         'has no depth: give more views of the same place')


class _Pairs:
    """Shots reconstructed from their pairs, which are compared where the engine says."""

    def __init__(self, config: PhotoConfig, encoder: CompactEncoder, engine: Mapped,
                 work: PartialWork | None, network: PairNetwork | None, bar: ProgressBar,
                 seconds: Seconds) -> None:
        self._config, self._encoder, self._network = config, encoder, network
        self._seconds = seconds
        # A network that decodes pairs takes all cores itself; pairs of networks are not kept.
        self._engine = map if network and network.decodes else engine
        self._work = None if network else work
        self._bar = bar

    def reconstructed(self, shots: list[Shot]) -> tuple[list[Shot], list[Reconstructed]]:
        """The reconstructions, and the images as they were seen in them.

        Where the focal length was guessed far off, all is done again with the one that was found:
        motions of pairs are as wrong as it was.
        """
        collection = self._network.collected([shot.prepared for shot in shots if shot.prepared],
                                             [shot.camera.K for shot in shots]
                                             ) if self._network else None
        for attempt in range(ATTEMPTS):
            calibration = open_calibration(shots)
            done = self._attempt(shots, calibration, collection)
            scale = done[0].structure.cameras[0].fx / shots[0].camera.fx
            if 'focal' not in calibration or abs(np.log(scale)) < CLOSE \
                    or attempt + 1 == ATTEMPTS:
                break
            shots = [shot.seen_by(shot.camera.with_lens(scale, 0.0)) for shot in shots]
            if self._network and collection:
                collection = self._network.told(collection, [shot.camera.K for shot in shots])
        return shots, done

    def _attempt(self, shots: list[Shot], calibration: tuple[str, ...],
                 collection: Collection | None) -> list[Reconstructed]:
        config = self._config.reconstruction
        decoder = pair_decoder(shots, self._encoder, config, collection)
        comparing = self._work.pairs(self._engine, shots) if self._work else self._engine
        return reconstruct(shots, decoder, config, calibration, _counting(comparing, self._bar),
                           self._engine, self._seconds)


def _run(done: Reconstructed, shots: list[Shot], photos: list[Photo], read: PhotosRead,
         config: PhotoConfig, encoder: CompactEncoder, spent: float, seconds: Seconds) -> Run:
    """One reconstruction as a map of photos that can be saved; spent: seconds, of all of them."""
    before = time.perf_counter()
    scene = scene_map(growing_map(done, shots, config.mapper), done, photos,
                      camera_source_of(shots, config))
    writer = MemoryWriter(config.memory, encoder.dim)
    for keyframe in scene.keyframes:
        writer.write(keyframe)
    mapped = time.perf_counter()
    memory = writer.snapshot()
    return Run(scene, writer, memory, Stats(len(photos), len(scene.keyframes)),
               Trajectory.of(read.truth), spent + mapped - before, read.reading_s,
               time.perf_counter() - mapped, encoder, config.mapper,
               {**seconds.parts, 'scene memory': time.perf_counter() - before})


def _counting(mapped: Callable, bar: ProgressBar) -> Callable:
    def counted(function: Callable, items: Iterable) -> Iterator:
        for batch in mapped(function, items):
            for _ in batch:
                bar.advance()
            yield batch

    return counted
