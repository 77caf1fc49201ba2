"""``Keys``: which cells of the coordinate network a descriptor belongs to.

A product key (Lample et al., 2019): in each of several tables two small code books say which code
of theirs a descriptor is most like, and the pair of codes names one of 65 536 places without a
search among them. Keys never change while mapping. Those of the shipped encoder were trained so
that views of a point share a place and other points do not (``ffrecon-train memory``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from feedforward_recon.errors import CheckpointError

KEYS_FILE = 'keys.safetensors'
# Two halves of 256 codes name as many cells as 16 bits do; of the tables a memory takes as many as
# its size is worth. Measured: docs/memory.md, Tables.
HALVES, CODES, TABLES = 2, 256, 8
# Codes of each half of which pairs are formed. The best four pairs are hardly ever others; of the
# best six some are, but six codes take twice the time.
CANDIDATES = 4
# Spreads the pairs over fewer cells as if by chance (Knuth's multiplicative hash).
SPREAD = 2_654_435_761


@dataclass(frozen=True, eq=False)
class Keys:
    """weight float32 [T, HALVES, CODES, D] and bias [T, HALVES, CODES] of T tables."""

    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def dim(self) -> int:
        """Length of a descriptor."""
        return self.weight.shape[-1]

    @property
    def tables(self) -> int:
        """Number of tables."""
        return len(self.weight)

    def first(self, tables: int) -> Keys:
        """The keys of the first tables alone."""
        return Keys(self.weight[:tables].contiguous(), self.bias[:tables].contiguous())

    @cached_property
    def sha256(self) -> str:
        """Of the numbers: a network that was written with other keys means nothing here."""
        return hashlib.sha256(self.weight.numpy().tobytes() + self.bias.numpy().tobytes()
                              ).hexdigest()

    @torch.inference_mode()
    def places(self, descriptors: NDArray[np.floating], probes: int, cells: int
               ) -> NDArray[np.int64]:
        """Cells [N, T, probes], 0 <= cell < ``cells``, of descriptors [N, D], best first."""
        given = torch.from_numpy(np.ascontiguousarray(descriptors, np.float32))
        flat = self.weight.reshape(-1, self.dim)
        scores = torch.addmm(self.bias.reshape(-1), given, flat.T)
        scores = scores.view(-1, self.tables, HALVES, CODES)
        if probes == 1:
            pair = scores.argmax(-1)
            return self._cells(pair[..., :1], pair[..., 1:], cells)
        best, code = scores.topk(CANDIDATES, dim=-1)
        total = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
        chosen = total.topk(probes, dim=-1).indices
        first = code[:, :, 0].gather(-1, chosen // CANDIDATES)
        second = code[:, :, 1].gather(-1, chosen % CANDIDATES)
        return self._cells(first, second, cells)

    @staticmethod
    def _cells(first: torch.Tensor, second: torch.Tensor, cells: int) -> NDArray[np.int64]:
        pair = (CODES * first + second).numpy()
        return (pair * SPREAD & 0xFFFFFFFF) * cells >> 32

    def save(self, path: str | Path) -> None:
        """Write the keys in half precision."""
        save_file({'weight': self.weight.half(), 'bias': self.bias.half()}, str(path),
                  metadata={'architecture': 'keys'})


def load_keys(path: Path) -> Keys:
    """Read keys that ``Keys.save`` wrote; raises CheckpointError with the reason."""
    try:
        with safe_open(str(path), 'pt') as file:
            weight, bias = (file.get_tensor(name).float() for name in ('weight', 'bias'))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'expected keys of the coordinate network in {path}, found none '
                              f'({error}); reinstall the package or train them with ffrecon-train '
                              'memory') from error
    if weight.shape[:3] != (TABLES, HALVES, CODES) or bias.shape != weight.shape[:3]:
        raise CheckpointError(f'expected keys of {TABLES} tables of {HALVES} x {CODES} codes in '
                              f'{path}, found {tuple(weight.shape)}; train them again')
    return Keys(weight, bias)


@lru_cache(maxsize=8)
def keys_for(dim: int, tables: int) -> Keys:
    """The shipped keys, or random ones for descriptors [dim] of another encoder."""
    shipped = load_keys(Path(str(resources.files('feedforward_recon.model.weights') / KEYS_FILE)))
    return (shipped if shipped.dim == dim else random_keys(dim)).first(tables)


def random_keys(dim: int, seed: int = 0) -> Keys:
    """Keys whose codes are random directions: nothing has to be trained for them."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((TABLES, HALVES, CODES, dim)).astype(np.float32)
    return Keys(torch.from_numpy(weight / np.linalg.norm(weight, axis=-1, keepdims=True)),
                torch.zeros(TABLES, HALVES, CODES))
