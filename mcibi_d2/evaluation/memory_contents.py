"""What a feature memory holds, and what pixels take out of it: the numbers behind the pictures."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..files import read_data
from ..modeling import FeatureMemory
from ..modeling.memory import ClassMeans, memory_in


@dataclass
class MemoryContents:
    """The rows of a memory, on the CPU, and how they lie to each other.

    Args:
        rows: (K * S, C), slot s of class k in row k * S + s.
        initialized: (K * S,) bool.
        num_classes: K.
    """

    rows: Tensor
    initialized: Tensor
    num_classes: int

    @classmethod
    def of(cls, memory: FeatureMemory) -> "MemoryContents":
        """Of a memory on any device, as it is now."""
        rows, initialized = memory.rows.detach().float().cpu(), memory.initialized.cpu()
        return cls(rows.clone(), initialized.clone(), memory.num_classes)

    @classmethod
    def read(cls, path: str) -> "MemoryContents | None":
        """Of a checkpoint, without its model; None if it has no memory.

        Raises:
            InputError: the file cannot be read, or holds no checkpoint.
        """
        content = read_data(path, "a checkpoint")
        if not isinstance(content, dict):
            raise InputError(f"{path}: holds a {type(content).__name__}, expected a checkpoint")
        stored = memory_in(content, path)
        if stored is None:
            return None
        return cls(stored.rows, stored.initialized, stored.num_classes or len(stored.rows))

    @property
    def slots(self) -> int:
        """S, rows per class."""
        return len(self.rows) // self.num_classes

    def norms(self) -> Tensor:
        """The lengths of the rows (K, S); nan where a row is not initialised."""
        norms = self.rows.norm(dim=1).masked_fill(~self.initialized, torch.nan)
        return norms.view(self.num_classes, self.slots)

    def row_cosines(self) -> Tensor:
        """The cosines between all rows (K * S, K * S); nan with one that is not initialised."""
        units = F.normalize(self.rows.double(), dim=1, eps=torch.finfo(self.rows.dtype).tiny)
        known = self.initialized[:, None] & self.initialized
        return (units @ units.t()).clamp(-1, 1).masked_fill(~known, torch.nan).float()

    def cosines(self) -> Tensor:
        """The cosines between the classes, (K, K); nan where there is none.

        With one slot they are those of the rows. With more, that of two classes is the highest of
        any two of their rows, and that of a class with itself the lowest of any two of its rows.
        """
        k, s = self.num_classes, self.slots
        blocks = self.row_cosines().view(k, s, k, s).transpose(1, 2).flatten(2)
        missing = blocks.isnan()
        highest = blocks.masked_fill(missing, -torch.inf).amax(dim=2)
        lowest = blocks.masked_fill(missing, torch.inf).amin(dim=2)
        same = torch.eye(k, dtype=torch.bool)
        return torch.where(same, lowest, highest).masked_fill(missing.all(dim=2), torch.nan)

    def confusable(self, count: int) -> list[tuple[int, int, float]]:
        """The pairs of classes with the highest cosine: (k, l, cosine), k < l, highest first."""
        cosines = self.cosines()
        first, second = torch.triu_indices(*cosines.shape, offset=1)
        values = cosines[first, second]
        order = values.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
        order = order[~values[order].isnan()][:count]
        return [(int(first[i]), int(second[i]), float(values[i])) for i in order.tolist()]


@torch.no_grad()
def gathered_rows(model: nn.Module, batches: Iterable[list[dict]]) -> Tensor:
    """Which rows the pixels of each class gather.

    Args:
        model: a segmentor in evaluation mode whose head is an ``MCIBIHead`` with H1.
        batches: lists of records with ``image`` (3, H, W) and ``sem_seg`` (H, W), its labels.

    Returns:
        (K, K) float32. Line k: the mean W (Eq. 11) over the pixels of class k in the truth, where
        W is up-sampled to the size of the labels, and the weights of classes without a row are
        left out as :meth:`FeatureMemory.read` leaves them out. Nan for a class without pixels.
    """
    head = model.sem_seg_head
    memory = head.memory
    known = memory.initialized.view(memory.num_classes, memory.slots).any(dim=1)
    table = ClassMeans(memory.num_classes, memory.num_classes, torch.float64, "cpu")
    for batch in batches:
        images = model.preprocess(batch)
        coarse = head.describe(model.backbone(images.tensor)).coarse
        weights = memory.weights(head.attention.weights(coarse.float()), known)
        # The features cover the padded images.
        targets = model.pad_targets([x["sem_seg"] for x in batch])
        table.add(weights.cpu(), targets.cpu(), head.ignore_value)
    return table.means().float()
