"""What a network keeps of a scene: a value, which can be saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import nn

from feedforward_recon.errors import InputError
from feedforward_recon.model.layers import GlobalBlock


@dataclass(frozen=True)
class NetworkState:
    """State of the network after writing a scene.

    states: one per global block, of the kind that its attention makes.
    camera_tokens: float32 [B, S, C], one of each frame written so far.
    """

    states: tuple[Any, ...]
    camera_tokens: torch.Tensor

    @property
    def written(self) -> int:
        """Number of frames whose tokens are kept."""
        return self.camera_tokens.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state as named tensors, for saving."""
        named = {f'{index}.{name}': tensor for index, state in enumerate(self.states)
                 for name, tensor in state.tensors().items()}
        return {'camera_tokens': self.camera_tokens, **named}

    def with_few_camera_tokens(self, limit: int) -> NetworkState:
        """The same state with at most ``limit`` camera tokens per scene.

        Kept are the first, whose camera is the world, and then always the one that differs
        most from those already kept (Gonzalez 1985): the views that span the scene.
        """
        if self.camera_tokens.shape[1] <= limit:
            return self
        kept = torch.stack([scene[_spread_out(scene, limit)] for scene in self.camera_tokens])
        return replace(self, camera_tokens=kept)


def state_of(blocks: nn.ModuleList, attention: str, tensors: Mapping[str, torch.Tensor]
             ) -> NetworkState:
    """The state that ``tensors`` were taken from (`NetworkState.tensors`).

    blocks, attention: the global blocks of the network, and the name of what they have.
    Raises InputError when they belong to another network.
    """
    states = []
    for index, block in enumerate(blocks):
        kind = cast(GlobalBlock, block).attn.state_type
        names = [field.name for field in fields(kind)]
        missing = [name for name in names if f'{index}.{name}' not in tensors]
        if missing or 'camera_tokens' not in tensors:
            raise InputError(f'expected the state of {attention} attention in {len(blocks)} '
                             f'blocks, found none of block {index}; map again with this model')
        states.append(kind.from_tensors({n: tensors[f'{index}.{n}'] for n in names}))
    return NetworkState(tuple(states), tensors['camera_tokens'])


def _spread_out(points: torch.Tensor, count: int) -> torch.Tensor:
    """Indices, in ascending order, of ``count`` points [S, C] far from each other."""
    chosen = [0]
    distance = (points - points[0]).norm(dim=-1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=-1))
    return torch.tensor(sorted(chosen), device=points.device)
