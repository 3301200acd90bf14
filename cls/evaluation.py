"""One pass of a model over labeled images: its outputs, and the accuracy of a classifier."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.data.images import Crop, ImageError
from addp_core.data.pixels import stack_pixels, to_float
from addp_core.data.sources import ImageSource
from addp_core.data.stream import ReadErrors, default_workers, ignore_signals, iterate
from addp_core.networks.classifier import RGB, normalize
from addp_core.training.compute import autocast
from addp_core.training.evaluation import check_unreadable
from addp_core.training.pace import VALIDATION, mark_pace
from addp_core.training.processes import process_state

log = logging.getLogger("addp")


@dataclass
class OutputBatch:
    """A model's outputs for a batch of images, in float32 on the CPU."""

    outputs: Tensor  # Float[b,...]
    labels: Tensor  # Long[b]
    indices: Tensor  # Long[b], into the source


@dataclass
class Scores:
    """A classifier's predictions, counted by class, of C classes."""

    confusion: Tensor  # Long[C,C], rows: true class, columns: predicted class
    top5: int = 0

    @classmethod
    def zero(cls, classes: int) -> "Scores":
        """Return the counts over no images."""
        return cls(torch.zeros(classes, classes, dtype=torch.long))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count the predictions of Float[b,C] logits against Long[b] labels."""
        classes = len(self.confusion)
        top = logits.topk(min(5, classes), 1).indices
        self.confusion += torch.bincount(labels * classes + top[:, 0], minlength=classes**2).view(classes, classes)
        self.top5 += int((top == labels[:, None]).sum())

    @property
    def images(self) -> int:
        """The number of images counted."""
        return int(self.confusion.sum())

    @property
    def metrics(self) -> dict[str, float]:
        """top1 and top5 in percent (with five classes or fewer, top5 is 100)."""
        n = max(self.images, 1)
        return {"top1": 100 * int(self.confusion.trace()) / n, "top5": 100 * self.top5 / n}

    def gather(self) -> "Scores":
        """Return the sum over all processes; to be called on each of them."""
        parts = gather_object([self])
        return Scores(torch.stack([part.confusion for part in parts]).sum(0), sum(part.top5 for part in parts))


def compute_outputs(
    model: nn.Module,
    source: ImageSource,
    transform: Crop,
    *,
    mean: RGB,
    std: RGB,
    indices: Sequence[int] | None = None,
    batch: int = 64,
    precision: str = "fp32",
    workers: int | None = None,
    max_errors: float = 0.01,
    title: str = "",
    errors: ReadErrors | None = None,
) -> Iterator[OutputBatch]:
    """Yield the outputs of `model` for every image, each image once; the processes of a run share the images.

    Unreadable images are skipped, with a warning for each. The processes count them together after every batch, so all
    of them must use up the iterator and not communicate otherwise meanwhile.

    Args:
        transform: the evaluation crop; its images are then normalized with `mean` and `std`.
        indices: the images to process; by default all.
        max_errors: as in a recipe's section `data`.
        title: of the progress bar; without one, no bar is shown.
        errors: if given, the unreadable images of this process are appended to it, and the processes do not count them
            together: the caller has to (`check_unreadable`).

    Raises:
        UserError: more than `max_errors` images are unreadable, or all of them, or a label is out of range.
        EvaluationStopped: a signal asked the training run that evaluates to stop.
    """
    state = process_state()
    count_together = errors is None
    errors = [] if errors is None else errors
    selected = range(len(source)) if indices is None else indices
    own_indices = selected[state.process_index :: state.num_processes]
    batches = [list(own_indices[first : first + batch]) for first in range(0, len(own_indices), batch)]
    loader = DataLoader(
        _ImageBatches(source, transform, batches),
        batch_size=None,
        num_workers=min(default_workers() if workers is None else workers, len(batches)),
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    device = next(model.parameters()).device
    rounds = math.ceil(math.ceil(len(selected) / state.num_processes) / batch)  # of the process with most images
    hidden = not (title and state.is_main_process)
    mark_pace(VALIDATION, 0)
    bar = tqdm(total=len(own_indices), desc=title, unit="img", disable=hidden, leave=False)
    with bar, iterate(loader) as loaded:
        for images, labels, batch_indices, new_errors in loaded:
            for name, reason in new_errors:
                log.warning("skipped an unreadable image: %s (%s)", name, reason)
            errors += new_errors
            if count_together:
                check_unreadable(errors, max_errors, len(selected))
            if len(batch_indices):
                _check_image_labels(labels, batch_indices, source)
                pixels = normalize(to_float(images.to(device, non_blocking=True)), mean, std)
                with torch.inference_mode(), autocast(precision, device):
                    outputs = model(pixels)
                yield OutputBatch(outputs.float().cpu(), labels, batch_indices)
            bar.update(len(batch_indices) + len(new_errors))
            mark_pace(VALIDATION, (len(batch_indices) + len(new_errors)) * state.num_processes)
    for _ in range(rounds - len(batches) if count_together else 0):
        check_unreadable(errors, max_errors, len(selected))


def _check_image_labels(labels: Tensor, indices: Tensor, source: ImageSource) -> None:
    """Raise UserError, with the name of the image, if a label is out of range."""
    invalid = ((labels < 0) | (labels >= len(source.classes))).nonzero()
    if len(invalid):
        row = int(invalid[0])
        raise UserError(
            f"{source.name(int(indices[row]))}: found label {int(labels[row])}, expected 0 to {len(source.classes) - 1}"
        )


class _ImageBatches(Dataset):
    """Batch number -> (UInt8[b,3,h,w], labels, indices, unreadable images)."""

    def __init__(self, source: ImageSource, transform: Crop, batches: list[list[int]]):
        self.source, self.transform, self.batches = source, transform, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, ReadErrors]:
        images: list[Tensor] = []
        labels: list[int] = []
        indices: list[int] = []
        errors: ReadErrors = []
        self.source.read_ahead(self.batches[number])
        for index in self.batches[number]:
            try:
                image, label = self.source.open_image(index)
                images.append(self.transform.pixels(image))
                labels.append(label)
                indices.append(index)
            except ImageError as error:
                errors.append((self.source.name(index), str(error)))
        stacked = stack_pixels(images) if images else torch.empty(0)
        return stacked, torch.tensor(labels, dtype=torch.long), torch.tensor(indices, dtype=torch.long), errors


def evaluate_classifier(model: nn.Module, source: ImageSource, transform: Crop, classes: int, **options: Any) -> Scores:
    """Return a classifier's scores over a whole source, on every process; `options` as those of `compute_outputs`."""
    scores = Scores.zero(classes)
    for batch in compute_outputs(model, source, transform, **options):
        scores.add(batch.outputs, batch.labels)
    return scores.gather()
