"""What the tools' command lines have in common: their grammar, and what ends them."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch
from detectron2.config import CfgNode, get_cfg

from mcibi_d2 import InputError, add_mcibi_config
from mcibi_d2.errors import sentence


class ToolParser(argparse.ArgumentParser):
    """The command line of ``python -m mcibi_d2.tools.<name>``.

    Config keys come at the end, after ``--opts``, as for Detectron2's demo. One that stands
    elsewhere is an :class:`InputError` that says so.

    Args:
        name: of the tool.
        description: its docstring, shown as it is written.
        more: of :class:`argparse.ArgumentParser`.
    """

    def __init__(self, name: str = "", description: str = "", **more):
        more.setdefault("prog", f"python -m mcibi_d2.tools.{name}")
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )

    def add_config_file(self, required: bool = True, of: str = "of the model") -> None:
        """Add ``--config-file FILE``; "" where it may be and is left out.

        Args:
            required: whether it must be given.
            of: what the help says of it.
        """
        self.add_argument(
            "--config-file", required=required, default="", metavar="FILE", help=f"config {of}"
        )

    def add_opts(self, example: str = "MODEL.WEIGHTS X.pth MODEL.DEVICE cpu") -> None:
        """Add ``--opts KEY VALUE ...``, which takes all that follows; call it last."""
        self.add_argument(
            "--opts", nargs=argparse.REMAINDER, default=[],
            help=f"config keys and values, last of all: --opts {example}",
        )  # fmt: skip

    def add_device(self) -> None:
        """Add ``--device``, for tools without a config."""
        self.add_argument(
            "--device", type=_usable_device, default="cpu", help="cpu (default) or cuda"
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """Parse as :mod:`argparse` does, which calls this for subcommands as well."""
        args = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:
            self._refuse_stray_keys(args)
        return super().parse_known_args(args, namespace)

    def _refuse_stray_keys(self, args: list[str]) -> None:
        for argument in args[: args.index("--opts") if "--opts" in args else None]:
            if not _is_key(argument) or os.path.exists(argument):
                continue
            if "--opts" in self._option_string_actions:
                raise InputError(
                    f"{argument}: expected config keys at the end, after --opts: "
                    f"--opts {argument} VALUE ..."
                )
            raise InputError(f"{argument}: is a config key, which {self.prog} does not take")


def _usable_device(name: str) -> str:
    try:
        torch.empty(1, device=name)
    except Exception as error:  # whatever a backend that is not there raises
        raise argparse.ArgumentTypeError(
            f"torch {torch.__version__} cannot use {name!r} here, expected a device that is there"
        ) from error
    return name


def _is_key(argument: str) -> bool:
    """Whether a word is a config key, or one of a known section with a slip in it."""
    first, dot, _ = argument.partition(".")
    cfg = get_cfg()
    add_mcibi_config(cfg)
    return first in cfg and isinstance(cfg[first], CfgNode) == bool(dot)


def run_tool(main: Callable[[], None]) -> None:
    """Call a tool's ``main``, and end the program as its outcome says.

    An :class:`InputError` is one line and status 1, and so is a file or folder that the system
    refuses; Ctrl-C is status 130. Where what reads the output has gone (``| head``), nothing more
    is said.
    """
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        sys.exit(f"error: {sentence(error)}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes the output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
