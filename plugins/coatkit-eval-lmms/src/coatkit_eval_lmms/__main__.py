"""`python -m coatkit_eval_lmms`: where the tasks are, and rows of the benchmarks that upstream lacks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from coatkit_eval_lmms import TASKS

_EXAMPLE = """examples:
  lmms_eval --model coatkit --model_args run=RUN --include_path "$(python -m coatkit_eval_lmms)" --tasks coatkit_meld
  python -m coatkit_eval_lmms prepare meld MELD.Raw DATA/meld.jsonl
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the folder of tasks, or prepare a benchmark's rows."""
    parser = argparse.ArgumentParser(
        prog="python -m coatkit_eval_lmms",
        description="Without a command: print the folder that lmms-eval's --include_path takes.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("prepare", help="write the rows of a benchmark, from its folder as it is handed out")
    one.add_argument("benchmark", choices=("gtzan", "meld", "iemocap_session_5"))
    one.add_argument("folder", type=Path, help="what was handed out")
    one.add_argument("out", type=Path, help="JSON Lines to write: NAME.jsonl in the folder COATKIT_LMMS_DATA names")
    given = parser.parse_args(arguments)
    if given.command is None:
        print(TASKS)
        return 0
    from coatkit import CoatkitError
    from coatkit_eval_lmms.prepare import prepare

    try:
        rows, bad = prepare(given.benchmark, given.folder, given.out)
    except CoatkitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{given.out}: cannot be written: {error.strerror or error}", file=sys.stderr)
        return 3
    print(f"{given.out}: {rows} rows" + (f"; {len(bad)} left out, first: {bad[0]}" if bad else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
