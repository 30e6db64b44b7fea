"""What a memory holds: the numbers against slow loops, and the tool from end to end."""

import csv
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.evaluation import MemoryContents, gathered_rows
from mcibi_d2.modeling import FeatureMemory
from mcibi_d2.tools import memory as tool
from mcibi_d2.tools.command import run_tool as run_guarded
from mcibi_d2.visualization import cosines_figure, gathered_figure, norms_figure, png, rgb

CONFIG = str(ROOT / "configs/scenes/mcibi_tiny.yaml")
TINY = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.MCIBI.ATTENTION_DIM", "8",
        "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", "[]", "DATALOADER.NUM_WORKERS", "0"]  # fmt: skip


def some_contents(num_classes, slots, empty=()):
    rows = torch.randn(num_classes * slots, 8)
    initialized = torch.ones(len(rows), dtype=torch.bool)
    initialized[list(empty)] = False
    return MemoryContents(rows * initialized[:, None], initialized, num_classes)


@pytest.mark.parametrize("slots, empty", [(1, (2,)), (3, (1, 6, 7, 8))])
def test_cosines_and_lengths_are_those_of_a_loop(slots, empty):
    contents = some_contents(4, slots, empty)
    rows = contents.rows.double().numpy()
    found = {}
    for i in range(len(rows)):
        for j in range(len(rows)):
            if i not in empty and j not in empty:
                cosine = rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
                found.setdefault((i // slots, j // slots), []).append(cosine)
    for k in range(4):
        for j in range(4):
            value = contents.cosines()[k, j].item()
            if (k, j) in found:
                best = min(found[k, j]) if k == j else max(found[k, j])
                assert value == pytest.approx(best, abs=1e-6)
            else:
                assert math.isnan(value)
    for k in range(4):
        for s in range(slots):
            length = contents.norms()[k, s].item()
            i = k * slots + s
            assert math.isnan(length) if i in empty else length == pytest.approx(
                np.linalg.norm(rows[i])
            )  # fmt: skip


def test_confusable_pairs_are_each_named_once_highest_first():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 0.0], [0.2, 1.0]])
    contents = MemoryContents(rows, torch.tensor([1, 1, 1, 0, 1]).bool(), 5)
    pairs = [(k, j) for k, j, _ in contents.confusable(99)]
    assert pairs == [(0, 1), (2, 4), (1, 4), (0, 4), (1, 2), (0, 2)]
    assert contents.confusable(1) == [(0, 1, pytest.approx(1 / math.hypot(1, 0.1)))]
    alone = MemoryContents(torch.ones(1, 2), torch.ones(1).bool(), 1)
    assert alone.confusable(3) == [] and alone.cosines().tolist() == [[1.0]]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["MODEL.MCIBI.MEMORY.RENORMALIZE", "False"],
        ["MODEL.MCIBI.HARD_AGGREGATION", "True"],
        ["MODEL.MCIBI.MEMORY.SLOTS", "2"],
    ],
    ids=["soft", "not renormalized", "hard", "slots"],
)
def test_gathered_rows_are_those_of_a_loop(tmp_path, options):
    model = build_model(make_tiny_cfg(tmp_path, *options)).eval()
    head, memory = model.sem_seg_head, model.sem_seg_head.memory
    memory.initialized.fill_(True)
    memory.initialized.view(16, -1)[[0, 5]] = False
    memory.initialized.view(16, -1)[7, 1:] = False
    for p in head.h1[-1].parameters():  # which are near zero at first
        torch.nn.init.normal_(p)
    known = [k not in (0, 5) for k in range(16)]
    batch = [
        {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8),
         "sem_seg": torch.randint(0, 14, size)}
        for size in ((40, 56), (48, 33))
    ]  # fmt: skip
    batch[0]["sem_seg"][:5] = 255

    with torch.no_grad():
        images = model.preprocess(batch)
        logits = head.h1(head.project(model.backbone(images.tensor)[head.in_feature]))
    sums, counts = np.zeros((16, 16)), np.zeros(16)
    for x, scores in zip(batch, logits, strict=True):
        if head.attention.hard:
            weights = F.one_hot(scores.argmax(0), 16).permute(2, 0, 1).float()
        else:
            weights = scores.softmax(0)
        weights = weights * torch.tensor(known)[:, None, None]
        if memory.renormalize:
            weights = weights / weights.sum(0).clamp_min(1e-30)
        size = images.tensor.shape[-2:]
        weights = F.interpolate(weights[None], size, mode="bilinear", align_corners=False)[0]
        for y, x_, k in ((y, x_, int(k)) for (y, x_), k in np.ndenumerate(x["sem_seg"].numpy())):
            if k != 255:
                sums[k] += weights[:, y, x_].numpy()
                counts[k] += 1
    table = gathered_rows(model, [batch]).numpy()
    assert np.isnan(table[14:]).all() and counts[14:].sum() == 0
    np.testing.assert_allclose(table[:14], sums[:14] / counts[:14, None], atol=2e-6)
    assert (table[:14, [0, 5]] == 0).all() and table[:14].std() > 0.001


def test_asking_h2_leaves_it_as_it_was(tiny_cfg):
    head = build_model(tiny_cfg).sem_seg_head
    head.memory.draw(0)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    answers = head.train().classify_rows()
    assert head.h2.training and all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    for row, answer in zip(head.memory.rows, answers, strict=True):
        expected = head.h2.eval()(row[None, :, None, None]).flatten().softmax(0)
        assert torch.allclose(answer, expected, atol=1e-6)


def write_checkpoint(folder, *options):
    cfg = make_tiny_cfg(folder, *options)
    model = build_model(cfg)
    if cfg.MODEL.MCIBI.ENABLED and cfg.MODEL.MCIBI.MEMORY.UPDATE != "zero":
        memory = model.sem_seg_head.memory
        memory.draw(1)
        memory.initialized[3] = False
        memory.rows[3] = 0
    torch.save({"model": model.state_dict(), "iteration": 3}, folder / "model.pth")
    return folder / "model.pth", model


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["memory", *map(str, arguments)])
    tool.main()


@pytest.mark.parametrize("slots", [1, 2])
def test_tool_needs_a_checkpoint_alone(tmp_path, monkeypatch, capsys, slots):
    path, model = write_checkpoint(tmp_path, "MODEL.MCIBI.MEMORY.SLOTS", str(slots))
    run_tool(monkeypatch, path)
    out = capsys.readouterr().out
    count = 16 * slots
    assert f"16 classes, {slots} row" in out and f"{count - 1} of {count} initialised" in out
    assert "Classes have numbers" in out and out.count("not initialised") == 1
    assert "--config-file" in out and "gathered" not in out
    contents = MemoryContents.read(str(path))
    assert (contents.num_classes, contents.slots) == (16, slots)
    assert torch.equal(contents.rows, model.sem_seg_head.memory.rows)
    k, j, cosine = contents.confusable(1)[0]
    assert any(line.split() == [str(k), str(j), f"{cosine:.3f}"] for line in out.splitlines())
    for name in ("lengths.png", "cosines.png"):
        with Image.open(tmp_path / "memory" / name) as image:
            assert np.asarray(image.convert("L")).std() > 20
    lines = list(csv.reader((tmp_path / "memory/cosines.csv").open()))
    assert len(lines) == 17 and float(lines[1 + k][1 + j]) == pytest.approx(cosine, abs=1e-4)

    (tmp_path / "config.yaml").write_text(make_tiny_cfg(tmp_path).dump() + "FROM_ANOTHER: 1\n")
    run_tool(monkeypatch, path)
    out = capsys.readouterr().out
    assert "foliage" in out and "Classes have numbers" not in out


def test_tool_with_a_config_asks_h2_and_the_pixels(tmp_path, monkeypatch, capsys):
    path, model = write_checkpoint(tmp_path)
    run_tool(monkeypatch, path, "--config-file", CONFIG, "--images", 2, "--output",
             tmp_path / "pictures", "--opts", *TINY)  # fmt: skip
    out = capsys.readouterr().out
    answers = model.sem_seg_head.classify_rows()
    known = model.sem_seg_head.memory.initialized
    right = int(((answers.argmax(1) == torch.arange(16)) & known).sum())
    assert f"H2 gives {right} of the 15 initialised rows to their own class." in out
    names = MetadataCatalog.get("scenes_val").stuff_classes
    answer = int(answers[0].argmax())
    assert f"{names[answer]} {100 * answers[0, answer]:.0f} %" in out
    lines = list(csv.reader((tmp_path / "pictures/gathered.csv").open()))
    assert lines[0][1:] == names
    shares = [[float(x) for x in line[1:]] for line in lines[1:] if line[1]]
    assert len(shares) > 5 and np.allclose(np.sum(shares, axis=1), 1, atol=1e-4)
    with Image.open(tmp_path / "pictures/gathered.png") as image:
        assert min(image.size) > 300


@pytest.mark.parametrize(
    "options, why",
    [
        (["MODEL.MCIBI.AGGREGATION", "none"], "AGGREGATION is none"),
        (["MODEL.MCIBI.AGGREGATION", "rows", "MODEL.MCIBI.ROWS_BIAS", "False"], "H1 has no say"),
    ],
)
def test_tool_says_when_h1_does_not_tell_what_is_gathered(
    tmp_path, monkeypatch, capsys, options, why
):
    path, _ = write_checkpoint(tmp_path, *options)
    run_tool(monkeypatch, path, "--config-file", CONFIG, "--opts", *TINY, *options)
    assert why in capsys.readouterr().out
    assert not (tmp_path / "memory/gathered.png").exists()


def test_tool_with_rows_attention_says_that_it_has_its_say(tmp_path, monkeypatch, capsys):
    options = ["MODEL.MCIBI.AGGREGATION", "rows", "MODEL.MCIBI.MEMORY.SLOTS", "2"]
    path, _ = write_checkpoint(tmp_path, *options)
    run_tool(monkeypatch, path, "--config-file", CONFIG, "--images", 1, "--opts", *TINY, *options)
    out = capsys.readouterr().out
    assert "the attention to the rows has its say" in out
    header = next(line for line in out.splitlines() if line.startswith("pixels of"))
    assert header.split() == ["pixels", "of", "gather", "the", "rows", "of"]


def test_tool_says_that_there_is_no_memory_or_nothing_in_it(tmp_path, monkeypatch, capsys):
    path, _ = write_checkpoint(tmp_path, "MODEL.MCIBI.ENABLED", "False")
    with pytest.raises(InputError, match="has no memory, expected a checkpoint"):
        run_tool(monkeypatch, path)
    path, _ = write_checkpoint(tmp_path, "MODEL.MCIBI.MEMORY.UPDATE", "zero")
    run_tool(monkeypatch, path)
    assert "no row is initialised" in capsys.readouterr().out
    assert not (tmp_path / "memory").exists()


def test_an_image_that_a_worker_cannot_read_is_one_sentence(tmp_path, monkeypatch, torn_scene):
    file, options = torn_scene
    path, _ = write_checkpoint(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        run_guarded(
            lambda: run_tool(monkeypatch, path, "--config-file", CONFIG, "--opts", *TINY, *options)
        )
    assert str(exit_info.value).startswith(f"error: {file}: cannot be read as an image")
    assert len(str(exit_info.value).splitlines()) == 1


def test_tool_refuses_what_it_cannot_read(tmp_path, monkeypatch):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save([1, 2], tmp_path / "list.pth")
    for arguments, message in (
        (["missing.pth"], "no such file"),
        ([tmp_path / "junk.pth"], "cannot be read as a checkpoint"),
        ([tmp_path / "list.pth"], "holds a list"),
        ([tmp_path / "list.pth", "--images", 0], "--images is 0"),
        ([tmp_path / "list.pth", "--opts", "MODEL.DEVICE", "cpu"], "needs --config-file"),
    ):
        with pytest.raises(InputError, match=message):
            run_tool(monkeypatch, *arguments)
    rows = {"h.memory.rows": torch.ones(7, 2), "h.h2.4.bias": torch.ones(3)}
    torch.save({"model": rows}, tmp_path / "odd.pth")
    with pytest.raises(InputError, match="7 rows and 7 flags for 3 classes"):
        MemoryContents.read(str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("num_classes", [1, 11, 182])
def test_figures_have_room_for_every_class(num_classes):
    names = [f"class {k} of a long name" for k in range(num_classes)]
    contents = some_contents(num_classes, 1)
    cosines = cosines_figure(contents.cosines().numpy(), names)
    axis = cosines.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()][:num_classes] == names
    gathered = torch.eye(num_classes).numpy()
    for figure in (cosines, gathered_figure(gathered, names), norms_figure(
        contents.norms().numpy(), names)):  # fmt: skip
        picture = rgb(png(figure))
        assert picture.std() > 10 and max(picture.shape) < 4000
        # The names do not touch: a line of them has as many pixels as its letters are high.
        if num_classes > 1 and figure is cosines:
            assert axis.bbox.height * 130 / figure.dpi / num_classes >= 14
        # Nothing is cut off at the border.
        border = np.concatenate(
            [picture[[0, -1]].reshape(-1, 3), picture[:, [0, -1]].reshape(-1, 3)]
        )
        assert (border == 255).all()


def test_contents_are_those_of_a_live_memory():
    memory = FeatureMemory(3, 4, slots=2)
    memory.draw(0)
    contents = MemoryContents.of(memory)
    memory.draw(1)
    assert contents.slots == 2 and not torch.equal(contents.rows, memory.rows)
