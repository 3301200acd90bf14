"""Losses of the tokenizer beyond pixels: perceptual distance and a patch discriminator.

References: perceptual distance LPIPS (arXiv 1801.03924), PatchGAN pix2pix (1611.07004), both in VQGAN (2012.09841).
"""

import os

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.weights.checkpoint import read_tensors

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # widths between poolings
GROUPS = 32


class PerceptualDistance(nn.Module):
    """Squared distance between unit-normalised VGG16 features: the mean over the last layer before each pooling.

    source: a local file with the state dict of torchvision's `vgg16` (its `features.*` part is read, as far as
    `depth` needs it). Nothing is downloaded.
    """

    def __init__(self, source: str | os.PathLike, depth: int = len(VGG16)):
        super().__init__()
        self.blocks = nn.ModuleList()
        state, index, width_in = {}, 0, 3
        for number, widths in enumerate(VGG16[:depth]):
            layers = [nn.MaxPool2d(2)] if number else []
            index += bool(number)
            for width in widths:
                for name in ("weight", "bias"):
                    state[f"blocks.{number}.{len(layers)}.{name}"] = f"features.{index}.{name}"
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
                index, width_in = index + 2, width
            self.blocks.append(nn.Sequential(*layers))
        self.load_state_dict(_vgg_tensors(source, state, self.state_dict()))
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Float[B,3,H,W] and Float[B,3,H,W], both in [0,1] -> scalar."""
        x = (torch.cat([images, targets]) - self.mean) / self.std
        distance = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x = block(x)
            found, expected = F.normalize(x.float(), dim=1, eps=1e-6).chunk(2)
            distance = distance + (found - expected).square().sum(1).mean()
        return distance / len(self.blocks)


def _vgg_tensors(source: str | os.PathLike, names: dict[str, str], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """{our name: tensor} out of a VGG16 file; `names` maps ours to torchvision's."""
    wanted = "a state dict of torchvision's vgg16 (vgg16-397923af.pth, or any with the same features.* tensors)"
    if not os.path.exists(source):
        raise UserError(f"loss.perceptual_weights: {source}: no such file; expected {wanted}")
    found = read_tensors(source)
    for ours, theirs in names.items():
        shape = tuple(expected[ours].shape)
        if theirs not in found:
            raise UserError(f"loss.perceptual_weights: {source}: no tensor {theirs}; expected {wanted}")
        if tuple(found[theirs].shape) != shape:
            raise UserError(
                f"loss.perceptual_weights: {source}: found {theirs} {tuple(found[theirs].shape)}, "
                f"expected {shape} as in {wanted}"
            )
    return {ours: found[theirs].float() for ours, theirs in names.items()}


class PatchDiscriminator(nn.Module):
    """PatchGAN with group instead of batch normalisation: an image's scores depend on that image alone."""

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            before, after = (width * min(2**j, 8) for j in (i - 1, i))
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.GroupNorm(min(GROUPS, after), after),
                nn.LeakyReLU(0.2),
            ]
        self.net = nn.Sequential(*blocks, nn.Conv2d(after, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Float[B,3,H,W] in [0,1] -> Float[B,1,h,w], a score for each patch: high for real ones."""
        return self.net(images * 2 - 1)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on its scores of real and of generated images."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())
