"""Causes as lines of a log: one when a cause begins, one when it is over, none in between.

Nothing here needs ROS. Times are seconds of a steady clock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from feedforward_recon.ros.causes import TRACKING, Cause

HOLD_S = 2.0  # a cause that may go by itself is told after this long
GONE_S = 5.0  # and is over once it has stayed away for this long
WORDINGS = 3  # of one cause, until it is over
DETAILS = re.compile(r'\([^)]*\)|\d+(\.\d+)?')
# These happen and then stay as they are, or have no end that one could see.
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
class _Told:
    """A cause that holds, or held lately: since when, when last, and what was said of it."""

    since_s: float
    last_s: float
    wordings: set[str] = field(default_factory=set)


class CauseLog:
    """What of the causes is new; to be asked about once a second.

    A sentence is told again when its words change, not its numbers nor what is in parentheses.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], _Told] = {}

    def look(self, causes: Sequence[Cause], now_s: float) -> list[Line]:
        """The lines that these causes, which hold now, deserve."""
        lines = []
        for cause in causes:
            told = self._told.setdefault((cause.code, cause.about), _Told(now_s, now_s))
            told.last_s = now_s
            wording = DETAILS.sub('', cause.sentence)
            if (cause.certain or now_s - told.since_s >= HOLD_S) \
                    and wording not in told.wordings and len(told.wordings) < WORDINGS:
                told.wordings.add(wording)
                lines.append(Line(_level(cause), f'{cause.code}: {cause.sentence}'))
        return lines + self._ended({(cause.code, cause.about) for cause in causes},
                                   _hides_status(causes), now_s)

    def forget_status(self) -> None:
        """Another map: whether the camera was lost in the old one no longer matters."""
        self._told = {key: told for key, told in self._told.items() if key[0] not in TRACKING}

    def forget(self) -> None:
        """Nobody looks any more: what held may or may not be over."""
        self._told.clear()

    def _ended(self, present: set[tuple[str, str]], hides_status: bool, now_s: float
               ) -> list[Line]:
        lines = []
        for key, told in list(self._told.items()):
            code, about = key
            if key in present or (hides_status and code in TRACKING):
                continue
            if told.wordings and now_s - told.last_s < GONE_S:
                continue
            del self._told[key]  # at once, unless it was told: it has to hold without a break
            if told.wordings and code not in EVENTS:
                end = f': {ENDS[code]}' if code in ENDS else f' ({about})' if about else ''
                lines.append(Line('INFO', f'{code} is over{end}'))
        return lines


def _level(cause: Cause) -> Literal['ERROR', 'WARNING']:
    """A camera that is lost only has to move; what blocks otherwise has to be repaired."""
    return 'ERROR' if cause.blocking and cause.code not in TRACKING else 'WARNING'


def _hides_status(causes: Sequence[Cause]) -> bool:
    """The camera may be lost all the same: the status is not a cause while others are."""
    return any(cause.code == 'PAUSED' or (cause.blocking and cause.code not in TRACKING)
               for cause in causes)
