"""Turn a model that the paper's authors released into a checkpoint of this project.

The configs of the 18 models, and what their files are called: configs/released/README.md.
"""

import os
from collections import Counter

import torch
from tabulate import tabulate

from mcibi_d2 import InputError
from mcibi_d2.convert import Fate, convert
from mcibi_d2.engine import load_config
from mcibi_d2.engine.checkpoint import replacing
from mcibi_d2.files import read_data
from mcibi_d2.tools.command import ToolParser, run_tool


def read(path: str) -> object:
    """What a file of tensors holds; code in it is never run."""
    if not os.path.isfile(path):
        raise InputError(f"--input {path}: no such file, expected a released checkpoint")
    return read_data(path, "a checkpoint that holds tensors alone")


def _part(name: str) -> str:
    """The part of a model that a tensor belongs to."""
    parts = name.split(".")
    inner = ("memory_module", "backbone", "sem_seg_head")
    return ".".join(parts[: 2 if parts[0] in inner else 1])


def table(fates: list[Fate]) -> str:
    """How many tensors of which part were mapped, renamed, left out or missing."""
    groups = Counter((_part(fate.source), _part(fate.target), fate.what) for fate in fates)
    lines = [(*group[:2], count, group[2]) for group, count in sorted(groups.items())]
    return tabulate(lines, headers=["released", "ours", "tensors", "what"])


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("convert_released", __doc__)
    parser.add_config_file(of="of the model, in configs/released")
    parser.add_argument("--input", required=True, metavar="X.pth", help="the released file")
    parser.add_argument("--output", required=True, metavar="Y.pth", help="the checkpoint to write")
    parser.add_opts("MODEL.SEM_SEG_HEAD.NUM_CLASSES 19")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    cfg = load_config(args.config_file, args.opts)
    folder = os.path.dirname(args.output) or "."
    if not os.path.isdir(folder):
        raise InputError(f"--output {args.output}: no such folder, expected one to write to")
    loaded = read(args.input)
    try:
        state, fates = convert(loaded, cfg)
    except InputError as error:
        raise InputError(f"{args.input}: {error}") from error
    try:
        with replacing(args.output) as file:
            torch.save({"model": state}, file)
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot be written ({error})") from error
    print(table(fates))
    if not any(name.startswith("sem_seg_head.") for name in state):
        print("\nA backbone alone: the head is trained from the beginning.")
    use = f"--config-file {args.config_file} MODEL.WEIGHTS {args.output}"
    print(f"\n{args.output}: {len(state)} tensors, for train_net.py {use}")


if __name__ == "__main__":
    run_tool(main)
