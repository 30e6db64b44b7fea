"""Show what the feature memory of a checkpoint holds.

python -m mcibi_d2.tools.memory output/ade20k/mcibi_R50/model_final.pth

prints each row's length, its most similar other class, and the most confusable pairs, and draws
lengths and cosines. The names of the classes are those of the config.yaml beside the checkpoint.
With a config file the model is built, too: then each row comes with H2's answer, and the pixels of
DATASETS.TEST tell which rows each class gathers.

python -m mcibi_d2.tools.memory output/ade20k/mcibi_R50/model_final.pth \\
    --config-file configs/ade20k/mcibi_R50.yaml --opts MODEL.DEVICE cpu
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from mcibi_d2 import InputError
from mcibi_d2.config_files import find_config_file, read_config
from mcibi_d2.data import build_labelled_loader, register_own_dataset
from mcibi_d2.engine import load_config
from mcibi_d2.engine.checkpoint import check_weights_exist
from mcibi_d2.engine.setup import check_config
from mcibi_d2.evaluation import MemoryContents, gathered_rows
from mcibi_d2.predict import load_model
from mcibi_d2.tools.command import ToolParser, run_tool
from mcibi_d2.visualization import cosines_figure, gathered_figure, norms_figure, png

PAIRS = 10
# Of the rows that the pixels of a class gather, as many are printed.
_MOST = 3


def class_names(config_file: str, num_classes: int) -> list[str]:
    """The names of the classes by a config file, or their numbers where it does not say them.

    Nothing but its data sets is read, so that the file may be of another version.
    """
    numbers = [str(k) for k in range(num_classes)]
    try:
        datasets = read_config(find_config_file(config_file))["DATASETS"]
        cfg = load_config()
        cfg.DATASETS.merge_from_other_cfg(CfgNode(datasets))
        register_own_dataset(cfg)
    except Exception:
        return numbers
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = MetadataCatalog.get(name).get("stuff_classes", ())
        if len(names) == num_classes:
            return list(names)
    return numbers


def rows_table(
    contents: MemoryContents, names: Sequence[str], answers: Tensor | None = None
) -> str:
    """One line per row: its length, the most similar row of another class, and H2's answer.

    Args:
        contents: of the memory.
        names: of the classes.
        answers: (K * S, K), H2's probabilities for each row; None to leave them out.
    """
    slots, k = contents.slots, contents.num_classes
    cosines = contents.row_cosines()
    own = torch.arange(k).repeat_interleave(slots)
    cosines = cosines.masked_fill(own[:, None] == own, torch.nan).nan_to_num(nan=-torch.inf)
    norms = contents.norms().flatten()
    lines = []
    for row, known in enumerate(contents.initialized.tolist()):
        line = [names[row // slots], *([row % slots] if slots > 1 else [])]
        nearest = int(cosines[row].argmax())
        cosine = float(cosines[row, nearest])
        if not known:
            lines.append([*line, "not initialised"])
            continue
        line.append(f"{norms[row]:.3f}")
        line += [names[nearest // slots], f"{cosine:.3f}"] if math.isfinite(cosine) else ["", ""]
        if answers is not None:
            answer = int(answers[row].argmax())
            right = "" if answer == row // slots else " (!)"
            line.append(f"{names[answer]} {100 * answers[row, answer]:.0f} %{right}")
        lines.append(line)
    headers = ["class", *(["slot"] if slots > 1 else []), "length", "most similar", "cosine"]
    if answers is not None:
        headers.append("H2's answer")
    return tabulate(lines, headers=headers, disable_numparse=True)


def pairs_table(contents: MemoryContents, names: Sequence[str], count: int = PAIRS) -> str:
    """The most confusable pairs of classes."""
    lines = [(names[k], names[j], f"{cosine:.3f}") for k, j, cosine in contents.confusable(count)]
    return tabulate(lines, headers=["most confusable", "", "cosine"], disable_numparse=True)


def gathered_table(gathered: Tensor, names: Sequence[str]) -> str:
    """For each class, the rows that its pixels gather most."""
    lines = []
    for name, weights in zip(names, gathered, strict=True):
        if weights.isnan().any():
            lines.append([name, "no pixels"])
            continue
        most = weights.topk(min(_MOST, len(weights)))
        some = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        lines.append([name, *(f"{names[k]} {100 * w:.1f} %" for k, w in some if w >= 5e-4)])
    headers = ["pixels of", "gather the rows of", *[""] * (_MOST - 1)]
    return tabulate(lines, headers=headers, disable_numparse=True)


def why_not_gathered(cfg: CfgNode) -> str:
    """Why H1's weights do not say what pixels gather; "" if they do."""
    mcibi = cfg.MODEL.MCIBI
    if mcibi.AGGREGATION == "none":
        return "no pixel gathers the rows: MODEL.MCIBI.AGGREGATION is none"
    if mcibi.AGGREGATION == "rows" and not mcibi.ROWS_BIAS:
        return "H1 has no say in what pixels gather: MODEL.MCIBI.ROWS_BIAS is False"
    if not cfg.DATASETS.TEST:
        return "no pixels to look at: DATASETS.TEST is empty"
    return ""


def make_config(config_file: str, checkpoint: str, options: list[str]) -> CfgNode:
    """The checked config of a command line."""
    cfg = load_config(config_file, options)
    cfg.MODEL.WEIGHTS = checkpoint
    if not cfg.MODEL.MCIBI.ENABLED:
        raise InputError(f"{config_file}: MODEL.MCIBI.ENABLED is False, expected a memory")
    cfg.freeze()
    check_config(cfg, train=False)
    return cfg


def gather(cfg: CfgNode, model: nn.Module, most: int | None) -> Tensor:
    """:func:`~mcibi_d2.evaluation.gathered_rows` over the first test set, or some of its images.

    Args:
        cfg: of the model.
        model: in evaluation mode.
        most: as many images, spread evenly over the set; None for all.
    """
    loader = build_labelled_loader(cfg, cfg.DATASETS.TEST[0], most)
    return gathered_rows(model, tqdm(loader, desc="Looking at pixels", unit="image"))


def write_csv(matrix: Tensor, names: Sequence[str], path: Path) -> None:
    """A (K, K) matrix with the names of its lines and columns; nan is left empty."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *names])
        for name, line in zip(names, matrix.tolist(), strict=True):
            writer.writerow([name, *("" if math.isnan(x) else f"{x:.6g}" for x in line)])


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("memory", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_config_file(required=False, of="that builds the model, for H2's answers and pixels")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: memory beside the checkpoint"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="look at so many of DATASETS.TEST (all)"
    )
    parser.add_opts("MODEL.DEVICE cpu")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    check_weights_exist(args.checkpoint)
    if args.images is not None and args.images < 1:
        raise InputError(f"--images is {args.images}, expected at least 1")
    if args.opts and not args.config_file:
        raise InputError("--opts needs --config-file FILE, which builds the model")
    contents = MemoryContents.read(args.checkpoint)
    if contents is None:
        raise InputError(
            f"{args.checkpoint}: has no memory, expected a checkpoint of a model with "
            f"MODEL.MCIBI.ENABLED True"
        )
    beside = str(Path(args.checkpoint).parent / "config.yaml")
    names = class_names(args.config_file or beside, contents.num_classes)
    known, rows = int(contents.initialized.sum()), len(contents.rows)
    print(
        f"{args.checkpoint}: {contents.num_classes} classes, {contents.slots} "
        f"{'row' if contents.slots == 1 else 'rows'} of {contents.rows.shape[1]} numbers for "
        f"each; {known} of {rows} initialised."
    )
    if known == 0:
        print("There is nothing to look at: no row is initialised (MEMORY.UPDATE zero?).")
        return
    answers, gathered, why = None, None, ""
    if names == list(map(str, range(len(names)))):
        print("Classes have numbers: no config.yaml beside the checkpoint names their data set.")
    if args.config_file:
        cfg = make_config(args.config_file, args.checkpoint, args.opts)
        model = load_model(cfg)
        answers = model.sem_seg_head.classify_rows().cpu()
        why = why_not_gathered(cfg)
        if not why:
            gathered = gather(cfg, model, args.images)

    print(f"\n{rows_table(contents, names, answers)}\n\n{pairs_table(contents, names)}")
    folder = args.output or Path(args.checkpoint).parent / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {
        "lengths.png": norms_figure(contents.norms().numpy(), names),
        "cosines.png": cosines_figure(contents.cosines().numpy(), names),
    }
    write_csv(contents.cosines(), names, folder / "cosines.csv")
    if gathered is not None:
        print(f"\n{gathered_table(gathered, names)}")
        if cfg.MODEL.MCIBI.AGGREGATION == "rows":
            print("These are the weights by H1, on which the attention to the rows has its say.")
        figures["gathered.png"] = gathered_figure(gathered.numpy(), names)
        write_csv(gathered, names, folder / "gathered.csv")
    if answers is not None:
        right = answers.argmax(dim=1) == torch.arange(rows) // contents.slots
        right = int((right & contents.initialized).sum())
        print(f"\nH2 gives {right} of the {known} initialised rows to their own class.")
    for name, figure in figures.items():
        (folder / name).write_bytes(png(figure))
    if why:
        print(f"\nNot drawn is which rows pixels gather: {why}.")
    elif not args.config_file:
        print("\nWith --config-file FILE: H2's answer on each row, and what pixels gather.")
    print(f"\nLook at {', '.join(str(folder / name) for name in figures)}.")


if __name__ == "__main__":
    run_tool(main)
