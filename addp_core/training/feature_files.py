"""Features of a frozen encoder on disk, with what belongs to them: `<folder>/00000.safetensors`, ..., each of which is
complete or absent.
"""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace, check_space

STORAGE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class FeatureFiles:
    """The files of a folder, whose name identifies the weights, images and settings of the features."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def missing(self) -> list[int]:
        """Return the numbers of the files that are not there, as rank 0 sees them; all processes must call this."""
        shared = [[number for number in range(self.count) if not self._path(number).exists()]]
        broadcast_object_list(shared)  # the folder may fill while other processes look at it
        return shared[0]

    def create_folder(self, size: int, advice: str) -> None:
        """Create the folder. Raises UserError, with advice, if `size` bytes do not fit on its disk."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            check_space(self.folder, size, f"{self.folder}: the features need up to", advice)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a file. Raises UserError if it cannot be written."""
        path = self._path(number)
        try:
            with atomic_replace(path) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: cannot be written ({error}); free some space and repeat the command to continue"
            ) from error

    def read(self, number: int, name: str) -> Tensor:
        """Return a tensor of a file, which is mapped into memory. Raises UserError if it cannot be read."""
        path = self._path(number)
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it to compute it again") from error

    def concatenate(self, name: str, length: int) -> Tensor:
        """Return a tensor of all files, one after the other, of `length` rows; it reads one file at a time."""
        parts = (self.read(number, name) for number in range(self.count))
        first = next(parts)
        rows = torch.empty((length, *first.shape[1:]), dtype=first.dtype)
        rows[: len(first)], end = first, len(first)
        for part in parts:
            rows[end : end + len(part)] = part
            end += len(part)
        return rows

    def concatenate_all(self, name: str) -> Tensor:
        """Return a small tensor of all files, one after the other."""
        return torch.cat([self.read(number, name) for number in range(self.count)])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"


def to_storage(features: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Return the features in the type that they are stored in, a value of `STORAGE_DTYPES`.

    key: the recipe's key for it. Raises UserError if they exceed its range.
    """
    stored = features.to(dtype)
    if not stored.isfinite().all():
        raise UserError(f"{key}: features up to {features.abs().max():.3g} do not fit {dtype}; set {key}=float32")
    return stored
