"""Which labels are those of a class."""

from torch import Tensor


def classes_of(labels: Tensor, num_classes: int, ignore_value: int) -> tuple[Tensor, Tensor]:
    """The class of each pixel, and whether it has one.

    Args:
        labels: of any integer type. Those equal to ``ignore_value`` or outside 0..K-1 are not
            valid.
        num_classes: K.
        ignore_value: the label of pixels without ground truth.

    Returns:
        The labels as int64, K where they are not valid, and whether they are.
    """
    labels = labels.long()
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_value)
    return labels.masked_fill(~valid, num_classes), valid
