"""A classifier on the shared encoder: average-pooled patch tokens or the class token, a norm, a linear head (App. D.2).

In timm, `cls/registry.py` builds the same model from timm's own ViT.
"""

from collections.abc import Sequence
from typing import get_args

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from addp_core.base.errors import UserError
from addp_core.networks.cnn import CnnEncoder
from addp_core.networks.config import FeatureNorm as FeatureNorm
from addp_core.networks.config import HeadNorm as HeadNorm
from addp_core.networks.config import Pooling as Pooling
from addp_core.networks.encoder import FeatureEncoder
from addp_core.networks.layers import LayerNorm
from addp_core.networks.token_encoder import RGB, TokenEncoder

NORM_EPS = 1e-6  # of the norms before the head
HEAD_STD = 2e-5  # standard deviation of a new head's weights, as in the published fine-tuning


class Classifier(nn.Module):
    """Encoder, pooling, `fc_norm` and `head`.

    Args:
        encoder: over pixels or over token ids, a ViT or a CNN.
        classes: outputs of the head; 0: no head.
        pooling: "avg" of the patch tokens, or the class "token".
        norm: before the head: "layer" (fine-tuning), "batch" without affine parameters (linear probing), or "none"
            (fine-tuning of a CNN, as in timm's ResNet).
        class_names: one per class, if known.
        mean, std: with which the input images are normalized.
        crop: fraction of an image's shorter side that validation used (None: the published rule).
        feature_norm: of linear probing, before the batch norm: "pretrained" for the encoder's final norm on each token
            (MAE's protocol with the class token), "layer" for a LayerNorm without parameters on the pooled tokens
            (MAE's with the average, and MAGE's: a new norm that is never trained), or "none".
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        classes: int,
        pooling: Pooling = "avg",
        norm: HeadNorm = "layer",
        class_names: Sequence[str] = (),
        mean: RGB = IMAGENET_DEFAULT_MEAN,
        std: RGB = IMAGENET_DEFAULT_STD,
        crop: float | None = None,
        feature_norm: FeatureNorm = "none",
    ):
        super().__init__()
        self.encoder, self.norm, self.feature_norm = encoder, norm, feature_norm
        encoder.norm.requires_grad_(
            False
        )  # fine-tuning does not use the final norm, linear probing trains the head only
        self.class_names, self.crop = tuple(class_names), crop
        self.mean: RGB = (mean[0], mean[1], mean[2])
        self.std: RGB = (std[0], std[1], std[2])
        if isinstance(encoder, TokenEncoder):
            encoder.mean, encoder.std = self.mean, self.std  # the tokenizer needs the normalization undone
        self.embed_dim = width = encoder.width
        self.fc_norm: nn.Module = nn.Identity()
        if norm != "none":
            self.fc_norm = LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling: found {pooling!r}, expected 'avg' or 'token'")
        check_pooling(encoder, pooling)
        self.pooling: Pooling = pooling
        self.num_classes = classes
        self.head: nn.Module = nn.Identity()
        if classes:
            self.head = init_head(nn.Linear(width, classes, device=next(encoder.parameters()).device))

    def forward(self, images: Tensor) -> Tensor:
        """Map images normalized by `mean` and `std`, Float[B,3,H,W], to logits Float[B,classes]."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images Float[B,3,H,W] to tokens Float[B,1+N,W], class token first, before pooling and `fc_norm`."""
        x = self.encoder.forward_features(images)
        return self.encoder.norm(x) if self.feature_norm == "pretrained" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens Float[B,1+N,W] to logits Float[B,classes], or with `pre_logits` to the head's input Float[B,W]."""
        x = self.fc_norm(self.pool(x))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor) -> Tensor:
        """Pool tokens, Float[B,1+N,W] -> Float[B,W]."""
        return pool_tokens(x, self.pooling, self.feature_norm, self.encoder.num_prefix_tokens)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.encoder.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, without weight decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Describe the layers to timm; `fc_norm` and `head`, which no pattern matches, come last."""
        return self.encoder.group_matcher(coarse, prefix="encoder.")


def init_head(head: nn.Linear) -> nn.Linear:
    """Give a new head small random weights and no bias, in place (App. D.2)."""
    nn.init.trunc_normal_(head.weight, std=HEAD_STD)
    nn.init.zeros_(head.bias)
    return head


def finetuning_norm(encoder: FeatureEncoder) -> HeadNorm:
    """Return the norm before the head in fine-tuning."""
    return "none" if isinstance(encoder, CnnEncoder) else "layer"


def check_pooling(encoder: FeatureEncoder, pooling: Pooling) -> None:
    """Raise UserError if the encoder lacks the class token to read, as a CNN, or one that a detector trained."""
    if pooling == "token" and isinstance(encoder, CnnEncoder):
        raise UserError(f"pooling=token: {encoder.config.arch} has no class token; expected avg")
    if pooling == "token" and not encoder.num_prefix_tokens:
        raise UserError("pooling=token: this encoder was trained without a class token; expected avg")


def pool_tokens(x: Tensor, pooling: Pooling, feature_norm: FeatureNorm, prefix_tokens: int = 1) -> Tensor:
    """Pool tokens Float[B,1+N,W], class token first, to the feature of an image, Float[B,W].

    feature_norm: "layer" normalizes the result; other values of `Classifier` change nothing here.
    prefix_tokens: 0 if there is no class token, only Float[B,N,W].
    """
    x = x[:, prefix_tokens:].mean(1) if pooling == "avg" else x[:, 0]
    return layer_norm(x, x.shape[-1:], eps=NORM_EPS) if feature_norm == "layer" else x


def normalize(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Subtract `mean` from images Float[B,3,H,W] in [0,1] and divide by `std`, per channel."""
    shift, scale = (torch.tensor(each).view(3, 1, 1).to(images.device, non_blocking=True) for each in (mean, std))
    return (images - shift) / scale
