"""Training scenes of the transformer: windows of views of synthetic rooms, with exact truth.

Rooms are rendered once, to files of a few dozen small views; every training step draws windows
from them. Half of a room's views follow a walk, the other half look at one place from around.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.model.configs import device_of
from feedforward_recon.model.pose_encoding import rigid_inverse, unprojected
from feedforward_recon.synthetic import Room
from feedforward_recon.synthetic.appearance import exposed
from feedforward_recon.synthetic.batch import render_batch
from feedforward_recon.synthetic.photos import photo_files
from feedforward_recon.synthetic.walk import look

SIDE = 112
HEIGHTS = (84, 84, 84, 112, 70)  # drawn evenly: most cameras are 4:3
# Rooms 2000... are trained on, rooms 9000... never; tests and benchmarks use seeds below 1000.
TRAIN, HELD_OUT = 'train', 'held_out'
FIRST_ROOM = {TRAIN: 2000, HELD_OUT: 9000}
FOV_DEG = (38.0, 85.0)
WALK_VIEWS, WALK_FPS = 40, 3.0
PLACES, VIEWS_PER_PLACE = 5, 8
CLEARANCE_M, SMALLEST_SPREAD_M = 0.15, 0.05
COARSER = 3
LONGEST_SPAN = 12  # walk views between the first and the last of a window, about four seconds


@dataclass(frozen=True)
class RoomViews:
    """Views of one room; the principal point is the middle, as the networks assume.

    image uint8 [V, H, W, 3] RGB; depth float16 [V, H, W] metres; K [V, 3, 3];
    T_world_cam [V, 4, 4]; group [V]: 0 for the walk, in its order, then one number per place.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float16]
    K: NDArray[np.float64]
    T_world_cam: NDArray[np.float64]
    group: NDArray[np.int8]


@dataclass(frozen=True)
class Windows:
    """B windows of N views; the world is the first camera, lengths are divided by ``scale``.

    images [B, N, 3, H, W] in 0..1; depth [B, N, H, W]; K [B, N, 3, 3];
    T_cam_world [B, N, 4, 4]; points [B, N, H, W, 3] in the world; scale [B] in metres: mean
    distance of the first view's points from its camera.
    """

    images: torch.Tensor
    depth: torch.Tensor
    K: torch.Tensor
    T_cam_world: torch.Tensor
    points: torch.Tensor
    scale: torch.Tensor


def render_views(out: Path, count: int, kind: str, *, photos: str | Path | None = None,
                 device: str = 'cpu') -> Iterator[Path]:
    """Render ``count`` rooms of a kind (`FIRST_ROOM`) to out/<kind>NNNN.npz; yields each file.

    photos: folder of *.jpg for the faces of the rooms, see `Room.with_photos`. Files that are
    there are kept, whatever they were rendered with. Raises InputError for a folder without
    photos, ConfigError for a device that does not work.
    """
    place = device_of(device)
    files = photo_files(photos) if photos else []
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        file = out / f'{kind}{index:04d}.npz'
        if not file.exists():
            part = file.with_name(f'.{file.name}')
            np.savez(part, **vars(views_of(FIRST_ROOM[kind] + index, photos=files,
                                          device=place)))
            part.replace(file)
        yield file


def load_views(folder: Path, kind: str) -> list[RoomViews]:
    """All rooms of a kind in a folder.

    Raises InputError when there is none.
    """
    files = sorted(folder.glob(f'{kind}*.npz'))
    if not files:
        raise InputError(f'expected {kind}*.npz in {folder}, found none; run `ffrecon-train '
                         'views` first')
    rooms = []
    for file in files:
        with np.load(file) as arrays:
            rooms.append(RoomViews(**arrays))
    return rooms


def views_of(seed: int, side: int = SIDE, photos: Sequence[Path] = (),
             device: str | torch.device = 'cpu') -> RoomViews:
    """The views of one room, square of ``side`` pixels, with photos on its faces if there are any.

    device: what renders them; on a GPU they differ in single grey levels.
    """
    rng = np.random.default_rng(seed)
    room = _coarse(Room.generate(seed))
    if photos:
        room = room.with_photos(photos, seed)
    walk = list(room.walk(WALK_VIEWS, seed, WALK_FPS))
    cameras = [_camera(rng, side)] * len(walk)
    rendered = render_batch(room, cameras, walk, device=device)
    around: list[NDArray[np.float64]] = []
    for _ in range(PLACES):
        index = int(rng.integers(WALK_VIEWS))
        distance = float(np.median(rendered.depth[index].cpu()))
        around += _poses_around(room, walk[index], distance, rng)
        cameras += [_camera(rng, side)] * VIEWS_PER_PLACE
    more = render_batch(room, cameras[WALK_VIEWS:], around, device=device)
    image, depth = (torch.cat([getattr(part, name) for part in (rendered, more)]).cpu().numpy()
                    for name in ('image', 'depth'))
    groups = [0] * WALK_VIEWS + [1 + k // VIEWS_PER_PLACE for k in range(len(around))]
    return RoomViews(np.ascontiguousarray(image.transpose(0, 2, 3, 1)), depth.astype(np.float16),
                     np.stack([c.K for c in cameras]), np.stack(walk + around),
                     np.array(groups, np.int8))


def _coarse(room: Room) -> Room:
    """The same room with textures that suffice for small images and are made much faster."""
    faces = [replace(face, texels_per_m=face.texels_per_m / COARSER) for face in room.faces]
    return replace(room, faces=faces, pyramids={})


def _camera(rng: np.random.Generator, side: int) -> Camera:
    focal = side / 2 / np.tan(np.deg2rad(rng.uniform(*FOV_DEG)) / 2)
    return Camera(side, side, focal, focal, (side - 1) / 2, (side - 1) / 2)


def _poses_around(room: Room, T_world_cam: NDArray, distance: float,
                  rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Poses in free space near a pose that look roughly at what it looks at."""
    target = T_world_cam[:3, 3] + distance * T_world_cam[:3, 2]
    spread = distance * rng.uniform(0.1, 0.6)
    found: list[NDArray[np.float64]] = []
    while len(found) < VIEWS_PER_PLACE:
        position = T_world_cam[:3, 3] + spread * rng.uniform(-1, 1, 3) * (1, 1, 0.6)
        if room.clearance(position[None])[0] < CLEARANCE_M and spread > SMALLEST_SPREAD_M:
            spread *= 0.9  # towards the pose itself, which is free
            continue
        x, y, z = target - position
        yaw, pitch, roll = np.array([np.arctan2(y, x), np.arctan2(z, np.hypot(x, y)), 0]) \
            + np.deg2rad(rng.normal(0, (5, 5, 6)))
        pose = np.eye(4)
        pose[:3, :3] = look(*np.array([[yaw], [pitch], [roll]]))[0]
        pose[:3, 3] = position
        found.append(pose)
    return found


def draw_windows(rooms: Sequence[RoomViews], rng: np.random.Generator, windows: int, views: int,
                 height: int) -> Windows:
    """Random windows of ``views`` overlapping views in random order, cut to ``height`` rows."""
    chosen = []
    for _ in range(windows):
        room = rooms[int(rng.integers(len(rooms)))]
        chosen.append((room, rng.permutation(_window(room, rng, views))))
    return gather(chosen, height)


def gather(chosen: Sequence[tuple[RoomViews, NDArray]], height: int) -> Windows:
    """The windows of given rooms and view numbers [N], cut to ``height`` rows in the middle."""
    top = (chosen[0][0].image.shape[1] - height) // 2
    rows = slice(top, top + height)
    images = torch.from_numpy(np.stack([r.image[i, rows] for r, i in chosen]))
    depth = torch.from_numpy(np.stack([r.depth[i, rows] for r, i in chosen])).float()
    K = torch.from_numpy(np.stack([r.K[i] for r, i in chosen]))
    K[..., 1, 2] -= top
    T_world_cam = torch.from_numpy(np.stack([r.T_world_cam[i] for r, i in chosen]))
    T_cam_world = rigid_inverse(T_world_cam) @ T_world_cam[:, :1]
    return normalised_windows(images.permute(0, 1, 4, 2, 3).float() / 255, depth, K.float(),
                              T_cam_world.float())


def normalised_windows(images: torch.Tensor, depth: torch.Tensor, K: torch.Tensor,
                       T_cam_world: torch.Tensor) -> Windows:
    """Windows of any unit of length, brought to the unit that the network is trained for."""
    first = unprojected(depth[:, 0], T_cam_world[:, 0], K[:, 0])
    scale = first.norm(dim=-1).mean((1, 2))
    T = T_cam_world.clone()
    T[..., :3, 3] /= scale[:, None, None]
    depth = depth / scale[:, None, None, None]
    return Windows(images, depth, K, T, unprojected(depth, T, K), scale)


def mirrored(windows: Windows) -> Windows:
    """The windows of the mirrored rooms: twice as many rooms for nothing."""
    flip = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    return replace(windows, images=windows.images.flip(-1), depth=windows.depth.flip(-1),
                   T_cam_world=flip[:, None] * windows.T_cam_world * flip,
                   points=windows.points.flip(-2) * flip[:3])


def _window(room: RoomViews, rng: np.random.Generator, views: int) -> NDArray[np.int64]:
    """View numbers of a piece of the walk or of one place."""
    if views <= VIEWS_PER_PLACE and rng.random() < 0.5:
        members = np.flatnonzero(room.group == 1 + rng.integers(room.group.max()))
        return rng.choice(members, views, replace=False)
    length = int((room.group == 0).sum())
    stride = int(rng.integers(1, 1 + max(1, min(4, LONGEST_SPAN // max(1, views - 1)))))
    # The walk is a loop: its end is next to its beginning.
    return (int(rng.integers(length)) + stride * np.arange(views)) % length


def augment_batch(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Exposure, colour, sharpness and noise of each view changed at random; [B, N, 3, H, W]."""
    shape = images.shape

    def draw(low: float, high: float, channels: int = 1) -> torch.Tensor:
        sample = torch.rand(*shape[:2], channels, 1, 1, generator=generator)
        return low + (high - low) * sample

    # A camera keeps most of its settings within a window; a part changes from view to view.
    gamma = draw(0.6, 1.6)[:, :1] * draw(0.9, 1.1)
    gain = draw(0.6, 1.3)[:, :1] * draw(0.9, 1.1) * draw(0.85, 1.15, 3)[:, :1]
    noise = draw(0.0, 0.03)[:, :1] * torch.randn(shape, generator=generator)
    grey = images.mean(2, keepdim=True)
    images = grey + draw(0.2, 1.2)[:, :1] * (images - grey)
    soft = F.avg_pool2d(F.pad(images.flatten(0, 1), (1, 1, 1, 1), 'replicate'), 3, 1)
    images = images.lerp(soft.unflatten(0, shape[:2]), draw(-0.5, 1.0).clamp(min=0))
    return exposed(images, gamma, gain, noise)
