"""``MemoryWriter``: fits a scene memory while mapping, in constant time and space.

Per keyframe: the slots are fused, a bounded reservoir takes a fair sample of all features
seen so far, and the coordinate network makes a fixed number of optimisation steps on it.
Slots and samples keep their keyframe and camera-frame point, so a loop correction re-anchors
them before the next step; weights alone could not be corrected.
Reading goes through ``snapshot()``: a quantised ``SceneMemory`` that no later write touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch.nn import functional as F

from feedforward_recon.config.schema import MemoryConfig
from feedforward_recon.geometry.transforms import inverse, nearest_poses
from feedforward_recon.memory.coordinate_mlp import initial_network
from feedforward_recon.memory.reservoir import Reservoir
from feedforward_recon.memory.scene_memory import (
    SceneMemory,
    quantise_descriptors,
    quantise_points,
)
from feedforward_recon.memory.slots import SlotTable
from feedforward_recon.types import Keyframe

# Per component: stands for the change of a descriptor with the view. This and POLISH_RATE were
# measured: docs/experiments.md, Coordinate network.
DESCRIPTOR_NOISE = 0.012
DEPTH_WEIGHT = 0.3  # of errors along the ray, which move a pose less; chosen by hand
# Errors beyond count by their logarithm: repeated texture cannot be learnt; chosen by hand.
ROBUST_PX = 50.0
# Step size between frames: few steps, which must not undo what was learnt; chosen by hand.
WRITE_RATE = 2e-3
POLISH_RATE = 6e-3  # step size of the polish at its peak
REFERENCE_FOCAL_PX = 525.0  # turns angles into pixels of a 640x480 camera, whatever camera maps


class MemoryWriter:
    """Training state of one scene memory."""

    def __init__(self, config: MemoryConfig, dim: int) -> None:
        self.config = config
        self.slots = SlotTable(config.slots, dim)
        self.poses = np.zeros((0, 4, 4))
        self.reservoir = Reservoir(config.reservoir, dim, config.seed)
        self.normaliser: np.ndarray | None = None
        self.network = initial_network(dim, config.hidden_dim, config.blocks, config.seed)
        self._optimiser = torch.optim.AdamW(self.network.parameters(), lr=1e-3,
                                            weight_decay=1e-4)
        self._generator = torch.Generator().manual_seed(config.seed)

    @property
    def filled(self) -> int:
        """Number of samples that the coordinate network is fitted to."""
        return self.reservoir.filled

    def write(self, keyframe: Keyframe) -> None:
        """Take in one keyframe: fuse slots, sample the reservoir, make a few steps."""
        self._set_pose(keyframe.id, keyframe.T_map_cam)
        known = np.flatnonzero(keyframe.has_point)
        if not len(known):
            return
        self.slots.write(keyframe, self.poses)
        self.reservoir.offer(keyframe, known)
        if self.normaliser is None:
            self.normaliser = self._first_normaliser(keyframe, known)
        self.fit(self.config.steps_per_keyframe, learning_rate=WRITE_RATE)

    def reanchor(self, T_map_cam: Mapping[int, np.ndarray]) -> None:
        """Move keyframes (id -> pose [4, 4]); their samples and slots move with them."""
        for keyframe_id, pose in T_map_cam.items():
            self._set_pose(keyframe_id, pose)

    def correct(self, keyframe: Keyframe) -> None:
        """Take over the points that a keyframe, which was written before, has by now."""
        self.slots.correct(keyframe)
        self.reservoir.correct(keyframe)

    def renumber(self, kept: np.ndarray) -> None:
        """Keyframes with the ids ``kept`` [K] become 0..K-1; the others are forgotten.

        What a forgotten one saw is anchored in the kept keyframe that is most like it.
        """
        unit = 1.0 if self.normaliser is None else float(self.normaliser[3])
        anchor = nearest_poses(self.poses, kept, unit)
        T_anchor_old = inverse(self.poses[kept])[anchor] @ self.poses
        self.slots.move(anchor, T_anchor_old)
        self.reservoir.move(anchor, T_anchor_old)
        self.poses = self.poses[kept]

    def polish(self, steps: int | None = None,
               progress: Callable[[int], None] | None = None) -> None:
        """Fit with a decaying step size until the network has converged."""
        steps = self.config.polish_steps if steps is None else steps
        for step in range(steps):
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            warm = min(1.0, (step + 1) / 50)
            self.fit(1, learning_rate=POLISH_RATE * warm * (0.01 + 0.99 * decay))
            if progress:
                progress(step + 1)

    def fit(self, steps: int, learning_rate: float) -> None:
        """Optimisation steps of the coordinate network on random samples."""
        if not self.filled:
            return
        for group in self._optimiser.param_groups:
            group['lr'] = learning_rate
        poses = torch.from_numpy(self.poses.astype(np.float32))
        for _ in range(steps):
            rows = torch.randint(self.filled, (self.config.batch,), generator=self._generator)
            loss = self._loss(rows.numpy(), poses)
            self._optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self._optimiser.step()

    def _loss(self, rows: np.ndarray, poses: torch.Tensor) -> torch.Tensor:
        """Laplace likelihood of the error in the camera that saw the point.

        The error is measured as the localizer will feel it: across the ray in pixels, and
        along the ray as relative depth, which moves a pose less and is noisier.
        """
        assert self.normaliser is not None
        samples = self.reservoir
        descriptors = torch.from_numpy(samples.descriptors[rows].astype(np.float32))
        noise = torch.randn(descriptors.shape, generator=self._generator)
        descriptors = F.normalize(descriptors + DESCRIPTOR_NOISE * noise, dim=-1)
        with torch.autocast('cpu', torch.bfloat16):
            out, log_sigma = self.network(descriptors)
        centre = torch.from_numpy(self.normaliser[:3].astype(np.float32))
        in_map = centre + float(self.normaliser[3]) * out
        T = poses[samples.keyframe_ids[rows]]
        in_cam = torch.einsum('nji,nj->ni', T[:, :3, :3], in_map - T[:, :3, 3])
        truth = torch.from_numpy(samples.points_cam[rows])
        z = truth[:, 2:]
        ray = F.normalize(truth, dim=-1)
        delta = (in_cam - truth) / z
        along = (delta * ray).sum(-1, keepdim=True)
        across = delta - along * ray
        error = REFERENCE_FOCAL_PX * torch.sqrt(
            across.square().sum(-1) + (DEPTH_WEIGHT * along[:, 0]).square() + 1e-9)
        fit = ROBUST_PX * torch.log1p(error / ROBUST_PX)
        # The expected error is learnt beside the fit, not through it: otherwise a large sigma
        # would stop the network from learning the points that are hard.
        negative_log_likelihood = error.detach() * torch.exp(-log_sigma) + log_sigma
        return fit.mean() + negative_log_likelihood.mean()

    @torch.inference_mode()
    def snapshot(self) -> SceneMemory:
        """The quantised memory as it stands; later writes do not touch it."""
        used = self.slots.trusted
        points = self.slots.map_points(self.poses) if len(self.poses) else self.slots.points_cam
        levels, box = quantise_points(points, used)
        normaliser = np.array([0, 0, 0, 1.0]) if self.normaliser is None else self.normaliser
        return SceneMemory(
            network={k: v.half().clone() for k, v in self.network.state_dict().items()},
            slot_descriptors=quantise_descriptors(self.slots.descriptors * used[:, None]),
            slot_points=levels, box=box,
            slot_counts=torch.from_numpy((self.slots.counts * used).clip(0, 255)
                                         .astype(np.uint8)),
            normaliser=torch.from_numpy(normaliser.astype(np.float32)))

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that writing depends on, as named tensors: from_state resumes exactly."""
        named = self.reservoir.state()
        named |= {f'slots.{name}': tensor for name, tensor in self.slots.state().items()}
        for name, parameter in self.network.named_parameters():
            named[f'network.{name}'] = parameter.detach()
            named |= {f'optimiser.{name}.{key}': value
                      for key, value in self._optimiser.state[parameter].items()}
        if self.normaliser is not None:
            named['normaliser'] = torch.from_numpy(self.normaliser)
        named |= {'poses': torch.from_numpy(self.poses),
                  'counters': torch.tensor([self.reservoir.offered, self.slots.writes]),
                  'random.torch': self._generator.get_state()}
        return {name: value.clone().contiguous() for name, value in named.items()}

    @staticmethod
    def from_state(config: MemoryConfig, state: Mapping[str, torch.Tensor]) -> MemoryWriter:
        """The writer whose ``state`` this was; ``config`` must be the one it had.

        Raises KeyError, ValueError or RuntimeError when the state does not fit.
        """
        writer = MemoryWriter(config, state['descriptors'].shape[1])
        offered, writes = state['counters'].tolist()
        writer.reservoir.restore(state, offered)
        writer.slots.restore({key.removeprefix('slots.'): value for key, value in state.items()
                              if key.startswith('slots.')}, writes)
        for name, parameter in writer.network.named_parameters():
            parameter.data.copy_(state[f'network.{name}'])
            prefix = f'optimiser.{name}.'
            writer._optimiser.state[parameter].update(
                {key.removeprefix(prefix): value.clone() for key, value in state.items()
                 if key.startswith(prefix)})
        writer.poses = state['poses'].numpy().copy()
        writer.normaliser = state['normaliser'].numpy().copy() if 'normaliser' in state else None
        writer._generator.set_state(state['random.torch'])
        return writer

    def _set_pose(self, keyframe_id: int, T_map_cam: np.ndarray) -> None:
        missing = keyframe_id + 1 - len(self.poses)
        if missing > 0:
            self.poses = np.concatenate([self.poses, np.tile(np.eye(4), (missing, 1, 1))])
        self.poses[keyframe_id] = T_map_cam

    @staticmethod
    def _first_normaliser(keyframe: Keyframe, known: np.ndarray) -> np.ndarray:
        T = keyframe.T_map_cam
        points = keyframe.points_cam[known] @ T[:3, :3].T + T[:3, 3]
        spread = max(float(np.median(keyframe.points_cam[known, 2])), 1e-6)
        return np.array([*np.median(points, 0), spread])
