"""What ``make demo`` runs: FCN, FCN + MCIBI, and the control without memory, on generated scenes.

Trains the three on the same schedule and seed on this machine, evaluates them, and writes a table,
a sheet of pictures and a report.
"""

import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from tabulate import tabulate
from tqdm import tqdm

from mcibi_d2.data import scenes
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.engine.setup import check_config
from mcibi_d2.model_zoo import get_config_file
from mcibi_d2.tools.command import ToolParser, run_tool
from mcibi_d2.tools.report import NAME as REPORT
from mcibi_d2.tools.report import write_report
from mcibi_d2.visualization import comparison_sheet

RUNS = {
    "FCN": ("scenes/fcn_tiny.yaml", []),
    "FCN + MCIBI": ("scenes/mcibi_tiny.yaml", []),
    "zero memory": ("scenes/mcibi_tiny.yaml", ["MODEL.MCIBI.MEMORY.UPDATE", "zero"]),
}
# Often enough for the report to show how the runs get there.
EVALUATION = ["TEST.EVAL_PERIOD", "100"]
PICTURES = 8


class _Progress(HookBase):
    """Moves a bar that spans all runs."""

    def __init__(self, bar: tqdm, name: str):
        self.bar = bar
        self.name = name

    def before_train(self) -> None:
        self.bar.set_description(f"Training {self.name}")

    def after_step(self) -> None:
        self.bar.update()
        loss = self.trainer.storage.latest().get("loss_o")
        if loss is not None:
            self.bar.set_postfix(loss_o=f"{loss[0]:.2f}", refresh=False)


class _QuietTrainer(Trainer):
    """Logs to files only; the bar is what is seen."""

    def build_writers(self) -> list:
        folder = Path(self.cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        return [JSONWriter(str(folder / "metrics.json")), TensorboardXWriter(str(folder))]


def _train(cfg: CfgNode, name: str, bar: tqdm) -> tuple[torch.nn.Module, dict, float]:
    """Train and evaluate one model; returns it, its results and the seconds of both."""
    seed_all_rng(cfg.SEED)
    trainer = _QuietTrainer(cfg)
    trainer.register_hooks([_Progress(bar, name)])
    trainer.resume_or_load(resume=False)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    return trainer.model.eval(), trainer._last_eval_results["sem_seg"], seconds


def _table(results: dict[str, dict], seconds: dict[str, float], classes: list[str]) -> str:
    """mIoU, per-class IoU and seconds, one column per run."""
    lines = [["mIoU", *(f"{r['mIoU']:.2f}" for r in results.values())]]
    for name in classes:
        lines.append([f"IoU {name}", *(f"{r[f'IoU-{name}']:.1f}" for r in results.values())])
    lines.append(["seconds", *(f"{s:.0f}" for s in seconds.values())])
    return tabulate(lines, headers=["", *results], stralign="right", disable_numparse=True)


@torch.no_grad()
def _pictures(models: dict[str, torch.nn.Module], numbers: range) -> list[dict[str, np.ndarray]]:
    rows = []
    for number in numbers:
        image, labels = scenes.render("val", number)
        tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
        row = {"image": image, "ground truth": labels}
        for name, model in models.items():
            row[name] = model([{"image": tensor}])[0]["sem_seg"].argmax(dim=0).numpy()
        rows.append(row)
    return rows


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("quickstart", __doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder to write")
    parser.add_opts("SOLVER.MAX_ITER 50")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=args.output / "log.txt", filemode="w", level=logging.INFO,
        format="[%(asctime)s] %(name)s: %(message)s",
    )  # fmt: skip

    # Where the report looks for it.
    logging.getLogger(__name__).info(f"Environment info:\n{collect_env_info()}")

    configs = {}
    for name, (config, options) in RUNS.items():
        folder = args.output / name.lower().replace(" ", "_").replace("+", "and")
        options = [*options, *EVALUATION, "OUTPUT_DIR", str(folder), *args.opts]
        configs[name] = load_config(get_config_file(config), options)
        check_config(configs[name])
        (folder / "config.yaml").write_text(configs[name].dump())
    print(f"Training {len(RUNS)} small networks on generated scenes, on the CPU.", flush=True)
    models, results, seconds = {}, {}, {}
    with tqdm(total=sum(c.SOLVER.MAX_ITER for c in configs.values()), unit="it") as bar:
        for name, cfg in configs.items():
            models[name], results[name], seconds[name] = _train(cfg, name, bar)

    metadata = MetadataCatalog.get("scenes_val")
    table = _table(results, seconds, metadata.stuff_classes)
    (args.output / "results.txt").write_text(table + "\n")
    shown = {name: models[name] for name in ("FCN", "FCN + MCIBI")}
    sheet = comparison_sheet(
        _pictures(shown, range(PICTURES)), metadata.stuff_classes, metadata.stuff_colors
    )
    sheet.savefig(args.output / "scenes.png", dpi=130)
    folders = {name: Path(cfg.OUTPUT_DIR) for name, cfg in configs.items()}
    write_report(folders, args.output / REPORT)
    print(f"\n{table}\n")
    print(
        "'zero memory' is FCN + MCIBI with its memory held at zero: what it gains over FCN comes "
        "from the\nextra layers, and only what FCN + MCIBI gains over it comes from the memory. "
        "One seed proves nothing."
    )
    python = os.path.relpath(sys.executable)
    print(
        f"\nLook at {args.output}/scenes.png and {args.output}/results.txt; next type: "
        f"{python} -m mcibi_d2.tools.train --config-file scenes/mcibi_tiny.yaml"
        f"\nThe report, for a browser: {args.output}/{REPORT}"
    )


if __name__ == "__main__":
    run_tool(main)
