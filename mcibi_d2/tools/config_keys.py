"""Every config key with what it may be, its default and what it does, as the table in configs/.

python -m mcibi_d2.tools.config_keys > configs/KEYS.md
"""

import inspect
import re

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.registry import Registry

from mcibi_d2 import add_mcibi_config
from mcibi_d2.engine.config_table import TABLE, Choice, Rule
from mcibi_d2.tools.command import ToolParser, run_tool

TITLE = """# Config keys

What each key may be; anything else is refused in one sentence before something is built. Written by
`python -m mcibi_d2.tools.config_keys > configs/KEYS.md`.
"""

DETECTRON2 = (
    "## Of Detectron2",
    "",
    "Its [documentation](https://detectron2.readthedocs.io/en/latest/modules/config.html) says "
    "what they do.",
    "",
    "| key | may be | default |",
    "|---|---|---|",
)


def keys_document() -> str:
    """The keys that this project adds, then those of Detectron2 that are checked, as Markdown."""
    plain, cfg = get_cfg(), get_cfg()
    add_mcibi_config(cfg)
    comments = _comments()
    lines = [
        TITLE,
        "## Of this project",
        "",
        "| key | may be | default | what it does |",
        "|---|---|---|---|",
    ]
    for key in (key for key in TABLE if not _has(plain, key)):
        lines.append(f"{_row(key, cfg)} {_cell(comments[key])} |")
    lines += ["", *DETECTRON2]
    lines += [_row(key, cfg) for key in TABLE if _has(plain, key)]
    return "\n".join(lines) + "\n"


def _row(key: str, cfg: CfgNode) -> str:
    value = cfg
    for name in key.split("."):
        value = value[name]
    return f"| `{key}` | {_cell(_words(TABLE[key]))} | `{value!r}` |"


def _words(rule: Rule) -> str:
    if isinstance(rule, Choice) and isinstance(rule.allowed, Registry):
        # What is in it depends on what else is imported.
        return f"a name that is registered as {rule.allowed._name}"
    return rule.describe()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _has(cfg: CfgNode, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(cfg, CfgNode) or name not in cfg:
            return False
        cfg = cfg[name]
    return True


def _comments() -> dict[str, str]:
    """The comment above each key, or above the keys that stand together, by key."""
    comments: dict[str, str] = {}
    block: list[str] = []
    above = ""
    for line in map(str.strip, inspect.getsource(add_mcibi_config).splitlines()):
        assigned = re.match(r"cfg\.([\w.]+) = (.*)", line)
        if line.startswith("#"):
            block += [] if line.startswith("# ---") else [line.lstrip("# ")]
        elif assigned and assigned[2] != "CN()":
            above = " ".join(block) or above
            comments[assigned[1]] = above
            block = []
        else:
            block = []
    return comments


def make_parser() -> ToolParser:
    """The command line."""
    return ToolParser("config_keys", __doc__)


def main() -> None:
    """Print the document."""
    make_parser().parse_args()
    print(keys_document(), end="")


if __name__ == "__main__":
    run_tool(main)
