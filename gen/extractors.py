"""The networks whose features `addp evaluate` compares: torch-fidelity's Inception-v3, or a classifier of our own."""

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from addp_core.base.errors import UserError
from addp_core.networks.classifier import normalize
from addp_core.weights.files import read_tensors
from addp_core.weights.fingerprint import fingerprint
from addp_core.weights.loading import load_classifier

# Names in torch-fidelity's registry of extractors.
INCEPTION = "inception-v3-compat"
CLASSIFIER = "addp-classifier"


class ClassifierExtractor(FeatureExtractorBase):
    """A classifier of `addp finetune` as an extractor of torch-fidelity, with the layers `pooled` (the input of its
    head) and `logits`.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any):
        super().__init__(name, features_list)
        self.classifier = load_classifier(feature_extractor_weights_path)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """UInt8[B,3,H,W] -> the features of the requested layers."""
        model = self.classifier
        images = images.float() / 255
        if images.shape[-2:] != tuple(model.encoder.image_size):
            size = tuple(model.encoder.image_size)
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        pooled = model.forward_head(model.forward_features(normalize(images, model.mean, model.std)), pre_logits=True)
        layers = {"pooled": pooled, "logits": model.head(pooled)}
        return tuple(layers[name] for name in self.features_list)


register_feature_extractor(CLASSIFIER, ClassifierExtractor)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor of torch-fidelity.

    Attributes:
        module: the network.
        label: its description in reports.
        key: digest of its weights, which cached features are looked up by.
        is_inception: whether it is Inception-v3, for which FID, IS and KID are defined.
    """

    module: FeatureExtractorBase
    label: str
    key: str
    is_inception: bool

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """UInt8[B,3,H,W] -> features Float[B,D] and logits Float[B,C], in float32."""
        with torch.no_grad():
            layers = self.module.convert_features_tuple_to_dict(self.module(images))
        features, logits = (layers[name].float() for name in self.module.features_list)
        return features, logits


def open_extractor(inception: str, classifier: str, device: torch.device) -> Extractor:
    """Load the extractor.

    Args:
        inception: file of Inception-v3's weights; empty to let torch-fidelity's file be downloaded.
        classifier: a run or file of `addp finetune` to use instead of Inception-v3; empty for none.
        device: where the extractor runs.

    Raises:
        UserError: if the weights cannot be read, downloaded or loaded.
    """
    if classifier:
        module = _create(CLASSIFIER, ClassifierExtractor, classifier)
        label = f"the classifier {classifier} (not Inception: no FID, and not comparable with published numbers)"
    else:
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles whatever a file contains, so it gets a file of tensors alone.
            path = os.path.join(folder, "inception.pth")
            torch.save(_inception_weights(inception), path)
            module = _create_inception(inception, path)
        label = f"Inception-v3 ({inception or URL_INCEPTION_V3.rpartition('/')[2]})"
    return Extractor(module.to(device), label, fingerprint(module), not classifier)


def _create(name: str, cls: type[FeatureExtractorBase], weights: str) -> FeatureExtractorBase:
    """Create an extractor with the layers that FID and IS read, in this order."""
    layers = [cls.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    return create_feature_extractor(name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False)


def _create_inception(inception: str, path: str) -> FeatureExtractorBase:
    """Create Inception-v3 with the weights in `path`, which come from `inception`."""
    try:
        return _create(INCEPTION, FeatureExtractorInceptionV3, path)
    except RuntimeError as error:  # load_state_dict lists every tensor that does not fit
        detail = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(
            f"inception: {inception or URL_INCEPTION_V3} has another layout than torch-fidelity's Inception-v3 "
            f"({detail[0].strip()[:120]}); expected {URL_INCEPTION_V3}"
        ) from error


def _inception_weights(inception: str) -> dict[str, Tensor]:
    """Read Inception-v3's weights from the file `inception`, or download them if it is empty."""
    if inception:
        return dict(read_tensors(inception))
    try:
        return torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, a proxy's error page instead of the file, a full disk
        raise UserError(
            f"inception: {URL_INCEPTION_V3} cannot be downloaded ({error}); expected inception=<that file>, or "
            "extractor=<a run of addp finetune on labeled images> to compare that classifier's features instead"
        ) from error
