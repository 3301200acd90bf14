"""The keys of `addp throughput`."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval, MultipleOf

from addp_core.base.paths import DatasetPath
from addp_core.networks.config import SIZES_HELP, VIT_SIZES
from addp_core.training.precision import PrecisionChoice

MODELS = {  # size: (name of the authors' ADDP, name of their token predictor)
    "base": ("addp_vit_base_patch16", "mage_vit_base_patch16"),
    "large": ("addp_vit_large_patch16", "mage_vit_large_patch16"),
}


IMAGE_SIZE = 256  # the only one that the authors' code supports


@dataclass
class Recipe:
    """Keys of `addp throughput`."""

    model: Annotated[str, f"{SIZES_HELP}, with random weights, or a run or file of `addp pretrain`"] = "base"
    batch: Annotated[int, Ge(1), "images per step"] = 4
    size: Annotated[int | None, Ge(16), MultipleOf(16), "side of the images in pixels; null: the file's, or 256"] = None
    precision: PrecisionChoice = "auto"
    device: Annotated[str, "cpu, cuda or cuda:<n>; empty: a GPU if there is one"] = ""
    train: Annotated[bool, "time training steps"] = True
    sample: Annotated[bool, "time sampling"] = True
    tokens: Annotated[bool, "time training steps on cached ids (`data.tokens`) too"] = False
    det: Annotated[bool, "time ViTDet's encoder too, beside detectron2's own ViT"] = False
    seg: Annotated[bool, "time UperNet's training step too, beside mmseg's own BEiT and VisionTransformer"] = False
    finetune: Annotated[bool, "time a fine-tuning step too, beside timm's own ViT"] = False
    dense_size: Annotated[int, Ge(16), MultipleOf(16), "side of the images of det and seg in pixels"] = 512
    dense_batch: Annotated[int, Ge(1), "images per step of det and seg (two at least in seg, for its batch norm)"] = 1
    mask_ratio: Annotated[float, Interval(gt=0, lt=1), "share of unreliable tokens in training steps"] = 0.75
    steps: Annotated[int, Ge(1), "sampling steps, with the cosine schedule"] = 20
    repeats: Annotated[int, Ge(1), "timed repeats; the median is reported"] = 5
    warmup: Annotated[int, Ge(0), "repeats that are run before and not timed"] = 1
    accelerate: Annotated[bool, "use the fast paths of addp_core/training/compute.py; false shows what they gain"] = (
        True
    )
    compile: Annotated[bool, "compile the networks with torch.compile"] = False
    channels_last: Annotated[bool, "channels_last memory format of convolutions"] = False
    published: Annotated[str, "a clone of the authors' repository, timed in turns (base and large at 256 px)"] = ""
    data: Annotated[
        DatasetPath, "images whose loading is timed too, beside timm's and torchvision's pipelines; empty: none"
    ] = ""
    json: Annotated[str, "file for all metrics"] = ""

    def __post_init__(self):
        transfers = self.det or self.seg or self.finetune
        if not (self.train or self.sample or self.data or transfers):
            raise ValueError(
                "train: found false, and sample is false too; expected one of train, sample, det, seg, finetune to be "
                "true, or data=<images>"
            )
        if self.tokens and not self.train:
            raise ValueError("tokens: found true with train=false; expected train=true, since it times training steps")
        if transfers and self.model not in VIT_SIZES:
            raise ValueError(f"det, seg, finetune: found model={self.model}; expected one of {', '.join(VIT_SIZES)}")
        if self.published and not (self.train or self.sample):
            raise ValueError("published: found, but train and sample are false; expected at least one to be true")
        if self.published and self.model not in MODELS:
            sizes = " or ".join(MODELS)
            raise ValueError(f"published: found model={self.model}; expected {sizes}, which the authors' code has")
        if self.published and self.size not in (None, IMAGE_SIZE):
            raise ValueError(f"published: found size={self.size}; expected {IMAGE_SIZE}, all it supports")
