"""The model card of an export: what the model is, how to use it, its recipe, data, metrics, license and citation."""

import dataclasses
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.recipes.verbs import RECIPES, recipe_module
from addp_core.weights.reading import Weights, read_weights
from tools.bench.benchmarks import BENCHMARKS
from tools.export.compare import given_heads
from tools.export.recipe import Recipe

BENCH = "bench.json"
DESCRIPTIONS = {  # kind of a model: (in words, the Hub's task, the function that loads it)
    "addp": ("ADDP, for image generation and recognition", "unconditional-image-generation", "load_addp"),
    "classifier": ("An image classifier over ADDP's encoder", "image-classification", "load_classifier"),
    "encoder": ("An image encoder", "image-feature-extraction", "load_encoder"),
    "detector": ("A detector over ADDP's encoder", "object-detection", ""),
    "segmentor": ("A segmentor over ADDP's encoder", "image-segmentation", ""),
}


def write_card(recipe: Recipe, path: Path, timm: bool) -> None:
    """Write the model card; `timm` says whether timm reads the repository."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    weights = read_weights(recipe.model, "classifier", given_heads(recipe), wanted=recipe.weights)
    kind = weights.kind if recipe.layout != "encoder" else "encoder"
    description, task, loader = DESCRIPTIONS.get(kind, DESCRIPTIONS["encoder"])
    run = _run_folder(recipe.model)
    values = _shortened(yaml.safe_load((run / "recipe.yaml").read_text())) if run else {}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("model_card.md.j2").render(
        repository=recipe.push,
        description=f"{description}, exported by `addp export layout={recipe.layout}`. ADDP is "
        "[Alternating Denoising Diffusion Process](https://arxiv.org/abs/2306.05423) (ICLR 2024).",
        license=recipe.license,
        license_text=recipe.license or "The author of this repository has not stated a license of the weights.",
        library="timm" if timm else "addp",
        task=task,
        timm=timm,
        details=_details(weights, values, run),
        usage=_usage(recipe, loader, timm, weights),
        metrics=_metrics(recipe),
        verb=_verb(values),
        recipe=yaml.safe_dump(values, sort_keys=False).strip() if values else "",
    )
    write_atomically(path, text.encode())


def _details(weights: Weights, recipe: Mapping[str, Any], run: Path | None) -> list[tuple[str, str]]:
    """Return the rows of the first table."""
    parameters = sum(value.numel() for value in weights.state.values() if value.is_floating_point())
    rows = [("parameters", f"{parameters / 1e6:.1f} M")]
    encoder = getattr(weights.architecture, "encoder", weights.architecture)
    size = getattr(weights.architecture, "image_size", None) or getattr(encoder, "image_size", None)
    if size:
        rows.append(("image size", f"{size[0]} x {size[1]}"))
    if recipe:
        data = recipe.get("data", {})
        rows.append(("data", str(data.get("source") or data)))
        if isinstance(recipe.get("model"), str):  # not the architecture that a pretraining has under this key
            rows.append(("trained from", recipe["model"]))
    if run and (run / "finished.json").exists():
        finished = json.loads((run / "finished.json").read_text())
        rows.append(("steps", str(finished.get("step", "-"))))
    return rows


def _usage(recipe: Recipe, loader: str, timm: bool, weights: Weights) -> list[tuple[str, str]]:
    """Return (what it does, code) for the ways in which the repository can be used."""
    usage = []
    if recipe.layout in ("addp", "encoder", "timm") and loader:
        name = (
            "load_encoder"
            if recipe.layout == "encoder" or (recipe.layout == "timm" and loader == "load_addp")
            else loader
        )
        code = f'from addp_core import {name}\n\nmodel = {name}("hf://{recipe.push}")'
        if name == "load_addp":
            code += "\n\nfrom addp_core import sample\n\nimages = sample(model, 4)  # Float[4,3,H,W] in [0, 1]"
        usage.append(("With `addp`; `model=hf://" + recipe.push + "` in its commands:", code))
    if timm:
        code = f'import timm\n\nmodel = timm.create_model("hf-hub:{recipe.push}", pretrained=True).eval()\n'
        code += "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        what = "The encoder with" if weights.kind != "classifier" else "With"
        usage.append((f"{what} plain timm:", code))
    if not usage:
        code = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{recipe.push}")'
        usage.append((f"The files, in the layout {recipe.layout}:", code))
    return usage


# -------------------- the recipe of the run


def _run_folder(model: str) -> Path | None:
    """Return the folder of the run that a model belongs to, or None if it belongs to none."""
    path = Path(model)
    for folder in (path, *path.parents[:3]):
        if (folder / "recipe.yaml").is_file():
            return folder
    return None


def _shortened(value: Any) -> Any:
    """Return a recipe without what only concerns the machine: paths become their last parts."""
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items() if key not in ("out", "trackers")}
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    if isinstance(value, str) and "/" in value and not re.match(r"\w+://", value):
        return os.path.basename(value.rstrip("/"))
    return value


def _verb(recipe: Mapping[str, Any]) -> str:
    """Return the verb whose recipe this is: the one that has all of its keys, and the fewest others; "..." if none."""
    keys = {verb: {field.name for field in dataclasses.fields(recipe_module(verb).Recipe)} for verb in RECIPES}
    fitting = [verb for verb in RECIPES if recipe.keys() <= keys[verb]]
    return min(fitting, key=lambda verb: len(keys[verb]), default="...")


# -------------------- metrics of a bench


def check_bench(recipe: Recipe) -> None:
    """Raise UserError if `bench` is not the folder of a bench that measured this model."""
    _metrics(recipe)


def _metrics(recipe: Recipe) -> str:
    """Return the scores of a model in a bench as a table in Markdown; "" without a bench."""
    if not recipe.bench:
        return ""
    path = Path(recipe.bench) / BENCH
    try:
        content = json.loads(path.read_text())
        models = {name: str(arm["model"]) for name, arm in content["arms"].items() if arm["init"] != "random"}
        steps: list[dict[str, Any]] = [step for step in content["steps"] if step["state"] == "done"]
        model = os.path.realpath(recipe.model)
        steps = [step for step in steps if step["arm"] in models and os.path.realpath(models[step["arm"]]) == model]
        rows = [row for step in steps for row in _rows(step)]
    except OSError as error:
        raise UserError(f"bench: {path}: {error.strerror}; expected the folder of an `addp bench`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"bench: {path}: not as `addp bench` writes it ({error!r})") from error
    if not rows:
        found = ", ".join(f"{name}={model}" for name, model in models.items())
        raise UserError(f"bench: {path} has no scores of model={recipe.model}; it has those of {found or 'no model'}")
    return "\n".join(["| benchmark | metric | value | seeds |", "|---|---|---|---|", *rows])


def _rows(step: Mapping[str, Any]) -> list[str]:
    labels = {metric.key: metric for metric in BENCHMARKS[step["benchmark"]].metrics}
    details = f" ({step['details']['features']})" if "features" in step.get("details", {}) else ""
    rows = []
    for key, values in step["scores"].items():
        metric = labels.get(key)
        label = metric.label if metric else key
        rows.append(f"| {step['benchmark']}{details} | {label} | {_mean(values)} | {len(values)} |")
    return rows


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
