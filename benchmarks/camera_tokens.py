"""Which camera tokens a network's memory should keep, and how many.

A walk is written into one memory; views between the written ones are queries. The tokens of a
query do not depend on the stored camera tokens, only the camera head reads them, so every rule
and every budget answers from the same pass. Reported are the difference to the answer with all
tokens and the error to the true poses, both after one similarity fitted to the written views.

    python -m benchmarks.camera_tokens --weights FILE [--attention ttt] [--written 96]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.common import KITCHEN, load_frames, write_result
from feedforward_recon.geometry.camera import Camera
from feedforward_recon.geometry.transforms import pose_error
from feedforward_recon.localization.network_link import align_cameras
from feedforward_recon.model.network_state import NetworkState
from feedforward_recon.model.pose_encoding import decode_cameras, rigid_inverse
from feedforward_recon.model.predictor import load_predictor, orthonormal, preparation
from feedforward_recon.model.preprocess import stacked
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.synthetic import Room, render_walk
from feedforward_recon.types import Frame

BUDGETS = (4, 8, 16, 32, 64)
QUERIES = 24
ROOMS = (3, 5, 7)
Rule = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def evenly(stored: torch.Tensor, query: torch.Tensor, count: int) -> torch.Tensor:
    """Every so many views of the walk."""
    return stored[torch.linspace(0, len(stored) - 1, count).round().long()]


def farthest(stored: torch.Tensor, query: torch.Tensor, count: int) -> torch.Tensor:
    """Each in turn the one that differs most from those before it."""
    return NetworkState((), stored[None]).with_few_camera_tokens(count).camera_tokens[0]


def typical(stored: torch.Tensor, query: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy medoids: each in turn the one that brings all views nearest to a kept one."""
    apart = torch.cdist(stored, stored)
    chosen, nearest = [0], apart[0]
    while len(chosen) < count:
        costs = torch.minimum(apart, nearest).sum(1)
        costs[chosen] = torch.inf
        chosen.append(int(costs.argmin()))
        nearest = torch.minimum(nearest, apart[chosen[-1]])
    return stored[sorted(chosen)]


def nearest(stored: torch.Tensor, query: torch.Tensor, count: int) -> torch.Tensor:
    """The first view, and those most like the query: needs all tokens to be stored."""
    likeness = torch.cosine_similarity(stored, query, dim=-1)
    likeness[0] = torch.inf
    return stored[likeness.topk(count).indices.sort().values]


RULES: dict[str, Rule] = {'evenly': evenly, 'farthest': farthest, 'typical': typical,
                          'nearest to the query': nearest}


class Walk:
    """One walk as a network sees it: tokens and poses of written views and of queries."""

    @torch.inference_mode()
    def __init__(self, network: Vggt, frames: list[Frame], written: int) -> None:
        index = np.unique(np.linspace(0, len(frames) - 1, written).round().astype(int))
        rest = np.setdiff1d(np.arange(len(frames)), index)
        asked = rest[np.unique(np.linspace(0, len(rest) - 1, QUERIES).round().astype(int))]
        self.network, self.true = network, np.stack([_pose(frames[i]) for i in asked])
        prepare = preparation(network)
        images = [stacked(prepare([frames[i].image for i in part])) for part in (index, asked)]
        memory = network.empty_memory()
        tokens, states = network.aggregator(images[0], memory.states, write=True, has_first=True)
        self.stored = tokens.camera[0]
        self.queries = torch.cat([network.aggregator(image[None, None], states, write=False,
                                                     has_first=False)[0].camera[0]
                                  for image in images[1][0]])
        self.fit = _fit(self._poses(self.stored), np.stack([_pose(frames[i]) for i in index]))

    @torch.inference_mode()
    def answers(self, rule: Rule | None = None, count: int = 0) -> np.ndarray:
        """Poses [Q, 4, 4] of the queries in the true world; without a rule, with all tokens."""
        found = []
        for query in self.queries:
            kept = self.stored
            if rule is not None:
                kept = rule(kept, query, count)
            found.append(self._poses(torch.cat((kept, query[None])))[-1])
        T, scale = self.fit
        poses = np.stack(found)
        poses[:, :3, 3] *= scale
        return T @ poses

    def _poses(self, tokens: torch.Tensor) -> np.ndarray:
        encodings = self.network.camera_head(tokens[None])[-1]
        return orthonormal(rigid_inverse(decode_cameras(encodings, (224, 224))[0])[0].numpy())


def _fit(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, float]:
    """The similarity to the true cameras; the scale makes their spreads equal, however bad."""
    spread = [np.linalg.norm(T[:, :3, 3] - T[:, :3, 3].mean(0)) for T in (true, found)]
    return align_cameras(found, true, float(spread[0] / spread[1]))


def _pose(frame: Frame) -> np.ndarray:
    assert frame.T_map_cam is not None
    return frame.T_map_cam


def scenes() -> Iterator[tuple[str, list[Frame]]]:
    """Walks with true poses: synthetic rooms, once around and a part of it, and one kitchen."""
    camera = Camera.from_fov(68.0, (112, 84))
    for seed in ROOMS:
        room = Room.generate(seed)
        poses = room.walk(360, seed)
        yield f'room {seed}, 4 s', list(render_walk(room, camera, poses[:60]))
        yield f'room {seed}, 24 s', list(render_walk(room, camera, poses[::3]))
    frames = load_frames(KITCHEN, use_depth=False)
    yield f'{KITCHEN}, 100 images', frames[:100]
    yield KITCHEN, frames


def measured(walk: Walk) -> Iterator[tuple[str, dict[str, Any]]]:
    """One row per rule and budget, and one with all tokens."""
    full = walk.answers()
    yield 'all', _row(walk, full, full, len(walk.stored))
    for name, rule in RULES.items():
        for count in BUDGETS:
            if count < len(walk.stored):
                yield f'{name} {count}', _row(walk, walk.answers(rule, count), full, count)


def _row(walk: Walk, answers: np.ndarray, full: np.ndarray, count: int) -> dict[str, Any]:
    change, error = pose_error(answers, full), pose_error(answers, walk.true)
    return {'tokens': count, 'change_m': float(np.median(change[0])),
            'change_deg': float(np.median(change[1])), 'error_m': float(np.median(error[0])),
            'error_deg': float(np.median(error[1])),
            'extent_m': float(np.sqrt(np.mean(np.var(walk.true[:, :3, 3], 0)) * 3))}


def main() -> None:
    """Measure every scene and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--model', default='tiny-ttt')
    parser.add_argument('--attention', default=None)
    parser.add_argument('--weights', default=None)
    parser.add_argument('--written', type=int, nargs='+', default=[96])
    arguments = parser.parse_args()
    predictor = load_predictor(arguments.model, arguments.attention, weights=arguments.weights)
    assert isinstance(predictor.network, Vggt), 'a network with camera tokens'
    rows = {}
    for scene, frames in scenes():
        for written in arguments.written:
            walk = Walk(predictor.network, frames, min(written, 2 * len(frames) // 3))
            for case, row in measured(walk):
                rows[f'{scene} | {written} written | {case}'] = row
                print(scene, written, case, *(f'{k} {v:.3f}' for k, v in row.items()), flush=True)
    write_result('camera_tokens', rows)


if __name__ == '__main__':
    main()
