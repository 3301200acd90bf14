"""What `addp bench` starts from: its checkpoints, data sets and packages, looked at before its first step."""

import hashlib
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.data.images import IMAGE_EXTENSIONS, ImageError
from addp_core.recipes.config import load_recipe
from addp_core.recipes.verbs import VERBS
from addp_core.training.run_folder import MODELS
from addp_core.weights.encoders import load_encoder
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.reading import read_weights
from tools import doctor
from tools.bench.curves import read_metrics

ROOMS = {"generation": "gen", "finetune": "cls", "linprobe": "cls", "robustness": "cls", "det": "det", "seg": "seg"}
PICTURES = 4  # of each set, to paint on


@dataclass(frozen=True)
class Arm:
    """A start: a column's name, its checkpoint, and what the file says about itself."""

    name: str
    model: str
    init: str  # pretrained | random
    digest: str  # of architecture and weights
    parameters: int | None  # of the encoder
    image_size: tuple[int, int]
    generates: bool

    def about(self) -> dict[str, Any]:
        """As bench.json has it: with the pretraining's budget, where its run folder tells; seconds are those of all
        stages that it trained.
        """
        found = {"model": self.model, "init": self.init, "parameters": self.parameters}
        found |= {"images_seen": None, "run": None, "seconds": None}
        run, last = _pretraining(Path(self.model))
        if self.init == "random" or not (run / "metrics.jsonl").is_file():
            return found
        seen, seconds = _spent(run, last)
        seconds += sum(_spent(run / part)[1] for part in ("tokenizer", "predictor"))
        return found | {"images_seen": seen or None, "run": str(run), "seconds": round(seconds, 1) or None}


def _pretraining(model: Path) -> tuple[Path, float]:
    """The run folder that a start comes from, and its last step: models/step-N holds weights kept on the way."""
    if model.name == MODEL_FILE:
        model = model.parent
    if model.parent.name == MODELS and (step := re.fullmatch(r"step-(\d+)", model.name)):
        return model.parent.parent, int(step[1])
    return model, math.inf


def _spent(run: Path, last: float = math.inf) -> tuple[int, float]:
    """(images seen, seconds) of a run up to its step `last`; (0, 0.0) where it has no metrics.jsonl."""
    seen, seconds = 0, 0.0
    for figures in read_metrics(run / "metrics.jsonl"):
        if "images" in figures and figures.get("img_s") and figures["step"] <= last:
            seconds += (figures["images"] - seen) / figures["img_s"]
            seen = figures["images"]
    return seen, seconds


def open_arms(models: dict[str, str], random: bool) -> list[Arm]:
    """The checkpoints, read once, and the arm "random". UserError, with the key, where one cannot be read."""
    arms, shapes = [], []
    for name, model in models.items():
        with naming(f"models.{name}"):
            weights = read_weights(model)
            file = weights.architecture
            size = getattr(file, "image_size", None) or getattr(
                getattr(file, "encoder", None), "image_size", (224, 224)
            )
            state = _digest_of(f"{weights.kind} {file}", weights.state)
            parameters, drawn = None, state
            if weights.kind != "predictor":  # MAGE's, which needs a tokenizer to be an encoder
                encoder = load_encoder(model, size, init="random")
                parameters = sum(parameter.numel() for parameter in encoder.parameters())
                drawn = _drawn_from(encoder)
        shapes.append(drawn)
        arms.append(Arm(name, model, "pretrained", state, parameters, tuple(size), weights.kind == "addp"))
    if random:
        first = arms[0]
        arms.append(Arm("random", first.model, "random", shapes[0], first.parameters, first.image_size, False))
    return arms


def _digest_of(text: str, state: dict[str, Any]) -> str:
    """Of words and tensors."""
    digest = hashlib.sha256(text.encode())
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _drawn_from(encoder: Any) -> str:
    """A digest of what an encoder with random weights takes from its checkpoint: the architecture, and the tokenizer
    of one over token ids.
    """
    about = [type(encoder).__name__, encoder.config, encoder.image_size, encoder.patch_size]
    if tokenizer := getattr(encoder, "tokenizer", None):
        return _digest_of(f"random {about} {encoder.vocabulary}", tokenizer.state_dict())
    return _digest_of(f"random {about} {encoder.attention}", {})


# -------------------- data


@dataclass(frozen=True)
class Picture:
    """A validation picture to paint on: where it is put, its size (width, height) and its file's content."""

    path: Path
    size: tuple[int, int]
    content: bytes


@dataclass
class Inputs:
    """Data sets that were looked at: a digest of each path's listing, and pictures of the validation part of some."""

    out: Path
    listings: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, list[Picture]] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        return self.out / "inputs" / name

    def write(self) -> None:
        """Put the pictures where the commands look for them, in place of those of an earlier set."""
        for name, pictures in self.pictures.items():
            self.folder(name).mkdir(parents=True, exist_ok=True)
            for stale in set(self.folder(name).glob("[0-9]*")) - {picture.path for picture in pictures}:
                stale.unlink(missing_ok=True)
            for picture in pictures:
                if not picture.path.exists() or picture.path.read_bytes() != picture.content:
                    write_atomically(picture.path, picture.content)

    def keep(self, name: str, source: Any) -> None:
        """Remember a few pictures of an ImageSource, evenly spread; those that cannot be read are passed over."""
        count = min(PICTURES, len(source))
        self.pictures[name] = []
        for number in range(count):
            index = number * len(source) // count
            suffix = Path(source.name(index)).suffix.lower()
            try:
                picture = source.open_image(index)[0]
                content = source.read_bytes(index)[0]
            except (ImageError, OSError):
                continue
            path = self.folder(name) / f"{number:03d}{suffix if suffix in IMAGE_EXTENSIONS else '.png'}"
            self.pictures[name].append(Picture(path, (picture.width, picture.height), content))


def open_sets(recipe: Any, wanted: set[str]) -> Inputs:
    """Look at every set of `recipe.data` that the wanted benchmarks read. UserError, with the key, for what is not
    there or not laid out as expected.
    """
    inputs, data = Inputs(Path(recipe.out)), recipe.data
    for name, path in vars(data).items():
        if path:
            with naming(f"data.{name}"):
                inputs.listings[path] = listing(path)
                OPENERS[name](recipe, path, inputs, wanted)
    return inputs


def _open_imagenet(recipe: Any, path: str, inputs: Inputs, wanted: set[str]) -> None:
    from addp_core.data.sources import open_source

    source = open_source(path, "val")
    if not source.classes and wanted & {"finetune", "linprobe", "robustness"}:
        raise UserError(f"data.source: {path} has no class folders; expected train/<class>/ and val/<class>/")
    if Path(path).is_dir() and not (Path(path) / "meta").is_dir():
        missing = [part for part in ("train", "val") if not (Path(path) / part).exists()]
        if missing and not any(Path(path).glob("*.tar")):
            raise UserError(f"data.source: {path} has no {missing[0]}/; expected train/<class>/ and val/<class>/")
    inputs.keep("imagenet", source)


def _open_variant(recipe: Any, path: str, inputs: Inputs, wanted: set[str]) -> None:
    from addp_core.data.sources import open_source

    open_source(path, recipe.robustness.set.get("split", "val"))


def _open_corruptions(recipe: Any, path: str, inputs: Inputs, wanted: set[str]) -> None:
    from cls.robustness import cells_on_disk

    cells_on_disk(Path(path).expanduser(), bool(recipe.robustness.set.get("allow_missing")))


def _open_coco(recipe: Any, path: str, inputs: Inputs, wanted: set[str]) -> None:
    if "det" not in wanted:
        return
    from det.coco import locate, open_coco
    from det.config import CocoFiles

    keys = {key.removeprefix("data."): value for key, value in recipe.det.set.items() if key.startswith("data.")}
    files = CocoFiles(**{"root": path} | {key: value for key, value in keys.items() if key in vars(CocoFiles())})
    locate(files, "train")  # hundreds of megabytes to read, which is the training's to do
    inputs.keep("coco", open_coco(files, "val"))


def _open_scenes(recipe: Any, path: str, inputs: Inputs, wanted: set[str]) -> None:
    if "seg" not in wanted:
        return
    from addp_core.data.sources import ImageFiles
    from seg.scenes import class_names, find_pairs

    class_names(path, recipe.seg.set.get("data.classes", ""))
    find_pairs(path, "train")
    pairs = find_pairs(path, "val")
    inputs.keep("ade20k", ImageFiles(Path(), [str(pair.picture) for pair in pairs]))


OPENERS = {
    "imagenet": _open_imagenet,
    "imagenet_a": _open_variant,
    "imagenet_r": _open_variant,
    "sketch": _open_variant,
    "imagenet_c": _open_corruptions,
    "coco": _open_coco,
    "ade20k": _open_scenes,
}


def listing(path: str) -> str:
    """A digest of a set without reading it. A path that is none (a hub set) stands for itself.

    It is of all names at any depth, of size and time of what is no picture (annotations, lists, archives), and of the
    time of each folder, which changes where something is added, removed or put in another's place. Pictures are not
    looked up one by one: ImageNet's 1.3 million names take seconds, and minutes would go by on a network's disk if each
    was asked for its size. A picture that is written over in its place therefore goes unnoticed, and a copy of a set
    counts as the same set if it kept the times (cp -a, tar).
    """
    root, digest, seen = Path(path).expanduser(), hashlib.sha256(), set()

    def add(*words: Any) -> None:
        digest.update(os.fsencode(" ".join(map(str, words))) + b"\0")

    if root.is_file():
        add(root.stat().st_size, root.stat().st_mtime_ns)
    elif not root.exists():
        add(path)
    pending = [""] if root.is_dir() else []
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(root / folder)
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError:  # what nobody may read, or a link to nowhere, is part of no set
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            continue
        seen.add((status.st_dev, status.st_ino))
        add(folder, status.st_mtime_ns)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            add(entry.name)
            if entry.is_dir():
                pending.append(os.path.join(folder, entry.name))
            elif os.path.splitext(entry.name)[1].lower() not in IMAGE_EXTENSIONS:
                with suppress(OSError):
                    add(entry.stat().st_size, entry.stat().st_mtime_ns)
    return digest.hexdigest()


def in_middle(size: tuple[int, int]) -> list[int]:
    """The box over the middle quarter of a picture's central square: left, top, right, bottom."""
    width, height = size
    half = min(size) // 2
    left, top = (width - half) // 2, (height - half) // 2
    return [left, top, left + half, top + half]


# -------------------- packages and recipes


def check_packages(benchmarks: set[str]) -> None:
    """UserError where a package that one of them needs is not installed."""
    for benchmark in sorted(benchmarks):
        needs = doctor.TASKS[ROOMS[benchmark]].needs + (("torch_fidelity",) if benchmark == "generation" else ())
        for module in needs:
            if importlib.util.find_spec(module) is None:
                raise UserError(
                    f"{benchmark}: the package {module!r} is not installed; add it with: {doctor.command_for(module)}; "
                    "or name the other benchmarks in bench.only"
                )


def typed(words: list[str], benchmark: str) -> Any:
    """The recipe that `addp <words>` would run with. UserError, with the benchmark, where it would be refused."""
    verb = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    rest = words[len(verb.split()) :]
    module = importlib.import_module(VERBS[verb][0])
    named = rest[0] if rest and "=" not in rest[0] else None
    try:
        return load_recipe(module, named, rest[1:] if named else rest)
    except UserError as error:
        raise UserError(f"{benchmark}: {error}") from error


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Errors name the bench's key instead of a verb's."""
    try:
        yield
    except UserError as error:
        text = str(error)
        named = re.match(r"(data\.\w+|imagenet_c): ", text)
        raise UserError(f"{key}: {text[named.end() :] if named else text}") from error
