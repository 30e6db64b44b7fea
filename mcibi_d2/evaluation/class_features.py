"""How a model's features lie: one mean feature per image and class, and how well these separate."""

from collections.abc import Iterable

import numpy as np
import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import InputError
from ..modeling import FeatureMemory, MCIBIHead


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
    seen: list[Tensor] = []
    classifier = head.h2 if head.enabled else head.classify
    hook = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features, classes = [], []
    try:
        for batch in batches:
            images = model.preprocess(batch)
            seen.clear()
            head(model.backbone(images.tensor))
            maps = seen[0].float()
            # The features cover the padded images.
            targets = ImageList.from_tensors(
                [x["sem_seg"].to(maps.device) for x in batch],
                model.backbone.size_divisibility,
                head.ignore_value,
            ).tensor
            for image, labels in zip(maps, targets, strict=True):
                # Of one image, what a memory starts with is the mean of each class.
                means = FeatureMemory(head.num_classes, len(image), update="mean").to(maps.device)
                means.observe(image[None], labels[None], head.ignore_value)
                means.commit(1.0)
                features.append(means.rows[means.initialized].cpu())
                classes.append(means.initialized.nonzero().flatten().cpu())
    finally:
        hook.remove()
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
