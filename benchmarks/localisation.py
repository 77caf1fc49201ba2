"""Finding held-out images in a memory: both splits, and what each half of the memory does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.common import KITCHEN, data_root, load_frames, true_trajectory
from benchmarks.ours import Answerer, alignment_to, map_frames
from benchmarks.scoring import extrapolation_split, interleaved_split, localisation_entry
from feedforward_recon.config.schema import MapperConfig, MemoryConfig
from feedforward_recon.io import SourceOptions, open_source
from feedforward_recon.memory.writer import MemoryWriter
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.types import Frame

SMALLEST_NETWORK = {'hidden_dim': 32, 'blocks': 1}
WRONG_PLACES = 100


def run() -> Iterator[tuple[str, dict[str, Any]]]:
    """Given poses (hybrid and each half at equal bytes), then our own poses."""
    frames = load_frames(KITCHEN)
    for split, (mapped, query) in {'interleaved': interleaved_split(len(frames)),
                                   'extrapolation': extrapolation_split(len(frames))}.items():
        known, unknown = [frames[i] for i in mapped], [frames[i] for i in query]
        for name, config in variants().items():
            yield f'{KITCHEN} {split} | {name}', given_poses(known, unknown, config)
        yield f'{KITCHEN} {split} | hybrid, own RGB-D poses', own_poses(known, unknown)


def variants() -> dict[str, MapperConfig]:
    """The default memory, and the coordinate network or the slots alone at the same bytes."""
    hybrid = MapperConfig()
    budget = nbytes(hybrid.memory)
    wider = (dataclasses.replace(hybrid.memory, slots=0, hidden_dim=width)
             for width in itertools.count(hybrid.memory.hidden_dim, 8))
    network = _last_within(budget, wider)
    more = (dataclasses.replace(hybrid.memory, slots=slots, **SMALLEST_NETWORK)
            for slots in itertools.count(hybrid.memory.slots, 100))
    slots = _last_within(budget, more)
    slots_only = dataclasses.replace(hybrid.localizer, network_candidates=0)
    return {'hybrid': hybrid,
            'network only': dataclasses.replace(hybrid, memory=network),
            'slots only': dataclasses.replace(hybrid, memory=slots, localizer=slots_only)}


def nbytes(memory: MemoryConfig) -> int:
    """Bytes of a memory, known before anything is written."""
    return MemoryWriter(memory, CompactEncoder.load().dim).snapshot().nbytes


def _last_within(budget: int, configs: Iterator[MemoryConfig]) -> MemoryConfig:
    return list(itertools.takewhile(lambda memory: nbytes(memory) <= budget, configs))[-1]


def given_poses(known: list[Frame], unknown: list[Frame], config: MapperConfig) -> dict[str, Any]:
    """Map with the true poses, localise the rest."""
    mapped = map_frames(known, config, given_poses=True)
    row = localisation_entry(Answerer(mapped, config), unknown, mapped.memory.nbytes,
                             mapped.mapping)
    return {**row, 'polish_seconds': mapped.polish.seconds}


def own_poses(known: list[Frame], unknown: list[Frame]) -> dict[str, Any]:
    """Map without poses; the answers are moved to the ground truth by one rigid transform."""
    mapped = map_frames(known)
    to_truth = alignment_to(true_trajectory(known), mapped.scene.trajectory, with_scale=False)
    row = localisation_entry(Answerer(mapped, to_truth=to_truth), unknown, mapped.memory.nbytes,
                             mapped.mapping)
    return {**row, 'polish_seconds': mapped.polish.seconds}


def run_wrong_places() -> Iterator[tuple[str, dict[str, Any]]]:
    """Images of other scenes, with their own cameras, against the memory of the kitchen."""
    frames = load_frames(KITCHEN)
    known = [frames[i] for i in interleaved_split(len(frames))[0]]
    answer = Answerer(map_frames(known, given_poses=True))
    strangers = other_scenes()
    accepted = [frame.source for frame in strangers if answer(frame) is not None]
    yield f'{KITCHEN} | other scenes', {'images': len(strangers), 'accepted': len(accepted),
                                        'which': accepted}


def other_scenes() -> list[Frame]:
    """``WRONG_PLACES`` images, in turn from every other set that has cameras."""
    options = SourceOptions(mixed_sizes=True)
    sources = [iter(open_source(folder, options)) for folder in sorted(data_root().iterdir())
               if folder.name != KITCHEN and (folder / 'cameras.json').exists()]
    frames: list[Frame] = []
    while sources and len(frames) < WRONG_PLACES:
        source = sources.pop(0)
        frame = next(source, None)
        if frame is not None:
            sources.append(source)
            if frame.camera is not None:
                frames.append(frame)
    return frames
