"""How well a network poses a window of shuffled photos, beside what needs no such network.

    python -m benchmarks.pose_accuracy                    # what ships: writes the result
    python -m benchmarks.pose_accuracy --model NAME --data SET ... --json

A window is 8 images of one size in any order, each of which overlaps with another by the true
poses (benchmarks/covisible_windows.py). Systems: the network; its poses refined with known
intrinsics (benchmarks/window_refinement.py); each image shown to it alone, which says depth but
no motion; the best of seven constant answers (no motion, or one step along an axis from image to
image, never a turn; all depths equal), and the best of these refined like the network's poses,
which says what the network adds to the matches; and, pair by pair, matches of the compact
encoder and an essential matrix with known intrinsics, at two image sizes.

auc30: mean over pairs of max(0, 1 - e / 30), e being the larger error in degrees of rotation and
of direction of translation; rra15, rta15: share of pairs whose rotation or direction is within
15 degrees. A pair without an answer has an infinite error, no motion a direction 90 degrees off.
Pairs with hardly a baseline are left out. abs_rel: mean over windows of |d - d*| / d* after one
median scale, where the set has depth.
"""

from __future__ import annotations

import argparse
import logging
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from benchmarks.common import DRIVE, KITCHEN, data_root, load_frames, write_result
from benchmarks.covisible_windows import covisible, drawn_windows
from benchmarks.pairs import FEATURES, auc, relative_pose
from benchmarks.window_refinement import refined_poses, shared_tracks
from feedforward_recon.config.photos import PHOTO_ENCODER
from feedforward_recon.console.terminal import print_json
from feedforward_recon.console.threads import one_thread
from feedforward_recon.errors import InputError, ReconError
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.mapping.matching import match_mutual
from feedforward_recon.model import Predictor
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.predictor import load_predictor
from feedforward_recon.reconstruction.shots import Shot, shot_of
from feedforward_recon.training.transformer_scores import AUC_DEG, SHORTEST_BASELINE, abs_rel
from feedforward_recon.types import Frame, Prediction

MODEL, WINDOWS, VIEWS = 'tiny', 8, 8
SETS = (KITCHEN, 'llff_fortress', 'llff_room', 'llff_flower', 'tabletop_cup', 'ngp_fox',
        'strecha_Herz-Jesus-P25', 'lund_door', DRIVE)
WITHIN_DEG = 15.0
SMALL_PIXELS = 49_152  # 256 x 192
NETWORK, REFINED, SINGLE = 'network', 'network, refined', 'network, one by one'
GUESS, GUESS_REFINED = 'best constant', 'best constant, refined'
SMALL, FULL = f'compact, {SMALL_PIXELS} px', 'compact, full size'
GUESSES = {'still': (0, 0, 0), '+x': (1, 0, 0), '-x': (-1, 0, 0), '+y': (0, 1, 0),
           '-y': (0, -1, 0), '+z': (0, 0, 1), '-z': (0, 0, -1)}
AFTER = ' refined'

Row = dict[str, Any]


class Answer(NamedTuple):
    """T_j_i [P, 4, 4] of the pairs i < j of a window, NaN where none was found; depth if said."""

    T_j_i: np.ndarray
    depth: np.ndarray | None = None


@dataclass
class Errors:
    """Degrees of all pairs of all windows so far, infinite without an answer; a window's depth."""

    rotation_deg: list[float] = field(default_factory=list)
    direction_deg: list[float] = field(default_factory=list)
    abs_rel: list[float] = field(default_factory=list)

    def add(self, frames: Sequence[Frame], answer: Answer) -> None:
        """One more window."""
        rotation, direction = pair_errors_deg(answer.T_j_i, true_poses(frames))
        self.rotation_deg += rotation.tolist()
        self.direction_deg += direction.tolist()
        if answer.depth is not None and all(frame.depth is not None for frame in frames):
            self.abs_rel.append(depth_error(frames, answer.depth))

    def row(self) -> Row:
        """The figures, 0 to 1; no abs_rel without depth."""
        rotation, direction = np.array(self.rotation_deg), np.array(self.direction_deg)
        return {'auc30': auc(np.maximum(rotation, direction).tolist(), AUC_DEG),
                'rra15': float(np.mean(rotation <= WITHIN_DEG)),
                'rta15': float(np.mean(direction <= WITHIN_DEG)),
                'abs_rel': float(np.mean(self.abs_rel)) if self.abs_rel else None,
                'pairs': len(rotation)}


# -- scores -------------------------------------------------------------------------------------

def true_poses(frames: Sequence[Frame]) -> np.ndarray:
    """Given poses [N, 4, 4] of frames that have one."""
    return np.stack([frame.T_map_cam for frame in frames if frame.T_map_cam is not None])


def intrinsics(frames: Sequence[Frame]) -> np.ndarray | None:
    """K [3, 3] of the camera that took all frames of a window; None where it is not known."""
    return None if frames[0].camera is None else frames[0].camera.K


def relative(T_world_cam: np.ndarray) -> np.ndarray:
    """T_j_i [P, 4, 4] of all pairs i < j of poses [N, 4, 4]."""
    i, j = np.triu_indices(len(T_world_cam), 1)
    return inverse(T_world_cam[j]) @ T_world_cam[i]


def pair_errors_deg(T_j_i: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Degrees of rotation and of direction [Q] of pairs [P, 4, 4] against poses [N, 4, 4].

    Infinite where a pair is NaN. Pairs whose baseline is below SHORTEST_BASELINE of the longest
    are left out.
    """
    true = relative(truth)
    length = np.linalg.norm(true[:, :3, 3], axis=-1)
    far = length > SHORTEST_BASELINE * length.max()
    mine, true, length = T_j_i[far], true[far], length[far]
    turn = np.einsum('pij,pij->p', mine[:, :3, :3], true[:, :3, :3])
    size = np.maximum(np.linalg.norm(mine[:, :3, 3], axis=-1), 1e-12)  # no motion: 90 degrees
    along = np.einsum('pi,pi->p', mine[:, :3, 3], true[:, :3, 3]) / (size * length)
    return _degrees((turn - 1) / 2), _degrees(along)


def _degrees(cosine: np.ndarray) -> np.ndarray:
    degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return np.where(np.isnan(degrees), np.inf, degrees)


def depth_error(frames: Sequence[Frame], depth: np.ndarray) -> float:
    """`abs_rel` of depths [N, h, w] of frames that all have depth."""
    truth = np.stack([f.depth for f in frames if f.depth is not None])
    guess = np.stack([cv2.resize(d, truth.shape[:0:-1]) for d in depth])
    # Pixels that the preparation cut off have no depth.
    return float(abs_rel(torch.from_numpy(guess), torch.from_numpy(truth * (guess > 0))))


# -- systems ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Systems:
    """All systems on one window of frames with a pose and a camera. encoder: of full size."""

    network: Predictor
    encoder: CompactEncoder

    def answers(self, frames: list[Frame]) -> Iterator[tuple[str, Answer]]:
        """What each system says; constant answers by the names of GUESSES."""
        said = self.network.predict([frame.image for frame in frames], K=intrinsics(frames))[0]
        large, small = (self._shots(frames, pixels)
                        for pixels in (PHOTO_ENCODER.max_pixels, SMALL_PIXELS))
        yield NETWORK, Answer(relative(said.T_world_cam), said.depth)
        tracks = shared_tracks(large, self.encoder)
        yield REFINED, Answer(relative(refined_poses(large, tracks, said.T_world_cam)), said.depth)
        yield SINGLE, self._one_by_one(frames)
        nothing = still(frames)
        for name, axis in GUESSES.items():
            T = _steps(nothing, axis)
            yield name, Answer(relative(T), nothing.depth)
            yield name + AFTER, Answer(relative(refined_poses(large, tracks, T)), nothing.depth)
        yield SMALL, essential(small)
        yield FULL, essential(large)

    def _shots(self, frames: list[Frame], pixels: int) -> list[Shot]:
        return [shot_of(frame, frame.camera, self.encoder, pixels)
                for frame in frames if frame.camera is not None]

    def _one_by_one(self, frames: list[Frame]) -> Answer:
        """Each image is the world of its own prediction: as if no camera moved."""
        depth = [self.network.predict([frame.image], K=intrinsics(frames))[0].depth[0]
                 for frame in frames]
        return Answer(relative(still(frames).T_world_cam), np.stack(depth))


def still(frames: Sequence[Frame]) -> Prediction:
    """The answer that needs no network: no camera moves, all depths are equal."""
    shape = (len(frames), *frames[0].image.shape[:2])
    return Prediction(np.stack([np.eye(4)] * len(frames)), np.stack([np.eye(3)] * len(frames)),
                      np.ones(shape, np.float32), np.ones(shape, np.float32))


def _steps(nothing: Prediction, axis: Sequence[float]) -> np.ndarray:
    T = nothing.T_world_cam.copy()
    T[:, :3, 3] = np.arange(len(T))[:, None] * axis
    return T


def essential(shots: Sequence[Shot]) -> Answer:
    """Pairs of encoded images, each by its matches alone."""
    found = []
    for i, j in zip(*np.triu_indices(len(shots), 1), strict=True):
        a, b = shots[i], shots[j]
        rows_a, rows_b = match_mutual(a.features.descriptors, b.features.descriptors, -1.0)
        focal_px = (a.camera.fx + a.camera.fy + b.camera.fx + b.camera.fy) / 4
        T_j_i = relative_pose(a.xy[rows_a], b.xy[rows_b], focal_px)
        found.append(np.full((4, 4), np.nan) if T_j_i is None else T_j_i)
    return Answer(np.stack(found))


def full_size_encoder() -> CompactEncoder:
    """The encoder of the package, for images as large as those of photo collections."""
    return CompactEncoder.load(config=replace(PHOTO_ENCODER, max_keypoints=FEATURES))


# -- sets ---------------------------------------------------------------------------------------

def resolved(name: str) -> Path:
    """The folder of a set: a name under FFRECON_DATA, or a path.

    Raises InputError where there is none, or no cameras.json in it.
    """
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        folder = data_root() / name
    if not folder.is_dir():
        known = ', '.join(sorted(path.parent.name for path in data_root().glob('*/cameras.json')))
        raise InputError(f'expected a folder or a set of {known}, found {name!r}; choose one')
    if not (folder / 'cameras.json').is_file():
        raise InputError(f'{name}: expected poses and intrinsics in cameras.json, found none; '
                         'choose a set with poses')
    return folder


def windows_of(folder: Path, count: int, views: int = VIEWS) -> list[list[Frame]]:
    """At most ``count`` windows of a set, the same each time, of images of one size each.

    Raises InputError where fewer images than a window overlap.
    """
    frames = [frame for frame in load_frames(str(folder))
              if frame.T_map_cam is not None and frame.camera is not None]
    if not frames:
        raise InputError(f'{folder}: expected images with T_world_camera and K, found none; '
                         'choose a set with poses')
    alike: dict[tuple[int, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        alike[frame.image.shape].append(frame)
    most = max(alike.values(), key=len)
    rng = np.random.default_rng(zlib.crc32(folder.name.encode()))
    drawn = drawn_windows(covisible(true_poses(most)), views, count, rng)
    if not drawn:
        raise InputError(f'{folder}: expected at least {views} images of one size that overlap, '
                         f'found {len(most)} of one size; choose a larger set')
    return [[most[index] for index in window] for window in drawn]


def rows_of(windows: Sequence[list[Frame]], systems: Systems) -> dict[str, Row]:
    """A row per system over the windows of one set."""
    errors: dict[str, Errors] = defaultdict(Errors)
    for frames in windows:
        for name, answer in systems.answers(frames):
            errors[name].add(frames, answer)
    rows = {name: {**part.row(), 'windows': len(windows)} for name, part in errors.items()}
    for best, after in ((GUESS, ''), (GUESS_REFINED, AFTER)):
        guesses = [{**rows.pop(name + after), 'guess': name} for name in GUESSES]
        rows[best] = max(guesses, key=lambda row: (row['auc30'], row['rta15']))
    return rows


def run(model: str = MODEL, data: Sequence[str] = SETS, windows: int = WINDOWS
        ) -> Iterator[tuple[str, Row]]:
    """A row per set and system. Raises ReconError for what cannot be measured."""
    folders = [resolved(name) for name in data]
    with one_thread():
        systems = Systems(load_predictor(model), full_size_encoder())
        for name, folder in zip(data, folders, strict=True):
            for system, row in rows_of(windows_of(folder, windows), systems).items():
                yield f'{name} | {system}', row


# -- command ------------------------------------------------------------------------------------

def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; of what ships, also write results/pose_accuracy.json."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format='%(message)s', level=logging.WARNING)
    asked = {'model': options.model, 'data': options.data, 'windows': options.windows}
    rows = {}
    try:
        for case, row in run(**asked):
            rows[case] = row
            if not options.json:
                print(_line(case, row), flush=True)
    except ReconError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    if options.json:
        print_json({'views': VIEWS, **asked, 'rows': rows})
    elif asked == {'model': MODEL, 'data': list(SETS), 'windows': WINDOWS}:
        print(write_result('pose_accuracy', rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default=MODEL, help=f'a network (default: {MODEL})')
    parser.add_argument('--data', nargs='+', default=list(SETS), metavar='SET',
                        help='names under FFRECON_DATA, or folders with a cameras.json')
    parser.add_argument('--windows', type=_positive, default=WINDOWS,
                        help=f'at most, of each set (default: {WINDOWS})')
    parser.add_argument('--json', action='store_true', help='one document on stdout')
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a number of at least 1, found {text!r}')
    return int(text)


def _line(case: str, row: Row) -> str:
    figures = ' '.join(f'{key} {row[key]:.3f}' for key in ('auc30', 'rra15', 'rta15'))
    depth = '' if row['abs_rel'] is None else f' abs_rel {row["abs_rel"]:.3f}'
    guess = f' ({row["guess"]})' if 'guess' in row else ''
    return f'{case + guess:50} {figures}{depth}'


if __name__ == '__main__':
    sys.exit(main())
