"""Time the parts that the project promises to be fast, side by side with the plain way."""

import argparse
import itertools
import json
import sys
from pathlib import Path

from mcibi_d2 import InputError

from . import data, evaluation, export, method


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mcibi_d2.tools.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="part", required=True)
    parts = [m.add_commands(commands) for m in (method, data, evaluation, export)]
    for part in itertools.chain(*parts):
        part.add_argument("--json", metavar="FILE", help="write the JSON there, not to the output")
    args = parser.parse_args()
    try:
        results = args.run(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    text = json.dumps(results, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
