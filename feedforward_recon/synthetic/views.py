"""What a batch of views of a room is made from, and what comes out: tensors and exact truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.synthetic.room import Room


@dataclass(frozen=True)
class MovingFaces:
    """Faces of a room that move together, as the six of a box.

    faces: their indices in the room. T_world_object [V, 4, 4]: rigid motion, for each view, from
    where the room has them (identity: where they are) to where the view sees them. Their texture
    keeps the light of the place where the room has them.
    """

    faces: Sequence[int]
    T_world_object: NDArray[np.float64]


@dataclass(frozen=True)
class RenderedViews:
    """V views of a room, on the device that they were rendered on.

    image uint8 [V, 3, H, W] RGB; depth float32 [V, H, W]: z-depth in metres, 0 where nothing is
    seen; surface int32 [V, H, W]: index of the face of the room, -1 where there is none; moving
    bool [V, H, W]: pixels of `MovingFaces`. K float32 [V, 3, 3], without distortion;
    T_world_cam float64 [V, 4, 4].
    """

    image: torch.Tensor
    depth: torch.Tensor
    surface: torch.Tensor
    moving: torch.Tensor
    K: torch.Tensor
    T_world_cam: torch.Tensor


@dataclass(frozen=True)
class Shots:
    """V views to be rendered: cameras of one size, T_world_cam [V, 4, 4], and what moves.

    Raises InputError for other numbers of cameras or motions than poses, cameras of different
    sizes, and faces that the room does not have.
    """

    room: Room
    cameras: Sequence[Camera]
    T_world_cam: NDArray[np.float64]
    moving: Sequence[MovingFaces] = ()

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        counts = {len(self.cameras), len(self.T_world_cam),
                  *(len(group.T_world_object) for group in self.moving)}
        if len(counts) > 1 or counts == {0}:
            raise InputError('expected one camera and one motion of each group of faces for every '
                             f'pose, at least one, found {sorted(counts)}')
        sizes = {camera.size_wh for camera in self.cameras}
        if len(sizes) > 1:
            raise InputError('expected cameras of one image size, found '
                             f'{sorted(sizes)}; render each size by itself')
        known = range(len(self.room.faces))
        if not all(face in known for group in self.moving for face in group.faces):
            raise InputError(f'expected moving faces in 0..{len(known) - 1}, found others')

    @property
    def groups(self) -> NDArray[np.int64]:
        """Of each face [S]: 0 where it stands still, else 1 + the index of what moves it."""
        groups = np.zeros(len(self.room.faces), np.int64)
        for number, group in enumerate(self.moving, 1):
            groups[list(group.faces)] = number
        return groups

    @property
    def T_world_group(self) -> NDArray[np.float64]:
        """Motions [V, 1 + G, 4, 4] of all groups; the first stands still."""
        still = np.broadcast_to(np.eye(4), (len(self.T_world_cam), 4, 4))
        return np.stack([still, *(np.asarray(g.T_world_object, float) for g in self.moving)], 1)

    def finished(self, image: torch.Tensor, depth: torch.Tensor, surface: torch.Tensor
                 ) -> RenderedViews:
        """The views with their cameras, and the pixels of what moves."""
        place = surface.device
        moves = torch.from_numpy(np.append(self.groups > 0, False)).to(place)  # index -1: nothing
        K = torch.from_numpy(np.stack([camera.K for camera in self.cameras]))
        return RenderedViews(image, depth, surface, moves[surface.long()], K.float().to(place),
                             torch.from_numpy(np.array(self.T_world_cam, float)).to(place))
