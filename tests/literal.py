"""The paper's equations, written out slowly and literally, to test against."""

import torch
import torch.nn.functional as F


def up(features, size):
    """The up-sampling in front of Eq. 8."""
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def transform(rows, initialized, features, labels, num_classes, cosine=True):
    """T of Eq. 6: R' by Eq. 8-10, with the plain mean where Eq. 10 says nothing.

    Args:
        rows: M, (K, C).
        initialized: (K,) bool.
        features: R, (N, C, h, w).
        labels: GT, (N, H, W).
    """
    pixels = up(features, labels.shape[-2:]).permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    labels = labels.reshape(-1)
    result = rows.clone()
    for k in range(num_classes):
        of_class = pixels[labels == k]  # Eq. 8
        if len(of_class) == 0:
            continue
        weights = torch.ones(len(of_class), dtype=rows.dtype)
        if cosine and initialized[k]:
            for i, pixel in enumerate(of_class):  # Eq. 9
                lengths = pixel.norm() * rows[k].norm()
                # Where grid points cancel, what is left of a pixel is rounding.
                similarity = pixel @ rows[k] / lengths if lengths > 1e-12 else 0.0
                weights[i] = 1 - similarity
        if weights.sum() <= 1e-12 * len(of_class):
            weights = torch.ones_like(weights)
        result[k] = sum(
            weight / weights.sum() * pixel  # Eq. 10
            for weight, pixel in zip(weights, of_class, strict=True)
        )
    return result


def step(rows, initialized, features, labels, num_classes, momentum, cosine=True):
    """Eq. 6 for the rows that are initialised; a row seen for the first time is set."""
    new = transform(rows, initialized, features, labels, num_classes, cosine)
    seen = torch.tensor([bool((labels == k).any()) for k in range(num_classes)])
    moved = torch.where(initialized[:, None], (1 - momentum) * rows + momentum * new, new)
    return torch.where(seen[:, None], moved, rows), initialized | seen


def step_slots(rows, initialized, features, labels, momentum, cosine=True):
    """Eq. 6-10 with several rows per class: (K, S, C), (K, S).

    A class with an empty slot fills it by the mean of its pixels; else each pixel moves the slot
    that is most similar to it.
    """
    pixels = up(features, labels.shape[-2:]).permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    labels = labels.reshape(-1)
    new_rows, new_initialized = rows.clone(), initialized.clone()
    for k in range(len(rows)):
        of_class = pixels[labels == k]
        if len(of_class) == 0:
            continue
        if not initialized[k].all():
            first = initialized[k].tolist().index(False)
            new_rows[k, first] = of_class.mean(dim=0)
            new_initialized[k, first] = True
            continue
        choice = torch.stack([F.cosine_similarity(of_class, row[None]) for row in rows[k]]).argmax(
            0
        )
        for slot in range(rows.shape[1]):
            own = of_class[choice == slot]
            if len(own) == 0:
                continue
            own_labels = torch.zeros(1, len(own), 1, dtype=torch.long)
            own_map = own.t()[None, :, :, None]
            new_rows[k, slot] = step(
                rows[k, slot : slot + 1], torch.tensor([True]), own_map, own_labels, 1, momentum,
                cosine,
            )[0][0]  # fmt: skip
    return new_rows, new_initialized


def attention(query, key, value):
    """Eq. 13 and the product of Eq. 14, for (N, D, h, w) maps."""
    query, key, value = (x.flatten(2).transpose(1, 2) for x in (query, key, value))
    relations = torch.softmax(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, dim=-1)
    return relations @ value
