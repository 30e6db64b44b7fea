"""The documents: what they link to is there, and the front page stays one that is read."""

import re
import subprocess

import pytest
import yaml
from conftest import ROOT

import mcibi_d2

TOP = {
    ".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff",
    "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "configs", "datasets", "mcibi_d2",
    "pyproject.toml", "setup.py", "tests", "train_net.py",
}  # fmt: skip
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(p for f in ("configs", "mcibi_d2") for p in (ROOT / f).rglob("*.md")),
     ROOT / "datasets" / "README.md"]
)  # fmt: skip


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """The names that a document's headings have in links."""
    headings = re.findall(r"^#+ (.*)", without_code(path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    """Where the links and pictures of a text lead, those to other sites left out."""
    text = without_code(text)
    found = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [link for link in found if "://" not in link]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in links(path.read_text("utf-8")):
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    text = path.read_text("utf-8")
    for name in re.findall(
        r"(?<![\w./-])(?:configs|tests|datasets)/[\w./-]+\.(?:yaml|md|py)", text
    ):
        assert (ROOT / name).exists(), name


def test_links_are_found():
    text = '[a](b.md#c) ![d](e.png) <img src="f.jpg"> [g](https://h.org)\n```\n[i](j.md)\n```\n'
    assert links(text) == ["b.md#c", "e.png", "f.jpg"]


def test_every_document_is_linked():
    linked = {
        (path.parent / link.partition("#")[0]).resolve()
        for path in DOCUMENTS
        for link in links(path.read_text("utf-8"))
    }
    assert {path for path in DOCUMENTS if path.name != "README.md" or path.parent != ROOT} <= linked


def test_the_front_page_is_short_and_has_its_results_early():
    words = (ROOT / "README.md").read_text("utf-8").split()
    assert len(words) <= 1200
    assert words.index("Results") < 250


def test_the_newest_version_of_the_changelog_is_the_packages():
    versions = re.findall(r"^## \[?([\d.]+)\]?", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert versions[0] == mcibi_d2.__version__ and len(set(versions)) == len(versions)


def test_each_tool_has_a_section():
    folder = ROOT / "mcibi_d2" / "tools"
    tools = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/*.py")}
    sections = anchors(folder / "README.md")
    assert tools - {"__init__", "command", "tools", "__pycache__"} <= sections


def test_commits_are_checked_as_by_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in hooks]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    lines = [line.strip().replace("$(python)", "python") for line in lint.splitlines()]
    assert entries == [line.removesuffix(" .") for line in lines]


def test_the_top_level_holds_what_belongs_there():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    assert {name.partition("/")[0] for name in names.splitlines()} <= TOP
