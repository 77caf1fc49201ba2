"""Posed photos on disk, and which corners of two of them are the same scene point.

A folder per scene holds ``images/``, ``cameras.json`` (K, distortion and T_world_camera of each
frame, pixel centres at one half) and ``tracks.npz`` (image_index, uv, depth, point_id: where
reconstructed points were seen). Tracks are sparse, and stand at other points than the corners
that the encoder describes. Two corners correspond when the depth of the tracks beside the first
says where it must lie on its epipolar line in the other image, the second lies there, and among
the few corners that do, both describe each other best.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy.sparse import csr_array
from scipy.spatial import cKDTree

from feedforward_recon.errors import InputError
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse, transform_points
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.types import Features

NEIGHBOURS = 4  # tracks that tell the depth of a corner: fewer would not show an edge between
NEIGHBOUR_PX = 50.0  # farther tracks lie on other things
DEPTH_RATIO = 1.4  # of the farthest to the nearest of them; more means an edge in depth
DEPTH_MARGIN = 0.03  # the corner may stand a little before or behind all of them
LINE_PX = 2.0  # both corners are found to about a pixel, poses to half of one
MIN_LIKENESS = 0.3  # the partner may be undetected: its neighbour is no partner
MIN_SHARED_TRACKS = 25  # images with fewer show hardly the same things
VIEW_ANGLE_DEG = (2.0, 50.0)  # between orientations: less is no new view, more is not matched
PAIRS_PER_SCENE = 250  # a large scene must not crowd out the others
MARGIN_PX = 4.0  # corners this near the border are cut off in the other image


@dataclass(frozen=True)
class PosedScene:
    """cameras and poses T_world_cam [N, 4, 4] of N images, and their tracks.

    Track arrays are in the order of images; those of image i are rows starts[i]:starts[i + 1].
    uv: pixels [T, 2], centres at integers. depth: z [T] in the unit of the poses. point_id [T].
    """

    files: list[Path]
    cameras: list[Camera]
    T_world_cam: np.ndarray
    starts: np.ndarray
    uv: np.ndarray
    depth: np.ndarray
    point_id: np.ndarray

    def tracks(self, image: int) -> slice:
        """Rows of the track arrays that belong to one image."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))

    def image(self, index: int) -> np.ndarray:
        """The image as RGB uint8 [H, W, 3]."""
        return posed_image(self.files[index], self.cameras[index].size_wh)


@dataclass(frozen=True)
class LabelledScene:
    """A scene and what `label_scene` found in it."""

    scene: PosedScene
    labels: dict[str, np.ndarray]

    def __len__(self) -> int:
        """Number of pairs of images."""
        return len(self.labels['pairs'])

    def pair(self, index: int) -> tuple[tuple[int, int], list[np.ndarray], np.ndarray]:
        """Images (a, b), their corners [C, 2] each, and matches [K, 2] between them."""
        a, b = (int(i) for i in self.labels['pairs'][index])
        starts, rows = self.labels['corner_starts'], self.labels['match_starts']
        corners = [self.labels['corners'][starts[i]:starts[i + 1]] for i in (a, b)]
        return (a, b), corners, self.labels['matches'][rows[index]:rows[index + 1]]


def read_scene(folder: Path) -> PosedScene:
    """Read a scene; raises InputError when a file is missing or of another kind."""
    try:
        frames = json.loads((folder / 'cameras.json').read_text())['frames']
        with np.load(folder / 'tracks.npz') as found:
            tracks = {key: found[key] for key in ('image_index', 'uv', 'depth', 'point_id')}
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f'expected cameras.json and tracks.npz in {folder}, found {error}; '
                         'give a folder of posed scenes') from error
    files = [folder / frame['file'] for frame in frames]
    order = np.argsort(tracks['image_index'], kind='stable')
    starts = np.searchsorted(tracks['image_index'][order], np.arange(len(files) + 1))
    cameras = [_camera(frame, file) for frame, file in zip(frames, files, strict=True)]
    T_world_cam = np.array([frame['T_world_camera'] for frame in frames], float)
    return PosedScene(files, cameras, T_world_cam, starts, tracks['uv'][order] - 0.5,
                      tracks['depth'][order], tracks['point_id'][order])


def _camera(frame: dict, file: Path) -> Camera:
    K = np.array(frame['K'], float)
    K[:2, 2] -= 0.5  # their pixel centres stand at one half, ours at integers
    height, width = _read(file).shape[:2]
    return Camera.from_matrix(K, (width, height), tuple(frame['distortion']))


def posed_image(file: Path, size_wh: tuple[int, int]) -> np.ndarray:
    """RGB uint8 [H, W, 3] of a file at the size (width, height) of its camera.

    Raises InputError for a file that is no image.
    """
    image = cv2.cvtColor(_read(file), cv2.COLOR_BGR2RGB)
    if image.shape[1::-1] != size_wh:
        image = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA)
    return np.asarray(image, np.uint8)


def _read(file: Path) -> np.ndarray:
    """As stored: calibrations do not know of EXIF rotations."""
    image = cv2.imread(str(file), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise InputError(f'expected an image at {file}, found no readable one; restore it')
    return image


def view_overlap(scene: PosedScene) -> tuple[np.ndarray, np.ndarray]:
    """Tracks that images share, and degrees between their orientations, both [N, N]."""
    images = len(scene.files)
    _, point = np.unique(scene.point_id, return_inverse=True)
    view = np.repeat(np.arange(images), np.diff(scene.starts))
    ones = np.ones(len(point), np.float32)
    seen = csr_array((ones, (view, point)), shape=(images, point.max(initial=-1) + 1))
    seen.data[:] = 1  # a point that an image shows twice counts once
    R = scene.T_world_cam[:, :3, :3]
    cosine = (np.einsum('aij,bij->ab', R, R) - 1) / 2
    return (seen @ seen.T).toarray(), np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def covisible_pairs(scene: PosedScene) -> np.ndarray:
    """Pairs of images [M, 2] that share tracks and whose orientations differ enough."""
    shared, angle_deg = view_overlap(scene)
    wanted = (shared >= MIN_SHARED_TRACKS) & (angle_deg >= VIEW_ANGLE_DEG[0]) \
        & (angle_deg <= VIEW_ANGLE_DEG[1])
    return np.argwhere(np.triu(wanted, 1))


def corresponding_corners(scene: PosedScene, pair: tuple[int, int],
                          found: tuple[Features, Features]) -> np.ndarray:
    """Rows (keypoint of image a, keypoint of image b) [K, 2]; -1 for b where it has none.

    Only keypoints of a are listed that image b must show by the tracks around them.
    """
    rows, ends = _segments(scene, pair, found[0].keypoints)
    if not len(rows):
        return np.zeros((0, 2), np.int32)
    near = _distance(ends, found[1].keypoints) < LINE_PX
    likeness = np.where(near, found[0].descriptors[rows] @ found[1].descriptors.T, -1.0)
    best = likeness.argmax(1)
    each = np.arange(len(rows))
    right = (likeness.argmax(0)[best] == each) & (likeness[each, best] > MIN_LIKENESS)
    return np.stack([rows, np.where(right, best, -1)], 1).astype(np.int32)


def _segments(scene: PosedScene, pair: tuple[int, int],
              keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints of a with a known depth that b shows [K], and where: ends [K, 2, 2] in px."""
    a, b = pair
    tracks = scene.tracks(a)
    if tracks.stop - tracks.start < NEIGHBOURS:
        return np.zeros(0, int), np.zeros((0, 2, 2))
    distance, index = cKDTree(scene.uv[tracks]).query(keypoints, NEIGHBOURS)
    depths = scene.depth[tracks][index]
    nearest, farthest = depths.min(1), depths.max(1)
    shared = np.isin(scene.point_id[tracks], scene.point_id[scene.tracks(b)])[index]
    # Half of the tracks beside it are seen by b as well, or it may be hidden there.
    known = (distance[:, -1] < NEIGHBOUR_PX) & (farthest < DEPTH_RATIO * nearest) \
        & (shared.sum(1) >= NEIGHBOURS // 2)
    T_b_a = inverse(scene.T_world_cam[b]) @ scene.T_world_cam[a]
    ends = np.stack([
        scene.cameras[b].project(transform_points(T_b_a, scene.cameras[a].unproject(
            keypoints, z))) for z in (nearest * (1 - DEPTH_MARGIN),
                                      farthest * (1 + DEPTH_MARGIN))], 1)
    limit = np.array(scene.cameras[b].size_wh) - 1 - MARGIN_PX
    with np.errstate(invalid='ignore'):
        inside = np.all((ends > MARGIN_PX) & (ends < limit), axis=(1, 2))
    rows = np.flatnonzero(known & inside)
    return rows, ends[rows]


def _distance(ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pixels [K, N] between segments [K, 2, 2] and points [N, 2]."""
    along = ends[:, 1] - ends[:, 0]
    offset = points[None] - ends[:, :1]
    share = np.einsum('knc,kc->kn', offset, along) / np.maximum((along**2).sum(1), 1e-9)[:, None]
    return np.linalg.norm(offset - share.clip(0, 1)[..., None] * along[:, None], axis=-1)


def read_labelled(folder: Path, cache: Path, held_out: Sequence[str]) -> list[LabelledScene]:
    """All scenes of a folder but those held out; labels are kept in ``cache``/labels."""
    names = [f.parent.name for f in sorted(folder.glob('*/cameras.json'))]
    if unknown := set(filter(None, held_out)) - set(names):
        raise InputError(f'expected scenes of {folder} to hold out, found {sorted(unknown)}; '
                         f'choose of {names}')
    names = [name for name in names if name not in held_out]
    if not names:
        raise InputError(f'expected scenes with a cameras.json in {folder}, found none; give '
                         'another folder')
    (cache / 'labels').mkdir(parents=True, exist_ok=True)
    encoder = CompactEncoder.load()
    scenes = [_labelled(read_scene(folder / name), cache / 'labels' / f'{name}.npz', encoder)
              for name in names]
    return [scene for scene in scenes if len(scene)]


def _labelled(scene: PosedScene, file: Path, encoder: CompactEncoder) -> LabelledScene:
    if not file.exists():
        labels = label_scene(scene, encoder, PAIRS_PER_SCENE, np.random.default_rng(0))
        part = file.with_name(f'.{file.name}')
        np.savez(part, **labels)  # type: ignore[arg-type]
        part.replace(file)
    with np.load(file) as found:
        return LabelledScene(scene, dict(found))


def label_scene(scene: PosedScene, encoder: CompactEncoder, pairs: int,
                rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Corresponding corners of at most ``pairs`` pairs of images of a scene.

    corners float32 [C, 2] of all images, those of image i in corner_starts[i]:corner_starts[i +
    1]; pairs [M, 2]; matches int32 [K, 2], those of pair m in match_starts[m]:match_starts[m +
    1] (see `corresponding_corners`).
    """
    found = [encoder.encode(scene.image(i)) for i in range(len(scene.files))]
    chosen = rng.permutation(covisible_pairs(scene))[:pairs]
    matches = [corresponding_corners(scene, (a, b), (found[a], found[b])) for a, b in chosen]
    return {'corners': np.concatenate([f.keypoints for f in found]),
            'corner_starts': np.cumsum([0, *(len(f) for f in found)]),
            'pairs': chosen.reshape(-1, 2),
            'matches': np.concatenate([np.zeros((0, 2), np.int32), *matches]),
            'match_starts': np.cumsum([0, *(len(m) for m in matches)])}
