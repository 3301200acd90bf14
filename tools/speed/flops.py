"""FLOP of a training step and of sampling, counted by fvcore.

One FLOP is one multiplication or addition of a convolution (computed directly), a linear layer or attention; norms and
activations are not counted.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from addp_core.base.rng import generator
from addp_core.method.addp import ADDP
from addp_core.method.diffusion import cosine_ratio

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # importing it scripts a function
    from fvcore.nn import FlopCountAnalysis

COUNTED = ("conv", "linear", "addmm", "mm", "bmm", "matmul", "scaled_dot_product_attention")


def training_flop(model: ADDP, mask_ratio: float) -> dict[str, float]:
    """Return the FLOP of each part of a training step per image; a backward pass counts as two forward passes."""
    image, ids, codes = _inputs(model)
    mask = fixed_masks(1, model.config.tokens, mask_ratio)[0]
    assert model.predictor is not None  # training needs one
    passes = 2 if model.config.process.condition == "z_t+1" else 1  # over the ids left at t and at t+1
    trained = _denoiser_flop(model, image, ids, int(mask.sum()))
    return {
        "vq_encode": count(model.tokenizer, "encode", image)[""],
        "predictor": passes * count(model.predictor, "forward", ids, mask)[""],
        "vq_decode": count(model.tokenizer, "decode", codes)[""],
        **trained,
        "backward": 2 * sum(trained.values()),
    }


def sampling_flop(model: ADDP, steps: int) -> dict[str, float]:
    """Return the FLOP of each part of sampling with the cosine schedule per image."""
    image, ids, codes = _inputs(model)
    n = model.config.tokens
    # The FLOP are a quadratic polynomial of the number of masked tokens: three counts determine the others.
    measured = {masked: _denoiser_flop(model, image, ids, masked) for masked in {1, n // 2, n - 1}}
    masked_counts = [max(math.ceil(n * cosine_ratio(step / steps)), 1) for step in range(1, steps)]
    flop = {
        part: sum(interpolate({n: flop[part] for n, flop in measured.items()}, masked) for masked in masked_counts)
        for part in ("encoder", "decoder")
    }
    all_masked = torch.ones_like(ids, dtype=torch.bool)
    flop["decoder"] += count(model.denoiser.decoder, "forward", None, ids, all_masked)[""]  # all of the first step
    return flop | {"vq_decode": steps * count(model.tokenizer, "decode", codes)[""]}


def fixed_masks(batch: int, tokens: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Return the mask Bool[B,N] of unreliable tokens and that of a slightly later step; the same in every call."""
    rank = torch.rand(batch, tokens, generator=generator(0, "mask")).argsort(1).argsort(1)
    return rank < math.ceil(tokens * ratio), rank < math.ceil(tokens * min(ratio + 0.05, 1))


def count(module: nn.Module, method: str, *inputs: Any, **options: Any) -> dict[str, float]:
    """Return the FLOP of `module.method(*inputs, **options)`: the sum under "", and those of the submodules by name."""

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.of = module

        def forward(self, *tensors: Tensor) -> Any:
            remaining = iter(tensors)
            return getattr(self.of, method)(*(None if x is None else next(remaining) for x in inputs), **options)

    analysis = FlopCountAnalysis(Call(), tuple(x for x in inputs if x is not None))
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_products)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    flop = {
        name: 2 * sum(products for op, products in ops.items() if op in COUNTED)
        for name, ops in analysis.by_module_and_operator().items()
    }
    return {name.removeprefix("of."): number for name, number in flop.items() if name != "of"}


def attention_products(inputs: list[Any], outputs: list[Any]) -> float:
    """Return the multiply-adds of softmax(q k^T) v; fvcore has no count for torch's fused attention."""
    (batch, heads, queries, width), (_, _, keys, _) = (value.type().sizes() for value in inputs[:2])
    return 2 * batch * heads * queries * keys * width


def interpolate(points: Mapping[int, float], x: int) -> float:
    """Return the value at x of the polynomial through the points (Lagrange)."""
    return sum(y * math.prod((x - b) / (a - b) for b in points if b != a) for a, y in points.items())


def _inputs(model: ADDP) -> tuple[Tensor, Tensor, Tensor]:
    config = model.config
    codes = torch.zeros(1, config.tokenizer.dim, *config.grid)
    return torch.zeros(1, 3, *config.image_size), torch.zeros(1, config.tokens, dtype=torch.long), codes


def _denoiser_flop(model: ADDP, image: Tensor, ids: Tensor, masked: int) -> dict[str, float]:
    """Return the FLOP of encoder and decoder for `masked` masked tokens, with logits of these alone."""
    mask = (torch.arange(ids.shape[1]) < masked).unsqueeze(0)
    flop = count(model.denoiser, "forward", image, ids, mask, masked_only=True)
    return {"encoder": flop["encoder"], "decoder": flop[""] - flop["encoder"]}
