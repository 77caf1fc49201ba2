"""The launch file declares what it uses and calls a command that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from typer.testing import CliRunner

from feedforward_recon.cli import app

LAUNCH = Path(__file__).resolve().parent.parent / 'launch' / 'map_source.launch.py'


def strings_of_calls(name: str) -> list[list[str]]:
    """String constants given to each call of ``name`` in the launch file."""
    calls = [node for node in ast.walk(ast.parse(LAUNCH.read_text()))
             if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == name]
    return [[c.value for c in ast.walk(call) if isinstance(c, ast.Constant)
             and isinstance(c.value, str)] for call in calls]


def test_every_argument_used_is_declared():
    declared = {call[0] for call in strings_of_calls('DeclareLaunchArgument')}
    used = {call[0] for call in strings_of_calls('LaunchConfiguration')}
    assert used == declared


def test_every_option_passed_exists():
    options = {word for call in strings_of_calls('ExecuteProcess') for word in call
               if word.startswith('--')}
    help_text = re.sub(r'\x1b\[[0-9;]*m', '',
                       CliRunner().invoke(app, ['map', '--help'], terminal_width=200).output)
    assert options
    assert all(option in help_text for option in options)
