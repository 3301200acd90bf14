"""A CNN as a backbone of MMSegmentation: the maps of its four stages. Registers `AddpCNN` in MODELS."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.networks.cnn import STAGES, CnnConfig, CnnEncoder
from addp_core.weights.encoders import load_encoder
from seg.backbone import PretrainedBackbone
from seg.keywords import pretrained_config, translate_cnn_keywords
from seg.state_names import check_cnn_state

NORMS = ("BN", "SyncBN")


@MODELS.register_module()
class AddpCNN(PretrainedBackbone, BaseModule):
    """A CNN of timm as a backbone: the maps of its stages, with their own channels and strides (4, 8, 16, 32).

    As in mmengine, `init_weights` loads the pretrained file.

    Args:
        arch: a CNN of timm, such as resnet50 or convnext_tiny.
        img_size: size of training images; images may have any.
        out_indices: the stages whose maps are taken, from 0 to 3, or one of them.
        drop_path: stochastic depth of the last block.
        norm_cfg: dict(type="SyncBN") lets the processes compute the statistics of batch norms together; None or
            dict(type="BN"): each its own.
        norm_eval: keep the statistics of batch norms, as mmseg's ResNets do.
        frozen_stages: 0 freezes the stem, k also the first k stages; -1: none.
        weights: the model to read from a checkpoint with several, as in `load_encoder`.
        checkpointing: compute the blocks twice to save memory.
        init_cfg: dict(type="Pretrained", checkpoint=...) with any source that `load_encoder` reads; None for a random
            initialization.
        mmseg_keywords: with_cp, drop_path_rate and pretrained, as of mmseg's ResNets.

    Raises:
        UserError: if the architecture is missing or no CNN of timm, or a keyword unknown; `init_weights` and loading of
            a state dict, if the file is of another architecture.
    """

    def __init__(
        self,
        arch: str | None = None,
        img_size: int | tuple[int, int] = 512,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        drop_path: float = 0.0,
        norm_cfg: Mapping[str, Any] | None = None,
        norm_eval: bool = False,
        frozen_stages: int = -1,
        weights: str = "",
        checkpointing: bool = False,
        init_cfg: dict[str, Any] | None = None,
        **mmseg_keywords: Any,
    ):
        options: dict[str, Any] = {"drop_path": drop_path, "checkpointing": checkpointing, "init_cfg": init_cfg}
        options = translate_cnn_keywords(mmseg_keywords, options, inspect.signature(AddpCNN).parameters)
        super().__init__()
        self.init_cfg, self.weights = pretrained_config(options["init_cfg"]), weights
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        if not isinstance(arch, str):
            raise _demand_arch(arch, self.init_cfg, size, weights)
        try:
            config = CnnConfig(arch, drop_path=options["drop_path"])
        except ValueError as error:
            raise UserError(str(error)) from error
        self.encoder = CnnEncoder(config, size)
        self.out_indices = _checked_stages(out_indices)
        self.encoder.checkpointing = options["checkpointing"]
        self._freeze(frozen_stages)
        if norm_eval:
            self.encoder.freeze_statistics()
        if norm_cfg is not None:
            self._set_norms(norm_cfg)
        self._layers = self.encoder.layers()

    def _freeze(self, frozen_stages: int) -> None:
        """Freeze what `frozen_stages` asks for, and stages after the last map, for which DDP would wait in vain."""
        try:
            if frozen_stages != -1:
                self.encoder.freeze_stages(1 + frozen_stages)
        except ValueError as error:
            raise UserError(f"frozen_stages: found {frozen_stages}, expected -1 (none) to {STAGES}") from error
        last = max(i % STAGES for i in self.out_indices)
        if last < STAGES - 1:
            layers = self.encoder.layers(coarse=True)
            for name, parameter in self.encoder.named_parameters():
                if layers[name] > 1 + last:
                    parameter.requires_grad_(False)

    def _set_norms(self, norm_cfg: Mapping[str, Any]) -> None:
        if norm_cfg.get("type") not in NORMS:
            raise UserError(f"norm_cfg: found {dict(norm_cfg)!r}, expected the type {' or '.join(NORMS)}")
        if not norm_cfg.get("requires_grad", True):
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.requires_grad_(False)
        if norm_cfg["type"] == "SyncBN":
            self.encoder = convert_sync_batchnorm(self.encoder)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Normalized images Float[B,3,H,W] -> Float[B,C,h,w] for each of `out_indices`, with its channels and size."""
        return tuple(self.encoder.forward_maps(images, self.out_indices))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, without weight decay: none."""
        return self.encoder.no_weight_decay()

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Return the layer of a parameter and the number of layers, as timm counts them: stem, blocks, heads."""
        layers = max(self._layers.values()) + 2
        if not param_name.startswith(prefix):
            return layers - 1, layers
        return self._layers[param_name.removeprefix(f"{prefix}encoder.")], layers

    def _load_pretrained(self, source: str) -> None:
        encoder = load_cnn(source, self.encoder.image_size, self.weights)
        if encoder.config.arch != self.encoder.config.arch:
            found, expected = self.encoder.config.arch, encoder.config.arch
            raise UserError(f"arch: found {found!r}; {source} expects arch={expected!r}")
        self.encoder.load_state_dict(encoder.state_dict())

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
        """Raise UserError if tensors of a state dict do not fit."""
        check_cnn_state(self.encoder, state_dict, prefix, unexpected_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, *args)


def load_cnn(source: str, size: tuple[int, int], weights: str) -> CnnEncoder:
    """Load the CNN of a file. Raises UserError if it has another encoder."""
    encoder = load_encoder(source, size, weights=weights, stages=True)
    if not isinstance(encoder, CnnEncoder):
        raise UserError(f"{source} is no CNN; expected one, or the backbone AddpViT (token ids: AddpTokenViT)")
    return encoder


def _checked_stages(out_indices: int | Sequence[int]) -> tuple[int, ...]:
    stages = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    if not stages or not all(-STAGES <= i < STAGES for i in stages):
        raise UserError(f"out_indices: found {list(stages)}, expected stages of 0 to {STAGES - 1}")
    return stages


def _demand_arch(found: Any, init_cfg: Mapping[str, Any] | None, size: tuple[int, int], weights: str) -> UserError:
    """Return the error for a config without an architecture, with the line that its pretrained file asks for."""
    if found is not None or init_cfg is None:
        return UserError(f"arch: found {found!r}, expected a CNN of timm, such as arch='resnet50'")
    source = init_cfg["checkpoint"]
    with torch.random.fork_rng(devices=[]):
        arch = load_cnn(source, size, weights).config.arch
    return UserError(f"arch: not given, expected arch={arch!r}, which is what {source} has")
