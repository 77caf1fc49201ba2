"""The laws that every global attention obeys, and the oracles that each is compared with."""

import numpy as np
import oracle_attention as oracle
import pytest
import torch
from safetensors.torch import load, save

from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.model.attention import ATTENTION, AttentionConfig, global_attention
from feedforward_recon.model.attention import fast_weights as fw
from feedforward_recon.model.attention.base import Layout
from feedforward_recon.model.attention.blocks import cut
from feedforward_recon.model.attention.config import (
    HybridOptions,
    SparseLinearOptions,
    SparseOptions,
    TttOptions,
)
from feedforward_recon.model.attention.sparse_linear import replace_local
from feedforward_recon.model.configs import build
from feedforward_recon.model.layers import Block, BlockConfig
from feedforward_recon.model.rope import patch_positions

DIM, HEADS, SPECIAL, GRID = 32, 2, 2, (5, 6)
POSITIONS = patch_positions(GRID, SPECIAL)
TOKENS = len(POSITIONS)
ALL = sorted(ATTENTION)


def make(name, dtype=torch.float64, seed=0, **changes):
    """A layer whose gates and zero-started parts are all awake."""
    torch.manual_seed(seed)
    settings = {'sparse': SparseOptions(window=3, kept=3), 'hybrid': HybridOptions(7),
                'sparse_linear': SparseLinearOptions(window=3, kept=3), 'chunk_tokens': 70}
    layer = global_attention(AttentionConfig(DIM, HEADS, name, SPECIAL, **{**settings, **changes}))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter) / max(1, parameter.ndim - 1) ** 2
    return layer.to(dtype).eval()


def tokens(frames, seed=1, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames * TOKENS, DIM, generator=generator, dtype=dtype)


@torch.no_grad()
def call(layer, x, state=None, write=True):
    state = layer.empty_state(len(x)) if state is None else state
    return layer(x, state, positions=POSITIONS, frames=x.shape[1] // TOKENS,
                 tokens_per_frame=TOKENS, write=write)


def by_frame(x):
    return x.unflatten(1, (-1, TOKENS))


def assert_states_equal(a, b, **tolerances):
    assert type(a) is type(b)
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(tensor, b.tensors()[name], msg=name, **tolerances)


@pytest.mark.parametrize('name', ALL)
def test_reading_never_changes_a_state(name):
    layer = make(name)
    _, state = call(layer, tokens(3))
    before = {key: tensor.clone() for key, tensor in state.tensors().items()}
    _, after = call(layer, tokens(2, seed=9), state, write=False)
    assert after is state
    assert all(torch.equal(before[key], tensor) for key, tensor in state.tensors().items())


@pytest.mark.parametrize('name', ALL)
def test_writing_leaves_the_old_state_alone(name):
    layer = make(name)
    _, old = call(layer, tokens(2))
    before = {key: tensor.clone() for key, tensor in old.tensors().items()}
    _, new = call(layer, tokens(2, seed=9), old)
    assert all(torch.equal(before[key], tensor) for key, tensor in old.tensors().items())
    assert any(before[key].shape != tensor.shape or not torch.equal(before[key], tensor)
               for key, tensor in new.tensors().items())


@pytest.mark.parametrize('name', ALL)
def test_what_was_written_is_read(name):
    layer, x = make(name), tokens(3)
    written, state = call(layer, x)
    read, _ = call(layer, x, state, write=False)
    torch.testing.assert_close(read, written, rtol=0, atol=0)


@pytest.mark.parametrize('name', ALL)
def test_queries_do_not_see_each_other(name):
    layer = make(name)
    _, state = call(layer, tokens(3))
    queries = tokens(4, seed=5)
    together, _ = call(layer, queries, state, write=False)
    alone, _ = call(layer, queries[:, TOKENS:2 * TOKENS], state, write=False)
    torch.testing.assert_close(by_frame(together)[:, 1:2], by_frame(alone))


@pytest.mark.parametrize('name', ALL)
def test_a_saved_state_is_the_same_state(name):
    layer = make(name)
    _, state = call(layer, tokens(3))
    again = type(state).from_tensors(load(save(state.tensors())))
    assert_states_equal(again, state, rtol=0, atol=0)
    assert layer.state_type is type(again)
    assert torch.equal(call(layer, tokens(1), again, False)[0],
                       call(layer, tokens(1), state, False)[0])


@pytest.mark.parametrize('name', ALL)
def test_fixed_size_means_fixed_bytes(name):
    layer, sizes = make(name, torch.float32), []
    state = layer.empty_state(1)
    for step in range(20):
        _, state = call(layer, tokens(10, seed=step, batch=1, dtype=torch.float32), state)
        sizes.append(state.nbytes)
    assert (sizes[-1] == sizes[0]) is layer.fixed_size
    assert layer.empty_state(1).nbytes == sizes[0] or not layer.fixed_size


@pytest.mark.parametrize('name', ALL)
def test_permuting_frames_permutes_outputs(name):
    layer, x, order = make(name), tokens(5), torch.tensor([3, 0, 4, 2, 1])
    out, _ = call(layer, x)
    permuted, _ = call(layer, by_frame(x)[:, order].flatten(1, 2))
    torch.testing.assert_close(by_frame(permuted), by_frame(out)[:, order])


@pytest.mark.parametrize('name', ALL)
def test_order_of_writing_does_not_matter(name):
    layer, a, b = make(name), tokens(3, seed=3), tokens(2, seed=4)
    query = tokens(1, seed=5)
    one = call(layer, b, call(layer, a)[1])[1]
    other = call(layer, a, call(layer, b)[1])[1]
    at_once = call(layer, torch.cat((a, b), 1))[1]
    answers = [call(layer, query, state, False)[0] for state in (one, other, at_once)]
    torch.testing.assert_close(answers[0], answers[1])
    torch.testing.assert_close(answers[0], answers[2])


@pytest.mark.parametrize('name', ALL)
def test_chunks_change_nothing(name):
    x = tokens(5)
    out, state = call(make(name), x)
    whole, at_once = call(make(name, chunk_tokens=10_000), x)
    torch.testing.assert_close(whole, out)
    assert_states_equal(at_once, state)


@pytest.mark.parametrize('name', ALL)
def test_scenes_of_a_batch_do_not_meet(name):
    layer, x = make(name), tokens(3)
    out, _ = call(layer, x)
    torch.testing.assert_close(call(layer, x[1:])[0], out[1:])


@pytest.mark.parametrize('name', ALL)
def test_every_parameter_learns(name):
    layer = make(name)
    x = tokens(3)
    out, _ = layer(x, layer.empty_state(2), positions=POSITIONS, frames=3,
                   tokens_per_frame=TOKENS, write=True)
    (out * torch.randn_like(out)).sum().backward()
    without = [key for key, p in layer.named_parameters() if p.requires_grad
               and (p.grad is None or not p.grad.abs().sum() > 0)]
    assert without == []


@pytest.mark.parametrize('name', ALL)
def test_wrong_calls_are_one_sentence(name):
    layer, x = make(name), tokens(2)
    with pytest.raises(InputError, match='expected 3 frames of 32 tokens, found 64 tokens'):
        layer(x, layer.empty_state(2), positions=POSITIONS, frames=3, tokens_per_frame=TOKENS,
              write=True)
    if name not in ('ttt', 'hybrid'):
        with pytest.raises(InputError, match='found an empty one'):
            call(layer, x, write=False)


@pytest.mark.parametrize('name', ['sparse', 'sparse_linear'])
def test_images_of_another_size_are_one_sentence(name):
    layer = make(name)
    _, state = call(layer, tokens(2))
    other = patch_positions((2, 2), SPECIAL)
    with pytest.raises(InputError, match='expected frames as large as those of the scene'):
        layer(tokens(1)[:, :6], state, positions=other, frames=1, tokens_per_frame=6, write=True)


@pytest.mark.parametrize(('positions', 'reason'), [(None, 'found None'),
                                                   (POSITIONS[:-1], 'found 29 in 5x6')])
def test_ttt_needs_the_whole_grid(positions, reason):
    layer = make('ttt')
    with pytest.raises(InputError, match=reason):
        layer(tokens(1)[:, :31], layer.empty_state(2), positions=positions, frames=1,
              tokens_per_frame=31, write=True)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"found 'flash'; choose one of softmax"):
        global_attention(AttentionConfig(8, 1, 'flash'))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_ttt_state_is_a_sum(dtype):
    layer = make('ttt', dtype)
    a, b = tokens(3, seed=3, dtype=dtype), tokens(2, seed=4, dtype=dtype)
    state_a, state_b = call(layer, a)[1], call(layer, b)[1]
    joint = call(layer, torch.cat((a, b), 1))[1]
    largest = joint.g1.abs().max()
    limit = {'rtol': 0, 'atol': float(largest) * (1e-6 if dtype == torch.float32 else 1e-14)}
    assert_states_equal(state_a + state_b, joint, **limit)
    assert_states_equal(call(layer, b, state_a)[1], joint, **limit)
    assert_states_equal(call(layer, a, state_b)[1], joint, **limit)
    assert_states_equal(joint - state_b, state_a, **limit)


def test_hybrid_states_add_up_and_refuse_to_be_taken_apart():
    layer, a, b = make('hybrid'), tokens(3, seed=3), tokens(2, seed=4)
    state_a, state_b = call(layer, a)[1], call(layer, b)[1]
    joint = call(layer, torch.cat((a, b), 1))[1]
    assert_states_equal(state_a + state_b, joint)
    with pytest.raises(InputError, match='cannot be taken away'):
        joint - state_b


def heads(layer, x):
    """Raw q, k, v of the first scene as numpy [3, heads, T, d]."""
    qkv = layer.qkv(x[:1])[0].unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
    return qkv.detach()


def merged(layer, out):
    return layer.proj(torch.as_tensor(np.stack(out, 1)).flatten(1)).detach()


def turned(layer, norm, x):
    return layer.turned(norm, x, POSITIONS).detach().numpy()


def test_softmax_is_its_oracle():
    layer, x = make('softmax'), tokens(3)
    q, k, v = heads(layer, x)
    expected = [oracle.softmax(*t) for t in zip(turned(layer, layer.q_norm, q),
                                                turned(layer, layer.k_norm, k), v.numpy(),
                                                strict=True)]
    torch.testing.assert_close(call(layer, x)[0][0], merged(layer, expected))


@pytest.mark.parametrize('steps', [1, 2])
def test_ttt_is_gradient_ascent_by_automatic_differentiation(steps):
    layer, x = make('ttt', ttt=TttOptions(steps=steps)), tokens(3)
    q, k, v = heads(layer, x)
    grids = v.permute(0, 2, 1).flatten(0, 1).unflatten(1, (3, TOKENS))  # [C, frames, P]
    patches = grids[:, :, SPECIAL:].unflatten(2, GRID).transpose(0, 1)
    mixed = torch.nn.functional.conv2d(patches, layer.short_conv_qkv[2].conv.weight, padding=1,
                                       groups=DIM).transpose(0, 1).flatten(2)
    grids = torch.cat((grids[:, :, :SPECIAL], mixed), 2).flatten(1)
    v = torch.nn.functional.silu(grids.unflatten(0, (HEADS, -1)).transpose(1, 2)).detach()
    rates = torch.log1p(torch.exp(layer.lr_fc(x[:1])[0] + np.log(np.expm1(0.01)))).detach()

    def normalised(t):
        t = torch.as_tensor(turned(layer, torch.nn.functional.silu, t))
        return t / (t.norm(dim=-1, keepdim=True) + 1e-5)
    q, k = normalised(q), normalised(k)
    out = []
    for h in range(HEADS):
        weights = first = [layer.w0[h], layer.w1[h], layer.w2[h]]
        for _ in range(steps):
            weights = oracle.fast_step(weights, first, k[h], v[h],
                                       [rates[:, r * HEADS + h, None] for r in range(3)])
        out.append(fw.apply(fw.Fast(*weights), q[h]).numpy())
    torch.testing.assert_close(call(layer, x)[0][0], merged(layer, out))


def test_closed_form_gradients_are_those_of_the_objective():
    torch.manual_seed(0)
    weights = fw.Fast(*(torch.randn(3, *s, dtype=torch.float64, requires_grad=True)
                        for s in ((4, 8), (8, 4), (4, 8))))
    k, v = torch.randn(2, 3, 20, 4, dtype=torch.float64)
    rates = torch.rand(3, 3, 20, 1, dtype=torch.float64)
    found = fw.gradients(weights, fw.Samples(k, v, rates))
    for index, name in enumerate(('w0', 'w1', 'w2')):
        value = sum(oracle.objective([w[h] for w in weights], k[h], v[h], rates[index, h])
                    for h in range(3))
        (expected,) = torch.autograd.grad(value, getattr(weights, name))
        torch.testing.assert_close(getattr(found, name), expected)


def test_several_steps_need_all_frames_at_once():
    layer = make('ttt', ttt=TttOptions(steps=2))
    written, state = call(layer, tokens(2))
    assert state.steps == 2
    assert torch.equal(call(layer, tokens(2), state, write=False)[0], written)
    with pytest.raises(InputError, match='empty state for 2 update steps'):
        call(layer, tokens(1), state)
    assert (state + state).steps == 1


def test_sparse_with_everything_selected_is_softmax():
    sparse = make('sparse', sparse=SparseOptions(window=3, kept=1000))
    with torch.no_grad():
        sparse.gate[0].weight.zero_()
        sparse.gate[0].bias.copy_(torch.tensor([-1e4, 1e4]).repeat(HEADS))
    softmax = make('softmax')
    softmax.load_state_dict(sparse.state_dict(), strict=False)
    torch.testing.assert_close(call(sparse, tokens(4))[0], call(softmax, tokens(4))[0])


@pytest.mark.parametrize('options', [SparseLinearOptions(window=3, kept=1000),
                                     SparseLinearOptions(keep_ratio=1.0)])
def test_sparse_linear_with_everything_kept_and_no_correction_is_softmax(options):
    layer, softmax = make('sparse_linear', sparse_linear=options), make('softmax')
    torch.nn.init.zeros_(layer.proj_lin.weight)
    softmax.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(call(layer, tokens(4))[0], call(softmax, tokens(4))[0])


def block_labels(frames, window):
    """The block of each token of some frames."""
    order = cut(Layout(POSITIONS, TOKENS), SPECIAL, window)
    labels = np.zeros(TOKENS, int)
    for index, (row, valid) in enumerate(zip(order.order, order.valid, strict=True)):
        labels[row[valid].numpy()] = index
    count = labels.max() + 1
    return np.concatenate([labels + frame * count for frame in range(frames)]), count


def test_sparse_is_its_oracle():
    layer, x, frames = make('sparse'), tokens(3), 3
    labels, count = block_labels(frames, 3)
    positions = np.stack([np.trunc(oracle.block_means(POSITIONS.numpy().astype(float),
                                                      labels[:TOKENS]))])[0]
    positions = torch.as_tensor(positions).long()
    out = []
    gate = layer.gate(x[0]).sigmoid().detach().numpy().reshape(-1, HEADS, 2)
    for h, (q, k, v) in enumerate(zip(*heads(layer, x), strict=True)):
        pooled = [torch.as_tensor(oracle.block_means(t.numpy(), labels)) for t in (q, k, v)]
        qc, kc = (layer.turned(norm, t, positions).detach().numpy() for norm, t
                  in zip((layer.q_norm, layer.k_norm), pooled[:2], strict=True))
        q, k, v = turned(layer, layer.q_norm, q), turned(layer, layer.k_norm, k), v.numpy()
        exact = oracle.blockwise(q, k, v, qc @ kc.T, labels, 3)
        special = labels % count == 0
        exact[special] = oracle.softmax(q[special], k, v)
        coarse = oracle.softmax(qc, kc, pooled[2].numpy())[labels]
        out.append(gate[:, h, :1] * coarse + gate[:, h, 1:] * exact)
    torch.testing.assert_close(call(layer, x)[0][0], merged(layer, out))


def test_sparse_linear_is_its_oracle():
    layer, x = make('sparse_linear'), tokens(3)
    labels, _ = block_labels(3, 3)
    out = []
    for q, k, v in zip(*heads(layer, x), strict=True):
        q, k, v = turned(layer, layer.q_norm, q), turned(layer, layer.k_norm, k), v.numpy()
        scores = oracle.block_means(q, labels) @ oracle.block_means(k, labels).T
        linear = oracle.linear(q, k, v) @ layer.proj_lin.weight.detach().numpy().T
        out.append(oracle.blockwise(q, k, v, scores, labels, 3) + linear)
    torch.testing.assert_close(call(layer, x)[0][0], merged(layer, out))


def test_sparse_linear_replaces_every_attention_of_a_network():
    network = replace_local(build('vggt-1b', 'sparse_linear', 'meta'), SparseLinearOptions())
    kinds = [type(m).__name__ for m in network.modules() if hasattr(m, 'qkv')]
    assert sorted(set(kinds)) == ['LocalSparseLinear', 'SparseLinearAttention']
    learned = [p.numel() for key, p in network.named_parameters() if 'proj_lin' in key]
    assert (len(learned), sum(learned)) == (76, 360_448)  # as published (arXiv 2605.11354)


@pytest.mark.parametrize('positions', [POSITIONS, None])
def test_local_sparse_linear_is_the_attention_it_replaced_when_it_keeps_all(positions):
    torch.manual_seed(0)
    block = Block(BlockConfig(DIM, HEADS, qk_norm=positions is not None)).double()
    x = tokens(1)
    expected = block(x, positions)
    replace_local(block, SparseLinearOptions(window=2, kept=1000), SPECIAL).double()
    torch.nn.init.zeros_(block.attn.proj_lin.weight)
    torch.testing.assert_close(block(x, positions), expected)


def test_latent_with_an_identity_among_latents_attends_to_frame_means():
    layer, x = make('latent'), tokens(3)
    torch.nn.init.zeros_(layer.latent_proj.weight)
    torch.nn.init.zeros_(layer.latent_proj.bias)
    means = by_frame(x).mean(2)
    q, _, _ = heads(layer, x)
    _, k, v = heads(layer, means)
    q, k = layer.q_norm(q).detach().numpy(), layer.k_norm(k).detach().numpy()
    expected = [oracle.softmax(*t) for t in zip(q, k, v.numpy(), strict=True)]
    torch.testing.assert_close(call(layer, x)[0][0], merged(layer, expected))


def test_hybrid_without_its_gate_is_ttt_and_keeps_the_best_anchors():
    hybrid, ttt, x = make('hybrid'), make('ttt'), tokens(4)
    ttt.load_state_dict(hybrid.state_dict(), strict=False)
    closed = make('hybrid')
    torch.nn.init.zeros_(closed.anchor_gate)
    torch.testing.assert_close(call(closed, x)[0], call(ttt, x)[0])
    assert not torch.allclose(call(hybrid, x)[0], call(ttt, x)[0])
    _, state = call(hybrid, x)
    rates = hybrid.rates(x).sum(0)[..., 0].detach()
    torch.testing.assert_close(state.scores, rates.topk(7, -1).values)


@pytest.mark.parametrize('name', ['softmax', 'sparse', 'sparse_linear', 'latent'])
def test_patches_may_come_in_any_order_with_their_positions(name):
    layer, x = make(name), by_frame(tokens(3))
    patches = torch.randperm(TOKENS - SPECIAL, generator=torch.Generator().manual_seed(0))
    order = torch.cat((torch.arange(SPECIAL), SPECIAL + patches))
    out, _ = call(layer, x.flatten(1, 2))
    with torch.no_grad():
        shuffled, _ = layer(x[:, :, order].flatten(1, 2), layer.empty_state(2), frames=3,
                            positions=POSITIONS[order], tokens_per_frame=TOKENS, write=True)
    torch.testing.assert_close(by_frame(shuffled), by_frame(out)[:, :, order])


@pytest.mark.parametrize('name', ALL)
def test_half_precision_stays_close(name):
    layer, x = make(name, torch.float32), tokens(4, dtype=torch.float32)
    exact, _ = call(layer, x)
    with torch.autocast('cpu', torch.bfloat16):
        rounded, state = call(layer, x)
        again, _ = call(layer, x, state, write=False)
    assert torch.equal(rounded, again)
    assert (rounded - exact).norm() < 0.1 * exact.norm()
    if name == 'ttt':
        assert state.g0.dtype == torch.float32


def test_blocks_cover_each_token_once_and_stay_within_the_window():
    for grid in ((4, 8), (5, 7), (1, 9), (37, 28)):
        layout = Layout(patch_positions(grid, 5), 5 + grid[0] * grid[1])
        blocks = cut(layout, 5, 4)
        assert sorted(blocks.order[blocks.valid].tolist()) == list(range(layout.tokens))
        assert blocks.order.shape[1] <= 16
        assert set(blocks.order[0][blocks.valid[0]].tolist()) == set(range(5))
        x = torch.randn(1, 1, 2 * layout.tokens, 3)
        assert torch.equal(blocks.joined(blocks.split(x)), x)
