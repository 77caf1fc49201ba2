"""``MemoryWriter``: writes a scene memory while mapping, once, in constant time and space.

Per keyframe: its points are fused into the landmark slots, and added to the sums of the coordinate
network. Nothing is trained afterwards. Slots and samples keep their keyframe and camera-frame
point, so a loop correction moves the slots, and takes samples away and adds them where they
belong. Reading goes through ``snapshot()``: a quantised ``SceneMemory`` that no later write
touches.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from feedforward_recon.config.schema import MemoryConfig
from feedforward_recon.geometry.transforms import inverse, nearest_poses
from feedforward_recon.memory.coordinate_network import quantise_weights
from feedforward_recon.memory.keys import keys_for
from feedforward_recon.memory.network_writer import NetworkWriter
from feedforward_recon.memory.scene_memory import SceneMemory, box_around, quantise_points
from feedforward_recon.memory.slots import SlotTable
from feedforward_recon.types import Keyframe

SLOTS, NETWORK = 'slots.', 'network.'


class MemoryWriter:
    """What one scene memory is written with; ``poses`` [K, 4, 4] of its keyframes by id."""

    def __init__(self, config: MemoryConfig, dim: int) -> None:
        self.config = config
        self.slots = SlotTable(config.slots, dim)
        self.network = NetworkWriter(config.cells, config.samples, keys_for(dim, config.tables))
        self.poses = np.zeros((0, 4, 4))

    @property
    def filled(self) -> bool:
        """Whether anything was written that can be localised in."""
        return bool(self.network.samples) or bool(self.slots.counts.any())

    def write(self, keyframe: Keyframe) -> None:
        """Take in one keyframe."""
        self._set_pose(keyframe.id, keyframe.T_map_cam)
        self.slots.write(keyframe, self.poses)
        self.network.write(keyframe)

    def reanchor(self, T_map_cam: Mapping[int, np.ndarray]) -> None:
        """Move keyframes (id -> pose [4, 4]); what they wrote moves with them."""
        for keyframe_id, pose in T_map_cam.items():
            self._set_pose(keyframe_id, pose)
        self.network.move(T_map_cam)

    def correct(self, keyframe: Keyframe) -> None:
        """Take over the points that a keyframe, which was written before, has by now."""
        self.slots.correct(keyframe)
        self.network.correct(keyframe)

    def renumber(self, kept: np.ndarray) -> None:
        """Keyframes with the ids ``kept`` [K] become 0..K-1; the others are forgotten.

        What a forgotten one saw is anchored in the kept keyframe that is most like it.
        """
        anchor = nearest_poses(self.poses, kept, self.network.sums.typical_depth)
        T_anchor_old = inverse(self.poses[kept])[anchor] @ self.poses
        self.slots.move(anchor, T_anchor_old)
        self.network.renumber(self.poses[kept], anchor, T_anchor_old)
        self.poses = self.poses[kept]

    def snapshot(self) -> SceneMemory:
        """The quantised memory as it stands; later writes do not touch it."""
        used = self.slots.trusted
        points = self.slots.map_points(self.poses) if len(self.poses) else self.slots.points_cam
        cells, weights = self.network.sums.means()
        box = box_around(points[used], cells[weights > 0])
        return SceneMemory(
            slot_descriptors=torch.from_numpy(self.slots.descriptors * used[:, None]),
            slot_points=quantise_points(points, used, box),
            slot_counts=torch.from_numpy((self.slots.counts * used).clip(0, 255)
                                         .astype(np.uint8)),
            cell_points=quantise_points(cells, weights > 0, box),
            cell_weights=quantise_weights(weights), box=torch.from_numpy(box),
            typical_depth=torch.tensor([self.network.sums.typical_depth]),
            keys=torch.frombuffer(bytearray.fromhex(self.network.keys.sha256),
                                  dtype=torch.uint8))

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that writing depends on, as named tensors: from_state resumes exactly."""
        named = {SLOTS + name: tensor for name, tensor in self.slots.state().items()}
        named |= {NETWORK + name: tensor for name, tensor in self.network.state().items()}
        named |= {'poses': torch.from_numpy(self.poses),
                  'counters': torch.tensor([self.slots.writes, self.slots.descriptors.shape[1]])}
        return {name: value.clone().contiguous() for name, value in named.items()}

    @staticmethod
    def from_state(config: MemoryConfig, state: Mapping[str, torch.Tensor]) -> MemoryWriter:
        """The writer whose ``state`` this was; ``config`` must be the one it had.

        Raises KeyError, ValueError or RuntimeError when the state does not fit.
        """
        writes, dim = state['counters'].tolist()
        writer = MemoryWriter(config, dim)
        writer.slots.restore(_named(state, SLOTS), writes)
        writer.network.restore(_named(state, NETWORK))
        writer.poses = state['poses'].numpy().copy()
        return writer

    def _set_pose(self, keyframe_id: int, T_map_cam: np.ndarray) -> None:
        missing = keyframe_id + 1 - len(self.poses)
        if missing > 0:
            self.poses = np.concatenate([self.poses, np.tile(np.eye(4), (missing, 1, 1))])
        self.poses[keyframe_id] = T_map_cam


def _named(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()
            if name.startswith(prefix)}
