"""Descriptors as they are compared with many others: in half precision."""

from __future__ import annotations

import numpy as np
import torch


def half_rows(descriptors: np.ndarray, multiple: int) -> torch.Tensor:
    """Descriptors [N, D] as bfloat16, and rows of zeros up to a multiple of rows.

    Half precision is twice as fast, and only decides between nearly equal neighbours. oneDNN
    compiles a product for every two sizes that it meets and keeps 0.6 MB of each of the last
    thousand: images with all numbers of features would fill that.
    """
    count, dim = descriptors.shape
    rows = torch.zeros(-(-count // multiple) * multiple, dim, dtype=torch.bfloat16)
    rows[:count] = torch.from_numpy(descriptors)
    return rows
