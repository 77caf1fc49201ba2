"""A synthetic room: generated from a seed, rendered with exact depth, walked through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import make_transform
from feedforward_recon.synthetic import lighting, render, textures, walk
from feedforward_recon.synthetic.layout import CEILINGS, FLOORS, STYLES, WALLS, Box, furnish
from feedforward_recon.synthetic.photos import photo_crop
from feedforward_recon.synthetic.render import Surface
from feedforward_recon.types import Frame, RightImage

WALL_TEXELS_PER_M = 300.0
BOX_TEXELS_PER_M = 420.0
PHOTO_SHARE = 0.5  # of the faces of a room with photos


@dataclass(frozen=True)
class Face:
    """A surface with the name and seed of its texture; the pixels are made when first seen.

    photo: file whose crop is the texture instead of the one that is named.
    """

    surface: Surface
    style: str
    seed: int
    texels_per_m: float
    photo: Path | None = None


@dataclass(frozen=True, eq=False)
class Room:
    """A closed room of ``size`` [3] metres with boxes in it.

    World frame: z up, origin in the middle of the floor. pyramids: lit textures of the faces that
    were seen so far, by index.
    """

    seed: int
    size: NDArray[np.float64]
    boxes: list[Box]
    faces: list[Face]
    lamps: list[lighting.Lamp]
    pyramids: dict[int, list[NDArray]] = field(default_factory=dict, repr=False)

    @staticmethod
    def generate(seed: int) -> Room:
        """The room of a seed; equal seeds give equal rooms, on any machine."""
        rng = np.random.default_rng(seed)
        size = rng.uniform((4.4, 3.6, 2.5), (6.0, 4.8, 3.0))
        boxes = furnish(rng, size)
        lights = lighting.lamps(rng, size)
        return Room(seed, size, boxes, faces_of(rng, size, boxes), lights)

    @cached_property
    def surfaces(self) -> list[Surface]:
        """The rectangles of all faces."""
        return [face.surface for face in self.faces]

    def render(self, camera: Camera, T_world_cam: NDArray
               ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Image uint8 [H, W, 3] RGB and z-depth float32 [H, W] in metres of a camera.

        T_world_cam [4, 4]: pose of the camera (OpenCV axes) inside the room. Depth is 0 where
        nothing is seen, which does not happen inside the room.
        """
        image, depth, _ = self.seen(self.surfaces, camera, T_world_cam)
        return image, depth

    def seen(self, surfaces: list[Surface], camera: Camera, T_world_cam: NDArray
             ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]:
        """As `render`, and the index of the face of each pixel [H, W], -1 where there is none.

        surfaces: those of the room; some may be elsewhere, of the same size.
        """
        nearest, inverse_depth, planes = render.rasterise(surfaces, camera, T_world_cam)
        image = np.zeros((camera.height, camera.width, 3), np.uint8)
        for index in np.flatnonzero(np.bincount(nearest.ravel() + 1)[1:]).tolist():
            mask = (nearest == index).view(np.uint8)
            x, y, w, h = cv2.boundingRect(mask)
            window = slice(y, y + h), slice(x, x + w)
            colours = render.shade(surfaces[index], self.texture(index),
                                   planes[index], camera, window)
            cv2.copyTo(colours, np.ascontiguousarray(mask[window]), image[window])
        depth = np.zeros_like(inverse_depth)
        np.divide(1.0, inverse_depth, out=depth, where=inverse_depth > 0)
        return render.smooth_edges(image, nearest), depth, nearest

    def clearance(self, points_world: NDArray) -> NDArray[np.float64]:
        """Distance [N] in metres of points [N, 3] to the nearest surface; negative inside one."""
        return lighting.clearance(points_world, self.size, self.boxes)

    def walk(self, n_frames: int, seed: int, fps: float = 15.0) -> list[NDArray[np.float64]]:
        """Poses T_world_cam of a hand-held walk that ends near where it began."""
        return walk.walk(self, n_frames, seed, fps)

    def held_out_views(self, trajectory: list[NDArray[np.float64]], n: int, seed: int
                       ) -> list[NDArray[np.float64]]:
        """``n`` poses near, but 5-20 cm and 3-10 degrees off, a walk, in free space."""
        return walk.held_out_views(self, trajectory, n, seed)

    def with_photos(self, photos: Sequence[Path], seed: int) -> Room:
        """The room with crops of photos on about half of its faces; the seed says which on which.

        What is where, and the other faces, stay as they are.
        """
        rng = np.random.default_rng(seed)
        chosen = rng.random(len(self.faces)) < PHOTO_SHARE
        which = rng.integers(len(photos), size=len(self.faces))
        faces = [replace(face, photo=photos[k]) if yes else face
                 for face, yes, k in zip(self.faces, chosen, which, strict=True)]
        return replace(self, faces=faces, pyramids={})

    def texture(self, index: int) -> list[NDArray]:
        """Lit mip pyramid of a face, uint8 [h, w, 3] each, the finest first.

        Made on first use: most faces are never seen.
        """
        if index not in self.pyramids:
            self.pyramids[index] = self._painted(self.faces[index])
        return self.pyramids[index]

    def _painted(self, face: Face) -> list[NDArray]:
        rng = np.random.default_rng(face.seed)
        w, h = (max(int(length * face.texels_per_m), 4) for length in face.surface.size_m)
        image = textures.TEXTURES[face.style](rng, h, w, face.texels_per_m) \
            if face.photo is None else photo_crop(rng, face.photo, h, w)
        if face.texels_per_m == WALL_TEXELS_PER_M:
            image = textures.with_details(rng, image, face.texels_per_m)
        surface = face.surface
        light = lighting.irradiance(surface.corner, surface.side_u, surface.side_v, self.size,
                                    self.boxes, self.lamps)
        bright = np.maximum(image * cv2.resize(light, (w, h), interpolation=cv2.INTER_LINEAR), 0)
        # Like a camera's tone curve: highlights fade into white instead of clipping.
        shoulder = np.where(bright > 0.75, 0.75 + 0.25 * np.tanh((bright - 0.75) / 0.25), bright)
        return render.pyramid((shoulder * 255).astype(np.uint8))


def _box_surfaces(box: Box) -> Iterator[tuple[str, Surface]]:
    """The six faces of a box with their place: front, top or side."""
    axes, centre = box.R_world_box, box.centre
    x, y, z = (axes[:, i] * box.half[i] for i in range(3))
    for place, right, down, out in (
            ('front', x, -z, -y), ('side', -x, -z, y), ('side', y, -z, x), ('side', -y, -z, -x),
            ('top', x, -y, z), ('side', x, y, -z)):
        yield place, Surface(centre + out - right - down, 2 * right, 2 * down)


def faces_of(rng: np.random.Generator, size: NDArray, boxes: list[Box]) -> list[Face]:
    """All faces of the room's shell (seen from inside) and of the boxes, with their textures."""
    shell = Box('room', np.array([0, 0, size[2] / 2]), size / 2)
    paper = str(rng.choice(WALLS))
    faces = []
    for place, outside in _box_surfaces(shell):
        style = paper if rng.random() < 0.5 else str(rng.choice(WALLS))
        if abs(outside.side_v[2]) < 1e-9:
            style = str(rng.choice(CEILINGS if place == 'top' else FLOORS))
        inside = Surface(outside.corner + outside.side_u, -outside.side_u, outside.side_v)
        faces.append(_face(rng, inside, style, WALL_TEXELS_PER_M))
    return faces + box_faces(rng, boxes)


def box_faces(rng: np.random.Generator, boxes: list[Box]) -> list[Face]:
    """The six faces of each box, with textures of its kind."""
    faces = []
    for box in boxes:
        choices = dict(zip(('front', 'top', 'side'), STYLES[box.kind], strict=True))
        side = str(rng.choice(choices['side']))
        for place, surface in _box_surfaces(box):
            style = side if place == 'side' else str(rng.choice(choices[place]))
            faces.append(_face(rng, surface, style, BOX_TEXELS_PER_M))
    return faces


def _face(rng: np.random.Generator, surface: Surface, style: str, texels_per_m: float) -> Face:
    return Face(surface, style, int(rng.integers(2**62)), texels_per_m)


def right_image(room: Room, camera: Camera, T_world_cam: NDArray, baseline_m: float, *,
                right: Camera | None = None, T_left_right: NDArray | None = None) -> RightImage:
    """What the right camera of a pair sees beside a camera at T_world_cam [4, 4].

    right, T_left_right: for a pair that is not rectified; else the same camera, ``baseline_m`` to
    the right.
    """
    if T_left_right is None:
        T_left_right = make_transform(np.eye(3), np.array([baseline_m, 0.0, 0.0]))
    right = right or camera
    return RightImage(room.render(right, T_world_cam @ T_left_right)[0], right, T_left_right)


def render_walk(room: Room, camera: Camera, poses: list[NDArray[np.float64]], *,
                fps: float = 15.0, noise: float = 0.0, exposure_drift: float = 0.0,
                seed: int = 0) -> Iterator[Frame]:
    """Frames of a walk with depth and true poses (the map frame is the room's frame).

    noise: standard deviation of the sensor noise in grey levels; exposure_drift: amplitude of
    slow brightness changes, as a share (0.1 is +-10 %).
    """
    rng = np.random.default_rng(seed)
    phases = rng.uniform(0, 2 * np.pi, 2)
    for index, T_world_cam in enumerate(poses):
        image, depth = room.render(camera, T_world_cam)
        time_s = index / fps
        if exposure_drift or noise:
            waves = np.sin(2 * np.pi * time_s / np.array([7.0, 17.0]) + phases).mean()
            grain = rng.normal(0, noise, image.shape) if noise else 0.0
            bright = image * (1 + exposure_drift * waves) + grain
            image = np.clip(np.rint(bright), 0, 255).astype(np.uint8)
        yield Frame(round(time_s * 1e9), image, depth, camera, f'synthetic/{index:06d}',
                    T_world_cam)
