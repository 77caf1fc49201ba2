"""Photos on the faces of rooms: seeded, about half of them, and nothing else changes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from feedforward_recon.errors import InputError
from feedforward_recon.synthetic import Room
from feedforward_recon.synthetic.photos import photo_crop, photo_files
from feedforward_recon.training import room_views as data
from feedforward_recon.training.cli import main as train


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Three photos of different blue, with red that grows from left to right."""
    folder = tmp_path_factory.mktemp('photos')
    for index, blue in enumerate((40, 120, 200)):
        image = np.full((60, 80, 3), (blue, 30, 0), np.uint8)
        image[..., 2] = np.linspace(0, 250, 80)
        cv2.imwrite(str(folder / f'{index}.jpg'), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    return folder


def test_half_of_the_faces_get_photos_and_a_seed_says_which(folder):
    room = Room.generate(4)
    files = photo_files(folder)
    one, again, other = (room.with_photos(files, seed).faces for seed in (1, 1, 2))
    assert one == again != other
    photos = [face.photo for face in one]
    assert 0.35 < np.mean([photo is not None for photo in photos]) < 0.65
    assert {*photos} == {None, *files}
    assert all(face.photo is None for face in room.faces)
    for before, after in zip(room.faces, one, strict=True):
        assert before.surface is after.surface and before.seed == after.seed


def test_a_face_shows_its_photo_and_the_others_stay(folder):
    room = Room.generate(4)
    changed = room.with_photos(photo_files(folder), 1)
    index = [face.photo is None for face in changed.faces].index(True)
    assert np.array_equal(room.texture(index)[0], changed.texture(index)[0])
    index = [face.photo is None for face in changed.faces].index(False)
    texture = changed.texture(index)
    assert [level.shape for level in texture] == [x.shape for x in room.texture(index)]
    assert not np.array_equal(texture[0], room.texture(index)[0])


@pytest.mark.parametrize('size', [(30, 40), (200, 20), (7, 300)])
def test_crops_are_of_the_photo_right_way_round_or_mirrored(folder, size):
    mirrored = set()
    for seed in range(20):
        crop = photo_crop(np.random.default_rng(seed), folder / '2.jpg', *size)
        assert crop.shape == (*size, 3) and crop.dtype == np.float32
        assert crop.min() >= 0 and crop.max() <= 1
        assert np.abs(crop[..., 1:] - (30 / 255, 200 / 255)).max() < 0.05
        mirrored.add(bool(crop[:, 0, 0].mean() > crop[:, -1, 0].mean()))
    assert mirrored == {True, False}


def test_a_folder_without_photos_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match=r'\*\.jpg'):
        photo_files(tmp_path)
    out = tmp_path / 'views'
    assert train(['views', '--out', str(out), '--photos', str(tmp_path)]) == 2
    assert 'expected *.jpg photos' in capsys.readouterr().err
    assert train(['views', '--out', str(out), '--device', 'nowhere']) == 2
    assert "found 'nowhere'" in capsys.readouterr().err
    (tmp_path / 'a.jpg').write_text('nothing')
    with pytest.raises(InputError, match='expected an image'):
        photo_crop(np.random.default_rng(0), tmp_path / 'a.jpg', 8, 8)


def test_training_views_have_photos_and_the_same_truth(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(data, 'WALK_VIEWS', 3)
    monkeypatch.setattr(data, 'PLACES', 1)
    monkeypatch.setattr(data, 'SIDE', 64)
    plain = data.views_of(data.FIRST_ROOM[data.HELD_OUT], 64)
    file, = data.render_views(tmp_path, 1, data.HELD_OUT, photos=folder)
    assert file.name == 'held_out0000.npz'
    with np.load(file) as arrays:
        photos = data.RoomViews(**arrays)
    for name in ('depth', 'K', 'T_world_cam'):
        assert np.array_equal(getattr(plain, name), getattr(photos, name)), name
    assert np.abs(plain.image.astype(float) - photos.image).mean() > 5
