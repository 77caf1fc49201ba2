"""The feed-forward network that settings name: it maps, and its own memory may be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from feedforward_recon.config.network import ModelOptions, WindowConfig
from feedforward_recon.config.schema import CloudConfig
from feedforward_recon.errors import ConfigError, MapError
from feedforward_recon.localization.localizer import Localizer
from feedforward_recon.localization.network_localizer import NetworkLocalizer, SavedFastWeights
from feedforward_recon.localization.scene_network import NetworkMemory
from feedforward_recon.mapping.dense_clouds import DenseClouds
from feedforward_recon.mapping.sources.window import FeedForward
from feedforward_recon.model.predictor import NetworkPredictor, is_out_of_memory, load_predictor

DEPTH_NETWORK = 'tiny'  # ships with the package, and knows its camera


@dataclass(frozen=True)
class SessionNetwork:
    """A network that maps window by window. memory: its own, None for one that keeps none."""

    windows: FeedForward
    memory: NetworkMemory | None = None


def load_network(options: ModelOptions) -> SessionNetwork:
    """The feed-forward network that the options name, with its weights, on its device.

    Raises ConfigError for options that cannot be met, CheckpointError for weights that are
    missing or do not fit.
    """
    windows = WindowConfig(options.window, options.anchors)
    try:
        predictor = load_predictor(options.model, options.attention or None, options.device,
                                   options.weights or None, options.precision)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f'expected room for {options.model} on {options.device}, found too '
                          'little memory; choose a smaller model or another device') from error
    feeds = FeedForward(predictor, windows)
    memory = NetworkMemory(predictor, options.model, options.weights, feeds.turn)
    return SessionNetwork(feeds, None if memory.unsupported else memory)


def dense_clouds(config: CloudConfig) -> DenseClouds | None:
    """What gives keyframes without depth their clouds, if the settings want it."""
    return DenseClouds(_depth_network(), config) if config.dense else None


@cache
def _depth_network() -> NetworkPredictor:
    return load_predictor(DEPTH_NETWORK)


class NetworkInUse:
    """The network of one session, loaded once it is needed.

    load: None for a session without. localize_with: what single images are looked for with:
    'landmarks'; 'network', whose pose is the answer; 'auto' asks both where the map holds fast
    weights, and the landmarks decide.
    """

    def __init__(self, load: Callable[[], SessionNetwork] | None, localize_with: str) -> None:
        self._load, self._localize_with = load, localize_with
        self._loaded: SessionNetwork | None = None

    @property
    def maps(self) -> bool:
        """A network gives the poses of a new map."""
        return self._load is not None

    @property
    def asks(self) -> bool:
        """The network may be asked about images."""
        return self.maps and self._localize_with != 'landmarks'

    def loaded(self) -> SessionNetwork | None:
        """The network, None without one. Raises what loading it raises."""
        if self._loaded is None and self._load is not None:
            self._loaded = self._load()
        return self._loaded

    def localizer(self, written: SavedFastWeights | None, landmarks: Localizer, where: str
                  ) -> NetworkLocalizer | None:
        """What asks the network about images; None where the landmarks alone are asked.

        written: what the network wrote of the map, if it did. where: the map, in words.
        Raises MapError where the network has to be asked and cannot, and what loading it raises.
        """
        must = self._localize_with == 'network'
        if written is None and must:
            raise MapError(f'{where}: expected the fast weights of a network (localize_with is '
                           'network), found none; map with model vgg-t3, or with attention ttt or '
                           'hybrid, and save with ~/save_map')
        if written is None or not self.asks:
            return None
        network = self.loaded()
        if network is None or network.memory is None:
            raise MapError(f'{where}: expected the network {written.model}, whose fast weights '
                           'this map holds, found one that keeps none; choose that as model, or '
                           'localize_with landmarks')
        return network.memory.localizer(written, landmarks.memory.points,
                                        None if must else landmarks)
