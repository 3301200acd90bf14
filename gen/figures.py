"""`addp figures`: the paper's figures of any checkpoint, as PNG.

steps (Fig. 8): images while they are generated, with what is unreliable. training (Fig. 9-11): the noisy images of
training, for each of the three mappings. ratios (Fig. 12): how often training masks how much. tokens (Fig. 16): the
token embeddings of every step. metrics (Fig. 6): quality against the number of steps, from a report of `addp evaluate`.
"""

import json
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

from addp_core.base.errors import UserError, calling
from addp_core.base.files import replacing
from addp_core.base.rng import generator
from addp_core.data.sources import open_source
from addp_core.data.stream import DataConfig, example_images
from addp_core.method.addp import ADDP
from addp_core.method.diffusion import mask_ratios
from addp_core.method.sampler import SampleConfig, Step, sample
from addp_core.training.compute import accelerate_model
from addp_core.training.engine import process_state
from gen.common import REPORT, DecoderHeads, EncoderHeads, ModelSource, TokenizerSource, load_named

log = logging.getLogger("addp")

MAPPINGS = {"weighted": 9, "argmax": 10, "sample": 11}  # and the paper's figure of each
CELL = 1.25  # inches of a picture
GAP = 16  # a picture's width over the gap beside it
PALE = 0.88  # grey of an unreliable token


@dataclass
class Recipe:
    """Keys of `addp figures`."""

    model: ModelSource
    out: Annotated[str, "folder for the PNG files"]
    data: Annotated[str, "images for the figures of training: folder, ImageNet root, .tar or hub set"] = ""
    split: Annotated[str, "part of them, where they have parts"] = "val"
    evaluation: Annotated[
        str, "for the figure of metrics: the `out` of an `addp evaluate` with several sweep.steps"
    ] = ""
    only: Annotated[
        tuple[Literal["steps", "training", "ratios", "tokens", "metrics"], ...], "which figures; none listed: all"
    ] = ()
    n: Annotated[int, Ge(1), "images in a figure"] = 4
    columns: Annotated[int, Ge(2), "steps or mask ratios in a figure, at most"] = 8
    seed: Annotated[int, "of generated images and masks"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    tokenizer: TokenizerSource = ""
    predictor: Annotated[str, "for a model file without one, which the figures of training need"] = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


def run(recipe: Recipe) -> None:
    """Draw the figures that are asked for; without a list, those that the keys allow. UserError names a missing key."""
    needs = {"training": ("data", recipe.data), "metrics": ("evaluation", recipe.evaluation)}
    names = list(recipe.only or DRAW)
    for name in [name for name in names if name in needs and not needs[name][1]]:
        if recipe.only:
            raise UserError(f"only: {name} needs {needs[name][0]}=")
        log.info("figures: no %s without %s=", name, needs[name][0])
        names.remove(name)
    if "metrics" in names:
        compared(recipe)  # before the other figures are drawn
    model = load_named(recipe, predictor=recipe.predictor or None).requires_grad_(False).to(process_state().device)
    accelerate_model(model)
    out = Path(recipe.out)
    for name in names:
        for file, figure in DRAW[name](model, recipe).items():
            save(figure, out / f"{file}.png")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    except OSError as error:
        raise UserError(f"out: {path} cannot be written ({error.strerror})") from error
    log.info("%s", path)


# -------------------- pictures in rows


def sheet(
    rows: Sequence[Sequence[Tensor]], titles: Sequence[str], labels: Sequence[str], title: str, caption: str
) -> Figure:
    """Pictures Float[3,H,W] in a grid, a title above each column and a label before each row."""
    height, width = rows[0][0].shape[-2:]
    gap = max(width // GAP, 1)
    pictures = torch.stack([picture.clamp(0, 1).cpu() for row in rows for picture in row])
    # one set of axes for all: matplotlib takes seconds to lay out as many as there are pictures
    tiled = make_grid(pictures, nrow=len(titles), padding=gap, pad_value=1.0).permute(1, 2, 0).numpy()
    figure = Figure((CELL * len(titles) + 1, CELL * height / width * len(rows) + 1.3), layout="constrained")
    axis = figure.subplots()
    axis.imshow(tiled, interpolation="nearest")
    axis.set_xticks([gap + width / 2 + i * (width + gap) for i in range(len(titles))], titles, fontsize=8)
    axis.set_yticks(
        [gap + height / 2 + i * (height + gap) for i in range(len(rows))], labels, fontsize=8, rotation=90, va="center"
    )
    axis.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False, left=False)
    axis.spines[:].set_visible(False)
    explain(figure, title, caption)
    return figure


def explain(figure: Figure, title: str, caption: str) -> None:
    figure.suptitle(title, fontsize=11, fontweight="bold")
    figure.supxlabel(caption, fontsize=8, wrap=True)


def spread(count: int, shown: int) -> list[int]:
    """Up to `shown` of the numbers 0 to count - 1, evenly spread, both ends included."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(shown, count))})


def enlarged(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """[C,h,w] -> Float[C,H,W], a square a token."""
    return F.interpolate(tokens[None].float(), hw, mode="nearest")[0]


def generation_steps(model: ADDP, recipe: Recipe) -> tuple[list[Step], list[str], list[int]]:
    """The steps of generating the images, a title for each one shown, and the numbers of those."""
    steps: list[Step] = []
    sample(
        model,
        recipe.n,
        **vars(recipe.sampling),
        seed=recipe.seed,
        batch=recipe.n,
        on_step=lambda _, step: steps.append(step),
    )
    shown = spread(len(steps), recipe.columns)
    titles = [f"step {i + 1}\n{steps[i].mask.float().mean():.0%} unreliable" for i in shown]
    return steps, titles, shown


def how(sampling: SampleConfig) -> str:
    order = "in Halton order" if sampling.order == "halton" else f"by confidence, temperature {sampling.temperature:g}"
    return f"{sampling.steps} steps, {sampling.schedule} schedule, ids kept {order}"


def draw_steps(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    steps, titles, shown = generation_steps(model, recipe)
    rows, labels = [], []
    for image in range(recipe.n):
        pictures, kept = [], []
        for i in shown:
            picture, mask = steps[i].image[image].clamp(0, 1), steps[i].mask[image].view(1, *model.config.grid)
            pictures.append(picture)
            kept.append(torch.where(enlarged(mask, model.config.image_size) > 0, PALE, picture))
        rows += [pictures, kept]
        labels += [f"image {image}", "reliable"]
    caption = (
        "The decoded image after each step, and below it the part whose tokens are reliable by then "
        f"(grey: drawn anew).\n{how(recipe.sampling)}; seed {recipe.seed}"
    )
    return {"steps": sheet(rows, titles, labels, "Generation, step by step (Fig. 8)", caption)}


def draw_tokens(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    steps, titles, shown = generation_steps(model, recipe)
    codes = torch.stack([model.tokenizer.quantize.embedding(steps[i].ids) for i in shown], 1).float()  # [n,S,N,D]
    flat = codes.flatten(0, 2)
    flat = flat - flat.mean(0)
    _, _, components = torch.linalg.svd(flat, full_matrices=False)
    projected = flat @ components[:3].T
    projected = F.pad(projected, (0, 3 - projected.shape[1])).view(*codes.shape[:3], 3)
    low, high = torch.quantile(projected.flatten(0, 2), torch.tensor([0.02, 0.98], device=projected.device), dim=0)
    colours = ((projected - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    rows, labels = [], []
    for image in range(recipe.n):
        maps = [colours[image, c].T.unflatten(1, model.config.grid) for c in range(len(shown))]
        rows += [[enlarged(m, model.config.image_size) for m in maps], [steps[i].image[image] for i in shown]]
        labels += ["tokens", f"image {image}"]
    caption = (
        "The embeddings of the ids after each step, their first three principal components as red, green and blue,\n"
        f"and the decoded image below. {how(recipe.sampling)}; seed {recipe.seed}"
    )
    return {"tokens": sheet(rows, titles, labels, "Token space, step by step (Fig. 16)", caption)}


# -------------------- what training sees


def draw_training(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    if model.predictor is None:
        raise UserError(
            f"predictor: {recipe.model} has no token predictor, which makes the noisy images; add predictor="
        )
    config, process = model.config, model.config.process
    with calling({"data.source": "data", "data.split": "split"}):
        source = open_source(recipe.data, recipe.split)
    images = example_images(source, DataConfig(size=config.image_size), recipe.n)
    if not len(images):
        raise UserError(f"data: none of the images looked at in {recipe.data} can be read")
    images = images.to(model.denoiser.mean.device)
    ids = model.encode_images(images)
    rebuilt = model.render(torch.zeros(1, device=ids.device), ids, torch.zeros_like(ids, dtype=torch.bool))
    noise = torch.rand(ids.shape, generator=generator(recipe.seed, "figures"))
    rank = noise.argsort(1).argsort(1).to(ids.device)
    ratios = mask_ratios(process)[0].tolist()
    shown = spread(len(ratios), max(recipe.columns - 2, 1))
    titles = ["photograph", "tokenizer's\nreconstruction", *(f"{ratios[i]:.0%}\nunreliable" for i in shown)]
    figures = {}
    for mapping, number in MAPPINGS.items():
        model.config = replace(config, process=replace(process, mapping=mapping))
        torch.manual_seed(recipe.seed)  # of the mapping that draws ids
        columns = [images, rebuilt]
        for i in shown:
            later = ratios[min(i + math.ceil(process.max_jump / 2), len(ratios) - 1)]
            masks = (rank < math.ceil(config.tokens * ratio) for ratio in (ratios[i], later))
            columns.append(model.corrupt(ids, *masks).images)
        caption = (
            "What the network is shown in training: true codes where ids are reliable; elsewhere the token predictor's "
            f"guess,\nturned into an embedding by f = {mapping}. Condition {process.condition}"
        )
        title = f"Training images, f = {mapping} (Fig. {number})"
        rows = [[column[row] for column in columns] for row in range(len(images))]
        figures[f"training-{mapping}"] = sheet(rows, titles, [""] * len(rows), title, caption)
    model.config = config
    return figures


def draw_ratios(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    process = model.config.process
    ratios, weights = (values.numpy() for values in mask_ratios(process))
    if process.ratios == "fixed":
        weights = np.eye(len(ratios))[np.abs(ratios - process.ratio_mean).argmin()]
    later = np.zeros(len(weights))
    for jump in range(1, process.max_jump + 1):
        np.add.at(later, np.minimum(np.arange(len(weights)) + jump, len(weights) - 1), weights / process.max_jump)
    steps = np.rint(process.timesteps * 2 / np.pi * np.arcsin(ratios))
    figure = Figure((8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(process.ratio_min, process.ratio_max, 11)
    for name, probabilities in (("z_t", weights), (f"the later step (at most {process.max_jump} on)", later)):
        left.hist(ratios, edges, weights=probabilities, alpha=0.6, label=name)
        right.bar(steps, probabilities, width=0.9, alpha=0.6, label=name)
    left.set(xlabel="mask ratio (share of unreliable tokens)", ylabel="probability of a bar")
    right.set(xlabel=f"step t (of {process.timesteps})", ylabel="probability")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    shape = (
        f"always {process.ratio_mean:g}"
        if process.ratios == "fixed"
        else f"normal around {process.ratio_mean:g}, deviation {process.ratio_std:g}, cut to "
        f"[{process.ratio_min:g}, {process.ratio_max:g})"
    )
    explain(figure, "How much training masks (Fig. 12)", f"Mask ratios of the cosine schedule, {shape}")
    return {"ratios": figure}


# -------------------- quality against steps


def draw_metrics(model: ADDP, recipe: Recipe) -> dict[str, Figure]:
    report, lines = compared(recipe)
    rows = [row for points in lines.values() for row in points]
    names = {"fid": "FID (lower is better)", "fd": "FD (lower is better)"}
    names |= {"is_mean": "IS (higher is better)", "cs_mean": "CS (higher is better)"}
    panels = {key: name for key, name in names.items() if key in rows[0]}
    figure = Figure((4.2 * len(panels), 3.6), layout="constrained")
    for axis, (key, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in lines.items():
            points = sorted(points, key=lambda row: row["sampling"]["steps"])
            axis.plot([p["sampling"]["steps"] for p in points], [p[key] for p in points], marker="o", label=label)
        ticks = sorted({row["sampling"]["steps"] for row in rows})
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="sampling steps", ylabel=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    caption = f"{rows[0]['images']} images a point; features: {report['features']}"
    explain(figure, "Quality against the number of steps (Fig. 6)", caption)
    return {"metrics": figure}


def compared(recipe: Recipe) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The report at `evaluation`, and its rows by line. UserError where no line has several numbers of steps."""
    report = read_report(Path(recipe.evaluation).expanduser())
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if "sampling" in row:
            lines.setdefault(line_name(row["sampling"]), []).append(row)
    if max(map(len, lines.values()), default=0) < 2:
        raise UserError(
            f"evaluation: {recipe.evaluation} compares no numbers of steps; expected an `addp evaluate` with, for "
            "example, sweep.steps=[4,8,20] sweep.schedule=[cosine,linear]"
        )
    return report, lines


def read_report(path: Path) -> dict[str, Any]:
    """What `addp evaluate` wrote into the folder `path`, or the file itself."""
    path = path / REPORT if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {"features": report["features"], "rows": list(report["rows"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"evaluation: {path} is no report of `addp evaluate` ({error})") from error


def line_name(sampling: dict[str, Any]) -> str:
    """What sets a line apart: all settings but the steps, those of the paper left out."""
    paper = vars(SampleConfig())
    extra = [
        f"{key} {value}" for key, value in sampling.items() if key not in ("steps", "schedule") and value != paper[key]
    ]
    return ", ".join([sampling["schedule"], *extra])


DRAW: dict[str, Callable[[ADDP, Recipe], dict[str, Figure]]] = {
    "steps": draw_steps,
    "training": draw_training,
    "ratios": draw_ratios,
    "tokens": draw_tokens,
    "metrics": draw_metrics,
}
