"""A classifier on the shared encoder: average-pooled patch tokens or the class token, a norm, a linear head (App. D.2).

It has the interface of timm's own ViTs, so timm's tools can use it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from addp_core.networks.encoder import Encoder
from addp_core.networks.layers import LayerNorm
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import to_feature_map

NORM_EPS = 1e-6  # of the norms before the head
HEAD_STD = 2e-5  # standard deviation of a new head's weights, as in the published fine-tuning

RGB = tuple[float, float, float]  # one value per color channel
Pooling = Literal["avg", "token"]  # the mean of the patch tokens, or the class token
FeatureNorm = Literal["none", "layer", "pretrained"]


class Classifier(nn.Module):
    """Encoder, pooling, `fc_norm` and `head`.

    Args:
        encoder: over pixels or over token ids.
        classes: outputs of the head; 0: no head.
        pooling: "avg" of the patch tokens, or the class "token".
        norm: "layer" (fine-tuning), or "batch" without affine parameters (linear probing).
        class_names: one per class, if known.
        mean, std: with which the input images are normalized.
        crop: fraction of an image's shorter side that validation used (None: the published rule).
        feature_norm: of linear probing, before the batch norm: "pretrained" for the encoder's final norm on each token
            (MAE's protocol with the class token), "layer" for a LayerNorm without parameters on the pooled tokens
            (MAE's with the average, and MAGE's: a new norm that is never trained), or "none".
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        encoder: Encoder | TokenEncoder,
        classes: int,
        pooling: Pooling = "avg",
        norm: Literal["layer", "batch"] = "layer",
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
        self.num_features = self.head_hidden_size = self.embed_dim = width = encoder.config.width
        self.fc_norm: nn.Module = (
            LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        )
        self.feature_info = [
            {"module": f"encoder.blocks.{i}", "num_chs": width, "reduction": encoder.patch_size}
            for i in range(len(encoder.blocks))
        ]
        self.reset_classifier(classes, pooling)

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
        return pool_tokens(x, self.pooling, self.feature_norm)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return the tokens after the last block and the features after some blocks, through timm's interface.

        Args:
            x: images, Float[B,3,H,W].
            indices: the last n blocks, the blocks of a list, or all (None).
            return_prefix_tokens: pair each feature with its class token.
            norm: apply the encoder's final norm to the features.
            stop_early: skip the blocks after the last of `indices`.
            output_fmt: feature maps Float[B,W,h,w] ("NCHW") or patch tokens Float[B,N,W] ("NLC").
            intermediates_only: return the list of features only.
            output_dict: return a dict with timm's names instead.
        """
        block_indices, last = feature_take_indices(len(self.encoder.blocks), indices)
        depth = last + 1 if stop_early or intermediates_only else len(self.encoder.blocks)
        outputs = self.encoder.forward_tokens(x, range(depth))
        selected = [self.encoder.norm(outputs[i]) if norm else outputs[i] for i in sorted(block_indices)]
        grid = self.encoder.grid_of(x)
        features = [to_feature_map(y[:, 1:], grid) if output_fmt == "NCHW" else y[:, 1:] for y in selected]
        class_tokens = [y[:, :1] for y in selected]
        if output_dict:
            output: dict[str, Any] = {"image_intermediates": features}
            if return_prefix_tokens:
                output["image_intermediates_prefix"] = class_tokens
            return output if intermediates_only else {**output, "image_features": outputs[-1]}
        intermediates = list(zip(features, class_tokens, strict=True)) if return_prefix_tokens else features
        return intermediates if intermediates_only else (outputs[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`, optionally norm and head; return the indices (timm's API)."""
        block_indices, last = feature_take_indices(len(self.encoder.blocks), indices)
        self.encoder.blocks = self.encoder.blocks[: last + 1]
        if prune_norm:
            self.encoder.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return block_indices

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pooling | None = None) -> None:
        """Replace the head by a new one with small random weights; with 0 classes, by none."""
        if global_pool is not None:
            if global_pool not in ("avg", "token"):
                raise ValueError(f"global_pool: found {global_pool!r}, expected 'avg' or 'token'")
            self.pooling = self.global_pool = global_pool
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            device = next(self.encoder.parameters()).device
            self.head = nn.Linear(self.num_features, num_classes, device=device)
            nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.encoder.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, without weight decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Describe the layers to timm; `fc_norm` and `head`, which no pattern matches, come last."""
        return self.encoder.group_matcher(coarse, prefix="encoder.")


def pool_tokens(x: Tensor, pooling: Pooling, feature_norm: FeatureNorm) -> Tensor:
    """Pool tokens Float[B,1+N,W], class token first, to the feature of an image, Float[B,W].

    feature_norm: "layer" normalizes the result; other values of `Classifier` change nothing here.
    """
    x = x[:, 1:].mean(1) if pooling == "avg" else x[:, 0]
    return layer_norm(x, x.shape[-1:], eps=NORM_EPS) if feature_norm == "layer" else x


def normalize(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Subtract `mean` from images Float[B,3,H,W] in [0,1] and divide by `std`, per channel."""
    shape = (3, 1, 1)
    return (images - torch.tensor(mean, device=images.device).view(shape)) / torch.tensor(
        std, device=images.device
    ).view(shape)
