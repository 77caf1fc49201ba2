"""``ffrecon weights list|get|check``: checkpoints, their licences, and whether they are intact."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from feedforward_recon.console.options import Json
from feedforward_recon.console.terminal import note, print_json, print_table
from feedforward_recon.model.weights.checkpoints import misfit
from feedforward_recon.model.weights.files import WeightsReport, check_weights, fetch_weights
from feedforward_recon.model.weights.registry import (
    CHECKPOINTS,
    Checkpoint,
    checkpoint_of,
    is_offline,
    located,
)

Name = Annotated[str, typer.Argument(help='Name that `ffrecon weights list` shows.',
                                     metavar='NAME', show_default=False)]
NameOrPath = Annotated[str, typer.Argument(help='Name of a checkpoint, or a file of weights.',
                                           metavar='NAME|PATH', show_default=False)]
Accept = Annotated[bool, typer.Option('--accept-licence',
                                      help='You have read the licence and agree to it.')]
Offline = Annotated[bool, typer.Option('--offline', help='Never touch the network, as with '
                                       'HF_HUB_OFFLINE=1.')]
Model = Annotated[str | None, typer.Option('--model', help='Architecture of a file of your own; '
                                           'default: the checkpoint it is named after.',
                                           metavar='NAME', show_default=False)]
Attention = Annotated[str | None, typer.Option('--attention', help='Global attention that the '
                                               'file was trained with; default: that of the '
                                               'architecture.', metavar='NAME',
                                               show_default=False)]


def root(context: typer.Context) -> None:
    """Weights of the networks: which there are, getting them, checking them.

    Examples:
      ffrecon weights list
      ffrecon weights get da3-small --accept-licence
      ffrecon weights check da3-small
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def list_command(json_: Json = False) -> None:
    """Show every checkpoint: size, licence, and whether it is on this machine.

    Examples:
      ffrecon weights list
      ffrecon weights list --json    (files, hashes and addresses too)
    """
    if json_:
        print_json([_entry(checkpoint) for checkpoint in CHECKPOINTS.values()])
        return
    header = ('name', 'size', 'licence', 'commercial use', 'here')
    print_table('weights', [_row(checkpoint) for checkpoint in CHECKPOINTS.values()], header)


def get_command(name: Name, accept_licence: Accept = False, offline: Offline = False) -> None:
    """Download a checkpoint, once its licence is accepted; prints the file.

    It goes to $FEEDFORWARD_RECON_WEIGHTS, or to ~/.cache/feedforward_recon/weights.

    Examples:
      ffrecon weights get da3-small --accept-licence
      ffrecon weights get vggt-1b --offline    (says what to put where)
    """
    checkpoint = checkpoint_of(name)
    licence = checkpoint.licence
    note(f'{name}, {_gigabytes(checkpoint.size)}, {checkpoint.url or "shipped with us"}; licence '
         f'{licence.name} ({licence.url}); commercial use: {licence.use}')
    download = checkpoint.repo and located(checkpoint) is None and not (offline or is_offline())
    if download and not accept_licence and sys.stdin.isatty():
        accept_licence = typer.confirm('Do you accept this licence?', err=True)
    print(fetch_weights(name, accept_licence=accept_licence, offline=offline))


def check_command(name: NameOrPath, model: Model = None, attention: Attention = None,
                  json_: Json = False) -> None:
    """Compare a file with its published hash and with the names and shapes of its network.

    Examples:
      ffrecon weights check vggt-1b
      ffrecon weights check mine.safetensors --model tiny --attention ttt
    """
    report = check_weights(name, model, attention)
    if json_:
        print_json(_report_entry(report))
    else:
        _print_report(report)
    if not report.keys.fits:
        raise misfit(report.model, report.file, report.keys)


def _entry(checkpoint: Checkpoint) -> dict:
    file = located(checkpoint)
    return {**asdict(checkpoint), 'url': checkpoint.url, 'file_here': file and str(file)}


def _row(checkpoint: Checkpoint) -> tuple[str, ...]:
    licence = checkpoint.licence
    return (checkpoint.name, _gigabytes(checkpoint.size), licence.name, licence.use,
            'yes' if located(checkpoint) else 'no')


def _gigabytes(size: int) -> str:
    return f'{size / 1e9:.2f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'


def _report_entry(report: WeightsReport) -> dict:
    keys = report.keys
    return {'file': str(report.file), 'model': report.model, 'bytes': report.size,
            'sha256': report.sha256, 'checked_against': report.checked_against or None,
            'fits': keys.fits, 'tensors': len(keys.sources), 'missing': keys.missing,
            'unexpected': keys.unexpected, 'ignored': keys.ignored,
            'misshapen': [{'name': name, 'expected': list(expected), 'found': list(found)}
                          for name, expected, found in keys.misshapen]}


def _print_report(report: WeightsReport) -> None:
    keys = report.keys
    known = (f'as {report.checked_against}' if report.checked_against
             else 'nothing known to compare it with')
    # Lines, since a table would cut the hash short on a narrow terminal.
    print(f'{report.model} in {report.file}, {report.size} bytes')
    print(f'SHA-256 {report.sha256}, {known}')
    print(f'{len(keys.sources)} tensors of this network, {len(keys.ignored)} of parts that we do '
          'not have; names and shapes', 'fit' if keys.fits else 'do not fit')
    for name in keys.missing:
        print('missing', name)
    for name in keys.unexpected:
        print('unexpected', name)
    for name, expected, found in keys.misshapen:
        print('shape', name, list(found), 'instead of', list(expected))


COMMANDS: dict[str, Callable[..., int | None]] = {
    'list': list_command, 'get': get_command, 'check': check_command}
