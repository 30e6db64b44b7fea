"""From the command line to a config that can be trained: every mistake is said before training."""

import argparse
import glob
import os

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser

from ..config import add_mcibi_config
from ..config_files import find_config_file
from ..data import register_own_dataset
from ..errors import InputError
from .checkpoint import check_weights_exist, files_of_a_run, split_query
from .config_check import check_config, merge_file, merge_options


def load_config(config_file: str = "", options: list[str] | None = None) -> CfgNode:
    """Detectron2's defaults, this project's keys, a file, and ``KEY VALUE`` options.

    The data set that ``DATASETS.OWN`` describes is registered.

    Args:
        config_file: YAML; "" for none. One that is not there is looked for among this project's:
            ``ade20k/mcibi_R50.yaml``.
        options: keys and values in turn.

    Raises:
        InputError: naming the file or the option, and the key.
    """
    cfg = get_cfg()
    add_mcibi_config(cfg)
    if config_file:
        merge_file(cfg, find_config_file(config_file))
    merge_options(cfg, options or [])
    register_own_dataset(cfg)
    return cfg


def without_download(cfg: CfgNode) -> CfgNode:
    """A copy, not frozen, whose backbone starts without timm's weights: a checkpoint is loaded."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.TIMM.PRETRAINED = False
    return cfg


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's ``default_argument_parser`` and ``--force``."""
    parser = default_argument_parser(epilog)
    parser.add_argument(
        "--force",
        action="store_true",
        help="train anew in an OUTPUT_DIR that has the checkpoints of a run: they are removed, "
        "with its metrics.json and TensorBoard events; log.txt goes on",
    )
    return parser


def _refuse_used_folder(args: argparse.Namespace, cfg: CfgNode) -> list[str]:
    """Refuse to overwrite the checkpoints of another run; returns what ``--force`` is to remove."""
    folder, force = cfg.OUTPUT_DIR, getattr(args, "force", False)
    found = files_of_a_run(folder)
    if force and (args.resume or args.eval_only):
        raise InputError(
            "--force starts a training anew, expected neither --resume nor --eval-only beside it"
        )
    if not found or args.eval_only or (args.resume and "last_checkpoint" in found):
        return []
    if not force:
        start = f"OUTPUT_DIR: {folder}: holds the checkpoints of a run ({found[-1]})"
        if args.resume:
            raise InputError(
                f"{start}, but no last_checkpoint, which names the one that --resume starts from, "
                f"expected one, another OUTPUT_DIR, or --force to remove them and start anew"
            )
        raise InputError(
            f"{start}, expected --resume to go on with it, another OUTPUT_DIR, or --force to "
            f"remove them and start anew"
        )
    events = os.path.join(glob.escape(folder), "events.out.tfevents.*")
    removed = [os.path.join(folder, name) for name in (*found, "metrics.json")]
    removed = [path for path in (*removed, *glob.glob(events)) if os.path.isfile(path)]
    for key, path in (
        ("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS),
        ("MODEL.MCIBI.MEMORY.INIT_FILE", cfg.MODEL.MCIBI.MEMORY.INIT_FILE),
    ):
        if os.path.realpath(split_query(path)[0]) in map(os.path.realpath, removed):
            raise InputError(f"{key}: {path}: is removed by --force, expected it elsewhere")
    return removed


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line, checked against the machine and the data.

    Args:
        args: of :func:`argument_parser`, or of Detectron2's ``default_argument_parser``;
            ``config_file`` becomes the path of the file that was found.

    Raises:
        InputError: in one sentence, what is wrong.
    """
    if args.config_file:
        args.config_file = find_config_file(args.config_file)
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
    if not 0 <= args.machine_rank < args.num_machines:
        raise InputError(
            f"--machine-rank is {args.machine_rank}, expected 0 up to --num-machines "
            f"({args.num_machines}) less one"
        )
    if cfg.MODEL.WEIGHTS and not resuming:
        check_weights_exist(cfg.MODEL.WEIGHTS)
    removed = _refuse_used_folder(args, cfg)
    cfg.freeze()
    check_config(cfg, args.num_gpus, args.num_machines, train=not args.eval_only)
    # Once, when all else is right; under torchrun every process is here.
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if args.machine_rank == 0 and not (under_torchrun and os.environ["RANK"] != "0"):
        for path in removed:
            os.remove(path)
    return cfg
