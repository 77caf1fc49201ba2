"""``EstimateHistory``: the pose of every frame relative to a keyframe, so that it moves along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.types import Estimate, Status, Trajectory


@dataclass(frozen=True)
class HistoryEntry:
    """A frame's estimate, and its pose [4, 4] relative to a keyframe; -1, None without a pose."""

    estimate: Estimate
    keyframe: int = -1
    T_keyframe_cam: np.ndarray | None = None


class EstimateHistory:
    """Estimates of all frames in the order they came."""

    def __init__(self, entries: Iterable[HistoryEntry] = ()) -> None:
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self._entries)

    def copy(self) -> EstimateHistory:
        """The same entries; those recorded later are missing."""
        return EstimateHistory(self._entries)

    def record(self, estimate: Estimate, keyframe: int, T_map_keyframe: np.ndarray | None,
             index: int | None = None) -> None:
        """Append an estimate, or replace that of frame ``index``."""
        T_keyframe_cam = None
        if estimate.T_map_cam is not None and T_map_keyframe is not None:
            T_keyframe_cam = inverse(T_map_keyframe) @ estimate.T_map_cam
        entry = HistoryEntry(estimate, keyframe, T_keyframe_cam)
        if index is None:
            self._entries.append(entry)
        else:
            self._entries[index] = entry

    def status(self, index: int) -> Status:
        """Status of frame ``index``."""
        return self._entries[index].estimate.status

    def keyframe(self, index: int) -> int:
        """The keyframe that frame ``index`` moves with; -1 without a pose."""
        return self._entries[index].keyframe

    def move(self, index: int, T_map_cam: np.ndarray, T_map_keyframe: np.ndarray) -> None:
        """Give frame ``index`` another pose [4, 4], beside its keyframe's."""
        entry = self._entries[index]
        self.record(replace(entry.estimate, T_map_cam=T_map_cam), entry.keyframe, T_map_keyframe,
                    index)

    def forget_poses(self) -> None:
        """The map was given up before it had depth: no frame so far has a pose."""
        self._entries = [HistoryEntry(replace(
            e.estimate, status=Status.INITIALISING, T_map_cam=None, covariance=None,
            is_keyframe=False, reason='the map started later')) for e in self._entries]

    def rescale(self, scale: np.ndarray) -> None:
        """Lengths around each keyframe were multiplied by ``scale`` [K]."""
        for index, entry in enumerate(self._entries):
            if entry.T_keyframe_cam is not None and entry.keyframe < len(scale):
                T = entry.T_keyframe_cam.copy()
                T[:3, 3] *= scale[entry.keyframe]
                self._entries[index] = replace(entry, T_keyframe_cam=T)

    def estimates(self, T_map_cam: np.ndarray) -> list[Estimate]:
        """All estimates, moved with their keyframes, whose poses [K, 4, 4] are now these."""
        return [e.estimate if e.T_keyframe_cam is None
                else replace(e.estimate, T_map_cam=T_map_cam[e.keyframe] @ e.T_keyframe_cam)
                for e in self._entries]

    def pose(self, index: int, T_map_cam: np.ndarray) -> np.ndarray | None:
        """Pose of frame ``index``, given all keyframe poses [K, 4, 4]; None if it has none."""
        entry = self._entries[index]
        if entry.T_keyframe_cam is None:
            return None
        return T_map_cam[entry.keyframe] @ entry.T_keyframe_cam

    def trajectory(self, T_map_cam: np.ndarray) -> Trajectory:
        """Poses of all frames that have one, given all keyframe poses [K, 4, 4]."""
        return Trajectory.of((e.stamp_ns, e.T_map_cam) for e in self.estimates(T_map_cam)
                             if e.T_map_cam is not None)
