"""Training of latent alignment inside a network that stays as it is (Light3R-SfM, sec. 3.5).

A graph is a window of eight views: a collection that is aligned, and the pairs of a tree that are
decoded. Its loss is that of `photo_losses`: of the points of each pair, and of all of them
together. Only the alignment learns, so that a network without it is the same network as before.
Everything random in a step follows from the seed, the number of the step and the process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.configs import ALIASES, Network, build, device_of, load
from feedforward_recon.model.distributed import own_device
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.training.processes import Processes
from feedforward_recon.training.room_files import room_sources
from feedforward_recon.training.run_folder import RunFolder, check_given
from feedforward_recon.training.scene_folders import photo_sources
from feedforward_recon.training.stepping import (
    drawn_ahead,
    follow_gradient,
    freeze_but,
    set_rate,
)
from feedforward_recon.training.students import parameters_by_kind
from feedforward_recon.training.transformer import photographed
from feedforward_recon.training.validation import whole_window
from feedforward_recon.training.view_graphs import graph_loss
from feedforward_recon.training.view_sources import ViewSource
from feedforward_recon.training.windows import Windows, WindowStream

log = logging.getLogger(__name__)
VIEWS = 8  # of a graph
BETAS = 0.9, 0.98
LOG_EVERY = 10
HELD_OUT_GRAPHS = 2  # of each scene


@dataclass(frozen=True)
class AlignmentTraining:
    """Settings of a training run; ``steps`` is the whole schedule, resumes included.

    photos, rooms, held_out: as in ``TransformerTraining``. teacher, weights: name and weights of
    the network. blocks: of latent alignment. graphs: windows of eight views of a step. dry_run:
    see ``what_aligns``; nothing is trained.
    """

    photos: str = ''
    out: str = ''
    rooms: str = ''
    held_out: str = ''
    teacher: str = 'tiny'
    weights: str = ''
    blocks: int = 4
    device: str = 'cpu'
    photo_share: float = 0.6
    steps: int = 1000
    graphs: int = 2
    learning_rate: float = 5e-4
    warm_up: int = 20
    seed: int = 0
    save_every: int = 50
    validate_every: int = 100
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError where a training lacks its folders."""
        if not self.dry_run:
            check_given(self.photos, self.out)


class AlignmentTrainer:
    """One training run in the folder ``settings.out``.

    On the way: the ``network``, and the names of what of it ``learns``.
    """

    def __init__(self, settings: AlignmentTraining) -> None:
        self.settings, self.device = settings, own_device(device_of(settings.device))
        self.processes, self.folder = Processes(self.device), RunFolder(settings.out)
        torch.manual_seed(settings.seed)
        self.network = aligning_network(settings).to(self.device)
        self.learns = alignment_parameters(self.network)
        held_out = [name for name in settings.held_out.split(',') if name]
        photos, kept = photo_sources(Path(settings.photos), held_out)
        rooms, room_kept = room_sources(Path(settings.rooms)) if settings.rooms else ([], [])
        self._stream = WindowStream(photos, rooms, settings.photo_share, settings.seed, (VIEWS,))
        self._held_out = held_out_graphs([*kept, *room_kept], settings.seed)
        self.optimiser = torch.optim.AdamW(self._parameters(), settings.learning_rate, BETAS,
                                           weight_decay=0.0)
        self.step = 0
        self._begin()

    def run(self) -> Iterator[int]:
        """Train until ``settings.steps``, yielding every step; stop and start it at any time."""
        for windows in drawn_ahead(self.graphs, self.step, self.settings.steps):
            report = self.learn(windows)
            self.step += 1
            self._after(report)
            yield self.step

    def graphs(self, step: int) -> list[Windows]:
        """The graphs of a step, as cameras with other settings would have taken them."""
        drawn = []
        for part in range(self.settings.graphs):
            number = step, part, self.processes.rank
            generator = torch.Generator().manual_seed(
                hash((self.settings.seed, *number)) % 2**62)
            drawn.append(photographed(self._stream.batch(number, VIEWS), generator))
        return drawn

    def learn(self, graphs: Sequence[Windows]) -> dict[str, float]:
        """One step along the mean gradient of graphs; their loss, and seconds."""
        started = time.perf_counter()
        self.network.train()
        self.optimiser.zero_grad()
        total = 0.0
        for windows in graphs:
            loss = graph_loss(self.network, windows.to(self.device)) / len(graphs)
            loss.backward()
            total += float(loss.detach())
        set_rate([self.optimiser], self.settings.learning_rate, self.step, self.settings.steps,
                 self.settings.warm_up)
        norm = follow_gradient(self._parameters(), [self.optimiser], self.processes, self.step)
        return {'loss': total, 'gradient': norm, 'seconds': time.perf_counter() - started}

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss of graphs of scenes that are not trained on; 0 where there are none."""
        self.network.eval()
        each = [float(graph_loss(self.network, windows.to(self.device)))
                for windows in self._held_out]
        return float(np.mean(each)) if each else 0.0

    def _parameters(self) -> list[nn.Parameter]:
        return [self.network.get_parameter(name) for name in self.learns]

    def _after(self, report: dict[str, float]) -> None:
        """Log, look at what is held out, save; by the first process alone."""
        settings, last = self.settings, self.step == self.settings.steps
        if self.processes.rank:
            return
        if last or self.step % LOG_EVERY == 0:
            self.folder.note(self.step, report)
        if last or self.step % settings.validate_every == 0:
            self.folder.note(self.step, {'held_out': self.held_out_loss()})
        if last or self.step % settings.save_every == 0:
            self.folder.save({'network': self.network.state_dict(),
                              'optimiser': self.optimiser.state_dict(), 'step': self.step,
                              'settings': asdict(settings)})
            self.folder.export(self.network, aligned_name(settings.teacher))

    def _begin(self) -> None:
        """Go on where the run was left."""
        state = self.folder.saved(self.device, asdict(self.settings))
        if state is None and not self.processes.rank:
            self.folder.note(0, {'held_out': self.held_out_loss()})
        if state is None:
            return
        self.network.load_state_dict(state['network'])
        self.optimiser.load_state_dict(state['optimiser'])
        self.step = state['step']
        log.info('resumed at step %d', self.step)


def aligned_name(teacher: str) -> str:
    """What a network with latent alignment is called: `tiny-aligned`."""
    return f'{ALIASES.get(teacher, teacher)}-aligned'


def held_out_graphs(sources: Sequence[ViewSource], seed: int) -> list[Windows]:
    """Some graphs of each source, as they are."""
    rng = np.random.default_rng(seed)
    drawn = [whole_window(source, rng, VIEWS) for source in sources
             for _ in range(HELD_OUT_GRAPHS)]
    return [window for window in drawn if window is not None]


def aligning_network(settings: AlignmentTraining) -> RayTransformer:
    """The teacher with latent alignment that does nothing yet.

    Raises ConfigError for networks and weights that cannot be trained, CheckpointError for
    weights that do not fit.
    """
    teacher = load(settings.teacher, settings.weights or None)
    if not isinstance(teacher, RayTransformer):
        raise ConfigError('expected a network of the kind of tiny to train latent alignment of, '
                          f'found {type(teacher).__name__}; choose tiny')
    if teacher.aligns:
        raise ConfigError('expected weights without latent alignment, found some with it; give '
                          'those of the teacher')
    network = build(settings.teacher, alignment=settings.blocks)
    assert isinstance(network, RayTransformer), 'as the teacher'
    network.load_state_dict(teacher.state_dict(), strict=False)
    return network


def alignment_parameters(network: Network) -> list[str]:
    """Names of the parameters of latent alignment, after all others have been frozen.

    Raises ConfigError where there are none.
    """
    names = [name for name, _ in network.named_parameters() if 'latent_alignment.' in name]
    if not names:
        raise ConfigError('expected blocks of latent alignment to train, found 0; choose 2 or 4')
    freeze_but(network, names)
    return names


def what_aligns(settings: AlignmentTraining) -> dict[str, str]:
    """Sizes of what would learn, by names without numbers of blocks; needs no weights."""
    network = build(settings.teacher, device='meta', alignment=settings.blocks)
    return parameters_by_kind(network, alignment_parameters(network))
