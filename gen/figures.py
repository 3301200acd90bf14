"""`addp figures`: the figures of the paper, drawn from any checkpoint, as PNG files.

steps (Fig. 8): images during generation, and which of their tokens are reliable. training (Fig. 9-11): the noisy images
of training, for each of the three mappings. ratios (Fig. 12): the distribution of mask ratios in training. tokens
(Fig. 16): the token embeddings of every step. metrics (Fig. 6): metrics by number of steps, from a report of
`addp evaluate`. denoising: noisy images of training, and what the network makes of them. features, attention,
neighbors: what the encoder sees in natural images (encoder_figures.py); any other encoder has these, too.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.paths import expand_home
from addp_core.base.rng import generator
from addp_core.data.sources import open_source
from addp_core.method.addp import ADDP
from addp_core.method.diffusion import map_tokens, mask_ratios
from addp_core.method.sampler import SampleConfig, SamplerState, sample
from addp_core.training.compute import accelerate_model
from addp_core.training.processes import process_state
from addp_core.weights.reading import read_weights
from gen.drawing import (
    add_title_and_caption,
    draw_image_grid,
    evenly_spaced,
    gray_out,
    principal_colors,
    save_figure,
    upsample_tokens,
    write_contact_sheet,
)
from gen.encoder_figures import DRAW_ENCODER, Subject, open_view, readable_images
from gen.model import load_recipe_addp
from gen.recipe import FiguresRecipe as Recipe
from gen.report import METRIC_LABELS, read_report

log = logging.getLogger("addp")

# The mappings from the token predictor's probabilities to embeddings, and the number of the paper's figure of each.
MAPPINGS: dict[Literal["weighted", "argmax", "sample"], int] = {"weighted": 9, "argmax": 10, "sample": 11}
FROM_PREDICTOR = ("training", "denoising")
WITHOUT_PREDICTOR = "the file has no token predictor, which makes the noisy images"
SHEET = "contact.png"  # all figures on one picture
# The metrics that are plotted against the number of steps.
PLOTTED_METRICS = {
    "fid": "lower is better",
    "fd": "lower is better",
    "is_mean": "higher is better",
    "cs_mean": "higher is better",
}


def run(recipe: Recipe) -> None:
    """Draw the figures in `only`, or all that the other keys allow, and one sheet with all of them.

    Raises UserError if a figure's key is missing, or if the checkpoint has not what a figure shows.
    """
    kind = read_weights(recipe.model).kind
    names = figure_names(recipe, kind)
    if "metrics" in names:  # the report is read before the other figures are drawn
        _, curves = read_curves(recipe)
        if problem := without_curve(recipe, curves):
            if recipe.only:
                raise UserError(problem)
            log.warning("figures: no metrics: %s", problem)
            names.remove("metrics")
    drawn: list[Path] = []
    if model_names := [name for name in names if name in DRAW]:
        model = load_recipe_addp(recipe, predictor=recipe.predictor or None).requires_grad_(False)
        model = model.to(process_state().device)
        accelerate_model(model)
        for name in [name for name in model_names if name in FROM_PREDICTOR]:
            if model.predictor is None and not recipe.only:
                log.info("figures: no %s: %s; predictor=<file> adds it", name, WITHOUT_PREDICTOR)
                model_names.remove(name)
        for name in model_names:
            drawn += save_figures(DRAW[name](model, recipe), Path(recipe.out))
        del model
    if encoder_names := [name for name in names if name in DRAW_ENCODER]:
        subject = open_subject(recipe, kind)
        for name in encoder_names:
            try:
                figures = DRAW_ENCODER[name](subject)
            except ValueError as error:
                if recipe.only:
                    raise UserError(f"only: no {name} of {recipe.model}: {error}") from error
                log.info("figures: no %s: %s", name, error)
                continue
            drawn += save_figures(figures, Path(recipe.out))
    if len(drawn) > 1:
        write_contact_sheet(drawn, Path(recipe.out, SHEET))


def figure_names(recipe: Recipe, kind: str) -> list[str]:
    """Return the figures to draw, as far as the recipe's keys and the kind of its model tell.

    Raises UserError if a key of one is missing.
    """
    needed = dict.fromkeys((*FROM_PREDICTOR, *DRAW_ENCODER), ("data", recipe.data))
    needed["metrics"] = ("evaluation", recipe.evaluation)
    names: list[str] = list(recipe.only or [*DRAW, *DRAW_ENCODER])
    for name in list(names):
        key, value = needed.get(name, ("", True))
        if not value and recipe.only:
            raise UserError(f"only: {name} needs {key}=")
        if name in DRAW and kind != "addp":
            if recipe.only:
                expected = f"an ADDP checkpoint, or some of {', '.join(DRAW_ENCODER)}"
                raise UserError(f"only: found {name}, but {recipe.model} is no ADDP checkpoint; expected {expected}")
        elif not value:
            log.info("figures: no %s without %s=", name, key)
        else:
            continue
        names.remove(name)
    if not names:
        raise UserError(f"data: not given; expected images for {', '.join(DRAW_ENCODER)}")
    return names


def open_subject(recipe: Recipe, kind: str) -> Subject:
    """Return the encoder and the images of its figures. Raises UserError if one of them cannot be read."""
    view = open_view(recipe, kind)
    with renaming_keys({"data.source": "data", "data.split": "split"}):
        source = open_source(recipe.data, recipe.split)
    return Subject(**vars(view), source=source, shown=recipe.n, pool=recipe.pool)


def save_figures(figures: dict[str, Figure], out: Path) -> list[Path]:
    """Write figures as `out`/<name>.png; return their paths."""
    paths = []
    for name, figure in figures.items():
        save_figure(figure, path := out / f"{name}.png")
        paths.append(path)
    return paths


# -------------------- generation


def generate_steps(model: ADDP, recipe: Recipe) -> tuple[list[SamplerState], list[int], list[str]]:
    """Generate the images; return the state after every step, the numbers of the steps to show, and their titles."""
    states: list[SamplerState] = []
    sample(
        model,
        recipe.n,
        **vars(recipe.sampling),
        seed=recipe.seed,
        batch=recipe.n,
        on_step=lambda _, state: states.append(state),
    )
    columns = evenly_spaced(len(states), recipe.columns)
    titles = [f"step {i + 1}\n{states[i].mask.float().mean():.0%} unreliable" for i in columns]
    return states, columns, titles


def describe_sampling(sampling: SampleConfig) -> str:
    """Describe the sampling settings in a caption."""
    order = "in Halton order" if sampling.order == "halton" else f"by confidence, temperature {sampling.temperature:g}"
    return f"{sampling.steps} steps, {sampling.schedule} schedule, ids kept {order}"


def draw_steps(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    """Draw the images after each step, and which of their tokens are reliable by then (Fig. 8)."""
    states, columns, titles = generate_steps(model, recipe)
    rows, labels = [], []
    for row in range(recipe.n):
        images, reliable_parts = [], []
        for i in columns:
            image, mask = states[i].image[row].clamp(0, 1), states[i].mask[row].view(1, *model.config.grid)
            images.append(image)
            reliable_parts.append(gray_out(image, mask))
        rows += [images, reliable_parts]
        labels += [f"image {row}", "reliable"]
    caption = (
        "The decoded image after each step, and below it the part whose tokens are reliable by then "
        f"(gray: to be sampled again).\n{describe_sampling(recipe.sampling)}; seed {recipe.seed}"
    )
    return {"steps": draw_image_grid(rows, titles, labels, "Generation, step by step (Fig. 8)", caption)}


def draw_tokens(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    """Draw the token embeddings after each step by their first three principal components, and the images (Fig. 16)."""
    states, columns, titles = generate_steps(model, recipe)
    codes = torch.stack([model.tokenizer.quantize.embedding(states[i].ids) for i in columns], 1).float()  # [n,S,N,D]
    colors = principal_colors(codes)
    rows, labels = [], []
    for row in range(recipe.n):
        maps = [colors[row, column].T.unflatten(1, model.config.grid) for column in range(len(columns))]
        rows.append([upsample_tokens(token_map, model.config.image_size) for token_map in maps])
        rows.append([states[i].image[row] for i in columns])
        labels += ["tokens", f"image {row}"]
    caption = (
        "The embeddings of the ids after each step, with their first three principal components as red, green and "
        f"blue,\nand the decoded image below. {describe_sampling(recipe.sampling)}; seed {recipe.seed}"
    )
    return {"tokens": draw_image_grid(rows, titles, labels, "Token space, step by step (Fig. 16)", caption)}


# -------------------- training


@dataclass(frozen=True)
class Examples:
    """Images of training at several mask ratios.

    Attributes:
        images: Float[n,3,H,W] in [0,1].
        ids: Long[n,N].
        masks: of each ratio, the unreliable positions at t and at the later step, Bool[n,N].
        titles: of each ratio.
    """

    images: Tensor
    ids: Tensor
    masks: list[tuple[Tensor, Tensor]]
    titles: list[str]


def open_examples(model: ADDP, recipe: Recipe, columns: int) -> Examples:
    """Return images of the recipe's data and up to `columns` of the mask ratios of training, evenly spaced.

    Raises UserError if no image can be read, or the model has no token predictor.
    """
    if model.predictor is None:
        raise UserError(f"predictor: {recipe.model}: {WITHOUT_PREDICTOR}; add predictor=<file>")
    config, process = model.config, model.config.process
    with renaming_keys({"data.source": "data", "data.split": "split"}):
        source = open_source(recipe.data, recipe.split)
    images = readable_images(source, config.image_size, recipe.n).to(next(model.parameters()).device)
    ids = model.encode_images(images)
    noise = torch.rand(ids.shape, generator=generator(recipe.seed, "figures"))
    rank = noise.argsort(1).argsort(1).to(ids.device)
    ratios, masks, titles = mask_ratios(process)[0].tolist(), [], []
    for i in evenly_spaced(len(ratios), columns):
        next_ratio = ratios[min(i + math.ceil(process.max_jump / 2), len(ratios) - 1)]
        mask, next_mask = (rank < math.ceil(config.tokens * ratio) for ratio in (ratios[i], next_ratio))
        masks.append((mask, next_mask))
        titles.append(f"{ratios[i]:.0%}\nunreliable")
    return Examples(images, ids, masks, titles)


def draw_training(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    """Draw the noisy images that training sees, one figure for each mapping (Fig. 9-11)."""
    config, process = model.config, model.config.process
    examples = open_examples(model, recipe, max(recipe.columns - 2, 1))
    images, ids = examples.images, examples.ids
    reconstructed = model.render(torch.zeros(1, device=ids.device), ids, torch.zeros_like(ids, dtype=torch.bool))
    titles = ["photograph", "tokenizer's\nreconstruction", *examples.titles]
    figures = {}
    for mapping, number in MAPPINGS.items():
        model.config = replace(config, process=replace(process, mapping=mapping))
        torch.manual_seed(recipe.seed)  # for the mapping that samples ids
        columns = [images, reconstructed]
        columns += [model.corrupt(ids, *masks).images for masks in examples.masks]
        caption = (
            "What the encoder sees in training: the true codes where ids are reliable; elsewhere the token predictor's "
            f"output,\nmapped to an embedding by f = {mapping}. Condition {process.condition}"
        )
        title = f"Training images, f = {mapping} (Fig. {number})"
        rows = [[column[row] for column in columns] for row in range(len(images))]
        figures[f"training-{mapping}"] = draw_image_grid(rows, titles, [""] * len(rows), title, caption)
    model.config = config
    return figures


def draw_denoising(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    """Draw noisy images of training, and below each what the network makes of it."""
    examples = open_examples(model, recipe, recipe.columns)
    ids = examples.ids
    torch.manual_seed(recipe.seed)  # for the mapping that samples ids
    noisy, reconstructed = [], []
    for mask, next_mask in examples.masks:
        images = model.corrupt(ids, mask, next_mask).images
        probabilities = model.logits(images, ids, mask)[..., : model.config.tokenizer.codebook].float().softmax(-1)
        noisy.append(images)
        mixed = map_tokens(probabilities, model.tokenizer.quantize.embedding.weight, "weighted")
        reconstructed.append(model.render(mixed, ids, mask))
    rows, labels = [], []
    for row in range(len(ids)):
        rows += [[column[row] for column in noisy], [column[row] for column in reconstructed]]
        labels += ["noisy", "denoised"]
    caption = (
        "The noisy images of training, and what one step of the network makes of them: its distribution over codes at "
        "the unreliable positions,\ndecoded together with the reliable ids"
    )
    return {"denoising": draw_image_grid(rows, examples.titles, labels, "Denoising", caption)}


def draw_ratios(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    """Draw the distributions of the mask ratio and of the step in training (Fig. 12)."""
    process = model.config.process
    ratios, weights = (values.numpy() for values in mask_ratios(process))
    if process.ratios == "fixed":
        weights = np.eye(len(ratios))[np.abs(ratios - process.ratio_mean).argmin()]
    next_weights = np.zeros(len(weights))
    for jump in range(1, process.max_jump + 1):
        next_steps = np.minimum(np.arange(len(weights)) + jump, len(weights) - 1)
        np.add.at(next_weights, next_steps, weights / process.max_jump)
    steps = np.rint(process.timesteps * 2 / np.pi * np.arcsin(ratios))
    figure = Figure((8, 3.4), layout="constrained")
    ratio_axis, step_axis = figure.subplots(1, 2)
    edges = np.linspace(process.ratio_min, process.ratio_max, 11)
    for name, probabilities in (("z_t", weights), (f"the later step (at most {process.max_jump} on)", next_weights)):
        ratio_axis.hist(ratios, edges, weights=probabilities, alpha=0.6, label=name)
        step_axis.bar(steps, probabilities, width=0.9, alpha=0.6, label=name)
    ratio_axis.set(xlabel="mask ratio (share of unreliable tokens)", ylabel="probability per bar")
    step_axis.set(xlabel=f"step t (of {process.timesteps})", ylabel="probability")
    for axis in (ratio_axis, step_axis):  # above the bars, of which one may be anywhere
        axis.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    distribution = (
        f"always {process.ratio_mean:g}"
        if process.ratios == "fixed"
        else f"normal with mean {process.ratio_mean:g} and standard deviation {process.ratio_std:g}, truncated to "
        f"[{process.ratio_min:g}, {process.ratio_max:g}]"
    )
    caption = f"Mask ratios of the cosine schedule, {distribution}"
    add_title_and_caption(figure, "Distribution of mask ratios in training (Fig. 12)", caption)
    return {"ratios": figure}


# -------------------- metrics against steps


def draw_metrics(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    """Draw each metric against the number of sampling steps (Fig. 6)."""
    report, curves = read_curves(recipe)
    rows = [row for points in curves.values() for row in points]
    metrics = [key for key in PLOTTED_METRICS if key in rows[0]]
    figure = Figure((4.2 * len(metrics), 3.6), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for label, points in curves.items():
            points = sorted(points, key=lambda row: row["sampling"]["steps"])
            axis.plot([p["sampling"]["steps"] for p in points], [p[key] for p in points], marker="o", label=label)
        ticks = sorted({row["sampling"]["steps"] for row in rows})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="sampling steps", ylabel=f"{METRIC_LABELS[key]} ({PLOTTED_METRICS[key]})")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    caption = f"{rows[0]['images']} images for each point; features: {report['features']}"
    add_title_and_caption(figure, "Metrics by number of sampling steps (Fig. 6)", caption)
    return {"metrics": figure}


def read_curves(recipe: Recipe) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Read the report at `evaluation`, and group its rows into curves, by label."""
    report = read_report(expand_home(recipe.evaluation))
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if "sampling" in row:
            curves.setdefault(curve_label(row["sampling"]), []).append(row)
    return report, curves


def without_curve(recipe: Recipe, curves: dict[str, list[dict[str, Any]]]) -> str:
    """Return why no curve can be drawn, "" if one has at least two numbers of steps."""
    if max((len({row["sampling"]["steps"] for row in rows}) for rows in curves.values()), default=0) > 1:
        return ""
    return (
        f"evaluation: {recipe.evaluation} does not compare different numbers of steps; expected a report of "
        "`addp evaluate` with, for example, sweep.steps=[4,8,20] sweep.schedule=[cosine,linear]"
    )


def curve_label(sampling: dict[str, Any]) -> str:
    """Return the settings that a curve's points share: the schedule, and others where they differ from the paper's."""
    paper = vars(SampleConfig())
    changed = [
        f"{key} {value}" for key, value in sampling.items() if key not in ("steps", "schedule") and value != paper[key]
    ]
    return ", ".join([sampling["schedule"], *changed])


# The figures by name; each function returns the figures to save, by file name without extension.
DRAW: dict[str, Callable[[ADDP, Recipe], dict[str, Figure]]] = {
    "steps": draw_steps,
    "training": draw_training,
    "denoising": draw_denoising,
    "ratios": draw_ratios,
    "tokens": draw_tokens,
    "metrics": draw_metrics,
}
