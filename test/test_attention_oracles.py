"""Each global attention against a dense reference that is obviously right (oracle_attention)."""

import numpy as np
import oracle_attention as oracle
import pytest
import torch
from test_attention_laws import (
    DIM,
    GRID,
    HEADS,
    POSITIONS,
    SPECIAL,
    TOKENS,
    by_frame,
    call,
    make,
    tokens,
)

from feedforward_recon.model.attention import fast_weights as fw
from feedforward_recon.model.attention.base import Layout
from feedforward_recon.model.attention.blocks import cut
from feedforward_recon.model.attention.config import (
    SparseLinearOptions,
    SparseOptions,
    TttOptions,
)
from feedforward_recon.model.attention.sparse_linear import replace_local
from feedforward_recon.model.configs import build
from feedforward_recon.model.layers import Block, BlockConfig


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


def samples_by_hand(layer, x):
    """Queries, keys, values [h, T, d] and rates [T, 3 h] of the first scene."""
    q, k, v = heads(layer, x)
    frames = x.shape[1] // TOKENS
    grids = v.permute(0, 2, 1).flatten(0, 1).unflatten(1, (frames, TOKENS))  # [C, frames, P]
    patches = grids[:, :, SPECIAL:].unflatten(2, GRID).transpose(0, 1)
    mixed = torch.nn.functional.conv2d(patches, layer.short_conv_qkv[2].conv.weight, padding=1,
                                       groups=DIM).transpose(0, 1).flatten(2)
    grids = torch.cat((grids[:, :, :SPECIAL], mixed), 2).flatten(1)
    v = torch.nn.functional.silu(grids.unflatten(0, (HEADS, -1)).transpose(1, 2)).detach()
    rates = torch.log1p(torch.exp(layer.lr_fc(x[:1])[0] + np.log(np.expm1(0.01)))).detach()

    def normalised(t):
        t = torch.as_tensor(turned(layer, torch.nn.functional.silu, t))
        return t / (t.norm(dim=-1, keepdim=True) + 1e-5)
    return normalised(q), normalised(k), v, rates


def fast_by_hand(layer, x, steps):
    """What the fast networks say, [h] of [T, d]."""
    q, k, v, rates = samples_by_hand(layer, x)
    out = []
    for h in range(HEADS):
        weights = first = [layer.w0[h], layer.w1[h], layer.w2[h]]
        for _ in range(steps):
            weights = oracle.fast_step(weights, first, k[h], v[h],
                                       [rates[:, r * HEADS + h, None] for r in range(3)])
        out.append(fw.apply(fw.FastWeights(*weights), q[h]).numpy())
    return out


@pytest.mark.parametrize('steps', [1, 2])
def test_ttt_is_gradient_ascent_by_automatic_differentiation(steps):
    layer, x = make('ttt', ttt=TttOptions(steps=steps)), tokens(3)
    torch.testing.assert_close(call(layer, x)[0][0], merged(layer, fast_by_hand(layer, x, steps)))


@pytest.mark.parametrize('steps', [1, 2])
def test_hybrid_is_ttt_and_softmax_over_anchors(steps):
    layer, x = make('hybrid', ttt=TttOptions(steps=steps)), tokens(3)
    q, k, v, rates = (t.numpy() for t in samples_by_hand(layer, x))
    gate = layer.anchor_gate.tanh().detach().numpy()
    tau = layer.anchor_log_tau.exp().detach().numpy()
    scores = rates.reshape(-1, 3, HEADS).sum(1)
    expected = [said + gate[h] * oracle.anchored(q[h], k[h], v[h], scores[:, h], 7, tau[h])
                for h, said in enumerate(fast_by_hand(layer, x, steps))]
    torch.testing.assert_close(call(layer, x)[0][0], merged(layer, expected))


def test_closed_form_gradients_are_those_of_the_objective():
    torch.manual_seed(0)
    weights = fw.FastWeights(*(torch.randn(3, *s, dtype=torch.float64, requires_grad=True)
                               for s in ((4, 8), (8, 4), (4, 8))))
    k, v = torch.randn(2, 3, 20, 4, dtype=torch.float64)
    rates = torch.rand(3, 3, 20, 1, dtype=torch.float64)
    found = fw.gradients(weights, fw.KeyValueSamples(k, v, rates))
    for index, name in enumerate(('w0', 'w1', 'w2')):
        value = sum(oracle.objective([w[h] for w in weights], k[h], v[h], rates[index, h])
                    for h in range(3))
        (expected,) = torch.autograd.grad(value, getattr(weights, name))
        torch.testing.assert_close(getattr(found, name), expected)


@pytest.mark.parametrize('one_place', [False, True])
def test_sparse_with_everything_selected_is_softmax(one_place):
    sparse = make('sparse', sparse=SparseOptions(window=3, kept=1000), one_place=one_place)
    with torch.no_grad():
        sparse.gate[0].weight.zero_()
        sparse.gate[0].bias.copy_(torch.tensor([-1e4, 1e4]).repeat(HEADS))
    softmax = make('softmax', one_place=one_place)
    softmax.load_state_dict(sparse.state_dict(), strict=False)
    torch.testing.assert_close(call(sparse, tokens(4))[0], call(softmax, tokens(4))[0])


@pytest.mark.parametrize('every', [1, 2, 100])
def test_frames_that_everyone_sees_are_read_beside_what_is_chosen(every):
    """The exact branch is softmax over the visible frames and the best of all other blocks."""
    options = SparseOptions(window=3, kept=2, visible_every=every)
    layer, x = make('sparse', sparse=options), tokens(3)
    blocks = layer.prepared(Layout(POSITIONS, TOKENS))
    memory = layer.readable(layer.write(layer._chunks(x, TOKENS), layer.empty_state(len(x)),
                                        blocks))
    _, exact, chosen = layer.branches(x, memory, blocks)
    per_frame = len(blocks.order)
    visible = [frame * per_frame + block for frame in range(0, 3, every)
               for block in range(per_frame)]
    assert all(set(visible) <= set(row.tolist()) for row in chosen.flatten(0, 2))
    sets = [set(row.tolist()) for row in chosen.flatten(0, 2)]
    assert {len(row) for row in sets} == {min(len(visible) + 2, 3 * per_frame)}
    if every == 1:  # nothing is left to choose
        softmax = make('softmax')
        softmax.load_state_dict(layer.state_dict(), strict=False)
        q = softmax.turned(softmax.q_norm, softmax.raw_queries(x), POSITIONS)
        keys, values = memory.tokens
        torch.testing.assert_close(
            exact, torch.nn.functional.scaled_dot_product_attention(q, keys, values))


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


def test_latent_is_its_oracle():
    layer, x = make('latent'), tokens(3)
    means = by_frame(x).mean(2)
    parts = layer.latent_qkv(layer.latent_norm(means[0])).unflatten(-1, (3, HEADS, -1))
    seen = [oracle.softmax(*t) for t in zip(*parts.detach().permute(1, 2, 0, 3).numpy(),
                                            strict=True)]
    means[0] += layer.latent_proj(torch.as_tensor(np.concatenate(seen, 1))).detach()
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
