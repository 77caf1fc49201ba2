"""The command ``ffrecon-train``: make the encoder's weights again, or your own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from feedforward_recon.cli.app import taught
from feedforward_recon.cli.options import Flag, takes
from feedforward_recon.cli.terminal import progress_bar, run
from feedforward_recon.training.encoder import EncoderTrainer, EncoderTraining
from feedforward_recon.training.rooms import render_rooms

app = typer.Typer(name='ffrecon-train', add_completion=False, no_args_is_help=False,
                  pretty_exceptions_enable=False,
                  help='Train the encoder. Mapping and localising never need this.')
ENCODER_FLAGS = {
    'photos': Flag('--photos', 'Folder of *.jpg photos: pairs by homography.', metavar='DIR'),
    'out': Flag('--out', 'Folder of the run: weights, log and state; an interrupted run goes '
                'on.', metavar='DIR'),
    'rooms': Flag('--rooms', 'Folder that `ffrecon-train rooms` wrote: true multi-view pairs.',
                  metavar='DIR'),
    'room_share': Flag('--room-share', 'Share of the pairs that come from rooms.'),
    'steps': Flag('--steps', 'Optimisation steps of the whole schedule.'),
    'pairs_per_step': Flag('--pairs-per-step', 'Image pairs per step.'),
    'learning_rate': Flag('--learning-rate', 'Highest learning rate.'),
    'temperature': Flag('--temperature', 'Temperature of the matching loss.'),
    'safe_radius_px': Flag('--safe-radius', 'Neighbours within this radius are no negatives.',
                           metavar='PX'),
    'seed': Flag('--seed', 'Seed of every random choice.'),
    'save_every': Flag('--save-every', 'Steps between saves.'),
    'workers': Flag('--workers', 'Processes that make pairs.')}
Out = Annotated[Path, typer.Option('--out', help='Folder for the *.npz files.', metavar='DIR',
                                   show_default=False)]
Count = Annotated[int, typer.Option('--count', min=1, help='Number of rooms.')]


@takes(EncoderTraining, 'training', ENCODER_FLAGS)
def encoder_command(training: EncoderTraining) -> None:
    """Train the compact encoder on a CPU, resumable at any step.

    The result is OUT/compact.safetensors; use it with `ffrecon map --encoder`.

    Example:
      ffrecon-train encoder --photos photos/ --rooms rooms/ --out runs/encoder
    """
    logging.getLogger('feedforward_recon.training').setLevel(logging.INFO)
    EncoderTrainer(training).run()


def rooms_command(out: Out, count: Count = 150) -> None:
    """Render synthetic rooms for training (none of them is the demo's).

    Example:
      ffrecon-train rooms --out rooms/ --count 150
    """
    with progress_bar('rendering', count) as bar:
        for _ in bar.over(render_rooms(out, count)):
            pass


app.command('encoder', help=taught(encoder_command))(encoder_command)
app.command('rooms', help=taught(rooms_command))(rooms_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ffrecon-train`` with ``arguments`` (those of the process when None)."""
    return run(app, arguments)
