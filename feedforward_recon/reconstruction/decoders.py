"""The pair decoder that settings name, and its network."""

from __future__ import annotations

from collections.abc import Sequence

from feedforward_recon.config.photos import ReconstructionConfig
from feedforward_recon.errors import ConfigError
from feedforward_recon.model.collection import CollectionNetwork, PairNetwork, WindowNetwork
from feedforward_recon.model.compact import CompactEncoder
from feedforward_recon.model.distributed import processes_started
from feedforward_recon.model.joint import JointNetwork
from feedforward_recon.model.joint_processes import SharedPass
from feedforward_recon.model.predictor import NetworkPredictor
from feedforward_recon.model.ray_collection import RayCollectionNetwork
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.model.vggt import Vggt
from feedforward_recon.reconstruction.pairs import CompactPairs, PairDecoder
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.reconstruction.transformer_pairs import PairPredictions, TransformerPairs


def check_decoder(config: ReconstructionConfig, has_network: bool) -> None:
    """Raises ConfigError for a decoder without its network, and for what it does not use."""
    if config.decoder != 'compact':
        if not has_network:
            raise ConfigError(f'expected a network for reconstruction.decoder {config.decoder}, '
                              'found none; choose one with --model, such as tiny')
        if config.decoder == 'joint' and config.latent_alignment:
            raise ConfigError('expected one of reconstruction.decoder joint and '
                              'reconstruction.latent_alignment, found both; in one pass images '
                              'see each other anyway, so leave the latter out')
    elif has_network or config.latent_alignment:
        given = 'a network' if has_network else 'reconstruction.latent_alignment'
        raise ConfigError(f'expected reconstruction.decoder transformer beside {given}, found '
                          'compact; set it, or leave that out')
    elif config.accumulation == 'rigid':
        raise ConfigError('expected reconstruction.decoder transformer beside '
                          'reconstruction.accumulation rigid, found compact; choose similarity, '
                          'since matches alone say no unit')


def pair_network(config: ReconstructionConfig, predictor: NetworkPredictor | None
                 ) -> PairNetwork | None:
    """The network that decodes pairs; None where matches alone do.

    Raises what ``check_decoder`` raises, ConfigError for latent alignment that the network cannot
    have, CheckpointError for one that its weights lack.
    """
    check_decoder(config, predictor is not None)
    if predictor is None:
        return None
    network = predictor.network
    if config.decoder == 'joint':
        count = processes_started()
        shared = SharedPass(predictor) if count > 1 else None
        return JointNetwork(predictor, shared, count)
    if isinstance(network, RayTransformer) and (config.latent_alignment or network.aligns):
        return RayCollectionNetwork(predictor, align=config.latent_alignment)
    if config.latent_alignment or isinstance(network, Vggt):
        return CollectionNetwork(predictor, align=config.latent_alignment)
    return WindowNetwork(predictor)


def pair_decoder(shots: Sequence[Shot], encoder: CompactEncoder, config: ReconstructionConfig,
                 collection: PairPredictions | None) -> PairDecoder:
    """What decodes pairs of shots: the network of a collection, or their matches alone."""
    if collection is None:
        return CompactPairs(shots, encoder, config.seed)
    return TransformerPairs(shots, encoder, collection, config.batch, config.seed)
