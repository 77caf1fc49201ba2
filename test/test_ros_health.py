"""Health of a node: exact rates, bounded memory, and one clear sentence for every fault."""

import json

import cv2
import numpy as np
import pytest

from feedforward_recon.ros.diagnosis import PERSISTENT, Transport, diagnose
from feedforward_recon.ros.health import Health, InfoState, info_state
from feedforward_recon.ros.image_watch import ImageWatch
from feedforward_recon.ros.input_health import (
    Connection,
    InputHealth,
    Publisher,
    StampFault,
    Traffic,
    stamp_fault,
)
from feedforward_recon.ros.meters import SECOND, Percentiles, RateMeter

NOW = 1_700_000_000 * SECOND
FRAME = SECOND // 15
RELIABLE, BEST_EFFORT = Publisher('/camera', True), Publisher('/camera', False)


def healthy(messages=30, *, start=NOW, **changes):
    """An active node whose camera has sent images for two seconds, and the time now."""
    health = Health('mapping_node: mapping', state='active', status='TRACKING',
                    active_since_ns=start, camera_info=InfoState.GOOD, frames=messages)
    image = InputHealth('/image', connection=Connection(publishers=(RELIABLE,)))
    health.inputs['image'] = image
    for index in range(messages):
        image.traffic.received(start + index * FRAME, start + index * FRAME, size_wh=(640, 480),
                               nbytes=921_600, frame_id='camera')
    for name, value in changes.items():
        setattr(health, name, value)
    return health, start + messages * FRAME


def codes(health, now, **options):
    return [diagnosis.code for diagnosis in diagnose(health, now, **options)]


# Meters


@pytest.mark.parametrize('rate', [0.5, 15.0, 90.0])
def test_rate_of_a_regular_stream_is_exact(rate):
    meter = RateMeter()
    for index in range(1000):
        now = NOW + round(index * SECOND / rate)
        meter.add(now)
    assert meter.rate_hz(now) == pytest.approx(rate, rel=1e-6)
    assert meter.rate_hz(now + SECOND) < rate
    assert meter.rate_hz(now + 6 * SECOND) == 0.0


def test_rate_survives_a_clock_that_goes_back_and_stays_bounded():
    meter = RateMeter(size=50)
    for index in range(1000):
        meter.add(NOW - SECOND + index)
    for index in range(50):
        meter.add(NOW + index * SECOND // 1000)
    assert meter.rate_hz(NOW + 49 * SECOND // 1000) == pytest.approx(1000.0), 'more than 50 kept'
    assert RateMeter().rate_hz(NOW) == 0.0
    for index in range(10):
        meter.add(index * FRAME)
    assert meter.rate_hz(9 * FRAME) == pytest.approx(15.0)


def test_percentiles_are_those_of_the_newest_values():
    values = Percentiles(size=101)
    assert values.at(50) is None
    for value in [1e9] * 500 + list(range(101)):
        values.add(value)
    assert values.at(0, 50, 95, 100) == (0, 50, 95, 100)


@pytest.mark.parametrize(('step', 'elapsed', 'fault'), [
    (FRAME, FRAME, None),
    (0, FRAME, StampFault.EQUAL),
    (-FRAME, FRAME, StampFault.REVERSED),
    (-SECOND, FRAME, StampFault.REVERSED),
    (-10 * SECOND, FRAME, StampFault.JUMP_BACK),
    (3600 * SECOND, FRAME, StampFault.JUMP_AHEAD),
    (30 * SECOND, 30 * SECOND, None),
    (30 * SECOND, -5, StampFault.JUMP_AHEAD),
])
def test_stamps_are_judged_by_the_one_before_and_the_clock(step, elapsed, fault):
    assert stamp_fault(NOW + step, NOW, elapsed, SECOND) is fault
    assert stamp_fault(NOW + step, None, elapsed, SECOND) is None
    assert stamp_fault(0, NOW, elapsed, SECOND) is StampFault.ZERO
    assert stamp_fault(NOW + step, 0, elapsed, SECOND) is None


def test_what_passes_between_jumps_is_strictly_increasing():
    rng, image, passed = np.random.default_rng(1), Traffic(), []
    for index in range(500):
        stamp = NOW + index * FRAME + int(rng.integers(-3, 4)) * FRAME
        if image.received(NOW + index * FRAME, stamp) is None:
            passed.append(stamp)
    assert len(passed) > 50
    assert all(later > earlier for earlier, later in zip(passed, passed[1:], strict=False))
    assert image.faults[StampFault.REVERSED] and image.faults[StampFault.EQUAL]


def picture(rng):
    return cv2.resize(rng.integers(0, 255, (15, 20, 3), np.uint8), (640, 480),
                      interpolation=cv2.INTER_NEAREST)


@pytest.mark.parametrize(('code', 'change'), [
    ('BLACK', lambda image: image // 32),
    ('WHITE', lambda image: 255 - image // 32),
    ('FLAT', lambda image: 120 + image // 128),
    ('BLURRED', lambda image: cv2.GaussianBlur(image, (0, 0), 8)),
])
def test_images_that_cannot_be_mapped_are_named(code, change):
    rng, watch = np.random.default_rng(3), ImageWatch()
    for times in range(1, 4):
        watch.look(change(picture(rng)))
        assert watch.faults == {code: times}
    watch.look(picture(rng))
    assert watch.faults == {}


def test_real_pictures_are_not_blurred_and_repeated_ones_are_counted(room_frames):
    watch = ImageWatch()
    for frame in room_frames:
        watch.look(frame.image, frame.depth)
        assert watch.faults == {}
    for times in (1, 2):
        watch.look(room_frames[-1].image)
        assert watch.faults == {'REPEATED': times}


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf, -1.0])
def test_depth_without_a_measurement_is_named(value, room_frames):
    watch, frame = ImageWatch(), room_frames[0]
    watch.look(frame.image, np.full_like(frame.depth, value))
    assert watch.faults == {'DEPTH_EMPTY': 1}


@pytest.mark.parametrize(('focal', 'info', 'image', 'state'), [
    (500.0, (640, 480), (640, 480), InfoState.GOOD),
    (500.0, (640, 480), None, InfoState.GOOD),
    (500.0, (1280, 960), (640, 480), InfoState.OTHER_SIZE),
    (0.0, (640, 480), (640, 480), InfoState.ZERO),
])
def test_calibration_is_judged_against_the_images(focal, info, image, state):
    assert info_state([focal, 0, 320, 0, focal, 240, 0, 0, 1], info, image) is state


def test_what_was_noticed_is_counted_and_the_newest_is_diagnosed_for_a_while():
    health, now = healthy()
    health.warn('REFUSED', 'an image was refused', now)
    health.warn('REFUSED', 'another was refused', now)
    assert health.warnings['REFUSED'].times == 2
    assert diagnose(health, now)[0].sentence == 'another was refused'
    assert codes(health, now + 11 * SECOND, silence_s=60) == []


# Diagnoses: each fault alone gives its own code, and a healthy node none


def test_a_healthy_node_has_no_diagnosis():
    health, now = healthy()
    assert codes(health, now) == []


def test_a_paused_node_says_so_and_does_not_call_the_camera_lost():
    health, now = healthy(90, status='LOST')
    assert codes(health, now) == ['LOST']
    health.paused = True
    assert codes(health, now) == ['PAUSED']
    assert codes(health, now + 30 * SECOND) == ['SILENT', 'PAUSED']


@pytest.mark.parametrize('state', ['unconfigured', 'inactive', 'finalized'])
def test_a_node_that_is_not_active_has_no_diagnosis(state):
    health, now = healthy(state=state)
    health.inputs['image'] = InputHealth('/image', connection=Connection(publishers=()))
    assert codes(health, now + 60 * SECOND) == []


def silent_input(kind='image', **connection):
    """A node that has waited five seconds for its first image."""
    health, _ = healthy(0)
    health.inputs['image'] = InputHealth('/image', kind, connection=Connection(
        **{'publishers': (RELIABLE,), **connection}))
    return health, NOW + 5 * SECOND


def test_nothing_is_reported_before_the_node_has_waited():
    health, now = silent_input(publishers=())
    assert codes(health, now) == ['NO_PUBLISHER']
    assert codes(health, NOW + SECOND) == []


def test_no_publisher_names_what_could_be_meant():
    health, now = silent_input(publishers=(), alternatives=('/camera/image_raw',))
    (diagnosis,) = diagnose(health, now)
    assert diagnosis.code == 'NO_PUBLISHER' and diagnosis.blocking
    assert 'nobody publishes /image' in diagnosis.sentence
    assert '/camera/image_raw' in diagnosis.sentence


@pytest.mark.parametrize(('changes', 'code'), [
    ({'publishers': (BEST_EFFORT,), 'reliable': True}, 'QOS'),
    ({'publishers': (RELIABLE,), 'unmatched': 1}, 'QOS'),
    ({'publishers': (BEST_EFFORT,), 'reliable': False}, 'LARGE_IMAGES_LOST'),
    ({'publishers': (RELIABLE,), 'reliable': False}, 'LARGE_IMAGES_LOST'),
    ({'publishers': (RELIABLE,), 'kind': 'odom'}, 'NOTHING_SENT'),
    ({'publishers': (RELIABLE, BEST_EFFORT), 'kind': 'odom'}, 'NOTHING_SENT'),
])
def test_a_publisher_that_is_not_heard_is_explained(changes, code):
    health, now = silent_input(**changes)
    (diagnosis,) = diagnose(health, now)
    assert diagnosis.code == code
    assert '/camera' in diagnosis.sentence


def test_an_optional_input_that_nobody_publishes_is_not_diagnosed():
    health, now = healthy()
    health.inputs['depth'] = InputHealth('/depth', 'depth', needed=False,
                                         connection=Connection(publishers=()))
    assert codes(health, now, silence_s=1) == []


def test_a_camera_that_starts_late_is_not_accused_before_its_publisher_was_there_as_long():
    health, _ = silent_input(publishers=())
    image, start = health.inputs['image'].connection, NOW + 30 * SECOND
    for second in range(10):
        image.published((BEST_EFFORT,) if second >= 2 else (), start + second * SECOND)
        expected = ['NO_PUBLISHER'] if second < 2 else [] if second < 5 else ['QOS']
        assert codes(health, start + second * SECOND) == expected
    image.published((), start)
    image.published((RELIABLE,), start + 20 * SECOND)
    assert codes(health, start + 21 * SECOND) == []


def test_images_that_are_only_compressed_are_named_with_the_setting_for_them():
    health, now = silent_input(publishers=(), alternatives=('/a', '/image/compressed'))
    (diagnosis,) = diagnose(health, now)
    assert diagnosis.code == 'NO_PUBLISHER'
    assert '/image/compressed is published; listen to that with image_transport auto' \
        in diagnosis.sentence


def test_a_single_calibration_is_enough():
    """It may be sent once, long ago, with any stamp."""
    health, now = other_input('camera_info')
    info = health.inputs['camera_info']
    assert codes(health, now) == ['NOTHING_SENT']
    info.traffic.received(NOW, NOW - 3600 * SECOND)
    info.traffic.received(NOW, 0)
    info.traffic.received(NOW, NOW)
    info.traffic.received(NOW, NOW)
    info.connection.lost_total(3, now)
    assert codes(health, now) == []


def other_input(kind, **changes):
    """A healthy node, and an optional input that is published; nothing has come of it."""
    health, now = healthy(90, **changes)
    health.inputs[kind] = InputHealth(f'/{kind}', kind, needed=False,
                                      connection=Connection(publishers=(RELIABLE,)))
    return health, now


@pytest.mark.parametrize(('kind', 'changes', 'expected'), [
    ('odom', {'scale_source': 'depth', 'tf_mode': 'map_to_base'}, []),
    ('odom', {'scale_source': 'depth', 'tf_mode': 'map_to_odom'}, ['NOTHING_SENT']),
    ('odom', {'scale_source': 'unknown'}, ['NOTHING_SENT']),
    ('depth', {'mode': 'mapping'}, ['LARGE_IMAGES_LOST']),
    ('depth', {'mode': 'localization', 'has_map': True}, []),
])
def test_an_optional_input_is_missed_only_where_it_would_help(kind, changes, expected):
    health, now = other_input(kind, **changes)
    assert codes(health, now) == expected
    health.inputs[kind].traffic.received(NOW, NOW)
    assert codes(health, now) == ['SILENT'] * len(expected)


def test_odometry_is_not_missed_where_depth_tells_the_scale():
    health, now = other_input('odom')
    depth = health.inputs['depth'] = InputHealth('/depth', 'depth', needed=False)
    depth.traffic.received(now, now)
    assert codes(health, now) == []


def test_localising_without_a_map_is_the_first_diagnosis_and_at_once():
    health, _ = healthy(0, mode='localization')
    (diagnosis,) = diagnose(health, NOW)
    assert (diagnosis.code, diagnosis.blocking, diagnosis.certain) == ('NO_MAP', True, True)
    assert 'map:=FOLDER' in diagnosis.sentence and '~/load_map' in diagnosis.sentence
    health.inputs['image'].connection.publishers = ()
    assert codes(health, NOW + 5 * SECOND) == ['NO_MAP', 'NO_PUBLISHER']
    health.has_map = True
    assert codes(health, NOW + 5 * SECOND) == ['NO_PUBLISHER']


@pytest.mark.parametrize(('transport', 'present', 'absent'), [
    (Transport(rmem_max=212_992), ['fastdds.xml', 'net.core.rmem_max', 'compressed'], []),
    (Transport(profile='x.xml', rmem_max=1 << 30), ['compressed'], ['fastdds', 'rmem_max']),
    (Transport('rmw_cyclonedds_cpp', '', None), ['compressed'], ['fastdds', 'rmem_max']),
])
def test_advice_for_lost_images_fits_the_machine(transport, present, absent):
    health, now = silent_input(publishers=(BEST_EFFORT,), reliable=False)
    (diagnosis,) = diagnose(health, now, transport=transport)
    assert all(word in diagnosis.sentence for word in present)
    assert not any(word in diagnosis.sentence for word in absent)


def test_lost_messages_are_reported_while_they_are_lost():
    health, now = healthy()
    health.inputs['image'].connection.lost_total(7, now)
    health.inputs['image'].connection.lost_total(7, now + 60 * SECOND)
    assert [(c.code, c.blocking) for c in diagnose(health, now)] == [('FRAMES_LOST', False)]
    assert codes(health, now + 11 * SECOND, silence_s=60) == []
    health.inputs['image'].connection.lost_total(70, now)
    assert [(c.code, c.blocking) for c in diagnose(health, now)] == [('FRAMES_LOST', True)]
    health.inputs['image'].connection.resubscribed(reliable=True)
    assert codes(health, now) == []


def test_a_camera_that_falls_silent_and_comes_back():
    health, now = healthy()
    (diagnosis,) = diagnose(health, now + 30 * SECOND)
    assert diagnosis.code == 'SILENT' and 'for 30 s' in diagnosis.sentence
    health.inputs['image'].connection.publishers = ()
    assert 'its publisher is gone' in diagnose(health, now + 30 * SECOND)[0].sentence
    later = now + 30 * SECOND
    assert health.inputs['image'].traffic.received(later, later) is None
    assert codes(health, later) == []


def test_a_clock_that_went_back_is_not_silence():
    health, now = healthy()
    assert codes(health, now - 3600 * SECOND) == []


@pytest.mark.parametrize(('step', 'code'), [
    (0, 'STAMPS_EQUAL'), (-FRAME, 'STAMPS_REVERSED'), (-5 * SECOND, 'STAMPS_JUMP_BACK')])
def test_stamps_are_named_and_forgotten(step, code):
    health, now = healthy()
    image = health.inputs['image'].traffic
    image.received(now, image.stamp_ns + step)
    assert codes(health, now) == [code]
    assert '/image' in diagnose(health, now)[0].sentence
    image.received(now + 11 * SECOND, now + 11 * SECOND)
    assert codes(health, now + 11 * SECOND) == []


def test_zero_stamps_block():
    health, now = healthy()
    health.inputs['image'].traffic.received(now, 0)
    assert [(c.code, c.blocking) for c in diagnose(health, now)] == [('STAMPS_ZERO', True)]


@pytest.mark.parametrize(('sim', 'shift', 'words'), [
    (False, -3600, '3600 s behind the clock of this node; for a bag or simulation set'),
    (False, 3600, '3600 s ahead of the clock'), (True, -3600, 'the bag plays without --clock')])
def test_clocks_that_disagree(sim, shift, words):
    health, now = healthy(use_sim_time=sim)
    image = InputHealth('/image', connection=Connection(publishers=(RELIABLE,)))
    image.traffic.received(now, now + shift * SECOND)
    health.inputs['image'] = image
    (diagnosis,) = diagnose(health, now)
    assert diagnosis.code == 'CLOCK_OFFSET' and words in diagnosis.sentence


@pytest.mark.parametrize(('changes', 'code', 'words'), [
    ({'use_sim_time': True, 'clock_running': False}, 'NO_CLOCK', '/clock'),
    ({'camera_info': InfoState.MISSING}, 'INFO_MISSING', 'field of view is guessed'),
    ({'camera_info': InfoState.ZERO}, 'INFO_ZERO', 'all-zero'),
    ({'camera_info': InfoState.OTHER_SIZE, 'info_wh': (1280, 960)}, 'INFO_OTHER_SIZE',
     'for 1280x960 images, but the images are 640x480'),
    ({'tf_missing': (('base_link', 'camera_optical_frame'),)}, 'TF_MISSING',
     'does not connect base_link and camera_optical_frame'),
    ({'status': 'LOST', 'reason': 'TOO_FEW_INLIERS'}, 'LOST', '(TOO_FEW_INLIERS)'),
    ({'status': 'NOT_LOCALISED'}, 'NOT_LOCALISED', 'not found in the map'),
    ({'status': 'INITIALISING'}, 'INITIALISING', 'sideways'),
])
def test_one_fault_gives_one_diagnosis(changes, code, words):
    health, now = healthy(60, **changes)
    (diagnosis,) = diagnose(health, now)
    assert diagnosis.code == code and words in diagnosis.sentence


def test_an_empty_frame_id_is_named():
    health, now = healthy()
    health.inputs['image'].traffic.received(now, now, frame_id='')
    assert codes(health, now) == ['FRAME_ID_EMPTY']


def test_another_resolution_is_named_with_both_sizes():
    health, now = healthy()
    health.inputs['image'].traffic.received(now, now, size_wh=(320, 240))
    (diagnosis,) = diagnose(health, now)
    assert diagnosis.code == 'SIZE_CHANGED' and 'from 640x480 to 320x240' in diagnosis.sentence


@pytest.mark.parametrize(('code', 'found'), [
    ('BLACK', 'IMAGE_BLACK'), ('WHITE', 'IMAGE_WHITE'), ('FLAT', 'IMAGE_FLAT'),
    ('BLURRED', 'IMAGE_BLURRED'), ('REPEATED', 'IMAGE_REPEATED'),
    ('DEPTH_EMPTY', 'DEPTH_EMPTY')])
def test_pictures_are_reported_once_they_persist(code, found):
    health, now = healthy()
    health.pictures.faults = {code: PERSISTENT - 1}
    assert codes(health, now) == []
    health.pictures.faults = {code: PERSISTENT}
    assert codes(health, now) == [found]


def test_what_blocks_comes_first_and_a_lost_camera_is_the_last_explanation():
    health, now = healthy(60, camera_info=InfoState.MISSING, status='LOST',
                          tf_missing=(('odom', 'base_link'),))
    assert codes(health, now) == ['TF_MISSING', 'INFO_MISSING']


def test_every_sentence_ends_with_what_to_do():
    """One sentence: no line breaks, not endless, and an imperative after the semicolon."""
    health, now = silent_input(publishers=())
    health.inputs['odom'] = InputHealth('/odom', 'odom', needed=False)
    health.inputs['odom'].traffic.received(now, now)
    health.inputs['odom'].traffic.received(now, now - 20 * SECOND)
    health.pictures.faults = dict.fromkeys(['BLACK', 'DEPTH_EMPTY'], 9)
    health.camera_info, health.tf_missing = InfoState.ZERO, (('a', 'b'),)
    for diagnosis in diagnose(health, now):
        assert ';' in diagnosis.sentence and '\n' not in diagnosis.sentence
        assert len(diagnosis.sentence) < 400


# What others see


def test_report_is_strict_json_with_every_number():
    pytest.importorskip('diagnostic_msgs', reason='ros: diagnostic_msgs is not installed')
    from feedforward_recon.ros.diagnostics import report_json

    health, now = healthy(scale_source='depth', memory_bytes=3_000_000, dropped=4)
    for value in range(100):
        health.latency.add(float(value))
    told = json.loads(report_json(health, diagnose(health, now), now))
    assert (told['level'], told['summary']) == ('OK', 'TRACKING')
    assert (told['scale_source'], told['memory_bytes'], told['dropped']) == (
        'depth', 3_000_000, 4)
    assert set(told['latency_ms']) == {'p50', 'p95', 'p99'}
    assert told['inputs']['image']['rate_hz'] == pytest.approx(15, abs=0.5)
    assert told['inputs']['image']['publishers'] == [
        {'node': '/camera', 'reliability': 'reliable'}]


@pytest.mark.parametrize(('changes', 'later', 'level'), [
    ({}, 0, b'\x00'), ({'camera_info': InfoState.MISSING}, 0, b'\x01'),
    ({'tf_missing': (('odom', 'base_link'),)}, 0, b'\x02'), ({}, 30, b'\x03'),
    ({'state': 'inactive'}, 30, b'\x00')])
def test_diagnostics_have_the_level_of_the_worst_diagnosis(changes, later, level):
    pytest.importorskip('diagnostic_msgs', reason='ros: diagnostic_msgs is not installed')
    from feedforward_recon.ros.diagnostics import diagnostic_status

    health, now = healthy(**changes)
    now += later * SECOND
    status = diagnostic_status(health, diagnose(health, now), now)
    assert status.level == level
    assert status.name == 'mapping_node: mapping'
    values = {item.key: item.value for item in status.values}
    assert values['inputs.image.topic'] == '/image'
    assert values['inputs.image.publishers'] == '/camera reliable'
