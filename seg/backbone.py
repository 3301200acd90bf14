"""The encoder as a backbone of MMSegmentation, the feature pyramid over it, and layer-wise learning rate decay.

Registers `AddpViT` and `MapPyramid` in MODELS, and `LayerDecay` in OPTIM_WRAPPER_CONSTRUCTORS.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.models.necks import Feature2Pyramid
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import VIT_SIZES, Encoder, EncoderConfig
from addp_core.weights.encoders import load_encoder
from addp_core.weights.pretrained import check_positions


def default_out_indices(depth: int) -> tuple[int, ...]:
    """Return the last blocks of the first third, half, two thirds and all of the depth; for 12: 3, 5, 7, 11."""
    return tuple(max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1))


@MODELS.register_module()
class AddpViT(BaseModule):
    """The encoder as a backbone: the feature maps after the blocks `out_indices`.

    Weights are loaded by the constructor, not by `init_weights`.

    Args:
        arch: the architecture without `init_cfg`: the name of a size, or `EncoderConfig`'s width, depth, heads and
            layer_scale.
        img_size: size of training images; images of other sizes must be multiples of the patch size.
        patch_size: side of a patch in pixels, without `init_cfg`.
        out_indices: the blocks after which feature maps are taken; None for `default_out_indices`.
        relative: "table" for BEiT's relative position tables in each block; "none" for the plain ViT.
        class_token: keep the class token in attention, as BEiT's and MAE's segmentation do.
        dropout: dropout rate.
        drop_path: stochastic depth of the last block.
        tokenizer_norm: keep ADDP's norm after the patches.
        encoder_heads: attention heads of a checkpoint, if not those of published ViTs of its width.
        weights: the model to read from a checkpoint with several, as in `load_encoder`.
        checkpointing: compute the blocks twice to save memory.
        init_cfg: dict(type="Pretrained", checkpoint=...) with any source that `load_encoder` reads, which also
            determines the architecture; None for a random initialization.

    Raises:
        UserError: if the checkpoint does not fit the other arguments.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = "base",
        img_size: int | tuple[int, int] = 512,
        patch_size: int = 16,
        out_indices: Sequence[int] | None = None,
        relative: Literal["none", "table"] = "table",
        class_token: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        tokenizer_norm: bool = False,
        encoder_heads: int | None = None,
        weights: str = "",
        checkpointing: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ):
        super().__init__()
        attention = AttentionConfig(relative=relative, class_token=class_token)
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if init_cfg:
            checkpoint = init_cfg["checkpoint"]
            encoder = load_encoder(
                checkpoint,
                size,
                encoder_heads=encoder_heads,
                weights=weights,
                dropout=dropout,
                drop_path=drop_path,
                tokenizer_norm=tokenizer_norm,
                attention=attention,
                dynamic=True,
            )
            if not isinstance(encoder, Encoder):
                raise UserError(f"{checkpoint} reads token ids, not pixels; expected an encoder of pixels")
            check_positions(encoder, checkpoint, "relative")
        else:
            shape: dict[str, Any] = dict(VIT_SIZES[arch] if isinstance(arch, str) else arch)
            config = EncoderConfig(
                **shape,
                dropout=dropout,
                drop_path=drop_path,
                tokenizer_norm=tokenizer_norm,
                input_dropout=dropout,
            )
            encoder = Encoder(config, size, patch_size, attention, dynamic=True)
        self.encoder = encoder
        self.encoder.checkpointing = checkpointing
        self.encoder.requires_grad_(True)
        depth = len(self.encoder.blocks)
        self.out_indices = default_out_indices(depth) if out_indices is None else tuple(out_indices)
        if not all(-depth <= i < depth for i in self.out_indices):
            raise UserError(f"out_indices: found {list(self.out_indices)}, expected blocks of 0 to {depth - 1}")
        last = max(i % depth for i in self.out_indices)
        for unused in (self.encoder.norm, *self.encoder.blocks[last + 1 :]):
            unused.requires_grad_(False)  # otherwise DDP would wait for its gradients

    def init_weights(self) -> None:
        """Do nothing, in place of mmengine's initializers: the constructor has initialized the weights."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalized images Float[B,3,H,W] -> Float[B,W,H/patch,W/patch] for each of `out_indices`."""
        return tuple(self.encoder.forward_maps(images, self.out_indices))


@MODELS.register_module()
class MapPyramid(Feature2Pyramid):
    """Feature maps of one scale -> x4, x2, x1 and x0.5, from four feature maps or from one for all four levels."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One Float[B,W,h,w], or one for each level -> Float[B,W,4h,4w], ..., Float[B,W,h/2,w/2]."""
        return super().forward(list(inputs) * len(self.rescales) if len(inputs) == 1 else inputs)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecay(DefaultOptimWrapperConstructor):
    """Layer-wise learning rate decay of the backbone's encoder.

    The learning rate falls by the factor paramwise_cfg["decay_rate"] from each layer to the one below; the heads have
    the full learning rate. One-dimensional tensors and those that the encoder's `no_weight_decay` names have no weight
    decay.
    """

    def add_params(self, params: list[dict], module: nn.Module, **_: Any) -> None:
        """Append one parameter group to `params` for each pair of layer and weight decay."""
        encoder: Encoder = cast(Any, module.backbone).encoder
        prefix = "backbone.encoder."
        without_decay = {prefix + name for name in encoder.no_weight_decay()}
        layers = group_with_matcher(encoder.named_parameters(), encoder.group_matcher(), reverse=True)
        top = len(encoder.blocks) + 1
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = min(layers[name.removeprefix(prefix)], top) if name.startswith(prefix) else top
            decays = parameter.ndim > 1 and name not in without_decay
            if (layer, decays) not in groups:
                scale = self.paramwise_cfg["decay_rate"] ** (top - layer)
                groups[layer, decays] = {
                    "params": [],
                    "lr": self.base_lr * scale,
                    "weight_decay": self.base_wd if decays else 0.0,
                }
            groups[layer, decays]["params"].append(parameter)
        params.extend(groups.values())
