"""Health as people and programs read it: a report for ``~/doctor``, a message for /diagnostics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from feedforward_recon.ros.diagnosis import Diagnosis
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.input_health import InputHealth
from feedforward_recon.ros.meters import SECOND

LEVELS = {'OK': DiagnosticStatus.OK, 'WARN': DiagnosticStatus.WARN,
          'ERROR': DiagnosticStatus.ERROR, 'STALE': DiagnosticStatus.STALE}


def diagnostic_status(health: Health, found: Sequence[Diagnosis], now_ns: int) -> DiagnosticStatus:
    """The report as a message: level, first diagnosis, and every number as text."""
    values = report(health, found, now_ns)
    level_, message = LEVELS[values.pop('level')], values.pop('summary')
    pairs = [KeyValue(key=key, value=text) for key, text in _flat(values)]
    return DiagnosticStatus(level=level_, name=health.name, message=message, values=pairs)


def report_json(health: Health, found: Sequence[Diagnosis], now_ns: int) -> str:
    """The report as JSON text on one line."""
    return json.dumps(report(health, found, now_ns), allow_nan=False)


def report(health: Health, found: Sequence[Diagnosis], now_ns: int) -> dict[str, Any]:
    """Plain values: level, summary, diagnoses as causes, state, counts, times, every input."""
    latency = health.latency.at(50, 95, 99)
    return {
        'level': level(health, found),
        'summary': found[0].sentence if found else
        health.status if health.state == 'active' else health.state,
        'causes': [{'code': c.code, 'sentence': c.sentence, 'blocking': c.blocking}
                   for c in found],
        'state': health.state, 'paused': health.paused, 'mode': health.mode,
        'status': health.status, 'reason': health.reason,
        'frames': health.frames, 'dropped': health.dropped, 'refused': health.refused,
        'pose_rate_hz': round(health.poses.rate_hz(now_ns), 2),
        'latency_ms': dict(zip(('p50', 'p95', 'p99'), (round(v, 1) for v in latency),
                               strict=True)) if latency else None,
        'keyframes': health.keyframes, 'memory_bytes': health.memory_bytes,
        'window': health.window or None,
        'scale_source': health.scale_source, 'camera_source': health.camera_source,
        'camera_info': health.camera_info.value, 'tf_mode': health.tf_mode,
        'use_sim_time': health.use_sim_time,
        'inputs': {kind: _input(input_, now_ns) for kind, input_ in health.inputs.items()},
        'conversions': dict(health.conversions),
        'noticed': {w.code: w.times for w in health.warnings.values()},
    }


def level(health: Health, found: Sequence[Diagnosis]) -> str:
    """OK, WARN (works, but), ERROR (cannot work) or STALE (worked until the camera stopped)."""
    if not found:
        return 'OK'
    if found[0].code == 'SILENT' and health.frames:
        return 'STALE'
    return 'ERROR' if any(diagnosis.blocking for diagnosis in found) else 'WARN'


def _input(input_: InputHealth, now_ns: int) -> dict[str, Any]:
    connection, traffic = input_.connection, input_.traffic
    publishers = None if connection.publishers is None else [
        {'node': p.node, 'reliability': _reliability(p.reliable)} for p in connection.publishers]
    stamped = traffic.stamp_ns is not None
    return {
        'topic': input_.topic, 'needed': input_.needed, 'publishers': publishers,
        'subscribed': _reliability(connection.reliable), 'messages': traffic.messages,
        'rate_hz': round(traffic.rate.rate_hz(now_ns), 2), 'lost': connection.lost,
        'frame_id': traffic.frame_id,
        'size': f'{traffic.size_wh[0]}x{traffic.size_wh[1]}' if traffic.size_wh else None,
        'clock_minus_stamp_s': round(traffic.offset_ns / SECOND, 3) if stamped else None,
        'stamp_faults': {fault.value: n for fault, n in traffic.faults.items()},
    }


def _reliability(reliable: bool) -> str:
    return 'reliable' if reliable else 'best_effort'


def _flat(values: dict[str, Any], where: str = '') -> Iterator[tuple[str, str]]:
    """Nested values as (dotted name, text), lists in one line."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{where}{key}.')
        elif isinstance(value, list):
            yield f'{where}{key}', '; '.join(
                item.get('code') or ' '.join(map(str, item.values())) for item in value)
        elif value is not None:
            yield f'{where}{key}', str(value)
