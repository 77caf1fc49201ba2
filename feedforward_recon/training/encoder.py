"""Training of the compact encoder: resumable, seeded, with a log that can be plotted."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from feedforward_recon.errors import InputError
from feedforward_recon.model.compact import (
    CompactNetwork,
    CompactShape,
    load_compact,
    save_compact,
)
from feedforward_recon.training.data import MISSED, SAME, PairSources, PairStream
from feedforward_recon.training.losses import confidence_loss, imitation_loss, matching_loss
from feedforward_recon.training.posed import read_labelled
from feedforward_recon.training.teacher import load_teacher, teacher_descriptors

log = logging.getLogger(__name__)
WORD_BATCHES = 40
CONFIDENCE_SHARE, TEACHER_SHARE = 0.3, 0.5  # of the loss beside that of matching
GROUP = 2  # pairs that are negatives of each other: all of a batch cost as much as a convolution
TEACHER_TEMPERATURE = 0.03  # sharper than ours: its descriptors of other points are more alike


@dataclass(frozen=True)
class EncoderTraining:
    """Settings of a training run; ``steps`` is the whole schedule, resumes included."""

    photos: str
    out: str
    rooms: str = ''
    scenes: str = ''
    held_out: str = ''
    room_share: float = 0.5
    scene_share: float = 0.35
    start: str = ''
    frozen_levels: int = 0
    teacher: bool = False
    steps: int = 6000
    pairs_per_step: int = 8
    learning_rate: float = 2e-3
    temperature: float = 0.05
    safe_radius_px: float = 3.0
    seed: int = 0
    save_every: int = 250
    workers: int = 1


class EncoderTrainer:
    """One training run in the folder ``settings.out``."""

    def __init__(self, settings: EncoderTraining) -> None:
        self.settings = settings
        self.out = Path(settings.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(settings.seed)
        self.network = load_compact(Path(settings.start)) if settings.start \
            else CompactNetwork(CompactShape())
        self.teacher = load_teacher() if settings.teacher else None
        for module in self._frozen():
            module.requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            [p for p in self.network.parameters() if p.requires_grad], lr=settings.learning_rate,
            weight_decay=1e-3)
        self.step = 0
        self._resume()

    def run(self) -> None:
        """Train until ``settings.steps``; may be interrupted and started again at any time."""
        stream = PairStream(self._sources(), self.settings.seed + self.step)
        loader = iter(DataLoader(stream, self.settings.pairs_per_step,
                                 num_workers=self.settings.workers))
        self.network.train()
        for module in self._frozen():
            module.eval()
        while self.step < self.settings.steps:
            report = self._step(*next(loader))
            self.step += 1
            if self.step % 50 == 0:
                self._log(report)
            if self.step % self.settings.save_every == 0:
                self._save()
        self._fit_words(loader)
        self._save()

    def _frozen(self) -> list[torch.nn.Module]:
        """The finest levels, which cost most and change least, if they are to stay."""
        count = self.settings.frozen_levels
        return [self.network.stem, *self.network.levels[:count]] if count else []

    def _sources(self) -> PairSources:
        settings = self.settings
        photos = sorted(Path(settings.photos).glob('*.jpg'))
        if not photos:
            raise InputError(f'expected *.jpg photos in {settings.photos}, found none; give '
                             'another folder')
        rooms = sorted(Path(settings.rooms).glob('*.npz')) if settings.rooms else []
        scenes = read_labelled(Path(settings.scenes), self.out, settings.held_out.split(',')) \
            if settings.scenes else []
        return PairSources(photos, rooms, scenes, settings.room_share, settings.scene_share)

    def _step(self, images: torch.Tensor, clean: torch.Tensor, pixels: torch.Tensor,
              state: torch.Tensor) -> dict[str, float]:
        """One optimisation step on images [B, 2, 3, H, W], pixels [B, 2, N, 2], state [B, N]."""
        pairs = len(images)
        for group in self.optimiser.param_groups:
            group['lr'] = self._learning_rate()
        flat = _flat(images)
        with torch.autocast('cpu', torch.bfloat16):
            maps = self.network.pyramid(flat)
        places = _flat(pixels)
        descriptors, logits = self.network.describe([m.float() for m in maps], places)
        match, mutual = self._matching(descriptors, pixels, state)
        loss = match + CONFIDENCE_SHARE * confidence_loss(
            logits[:pairs], logits[pairs:], mutual, state == SAME, state == MISSED)
        if self.teacher is not None:
            told = teacher_descriptors(self.teacher, _flat(clean), places)
            loss = loss + TEACHER_SHARE * imitation_loss(
                descriptors[:pairs], descriptors[pairs:], told[:pairs], told[pairs:],
                self.settings.temperature, TEACHER_TEMPERATURE)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 2.0)
        self.optimiser.step()
        return {'loss': float(match.detach()), 'total': float(loss.detach()),
                'mutual': float(mutual.sum() / (state == SAME).sum())}

    def _matching(self, descriptors: torch.Tensor, pixels: torch.Tensor,
                  state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Matching loss of descriptors [2 B, N, D] in groups of pairs; mutual best [B, N]."""
        settings, pairs = self.settings, len(pixels)
        found = [matching_loss(
            descriptors[:pairs][some], descriptors[pairs:][some], pixels[some, 0],
            pixels[some, 1], settings.temperature, settings.safe_radius_px, state[some] == SAME)
            for some in (slice(i, i + GROUP) for i in range(0, pairs, GROUP))]
        return torch.stack([loss for loss, _ in found]).mean(), torch.cat([m for _, m in found])

    @torch.inference_mode()
    def _fit_words(self, loader: Iterator[list[torch.Tensor]]) -> None:
        """Set the visual words from descriptors of a few more batches."""
        self.network.eval()
        descriptors = []
        for images, _, pixels, _ in itertools.islice(loader, WORD_BATCHES):
            found, logits = self.network(images[:, 0], pixels[:, 0])
            descriptors.append(found[logits > 0].numpy())
        fit_words(self.network, np.concatenate(descriptors), self.settings.seed)

    def _learning_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / 100)
        done = min(1.0, self.step / self.settings.steps)
        return self.settings.learning_rate * warm * (0.01 + 0.99 * 0.5
                                                     * (1 + math.cos(math.pi * done)))

    def _log(self, report: dict[str, float]) -> None:
        line = {'step': self.step, **{k: round(v, 4) for k, v in report.items()}}
        log.info('%s', json.dumps(line))
        with open(self.out / 'log.jsonl', 'a') as file:
            file.write(json.dumps(line) + '\n')

    def _save(self) -> None:
        state = {'network': self.network.state_dict(), 'step': self.step,
                 'optimiser': self.optimiser.state_dict(), 'settings': asdict(self.settings)}
        torch.save(state, self.out / 'state.tmp')
        (self.out / 'state.tmp').replace(self.out / 'state.pt')
        save_compact(self.network, self.out / 'compact.safetensors')

    def _resume(self) -> None:
        file = self.out / 'state.pt'
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        self.network.load_state_dict(state['network'])
        self.optimiser.load_state_dict(state['optimiser'])
        self.step = state['step']
        log.info('resumed at step %d', self.step)


def _flat(pairs: torch.Tensor) -> torch.Tensor:
    """All first, then all second members of pairs [B, 2, ...]: [2 B, ...], channels last."""
    flat = pairs.transpose(0, 1).flatten(0, 1)
    return flat.contiguous(memory_format=torch.channels_last) if flat.ndim == 4 else flat


@torch.inference_mode()
def fit_words(network: CompactNetwork, descriptors: np.ndarray, seed: int,
              rounds: int = 25) -> None:
    """Set the visual words of the global descriptor by k-means on descriptors [N, D]."""
    points = torch.from_numpy(descriptors)
    count = len(network.words)
    chosen = np.random.default_rng(seed).choice(len(points), count, replace=len(points) < count)
    words = points[chosen].clone()
    for _ in range(rounds):
        nearest = (points @ words.T).argmax(1)
        for i in range(len(words)):
            members = points[nearest == i]
            if len(members):
                words[i] = torch.nn.functional.normalize(members.mean(0), dim=0)
    network.words.copy_(words)
