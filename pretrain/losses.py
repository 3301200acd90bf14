"""Losses of the tokenizer besides the distance of pixels: a perceptual distance and a patch discriminator.

References: perceptual distance LPIPS (arXiv 1801.03924), PatchGAN pix2pix (1611.07004), both in VQGAN (2012.09841).
"""

import os

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.weights.files import read_tensors

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # widths between poolings
MAX_GROUPS = 32


class PerceptualDistance(nn.Module):
    """Squared distance of unit-normalized VGG16 features, averaged over the last layer before each pooling.

    Args:
        source: a local file with the state dict of torchvision's `vgg16`, of which only the `features.*` tensors of the
            blocks in use are read. Nothing is downloaded.
        depth: blocks in use, from the first.

    Raises:
        UserError: if the file does not exist or does not hold these tensors.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: str | os.PathLike, depth: int = len(VGG16)):
        super().__init__()
        self.blocks = nn.ModuleList()
        vgg_names, index, width_in = {}, 0, 3
        for number, widths in enumerate(VGG16[:depth]):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number else []
            index += bool(number)
            for width in widths:
                for name in ("weight", "bias"):
                    vgg_names[f"blocks.{number}.{len(layers)}.{name}"] = f"features.{index}.{name}"
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
                index, width_in = index + 2, width
            self.blocks.append(nn.Sequential(*layers))
        self.load_state_dict(_read_vgg(source, vgg_names, self.state_dict()))
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Float[B,3,H,W] and Float[B,3,H,W], both in [0,1] -> scalar."""
        x = (torch.cat([images, targets]) - self.mean) / self.std
        distance = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x = block(x)
            features, target_features = F.normalize(x.float(), dim=1, eps=1e-6).chunk(2)
            distance = distance + (features - target_features).square().sum(1).mean()
        return distance / len(self.blocks)


def _read_vgg(source: str | os.PathLike, vgg_names: dict[str, str], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a VGG16 file by our names.

    vgg_names: our name -> torchvision's; expected: our name -> a tensor of the right shape.
    """
    description = "a state dict of torchvision's vgg16 (vgg16-397923af.pth, or any with the same features.* tensors)"
    if not os.path.exists(source):
        raise UserError(f"loss.perceptual_weights: {source}: no such file; expected {description}")
    state = read_tensors(source)
    for name, vgg_name in vgg_names.items():
        shape = tuple(expected[name].shape)
        if vgg_name not in state:
            raise UserError(f"loss.perceptual_weights: {source}: no tensor {vgg_name}; expected {description}")
        if tuple(state[vgg_name].shape) != shape:
            raise UserError(
                f"loss.perceptual_weights: {source}: found {vgg_name} {tuple(state[vgg_name].shape)}, "
                f"expected {shape} as in {description}"
            )
    return {name: state[vgg_name].float() for name, vgg_name in vgg_names.items()}


class PatchDiscriminator(nn.Module):
    """PatchGAN with group instead of batch normalization, so that an image's scores do not depend on other images."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            width_in, width_out = (width * min(2**j, 8) for j in (i - 1, i))
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(width_in, width_out, 4, stride, 1, bias=False),
                nn.GroupNorm(min(MAX_GROUPS, width_out), width_out),
                nn.LeakyReLU(0.2),
            ]
        self.net = nn.Sequential(*blocks, nn.Conv2d(width_out, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] in [0,1] -> Float[B,1,h,w], one score per patch; real patches should score high."""
        return self.net(images * 2 - 1)


def hinge_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return the loss of the discriminator, a scalar, from its scores of real and of decoded images."""
    return 0.5 * (F.relu(1 - real_scores.float()).mean() + F.relu(1 + fake_scores.float()).mean())
