"""A transformer that trains in no time, what it is trained on, and windows of a known truth."""

import cv2
import numpy as np
import torch

from benchmarks.rendered_photos import write_scene
from feedforward_recon.model import configs
from feedforward_recon.model.ray_stem import cell_pixels
from feedforward_recon.model.ray_transformer import RayConfig
from feedforward_recon.training import room_views, validation
from feedforward_recon.training import windows as windows_module
from feedforward_recon.training.room_files import room_source
from feedforward_recon.training.windows import Windows

MICRO = RayConfig(dim=32, heads=4, depth=3)
SIZE_WH = (64, 48)


def training_folders(room_file, root):
    """Rooms as `ffrecon-train views` writes them, and the walk as two scenes of posed photos."""
    (root / 'rooms').mkdir()
    for kind in room_views.FIRST_ROOM:
        (root / 'rooms' / f'{kind}0000.npz').write_bytes(room_file.read_bytes())
    for name in ('hall', 'yard'):
        write_scene(room_source(room_file), root / 'photos' / name)
    return root


def use_small_windows(patch):
    """The network `micro`, and small windows that are drawn in no time."""
    patch.setitem(configs.CONFIGS, 'micro', MICRO)
    patch.setattr(windows_module, 'SIZES_WH', (SIZE_WH,))
    patch.setattr(windows_module, 'VIEWS', (2,))
    patch.setattr(validation, 'LANDSCAPE', SIZE_WH)
    patch.setattr(validation, 'WINDOWS', 1)
    patch.setattr(validation, 'VIEWS', 2)


def pixel_grid():
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in SIZE_WH[::-1]),
                          indexing='ij')
    return torch.stack([x, y], -1).flatten(0, 1)


def plane_depth(K, T_world_cam, pixels):
    """Depth of a tilted plane at pixels [N, P, 2] of N views."""
    normal = torch.tensor([0.2, 0.1, 1.0])
    rays = torch.cat([(pixels - K[0, :2, 2]) / K[0, 0, 0], torch.ones(*pixels.shape[:-1], 1)], -1)
    rays = rays @ T_world_cam[:, :3, :3].transpose(1, 2)
    depth = (1 - T_world_cam[:, :3, 3] @ normal)[:, None] / (rays @ normal)
    return depth, rays * depth[..., None] + T_world_cam[:, None, :3, 3]


def texture(points):
    """Colours of places."""
    return 0.5 + 0.5 * torch.stack([(9 * points[..., k] + 7 * points[..., 1 - k % 2] + k).sin()
                                    for k in range(3)], -1)


def plane_windows():
    """Three views of a tilted plane; depth is known at all cells, and so are matches."""
    K = torch.tensor([[60.0, 0, 31.5], [0, 60, 23.5], [0, 0, 1]]).repeat(3, 1, 1)
    T = torch.eye(4).repeat(3, 1, 1)
    for view, turn, place in ((1, 0.15, (0.2, 0.05, 0.0)), (2, -0.1, (-0.1, 0.1, 0.1))):
        T[view, :3, :3] = torch.from_numpy(cv2.Rodrigues(np.array([0.05, turn, 0.1]))[0])
        T[view, :3, 3] = torch.tensor(place)
    cells = cell_pixels(SIZE_WH[::-1]).expand(3, -1, -1)
    depth, points = plane_depth(K, T, cells)
    unit = points[0].norm(dim=-1).median()
    colours = texture(plane_depth(K, T, pixel_grid().expand(3, -1, -1))[1])
    images = colours.unflatten(1, SIZE_WH[::-1]).movedim(-1, 1)
    there = points[:, None] @ torch.eye(3) - T[None, :, None, :3, 3]
    there = torch.einsum('jab,ijma->ijmb', T[:, :3, :3], there)
    found = there[..., :2] / there[..., 2:] * 60 + torch.tensor([31.5, 23.5])
    seen = ((found >= 0) & (found <= torch.tensor(SIZE_WH) - 1)).all(-1)
    seen &= ~torch.eye(3, dtype=torch.bool)[..., None]
    T[:, :3, 3] /= unit
    known = torch.ones(depth.shape, dtype=torch.bool)
    return Windows(*(x[None] for x in (images, K, T, cells, depth / unit, known, cells, found,
                                       seen)))
