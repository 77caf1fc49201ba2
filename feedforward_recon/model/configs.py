"""Every architecture by name, in the sizes of the published checkpoints.

``build`` makes a network with initial weights, ``load`` one with the weights of a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from feedforward_recon.errors import ConfigError
from feedforward_recon.model.attention.config import SparseLinearOptions, SparseOptions, TttOptions
from feedforward_recon.model.attention.registry import attention_factory, what_is_kept
from feedforward_recon.model.attention.sparse_linear import replace_local
from feedforward_recon.model.backbone import SPECIAL, BackboneConfig
from feedforward_recon.model.da3 import Da3, Da3Config
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.fp8 import PRECISIONS, storage_note
from feedforward_recon.model.pi3 import Pi3, Pi3Config
from feedforward_recon.model.ray_transformer import SPECIAL as RAY_SPECIAL
from feedforward_recon.model.ray_transformer import RayConfig, RayTransformer
from feedforward_recon.model.vggt import Vggt, VggtConfig
from feedforward_recon.model.vit import VitConfig
from feedforward_recon.model.weights.checkpoints import load_weights, tensor_shapes
from feedforward_recon.model.weights.registry import ALIASES, find_weights

log = logging.getLogger(__name__)
Config = VggtConfig | Pi3Config | Da3Config | RayConfig
Network = Vggt | Pi3 | Da3 | RayTransformer

TINY = VggtConfig(BackboneConfig(VitConfig(128, 4, 2, grid=8), 4, (0, 1, 2, 3)),
                  DptConfig(256, 32, (32, 48, 64, 96)), camera_depth=1,
                  point_head=False)
CONFIGS: dict[str, Config] = {
    'vggt-1b': VggtConfig(),
    'vgg-t3': VggtConfig(attention='ttt'),
    'pi3': Pi3Config(),
    'speed3r': Pi3Config(registers=0, attention='sparse'),
    'da3-large': Da3Config(),
    'da3-base': Da3Config(VitConfig(768, 12, 12, registers=0), 4, (5, 7, 9, 11),
                          DptConfig(1536, 128, (96, 192, 384, 768), rectify_skip=False)),
    'da3-small': Da3Config(VitConfig(384, 6, 12, registers=0), 4, (5, 7, 9, 11),
                           DptConfig(768, 64, (48, 96, 192, 384), rectify_skip=False)),
    'lite3r-vggt': VggtConfig(attention='sparse_linear', point_head=False),
    'lite3r-da3': Da3Config(attention='sparse_linear', normalised=False),
    # Shipped with the package: small enough for every machine, for images 112 px wide.
    'tiny': RayConfig(),
    'vggt-tiny': TINY,
    'tiny-ttt': RayConfig(attention='ttt'),
    'tiny-sparse': RayConfig(attention='sparse'),
    'tiny-sla': RayConfig(attention='sparse_linear'),
    # Sizes of the reference outputs that every part is checked against.
    'vggt-small': VggtConfig(
        BackboneConfig(VitConfig(384, 6, 12, grid=5), 4, (0, 1, 2, 3)),
        DptConfig(768, 64, (32, 64, 96, 128))),
    'pi3-small': Pi3Config(VitConfig(384, 6, 12), 24),
}


@dataclasses.dataclass(frozen=True)
class Student:
    """How NAME-ttt and so on, a student of the network NAME, differs from it (docs/students.md).

    attention: where views meet. everywhere: within images, too. options: as for `build`.
    """

    attention: str
    everywhere: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


STUDENTS = {
    'ttt': Student('ttt'),
    'hybrid': Student('hybrid'),
    'sparse': Student('sparse', options={'sparse': SparseOptions(visible_every=100)}),
    'sla': Student('sparse_linear', everywhere=True)}
# What the attentions of a name do, where it is not their default. VGG-T3 was trained with one
# step and evaluated with two, which its paper finds best at every number of images.
OPTIONS: dict[str, dict[str, Any]] = {
    'vgg-t3': {'ttt': TttOptions(steps=2)}}
# Networks whose attentions within images are of the sparse kind too, as Lite3R has them.
SPARSE_EVERYWHERE = {'lite3r-vggt', 'lite3r-da3'}
ALIGNMENT_NAME = re.compile(r'(?:aggregator\.)?latent_alignment\.blocks\.(\d+)\.')


def config_of(name: str, attention: str | None = None) -> Config:
    """The configuration of a name, with another global attention if one is given.

    Raises ConfigError for a name that does not exist.
    """
    config, student = CONFIGS.get(ALIASES.get(name, name)), student_named(name)
    if config is None and student is not None:
        config = dataclasses.replace(CONFIGS[teacher_of(name)], attention=student.attention)
    if config is None:
        near = difflib.get_close_matches(name, [*CONFIGS, *ALIASES], 1)
        hint = f'did you mean {near[0]}?' if near else f'choose one of {", ".join(CONFIGS)}'
        raise ConfigError(f'expected the name of a model, found {name!r}; {hint}')
    return config if attention is None else dataclasses.replace(config, attention=attention)


def student_named(name: str) -> Student | None:
    """What a network of that name is a student in; None for others."""
    return STUDENTS.get(name.rpartition('-')[2]) if teacher_of(name) in CONFIGS else None


def teacher_of(name: str) -> str:
    """The network whose student has that name."""
    teacher = name.rpartition('-')[0]
    return ALIASES.get(teacher, teacher)


def build(name: str, attention: str | None = None, device: str | torch.device = 'cpu', *,
          alignment: int = 0, **options: Any) -> Network:
    """A network in evaluation mode with initial weights (none on the device `meta`).

    attention: another variant for the global blocks than the one of the name.
    alignment: blocks of latent alignment, of networks of the kinds of VGGT and of tiny.
    options: fields of `AttentionConfig`, for example ``ttt=TttOptions(steps=1)``.
    Raises ConfigError for an unknown model or attention.
    """
    config, key, student = config_of(name, attention), ALIASES.get(name, name), student_named(name)
    if alignment:
        config = aligning_config(config, alignment)
    own = OPTIONS.get(key, {}) if student is None else student.options
    everywhere = key in SPARSE_EVERYWHERE if student is None else student.everywhere
    with torch.device(device):
        return network_of(config, everywhere=everywhere, **{**own, **options})


def aligning_config(config: Config, blocks: int) -> Config:
    """The same network with so many blocks of latent alignment.

    Raises ConfigError for networks that decode nothing after they encoded.
    """
    if isinstance(config, RayConfig):
        return dataclasses.replace(config, alignment=blocks)
    if isinstance(config, VggtConfig):
        backbone = dataclasses.replace(config.backbone, alignment=blocks)
        return dataclasses.replace(config, backbone=backbone)
    raise ConfigError('expected a network that can align images between encoding and decoding '
                      f'them, found {type(config).__name__.removesuffix("Config")}; choose vggt, '
                      'vgg-t3 or tiny')


def network_of(config: Config, *, everywhere: bool = False, **options: Any) -> Network:
    """The network of a configuration, in evaluation mode; options as for `build`.

    everywhere: attentions within images are sparse, too.
    """
    factory = attention_factory(config.attention, special=special_tokens(config), **options)
    network = _kind_of(config)(config, factory).eval()
    if everywhere:
        kept = options.get('sparse_linear', SparseLinearOptions())
        replace_local(network, what_is_kept(config.attention, kept), special_tokens(config))
    return network


def _kind_of(config: Config) -> Callable[..., Network]:
    kinds: dict[type, Callable[..., Network]] = {
        Pi3Config: Pi3, Da3Config: Da3, RayConfig: RayTransformer, VggtConfig: Vggt}
    return kinds[type(config)]


def load(name: str, weights: str | Path | None = None, *, attention: str | None = None,
         sha256: str = '', device: str | torch.device = 'cpu', precision: str = 'full',
         **options: Any) -> Network:
    """A network with its weights, on ``device``; nothing exists twice on the way.

    weights: a file, or a name that `ffrecon weights list` shows; without, the checkpoint that is
        named like the network. Where they have latent alignment, so has the network.
    sha256: what the file must hash to; '' skips the check.
    precision: full keeps weights as float32; fp8 keeps them in a quarter (`model.fp8`).
    attention, options: as for `build`.
    Raises ConfigError for an unknown name or precision or a device that is not there,
    CheckpointError for weights that are missing or do not fit (`checkpoints.load_weights`).
    """
    place, fp8 = device_of(device), is_fp8(precision)
    config_of(name, attention)
    file = find_weights(weights or ALIASES.get(name, name))
    network = build(name, attention, 'meta', alignment=alignment_blocks(tensor_shapes(file)),
                    **options)
    load_weights(network, file, sha256=sha256, device=place, fp8=fp8)
    if fp8:
        log.info('%s', storage_note(place))
    return network


def is_fp8(precision: str) -> bool:
    """Whether weights of that precision are kept in fp8.

    Raises ConfigError for a precision that does not exist.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f'expected {" or ".join(PRECISIONS)} as precision of the weights, found '
                          f'{precision!r}; choose one of them')
    return precision == 'fp8'


def alignment_blocks(names: Iterable[str]) -> int:
    """How many blocks of latent alignment the weights of these names have."""
    return len({match[1] for name in names if (match := ALIGNMENT_NAME.match(name))})


def device_of(name: str | torch.device) -> torch.device:
    """The device of that name, after making sure that it works.

    Raises ConfigError when it does not.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        log.debug('device %s: %s', name, error)
        raise ConfigError(f'expected a device that this machine has, such as cpu or cuda, found '
                          f'{str(name)!r}; use cpu, or install a driver and a PyTorch that fit'
                          ) from error
    return device


def special_tokens(config: Config) -> int:
    """Number of tokens before the patches of each frame."""
    if isinstance(config, Pi3Config):
        return config.registers
    if isinstance(config, RayConfig):
        return RAY_SPECIAL
    return 1 if isinstance(config, Da3Config) else SPECIAL
