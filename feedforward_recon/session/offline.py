"""``map_frames``: a recording becomes a map; the same for Python, `ffrecon map` and the demo.

run = map_frames(open_source('walk/'))
saved = run.save('maps/kitchen')
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.evaluation import TrajectoryError, absolute_trajectory_error
from feedforward_recon.localization.network_localizer import SavedFastWeights
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.scene_map import SceneMap, Stats
from feedforward_recon.mapping.sources import FeaturePoses, PoseSource
from feedforward_recon.mapping.sources.features import Relocaliser
from feedforward_recon.memory import MemoryWriter, SceneMemory
from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.map_folder import (
    SavedMap,
    nothing_found,
    save_map,
    settings_to_go_on,
)
from feedforward_recon.session.networks import dense_clouds
from feedforward_recon.session.newest_memory import NewestMemory
from feedforward_recon.types import Frame, Trajectory

SourceOf = Callable[[Relocaliser], PoseSource]  # given what finds a lost camera in the memory


class ProgressBar(Protocol):
    """Progress of one step."""

    def advance(self, state: str = '') -> None:
        """One more unit is done."""
        ...


class _NoBar:
    def advance(self, state: str = '') -> None:
        """Show nothing."""


Progress = Callable[[str, int], AbstractContextManager[ProgressBar]]  # label and total -> a bar


def quiet(label: str, total: int) -> AbstractContextManager[ProgressBar]:
    """Progress that is not shown."""
    return nullcontext(_NoBar())


@dataclass(frozen=True)
class Run:
    """A finished mapping run.

    truth: poses that came with the frames, empty without. mapping_s: tracking and mapping,
    including the last refinement; reading_s: waiting for frames; polish_s: freezing ``memory``
    after the walk: nothing is trained. seconds: parts of the work by name, of photos.
    """

    scene: SceneMap
    writer: MemoryWriter
    memory: SceneMemory
    stats: Stats
    truth: Trajectory
    mapping_s: float
    reading_s: float
    polish_s: float
    encoder: Encoder
    config: MapperConfig
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def tracked_share(self) -> float:
        """Share of all frames that got a pose."""
        return len(self.scene.trajectory) / max(self.stats.frames, 1)

    def error(self) -> TrajectoryError:
        """ATE (Sturm et al. 2012) against the poses of the frames, aligned as the scale allows.

        SE(3) for a map in metres, else Sim(3).

        Raises InputError or DegenerateError when they cannot be compared.
        """
        alignment = 'sim3' if self.scene.metres_per_unit is None else 'se3'
        return absolute_trajectory_error(self.scene.trajectory, self.truth, alignment)

    def save(self, path: str | Path, network: SavedFastWeights | None = None) -> SavedMap:
        """Write the map folder; replaces an older map there.

        Raises as ``save_map``.
        """
        return save_map(path, self.scene, self.writer, self.encoder, self.config, network)


def map_frames(frames: Iterable[Frame], config: MapperConfig | None = None,
               encoder: Encoder | None = None, *, source: SourceOf | None = None,
               into: SavedMap | None = None, total: int = 0, progress: Progress = quiet) -> Run:
    """Map frames, refine, and look for missed frames in the finished map.

    source: makes the pose source; default: features of the images, and the memory for a lost
    camera. Relocalising missed frames needs frames that can be read twice (not an iterator).
    into: a saved map to go on with: frames are located in it first, and extend it once one is
    found; memory and encoder keep the settings it was made with.
    total: how many frames there are, for the progress.
    Raises InputError for a frame that cannot be used, MapError for a map that cannot be gone on
    with or in which no frame was found, and what a network raises.
    """
    config = config or MapperConfig()
    if into is None:
        encoder = encoder or CompactEncoder.load(config=config.encoder)
        start, writer = None, MemoryWriter(config.memory, encoder.dim)
    else:
        config, encoder = settings_to_go_on(into, config), encoder or into.load_encoder()
        start, writer = into.start(config, encoder)
    relocalise = NewestMemory(writer, encoder, config.localizer).relocalise
    poses = FeaturePoses(config, encoder, relocalise=relocalise) if source is None \
        else source(relocalise)
    mapper = Mapper(config, encoder, writer, source=poses, start=start,
                    dense=dense_clouds(config.cloud))
    truth: list[tuple[int, np.ndarray]] = []
    started, mapping_s = time.perf_counter(), 0.0
    with progress('mapping', total) as bar:
        for frame in frames:
            before = time.perf_counter()
            estimate = mapper.process(frame)
            mapping_s += time.perf_counter() - before
            if frame.T_map_cam is not None:
                truth.append((frame.stamp_ns, frame.T_map_cam))
            bar.advance(estimate.status.value.lower())
    reading_s = time.perf_counter() - started - mapping_s
    before = time.perf_counter()
    scene = mapper.finish()
    if not isinstance(frames, Iterator) and relocalise_frames(mapper, frames):
        scene = mapper.results.scene_map()
    if into is not None and not len(scene.trajectory):
        raise nothing_found(into.path, len(scene.estimates))
    done = time.perf_counter()
    mapping_s += done - before
    memory = writer.snapshot()
    return Run(scene, writer, memory, mapper.stats, Trajectory.of(truth), mapping_s, reading_s,
               time.perf_counter() - done, encoder, config)


def relocalise_frames(mapper: Mapper, frames: Iterable[Frame]) -> int:
    """Relocalise frames in a finished map that its pose source could not place, or not well.

    frames: all of them, in the same order. The map stays as it is. Returns how many were looked
    for.
    """
    wanted = {index for index, estimate in enumerate(mapper.results.estimates)
              if mapper.source.wants_relocalisation(estimate)}
    for index, frame in enumerate(frames if wanted else ()):
        if index in wanted:
            mapper.relocalise_frame(index, frame)
    return len(wanted)
