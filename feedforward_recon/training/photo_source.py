"""Posed photos whose sparse tracks say where they show the same points."""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.training.covisible_views import CovisibleViews
from feedforward_recon.training.posed import PosedScene, posed_image, view_overlap
from feedforward_recon.training.view_sources import SeenPoints
from feedforward_recon.training.virtual_camera import VirtualCamera

MIN_SHARED_TRACKS = 15
KEPT_IMAGES = 512  # decoded ones of all scenes, 0.3 to 1.3 MB each

_kept_image = lru_cache(maxsize=KEPT_IMAGES)(posed_image)


class PhotoSource:
    """Posed photos and their tracks."""

    def __init__(self, name: str, scene: PosedScene) -> None:
        self._name, self._scene = name, scene

    @property
    def name(self) -> str:
        """See ``ViewSource``."""
        return self._name

    @property
    def size_wh(self) -> tuple[int, int]:
        """Pixels of the first image."""
        return self._scene.cameras[0].size_wh

    @cached_property
    def covisible(self) -> CovisibleViews:
        """Views that share tracks."""
        scene = self._scene
        tracks = map(scene.tracks, range(len(scene.files)))
        depth = [np.median(scene.depth[t]) if t.stop > t.start else np.inf for t in tracks]
        return CovisibleViews.of(view_overlap(scene)[0] >= MIN_SHARED_TRACKS, scene.T_world_cam,
                                 np.array(depth))

    def window(self, rng: np.random.Generator, count: int) -> np.ndarray | None:
        """See ``ViewSource``; neighbours differ by an angle within ``ANGLE_DEG``."""
        return self.covisible.drawn(rng, count)

    def camera(self, view: int) -> Camera:
        """See ``ViewSource``."""
        return self._scene.cameras[view]

    def pose(self, view: int) -> np.ndarray:
        """See ``ViewSource``."""
        return self._scene.T_world_cam[view]

    def image(self, view: int) -> np.ndarray:
        """See ``ViewSource``; the last ones are kept."""
        return _kept_image(self._scene.files[view], self._scene.cameras[view].size_wh)

    def points(self, view: int, through: VirtualCamera, count: int, rng: np.random.Generator
               ) -> SeenPoints:
        """Tracks of the view; their keys are the numbers of their points."""
        seen = self._tracked(view, through)
        kept = rng.permutation(len(seen.depth))[:count]
        return SeenPoints(seen.pixels[kept], seen.depth[kept], seen.keys[kept])

    def found(self, view: int, through: VirtualCamera, keys: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
        """Where the view has tracks of the same points."""
        seen = self._tracked(view, through)
        if not len(seen.keys):
            return np.zeros((len(keys), 2)), np.zeros(len(keys), bool)
        order = np.argsort(seen.keys)
        row = order[np.searchsorted(seen.keys[order], keys).clip(max=len(order) - 1)]
        return seen.pixels[row], seen.keys[row] == keys

    def _tracked(self, view: int, through: VirtualCamera) -> SeenPoints:
        tracks, camera = self._scene.tracks(view), self._scene.cameras[view]
        own = camera.unproject(self._scene.uv[tracks], self._scene.depth[tracks])
        pixels, depth, visible = through.seen(own)
        return SeenPoints(pixels[visible], depth[visible],
                          self._scene.point_id[tracks][visible])
