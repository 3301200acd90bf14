"""The fast mode of `addp linprobe`: linear heads of many learning rates, and a k-NN vote, on features computed once.

For each block and pooling all rates are trained together, as one tensor of heads. The rate is picked by a share of the
training images that these heads have not seen; a head of that rate is then trained on all of them, and only this one
meets the validation images. What is done stays on the disk: features in files of `fast.shard` images, a file a head.
"""

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval, Lt, MinLen
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from addp_core.base.errors import UserError
from addp_core.base.files import atomic_replace, write_atomically
from addp_core.base.rng import generator
from addp_core.data.images import eval_transform
from addp_core.data.sources import ImageSource
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.training.compute import accelerate_model
from addp_core.training.engine import process_state
from addp_core.training.run_folder import mark_finished, release_out
from addp_core.weights.checkpoint import MODEL_FILE, save_model
from addp_core.weights.start import NORMALISATION
from cls.data import evaluation_share
from cls.features import Bank, Features, Pooling, block_number, collect, cut
from cls.results import RESULTS

if TYPE_CHECKING:
    from cls.linprobe import Recipe

log = logging.getLogger("addp")

TEMPERATURE = 0.07  # of the k-NN vote (arXiv 1805.01978)
EPS = 1e-6  # of the standardisation, as of the classifier's batch norm
ROWS = 1 << 14  # features looked at together where all are read
ELEMENTS = 1 << 26  # of a matrix of similarities held at once
ROW, KEY = "row", "key"  # entries in the metadata of a head's file

Rate = Annotated[float, Gt(0)]


@dataclass
class FastConfig:
    """Features once per image, then heads of many learning rates; the section `fast`, for mode=fast."""

    blocks: Annotated[
        tuple[int, ...], "blocks whose features are probed, from 1, or from the end as -1; empty: all"
    ] = ()
    poolings: Annotated[tuple[Pooling, ...], MinLen(1), "mean of the patches, class token"] = ("avg",)
    mirrored: Annotated[bool, "train on the features of the mirror images too"] = False
    lrs: Annotated[tuple[Rate, ...], MinLen(1), "learning rates of the heads"] = (
        *(0.0003, 0.001, 0.003, 0.01),
        *(0.03, 0.1, 0.3, 1.0, 3.0),
    )
    epochs: Annotated[int, Ge(1), "passes over the features, the rate falling on half a cosine"] = 50
    batch: Annotated[int, Ge(1), "features a step"] = 256
    momentum: Annotated[float, Interval(ge=0, lt=1), "of SGD"] = 0.9
    weight_decay: Annotated[float, Ge(0), "of the heads' weights"] = 0.0
    held_out: Annotated[
        float, Ge(0), Lt(1), "share of the training images that picks the rate; 0: validation picks it, which flatters"
    ] = 0.1
    knn: Annotated[int, Ge(0), "neighbours of the k-NN vote; 0: none"] = 20
    cache: Annotated[str, "folder of the features, which other runs may share (default: features in `out`)"] = ""
    store: Annotated[Literal["float16", "float32"], "arithmetic of the stored features"] = "float16"
    shard: Annotated[int, Ge(1), "images a file of features"] = 4096

    def __post_init__(self):
        for key in ("blocks", "poolings", "lrs"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: found {list(values)}, expected each one once")


@dataclass
class Heads:
    """Linear heads of L learning rates on features that are standardised first; float32."""

    mean: Tensor  # Float[W]
    variance: Tensor  # Float[W]
    weight: Tensor  # Float[L,C,W]
    bias: Tensor  # Float[L,C]

    def standardised(self, rows: Tensor) -> Tensor:
        """[n,W] of any type -> Float[n,W]."""
        return (rows.float() - self.mean) * (self.variance + EPS).rsqrt()

    def logits(self, x: Tensor) -> Tensor:
        """Standardised Float[n,W] -> Float[n,L,C], as one product."""
        rates, classes, width = self.weight.shape
        return torch.addmm(self.bias.flatten(), x, self.weight.view(-1, width).t()).view(-1, rates, classes)

    def hits(self, rows: Tensor, labels: Tensor, k: int = 1) -> Tensor:
        """Share of [n,W] rows in per cent that each rate's head has among its best k, Double[L]."""
        found = torch.zeros(len(self.weight), dtype=torch.double, device=rows.device)
        for part, truth in zip(rows.split(ROWS), labels.split(ROWS), strict=True):
            best = self.logits(self.standardised(part)).topk(min(k, self.weight.shape[1]), 2).indices
            found += (best == truth[:, None, None]).any(2).sum(0)
        return 100 * found / len(rows)


def run(recipe: "Recipe", encoder: Encoder, train_set: ImageSource, val_set: ImageSource, text: str) -> None:
    """Everything that is not on the disk yet; ends with the table on stdout and the best classifier in the folder."""
    config, out = recipe.fast, Path(recipe.out)
    state = process_state()
    every = config.blocks or range(1, len(encoder.blocks) + 1)
    blocks = sorted({block_number(encoder, block, "fast.blocks") for block in every})
    classes = len(train_set.classes)
    train_bank, val_bank = banks(recipe, encoder, blocks, train_set, val_set, state.device)

    task = [train_bank.key, val_bank.key, classes, recipe.train.seed, asdict(config)]
    task[-1].pop("cache")
    key = hashlib.blake2b(json.dumps(task).encode(), digest_size=16).hexdigest()
    jobs = [(block, pooling) for block in blocks for pooling in config.poolings]
    for block, pooling in jobs[state.process_index :: state.num_processes]:
        path = head_path(out, block, pooling)
        if known(path, key) is None:
            row, head = probe(recipe, train_bank, val_bank, block, pooling, classes, state.device)
            write_head(path, row, head, key)
            log.info("block %d %s: %s", block, pooling, ", ".join(f"{n} {row[n]:.2f}" for n in shown(row)))
    state.wait_for_everyone()
    if state.is_main_process:
        rows = [known(head_path(out, block, pooling), key) for block, pooling in jobs]
        finish(recipe, rows, encoder, train_set, len(train_bank), len(val_bank))
        mark_finished(out, text, {})
        show(out, recipe.mode)
    state.wait_for_everyone()
    release_out(out)


def banks(
    recipe: "Recipe", encoder: Encoder, blocks: list[int], train: ImageSource, val: ImageSource, device: torch.device
) -> tuple[Bank, Bank]:
    """The features of centre crops of both sets; of the training set with mirror images where they are asked for."""
    config = recipe.fast
    cache = Path(config.cache).expanduser() if config.cache else Path(recipe.out) / "features"
    mean, std = NORMALISATION[recipe.normalisation]
    if isinstance(encoder, TokenEncoder):
        encoder.mean, encoder.std = mean, std  # it has to undo them, and no classifier is around it yet
    transform = eval_transform(recipe.data.hw, evaluation_share(recipe.data.hw, recipe.eval_crop))
    options = {"mean": mean, "std": std, "batch": recipe.eval_batch, "precision": recipe.train.precision}
    options |= {"workers": recipe.data.workers, "max_errors": recipe.data.max_errors}
    options |= {"store": config.store, "shard": config.shard}
    found = []
    for title, source, mirrored in (("train", train, config.mirrored), ("val", val, False)):
        features = Features(encoder, blocks, config.poolings, mirrored).to(device).eval().requires_grad_(False)
        accelerate_model(features, recipe.train.compile, recipe.train.channels_last)
        found.append(collect(features, source, transform, cache, title=title, **options))
    return found[0], found[1]


# -------------------- one block and pooling


def probe(
    recipe: "Recipe",
    train_bank: Bank,
    val_bank: Bank,
    block: int,
    pooling: str,
    classes: int,
    device: torch.device,
) -> tuple[dict[str, Any], Heads]:
    """The row of the table, and the head of the best rate."""
    config, seed = recipe.fast, recipe.train.seed
    rows, labels = train_bank.rows(block, pooling).to(device), train_bank.labels.to(device)  # [n,V,W]
    val_rows, val_labels = val_bank.rows(block, pooling)[:, 0].to(device), val_bank.labels.to(device)
    everything = torch.arange(len(rows))
    if config.held_out:
        order = torch.randperm(len(rows), generator=generator(seed, "held out"))
        rest, judges = order.tensor_split([len(rows) - max(1, round(config.held_out * len(rows)))])
        if not len(rest):
            raise UserError(f"fast.held_out={config.held_out}: leaves none of {len(rows)} images to train on")
        heads = train_heads(rows, labels, rest, classes, config.lrs, config, seed)
        judged = heads.hits(rows[judges.to(device), 0], labels[judges.to(device)])
        best = int(judged.argmax())
        head = train_heads(rows, labels, everything, classes, [config.lrs[best]], config, seed)
    else:
        heads = train_heads(rows, labels, everything, classes, config.lrs, config, seed)
        judged = heads.hits(val_rows, val_labels)
        best = int(judged.argmax())
        head = Heads(heads.mean, heads.variance, heads.weight[best : best + 1], heads.bias[best : best + 1])
    row = {"block": block, "pooling": pooling, "lr": config.lrs[best]}
    if config.held_out:
        row["held_out"] = judged[best].item()
    row |= {f"top{k}": head.hits(val_rows, val_labels, k).item() for k in (1, 5)}
    if config.knn:
        row["knn"] = knn(rows[:, 0], labels, val_rows, val_labels, classes, config.knn)
    return row | {"sweep": judged.tolist()}, head


@torch.no_grad()
def train_heads(
    rows: Tensor, labels: Tensor, images: Tensor, classes: int, lrs: Sequence[float], config: FastConfig, seed: int
) -> Heads:
    """A head for each rate from zero, by SGD with momentum on cross-entropy; the same batches for all.

    rows: [n,V,W]. labels: Long[n]. images: Long[m], those to train on, in all their views.
    """
    views, device = rows.shape[1], rows.device
    taken = (images[:, None] * views + torch.arange(views)).flatten()
    rows = rows.flatten(0, 1)
    mean, variance = moments(rows, taken)
    weight = torch.zeros(len(lrs), classes, rows.shape[1], device=device)
    heads = Heads(mean, variance, weight, torch.zeros(len(lrs), classes, device=device))
    rates = torch.tensor(lrs, device=device)
    speeds = [torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)]
    per_epoch = math.ceil(len(taken) / config.batch)
    for epoch in range(config.epochs):
        order = taken[torch.randperm(len(taken), generator=generator(seed, "order", epoch))].to(device)
        for at, some in enumerate(order.tensor_split(per_epoch)):
            x, truth = heads.standardised(rows[some]), labels[some // views]
            # the gradient of the cross-entropy by hand: softmax minus one at the truth
            slope = heads.logits(x).softmax(2)
            slope[torch.arange(len(some), device=device), :, truth] -= 1
            slope /= len(some)
            slopes = [(slope.flatten(1).t() @ x).view_as(heads.weight), slope.sum(0)]
            slopes[0].add_(heads.weight, alpha=config.weight_decay)
            progress = (epoch * per_epoch + at) / (config.epochs * per_epoch)
            now = rates * (0.5 * (1 + math.cos(math.pi * progress)))
            for parameter, speed, gradient in zip((heads.weight, heads.bias), speeds, slopes, strict=True):
                speed.mul_(config.momentum).add_(gradient)
                parameter.sub_(now.view(-1, *[1] * (parameter.ndim - 1)) * speed)
    return heads


def moments(rows: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the rows [n,W] at `taken`, Float[W] each, summed up in double precision."""
    parts = taken.to(rows.device).split(ROWS)
    mean = torch.stack([rows[part].double().sum(0) for part in parts]).sum(0) / len(taken)
    variance = torch.stack([(rows[part].double() - mean).square().sum(0) for part in parts]).sum(0) / len(taken)
    return mean.float(), variance.float()


@torch.no_grad()
def knn(rows: Tensor, labels: Tensor, val_rows: Tensor, val_labels: Tensor, classes: int, k: int) -> float:
    """Top-1 in per cent of the vote of each image's k nearest training images by cosine, weighted exp(cosine / T)."""
    k, hits = min(k, len(rows)), 0
    bank = normalize(rows.float(), dim=1)
    chunk = max(1, ELEMENTS // len(rows))
    for some, truth in zip(val_rows.split(chunk), val_labels.split(chunk), strict=True):
        near, who = (normalize(some.float(), dim=1) @ bank.t()).topk(k, 1)
        votes = torch.zeros(len(some), classes, device=rows.device)
        votes.scatter_add_(1, labels[who], (near / TEMPERATURE).exp())
        hits += int((votes.argmax(1) == truth).sum())
    return 100 * hits / len(val_rows)


# -------------------- what is kept


def head_path(out: Path, block: int, pooling: str) -> Path:
    return out / "heads" / f"block{block}-{pooling}.safetensors"


def write_head(path: Path, row: dict[str, Any], head: Heads, key: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in vars(head).items()}
        with atomic_replace(path) as temporary:
            save_file(tensors, temporary, {KEY: key, ROW: json.dumps(row)})
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def known(path: Path, key: str) -> dict[str, Any] | None:
    """The row of a head that was trained on this task before."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        about = file.metadata()
    return json.loads(about[ROW]) if about[KEY] == key else None


def shown(row: dict[str, Any]) -> list[str]:
    """The figures of a row, in the order of the table."""
    return [name for name in ("held_out", "top1", "top5", "knn") if name in row]


def finish(
    recipe: "Recipe", rows: list[dict[str, Any]], encoder: Encoder, train_set: ImageSource, images: int, judged: int
) -> None:
    """Write results.json, metrics.jsonl, the picture, and the classifier of the row that the held-out images prefer."""
    config, out = recipe.fast, Path(recipe.out)
    picked = "held_out" if config.held_out else "top1"
    best = max(rows, key=lambda row: row[picked])
    if len(config.lrs) > 2 and best["lr"] in (min(config.lrs), max(config.lrs)):
        log.warning("the best rate, %g, is at the end of fast.lrs: the optimum may lie beyond", best["lr"])
    how = f"{config.held_out:.0%} of the training images" if config.held_out else "the validation images themselves"
    results = {
        "images": judged,
        "classes": len(train_set.classes),
        "trained_on": images,
        "picked_by": how,
        "best": best,
        "lrs": config.lrs,
        "rows": rows,
    }
    lines = [{"step": row["block"], **{name: row[name] for name in row if name != "sweep"}} for row in rows]
    write_atomically(out / RESULTS, json.dumps(results, indent=1).encode())
    write_atomically(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    draw(rows, out / "images" / "blocks.png")
    save_model(classifier(recipe, best, encoder, train_set.classes), out / MODEL_FILE)


def classifier(recipe: "Recipe", row: dict[str, Any], encoder: Encoder, names: tuple[str, ...]) -> Classifier:
    """The encoder up to the row's block with its head: the standardisation becomes the batch norm's statistics."""
    mean, std = NORMALISATION[recipe.normalisation]
    cut(encoder, row["block"])
    model = Classifier(encoder, len(names), row["pooling"], "batch", names, mean, std, recipe.eval_crop)
    with safe_open(head_path(Path(recipe.out), row["block"], row["pooling"]), "pt") as file:
        model.fc_norm.running_mean, model.fc_norm.running_var = file.get_tensor("mean"), file.get_tensor("variance")
        model.head.weight = nn.Parameter(file.get_tensor("weight")[0])
        model.head.bias = nn.Parameter(file.get_tensor("bias")[0])
    return model


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture of the figures by block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot(xlabel="block", ylabel="top-1 on validation (%)")
    for number, pooling in enumerate(dict.fromkeys(row["pooling"] for row in rows)):
        part = [row for row in rows if row["pooling"] == pooling]
        for name, style, label in (("top1", "o-", "linear"), ("knn", "s--", "k-NN")):
            if name in part[0]:
                blocks, values = zip(*((row["block"], row[name]) for row in part), strict=True)
                axes.plot(blocks, values, style, color=f"C{number}", label=f"{label}, {pooling}")
    axes.set_xticks(sorted({row["block"] for row in rows}))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def show(out: Path, mode: str) -> None:
    """The table of a finished run on stdout."""
    if os.environ.get("RANK", "0") != "0" or not (out / RESULTS).exists():
        return
    results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    sys.stdout.write(table(results) if mode == "fast" else json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """A line a row, the picked one with a star."""
    rows = results["rows"]
    titles = {"held_out": "held out", "top1": "top-1", "top5": "top-5", "knn": "k-NN"}
    lines = [["block", "pooling", "lr", *(titles[name] for name in shown(rows[0])), ""]]
    for row in rows:
        figures = [f"{row[name]:.2f}" for name in shown(row)]
        lines.append(
            [str(row["block"]), row["pooling"], f"{row['lr']:g}", *figures, "*" if row == results["best"] else ""]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    foot = (
        f"per cent of {results['images']} validation images, {results['classes']} classes; "
        f"lr and * picked by {results['picked_by']}"
    )
    return "\n".join([*body, "", foot]) + "\n"
