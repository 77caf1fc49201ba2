"""``SceneMemory``: everything localising needs, frozen, of a size fixed at construction.

Two readings of one scene. The *coordinate network* is global and smooth: any descriptor gets
a point, in constant time. The *landmark slots* are local and exact: a bounded table of fused
descriptors with their points, read by nearest neighbour. Both are stored quantised (fp16, int8,
uint16), and queries run on exactly these bytes, so what is saved is what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from feedforward_recon.errors import MapError
from feedforward_recon.memory.coordinate_mlp import CoordinateNetwork, network_from

DESCRIPTOR_SCALE = 127.0  # largest int8
POINT_LEVELS = 65535  # largest uint16: 0.15 mm in a box of 10 m


@dataclass(frozen=True)
class SceneMemory:
    """Quantised, immutable memory of one scene.

    network: fp16 tensors of the coordinate network, by name.
    slot_descriptors: int8 [S, D]; slot_points: uint16 [S, 3] inside the box;
    slot_counts: uint8 [S], how often a slot was observed, 0 for an empty slot.
    box: float32 [2, 3], lowest corner and size of the box around the points, map units.
    normaliser: float32 [4], centre (x, y, z) and scale of the network's output, map units.
    """

    network: dict[str, torch.Tensor]
    slot_descriptors: torch.Tensor
    slot_points: torch.Tensor
    slot_counts: torch.Tensor
    box: torch.Tensor
    normaliser: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; the same for every content."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def dim(self) -> int:
        """Length of a descriptor."""
        return self.slot_descriptors.shape[1]

    @cached_property
    def occupied(self) -> np.ndarray:
        """Indices [V] of the slots in use."""
        return np.flatnonzero(self.slot_counts.numpy())

    @cached_property
    def points(self) -> np.ndarray:
        """Map points float64 [V, 3] of the slots in use."""
        levels = self.slot_points.numpy()[self.occupied].astype(np.float64) / POINT_LEVELS
        low, size = self.box.numpy().astype(np.float64)
        return low + levels * size

    @cached_property
    def descriptors(self) -> torch.Tensor:
        """L2-normalised descriptors float32 [V, D] of the slots in use."""
        raw = self.slot_descriptors[torch.from_numpy(self.occupied)].float()
        return torch.nn.functional.normalize(raw, dim=-1)

    @cached_property
    def _network(self) -> CoordinateNetwork:
        return network_from(self.network)

    @torch.inference_mode()
    def predict(self, descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points float64 [N, 3] (map units) and expected error [N] (px) of descriptors [N, D]."""
        out, log_sigma = self._network(torch.from_numpy(descriptors))
        centre, scale = self.normaliser[:3].double(), float(self.normaliser[3])
        return (centre + scale * out.double()).numpy(), log_sigma.exp().numpy()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by the names they are saved under."""
        named = {f'network.{k}': v for k, v in self.network.items()}
        named |= {name: getattr(self, name) for name in
                  ('slot_descriptors', 'slot_points', 'slot_counts', 'box', 'normaliser')}
        return named

    def save(self, path: str | Path) -> None:
        """Write the memory as safetensors."""
        save_file({k: v.contiguous() for k, v in self.tensors().items()}, str(path))

    @staticmethod
    def load(path: str | Path) -> SceneMemory:
        """Read a memory; raises MapError when the file is missing, damaged or incomplete."""
        if not Path(path).is_file():
            raise MapError(f'expected the memory of a map at {path}, found no file; give the '
                           'folder that `ffrecon map --out` wrote')
        try:
            with safe_open(str(path), 'pt') as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            network = {k.removeprefix('network.'): tensors.pop(k)
                       for k in list(tensors) if k.startswith('network.')}
            return SceneMemory(network=network, **tensors)
        except (SafetensorError, OSError, TypeError) as error:
            raise MapError(f'expected a complete scene memory in {path}, found a damaged file '
                           f'({error}); save the map again') from error


def quantise_descriptors(descriptors: np.ndarray) -> torch.Tensor:
    """int8 [S, D] of L2-normalised float descriptors, scaled so that each row fills the range."""
    peak = np.abs(descriptors).max(1, keepdims=True)
    scaled = descriptors / np.maximum(peak, 1e-9) * DESCRIPTOR_SCALE
    return torch.from_numpy(np.rint(scaled).astype(np.int8))


def quantise_points(points: np.ndarray, used: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint16 levels [S, 3] and the box [2, 3] of points [S, 3]; unused rows become zero."""
    inside = points[used] if used.any() else np.zeros((1, 3))
    low = inside.min(0)
    size = np.maximum(inside.max(0) - low, 1e-6)
    levels = np.rint((points - low) / size * POINT_LEVELS).clip(0, POINT_LEVELS)
    levels[~used] = 0
    box = torch.from_numpy(np.stack([low, size]).astype(np.float32))
    return torch.from_numpy(levels.astype(np.uint16)), box
