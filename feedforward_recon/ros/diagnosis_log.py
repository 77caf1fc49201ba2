"""Diagnoses as lines of a log: one when a diagnosis begins, one when it is over, none between.

Nothing here needs ROS. Times are seconds of a steady clock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from feedforward_recon.ros.diagnosis import TRACKING, Diagnosis

HOLD_S = 2.0  # a diagnosis that may go by itself is logged after this long
GONE_S = 5.0  # and is over once it has stayed away for this long
WORDINGS = 3  # of one diagnosis, until it is over
DETAILS = re.compile(r'\([^)]*\)|\d+(\.\d+)?')
# These happen once: no moment could be logged as their end.
EVENTS = frozenset({'CALIBRATION_LATE', 'SIZE_CHANGED', 'STAMPS_JUMP_BACK', 'STAMPS_JUMP_AHEAD',
                    'INITIALPOSE_FRAME', 'INITIALPOSE_REFUSED', 'POSE_REFUSED', 'CLOUD',
                    'INTERNAL_ERROR', 'NO_TF2_MSGS'})
ENDS = {'INITIALISING': 'the map has started', 'LOST': 'the camera was found again',
        'NOT_LOCALISED': 'the camera is found in the map'}


@dataclass(frozen=True)
class Line:
    """A line for the log."""

    level: Literal['ERROR', 'WARNING', 'INFO']
    text: str


@dataclass
class _Logged:
    """A diagnosis that holds, or held lately: since when, when last, and what was logged of it."""

    since_s: float
    last_s: float
    wordings: set[str] = field(default_factory=set)


class DiagnosisLog:
    """Tells which diagnoses are new; asked once a second.

    A sentence is logged again when its words change, not its numbers nor what is in parentheses.
    """

    def __init__(self) -> None:
        self._logged: dict[tuple[str, str], _Logged] = {}

    def look(self, diagnoses: Sequence[Diagnosis], now_s: float) -> list[Line]:
        """Lines to log for the diagnoses that hold now."""
        lines = []
        for diagnosis in diagnoses:
            entry = self._logged.setdefault(diagnosis.key, _Logged(now_s, now_s))
            entry.last_s = now_s
            wording = DETAILS.sub('', diagnosis.sentence)
            if (diagnosis.certain or now_s - entry.since_s >= HOLD_S) \
                    and wording not in entry.wordings and len(entry.wordings) < WORDINGS:
                entry.wordings.add(wording)
                lines.append(Line(_level(diagnosis), f'{diagnosis.code}: {diagnosis.sentence}'))
        present = {diagnosis.key for diagnosis in diagnoses}
        return lines + self._ended(present, _hides_status(diagnoses), now_s)

    def forget_status(self) -> None:
        """Another map: whether the camera was lost in the old one no longer matters."""
        self._logged = {key: entry for key, entry in self._logged.items()
                        if key[0] not in TRACKING}

    def forget(self) -> None:
        """The node stops looking: what held may or may not be over, so nothing is logged."""
        self._logged.clear()

    def _ended(self, present: set[tuple[str, str]], hides_status: bool, now_s: float
               ) -> list[Line]:
        lines = []
        for key, entry in list(self._logged.items()):
            code, about = key
            if key in present or (hides_status and code in TRACKING):
                continue
            if entry.wordings and now_s - entry.last_s < GONE_S:
                continue
            # At once, unless it was logged: HOLD_S has to pass without a break.
            del self._logged[key]
            if entry.wordings and code not in EVENTS:
                end = f': {ENDS[code]}' if code in ENDS else f' ({about})' if about else ''
                lines.append(Line('INFO', f'{code} is over{end}'))
        return lines


def _level(diagnosis: Diagnosis) -> Literal['ERROR', 'WARNING']:
    """ERROR for what somebody has to repair; a lost camera only has to be moved."""
    return 'ERROR' if diagnosis.blocking and diagnosis.code not in TRACKING else 'WARNING'


def _hides_status(diagnoses: Sequence[Diagnosis]) -> bool:
    """No status is diagnosed while these hold, so a status that is absent may not be over."""
    return any(d.code == 'PAUSED' or (d.blocking and d.code not in TRACKING) for d in diagnoses)
