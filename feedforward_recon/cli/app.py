"""The list of commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from feedforward_recon.cli import weights
from feedforward_recon.cli.demo import demo_command
from feedforward_recon.cli.evaluate import bench_command, eval_command
from feedforward_recon.cli.localize import localize_command
from feedforward_recon.cli.mapping import map_command
from feedforward_recon.cli.maps import export_command, info_command, merge_command
from feedforward_recon.cli.reconstruct import reconstruct_command
from feedforward_recon.console.terminal import taught
from feedforward_recon.version import __version__

app = typer.Typer(name='ffrecon', add_completion=False, pretty_exceptions_enable=False,
                  context_settings={'help_option_names': ['-h', '--help']})


def root(context: typer.Context,
         version: Annotated[bool, typer.Option('--version', help='Print the version.')] = False
         ) -> None:
    """Mapping and localisation with one camera; the saved scene memory has a fixed size.

    Start here:
      ffrecon demo                     maps a rendered room, localises in it
      ffrecon map WALK --out MAP       maps a walk: folder, video or bag
      ffrecon map LATER --into MAP     goes on with the map
      ffrecon reconstruct PHOTOS --out MAP   maps photos in any order
      ffrecon localize MAP IMAGES      finds images in the map
    """
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.callback(invoke_without_command=True, help=taught(root))(root)


COMMANDS: dict[str, Callable[..., int | None]] = {
    'demo': demo_command, 'map': map_command, 'reconstruct': reconstruct_command,
    'localize': localize_command, 'info': info_command,
    'eval': eval_command, 'export': export_command,
    'merge': merge_command, 'bench': bench_command}
weights_app = typer.Typer()
weights_app.callback(invoke_without_command=True,
                     help=taught(weights.weights_root))(weights.weights_root)
app.add_typer(weights_app, name='weights')
for _app, _commands in ((app, COMMANDS), (weights_app, weights.COMMANDS)):
    for _name, _command in _commands.items():
        _app.command(_name, help=taught(_command))(_command)
