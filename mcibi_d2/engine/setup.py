"""From the command line to a config that can be trained: every mistake is said before training."""

import argparse
import os

from detectron2.config import CfgNode, get_cfg

from ..config import add_mcibi_config
from ..data import register_own_dataset
from ..errors import InputError
from .checkpoint import check_weights_exist
from .config_check import check_config, merge_file, merge_options


def load_config(config_file: str = "", options: list[str] | None = None) -> CfgNode:
    """Detectron2's defaults, this project's keys, a file, and ``KEY VALUE`` options.

    The data set that ``DATASETS.OWN`` describes is registered.

    Args:
        config_file: YAML; "" for none.
        options: keys and values in turn.

    Raises:
        InputError: naming the file or the option, and the key.
    """
    cfg = get_cfg()
    add_mcibi_config(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise InputError(f"--config-file {config_file}: no such file")
        merge_file(cfg, config_file)
    merge_options(cfg, options or [])
    register_own_dataset(cfg)
    return cfg


def without_download(cfg: CfgNode) -> CfgNode:
    """A copy, not frozen, whose backbone starts without timm's weights: a checkpoint is loaded."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line, checked against the machine and the data.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Raises:
        InputError: in one sentence, what is wrong.
    """
    cfg = load_config(args.config_file, args.opts)
    resuming = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if args.eval_only or resuming:
        cfg = without_download(cfg)
    if args.eval_only and not resuming and not cfg.MODEL.WEIGHTS:
        raise InputError("--eval-only needs MODEL.WEIGHTS <checkpoint>, or --resume")
    if args.eval_only and not cfg.DATASETS.TEST:
        raise InputError("--eval-only needs DATASETS.TEST, which is empty")
    if args.num_gpus < 1:
        raise InputError(f"--num-gpus is {args.num_gpus}, expected at least 1 process")
    if cfg.MODEL.WEIGHTS and not resuming:
        check_weights_exist(cfg.MODEL.WEIGHTS)
    cfg.freeze()
    check_config(cfg, args.num_gpus, args.num_machines, train=not args.eval_only)
    return cfg
