"""One pass over labelled images: what a classifier answers, and how often it is right."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError
from addp_core.data.sources import ImageSource
from addp_core.data.stream import default_workers, error_limit, ignore_signals
from addp_core.networks.classifier import RGB, normalize
from addp_core.training.compute import arithmetic
from addp_core.training.engine import process_state

log = logging.getLogger("addp")


@dataclass
class Answers:
    """What a model says of a batch: float32 on the CPU."""

    outputs: Tensor  # Float[b,C]
    labels: Tensor  # Long[b]
    indices: Tensor  # Long[b], into the source


@dataclass
class Scores:
    """Counts over images seen so far, of C classes."""

    confusion: Tensor  # Long[C,C], rows: the label, columns: the answer
    top5: int = 0

    @classmethod
    def of(cls, classes: int) -> "Scores":
        """No images yet."""
        return cls(torch.zeros(classes, classes, dtype=torch.long))

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count Float[b,C] logits against Long[b] labels."""
        classes = len(self.confusion)
        best = logits.topk(min(5, classes), 1).indices
        self.confusion += torch.bincount(labels * classes + best[:, 0], minlength=classes**2).view(classes, classes)
        self.top5 += int((best == labels[:, None]).sum())

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def figures(self) -> dict[str, float]:
        """top1 and top5 in per cent (of two to five classes, top5 is 100)."""
        n = max(self.images, 1)
        return {"top1": 100 * int(self.confusion.trace()) / n, "top5": 100 * self.top5 / n}

    def gathered(self) -> "Scores":
        """The sum over all processes, on each of them."""
        parts = gather_object([self])
        return Scores(torch.stack([part.confusion for part in parts]).sum(0), sum(part.top5 for part in parts))


def answers(
    model: nn.Module,
    source: ImageSource,
    transform: Callable,
    *,
    mean: RGB,
    std: RGB,
    indices: Sequence[int] | None = None,
    batch: int = 64,
    precision: str = "fp32",
    workers: int | None = None,
    max_errors: float = 0.01,
    title: str = "",
) -> Iterator[Answers]:
    """What `model` says of every image, or of those at `indices`, once each; the processes of a run share them.

    transform: as `eval_transform` gives; the images are then normalised by `mean` and `std`. Unreadable images are
    left out and named; UserError past `max_errors` (as in a recipe's `data`), and for a label without a class. title:
    of the progress bar; empty: none.
    """
    state = process_state()
    wanted = list(range(len(source)) if indices is None else indices)
    mine = wanted[state.process_index :: state.num_processes]
    batches = [mine[first : first + batch] for first in range(0, len(mine), batch)]
    loader = DataLoader(
        _Images(source, transform, batches),
        batch_size=None,
        num_workers=min(default_workers() if workers is None else workers, len(batches)),
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    device = next(model.parameters()).device
    limit, unreadable = error_limit(max_errors, len(wanted)), 0
    shown = tqdm(total=len(mine), desc=title, unit="img", disable=not (title and state.is_main_process), leave=False)
    with shown as bar:
        for images, labels, places, errors in loader:
            for name, reason in errors:
                unreadable += 1
                log.warning("unreadable image left out: %s (%s)", name, reason)
                if unreadable > limit:
                    raise UserError(
                        f"data.max_errors: more than {limit} of {len(wanted)} images unreadable, the last {name} "
                        f"({reason}); repair or remove them, or raise data.max_errors"
                    )
            if len(places):
                strays = ((labels < 0) | (labels >= len(source.classes))).nonzero()
                if len(strays):
                    row = int(strays[0])
                    raise UserError(
                        f"{source.name(int(places[row]))}: found label {int(labels[row])}, "
                        f"expected 0 to {len(source.classes) - 1}"
                    )
                pixels = normalize(images.to(device, non_blocking=True).float() / 255, mean, std)
                with torch.inference_mode(), arithmetic(precision, device):
                    outputs = model(pixels)
                yield Answers(outputs.float().cpu(), labels, places)
            bar.update(len(places) + len(errors))


class _Images(Dataset):
    """Number of a batch -> (UInt8[b,3,h,w], labels, indices, what could not be read)."""

    def __init__(self, source: ImageSource, transform: Callable, batches: list[list[int]]):
        self.source, self.transform, self.batches = source, transform, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[str, str]]]:
        images, labels, indices, errors = [], [], [], []
        for index in self.batches[number]:
            try:
                picture, label = self.source.open_image(index)
                images.append(self.transform.pixels(picture))
                labels.append(label)
                indices.append(index)
            except ImageError as error:
                errors.append((self.source.name(index), str(error)))
        stacked = torch.stack(images) if images else torch.empty(0)
        return stacked, torch.tensor(labels, dtype=torch.long), torch.tensor(indices, dtype=torch.long), errors


def score(model: nn.Module, source: ImageSource, transform: Callable, classes: int, **options) -> Scores:
    """The scores of a classifier over a whole source; `options` as those of `answers`."""
    scores = Scores.of(classes)
    for seen in answers(model, source, transform, **options):
        scores.add(seen.outputs, seen.labels)
    return scores.gathered()
