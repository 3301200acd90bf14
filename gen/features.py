"""Features of a set of images: extracting them, and their mean and covariance.

Features are stored in .npy files, which are memory-mapped and read in chunks: 50,000 images need no more memory than
500.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, functional
from tqdm import tqdm

from addp_core.base.errors import UserError
from addp_core.data.images import ImageError, LazyImage, eval_transform
from addp_core.data.sources import ImageSource
from gen.extractors import Extractor

EXTRACTOR_BATCH = 32  # images
ROWS_IN_MEMORY = 2048  # of features

Interpolation = Literal["bilinear", "bicubic", "lanczos", "box"]  # torchvision's names
Prepare = Callable[[LazyImage], Tensor]  # an image -> UInt8[3,h,w]; may raise ImageError


@dataclass(frozen=True)
class FeatureSet:
    """The features of n images, or statistics of them alone.

    Attributes:
        mean: Float64[D], of the features.
        covariance: Float64[D,D], of the features.
        features: Float32[n,D], memory-mapped; None if only the statistics are available.
        logits: Float32[n,C], memory-mapped; None if only the statistics are available.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None = None
    logits: np.ndarray | None = None

    @classmethod
    def read(cls, folder: Path) -> "FeatureSet":
        """Open what `extract_features` wrote. Raises OSError or ValueError if a file is missing or incomplete."""
        # copy-on-write, because torch wants writable memory
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("features", "logits")}
        return cls(np.load(folder / "mean.npy"), np.load(folder / "covariance.npy"), **arrays)


def extract_features(
    source: ImageSource, prepare: Prepare, extractor: Extractor, folder: Path, workers: int
) -> FeatureSet:
    """Extract the features of all images into `folder`, shared among all processes.

    Args:
        source: the images.
        prepare: Turns an image into UInt8[3,h,w], of one size for all images.
        extractor: the network.
        folder: where the features are stored; what it holds is removed first.
        workers: number of data loading processes of each process.

    Raises:
        UserError: if an image cannot be read or prepared; the message names it.
    """
    state, n = PartialState(), len(source)
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        blank = torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=state.device)
        for name, values in zip(("features", "logits"), extractor(blank), strict=True):
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (n, values.shape[1])).flush()
    state.wait_for_everyone()
    files = [np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("features", "logits")]
    assigned = np.array_split(np.arange(n), state.num_processes)[state.process_index]
    dataset = _PreparedImages(source, prepare, assigned)
    loader = DataLoader(dataset, EXTRACTOR_BATCH, num_workers=workers, collate_fn=list)
    position = int(assigned[0]) if len(assigned) else n
    with tqdm(total=len(assigned), unit="img", desc="features", disable=not state.is_main_process, leave=False) as bar:
        for batch in loader:
            for problem in filter(lambda item: isinstance(item, str), batch):
                raise UserError(problem)
            for file, values in zip(files, extractor(torch.stack(batch).to(state.device)), strict=True):
                file[position : position + len(batch)] = values.cpu().numpy()
            position += len(batch)
            bar.update(len(batch))
    for file in files:
        file.flush()
    state.wait_for_everyone()
    if state.is_main_process:
        for name, value in zip(("mean", "covariance"), mean_and_covariance(files[0]), strict=True):
            np.save(folder / f"{name}.npy", value)
    state.wait_for_everyone()
    return FeatureSet.read(folder)


class _PreparedImages(Dataset):
    """The images `indices` of a source, prepared. An image that cannot be read is replaced by the error message."""

    def __init__(self, source: ImageSource, prepare: Prepare, indices: np.ndarray):
        self.source, self.prepare, self.indices = source, prepare, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> Tensor | str:
        index = int(self.indices[row])
        try:
            return self.prepare(self.source.open_image(index)[0])
        except ImageError as error:
            return f"{self.source.name(index)}: {error}; repair or remove it"


@dataclass(frozen=True)
class ResizeAndCrop:
    """Resizes an image until it just covers `hw` and crops its center, as torchvision's Resize and CenterCrop do: the
    published preparation of FID's reference. A class and not a closure, so that data loading processes can be sent it.

    Attributes:
        hw: height and width of the result.
        resize: interpolation of the resize.
    """

    hw: tuple[int, int]
    resize: Interpolation

    def __call__(self, image: LazyImage) -> Tensor:
        height, width = self.hw
        pixels = image.decode()
        if pixels.width * height <= pixels.height * width:  # the width is what the image covers exactly
            size = [int(width * pixels.height / pixels.width), width]
        else:
            size = [height, int(height * pixels.width / pixels.height)]
        pixels = functional.resize(pixels, size, InterpolationMode(self.resize))
        return functional.pil_to_tensor(functional.center_crop(pixels, [height, width]))


@dataclass(frozen=True)
class RequireSize:
    """Leaves images of the size `hw` as they are and raises `ImageError` for others."""

    hw: tuple[int, int]

    def __call__(self, image: LazyImage) -> Tensor:
        if (image.height, image.width) != self.hw:
            raise ImageError(f"{image.width} x {image.height} pixels, where others have {self.hw[1]} x {self.hw[0]}")
        return eval_transform(self.hw).pixels(image)


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float[n,D], n > 1 -> mean Float64[D] and covariance Float64[D,D], computed in chunks."""
    mean = sum(chunk.sum(0) for chunk in float64_chunks(features)) / len(features)
    scatter = np.zeros((features.shape[1],) * 2)
    for chunk in float64_chunks(features):
        chunk -= mean
        scatter += chunk.T @ chunk
    return mean, scatter / (len(features) - 1)


def float64_chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of `array`, `ROWS_IN_MEMORY` at a time, as float64 copies in memory."""
    for start in range(0, len(array), ROWS_IN_MEMORY):
        yield np.array(array[start : start + ROWS_IN_MEMORY], dtype=np.float64)
