"""The encoder as MMSegmentation's backbone, the pyramid of maps on it, and rates that fall from layer to layer.

Registered under their names: `AddpViT` and `MapPyramid` in MODELS, `LayerDecay` in OPTIM_WRAPPER_CONSTRUCTORS.
"""

from collections.abc import Sequence
from typing import Any, Literal

from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.models.necks import Feature2Pyramid
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import VIT_SIZES, Encoder, EncoderConfig
from addp_core.weights.checkpoint import load_encoder
from addp_core.weights.start import check_positions


def default_indices(depth: int) -> tuple[int, ...]:
    """The blocks that end a third, a half, two thirds and all of the depth; of 12: 3, 5, 7, 11."""
    return tuple(max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1))


@MODELS.register_module()
class AddpViT(BaseModule):
    """The encoder; images of any size that is a multiple of the patch -> the maps after the blocks `out_indices`.

    init_cfg: dict(type="Pretrained", checkpoint=...), any source that `load_encoder` reads, which then also says what
    the architecture is. Without it, fresh weights for `arch`: the name of a size, or `EncoderConfig`'s width, depth,
    heads and layer_scale.
    relative: "table" is BEiT's relative position table in each block, over patch tokens alone; "none" is the plain
    ViT, whose class token takes part. out_indices: None for `default_indices`. Weights are read when the module is
    made; UserError where they do not fit.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] = "base",
        img_size: int | tuple[int, int] = 512,
        patch_size: int = 16,
        out_indices: Sequence[int] | None = None,
        relative: Literal["none", "table"] = "table",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        tokenizer_norm: bool = False,
        encoder_heads: int | None = None,
        checkpointing: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ):
        super().__init__()
        attention = AttentionConfig(relative=relative, class_token=relative == "none")
        options = {"dropout": dropout, "drop_path": drop_path, "tokenizer_norm": tokenizer_norm}
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if init_cfg:
            shape = {"attention": attention, "dynamic": True, "encoder_heads": encoder_heads}
            self.encoder = load_encoder(init_cfg["checkpoint"], size, **options, **shape)
            check_positions(self.encoder, init_cfg["checkpoint"], "relative")
        else:
            config = EncoderConfig(
                **(VIT_SIZES[arch] if isinstance(arch, str) else arch), **options, input_dropout=dropout
            )
            self.encoder = Encoder(config, size, patch_size, attention, dynamic=True)
        self.encoder.checkpointing = checkpointing
        self.encoder.requires_grad_(True)
        depth = len(self.encoder.blocks)
        self.out_indices = default_indices(depth) if out_indices is None else tuple(out_indices)
        if not all(-depth <= i < depth for i in self.out_indices):
            raise UserError(f"out_indices: found {list(self.out_indices)}, expected blocks of 0 to {depth - 1}")
        last = max(i % depth for i in self.out_indices)
        for unread in (self.encoder.norm, *self.encoder.blocks[last + 1 :]):
            unread.requires_grad_(False)  # or processes would wait for its gradient

    def init_weights(self) -> None:
        """Nothing is left to do; mmengine's initialisers are not called."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Float[B,3,H,W] normalised -> Float[B,W,H/patch,W/patch] for each of `out_indices`."""
        return tuple(self.encoder.forward_maps(images, self.out_indices))


@MODELS.register_module()
class MapPyramid(Feature2Pyramid):
    """Maps of one scale -> x4, x2, x1 and x0.5. One map serves all four levels, four maps serve one level each."""

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One or as many Float[B,W,h,w] as there are levels -> Float[B,W,4h,4w], ..., Float[B,W,h/2,w/2]."""
        return super().forward(list(inputs) * len(self.rescales) if len(inputs) == 1 else inputs)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecay(DefaultOptimWrapperConstructor):
    """Rates that fall by paramwise_cfg["decay_rate"] from each layer of the backbone's encoder to the one below; the
    heads learn at the full rate. No weight decay for one-dimensional tensors, nor for what the encoder's
    `no_weight_decay` names.
    """

    def add_params(self, params: list[dict], module: nn.Module, **_: Any) -> None:
        """Append one group for each pair of layer and weight decay to `params`."""
        encoder, prefix = module.backbone.encoder, "backbone.encoder."
        spared = {prefix + name for name in encoder.no_weight_decay()}
        layers = group_with_matcher(encoder.named_parameters(), encoder.group_matcher(), reverse=True)
        top = len(encoder.blocks) + 1
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = min(layers[name.removeprefix(prefix)], top) if name.startswith(prefix) else top
            decays = parameter.ndim > 1 and name not in spared
            if (layer, decays) not in groups:
                scale = self.paramwise_cfg["decay_rate"] ** (top - layer)
                groups[layer, decays] = {
                    "params": [],
                    "lr": self.base_lr * scale,
                    "weight_decay": self.base_wd if decays else 0.0,
                }
            groups[layer, decays]["params"].append(parameter)
        params.extend(groups.values())
