"""How a model's features lie: one mean feature per image and class, and how well these separate."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..modeling import MCIBIHead
from ..modeling.memory import ClassMeans


@torch.no_grad()
def class_features(model: nn.Module, batches: Iterable[list[dict]]) -> tuple[Tensor, Tensor]:
    """The mean feature of each class in each image, the points of the paper's Figure 3.

    The features are those that the last classifier sees: R_aug before H2 (Eq. 4), or, without a
    memory, what the baseline classifies. They are up-sampled bilinearly to the labels.

    Args:
        model: a segmentor in evaluation mode whose head is an :class:`MCIBIHead`.
        batches: lists of records with ``image`` (3, H, W) and ``sem_seg`` (H, W), its labels.

    Returns:
        (P, C) float32 features and their classes (P,), on the CPU, in the order of the images.
    """
    head = model.sem_seg_head
    if not isinstance(head, MCIBIHead):
        raise InputError(f"the head is {type(head).__name__}, expected MCIBIHead")
    features, classes = [], []
    for batch in batches:
        images = model.preprocess(batch)
        maps = head.describe(model.backbone(images.tensor)).augmented.float()
        # The features cover the padded images.
        targets = model.pad_targets([x["sem_seg"] for x in batch])
        for image, labels in zip(maps, targets, strict=True):
            of_image = ClassMeans(head.num_classes, len(image), maps.dtype, maps.device)
            of_image.add(image[None], labels[None], head.ignore_value)
            means = of_image.means()
            found = means.isfinite().all(dim=1)
            features.append(means[found].cpu())
            classes.append(found.nonzero().flatten().cpu())
    return torch.cat(features), torch.cat(classes)


def separation(features: np.ndarray, classes: np.ndarray) -> tuple[float, float]:
    """How compact and apart classes are, by distances between the features themselves.

    Args:
        features: (P, C).
        classes: (P,).

    Returns:
        The mean silhouette (-1 to 1), and the share of points whose nearest neighbour is of their
        class (0 to 1), both over the classes with two points or more.

    Raises:
        InputError: there are not two such classes.
    """
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    kinds, place, counts = np.unique(classes, return_inverse=True, return_counts=True)
    kept = counts[place] > 1
    if (counts > 1).sum() < 2:
        raise InputError(
            f"{len(classes)} features of {len(kinds)} classes, expected two classes in two images "
            f"or more"
        )
    features, classes = features[kept], classes[kept]
    nearest = NearestNeighbors(n_neighbors=1).fit(features).kneighbors(return_distance=False)
    purity = (classes[nearest[:, 0]] == classes).mean()
    return float(silhouette_score(features, classes)), float(purity)
