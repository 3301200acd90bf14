"""Convolutional encoders of timm in place of the ViT: ResNet-50 (App. C.2; Tables 8, 14, 17) and others with stages.

Pretraining needs a map on the decoder's grid, which has stride 16, whereas the last stage of a ResNet has stride 32.
The paper does not say how it bridges this. Here the last stages are dilated instead of strided (DeepLab: arXiv
1606.00915), which neither adds nor changes a weight: every second row and column of the dilated map of ResNet-50 is
exactly the map of the plain one. So the network that is pretrained is the one that transfers start from, at its usual
stride and cost. A learned upsampling would have to be thrown away with what it has learned. A linear layer brings the
channels to the decoder's width, and the final norm follows, as after the ViT.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import timm
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.functional import interpolate

from addp_core.networks.config import OUTPUT_STRIDES as OUTPUT_STRIDES
from addp_core.networks.config import STAGES as STAGES
from addp_core.networks.config import CnnConfig as CnnConfig
from addp_core.networks.config import cnn_stages as cnn_stages
from addp_core.networks.encoder import FeatureEncoder, describe_state, padded_grid
from addp_core.networks.layers import LayerNorm, gather_tokens, init_transformer

START = re.compile(r"(?<![^|])\^")  # of the alternatives of a pattern


@dataclass(frozen=True)
class CnnArchitecture:
    """Architecture of a convolutional encoder, as files store it."""

    encoder: CnnConfig
    image_size: tuple[int, int]

    @property
    def patch_size(self) -> int:
        """Stride of the last map in pixels."""
        return self.encoder.strides[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last map."""
        return padded_grid(self.image_size, self.patch_size)

    def build(self, image_size: tuple[int, int] | None = None, dynamic: bool = True) -> "CnnEncoder":
        """Build the encoder, with random weights, for images of this size (default: its own); it takes any."""
        return CnnEncoder(self.encoder, image_size or self.image_size)


class CnnEncoder(FeatureEncoder):
    """A CNN of timm, `body`, whose four stages take the place of blocks; it has no class token and no norm of its own.

    Args:
        config: the architecture.
        image_size: height and width in pixels; images of any other size are accepted too.
        output_stride: of the last map in pixels, 8, 16 or 32. Below 32, the last stages are dilated.
    """

    kind = "cnn_encoder"  # of the architecture, in files
    config: CnnConfig  # type: ignore[assignment]
    num_prefix_tokens = 0
    dynamic = True
    frozen_statistics = False
    frozen_stages = 0  # of the stem and the stages

    def __init__(self, config: CnnConfig, image_size: tuple[int, int], output_stride: int = OUTPUT_STRIDES[-1]):
        super().__init__()
        self.config, self.image_size = config, (image_size[0], image_size[1])
        body: Any = timm.create_model(
            config.arch, num_classes=0, output_stride=output_stride, drop_path_rate=config.drop_path
        )
        self.maps = range(len(body.feature_info))[-STAGES:]  # which of timm's feature maps end a stage
        body.prune_intermediate_layers(list(self.maps), prune_norm=True, prune_head=True)
        if hasattr(body, "head"):
            body.head = nn.Identity()  # timm 1.0.26 leaves ConvNeXt's norm in it
        self.body = body
        self.patch_size = body.feature_info[-1]["reduction"]
        self.grid = padded_grid(self.image_size, self.patch_size)
        self.norm: nn.Module = nn.Identity()
        self.register_state_dict_post_hook(describe_state)

    @property
    def width(self) -> int:
        """Channels of the last map."""
        return self.config.channels[-1]

    @property
    def depth(self) -> int:
        """The number of stages."""
        return STAGES

    @property
    def first_wide_block(self) -> int:
        """The first stage, counted from 1, whose map has `width` channels."""
        return 1 + self.config.channels.index(self.width)

    @property
    def architecture(self) -> CnnArchitecture:
        """Everything that builds the encoder again for transfer."""
        return CnnArchitecture(self.config, self.image_size)

    def freeze_statistics(self) -> None:
        """Normalize with the moving statistics in training too, and keep them; scales and shifts stay trainable.

        Detectors and segmentors see few images at a time, whose statistics are noisy.
        """
        self.frozen_statistics = True
        self.train(self.training)

    def freeze_stages(self, count: int) -> None:
        """Freeze the stem and the first stages, `count` of them together: weights, and statistics of batch norms.

        Raises ValueError if the CNN has no so many, or its layers are not counted as a stem and four stages.
        """
        layers = self.layers(coarse=True)
        if not 0 <= count <= 1 + STAGES or set(layers.values()) != {*range(1 + STAGES)}:
            raise ValueError(f"found {count}, expected 0 to {1 + STAGES} of the stem and the stages of a ResNet")
        self.frozen_stages = count
        for name, parameter in self.named_parameters():
            if layers.get(name, STAGES) < count:
                parameter.requires_grad_(False)
        self.train(self.training)

    def layers(self, coarse: bool = False) -> dict[str, int]:
        """Return the layer of each parameter of the CNN: 0 for the stem, then that of its block, or of its stage."""
        return group_parameters(self, self.group_matcher(coarse), reverse=True)

    def train(self, mode: bool = True) -> "CnnEncoder":
        """Set the mode; batch norms with frozen statistics and frozen stages stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if (self.frozen_statistics and is_norm) or (self.frozen_stages and _is_frozen(module)):
                module.eval()
        return self

    def forward_maps(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the maps of these stages, Float[B,C,h,w] with the stage's own channels and stride.

        images: normalized, Float[B,3,H,W]. blocks: indices of stages; negative ones count from the end.
        """
        body: Any = self.body
        body.set_grad_checkpointing(self.checkpointing and self.training)
        wanted = [i % STAGES for i in blocks]
        kept = sorted(set(wanted))
        maps = body.forward_intermediates(
            images, indices=[self.maps[i] for i in kept], stop_early=True, intermediates_only=True
        )
        return [cast(Tensor, maps[kept.index(i)]) for i in wanted]

    def forward_tokens(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Return the positions of these stages' maps as tokens, Float[B,N,C], row-major.

        images: normalized, Float[B,3,H,W]. blocks: indices of stages; negative ones count from the end.
        """
        return [features.flatten(2).transpose(1, 2) for features in self.forward_maps(images, blocks)]

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of the last map of images Float[B,3,H,W]."""
        return padded_grid((images.shape[-2], images.shape[-1]), self.patch_size)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, besides one-dimensional ones, without weight decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict[str, Any]:
        """Describe the layers to timm for layer-wise learning rate decay, as timm does for this model.

        prefix: what precedes the names of the encoder's parameters in the enclosing model.
        """
        start, body = re.escape(f"{prefix}body."), cast(Any, self.body)
        groups: dict[str, Any] = body.group_matcher(coarse=coarse)

        def inside(pattern: str) -> str:
            return f"^{start}(?:{START.sub('', pattern)})"

        return {
            name: [(inside(pattern), order) for pattern, order in patterns]
            if isinstance(patterns, list)
            else inside(patterns)
            for name, patterns in groups.items()
        }


class CnnGridEncoder(CnnEncoder):
    """The CNN in pretraining: its last map on the decoder's grid, as tokens of the decoder's width.

    The map is dilated to the tokenizer's stride. Where a CNN cannot have this stride (below 8), the map is resampled
    bilinearly to the grid.

    Args:
        config: the architecture.
        image_size: height and width in pixels.
        grid: rows and columns of tokens.
    """

    def __init__(self, config: CnnConfig, image_size: tuple[int, int], grid: tuple[int, int]):
        stride = image_size[0] // grid[0]
        super().__init__(config, image_size, max(s for s in OUTPUT_STRIDES if s <= max(stride, OUTPUT_STRIDES[0])))
        self.token_grid = grid
        self.projection = nn.Linear(config.channels[-1], config.width)
        self.norm = LayerNorm(config.width)
        init_transformer(self.projection)

    def forward(self, images: Tensor, queries: Tensor | None = None) -> Tensor:
        """Map normalized images Float[B,3,H,W] to tokens after the final norm, Float[B,N,W]; no class token.

        queries: Long[B,Q], positions whose features are wanted -> Float[B,Q,W] (default: all).
        """
        features = self.forward_maps(images, (-1,))[0]
        if features.shape[-2:] != self.token_grid:
            features = interpolate(features, self.token_grid, mode="bilinear")
        tokens = features.flatten(2).transpose(1, 2)
        return self.norm(self.projection(tokens if queries is None else gather_tokens(tokens, queries)))


def _is_frozen(module: nn.Module) -> bool:
    """Return whether a module has parameters, none of which is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)
