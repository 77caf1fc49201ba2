"""Students: what a recipe names learns and nothing else, and what is taught is learnt."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_network import SMALL
from small_training import MICRO, plane_windows, training_folders, use_small_windows

from feedforward_recon.errors import ConfigError
from feedforward_recon.model import configs
from feedforward_recon.model.attention.base import QkvAttention
from feedforward_recon.model.fp8 import FakeFp8Linear
from feedforward_recon.model.layers import Block, BlockConfig
from feedforward_recon.model.ray_transformer import RayTransformer
from feedforward_recon.model.vit import normalised
from feedforward_recon.training import room_views
from feedforward_recon.training.answer_losses import answer_losses
from feedforward_recon.training.attention_record import AttentionRecord, attention_paths
from feedforward_recon.training.cli import main
from feedforward_recon.training.students import (
    RECIPES,
    StudentTrainer,
    StudentTraining,
    answer,
    learning,
    side_multiple,
    student_name,
    student_of,
    what_learns,
    with_attention,
)
from feedforward_recon.training.windows import cropped

# Of each recipe a part of the names of what learns, and whether all of these do.
TAUGHT = {'linearize': ('.attn.', 'global_blocks'), 'sparsify': ('', 'global_blocks'),
          'sla': ('.proj_lin.', ''), 'qat': ('.weight', '')}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """Scenes to train on, and weights of a small teacher."""
    root = tmp_path_factory.mktemp('students')
    with pytest.MonkeyPatch.context() as patch:
        use_small_windows(patch)
        patch.setitem(configs.CONFIGS, 'micro-vggt', SMALL)
        file = root / 'train0000.npz'
        np.savez(file, **vars(room_views.views_of(9500, 128)))
        training_folders(file, root)
        torch.manual_seed(1)
        for name in ('micro', 'micro-vggt'):
            save_file(configs.build(name).state_dict(), root / f'{name}.safetensors')
        yield root


def trainer_of(prepared, out, recipe, **changes):
    teacher = changes.get('teacher', 'micro')
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return StudentTrainer(recipe, StudentTraining(**{
        'photos': str(prepared / 'photos'), 'rooms': str(prepared / 'rooms'), 'out': str(out),
        'held_out': 'yard', 'teacher': teacher, 'steps': 4, 'transfer_steps': 2, 'warm_up': 1,
        'weights': str(prepared / f'{teacher}.safetensors'), 'views_per_step': 4, 'save_every': 2,
        'validate_every': 100, **changes}))


def weights_of(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(('recipe', 'transfer_steps'), [
    *((recipe, 0) for recipe in RECIPES), ('linearize', 2)])
def test_only_what_the_recipe_names_moves(prepared, tmp_path, recipe, transfer_steps):
    trainer = trainer_of(prepared, tmp_path, recipe, transfer_steps=transfer_steps)
    before = weights_of(trainer.network)
    list(trainer.run())
    moved = {name for name, tensor in trainer.network.state_dict().items()
             if not torch.equal(tensor, before[name])}
    assert moved and moved <= set(trainer.lesson.learns)
    part, where = TAUGHT[recipe]
    assert all(where in name for name in moved) and any(part in name for name in moved)
    if recipe == 'qat':
        kept = ('norm', 'special_tokens', 'stem', 'place', 'gamma')
        assert not any(part in name for part in kept for name in moved)
    if recipe == 'linearize':
        assert {'lr_fc', 'short_conv_qkv'} <= {name.split('.')[3] for name in moved}
        assert not any('.w0' in name for name in moved)


@pytest.mark.parametrize(('recipe', 'transfer_steps'), [
    *((recipe, 0) for recipe in RECIPES), ('sparsify', 100)])
def test_a_step_lowers_the_loss(prepared, tmp_path, recipe, transfer_steps):
    trainer = trainer_of(prepared, tmp_path, recipe, transfer_steps=transfer_steps, steps=100,
                         learning_rate=1e-5 if recipe == 'qat' else 1e-4)
    windows = plane_windows()

    def total():
        with torch.no_grad():
            return float(sum(trainer.losses(windows).values()))

    before = total()
    trainer.learn(windows)
    assert total() < before


@pytest.mark.parametrize('recipe', ['linearize', 'sla'])
def test_a_network_of_another_kind_learns_too(prepared, tmp_path, recipe):
    trainer = trainer_of(prepared, tmp_path, recipe, teacher='micro-vggt', transfer_steps=0,
                         steps=100, learning_rate=1e-4)
    windows = cropped(plane_windows(), side_multiple(trainer.network))
    assert windows.images.shape[-2:] == (42, 56)
    before = sum(trainer.learn(windows)[part] for part in ('depth', 'turn', 'place', 'distil'))
    with torch.no_grad():
        assert sum(trainer.losses(windows).values()) < before


def test_a_resumed_run_ends_with_the_same_weights(prepared, tmp_path):
    through = trainer_of(prepared, tmp_path / 'a', 'linearize')
    assert list(through.run()) == [1, 2, 3, 4]
    halted = trainer_of(prepared, tmp_path / 'b', 'linearize')
    for step in halted.run():
        if step == 3:  # the last state that was saved is that of step 2
            break
    again = trainer_of(prepared, tmp_path / 'b', 'linearize')
    assert again.step == 2
    list(again.run())
    for name, tensor in through.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    stored = load_file(tmp_path / 'b' / 'micro-ttt.safetensors')
    assert set(stored) == set(through.network.state_dict())


@pytest.mark.parametrize(('changes', 'found'), [
    ({'attention': 'hybrid'}, "network 'micro-ttt', found 'micro-hybrid'"),
    ({'seed': 1}, 'seed 0, found 1')])
def test_the_folder_of_another_run_is_refused(prepared, tmp_path, changes, found):
    list(trainer_of(prepared, tmp_path, 'linearize', steps=1).run())
    with pytest.raises(ConfigError, match=f'with {found}; choose another --out'):
        trainer_of(prepared, tmp_path, 'linearize', **changes)
    assert trainer_of(prepared, tmp_path, 'linearize', save_every=7).step == 1


@pytest.mark.parametrize('suffix', ['ttt', 'hybrid', 'sparse', 'sla'])
@pytest.mark.parametrize('teacher', ['micro', 'micro-vggt'])
def test_students_are_networks_of_their_names(prepared, teacher, suffix):
    """What a recipe trains is what `--model TEACHER-SUFFIX` builds, attention by attention."""
    recipe = next((r for r in RECIPES.values() if r.suffix == suffix), None)
    recipe = recipe or with_attention(RECIPES['linearize'], suffix)
    student = student_of(configs.build(teacher), recipe)
    named = configs.build(student_name(teacher, recipe))
    assert str(student) == str(named)
    assert [part.config for part in student.modules() if isinstance(part, QkvAttention)] == [
        part.config for part in named.modules() if isinstance(part, QkvAttention)]
    assert student.state_dict().keys() == named.state_dict().keys()


def test_of_many_images_all_attentions_within_are_recorded():
    """Those within images are called for some images after the other."""
    torch.manual_seed(0)
    block, images = Block(BlockConfig(16, 2)).eval(), torch.randn(32, 197, 16)
    record = AttentionRecord(block, ['attn'])
    with torch.no_grad():
        block(torch.randn(5, 197, 16))
        block(images)  # what the pass before left is forgotten
        wanted = block.attn(block.norm1(images))  # is no part of a pass
        for _ in range(2):
            torch.testing.assert_close(record.repeated('attn', block.attn), wanted)
    torch.testing.assert_close(record.outputs['attn'], wanted)


def test_a_student_of_da3_sees_what_da3_sees():
    network = configs.build('da3-small', device='meta')
    seen = []
    network.forward = lambda images, *_, **__: seen.append(images) or (None, None)
    windows = plane_windows()
    answer(network, windows)
    torch.testing.assert_close(seen[0], normalised(windows.images))


def test_a_student_is_no_teacher_of_another_attention():
    with pytest.raises(ConfigError, match='found sparse attentions; choose the teacher'):
        student_of(configs.build('tiny-sla', device='meta'), RECIPES['linearize'])
    assert student_of(configs.build('tiny-sla'), RECIPES['qat']).state_dict()


def test_a_student_begins_with_the_weights_of_its_teacher(prepared):
    teacher = configs.load('micro', prepared / 'micro.safetensors')
    for recipe in RECIPES.values():
        student = student_of(teacher, recipe)
        own = teacher.state_dict()
        shared = {name for name in student.state_dict() if name in own}
        assert len(shared) > len(own) - 4 * MICRO.depth - 1
        for name in shared:
            assert torch.equal(student.state_dict()[name], own[name]), name
        assert not any(isinstance(module, FakeFp8Linear) for module in teacher.modules())


def test_attentions_taught_the_same_answer_the_same(prepared, tmp_path, monkeypatch):
    """A student whose attention is the teacher's has nothing to learn from it."""
    monkeypatch.setitem(configs.STUDENTS, 'softmax', configs.Student('softmax'))
    recipe = replace(RECIPES['linearize'], suffix='softmax')
    trainer = trainer_of(prepared, tmp_path, recipe)
    rounding = 1e-4  # of bfloat16: with gradients softmax is computed in another way
    assert trainer.losses(plane_windows())['transfer'] < rounding
    trainer.step = trainer.settings.transfer_steps
    assert trainer.losses(plane_windows())['distil'] < rounding


def test_the_linear_branch_is_in_every_attention(prepared):
    teacher = configs.load('micro', prepared / 'micro.safetensors')
    student = student_of(teacher, RECIPES['sla'])
    assert attention_paths(student) == attention_paths(teacher)
    assert len(learning(student, RECIPES['sla'])) == len(attention_paths(teacher)) == 6


@pytest.mark.parametrize(('recipe', 'published'), [
    ('linearize', '102,163,584'), ('sla', '360,448')])
def test_of_vggt_as_many_parameters_learn_as_published(recipe, published):
    assert what_learns('vggt', RECIPES[recipe])['all of these'].startswith(f'{published} of ')


def test_a_dry_run_needs_neither_weights_nor_images(capsys):
    assert main(['sparsify', '--teacher', 'pi3', '--dry-run']) == 0
    assert 'attn.gate' in capsys.readouterr().out


@pytest.mark.parametrize('command', ['sla', 'align'])
def test_a_training_without_its_folders_is_refused(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command, '--out', 'run']) != 0
    assert 'found no --photos; name them, or add --dry-run' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_teacher_without_what_learns_is_refused(prepared):
    network = configs.build('micro')
    with pytest.raises(ConfigError, match='expected a teacher with what this recipe teaches'):
        learning(network, RECIPES['sla'])


@pytest.mark.parametrize(('recipe', 'attention'), [
    ('qat', 'ttt'), ('linearize', 'sparse'), ('linearize', 'tt')])
def test_an_attention_that_a_recipe_has_no_use_for_is_refused(recipe, attention):
    with pytest.raises(ConfigError, match='expected fast weights for linearize alone'):
        what_learns('micro', RECIPES[recipe], attention)


def test_the_command_trains_and_its_weights_load(prepared, tmp_path, capsys):
    out = tmp_path / 'run'
    assert main(['linearize', '--teacher', 'micro', '--weights',
                 str(prepared / 'micro.safetensors'), '--photos', str(prepared / 'photos'),
                 '--held-out', 'yard', '--out', str(out), '--steps', '1', '--transfer-steps', '0',
                 '--views-per-step', '2', '--attention', 'hybrid']) == 0
    trained = configs.load('micro', out / 'micro-hybrid.safetensors', attention='hybrid')
    assert isinstance(trained, RayTransformer)
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert {'depth', 'coarse', 'distil'} <= set(lines[0]) and 'yard' in lines[1]['held_out']


def test_a_network_that_knows_the_truth_has_no_loss():
    windows = plane_windows()
    grid = (windows.images.shape[-2] // 8, windows.images.shape[-1] // 8)
    depth = windows.depth.unflatten(2, grid).repeat_interleave(8, 2).repeat_interleave(8, 3)
    moved = torch.eye(4)
    moved[:3, 3] = torch.tensor([1.0, 2.0, 3.0])  # another world, and another unit
    T = windows.T_world_cam.clone()
    T[..., :3, 3] *= 2.5
    said = (moved @ T, windows.K, 2.5 * depth, torch.ones_like(depth))
    middles = replace(windows, pixels=windows.pixels.round())
    assert all(part < 1e-5 for part in answer_losses(said, middles).values())
    turned = said[0].clone()
    turned[:, 1] = turned[:, 1] @ turned[:, 2]
    worse = answer_losses((turned, *said[1:]), middles)
    assert worse['turn'] > 0.01 and worse['place'] > 0.01
    assert answer_losses((said[0], said[1], depth ** 2, said[3]), middles)['depth'] > 0.01


def test_what_is_cut_off_is_no_longer_known():
    windows = plane_windows()
    smaller = cropped(windows, 28)
    assert smaller.images.shape[-2:] == (28, 56)
    inside = (windows.pixels <= torch.tensor([55, 27])).all(-1)
    assert torch.equal(smaller.known, inside) and not inside.all()
    there = (windows.found <= torch.tensor([55, 27])).all(-1)
    assert torch.equal(smaller.seen, windows.seen & there & inside[:, :, None])
    assert smaller.seen.any()
