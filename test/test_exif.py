"""The focal length in EXIF blocks of photos, as Pillow writes them."""

from __future__ import annotations

import io
import logging
import math
import os
import random
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from feedforward_recon.cli import main
from feedforward_recon.errors import InputError
from feedforward_recon.io import SourceOptions, folder, open_source
from feedforward_recon.io.exif import exif_camera
from feedforward_recon.reconstruction.shots import Shot
from feedforward_recon.session.photo_cameras import guessed_camera, like_others, open_calibration
from feedforward_recon.types import Features

TAG = ExifTags.Base
INCH, CENTIMETRE, MILLIMETRE, MICROMETRE = 2, 3, 4, 5
LANDSCAPE, PORTRAIT = (400, 300), (300, 400)
ROTATED = 6  # orientation: turn it a quarter to look at it
USE_EXIF = SourceOptions(use_exif=True, mixed_sizes=True)


def exif_block(orientation=1, **tags):
    block = Image.Exif()
    block[TAG.Orientation] = orientation
    block.get_ifd(ExifTags.IFD.Exif).update({TAG[name]: value for name, value in tags.items()})
    return block


def photo(size_wh=LANDSCAPE, orientation=1, **tags):
    """Bytes of a JPEG with these tags."""
    stored = io.BytesIO()
    Image.new('RGB', size_wh, 'gray').save(stored, 'jpeg', exif=exif_block(orientation, **tags))
    return stored.getvalue()


def plane(pixels_per_mm, unit_mm, unit, **more):
    """Tags of a lens of 5 mm; ``unit``: how the resolution is written."""
    return {'FocalLength': 5.0, 'FocalPlaneXResolution': pixels_per_mm * unit_mm,
            'FocalPlaneResolutionUnit': unit, **more}


@pytest.mark.parametrize(('size_wh', 'orientation'), [
    (LANDSCAPE, 1), (LANDSCAPE, ROTATED), (PORTRAIT, 1)])
def test_35_mm_equivalent_compares_diagonals(size_wh, orientation):
    """A lens as long as the diagonal of the film sees what one as long as ours does."""
    diagonal_mm = math.hypot(36, 24)
    camera = exif_camera(photo(size_wh, orientation, FocalLengthIn35mmFilm=28), size_wh)
    assert camera.fx == camera.fy == pytest.approx(28 / diagonal_mm * 500)
    assert (camera.size_wh, camera.distortion) == (size_wh, ())
    assert (camera.cx, camera.cy) == ((size_wh[0] - 1) / 2, (size_wh[1] - 1) / 2)


@pytest.mark.parametrize('size_wh', [LANDSCAPE, PORTRAIT])
@pytest.mark.parametrize(('unit_mm', 'unit'), [
    (25.4, INCH), (10.0, CENTIMETRE), (1.0, MILLIMETRE), (0.001, MICROMETRE)])
def test_resolution_of_the_focal_plane(size_wh, unit_mm, unit):
    camera = exif_camera(photo(size_wh, **plane(80, unit_mm, unit)), size_wh)
    assert camera.fx == camera.fy == pytest.approx(5 * 80, rel=1e-4)


def test_resolution_is_per_inch_unless_said():
    tags = plane(80, 25.4, INCH)
    del tags['FocalPlaneResolutionUnit']
    assert exif_camera(photo(**tags), LANDSCAPE).fx == pytest.approx(400, rel=1e-4)


@pytest.mark.parametrize('taken', [(1600, 1200), (1200, 1600)])
def test_a_photo_that_was_made_smaller_has_a_smaller_focal_length(taken):
    tags = plane(320, 1, MILLIMETRE, ExifImageWidth=taken[0], ExifImageHeight=taken[1])
    assert exif_camera(photo(**tags), LANDSCAPE).fx == pytest.approx(400, rel=1e-4)


@pytest.mark.parametrize('tags', [
    {}, {'FocalLength': 5.0}, {'FocalPlaneXResolution': 2000.0},
    plane(80, 1, 1), plane(80, 1, 77), plane(0, 1, MILLIMETRE),
    {'FocalLengthIn35mmFilm': 0}, {'FocalLengthIn35mmFilm': 65535},
    {'FocalLengthIn35mmFilm': 6}, plane(15.9, 1, MILLIMETRE), plane(1601, 1, MILLIMETRE),
    {'FocalLengthIn35mmFilm': 'wide'}, plane(80, 1, MILLIMETRE, FocalLength=float('nan')),
])
def test_what_is_absent_or_absurd_is_no_camera(tags):
    assert exif_camera(photo(**tags), LANDSCAPE) is None


@pytest.mark.parametrize('absurd', [0, 1, 65535])
def test_an_absurd_equivalent_leaves_the_other_tags(absurd):
    tags = plane(80, 1, MILLIMETRE, FocalLengthIn35mmFilm=absurd)
    assert exif_camera(photo(**tags), LANDSCAPE).fx == pytest.approx(400, rel=1e-4)


def test_files_without_exif_have_no_camera():
    image = np.full((300, 400, 3), 128, np.uint8)
    for suffix in ('.jpg', '.png', '.bmp', '.webp'):
        assert exif_camera(cv2.imencode(suffix, image)[1].tobytes(), LANDSCAPE) is None


def broken(data):
    """The photo with an EXIF block whose header is no TIFF header."""
    start = data.index(b'Exif\0\0') + 6
    return data[:start] + b'XXXX' + data[start + 4:]


def cut(data):
    """The photo with an EXIF block whose directory lies beyond its end."""
    start = data.index(b'Exif\0\0') + 6
    return data[:start + 4] + b'\x7f\x7f\x7f\x7f' + data[start + 8:]


@pytest.mark.parametrize('damage', [broken, cut])
def test_a_damaged_block_is_one_sentence(damage, recwarn):
    with pytest.raises(InputError, match=r'^expected an EXIF block that can be read, found '):
        exif_camera(damage(photo(FocalLengthIn35mmFilm=28)), LANDSCAPE)
    assert not recwarn


def test_any_damage_is_a_camera_or_one_sentence(recwarn):
    whole, chance = photo(FocalLengthIn35mmFilm=28, **plane(80, 1, MILLIMETRE)), random.Random(0)
    start = whole.index(b'Exif\0\0')
    length = int.from_bytes(whole[start - 2:start], 'big') - 2
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 3, 10])):
            data[start + chance.randrange(length)] = chance.choice([0, 255, chance.randrange(256)])
        try:
            camera = exif_camera(bytes(data), LANDSCAPE)
        except InputError:
            continue
        assert camera is None or 0.2 * 400 <= camera.fx <= 20 * 400
    assert not recwarn


# Sources and photos


@pytest.fixture
def mixed(tmp_path):
    """Photos of one camera: two with a focal length, one without EXIF, two with broken EXIF."""
    good = photo(FocalLengthIn35mmFilm=28)
    for name, data in (('a.jpg', good), ('b.jpg', photo()), ('c.jpg', broken(good)),
                       ('d.jpg', cut(good)), ('e.jpg', good)):
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_folder_says_where_its_cameras_are_from(mixed, caplog):
    frames = list(open_source(mixed, USE_EXIF))
    assert [f.camera is not None for f in frames] == [True, False, False, False, True]
    assert frames[0].camera_source == frames[4].camera_source == 'exif'
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert 'c.jpg: expected an EXIF block' in caplog.text


def test_what_is_given_counts_more_than_exif(mixed, caplog):
    frames = list(open_source(mixed, replace(USE_EXIF, fx=250.0)))
    assert {(f.camera.fx, f.camera_source) for f in frames} == {(250.0, 'given')}
    assert not caplog.records


def test_walks_do_not_read_exif(mixed):
    assert all(frame.camera is None for frame in open_source(mixed))


def shot(focal_px, camera_source, size_wh=LANDSCAPE):
    features = Features(np.array([[10.0, 20.0]], np.float32), np.ones((1, 4), np.float32),
                        np.ones(1, np.float32), np.ones(4, np.float32))
    half = (size_wh[0] // 2, size_wh[1] // 2)  # as the encoder sees it
    camera = replace(guessed_camera(size_wh), fx=focal_px, fy=focal_px).resized(half)
    return Shot(features, camera, camera.normalise(features.keypoints), np.zeros((1, 3), np.uint8),
                np.zeros(half[::-1], np.uint8), size_wh, camera_source=camera_source)


def test_photos_without_exif_are_taken_for_the_median_of_their_size(caplog):
    shots = [shot(f, 'exif') for f in (300, 320, 900)] + [shot(400, 'guessed')] * 2 + [
        shot(305, 'exif', PORTRAIT), shot(444, 'guessed', (500, 300)), shot(410, 'given')]
    found = like_others(shots)
    assert [2 * s.camera.fx for s in found] == [300, 320, 900, 320, 320, 305, 444, 410]
    assert found[3].camera == found[1].camera and found[3].camera_source == 'exif'
    np.testing.assert_allclose(found[3].camera.project(np.c_[found[3].xy, [1.0]]), [[10, 20]],
                               atol=1e-5)
    assert (found[6].camera_source, found[7].camera_source) == ('guessed', 'given')
    assert [r.getMessage() for r in caplog.records] == [
        '2 of 8 photos have no focal length in EXIF; taken to be the median of those of their '
        'size']


def test_nothing_is_said_where_all_or_none_have_exif(caplog):
    for source in ('exif', 'guessed', 'given'):
        shots = [shot(300, source)] * 3
        assert like_others(shots) == shots
    assert not caplog.records


def test_one_camera_by_exif_is_refined_like_a_guessed_one():
    one = [shot(300, 'exif'), shot(300, 'exif'), *like_others([shot(300, 'exif'),
                                                               shot(400, 'guessed')])]
    assert open_calibration(one) == ('focal', 'radial')
    assert open_calibration([shot(300, 'exif'), shot(310, 'exif')]) == ()
    assert open_calibration([shot(300, 'given')]) == ('radial',)


# Links


def test_thousands_of_links_to_one_photo_are_decoded_once(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / 'photo.jpg'), rng.integers(0, 256, (600, 800, 3), np.uint8))
    links = tmp_path / 'links'
    links.mkdir()
    for k in range(5000):
        os.symlink(tmp_path / 'photo.jpg', links / f'{k}.jpg')
    decoded = []
    decode = folder.decode_compressed
    monkeypatch.setattr(folder, 'decode_compressed', lambda data, where: (
        decoded.append(where), decode(data, where))[1])
    assert main(['reconstruct', str(links), '--out', str(tmp_path / 'map')]) != 0
    said = ' '.join(capsys.readouterr().err.split())
    assert 'expected at least two different images, found 5000 copies of one' in said
    assert len(decoded) == 1
