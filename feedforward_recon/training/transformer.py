"""Training of the transformer `tiny`: resumable, seeded, on one CPU core.

Everything random in a step follows from the seed and the number of the step, so an interrupted
run that goes on ends with the weights of one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.ttt import ShortConv
from feedforward_recon.model.configs import build, load
from feedforward_recon.model.dpt import direction_embedding
from feedforward_recon.model.heads import PASSES
from feedforward_recon.model.layers import Block, GlobalBlock, LayerScale
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.training.guidance import GuideInputs
from feedforward_recon.training.muon import Muon
from feedforward_recon.training.transformer_data import (
    HEIGHTS,
    HELD_OUT,
    TRAIN,
    RoomViews,
    Windows,
    augment_batch,
    draw_windows,
    load_views,
    mirrored,
)
from feedforward_recon.training.transformer_losses import (
    TrainingHeads,
    attention_logits,
    camera_loss,
    camera_target,
    confident_loss,
    feature_logits,
    first_view_loss,
    match_loss,
    matching_patches,
    patch_loss,
)
from feedforward_recon.training.transformer_scores import Scores, baseline, concatenated, errors

log = logging.getLogger(__name__)
VIEWS_PER_WINDOW = (2, 4, 4, 8)  # drawn evenly
CAMERA_WEIGHT, PATCH_WEIGHT, MATCH_WEIGHT = 5.0, 1.0, 0.2
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.05, 1.0
FIRST_LAYER_SCALE, TOKEN_DEVIATION = 0.2, 0.5
HELD_OUT_SEED, HELD_OUT_BATCHES, HELD_OUT_WINDOWS, HELD_OUT_VIEWS = 1, 4, 8, 8
DENSE_WINDOWS = 4
# Global block and head -> what its attention is told: which patches match in all pairs of
# views, or where patches are in the first view.
MATCHING_HEADS, FIRST_VIEW_HEADS = ((1, 0), (1, 1)), ((1, 2), (1, 3), (2, 0), (2, 1))
GUIDED_BLOCKS = (1, 2)
LOG_EVERY = 25
MEAN_ENCODING = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.8, 1.0)


@dataclass(frozen=True)
class TransformerTraining:
    """Settings of a training run; ``steps`` is the whole schedule, resumes included.

    views: folder of `render_views`. out: folder of the run. start: weights to begin with; what
    they lack starts fresh. teacher: weights of the same network with softmax attention, whose
    tokens are imitated.
    """

    views: str
    out: str
    model: str = 'tiny'
    start: str = ''
    teacher: str = ''
    steps: int = 4000
    views_per_step: int = 32
    learning_rate: float = 1e-3
    warm_up: int = 200
    seed: int = 0
    save_every: int = 100
    validate_every: int = 250


class TransformerTrainer:
    """One training run in the folder ``settings.out``."""

    def __init__(self, settings: TransformerTraining) -> None:
        self.settings = settings
        self.out = Path(settings.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rooms = load_views(Path(settings.views), TRAIN)
        self.held_out = load_views(Path(settings.views), HELD_OUT)
        torch.manual_seed(settings.seed)
        network = build(settings.model)
        if not isinstance(network, Vggt):
            raise ConfigError('expected a network of the kind of VGGT, found '
                              f'{settings.model!r}; choose tiny')
        self.network = network
        self.teacher = cast(Vggt, load(settings.model, settings.teacher, attention='softmax')) \
            if settings.teacher else None
        self.heads = TrainingHeads(network.config.backbone.vit.dim)
        start_well(network)
        if settings.start:
            take_over(network, Path(settings.start))
        self.optimisers = self._optimisers()
        self.step, self.best = 0, -math.inf
        self._guide = GuideInputs(network, GUIDED_BLOCKS)
        self._resume()

    def run(self) -> Iterator[int]:
        """Train until ``settings.steps``, yielding every step; stop and start it at any time."""
        while self.step < self.settings.steps:
            report = self._step()
            self.step += 1
            if self.step % LOG_EVERY == 0:
                self._log(report)
            last = self.step == self.settings.steps
            if last or self.step % self.settings.validate_every == 0:
                self._validate()
            if last or self.step % self.settings.save_every == 0:
                self._save()
            yield self.step

    def loss(self, windows: Windows, images: torch.Tensor, dense_view: torch.Tensor,
             ) -> dict[str, torch.Tensor]:
        """The parts of the loss, each with its weight.

        images: those of the windows, perhaps with other exposure. dense_view: the view [B] of
        each window on which the costly dense heads are trained.
        """
        with torch.autocast('cpu', torch.bfloat16):
            memory = self.network.empty_memory(len(images))
            tokens, states = self.network.aggregator(images, memory.states, write=True,
                                                     has_first=True)
            match = self._match_loss(states, windows)
            unlike = self._teacher_loss(tokens.levels, images)
            patches = [level.unflatten(0, images.shape[:2]) for level in tokens.patches]
            points, depth = self.heads.points_and_depth(patches[-1], tokens.grid_hw)
            rows = torch.arange(min(len(images), DENSE_WINDOWS))
            shown = [level[rows, dense_view[rows]] for level in patches]
            dense_depth = self.network.depth_head(shown, tokens.grid_hw).float()
        encodings = self.network.camera_head(tokens.camera.float())
        depth_error = (dense_depth[..., 0].exp() - windows.depth[rows, dense_view[rows]]).abs()
        return {
            'camera': CAMERA_WEIGHT * camera_loss(encodings, camera_target(windows)),
            'depth': confident_loss(depth_error, 1 + dense_depth[..., 1].exp()),
            'patches': PATCH_WEIGHT * patch_loss(points, depth, windows),
            'match': MATCH_WEIGHT * match, 'teacher': unlike}

    def _teacher_loss(self, levels: tuple[torch.Tensor, ...], images: torch.Tensor,
                      ) -> torch.Tensor:
        """Share of the variance of the teacher's tokens that is missed, mean over the levels."""
        if self.teacher is None:
            return torch.zeros(())
        with torch.no_grad():
            memory = self.teacher.empty_memory(len(images))
            wanted, _ = self.teacher.aggregator(images, memory.states, write=True,
                                                has_first=True)
        missed = [(mine.float() - theirs.float()).square().mean() / theirs.float().var()
                  for mine, theirs in zip(levels, wanted.levels, strict=True)]
        return torch.stack(missed).mean()

    def _match_loss(self, states: tuple[Any, ...], windows: Windows) -> torch.Tensor:
        """Encoded patches, and queries and keys of some heads, are alike where they match."""
        target, visible = matching_patches(windows)
        shape, patches = windows.images.shape[:2], target.shape[-1]
        features = self.heads.match(self._guide.encoded.unflatten(0, shape))
        loss = match_loss(feature_logits(features), target, visible)
        compared = {block: self._guide.queries_keys(block, states[block], shape[1])
                    for block in GUIDED_BLOCKS}
        for block, head in MATCHING_HEADS:
            logits = attention_logits(*(x[:, head, :, -patches:] for x in compared[block]))
            loss = loss + match_loss(logits, target, visible)
        for block, head in FIRST_VIEW_HEADS:
            q, k = (x[:, head] for x in compared[block])
            loss = loss + first_view_loss(q, k, target, visible)
        return loss

    def _step(self) -> dict[str, float]:
        rng = np.random.default_rng([self.settings.seed, self.step])
        views = int(rng.choice(VIEWS_PER_WINDOW))
        count = max(1, self.settings.views_per_step // views)
        windows = draw_windows(self.rooms, rng, count, views, int(rng.choice(HEIGHTS)))
        if rng.random() < 0.5:
            windows = mirrored(windows)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        dense_view = torch.from_numpy(rng.integers(views, size=count))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group['lr'] = self._learning_rate()
        self.network.train()
        # Plain matrix products are faster than the fused attention at this size.
        with sdpa_kernel(SDPBackend.MATH):
            parts = self.loss(windows, augment_batch(windows.images, generator), dense_view)
            total = torch.stack(list(parts.values())).sum()
        for parameter in self._parameters():
            parameter.grad = None
        total.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters(), CLIP)
        if torch.isfinite(norm):
            for optimiser in self.optimisers:
                optimiser.step()
        else:
            log.warning('step %d: gradient is not finite, no step taken', self.step)
        return {'views': views, **{name: float(part.detach()) for name, part in parts.items()}}

    def _learning_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / max(1, self.settings.warm_up))
        done = min(1.0, self.step / self.settings.steps)
        return self.settings.learning_rate * warm * (0.01 + 0.99 * 0.5
                                                     * (1 + math.cos(math.pi * done)))

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.network.parameters(), *self.heads.parameters()]

    def _optimisers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for all else."""
        inner = [module.weight for block in self.network.modules() if isinstance(block, Block)
                 for module in block.modules() if isinstance(module, nn.Linear)]
        chosen = {id(p) for p in inner}
        others = [p for p in self._parameters() if id(p) not in chosen]
        return (Muon(inner, weight_decay=WEIGHT_DECAY),
                torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0))

    def _validate(self) -> None:
        scores, without = held_out_scores(self.network, self.held_out)
        self._log({'held_out': asdict(scores), 'baseline': asdict(without)})
        if scores.auc30 > self.best:
            self.best = scores.auc30
            self._export()

    def _export(self) -> None:
        """The weights in half precision: they are read as float32 again."""
        tensors = {name: tensor.half().contiguous()
                   for name, tensor in self.network.state_dict().items()}
        file = self.out / f'{self.settings.model}.safetensors'
        save_file(tensors, file.with_suffix('.tmp'))
        file.with_suffix('.tmp').replace(file)

    def _log(self, report: dict) -> None:
        line = {'step': self.step, **{k: round(v, 4) if isinstance(v, float) else v
                                      for k, v in report.items()}}
        log.info('%s', json.dumps(line))
        with open(self.out / 'log.jsonl', 'a') as file:
            file.write(json.dumps(line) + '\n')

    def _save(self) -> None:
        state = {'network': self.network.state_dict(), 'heads': self.heads.state_dict(),
                 'optimisers': [o.state_dict() for o in self.optimisers],
                 'step': self.step, 'best': self.best, 'settings': asdict(self.settings)}
        torch.save(state, self.out / 'state.tmp')
        (self.out / 'state.tmp').replace(self.out / 'state.pt')

    def _resume(self) -> None:
        file = self.out / 'state.pt'
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        self.network.load_state_dict(state['network'])
        self.heads.load_state_dict(state['heads'])
        for optimiser, saved in zip(self.optimisers, state['optimisers'], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.best = state['step'], state['best']
        log.info('resumed at step %d', self.step)


@torch.no_grad()
def start_well(network: Vggt) -> None:
    """Initial values for a short training from nothing; the architecture stays as it is.

    The published ones suit an encoder that has been trained before. Here patches know from the
    start where they are, blocks contribute at once, and global queries equal keys, so that
    tokens look for their like.
    """
    aggregator = network.aggregator
    side = network.config.backbone.vit.grid
    table = direction_embedding((side, side), 1.0, network.config.backbone.vit.dim)
    aggregator.patch_embed.pos_embed[0, 1:] = TOKEN_DEVIATION * table.flatten(1).T
    for token in (aggregator.camera_token, aggregator.register_token,
                  aggregator.patch_embed.register_tokens):
        token.normal_(std=TOKEN_DEVIATION)
    for module in network.modules():
        if isinstance(module, LayerScale) and module.gamma[0] < FIRST_LAYER_SCALE:
            module.gamma.fill_(FIRST_LAYER_SCALE)
        if isinstance(module, ShortConv):
            nn.init.dirac_(module.conv.weight, groups=module.conv.groups)
    # A quarter per pass: no field of view starts at the dead side of its ReLU.
    network.camera_head.pose_branch.fc2.bias.copy_(torch.tensor(MEAN_ENCODING) / PASSES)
    for block in aggregator.global_blocks:
        queries, keys, _ = cast(GlobalBlock, block).attn.qkv.weight.chunk(3)
        keys.copy_(queries)


@torch.no_grad()
def take_over(network: nn.Module, file: Path) -> None:
    """Copy what a file and a network share; says in the log what they do not."""
    stored, wanted = load_file(file), network.state_dict()
    shared = [name for name in wanted if name in stored
              and stored[name].shape == wanted[name].shape]
    for name in shared:
        wanted[name].copy_(stored[name])
    log.info('began with %d tensors of %s; %d are new, %d left out', len(shared), file,
             len(wanted) - len(shared), len(stored) - len(shared))


@torch.inference_mode()
def held_out_scores(network: Vggt, rooms: list[RoomViews],
                    batches: int = HELD_OUT_BATCHES) -> tuple[Scores, Scores]:
    """Figures of a network on fixed windows of rooms, and those of the baseline."""
    network.eval()
    rng = np.random.default_rng(HELD_OUT_SEED)
    found, without = [], []
    for _ in range(batches):
        windows = draw_windows(rooms, rng, HELD_OUT_WINDOWS, HELD_OUT_VIEWS, HEIGHTS[0])
        said, _ = network(windows.images)
        found.append(errors(said.T_cam_world, said.depth, windows))
        without.append(baseline(windows))
    return concatenated(found).scores(), concatenated(without).scores()
