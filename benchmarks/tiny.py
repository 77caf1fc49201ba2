"""The shipped `tiny` transformers on windows of 8 views: rooms never trained on, real images.

    python -m benchmarks.tiny [--views DIR]    # DIR: of `ffrecon-train views`; else rendered

No pose, depth or calibration is given. `nothing` says that no camera moves and that all depths
are equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch

from benchmarks.common import KITCHEN, load_frames, write_result
from feedforward_recon.geometry.transforms import inverse
from feedforward_recon.model.predictor import NetworkPredictor, load_predictor
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.training.transformer import held_out_scores
from feedforward_recon.training.transformer_data import HELD_OUT, load_views, render_views
from feedforward_recon.training.transformer_scores import (
    PairErrors,
    Scores,
    abs_rel,
    concatenated,
    pose_errors,
)
from feedforward_recon.types import Frame, Prediction

NAMES = ('tiny', 'tiny-ttt')
VIEWS, HELD_OUT_ROOMS = 8, 16
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
    predictors = {name: load_predictor(name) for name in NAMES}
    for _ in render_views(rooms_folder, HELD_OUT_ROOMS, HELD_OUT):
        pass
    rooms = load_views(rooms_folder, HELD_OUT)
    for name, predictor in predictors.items():
        mine, without = held_out_scores(cast(Vggt, predictor.network), rooms)
        yield f'rooms never trained on | {name}', dataclasses.asdict(mine)
    yield 'rooms never trained on | nothing', dataclasses.asdict(without)
    for place in SETS:
        windows = windows_of(place)
        ways: dict[str, Predict] = {name: _with(p) for name, p in predictors.items()}
        for name, predict in {**ways, 'nothing': still}.items():
            yield f'{place} | {name}', {'windows': len(windows),
                                        **dataclasses.asdict(scores(windows, predict))}


def _with(predictor: NetworkPredictor) -> Predict:
    return lambda frames: predictor.predict([frame.image for frame in frames])[0]


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
