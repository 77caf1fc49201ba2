"""The laws that every global attention obeys, and the oracles that each is compared with."""

import pytest
import torch
from safetensors.torch import load, save

from feedforward_recon.errors import ConfigError, InputError
from feedforward_recon.model.attention.base import Layout
from feedforward_recon.model.attention.blocks import cut
from feedforward_recon.model.attention.config import (
    AttentionConfig,
    HybridOptions,
    SparseLinearOptions,
    SparseOptions,
    TttOptions,
)
from feedforward_recon.model.attention.registry import ATTENTION, global_attention
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
    """After 10 frames and after 1000; what grows is spared the rest."""
    layer, written, sizes = make(name, torch.float32, chunk_tokens=4000), 0, []
    state = layer.empty_state(1)
    for count in (10, 490, 500) if layer.fixed_size else (10, 10, 10):
        _, state = call(layer, tokens(count, seed=written, batch=1, dtype=torch.float32), state)
        written += count
        sizes.append(state.nbytes)
    assert written == (1000 if layer.fixed_size else 30)
    assert (len(set(sizes)) == 1) is layer.fixed_size
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


def test_several_steps_need_all_frames_at_once():
    layer = make('ttt', ttt=TttOptions(steps=2))
    written, state = call(layer, tokens(2))
    assert state.steps == 2
    assert torch.equal(call(layer, tokens(2), state, write=False)[0], written)
    with pytest.raises(InputError, match='empty state for 2 update steps'):
        call(layer, tokens(1), state)
    assert (state + state).steps == 1


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
