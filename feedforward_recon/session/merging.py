"""``merge_maps``: two saved maps of one place become one, with one memory of the same size."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.errors import MapError
from feedforward_recon.geometry.align import Alignment
from feedforward_recon.geometry.transforms import inverse, nearest_poses
from feedforward_recon.mapping.adjustment import refine_all
from feedforward_recon.mapping.joining import add_map, find_joint
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.scene_map import SceneMap, finished_map
from feedforward_recon.memory import MemoryWriter
from feedforward_recon.model import Encoder
from feedforward_recon.session.map_folder import SavedMap
from feedforward_recon.types import Estimate, Status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """What two maps became; save it with ``session.map_folder.save_map``.

    moved: the map that was brought into the frame of the other; alignment: how; joined: landmarks
    that both had.
    """

    scene: SceneMap
    writer: MemoryWriter
    encoder: Encoder
    config: MapperConfig
    moved: Path
    alignment: Alignment
    joined: int


def merge_maps(first: SavedMap, second: SavedMap) -> Merged:
    """Bring the second map into the frame and the unit of the first, and refine both together.

    Where only the second is in metres, it is the one whose frame and unit stay.
    Raises MapError for maps of different encoders, for maps that were saved without their
    keyframes, and where they do not show the same place.
    """
    if first.info.metres_per_unit is None and second.info.metres_per_unit is not None:
        first, second = second, first
        log.warning('%s is in metres: its frame and unit stay', first.path)
    if first.info.encoder_sha256 != second.info.encoder_sha256:
        raise MapError(f'{second.path}: expected the encoder '
                       f'{first.info.encoder_sha256[:12]} that '
                       f'made {first.path}, found {second.info.encoder_sha256[:12]}; map one of '
                       'them again')
    encoder, config = first.load_encoder(), first.info.config
    a, b = (_graph(saved, config) for saved in (first, second))
    metric = first.info.metres_per_unit is not None and second.info.metres_per_unit is not None
    joint = find_joint(a, b, with_scale=not metric)
    before, kept = b.T_map_cam.copy(), len(a)
    depth_a, depth_b = (graph.typical_depth(len(graph) - 1) for graph in (a, b))
    add_map(a, b, joint)
    moved_a = a.T_map_cam[:kept].copy()
    refine_all(a, config)
    estimates = moved_images(first.poses(), moved_a, a.T_map_cam[:kept], depth_a) + moved_images(
        second.poses(), before, a.T_map_cam[kept:], depth_b, joint.alignment.scale)
    writer = MemoryWriter(config.memory, encoder.dim)
    info = first.info
    scene = finished_map(a, estimates, metres_per_unit=info.metres_per_unit,
                         scale_source=info.scale_source, frame=info.frame,
                         camera_source=second.info.camera_source,
                         sessions=info.sessions + second.info.sessions)
    for keyframe in scene.keyframes:
        writer.write(keyframe)
    return Merged(scene, writer, encoder, config, second.path, joint.alignment,
                  len(joint.landmarks_a))


def _graph(saved: SavedMap, config: MapperConfig) -> GrowingMap:
    map_, _ = saved.keyframes(config)
    if len(map_) < saved.info.keyframes:
        log.warning('%s: of %d keyframes %d were saved; the merged memory knows what these saw',
                    saved.path, saved.info.keyframes, len(map_))
    return map_


def moved_images(entries: list[dict[str, Any]], before: np.ndarray, after: np.ndarray,
                 depth: float, scale: float = 1.0) -> list[Estimate]:
    """The images of a map, each moved with the nearest keyframe.

    entries: as ``SavedMap.poses`` gives them; before, after: poses [K, 4, 4] of the keyframes;
    depth: how far things are, in units of that map; scale: of its lengths.
    """
    estimates = []
    posed = [entry for entry in entries if entry['T_map_cam'] is not None]
    T = np.array([entry['T_map_cam'] for entry in posed], float).reshape(-1, 4, 4)
    together = np.concatenate([before, T])
    nearest = nearest_poses(together, np.arange(len(before)), depth)[len(before):]
    for entry, pose, keyframe in zip(posed, T, nearest, strict=True):
        T_keyframe_cam = inverse(before[keyframe]) @ pose
        T_keyframe_cam[:3, 3] *= scale
        estimates.append(Estimate(entry['stamp_ns'], Status(entry['status']),
                                  after[keyframe] @ T_keyframe_cam, source=entry['file'],
                                  camera=entry['camera']))
    lost = [Estimate(entry['stamp_ns'], Status(entry['status']), source=entry['file'])
            for entry in entries if entry['T_map_cam'] is None]
    return estimates + lost
