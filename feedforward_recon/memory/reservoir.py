"""A fair sample, of bounded size, of all features that keyframes ever offered.

Vitter 1985, algorithm R: every feature is in it with equal probability, whenever it was offered.
A sample keeps its keyframe and its point in that camera, so a corrected pose moves it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch

from feedforward_recon.memory.slots import same_features
from feedforward_recon.types import Keyframe

# Of its depth before, for a sample that moves to another camera: nearer than this the error in its
# image, which is over depth, would count ten times as much; chosen by hand.
MIN_DEPTH_SHARE = 0.1
ARRAYS = ('descriptors', 'points_cam', 'keyframe_ids')


class Reservoir:
    """Samples: descriptors float16 [R, D], points_cam float32 [R, 3], keyframe_ids int32 [R].

    offered: number of features seen so far.
    """

    def __init__(self, capacity: int, dim: int, seed: int) -> None:
        self.descriptors = np.zeros((capacity, dim), np.float16)
        self.points_cam = np.zeros((capacity, 3), np.float32)
        self.keyframe_ids = np.zeros(capacity, np.int32)
        self.offered = 0
        self._rng = np.random.default_rng(seed)

    @property
    def filled(self) -> int:
        """Number of samples; they are the first rows of the arrays."""
        return min(self.offered, len(self.keyframe_ids))

    def offer(self, keyframe: Keyframe, features: np.ndarray) -> None:
        """Algorithm R on these features (indices) of a keyframe, all at once."""
        capacity = len(self.keyframe_ids)
        arrival = self.offered + np.arange(len(features))
        self.offered += len(features)
        place = np.where(arrival < capacity, arrival, self._rng.integers(0, arrival + 1))
        kept = place < capacity
        place, chosen = place[kept], features[kept]
        self.descriptors[place] = keyframe.features.descriptors[chosen]
        self.points_cam[place] = keyframe.points_cam[chosen]
        self.keyframe_ids[place] = keyframe.id

    def correct(self, keyframe: Keyframe) -> None:
        """Give the samples of a keyframe the points that its features have by now."""
        own = np.flatnonzero(self.keyframe_ids[:self.filled] == keyframe.id)
        row, feature = same_features(keyframe, self.points_cam[own], self.descriptors[own])
        self.points_cam[own[row]] = keyframe.points_cam[feature]

    def state(self) -> dict[str, torch.Tensor]:
        """Samples and generator as named tensors; ``offered`` is kept by the caller."""
        random = json.dumps(self._rng.bit_generator.state).encode()
        return {**{name: torch.from_numpy(getattr(self, name)[:self.filled]) for name in ARRAYS},
                'random.numpy': torch.frombuffer(bytearray(random), dtype=torch.uint8)}

    def restore(self, state: Mapping[str, torch.Tensor], offered: int) -> None:
        """Take over a ``state``, of which ``offered`` features had been seen."""
        self.offered = offered
        for name in ARRAYS:
            getattr(self, name)[:self.filled] = state[name].numpy()
        self._rng.bit_generator.state = json.loads(bytes(state['random.numpy'].numpy()))

    def move(self, anchor: np.ndarray, T_anchor_old: np.ndarray) -> None:
        """Anchor what keyframe k saw in keyframe ``anchor[k]``; T_anchor_old: [K, 4, 4].

        A sample that is not in front of its new camera gives way to a copy of another one: its
        error in that image would mean nothing.
        """
        count = self.filled
        T = T_anchor_old[self.keyframe_ids[:count]].astype(np.float32)
        points = np.einsum('nij,nj->ni', T[:, :3, :3], self.points_cam[:count]) + T[:, :3, 3]
        good = np.flatnonzero(points[:, 2] > MIN_DEPTH_SHARE * self.points_cam[:count, 2])
        row = np.arange(count)
        if len(good):
            behind = np.setdiff1d(row, good)
            row[behind] = self._rng.choice(good, len(behind))
        self.descriptors[:count] = self.descriptors[row]
        self.points_cam[:count] = points[row]
        self.keyframe_ids[:count] = anchor[self.keyframe_ids[row]]
