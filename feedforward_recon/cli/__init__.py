"""The command ``ffrecon``.

Exit codes: 0 done; 1 no image was localised, or the demo did not reach its limits; 2 bad
input or usage, said in exactly one line ``error: ...``. With ``--json`` stdout is JSON only;
progress and notes go to stderr.
"""

from __future__ import annotations

from collections.abc import Sequence

from feedforward_recon.cli.app import app
from feedforward_recon.console.terminal import run

__all__ = ['app', 'main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ffrecon`` with ``arguments`` (those of the process when None); the exit code."""
    return run(app, arguments)
