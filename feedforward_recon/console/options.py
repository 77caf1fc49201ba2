"""Options that several commands share, each declared once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer
import yaml

from feedforward_recon.config.files import mapper_settings
from feedforward_recon.config.network import PRECISIONS, ModelOptions
from feedforward_recon.config.schema import MapperConfig, from_dict, option, to_dict
from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.io import SourceOptions
from feedforward_recon.io.writers import MAP_MARKER
from feedforward_recon.session.map_folder import check_map_output

C = TypeVar('C', bound=MapperConfig)
SOURCE_HELP = 'Folder of images, image, video file or ROS 2 bag.'
Source = Annotated[Path, typer.Argument(help=SOURCE_HELP, metavar='SOURCE', show_default=False)]
MapFolder = Annotated[Path, typer.Argument(help='Folder that `ffrecon map --out` wrote.',
                                           metavar='MAP', show_default=False)]
Json = Annotated[bool, typer.Option('--json', help='Print JSON only.')]
Config = Annotated[Path | None, typer.Option(
    '--config', help='YAML file of settings, see config/*.yaml; keys left out keep their '
    'defaults.', show_default=False, rich_help_panel='Settings')]
NewMap = Annotated[Path, typer.Option('--out', '-o', help='Map folder to write.',
                                      show_default=False)]
Overwrite = Annotated[bool, typer.Option('--overwrite', help='Replace a map that is already at '
                                         '--out.')]
Set = Annotated[list[str] | None, typer.Option(
    '--set', help='One setting, such as memory.slots=8000; may be repeated.',
    show_default=False, metavar='NAME=VALUE', rich_help_panel='Settings')]
Weights = Annotated[Path | None, typer.Option(
    '--encoder', help='Encoder weights of your own (ffrecon-train encoder); default: the ones '
    'shipped.', show_default=False, rich_help_panel='Settings')]


@dataclasses.dataclass(frozen=True)
class Flag:
    """How a field of a dataclass looks on the command line."""

    name: str
    help: str
    panel: str | None = None
    parser: Callable[[str], Any] | None = None
    metavar: str | None = None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(','))
    except ValueError:
        raise ConfigError(f'expected numbers separated by commas, found {text!r}') from None


SOURCE_FLAGS = {
    'fx': Flag('--fx', 'Focal length; replaces what the source says.', 'Camera', metavar='PX'),
    'fy': Flag('--fy', 'Vertical focal length; default: fx.', 'Camera', metavar='PX'),
    'cx': Flag('--cx', 'Principal point; default: the middle.', 'Camera', metavar='PX'),
    'cy': Flag('--cy', 'Principal point; default: the middle.', 'Camera', metavar='PX'),
    'distortion': Flag('--distortion', 'k1,k2,p1,p2[,k3[,k4,k5,k6]] as OpenCV orders them, or '
                       'k1,k2,k3,k4 with --distortion-model fisheye.', 'Camera', numbers,
                       'K1,K2,...'),
    'distortion_model': Flag('--distortion-model', 'plumb_bob, rational or fisheye; default: '
                             'by the number of coefficients.', 'Camera', metavar='MODEL'),
    'fov_deg': Flag('--fov', 'Horizontal field of view, instead of --fx.', 'Camera',
                    metavar='DEG'),
    'calibration': Flag('--calibration', 'YAML file of ROS camera_calibration, instead of '
                        '--fx.', 'Camera', metavar='FILE'),
    'camera': Flag('--camera', 'Camera of a stereo set.', 'Source', metavar='NAME'),
    'baseline_m': Flag('--baseline', 'Baseline of rectified images in the folders left and right, '
                       'with --fx.', 'Camera', metavar='M'),
    'image_topic': Flag('--image-topic', 'Bag topic; default: the only one.', 'Source',
                        metavar='TOPIC'),
    'right_image_topic': Flag('--right-image-topic', 'Bag topic of the right images of a stereo '
                              'pair; default: the one called right where the images are called '
                              'left.', 'Source', metavar='TOPIC'),
    'depth_topic': Flag('--depth-topic', 'Bag topic; default: the only one.', 'Source',
                        metavar='TOPIC'),
    'camera_info_topic': Flag('--camera-info-topic', 'Bag topic; default: the one beside the '
                              'images.', 'Source', metavar='TOPIC'),
    'rectified': Flag('--rectified', 'Images are rectified: the projection matrix P of '
                      'CameraInfo holds, its distortion does not.', 'Source'),
    'depth_units_per_metre': Flag('--depth-units', 'Stored depth per metre (1000: millimetres); '
                                  'default: as the format says.', 'Source', metavar='NUMBER'),
    'step': Flag('--step', 'Use every STEP-th image.', 'Source', metavar='STEP'),
    'max_frames': Flag('--max-frames', 'Use at most so many images.', 'Source',
                       metavar='COUNT'),
}


def takes(cls: type, parameter: str, flags: Mapping[str, Flag]) -> Callable[[Callable], Callable]:
    """Give a command one option per field of a dataclass named in ``flags``.

    The command itself takes the built dataclass as ``parameter``; defaults are those of the
    fields, so nothing is declared twice.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    types = get_type_hints(cls)

    def added() -> list[inspect.Parameter]:
        return [_parameter(fields[name], types[name], flag) for name, flag in flags.items()]

    def decorate(command: Callable) -> Callable:
        hints = get_type_hints(command, include_extras=True)
        own = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
               for p in inspect.signature(command).parameters.values() if p.name != parameter]

        def wrapper(**values: Any) -> Any:
            chosen = {name: values.pop(name) for name in flags}
            given = {name: _converted(flags[name], value) for name, value in chosen.items()
                     if value is not None}
            return command(**values, **{parameter: cls(**given)})

        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        signature = inspect.Signature([*own, *added()])
        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return wrapper

    return decorate


def _converted(flag: Flag, value: Any) -> Any:
    return flag.parser(value) if flag.parser else value


def _parameter(field: dataclasses.Field, type_: Any, flag: Flag) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
    if flag.parser:  # the text is converted when the command runs
        type_, default = str | None, None
    option: Any = typer.Option(flag.name, help=flag.help, rich_help_panel=flag.panel,
                               metavar=flag.metavar, show_default=default not in (None, ''))
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default,
                             annotation=Annotated[type_, option])


takes_source_options = takes(SourceOptions, 'options', SOURCE_FLAGS)


@dataclasses.dataclass(frozen=True)
class NetworkOptions(ModelOptions):
    """Which network maps a recording. refine: see ``mapping.windows``."""

    refine: bool = option(True, 'bundle adjustment at the end, and a second look at each image')

    def __post_init__(self) -> None:
        """Refuse what only a feed-forward network has."""
        self.check({name: flag.name for name, flag in MODEL_FLAGS.items()})


def _described(doc: str) -> str:
    return f'{doc[0].upper()}{doc[1:]}.'


METAVARS = {'window': 'COUNT', 'anchors': 'COUNT', 'weights': 'FILE|NAME', 'refine': None,
            'precision': '|'.join(PRECISIONS)}
MODEL_FLAGS = {
    spec.name: Flag('--refine/--no-refine' if spec.name == 'refine' else f'--{spec.name}',
                    _described(spec.metadata['doc']), 'Network',
                    metavar=METAVARS.get(spec.name, 'NAME'))
    for spec in dataclasses.fields(NetworkOptions)}
takes_model_options = takes(NetworkOptions, 'network', MODEL_FLAGS)
takes_network = takes(NetworkOptions, 'network', {
    name: MODEL_FLAGS[name] for name in ('model', 'attention', 'device', 'weights', 'precision')})


def settings(base: C, file: Path | None, assignments: list[str] | None) -> C:
    """``base``, changed by a YAML file (a ROS parameter file too) and then by NAME=VALUE.

    Raises ConfigError for an unreadable file, an unknown name or a value out of range.
    """
    values = to_dict(base)
    if file is not None:
        _merge(values, mapper_settings(file, type(base)))
    for assignment in assignments or ():
        _merge(values, _nested(assignment))
    return from_dict(type(base), values)


def _nested(assignment: str) -> dict[str, Any]:
    name, equals, text = assignment.partition('=')
    if not equals:
        raise ConfigError(f'expected NAME=VALUE, found {assignment!r}')
    try:
        nested: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f'expected a value for {name}, found {text!r}') from None
    for key in reversed(name.strip().split('.')):
        nested = {key: nested}
    return nested


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output that cannot be written or would replace a map.

    Raises InputError.
    """
    check_map_output(out)
    if not overwrite and (out / MAP_MARKER).exists():
        raise InputError(f'{out}: expected no map yet, found one; choose another --out or add '
                         '--overwrite')
