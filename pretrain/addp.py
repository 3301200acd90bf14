"""Stage 3: `addp pretrain` trains ADDP over a frozen tokenizer and a frozen token predictor (Sec. 3.3, App. D.1).

Where one of the two is not given and the recipe names `stages`, it is trained first, into a folder of its own within
the run.
"""

from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from addp_core.base.errors import UserError
from addp_core.data.config import DataConfig
from addp_core.data.images import pretrain_transform
from addp_core.data.sources import open_source
from addp_core.data.stream import Batch, Stream
from addp_core.method.addp import ADDP, ADDPConfig, DenoiserConfig
from addp_core.method.diffusion import ProcessConfig, draw_masks
from addp_core.method.sampler import sample
from addp_core.recipes.config import dump, find_recipe, load
from addp_core.training.engine import Draw, Stage, TrainConfig, prepare_out, train
from addp_core.weights.checkpoint import (
    MODEL_FILE,
    fingerprint,
    load_predictor,
    load_tokenizer,
    save_model,
    stated_heads,
)
from pretrain import predictor as predictor_stage
from pretrain import tokenizer as tokenizer_stage

PREVIEWS = 16  # generated images in a preview
PUBLISHED = {
    "tokenizer": "the published vqgan_jax_strongaug.ckpt, Google Drive id 13S_unB87n6KKuuMdyMnyExW0G1kplTbP",
    "predictor": "the published mage-vitb-1600.pth / mage-vitl-1600.pth, Google Drive ids "
    "1Q6tbt3vF0bSrv5sPrjpFu8ksG3vTsVX2 / 15xBPa8EIa0IRUiRYtXiYOC9JZVyMIFrB",
}


@dataclass
class Recipe:
    """Keys of `addp pretrain`."""

    out: Annotated[str, "run folder"]
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: Annotated[str, "a run of `addp tokenizer`, a VQGAN file, or hf://owner/repository/file"] = ""
    predictor: Annotated[str, "a run of `addp predictor`, a MAGE file, or hf://owner/repository/file"] = ""
    stages: Annotated[
        str,
        "what trains the parts that are not given: the name of a recipe of `addp tokenizer` and `addp predictor`, "
        "or a folder with tokenizer.yaml and predictor.yaml",
    ] = ""
    predictor_heads: Annotated[int | None, Ge(1), "of a MAGE file whose heads are not width/64"] = None
    predictor_decoder_heads: Annotated[int | None, Ge(1), "of a MAGE file whose decoder heads are not 16"] = None
    model: DenoiserConfig = field(default_factory=DenoiserConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    draw: Annotated[
        Literal["batch", "process"],
        "one mask ratio for the whole batch (the same numbers on any number of processes), "
        "or one on each process (as published)",
    ] = "batch"
    train: TrainConfig = field(default_factory=TrainConfig)


def run(recipe: Recipe) -> None:
    """Pretrain, or continue; ends with `<out>/model.safetensors`, which feeds every other verb."""
    text = dump(recipe)
    if prepare_out(recipe.out, text):
        return
    source = open_source(recipe.data)
    _check_parts(recipe)
    tokenizer_source = recipe.tokenizer or _train_part(recipe, "tokenizer")
    predictor_source = recipe.predictor or _train_part(recipe, "predictor", tokenizer=tokenizer_source)
    model = build(recipe, tokenizer_source, predictor_source)
    stage = PretrainStage(model, recipe.draw)
    stream = Stream(
        source, pretrain_transform(recipe.data), recipe.data, seed=recipe.train.seed, batch=recipe.train.micro_batch
    )
    train(stage, stream, recipe.train, recipe.out, text)


def build(recipe: Recipe, tokenizer_source: str, predictor_source: str) -> ADDP:
    """The model with both frozen parts loaded and the denoiser freshly drawn from the seed."""
    tokenizer = load_tokenizer(tokenizer_source)
    grid = tokenizer_stage.token_grid(tokenizer.config, recipe.data)
    predictor = load_predictor(predictor_source, grid, **stated_heads(recipe))
    if predictor.vocabulary.codebook != tokenizer.config.codebook:
        raise UserError(
            f"predictor: {predictor_source} predicts {predictor.vocabulary.codebook} codes, "
            f"but the tokenizer {tokenizer_source} has {tokenizer.config.codebook}; "
            "expected a predictor trained on this tokenizer"
        )
    if predictor.trained_on not in ("", fingerprint(tokenizer)):
        raise UserError(
            f"predictor: {predictor_source} was trained on another tokenizer than {tokenizer_source}; "
            "expected the one it knows, or a predictor trained anew"
        )
    torch.manual_seed(recipe.train.seed)
    config = ADDPConfig(
        recipe.data.hw, tokenizer.config, predictor.vocabulary, predictor.config, recipe.model, recipe.process
    )
    model = ADDP(config)
    model.tokenizer.load_state_dict(tokenizer.state_dict())
    model.predictor.load_state_dict(predictor.state_dict())
    return model


class PretrainStage(Stage):
    """What the engine trains: the denoiser, on images that the frozen parts corrupt."""

    name = "pretrain"

    def __init__(self, addp: ADDP, draw: str = "batch"):
        self.addp, self.model, self.frozen = addp, addp.denoiser, [addp.tokenizer, addp.predictor]
        self.shared = draw == "batch"

    def loss(self, model: nn.Module, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """One training step of Sec. 3.3. `model` is the denoiser as the engine wrapped it."""
        addp, device = self.addp, batch.images.device
        rows = draw.rows if self.shared else slice(None)
        drawn = draw.batch if self.shared else len(batch.images)
        masks = draw_masks(addp.config.process, drawn, addp.config.tokens, draw.generator("mask", shared=self.shared))
        mask, next_mask = (m[rows].to(device) for m in masks)
        ids = addp.encode_images(batch.images)
        corrupted = addp.corrupt(ids, mask, next_mask)
        return {"loss": model(corrupted.images, ids, mask, corrupted.target), "mask_ratio": mask.float().mean()}

    def preview(self, model: nn.Module, step: int) -> dict[str, Tensor]:
        """Images generated with the paper's sampler, always from the same seed."""
        return {"sample": sample(self._with(model), PREVIEWS)}

    def export(self, model: nn.Module, path: Path) -> None:
        save_model(self._with(model), path)

    def _with(self, denoiser: nn.Module) -> ADDP:
        """The model around the denoiser at hand, which may be the one with averaged weights; nothing is copied."""
        addp = copy(self.addp)
        addp._modules = {**self.addp._modules, "denoiser": denoiser}
        return addp


STAGES = {"tokenizer": tokenizer_stage, "predictor": predictor_stage}


def _check_parts(recipe: Recipe) -> None:
    """Find what is missing before the first stage starts to train."""
    for part in STAGES:
        if getattr(recipe, part):
            continue
        if not recipe.stages:
            raise UserError(
                f"{part}: not given; expected {part}=<file or run> ({PUBLISHED[part]}), "
                "or stages=tiny to train one on these images first"
            )
        _stage_recipe(recipe, part, out="", **({} if part == "tokenizer" else {"tokenizer": ""}))


def _train_part(recipe: Recipe, part: str, **given: str) -> str:
    """Train the tokenizer or predictor on the same images into `<out>/<part>` (or continue, or find it finished)."""
    out = Path(recipe.out) / part
    STAGES[part].run(_stage_recipe(recipe, part, out=str(out), **given))
    return str(out / MODEL_FILE)


def _stage_recipe(recipe: Recipe, part: str, **settings: str) -> Any:
    """The recipe of an earlier stage, on this recipe's images."""
    module, folder = STAGES[part], Path(recipe.stages)
    try:
        path = folder / f"{part}.yaml" if folder.is_dir() else find_recipe(module, recipe.stages)
    except UserError as error:
        raise UserError(f"stages: {error}") from error
    return replace(load(module.Recipe, path, [f"{key}={value}" for key, value in settings.items()]), data=recipe.data)
