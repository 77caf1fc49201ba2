"""Training pairs for the encoder: two images and points known to correspond.

Photos give pairs through a random homography bent by a smooth flow (a stand-in for parallax);
posed RGB-D views (synthetic rooms) give true multi-view pairs with occlusion; posed photos give
real ones, with corners that the detector found in both (`training.posed`). All get independent
photometric changes, so that the descriptor learns what stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import IterableDataset

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.model.compact import detect_corners
from feedforward_recon.training.posed import LabelledScene

SIZE_WH = (320, 240)
POINTS = 320
LEAST_SHARED = 20  # corners in both windows; fewer teach little for the cost of two images
SCENE_SCALE = (0.5, 1.1)  # of a posed photo in a window: from all of it to its own pixels
SAME, UNKNOWN, MISSED = 1, 0, -1  # states of a row of points


@dataclass(frozen=True)
class Pair:
    """images uint8 [2, H, W, 3], clean as they were before the photometric changes.

    pixels float32 [2, N, 2]; row n of both shows the same scene point where state [N] is SAME.
    Elsewhere the rows are unrelated corners; where it is MISSED, the corner of the first image
    is visible in the second and was not detected there.
    """

    images: np.ndarray
    clean: np.ndarray
    pixels: np.ndarray
    state: np.ndarray


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PairSources:
    """Where pairs come from: photos, room views, labelled scenes; shares of the last two."""

    photos: list[Path]
    rooms: list[Path] = field(default_factory=list)
    scenes: list[LabelledScene] = field(default_factory=list)
    room_share: float = 0.0
    scene_share: float = 0.0


class PairStream(IterableDataset):
    """Endless seeded stream of pairs."""

    def __init__(self, sources: PairSources, seed: int) -> None:
        self.sources, self.seed = sources, seed
        self.room_share = sources.room_share if sources.rooms else 0.0
        self.scene_share = sources.scene_share if sources.scenes else 0.0

    def __iter__(self) -> Iterator[Sample]:
        """Yield images and clean images [2, 3, H, W] in 0..1, pixels [2, N, 2], state [N]."""
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        cv2.setNumThreads(1)
        while True:
            pair = self._draw(rng)
            if pair is not None:
                images, clean = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
                                 for x in (pair.images, pair.clean))
                yield images, clean, torch.from_numpy(pair.pixels), torch.from_numpy(pair.state)

    def _draw(self, rng: np.random.Generator) -> Pair | None:
        sources, kind = self.sources, rng.random()
        if kind < self.room_share:
            with np.load(sources.rooms[rng.integers(len(sources.rooms))]) as views:
                return room_pair(views, rng)
        if kind < self.room_share + self.scene_share:
            return scene_pair(sources.scenes[rng.integers(len(sources.scenes))], rng)
        path = sources.photos[rng.integers(len(sources.photos))]
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


def scene_pair(labelled: LabelledScene, rng: np.random.Generator) -> Pair | None:
    """Two windows of posed photos about a point that both show; None with few shared corners."""
    (a, b), corners, matches = labelled.pair(int(rng.integers(len(labelled))))
    matched = matches[matches[:, 1] >= 0]
    if len(matched) < LEAST_SHARED:
        return None
    images = [labelled.scene.image(i) for i in (a, b)]
    centre = matched[rng.integers(len(matched))]
    mirrored, scale = rng.random() < 0.5, np.exp(rng.uniform(*np.log(SCENE_SCALE)))
    windows = [_window(corners[i][centre[i]], scale * np.exp(rng.normal(0, 0.15)),
                       mirrored, rng) for i in range(2)]
    crops = [_warped(image, window) for image, window in zip(images, windows, strict=True)]
    pixels = [xy @ window[:, :2].T + window[:, 2]
              for xy, window in zip(corners, windows, strict=True)]
    return _with_negatives(crops, pixels, matches, rng)


def _window(about: np.ndarray, scale: float, mirrored: bool,
            rng: np.random.Generator) -> np.ndarray:
    """Affine map [2, 3] from a photo to a window of it with a pixel near the middle."""
    angle = rng.normal(0, 0.15)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if mirrored else 1.0, 1.0])
    middle = np.array(SIZE_WH) * rng.uniform(0.3, 0.7, 2)
    return np.c_[linear, middle - linear @ about]


def _warped(image: np.ndarray, window: np.ndarray) -> np.ndarray:
    scale = float(np.sqrt(abs(np.linalg.det(window[:, :2]))))
    if scale < 0.9:
        image = cv2.GaussianBlur(image, (0, 0), 0.45 / scale)
    return cv2.warpAffine(image, window, SIZE_WH, flags=cv2.INTER_LINEAR,
                          borderMode=cv2.BORDER_REFLECT)


def _with_negatives(images: list[np.ndarray], pixels: list[np.ndarray], matches: np.ndarray,
                    rng: np.random.Generator) -> Pair | None:
    """POINTS rows: shared corners first, then corners of a that b misses, then any others."""
    inside = [_inside(p) for p in pixels]
    seen = matches[inside[0][matches[:, 0]]]
    shared = seen[(seen[:, 1] >= 0) & inside[1][seen[:, 1]]]
    if len(shared) < LEAST_SHARED:
        return None
    shared = rng.permutation(shared)[:POINTS]
    missed = rng.permutation(seen[seen[:, 1] < 0, 0])[:POINTS - len(shared)]
    listed = [np.r_[shared[:, 0], missed], shared[:, 1]]
    state = np.zeros(POINTS, np.int64)
    state[:len(shared)] = SAME
    state[len(shared):len(listed[0])] = MISSED
    chosen = []
    for xy, within, rows in zip(pixels, inside, listed, strict=True):
        others = rng.permutation(np.setdiff1d(np.flatnonzero(within), rows))
        filled = np.concatenate([xy[np.r_[rows, others].astype(int)][:POINTS],
                                 rng.uniform(4, np.array(SIZE_WH) - 5, (POINTS, 2))])
        chosen.append(filled[:POINTS])
    return _changed(images, np.stack(chosen), state, rng)


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
    stack = np.stack([pixels[0][chosen] + jitter, pixels[1][chosen]])
    return _changed(images, stack, np.full(POINTS, SAME), rng)


def _changed(images: list[np.ndarray], pixels: np.ndarray, state: np.ndarray,
             rng: np.random.Generator) -> Pair:
    return Pair(np.stack([augment_image(i, rng) for i in images]), np.stack(images),
                pixels.astype(np.float32), state)
