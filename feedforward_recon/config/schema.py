"""Every setting, declared once: name, default, unit, range and meaning.

The CLI, the saved map and the ROS parameters all walk these dataclasses; nothing is listed
twice. Budgets are counts (steps, points, slots), never seconds, so results repeat.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from feedforward_recon.errors import ConfigError

T = TypeVar('T')


def option(default: Any, doc: str, *, low: float | None = None, high: float | None = None,
           unit: str = '', choices: tuple[str, ...] = (), live: bool = False,
           fixed: bool = False) -> Any:
    """Declare a dataclass field with its documentation, unit and range [low, high].

    live: a running node may change it; fixed: only the start of a node decides it; the others
    take effect when a node is configured.
    """
    metadata = {'doc': doc, 'low': low, 'high': high, 'unit': unit, 'choices': choices,
                'live': live, 'fixed': fixed}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class EncoderConfig:
    """What the image encoder looks at."""

    max_pixels: int = option(307_200, 'larger images are scaled down to this many pixels',
                             low=10_000, high=4_000_000, unit='px')
    max_keypoints: int = option(1000, 'keypoints described per image', low=50, high=4000)
    spacing_px: int = option(5, 'least distance of two keypoints', low=1, high=100, unit='px')


@dataclass(frozen=True)
class MemoryConfig:
    """Size of the scene memory."""

    slots: int = option(38_000, 'landmark slots; 0 keeps the coordinate network alone', low=0,
                        high=200_000)
    tables: int = option(4, 'tables of the coordinate network: more of them know fewer things '
                         'better', low=1, high=8)
    cells: int = option(0, 'cells in each table of the coordinate network; 0 keeps the '
                        'landmark slots alone', low=0, high=1_000_000)
    samples: int = option(100_000, 'written into the coordinate network at most; kept to be '
                          'moved with their keyframes', low=1000, high=2_000_000)


@dataclass(frozen=True)
class LocalizerConfig:
    """How a pose is found from the memory, and when it is refused."""

    slot_queries: int = option(400, 'most confident features that are matched to all slots',
                               low=50, high=4000)
    network_candidates: int = option(200, 'surest answers of the coordinate network in which a '
                                     'pose is looked for; 0 does not ask it at all', low=0,
                                     high=4000)
    min_similarity: float = option(0.6, 'lowest cosine of two descriptors that may match',
                                   low=0.0, high=1.0)
    search_px: float = option(8.0, 'agreement threshold of the robust search', low=0.5,
                              high=50.0, unit='px')
    search_iterations: int = option(500, 'samples of the robust search', low=10, high=100_000)
    sure_share: float = option(0.15, 'landmarks seen once, then all features are compared, and '
                               'the network is asked, unless this share of the matches agrees '
                               'with one pose', low=0.0,
                               high=1.0)
    rematch_radius: float = option(0.03, 'radius of the guided re-matching, as a share of the '
                                   'image width', low=0.005, high=0.5)
    rematch_similarity: float = option(0.75, 'lowest cosine of a guided match', low=0.0,
                                       high=1.0)
    min_votes: int = option(10, 'fewest candidates that must agree with a first pose', low=6)
    min_inliers: int = option(25, 'fewest matches that must agree with the final pose', low=6)
    min_score: float = option(0.02, 'lowest share of candidates that must agree', low=0.0,
                              high=1.0)
    max_runner_up: float = option(0.6, 'refuse when another pose has this share of the score',
                                  low=0.0, high=1.0)
    refuse_lookalikes: bool = option(True, 'refuse an answer whose matches are in other places of '
                                     'the map too, or that the rest of the image contradicts')
    followed_images: int = option(10, 'images of a stream whose pose is followed from one '
                                  'answer of the memory to the next; 0 asks for each image',
                                  low=0, high=1000)
    seed: int = option(0, 'seed of the robust estimator', low=0)


@dataclass(frozen=True)
class TrackingConfig:
    """How image points are followed and how the camera pose of a frame is found."""

    max_tracks: int = option(400, 'landmarks followed at once', low=30, high=4000)
    flow_window_px: int = option(15, 'side of the optical flow window', low=5, high=61,
                                 unit='px')
    flow_levels: int = option(3, 'pyramid levels above the full image', low=0, high=8)
    flow_roundtrip_px: float = option(0.8, 'largest forward-backward error of a track', low=0.1,
                                      high=10, unit='px')
    outlier_px: float = option(3.0, 'residual beyond which a track is dropped', low=0.5,
                               high=50, unit='px')
    depth_noise: float = option(0.004, 'least noise of the inverse depth of depth images; the '
                                'map measures how much more there is', low=1e-5, high=1,
                                unit='1/m')
    stereo_noise_px: float = option(0.3, 'noise of a disparity between left and right image',
                                    low=0.01, high=10, unit='px')
    min_disparity_px: float = option(3.0, 'points that left and right image show with less '
                                     'between them are too far for a depth', low=0.1, high=100,
                                     unit='px')
    max_depth_m: float = option(8.0, 'sensor depth beyond this is ignored', low=0.1, high=1000,
                                unit='m')
    min_inliers: int = option(20, 'fewest landmarks that must agree with a pose', low=6,
                              high=1000)
    relocalise_inliers: int = option(50, 'fewest landmarks that must agree with the pose of a '
                                     'camera that was lost', low=6, high=1000)
    match_similarity: float = option(0.75, 'smallest cosine similarity of matching descriptors',
                                     low=0, high=1)
    guessed_fov_deg: float = option(65.0, 'horizontal field of view assumed of an uncalibrated '
                                    'camera', low=10, high=170, unit='deg')
    seed: int = option(0, 'seed of the robust estimators', low=0)


@dataclass(frozen=True)
class KeyframeConfig:
    """When a frame is worth keeping."""

    min_gap: int = option(2, 'fewest frames between keyframes', low=1, high=1000)
    max_gap: int = option(30, 'a moving camera gets a keyframe after this many frames', low=1,
                          high=10_000)
    motion_share: float = option(0.06, 'median image motion since the last keyframe, as a share '
                                 'of the image width', low=0.005, high=1)
    tracked_share: float = option(0.7, 'share of the tracks of the last keyframe below which a '
                                  'keyframe is due', low=0.05, high=1)
    min_sharpness: float = option(0.4, 'sharpness relative to recent frames below which a frame '
                                  'is not kept', low=0, high=1)
    init_motion_share: float = option(0.03, 'median image motion that starts a monocular map, '
                                      'as a share of the image width', low=0.005, high=0.5)
    saved: int = option(200, 'keyframes in a saved map that later sessions go on from, about '
                        '0.2 MB each; those that span the walk best', low=10, high=10_000)
    min_parallax_deg: float = option(0.6, 'smallest angle between rays that triangulates a '
                                     'landmark', low=0.1, high=30, unit='deg')


@dataclass(frozen=True)
class RefineConfig:
    """Bundle adjustment: sliding window and whole map."""

    window: int = option(12, 'newest keyframes refined after each keyframe', low=2, high=50)
    window_fixed: int = option(20, 'older keyframes that hold the window', low=1, high=200)
    window_steps: int = option(4, 'optimisation steps after each keyframe', low=0, high=100)
    loop_steps: int = option(4, 'optimisation steps over the whole map after a loop', low=0,
                             high=100)
    global_steps: int = option(15, 'optimisation steps over the whole map', low=0, high=500)
    max_keyframes: int = option(400, 'keyframes refined at once; older ones hold', low=10,
                                high=5000)
    robust_px: float = option(1.5, 'residual beyond which an observation loses weight', low=0.1,
                              high=50, unit='px')


@dataclass(frozen=True)
class LoopConfig:
    """Recognising places seen before."""

    every: int = option(3, 'keyframes between searches for loops', low=1, high=1000)
    candidates: int = option(3, 'old keyframes verified per keyframe', low=0, high=50)
    min_age: int = option(8, 'keyframes between a loop and its candidate', low=2, high=1000)
    min_inliers: int = option(30, 'fewest matches that must agree with a loop', low=8, high=1000)
    correct_px: float = option(3.0, 'map error in the image beyond which a loop corrects the '
                               'whole trajectory at once', low=1, high=500, unit='px')


@dataclass(frozen=True)
class CloudConfig:
    """The coloured point cloud."""

    voxel_m: float = option(0.02, 'one point per cube of this side; without metric scale in '
                            'units of the median scene depth / 2', low=1e-4, high=10, unit='m')
    max_points: int = option(500_000, 'largest number of points', low=1000, high=50_000_000)
    stride_px: int = option(4, 'every how many pixels depth is sampled', low=1, high=64,
                            unit='px')
    dense: bool = option(False, 'a dense cloud without a depth sensor: depth of the network tiny, '
                         'bent to the landmarks of the map')


@dataclass(frozen=True)
class MapperConfig:
    """All settings of a mapping or localisation run."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    localizer: LocalizerConfig = field(default_factory=LocalizerConfig,
                                       metadata={'live': True})
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    keyframes: KeyframeConfig = field(default_factory=KeyframeConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    loops: LoopConfig = field(default_factory=LoopConfig)
    cloud: CloudConfig = field(default_factory=CloudConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionary of a configuration, for YAML."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str = '') -> T:
    """Build a configuration from a nested dictionary; missing keys keep their defaults.

    Raises ConfigError for unknown keys (naming the nearest), wrong types and values out of
    range.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f'{where}{key}'
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f'; did you mean {where}{near[0]}?' if near else f'; known: {sorted(fields)}'
            raise ConfigError(f'unknown setting {name}{hint}')
        arguments[key] = _checked(fields[key], value, name)
    return cls(**arguments)


def _checked(spec: dataclasses.Field, value: Any, name: str) -> Any:
    default = spec.default
    if spec.default_factory is not dataclasses.MISSING:
        default = spec.default_factory()
    if dataclasses.is_dataclass(default):
        if not isinstance(value, dict):
            raise ConfigError(f'expected a group of settings at {name}, found {value!r}')
        return from_dict(type(default), value, f'{name}.')
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    if type(value) is not type(default):
        raise ConfigError(f'expected {type(default).__name__} for {name}, '
                          f'found {value!r} ({type(value).__name__})')
    _check_range(spec, value, name)
    return value


def _check_range(spec: dataclasses.Field, value: Any, name: str) -> None:
    low, high = spec.metadata.get('low'), spec.metadata.get('high')
    choices = spec.metadata.get('choices')
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f'expected a finite number for {name}, found {value!r}')
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(f'expected {name} within [{low}, {high}], found {value!r}')
    if choices and value not in choices:
        raise ConfigError(f'expected {name} to be one of {choices}, found {value!r}')


def as_yaml(config: Any, indent: str = '', skip: Collection[str] = ()) -> str:
    """A configuration as YAML text, each value with its meaning, unit and range beside it.

    Single settings come before groups of settings; fields named in ``skip`` are left out.
    """
    lines = []
    specs = [spec for spec in dataclasses.fields(config) if spec.name not in skip]
    for spec in sorted(specs, key=lambda spec: dataclasses.is_dataclass(getattr(config,
                                                                                spec.name))):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            summary = (type(value).__doc__ or '').strip().splitlines()[0]
            lines += [f'{indent}{spec.name}:  # {summary}', as_yaml(value, indent + '  ')]
        else:
            text = list(value) if isinstance(value, tuple) else value
            lines.append(f'{indent}{spec.name}: {json.dumps(text)}  # {_described(spec)}')
    return '\n'.join(lines)


def limits(spec: dataclasses.Field) -> str:
    """The values that a setting allows, as words: '>= 0, <= 1', 'raw | compressed' or ''."""
    low, high = spec.metadata.get('low'), spec.metadata.get('high')
    edges = [text for text, limit in ((f'>= {low}', low), (f'<= {high}', high))
             if limit is not None]
    return ', '.join(edges) or ' | '.join(spec.metadata.get('choices', ()))


def _described(spec: dataclasses.Field) -> str:
    notes = '; '.join(filter(None, (spec.metadata.get('unit'), limits(spec))))
    return spec.metadata['doc'] + (f' [{notes}]' if notes else '')
