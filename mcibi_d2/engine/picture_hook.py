"""Pictures of the memory and of predictions, after every evaluation."""

import os

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from matplotlib.figure import Figure
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import SemSegMapper, read_image
from ..data.classes import Classes
from ..data.datasets import load_records
from ..data.labels import read_labels
from ..evaluation import MemoryContents
from ..modeling.segmentor import labels_only
from ..visualization import comparison_sheet, cosines_figure, norms_figure, png, rgb
from .checkpoint import replacing
from .memory_hooks import find_memories

# In the folder of the run: the last overlays.
OVERLAYS = "overlays.png"


class PictureHook(HookBase):
    """Draw the memory and a few validation images whenever there was an evaluation.

    To TensorBoard (as images of the event storage) go ``memory/cosines`` and ``memory/lengths``,
    where the model has a memory with an initialised row, and ``validation``: a sheet of images,
    their ground truth and predictions, which is also written to ``overlays.png`` in the folder of
    the run. The images are spread evenly over the first test set, and are the same every time.

    It must run on the main process alone, between the evaluation and the writers. It changes
    nothing that the training sees: the model runs in evaluation mode, and nothing is drawn at
    random.

    Args:
        cfg: ``DATASETS.TEST``, ``TEST.VIS_IMAGES``, ``TEST.EVAL_PERIOD`` and ``OUTPUT_DIR``, and
            what the images are prepared with.
    """

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg

    def after_step(self) -> None:
        """Draw, if this iteration had its evaluation, and it is not that of the end."""
        done, period = self.trainer.iter + 1, self.cfg.TEST.EVAL_PERIOD
        if period > 0 and done % period == 0 and done != self.trainer.max_iter:
            self._draw()

    def after_train(self) -> None:
        """Draw what the end of the training is like."""
        self._draw()

    def _draw(self) -> None:
        model = self.trainer.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        for memory in find_memories(model):
            contents = MemoryContents.of(memory)
            names = Classes.of(self.cfg.DATASETS.TEST[0]).names
            if contents.initialized.any():
                cosines, norms = contents.cosines().numpy(), contents.norms().numpy()
                self._show("memory/cosines", png(cosines_figure(cosines, names)))
                self._show("memory/lengths", png(norms_figure(norms, names)))
        sheet = png(overlays(self.cfg, model, self.cfg.TEST.VIS_IMAGES))
        self._show("validation", sheet)
        with replacing(os.path.join(self.cfg.OUTPUT_DIR, OVERLAYS)) as file:
            file.write(sheet)

    def _show(self, name: str, picture: bytes) -> None:
        self.trainer.storage.put_image(name, rgb(picture).transpose(2, 0, 1))


def overlays(cfg: CfgNode, model: nn.Module, count: int) -> Figure:
    """A sheet of images of the first test set, with ground truth and predictions laid over them.

    Args:
        cfg: see :class:`PictureHook`.
        model: a segmentor, whose mode is as before afterwards.
        count: of the images, which are spread evenly over the set.
    """
    name = cfg.DATASETS.TEST[0]
    records, classes = load_records(name), Classes.of(name)
    count = min(count, len(records))
    mapper, rows = SemSegMapper(cfg, False), []
    with inference_context(model), labels_only(model), torch.no_grad():
        for record in (records[i * len(records) // count] for i in range(count)):
            result = model([mapper(record)])[0]
            labels = result["labels"] if "labels" in result else result["sem_seg"].argmax(dim=0)
            label_file = record.get("sem_seg_file_name")
            row = {
                "image": read_image(
                    record["file_name"],
                    "RGB",
                    label_file,
                    cfg.INPUT.WHITE_LEVEL,
                    cfg.INPUT.MAX_PIXELS,
                )
            }
            if label_file:  # evaluators of other projects may do without
                row["ground truth"] = read_labels(label_file, name)
            rows.append({**row, "prediction": labels.cpu().numpy().astype(np.int64)})
    return comparison_sheet(rows, classes.names, classes.colors, opacity=0.7)
