"""The folder of a training run: its log, what it needs to go on, and the best weights so far."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from feedforward_recon.errors import ConfigError

log = logging.getLogger(__name__)
# What a run that goes on has in common with its beginning.
SAME = 'network', 'model', 'teacher', 'weights', 'blocks', 'seed', 'held_out'


def check_given(photos: str, out: str) -> None:
    """Raises ConfigError unless a training is told what it learns from, and where it is kept."""
    missing = [name for name, value in (('--photos', photos), ('--out', out)) if not value]
    if missing:
        raise ConfigError(f'expected folders of scenes and of the run, found no '
                          f'{" and no ".join(missing)}; name them, or add --dry-run')


class RunFolder:
    """Made where it is missing. A file is replaced when the new one is complete."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def note(self, step: int, report: Mapping[str, Any]) -> None:
        """One line of the log."""
        line = {'step': step, **{k: round(v, 4) if isinstance(v, float) else v
                                 for k, v in report.items()}}
        log.info('%s', json.dumps(line))
        with open(self.path / 'log.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep what a run needs to go on."""
        torch.save(dict(state), self.path / 'state.tmp')
        (self.path / 'state.tmp').replace(self.path / 'state.pt')

    def saved(self, device: torch.device, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """What ``save`` kept; None in a new folder.

        Raises ConfigError where it is that of a run with other ``settings``, of those in ``SAME``.
        """
        file = self.path / 'state.pt'
        if not file.exists():
            return None
        state = torch.load(file, weights_only=True, map_location=device)
        for name in SAME:
            found = settings.get(name)
            if (before := state['settings'].get(name, found)) != found:
                raise ConfigError(f'expected the run that {self.path} began, with {name} '
                                  f'{before!r}, found {found!r}; choose another --out')
        return state

    def export(self, network: nn.Module, name: str) -> None:
        """The weights in half precision: they are read as float32 again."""
        tensors = {key: tensor.half().contiguous().cpu()
                   for key, tensor in network.state_dict().items()}
        file = self.path / f'{name}.safetensors'
        save_file(tensors, file.with_suffix('.tmp'))
        file.with_suffix('.tmp').replace(file)
