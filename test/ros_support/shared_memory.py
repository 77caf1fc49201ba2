"""Shared-memory files that Fast DDS leaves behind when a process is killed."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path('/dev/shm')
# Ports of a domain, https://docs.ros.org/en/rolling/Concepts/Intermediate/About-Domain-ID.html
FIRST_PORT, PORTS_PER_DOMAIN = 7400, 250


def mapped_by(pid: int) -> set[Path]:
    """Fast DDS files that a process has mapped; empty for one that is gone or not ours."""
    try:
        maps = Path(f'/proc/{pid}/maps').read_text()
    except OSError:
        return set()
    return {Path(name) for name in re.findall(r'/dev/shm/\S*fastdds_\S+', maps)}


def ports_of(domain_id: int) -> set[Path]:
    """Files of the ports of a ROS domain."""
    first = FIRST_PORT + PORTS_PER_DOMAIN * domain_id
    return {path for path in FOLDER.glob('*fastdds_port*')
            if first <= int(re.search(r'port(\d+)', path.name)[1]) < first + PORTS_PER_DOMAIN}


def remove(candidates: set[Path]) -> None:
    """Delete files (and their locks) that no living process maps."""
    if not candidates:
        return
    living = set().union(*(mapped_by(int(entry.name)) for entry in Path('/proc').iterdir()
                           if entry.name.isdigit()))
    for path in candidates - living:
        for name in (path, path.with_name(f'{path.name}_el')):
            name.unlink(missing_ok=True)
