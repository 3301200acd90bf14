"""Features of a set of images: extracting them into files, with their mean and covariance.

Features are stored in .npy files, which are memory-mapped and read in chunks: 50,000 images need no more memory than
500.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from addp_core.data.stream import iterate
from addp_core.training.extractors import Extractor
from addp_core.training.image_metrics import ARRAYS, ROWS_IN_MEMORY, FeatureSet, mean_and_covariance
from addp_core.training.pace import FEATURES, mark_pace
from gen.recipe import Interpolation

EXTRACTOR_BATCH = 32  # images

Prepare = Callable[[LazyImage], Tensor]  # an image -> UInt8[3,h,w]; may raise ImageError


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
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    state.wait_for_everyone()
    assigned = np.array_split(np.arange(len(source)), state.num_processes)[state.process_index]
    if len(assigned):
        loader = DataLoader(
            _PreparedImages(source, prepare, assigned), EXTRACTOR_BATCH, num_workers=workers, collate_fn=list
        )
        hidden = not state.is_main_process
        with tqdm(total=len(assigned), unit="img", desc="features", disable=hidden, leave=False) as bar:
            _extract_part(loader, extractor, folder, bar)
    state.wait_for_everyone()
    if state.is_main_process:
        for name in ARRAYS:
            _join_parts(folder, name, state.num_processes)
        features = np.load(folder / "features.npy", mmap_mode="r")
        for name, value in zip(("mean", "covariance"), mean_and_covariance(features), strict=True):
            np.save(folder / f"{name}.npy", value)
    state.wait_for_everyone()
    extracted = FeatureSet.read(folder)
    state.wait_for_everyone()  # the caller may move the folder, which another process would no longer find
    return extracted


def _extract_part(loader: DataLoader, extractor: Extractor, folder: Path, bar: tqdm) -> None:
    """Write this process's rows to files of its own: several machines cannot map one file of a network disk."""
    state, rows, begin = PartialState(), len(loader.dataset), 0  # type: ignore[arg-type]
    files: list[np.memmap] = []
    mark_pace(FEATURES, 0)
    with iterate(loader) as loaded:
        for batch in loaded:
            for problem in filter(lambda item: isinstance(item, str), batch):
                raise UserError(problem)
            arrays = [values.cpu().numpy() for values in extractor(torch.stack(batch).to(state.device))]
            if not files:
                for name, values in zip(ARRAYS, arrays, strict=True):
                    path = _part(folder, name, state.process_index)
                    files.append(np.lib.format.open_memmap(path, "w+", np.float32, (rows, values.shape[1])))
            for file, values in zip(files, arrays, strict=True):
                file[begin : begin + len(batch)] = values
            begin += len(batch)
            bar.update(len(batch))
            mark_pace(FEATURES, len(batch) * state.num_processes)
    for file in files:
        file.flush()


def _part(folder: Path, name: str, process: int) -> Path:
    return folder / f"{name}-{process}.npy"


def _join_parts(folder: Path, name: str, processes: int) -> None:
    """Replace the files of all processes by one with the rows of all."""
    paths = [path for process in range(processes) if (path := _part(folder, name, process)).exists()]
    if len(paths) == 1:
        paths[0].rename(folder / f"{name}.npy")
        return
    parts = [np.load(path, mmap_mode="r") for path in paths]
    shape = sum(map(len, parts)), parts[0].shape[1]
    joined, begin = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape), 0
    for part in parts:
        for start in range(0, len(part), ROWS_IN_MEMORY):
            rows = part[start : start + ROWS_IN_MEMORY]
            joined[begin : begin + len(rows)] = rows
            begin += len(rows)
    joined.flush()
    for path in paths:
        path.unlink()


class _PreparedImages(Dataset):
    """The images `indices` of a source, prepared. An image that cannot be read is replaced by the error message."""

    def __init__(self, source: ImageSource, prepare: Prepare, indices: np.ndarray):
        self.source, self.prepare, self.indices = source, prepare, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, rows: list[int]) -> list[Tensor | str]:
        """Return several images, which the loader asks for a batch at a time."""
        self.source.read_ahead(self.indices[rows].tolist())
        return [self[row] for row in rows]

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


def check_size(image: LazyImage, hw: tuple[int, int]) -> None:
    """Raise ImageError if an image has another size."""
    if (image.height, image.width) != hw:
        raise ImageError(f"{image.width} x {image.height} pixels, where others have {hw[1]} x {hw[0]}")


@dataclass(frozen=True)
class RequireSize:
    """Leaves images of the size `hw` as they are and raises `ImageError` for others."""

    hw: tuple[int, int]

    def __call__(self, image: LazyImage) -> Tensor:
        check_size(image, self.hw)
        return eval_transform(self.hw).pixels(image)
