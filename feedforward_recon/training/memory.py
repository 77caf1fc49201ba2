"""Training of the keys of the scene memory, so that one write is enough.

Inner loop: what a scene wrote is a sum over its samples, so reading it with a descriptor is a
mean of their points, weighted by how likely the key puts both into the same cell. Outer loss: how
likely what is read does not lie where the point is seen, by the reprojection error in images that
were not written, hard ones among them. The keys learn which differences of descriptors to ignore.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2

from feedforward_recon.errors import InputError
from feedforward_recon.memory.keys import CODES, HALVES, TABLES, Keys
from feedforward_recon.training.memory_scenes import MemoryScene, read_memory_scenes

log = logging.getLogger(__name__)
ROBUST_PX = 4.0  # errors beyond count as wrong, whatever they are
FEWEST = 1e-9  # of a probability, for its logarithm
SHARPNESS = 24.0  # of the first keys: distances of descriptors to log probabilities
ROUNDS = 8  # of k-means for the first keys
HOLD_OUT = 8  # every so many-th scene is validated on


@dataclass(frozen=True)
class MemoryTraining:
    """Settings of a training run; ``steps`` is the whole schedule, resumes included."""

    out: str
    photos: str = ''
    rooms: int = 40
    steps: int = 2000
    samples: int = 4096
    queries: int = 768
    learning_rate: float = 2.5e-2
    seed: int = 0
    save_every: int = 100


class MemoryTrainer:
    """One training run in the folder ``settings.out``."""

    def __init__(self, settings: MemoryTraining) -> None:
        self.settings, self.out = settings, Path(settings.out)
        scenes = list(read_memory_scenes(settings.rooms, settings.photos, self.out / 'scenes'))
        if len(scenes) < 2:
            raise InputError(f'expected at least 2 scenes, found {len(scenes)}; give more --rooms '
                             'or a folder of --photos')
        self.held_out, self.scenes = scenes[::HOLD_OUT], \
            [scene for i, scene in enumerate(scenes) if i % HOLD_OUT]
        keys = first_keys(np.concatenate([scene.descriptors[::7] for scene in self.scenes]),
                          settings.seed)
        self.weight = torch.nn.Parameter(keys.weight)
        self.bias = torch.nn.Parameter(keys.bias)
        self._optimiser = torch.optim.Adam([self.weight, self.bias], lr=settings.learning_rate)
        self.step = 0
        self._resume()

    def run(self) -> Iterator[int]:
        """Train until ``settings.steps``, yielding each step; may be interrupted and resumed."""
        while self.step < self.settings.steps:
            for group in self._optimiser.param_groups:
                group['lr'] = self._learning_rate()
            rng = np.random.default_rng([self.settings.seed, self.step])
            loss = self._loss(self.scenes[rng.integers(len(self.scenes))], rng)
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            self.step += 1
            if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                self._save(float(loss.detach()))
            yield self.step

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and share of queries that one hard read finds, over scenes never trained on."""
        rng = np.random.default_rng(1)
        losses = [float(self._loss(scene, rng)) for scene in self.held_out]
        keys = Keys(self.weight.detach(), self.bias.detach())
        shares = np.mean([_hit_share(keys, scene, rng, self.settings) for scene in self.held_out],
                         axis=0)
        return {'loss': float(np.mean(losses)), 'same cell': shares[0], 'others': shares[1]}

    def _loss(self, scene: MemoryScene, rng: np.random.Generator) -> torch.Tensor:
        batch = drawn(scene, rng, self.settings.samples, self.settings.queries)
        right = torch.from_numpy(batch.right)
        tables = torch.from_numpy(rng.choice(TABLES, 2, replace=False))
        with torch.autocast('cpu', torch.bfloat16):
            asked, written = (self._codes(x, tables) for x in (batch.asked, batch.written))
            # Probability that a query and a sample share a cell, table by table: [T, Q, S].
            same = (asked[:, 0] @ written[:, 0].mT) * (asked[:, 1] @ written[:, 1].mT)
        same = same.float()
        found = (same * right).sum(-1)
        return -(torch.log(found + FEWEST) - torch.log(same.sum(-1) + FEWEST)).mean()

    def _codes(self, descriptors: np.ndarray, tables: torch.Tensor) -> torch.Tensor:
        """Probabilities [T, HALVES, N, CODES] of the codes of descriptors [N, D]."""
        weight, bias = self.weight[tables], self.bias[tables]
        given = torch.from_numpy(descriptors.astype(np.float32))
        scores = torch.einsum('nd,thcd->thnc', given, weight) + bias[:, :, None]
        return torch.softmax(scores.float(), -1)

    def _learning_rate(self) -> float:
        done = self.step / self.settings.steps
        return self.settings.learning_rate * min(1.0, (self.step + 1) / 50) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def _save(self, loss: float) -> None:
        line = {'step': self.step, 'train': round(loss, 4),
                **{k: round(v, 5) for k, v in self.validate().items()}}
        log.info('%s', json.dumps(line))
        with open(self.out / 'log.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')
        state = {'weight': self.weight, 'bias': self.bias, 'step': self.step,
                 'optimiser': self._optimiser.state_dict(), 'settings': asdict(self.settings)}
        torch.save(state, self.out / 'state.tmp')
        (self.out / 'state.tmp').replace(self.out / 'state.pt')
        Keys(self.weight.detach(), self.bias.detach()).save(self.out / 'keys.safetensors')

    def _resume(self) -> None:
        file = self.out / 'state.pt'
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        self.weight.data.copy_(state['weight'])
        self.bias.data.copy_(state['bias'])
        self._optimiser.load_state_dict(state['optimiser'])
        self.step = state['step']
        log.info('resumed at step %d', self.step)


@dataclass(frozen=True)
class Batch:
    """asked [Q, D], written [S, D]; right float32 [Q, S]: the sample shows where the query is."""

    asked: np.ndarray
    written: np.ndarray
    right: np.ndarray


def drawn(scene: MemoryScene, rng: np.random.Generator, samples: int, queries: int) -> Batch:
    """Samples of some images of a scene, and queries from others of them.

    A sample is right by 1 / (1 + (e / ROBUST_PX)^2) for a reprojection error of e pixels (Geman
    and McClure) in the image of the query.
    """
    views = len(scene.T_cam_world)
    asked_views = rng.choice(views, max(1, views // 4), replace=False)
    of_asked = np.isin(scene.view, asked_views)
    written = _some(np.flatnonzero(~of_asked & ~scene.hard), samples, rng)
    asked = _some(np.flatnonzero(of_asked), queries, rng)
    right = np.zeros((len(asked), len(written)), np.float32)
    for view in np.unique(scene.view[asked]):
        rows = np.flatnonzero(scene.view[asked] == view)
        T = scene.T_cam_world[view]
        ours, theirs = (_normalised(T, scene.points[index]) for index in (asked[rows], written))
        off = scene.focal_px[view] * np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
        right[rows] = 1 / (1 + np.square(np.nan_to_num(off, nan=1e6) / ROBUST_PX))
    seen = right.max(1, initial=0) > 0.5  # the others cannot be found
    return Batch(scene.descriptors[asked[seen]], scene.descriptors[written], right[seen])


def _some(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(rows)[:count]


def _normalised(T_cam_world: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Image points [N, 2] at focal length 1 of world points [N, 3]; NaN behind the camera."""
    in_cam = points @ T_cam_world[:3, :3].T + T_cam_world[:3, 3]
    depth = np.where(in_cam[:, 2:] > 1e-6, in_cam[:, 2:], np.nan)
    return in_cam[:, :2] / depth


def first_keys(descriptors: np.ndarray, seed: int) -> Keys:
    """Keys from k-means in random projections of descriptors [N, D]: where training begins."""
    rng = np.random.default_rng(seed)
    given = torch.from_numpy(descriptors.astype(np.float32))
    dim = given.shape[1]
    weight, bias = torch.zeros(TABLES, HALVES, CODES, dim), torch.zeros(TABLES, HALVES, CODES)
    for table in range(TABLES):
        turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
        for half in range(HALVES):
            part = torch.from_numpy(turn[:, half * dim // HALVES:(half + 1) * dim // HALVES])
            points = (given @ part).numpy()[rng.permutation(len(given))[:100 * CODES]]
            centres = torch.from_numpy(kmeans2(points, points[:CODES], iter=ROUNDS,
                                               minit='matrix')[0])
            weight[table, half] = 2 * SHARPNESS * centres @ part.T
            bias[table, half] = -SHARPNESS * centres.square().sum(1)
    return Keys(weight, bias)


def _hit_share(keys: Keys, scene: MemoryScene, rng: np.random.Generator,
               settings: MemoryTraining) -> tuple[float, float]:
    """Shares of tables in which a query meets its point, and of other samples in its cell."""
    batch = drawn(scene, rng, settings.samples, settings.queries)
    asked, written = (keys.places(x, 1, CODES * CODES)[..., 0]
                      for x in (batch.asked, batch.written))
    met = asked[:, None] == written[None]  # [Q, S, TABLES]
    right = batch.right > 0.5
    return float((met & right[..., None]).any(1).mean()), \
        float((met & ~right[..., None]).sum(1).mean())
