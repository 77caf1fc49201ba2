"""Training of latent alignment: what learns, what it costs, and that a run can be halted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import plane_windows, training_folders, use_small_windows

from feedforward_recon.errors import ConfigError
from feedforward_recon.model import configs
from feedforward_recon.training import alignment, room_views
from feedforward_recon.training.alignment import (
    AlignmentTrainer,
    AlignmentTraining,
    what_aligns,
)
from feedforward_recon.training.cli import main
from feedforward_recon.training.photo_losses import PairMaps
from feedforward_recon.training.view_graphs import covisible_tree, graph_loss, in_true_unit


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """Scenes to train on, and weights of a small teacher."""
    root = tmp_path_factory.mktemp('alignment')
    with pytest.MonkeyPatch.context() as patch:
        use_small_windows(patch)
        patch.setattr(alignment, 'VIEWS', 3)
        patch.setattr(alignment, 'HELD_OUT_GRAPHS', 1)
        file = root / 'train0000.npz'
        np.savez(file, **vars(room_views.views_of(9500, 128)))
        training_folders(file, root)
        torch.manual_seed(1)
        save_file(configs.build('micro').state_dict(), root / 'micro.safetensors')
        yield root


def trainer_of(prepared, out, **changes):
    return AlignmentTrainer(AlignmentTraining(**{
        'photos': str(prepared / 'photos'), 'rooms': str(prepared / 'rooms'), 'out': str(out),
        'held_out': 'yard', 'teacher': 'micro', 'steps': 4, 'warm_up': 1, 'blocks': 2,
        'weights': str(prepared / 'micro.safetensors'), 'save_every': 2, 'validate_every': 100,
        **changes}))


def weights_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize('blocks', [2, 4])
def test_only_the_alignment_moves(prepared, tmp_path, blocks):
    trainer = trainer_of(prepared, tmp_path, blocks=blocks)
    before = weights_of(trainer.network)
    list(trainer.run())
    moved = {name for name, tensor in trainer.network.state_dict().items()
             if not torch.equal(tensor, before[name])}
    assert moved and moved == {name for name in before if name in trainer.learns}
    assert {name.split('.')[2] for name in moved} == {str(block) for block in range(blocks)}
    assert all(name.startswith('latent_alignment.blocks.') for name in moved)


def test_an_untouched_alignment_costs_what_the_teacher_does(prepared, tmp_path):
    trainer = trainer_of(prepared, tmp_path)
    teacher = configs.load('micro', prepared / 'micro.safetensors')
    with torch.no_grad():
        assert graph_loss(trainer.network, plane_windows()) == graph_loss(teacher, plane_windows())


def test_a_step_lowers_the_loss(prepared, tmp_path):
    trainer = trainer_of(prepared, tmp_path, steps=100, learning_rate=1e-4)
    before = trainer.learn([plane_windows()])['loss']
    with torch.no_grad():
        assert graph_loss(trainer.network, plane_windows()) < before


def test_a_resumed_run_ends_with_the_same_weights(prepared, tmp_path):
    through = trainer_of(prepared, tmp_path / 'a')
    assert list(through.run()) == [1, 2, 3, 4]
    halted = trainer_of(prepared, tmp_path / 'b')
    for step in halted.run():
        if step == 3:  # the last state that was saved is that of step 2
            break
    again = trainer_of(prepared, tmp_path / 'b')
    assert again.step == 2
    list(again.run())
    for name, tensor in through.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    stored = load_file(tmp_path / 'b' / 'micro-aligned.safetensors')
    assert set(stored) == set(through.network.state_dict())
    assert configs.load('micro', tmp_path / 'b' / 'micro-aligned.safetensors').aligns
    lines = [json.loads(line) for line in (tmp_path / 'a' / 'log.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'held_out' in line] == [0, 4]


def test_pairs_are_those_that_show_the_most_of_each_other():
    windows = plane_windows()
    seen = torch.zeros_like(windows.seen)
    shares = {(0, 1): 0.9, (1, 2): 0.8, (0, 2): 0.3}  # a walk: ends hardly meet
    for (i, j), share in shares.items():
        count = round(share * seen.shape[-1])
        seen[0, i, j, :count] = seen[0, j, i, :count] = True
    assert list(covisible_tree(replace(windows, seen=seen))) == [(1, 0), (1, 2)]


def test_the_unit_of_a_pair_does_not_count():
    truth = torch.randn(2, 2, 30, 3, generator=torch.Generator().manual_seed(0))
    known = torch.ones(truth.shape[:-1], dtype=torch.bool)
    known[1, 1, 7:] = False
    unit = torch.tensor([0.2, 5.0])[:, None, None, None]
    said = torch.where(known[..., None], unit * truth, 100.0)  # what is unknown may be anything
    maps = in_true_unit(PairMaps(said, torch.ones(known.shape)), truth, known)
    torch.testing.assert_close(maps.points[known], truth[known])


@pytest.mark.parametrize(('changes', 'sentence'), [
    ({'blocks': 0}, 'expected blocks of latent alignment to train, found 0; choose 2 or 4'),
    ({'weights': 'aligned'}, 'expected weights without latent alignment'),
    ({'teacher': 'vggt-tiny', 'weights': 'vggt'}, 'kind of tiny .* found Vggt; choose tiny')])
def test_what_cannot_be_trained_is_one_sentence(prepared, tmp_path, changes, sentence):
    made = {'aligned': ('micro', 2), 'vggt': ('vggt-tiny', 0)}
    if changes.get('weights') in made:
        name, blocks = made[changes['weights']]
        changes = {**changes, 'weights': str(tmp_path / 'other.safetensors')}
        save_file(configs.build(name, alignment=blocks).state_dict(), changes['weights'])
    with pytest.raises(ConfigError, match=sentence):
        trainer_of(prepared, tmp_path, **changes)


@pytest.mark.parametrize(('teacher', 'dim', 'inside'), [
    ('vggt-1b', 1024, 'aggregator.'), ('tiny', 192, '')])
def test_a_dry_run_says_what_would_learn(teacher, dim, inside, capsys):
    """Two attentions and two MLPs of a block: 24 C^2, and 28 C of biases and norms."""
    count = f'{4 * (24 * dim**2 + 28 * dim):,}'
    rows = what_aligns(AlignmentTraining(teacher=teacher, dry_run=True))
    assert rows.pop('all of these').startswith(f'{count} of ')
    assert f'{inside}latent_alignment.blocks.N.across.proj.weight' in rows
    assert all(name.startswith(f'{inside}latent_alignment.blocks.N.') for name in rows)
    assert main(['align', '--teacher', teacher, '--dry-run']) == 0
    assert count in capsys.readouterr().out


def test_the_command_trains(prepared, tmp_path, capsys):
    assert main(['align', '--photos', str(prepared / 'photos'), '--teacher', 'micro', '--weights',
                 str(prepared / 'micro.safetensors'), '--blocks', '2', '--steps', '1',
                 '--graphs', '1', '--out', str(tmp_path / 'run')]) == 0
    assert (tmp_path / 'run' / 'micro-aligned.safetensors').exists()
