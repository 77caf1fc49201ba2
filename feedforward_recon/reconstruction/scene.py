"""A reconstruction as a map that grows, is saved and localised in like any other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.mapping.keyframes import MapKeyframe
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.mapping.scene_map import SceneMap, finished_map
from feedforward_recon.reconstruction.pipeline import Reconstructed
from feedforward_recon.reconstruction.refinement import Structure
from feedforward_recon.reconstruction.shots import Photo, Shot
from feedforward_recon.types import Estimate, Status


def growing_map(done: Reconstructed, shots: Sequence[Shot], config: MapperConfig) -> GrowingMap:
    """Registered images as keyframes, tracks as landmarks; each image keeps its best features.

    The first registered image is the frame of the map; the median depth of the points is one.
    """
    images = np.flatnonzero(done.registered)
    structure = in_first_camera(done.structure, int(images[0]))
    map_ = GrowingMap(config, shots[0].features.descriptors.shape[1])
    map_.T_map_cam = structure.T_map_cam[images]
    ids = _add_landmarks(map_, structure, shots, images)
    rows_of = dict(structure.tracks.by_image())
    for number, image in enumerate(images.tolist()):
        rows = rows_of.get(image, np.zeros(0, int))
        _add_keyframe(map_, number, image, shots[image], structure, rows, ids)
    return map_


def scene_map(map_: GrowingMap, done: Reconstructed, photos: Sequence[Photo], camera_source: str
              ) -> SceneMap:
    """The finished map; photos that have no pose say why, copies have that of the first."""
    keyframe = np.cumsum(done.registered) - 1
    seen = done.structure.tracks.views(len(done.registered))
    known, estimates = set(), []
    for photo in photos:
        registered = bool(done.registered[photo.shot])
        id_ = keyframe[photo.shot]
        estimates.append(Estimate(
            photo.stamp_ns, Status.TRACKING if registered else Status.NOT_LOCALISED,
            map_.T_map_cam[id_] if registered else None,
            inliers=int(seen[photo.shot]), reason=done.reasons[photo.shot],
            is_keyframe=registered and photo.shot not in known, source=photo.source,
            camera=map_.keyframes[id_].camera if registered else None))
        known.add(photo.shot)
    return finished_map(map_, estimates, camera_source=camera_source)


def in_first_camera(structure: Structure, first: int) -> Structure:
    """The structure in the frame of an image, with points one unit away in the median."""
    T_first_map = inverse(structure.T_map_cam[first])
    tracks = structure.tracks
    from_camera = structure.points[tracks.point] - structure.T_map_cam[tracks.image, :3, 3]
    depth = (from_camera * structure.T_map_cam[tracks.image, :3, 2]).sum(1)
    depth = depth[np.isfinite(depth) & (depth > 0)]
    scale = 1 / float(np.median(depth)) if len(depth) else 1.0
    T_map_cam = T_first_map @ structure.T_map_cam
    T_map_cam[:, :3, 3] *= scale
    return replace(structure, T_map_cam=T_map_cam,
                   points=scale * transform_points(T_first_map, structure.points))


def _add_landmarks(map_: GrowingMap, structure: Structure, shots: Sequence[Shot],
                   images: np.ndarray) -> np.ndarray:
    """One landmark per point, anchored in the first image that saw it; their ids [count]."""
    tracks, keyframe = structure.tracks, np.full(len(shots), -1)
    keyframe[images] = np.arange(len(images))
    _, first = np.unique(tracks.point, return_index=True)
    descriptors = np.zeros((tracks.count, shots[0].features.descriptors.shape[1]), np.float32)
    rgb = np.zeros((tracks.count, 3), np.uint8)
    for point, row in enumerate(first.tolist()):
        shot, feature = shots[tracks.image[row]], tracks.feature[row]
        descriptors[point], rgb[point] = shot.features.descriptors[feature], shot.rgb[feature]
    ids = map_.landmarks.add(0, np.zeros((tracks.count, 3)), descriptors, rgb)
    map_.landmarks.anchor[ids] = keyframe[tracks.image[first]]
    map_.landmarks.set_points_map(ids, structure.points, map_.T_map_cam)
    return ids


def _add_keyframe(map_: GrowingMap, number: int, image: int, shot: Shot, structure: Structure,
                  rows: np.ndarray, ids: np.ndarray) -> None:
    """A keyframe with the features that show landmarks, where these really are, then others."""
    tracks, camera = structure.tracks, structure.cameras[image].resized(shot.size_wh)
    larger = np.array(shot.size_wh) / structure.cameras[image].size_wh
    keypoints = shot.features.keypoints.copy()
    landmark = np.full(len(keypoints), -1)
    keypoints[tracks.feature[rows]] = tracks.px[rows]
    landmark[tracks.feature[rows]] = ids[tracks.point[rows]]
    best = np.lexsort((-shot.features.confidence, landmark < 0))
    best = best[:map_.config.encoder.max_keypoints]
    full = ((keypoints + 0.5) * larger - 0.5).astype(np.float32)
    features = replace(shot.features, keypoints=full).select(best)
    map_.keyframes.append(MapKeyframe(
        number, image, shot.stamp_ns, camera, features, np.full((len(best), 3), np.nan),
        landmark[best], shot.rgb[best], shot.source))
    px = (tracks.px[rows] + 0.5) * larger - 0.5
    map_.landmarks.observe(ids[tracks.point[rows]], number, px, camera.normalise(px),
                           np.full(len(rows), np.nan), float(larger.mean()))
