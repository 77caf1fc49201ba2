"""One function for batches of views: NumPy and OpenCV on a CPU, torch on other devices.

>>> views = render_batch(Room.generate(7), camera, poses, device='cuda')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.synthetic.render import Surface
from feedforward_recon.synthetic.room import Room
from feedforward_recon.synthetic.torch_render import TorchRoom
from feedforward_recon.synthetic.views import MovingFaces, RenderedViews, Shots

# A room's rectangles and textures are kept on the device for the next batch of it.
_on_device = lru_cache(maxsize=2)(TorchRoom)


def render_batch(room: Room, cameras: Camera | Sequence[Camera],
                 T_world_cam: NDArray[np.float64] | Sequence[NDArray[np.float64]], *,
                 device: str | torch.device = 'cpu', moving: Sequence[MovingFaces] = ()
                 ) -> RenderedViews:
    """Views of a room from poses [V, 4, 4] (OpenCV axes), on a device.

    cameras: one for all views, or one for each, all of one image size. moving: faces that each
    view sees elsewhere. Raises InputError when these do not fit together.
    """
    poses = np.asarray(T_world_cam, float)
    every = [cameras] * len(poses) if isinstance(cameras, Camera) else cameras
    return renderer_for(device)(Shots(room, every, poses, moving))


def renderer_for(device: str | torch.device) -> Callable[[Shots], RenderedViews]:
    """What renders fastest on a device: the NumPy rasteriser on a CPU, torch elsewhere."""
    place = torch.device(device)
    if place.type == 'cpu':
        return _one_by_one
    return lambda shots: _on_device(shots.room, place).render(shots)


def _one_by_one(shots: Shots) -> RenderedViews:
    parts = []
    for index, camera in enumerate(shots.cameras):
        surfaces = _moved(shots, index) if shots.moving else shots.room.surfaces
        parts.append(shots.room.seen(surfaces, camera, shots.T_world_cam[index]))
    image, depth, nearest = (torch.from_numpy(np.stack(arrays))
                             for arrays in zip(*parts, strict=True))
    return shots.finished(image.permute(0, 3, 1, 2).contiguous(), depth, nearest)


def _moved(shots: Shots, index: int) -> list[Surface]:
    """The rectangles of the room where one view sees them."""
    surfaces = list(shots.room.surfaces)
    for group in shots.moving:
        T = np.asarray(group.T_world_object[index], float)
        R, t = T[:3, :3], T[:3, 3]
        for face in group.faces:
            s = shots.room.surfaces[face]
            surfaces[face] = Surface(R @ s.corner + t, R @ s.side_u, R @ s.side_v)
    return surfaces
