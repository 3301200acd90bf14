"""The encoder as a backbone of MMSegmentation, the feature pyramid over it, and layer-wise learning rate decay.

Registers `AddpViT` and `MapPyramid` in MODELS, and `LayerDecay` in OPTIM_WRAPPER_CONSTRUCTORS.
"""

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast, get_args, get_type_hints

import torch
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.models.necks import Feature2Pyramid
from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder, TransformerEncoder
from addp_core.weights.encoders import DEFAULT_PATCH_SIZE, load_encoder
from addp_core.weights.pretrained import check_positions
from seg import mmseg_loader  # noqa: F401 (importing it registers a loader of files)
from seg.architecture import check_arch, demand_arch, read_arch, read_pretrained
from seg.keywords import pretrained_config, translate_keywords
from seg.segmentor import default_out_indices
from seg.state_names import PREFIX, check_state, from_stored_names, to_stored_names

Backbone = TypeVar("Backbone", bound="MmsegBackbone")

RELATIVE_POSITIONS = get_args(get_args(get_type_hints(AttentionConfig, include_extras=True)["relative"])[0])


def global_attention(relative: str, class_token: bool) -> AttentionConfig:
    """Return attention of every patch to all others. Raises UserError if these relative positions are unknown."""
    if relative not in RELATIVE_POSITIONS:
        raise UserError(f"relative: found {relative!r}, expected one of {', '.join(RELATIVE_POSITIONS)}")
    return AttentionConfig(relative=cast(Any, relative), class_token=class_token)


class PretrainedBackbone:
    """Part of a backbone that loads its pretrained file as mmengine does: when `init_weights` is called."""

    init_cfg: dict[str, Any] | None
    _is_init: bool  # of mmengine: whether `init_weights` has been called

    def init_weights(self) -> None:
        """Load the pretrained file, in place of mmengine's initializers; the constructor has drawn random weights.

        Draws nothing from torch's generators. Raises UserError if the file does not fit the config.
        """
        if self.init_cfg is None or self._is_init:
            return
        with torch.random.fork_rng(devices=[]):
            self._load_pretrained(self.init_cfg["checkpoint"])
        self._is_init = True

    def _load_pretrained(self, source: str) -> None:
        """Copy the weights of a file. Raises UserError if it does not fit the config."""
        raise NotImplementedError


def named_as_beit(cls: type[Backbone]) -> type[Backbone]:
    """Append BEiT to the name of a class, after it is registered: a decorator.

    mmseg's LearningRateDecayOptimizerConstructor takes layers from parameter names only in classes with BEiT or MAE in
    their name; those of our backbones are named as BEiT's.
    """
    cls.__name__ += " (BEiT)"
    return cls


class MmsegBackbone(PretrainedBackbone, TransformerEncoder):
    """What an encoder has to have as a backbone of mmseg, whatever its input.

    Modules and parameters have the names of mmseg's BEiT and MAE (`layers.0...`), by which its
    LearningRateDecayOptimizerConstructor finds the layers; state dicts have the encoder's own (`encoder.blocks.0...`).
    """

    def _become_backbone(
        self, checkpointing: bool, out_indices: int | Sequence[int] | None, frozen_stages: int
    ) -> None:
        """Rename the modules, choose the blocks whose maps are taken, and freeze what is not trained."""
        self._modules = {"layers" if name == "blocks" else name: child for name, child in self._modules.items()}
        self.register_state_dict_post_hook(to_stored_names)
        self.checkpointing = checkpointing
        self.out_indices = self._checked_blocks(out_indices)
        self.frozen_stages = frozen_stages
        self._freeze()

    def _checked_blocks(self, out_indices: int | Sequence[int] | None) -> tuple[int, ...]:
        depth = len(self.blocks)
        if out_indices is None:
            return default_out_indices(depth)
        blocks = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        if not blocks or not all(-depth <= i < depth for i in blocks):
            raise UserError(f"out_indices: found {list(blocks)}, expected blocks of 0 to {depth - 1}")
        return blocks

    def _freeze(self) -> None:
        """Freeze what is not trained: for which DDP would wait in vain, and what `frozen_stages` asks for."""
        depth = len(self.blocks)
        if not -1 <= self.frozen_stages <= depth:
            raise UserError(f"frozen_stages: found {self.frozen_stages}, expected -1 (none) to {depth} (all blocks)")
        last = max(i % depth for i in self.out_indices)
        for unused in (self.norm, *self.blocks[last + 1 :]):
            unused.requires_grad_(False)
        for name, parameter in self.named_parameters():
            if self.get_layer_depth(name)[0] <= self.frozen_stages:
                parameter.requires_grad_(False)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]  # named as in mmseg's ViTs
        """The blocks, which are registered as `layers`."""
        return cast(nn.ModuleList, self._modules["layers"])

    @property
    def encoder(self) -> TransformerEncoder:
        """The backbone itself, which is the encoder."""
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # a backbone's
        """Normalized images Float[B,3,H,W] -> Float[B,W,H/patch,W/patch] for each of `out_indices`."""
        return tuple(self.forward_maps(images, self.out_indices))

    def train(self: Backbone, mode: bool = True) -> Backbone:
        """Set the training mode, in which the frozen blocks stay in evaluation mode."""
        super().train(mode)
        for block in self.blocks[: max(self.frozen_stages, 0)]:
            block.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the layer of a parameter and the number of layers, as the backbones of mmpretrain do.

        The embeddings are layer 0, block i is layer i + 1, and the last layer is that of the heads.
        """
        layers = len(self.blocks) + 2
        name = param_name.removeprefix(prefix)
        if not param_name.startswith(prefix) or name.startswith("norm."):
            return layers - 1, layers
        block = re.match(r"layers\.(\d+)\.", name)
        return (int(block[1]) + 1 if block else 0), layers

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        *args: Any,
    ) -> None:
        """Give the tensors of a state dict the names of this module. Raises UserError if some of them do not fit."""
        from_stored_names(state_dict, prefix)
        check_state(self, state_dict, prefix, local_metadata, unexpected_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, *args)


@named_as_beit
@MODELS.register_module()
class AddpViT(MmsegBackbone, Encoder, BaseModule):  # type: ignore[misc]  # forward is a backbone's
    """The encoder over pixels as a backbone: the feature maps after the blocks `out_indices`.

    The config states the architecture, so that the same network is built with and without the pretrained file. As in
    mmengine, `init_weights` loads that file.

    Args:
        arch: the name of a size (tiny, small, base, large), or a dict of width, depth, heads and layer_scale; mmseg's
            embed_dims, num_layers and num_heads mean the same, here or as arguments of their own.
        img_size: size of training images; images of other sizes must be multiples of the patch size.
        patch_size: side of a patch in pixels.
        out_indices: the blocks after which feature maps are taken, or one of them; None for `default_out_indices`.
        relative: "table" for BEiT's relative position tables in each block; "none" for the plain ViT.
        class_token: keep the class token in attention, as BEiT's and MAE's segmentation do.
        dropout: dropout rate.
        drop_path: stochastic depth of the last block.
        tokenizer_norm: keep ADDP's norm after the patches.
        encoder_heads: attention heads of a checkpoint that does not store them, if not those of `arch`.
        weights: the model to read from a checkpoint with several, as in `load_encoder`.
        checkpointing: compute the blocks twice to save memory.
        init_cfg: dict(type="Pretrained", checkpoint=...) with any source that `load_encoder` reads; None for a random
            initialization.
        frozen_stages: 0 freezes the embeddings, k also the first k blocks; -1: none.
        mmseg_keywords: further keywords of mmseg's ViTs, see `translate_keywords`.

    Raises:
        UserError: if the architecture is missing or impossible, or a keyword unknown; `init_weights` and loading of a
            state dict, if the file is of another architecture.
    """

    def __init__(
        self,
        arch: str | dict[str, Any] | None = None,
        img_size: int | tuple[int, int] = 512,
        patch_size: int = DEFAULT_PATCH_SIZE,
        out_indices: int | Sequence[int] | None = None,
        relative: Literal["none", "table"] = "table",
        class_token: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        tokenizer_norm: bool = False,
        encoder_heads: int | None = None,
        weights: str = "",
        checkpointing: bool = False,
        init_cfg: dict[str, Any] | None = None,
        frozen_stages: int = -1,
        **mmseg_keywords: Any,
    ):
        options: dict[str, Any] = {"arch": arch, "class_token": class_token, "drop_path": drop_path}
        options["checkpointing"] = checkpointing
        options = translate_keywords(
            mmseg_keywords, options | {"init_cfg": init_cfg}, inspect.signature(AddpViT).parameters
        )
        init_cfg = pretrained_config(options["init_cfg"])
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if options["arch"] is None:
            raise demand_arch(init_cfg, size, encoder_heads, weights)
        config = replace(
            read_arch(options["arch"]),
            dropout=dropout,
            drop_path=options["drop_path"],
            tokenizer_norm=tokenizer_norm,
            input_dropout=dropout,
        )
        attention = global_attention(relative, options["class_token"])
        try:
            super().__init__(config, size, patch_size, attention, dynamic=True)
        except ValueError as error:
            raise UserError(f"img_size: {error}") from error
        self.init_cfg, self.encoder_heads, self.weights = init_cfg, encoder_heads, weights
        self._become_backbone(options["checkpointing"], out_indices, frozen_stages)

    def _load_pretrained(self, source: str) -> None:
        found, weights = read_pretrained(source, self.image_size, self.encoder_heads, self.weights)
        check_arch(self.config, self.patch_size, found, weights)
        encoder = load_encoder(
            source,
            self.image_size,
            encoder_heads=None if weights.stored else self.config.heads,
            weights=self.weights,
            tokenizer_norm=self.config.tokenizer_norm,
            attention=self.attention,
            dynamic=True,
        )
        assert isinstance(encoder, Encoder)  # as `read_pretrained` has found one
        check_positions(encoder, source, "relative")
        self.load_state_dict({PREFIX + name: value for name, value in encoder.state_dict().items()})


class PoolWithin(nn.Module):
    """Max pooling in windows side by side, which are no larger than the map: that of a single row is pooled too."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side  # of a window

    def forward(self, x: Tensor) -> Tensor:
        """Float[B,W,h,w] -> Float[B,W,h/side,w/side], rounded down, but at least 1."""
        height, width = x.shape[-2:]
        return max_pool2d(x, (min(self.side, height), min(self.side, width)))


@MODELS.register_module()
class MapPyramid(Feature2Pyramid):
    """Feature maps of one scale -> one map for each of `rescales`, from four feature maps or from one for all levels.

    rescales: 4, 2, 1 and 0.5, or 2, 1, 0.5 and 0.25.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.downsample_2x, self.downsample_4x = PoolWithin(2), PoolWithin(4)

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
        backbone = cast(MmsegBackbone, module.backbone)
        prefix = "backbone."
        without_decay = {prefix + name for name in backbone.no_weight_decay()}
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer, layers = backbone.get_layer_depth(name, prefix)
            decays = parameter.ndim > 1 and name not in without_decay
            if (layer, decays) not in groups:
                scale = self.paramwise_cfg["decay_rate"] ** (layers - 1 - layer)
                groups[layer, decays] = {
                    "params": [],
                    "lr": self.base_lr * scale,
                    "weight_decay": self.base_wd if decays else 0.0,
                }
            groups[layer, decays]["params"].append(parameter)
        params.extend(groups.values())
