"""`addp figures`: the figures of the paper, drawn from any checkpoint, as PNG files.

steps (Fig. 8): images during generation, and which of their tokens are reliable. training (Fig. 9-11): the noisy images
of training, for each of the three mappings. ratios (Fig. 12): the distribution of mask ratios in training. tokens
(Fig. 16): the token embeddings of every step. metrics (Fig. 6): metrics by number of steps, from a report of
`addp evaluate`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import make_grid

from addp_core.base.errors import UserError, renaming_keys
from addp_core.base.files import atomic_replace
from addp_core.base.rng import generator
from addp_core.data.config import DataConfig
from addp_core.data.sources import open_source
from addp_core.data.stream import example_images
from addp_core.method.addp import ADDP
from addp_core.method.diffusion import mask_ratios
from addp_core.method.sampler import SampleConfig, SamplerState, sample
from addp_core.training.compute import accelerate_model
from addp_core.training.processes import process_state
from gen.model import DecoderHeads, EncoderHeads, ModelSource, TokenizerSource, load_recipe_model
from gen.report import METRIC_LABELS, read_report

log = logging.getLogger("addp")

# The mappings from the token predictor's probabilities to embeddings, and the number of the paper's figure of each.
MAPPINGS: dict[Literal["weighted", "argmax", "sample"], int] = {"weighted": 9, "argmax": 10, "sample": 11}
# The metrics that are plotted against the number of steps.
PLOTTED_METRICS = {
    "fid": "lower is better",
    "fd": "lower is better",
    "is_mean": "higher is better",
    "cs_mean": "higher is better",
}
IMAGE_INCHES = 1.25  # width of an image in a figure
WIDTH_TO_GAP = 16  # width of an image over that of the gap beside it
UNRELIABLE_GRAY = 0.88


@dataclass
class Recipe:
    """Keys of `addp figures`."""

    model: ModelSource
    out: Annotated[str, "folder for the PNG files"]
    data: Annotated[str, "images for the figures of training: a folder, ImageNet root, .tar file or hub dataset"] = ""
    split: Annotated[str, "split of `data`, if it has splits"] = "val"
    evaluation: Annotated[
        str, "for the figure of metrics: the `out` of an `addp evaluate` with several sweep.steps"
    ] = ""
    only: Annotated[
        tuple[Literal["steps", "training", "ratios", "tokens", "metrics"], ...],
        "figures to draw; by default all that the other keys allow",
    ] = ()
    n: Annotated[int, Ge(1), "number of images in a figure"] = 4
    columns: Annotated[int, Ge(2), "maximum number of steps or mask ratios in a figure"] = 8
    seed: Annotated[int, "random seed of generated images and masks"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    tokenizer: TokenizerSource = ""
    predictor: Annotated[
        str, "token predictor file, which the figures of training need if the model file does not include one"
    ] = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


def run(recipe: Recipe) -> None:
    """Draw the figures in `only`, or all that the other keys allow. Raises UserError if a figure's key is missing."""
    required_keys = {"training": ("data", recipe.data), "metrics": ("evaluation", recipe.evaluation)}
    names: list[str] = list(recipe.only or DRAW)
    for name in [name for name in names if name in required_keys and not required_keys[name][1]]:
        if recipe.only:
            raise UserError(f"only: {name} needs {required_keys[name][0]}=")
        log.info("figures: no %s without %s=", name, required_keys[name][0])
        names.remove(name)
    if "metrics" in names:  # the report is read before the other figures are drawn
        _, curves = read_curves(recipe)
        if problem := without_curve(recipe, curves):
            if recipe.only:
                raise UserError(problem)
            log.warning("figures: no metrics: %s", problem)
            names.remove("metrics")
    model = load_recipe_model(recipe, predictor=recipe.predictor or None).requires_grad_(False)
    model = model.to(process_state().device)
    accelerate_model(model)
    out = Path(recipe.out)
    for name in names:
        for file_name, figure in DRAW[name](model, recipe).items():
            save_figure(figure, out / f"{file_name}.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    except OSError as error:
        raise UserError(f"out: {path} cannot be written ({error.strerror})") from error
    log.info("%s", path)


# -------------------- images in rows


def draw_image_grid(
    rows: Sequence[Sequence[Tensor]], column_titles: Sequence[str], row_labels: Sequence[str], title: str, caption: str
) -> Figure:
    """Draw images, Float[3,H,W], in a grid with titles above the columns and labels before the rows."""
    height, width = rows[0][0].shape[-2:]
    gap = max(width // WIDTH_TO_GAP, 1)
    images = torch.stack([image.clamp(0, 1).cpu() for row in rows for image in row])
    # One pair of axes for all images: with one for each image, matplotlib would take seconds for the layout.
    tiled = make_grid(images, nrow=len(column_titles), padding=gap, pad_value=1.0).permute(1, 2, 0).numpy()
    figure_height = IMAGE_INCHES * height / width * len(rows) + 1.3
    figure = Figure((IMAGE_INCHES * len(column_titles) + 1, figure_height), layout="constrained")
    axis = figure.subplots()
    axis.imshow(tiled, interpolation="nearest")
    x_ticks = [gap + width / 2 + i * (width + gap) for i in range(len(column_titles))]
    y_ticks = [gap + height / 2 + i * (height + gap) for i in range(len(rows))]
    axis.set_xticks(x_ticks, column_titles, fontsize=8)
    axis.set_yticks(y_ticks, row_labels, fontsize=8, rotation=90, va="center")
    axis.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False, left=False)
    axis.spines[:].set_visible(False)
    add_title_and_caption(figure, title, caption)
    return figure


def add_title_and_caption(figure: Figure, title: str, caption: str) -> None:
    """Write the title above the figure and the caption below it."""
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.supxlabel(caption, fontsize=8, wrap=True)


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Return up to `limit` of the numbers 0 to `count` - 1, evenly spaced, with both ends."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(limit, count))})


def upsample_tokens(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """[C,h,w] -> Float[C,H,W], in which each token is a square of one color."""
    return F.interpolate(tokens[None].float(), hw, mode="nearest")[0]


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
            masked = upsample_tokens(mask, model.config.image_size) > 0
            reliable_parts.append(torch.where(masked, UNRELIABLE_GRAY, image))
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
    flat = codes.flatten(0, 2)
    flat = flat - flat.mean(0)
    _, _, components = torch.linalg.svd(flat, full_matrices=False)
    projected = flat @ components[:3].T
    projected = F.pad(projected, (0, 3 - projected.shape[1])).view(*codes.shape[:3], 3)
    low, high = torch.quantile(projected.flatten(0, 2), torch.tensor([0.02, 0.98], device=projected.device), dim=0)
    colors = ((projected - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
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


def draw_training(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    """Draw the noisy images that training sees, one figure for each mapping (Fig. 9-11)."""
    if model.predictor is None:
        raise UserError(
            f"predictor: {recipe.model} has no token predictor, which makes the noisy images; add predictor=<file>"
        )
    config, process = model.config, model.config.process
    with renaming_keys({"data.source": "data", "data.split": "split"}):
        source = open_source(recipe.data, recipe.split)
    images = example_images(source, DataConfig(size=config.image_size), recipe.n)
    if not len(images):
        raise UserError(f"data: none of the images tried in {recipe.data} can be read")
    images = images.to(next(model.parameters()).device)
    ids = model.encode_images(images)
    reconstructed = model.render(torch.zeros(1, device=ids.device), ids, torch.zeros_like(ids, dtype=torch.bool))
    noise = torch.rand(ids.shape, generator=generator(recipe.seed, "figures"))
    rank = noise.argsort(1).argsort(1).to(ids.device)
    ratios = mask_ratios(process)[0].tolist()
    steps = evenly_spaced(len(ratios), max(recipe.columns - 2, 1))
    titles = ["photograph", "tokenizer's\nreconstruction", *(f"{ratios[i]:.0%}\nunreliable" for i in steps)]
    figures = {}
    for mapping, number in MAPPINGS.items():
        model.config = replace(config, process=replace(process, mapping=mapping))
        torch.manual_seed(recipe.seed)  # for the mapping that samples ids
        columns = [images, reconstructed]
        for i in steps:
            next_ratio = ratios[min(i + math.ceil(process.max_jump / 2), len(ratios) - 1)]
            mask, next_mask = (rank < math.ceil(config.tokens * ratio) for ratio in (ratios[i], next_ratio))
            columns.append(model.corrupt(ids, mask, next_mask).images)
        caption = (
            "What the encoder sees in training: the true codes where ids are reliable; elsewhere the token predictor's "
            f"output,\nmapped to an embedding by f = {mapping}. Condition {process.condition}"
        )
        title = f"Training images, f = {mapping} (Fig. {number})"
        rows = [[column[row] for column in columns] for row in range(len(images))]
        figures[f"training-{mapping}"] = draw_image_grid(rows, titles, [""] * len(rows), title, caption)
    model.config = config
    return figures


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
    report = read_report(Path(recipe.evaluation).expanduser())
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
    "ratios": draw_ratios,
    "tokens": draw_tokens,
    "metrics": draw_metrics,
}
