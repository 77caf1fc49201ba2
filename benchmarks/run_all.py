"""Run measurements, one after another: ``python -m benchmarks.run_all [NAME ...]``."""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from typing import Any

from benchmarks.common import write_result
from feedforward_recon.errors import InputError

log = logging.getLogger(__name__)


# Name of the result: module and function that measure it.
ENTRIES = {
    'mapping': ('mapping', 'run'),
    'stress': ('stress', 'run'),
    'sparse_depth': ('sparse_depth', 'run'),
    'dense_cloud': ('dense_cloud', 'run'),
    'sessions': ('sessions', 'run'),
    'pairs': ('pairs', 'run'),
    'pose_accuracy': ('pose_accuracy', 'run'),
    'students': ('students', 'run'),
    'localisation': ('localisation', 'run'),
    'wrong_places': ('localisation', 'run_wrong_places'),
    'repeated_office': ('places', 'run'),
    'memory': ('memory', 'run'),
    'memory_law': ('memory_law', 'run'),
    'offline': ('offline', 'run'),
    'trees': ('offline', 'run_trees'),
    'merge': ('offline', 'run_merge'),
    'photo_growth': ('offline', 'run_growth'),
    'photo_scale': ('photo_scale', 'run'),
    'joint': ('joint', 'run'),
    'moving_photos': ('offline', 'run_moving'),
    'attention_scaling': ('attention_scaling', 'run'),
    'live': ('live', 'run'),
    'peers_mapping': ('colmap_peer', 'run'),
    'peers_localisation': ('sift_peer', 'run'),
}


def measure(name: str) -> dict[str, Any]:
    """Rows of one entry; its module is imported only now, so that one needs no other's extras."""
    module, function = ENTRIES[name]
    rows: dict[str, Any] = {}
    for case, row in getattr(importlib.import_module(f'benchmarks.{module}'), function)():
        log.info('%s | %s', case, row)
        rows[case] = row
    return rows


def main() -> None:
    """Write one JSON file per entry; all entries unless some are named.

    One that cannot be measured here does not keep the others from it; the exit code is 1 then.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', metavar='NAME', help=f'of {", ".join(ENTRIES)}')
    names = parser.parse_args().names or list(ENTRIES)
    unknown = sorted(set(names) - set(ENTRIES))
    if unknown:
        parser.error(f'expected names of {", ".join(ENTRIES)}, found {", ".join(unknown)}')
    logging.basicConfig(format='%(message)s')
    for logger in (log, logging.getLogger('benchmarks')):
        logger.setLevel(logging.INFO)
    failed = []
    for name in names:
        started = time.perf_counter()
        try:
            path = write_result(name, measure(name))
        except (InputError, ImportError) as error:  # no data, no ROS, no pycolmap
            failed.append(name)
            log.error('%s was not measured: %s', name, error)
            continue
        log.info('%s: %s in %.0f s', name, path, time.perf_counter() - started)
    if failed:
        parser.exit(1, f'not measured: {", ".join(failed)}\n')


if __name__ == '__main__':
    main()
