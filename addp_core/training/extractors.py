"""The networks whose features are compared, by `addp evaluate` and while pretraining: torch-fidelity's Inception-v3, a
classifier of our own, or a small CNN of random weights.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor
from torchvision.models import VGG16_Weights

from addp_core.base.errors import UserError, naming_key
from addp_core.base.rng import generator
from addp_core.networks.classifier import normalize
from addp_core.weights.files import read_tensors
from addp_core.weights.fingerprint import fingerprint
from addp_core.weights.loading import load_classifier

# Names in torch-fidelity's registry of extractors.
INCEPTION = "inception-v3-compat"
VGG16 = "vgg16"
CLASSIFIER = "addp-classifier"
RANDOM = "addp-random-cnn"
EXPECTED_WEIGHTS = {  # by key of the recipe: the layout, and where its file is
    "inception": ("torch-fidelity's Inception-v3", URL_INCEPTION_V3),
    "vgg16": ("torchvision's VGG16", VGG16_Weights.IMAGENET1K_V1.url),
}


class _OwnExtractor(FeatureExtractorBase):
    """What torch-fidelity asks of an extractor with the layers `pooled` and `logits`."""

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class ClassifierExtractor(_OwnExtractor):
    """A classifier of `addp finetune` as an extractor of torch-fidelity, with the layers `pooled` (the input of its
    head) and `logits`.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any):
        super().__init__(name, features_list)
        self.classifier = load_classifier(feature_extractor_weights_path)

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


class RandomExtractor(_OwnExtractor):
    """A CNN of fixed random weights, whose feature is the mean of the maps of all its stages, Float[B,240].

    Random embeddings tell sets of images apart, also of domains that Inception does not know (arXiv 2002.09797). The
    images are resized to 64 x 64 pixels.
    """

    side, widths = 64, (16, 32, 64, 128)

    def __init__(self, name: str = RANDOM, features_list: list[str] | None = None, **_: Any):
        super().__init__(name, features_list or list(self.get_provided_features_list()))
        rng, stages = generator(0, RANDOM), []
        for channels, width in zip((3, *self.widths), self.widths, strict=False):
            stage = torch.nn.Conv2d(channels, width, 3, padding=1, bias=False)
            stage.weight.data = torch.randn(stage.weight.shape, generator=rng) * (2 / (9 * channels)) ** 0.5
            stages.append(stage)
        self.stages = torch.nn.ModuleList(stages)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """UInt8[B,3,H,W] -> the features of the requested layers, which are all the same."""
        size = (self.side, self.side)
        x = F.interpolate(images.float() / 127.5 - 1, size, mode="bilinear", align_corners=False, antialias=True)
        means = []
        for stage in self.stages:
            x = F.avg_pool2d(F.relu(stage(x)), 2)
            means.append(x.mean((2, 3)))
        return tuple(torch.cat(means, 1) for _ in self.features_list)


register_feature_extractor(RANDOM, RandomExtractor)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor of torch-fidelity.

    Attributes:
        module: the network.
        label: its description in reports.
        key: digest of its weights, which cached features are looked up by.
        is_inception: whether it is Inception-v3, for which FID, IS and KID are defined.
        layer: which of its layers the features are, in words.
    """

    module: FeatureExtractorBase
    label: str
    key: str
    is_inception: bool
    layer: str

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
        with naming_key("extractor"):
            module = _create(CLASSIFIER, ClassifierExtractor, classifier)
        label = f"the classifier {classifier} (not Inception: no FID, and not comparable with published numbers)"
        layer = f"the pooled features of the classifier {classifier}"
    else:
        alternative = "extractor=<a run of addp finetune on labeled images> to compare that classifier's features"
        weights = _read_or_download("inception", inception, URL_INCEPTION_V3, alternative)
        module = _create_from_tensors("inception", inception or URL_INCEPTION_V3, weights)
        label = f"Inception-v3 ({inception or URL_INCEPTION_V3.rpartition('/')[2]})"
        layer = "Inception-v3's pool3 features, as in ADM's evaluator"
    return Extractor(module.to(device), label, fingerprint(module), not classifier, layer)


def open_local_extractor(inception: str, classifier: str, device: torch.device) -> Extractor:
    """Load the extractor as `open_extractor` does, but download nothing: without Inception's weights in a file or where
    torch-fidelity keeps them, the extractor is the random CNN.
    """
    if not (inception or classifier):
        downloaded = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
        if not downloaded.exists():
            module = RandomExtractor().to(device).eval().requires_grad_(False)
            label = "a small CNN of random weights (Inception-v3's are not on this machine)"
            return Extractor(module, label, fingerprint(module), False, "the random CNN's pooled features")
        inception = str(downloaded)
    return open_extractor(inception, classifier, device)


def open_vgg16(vgg16: str, device: torch.device) -> Extractor:
    """Load VGG16, whose features torch-fidelity takes for precision and recall unless told otherwise.

    vgg16: file of torchvision's weights; empty to download it. Raises UserError if the weights cannot be read,
    downloaded or loaded.
    """
    url = VGG16_Weights.IMAGENET1K_V1.url
    weights = _read_or_download("vgg16", vgg16, url, "prc_features=extractor")
    module = _create_from_tensors("vgg16", vgg16 or url, weights)
    label = f"VGG16 ({vgg16 or url.rpartition('/')[2]})"
    layer = "VGG16's second fully connected layer after its ReLU, torch-fidelity's default"
    return Extractor(module.to(device), label, fingerprint(module), False, layer)


def _create(name: str, cls: type[FeatureExtractorBase], weights: str) -> FeatureExtractorBase:
    """Create an extractor with the layers that FID and IS read, in this order."""
    layers = [cls.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    return create_feature_extractor(name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False)


def _create_from_tensors(key: str, source: str, weights: dict[str, Tensor]) -> FeatureExtractorBase:
    """Create the extractor of a recipe's key, "inception" or "vgg16", with weights that come from `source`."""
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity unpickles whatever a file contains, so it gets a file of tensors alone.
        path = os.path.join(folder, "weights.pth")
        torch.save(weights, path)
        try:
            if key == "inception":
                return _create(INCEPTION, FeatureExtractorInceptionV3, path)
            layers = list(FeatureExtractorVGG16.get_provided_features_list())[::-1]  # the one after the ReLU first
            return create_feature_extractor(
                VGG16, layers, cuda=False, feature_extractor_weights_path=path, verbose=False
            )
        except RuntimeError as error:  # load_state_dict lists every tensor that does not fit
            name, expected = EXPECTED_WEIGHTS[key]
            detail = str(error).splitlines()[1:2] or [str(error)]
            raise UserError(
                f"{key}: {source} has another layout than {name} ({detail[0].strip()[:120]}); expected {expected}"
            ) from error


def _read_or_download(key: str, path: str, url: str, alternative: str) -> dict[str, Tensor]:
    """Read an extractor's weights from the file `path`, or download them if it is empty."""
    if path:
        with naming_key(key):
            return dict(read_tensors(path))
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, a proxy's error page instead of the file, a full disk
        raise UserError(
            f"{key}: {url} cannot be downloaded ({error}); expected {key}=<that file>, or {alternative} instead"
        ) from error
