"""What setup.py installs and package.xml declares."""

from __future__ import annotations

import os
import runpy
import sys
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
# Of other packages, what the launch files start.
STARTED = {'rviz2', 'ros2bag'}


def setup_arguments() -> dict[str, Any]:
    """Keyword arguments with which setup.py calls setup(), which does nothing here."""
    found: dict[str, Any] = {}
    stand_in = SimpleNamespace(setup=found.update, find_packages=lambda **_: [])
    before = sys.modules.get('setuptools')
    sys.modules['setuptools'] = stand_in  # type: ignore[assignment]
    try:
        with inside(ROOT):  # its globs are relative
            runpy.run_path('setup.py')
    finally:
        if before is None:
            del sys.modules['setuptools']
        else:
            sys.modules['setuptools'] = before
    return found


def console_scripts() -> set[str]:
    """The programs that are installed, where `ros2 run` and launch files find them."""
    scripts = setup_arguments()['entry_points']['console_scripts']
    return {script.partition('=')[0].strip() for script in scripts}


def exec_depends() -> list[str]:
    """Packages that package.xml wants at run time."""
    return [str(entry.text) for entry in ET.parse(ROOT / 'package.xml').iter('exec_depend')]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With another working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
