"""docs/benchmarks.md, and the figures of README.md, from benchmarks/results/*.json.

Run as ``python -m benchmarks.tables``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import DRIVE, KITCHEN, REPOSITORY, RESULTS
from benchmarks.scoring import Row, value_at
from feedforward_recon.evaluation import RECALL_THRESHOLDS

PAGE, README = REPOSITORY / 'docs' / 'benchmarks.md', REPOSITORY / 'README.md'
MARKS = '<!-- measured -->', '<!-- /measured -->'
INTRODUCTION = """# Benchmarks

Written by `make bench` (`python -m benchmarks.run_all`, then `python -m benchmarks.tables`) from
`benchmarks/results/*.json`; not edited by hand. Data: the real image sets in `FFRECON_DATA`,
which are not part of this repository. Under each table: commit, machine and versions.
Seconds are wall time on that machine with whatever else it was doing (load per core is given);
CPU seconds add up all threads and are the steadier figure.
"""
TRUTH = (
    'The truth of the kitchen is structure from motion (Brachmann et al., ICCV 2021), good to '
    'millimetres or a centimetre, in this and all other tables. Until 2026-11-21 it was that of '
    'KinectFusion, which is itself 5.0 cm and 2.4 deg off: against it this package had 4.5 cm '
    'with depth and 5.6 cm without, COLMAP 5.2 cm.')

GPU = """## On a GPU

Not measured yet: no GPU was available. `make bench-gpu` (`benchmarks/gpu_day.sh`) measures in
parts of less than nine minutes, goes on where it stopped, and writes JSON files to a folder; on a
CPU `DEVICE=cpu` rehearses it.

- `attention_*`: the whole network of VGGT-1B's size, random weights, bfloat16, 50 to 1000 views of
  518x392, with `ttt`, `sparse` and flash softmax. Goals at 1000 views: 11.6 and 12.4 times faster
  than softmax.
- `update`: share of the bfloat16 peak that the update of a `ttt` layer reaches.
- `pieces`: `ffrecon map --model vggt` and `vgg-t3`, seconds of preparation, parts of the network
  and mapping.
- `rooms`, `throughput`, `training`: views of rooms, steps of training, a training of `tiny`.
- `goals`: what was reached of the goals.
"""


def page(results: Path = RESULTS) -> str:
    """The whole page, from the results that are there."""
    parts = [INTRODUCTION]
    for title, names, columns, notes in SECTIONS:
        contents = [json.loads((results / f'{name}.json').read_text(encoding='utf-8'))
                    for name in names if (results / f'{name}.json').exists()]
        if contents:
            rows = {key: row for content in contents for key, row in content['rows'].items()}
            parts += [f'## {title}', notes, table(rows, columns),
                      '\n'.join(map(_origin, contents))]
    return '\n\n'.join(part.strip() for part in [*parts, GPU]) + '\n'


def front_page(text: str, results: Path = RESULTS) -> str:
    """The README with the lines between its marks replaced by the headline figures."""
    before, rest = text.split(MARKS[0])
    lines = ['| measured | this package | peer in the same run | ratio |', '|---|---|---|---|',
             *filter(None, (headline.line(results) for headline in HEADLINES))]
    return '\n'.join([before + MARKS[0], *lines, MARKS[1] + rest.split(MARKS[1])[1]])


def table(rows: dict[str, Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """Markdown table; rows are 'case | system' and stay together by case."""
    lines = [' | '.join(['case', 'system', *columns]), ' | '.join(['---'] * (len(columns) + 2))]
    order = list(dict.fromkeys(key.split(' | ')[0] for key in rows))
    for key in sorted(rows, key=lambda key: order.index(key.split(' | ')[0])):
        case, _, system = key.partition(' | ')
        lines.append(' | '.join([case, system, *(cell(rows[key]) for cell in columns.values())]))
    return '\n'.join(f'| {line} |' for line in lines)


def number(key: str, digits: int, factor: float = 1.0, missing: str = '-', spread: str = ''
           ) -> Callable[[Row], str]:
    """A cell: the value at a dotted key, scaled and rounded, and how much it varies."""
    def cell(row: Row) -> str:
        value, varies = value_at(row, key), value_at(row, spread) if spread else None
        text = missing if value is None else f'{value * factor:.{digits}f}'
        return text if varies is None else f'{text} ± {varies * factor:.{digits}f}'
    return cell


def or_ratio(name: str, cell: Callable[[Row], str]) -> Callable[[Row], str]:
    """A cell, or in a row of ratios the one of that name."""
    ratio = number(f'ratios.{name}', 2)
    return lambda row: ratio(row) if 'ratios' in row else cell(row)


def _within(metres: float, degrees: float) -> Callable[[Row], str]:
    index = RECALL_THRESHOLDS.index((metres, degrees))
    return lambda row: f'{100 * row["recall"][index]:.0f} %'


def _percent(key: str) -> Callable[[Row], str]:
    number_of = number(key, 1, 100)
    return lambda row: '-' if value_at(row, key) is None else f'{number_of(row)} %'


def _percent_of_path(row: Row) -> str:
    error = row.get('error')
    return '-' if error is None else f'{100 * error["rmse"] / error["path_length"]:.2f} %'


def _origin(content: Row) -> str:
    origin, machine = content['provenance'], content['provenance']['machine']
    versions = ', '.join(f'{name} {version}' for name, version in origin['versions'].items())
    changed = ' with local changes' if origin['modified'] else ''
    return (f'*{origin["date"]}, commit {origin["commit"]}{changed}; {machine["cpu"]}, '
            f'{machine["cores"]} cores, load per core {machine["load_per_core"]}; {versions}*\n')


def _tracked(row: Row) -> str:
    """Of all walks together."""
    return _of_all(row, 'tracked')


def _of_all(row: Row, key: str) -> str:
    return f'{_sum(row, key)} of {_sum(row, "images")}'


def _sum(row: Row, key: str) -> str:
    """Of all walks together, from their mean."""
    return f'{row[key] * row.get("walks", 1):.0f}'


MAPPING: dict[str, Callable[[Row], str]] = {
    'walks': number('walks', 0, missing='1'),
    'tracked': or_ratio('tracked', _tracked),
    'ATE cm': or_ratio('ATE', number('error.rmse', 2, 100, spread='spread')),
    'of path': _percent_of_path,
    'rotation deg': or_ratio('rotation', number('error.rotation_median_deg', 2)),
    'live ATE cm': or_ratio('live ATE', number('live_error.rmse', 2, 100)),
    'live deg': or_ratio('live rotation', number('live_error.rotation_median_deg', 2)),
    'ATE at keyframes cm': or_ratio('keyframe ATE', number('keyframe_error.rmse', 2, 100)),
    'ms to a pose': or_ratio('latency', number('latency_ms', 0)),
    'CPU s': or_ratio('CPU', number('cpu_seconds', 1)),
    'aligned by': lambda row: row.get('alignment', ''),
    'straight line cm': number('error.straight_line_rmse', 0, 100)}
PAIRS: dict[str, Callable[[Row], str]] = {
    'pairs': number('pairs', 0), 'AUC@30': number('auc30', 3, spread='auc30_spread'),
    'AUC@5': number('auc5', 3, spread='auc5_spread'), 'right matches': number('right', 0),
    'precision': number('precision', 2)}
POSE_ACCURACY: dict[str, Callable[[Row], str]] = {
    'windows': number('windows', 0), 'pairs': number('pairs', 0), 'AUC@30': number('auc30', 3),
    'RRA@15': number('rra15', 3), 'RTA@15': number('rta15', 3), 'AbsRel': number('abs_rel', 3),
    'guess': lambda row: row.get('guess', '')}
STUDENTS: dict[str, Callable[[Row], str]] = {
    'AUC@30': number('auc30', 3), 'world points alone': number('auc30_points', 3),
    'AbsRel': number('abs_rel', 3), 'CPU s': number('cpu_seconds', 1),
    'peak MB': number('peak_mb', 0), 'weights MB': number('megabytes', 1)}
LOCALISATION: dict[str, Callable[[Row], str]] = {
    'found': lambda row: f'{row["localised"]} of {row["queries"]}',
    'median cm': number('median_m', 2, 100), 'median deg': number('median_deg', 2),
    **{f'{metres * 100:.0f} cm, {degrees:.0f} deg': _within(metres, degrees)
       for metres, degrees in RECALL_THRESHOLDS},
    'map MB': number('nbytes', 2, 1e-6), 'ms per query': number('query_ms', 0),
    'CPU ms': number('query_cpu_ms', 0)}
STRESS: dict[str, Callable[[Row], str]] = {
    'live poses': lambda row: _of_all(row, 'tracked_live'),
    'not sure': lambda row: _sum(row, 'unsure_live'),
    'false, live': lambda row: _sum(row, 'false_live'),
    'in the end': lambda row: _of_all(row, 'tracked'), 'false': lambda row: _sum(row, 'false'),
    'ATE cm': number('error.rmse', 2, 100, spread='spread'),
    'live ATE cm': number('live_error.rmse', 2, 100), 'CPU s': number('cpu_seconds', 1)}
ATTENTION: dict[str, Callable[[Row], str]] = {
    'CPU ms per view': number('ms_per_view', 1), 'peak MB': number('peak_mb', 0),
    'state MB': number('state_mb', 2), 'exponent': number('exponent', 2),
    'of the last doubling': number('last_exponent', 2),
    'faster than softmax': number('speed_up', 1)}
MEMORY: dict[str, Callable[[Row], str]] = {
    'queries': number('queries', 0), 'median cm': number('median_m', 2, 100),
    '1 cm, 1 deg': lambda row: f'{100 * row["recall"][0]:.0f} %',
    'found': lambda row: f'{100 * row["recall"][2]:.0f} %', 'wrong': number('wrong', 0),
    'MB': number('nbytes', 2, 1e-6), 'write ms': number('write_ms', 1),
    'search ms': number('search_ms', 0)}
PHOTOS: dict[str, Callable[[Row], str]] = {
    'registered': lambda row: f'{row["registered"]} of {row["images"]}',
    'ATE, 1e-4 of the extent': number('ate_of_extent', 1, 1e4),
    'rotation deg': number('error.rotation_median_deg', 3), 's': number('seconds', 1),
    'CPU s': number('cpu_seconds', 1), 'focal error': number('focal_error', 4)}
TREES: dict[str, Callable[[Row], str]] = {
    'registered': lambda row: f'{row["registered"]} of {row["images"]}',
    'deepest': number('depth', 0), 'mean depth': number('mean_depth', 1),
    'ATE, 1e-4 of the extent': number('ate_of_extent', 0, 1e4),
    'rotation deg': number('error.rotation_median_deg', 2)}
PHOTO_SCALE: dict[str, Callable[[Row], str]] = {
    'registered': lambda row: (f'{row["registered"]} of {row["images"]}' if 'registered' in row
                               else '-'),
    'rotation deg': number('error.rotation_median_deg', 2),
    'retrieval ms': number('retrieval_ms', 2), 'together ms': number('together_ms', 1),
    'MB': number('peak_mb', 2), 'search ms': number('search_ms', 2),
    'exact search ms': number('exact_ms', 2), 'found': number('found', 3)}
JOINT: dict[str, Callable[[Row], str]] = {
    'registered': lambda row: (f'{row["registered"]} of {row["images"]}' if 'registered' in row
                               else '-'),
    'ATE cm': number('error.rmse', 2, 100),
    'rotation deg': number('error.rotation_median_deg', 2), 's': number('seconds', 0),
    'CPU s': number('cpu_seconds', 0),
    **{f'{name} s': number(f'parts.{name}', 0) for name in (
        'reading', 'features', 'stem', 'joint pass', 'heads', 'matching', 'poses', 'depth',
        'pairs', 'refinement', 'saving')},
    'peak MB': number('peak_mb', 0), 'exponent': number('exponent', 2),
    'of CPU time': number('cpu_exponent', 2)}
SECTIONS = (
    ('Mapping', ('mapping', 'peers_mapping'), MAPPING,
     'Means over walks; ± is the standard deviation between them. The kitchen is walked in four '
     'ways: forwards, backwards, every second image, and from the middle to the end, then from '
     'the middle to the beginning. ATE: root mean square distance of camera centres after one '
     'alignment; rotation: median, after the orientations were aligned by their own mean. Live: '
     'poses as they came with the images, before anything was refined. At keyframes: refined '
     'poses at the moments of the keyframes of ORB-SLAM3; of its monocular images only those are '
     'refined, so its other figures are of live poses there. ORB-SLAM3 gets the images at the '
     'pace of the camera, this package as fast as it takes them, on one thread. Straight line: '
     'what the best line at constant velocity reaches, without looking at any image. Rows "/" '
     'are ratios: below 1 this package is ahead, but for tracked.\n\n' + TRUTH),
    ('Pairs of images', ('pairs',), PAIRS,
     'Features alone: pairs of images whose orientations are 8 to 40 degrees apart, 24 for each '
     'of three draws, long side 640; mutual nearest neighbours, essential matrix by MAGSAC, '
     'intrinsics given. AUC: area under the share of pairs whose larger error, of rotation and '
     'of direction of translation, is within 30 or 5 degrees; ± is the standard deviation '
     'between draws. Right: within 3 px of the true epipolar lines. In brackets: how many '
     'features an image may have.'),
    ('Poses of shuffled windows', ('pose_accuracy',), POSE_ACCURACY,
     'Windows of 8 images in any order, each of which overlaps with another. Network: `tiny`, of '
     'the images alone; refined: by tracks of the compact encoder and with known intrinsics, '
     'from the poses of the network or from those of a constant answer. Constant: no camera '
     'moves, or each a step along one axis from the one before; the best of seven, chosen by '
     'the truth (guess). Compact: each pair by its matches and an essential matrix, intrinsics '
     'given. AUC@30: mean over pairs of 1 - e / 30 where the larger error e, of rotation and of '
     'direction, is below 30 degrees; RRA, RTA: rotations and directions within 15 degrees; a '
     'pair without an answer is wrong. AbsRel: of depths, after one median scale per window.'),
    ('Students of tiny', ('students',), STUDENTS,
     'The attentions of VGG-T3 (ttt), Speed3R (sparse) and Lite3R (sla), learnt from `tiny` '
     '(dense). Windows of shuffled images, of 8 views of the nine sets above, of more of the '
     'kitchen, the fox and the drive, where there are so many. AUC@30: poses from matches; world '
     'points alone: those that know of other views through the attention only. Without: joint '
     'attentions that say nothing. Pass: one pass over images of the kitchen, on one core; peak: '
     'memory beyond that of the network and the images.'),
    ('Stress', ('stress',), STRESS,
     'Rendered walks of 160 images (320x240, 20 Hz) with exact truth, four rooms for each case, '
     'all images of a case together. False: the system vouches for a pose that is more than '
     '20 cm off, after the alignment on which most poses agree; not sure: poses with status '
     'UNCERTAIN. White corridor: for about 15 % of the images nothing but a white wall is seen. '
     'Moving boxes cover more than 30 % of most images. Live: as the poses came with the images; '
     'in the end: after the last refinement and the search for lost images.'),
    ('Sparse and late depth', ('sparse_depth',),
     {'tracked': lambda row: f'{row["tracked"]} of {row["images"]}',
      'ATE cm': number('error_cm', 2), 'spread cm': number('spread_cm', 2),
      'of dense': number('ratio', 2), 'CPU s': number('cpu_seconds', 1)},
     'RGB-D mapping of four rendered rooms, 320x240, each walked forwards and backwards, with the '
     'depth of every image spoilt in one way; means over the walks. ATE without scale. Rendered '
     'depth is exact, which favours dense depth.'),
    ('Dense clouds of one camera', ('dense_cloud',),
     {'keyframes': number('keyframes', 0), 'points': number('points', 0),
      'AbsRel': number('abs_rel', 3), 'accurate': number('accuracy', 2),
      'complete': number('completeness', 2), 'CPU s': number('cpu_seconds', 1)},
     'The kitchen from its images alone: clouds of landmarks, and dense ones (`cloud.dense`). '
     'AbsRel: of the points of all keyframes against the depth image that was hidden, after the '
     'trajectory was aligned; accurate: share of the points of the cloud within 10 cm of what the '
     'sensor measured; complete: share of what it measured (voxels of 5 cm) within 10 cm of a '
     'point of the cloud.'),
    ('Sessions', ('sessions',),
     {'tracked': lambda row: f'{row["tracked"]:.0f} of {row["images"]:.0f}',
      'ATE cm': number('ate_m', 2, 100), 'alone cm': number('ate_alone_m', 2, 100),
      'one run cm': number('ate_one_run_m', 2, 100), 'of alone': number('ratio_alone', 2),
      'of one run': number('ratio', 2),
      'recall': lambda row: f'{100 * row["recall_5cm"]:.0f} %' if 'recall_5cm' in row else '-',
      'keyframes': number('keyframes', 0), 'memory bytes': number('memory_bytes', 0),
      'keyframes MB': number('keyframes_bytes', 1, 1e-6)},
     'Three sessions, each going on with the map that the one before saved. Alone: a new map of '
     'the same images; one run: the same images in one run over all. Each after an alignment of '
     'its own, means over walks forwards and backwards. All keyframes: those of the last map, '
     'after one alignment, against all images of the one run. Recall: images of the first '
     'session found within 5 cm.'),
    ('Localisation', ('localisation', 'peers_localisation'), LOCALISATION,
     'Medians and recalls are over all queries; one without an answer counts as wrong. Mapping '
     'images have their true poses unless the row says otherwise. Interleaved: every fourth '
     'block of 25 frames is query; extrapolation: the first 70 % are mapped.'),
    ('Scene memories at equal bytes', ('memory',), MEMORY,
     'Landmark slots alone (the default), slots and coordinate network (hybrid), and the network '
     'alone, written once from the same keyframes with given poses. Found: within 5 cm and 5 '
     'degrees. Wrong: an answer more than 20 cm or 10 degrees off. Building: rendered rooms that '
     'share one memory; the first room is asked for after the last one was written. Write: CPU of '
     'a keyframe; search: of a query, after its image was encoded.'),
    ('Photos in any order', ('offline',), PHOTOS,
     'Images in a shuffled order, on all cores, from decoded images (COLMAP: from lossless files) '
     'to a map; ours with its scene memory, and with the radial distortion of a camera that is '
     'said to have none refined. COLMAP: defaults of pycolmap, intrinsics given and held; '
     'sequential matching gets the order of the walk. Errors after a similarity; extent: diagonal '
     'of the box around the true camera centres. The truth of llff, fox, door and cup is itself '
     'that of COLMAP; that of Strecha is measured. Without intrinsics: nothing is known of the '
     'camera; focal error: of what was found. Rows of ngp_fox are of 2026-11-30, since when '
     'tracks are made anew (docs/experiments.md); the others are of before.'),
    ('Trees of pairs', ('trees',), TREES,
     'Poses as they are accumulated along a tree, before any refinement. Shortest: shortest-path '
     'tree from the most central image; spanning: minimum spanning tree. Costs of a pair by its '
     'similarity S: 1 - S, (1 - S)^2, arccos S.'),
    ('Growth with the number of photos', ('photo_growth',),
     {'registered': lambda row: f'{row["registered"]} of {row["images"]}',
      'rotation deg': number('error.rotation_median_deg', 2), 's': number('seconds', 1),
      'CPU s': number('cpu_seconds', 1), 'exponent': number('exponent', 2)},
     'The first images of the kitchen walk, shuffled: from decoded images to a map with its '
     'memory. Exponent p: best fit of CPU time = c N^p so far.'),
    ('Thousands of photos', ('photo_scale',), PHOTO_SCALE,
     'A synthetic collection, about 300 features an image; matches and motions of pairs are '
     'replayed. Per image: CPU time of what follows encoding and matching (which images are '
     'compared, rotations of all pairs, tree, poses along it, tracks and points; no bundle '
     'adjustment), and peak memory beyond that of features and images. Search: for the neighbours '
     'alone, by default (beyond 2000 images an index) and exact; found: of the exact neighbours. '
     'Extrapolated: the power law that fits best.'),
    ('One pass over all photos', ('joint',), JOINT,
     'The first images of the kitchen walk, by `ffrecon reconstruct --joint`: from the files to '
     'a saved map, intrinsics given. The kitchen has 500 images; of more, the others are the '
     'same images cut to nine tenths of each side, at random places. Seconds are wall time, told '
     'apart: of the network (stem, joint pass, heads), of poses and depth of its matches '
     '(matching, poses, depth), of pairs of features, and of what makes the map of them. Peak: '
     'of the process, which is a new one for each row. Growth: exponent p of the best fit of '
     'time = c N^p.'),
    ('Photos of rooms in which boxes move', ('moving_photos',),
     {'registered': lambda row: _of_all(row, 'registered'), 'maps': number('maps', 1),
      'false': lambda row: _sum(row, 'false'),
      'ATE cm': number('error.rmse', 2, 100, spread='spread'),
      'rotation deg': number('error.rotation_median_deg', 2),
      'observations of boxes': _percent('shown'), 'wrong points': _percent('wrong_points'),
      'wrong observations': _percent('wrong_observations'),
      'wrong points, not refined': _percent('not_refined.wrong_points'),
      'CPU s': number('cpu_seconds', 1)},
     'Four rendered rooms (320x240), 40 images of each, shuffled, monocular; means over rooms. '
     'Crossing: two boxes near the camera go to and fro, elsewhere in every image; covered: what '
     'they hide is hidden, but nothing moves. Two visits: in half of the images all boxes stand '
     '60 cm from where they are in the other half. Registered: in the largest map; maps: into '
     'how many the images fall. False: more than 20 cm off, after the similarity on which most '
     'poses agree; ATE: after one of all. Wrong points: half of their observations show a box; '
     'of two visits: they show a box in both. COLMAP as above.'),
    ('Two maps merged', ('merge',),
     {'images': lambda row: f'{row["registered"]} of {row["images"]}',
      'ATE cm': number('error.rmse', 2, 100),
      'rotation deg': number('error.rotation_median_deg', 2),
      'median cm of a query': number('median_m', 2, 100),
      '1 cm, 1 deg': lambda row: f'{100 * row["recall"][0]:.0f} %',
      'found': lambda row: f'{100 * row["recall"][2]:.0f} %',
      'memory MB': number('memory_bytes', 2, 1e-6), 's': number('seconds', 1)},
     'Every second image of the kitchen, mapped at once, and as two halves that share 50 of them; '
     'images between are looked for in both. Found: within 5 cm and 5 degrees.'),
    ('Wrong places', ('wrong_places',), {'images': number('images', 0),
                                         'accepted': number('accepted', 0)},
     'Images of other scenes, photos and rendered rooms against the memory of the kitchen; each '
     'accepted one is a mistake.'),
    ('Repeated office', ('repeated_office',),
     {'queries': number('queries', 0), 'answered': number('answered', 0),
      'wrong': number('wrong', 0)},
     'Two rendered offices of eight like cubicles each, of which four are mapped with true poses; '
     'with the default memory, and with a network beside slots at the same bytes. '
     'Wrong: more than 20 cm or 10 degrees off. Where nothing but what the map has several times '
     'is in view, no answer is right.'),
    ('Law of fixed memory', ('memory_law',),
     {'bytes': number('nbytes', 0),
      'CPU s per keyframe': number('cpu_seconds_per_keyframe', 3),
      'worst of 25': number('cpu_seconds_worst', 3)},
     'Every frame of the kitchen as a keyframe, the whole loop; and its keyframes given to the '
     'memory alone, lap after lap as if each were another kitchen.'),
    ('Live', ('live',),
     {'images': number('images', 0), 'poses': number('poses', 0),
      'Hz': number('hz', 1), 'of a core': lambda row: (
          '-' if row.get('core_share') is None else f'{100 * row["core_share"]:.0f} %'),
      'dropped': number('dropped', 0), 'p50 ms': number('p50_ms', 0),
      'p95 ms': number('p95_ms', 0), 'p99 ms': number('p99_ms', 0),
      'longest ms': number('max_ms', 0), 'waiting': number('waiting', 0),
      'ATE cm': number('ate_m', 1, 100),
      'MB': number('rss_mb', 0), 'MB per minute': number('rss_mb_per_minute', 1),
      'same trajectory': lambda row: {None: '-', True: 'yes', False: 'no'}[row.get('same')]},
     'player_node, the node and a listener to its poses in three processes over DDS: the walk, '
     '640x480 at 15 Hz, in a loop for 60 s; localization_node loads what mapping_node saved. '
     'Latency: from the stamp that the player gives an image to the '
     'arrival of its pose. Waiting: most images that were sent and not answered when a pose '
     'came. MB: resident memory of the node at the end, and its slope over the last 24 s.'),
    ('Growth of the global attentions', ('attention_scaling',), ATTENTION,
     'Backbone of `vggt-tiny` with initial weights, random images of 126x98 px (68 tokens per '
     'view) mapped in one call, one process per point. Peak: memory beyond the model. Exponent p: '
     'best fit of CPU time = c views^p over all points; faster: at the largest number of '
     'views.\n\n'
     '![CPU time per view and peak memory over the number of views](attention_scaling.png)'),
)


def _mapping_sentence(row: Row) -> str:
    live, rotation = number('live_error.rmse', 2, 100), number('error.rotation_median_deg', 2)
    return (f'{number("error.rmse", 2, 100)(row)} cm ({_percent_of_path(row)} of the path), live '
            f'{live(row)} cm; {rotation(row)} deg; {_tracked(row)} images; '
            f'{number("cpu_seconds", 0)(row)} CPU s')


def _localisation_sentence(row: Row) -> str:
    return (f'median {number("median_m", 2, 100)(row)} cm, {number("median_deg", 2)(row)} deg; '
            f'{_within(0.01, 1.0)(row)} within 1 cm and 1 deg, {_within(0.05, 5.0)(row)} within '
            f'5 cm and 5 deg; {number("nbytes", 1, 1e-6)(row)} MB')


def _pairs_sentence(row: Row) -> str:
    return f'AUC@30 {number("auc30", 3)(row)}, AUC@5 {number("auc5", 3)(row)}'


def _photos_sentence(row: Row) -> str:
    return (f'{1e4 * row["ate_of_extent"]:.1f}e-4 of the extent, '
            f'{number("error.rotation_median_deg", 3)(row)} deg; {row["registered"]} of '
            f'{row["images"]} images; {number("seconds", 0)(row)} s')


@dataclass(frozen=True)
class Headline:
    """A line of the README: a row of a result, and beside it that of a peer.

    sentence: figures of a row in words. peer: result and row. compared: what the ratios are of,
    {word: dotted key}.
    """

    label: str
    name: str
    case: str
    sentence: Callable[[Row], str]
    peer: tuple[str, str] | None = None
    compared: tuple[tuple[str, str], ...] = ()

    def line(self, results: Path) -> str | None:
        """The line, None without its row."""
        row, peer = _row(results, self.name, self.case), None
        if row is None:
            return None
        if self.peer is not None:
            peer = _row(results, *self.peer)
        if self.peer is None or peer is None:
            return f'| {self.label} | {self.sentence(row)} | | |'
        both = [(word, value_at(row, key), value_at(peer, key)) for word, key in self.compared]
        ratios = ', '.join(f'{word} {mine / theirs:.2f}' for word, mine, theirs in both
                           if mine is not None and theirs)
        system = self.peer[1].split(' | ')[1]
        theirs = f'{system}: {self.sentence(peer)}'
        return f'| {self.label} | {self.sentence(row)} | {theirs} | {ratios} |'


def _row(results: Path, name: str, case: str) -> Row | None:
    path = results / f'{name}.json'
    return json.loads(path.read_text(encoding='utf-8'))['rows'].get(case) if path.exists() \
        else None


def _mapping(label: str, case: str) -> Headline:
    return Headline(label, 'mapping', f'{case} | feedforward_recon', _mapping_sentence,
                    ('mapping', f'{case} | ORB-SLAM3'),
                    (('error', 'error.rmse'), ('live', 'live_error.rmse'),
                     ('at its keyframes', 'keyframe_error.rmse'),
                     ('rotation', 'error.rotation_median_deg'), ('images', 'tracked'),
                     ('CPU', 'cpu_seconds')))


def _localisation(label: str, split: str) -> Headline:
    return Headline(label, 'localisation', f'{KITCHEN} {split} | default', _localisation_sentence,
                    ('peers_localisation', f'{KITCHEN} {split} | SIFT + VLAD + PnP, every 5th '
                     'mapping image'), (('error', 'median_m'), ('rotation', 'median_deg'),
                                        ('size', 'nbytes'), ('time', 'query_cpu_ms')))


HEADLINES = (
    _mapping('kitchen walk of 33 s in four ways, RGB-D', f'{KITCHEN} RGB-D'),
    _mapping('the same, monocular', f'{KITCHEN} monocular'),
    _mapping('car, 51 images, monocular', f'{DRIVE} monocular'),
    _mapping('car, stereo', f'{DRIVE} stereo'),
    _localisation('images between mapped ones', 'interleaved'),
    _localisation('images beyond the mapped part', 'extrapolation'),
    Headline('relative pose of two images, seven sets', 'pairs',
             'mean of 7 sets | compact (1000)', _pairs_sentence,
             ('pairs', 'mean of 7 sets | XFeat (2000)'),
             (('AUC@30', 'auc30'), ('AUC@5', 'auc5'))),
    *(Headline(f'photos in any order: {label}', 'offline', f'{name} | ours', _photos_sentence,
               ('offline', f'{name} | pycolmap incremental, exhaustive matching'),
               (('error', 'error.rmse'), ('rotation', 'error.rotation_median_deg'),
                ('images', 'registered'), ('time', 'seconds')))
      for label, name in (('facade, 25 images', 'strecha_Herz-Jesus-P25'),
                          ('fox, 50 images', 'ngp_fox'))),
    Headline('images of other places', 'wrong_places', f'{KITCHEN} | other scenes',
             lambda row: f'{row["accepted"]} of {row["images"]} accepted'),
    *(Headline(f'cubicles that were not mapped, {label}', 'repeated_office',
               f'office, {label} | cubicles not mapped',
               lambda row: f'{row["wrong"]} of {row["queries"]} at a wrong place')
      for label in ('all alike', 'like furniture')),
    Headline('memory after 500 keyframes', 'memory_law', '500 keyframes',
             lambda row: f'{number("nbytes", 2, 1e-6)(row)} MB'),
)


if __name__ == '__main__':
    PAGE.write_text(page(), encoding='utf-8')
    README.write_text(front_page(README.read_text(encoding='utf-8')), encoding='utf-8')
