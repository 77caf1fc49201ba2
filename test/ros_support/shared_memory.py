"""Shared-memory files that Fast DDS leaves behind when a process is killed.

The owner of a segment, and the listener of a port, hold a lock on the file NAME_el as long as
they live; the kernel drops it with the process.
"""

from __future__ import annotations

import fcntl
import re
from pathlib import Path

FOLDER = Path('/dev/shm')
# Ports of a domain, https://docs.ros.org/en/rolling/Concepts/Intermediate/About-Domain-ID.html
FIRST_PORT, PORTS_PER_DOMAIN = 7400, 250


def mapped_by(pid: int) -> set[Path]:
    """Fast DDS segments that a process uses, own and foreign; empty for one that is gone."""
    try:
        maps = Path(f'/proc/{pid}/maps').read_text()
    except OSError:
        return set()
    return {Path(name) for name in re.findall(r'/dev/shm/fastdds_\w+', maps)}


def ports_of(domain_id: int) -> set[Path]:
    """Files of the ports of a ROS domain."""
    first = FIRST_PORT + PORTS_PER_DOMAIN * domain_id
    return {path for path in FOLDER.glob('fastdds_port*')
            if path.name.removeprefix('fastdds_port').isdigit()
            and first <= int(path.name.removeprefix('fastdds_port')) < first + PORTS_PER_DOMAIN}


def is_owned(path: Path) -> bool:
    """True while a living process holds the lock of a segment or port."""
    try:
        with path.with_name(f'{path.name}_el').open('r+') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def remove(candidates: set[Path]) -> None:
    """Delete those segments and ports, with their locks, that nobody owns any more."""
    for path in candidates:
        if not is_owned(path):
            for name in (path.name, f'{path.name}_el', f'sem.{path.name}_mutex'):
                path.with_name(name).unlink(missing_ok=True)
