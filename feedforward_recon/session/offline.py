"""One mapping run with progress: what ``ffrecon map`` and ``ffrecon demo`` share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from feedforward_recon.config.network import WindowConfig
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.terminal import progress_bar
from feedforward_recon.evaluation import TrajectoryError, absolute_trajectory_error
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.mapping.mapper import OnlineReconstructor
from feedforward_recon.mapping.offline import second_look
from feedforward_recon.mapping.scene_map import SceneMap, Stats
from feedforward_recon.mapping.sources.windows import WindowedReconstructor
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model import Encoder, Predictor
from feedforward_recon.types import Estimate, Frame, Trajectory

Poses = Literal['estimated', 'given']


@dataclass(frozen=True)
class Run:
    """A finished mapping run.

    truth: poses that came with the frames, empty without. mapping_s: tracking and mapping,
    including the last refinement; reading_s: waiting for frames; polish_s: fitting the memory
    after the walk.
    """

    scene: SceneMap
    writer: MemoryWriter
    stats: Stats
    truth: Trajectory
    mapping_s: float
    reading_s: float
    polish_s: float

    @property
    def tracked_share(self) -> float:
        """Share of all frames that got a pose."""
        return len(self.scene.trajectory) / max(self.stats.frames, 1)

    def error(self) -> TrajectoryError:
        """ATE against the poses that came with the frames, aligned as the scale allows.

        Raises InputError or DegenerateError when they cannot be compared.
        """
        alignment = 'sim3' if self.scene.metres_per_unit is None else 'se3'
        return absolute_trajectory_error(self.scene.trajectory, self.truth, alignment)


def map_frames(frames: Iterable[Frame], total: int, encoder: Encoder, config: MapperConfig,
               poses: Poses = 'estimated') -> Run:
    """Map frames, refine, place what was missed, and polish the memory; bars on stderr.

    Raises InputError for a frame that cannot be used.
    """
    writer = MemoryWriter(config.memory, encoder.dim)

    def ask_memory(frame: Frame) -> Estimate:
        return Localizer(writer.snapshot(), encoder, config.localizer,
                         mapper.camera).localize(frame)

    mapper = OnlineReconstructor(config, encoder, writer, poses=poses, relocalise=ask_memory)
    truth: list[tuple[int, np.ndarray]] = []
    started, mapping_s = time.perf_counter(), 0.0
    with progress_bar('mapping', total) as bar:
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
    if poses == 'estimated' and not isinstance(frames, Iterator):  # it can be read again
        second_look(mapper, frames)
        scene = mapper.scene_map()
    mapping_s += time.perf_counter() - before
    polish_s = _polish(writer)
    return Run(scene, writer, mapper.stats, _trajectory(truth), mapping_s, reading_s, polish_s)


def map_windows(frames: Iterable[Frame], total: int, predictor: Predictor, encoder: Encoder,
                config: MapperConfig, windows: WindowConfig, *, refine: bool = True) -> Run:
    """Map frames window by window with a feed-forward network, and polish the memory.

    Raises InputError for a frame that cannot be used.
    """
    writer = MemoryWriter(config.memory, encoder.dim)
    mapper = WindowedReconstructor(config, predictor, encoder, writer, windows=windows,
                                   refine=refine)
    truth: list[tuple[int, np.ndarray]] = []
    started, mapping_s = time.perf_counter(), 0.0
    with progress_bar('mapping', total) as bar:
        for frame in frames:
            before = time.perf_counter()
            mapper.add(frame)
            mapping_s += time.perf_counter() - before
            if frame.T_map_cam is not None:
                truth.append((frame.stamp_ns, frame.T_map_cam))
            bar.advance()
    reading_s = time.perf_counter() - started - mapping_s
    before = time.perf_counter()
    scene = mapper.finish()
    if not isinstance(frames, Iterator):  # it can be read again
        scene = mapper.look_again(frames)
    mapping_s += time.perf_counter() - before
    polish_s = _polish(writer)
    return Run(scene, writer, mapper.stats, _trajectory(truth), mapping_s, reading_s, polish_s)


def _polish(writer: MemoryWriter) -> float:
    started = time.perf_counter()
    with progress_bar('polishing', writer.config.polish_steps) as bar:
        writer.polish(progress=lambda _: bar.advance())
    return time.perf_counter() - started


def _trajectory(poses: list[tuple[int, np.ndarray]]) -> Trajectory:
    if not poses:
        return Trajectory()
    return Trajectory(np.array([stamp_ns for stamp_ns, _ in poses], np.int64),
                      np.stack([T_map_cam for _, T_map_cam in poses]))
