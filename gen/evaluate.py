"""`addp evaluate`: FID, Inception score, precision, recall and KID of generated images, a row for each setting.

Measures a folder of images, or generates them from a model: once with `sampling`, or with every combination in `sweep`.
Numbers are torch-fidelity's on the same images. With `extractor` the features are those of a classifier trained with
`addp finetune`; distance, score and kernel distance are then called FD, CS and KD, for they are not Inception's.
"""

import json
import logging
import shutil
import sys
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from accelerate import PartialState
from annotated_types import Ge, Gt, Interval

from addp_core.base.errors import UserError, calling
from addp_core.base.files import TEMPORARY, write_atomically
from addp_core.data.images import ImageError
from addp_core.data.sources import Files, ImageSource, open_source
from addp_core.method.sampler import SampleConfig
from addp_core.training.compute import Precision
from addp_core.training.engine import process_state
from gen import generate
from gen.common import REPORT, DecoderHeads, EncoderHeads, TokenizerSource, image_path, load_named
from gen.features import Extractor, Features, cached, content, extract, only, open_extractor, read_statistics
from gen.metrics import NEIGHBOURS, frechet_distance, inception_score, kernel_distance, precision_recall

log = logging.getLogger("addp")

FEW = 10_000  # images, below which FID is known to be too high


@dataclass
class Sweep:
    """Sampling settings to compare: every combination of those listed; none listed: the one of `sampling`."""

    steps: Annotated[tuple[Annotated[int, Ge(1)], ...], "as in steps=[4,8,20]"] = ()
    schedule: tuple[Literal["cosine", "linear"], ...] = ()
    temperature: tuple[Annotated[float, Ge(0)], ...] = ()
    top_p: tuple[Annotated[float, Interval(ge=0, le=1)], ...] = ()
    top_k: tuple[Annotated[int, Ge(0)], ...] = ()
    order: tuple[Literal["confidence", "halton"], ...] = ()


@dataclass
class Recipe:
    """Keys of `addp evaluate`."""

    out: Annotated[str, f"folder for {REPORT} and, with `model`, the generated images"]
    reference: Annotated[
        str,
        "images to compare with: folder, ImageNet root, .tar or hub set, centre-cropped to the size of the generated "
        "ones; or statistics: a folder of the cache, or an .npz file with mu and sigma",
    ]
    split: Annotated[str, "part of the reference, where it has parts"] = "val"
    images: Annotated[str, "folder of generated images, all of one size"] = ""
    model: Annotated[str, "instead of `images`: a run or ADDP file, which generates what is missing below `out`"] = ""
    n: Annotated[int, Ge(1), "images to generate; published numbers take 50000"] = 50_000
    seed: Annotated[int, "of generated images"] = 0
    sampling: SampleConfig = field(default_factory=SampleConfig)
    sweep: Sweep = field(default_factory=Sweep)
    inception: Annotated[str, "file of torch-fidelity's Inception-v3 weights; empty: its own download"] = ""
    extractor: Annotated[str, "instead of Inception: a run of `addp finetune` on labelled images, or its file"] = ""
    is_splits: Annotated[int, Ge(1), "parts that the score's mean and deviation are over"] = 10
    kid_subset: Annotated[int, Ge(2), "images in each of KID's 100 subsets; fewer where there are fewer"] = 1000
    cache: Annotated[str, "folder that keeps the features of references"] = "~/.cache/addp/features"
    batch: Annotated[int, Gt(0), "images generated at a time on each process"] = 16
    workers: Annotated[int, Ge(0), "loading processes of each process"] = 2
    precision: Precision = "fp32"
    tokenizer: TokenizerSource = ""
    encoder_heads: EncoderHeads = None
    decoder_heads: DecoderHeads = None


def run(recipe: Recipe) -> None:
    """Generate what is missing, extract features, write the table to stdout and the report to `out`."""
    out, state = Path(recipe.out), process_state()
    rows = settings(recipe)
    given = None
    if recipe.images:
        with calling({"data.source": "images", "data.split": "images"}):
            given = generated_images(Path(recipe.images).expanduser())
    check_counts(recipe.n if given is None else len(given), recipe.is_splits)
    reference = open_reference(recipe)
    hw = load_named(recipe).config.image_size if given is None else size_of_first(given)
    extractor = open_extractor(recipe.inception, recipe.extractor, state.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror})") from error
    known = Known.of(reference, hw, recipe, extractor)  # before hours of generating

    report: dict[str, Any] = {"features": extractor.label, "reference": recipe.reference, "rows": []}
    for name, sampling in rows.items():
        if given is None:
            generate.run(generation(recipe, out / name, sampling))
        images = generated_images(out / name, recipe.n) if given is None else given
        warn_of_equal_sets(images, known, recipe)
        found = extract(images, only(hw), extractor, out / f"{TEMPORARY}features", recipe.workers)
        if state.is_main_process:
            row = {"name": name, "images": len(images), **measure(found, known.features, recipe, extractor)}
            report["rows"].append(row | ({} if sampling is None else {"sampling": vars(sampling)}))
            write_atomically(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
        state.wait_for_everyone()
    if state.is_main_process:
        if len(images) < FEW:
            log.warning("%d images: too few for numbers that compare with published ones", len(images))
        shutil.rmtree(out / f"{TEMPORARY}features", ignore_errors=True)
        sys.stdout.write(table(report))


# -------------------- what is compared


def settings(recipe: Recipe) -> dict[str, SampleConfig | None]:
    """A row's name and its sampling settings; None for a folder of images that are there already."""
    listed = {f.name: getattr(recipe.sweep, f.name) for f in fields(Sweep)}
    if bool(recipe.images) == bool(recipe.model):
        raise UserError("images, model: expected one of them: a folder of generated images, or a model that makes them")
    if recipe.images:
        if any(listed.values()):
            raise UserError("sweep: needs model=<run or file>, which generates the images of each setting")
        return {recipe.images: None}
    listed = {key: values for key, values in listed.items() if values}
    swept = [replace(recipe.sampling, **dict(zip(listed, values, strict=True))) for values in product(*listed.values())]
    return {row_name(sampling): sampling for sampling in swept}


def row_name(s: SampleConfig) -> str:
    """Of a folder and a row: all settings, short."""
    name = f"{s.schedule}-{s.steps}"
    name += "-halton" if s.order == "halton" else f"-t{s.temperature:g}"
    return name + (f"-p{s.top_p:g}" if s.top_p < 1 else "") + (f"-k{s.top_k}" if s.top_k else "")


def generation(recipe: Recipe, out: Path, sampling: SampleConfig) -> generate.Recipe:
    """`addp generate` with the keys that both verbs have."""
    shared = {f.name: getattr(recipe, f.name) for f in fields(generate.Recipe) if hasattr(recipe, f.name)}
    return generate.Recipe(**shared | {"out": str(out), "sampling": sampling, "grid": 0})


def generated_images(folder: Path, n: int | None = None) -> ImageSource:
    """The images of a folder, or its first `n` by `addp generate`, which keeps a grid and notes beside them.

    UserError, with the key data.source, where there are none.
    """
    if is_generated(folder):
        names = sorted(path.name for path in folder.glob("[0-9]*.png"))
        if not names:
            raise UserError(f"data.source: {folder} is empty: `addp generate` has made no image there yet")
        return Files(folder, names if n is None else [image_path(folder, i).name for i in range(n)])
    return open_source(str(folder))


def is_generated(folder: Path) -> bool:
    """Whether `addp generate` has made the folder."""
    return (folder / generate.WEIGHTS).exists()


def size_of_first(images: ImageSource) -> tuple[int, int]:
    """(height, width) of the first image."""
    try:
        picture, _ = images.picture(0)
    except ImageError as error:
        raise UserError(f"{images.name(0)}: {error}; repair or remove it") from error
    return picture.height, picture.width


def open_reference(recipe: Recipe) -> ImageSource | Path:
    """Images, or the path of statistics."""
    path = Path(recipe.reference).expanduser()
    if path.suffix == ".npz" or (path / "about.json").is_file():
        return path
    with calling({"data.source": "reference", "data.split": "split"}):
        return generated_images(path) if is_generated(path) else open_source(recipe.reference, recipe.split)


@dataclass(frozen=True)
class Known:
    """The reference: its features, and the digest of its files ("": unknown)."""

    features: Features
    content: str = ""

    @classmethod
    def of(cls, reference: ImageSource | Path, hw: tuple[int, int], recipe: Recipe, extractor: Extractor) -> "Known":
        if isinstance(reference, Path):
            return cls(*read_statistics(reference, extractor))
        check_counts(len(reference), which="reference")
        digest = content(reference)
        cache = Path(recipe.cache).expanduser()
        return cls(cached(reference, digest, hw, extractor, cache, recipe.workers), digest)


def check_counts(n: int, splits: int = 1, which: str = "images") -> None:
    """UserError where there are too few images for what is measured."""
    if n <= NEIGHBOURS:
        raise UserError(f"{which}: {n} of them; expected more than {NEIGHBOURS}, as precision and recall need")
    if n < splits:
        raise UserError(f"is_splits: {splits} parts of {n} images; expected is_splits={n} or less, or more images")


def warn_of_equal_sets(images: ImageSource, known: Known, recipe: Recipe) -> None:
    if known.content and content(images) == known.content:
        log.warning(
            "reference: %s holds the very images that are measured: the distance says nothing", recipe.reference
        )


# -------------------- what comes out


def measure(generated: Features, reference: Features, recipe: Recipe, extractor: Extractor) -> dict[str, float]:
    """All metrics. Names say whether Inception saw the images."""
    distance, score, kernel = ("fid", "is", "kid") if extractor.is_inception else ("fd", "cs", "kd")
    found = {distance: frechet_distance(generated, reference)}
    found[f"{score}_mean"], found[f"{score}_std"] = inception_score(generated.logits, recipe.is_splits)
    if reference.features is not None:
        sets = generated.features, reference.features
        found["precision"], found["recall"] = precision_recall(*sets, PartialState().device)
        subset = min(recipe.kid_subset, *map(len, sets))
        found[f"{kernel}_mean"], found[f"{kernel}_std"] = kernel_distance(*sets, subset)
        found[f"{kernel}_subset"] = subset
    return found


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    names = {"fid": "FID", "fd": "FD", "is_mean": "IS", "cs_mean": "CS", "precision": "precision", "recall": "recall"}
    names |= {"kid_mean": "KID x 1000", "kd_mean": "KD x 1000"}
    columns = [key for key in names if key in report["rows"][0]]
    lines = [["images", "n", *(names[key] for key in columns)]]
    for row in report["rows"]:
        cells = [row["name"], str(row["images"])]
        for key in columns:
            scale = 1000 if key.startswith("k") else 1
            text = f"{row[key] * scale:.3f}"
            spread = row.get(key.replace("_mean", "_std")) if key.endswith("_mean") else None
            cells.append(text if spread is None else f"{text} ± {spread * scale:.3f}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([f"features: {report['features']}", f"reference: {report['reference']}", "", *body]) + "\n"
