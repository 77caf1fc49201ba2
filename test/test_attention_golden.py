"""Single layers against reference outputs, in the precision of their users and in double."""

import numpy as np
import pytest
import torch

from benchmarks import golden
from benchmarks.golden_layers import LAYERS

FILES = [('ttt', 'ttt_layer'), ('sparse_linear', 'sla_fp8'), ('sparse', 'speed3r_reference')]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(('name', 'file'), FILES)
def test_layers_equal_their_references(golden_dir, name, file, dtype):
    arrays = dict(np.load(golden_dir / f'{file}.npz'))
    with torch.inference_mode():
        found = LAYERS[name](arrays, golden.rule, dtype)
    differences = golden.errors(found, arrays)
    assert len(differences) >= 3
    assert max(differences.values()) <= 1e-5, differences
