"""Training of the transformer `tiny` on posed photos and rooms: seeded, resumable, on any device.

Everything random in a step follows from the seed, the number of the step and the process, so an
interrupted run that goes on ends with the weights of one that was never interrupted. Under
torchrun every process draws windows of its own, and gradients are averaged.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from feedforward_recon.errors import CheckpointError, ConfigError
from feedforward_recon.model.configs import build, device_of
from feedforward_recon.model.distributed import own_device
from feedforward_recon.model.layers import Block
from feedforward_recon.model.ray_stem import RayStem
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.synthetic.appearance import Appearance
from feedforward_recon.training.guidance import AttentionInputs
from feedforward_recon.training.moving_average import MovingAverage
from feedforward_recon.training.muon import Muon
from feedforward_recon.training.processes import Processes
from feedforward_recon.training.run_folder import RunFolder
from feedforward_recon.training.scenes import open_scenes
from feedforward_recon.training.stepping import drawn_ahead, follow_gradient, set_rate
from feedforward_recon.training.transformer_losses import guide_loss, task_losses
from feedforward_recon.training.windows import Windows

log = logging.getLogger(__name__)
BETAS, WEIGHT_DECAY = (0.9, 0.98), 0.02
# Heads of global blocks that are told what patches show: in all views, in the first view.
GUIDED = {'all_views': (0, 1), 'first_view': (2, 3)}
GUIDED_BLOCKS = (1, 2)
LOG_EVERY = 25
STATISTICS_BATCHES = 4


@dataclass(frozen=True)
class TransformerTraining:
    """Settings of a training run; ``steps`` is the whole schedule, resumes included.

    photos: folder of scenes, see ``scene_folders``. rooms: folder of ``ffrecon-train views``.
    held_out: names of scenes that are only looked at. start: weights to begin with; what they lack
    starts fresh. accumulate: batches of ``views_per_step`` images in one step.
    """

    photos: str
    out: str
    rooms: str = ''
    held_out: str = ''
    model: str = 'tiny'
    start: str = ''
    device: str = 'cpu'
    photo_share: float = 0.6
    steps: int = 6000
    views_per_step: int = 32
    accumulate: int = 1
    learning_rate: float = 1.5e-3
    warm_up: int = 100
    seed: int = 0
    save_every: int = 100
    validate_every: int = 500


class TransformerTrainer:
    """One training run in the folder ``settings.out``."""

    def __init__(self, settings: TransformerTraining) -> None:
        self.settings, self.device = settings, own_device(device_of(settings.device))
        self.processes = Processes(self.device)
        self.folder = RunFolder(settings.out)
        self.stream, self.validation = open_scenes(
            settings.photos, settings.rooms, settings.held_out, settings.photo_share,
            settings.seed)
        torch.manual_seed(settings.seed)
        network = build(settings.model)
        if not isinstance(network, RayTransformer):
            raise ConfigError('expected a network of the kind of tiny, found '
                              f'{settings.model!r}; choose tiny')
        self.network = network.to(self.device)
        self._guide = AttentionInputs(network.global_blocks, GUIDED_BLOCKS)
        self.optimisers = self._optimisers()
        self.average = MovingAverage(network)
        self.step, self.best = 0, -math.inf
        self._begin()

    def run(self) -> Iterator[int]:
        """Train until ``settings.steps``, yielding every step; stop and start it at any time."""
        for batches in drawn_ahead(self._batches, self.step, self.settings.steps):
            report = self.learn(batches)
            self.step += 1
            self._after(report)
            yield self.step

    def losses(self, windows: Windows, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The parts of the loss, each with its weight."""
        with torch.autocast(self.device.type, torch.bfloat16):
            cells, _ = self.network(windows.images, windows.K)
            compared = {block: self._guide.queries_keys(block, windows.images.shape[1])
                        for block in GUIDED_BLOCKS}
        parts = task_losses(self.network, cells, windows, generator)
        if windows.seen.any():
            parts['guide'] = guide_loss(compared, windows, **GUIDED)
        return parts

    def learn(self, batches: list[Windows]) -> dict[str, float]:
        """One step along the mean gradient of batches; parts of the loss, and its seconds."""
        started = time.perf_counter()
        settings = self.settings
        set_rate(self.optimisers, settings.learning_rate, self.step, settings.steps,
                 settings.warm_up)
        report = self._gradient(batches)
        norm = follow_gradient(self._parameters(), self.optimisers, self.processes, self.step)
        if math.isfinite(norm):
            self.average.update(self.network, self.step)
        return {**report, 'seconds': time.perf_counter() - started}

    def _batches(self, step: int) -> list[Windows]:
        rank = self.processes.rank
        return [self.stream.batch((step, part, rank), self.settings.views_per_step)
                for part in range(self.settings.accumulate)]

    def _gradient(self, batches: list[Windows]) -> dict[str, float]:
        """Leave the mean gradient of the batches in the parameters; mean parts of the loss."""
        self.network.train()
        for parameter in self._parameters():
            parameter.grad = None
        report: dict[str, float] = {'views': batches[0].images.shape[1]}
        for part, windows in enumerate(batches):
            generator = torch.Generator().manual_seed(
                hash((self.settings.seed, self.step, part, self.processes.rank)) % 2**62)
            windows = photographed(windows, generator)
            parts = self.losses(windows.to(self.device), generator)
            (torch.stack(list(parts.values())).sum() / len(batches)).backward()
            for name, value in parts.items():
                report[name] = report.get(name, 0.0) + float(value.detach()) / len(batches)
        return report

    def _after(self, report: dict[str, float]) -> None:
        """Log, look at what is held out, save; by the first process alone."""
        last = self.step == self.settings.steps
        if self.processes.rank:
            return
        if last or self.step % LOG_EVERY == 0:
            self.folder.note(self.step, report)
        if last or self.step % self.settings.validate_every == 0:
            self._validate()
        if last or self.step % self.settings.save_every == 0:
            self._save()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def _optimisers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for all else."""
        inner = [module.weight for block in self.network.modules() if isinstance(block, Block)
                 for module in block.modules() if isinstance(module, nn.Linear)]
        chosen = {id(p) for p in inner}
        others = [p for p in self._parameters() if id(p) not in chosen]
        return (Muon(inner, weight_decay=WEIGHT_DECAY),
                torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0))

    def _validate(self) -> None:
        with self.average.applied(self.network):
            self.network.eval()
            rows = self.validation.scores(self.network, self.device)
            self.folder.note(self.step, {'held_out': rows})
            score = self.validation.mean_auc(rows)
            if score >= self.best:  # where nothing is held out, the latest are the best
                self.best = score
                self.folder.export(self.network, self.settings.model)

    def _save(self) -> None:
        self.folder.save({'network': self.network.state_dict(),
                          'average': self.average.state_dict(),
                          'optimisers': [o.state_dict() for o in self.optimisers],
                          'step': self.step, 'best': self.best,
                          'settings': asdict(self.settings)})

    def _begin(self) -> None:
        """Go on where the run was left, or from given weights, or from nothing."""
        state = self.folder.saved(self.device, asdict(self.settings))
        if state is not None:
            self.network.load_state_dict(state['network'])
            self.average.load_state_dict(state['average'])
            for optimiser, saved in zip(self.optimisers, state['optimisers'], strict=True):
                optimiser.load_state_dict(saved)
            self.step, self.best = state['step'], state['best']
            log.info('resumed at step %d', self.step)
            return
        if self.settings.start:
            take_over(self.network, Path(self.settings.start))
        else:
            self._start_fresh()
        self.average = MovingAverage(self.network)

    @torch.no_grad()
    def _start_fresh(self) -> None:
        """The stem of the shipped compact encoder, and what its columns are like."""
        self.network.stem.load_state_dict(RayStem.shipped().state_dict())
        columns = []
        for number in range(STATISTICS_BATCHES):
            images = self.stream.batch((number, 0, 2**16), self.settings.views_per_step).images
            columns.append(self.network.stem(images.flatten(0, 1).to(self.device)
                                             ).columns.flatten(0, 2))
        everything = torch.cat(columns)
        self.network.tokens.column_mean.copy_(everything.mean(0))
        self.network.tokens.column_deviation.copy_(everything.std(0) + 1e-3)


def photographed(windows: Windows, generator: torch.Generator) -> Windows:
    """The windows as cameras with other settings would have taken them."""
    shape = windows.images.shape
    taken = Appearance.drawn(shape[0], shape[1], generator)
    images = taken.applied(windows.images.flatten(0, 1), generator)
    return replace(windows, images=images.view(shape))


@torch.no_grad()
def take_over(network: nn.Module, file: Path) -> None:
    """Copy what a file and a network share; says in the log what they do not.

    Raises CheckpointError for a file that is no weights.
    """
    try:
        stored, wanted = load_file(file), network.state_dict()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f'expected weights to start from in {file}, found {error}; give a '
                              '.safetensors file') from error
    shared = [name for name in wanted if name in stored
              and stored[name].shape == wanted[name].shape]
    for name in shared:
        wanted[name].copy_(stored[name])
    log.info('began with %d tensors of %s; %d are new, %d left out', len(shared), file,
             len(wanted) - len(shared), len(stored) - len(shared))
