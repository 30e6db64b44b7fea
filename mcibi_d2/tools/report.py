"""Write one page about a run, or about several side by side: report.html.

python -m mcibi_d2.tools.report output/ade20k/mcibi_R50
python -m mcibi_d2.tools.report output/ade20k/fcn_R50 output/ade20k/mcibi_R50 --output page.html

Losses and mIoU over time, IoU per class, the memory, example predictions, config and environment,
from the files that training left. A folder that is no run itself stands for the runs in it. The
page needs nothing but its file: no network, no scripts.
"""

import base64
import html
import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import yaml

from mcibi_d2 import InputError
from mcibi_d2.data.files import find_files
from mcibi_d2.engine.checkpoint import replacing
from mcibi_d2.engine.picture_hook import OVERLAYS
from mcibi_d2.evaluation import MemoryContents, Results, read_results
from mcibi_d2.evaluation.results import MEASURES
from mcibi_d2.tools.command import ToolParser, run_tool
from mcibi_d2.tools.memory import PAIRS, class_names
from mcibi_d2.visualization import cosines_figure, curves_figure, norms_figure, png
from mcibi_d2.visualization.png import DPI

NAME = "report.html"
# One of these makes a folder a run.
_OF_A_RUN = ("metrics.json", "config.yaml", "last_checkpoint")
# What panels call the numbers of metrics.json, where another name says more.
_TITLES = {
    "sem_seg/mIoU": "mIoU",
    "loss_o": "loss_o: the prediction",
    "loss_w": "loss_w: H1",
    "loss_m": "loss_m: H2 on the memory",
    "loss_aux": "loss_aux: auxiliary head",
    "lr": "learning rate",
    "memory/initialized": "memory: share of rows initialised",
    "memory/momentum": "memory: momentum",
    "memory/row_norm": "memory: mean length of the rows",
    "memory/cosine": "memory: mean cosine between classes",
    "memory/h2_accuracy": "memory: share of rows that H2 recognises",
}


@dataclass
class Run:
    """What the folder of a run tells; None for what it does not.

    Args:
        folder: of the run.
        metrics: name -> iteration -> value.
        config: text of ``config.yaml``.
        results: of the last evaluation.
        best: of ``model_best.json``.
        memory: of the last checkpoint.
        class_names: of the memory.
        overlays: example predictions, a PNG file.
        environment: as the log has it.
        notes: what is missing, in sentences.
    """

    folder: Path
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    config: str | None = None
    results: Results | None = None
    best: dict | None = None
    memory: MemoryContents | None = None
    class_names: Sequence[str] = ()
    overlays: bytes | None = None
    environment: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, object]:
        """The config as key -> value, with the keys' full names; {} if it cannot be read."""
        try:
            return _flatten(yaml.safe_load(self.config or ""))
        except yaml.YAMLError:
            return {}


def _flatten(node: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node} if prefix else {}
    flat = {}
    for key, value in node.items():
        flat.update(_flatten(value, f"{prefix}{key}."))
    return flat


def read_metrics(path: Path) -> tuple[dict[str, dict[int, float]], int]:
    """The numbers of a ``metrics.json``.

    Where a run was resumed from an earlier iteration, or started again, what comes later in the
    file replaces what was there from that iteration on.

    Args:
        path: of the file, with a JSON object on each line.

    Returns:
        name -> iteration -> value, and how many lines could not be read, such as the last one of a
        run that was killed.
    """
    metrics: dict[str, dict[int, float]] = {}
    bad, last = 0, -1
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            iteration = int(values.pop("iteration"))
        except (ValueError, TypeError, KeyError, AttributeError):
            bad += bool(line.strip())
            continue
        if "total_loss" in values:  # every run has it, and writes it in order
            if iteration <= last:
                for name, series in metrics.items():
                    metrics[name] = {i: v for i, v in series.items() if i < iteration}
            last = iteration
        for name, value in values.items():
            if isinstance(value, int | float):
                metrics.setdefault(name, {})[iteration] = float(value)
    return {name: series for name, series in metrics.items() if series}, bad


def read_run(folder: Path) -> Run:
    """Read what there is of a run. Files that are missing or broken are said in its notes."""
    run = Run(folder)
    if (folder / "metrics.json").is_file():
        run.metrics, bad = read_metrics(folder / "metrics.json")
        if bad:
            lines, verb = ("1 line", "is") if bad == 1 else (f"{bad} lines", "are")
            run.notes.append(f"{lines} of metrics.json cannot be read and {verb} left out.")
    if not run.metrics:
        run.notes.append("There are no metrics (metrics.json), so there are no curves.")
    if (folder / "config.yaml").is_file():
        run.config = (folder / "config.yaml").read_text(errors="replace")
        if not run.settings:
            run.notes.append("config.yaml cannot be read as YAML.")
    run.results = _read_evaluation(run)
    if (folder / "model_best.json").is_file():
        try:
            run.best = json.loads((folder / "model_best.json").read_text())
        except ValueError:
            run.notes.append("model_best.json cannot be read.")
    _read_memory(run)
    if (folder / OVERLAYS).is_file():
        run.overlays = (folder / OVERLAYS).read_bytes()
        if not run.overlays.startswith(b"\x89PNG") or len(run.overlays) < 24:
            run.overlays = None
            run.notes.append(f"{OVERLAYS} cannot be read as a PNG file.")
    # The runs of the demo share one log.
    for log in (folder / "log.txt", folder.parent / "log.txt"):
        if run.environment is None and log.is_file():
            run.environment = read_environment(log.read_text(errors="replace"))
    return run


def _read_evaluation(run: Run) -> Results | None:
    # With several test sets each has a folder of its own.
    names = run.settings.get("DATASETS.TEST") or []
    folders = [run.folder, *(run.folder / "inference" / str(name) for name in names)]
    error: InputError | None = None
    for folder in folders:
        if folder.is_dir():
            try:
                return read_results(str(folder))
            except InputError as reason:
                error = error or reason
    found = any(
        file.stem == "sem_seg_evaluation"
        for folder in run.folder.glob("inference*")
        for file in find_files(folder).files
    )
    run.notes.append(f"{error}." if found else "It is not evaluated yet.")
    return None


def _read_memory(run: Run) -> None:
    tag = run.folder / "last_checkpoint"
    names = [tag.read_text().strip()] if tag.is_file() else []
    names = [n for n in (*names, "model_final.pth", "model_best.pth") if n]
    path = next((run.folder / n for n in names if (run.folder / n).is_file()), None)
    if path is None:
        run.notes.append("There is no checkpoint yet, so nothing is said of a memory.")
        return
    try:
        run.memory = MemoryContents.read(str(path))
    except InputError as error:
        run.notes.append(f"{error}.")
        return
    if run.memory is not None:
        run.class_names = class_names(str(run.folder / "config.yaml"), run.memory.num_classes)


def read_environment(log: str) -> str | None:
    """The last environment that a log describes, or None."""
    start = log.rfind("Environment info:")
    if start < 0:
        return None
    lines = log[start:].splitlines()[1:]
    # Up to the next message.
    end = next(
        (i for i, line in enumerate(lines) if re.match(r"\[\d\d/\d\d |\[\d{4}-", line)), None
    )
    return "\n".join(lines[:end]).strip()


def find_runs(folders: Sequence[Path]) -> dict[str, Path]:
    """The runs in folders, by the names that the page calls them.

    Raises:
        InputError: a folder is not there, or holds no run.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected the OUTPUT_DIR of a run")
        inside = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.iterdir()))
        if not inside:
            raise InputError(f"{folder}: holds none of {', '.join(_OF_A_RUN)}, expected a run")
        found += [run for run in inside if run not in found]
    parts = [run.resolve().parts for run in found]
    # As much of each path as tells it from the others.
    depth = next(n for n in range(1, 99) if len({p[-n:] for p in parts}) == len(parts) or n > 50)
    return {"/".join(p[-depth:]): run for p, run in zip(parts, found, strict=True)}


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in _OF_A_RUN)


def write_report(folders: Mapping[str, Path], path: Path) -> None:
    """Write the page.

    Args:
        folders: name -> folder of each run.
        path: of the page.
    """
    runs = {name: read_run(folder) for name, folder in folders.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(str(path)) as file:
        file.write(page(runs).encode())


def page(runs: Mapping[str, Run]) -> str:
    """The page about runs, as HTML."""
    title = ", ".join(runs)
    sections = [
        ("Overview", _overview(runs)),
        ("Over time", _curves(runs, _is_result)),
        ("IoU per class", _classes(runs)),
        ("Memory", _memory(runs)),
        ("Examples", _examples(runs)),
        (
            "Config",
            _texts({name: run.config for name, run in runs.items()}, "there is no config.yaml."),
        ),
        ("Environment", _environments(runs)),
    ]
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{text}\n</section>" for name, text in sections)
    return _PAGE.substitute(title=_text(title), body=body)


def _overview(runs: Mapping[str, Run]) -> str:
    lines = [
        ["iterations", *map(_iterations, runs.values())],
        ["data set", *(r.results.dataset if r.results else "" for r in runs.values())],
        ["images", *(r.results.images or "" if r.results else "" for r in runs.values())],
    ]
    for key in MEASURES:
        values = [r.results.values.get(key) if r.results else None for r in runs.values()]
        if any(value is not None for value in values):
            lines.append([key, *("" if v is None else f"{v:.2f}" for v in values)])
    lines.append(["best mIoU", *map(_best, runs.values())])
    parts = [_table(["", *runs], [line for line in lines if any(line[1:])])]
    differing = _differing_settings(runs)
    if differing:
        parts.append("<h3>What differs in the config</h3>")
        parts.append(_table(["", *runs], differing))
    notes = [f"<b>{_text(name)}</b>: {_text(note)}" for name, r in runs.items() for note in r.notes]
    for name, run in runs.items():
        for error in run.results.errors if run.results else ():
            notes.append(f"<b>{_text(name)}</b>: not counted: {_text(error)}")
    if notes:
        parts.append("<ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>")
    return "\n".join(parts)


def _iterations(run: Run) -> str:
    done = max(run.metrics.get("total_loss", {}), default=-1) + 1
    planned = run.settings.get("SOLVER.MAX_ITER")
    return f"{done} of {planned}" if planned else str(done)


def _best(run: Run) -> str:
    best = run.best or {}
    if not isinstance(best.get("value"), int | float):
        return ""
    return f"{best['value']:.2f} (iteration {best.get('iteration', '?')})"


def _differing_settings(runs: Mapping[str, Run]) -> list[list[str]]:
    settings = [run.settings for run in runs.values()]
    if not all(settings):
        return []
    keys = dict.fromkeys(key for flat in settings for key in flat if key != "OUTPUT_DIR")
    lines = [[key, *(str(flat.get(key, "")) for flat in settings)] for key in keys]
    return [line for line in lines if len(set(line[1:])) > 1]


def _is_result(name: str) -> bool:
    return name.endswith("/mIoU") or name.startswith(("total_loss", "loss")) or name == "lr"


def _curves(runs: Mapping[str, Run], wanted: Callable[[str], bool]) -> str:
    """The numbers with wanted names; mIoU comes first, then the sum of the losses."""
    names = sorted(
        {name for run in runs.values() for name in run.metrics if wanted(name)},
        key=lambda name: (not name.endswith("/mIoU"), name != "total_loss", name == "lr", name),
    )
    panels = {
        _TITLES.get(name, name): {
            of: run.metrics[name] for of, run in runs.items() if name in run.metrics
        }
        for name in names
    }
    if not panels:
        return _note("There are no numbers over time.")
    return _image(png(curves_figure(panels, list(runs))), ", ".join(panels))


def _classes(runs: Mapping[str, Run]) -> str:
    groups: dict[tuple, dict[str, Results]] = {}
    for name, run in runs.items():
        if run.results:
            groups.setdefault(tuple(run.results.classes), {})[name] = run.results
    if not groups:
        return _note("No run is evaluated.")
    return "\n".join(_class_table(classes, results) for classes, results in groups.items())


def _class_table(classes: Sequence[str], results: Mapping[str, Results]) -> str:
    lines = []
    for k in classes:
        values = [r.values.get(f"IoU-{k}", math.nan) for r in results.values()]
        known = [value for value in values if not math.isnan(value)]
        cells = [f"<th scope=row>{_text(k)}</th>"]
        for value in values:
            if math.isnan(value):
                cells.append("<td>absent</td>")
                continue
            strong = " best" if value == max(known) > min(known) else ""
            cells.append(
                f'<td class="bar{strong}" style="--part:{value:.2f}%"><span>{value:.2f}</span></td>'
            )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    head = "".join(f"<th scope=col>{_text(name)}</th>" for name in ("", *results))
    return (
        f'<div class="scroll"><table class="bars"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _memory(runs: Mapping[str, Run]) -> str:
    parts = []
    if any(name.startswith("memory/") for run in runs.values() for name in run.metrics):
        parts.append(_curves(runs, lambda name: name.startswith("memory/")))
    for name, run in runs.items():
        memory = run.memory
        if memory is None:
            parts.append(_note(f"{name}: no memory to show."))
            continue
        known = int(memory.initialized.sum())
        said = f"{known} of {len(memory.rows)} rows are initialised"
        if known == 0:
            parts.append(_note(f"{name}: {said}."))
            continue
        lengths = memory.norms()[~memory.norms().isnan()]
        cosines = cosines_figure(memory.cosines().numpy(), run.class_names)
        norms = norms_figure(memory.norms().numpy(), run.class_names)
        pairs = [
            [f"{run.class_names[k]}, {run.class_names[j]}", f"{cosine:.3f}"]
            for k, j, cosine in memory.confusable(PAIRS)
        ]
        parts.append(
            f"<h3>{_text(name)}</h3><p>{said}, of lengths {lengths.min():.2f} to "
            f'{lengths.max():.2f}.</p><div class="columns"><div>'
            f"{_image(png(cosines), f'cosines between the rows of {name}')}</div><div>"
            f"{_image(png(norms), f'lengths of the rows of {name}')}"
            f"{_table(['most confusable', 'cosine'], pairs) if pairs else ''}</div></div>"
        )
    return "\n".join(parts)


def _examples(runs: Mapping[str, Run]) -> str:
    blocks = [
        f"<div><h3>{_text(name)}</h3>{_image(run.overlays, f'predictions of {name}')}</div>"
        for name, run in runs.items()
        if run.overlays
    ]
    if not blocks:
        return _note(f"There is no {OVERLAYS}, which every evaluation in training writes.")
    return f'<div class="columns">{"".join(blocks)}</div>'


def _environments(runs: Mapping[str, Run]) -> str:
    texts = {name: run.environment for name, run in runs.items()}
    if len(set(texts.values())) == 1:
        texts = {"all runs" if len(texts) > 1 else next(iter(texts)): next(iter(texts.values()))}
    return _texts(texts, "not recorded in log.txt.")


def _texts(texts: Mapping[str, str | None], missing: str) -> str:
    parts = []
    for name, text in texts.items():
        if text is None:
            parts.append(_note(f"{name}: {missing}"))
        else:
            parts.append(
                f"<details><summary>{_text(name)}</summary><pre>{_text(text)}</pre></details>"
            )
    return "\n".join(parts)


def _text(value: object) -> str:
    return html.escape(str(value))


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _table(head: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    header = "".join(f"<th scope=col>{_text(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{_text(line[0])}</th>"
        + "".join(f"<td>{_text(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    return (
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _image(file: bytes, alt: str) -> str:
    """A PNG file in the page, at the size that it is drawn for; one larger than that scrolls."""
    width = round(struct.unpack(">I", file[16:20])[0] * 96 / DPI)
    data = base64.b64encode(file).decode()
    wide = " wide" if width > 1200 else ""
    return (
        f'<div class="picture{wide}"><img width="{width}" alt="{_text(alt)}" '
        f'src="data:image/png;base64,{data}"></div>'
    )


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1c1e21; --back: #fff; --line: #d8dce2; --soft: #5c6570;
 --part: 0%; --bar: #bcd4f0; --best: #7fb0e6; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --back: #16181c; --line: #363b43;
 --soft: #9aa3af; --bar: #24405f; --best: #2f6aa8; } }
body { margin: 0 auto; max-width: 1240px; padding: 1rem 1.5rem 4rem; color: var(--text);
 background: var(--back); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .6rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; padding-bottom: .25rem;
 border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
h4 { font-size: .9rem; margin: 1rem 0 .4rem; }
.note, summary, ul { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; }
th[scope=row] { text-align: left; font-weight: 400; }
.bars td { min-width: 9rem; }
.bar { background: linear-gradient(to right, var(--bar) var(--part), transparent var(--part)); }
.best { --bar: var(--best); font-weight: 600; }
.columns { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
.columns > div { flex: 1 1 30rem; min-width: 0; }
.columns > div:has(.wide) { flex-basis: 100%; }
.picture { margin: .5rem 0; }
.picture img { display: block; max-width: 100%; height: auto; background: #fff;
 border-radius: 4px; }
.wide { overflow: auto; max-height: 85vh; }
.wide img { max-width: none; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 4px;
 font-size: 12px; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("report", __doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help=f"default: {NAME} in the folder, or in the one that holds all of them",
    )  # fmt: skip
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    runs = find_runs(args.folders)
    path = args.output or Path(os.path.commonpath(args.folders)) / NAME
    write_report(runs, path)
    print(f"Look at {path}.")


if __name__ == "__main__":
    run_tool(main)
