"""Stage 3: `addp pretrain` trains ADDP with a frozen tokenizer and a frozen token predictor (Sec. 3.3, App. D.1).

If one of these two is not given and the recipe sets `stages`, it is trained first, in a subfolder of the run.
"""

from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.data.stream import Batch
from addp_core.method.addp import ADDP, ADDPConfig
from addp_core.method.diffusion import InputRows, draw_input_rows, draw_masks
from addp_core.method.sampler import sample
from addp_core.networks.cnn import CnnGridEncoder
from addp_core.networks.encoder import Encoder
from addp_core.networks.layers import checkpoint_blocks
from addp_core.networks.predictor import TokenPredictor
from addp_core.networks.tokenizer import Tokenizer
from addp_core.training.batch_norm import average_statistics, synchronize_batch_norms
from addp_core.training.stage import MicroStep
from addp_core.weights.architectures import recipe_heads
from addp_core.weights.fingerprint import fingerprint
from addp_core.weights.loading import load_predictor
from addp_core.weights.saving import save_model
from pretrain.common import load_frozen_tokenizer, run_stage
from pretrain.evaluation import EvaluatedStage, Evaluation, Measured
from pretrain.frozen_stages import check_before_training, check_frozen_parts, is_finished, train_frozen_part
from pretrain.initial_weights import load_initial_denoiser, start_from, warn_of_other_ids
from pretrain.recipe import PretrainRecipe as Recipe
from pretrain.tokens import TokenBatch

PREVIEW_IMAGES = 16


def run(recipe: Recipe) -> None:
    """Pretrain, or continue; ends with `<out>/model.safetensors`, which all other verbs read."""
    check_frozen_parts(recipe)
    if not is_finished(Path(recipe.out)):
        check_before_training(recipe)
    run_stage(recipe, lambda source: build_stage(recipe), PretrainStage.measured)


def build_stage(recipe: Recipe) -> "PretrainStage":
    """Return the stage; the frozen parts that are not given are trained first."""
    tokenizer_source = recipe.tokenizer or train_frozen_part(recipe, "tokenizer")
    predictor_source = recipe.predictor or train_frozen_part(recipe, "predictor", tokenizer=tokenizer_source)
    return PretrainStage(build(recipe, tokenizer_source, predictor_source), recipe.draw)


def build(recipe: Recipe, tokenizer_source: str, predictor_source: str) -> ADDP:
    """Return ADDP with both frozen parts loaded and the denoiser of `init`, or a randomly initialized one.

    Raises UserError if the predictor and the tokenizer do not belong together.
    """
    tokenizer, predictor = load_frozen_parts(recipe, tokenizer_source, predictor_source)
    torch.manual_seed(recipe.train.seed)
    config = ADDPConfig(
        recipe.data.hw, tokenizer.config, predictor.vocabulary, predictor.config, recipe.model, recipe.process
    )
    model = ADDP(config)
    assert model.predictor is not None
    model.tokenizer.load_state_dict(tokenizer.state_dict())
    model.predictor.load_state_dict(predictor.state_dict())
    if start := load_initial_denoiser(recipe):
        start_from(model.denoiser, start.denoiser, recipe.init)
        warn_of_other_ids(fingerprint(start.tokenizer), fingerprint(tokenizer), recipe.init, tokenizer_source)
    checkpoint_blocks(model.denoiser, recipe.train.checkpointing)
    if isinstance(model.denoiser.encoder, CnnGridEncoder):  # which has no such blocks
        model.denoiser.encoder.checkpointing = recipe.train.checkpointing
    return model


def load_frozen_parts(recipe: Recipe, tokenizer_source: str, predictor_source: str) -> tuple[Tokenizer, TokenPredictor]:
    """Load the tokenizer and the predictor for the images of a recipe.

    Raises UserError if they cannot be read, do not fit the size of the images, or do not belong together.
    """
    tokenizer, grid = load_frozen_tokenizer(tokenizer_source, recipe.data)
    predictor = load_predictor(predictor_source, grid, **recipe_heads(recipe))
    if predictor.vocabulary.codebook != tokenizer.config.codebook:
        raise UserError(
            f"predictor: {predictor_source} predicts {predictor.vocabulary.codebook} codes, "
            f"but the tokenizer {tokenizer_source} has {tokenizer.config.codebook}; "
            "expected a predictor trained on this tokenizer"
        )
    if predictor.trained_on not in ("", fingerprint(tokenizer)):
        raise UserError(
            f"predictor: {predictor_source} was trained on another tokenizer than {tokenizer_source}; "
            "expected the tokenizer it was trained on, or a predictor trained on this one"
        )
    return tokenizer, predictor


class PretrainStage(EvaluatedStage):
    """Trains the denoiser on images that the frozen parts corrupt."""

    name = "pretrain"
    measured = Measured({"val_loss": False}, encoder=True, images=True)

    def __init__(self, addp: ADDP, draw: str = "batch"):
        assert addp.predictor is not None
        self.addp, self.model, self.frozen = addp, addp.denoiser, [addp.tokenizer, addp.predictor]
        self.one_ratio_per_batch = draw == "batch"
        synchronize_batch_norms(self.model)  # a ViT has none

    def loss(self, model: nn.Module, batch: Batch | TokenBatch, micro_step: MicroStep) -> dict[str, Tensor]:
        """Compute the loss of one training step (Sec. 3.3). `model` is the denoiser as the engine wrapped it."""
        addp, shared = self.addp, self.one_ratio_per_batch
        mask_rows = micro_step.batch if shared else len(batch)
        rows = micro_step.rows if shared else slice(None)
        generator = micro_step.generator("mask", shared=shared)
        masks = draw_masks(addp.config.process, mask_rows, addp.config.tokens, generator)
        mask, next_mask = (m[rows] for m in masks)
        drawn = draw_input_rows(addp.config.process, mask_rows, micro_step.generator("inputs", shared=shared))
        inputs = None if drawn is None else InputRows(*(each[rows] for each in drawn))
        if isinstance(batch, TokenBatch):
            loss = addp.loss_of_ids(model, batch.ids, mask, next_mask, inputs)
        else:
            loss = addp.training_loss(model, batch.images, mask, next_mask, inputs)
        return {"loss": loss, "mask_ratio": mask.float().mean()}

    def after_step(self, model: nn.Module, micro_step: MicroStep, accelerator: Accelerator) -> dict[str, Tensor]:
        """Average the moving statistics of a CNN between the processes."""
        average_statistics(model, accelerator)
        return {}

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Generate images with the paper's sampler, always from the same seed."""
        return {"sample": sample(self._with_denoiser(model), PREVIEW_IMAGES)}

    def measure(self, model: nn.Module, evaluation: Evaluation) -> dict[str, float]:
        """Return the loss, probes of the encoder, and the distance of generated images to real ones."""
        addp, process = self._with_denoiser(model), self.addp.config.process
        masks = evaluation.rows(lambda n, drawn: draw_masks(process, n, addp.config.tokens, drawn), "mask")
        sums, start = torch.zeros(2, device=addp.denoiser.mean.device), 0  # of the loss at masked ids; their number
        for images in evaluation.batches():
            mask, next_mask = (each[start : start + len(images)] for each in masks)
            loss = addp.loss_of_ids(model, addp.encode_images(images), mask, next_mask)
            sums += torch.stack([loss.float(), loss.new_ones(()).float()]) * mask.sum()
            start += len(images)
        total, count = evaluation.total(sums).tolist()
        return {
            "val_loss": total / count,
            **evaluation.probe(transfer_encoder(addp.denoiser.encoder)),
            **evaluation.compare_generated(lambda first, n: sample(addp, n, first=first, batch=n)),
        }

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(self._with_denoiser(model), path)

    def _with_denoiser(self, denoiser: nn.Module) -> ADDP:
        """Return ADDP with another denoiser, such as the one with averaged weights; nothing is copied."""
        addp = copy(self.addp)
        addp._modules = {**self.addp._modules, "denoiser": denoiser}
        return addp


def transfer_encoder(encoder: Encoder | CnnGridEncoder) -> Encoder | CnnGridEncoder:
    """Return the encoder, with the same weights, as transfers use it by default: without ADDP's input norm.

    A CNN stays as pretraining dilates it.
    """
    if isinstance(encoder, CnnGridEncoder):
        return encoder
    encoder = copy(encoder)
    encoder.config = replace(encoder.config, tokenizer_norm=encoder.config.pre_norm)
    return encoder
