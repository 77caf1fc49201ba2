"""Images to map and to query, and rows of the localisation table, for us and the peers alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import Clock
from feedforward_recon.evaluation import localisation_score
from feedforward_recon.types import Frame


def interleaved_split(count: int, block: int = 25, every: int = 4
                      ) -> tuple[np.ndarray, np.ndarray]:
    """Indices to map and to query: of every ``every`` blocks of images the last is query."""
    query = np.arange(count) // block % every == every - 1
    return np.flatnonzero(~query), np.flatnonzero(query)


def extrapolation_split(count: int, mapped: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Indices to map and to query: the walk is mapped up to a share of it, then queried."""
    first = round(count * mapped)
    return np.arange(first), np.arange(first, count)


def localisation_entry(localise: Callable[[Frame], np.ndarray | None], queries: list[Frame],
                       nbytes: int, mapping: Clock) -> dict[str, Any]:
    """Score and median time of a query on frames with true poses."""
    clocks, answers = [], []
    for frame in queries:
        clock = Clock()
        answers.append(localise(frame))
        clocks.append(clock.stop())
    truth = np.stack([f.T_map_cam for f in queries if f.T_map_cam is not None])
    return {**dataclasses.asdict(localisation_score(answers, truth)), 'nbytes': nbytes,
            'query_ms': 1e3 * float(np.median([clock.seconds for clock in clocks])),
            'query_cpu_ms': 1e3 * float(np.median([clock.cpu_seconds for clock in clocks])),
            'map_seconds': mapping.seconds, 'map_cpu_seconds': mapping.cpu_seconds}
