"""Stage 1: `addp tokenizer` trains the VQGAN on your images (VQGAN, arXiv 2012.09841; VQ-VAE, 1711.00937).

The codebook is a moving average of the encoder's outputs (VQ-VAE, App. A.1). A code that has not been used for a while
is moved to a current output of the encoder. The codebook is initialized in the same way, because at first no code has
been used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.data.sources import ImageSource
from addp_core.data.stream import Batch, example_images
from addp_core.networks.tokenizer import Tokenizer, to_feature_map
from addp_core.training.stage import MicroStep
from addp_core.weights.saving import save_model
from pretrain.common import run_stage, token_grid
from pretrain.evaluation import EvaluatedStage, Evaluation, Measured
from pretrain.losses import PatchDiscriminator, PerceptualDistance, hinge_loss
from pretrain.recipe import LossConfig as LossConfig
from pretrain.recipe import TokenizerRecipe as Recipe

PREVIEW_IMAGES = 16
MAX_GRADIENT_RATIO = 1e4  # of the adaptive adversarial weight
NEVER_USED = 2**40  # steps since the last use of a code that has never been used


def run(recipe: Recipe) -> None:
    """Train a tokenizer, or continue; ends with `<out>/model.safetensors`."""
    run_stage(recipe, lambda source: build_stage(recipe, source), TokenizerStage.measured)


def build_stage(recipe: Recipe, source: ImageSource) -> "TokenizerStage":
    """Return the stage with a randomly initialized tokenizer. `source` provides the images of previews.

    Raises UserError if the image size does not suit the tokenizer or the discriminator.
    """
    examples = example_images(source, recipe.data, PREVIEW_IMAGES)
    size, loss = recipe.data.hw, recipe.loss
    grid = token_grid(recipe.model, recipe.data)
    min_size = 3 * 2**loss.discriminator_layers
    if loss.adversarial and min(size) < min_size:
        raise UserError(
            f"loss.discriminator_layers: found {loss.discriminator_layers}, for images of at least {min_size} pixels a "
            f"side; expected fewer, or data.size={min_size} or more"
        )
    torch.manual_seed(recipe.train.seed)
    return TokenizerStage(Tokenizer(recipe.model, grid), loss, examples)


class TokenizerStage(EvaluatedStage):
    """Trains the encoder, decoder and discriminator by gradient descent, and the codebook by moving averages."""

    name = "tokenizer"
    model: "TokenizerTraining"
    measured = Measured({"val_psnr": True, "val_usage": True, "val_perplexity": True}, images=True)

    def __init__(self, tokenizer: Tokenizer, config: LossConfig, examples: Tensor):
        """`examples`: Float[n,3,H,W] in [0,1], the images of previews."""
        self.config, self.examples = config, examples
        discriminator = None
        if config.adversarial:
            discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
        self.model = TokenizerTraining(tokenizer, discriminator)
        self.perceptual = None
        if config.perceptual_weights and config.perceptual:
            self.perceptual = PerceptualDistance(config.perceptual_weights, config.perceptual_depth)
            self.frozen = [self.perceptual]
        # (features, ids) of the micro-steps of the current optimizer step
        self.quantized: list[tuple[Tensor, Tensor]] = []
        self.quantized_step = -1

    def loss(self, model: nn.Module, batch: Batch, micro_step: MicroStep) -> dict[str, Tensor]:
        config, images = self.config, batch.images
        adversarial = config.adversarial > 0 and micro_step.step >= config.adversarial_start
        out = model(images, adversarial)
        if micro_step.step != self.quantized_step:  # drop what a skipped optimizer step has left behind
            self.quantized, self.quantized_step = [], micro_step.step
        self.quantized.append((out["features"].detach(), out["ids"].flatten()))

        decoded = out["images"].float()
        terms = {"l1": F.l1_loss(decoded, images), "l2": F.mse_loss(decoded, images)}
        weights = {"l1": config.l1, "l2": config.l2}
        if self.perceptual is not None:
            terms["perceptual"], weights["perceptual"] = self.perceptual(decoded, images), config.perceptual
        reconstruction = cast(Tensor, sum(weights[name] * term for name, term in terms.items()))
        terms["commitment"] = out["commitment"]
        loss = reconstruction + config.commitment * out["commitment"]
        if self.model.discriminator is not None:
            loss = loss + out["discriminator"]
        if adversarial:
            weight = torch.full((), config.adversarial, device=loss.device)
            if config.adversarial_balance == "adaptive":
                weight = weight * self._gradient_ratio(reconstruction, out["adversarial"])
            loss = loss + weight * out["adversarial"]
            terms |= {name: out[name] for name in ("adversarial", "discriminator")}
            terms["adversarial_weight"] = weight
        return {"loss": loss, **terms, "psnr": psnr(decoded.detach(), images).mean()}

    def _gradient_ratio(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """Return how much larger the gradient of the first term is at the decoder's last layer (VQGAN, Eq. 7)."""
        last_layer = self.model.tokenizer.decoder.conv_out.weight
        norms = [
            cast(Tensor, reduce(torch.autograd.grad(term, last_layer, retain_graph=True)[0].float(), "mean")).norm()
            for term in (reconstruction, adversarial)
        ]
        return (norms[0] / (norms[1] + 1e-4)).clamp_max(MAX_GRADIENT_RATIO)

    @torch.no_grad()
    def after_step(self, model: nn.Module, micro_step: MicroStep, accelerator: Accelerator) -> dict[str, Tensor]:
        """Update the codebook with the features of all processes and micro-steps; all processes get the same one."""
        training = cast(TokenizerTraining, model)
        counts, sums = (accelerator.reduce(part, "sum") for part in training.statistics(self.quantized))
        # Candidates come from the features of all processes, so that they do not depend on the number of processes.
        features, _ = self.quantized[-1]
        tokens = len(features) // (micro_step.rows.stop - micro_step.rows.start)
        order = torch.randperm(micro_step.batch * tokens, generator=micro_step.generator("revive"))
        chosen = order[torch.arange(len(counts)) % len(order)].to(features.device)
        candidates = accelerator.reduce(_local_rows(features, chosen - micro_step.rows.start * tokens), "sum")
        self.quantized = []
        return training.update_codebook(counts, sums, candidates, self.config.codebook_decay, self.config.revive_after)

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Show images beside their reconstructions."""
        tokenizer = cast(TokenizerTraining, model).tokenizer
        images = self.examples.to(tokenizer.quantize.embedding.weight.device)
        decoded = tokenizer.decode(tokenizer.lookup(tokenizer.encode(images)))
        return {"recon": torch.cat([images, decoded.float()], 3).clamp(0, 1)}

    def measure(self, model: nn.Module, evaluation: Evaluation) -> dict[str, float]:
        """Return PSNR, use of the codebook, and the distance of reconstructions to the images."""
        tokenizer = cast(TokenizerTraining, model).tokenizer
        counts = torch.zeros(tokenizer.config.codebook, device=tokenizer.quantize.embedding.weight.device)
        ratios = []
        for images in evaluation.batches():
            ids = tokenizer.encode(images)
            counts += ids.flatten().bincount(minlength=len(counts))
            ratios.append(psnr(tokenizer.decode(tokenizer.lookup(ids)).float(), images))
        usage, perplexity = codebook_use(evaluation.total(counts))
        return {
            "val_psnr": evaluation.gather(torch.cat(ratios) if ratios else torch.empty(0)).mean().item(),
            "val_usage": usage.item(),
            "val_perplexity": perplexity.item(),
            **evaluation.compare_reconstructed(lambda x: tokenizer.decode(tokenizer.lookup(tokenizer.encode(x)))),
        }

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(cast(TokenizerTraining, model).tokenizer, path)


class TokenizerTraining(nn.Module):
    """A tokenizer with what only its training needs: the averages behind the codebook, and a discriminator."""

    count: Tensor  # Float[K], moving average of the uses of each code
    total: Tensor  # Float[K,D], moving average of the sums of features behind each code
    idle: Tensor  # Long[K], steps since the last use of each code

    def __init__(self, tokenizer: Tokenizer, discriminator: PatchDiscriminator | None = None):
        super().__init__()
        self.tokenizer, self.discriminator = tokenizer, discriminator
        # The codes are averages and get no gradient. As a buffer they are saved, and restored when a step is skipped.
        embedding = tokenizer.quantize.embedding
        codes = embedding.weight.detach().clone()
        del embedding.weight
        embedding.register_buffer("weight", codes)
        self.register_buffer("count", torch.zeros(len(codes)))
        self.register_buffer("total", torch.zeros_like(codes))
        self.register_buffer("idle", torch.full((len(codes),), NEVER_USED))

    def forward(self, images: Tensor, adversarial: bool = False) -> dict[str, Tensor]:
        """Quantize and decode images; the gradient passes straight through the quantization.

        Args:
            images: Float[B,3,H,W] in [0,1].
            adversarial: whether the discriminator scores the decoded images.

        Returns:
            "images" Float[B,3,H,W] (decoded), "features" Float[B*N,D], "ids" Long[B,N], and the scalar losses
            "commitment", "adversarial" (if asked for) and "discriminator" (if there is one).
        """
        h = self.tokenizer.encoder(images).float()
        ids = self.tokenizer.quantize.nearest_ids(h.detach())
        codes = to_feature_map(self.tokenizer.quantize.embedding(ids), h.shape[2:])
        out = {"features": h.flatten(2).transpose(1, 2).flatten(0, 1), "ids": ids, "commitment": F.mse_loss(h, codes)}
        out["images"] = self.tokenizer.decode(h + (codes - h).detach())
        if self.discriminator is not None and adversarial:
            frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            out["adversarial"] = -functional_call(self.discriminator, frozen, (out["images"],)).float().mean()
            scores = self.discriminator(torch.cat([images, out["images"].detach().to(images.dtype)]))
            out["discriminator"] = hinge_loss(*scores.chunk(2))
        elif self.discriminator is not None:  # data-parallel wrappers expect a gradient for each parameter
            zeros = (0 * value.sum() for value in self.discriminator.parameters())
            out["discriminator"] = cast(Tensor, sum(zeros))
        return out

    def statistics(self, quantized: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Count the uses of each code, Float[K], and sum the features quantized to it, Float[K,D].

        quantized: pairs of features Float[M,D] and ids Long[M].
        """
        counts, sums = torch.zeros_like(self.count), torch.zeros_like(self.total)
        for features, ids in quantized:
            # A matrix product, because on GPUs index_add_ sums in a different order each time.
            one_hot = F.one_hot(ids, len(counts)).to(features.dtype)
            counts += one_hot.sum(0)
            sums += one_hot.T @ features
        return counts, sums

    def update_codebook(
        self, counts: Tensor, sums: Tensor, candidates: Tensor, decay: float, revive_after: int | None
    ) -> dict[str, Tensor]:
        """Update the moving averages, move unused codes to their candidates, and return the codebook's metrics.

        Args:
            counts: Float[K], uses of each code.
            sums: Float[K,D], sums of the features quantized to each code.
            candidates: Float[K,D], encoder outputs.
            decay: of the moving averages.
            revive_after: steps without use after which a code moves; None: only codes that were never used.
        """
        codes = cast(Tensor, self.tokenizer.quantize.embedding.weight)
        self.count.lerp_(counts, 1 - decay)
        self.total.lerp_(sums, 1 - decay)
        # An unused code keeps its place. Its count and total shrink together until their ratio is only noise.
        vanished = self.count <= torch.finfo(self.count.dtype).tiny / (1 - decay)
        codes.copy_(torch.where(vanished[:, None], codes, self.total / self.count[:, None]))
        used = counts > 0
        self.idle.copy_(torch.where(used, 0, self.idle + 1))
        dead = self.idle >= (NEVER_USED if revive_after is None else revive_after)
        codes.copy_(torch.where(dead[:, None], candidates, codes))
        for average in (self.count, self.total, self.idle):
            average.masked_fill_(dead if average.ndim == 1 else dead[:, None], 0)
        usage, perplexity = codebook_use(counts)
        return {"usage": usage, "perplexity": perplexity, "revived": dead.float().sum()}


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each decoded image in dB: Float[B,3,H,W] twice -> Float[B]."""
    squared_error = (decoded.clamp(0, 1) - images).square().mean((1, 2, 3))
    return -10 * squared_error.clamp_min(1e-10).log10()


def codebook_use(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of the codes that are used and the perplexity, by how often each is used, Float[K]."""
    share = counts / counts.sum()
    return (counts > 0).float().mean(), torch.special.entr(share).sum().exp()


def _local_rows(features: Tensor, rows: Tensor) -> Tensor:
    """Return rows of Float[M,D] features; zeros for rows out of range, which other processes hold."""
    inside = (rows >= 0) & (rows < len(features))
    return features[rows.clamp(0, len(features) - 1)] * inside[:, None]
