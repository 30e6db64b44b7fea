"""Time the parts that the project promises to be fast, side by side with the plain way."""

import itertools
import json
from pathlib import Path

from ..command import ToolParser, run_tool
from . import data, evaluation, export, inference, method, predict, training


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("benchmark", __doc__)
    commands = parser.add_subparsers(dest="part", required=True)
    modules = (method, training, inference, data, evaluation, export, predict)
    parts = [m.add_commands(commands) for m in modules]
    for part in itertools.chain(*parts):
        part.add_argument("--json", metavar="FILE", help="write the JSON there, not to the output")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    results = args.run(args)
    text = json.dumps(results, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    run_tool(main)
