"""RGB-D mapping with depth as cameras really give it: sparse, with holes, small, late.

Rendered rooms with exact truth, each walked both ways. Every case spoils the same depth images;
the row ``dense`` has a measurement in every pixel, ``none after 5 images`` goes on without depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from benchmarks.common import Clock, backwards, true_trajectory
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.evaluation import absolute_trajectory_error
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.io.images import scaled_depth
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame

ROOMS, IMAGES, FPS = (3, 7, 11, 15), 80, 25.0
EVERY = 3  # images are 120 ms apart, so that depth can be 40 ms late
SIZE_WH = (320, 240)
ROWS, COLUMNS = np.mgrid[:SIZE_WH[1], :SIZE_WH[0]]
Spoil = Callable[[list[Frame], int], np.ndarray | None]


def _kept(mask: Callable[[Frame], np.ndarray]) -> Spoil:
    def spoil(frames: list[Frame], index: int) -> np.ndarray:
        frame = frames[index]
        assert frame.depth is not None
        return np.where(mask(frame), frame.depth, 0).astype(np.float32)
    return spoil


def _by_chance(share: float) -> Spoil:
    return _kept(lambda frame: np.random.default_rng(frame.stamp_ns).random(ROWS.shape) < share)


def _neither_dark_nor_shiny(frame: Frame) -> np.ndarray:
    brightness = cv2.GaussianBlur(frame.image.mean(2).astype(np.float32), (0, 0), 2)
    low, high = np.percentile(brightness, (35, 75))
    return (brightness > low) & (brightness < high)


def _half_size(frames: list[Frame], index: int) -> np.ndarray:
    depth = frames[index].depth
    assert depth is not None
    return scaled_depth(np.ascontiguousarray(depth[1::2, 1::2]), SIZE_WH, 'half')


def _late(images: int) -> Spoil:
    return lambda frames, index: frames[min(index + images, len(frames) - 1)].depth


CASES: dict[str, Spoil] = {
    'dense': lambda frames, index: frames[index].depth,
    'every second row and column': _kept(lambda _: (ROWS % 2 == 0) & (COLUMNS % 2 == 0)),
    '60 % holes': _by_chance(0.4),
    '10 % of the pixels': _by_chance(0.1),
    '16 lidar lines': _kept(lambda _: ROWS % 15 == 7),
    'dark and shiny missing': _kept(_neither_dark_nor_shiny),
    'half the size': _half_size,
    '40 ms late': _late(1),
    '80 ms late': _late(2),
    'none after 5 images': lambda frames, index: frames[index].depth if index < 5 * EVERY
    else None,
}


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """One row per case: means over all walks."""
    encoder, walks = CompactEncoder.load(), [walk for seed in ROOMS for walk in _walks(seed)]
    dense_cm = 0.0
    for case, spoil in CASES.items():
        runs = [_mapped(frames, spoil, encoder) for frames in walks]
        errors_cm = np.array([error_cm for error_cm, _, _ in runs])
        dense_cm = dense_cm or float(errors_cm.mean())
        yield f'{case} | compact', {
            'walks': len(runs), 'images': IMAGES * len(runs),
            'tracked': sum(tracked for _, tracked, _ in runs),
            'error_cm': float(errors_cm.mean()), 'spread_cm': float(errors_cm.std()),
            'ratio': float(errors_cm.mean()) / dense_cm,
            'cpu_seconds': float(np.mean([seconds for _, _, seconds in runs]))}


def _walks(seed: int) -> Iterator[list[Frame]]:
    """A room walked forwards and backwards, all images of 40 ms."""
    room = Room.generate(seed)
    steps = room.walk(600, seed=0, fps=FPS)[:IMAGES * EVERY]
    frames = list(render_walk(room, Camera.from_fov(68.0, SIZE_WH), steps, fps=FPS, noise=1.0,
                              seed=1))
    yield frames
    yield backwards(frames)


def _mapped(frames: list[Frame], spoil: Spoil, encoder: CompactEncoder
            ) -> tuple[float, int, float]:
    """RMS error without scale (cm), images with a pose while mapping, CPU seconds."""
    mapper, clock = Mapper(MapperConfig(), encoder), Clock()
    seen = [replace(frames[index], depth=spoil(frames, index))
            for index in range(0, len(frames), EVERY)]
    tracked = sum(mapper.process(frame).T_map_cam is not None for frame in seen)
    found = mapper.finish().trajectory
    error = absolute_trajectory_error(found, true_trajectory(seen), 'se3')
    return 100 * error.rmse, tracked, clock.stop().cpu_seconds
