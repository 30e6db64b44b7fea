"""The page about runs: what it says of good, broken and missing files, in a browser too."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import make_tiny_cfg
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer
from mcibi_d2.evaluation import Results
from mcibi_d2.evaluation.results import measures
from mcibi_d2.tools import report
from mcibi_d2.tools.report import find_runs, page, read_environment, read_metrics, read_run

CLASSES = ["sky", "<b>road</b>", 'a "bird" & more']
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page; fails where a tag is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += f" {data}"

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def write_metrics(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder, name="camvid", memory=True, shift=0.0, classes=CLASSES):
    """A run of files written by hand."""
    write_metrics(
        folder,
        [
            {"iteration": t, "total_loss": 3 - t / 50 + shift, "loss_o": 1.0, "lr": 0.01,
             **({"memory/row_norm": 2.0 + t} if memory else {}),
             **({"sem_seg/mIoU": 40.0 + t} if t in (39, 79) else {})}
            for t in (19, 39, 59, 79)
        ],
    )  # fmt: skip
    (folder / "config.yaml").write_text(
        f"OUTPUT_DIR: {folder}\nSOLVER: {{MAX_ITER: 80}}\nMODEL: {{MCIBI: {{ENABLED: {memory}}}}}\n"
        f"DATASETS: {{TEST: [{name}]}}\nNOTE: '<script>alert(1)</script>'\n"
    )
    counts = np.zeros((4, 4), dtype=np.int64)
    counts[:2, :2] = [[50, 10], [0, 40]]
    Results(measures(counts, classes), list(classes), name, 7, counts).write(
        str(folder / "inference")
    )
    (folder / "model_best.json").write_text('{"metric": "m", "value": 61.5, "iteration": 39}')
    state = {"backbone.x": torch.ones(1)}
    if memory:
        state |= {
            "head.memory.rows": torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 0.0]]),
            "head.memory.initialized": torch.tensor([True, True, False]),
            "head.h2.4.bias": torch.zeros(3),
        }
    torch.save({"model": state}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    Image.fromarray(np.full((60, 90, 3), 200, np.uint8)).save(folder / "overlays.png")
    (folder / "log.txt").write_text(
        "[11/22 22:14:14] detectron2 INFO: Environment info:\n------\nPython  3.99\n------\n"
        "[11/22 22:14:15] detectron2 INFO: Command line\n"
    )
    return folder


def test_page_says_what_the_files_say(tmp_path):
    run = make_run(tmp_path / "run<1>")
    parsed = Page(page({run.name: read_run(run)}))
    text = re.sub(r"\s+", " ", parsed.text)
    assert "run<1>" in text and "80 of 80" in text and "61.50 (iteration 39)" in text
    assert "camvid" in text and "Python 3.99" in text and "Command line" not in text
    assert "2 of 3 rows are initialised" in text and "0.981" in text
    assert "<b>road</b>" in text and 'a "bird" & more' in text and "absent" in text
    assert "<script>alert(1)</script>" in text
    for iou in (50 / 60, 40 / 50):
        assert f"{100 * iou:.2f}" in text
    assert "mIoU 81.67" in text
    assert len(parsed.images()) == 5  # results and memory over time, cosines, lengths, examples


def test_page_needs_no_network_and_no_script(tmp_path):
    runs = {name: read_run(make_run(tmp_path / name)) for name in "ab"}
    source = page(runs)
    parsed = Page(source)
    assert "script" not in {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "data", "srcset", "action"):
                assert tag == "img" and value.startswith("data:image/png;base64,")
            elif name != "alt":
                assert "//" not in (value or "")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_runs_stand_side_by_side(tmp_path):
    make_run(tmp_path / "fcn", memory=False)
    make_run(tmp_path / "mcibi", shift=1.0)
    runs = {name: read_run(folder) for name, folder in find_runs([tmp_path]).items()}
    assert list(runs) == ["fcn", "mcibi"]
    text = re.sub(r"\s+", " ", Page(page(runs)).text)
    assert "MODEL.MCIBI.ENABLED False True" in text and "OUTPUT_DIR fcn" not in text
    assert "fcn: no memory to show." in text
    assert text.count("Python 3.99") == 1 and "all runs" in text


def test_runs_of_other_classes_have_tables_of_their_own(tmp_path):
    runs = {
        "one": read_run(make_run(tmp_path / "one")),
        "two": read_run(make_run(tmp_path / "two", classes=["x", "y", "z"])),
    }
    tables = [tag for tag in Page(page(runs)).tags if tag == ("table", {"class": "bars"})]
    assert len(tables) == 2


def test_a_killed_run_is_read_up_to_where_it_was(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(
        '{"iteration": 19, "total_loss": 2.0}\n\n{"iteration": 39, "total_loss": NaN}\n'
        '[1]\n{"total_loss": 1}\n{"iteration": 59, "total_lo'
    )
    metrics, bad = read_metrics(path)
    assert bad == 3
    assert metrics["total_loss"][19] == 2.0 and np.isnan(metrics["total_loss"][39])
    run = read_run(tmp_path)
    assert "3 lines of metrics.json cannot be read and are left out." in run.notes


def test_what_a_resumed_run_writes_again_replaces_what_was_there(tmp_path):
    write_metrics(
        tmp_path,
        [
            {"iteration": 19, "total_loss": 5.0},
            # An evaluation that came before the iteration of the line above it.
            {"iteration": 9, "sem_seg/mIoU": 10.0},
            {"iteration": 39, "total_loss": 4.0, "sem_seg/mIoU": 20.0},
            {"iteration": 59, "total_loss": 3.0, "sem_seg/mIoU": 30.0},
            # Resumed at 30.
            {"iteration": 39, "total_loss": 7.0},
        ],
    )
    metrics, bad = read_metrics(tmp_path / "metrics.json")
    assert bad == 0
    assert metrics == {"total_loss": {19: 5.0, 39: 7.0}, "sem_seg/mIoU": {9: 10.0}}
    with (tmp_path / "metrics.json").open("a") as file:  # and started anew
        file.write('{"iteration": 9, "total_loss": 8.0}\n')
    assert read_metrics(tmp_path / "metrics.json")[0] == {"total_loss": {9: 8.0}}


def test_an_empty_run_says_what_it_has_not(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [")
    run = read_run(tmp_path)
    text = re.sub(r"\s+", " ", Page(page({"run": run})).text)
    for sentence in (
        "There are no metrics (metrics.json), so there are no curves.",
        "config.yaml cannot be read as YAML.",
        "It is not evaluated yet.",
        "There is no checkpoint yet, so nothing is said of a memory.",
        "There are no numbers over time.",
        "No run is evaluated.",
        "There is no overlays.png",
        "run: not recorded in log.txt.",
    ):
        assert sentence in text


def test_broken_files_are_said_and_do_not_stop_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "model_best.json").write_text("{")
    (run / "model_final.pth").write_bytes(b"torn")
    (run / "inference/sem_seg_evaluation.json").write_text("{}")
    (run / "overlays.png").write_bytes(b"torn")
    text = Page(page({"run": read_run(run)})).text
    assert "model_best.json cannot be read." in text
    assert "model_final.pth: cannot be read as a checkpoint" in text
    assert "sem_seg_evaluation.json: cannot be read as the result file" in text
    assert "overlays.png cannot be read as a PNG file." in text


def test_each_test_set_has_a_folder(tmp_path):
    run = make_run(tmp_path / "run", name="first")
    (run / "inference").rename(run / "moved")
    for name in ("first", "second"):
        shutil.copytree(run / "moved", run / "inference" / name)
    assert read_run(run).results.images == 7


def test_the_last_environment_of_a_log(tmp_path):
    first = (make_run(tmp_path) / "log.txt").read_text()
    log = first + first.replace("3.99", "4.00").replace("[11/22", "[2026-11-22")
    assert read_environment(log).splitlines() == ["------", "Python  4.00", "------"]
    assert read_environment("nothing") is None


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(InputError, match="expected a run"):
        find_runs([tmp_path])
    for parent in "ab":
        make_run(tmp_path / parent / "run")
    assert list(find_runs([tmp_path / "a/run", tmp_path / "b/run"])) == ["a/run", "b/run"]


def test_tool_writes_the_page_of_a_real_run(tmp_path, monkeypatch, capsys, three_scenes):
    folder = tmp_path / "run"
    cfg = make_tiny_cfg(folder, *three_scenes, "TEST.EVAL_PERIOD", "2")
    Trainer(cfg).train()
    (folder / "config.yaml").write_text(cfg.dump())
    monkeypatch.setattr(sys, "argv", ["report", str(folder)])
    report.main()
    assert str(folder / "report.html") in capsys.readouterr().out
    parsed = Page((folder / "report.html").read_text())
    text = re.sub(r"\s+", " ", parsed.text)
    assert "4 of 4" in text and "test_scenes_three" in text and "foliage" in text
    assert "16 rows are initialised" in text
    assert len(parsed.images()) == 5


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LOOK = """<script>addEventListener("load", () => { document.documentElement.dataset.seen =
JSON.stringify({widths: [...document.images].map(i => i.naturalWidth),
 outside: performance.getEntriesByType("resource").map(e => e.name).filter(n => !/^data:/.test(n)),
 over: document.documentElement.scrollWidth - innerWidth,
 bar: getComputedStyle(document.querySelector(".bar")).backgroundImage}) })</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to look at the page with")
def test_a_browser_shows_it(tmp_path):
    for name in ("fcn", "mcibi"):
        make_run(tmp_path / name, memory=name == "mcibi")
    source = page({name: read_run(tmp_path / name) for name in ("fcn", "mcibi")})
    # With a script of the test, which the page's own policy would not run.
    policy = re.search(r"<meta http-equiv.*?>", source, re.DOTALL)[0]
    (tmp_path / "page.html").write_text(source.replace(policy, LOOK))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1000,2000", "--dump-dom",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    seen = re.search(r'data-seen="(.*?)"', done.stdout)
    assert seen, done.stderr[-2000:]
    seen = json.loads(seen[1].replace("&quot;", '"'))
    assert len(seen["widths"]) == 6 and min(seen["widths"]) >= 90
    assert seen["outside"] == [] and seen["over"] <= 0
    assert "linear-gradient" in seen["bar"]
