"""This package, driven as the command line drives it, with a clock beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.common import Clock
from benchmarks.scoring import Walked
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.threads import one_thread
from feedforward_recon.evaluation import associate
from feedforward_recon.geometry.align import Alignment, align_points
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.mapping.sources import FeaturePoses, GivenPoses
from feedforward_recon.memory.scene_memory import SceneMemory
from feedforward_recon.memory.writer import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.newest_memory import NewestMemory
from feedforward_recon.session.offline import relocalise_frames
from feedforward_recon.types import Estimate, Frame, Status, Trajectory


@dataclass(frozen=True)
class Mapped:
    """A mapped walk.

    mapping: time of tracking, mapping and the last refinement.
    """

    scene: SceneMap
    memory: SceneMemory
    mapping: Clock


def map_frames(frames: Sequence[Frame], config: MapperConfig | None = None, *,
               given_poses: bool = False) -> Mapped:
    """Map frames one by one into a memory."""
    config = config or MapperConfig()
    encoder = CompactEncoder.load(config=config.encoder)
    writer = MemoryWriter(config.memory, encoder.dim)
    mapping = Clock()
    if given_poses:
        mapper = Mapper(config, encoder, writer, source=GivenPoses(config, encoder))
    else:
        mapper = _mapper(config, encoder, writer)
    for frame in frames:
        mapper.process(frame)
    scene = _finished(mapper, frames)
    return Mapped(scene, writer.snapshot(), mapping.stop())


def map_walk(frames: Sequence[Frame], config: MapperConfig | None = None) -> Walked:
    """Map frames one by one, as a system that is compared with others on one thread."""
    config = config or MapperConfig()
    encoder = CompactEncoder.load(config=config.encoder)
    with one_thread():  # as in the nodes and the command
        mapper = _mapper(config, encoder, MemoryWriter(config.memory, encoder.dim))
        clock = Clock()
        estimates = [mapper.process(frame) for frame in frames]
        scene = _finished(mapper, frames)
        clock.stop()
    posed = [(e.stamp_ns, e.T_map_cam) for e in estimates if e.T_map_cam is not None]
    keyframes_ns = np.array([keyframe.stamp_ns for keyframe in scene.keyframes], np.int64)
    return Walked(Trajectory.of(posed), scene.trajectory, scene.trajectory, keyframes_ns,
                  clock.cpu_seconds, float(np.median([e.latency_ms for e in estimates])),
                  _unsure(estimates), _unsure(mapper.results.estimates))


def _mapper(config: MapperConfig, encoder: Encoder, writer: MemoryWriter) -> Mapper:
    """Looks for a lost camera in the memory, as the command and the nodes do."""
    relocalise = NewestMemory(writer, encoder, config.localizer).relocalise
    return Mapper(config, encoder, writer,
                  source=FeaturePoses(config, encoder, relocalise=relocalise))


def _finished(mapper: Mapper, frames: Sequence[Frame]) -> SceneMap:
    scene = mapper.finish()
    return mapper.results.scene_map() if relocalise_frames(mapper, frames) else scene


def _unsure(estimates: Sequence[Estimate]) -> np.ndarray:
    return np.array([e.stamp_ns for e in estimates if e.status is Status.UNCERTAIN], np.int64)


class Answerer:
    """Localises frames; ``to_truth`` moves the answers into the frame of the ground truth."""

    def __init__(self, mapped: Mapped, config: MapperConfig | None = None,
                 to_truth: Alignment | None = None) -> None:
        config = config or MapperConfig()
        encoder: Encoder = CompactEncoder.load(config=config.encoder)
        self._localizer = Localizer(mapped.memory, encoder, config.localizer,
                                    mapped.scene.keyframes[-1].camera)
        self._to_truth = to_truth

    def __call__(self, frame: Frame) -> np.ndarray | None:
        """T_map_cam [4, 4], or None when the localizer refuses."""
        T_map_cam = self._localizer.localize(frame).T_map_cam
        if T_map_cam is None or self._to_truth is None:
            return T_map_cam
        return self._to_truth.apply_to_poses(T_map_cam)


def alignment_to(truth: Trajectory, estimated: Trajectory, *, with_scale: bool) -> Alignment:
    """The transform that brings the mapped walk onto the ground truth."""
    ours, theirs = associate(estimated, truth)
    return align_points(ours.positions, theirs.positions, with_scale=with_scale)
