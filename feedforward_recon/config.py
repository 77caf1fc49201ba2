"""Every setting, declared once: name, default, unit, range and meaning.

The CLI, the saved map and the ROS parameters all walk these dataclasses; nothing is listed
twice. Budgets are counts (steps, points, slots), never seconds, so results repeat.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, TypeVar

from feedforward_recon.errors import ConfigError

T = TypeVar('T')


def option(default: Any, doc: str, *, low: float | None = None, high: float | None = None,
           unit: str = '', choices: tuple[str, ...] = ()) -> Any:
    """Declare a dataclass field with its documentation, unit and range [low, high]."""
    metadata = {'doc': doc, 'low': low, 'high': high, 'unit': unit, 'choices': choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class EncoderConfig:
    """What the image encoder looks at."""

    long_side: int = option(640, 'images are resized to this longer side', low=128, high=2048,
                            unit='px')
    max_keypoints: int = option(1000, 'keypoints described per image', low=50, high=4000)


@dataclass(frozen=True)
class MemoryConfig:
    """Size and training budget of the scene memory."""

    hidden_dim: int = option(256, 'width of the coordinate network', low=32, high=1024)
    blocks: int = option(3, 'residual blocks of the coordinate network', low=1, high=8)
    slots: int = option(16000, 'landmark slots; 0 keeps the coordinate network alone', low=0,
                        high=200_000)
    reservoir: int = option(150_000, 'training samples kept for fitting', low=1000,
                            high=2_000_000)
    batch: int = option(4096, 'samples per optimisation step', low=64, high=65_536)
    steps_per_keyframe: int = option(5, 'optimisation steps after each keyframe', low=0,
                                     high=200)
    polish_steps: int = option(1500, 'optimisation steps when mapping ends', low=0, high=50_000)
    seed: int = option(0, 'seed of every random choice', low=0)


@dataclass(frozen=True)
class LocalizerConfig:
    """How a pose is found from the memory, and when it is refused."""

    min_inliers: int = option(30, 'fewest matches that must agree with a pose', low=6)
    reprojection_px: float = option(3.0, 'inlier threshold in the encoder image', low=0.5,
                                    high=20, unit='px')
    seed: int = option(0, 'seed of the robust estimator', low=0)


@dataclass(frozen=True)
class MapperConfig:
    """All settings of a mapping or localisation run."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    localizer: LocalizerConfig = field(default_factory=LocalizerConfig)


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
    default = (spec.default if spec.default is not dataclasses.MISSING
               else spec.default_factory())  # type: ignore[misc]
    if dataclasses.is_dataclass(default):
        if not isinstance(value, dict):
            raise ConfigError(f'expected a group of settings at {name}, found {value!r}')
        return from_dict(type(default), value, f'{name}.')
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise ConfigError(f'expected {type(default).__name__} for {name}, '
                          f'found {value!r} ({type(value).__name__})')
    _check_range(spec, value, name)
    return value


def _check_range(spec: dataclasses.Field, value: Any, name: str) -> None:
    low, high = spec.metadata.get('low'), spec.metadata.get('high')
    choices = spec.metadata.get('choices')
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(f'expected {name} within [{low}, {high}], found {value!r}')
    if choices and value not in choices:
        raise ConfigError(f'expected {name} to be one of {choices}, found {value!r}')
