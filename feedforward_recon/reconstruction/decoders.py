"""The pair decoder that settings name, and its network."""

from __future__ import annotations

from collections.abc import Sequence

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.errors import ConfigError
from feedforward_recon.model.collection import Collection, CollectionNetwork
from feedforward_recon.model.predictor import NetworkPredictor
from feedforward_recon.reconstruction.pairs import CompactPairs, PairDecoder
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.reconstruction.transformer_pairs import TransformerPairs


def pair_network(config: ReconstructionConfig, predictor: NetworkPredictor | None
                 ) -> CollectionNetwork | None:
    """The network that decodes pairs; None where matches alone do.

    Raises ConfigError for a decoder without its network, a network that is not asked and one that
    does not decode pairs, CheckpointError for latent alignment that the weights lack.
    """
    if config.decoder == 'transformer':
        if predictor is None:
            raise ConfigError('expected a network for reconstruction.decoder transformer, found '
                              'none; choose one with --model, such as tiny')
        return CollectionNetwork(predictor, align=config.latent_alignment)
    if predictor is not None or config.latent_alignment:
        found = 'a network' if predictor is not None else 'reconstruction.latent_alignment'
        raise ConfigError(f'expected reconstruction.decoder transformer beside {found}, found '
                          'compact; set it, or leave that out')
    return None


def pair_decoder(shots: Sequence[Shot], config: ReconstructionConfig,
                 collection: Collection | None) -> PairDecoder:
    """What decodes pairs of shots: the network of a collection, or their matches alone."""
    if collection is None:
        return CompactPairs(shots, config.seed)
    return TransformerPairs(shots, collection, config.batch, config.seed)
