"""What a day on a GPU found beside its goals: speed-ups over softmax, share of the peak.

    python -m benchmarks.gpu_goals FOLDER     # of benchmarks/gpu_day.sh; writes FOLDER/goals.json

Goals: 1000 views end to end, of VGGT-1B's size, 11.6 times faster than flash softmax with `ttt`
and 12.4 times with `sparse`. Softmax is the fastest kernel that was measured. Where it did not
fit into memory there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.attention_gpu import load

GOALS = {('ttt', 1000): 11.6, ('sparse', 1000): 12.4}
Row = dict[str, Any]


def speed_ups(rows: dict[str, Row]) -> dict[str, Row]:
    """Of each point of another attention over softmax with as many views, and its goal."""
    exact: dict[str, float] = {}
    for key, row in rows.items():
        place, _, label = key.rpartition(' | ')
        if label.split(',')[0] == 'softmax' and 'seconds' in row:
            exact[place] = min(row['seconds'], exact.get(place, row['seconds']))
    found = {}
    for key, row in rows.items():
        place, _, label = key.rpartition(' | ')
        if label.split(',')[0] != 'softmax' and place in exact and 'seconds' in row:
            found[key] = {'faster': exact[place] / row['seconds'],
                          'goal': GOALS.get((label, row['views']))}
    return found


def shares_of_peak(rows: dict[str, Row]) -> dict[str, Row]:
    """What updates of `ttt` layers reach of the peak of the device."""
    return {key: {'update_of_peak': row['update_of_peak'], 'layer_of_peak': row['layer_of_peak']}
            for key, row in rows.items() if 'update_of_peak' in row}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write them; 1 where there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, metavar='FOLDER')
    folder = parser.parse_args(arguments).folder
    rows = load(sorted(folder.glob('attention_*.json')) + [folder / 'update.json'])
    found = speed_ups(rows) | shares_of_peak(rows)
    for key, row in found.items():
        print(f'{key:50}', ', '.join(f'{name} {value:.3g}' for name, value in row.items()
                                     if value is not None))
    content = {'goals': {f'{name}, {views} views': goal for (name, views), goal in GOALS.items()},
               'rows': found}
    (folder / 'goals.json').write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    return 0 if found else 1


if __name__ == '__main__':
    sys.exit(main())
