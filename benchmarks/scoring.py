"""Rows of the localisation table, for us and for the peers alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.common import Clock
from feedforward_recon.evaluation import localisation_score
from feedforward_recon.types import Frame


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
