"""The command lines: one grammar, said the same way by every tool and every document."""

import os
import pkgutil
import re
import shlex
import sys
from importlib import import_module

import pytest
from conftest import ROOT
from detectron2.config import get_cfg

from mcibi_d2 import InputError, add_mcibi_config, tools
from mcibi_d2.config_files import find_config_file
from mcibi_d2.tools.command import ToolParser, run_tool

NAMES = sorted({m.name for m in pkgutil.iter_modules(tools.__path__)} - {"command", "train"})
TAKE_KEYS = {
    "check_dataset", "complexity", "convert_released", "demo", "export", "export_predictions",
    "features", "memory", "quickstart",
}  # fmt: skip
# Parts of the benchmark whose config is always the same one.
PARTS = {"step", "inference"}
DOCUMENTS = [
    *ROOT.glob("*.md"), *ROOT.glob("configs/**/*.md"), *ROOT.glob("datasets/*.md"),
    *ROOT.glob("mcibi_d2/**/*.md"), *ROOT.glob("mcibi_d2/tools/**/*.py"), ROOT / "train_net.py",
]  # fmt: skip


def parser_of(tool):
    """The parser of a tool, by its name."""
    module = import_module(f"mcibi_d2.tools.{tool}")
    if hasattr(module, "__path__"):
        module = import_module(f"mcibi_d2.tools.{tool}.__main__")
    return module.make_parser()


def subparsers(parser):
    """The parsers of a tool's subcommands, or its own."""
    if parser._subparsers is None:
        return [parser]
    return list(parser._subparsers._group_actions[0].choices.values())


@pytest.mark.parametrize("tool", NAMES)
def test_every_tool_takes_config_keys_in_the_same_way(tool, capsys):
    parser = parser_of(tool)
    with pytest.raises(SystemExit) as exit_info:
        parser.parse_args(["--help"])
    assert exit_info.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m mcibi_d2.tools.{tool}")
    assert all(isinstance(part, ToolParser) for part in subparsers(parser))
    for part in subparsers(parser):
        options = {option for action in part._actions for option in action.option_strings}
        assert "opts" not in {action.dest for action in part._actions if not action.option_strings}
        assert "--config-file" not in options or "--opts" in options
        takes = tool in TAKE_KEYS or "--config-file" in options or part.prog.split()[-1] in PARTS
        assert ("--opts" in options) == takes
        if tool in TAKE_KEYS:
            assert part._actions[-1].option_strings == ["--opts"], "last, in the help as well"
            assert "config keys and values, last of all" in said


@pytest.mark.parametrize("tool", sorted(TAKE_KEYS))
def test_a_key_elsewhere_is_told_where_it_belongs(tool, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["x", "--config-file", "f.yaml", "--format", "png", "--output", "o", "--input", "i"]
    for stray in (["MODEL.DEVICE", "cpu"], ["MODEL.DEVIEC", "cpu"], ["SEED", "1"]):
        for arguments in ([*given, *stray], [*stray, *given], [*stray, *given, "--opts", *stray]):
            with pytest.raises(InputError, match=rf"^{stray[0]}: .* after --opts: --opts {stray}"
                               .replace(str(stray), stray[0])):  # fmt: skip
                parser_of(tool).parse_args(arguments)


def test_words_that_only_look_like_keys(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^MODEL\.DEVICE: is a config key, which .*report does"):
        parser_of("report").parse_args(["run", "MODEL.DEVICE", "cpu"])
    # A section alone is no key, nor what is a file.
    (tmp_path / "OUTPUT_DIR").touch()
    args = parser_of("report").parse_args(["DATASETS", "OUTPUT_DIR", "MEAN.TXT"])
    assert list(map(str, args.folders)) == ["DATASETS", "OUTPUT_DIR", "MEAN.TXT"]
    args = parser_of("memory").parse_args(["x.pth", "--opts", "MODEL.DEVICE", "cpu", "--images"])
    assert args.opts == ["MODEL.DEVICE", "cpu", "--images"]


@pytest.mark.parametrize("words", [["benchmark", "memory"], ["benchmark", "step"], ["complexity"]])
def test_devices_that_are_not_there(words, capsys):
    with pytest.raises(SystemExit):
        parser_of(words[0]).parse_args([*words[1:], "--device", "foo"])
    assert "cannot use 'foo' here, expected a device that is there" in capsys.readouterr().err


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("x.png: cannot be read"), "error: x.png: cannot be read"),
        (
            InputError(
                "Caught InputError in DataLoader worker process 0.\nOriginal Traceback:\n"
                "mcibi_d2.errors.InputError: x.png: cannot be read"
            ),
            "error: x.png: cannot be read",
        ),
        (
            NotADirectoryError(20, "Not a directory", "/dev/null/x"),
            "error: /dev/null/x: Not a directory",
        ),
        (KeyboardInterrupt(), 130),
    ],
)
def test_one_guard_ends_every_tool(error, status):
    with pytest.raises(SystemExit) as exit_info:
        run_tool(lambda: fail(error))
    assert exit_info.value.code == status
    for path in (ROOT / "mcibi_d2" / "tools").rglob("*.py"):
        text = path.read_text()
        assert "__main__" not in text or text.endswith("\n    run_tool(main)\n"), path
        assert path.stem == "command" or not re.search(r"sys\.exit\(f\"error: \{error", text), path


def test_output_that_nobody_reads_any_more(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as exit_info:
            run_tool(lambda: print("long " * 100_000))
    assert exit_info.value.code == 1


def commands(text):
    """The command lines in a document: (words, whether they stand in a block of their own)."""
    text = re.sub(r"\\?\\\n", " ", text)
    variables = dict(re.findall(r'^(\w+)="(.*?)"', text, re.MULTILINE))
    for name, value in variables.items():
        text = text.replace(f"${name} ", f"{value} ")
    start = r"(?:python|torchrun) [^`\n]*(?:mcibi_d2\.tools|train_net)"
    for line in re.findall(rf"^ *{start}.*", text, re.MULTILINE):
        yield shlex.split(line, comments=True), True
    for line in re.findall(rf"`+({start}[^`]*)`", text):
        yield shlex.split(line), False


def test_what_the_documents_say_can_be_typed():
    cfg = get_cfg()
    add_mcibi_config(cfg)
    seen = set()
    for path in DOCUMENTS:
        for words, whole in commands(path.read_text()):
            place = next(
                i for i, word in enumerate(words) if "mcibi_d2" in word or "net.py" in word
            )
            tool, arguments = words[place].rpartition("tools.")[2], words[place + 1 :]
            arguments = arguments[: arguments.index(">") if ">" in arguments else None]
            tool = tool.replace("train_net.py", "train")
            if "..." in arguments or not tool.isidentifier():
                continue  # <name>
            seen.add(tool)
            parser = parser_of(tool)
            if "--help" in arguments or not (arguments or whole):
                continue
            try:
                args = parser.parse_args(arguments)
            except (SystemExit, InputError) as error:
                pytest.fail(f"{path}: {shlex.join(words)}: {error}")
            options = getattr(args, "opts", [])
            assert len(options) % 2 == 0, (path, words)
            for key in options[::2]:
                node = cfg
                for part in key.split("."):
                    assert part in node, (path, words)
                    node = node[part]
            file = getattr(args, "config_file", None)
            if isinstance(file, str) and "/" in file and "/to/" not in file:
                find_config_file(str(ROOT / file) if file.startswith("configs/") else file)
    assert seen >= {"train", *NAMES} - {"quickstart"}, "documents name every tool"


def test_commands_are_found():
    text = (
        "a `python -m mcibi_d2.tools.demo\n--x` b\n```\n"
        'W="K 1"\npython train_net.py \\\n  $W S 2  # why\n```\n'
    )
    assert list(commands(text)) == [
        (["python", "train_net.py", "K", "1", "S", "2"], True),
        (["python", "-m", "mcibi_d2.tools.demo", "--x"], False),
    ]
