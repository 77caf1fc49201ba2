"""Both halves of a memory in a building: slots few of which are in any room, and the network.

Twelve places, a small version of the building of benchmarks/memory.py. Three rooms are rendered;
seen in a mirror, or upside down, or both, each is a place of its own to the encoder, at a fraction
of the price. There are 40 slots for a place, so that few of them agree with any pose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from feedforward_recon.config.schema import LocalizerConfig, MemoryConfig
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.memory import MemoryWriter, SceneMemory
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.synthetic.hardships import flat
from feedforward_recon.types import Features, Frame, Keyframe

CAMERA = Camera.from_fov(65.0, (320, 240))
ROOMS, APART_M = (100, 104, 105), 20.0
FRAMES, QUERIES = 6, 2  # of a room
CONFIG = MemoryConfig(slots=500, cells=0)
ALONE = MemoryConfig(slots=0, tables=8, cells=65_536)
WRONG_M, WRONG_DEG = 0.2, 10.0
KINDS: dict[str, Callable[[Frame], Frame]] = {'plain': lambda frame: frame, 'low contrast': flat}


@dataclass(frozen=True)
class Building:
    """Two memories of all rooms, and views (features and true pose) that are not in them.

    alone: a coordinate network without slots.
    """

    memory: SceneMemory
    alone: SceneMemory
    views: dict[str, list[tuple[Features, np.ndarray]]]

    def found(self, encoder, kind: str, memory: SceneMemory,
              config: LocalizerConfig | None = None) -> int:
        """How many views of a kind are localised; no answer may be wrong."""
        localizer = Localizer(memory, encoder, config)
        answers = [(localizer.localize_features(features, CAMERA).estimate.T_map_cam, pose)
                   for features, pose in self.views[kind]]
        errors = [pose_error(found, pose) for found, pose in answers if found is not None]
        wrong = [e for e in errors if e[0] > WRONG_M or e[1] > WRONG_DEG]
        assert not wrong, f'{kind}: {wrong}'
        return len(errors)


@pytest.fixture(scope='module')
def building(encoder) -> Building:
    writers = [MemoryWriter(config, encoder.dim) for config in (CONFIG, ALONE)]
    views: dict[str, list[tuple[Features, np.ndarray]]] = {kind: [] for kind in KINDS}
    places = keyframes = 0
    for seed in ROOMS:
        walk, held_out = seen(seed)
        for mirrored, upside_down in np.ndindex(2, 2):
            offset = np.eye(4)
            offset[0, 3] = places * APART_M
            for frame in walk:
                written = keyframe(encoder, keyframes, offset,
                                   turned(frame, mirrored, upside_down))
                for writer in writers:
                    writer.write(written)
                keyframes += 1
            for kind, change in KINDS.items():
                for frame in held_out:
                    frame = change(turned(frame, mirrored, upside_down))
                    views[kind].append((encoder.encode(frame.image), offset @ frame.T_map_cam))
            places += 1
    return Building(*(writer.snapshot() for writer in writers), views)


def seen(seed: int) -> tuple[list[Frame], list[Frame]]:
    """Frames of a short walk, and of views beside it."""
    room = Room.generate(seed)
    # Half as fine as usual, as fits the small images: painting is most of the time.
    room = replace(room, faces=[replace(face, texels_per_m=face.texels_per_m / 2)
                                for face in room.faces], pyramids={})
    poses = room.walk(FRAMES, seed=0, fps=4.0)
    held_out = room.held_out_views(poses, QUERIES, seed=3)
    return list(render_walk(room, CAMERA, poses)), list(render_walk(room, CAMERA, held_out))


def turned(frame: Frame, mirrored: bool, upside_down: bool) -> Frame:
    """The frame in a mirrored world, held upside down: image, depth and pose stay consistent."""
    x, y = (-1 if mirrored != upside_down else 1), (-1 if upside_down else 1)
    world = np.diag([-1.0 if mirrored else 1.0, 1.0, 1.0, 1.0])
    pixels = slice(None, None, y), slice(None, None, x)
    assert frame.depth is not None and frame.T_map_cam is not None
    return replace(frame, image=np.ascontiguousarray(frame.image[pixels]),
                   depth=np.ascontiguousarray(frame.depth[pixels]),
                   T_map_cam=world @ frame.T_map_cam @ np.diag([x, y, 1.0, 1.0]))


def keyframe(encoder, index: int, T_map_world: np.ndarray, frame: Frame) -> Keyframe:
    """A keyframe whose points are the rendered depth at its features."""
    features = encoder.encode(frame.image)
    assert frame.depth is not None and frame.T_map_cam is not None
    column, row = np.rint(features.keypoints).astype(int).clip(0, np.array(CAMERA.size_wh) - 1).T
    points = CAMERA.unproject(features.keypoints, frame.depth[row, column])
    return Keyframe(index, index, CAMERA, T_map_world @ frame.T_map_cam, features,
                    points.astype(np.float32))


@pytest.mark.parametrize('kind', KINDS)
def test_other_rooms_do_not_count_against_a_place(building, encoder, kind):
    """Slots behind walls are in every view: they must not make what is right look wrong."""
    assert building.found(encoder, kind, building.memory) > 0.8 * len(building.views[kind])


def test_a_network_alone_finds_views(building, encoder):
    """Nothing of it can be left out: mute or with any points in its cells it finds none."""
    memory, views = building.alone, len(building.views['plain'])
    noise = np.random.default_rng(0).integers(0, 65536, tuple(memory.cell_points.shape))
    nonsense = replace(memory, cell_points=torch.from_numpy(noise.astype(np.uint16)))
    assert building.found(encoder, 'plain', memory) > 0.8 * views
    assert building.found(encoder, 'plain', nonsense) == 0
    assert building.found(encoder, 'plain', memory, LocalizerConfig(network_candidates=0)) == 0
