"""The log has each diagnosis once when it begins and once when it is over."""

import itertools

import pytest

from feedforward_recon.geometry.camera import Camera
from feedforward_recon.ros.diagnosis import Diagnosis
from feedforward_recon.ros.diagnosis_log import GONE_S, HOLD_S, WORDINGS, DiagnosisLog, Line
from feedforward_recon.ros.health import Health
from feedforward_recon.ros.milestones import Milestones, about_camera

LOST = Diagnosis('LOST', 'the camera is lost (TOO_FEW_INLIERS); go back', True)
WRONG_TOPIC = Diagnosis('NO_PUBLISHER', 'nobody publishes /image; remap it', True, '/image')
REFUSED = Diagnosis('IMAGE_REFUSED', 'an image cannot be used; check it', certain=True)
SECONDS = range(60)


def silent(seconds, topic='/image'):
    return Diagnosis('SILENT', f'{topic} has been silent for {seconds} s; restart it', True, topic)


def told(log, *looks, start=0):
    """Lines of looks that are a second apart, each a list of diagnoses, with their second."""
    return [(second, line) for second, found in enumerate(looks, start)
            for line in log.look(found, float(second))]


def test_a_diagnosis_that_stays_is_told_once_and_its_end_once():
    lines = told(DiagnosisLog(), *[[WRONG_TOPIC]] * 30, *[[]] * 30)
    assert lines == [
        (HOLD_S, Line('ERROR', 'NO_PUBLISHER: nobody publishes /image; remap it')),
        (29 + GONE_S, Line('INFO', 'NO_PUBLISHER is over (/image)'))]


def test_numbers_that_change_are_not_told_again():
    lines = told(DiagnosisLog(), *[[silent(second)] for second in SECONDS])
    assert [line.text for _, line in lines] == [
        f'SILENT: /image has been silent for {HOLD_S:.0f} s; restart it']


def test_a_short_fault_is_not_told():
    log = DiagnosisLog()
    assert told(log, [LOST], [LOST], *[[]] * 20) == []
    assert told(log, *itertools.islice(itertools.cycle([[LOST], []]), 60), start=30) == []


def test_what_comes_and_goes_is_told_once_until_it_stays_away():
    flicker = itertools.islice(itertools.cycle([[LOST], [], [], []]), 200)
    lines = told(DiagnosisLog(), *[[LOST]] * 5, *flicker, *[[]] * 10, *[[LOST]] * 5)
    assert [line.level for _, line in lines] == ['WARNING', 'INFO', 'WARNING']
    assert lines[1][1].text == 'LOST is over: the camera was found again'
    assert lines[1][0] > 200, 'said to be over while it still came again'


def test_what_is_certain_is_told_at_once_and_an_event_has_no_end():
    assert told(DiagnosisLog(), [REFUSED], *[[]] * 10) == [
        (0, Line('WARNING', 'IMAGE_REFUSED: an image cannot be used; check it')),
        (GONE_S, Line('INFO', 'IMAGE_REFUSED is over'))]
    late = Diagnosis('CALIBRATION_LATE', 'the calibration came late', certain=True)
    assert len(told(DiagnosisLog(), *[[late]] * 10, *[[]] * 20)) == 1


def test_other_words_are_told_but_not_without_end():
    def remap(names):
        return Diagnosis('NO_PUBLISHER', f'nobody publishes /image; there is {names}', True,
                         '/image')

    lines = told(DiagnosisLog(), *[[remap('no other')]] * 5, *[[remap('/camera')]] * 5,
                 *[[remap('no other')]] * 5)
    assert [line.text[-8:] for _, line in lines] == ['no other', '/camera'.rjust(8)]
    letters = [[remap(chr(ord('a') + second % 26) * (1 + second // 26))] for second in SECONDS]
    assert len(told(DiagnosisLog(), *letters)) == WORDINGS


def test_what_stands_in_parentheses_is_a_detail():
    other = Diagnosis('LOST', 'the camera is lost (NO_CONSISTENT_POSE); go back', True)
    looks = itertools.islice(itertools.cycle([[LOST], [other]]), 60)
    assert len(told(DiagnosisLog(), *looks)) == 1


def test_one_code_of_two_topics_is_two_diagnoses():
    both, one = [silent(3), silent(3, '/depth')], [silent(3)]
    lines = [line.text for _, line in told(DiagnosisLog(), *[both] * 5, *[one] * 10)]
    assert len(lines) == 3
    assert lines[-1] == 'SILENT is over (/depth)'


def test_a_lost_camera_that_falls_silent_is_not_said_to_be_found():
    lost = [[LOST]] * 5
    for hidden in ([silent(9)], [Diagnosis('PAUSED', 'paused; go on', certain=True)]):
        lines = told(DiagnosisLog(), *lost, *[hidden] * 30, *lost)
        assert not [line for _, line in lines if line.text.startswith('LOST is over')]
        assert len([line for _, line in lines if line.text.startswith('LOST: ')]) == 1


def test_what_nobody_looks_at_any_more_is_not_said_to_be_over():
    log = DiagnosisLog()
    assert told(log, *[[WRONG_TOPIC, LOST]] * 5)
    log.forget_status()
    assert [line.text[:12] for _, line in told(log, *[[]] * 9, start=5)] == ['NO_PUBLISHER']
    assert told(log, *[[WRONG_TOPIC]] * 5, start=20)
    log.forget()
    assert told(log, *[[]] * 9, start=25) == []


@pytest.mark.parametrize(('mode', 'words'), [('mapping', 'the map has started; camera: given'),
                                             ('localization', 'found in the map')])
def test_the_first_pose_in_a_map_is_told_once(mode, words):
    health, milestones = Health('node', mode=mode, camera_source='given'), Milestones()
    health.status = 'LOST'
    assert milestones.reached(health) == []
    health.status = 'TRACKING'
    (sentence,) = milestones.reached(health)
    assert words in sentence
    health.status = 'LOST'
    assert milestones.reached(health) == []
    health.status = 'UNCERTAIN'
    assert milestones.reached(health) == []


def test_a_calibration_is_one_line_with_its_size_and_lens():
    camera = Camera(640, 480, 525.0, 524.0, 319.5, 239.5, (0.1, 0, 0, 0))
    assert about_camera(camera) == ('calibration of 640x480 images, focal length 525.0 x 524.0 '
                                    'px, centre (319.5, 239.5), plumb_bob distortion')
    assert about_camera(Camera.from_fov(70, (640, 480))).endswith('no distortion')
