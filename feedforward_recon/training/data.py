"""Training pairs for the encoder: two images and points known to correspond.

Photos give pairs through a random homography bent by a smooth flow (a stand-in for parallax);
posed RGB-D views (synthetic rooms) give true multi-view pairs with occlusion. Both get
independent photometric changes, so that the descriptor learns what stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import IterableDataset

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.model.compact import detect_corners

SIZE_WH = (320, 240)
POINTS = 320


@dataclass(frozen=True)
class Pair:
    """images uint8 [2, H, W, 3]; pixels float32 [2, N, 2], row n the same scene point."""

    images: np.ndarray
    pixels: np.ndarray


class PairStream(IterableDataset):
    """Endless seeded stream of pairs from photos and pre-rendered room views."""

    def __init__(self, photos: Sequence[Path], rooms: Sequence[Path], seed: int,
                 room_share: float) -> None:
        self.photos, self.rooms, self.seed = list(photos), list(rooms), seed
        self.room_share = room_share if rooms else 0.0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images [2, 3, H, W] in 0..1, pixels [2, N, 2])."""
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        cv2.setNumThreads(1)
        while True:
            pair = self._draw(rng)
            if pair is not None:
                images = torch.from_numpy(pair.images).permute(0, 3, 1, 2).float() / 255
                yield images, torch.from_numpy(pair.pixels)

    def _draw(self, rng: np.random.Generator) -> Pair | None:
        if rng.random() < self.room_share:
            with np.load(self.rooms[rng.integers(len(self.rooms))]) as views:
                return room_pair(views, rng)
        path = self.photos[rng.integers(len(self.photos))]
        photo = cv2.imread(str(path))
        if photo is None:
            raise InputError(f'expected a photo at {path}, found no readable image; remove it')
        return photo_pair(photo, rng)


def photo_pair(photo_bgr: np.ndarray, rng: np.random.Generator) -> Pair | None:
    """Two warped crops of one photo; None when too few points survive."""
    photo = cv2.cvtColor(photo_bgr, cv2.COLOR_BGR2RGB)
    maps = [_random_warp(photo.shape[:2], rng, strength) for strength in (0.3, 1.0)]
    images = [cv2.remap(photo, m[0], m[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
              for m in maps]
    # A point of image b is followed to the photo, then looked up in the inverse of map a.
    corners = _points(images[1], rng)
    in_photo = np.stack([_lookup(m, corners) for m in maps[1]], -1)
    in_a = _invert(maps[0], in_photo)
    keep = _inside(in_a) & np.all((in_photo > 2) & (in_photo < np.array(photo.shape[1::-1]) - 3),
                                  axis=1)
    return _finished(images, [in_a[keep], corners[keep]], rng)


def room_pair(views: np.lib.npyio.NpzFile, rng: np.random.Generator) -> Pair | None:
    """Two views of one room (arrays image, depth, K, T_world_cam); None without overlap."""
    images, depths, poses = views['image'], views['depth'], views['T_world_cam']
    # Views are stored in the order of a walk: neighbours in it are likely to overlap.
    a = rng.integers(len(images))
    b = (a + rng.integers(1, 4) * rng.choice([-1, 1])) % len(images)
    crops = [_random_crop(images[i].shape[:2], rng) for i in (a, b)]
    corners = _points(_cropped(images[b], crops[1]), rng)
    full_b = corners / crops[1][2] + crops[1][:2]
    z = _lookup(depths[b].astype(np.float32), full_b)
    K = views['K']
    points_b = np.c_[(full_b - K[:2, 2]) / (K[0, 0], K[1, 1]), np.ones(len(full_b))] * z[:, None]
    points_a = transform_points(inverse(poses[a]) @ poses[b], points_b)
    full_a = points_a[:, :2] / np.maximum(points_a[:, 2:], 1e-6) * (K[0, 0], K[1, 1]) + K[:2, 2]
    visible = np.abs(_lookup(depths[a].astype(np.float32), full_a) - points_a[:, 2]) \
        < 0.02 * points_a[:, 2]
    in_a = (full_a - crops[0][:2]) * crops[0][2]
    keep = (points_a[:, 2] > 0.1) & visible & _inside(in_a)
    images_ab = [_cropped(images[i], crop) for i, crop in zip((a, b), crops, strict=True)]
    return _finished(images_ab, [in_a[keep], corners[keep]], rng)


def augment_image(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random exposure, colour, blur, noise and JPEG artefacts of an RGB uint8 image."""
    x = image.astype(np.float32) / 255
    x = np.power(x, rng.uniform(0.6, 1.6)) * rng.uniform(0.6, 1.3, 3).astype(np.float32) \
        .clip(0.75, 1.2) * rng.uniform(0.6, 1.3) + rng.uniform(-0.08, 0.08)
    if rng.random() < 0.35:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.4, 1.6))
    if rng.random() < 0.2:
        x = _motion_blur(x, rng)
    if rng.random() < 0.3:
        left, right = rng.uniform(0.6, 1.2, 2)
        ramp = np.linspace(left, right, x.shape[1]).astype(np.float32)
        x = x * ramp[None, :, None]
    x = x + rng.normal(0, rng.uniform(0, 0.04), x.shape).astype(np.float32)
    out = (x.clip(0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.3:
        quality = int(rng.integers(35, 90))
        out = cv2.imdecode(cv2.imencode('.jpg', out, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)
    return out


def _motion_blur(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    length = int(rng.integers(3, 8))
    kernel = np.zeros((length, length), np.float32)
    kernel[length // 2] = 1 / length
    turn = cv2.getRotationMatrix2D(((length - 1) / 2,) * 2, rng.uniform(0, 180), 1)
    turned = np.asarray(cv2.warpAffine(kernel, turn, (length, length)), np.float32)
    return cv2.filter2D(x, -1, np.divide(turned, max(float(turned.sum()), 1e-6)))


def _random_warp(size_hw: tuple[int, int], rng: np.random.Generator,
                 strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Sampling maps (x, y) [H, W] into a photo: similarity, perspective and smooth flow."""
    w, h = SIZE_WH
    fit = min(size_hw[1] / w, size_hw[0] / h)
    zoom = fit * np.exp(rng.uniform(-0.7, 0.0))
    angle = strength * rng.normal(0, 0.2)
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    slack = np.maximum(0, np.array(size_hw[::-1]) - zoom * np.array([w, h])) / 2
    centre = np.array(size_hw[::-1]) / 2 + rng.uniform(-1, 1, 2) * slack
    shear = np.eye(2) + strength * rng.normal(0, 0.1, (2, 2))
    linear = np.array([[cos, -sin], [sin, cos]]) @ shear
    u, v = np.meshgrid(np.arange(w) - w / 2, np.arange(h) - h / 2)
    tilt = strength * rng.normal(0, 0.4, 2) / w
    depth = np.maximum(0.3, 1 + tilt[0] * u + tilt[1] * v)
    flow = [cv2.resize(rng.normal(0, 3.0 * strength * rng.random(), (4, 5)).astype(np.float32),
                       (w, h), interpolation=cv2.INTER_CUBIC) for _ in range(2)]
    x = (linear[0, 0] * u + linear[0, 1] * v) / depth + centre[0] + flow[0]
    y = (linear[1, 0] * u + linear[1, 1] * v) / depth + centre[1] + flow[1]
    return x.astype(np.float32), y.astype(np.float32)


def _lookup(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    p = pixels.astype(np.float32)
    return cv2.remap(image, p[None, :, 0], p[None, :, 1], cv2.INTER_LINEAR,
                     borderMode=cv2.BORDER_REPLICATE)[0]


def _invert(maps: tuple[np.ndarray, np.ndarray], target: np.ndarray) -> np.ndarray:
    """Pixels whose map value is ``target`` [N, 2], by Newton steps; NaN if not found."""
    p = np.tile(np.array(SIZE_WH, float) / 2, (len(target), 1))
    gradients = [np.gradient(m) for m in maps]
    for _ in range(12):
        value = np.stack([_lookup(m, p) for m in maps], -1)
        J = np.stack([np.stack([_lookup(g[1].astype(np.float32), p),
                                _lookup(g[0].astype(np.float32), p)], -1) for g in gradients], 1)
        p = p + np.linalg.solve(J, (target - value)[..., None])[..., 0].clip(-60, 60)
        p = p.clip(-8, np.array(SIZE_WH) + 8.0)
    error = np.linalg.norm(np.stack([_lookup(m, p) for m in maps], -1) - target, axis=1)
    return np.where(error[:, None] < 0.2, p, np.nan)


def _random_crop(size_hw: tuple[int, int],
                 rng: np.random.Generator) -> tuple[float, float, float]:
    """(left, top, scale) of a window that fills the training size."""
    smallest = max(SIZE_WH[0] / size_hw[1], SIZE_WH[1] / size_hw[0])
    scale = np.exp(rng.uniform(np.log(smallest), np.log(max(1.0, smallest))))
    room = np.array(size_hw[::-1]) - np.array(SIZE_WH) / scale
    left, top = rng.uniform(0, 1, 2) * np.maximum(room, 0)
    return float(left), float(top), float(scale)


def _cropped(image: np.ndarray, crop: tuple[float, float, float]) -> np.ndarray:
    left, top, scale = crop
    M = np.array([[1 / scale, 0, left], [0, 1 / scale, top]], np.float32)
    if scale < 0.9:
        image = cv2.GaussianBlur(image, (0, 0), 0.45 / scale)
    return cv2.warpAffine(image, M, SIZE_WH, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_REFLECT)


def _points(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Corners, filled up with random pixels so that weak texture is trained too."""
    corners = detect_corners(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 2 * POINTS, 4)
    extra = rng.uniform(4, np.array(SIZE_WH) - 5, (POINTS // 2, 2))
    return np.concatenate([corners, extra]).astype(np.float32)


def _inside(pixels: np.ndarray) -> np.ndarray:
    with np.errstate(invalid='ignore'):
        return np.all((pixels > 3) & (pixels < np.array(SIZE_WH) - 4), axis=1)


def _finished(images: list[np.ndarray], pixels: list[np.ndarray],
              rng: np.random.Generator) -> Pair | None:
    count = len(pixels[0])
    if count < POINTS // 4:
        return None
    chosen = rng.choice(count, POINTS, replace=count < POINTS)
    # Detected corners repeat to within about a pixel; training sees the same jitter.
    jitter = rng.normal(0, 0.5, (POINTS, 2))
    stack = np.stack([pixels[0][chosen] + jitter, pixels[1][chosen]]).astype(np.float32)
    return Pair(np.stack([augment_image(i, rng) for i in images]), stack)
