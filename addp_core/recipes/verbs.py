"""The verbs of the command line.

Each verb names the module whose `Recipe` it reads and whose `run(recipe)` it calls. A module is imported when its verb
runs. Help and the checks of a recipe need its dataclass alone, which lies in a module without torch if the verb's
imports torch: that takes seconds.
"""

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

VERBS = {  # verb: (module, one line of help)
    "tokenizer": ("pretrain.tokenizer", "stage 1: train a VQGAN tokenizer on your images"),
    "tokenizer cache": ("pretrain.cache_tokens", "compute the ids of crops once, for data.tokens of the later stages"),
    "predictor": ("pretrain.predictor", "stage 2: train a token predictor (MAGE) on the tokenizer's ids"),
    "pretrain": ("pretrain.addp", "stage 3: train ADDP with a frozen tokenizer and token predictor"),
    "mae": ("pretrain.mae", "train MAE, the baseline of pixel encoders, on the same images"),
    "generate": ("gen.generate", "generate images and a grid of them"),
    "inpaint": ("gen.inpaint", "fill a hole in an image, or extend an image beyond its borders"),
    "figures": ("gen.figures", "draw the paper's figures for a checkpoint"),
    "app": ("gen.app", "generate, inpaint, see features and watch runs on a local web page"),
    "evaluate": ("gen.evaluate", "measure FID, IS, precision, recall and KID of generated images"),
    "finetune": ("cls.finetune", "fine-tune the encoder for image classification"),
    "linprobe": ("cls.linprobe", "train a linear classifier on the frozen encoder, as published or in minutes"),
    "robustness": ("cls.robustness", "measure a fine-tuned classifier on ImageNet-A, -R, -Sketch and -C"),
    "det train": ("det.train", "train ViTDet's Mask R-CNN on COCO"),
    "det eval": ("det.eval", "measure the average precision of boxes and masks on COCO"),
    "det predict": ("det.predict", "draw boxes, masks and scores on a folder of images"),
    "det cost": ("det.cost", "measure time and memory of a detector's training step"),
    "seg train": ("seg.train", "train UperNet on ADE20K"),
    "seg test": ("seg.test", "measure the mIoU of a trained segmentor, or of class maps on disk"),
    "seg predict": ("seg.predict", "draw class maps beside a folder of images"),
    "seg probe": ("seg.probe", "measure mIoU of linear and k-NN probes on the patches of a frozen encoder"),
    "seg cost": ("seg.cost", "measure time and memory of a segmentor's training step and test crop"),
    "bench": ("tools.bench.bench", "run every benchmark on one checkpoint or several, into one table and report"),
    "sweep": ("tools.bench.sweep", "compare initializations with the same small grid and seeds for each"),
    "report": ("tools.bench.report", "write report.html and report.md of a bench folder"),
    "throughput": ("tools.speed.throughput", "measure images/s, GFLOP, MFU and memory, part by part"),
    "data": ("tools.datasets.data", "download, verify and unpack a public dataset"),
    "toy": ("tools.toy.toy", "write small datasets in the formats of ImageNet, COCO and ADE20K"),
    "export": ("tools.export.export", "write a checkpoint in another layout"),
    "completion": ("tools.completion.completion", "print the completion of this command line for bash, zsh or fish"),
    "doctor": ("tools.doctor", "show what is installed and what tasks lack, or check that this machine computes right"),
}

# Verbs that run without arguments; their errors are of what they do, and no reason to show command lines.
NEED_NO_ARGUMENTS = frozenset({"doctor", "throughput", "det cost", "seg cost"})

# Verbs that run as one process, whatever the environment says; `bench` and `sweep` start the processes of others.
ONE_PROCESS = {
    "app",
    "det cost",
    "seg cost",
    "bench",
    "sweep",
    "report",
    "throughput",
    "data",
    "toy",
    "export",
    "completion",
    "doctor",
}

RECIPES = {  # verb: the dataclass of its recipe, if its module imports torch
    "tokenizer": "pretrain.recipe:TokenizerRecipe",
    "tokenizer cache": "pretrain.recipe:TokenCacheRecipe",
    "predictor": "pretrain.recipe:PredictorRecipe",
    "pretrain": "pretrain.recipe:PretrainRecipe",
    "mae": "pretrain.recipe:MaeRecipe",
    "generate": "gen.recipe:GenerateRecipe",
    "inpaint": "gen.recipe:InpaintRecipe",
    "figures": "gen.recipe:FiguresRecipe",
    "app": "gen.recipe:AppRecipe",
    "evaluate": "gen.recipe:EvaluateRecipe",
    "finetune": "cls.recipe:FinetuneRecipe",
    "linprobe": "cls.probing.recipe:Recipe",
    "robustness": "cls.variants.recipe:Recipe",
    "det train": "det.recipe:TrainRecipe",
    "det eval": "det.recipe:EvalRecipe",
    "det predict": "det.recipe:PredictRecipe",
    "det cost": "det.recipe:CostRecipe",
    "seg train": "seg.recipe:TrainRecipe",
    "seg test": "seg.recipe:TestRecipe",
    "seg predict": "seg.recipe:PredictRecipe",
    "seg probe": "seg.probing.recipe:Recipe",
    "seg cost": "seg.recipe:CostRecipe",
    "bench": "tools.bench.plan:Recipe",
    "throughput": "tools.speed.recipe:Recipe",
    "toy": "tools.toy.recipe:Recipe",
    "export": "tools.export.recipe:Recipe",
}

_reading_recipe = False


def recipe_module(verb: str) -> ModuleType:
    """Return the verb's module or, if that would import torch, a stand-in with its docstring and its `Recipe` alone."""
    name = VERBS[verb][0]
    if verb not in RECIPES or name in sys.modules:
        return importlib.import_module(name)
    module_name, _, class_name = RECIPES[verb].partition(":")
    with _recipes_only():
        recipe = getattr(importlib.import_module(module_name), class_name)
        spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        module = ModuleType(name, ast.get_docstring(ast.parse(file.read())))
    module.__file__ = spec.origin
    module.Recipe = recipe  # type: ignore[attr-defined]
    return module


def verb_of(recipe: type) -> str:
    """Return the verb whose recipes are of this dataclass."""
    name = f"{recipe.__module__}:{recipe.__qualname__}"
    return next(
        verb for verb, (module, _) in VERBS.items() if name in (RECIPES.get(verb), f"{module}:{recipe.__qualname__}")
    )


@contextlib.contextmanager
def _recipes_only() -> Iterator[None]:
    global _reading_recipe
    before, _reading_recipe = _reading_recipe, "timm" not in sys.modules
    try:
        yield
    finally:
        _reading_recipe = before


def reading_recipe() -> bool:
    """Check whether a package is being imported for the keys of its verbs alone, by a process without timm."""
    return _reading_recipe


def verb_groups() -> dict[str, list[str]]:
    """Return the verbs of two words by their first word, if it is no verb itself: {'det': ['det train', ...], ...}."""
    groups: dict[str, list[str]] = {}
    for verb in VERBS:
        if " " in verb and verb.split()[0] not in VERBS:
            groups.setdefault(verb.split()[0], []).append(verb)
    return groups
