"""The shipped `tiny` transformers on windows of 8 views: rooms never trained on, real images.

    python -m benchmarks.tiny [--views DIR]    # DIR: of `ffrecon-train views`; else rendered

No pose or depth is given, and the calibration to `tiny` alone, which needs it. `nothing` says that
no camera moves and that all depths are equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.common import KITCHEN, load_frames, write_result
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.model.predictor import NetworkPredictor, load_predictor
from feedforward_recon.training.depth_source import DepthSource
from feedforward_recon.training.room_files import room_source
from feedforward_recon.training.room_views import HELD_OUT, render_views
from feedforward_recon.training.transformer_scores import (
    PairErrors,
    Scores,
    abs_rel,
    concatenated,
    pose_errors,
)
from feedforward_recon.types import Frame, Prediction

NAMES = ('tiny', 'tiny-ttt')
VIEWS, HELD_OUT_ROOMS, WINDOWS_PER_ROOM = 8, 16, 2
# Images between the views of a window, and between windows.
SETS = {KITCHEN: (8, 40), 'llff_fortress': (1, 8), 'llff_room': (1, 8), 'llff_flower': (1, 8),
        'tabletop_cup': (1, 8), 'ngp_fox': (1, 8), 'strecha_Herz-Jesus-P8': (1, 8),
        'kitti_seq2': (1, 8)}
Predict = Callable[[list[Frame]], Prediction]


def windows_of(name: str) -> list[list[Frame]]:
    """Windows of a real set."""
    frames = load_frames(name)
    step, apart = SETS[name]
    span = step * (VIEWS - 1) + 1
    return [frames[i:i + span:step] for i in range(0, len(frames) - span + 1, apart)]


def room_windows(room: DepthSource, count: int) -> list[list[Frame]]:
    """Windows of a room, its views cut to 4:3."""
    rng = np.random.default_rng(0)
    drawn = [room.window(rng, VIEWS) for _ in range(count)]
    return [[_frame(room, int(view)) for view in views] for views in drawn if views is not None]


def _frame(room: DepthSource, view: int) -> Frame:
    whole, (width, height) = room.camera(view), room.size_wh
    top = height // 8
    rows = slice(top, top + 3 * height // 4)
    camera = Camera(width, 3 * height // 4, whole.fx, whole.fy, whole.cx, whole.cy - top)
    return Frame(view, np.ascontiguousarray(room.image(view)[rows]), camera=camera,
                 T_map_cam=room.pose(view), depth=room.depth(view)[rows].astype(np.float32))


def still(frames: list[Frame]) -> Prediction:
    """The answer that needs no network."""
    shape = (len(frames), *frames[0].image.shape[:2])
    return Prediction(np.stack([np.eye(4)] * len(frames)), np.stack([np.eye(3)] * len(frames)),
                      np.ones(shape, np.float32), np.ones(shape, np.float32))


def scores(windows: list[list[Frame]], predict: Predict) -> Scores:
    """Figures over all windows of a set; NaN for the depth where none is known."""
    return concatenated([_errors(frames, predict(frames)) for frames in windows]).scores()


def _errors(frames: list[Frame], said: Prediction) -> PairErrors:
    given = np.stack([f.T_map_cam for f in frames if f.T_map_cam is not None])
    centres = given[:, :3, 3]
    given[:, :3, 3] /= np.linalg.norm(centres[:, None] - centres, axis=-1).max()
    mine, true = (torch.from_numpy(np.stack([inverse(T) for T in poses]))[None]
                  for poses in (said.T_world_cam, given))
    known = all(f.depth is not None for f in frames)
    depth = torch.tensor([depth_error(frames, said.depth) if known else torch.nan])
    return PairErrors(*pose_errors(mine, true), depth)


def depth_error(frames: Sequence[Frame], depth: np.ndarray) -> float:
    """`abs_rel` of depths [N, h, w] of frames that all have depth."""
    truth = np.stack([f.depth for f in frames if f.depth is not None])
    guess = np.stack([cv2.resize(d, truth.shape[:0:-1]) for d in depth])
    # Pixels that the preparation cut off have no depth.
    return float(abs_rel(torch.from_numpy(guess), torch.from_numpy(truth * (guess > 0))))


def rows(rooms_folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the table."""
    ways: dict[str, Predict] = {name: told(load_predictor(name)) for name in NAMES}
    ways['nothing'] = still
    rooms = [room_source(file) for file in render_views(rooms_folder, HELD_OUT_ROOMS, HELD_OUT)]
    sets = {'rooms never trained on': [window for room in rooms
                                       for window in room_windows(room, WINDOWS_PER_ROOM)],
            **{place: windows_of(place) for place in SETS}}
    for place, windows in sets.items():
        for name, predict in ways.items():
            yield f'{place} | {name}', {'windows': len(windows),
                                        **dataclasses.asdict(scores(windows, predict))}


def told(predictor: NetworkPredictor) -> Predict:
    """What a network says of images and their intrinsics."""
    return lambda frames: predictor.predict(
        [frame.image for frame in frames],
        K=frames[0].camera.K if frames[0].camera else None)[0]


def main() -> None:
    """Measure everything and write results/tiny.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--views', type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        table = {}
        for name, row in rows(arguments.views or Path(folder)):
            table[name] = row
            figures = ', '.join(f'{k} {v:.3g}' for k, v in row.items())
            print(f'{name}: {figures}', flush=True)
    print(write_result('tiny', table))


if __name__ == '__main__':
    main()
