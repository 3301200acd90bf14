"""Stage 1: `addp tokenizer` trains the VQGAN on the user's images (VQGAN, arXiv 2012.09841; VQ-VAE, 1711.00937).

The codebook is a moving average of the encoder's outputs (VQ-VAE, App. A.1). A code that nothing has used for a while
is put where an encoder output lies now; the codebook starts that way too, as no code has ever been used then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from annotated_types import Ge, Interval, MultipleOf
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.data.images import pretrain_transform
from addp_core.data.sources import open_source
from addp_core.data.stream import Batch, Stream, example_images
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig, to_feature_map
from addp_core.recipes.config import dump
from addp_core.training.engine import Draw, Stage, TrainConfig, prepare_out, train
from addp_core.weights.checkpoint import save_model
from pretrain.losses import PatchDiscriminator, PerceptualDistance, hinge

EXAMPLES = 16  # images in a preview
LARGEST_BALANCE = 1e4  # of the adaptive adversarial weight
NEVER = 2**40  # steps


@dataclass
class LossConfig:
    """Terms of the loss, and how the codebook follows the encoder."""

    l1: Annotated[float, Ge(0), "weight of the mean absolute error"] = 1.0
    l2: Annotated[float, Ge(0), "weight of the mean squared error"] = 0.0
    commitment: Annotated[float, Ge(0), "weight of the encoder's squared distance to its codes (beta)"] = 0.25
    codebook_decay: Annotated[float, Interval(ge=0, lt=1), "of the codes' moving averages, per step"] = 0.99
    revive_after: Annotated[int | None, Ge(1), "steps until an unused code is put to use; null: never"] = 100
    perceptual_weights: Annotated[str, "local file of torchvision's vgg16 state dict; empty: no perceptual term"] = ""
    perceptual: Annotated[float, Ge(0), "weight of the perceptual term"] = 0.1
    perceptual_depth: Annotated[int, Interval(ge=1, le=5), "VGG blocks that are compared"] = 5
    adversarial: Annotated[float, Ge(0), "weight of the adversarial term; 0: no discriminator"] = 0.0
    adversarial_start: Annotated[int, Ge(0), "step from which the discriminator is trained and counts"] = 0
    adversarial_balance: Annotated[
        Literal["fixed", "adaptive"],
        "adaptive: the weight is relative to the gradient of the other terms at the last layer (VQGAN, Eq. 7)",
    ] = "fixed"
    discriminator_width: Annotated[int, Ge(32), MultipleOf(32), "channels of its first layer"] = 64
    discriminator_layers: Annotated[int, Ge(1), "layers after the first; one fewer of them halves the image"] = 3

    def __post_init__(self):
        if not (self.l1 or self.l2 or (self.perceptual and self.perceptual_weights)):
            raise ValueError("l1: found 0, as all other terms that compare images; expected one of them above 0")


def _train_defaults() -> TrainConfig:
    return TrainConfig(betas=(0.9, 0.99), weight_decay=0.0, clip_grad=1.0)


@dataclass
class Recipe:
    """Keys of `addp tokenizer`."""

    out: Annotated[str, "run folder"]
    data: DataConfig = field(default_factory=DataConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=_train_defaults)

    def __post_init__(self):
        if self.train.compile and self.loss.adversarial and self.loss.adversarial_balance == "adaptive":
            raise ValueError("train.compile: found true, expected false with loss.adversarial_balance=adaptive")


def run(recipe: Recipe) -> None:
    """Train a tokenizer, or continue; ends with `<out>/model.safetensors`."""
    text = dump(recipe)
    if prepare_out(recipe.out, text):
        return
    source = open_source(recipe.data)
    stage = build(recipe, example_images(source, recipe.data, EXAMPLES))
    crop, settings = pretrain_transform(recipe.data), recipe.train
    stream = Stream(source, crop, recipe.data, seed=settings.seed, batch=settings.micro_batch)
    train(stage, stream, settings, recipe.out, text)


def build(recipe: Recipe, examples: Tensor) -> "TokenizerStage":
    """The stage, its tokenizer freshly drawn from the seed. `examples`: Float[n,3,H,W], the images of previews."""
    size, loss = recipe.data.hw, recipe.loss
    grid = token_grid(recipe.model, recipe.data)
    smallest = 3 * 2**loss.discriminator_layers
    if loss.adversarial and min(size) < smallest:
        raise UserError(
            f"loss.discriminator_layers: found {loss.discriminator_layers}, for images of at least {smallest} pixels a "
            f"side; expected fewer, or data.size={smallest} or more"
        )
    torch.manual_seed(recipe.train.seed)
    return TokenizerStage(Tokenizer(recipe.model, grid), loss, examples)


def token_grid(tokenizer: TokenizerConfig, data: DataConfig) -> tuple[int, int]:
    """Rows and columns of tokens of the recipe's images. UserError where the size does not fit the tokenizer."""
    try:
        return tokenizer.grid(data.hw)
    except ValueError as error:
        raise UserError(f"data.size: {error}") from error


class TokenizerStage(Stage):
    """What the engine trains: encoder, decoder and discriminator by gradient, the codebook by averages."""

    name = "tokenizer"

    def __init__(self, tokenizer: Tokenizer, config: LossConfig, examples: Tensor):
        self.config, self.examples = config, examples
        discriminator = None
        if config.adversarial:
            discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
        self.model = TokenizerTraining(tokenizer, discriminator)
        self.perceptual = None
        if config.perceptual_weights and config.perceptual:
            self.perceptual = PerceptualDistance(config.perceptual_weights, config.perceptual_depth)
            self.frozen = [self.perceptual]
        self.seen: list[tuple[Tensor, Tensor]] = []  # features and ids of the micro-steps of optimizer step `seen_in`
        self.seen_in = -1

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        config, images = self.config, batch.images
        adversarial = config.adversarial > 0 and draw.step >= config.adversarial_start
        out = model(images, adversarial)
        if draw.step != self.seen_in:  # a step that was skipped has left its own behind
            self.seen, self.seen_in = [], draw.step
        self.seen.append((out["features"].detach(), out["ids"].flatten()))

        decoded = out["images"].float()
        terms = {"l1": F.l1_loss(decoded, images), "l2": F.mse_loss(decoded, images)}
        weights = {"l1": config.l1, "l2": config.l2}
        if self.perceptual is not None:
            terms["perceptual"], weights["perceptual"] = self.perceptual(decoded, images), config.perceptual
        loss = similarity = sum(weights[name] * term for name, term in terms.items())
        terms["commitment"] = out["commitment"]
        loss = loss + config.commitment * out["commitment"]
        if self.model.discriminator is not None:
            loss = loss + out["discriminator"]
        if adversarial:
            weight = torch.as_tensor(config.adversarial, device=loss.device)
            if config.adversarial_balance == "adaptive":
                weight = weight * self._balance(similarity, out["adversarial"])
            loss = loss + weight * out["adversarial"]
            terms |= {name: out[name] for name in ("adversarial", "discriminator")}
            terms["adversarial_weight"] = weight
        squared = (decoded.detach().clamp(0, 1) - images).square().mean((1, 2, 3))
        return {"loss": loss, **terms, "psnr": -10 * squared.clamp_min(1e-10).log10().mean()}

    def _balance(self, similarity: Tensor, adversarial: Tensor) -> Tensor:
        """How much stronger the one term's gradient is than the other's, at the decoder's last layer (VQGAN, Eq. 7)."""
        last = self.model.tokenizer.decoder.conv_out.weight
        norms = [
            reduce(torch.autograd.grad(term, last, retain_graph=True)[0].float(), "mean").norm()
            for term in (similarity, adversarial)
        ]
        return (norms[0] / (norms[1] + 1e-4)).clamp_max(LARGEST_BALANCE)

    @torch.no_grad()
    def after_step(self, model: "TokenizerTraining", draw: Draw, accelerator: Accelerator) -> dict[str, float]:
        """Let the codebook follow the features of all processes and micro-steps; it stays the same on all of them."""
        counts, sums = (accelerator.reduce(part, "sum") for part in model.statistics(self.seen))
        # Drawn over the outputs of all processes, so that the choice does not depend on how many there are.
        features, _ = self.seen[-1]
        tokens = len(features) // (draw.rows.stop - draw.rows.start)
        order = torch.randperm(draw.batch * tokens, generator=draw.generator("revive"))
        wanted = order[torch.arange(len(counts)) % len(order)].to(features.device)
        candidates = accelerator.reduce(_owned_rows(features, wanted - draw.rows.start * tokens), "sum")
        self.seen = []
        return model.update_codebook(counts, sums, candidates, self.config.codebook_decay, self.config.revive_after)

    def preview(self, model: "TokenizerTraining", step: int) -> dict[str, Tensor]:
        """Pairs of an image and its reconstruction."""
        tokenizer = model.tokenizer
        images = self.examples.to(tokenizer.quantize.embedding.weight.device)
        decoded = tokenizer.decode(tokenizer.lookup(tokenizer.encode(images)))
        return {"recon": torch.cat([images, decoded.float()], 3).clamp(0, 1)}

    def export(self, model: "TokenizerTraining", path: Path) -> None:
        save_model(model.tokenizer, path)


class TokenizerTraining(nn.Module):
    """A tokenizer with all that only its training needs: the averages behind the codebook, and a discriminator."""

    def __init__(self, tokenizer: Tokenizer, discriminator: PatchDiscriminator | None = None):
        super().__init__()
        self.tokenizer, self.discriminator = tokenizer, discriminator
        # The codes are averages and get no gradient: as a buffer they are saved, and restored where a step is skipped.
        embedding = tokenizer.quantize.embedding
        codes = embedding.weight.detach().clone()
        del embedding.weight
        embedding.register_buffer("weight", codes)
        self.register_buffer("count", torch.zeros(len(codes)))
        self.register_buffer("total", torch.zeros_like(codes))
        self.register_buffer("idle", torch.full((len(codes),), NEVER))  # steps since a code was used

    def forward(self, images: Tensor, adversarial: bool = False) -> dict[str, Tensor]:
        """Float[B,3,H,W] in [0,1] -> decoded `images`, `features` Float[B*N,D], `ids` Long[B,N] and scalar losses.

        The gradient reaches the encoder as if there were no quantization (straight through).
        """
        h = self.tokenizer.encoder(images).float()
        ids = self.tokenizer.quantize.nearest_ids(h.detach())
        codes = to_feature_map(self.tokenizer.quantize.embedding(ids), h.shape[2:])
        out = {"features": h.flatten(2).transpose(1, 2).flatten(0, 1), "ids": ids, "commitment": F.mse_loss(h, codes)}
        out["images"] = self.tokenizer.decode(h + (codes - h).detach())
        if self.discriminator is not None and adversarial:
            fixed = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            out["adversarial"] = -functional_call(self.discriminator, fixed, (out["images"],)).float().mean()
            scores = self.discriminator(torch.cat([images, out["images"].detach().to(images.dtype)]))
            out["discriminator"] = hinge(*scores.chunk(2))
        elif self.discriminator is not None:  # data-parallel wrappers expect a gradient for each parameter
            out["discriminator"] = sum(0 * value.sum() for value in self.discriminator.parameters())
        return out

    def statistics(self, seen: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Pairs of Float[M,D] features and Long[M] ids -> each code's uses Float[K] and sum of features Float[K,D]."""
        counts, sums = torch.zeros_like(self.count), torch.zeros_like(self.total)
        for features, ids in seen:
            # a product: on GPUs, index_add_ sums in another order each time
            chosen = F.one_hot(ids, len(counts)).to(features.dtype)
            counts += chosen.sum(0)
            sums += chosen.T @ features
        return counts, sums

    def update_codebook(
        self, counts: Tensor, sums: Tensor, candidates: Tensor, decay: float, revive_after: int | None
    ) -> dict[str, float]:
        """One step of the moving averages; codes unused for `revive_after` steps (None: ever) become their candidate.

        counts: Float[K] uses of each code; sums: Float[K,D] of the features behind them; candidates: Float[K,D].
        """
        codes = self.tokenizer.quantize.embedding.weight
        self.count.lerp_(counts, 1 - decay)
        self.total.lerp_(sums, 1 - decay)
        # A code that is not used keeps its place; its count and sum fade together until their ratio is noise.
        faded = self.count <= torch.finfo(self.count.dtype).tiny / (1 - decay)
        codes.copy_(torch.where(faded[:, None], codes, self.total / self.count[:, None]))
        used = counts > 0
        self.idle.copy_(torch.where(used, 0, self.idle + 1))
        dead = self.idle >= (NEVER if revive_after is None else revive_after)
        codes.copy_(torch.where(dead[:, None], candidates, codes))
        for average in (self.count, self.total, self.idle):
            average[dead] = 0
        share = counts / counts.sum()
        perplexity = torch.special.entr(share).sum().exp()
        figures = {"usage": used.float().mean(), "perplexity": perplexity, "revived": dead.float().sum()}
        return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))


def _owned_rows(features: Tensor, wanted: Tensor) -> Tensor:
    """Rows `wanted` of Float[M,D] features; zeros for those outside of it, which other processes hold."""
    inside = (wanted >= 0) & (wanted < len(features))
    return features[wanted.clamp(0, len(features) - 1)] * inside[:, None]
