"""The paper's Figure 3: how the features of a model and of its baseline lie.

python -m mcibi_d2.tools.features --output features.png \\
    --config-file configs/cityscapes/mcibi_R50.yaml --weights mcibi.pth \\
    --baseline-config-file configs/cityscapes/fcn_R50.yaml --baseline-weights fcn.pth

Each point is the mean feature of one class in one image of DATASETS.TEST: of R_aug, which H2
classifies, or of what the baseline's classifier sees. t-SNE lays them out. The numbers below are of
the features themselves: the mean silhouette (1: compact and apart, 0: mixed), and the share of
points whose nearest neighbour is of their class.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from mcibi_d2 import InputError
from mcibi_d2.data import build_labelled_loader
from mcibi_d2.data.classes import Classes
from mcibi_d2.engine import load_config
from mcibi_d2.evaluation import class_features, separation
from mcibi_d2.predict import Predictor
from mcibi_d2.tools.command import ToolParser, run_tool
from mcibi_d2.visualization import Panel, embedding_figure

# scikit-learn's t-SNE is slow for more points.
MOST_POINTS = 10_000


def embed(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of (P, C) features to (P, 2): scikit-learn's, openTSNE's for very many points."""
    perplexity = min(30.0, (len(features) - 1) / 3)
    if len(features) > MOST_POINTS:
        from openTSNE import TSNE

        return np.asarray(TSNE(perplexity=perplexity, random_state=seed).fit(features))
    from sklearn.manifold import TSNE

    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)


def check_package(name: str, package: str) -> None:
    """Raise an :class:`InputError` if a package is not installed."""
    if find_spec(name) is None:
        raise InputError(f"this tool needs {package}: pip install 'mcibi_d2[features]'")


def features_of(
    config_file: str, weights: str, options: list[str], images: int | None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean features (P, C), their classes (P,), and the name of the data set.

    Args:
        config_file: of the model.
        weights: of the model; "" for ``MODEL.WEIGHTS`` of the config.
        options: config keys and values.
        images: look at so many; None for all.
    """
    cfg = load_config(config_file, options)
    if weights:
        cfg.MODEL.WEIGHTS = weights
    if not cfg.DATASETS.TEST:
        raise InputError(f"{config_file}: DATASETS.TEST is empty, expected a data set with labels")
    name = cfg.DATASETS.TEST[0]
    model = Predictor(cfg).model
    loader = build_labelled_loader(cfg, name, images)
    found, classes = class_features(model, tqdm(loader, desc="Looking at images", unit="image"))
    if not torch.isfinite(found).all():
        raise InputError(f"{cfg.MODEL.WEIGHTS}: gives features that are not finite")
    return found.numpy(), classes.numpy(), name


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("features", __doc__)
    parser.add_config_file()
    parser.add_argument("--weights", default="", metavar="FILE", help="default: MODEL.WEIGHTS")
    parser.add_argument("--baseline-config-file", metavar="FILE", help="drawn on the left")
    parser.add_argument("--baseline-weights", default="", metavar="FILE")
    parser.add_argument(
        "--output", type=Path, default=Path("features.png"), help="picture (features.png)"
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="look at so many of DATASETS.TEST (all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE (0)")
    parser.add_opts("MODEL.DEVICE cpu, of both")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    if args.images is not None and args.images < 1:
        raise InputError(f"--images is {args.images}, expected at least 1")
    if args.baseline_weights and not args.baseline_config_file:
        raise InputError("--baseline-weights needs --baseline-config-file")
    check_package("sklearn", "scikit-learn")
    runs = {}
    if args.baseline_config_file:
        runs["baseline"] = (args.baseline_config_file, args.baseline_weights)
    runs["MCIBI" if runs else "features"] = (args.config_file, args.weights)

    found = {name: features_of(*run, args.opts, args.images) for name, run in runs.items()}
    names = {dataset for _, _, dataset in found.values()}
    if len(names) > 1:
        raise InputError(
            f"DATASETS.TEST of the two are {' and '.join(sorted(names))}, expected one"
        )
    (dataset,) = names
    panels, lines = [], []
    for name, (features, classes, _) in found.items():
        silhouette, purity = separation(features, classes)
        if len(features) > MOST_POINTS:
            check_package("openTSNE", f"openTSNE for {len(features)} points")
        caption = f"silhouette {silhouette:.3f}, nearest neighbour pure {100 * purity:.1f} %"
        panels.append(Panel(name, embed(features, args.seed), classes, caption))
        lines.append([name, len(features), f"{silhouette:.3f}", f"{100 * purity:.1f} %"])
    print(
        tabulate(
            lines, headers=["", "points", "silhouette", "pure neighbours"], disable_numparse=True
        )
    )
    classes = Classes.of(dataset)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure = embedding_figure(panels, classes.names, classes.colors)
    figure.savefig(args.output, dpi=150)
    print(f"Look at {args.output}.")


if __name__ == "__main__":
    run_tool(main)
