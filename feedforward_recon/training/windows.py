"""Training windows: a few overlapping views of a scene, and what is known about them.

Everything random follows from a seed and a number, so a run that was interrupted draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.training.covisible_views import ANGLE_DEG
from feedforward_recon.training.view_sources import SeenPoints, ViewSource
from feedforward_recon.training.virtual_camera import (
    Variation,
    VirtualCamera,
    varied_view,
    whole_view,
)

VIEWS = (2, 4, 4, 8)  # in a window, drawn evenly
POINTS, MATCHED = 320, 48  # known points of a view; those looked for in the other views
MIN_KNOWN = 10  # points of the first view, which set the unit
# About as many pixels each. Most cameras are 4:3 and lie; cars are wide.
SIZES_WH = ((256, 192), (256, 192), (256, 192), (192, 256), (192, 256), (288, 176), (176, 288),
            (320, 160), (224, 224), (384, 128))
MOST_DRAWS = 500  # of scenes, until one has a window
MAX_ASPECT = 1.9  # of a photo and the view cut from it, one over the other


@dataclass(frozen=True)
class Windows:
    """B windows of N views; the world is the first camera.

    Lengths are in units of the median distance of the first view's points.

    images: [B, N, 3, H, W] in 0..1. K: [B, N, 3, 3], pixel centres at integers. T_world_cam:
    [B, N, 4, 4]. pixels, depth, known: [B, N, P, 2], [B, N, P], bool [B, N, P]: where z-depth is
    known and nothing moves. queries: [B, N, M, 2] pixels of some of these points. found, seen:
    [B, N, N, M, 2], bool [B, N, N, M]: where view j shows those of view i. What moves between the
    views is in none of them, so no loss speaks of it.
    """

    images: torch.Tensor
    K: torch.Tensor
    T_world_cam: torch.Tensor
    pixels: torch.Tensor
    depth: torch.Tensor
    known: torch.Tensor
    queries: torch.Tensor
    found: torch.Tensor
    seen: torch.Tensor

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        return Windows(*(getattr(self, f.name).to(device) for f in fields(self)))

    @property
    def points(self) -> torch.Tensor:
        """Known points [B, N, P, 3] in the world."""
        own = self.rays * self.depth[..., None]
        T = self.T_world_cam
        return own @ T[..., :3, :3].transpose(-1, -2) + T[..., None, :3, 3]

    @property
    def rays(self) -> torch.Tensor:
        """Of the known points [B, N, P, 3], with z = 1."""
        focal = self.K.diagonal(dim1=-2, dim2=-1)[..., None, :2]
        xy = (self.pixels - self.K[..., None, :2, 2]) / focal
        return F.pad(xy, (0, 1), value=1.0)


class WindowStream:
    """Batches of windows of photos and rooms.

    photo_share: of the windows. counts: of the views of a window, drawn evenly; those of VIEWS
    if none are given. Drawing one raises InputError where no scene has enough views.
    """

    def __init__(self, photos: Sequence[ViewSource], rooms: Sequence[ViewSource],
                 photo_share: float, seed: int, counts: Sequence[int] = ()) -> None:
        self._photos, self._rooms, self._seed = photos, rooms, seed
        self._counts = counts or VIEWS
        self._share = photo_share if photos and rooms else float(bool(photos))

    def batch(self, number: Sequence[int], views: int) -> Windows:
        """The batch of a number, such as (step, process), of about so many views in all."""
        rng = np.random.default_rng([self._seed, *number])
        count = int(rng.choice(self._counts))
        size_wh = SIZES_WH[int(rng.integers(len(SIZES_WH)))]
        photos = [p for p in self._photos if _alike(p.size_wh, size_wh)]
        if not photos and not self._rooms:  # rather cut much than nothing
            photos = list(self._photos)
        return batched([self._window(photos, rng, count, size_wh)
                        for _ in range(max(1, views // count))])

    def _window(self, photos: Sequence[ViewSource], rng: np.random.Generator, count: int,
                size_wh: tuple[int, int]) -> Windows:
        for _ in range(MOST_DRAWS):
            from_photos = photos and rng.random() < self._share
            sources = photos if from_photos or not self._rooms else self._rooms
            window = drawn_window(sources[int(rng.integers(len(sources)))], rng, count, size_wh)
            if window is not None:
                return window
        raise InputError(f'expected scenes with {count} overlapping views that differ by '
                         f'{ANGLE_DEG[0]:.0f} to {ANGLE_DEG[1]:.0f} degrees, found none in '
                         f'{MOST_DRAWS} draws; add scenes, or views between those there are')


def batched(windows: Sequence[Windows]) -> Windows:
    """Windows of as many views of one size in one batch."""
    return Windows(*(torch.cat([getattr(w, f.name) for w in windows]) for f in fields(Windows)))


def drawn_window(source: ViewSource, rng: np.random.Generator, count: int,
                 size_wh: tuple[int, int], *, varied: bool = True) -> Windows | None:
    """One window of a source; None where it has none with known points.

    varied: through random cameras and perhaps mirrored, else the images as they are.
    """
    views = source.window(rng, count)
    if views is None:
        return None
    how = Variation.drawn(rng)
    cameras = [varied_view(source.camera(v), size_wh, how, rng) if varied else
               whole_view(source.camera(v), size_wh) for v in views]
    points = [source.points(v, camera, POINTS, rng)
              for v, camera in zip(views, cameras, strict=True)]
    if len(points[0].depth) < MIN_KNOWN:
        return None
    images = np.stack([camera.looked_through(source.image(v), source.camera(v))
                       for v, camera in zip(views, cameras, strict=True)])
    T = np.stack([camera.pose(source.pose(v)) for v, camera in zip(views, cameras, strict=True)])
    matches = _matches(source, views, cameras, points, rng)
    window = _tensors(images, np.stack([c.K for c in cameras]), inverse(T[0]) @ T, points, matches)
    return mirrored(window) if varied and rng.random() < 0.5 else window


def _matches(source: ViewSource, views: np.ndarray, cameras: Sequence[VirtualCamera],
             points: Sequence[SeenPoints], rng: np.random.Generator
             ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """queries, found and seen of ``Windows``, of one window."""
    count = len(views)
    queries = np.zeros((count, MATCHED, 2))
    found, seen = np.zeros((count, count, MATCHED, 2)), np.zeros((count, count, MATCHED), bool)
    for i, own in enumerate(points):
        rows = rng.permutation(len(own.depth))[:MATCHED]
        queries[i, :len(rows)] = own.pixels[rows]
        for j in range(count):
            if i == j:
                continue
            at, visible = source.found(views[j], cameras[j], own.keys[rows])
            found[i, j, :len(rows)][visible] = at[visible]
            seen[i, j, :len(rows)] = visible
    return queries, found, seen


def _tensors(images: np.ndarray, K: np.ndarray, T: np.ndarray, points: Sequence[SeenPoints],
             matches: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Windows:
    pixels, depth = np.zeros((len(K), POINTS, 2)), np.ones((len(K), POINTS))
    known = np.zeros((len(K), POINTS), bool)
    for view, own in enumerate(points):
        rows = slice(len(own.depth))
        pixels[view, rows], depth[view, rows], known[view, rows] = own.pixels, own.depth, True
    queries, found, seen = matches
    parts = (np.moveaxis(images, -1, 1) / np.float32(255), K, T, pixels, depth, known, queries,
             found, seen)
    arrays = (x if x.dtype == bool else x.astype(np.float32) for x in parts)
    return _with_unit(Windows(*(torch.from_numpy(np.ascontiguousarray(x))[None] for x in arrays)))


def _with_unit(window: Windows) -> Windows:
    distance = (window.rays * window.depth[..., None]).norm(dim=-1)
    unit = distance[:, 0][window.known[:, 0]].median()
    T = window.T_world_cam.clone()
    T[..., :3, 3] /= unit
    return replace(window, T_world_cam=T, depth=window.depth / unit)


def mirrored(windows: Windows) -> Windows:
    """The windows of the mirrored scenes: twice as many scenes for nothing."""
    last = windows.images.shape[-1] - 1
    flip = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    K = windows.K.clone()
    K[..., 0, 2] = last - K[..., 0, 2]

    def turned(pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack([last - pixels[..., 0], pixels[..., 1]], -1)

    return replace(windows, images=windows.images.flip(-1), K=K,
                   T_world_cam=flip[:, None] * windows.T_world_cam * flip,
                   pixels=turned(windows.pixels), queries=turned(windows.queries),
                   found=turned(windows.found))


def cropped(windows: Windows, multiple: int) -> Windows:
    """The windows with sides that are multiples of some number of pixels.

    What is cut off on the right and below is no longer known. The camera stays.
    """
    height, width = (side // multiple * multiple for side in windows.images.shape[-2:])
    last = torch.tensor([width - 1, height - 1])

    def inside(pixels: torch.Tensor) -> torch.Tensor:
        return (pixels <= last.to(pixels.device)).all(-1)

    seen = windows.seen & inside(windows.found) & inside(windows.queries)[:, :, None]
    return replace(windows, images=windows.images[..., :height, :width],
                   known=windows.known & inside(windows.pixels), seen=seen)


def _alike(a_wh: tuple[int, int], b_wh: tuple[int, int]) -> bool:
    ratio = np.log(a_wh[0] / a_wh[1]) - np.log(b_wh[0] / b_wh[1])
    return bool(abs(ratio) < np.log(MAX_ASPECT))
