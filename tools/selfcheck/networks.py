"""The networks of the check, and what they compute: a tiny one with golden numbers, and one of published widths.

The golden numbers are those of the tiny network in float64 on a CPU. `python -m tools.selfcheck.networks` writes them
anew, which a change of networks or method needs only if it is meant to change their outputs. Weights and images are
functions of names, shapes and numpy's Mersenne Twister, which are the same on every machine and in every version.
"""

import math
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from addp_core.method.addp import ADDP, ADDPConfig, DenoiserConfig
from addp_core.method.sampler import sample
from addp_core.networks.decoder import DecoderConfig
from addp_core.networks.encoder import EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.tokenizer import TokenizerConfig, Vocabulary

GOLDEN_FILE = Path(__file__).parent / "golden" / "outputs.safetensors"
IMAGES = 2  # in every comparison
MASKED = (0.6, 0.75)  # shares of unreliable tokens at t and at the later step
SAMPLE_STEPS = 5


@dataclass(frozen=True)
class Inputs:
    """What the parts of a network are called with, so that an error in one of them does not reach the next.

    images: Float[B,3,H,W] in [0,1]. ids: Long[B,N]. mask, next_mask: Bool[B,N]. noisy: Float[B,3,H,W], x_t. target:
    Float[B,N,K].
    """

    images: Tensor
    ids: Tensor
    mask: Tensor
    next_mask: Tensor
    noisy: Tensor
    target: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        """Return them on a device, with floating-point numbers of this type."""
        tensors = (value.to(device, dtype if value.is_floating_point() else None) for value in vars(self).values())
        return Inputs(*tensors)


def golden_network() -> ADDP:
    """Return the tiny network: 32 x 32 px, 8 x 8 tokens of 64 codes; every kind of layer that the real ones have."""
    tokenizer = TokenizerConfig(width=32, multipliers=(1, 1, 2), blocks=1, codebook=64, dim=16, groups=8)
    config = ADDPConfig(
        image_size=(32, 32),
        tokenizer=tokenizer,
        vocabulary=Vocabulary(tokenizer.codebook, unused=8, class_slot=1),
        predictor=PredictorConfig(width=64, depth=2, heads=4, decoder_depth=1, decoder_heads=4, dropout=0.0),
        denoiser=DenoiserConfig(
            EncoderConfig(64, 3, 4, dropout=0.0, input_dropout=0.0, tokenizer_norm=True), DecoderConfig(2, 4, 0.0)
        ),
    )
    return _with_weights(ADDP(config))


def wide_network() -> ADDP:
    """Return a network with the widths of ViT-B and the published tokenizer, few blocks and images of 64 px."""
    config = ADDPConfig(
        image_size=(64, 64),
        predictor=PredictorConfig(depth=2, decoder_depth=1, dropout=0.0),
        denoiser=DenoiserConfig(
            EncoderConfig(depth=2, dropout=0.0, input_dropout=0.0, tokenizer_norm=True), DecoderConfig(1, 16, 0.0)
        ),
    )
    return _with_weights(ADDP(config))


def _with_weights(model: ADDP) -> ADDP:
    """Replace all weights by normal numbers that are a function of their names and shapes; in eval mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values, shape = numbers(name, *parameter.shape), tuple(parameter.shape)
            if len(shape) < 2:
                values = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
            elif "embed" in name or "token" in name.rpartition(".")[2]:
                values = values * min(0.5, 4 / math.sqrt(shape[-1]))  # logits of the same spread for all widths
            else:
                values = values / math.sqrt(math.prod(shape[1:]))
            parameter.copy_(values)
    return model.eval()


def numbers(name: str, *shape: int) -> Tensor:
    """Return normal numbers seeded by the name, float32."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def images_for(model: ADDP, count: int = IMAGES) -> Tensor:
    """Return smooth images, Float[count,3,H,W] in [0,1]: noise of a few pixels, enlarged."""
    height, width = model.config.image_size
    coarse = numbers("images", count, 3, 6, 6)
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear").mul(0.25).add(0.5).clamp(0, 1)


@torch.no_grad()
def inputs_for(model: ADDP) -> Inputs:
    """Return the inputs of all parts, computed by this network: float64 on a CPU."""
    images, tokens = images_for(model).to(next(model.parameters())), model.config.tokens
    rank = numbers("masks", IMAGES, tokens).argsort(1).argsort(1)
    mask, next_mask = (rank < math.ceil(tokens * share) for share in MASKED)
    ids = model.encode_images(images)
    corrupted = model.corrupt(ids, mask, next_mask)
    return Inputs(images, ids, mask, next_mask, corrupted.images, corrupted.target)


def outputs(model: ADDP, inputs: Inputs) -> dict[str, Tensor]:
    """Return what every part computes from its own inputs, in float32 on the CPU.

    `loss` and `gradients` (the norms of all gradients of the denoiser) are those of a training step.
    """
    tokenizer, denoiser = model.tokenizer, model.denoiser
    assert model.predictor is not None
    # Before the parts without gradients: within one autocast, torch 2.6 would reuse their casts of the weights.
    model.zero_grad()
    loss = denoiser(inputs.noisy, inputs.ids, inputs.mask, inputs.target)
    loss.backward()
    gradients = [parameter.grad.norm() for parameter in denoiser.parameters() if parameter.grad is not None]
    model.zero_grad()
    with torch.no_grad():
        found = {
            "features before quantization": tokenizer.encoder(inputs.images),
            "ids": tokenizer.encode(inputs.images),
            "reconstruction": tokenizer.decode(tokenizer.lookup(inputs.ids)),
            "predicted probabilities": model.predictor(inputs.ids, inputs.next_mask),
            "noisy image": model.corrupt(inputs.ids, inputs.mask, inputs.next_mask).images,
            "encoder": denoiser.encode(inputs.noisy, inputs.ids, inputs.mask),
            "logits": model.logits(inputs.noisy, inputs.ids, inputs.mask),
        }
    found |= {"loss": loss.detach(), "gradients": torch.stack(gradients)}
    return {name: (value if name == "ids" else value.float()).detach().cpu() for name, value in found.items()}


def sampled(model: ADDP) -> Tensor:
    """Return images that are generated without random choices, Float[B,3,H,W] in [0,1], on the CPU."""
    return sample(model, IMAGES, SAMPLE_STEPS, temperature=0.0, top_p=0.0).float().cpu()


def write_golden(path: Path) -> None:
    """Compute the golden numbers and write them."""
    model = golden_network().double()
    inputs = inputs_for(model)
    named = {f"inputs.{name}": value for name, value in vars(inputs).items()}
    named |= {f"outputs.{name}": value for name, value in (outputs(model, inputs) | {"sample": sampled(model)}).items()}
    save_file({name: _small(value) for name, value in named.items()}, path)


def read_golden(path: Path = GOLDEN_FILE) -> tuple[Inputs, dict[str, Tensor]]:
    """Return the inputs and outputs of the golden network."""
    tensors: Mapping[str, Any] = load_file(path)
    parts = {
        kind: {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{kind}.")}
        for kind in ("inputs", "outputs")
    }
    return Inputs(**parts["inputs"]), parts["outputs"]


def _small(value: Tensor) -> Tensor:
    return (value.float() if value.is_floating_point() else value).contiguous()


if __name__ == "__main__":
    write_golden(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN_FILE)
