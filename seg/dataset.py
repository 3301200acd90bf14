"""ADE20K's layout as an mmseg dataset, whose order and crops depend on the seed and on the position in the run alone.

Registers the dataset `SceneFolder`, the sampler `PositionSampler`, the transforms `LoadPicture`, `ResizePicture` and
`LoadClassMap`, and the function `start_worker`.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from mmcv.image import rescale_size
from mmcv.transforms import BaseTransform, Resize
from mmengine.dist import get_dist_info
from mmengine.registry import FUNCTIONS
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATA_SAMPLERS, DATASETS, TRANSFORMS
from PIL import Image
from torch.utils.data import Sampler

from addp_core.base.rng import generator, seed_for
from addp_core.data.stream import ignore_signals, preserve_rng, seed_cpu
from seg.scenes import class_colors, find_pairs, read_class_map, read_class_names, read_image

FUNCTIONS.register_module(name="start_worker", module=ignore_signals)


@DATASETS.register_module()
class SceneFolder(BaseSegDataset):
    """The pairs of images and class maps of one split.

    With a `seed`, item p is the pair at position p of an endless run over shuffled epochs, and the random numbers of
    its transforms depend on the seed and p alone. Without one, item i is pair i.
    """

    def __init__(self, data_root: str, split: str, table: str = "", seed: int | None = None, **options: Any):
        self.split, self.seed = split, seed
        classes = read_class_names(data_root, table)
        metainfo = {"classes": classes, "palette": class_colors(len(classes)).tolist()}
        super().__init__(data_root=data_root, metainfo=metainfo, reduce_zero_label=True, **options)
        self._order = lru_cache(2)(self._permutation)

    def load_data_list(self) -> list[dict[str, Any]]:
        shared = {"classes": len(self.metainfo["classes"]), "reduce_zero_label": True, "label_map": None}
        return [
            {"img_path": str(pair.image), "seg_map_path": str(pair.class_map), "seg_fields": [], **shared}
            for pair in find_pairs(self.data_root, self.split)
        ]

    def _permutation(self, epoch: int) -> torch.Tensor:
        assert self.seed is not None  # without it, `__getitem__` has no epochs
        return torch.randperm(len(self), generator=generator(self.seed, "order", epoch))

    def __getitem__(self, position: int) -> dict[str, Any]:
        if self.seed is None:
            return super().__getitem__(position)
        epoch, index = divmod(position, len(self))
        with preserve_rng():
            seed_cpu(seed_for(self.seed, "augment", position))
            return super().__getitem__(int(self._order(epoch)[index]))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _order=lru_cache(2)(self._permutation))


@DATA_SAMPLERS.register_module()
class PositionSampler(Sampler):
    """The positions of a run, endlessly. Each rank takes `batch_size` consecutive positions of each step's batch."""

    def __init__(self, dataset: Any, batch_size: int, seed: int | None = None):
        self.dataset, self.batch_size, self.step = dataset, batch_size, 0
        self.rank, self.world_size = get_dist_info()

    def skip(self, samples: int) -> None:
        """Start after this many samples of this process."""
        self.step += samples // self.batch_size

    def __iter__(self) -> Iterator[int]:
        step = self.step
        while True:
            first = (step * self.world_size + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)
            step += 1

    def __len__(self) -> int:
        return len(self.dataset)


@TRANSFORMS.register_module()
class LoadPicture(BaseTransform):
    """Load the image at `img_path`."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return results | image_fields(read_image(results["img_path"]))


@TRANSFORMS.register_module()
class ResizePicture(BaseTransform):
    """mmcv's `Resize` with keep_ratio, of which no side becomes shorter than two pixels, however long the other one is.

    mmcv makes none of a thin image, and mmseg cannot pack a single column that has been mirrored.

    scale: the largest sides, in any order.
    """

    def __init__(self, scale: tuple[int, int]):
        self.scale = scale  # RandomResize sets it for each image

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        size = tuple(max(side, 2) for side in rescale_size((width, height), tuple(self.scale)))
        return Resize(size).transform(results)


def image_fields(image: Image.Image) -> dict[str, Any]:
    """Return the fields that mmseg's transforms expect of an RGB image: `img`, UInt8[H,W,3] in BGR, and its shape."""
    bgr = np.ascontiguousarray(np.asarray(image)[..., ::-1])
    return {"img": bgr, "img_shape": bgr.shape[:2], "ori_shape": bgr.shape[:2]}


@TRANSFORMS.register_module()
class LoadClassMap(BaseTransform):
    """Load the class map at `seg_map_path`, and check it against its image's size and the number of classes."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        labels = read_class_map(results["seg_map_path"], results["ori_shape"], results["classes"])
        return results | {"gt_seg_map": labels, "seg_fields": [*results["seg_fields"], "gt_seg_map"]}
