"""``NetworkWriter``: what each keyframe wrote into the coordinate network, and the sums of it.

The sums alone answer queries. The samples stay as well, a bounded number of them, so that a loop
closure can take away what moved and add it again where it belongs: exactly, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.geometry.transforms import transform_points
from feedforward_recon.memory.coordinate_network import CellSums
from feedforward_recon.memory.keys import Keys
from feedforward_recon.types import Keyframe

# Written of each keyframe, the most confident features first; more are hardly ever read again.
PER_KEYFRAME = 700
# When there are too many samples this share of them stays, so that room is made rarely.
KEPT = 0.9


@dataclass(frozen=True)
class KeyframeSamples:
    """What a keyframe wrote: cells int32 [N, T], points_cam float32 [N, 3], the surest first.

    T_map_cam: the pose [4, 4] with which they are in the sums.
    """

    cells: NDArray[np.int32]
    points_cam: NDArray[np.float32]
    T_map_cam: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.cells)

    def part(self, rows: slice) -> KeyframeSamples:
        """Some of the samples."""
        return replace(self, cells=self.cells[rows], points_cam=self.points_cam[rows])

    def joined(self, other: KeyframeSamples) -> KeyframeSamples:
        """Both, in the camera frame of these."""
        return replace(self, cells=np.concatenate([self.cells, other.cells]),
                       points_cam=np.concatenate([self.points_cam, other.points_cam]))


class NetworkWriter:
    """The sums of a coordinate network of ``cells`` cells a table, and their samples.

    capacity: number of samples at most.
    Law: the sums are those of the samples, whatever was written, moved or taken away before.
    """

    def __init__(self, cells: int, capacity: int, keys: Keys) -> None:
        self.sums, self.keys, self.capacity = CellSums(keys.tables, cells), keys, capacity
        self.samples: dict[int, KeyframeSamples] = {}
        self._open: set[int] = set()

    @property
    def cells(self) -> int:
        """Cells of each table."""
        return self.sums.count.shape[1]

    @property
    def filled(self) -> int:
        """Number of samples in the sums."""
        return sum(len(samples) for samples in self.samples.values())

    def write(self, keyframe: Keyframe) -> None:
        """Add a keyframe; what it wrote before is taken away first."""
        self.remove(keyframe.id)
        known = np.flatnonzero(keyframe.has_point)
        if not len(known) or not self.cells:
            return
        order = np.argsort(-keyframe.features.confidence[known], kind='stable')
        chosen = known[order[:PER_KEYFRAME]]
        cells = self.keys.places(keyframe.features.descriptors[chosen], 1, self.cells)[..., 0]
        self._open.add(keyframe.id)
        self._add(keyframe.id, KeyframeSamples(cells.astype(np.int32),
                                               keyframe.points_cam[chosen],
                                               np.array(keyframe.T_map_cam, np.float64)))
        if self.filled > self.capacity:
            self._make_room()

    def correct(self, keyframe: Keyframe) -> None:
        """Write a keyframe again, whose points are better by now.

        Those of earlier sessions stay: a saved map no longer has all features that they wrote.
        """
        if keyframe.id in self._open and keyframe.has_point.any():
            self.write(keyframe)

    def remove(self, keyframe_id: int) -> None:
        """Take away what a keyframe wrote; nothing happens if it wrote nothing."""
        samples = self.samples.pop(keyframe_id, None)
        if samples is not None:
            self._sum([samples], -1)

    def move(self, T_map_cam: Mapping[int, NDArray[np.floating]]) -> None:
        """Keyframes have other poses [4, 4]: take them away and add them there."""
        moved = {id_: replace(self.samples[id_], T_map_cam=np.array(pose, np.float64))
                 for id_, pose in T_map_cam.items() if id_ in self.samples
                 and not np.array_equal(self.samples[id_].T_map_cam, pose)}
        self._sum([self.samples[id_] for id_ in moved], -1)
        self._sum(list(moved.values()), 1)
        self.samples |= moved

    def renumber(self, poses: NDArray[np.floating], anchor: NDArray[np.integer],
                 T_anchor_old: NDArray[np.floating]) -> None:
        """What keyframe k wrote belongs to the new number ``anchor[k]`` from now on.

        poses [K, 4, 4] of the new keyframes; T_anchor_old [O, 4, 4] of the old ones in them.
        """
        before = {old: self.samples[old] for old in sorted(self.samples)}
        for old in before:
            self.remove(old)
        together: dict[int, KeyframeSamples] = {}
        for old, samples in before.items():
            number = int(anchor[old])
            points = transform_points(T_anchor_old[old], samples.points_cam.astype(np.float64))
            moved = KeyframeSamples(samples.cells, points.astype(np.float32),
                                    np.array(poses[number], np.float64))
            together[number] = together[number].joined(moved) if number in together else moved
        for number, samples in together.items():
            self._add(number, samples)
        self._open = set()  # their features are not those of the new keyframes

    def merge(self, other: NetworkWriter) -> None:
        """Add all keyframes of ``other``, of the same map frame, numbered after our own."""
        first = max(self.samples, default=-1) + 1
        self.sums.merge(other.sums)
        self.samples |= {first + number: samples for number, samples in other.samples.items()}
        if self.filled > self.capacity:
            self._make_room()

    def state(self) -> dict[str, torch.Tensor]:
        """The samples as named tensors; the sums follow from them."""
        ids = sorted(self.samples)
        all_samples = [self.samples[id_] for id_ in ids]
        cells = np.concatenate([np.zeros((0, self.keys.tables), np.int32),
                                *(samples.cells for samples in all_samples)])
        narrow = np.uint16 if self.cells <= 1 << 16 else np.int32
        arrays = {'ids': np.array(ids, np.int64),
                  'first': np.cumsum([0, *(len(s) for s in all_samples)]),
                  'T_map_cam': np.array([s.T_map_cam for s in all_samples]).reshape(-1, 4, 4),
                  'cells': cells.astype(narrow),
                  'points_cam': np.concatenate([np.zeros((0, 3), np.float32),
                                                *(s.points_cam for s in all_samples)])}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a ``state``; sums come out as they were, bit by bit."""
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        for index, id_ in enumerate(arrays['ids'].tolist()):
            rows = slice(*arrays['first'][index:index + 2])
            self._add(id_, KeyframeSamples(arrays['cells'][rows].astype(np.int32),
                                           arrays['points_cam'][rows].copy(),
                                           arrays['T_map_cam'][index].copy()))

    def _add(self, keyframe_id: int, samples: KeyframeSamples) -> None:
        self.samples[keyframe_id] = samples
        self._sum([samples], 1)

    def _sum(self, several: list[KeyframeSamples], sign: int) -> None:
        if several:
            points = np.concatenate([transform_points(s.T_map_cam, s.points_cam.astype(np.float64))
                                     for s in several])
            self.sums.add(np.concatenate([s.cells for s in several]), points,
                          np.concatenate([s.points_cam[:, 2] for s in several]), sign)

    def _make_room(self) -> None:
        """Take the least sure samples of the keyframes that have most, until some room is free."""
        lengths = np.array([len(samples) for samples in self.samples.values()])
        most = max(fair_share(lengths, int(KEPT * self.capacity)), 1)
        for keyframe_id, samples in self.samples.items():
            if len(samples) > most:
                self._sum([samples.part(slice(most, None))], -1)
                self.samples[keyframe_id] = samples.part(slice(most))
        for keyframe_id in sorted(self.samples)[:max(0, self.filled - self.capacity)]:
            self.remove(keyframe_id)  # with one sample each there are still too many


def fair_share(lengths: NDArray[np.integer], total: int) -> int:
    """Largest number that each may keep of ``lengths`` so that together they keep ``total``."""
    low, high = 0, int(lengths.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(lengths, middle).sum() <= total \
            else (low, middle - 1)
    return low
