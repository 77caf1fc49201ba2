"""Every network with every global attention: it runs, remembers and keeps its symmetries."""

import copy
import dataclasses

import pytest
import torch

from benchmarks import golden
from feedforward_recon.model import pi3
from feedforward_recon.model.attention.config import (
    HybridOptions,
    SparseLinearOptions,
    SparseOptions,
    TttOptions,
)
from feedforward_recon.model.attention.registry import ATTENTION
from feedforward_recon.model.attention.sparse_linear import SparseLinearAttention, replace_local
from feedforward_recon.model.backbone import BackboneConfig
from feedforward_recon.model.configs import CONFIGS, OPTIONS, SPARSE_EVERYWHERE, build, network_of
from feedforward_recon.model.da3 import Da3Config
from feedforward_recon.model.dpt import DptConfig
from feedforward_recon.model.fp8 import StoredFp8Matrices, stored_in_fp8
from feedforward_recon.model.pi3 import Pi3Config
from feedforward_recon.model.vggt import VggtConfig
from feedforward_recon.model.vit import VitConfig

VIT = VitConfig(32, 2, 2, grid=3)
DA3 = Da3Config(VitConfig(32, 2, 8, grid=3, registers=0), 4, (4, 5, 6, 7),
                DptConfig(64, 16, (8, 8, 8, 8), rectify_skip=False))
SMALL = {
    'vggt': VggtConfig(BackboneConfig(VIT, 4, (0, 1, 2, 3)), DptConfig(64, 16, (8, 8, 8, 8))),
    'pi3': Pi3Config(VIT, 4), 'speed3r': Pi3Config(VIT, 4, registers=0), 'da3': DA3}
SPARSELY = {'sparse': SparseOptions(window=2, kept=3), 'hybrid': HybridOptions(5),
            'sparse_linear': SparseLinearOptions(window=2, kept=3)}
ALL = [(model, attention) for model in SMALL for attention in ATTENTION]


@pytest.fixture(autouse=True)
def narrow_heads(monkeypatch):
    """The decoders of pi3's heads are 1024 wide whatever the rest is: 200 million numbers."""
    monkeypatch.setattr(pi3, 'HEAD_DIM', 64)


def network(model, attention):
    """A small network with lively weights."""
    found = network_of(dataclasses.replace(SMALL[model], attention=attention), **SPARSELY)
    golden.fill(found)
    return found.eval()


def images(count, seed=0):
    return torch.rand(1, count, 3, 42, 56, generator=torch.Generator().manual_seed(seed))


def states(memory):
    return memory.states if hasattr(memory, 'states') else memory


def dense(answer):
    return answer.points_cam if hasattr(answer, 'points_cam') else answer.depth


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(('model', 'attention'), ALL)
@torch.inference_mode()
def test_every_network_runs_with_every_attention(model, attention):
    net = network(model, attention)
    answer, memory = net(images(4))
    assert torch.isfinite(dense(answer)).all() and dense(answer).shape[:4] == (1, 4, 42, 56)
    kept = [{k: t.clone() for k, t in s.tensors().items()} for s in states(memory)]
    query, after = net(images(2, seed=1), memory, write=False)
    assert all(torch.equal(t, old[k]) for s, old in zip(states(after), kept, strict=True)
               for k, t in s.tensors().items())
    alone, _ = net(images(2, seed=1)[:, 1:], memory, write=False)
    assert difference(dense(alone), dense(query)[:, 1:]) < 1e-4
    elsewhere, _ = net(images(2, seed=1), net(images(4, seed=2))[1], write=False)
    assert not torch.equal(dense(elsewhere), dense(query))  # what was mapped matters
    sizes = [sum(s.nbytes for s in states(net(images(n))[1])) for n in (2, 4)]
    assert (sizes[0] == sizes[1]) is ATTENTION[attention].fixed_size


@pytest.mark.parametrize(('model', 'attention'), ALL)
@torch.inference_mode()
def test_the_order_of_images_matters_as_little_as_the_network_says(model, attention):
    """Not at all to pi3 and DA3; VGGT only asks which is the first."""
    net, order = network(model, attention), torch.tensor([0, 3, 1, 2])
    if model != 'vggt':
        order = torch.tensor([2, 0, 3, 1])
    straight, mixed = net(images(4))[0], net(images(4)[:, order])[0]
    assert difference(dense(mixed), dense(straight)[:, order]) < 1e-4


def widened(net):
    """The stored layers of a network as the numbers that they stand for, by name."""
    for name, part in net.named_modules():
        if hasattr(part, 'scale') and part.weight.element_size() == 1:
            matrices = isinstance(part, StoredFp8Matrices)
            outputs = (part.weight.ndim - 1 if matrices else
                       int(getattr(part, 'transposed', False)))
            shape = [-1 if dim == outputs else 1 for dim in range(part.weight.ndim)]
            yield (name if matrices else f'{name}.weight',
                   part.weight.float() * part.scale.view(shape))


@pytest.mark.parametrize(('model', 'attention'), ALL)
@torch.inference_mode()
def test_every_network_in_fp8_is_the_network_of_the_rounded_weights(model, attention):
    """In float32 to its rounding, and under autocast, of mapping and of a query."""
    net = network(model, attention)
    stored = stored_in_fp8(copy.deepcopy(net))
    rounded = dict(widened(stored))
    assert {name for name, tensor in net.state_dict().items() if tensor.ndim > 1
            and name.rpartition('.')[2] in ('weight', 'w0', 'w1', 'w2')} == rounded.keys()
    net.load_state_dict(rounded, strict=False)
    for half in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            (answer, memory), (expected, known) = stored(images(3)), net(images(3))
            query, _ = stored(images(1, seed=1), memory, write=False)
            wanted, _ = net(images(1, seed=1), known, write=False)
        for said, right in ((answer, expected), (query, wanted)):
            assert dense(said).dtype == dense(right).dtype
            assert difference(dense(said), dense(right)) < (0.2 if half else 1e-4)


@pytest.mark.parametrize('attention', ['sparse', 'sparse_linear'])
@torch.inference_mode()
def test_sparse_is_sparse_in_da3_too(attention):
    """Its patches have no place when they are turned, but they are cut into windows by place."""
    net = network('da3', attention)
    _, memory = net(images(2))
    special, windows = 1, 2 * 2  # of 2x2 in a grid of 3x4
    assert states(memory)[0].keys.shape[2] == 2 * (special + windows)


def test_vgg_t3_makes_the_steps_of_its_evaluation():
    def steps(net):
        return {block.attn.config.ttt.steps for block in net.aggregator.global_blocks}
    assert steps(build('vgg-t3', device='meta')) == {2}
    assert steps(build('vgg-t3', device='meta', ttt=TttOptions(steps=1))) == {1}
    assert steps(build('vggt-1b', 'ttt', device='meta')) == {1}


@pytest.mark.parametrize(('name', 'tensors'), [('lite3r-vggt', 1402 - 62 + 2 * 76),
                                               ('lite3r-da3', 643 + 2 * 28)])
def test_lite3r_replaces_every_attention(name, tensors):
    """Counts as published: 76 of VGGT and 28 of DA3, with 360 448 and 114 688 learned numbers."""
    net = build(name, device='meta')
    assert len(net.state_dict()) == tensors
    learned = sum(p.numel() for key, p in net.named_parameters() if 'proj_lin' in key)
    assert learned == {'lite3r-vggt': 360_448, 'lite3r-da3': 114_688}[name]


@pytest.mark.parametrize('model', ['vggt', 'da3'])
@torch.inference_mode()
def test_lite3r_runs(model):
    """With every attention replaced; VGGT without its point head, points from depth instead."""
    config = dataclasses.replace(SMALL[model], attention='sparse_linear',
                                 **({'point_head': False} if model == 'vggt' else {}))
    net = replace_local(network_of(config, **SPARSELY), SPARSELY['sparse_linear'],
                        special=5 if model == 'vggt' else 1)
    golden.fill(net)
    answer, _ = net.eval()(images(3))
    assert torch.isfinite(answer.depth).all()
    if model == 'vggt':
        seen = answer.points[0, 0] @ answer.T_cam_world[0, 0, :3, :3].mT
        z = seen[..., 2] + answer.T_cam_world[0, 0, 2, 3]
        torch.testing.assert_close(z, answer.depth[0, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', ['lite3r-vggt', 'lite3r-da3'])
def test_the_published_form_of_lite3r_keeps_a_share_of_the_tokens_everywhere(name):
    def shares(net):
        return [part.config.sparse_linear.keep_ratio for part in net.modules()
                if isinstance(part, SparseLinearAttention)]
    published, blocks = (build(name, attention, device='meta') for attention in ('lite3r', None))
    assert published.state_dict().keys() == blocks.state_dict().keys()
    assert set(shares(published)) == {0.3} and set(shares(blocks)) == {None}
    assert len(shares(published)) == len(shares(blocks)) == (76 if name == 'lite3r-vggt' else 28)
    other = build(name, 'lite3r', device='meta', sparse_linear=SparseLinearOptions(keep_ratio=0.2))
    assert set(shares(other)) == {0.2}


def test_exceptions_are_about_networks_that_there_are():
    assert OPTIONS.keys() | SPARSE_EVERYWHERE <= CONFIGS.keys()
