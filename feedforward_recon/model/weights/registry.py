"""Checkpoints by name: who publishes them, under which licence, and where they lie here.

    find_weights('vggt-1b')            # a name of the registry
    find_weights('~/mine.safetensors') # or a file

Nothing here touches the network; `weights_files.fetch_weights` does, and only when asked to.
"""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from feedforward_recon.errors import CheckpointError

log = logging.getLogger(__name__)
FOLDER_VARIABLE = 'FEEDFORWARD_RECON_WEIGHTS'
OFFLINE_VARIABLE = 'HF_HUB_OFFLINE'
ALIASES = {'vggt': 'vggt-1b', 'da3': 'da3-large'}  # short names of networks and checkpoints
SUFFIXES = ('.safetensors', '.pt', '.pth', '.bin')


@dataclass(frozen=True)
class Licence:
    """A licence of weights. commercial: whether it allows commercial use; limits: what else."""

    name: str
    url: str
    commercial: bool
    limits: str = ''

    @property
    def use(self) -> str:
        """Whether commercial use is allowed, in words."""
        return ('yes' if self.commercial else 'no') + (f', {self.limits}' if self.limits else '')


@dataclass(frozen=True)
class Checkpoint:
    """One file of weights.

    name: what we call it. model: its architecture, a name of `model.configs`, or `compact`.
    repo, file, revision: where Hugging Face has it; an empty repo means shipped with us.
    sha256: of the published file; without, the one of the first download is recorded.
    size: of the file in bytes; where the revision is not pinned, that of the parameters we use.
    gated: the publisher grants access one by one.
    """

    name: str
    model: str
    licence: Licence
    size: int
    repo: str = ''
    file: str = 'model.safetensors'
    revision: str = 'main'
    sha256: str = ''
    gated: bool = False

    @property
    def is_pinned(self) -> bool:
        """True when the very file is known, and so its size."""
        return bool(self.sha256) and (not self.repo or len(self.revision) == 40)

    @property
    def local_file(self) -> str:
        """Name of the file in a folder of ours."""
        return self.name + Path(self.file).suffix

    @property
    def url(self) -> str:
        """The page of the publisher; empty for weights that we ship."""
        return f'https://huggingface.co/{self.repo}' if self.repo else ''


APACHE = Licence('Apache-2.0', 'https://www.apache.org/licenses/LICENSE-2.0', True)
CC_BY_NC = Licence('CC BY-NC 4.0', 'https://creativecommons.org/licenses/by-nc/4.0/', False)
NVIDIA_ONEWAY = Licence('NVIDIA OneWay Noncommercial',
                        'https://github.com/nv-dvl/vgg-ttt/blob/main/LICENSE', False)
VGGT_LICENCE = Licence('VGGT License v1', 'https://huggingface.co/facebook/VGGT-1B-Commercial/'
                       'blob/main/LICENSE', True, 'not military')

_ALL = (
    Checkpoint(
        'compact', 'compact', APACHE, 4_292_338, file='compact.safetensors',
        sha256='f5da2afe4c872010e131a7b726f6b0733854f91572d2fa1ae75a42d4ef2300d4'),
    Checkpoint(
        'tiny', 'tiny', APACHE, 14_502_290, file='tiny.safetensors',
        sha256='606f39e6c3c3d4631379a03a88eeb102856b76859d778456950d249d73eed4dc'),
    Checkpoint(
        'tiny-ttt', 'tiny-ttt', APACHE, 15_291_454, file='tiny-ttt.safetensors',
        sha256='29a2b2ea5aa1897f8e8cf2cb7043edfc514984f0f611c5f118732c4a63fa00b5'),
    Checkpoint(
        'tiny-sla', 'tiny-sla', APACHE, 14_524_710, file='tiny-sla.safetensors',
        sha256='351742e11fe823c4e84d289ae03a3a90af611d8c6bca9fa4ccc64466f126038c'),
    Checkpoint(
        'tiny-sparse', 'tiny-sparse', APACHE, 14_526_474, file='tiny-sparse.safetensors',
        sha256='6b1f9464b85a3f94ed825fed542320414a94c4078d748ac29b6997913cf5b3cd'),
    Checkpoint(
        'vggt-1b', 'vggt-1b', CC_BY_NC, 5_026_367_224, 'facebook/VGGT-1B',
        revision='860abec7937da0a4c03c41d3c269c366e82abdf9',
        sha256='f164acf60724910d8fe1578bb499d800850c7bb0948db7555c413f9fbe60467e'),
    Checkpoint(
        'vggt-1b-commercial', 'vggt-1b', VGGT_LICENCE, 5_026_367_224,
        'facebook/VGGT-1B-Commercial', revision='ebb29a532abe92960eeb6903a5530f16990ef4ab',
        sha256='2b766b284359bc47ce26be107254621f685b758a0282082ff109f3ff02788b53', gated=True),
    Checkpoint('vgg-t3', 'vgg-t3', NVIDIA_ONEWAY, 4_843_461_216, 'nvidia/vgg-ttt'),
    Checkpoint(
        'pi3', 'pi3', CC_BY_NC, 3_834_909_248, 'yyfz233/Pi3',
        revision='ae722e7039287d0c8fde9f11f197f804f44b510c',
        sha256='33580e4702ac671558aedeab1148fd08118f7ce45bdbeb99f3e3cf340062875d'),
    Checkpoint('speed3r', 'speed3r', CC_BY_NC, 3_837_128_072, 'weining17/Speed3R_Pi3'),
    Checkpoint(
        'da3-large', 'da3-large', CC_BY_NC, 1_643_843_860, 'depth-anything/DA3-LARGE',
        revision='c54c26b16ec04d218e8d584ecf4bce082a9fcc20',
        sha256='eaf2ae06df55889ad23eb245c82e2dd2a30c0cbf7e3d873a118fa5ed27a3e421'),
    Checkpoint(
        'da3-large-1.1', 'da3-large', CC_BY_NC, 1_643_843_860, 'depth-anything/DA3-LARGE-1.1',
        revision='0e109ae307c5982f319a67cf6f9f99ccdc0ec97c',
        sha256='739905c423cf0d6ccaf9e61a8401d82ba1ac32d7f4d3ee6dca8f92b377633f64'),
    Checkpoint(
        'da3-base', 'da3-base', APACHE, 541_518_028, 'depth-anything/DA3-BASE',
        revision='f4a6c9b3c95e41c82048423d3493a81ec3fa810e',
        sha256='e01067dc1659613083d9145a9a2547ccdbe6ccbbf83c4fe7b3e8a4e2bdae78b5'),
    Checkpoint(
        'da3-small', 'da3-small', APACHE, 137_248_940, 'depth-anything/DA3-SMALL',
        revision='e08cab65ca0ec38e7826075418411ab90cab4da3',
        sha256='364492e38a3a06d221ac75da7f6621ada3f2361cd24fde11ba79091e9f40efcf'),
    # Fine-tuned from vggt-1b and da3-large, whose licences hold on.
    Checkpoint(
        'lite3r-vggt', 'lite3r-vggt', CC_BY_NC, 4_633_203_968, 'AIGeeksGroup/Lite3R',
        file='vggt_fp8_qat_1ep.pt',
        sha256='aa4314350c3400d50c9b06ebff524205049654a4189a0d4fcbe9720b00bcf074'),
    Checkpoint(
        'lite3r-da3', 'lite3r-da3', CC_BY_NC, 1_644_226_700, 'AIGeeksGroup/Lite3R',
        file='da3_fp8_qat_1ep.pt',
        sha256='9cfacfa89b28c54f573327063b8782cadc6b71e6a344950259a3435746526813'),
)
CHECKPOINTS: dict[str, Checkpoint] = {checkpoint.name: checkpoint for checkpoint in _ALL}


def checkpoint_of(name: str) -> Checkpoint:
    """The checkpoint of that name, or of a network with one of the short names.

    Raises CheckpointError, with the nearest name, for one that does not exist.
    """
    if ALIASES.get(name, name) in CHECKPOINTS:
        return CHECKPOINTS[ALIASES.get(name, name)]
    near = difflib.get_close_matches(name, CHECKPOINTS, 1)
    hint = f'did you mean {near[0]}?' if near else f'choose one of {", ".join(CHECKPOINTS)}'
    raise CheckpointError(f'expected the name of a checkpoint, found {name!r}; {hint}')


def is_path(name_or_path: str | Path) -> bool:
    """Whether this is meant as a file rather than as a name."""
    text = str(name_or_path)
    return isinstance(name_or_path, Path) or '/' in text or text.endswith(SUFFIXES)


def find_weights(name_or_path: str | Path) -> Path:
    """The file of a checkpoint, by name or by path, without touching the network.

    A name is looked for in the folder $FEEDFORWARD_RECON_WEIGHTS (by default one in the user's
    cache), in the Hugging Face cache and in the package's own weights, in this order. A text
    with a slash or the ending of a weights file is a path.
    Raises CheckpointError that says what was expected, where it was looked for and what to run.
    """
    if not is_path(name_or_path):
        checkpoint = checkpoint_of(str(name_or_path))
        file = located(checkpoint)
        if file is None:
            raise missing(checkpoint)
        log.info('weights of %s: %s', checkpoint.name, file)
        return file
    file = Path(name_or_path).expanduser()
    if not file.is_file():
        found = 'a folder' if file.is_dir() else 'no file'
        raise CheckpointError(f'expected weights at {file}, found {found}; give a file, or a '
                              'name that `ffrecon weights list` shows')
    return file


def located(checkpoint: Checkpoint) -> Path | None:
    """The file of a checkpoint on this machine, the first in the order of `find_weights`."""
    ours = weights_folder() / checkpoint.local_file
    if ours.is_file():
        return ours
    if checkpoint.repo and (cached := _in_hub_cache(checkpoint)):
        return cached
    shipped = package_folder() / checkpoint.local_file
    return shipped if shipped.is_file() else None


def weights_folder() -> Path:
    """The user's folder of weights: $FEEDFORWARD_RECON_WEIGHTS, or one in the user's cache.

    Raises CheckpointError when the variable names something else than a folder.
    """
    cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    text = os.environ.get(FOLDER_VARIABLE) or f'{cache}/feedforward_recon/weights'
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f'expected a folder for weights at {folder}, found a file; set '
                              f'{FOLDER_VARIABLE} to a folder')
    return folder


def package_folder() -> Path:
    """The folder of the weights that the package ships."""
    return Path(str(resources.files('feedforward_recon.model.weights')))


def is_offline() -> bool:
    """Whether $HF_HUB_OFFLINE forbids the network, read as huggingface_hub reads it."""
    return os.environ.get(OFFLINE_VARIABLE, '').upper() in {'1', 'ON', 'YES', 'TRUE'}


def missing(checkpoint: Checkpoint, offline: bool = False) -> CheckpointError:
    """The error for weights that are nowhere: expected what, looked where, do what.

    offline: without network; then it says what to put where.
    """
    name, ours = checkpoint.name, weights_folder() / checkpoint.local_file
    if not checkpoint.repo:
        return CheckpointError(f'expected {checkpoint.local_file}, which ships with the package, '
                               f'found none at {ours} or in {package_folder()}; reinstall the '
                               'package')
    remedy = by_hand(checkpoint) if offline else f'run `ffrecon weights get {name}`'
    return CheckpointError(f'expected weights of {name} ({checkpoint.file} of {checkpoint.repo}), '
                           f'found none at {ours}, in the Hugging Face cache or in '
                           f'{package_folder()}; {remedy}')


def by_hand(checkpoint: Checkpoint) -> str:
    """What to put where on a machine without network, as the end of a sentence."""
    return (f'download {checkpoint.file} from {checkpoint.url}/tree/{checkpoint.revision} '
            f'elsewhere and put it at {weights_folder() / checkpoint.local_file}')


def _in_hub_cache(checkpoint: Checkpoint) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        log.warning('huggingface_hub is not installed: its cache is not searched')
        return None
    pinned = try_to_load_from_cache(checkpoint.repo, checkpoint.file,
                                    revision=checkpoint.revision)
    if isinstance(pinned, str):  # else None, or a mark for a file that does not exist
        return Path(pinned)
    # Other programs fetch the newest revision; the cache names contents by their hash.
    newest = try_to_load_from_cache(checkpoint.repo, checkpoint.file)
    if isinstance(newest, str) and Path(newest).resolve().name == checkpoint.sha256:
        return Path(newest)
    return None
