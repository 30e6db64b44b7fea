"""Train or evaluate a model from a config file, on one process or several.

python -m mcibi_d2.tools.train --config-file ade20k/mcibi_R50.yaml --num-gpus 8
python -m mcibi_d2.tools.train --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
torchrun --nproc-per-node 8 -m mcibi_d2.tools.train --config-file ade20k/mcibi_R50.yaml --resume

Config keys stand at the end, as for Detectron2's training programs; --opts before them, as for the
other tools, may be written. In a checkout, train_net.py is the same program.
"""

import argparse
import os
import sys

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from mcibi_d2.engine import Checkpointer, Trainer, argument_parser, launch, setup
from mcibi_d2.engine.checkpoint import files_of_a_run, replacing
from mcibi_d2.engine.class_names import class_names
from mcibi_d2.tools.command import run_tool


def train(args: argparse.Namespace, cfg: CfgNode) -> dict | None:
    """What each process does; returns the results of the evaluation, if there was one."""
    config = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    # A run in the folder keeps its config in an evaluation, and until it goes on with another.
    kept = None
    if comm.is_main_process() and files_of_a_run(cfg.OUTPUT_DIR) and os.path.isfile(config):
        with open(config, "rb") as file:
            kept = file.read()
    default_setup(cfg, args)
    if kept is not None:
        _write(config, kept)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="mcibi_d2")
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            class_names=class_names(cfg),
            allow_other_classes=cfg.DATASETS.ALLOW_OTHER_CLASSES,
        )
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume, strict=True)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if kept is not None:
        _write(config, cfg.dump().encode())
    return trainer.train()


def _write(path: str, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    return argument_parser(epilog=__doc__)


def main() -> None:
    """Run the tool."""
    words = [word for word in sys.argv[1:] if word != "--opts"]
    launch(train, setup, make_parser().parse_args(words))


if __name__ == "__main__":
    run_tool(main)
