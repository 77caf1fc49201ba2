"""The law of fixed memory: bytes and seconds per keyframe do not grow with the walk.

Every frame of the kitchen becomes a keyframe and the walk is gone back as well, so that it is
long enough to show it. Writing alone is measured with new places lap by lap, so that the table of
slots is full long before the end.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.common import KITCHEN, load_frames
from benchmarks.ours import map_frames
from feedforward_recon.config.schema import MapperConfig
from feedforward_recon.console.threads import one_thread
from feedforward_recon.mapping.mapper import Mapper
from feedforward_recon.memory.writer import MemoryWriter
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.types import Frame

COUNTS = (50, 100, 200, 300, 400, 500)
WRITTEN = (50, 100, 200, 300, 500, 1000)
WINDOW = 25  # keyframes whose median time stands for "now"
APART_M = 20.0  # of one copy of the kitchen from the next: none shows another


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Both laws."""
    yield from whole_loop()
    yield from writing()


def whole_loop() -> Iterator[tuple[str, dict[str, Any]]]:
    """Memory bytes, and seconds of a keyframe in the whole loop, as keyframes accumulate."""
    every_frame = dataclasses.replace(MapperConfig().keyframes, min_gap=1, max_gap=1)
    config = dataclasses.replace(MapperConfig(), keyframes=every_frame)
    encoder = CompactEncoder.load(config=config.encoder)
    writer = MemoryWriter(config.memory, encoder.dim)
    mapper = Mapper(config, encoder, writer)
    seconds: list[float] = []
    for frame in there_and_back(load_frames(KITCHEN)):
        started = time.process_time()
        estimate = mapper.process(frame)
        if estimate.is_keyframe:
            seconds.append(time.process_time() - started)
            if len(seconds) in COUNTS:
                yield f'{len(seconds)} keyframes', {
                    'nbytes': writer.snapshot().nbytes,
                    'cpu_seconds_per_keyframe': float(np.median(seconds[-WINDOW:])),
                    'cpu_seconds_worst': float(np.max(seconds[-WINDOW:]))}


def writing() -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of writing the memory alone, with a kitchen that was not seen before every lap."""
    lap = map_frames(load_frames(KITCHEN), given_poses=True).scene.keyframes
    writer, seconds = MemoryWriter(MapperConfig().memory, lap[0].features.descriptors.shape[1]), []
    with one_thread():
        for number in range(WRITTEN[-1]):
            keyframe, T = lap[number % len(lap)], np.eye(4)
            T[0, 3] = APART_M * (number // len(lap))
            keyframe = dataclasses.replace(keyframe, id=number, T_map_cam=T @ keyframe.T_map_cam)
            started = time.process_time()
            writer.write(keyframe)
            seconds.append(time.process_time() - started)
            if number + 1 in WRITTEN:
                yield f'{number + 1} keyframes, writing alone', {
                    'nbytes': writer.snapshot().nbytes,
                    'cpu_seconds_per_keyframe': float(np.median(seconds[-WINDOW:])),
                    'cpu_seconds_worst': float(np.max(seconds[-WINDOW:]))}


def there_and_back(walk: Iterable[Frame]) -> Iterator[Frame]:
    """The frames of a walk, then in reverse, with stamps that go on."""
    frames = list(walk)
    yield from frames
    last_ns = frames[-1].stamp_ns
    for frame in frames[-2::-1]:
        yield dataclasses.replace(frame, stamp_ns=2 * last_ns - frame.stamp_ns)
