#!/usr/bin/env python
"""Train or evaluate a model from a config file.

python train_net.py --config-file configs/ade20k/mcibi_R50.yaml --num-gpus 8
python train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth
torchrun --nproc-per-node 8 train_net.py --config-file configs/ade20k/mcibi_R50.yaml --resume
"""

from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import mcibi_d2  # noqa: F401  registers models and data sets
from mcibi_d2.engine import Checkpointer, Trainer, argument_parser, launch, setup
from mcibi_d2.engine.class_names import class_names


def main(args, cfg):
    """What each process does."""
    default_setup(cfg, args)
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
    return trainer.train()


if __name__ == "__main__":
    launch(main, setup, argument_parser().parse_args())
