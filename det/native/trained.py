"""Detectors that detectron2's own scripts trained over our backbones: model_final.pth and the config.yaml beside it.

Of any meta architecture, for `addp det eval` and `addp det predict`. The encoder is built from what its weights tell,
so that the pretrained file is not needed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.weights.architectures import parse_architecture
from addp_core.weights.files import FileContent, read_file
from addp_core.weights.fitting import AnyArchitecture
from det.config import Category, DetectorArchitecture, DetectorConfig, DetEncoder, describe_encoder
from det.masks import encode_bitmap
from det.model import DETECTRON2_CONFIG, Detections, Detector, mismatched_tensors
from det.native.config import IMAGE_FORMAT, add_encoder_config, architecture_keys
from det.native.safe_lazy import build_lazy, read_yaml, replace_encoder


class TrainedDetector(Detector):
    """A model of detectron2 with the resizing and the categories of its config.

    `names_assumed` says that the config does not tell the categories, which are then numbered from 1.
    """

    def __init__(self, model: nn.Module, resize: Any, image_format: str, categories: tuple[Category, ...] | int):
        super().__init__()
        self.model, self.resize, self.image_format = model, resize, image_format
        self.names_assumed = isinstance(categories, int)
        if isinstance(categories, int):
            categories = tuple(Category(i, str(i)) for i in range(1, categories + 1))
        (encoder,) = (part for part in model.modules() if isinstance(part, DetEncoder))
        masks = getattr(getattr(model, "roi_heads", None), "mask_on", False)
        self.architecture = DetectorArchitecture(
            engine="detectron2",
            **describe_encoder(encoder),
            size=encoder.image_size[0],
            detector=DetectorConfig(masks=masks),
            categories=categories,
        )

    @torch.no_grad()
    def detect(self, images: list[Tensor]) -> list[Detections]:
        """Detect objects on UInt8[3,H,W] RGB images of any sizes, resized as in detectron2's DefaultPredictor."""
        return [self._detect(image) for image in images]

    def _detect(self, image: Tensor) -> Detections:
        height, width = image.shape[-2:]
        pixels = image.permute(1, 2, 0).cpu().numpy()
        if self.image_format != IMAGE_FORMAT:
            pixels = pixels[:, :, ::-1]
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        inputs = {
            "image": torch.as_tensor(resized.astype("float32").transpose(2, 0, 1)),
            "height": height,
            "width": width,
        }
        instances: Instances = self.model([inputs])[0]["instances"]
        order = instances.scores.argsort(descending=True, stable=True)
        instances = instances[order]
        masks = [encode_bitmap(mask) for mask in instances.pred_masks] if instances.has("pred_masks") else None
        return Detections(instances.pred_boxes.tensor.float(), instances.scores.float(), instances.pred_classes, masks)


def load_trained(path: Path) -> TrainedDetector:
    """Load a checkpoint of detectron2 with the config.yaml of its folder, in eval mode, float32, on the CPU.

    Raises UserError if the config is not that of a detector over our encoder, or not that of the checkpoint.
    """
    content, config = read_file(path), path.parent / DETECTRON2_CONFIG
    if all(name.startswith("backbone.") for name in content.state):
        raise UserError(f"{path}: holds a backbone without the heads of a detector; expected a trained detector")
    values = read_yaml(config)
    if "MODEL" in values:
        detector = _load_yacs(config, values, content)
    elif "model" in values:
        detector = _load_lazy(config, values, content)
    else:
        raise UserError(f"{config}: has neither MODEL (yacs) nor model (LazyConfig); expected a config of detectron2")
    mismatched = mismatched_tensors(detector.model, content.state)
    if mismatched:
        names = ", ".join(mismatched[:3])
        raise UserError(f"{path}: {len(mismatched)} tensors do not match {config}: {names}; expected a detector")
    detector.model.load_state_dict(content.state)
    return detector.eval()


def _encoder_of(content: FileContent) -> AnyArchitecture:
    """Return the architecture of the encoder in a checkpoint. Raises UserError if there is none."""
    found = [text for prefix, text in content.descriptions.items() if prefix.endswith("encoder.")]
    if len(found) != 1:
        raise UserError(
            f"{content.source}: does not tell the architecture of our encoder; expected a checkpoint that detectron2 "
            "wrote with one of our backbones"
        )
    _, architecture = parse_architecture(content.source, found[0])
    return architecture


def _load_yacs(config: Path, values: dict[str, Any], content: FileContent) -> TrainedDetector:
    cfg = get_cfg()
    add_encoder_config(cfg)
    cfg.set_new_allowed(True)  # keys of other projects
    keys = architecture_keys(_encoder_of(content))
    values["MODEL"]["ENCODER"] = {**values["MODEL"].get("ENCODER", {}), **keys, "source": ""}
    values["MODEL"].update(WEIGHTS="", DEVICE="cpu")
    try:
        cfg.merge_from_other_cfg(CfgNode(values))
        model = build_model(cfg)
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"{config}: detectron2 cannot build it ({error})") from error
    inputs = cfg.INPUT
    resize = T.ResizeShortestEdge([inputs.MIN_SIZE_TEST] * 2, inputs.MAX_SIZE_TEST)
    retinanet = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    classes = cfg.MODEL.RETINANET.NUM_CLASSES if retinanet else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return TrainedDetector(
        model, resize, inputs.FORMAT, _categories([*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN], classes)
    )


def _load_lazy(config: Path, values: dict[str, Any], content: FileContent) -> TrainedDetector:
    encoder = _encoder_of(content)
    values["model"] = replace_encoder(values["model"], encoder)
    model = cast(nn.Module, build_lazy(config, values, "model"))
    mapper = values.get("dataloader", {}).get("test", {}).get("mapper", {})
    augmentations = build_lazy(config, values, "dataloader.test.mapper.augmentations") if mapper else []
    side = encoder.image_size[0]
    resize = T.AugmentationList(augmentations) if augmentations else T.ResizeShortestEdge([side] * 2, side)
    known = tuple(Category(**each) for each in values.get("categories", ()))
    categories = known or cast(Any, getattr(model, "roi_heads", model)).num_classes
    return TrainedDetector(model, _Resize(resize), mapper.get("image_format", IMAGE_FORMAT), categories)


class _Resize:
    """Gives a list of augmentations the interface of one."""

    def __init__(self, augmentation: Any):
        self.augmentation = augmentation

    def get_transform(self, pixels: Any) -> Any:
        return self.augmentation(T.AugInput(pixels))


def _categories(datasets: list[str], classes: int) -> tuple[Category, ...] | int:
    """Return the categories of the first registered dataset that has so many, or only their number."""
    for name in datasets:
        metadata: Mapping[str, Any] = MetadataCatalog.get(name).as_dict()
        ids, names = metadata.get("thing_dataset_id_to_contiguous_id"), metadata.get("thing_classes")
        if ids and names and len(ids) == len(names) == classes:
            return tuple(Category(i, names[position]) for i, position in sorted(ids.items(), key=lambda pair: pair[1]))
    return classes
