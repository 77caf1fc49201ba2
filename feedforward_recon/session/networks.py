"""Loading what settings name: the feed-forward network that maps."""

from __future__ import annotations

from feedforward_recon.config.network import ModelOptions, WindowConfig
from feedforward_recon.errors import ConfigError
from feedforward_recon.mapping.sources.window import FeedForward
from feedforward_recon.model.predictor import is_out_of_memory, load_predictor


def load_network(options: ModelOptions) -> FeedForward:
    """The feed-forward network that the options name, with its weights, on its device.

    Raises ConfigError for options that cannot be met, CheckpointError for weights that are
    missing or do not fit.
    """
    windows = WindowConfig(options.window, options.anchors)
    try:
        predictor = load_predictor(options.model, options.attention or None, options.device,
                                   options.weights or None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f'expected room for {options.model} on {options.device}, found too '
                          'little memory; choose a smaller model or another device') from error
    return FeedForward(predictor, windows)
