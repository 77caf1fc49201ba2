"""Rows of the localisation table, for us and for the peers alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from feedforward_recon.evaluation import localisation_score
from feedforward_recon.types import Frame


def localisation_entry(localise: Callable[[Frame], np.ndarray | None], queries: list[Frame],
                       nbytes: int, map_seconds: float) -> dict[str, Any]:
    """Score and median time of a query on frames with true poses."""
    answers, milliseconds = [], []
    for frame in queries:
        started = time.perf_counter()
        answers.append(localise(frame))
        milliseconds.append(1e3 * (time.perf_counter() - started))
    truth = np.stack([f.T_map_cam for f in queries if f.T_map_cam is not None])
    return {**dataclasses.asdict(localisation_score(answers, truth)), 'nbytes': nbytes,
            'query_ms': float(np.median(milliseconds)), 'map_seconds': map_seconds}
