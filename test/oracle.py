"""A scene of labelled points and an encoder that recognises them: exact truth, no network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, se3_exp, transform_points
from feedforward_recon.types import Features, Keyframe

CAMERA = Camera.from_fov(65.0, (320, 240))
DIM = 32


@dataclass(frozen=True)
class OracleScene:
    """Points [N, 3] on the far sides of a box, each with its own descriptor [N, D]."""

    points: np.ndarray
    descriptors: np.ndarray

    @staticmethod
    def generate(seed: int, count: int = 1500) -> OracleScene:
        """Random scene about 3 m in front of the origin."""
        rng = np.random.default_rng(seed)
        points = rng.uniform((-3, -2, 2), (3, 2, 5), (count, 3))
        return OracleScene(points, unit(rng.normal(size=(count, DIM))))

    def features(self, T_map_cam: np.ndarray, seed: int, pixel_noise: float = 0.3,
                 descriptor_noise: float = 0.05) -> tuple[Features, np.ndarray]:
        """What a camera sees: features and their exact camera-frame points [M, 3]."""
        rng = np.random.default_rng(seed)
        in_cam = transform_points(inverse(T_map_cam), self.points)
        pixels = CAMERA.project(in_cam)
        with np.errstate(invalid='ignore'):
            seen = np.flatnonzero(np.all((pixels > 0) & (pixels < CAMERA.size_wh), axis=1))
        seen = rng.permutation(seen)
        noisy = unit(self.descriptors[seen]
                     + descriptor_noise * rng.normal(size=(len(seen), DIM)))
        keypoints = pixels[seen] + rng.normal(0, pixel_noise, (len(seen), 2))
        features = Features(keypoints.astype(np.float32), noisy.astype(np.float32),
                            np.ones(len(seen), np.float32), np.zeros(4, np.float32))
        return features, in_cam[seen]

    def keyframe(self, index: int, T_map_cam: np.ndarray) -> Keyframe:
        """A keyframe with exact points."""
        features, points_cam = self.features(T_map_cam, seed=index)
        return Keyframe(index, index * 10**8, CAMERA, T_map_cam, features,
                        points_cam.astype(np.float32))


def unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length one."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def poses_around(count: int, seed: int, spread: float = 0.3) -> list[np.ndarray]:
    """Camera poses near the origin, looking into the scene."""
    rng = np.random.default_rng(seed)
    return [se3_exp(np.r_[rng.normal(0, spread, 3), rng.normal(0, 0.15, 3)])
            for _ in range(count)]


def shifted(scene: OracleScene, offset: np.ndarray) -> OracleScene:
    """The scene at another place."""
    return OracleScene(scene.points + offset, scene.descriptors)
