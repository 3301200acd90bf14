"""A classifier over the shared encoder: pooled patch tokens or the class token, a norm, a linear head (App. D.2).

It answers to what timm asks of its own ViTs, so that timm's tools can use it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from addp_core.networks.encoder import Encoder
from addp_core.networks.layers import LayerNorm
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import to_feature_map

HEAD_STD = 2e-5  # of a new head's weights, as published fine-tuning draws them

RGB = tuple[float, float, float]


class Classifier(nn.Module):
    """Encoder, pooling, `fc_norm`, `head`.

    pooling: "avg" of the patch tokens or the class "token". norm: "layer" (fine-tuning) or "batch" without affine
    parameters (linear probing). classes = 0: no head. mean, std: of the images it takes. crop: the share of their
    shorter side that its validation saw (None: the published rule).
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        encoder: Encoder | TokenEncoder,
        classes: int,
        pooling: Literal["avg", "token"] = "avg",
        norm: Literal["layer", "batch"] = "layer",
        class_names: Sequence[str] = (),
        mean: RGB = IMAGENET_DEFAULT_MEAN,
        std: RGB = IMAGENET_DEFAULT_STD,
        crop: float | None = None,
    ):
        super().__init__()
        self.encoder, self.norm = encoder, norm
        encoder.norm.requires_grad_(False)  # nothing here reads it
        self.class_names, self.mean, self.std, self.crop = tuple(class_names), tuple(mean), tuple(std), crop
        if isinstance(encoder, TokenEncoder):
            encoder.mean, encoder.std = self.mean, self.std  # it has to undo them
        self.num_features = self.head_hidden_size = self.embed_dim = width = encoder.config.width
        self.fc_norm = LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.feature_info = [
            {"module": f"encoder.blocks.{i}", "num_chs": width, "reduction": encoder.patch_size}
            for i in range(len(encoder.blocks))
        ]
        self.reset_classifier(classes, pooling)

    def forward(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] normalised by `mean` and `std` -> logits, Float[B,classes]."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] -> tokens, Float[B,1+N,W], class token first, before pooling and norm."""
        return self.encoder.forward_features(images)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens Float[B,1+N,W] -> logits Float[B,classes], or what the head sees, Float[B,W]."""
        x = self.fc_norm(self.pool(x))
        return x if pre_logits else self.head(x)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens Float[B,1+N,W] -> Float[B,W]."""
        return x[:, 1:].mean(1) if self.pooling == "avg" else x[:, 0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """timm's: images Float[B,3,H,W] -> (tokens, a list of features after the blocks `indices`), or one of the two.

        indices: the last n blocks, those named, or all. norm: with the encoder's final norm. Features are maps
        Float[B,W,h,w] or patch tokens Float[B,N,W], with `return_prefix_tokens` each beside its class token.
        """
        taken, last = feature_take_indices(len(self.encoder.blocks), indices)
        depth = last + 1 if stop_early or intermediates_only else len(self.encoder.blocks)
        outputs = self.encoder.forward_tokens(x, range(depth))
        kept = [self.encoder.norm(outputs[i]) if norm else outputs[i] for i in sorted(taken)]
        grid = self.encoder.grid_of(x)
        features = [to_feature_map(y[:, 1:], grid) if output_fmt == "NCHW" else y[:, 1:] for y in kept]
        prefix = [y[:, :1] for y in kept]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": features}
            if return_prefix_tokens:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else {**found, "image_features": outputs[-1]}
        if return_prefix_tokens:
            features = list(zip(features, prefix, strict=True))
        return features if intermediates_only else (outputs[-1], features)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drops the blocks after the last of `indices`, and what else is not wanted; returns the indices."""
        taken, last = feature_take_indices(len(self.encoder.blocks), indices)
        self.encoder.blocks = self.encoder.blocks[: last + 1]
        if prune_norm:
            self.encoder.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return taken

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["avg", "token"] | None = None) -> None:
        """A new head, of small weights; 0 classes: none."""
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
        """Compute activations a second time in training rather than keep them."""
        self.encoder.checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay spares, beside one-dimensional ones."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's description of the layers; `fc_norm` and `head`, which nothing matches, are the last."""
        return self.encoder.group_matcher(coarse, prefix="encoder.")


def normalize(images: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Float[B,3,H,W] in [0,1] -> the same minus `mean`, over `std`, a channel each."""
    shape = (3, 1, 1)
    return (images - torch.tensor(mean, device=images.device).view(shape)) / torch.tensor(
        std, device=images.device
    ).view(shape)
