"""Time and memory per photo of what follows encoding and matching, up to 20,000 photos.

A synthetic collection: cameras on a large circle, 0.4 m apart, look at a wall of points outside.
Global descriptors fall off with the distance of the cameras. Matches are replayed from the numbers
of the points that both images see, motions from the truth with an error; their time is told apart.
Every point runs in a process of its own, so that its peak memory is its own.

    python -m benchmarks.run_all photo_scale            all points -> results
    python -m benchmarks.photo_scale 1000               one point, as JSON
    python -m benchmarks.photo_scale 1000 refine        the same with bundle adjustment
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.common import REPOSITORY, Clock, forget_peak, memory_bytes
from benchmarks.scoring import trajectory_error
from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, se3_exp, transform_points
from feedforward_recon.reconstruction.comparisons import compared
from feedforward_recon.reconstruction.pairs import (
    Edge,
    FeatureMatches,
    PairGeometry,
    with_motion,
)
from feedforward_recon.reconstruction.parts import PhotoSet, part_of
from feedforward_recon.reconstruction.retrieval import EXACT, Likeness
from feedforward_recon.reconstruction.shots import ROLLS, Shot
from feedforward_recon.types import Features, Trajectory

COUNTS = 1000, 3000, 10_000, 20_000
FAR = 100_000  # images that times and memory are extrapolated to
CAMERA = Camera.from_fov(65.0, (320, 240))
STEP_M, POINTS_PER_STEP = 0.4, 25  # of which an image sees about 300
DEPTH_M, HEIGHT_M = (3.0, 6.0), 2.5  # of the wall
SEEN_M = 8.0  # to either side; beyond, nothing is in view
ALIKE_M = 1.5  # distance at which similarity is exp(-1/2)
SIZE = 3072  # of a global descriptor, as the encoder has it
NOISE_PX, NOISE_RAD = 0.5, 0.002  # of a keypoint, and of the motion of a pair
Row = dict[str, Any]


class Replayed:
    """Pairs from the numbers of the points that images see, and true poses with an error."""

    batch = 1

    def __init__(self, shots: Sequence[Shot], seen: Sequence[np.ndarray], poses: np.ndarray
                 ) -> None:
        self._shots, self._seen, self._poses = shots, seen, poses
        self.cpu_seconds = 0.0

    def rolled(self, image: int) -> np.ndarray:
        """The image as it is, whatever the roll."""
        return np.stack([self._shots[image].features.global_descriptor] * ROLLS)

    def match(self, i: int, j: int, roll: int = 0) -> FeatureMatches:
        """Features of the points that both images see."""
        clock = Clock()
        _, row, column = np.intersect1d(self._seen[i], self._seen[j], assume_unique=True,
                                        return_indices=True)
        self.cpu_seconds += clock.stop().cpu_seconds
        return FeatureMatches(row, column, np.ones(len(row), bool))

    def decode(self, edges: Sequence[Edge], matches: Sequence[FeatureMatches]
               ) -> list[PairGeometry | None]:
        """True motions with an error; None where few matches agree."""
        clock = Clock()
        found = [self._decoded(edge, both) for edge, both in zip(edges, matches, strict=True)]
        self.cpu_seconds += clock.stop().cpu_seconds
        return found

    def _decoded(self, edge: Edge, matches: FeatureMatches) -> PairGeometry | None:
        T_i_j = inverse(self._poses[edge[0]]) @ self._poses[edge[1]]
        T_i_j[:3, 3] /= np.linalg.norm(T_i_j[:3, 3])
        noise = np.random.default_rng(edge).normal(0, NOISE_RAD, 6)
        return with_motion(edge, matches, self._shots, T_i_j @ se3_exp(noise))


def collection(count: int) -> tuple[list[Shot], Replayed, np.ndarray]:
    """Shots in an order that says nothing, what says their pairs, and true poses [N, 4, 4]."""
    rng = np.random.default_rng(count)
    poses = circle(count, rng)[rng.permutation(count)]
    radius = count * STEP_M / (2 * np.pi)
    points = count * POINTS_PER_STEP
    angle = np.sort(rng.uniform(-np.pi, np.pi, points))
    away = radius + rng.uniform(*DEPTH_M, points)
    wall = np.stack([away * np.cos(angle), away * np.sin(angle),
                     rng.uniform(-HEIGHT_M, HEIGHT_M, points)], 1)
    turns = np.concatenate([angle - 2 * np.pi, angle, angle + 2 * np.pi])
    shots, seen = [], []
    for pose, code in zip(poses, global_descriptors(poses[:, :3, 3], rng), strict=True):
        ends = np.arctan2(pose[1, 3], pose[0, 3]) + np.array([-SEEN_M, SEEN_M]) / radius
        near = np.arange(*np.searchsorted(turns, ends)) % points
        numbers, shot = looked(pose, wall[near], code, rng)
        shots.append(shot)
        seen.append(near[numbers])
    return shots, Replayed(shots, seen, poses), poses


def circle(count: int, rng: np.random.Generator) -> np.ndarray:
    """Poses T_map_cam [N, 4, 4] on a circle, looking outwards, each a little moved and turned."""
    angle = 2 * np.pi * np.arange(count) / count
    cos, sin, none = np.cos(angle), np.sin(angle), np.zeros(count)
    T = np.tile(np.eye(4), (count, 1, 1))
    T[:, :3, :3] = np.stack([np.stack([sin, -cos, none], 1), np.tile([0, 0, -1.0], (count, 1)),
                             np.stack([cos, sin, none], 1)], 2)
    T[:, :3, 3] = count * STEP_M / (2 * np.pi) * T[:, :3, 2]
    return T @ se3_exp(rng.normal(0, 0.1, (count, 6)))


def global_descriptors(positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors [N, SIZE] with cosines exp(-d^2 / 2 ALIKE_M^2) (random Fourier features)."""
    phase = positions @ rng.normal(0, 1 / ALIKE_M, (3, SIZE // 2))
    return (np.concatenate([np.cos(phase), np.sin(phase)], 1) / np.sqrt(SIZE / 2)
            ).astype(np.float32)


def looked(pose: np.ndarray, points: np.ndarray, code: np.ndarray, rng: np.random.Generator
           ) -> tuple[np.ndarray, Shot]:
    """Which points [n, 3] a camera sees, and what it makes of them."""
    px = CAMERA.project(transform_points(inverse(pose), points))
    with np.errstate(invalid='ignore'):
        numbers = np.flatnonzero(np.all((px > 0) & (px < CAMERA.size_wh), axis=1))
    px = (px[numbers] + rng.normal(0, NOISE_PX, (len(numbers), 2))).astype(np.float32)
    features = Features(px, np.zeros((len(px), 0), np.float32), np.ones(len(px), np.float32), code)
    return numbers, Shot(features, CAMERA, CAMERA.normalise(px), np.zeros((len(px), 3), np.uint8),
                         np.zeros((1, 1), np.uint8), CAMERA.size_wh)


def measure(count: int, refine: bool = False) -> Row:
    """CPU time and peak memory of each photo; memory beyond that of the features."""
    config = ReconstructionConfig(refine=refine)
    shots, decoder, poses = collection(count)
    before = forget_peak()
    clock = Clock()
    comparisons = compared(shots, decoder, config)
    retrieval = clock.stop().cpu_seconds - decoder.cpu_seconds
    clock = Clock()
    part = part_of(PhotoSet(shots, comparisons, config), np.ones(count, bool))
    together = clock.stop().cpu_seconds
    peak = memory_bytes('VmHWM') - before
    images = np.flatnonzero(part.registered)
    error = trajectory_error(Trajectory(images, part.structure.T_map_cam[images]),
                             Trajectory(np.arange(count), poses), 'sim3')
    return {'images': count, 'registered': len(images), 'pairs': len(comparisons.pairs),
            'retrieval_ms': 1e3 * retrieval / count, 'together_ms': 1e3 * together / count,
            'replayed_ms': 1e3 * decoder.cpu_seconds / count, 'peak_mb': peak / 1e6 / count,
            'error': error, **in_blocks(shots, config.neighbours)}


def in_blocks(shots: Sequence[Shot], neighbours: int) -> Row:
    """Time of an exact search alone, and of the default; which neighbours that finds."""
    similar = Likeness(np.stack([shot.features.global_descriptor for shot in shots]))
    every = np.arange(len(shots))
    clocks, found = [], []
    for blocks in ([every], np.split(every, every[EXACT::EXACT])):
        clock = Clock()
        pairs = np.concatenate([similar.nearest(block, every, neighbours)[0] for block in blocks])
        clocks.append(clock.stop().cpu_seconds)
        found.append(pairs @ [len(every), 1])
    return {'search_ms': 1e3 * clocks[0] / len(every), 'exact_ms': 1e3 * clocks[1] / len(every),
            'found': float(np.isin(found[1], found[0]).mean())}


def in_own_process(count: int, *more: str) -> Row:
    """``measure`` in a new interpreter."""
    command = [sys.executable, '-m', 'benchmarks.photo_scale', str(count), *more]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True,
                            env={**os.environ, 'PYTHONPATH': str(REPOSITORY)})
    return json.loads(result.stdout)


def run() -> Iterator[tuple[str, Row]]:
    """All points, and what they say about many more photos."""
    rows = []
    for count in COUNTS:
        rows.append(in_own_process(count))
        yield f'{count} images | measured', rows[-1]
    yield f'{FAR} images | extrapolated', extrapolated(rows, FAR)


def extrapolated(rows: list[Row], count: int) -> Row:
    """Each figure per photo at ``count`` photos, by the power law that fits best."""
    images = np.log([row['images'] for row in rows])
    row: Row = {'images': count}
    for key in ('retrieval_ms', 'together_ms', 'peak_mb', 'search_ms', 'exact_ms'):
        slope, offset = np.polyfit(images, np.log([max(row[key], 1e-9) for row in rows]), 1)
        row[key] = float(np.exp(offset + slope * np.log(count)))
    return row


if __name__ == '__main__':
    print(json.dumps(measure(int(sys.argv[1]), 'refine' in sys.argv[2:])))
