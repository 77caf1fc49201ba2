"""Students of a trained network: its attention is exchanged, and little of it learns anew.

A recipe says which attention the student has, and what of it learns; all else is the teacher's and
stays. Each is that of a published system:
    linearize (VGG-T3, arXiv 2602.23361): fast weights where views meet; their projections, rates
        and short convolutions learn;
    sparsify (Speed3R, arXiv 2603.08055): compression and selection; the joint blocks learn;
    sla (Lite3R, arXiv 2605.11354): kept keys and a linear branch in every attention; the
        projections of the linear branch learn;
    qat (Lite3R): weights and inputs of linear layers rounded to eight bits; these layers learn.
What a student is taught: the answers of the teacher's attentions, and what the network is for.
First, for some steps, each attention learns alone, from what the teacher's own was given.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.config import SparseOptions
from feedforward_recon.model.attention.sparse_linear import LocalSparseLinear
from feedforward_recon.model.backbone import Demand
from feedforward_recon.model.configs import (
    ALIASES,
    STUDENTS,
    Network,
    build,
    device_of,
    load,
    network_of,
)
from feedforward_recon.model.distributed import own_device
from feedforward_recon.model.fp8 import FakeFp8Linear, fake_quantised
from feedforward_recon.model.layers import GlobalBlock
from feedforward_recon.model.pi3 import Pi3
from feedforward_recon.model.predictor import as_taken, read
from feedforward_recon.model.ray_stem import PATCH, RayStem
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.model.vit import PATCH as DINO_PATCH
from feedforward_recon.training.answer_losses import answer_losses
from feedforward_recon.training.attention_record import (
    AttentionRecord,
    attention_paths,
    unlikeness,
)
from feedforward_recon.training.moving_average import MovingAverage
from feedforward_recon.training.processes import Processes
from feedforward_recon.training.run_folder import RunFolder, check_given
from feedforward_recon.training.scenes import open_scenes
from feedforward_recon.training.stepping import (
    drawn_ahead,
    follow_gradient,
    freeze_but,
    set_rate,
)
from feedforward_recon.training.transformer import photographed, take_over
from feedforward_recon.training.transformer_losses import task_losses
from feedforward_recon.training.windows import Windows, cropped

log = logging.getLogger(__name__)
BETAS = 0.9, 0.95
QAT = 'qat'  # quantisation-aware training
FAST_WEIGHTS = 'ttt', 'hybrid'  # students of `linearize`
LOG_EVERY = 25
SPARSE_SIDE = SparseOptions().window  # patches: Speed3R's network knows whole windows only


@dataclass(frozen=True)
class Recipe:
    """How a student differs from its teacher.

    learns: names of the parameters that do. learning_rate: the highest. suffix: of the student's
    name, which says its attentions (`configs.STUDENTS`); of `QAT` they stay, and linear layers are
    rounded.
    """

    learns: Callable[[nn.Module], list[str]]
    learning_rate: float
    suffix: str


def of_joint_attentions(network: nn.Module) -> list[str]:
    """Parameters of the attentions in which views meet."""
    return _inside(network, GlobalBlock, 'attn.')


def joint_blocks(network: nn.Module) -> list[str]:
    """Parameters of the blocks in which views meet."""
    return _inside(network, GlobalBlock, '')


def linear_branches(network: nn.Module) -> list[str]:
    """Projections of linear branches."""
    return [name for name, _ in network.named_parameters() if '.proj_lin.' in name]


def rounded_layers(network: nn.Module) -> list[str]:
    """Parameters of layers that compute in eight bits, but those of a frozen stem."""
    stem = set(_inside(network, RayStem, ''))
    return [name for name in _inside(network, FakeFp8Linear, '') if name not in stem]


def _inside(network: nn.Module, kind: type[nn.Module], part: str) -> list[str]:
    """Names of the parameters of all modules of a kind, or of a part of them."""
    return [f'{path}.{name}' for path, module in network.named_modules()
            if isinstance(module, kind) for name, _ in module.named_parameters()
            if name.startswith(part)]


RECIPES = {
    'linearize': Recipe(of_joint_attentions, 2e-3, 'ttt'),
    'sparsify': Recipe(joint_blocks, 3e-4, 'sparse'),
    'sla': Recipe(linear_branches, 1e-3, 'sla'),
    'qat': Recipe(rounded_layers, 1e-4, QAT)}


@dataclass(frozen=True)
class StudentTraining:
    """Settings of a student's training; ``steps`` is the whole schedule, resumes included.

    photos, rooms, held_out: as in ``TransformerTraining``. teacher, weights: name and weights of
    the teacher. attention: another than that of the recipe. start: weights to begin with; what
    they lack is the teacher's. transfer_steps: those at first in which each attention learns
    alone. distillation: weight of the answers of the attentions. learning_rate: 0: that of the
    recipe. dry_run: see ``what_learns``; nothing is trained.
    """

    photos: str = ''
    out: str = ''
    rooms: str = ''
    held_out: str = ''
    teacher: str = 'tiny'
    weights: str = ''
    attention: str = ''
    start: str = ''
    device: str = 'cpu'
    photo_share: float = 0.6
    steps: int = 1000
    transfer_steps: int = 400
    views_per_step: int = 32
    learning_rate: float = 0.0
    warm_up: int = 20
    distillation: float = 1.0
    seed: int = 0
    save_every: int = 100
    validate_every: int = 250
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError where a training lacks its folders."""
        if not self.dry_run:
            check_given(self.photos, self.out)


class Lesson:
    """A teacher, its student, and what the attentions of both answered in their last pass.

    learns: names of the student's parameters that do.
    """

    def __init__(self, teacher: Network, recipe: Recipe) -> None:
        self.teacher, self.student = teacher.requires_grad_(False), student_of(teacher, recipe)
        self.learns = learning(self.student, recipe)
        compared = [path for path in attention_paths(self.student)
                    if any(name.startswith(f'{path}.') for name in self.learns)]
        self._taught = AttentionRecord(teacher, compared)
        self._said = AttentionRecord(self.student, compared)

    def transfer(self) -> torch.Tensor:
        """How far attentions are from the teacher's where they are given the same."""
        said = {path: self._taught.repeated(path, self.student.get_submodule(path))
                for path in self._taught.outputs}
        return self._apart(said)

    def distillation(self) -> torch.Tensor:
        """How far attentions are from the teacher's, each network going its own way."""
        return self._apart(self._said.outputs)

    def _apart(self, said: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([unlikeness(said[path], wanted)
                            for path, wanted in self._taught.outputs.items()]).mean()


class StudentTrainer:
    """One training run of a recipe in the folder ``settings.out``."""

    def __init__(self, recipe: Recipe, settings: StudentTraining) -> None:
        recipe = with_attention(recipe, settings.attention)
        self.settings, self.device = settings, own_device(device_of(settings.device))
        self.name = student_name(settings.teacher, recipe)
        self.processes, self.folder = Processes(self.device), RunFolder(settings.out)
        self.scenes = open_scenes(settings.photos, settings.rooms, settings.held_out,
                                  settings.photo_share, settings.seed)
        torch.manual_seed(settings.seed)
        self.lesson = Lesson(load(settings.teacher, settings.weights or None,
                                  device=self.device), recipe)
        self.network = self.lesson.student.to(self.device)
        self.optimiser = torch.optim.AdamW(
            self._parameters(), settings.learning_rate or recipe.learning_rate, BETAS,
            weight_decay=0.0)
        self.average = MovingAverage(self.network)
        self.step, self.best = 0, -math.inf
        self._begin()

    def run(self) -> Iterator[int]:
        """Train until ``settings.steps``, yielding every step; stop and start it at any time."""
        for windows in drawn_ahead(self.batch, self.step, self.settings.steps):
            report = self.learn(windows)
            self.step += 1
            self._after(report)
            yield self.step

    def batch(self, step: int) -> Windows:
        """The windows of a step, as cameras with other settings would have taken them."""
        number = step, 0, self.processes.rank
        windows = self.scenes.stream.batch(number, self.settings.views_per_step)
        multiple = side_multiple(self.network)
        return photographed(cropped(windows, multiple), self._generator(step))

    def losses(self, windows: Windows) -> dict[str, torch.Tensor]:
        """The parts of the loss, each with its weight."""
        precision = torch.autocast(self.device.type, torch.bfloat16)
        with torch.no_grad(), precision:
            answer(self.lesson.teacher, windows)
        if self.step < self.settings.transfer_steps:
            with precision:
                return {'transfer': self.lesson.transfer()}
        with precision:
            said = answer(self.network, windows)
        return {**losses_of(self.network, said, windows, self._generator(self.step)),
                'distil': self.settings.distillation * self.lesson.distillation()}

    def learn(self, windows: Windows) -> dict[str, float]:
        """One step; parts of the loss, and its seconds."""
        started = time.perf_counter()
        self.network.train()
        self.optimiser.zero_grad()
        parts = self.losses(windows.to(self.device))
        torch.stack(list(parts.values())).sum().backward()
        set_rate([self.optimiser], self.optimiser.defaults['lr'], self.step, self.settings.steps,
                 self.settings.warm_up)
        norm = follow_gradient(self._parameters(), [self.optimiser], self.processes, self.step)
        if math.isfinite(norm):
            self.average.update(self.network, self.step)
        return {'views': windows.images.shape[1],
                **{name: float(value.detach()) for name, value in parts.items()},
                'seconds': time.perf_counter() - started}

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(
            hash((self.settings.seed, step, self.processes.rank)) % 2**62)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def _after(self, report: dict[str, float]) -> None:
        """Log, look at what is held out, save; by the first process alone."""
        settings, last = self.settings, self.step == self.settings.steps
        if self.processes.rank:
            return
        if last or self.step % LOG_EVERY == 0:
            self.folder.note(self.step, report)
        if last or self.step % settings.validate_every == 0:
            self._validate()
        if last or self.step % settings.save_every == 0:
            self.folder.save({'network': self.network.state_dict(),
                              'average': self.average.state_dict(),
                              'optimiser': self.optimiser.state_dict(), 'step': self.step,
                              'best': self.best, 'settings': self._described()})

    def _validate(self) -> None:
        """Keep the averaged weights if they are the best so far on what is held out."""
        with self.average.applied(self.network):
            self.network.eval()
            score = 0.0
            if isinstance(self.network, RayTransformer):
                rows = self.scenes.validation.scores(self.network, self.device)
                self.folder.note(self.step, {'held_out': rows})
                score = self.scenes.validation.mean_auc(rows)
            if score >= self.best:  # where nothing is held out, the latest are the best
                self.best = score
                self.folder.export(self.network, self.name)

    def _described(self) -> dict[str, Any]:
        return {**asdict(self.settings), 'network': self.name}

    def _begin(self) -> None:
        """Go on where the run was left."""
        state = self.folder.saved(self.device, self._described())
        if state is not None:
            self.network.load_state_dict(state['network'])
            self.average.load_state_dict(state['average'])
            self.optimiser.load_state_dict(state['optimiser'])
            self.step, self.best = state['step'], state['best']
            log.info('resumed at step %d', self.step)
        elif self.settings.start:
            take_over(self.network, Path(self.settings.start))
            self.average = MovingAverage(self.network)


def what_learns(teacher: str, recipe: Recipe, attention: str = '') -> dict[str, str]:
    """Sizes of what learns of a student, by names without numbers of layers; needs no weights."""
    recipe = with_attention(recipe, attention)
    student = student_of(build(teacher, device='meta'), recipe)
    return parameters_by_kind(student, learning(student, recipe))


def parameters_by_kind(network: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Sizes of parameters by their names without numbers of layers, and their share of all."""
    sizes: dict[str, int] = {}
    for name in names:
        kind = re.sub(r'\.\d+\.', '.N.', name)
        sizes[kind] = sizes.get(kind, 0) + network.get_parameter(name).numel()
    total = sum(p.numel() for p in network.parameters())
    rows = {kind: f'{size:,}' for kind, size in sizes.items()}
    return {**rows, 'all of these': f'{sum(sizes.values()):,} of {total:,} parameters'}


def student_name(teacher: str, recipe: Recipe) -> str:
    """What a student is called: `tiny-ttt`."""
    return f'{ALIASES.get(teacher, teacher)}-{recipe.suffix}'


def with_attention(recipe: Recipe, name: str) -> Recipe:
    """The recipe for another attention, unless the name is ''.

    Raises ConfigError where there is no such student.
    """
    if not name:
        return recipe
    if recipe is not RECIPES['linearize'] or name not in FAST_WEIGHTS:
        raise ConfigError(f'expected fast weights for linearize alone, ttt or hybrid, found '
                          f'attention {name}; leave it out')
    return replace(recipe, suffix=name)


def student_of(teacher: Network, recipe: Recipe) -> Network:
    """A network of the recipe with all weights of the teacher that it has a place for.

    Raises ConfigError for a teacher some of whose attentions it has no place for.
    """
    if recipe.suffix == QAT:
        return cast(Network, fake_quantised(copy.deepcopy(teacher)))
    if any(isinstance(layer, LocalSparseLinear) for layer in teacher.modules()):
        raise ConfigError('expected a teacher that compares all with all within images, found '
                          'sparse attentions; choose the teacher of this one')
    kind = STUDENTS[recipe.suffix]
    config = replace(teacher.config, attention=kind.attention)
    with device_of_network(teacher):
        student = network_of(config, everywhere=kind.everywhere, **kind.options)
    if device_of_network(teacher).type != 'meta':
        student.load_state_dict(teacher.state_dict(), strict=False)
    return student


def device_of_network(network: nn.Module) -> torch.device:
    """Where a network is."""
    return next(network.parameters()).device


def learning(network: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the parameters that learn, after all others have been frozen.

    Raises ConfigError where there are none: the recipe does not fit the network.
    """
    names = recipe.learns(network)
    if not names:
        raise ConfigError('expected a teacher with what this recipe teaches anew, found none of '
                          f'it in {type(network).__name__}; choose another, such as tiny')
    freeze_but(network, names)
    return names


def answer(network: Network, windows: Windows) -> Any:
    """What a network says of windows, in the way that its losses take it."""
    if isinstance(network, RayTransformer):
        return network(windows.images, windows.K)[0]
    demand = Demand(points=False, memory=False)
    return network(as_taken(network, windows.images), None, demand=demand)[0]


def side_multiple(network: Network) -> int:
    """What the sides of a network's images are multiples of, in pixels."""
    if isinstance(network, RayTransformer):
        return PATCH
    return DINO_PATCH * (SPARSE_SIDE if isinstance(network, Pi3) and
                         not network.config.registers else 1)


def losses_of(network: Network, said: Any, windows: Windows, generator: torch.Generator
              ) -> dict[str, torch.Tensor]:
    """What a network is for."""
    if isinstance(network, RayTransformer):
        return task_losses(network, said, windows, generator)
    return answer_losses(read(said), windows)
