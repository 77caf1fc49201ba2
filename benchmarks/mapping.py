"""Trajectories of real walks: RGB-D, stereo and monocular, the whole walk and one with gaps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common import DRIVE, KITCHEN, load_frames, trajectory_entry, true_trajectory
from benchmarks.ours import map_frames
from benchmarks.scoring import interleaved_split
from feedforward_recon.types import Frame


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case of the mapping table."""
    kitchen = {use_depth: load_frames(KITCHEN, use_depth=use_depth) for use_depth in (True, False)}
    gaps, _ = interleaved_split(len(kitchen[True]))
    cases: dict[str, tuple[list[Frame], str]] = {
        f'{KITCHEN} RGB-D': (kitchen[True], 'se3'),
        f'{KITCHEN} monocular': (kitchen[False], 'sim3'),
        f'{KITCHEN} RGB-D, gaps of 25 frames': ([kitchen[True][i] for i in gaps], 'se3'),
        f'{KITCHEN} monocular, gaps of 25 frames': ([kitchen[False][i] for i in gaps], 'sim3'),
        f'{DRIVE} stereo': (load_frames(DRIVE), 'se3'),
        f'{DRIVE} monocular': (load_frames(DRIVE, use_depth=False), 'sim3'),
    }
    for name, (frames, alignment) in cases.items():
        yield f'{name} | feedforward_recon', entry(frames, alignment)


def entry(frames: list[Frame], alignment: str) -> dict[str, Any]:
    """Map frames without their poses and compare with them."""
    mapped = map_frames(frames)
    row = trajectory_entry(mapped.scene.trajectory, true_trajectory(frames), alignment,
                           len(frames), mapped.mapping)
    return {**row, 'polish_seconds': mapped.polish.seconds,
            'polish_cpu_seconds': mapped.polish.cpu_seconds,
            'keyframes': len(mapped.scene.keyframes), 'nbytes': mapped.memory.nbytes}
