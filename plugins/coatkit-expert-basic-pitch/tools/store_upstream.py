"""Pick the few upstream frames the tests compare with out of a dump of `tests/parity/basic_pitch.py`.

python tools/store_upstream.py DUMP.npz tests/upstream.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

SOUND = "noise 3 s"
PICKED = [(0, 15), (0, 60), (0, 156), (1, 16), (1, 80), (1, 120)]
"""Windows and rows of the kept frames to store: from the start to the end of each window."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    dump = np.load(args.dump)
    z, contour = dump[f"{SOUND}/z"], dump[f"{SOUND}/contour"]
    windows, rows = np.array(PICKED).T
    np.savez_compressed(
        args.out,
        windows=windows,
        rows=rows,
        samples=dump[f"{SOUND}/samples"][:16],
        z=z[windows, :, rows],
        contour=contour[windows * 142 + rows - 15],
        versions=dump["versions"],
    )


if __name__ == "__main__":
    main()
