"""Dense clouds of a camera that measures no depth, against the depth sensor that was hidden.

The kitchen, mapped from its images alone, forwards and backwards, with clouds of landmarks and
with dense ones (``cloud.dense``). The trajectory is aligned with the truth (Sim(3)); then every
keyframe's cloud is compared with the depth of its image, and the whole cloud with the one that
all depth images of keyframes make at their true poses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from benchmarks.common import KITCHEN, Clock, backwards, load_frames
from benchmarks.pose_accuracy import true_poses
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.align import Alignment, align_points
from feedforward_recon.geometry.transforms import transform_points
from feedforward_recon.mapping.cloud import sampled_depth, voxel_fused
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.session.networks import dense_clouds
from feedforward_recon.types import Frame

NEAR_M, VOXEL_M = 0.1, 0.05
STRIDE_PX = 4


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of landmarks and of dense clouds, each way."""
    frames, encoder = load_frames(KITCHEN), CompactEncoder.load()
    for way, walk in (('forwards', frames), ('backwards', backwards(frames))):
        for dense in (False, True):
            name = 'compact, dense' if dense else 'compact'
            yield f'{KITCHEN}, {way} | {name}', _row(walk, encoder, dense)


def _row(frames: list[Frame], encoder: CompactEncoder, dense: bool) -> dict[str, Any]:
    config = MapperConfig()
    config = replace(config, cloud=replace(config.cloud, dense=dense))
    mapper, clock = Mapper(config, encoder, dense=dense_clouds(config.cloud)), Clock()
    for frame in frames:
        mapper.process(replace(frame, depth=None, T_map_cam=None))
    scene = mapper.finish()
    clock.stop()
    truth, keyframes = {frame.stamp_ns: frame for frame in frames}, mapper.results.keyframes
    shown = [truth[keyframe.stamp_ns] for keyframe in keyframes]
    alignment = align_points(
        np.stack([keyframe.T_map_cam[:3, 3] for keyframe in keyframes]),
        true_poses(shown)[:, :3, 3], with_scale=True)
    mine = alignment.apply(scene.cloud.xyz.astype(float))
    there = measured_cloud(shown)
    return {'keyframes': len(keyframes), 'points': len(mine), 'cpu_seconds': clock.cpu_seconds,
            'abs_rel': _depth_error(mapper, shown, alignment) if dense else None,
            'accuracy': share_near(mine, there), 'completeness': share_near(there, mine)}


def measured_cloud(frames: list[Frame]) -> np.ndarray:
    """Points [P, 3] in metres of what the sensor saw from the true poses, one per voxel."""
    def part(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
        assert frame.camera is not None
        points, colours = sampled_depth(frame.camera, frame.image, frame.depth, STRIDE_PX)
        return transform_points(true_poses([frame])[0], points), colours
    return voxel_fused([partial(part, frame) for frame in frames], VOXEL_M, 10**7).xyz


def share_near(points: np.ndarray, others: np.ndarray) -> float:
    """Share of points [P, 3] within ``NEAR_M`` of one of the others [Q, 3]."""
    distance, _ = cKDTree(others).query(points, distance_upper_bound=NEAR_M)
    return float(np.isfinite(distance).mean())


def _depth_error(mapper: Mapper, shown: list[Frame], alignment: Alignment) -> float:
    """Mean of |d - d*| / d* over the points of the clouds of keyframes."""
    errors = []
    for keyframe, frame, points in zip(mapper.results.keyframes, shown,
                                       mapper.results.cloud_source().xyz, strict=True):
        depth, cloud = frame.depth, points.astype(float)
        assert depth is not None
        last = np.array(depth.shape[::-1]) - 1
        u, v = np.clip(np.rint(keyframe.camera.project(cloud)), 0, last).astype(int).T
        known = depth[v, u] > 0
        there = depth[v, u][known]
        errors.append(np.abs(alignment.scale * cloud[known, 2] - there) / there)
    return float(np.concatenate(errors).mean())
