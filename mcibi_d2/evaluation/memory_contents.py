"""What a feature memory holds, and what pixels take out of it: the numbers behind the pictures."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import InputError
from ..files import read_data
from ..modeling import FeatureMemory


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
        state = read_data(path, "a checkpoint")
        if isinstance(state, dict) and isinstance(state.get("model"), dict):
            state = state["model"]
        if not isinstance(state, dict):
            raise InputError(f"{path}: holds a {type(state).__name__}, expected a checkpoint")
        names = [name for name in state if f".{name}".endswith(".memory.rows")]
        if not names:
            return None
        prefix = names[0].removesuffix("memory.rows")
        if not torch.is_tensor(state[names[0]]):
            raise InputError(f"{path}: its {names[0]} is no tensor, expected a checkpoint")
        rows = state[names[0]].float()
        initialized = state.get(f"{prefix}memory.initialized")
        if initialized is None:
            initialized = rows.any(dim=1)
        # H2's last bias has one number for each class.
        biases = [
            v for k, v in state.items() if f"{k}".startswith(f"{prefix}h2.") and k.endswith("bias")
        ]
        num_classes = len(biases[-1]) if biases else len(rows)
        if len(initialized) != len(rows) or len(rows) % num_classes:
            raise InputError(
                f"{path}: its memory has {len(rows)} rows and {len(initialized)} flags for "
                f"{num_classes} classes, expected as many for each"
            )
        return cls(rows, initialized.bool(), num_classes)

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
    known = memory.initialized.view(memory.num_classes, memory.slots).any(dim=1)[:, None, None]
    # The mean over the pixels of each class is what a memory of W's starts with.
    table = FeatureMemory(memory.num_classes, memory.num_classes, update="mean").double()
    for batch in batches:
        images = model.preprocess(batch)
        features = model.backbone(images.tensor)
        coarse = head.h1(head.project(features[head.in_feature]))
        weights = head.read_weights(coarse.float()) * known
        if memory.renormalize:
            total = weights.sum(dim=1, keepdim=True)
            weights = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
        # The features cover the padded images.
        targets = ImageList.from_tensors(
            [x["sem_seg"] for x in batch], model.backbone.size_divisibility, head.ignore_value
        ).tensor
        table.observe(weights.cpu(), targets, head.ignore_value)
    table.commit(1.0)
    return table.rows.masked_fill(~table.initialized[:, None], torch.nan).float()
