"""The tokenizer and the predictor that `addp pretrain` builds on: given, or trained first, as `stages` says, in
subfolders of the run.
"""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from addp_core.base.errors import UserError, naming_key
from addp_core.base.paths import FINISHED_FILE, MODEL_FILE
from addp_core.method.addp import Denoiser
from addp_core.recipes.config import find_recipe, load, recipes_of
from addp_core.training.best import check_keep_best
from addp_core.training.optimization import check_layer_decay
from addp_core.training.run_folder import changes_of_run, has_results
from addp_core.training.submission import check_training
from addp_core.weights.mage import tokenizer_in_recipe
from pretrain import predictor as predictor_stage
from pretrain import tokenizer as tokenizer_stage
from pretrain.common import token_grid
from pretrain.evaluation import possible_metrics
from pretrain.initial_weights import load_initial_denoiser, load_initial_predictor
from pretrain.recipe import PretrainRecipe

FROZEN_STAGES: dict[str, ModuleType] = {"tokenizer": tokenizer_stage, "predictor": predictor_stage}
TRAINED = {"tokenizer": tokenizer_stage.TokenizerTraining, "predictor": predictor_stage.MaskedTokenModel}
MEASURED = {
    "tokenizer": tokenizer_stage.TokenizerStage.measured,
    "predictor": predictor_stage.PredictorStage.measured,
}
FROM_RECIPE = ("out.", "tokenizer.", "data.", "evaluation.")  # keys that a stage has from the recipe of the pretraining
PUBLISHED = {
    "tokenizer": "the published vqgan_jax_strongaug.ckpt, Google Drive id 13S_unB87n6KKuuMdyMnyExW0G1kplTbP",
    "predictor": "the published mage-vitb-1600.pth / mage-vitl-1600.pth, Google Drive ids "
    "1Q6tbt3vF0bSrv5sPrjpFu8ksG3vTsVX2 / 15xBPa8EIa0IRUiRYtXiYOC9JZVyMIFrB",
}


# -------------------- checks, before anything is trained


def check_frozen_parts(recipe: PretrainRecipe) -> None:
    """Raise UserError for whatever is missing to load or train both parts, before the first of them starts to train.

    What the run has trained on a part fixes that part: it stays as it is, and another recipe for it is refused.
    """
    if recipe.predictor and not recipe.tokenizer:  # one that is trained now would have other ids
        named = tokenizer_in_recipe(recipe.predictor)
        hint = f"; its recipe says tokenizer={named}" if named else ", which may be in the same file"
        raise UserError(
            f"tokenizer: found none beside predictor={recipe.predictor}; expected tokenizer=<the one that this "
            f"predictor was trained on>{hint}"
        )
    for part in FROZEN_STAGES:
        if getattr(recipe, part):
            continue
        if not recipe.stages:
            raise UserError(
                f"{part}: not given; expected {part}=<file or run> ({PUBLISHED[part]}), "
                "or stages=tiny to train one on these images first"
            )
        folder, fixed = own_folder(recipe, part), _is_fixed(recipe, part)
        try:
            _find_recipe(recipe, part)
        except UserError:
            if fixed and is_finished(folder):
                continue
            raise
        stage = _own_stage(recipe, part)
        if fixed and (changes := changes_of_run(folder, stage, FROM_RECIPE)):
            parts = list(FROZEN_STAGES)
            keep = " ".join(f"{each}={own_folder(recipe, each)}" for each in parts[: parts.index(part) + 1])
            raise UserError(
                f"stages: {frozen_stage_name(recipe, part)} is another recipe than that of {folder}, on which the next "
                f"stage has been trained: {changes}; put the keys back, give {keep} to keep it, or choose another "
                "out"
            )


def check_before_training(recipe: PretrainRecipe) -> None:
    """Raise UserError for what would stop a later stage, if an earlier one has to be trained before it."""
    parts = [part for part in FROZEN_STAGES if not getattr(recipe, part) and not is_finished(own_folder(recipe, part))]
    stages = {part: _own_stage(recipe, part) for part in parts}
    for part, stage in stages.items():
        with naming_key(f"stages: {frozen_stage_name(recipe, part)}, as recipe of the {part}"):
            check_training(recipe, stage.train)
            check_layer_decay(TRAINED[part], stage.train)
            check_keep_best(stage.train.keep_best, possible_metrics(stage.evaluation, MEASURED[part]))
    if "tokenizer" in stages and "predictor" in stages:  # if the tokenizer is there, the predictor begins at once
        with naming_key(f"stages: {frozen_stage_name(recipe, 'predictor')}, as recipe of the predictor"):
            load_initial_predictor(stages["predictor"], token_grid(stages["tokenizer"].model, recipe.data))
    if stages:
        check_training(recipe)
        check_layer_decay(Denoiser, recipe.train)
        load_initial_denoiser(recipe)


# -------------------- their training


def train_frozen_part(recipe: PretrainRecipe, part: str, **settings: str) -> str:
    """Train the tokenizer or predictor on the same images in `<out>/<part>` unless it is finished; return its file."""
    folder = own_folder(recipe, part)
    if not (_is_fixed(recipe, part) and is_finished(folder)):
        FROZEN_STAGES[part].run(frozen_stage_recipe(recipe, part, out=str(folder), **settings))
    return str(folder / MODEL_FILE)


def own_folder(recipe: PretrainRecipe, part: str) -> Path:
    """Return the folder in which the run trains the tokenizer or predictor if it is not given."""
    return Path(recipe.out) / part


def is_finished(folder: Path) -> bool:
    """Check whether a run has ended in a folder, whatever its recipe was."""
    return (folder / FINISHED_FILE).exists() and (folder / MODEL_FILE).exists()


def _is_fixed(recipe: PretrainRecipe, part: str) -> bool:
    """Check whether a later stage of the run has begun: it needs the weights that it was begun with."""
    later = [Path(recipe.out)] if part == "predictor" else [own_folder(recipe, "predictor"), Path(recipe.out)]
    return any(map(has_results, later))


def _own_stage(recipe: PretrainRecipe, part: str) -> Any:
    """Return the recipe that trains a part in the run's own folder."""
    tokenizer = recipe.tokenizer or str(own_folder(recipe, "tokenizer") / MODEL_FILE)
    settings = {} if part == "tokenizer" else {"tokenizer": tokenizer}
    return frozen_stage_recipe(recipe, part, out=str(own_folder(recipe, part)), **settings)


def frozen_stage_recipe(recipe: PretrainRecipe, part: str, **settings: str) -> Any:
    """Return the recipe that trains the tokenizer or predictor on the images of this recipe, with its evaluation and
    trackers.

    settings: its required keys, which may be empty if it is only looked at.
    """
    module = FROZEN_STAGES[part]
    required = [f"{key}=-" for key in settings]  # not their values, of which the command line would refuse empty ones
    stage = load(module.Recipe, _find_recipe(recipe, part), required, recipes_of(module))
    data = recipe.data.without_tokens() if part == "tokenizer" else recipe.data
    shown = {key: getattr(recipe.train, key) for key in ("trackers", "tracker_project")}
    section = replace(stage.train, **shown)
    return replace(stage, **settings, data=data, evaluation=recipe.evaluation, train=section, launch="local")


def _find_recipe(recipe: PretrainRecipe, part: str) -> Path:
    """Return the file of the recipe that trains the tokenizer or predictor. Raises UserError if there is none."""
    with naming_key("stages"):
        return find_recipe(FROZEN_STAGES[part], frozen_stage_name(recipe, part))


def frozen_stage_name(recipe: PretrainRecipe, part: str) -> str:
    """Return the name or the file of the recipe that trains the tokenizer or predictor."""
    folder = Path(recipe.stages)
    return str(folder / f"{part}.yaml") if folder.is_dir() else recipe.stages
