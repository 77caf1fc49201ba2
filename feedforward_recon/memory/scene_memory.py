"""``SceneMemory``: everything localising needs, frozen, of a size fixed at construction.

Two readings of one scene. The *landmark slots* are exact: a bounded table of fused descriptors
with their points, read by nearest neighbour. The *coordinate network* knows more of the scene than
fits into slots, and what of it exists only once: descriptors go in, points and votes come out.
Both are stored quantised (int8, uint16, uint8), and queries run on exactly these bytes, so what
is saved is what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from feedforward_recon.errors import MapError
from feedforward_recon.memory.coordinate_network import POINT_LEVELS, CoordinateNetwork
from feedforward_recon.memory.keys import keys_for


@dataclass(frozen=True)
class SceneMemory:
    """Quantised, immutable memory of one scene.

    slot_descriptors: int8 [S, D]; slot_points: uint16 [S, 3] inside the box;
    slot_counts: uint8 [S], how often a slot was observed, 0 for an empty slot.
    cell_points: uint16 [T, C, 3] inside the box; cell_weights: uint8 [T, C], what the cells of the
    coordinate network weigh, 0 for those that say nothing.
    box: float32 [2, 3], lowest corner and size of the box around the points, map units.
    typical_depth: float32 [1], map units. keys: uint8 [32], SHA-256 of the keys of the network.
    """

    slot_descriptors: torch.Tensor
    slot_points: torch.Tensor
    slot_counts: torch.Tensor
    cell_points: torch.Tensor
    cell_weights: torch.Tensor
    box: torch.Tensor
    typical_depth: torch.Tensor
    keys: torch.Tensor

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
    def network(self) -> CoordinateNetwork:
        """The coordinate network, for reading.

        Raises MapError when it was written with other keys than those of this version.
        """
        keys = keys_for(self.dim, len(self.cell_weights))
        written = bytes(self.keys.numpy()).hex()
        if written != keys.sha256:
            raise MapError(f'expected a coordinate network with keys {keys.sha256[:12]}, found '
                           f'one with {written[:12]}; map again, or use the version that made it')
        return CoordinateNetwork(keys, self.cell_points, self.cell_weights,
                                 self.box.numpy().astype(np.float64), float(self.typical_depth))

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by the names they are saved under."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
            return SceneMemory(**tensors)
        except (SafetensorError, OSError, TypeError) as error:
            raise MapError(f'expected a complete scene memory in {path}, found a damaged file '
                           f'({error}); save the map again') from error


def box_around(*points: np.ndarray) -> np.ndarray:
    """Lowest corner and size [2, 3] of the box around sets of points [N, 3]."""
    inside = np.concatenate([np.zeros((0, 3)), *points])
    if not len(inside):
        inside = np.zeros((1, 3))
    low = inside.min(0)
    return np.stack([low, np.maximum(inside.max(0) - low, 1e-6)]).astype(np.float32)


def quantise_points(points: np.ndarray, used: np.ndarray, box: np.ndarray) -> torch.Tensor:
    """uint16 levels [..., 3] of points [..., 3] in a box [2, 3]; unused ones become zero."""
    low, size = box.astype(np.float64)
    levels = np.rint((points - low) / size * POINT_LEVELS).clip(0, POINT_LEVELS)
    return torch.from_numpy(np.where(used[..., None], levels, 0).astype(np.uint16))
