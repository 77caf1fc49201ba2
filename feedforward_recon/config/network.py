"""Which network maps, and how: declared once, for the command line and for the nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from feedforward_recon.config.schema import option
from feedforward_recon.errors import ConfigError

# The names that can be chosen; `model.configs` and `model.attention.registry` make what they name,
# and a test compares them.
NETWORKS = ('vggt', 'vgg-t3', 'pi3', 'speed3r', 'da3', 'tiny', 'tiny-ttt', 'tiny-sparse',
            'tiny-sla')
MORE_NETWORKS = ('vggt-1b', 'da3-large', 'da3-base', 'da3-small', 'lite3r-vggt', 'lite3r-da3')
ATTENTIONS = ('softmax', 'ttt', 'sparse', 'sparse_linear', 'lite3r', 'latent', 'hybrid')
PRECISIONS = ('full', 'fp8')


@dataclass(frozen=True)
class ModelOptions:
    """The network that maps; ``compact`` is the encoder with closed-form geometry.

    attention and weights: '' are those of the model. window, anchors: see ``mapping.windows``.
    """

    model: str = option('compact', 'network that maps: compact, or one that predicts many images '
                        f'at once: {", ".join(NETWORKS)}, also {", ".join(MORE_NETWORKS)}')
    attention: str = option('', f'global attention of the network: {", ".join(ATTENTIONS)}; '
                            'empty: its own')
    device: str = option('cpu', 'where the network runs: cpu, cuda, cuda:1')
    weights: str = option('', 'file of weights, or a name of `ffrecon weights list`; empty: the '
                          'name of the model')
    precision: str = option('full', 'weights of the network: full keeps them as float32, fp8 in a '
                            'quarter of the memory, rounded to three bits after the first',
                            choices=PRECISIONS)
    window: int = option(32, 'images predicted together; fewer where memory is short', low=2,
                         high=1000)
    anchors: int = option(4, 'how many of them are mapped already and tie the window to the map',
                          low=1, high=100)

    @property
    def feeds_forward(self) -> bool:
        """True for the networks that predict many images at once."""
        return self.model != 'compact'

    def check(self, spelled: Mapping[str, str] | None = None) -> None:
        """Refuse what ``compact`` would not use.

        spelled: the options to look at, and what the user calls them; default: their names.
        Raises ConfigError.
        """
        call = dict(spelled or {spec.name: spec.name for spec in fields(ModelOptions)})
        changed = [call[spec.name] for spec in fields(self) if spec.name in call
                   and spec.name != 'model' and getattr(self, spec.name) != spec.default]
        if not self.feeds_forward and changed:
            raise ConfigError(f'expected {", ".join(changed)} beside a feed-forward network, '
                              f'found {call["model"]} compact; choose another '
                              f'{call["model"]} ({", ".join(NETWORKS)}) or leave them out')


@dataclass(frozen=True)
class WindowConfig:
    """size: images predicted together; anchors: how many of them are mapped already."""

    size: int = 32
    anchors: int = 4

    def __post_init__(self) -> None:
        """Refuse windows that could not be tied to each other."""
        if self.size < 2 or not 1 <= self.anchors < self.size:
            raise ConfigError('expected windows of at least 2 images with 1 or more anchors and '
                              f'at least one new image, found {self.size} images with '
                              f'{self.anchors} anchors; choose larger windows')

    def of_size(self, size: int) -> WindowConfig:
        """Smaller windows, of at least two images."""
        size = max(2, size)
        return WindowConfig(size, max(1, min(self.anchors, size // 2)))
