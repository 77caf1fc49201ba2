"""``KeyframeGraph``: what a later session needs to go on with a map, of bounded size.

Keyframes with the features that show landmarks, landmarks, and observations. Of a long walk the
keyframes that span it best stay; landmarks that none of them saw are dropped. A feature is
described as its landmark is: one descriptor of eight bits for all its views takes a tenth of the
bytes of one for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.eight_bits import quantised, unit_length
from feedforward_recon.geometry.transforms import inverse, spanning_poses
from feedforward_recon.mapping.adjustment import calibrate_depth, normalise_observations
from feedforward_recon.mapping.keyframes import EARLIER_SESSION, MapKeyframe
from feedforward_recon.mapping.map import GrowingMap
from feedforward_recon.types import Features

Arrays = dict[str, np.ndarray]
# Columns of observations; ``seen_xy`` follows from the pixel and the camera.
_STORED = ('seen_landmark', 'seen_keyframe', 'seen_px', 'seen_inv_depth', 'seen_sigma')
FEATURES = ('keypoints', 'confidence', 'landmark', 'rgb', 'points_cam')
CLOUD = ('cloud_cam', 'cloud_rgb')
LANDMARKS = ('anchor', 'point_cam', 'descriptor', 'rgb')
# Kept of the clouds of all keyframes together: 9 bytes each.
CLOUD_POINTS = 150_000


@dataclass(frozen=True)
class KeyframeGraph:
    """Arrays by name, and what is said about each keyframe in words (JSON).

    ids: numbers of the keyframes in the map that they come from. first, cloud_first: [K + 1],
    where the features and the cloud points of each keyframe begin.
    """

    arrays: Arrays
    about: str

    def __len__(self) -> int:
        return len(self.arrays['ids'])

    @property
    def ids(self) -> np.ndarray:
        """Numbers [K] of the keyframes in the map that they come from."""
        return self.arrays['ids']

    def restored(self, config: MapperConfig) -> GrowingMap:
        """A growing map with these keyframes, numbered from 0.

        Raises KeyError, ValueError or TypeError for arrays that do not belong together.
        """
        map_ = GrowingMap(config, self.arrays['landmarks.descriptor'].shape[1])
        map_.T_map_cam = self.arrays['T_map_cam'].copy()
        map_.keyframes.extend(_keyframe(self, k, about)
                              for k, about in enumerate(json.loads(self.about)))
        table, arrays = map_.landmarks, self.arrays
        table.add(0, arrays['landmarks.point_cam'].astype(float),
                  unit_length(arrays['landmarks.descriptor']), arrays['landmarks.rgb'])
        table.anchor[:] = arrays['landmarks.anchor']
        for name in _STORED:
            setattr(table, name, arrays[name].astype(getattr(table, name).dtype))
        table.seen_xy = np.zeros((len(table.seen_px), 2))
        normalise_observations(map_)
        calibrate_depth(map_)
        return map_


def keyframe_graph(map_: GrowingMap, most: int) -> KeyframeGraph:
    """The graph of a map, with at most ``most`` keyframes and ``CLOUD_POINTS`` of their clouds.

    Keyframes by farthest-point sampling of poses (Gonzalez 1985). Copies what mapping may change
    meanwhile.
    """
    ids = np.arange(len(map_))
    if len(ids) > most:
        ids = np.sort(spanning_poses(map_.T_map_cam, most, map_.typical_depth(len(map_) - 1)))
    landmarks, number = _landmarks(map_, ids)
    keyframes = [map_.keyframes[id_] for id_ in ids]
    share = max(1, CLOUD_POINTS // max(len(ids), 1))
    features = [_features(keyframe, map_.landmarks.alias, number) for keyframe in keyframes]
    clouds = [_cloud(keyframe, share) for keyframe in keyframes]
    arrays: Arrays = {
        'ids': ids, 'T_map_cam': map_.T_map_cam[ids],
        'stamps_ns': np.array([k.stamp_ns for k in keyframes], np.int64),
        'global_descriptor': quantised(np.stack([k.features.global_descriptor
                                                 for k in keyframes])),
        'first': np.cumsum([0, *(len(one['landmark']) for one in features)]),
        'cloud_first': np.cumsum([0, *(len(cloud['cloud_cam']) for cloud in clouds)]),
        **{name: np.concatenate([one[name] for one in features]) for name in FEATURES},
        **{name: np.concatenate([one[name] for one in clouds]) for name in CLOUD}, **landmarks}
    return KeyframeGraph(arrays, json.dumps([_about(keyframe) for keyframe in keyframes]))


def _about(keyframe: MapKeyframe) -> dict[str, Any]:
    return {'camera': asdict(keyframe.camera), 'source': keyframe.source,
            'inv_depth_noise': keyframe.inv_depth_noise}


def _features(keyframe: MapKeyframe, alias: np.ndarray, number: np.ndarray) -> Arrays:
    """Columns of the features that show kept landmarks; number: new number of each, or -1."""
    landmark = np.where(keyframe.landmark >= 0, number[alias[keyframe.landmark]], -1)
    shown = landmark >= 0
    return {'keypoints': keyframe.features.keypoints[shown].astype(np.float32),
            'confidence': keyframe.features.confidence[shown].astype(np.float16),
            'landmark': landmark[shown].astype(np.int32), 'rgb': keyframe.rgb[shown],
            'points_cam': keyframe.points_cam[shown].astype(np.float32)}


def _cloud(keyframe: MapKeyframe, most: int) -> Arrays:
    step = max(1, -(-len(keyframe.cloud_cam) // most))
    return {'cloud_cam': keyframe.cloud_cam[::step].astype(np.float16),
            'cloud_rgb': keyframe.cloud_rgb[::step]}


def _landmarks(map_: GrowingMap, ids: np.ndarray) -> tuple[Arrays, np.ndarray]:
    """Columns of landmarks that kept keyframes saw, and the new number of each, -1 if dropped.

    A landmark whose anchor is dropped is anchored in the first keyframe that stays and saw it.
    """
    table, local = map_.landmarks, np.full(len(map_), -1)
    local[ids] = np.arange(len(ids))
    rows = np.flatnonzero(table.has_point[table.seen_landmark] & (local[table.seen_keyframe] >= 0))
    kept, first = np.unique(table.seen_landmark[rows], return_index=True)
    number = np.full(len(table), -1, np.int64)
    number[kept] = np.arange(len(kept))
    anchor = local[table.anchor[kept]]
    anchor = np.where(anchor >= 0, anchor, local[table.seen_keyframe[rows[first]]])
    in_map = table.points_map(kept, map_.T_map_cam)
    T = inverse(map_.T_map_cam[ids[anchor]])
    point_cam = np.matmul(T[:, :3, :3], in_map[..., None])[..., 0] + T[:, :3, 3]
    values = (anchor.astype(np.int32), point_cam.astype(np.float32),
              quantised(table.descriptor[kept]), table.rgb[kept])
    seen = {name: getattr(table, name)[rows] for name in _STORED}
    seen['seen_landmark'] = number[seen['seen_landmark']].astype(np.int32)
    seen['seen_keyframe'] = local[seen['seen_keyframe']].astype(np.uint16)
    seen['seen_inv_depth'] = seen['seen_inv_depth'].astype(np.float32)
    seen['seen_sigma'] = seen['seen_sigma'].astype(np.float16)
    named = {f'landmarks.{name}': value for name, value in zip(LANDMARKS, values, strict=True)}
    return {**named, **seen}, number


def _keyframe(graph: KeyframeGraph, k: int, about: Mapping[str, Any]) -> MapKeyframe:
    arrays = graph.arrays
    own = slice(*arrays['first'][k:k + 2])
    cloud = slice(*arrays['cloud_first'][k:k + 2])
    landmark = arrays['landmark'][own]
    features = Features(arrays['keypoints'][own], arrays['landmarks.descriptor'][landmark],
                        arrays['confidence'][own].astype(np.float32),
                        unit_length(arrays['global_descriptor'][k:k + 1])[0])
    return MapKeyframe(
        k, EARLIER_SESSION, int(arrays['stamps_ns'][k]), Camera.from_fields(about['camera']),
        features, arrays['points_cam'][own].copy(), landmark.copy(), arrays['rgb'][own],
        about['source'], arrays['cloud_cam'][cloud].copy(), arrays['cloud_rgb'][cloud].copy(),
        about['inv_depth_noise'])
