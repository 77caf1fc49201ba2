"""This package, driven as the command line drives it, with a clock beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from benchmarks.common import Clock
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.threads import one_thread
from feedforward_recon.evaluation import associate
from feedforward_recon.geometry.align import Alignment, align_points
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.mapping.scene_map import SceneMap
from feedforward_recon.mapping.sources import GivenPoses
from feedforward_recon.memory.scene_memory import SceneMemory
from feedforward_recon.memory.writer import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.types import Frame, Trajectory


@dataclass(frozen=True)
class Mapped:
    """A mapped walk.

    mapping: time of tracking, mapping and the last refinement. polish: time of fitting the
    memory at the end.
    """

    scene: SceneMap
    memory: SceneMemory
    mapping: Clock
    polish: Clock


def map_frames(frames: Iterable[Frame], config: MapperConfig | None = None, *,
               given_poses: bool = False) -> Mapped:
    """Map frames one by one into a memory, then polish the memory."""
    config = config or MapperConfig()
    encoder = CompactEncoder.load(config=config.encoder)
    writer = MemoryWriter(config.memory, encoder.dim)
    mapping = Clock()
    source = GivenPoses(config, encoder) if given_poses else None
    mapper = Mapper(config, encoder, writer, source=source)
    for frame in frames:
        mapper.process(frame)
    scene = mapper.finish()
    mapping.stop()
    polish = Clock()
    writer.polish()
    return Mapped(scene, writer.snapshot(), mapping, polish.stop())


class Answerer:
    """Localises frames; ``to_truth`` moves the answers into the frame of the ground truth."""

    def __init__(self, mapped: Mapped, config: MapperConfig | None = None,
                 to_truth: Alignment | None = None) -> None:
        config = config or MapperConfig()
        encoder: Encoder = CompactEncoder.load(config=config.encoder)
        self._localizer = Localizer(mapped.memory, encoder, config.localizer)
        self._to_truth = to_truth

    def __call__(self, frame: Frame) -> np.ndarray | None:
        """T_map_cam [4, 4], or None when the localizer refuses."""
        with one_thread():  # as in the nodes and the command
            T_map_cam = self._localizer.localize(frame).T_map_cam
        if T_map_cam is None or self._to_truth is None:
            return T_map_cam
        return self._to_truth.apply_to_poses(T_map_cam)


def alignment_to(truth: Trajectory, estimated: Trajectory, *, with_scale: bool) -> Alignment:
    """The transform that brings the mapped walk onto the ground truth."""
    ours, theirs = associate(estimated, truth)
    return align_points(ours.positions, theirs.positions, with_scale=with_scale)
