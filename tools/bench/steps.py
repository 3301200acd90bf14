"""The steps of `addp bench`: what each benchmark runs for an arm, what its result depends on, and what came out.

A benchmark is an entry of TRAININGS, which `addp sweep` runs over a grid and seeds, or one of the two that look at what
is there: generation and robustness. To add one: its keys in bench.Recipe, its entry here, its opening in inputs.py.
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml

import addp_core
from addp_core.base.errors import UserError, did_you_mean
from addp_core.recipes.config import dump
from addp_core.training.run_folder import COMPUTE_ONLY
from tools.bench import sweep
from tools.bench.children import command_line
from tools.bench.inputs import Arm, Inputs, in_middle, typed

STEP, LOG, SWEEP = "step.json", "log.txt", "sweep.yaml"  # in a step's folder
PICTURES, FILLED = "pictures", "inpaint"  # and these, of pictures alone
BEST = "best:"  # best:finetune/random stands for the best run of that step, with the first seed
SHOWN = 64  # generated images on a grid
SURE, MOST = 0.1, 8  # detections to draw: weak detectors are never surer, of good ones a few will do
REPAINTED = 3  # pictures with a hole to fill
ELSEWHERE = COMPUTE_ONLY | {"model", "workers", "cache"}  # keys that say nothing about a result, or twice


@dataclass
class Evaluation:
    """How a benchmark looks at what is there."""

    set: Annotated[
        dict[str, Any], f"settings of its verb; {BEST}finetune/random stands for the best run of that step"
    ] = field(default_factory=dict)
    seeds: Annotated[list[int] | None, "instead of the bench's"] = None
    arms: Annotated[list[str], "the models, and random, that it is for; none: all"] = field(default_factory=list)


@dataclass
class Transfer(Evaluation):
    """How a benchmark trains."""

    recipe: Annotated[str, "recipe of its verb; empty: none"] = ""
    grid: Annotated[dict[str, list[Any]], "key -> values: the small sweep that every arm gets, with the first seed"] = (
        field(default_factory=dict)
    )


@dataclass(frozen=True)
class Training:
    """A benchmark that trains: its verb, its set, the key that takes the set's path, the figure that settings are
    picked by, and what its scores are: name -> (place in the figures, factor to per cent).
    """

    verb: str
    data: str
    source: str
    metric: str
    scores: dict[str, tuple[str, float]]


TRAININGS = {
    "finetune": Training("finetune", "imagenet", "data.source", "last.top1", {"top1": ("last.top1", 1)}),
    "linprobe": Training("linprobe", "imagenet", "data.source", "last.top1", {"top1": ("last.top1", 1)}),
    "det": Training(
        "det train", "coco", "data.root", "box_AP", {"box_ap": ("box_AP", 100), "mask_ap": ("mask_AP", 100)}
    ),
    "seg": Training("seg train", "ade20k", "data.source", "mIoU", {"miou": ("mIoU", 1)}),
}
FAST = replace(TRAININGS["linprobe"], metric="best.top1", scores={"top1": ("best.top1", 1)})  # picks a head by itself
BENCHMARKS = ("generation", "finetune", "linprobe", "robustness", "det", "seg")
ROBUSTNESS = {"imagenet_a": "a", "imagenet_r": "r", "sketch": "sketch", "imagenet_c": "c", "corrupt": "c_generated"}
GENERATION = {"fid": "fid", "fd": "fd", "is_mean": "is", "cs_mean": "cs", "precision": "precision", "recall": "recall"}


@dataclass
class Step:
    """One benchmark of one arm, in `out/<benchmark>/<arm>`."""

    benchmark: str
    arm: Arm
    out: Path
    seeds: list[int] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)  # words behind `addp`, one run after the other
    processes: int = 1
    training: Training | None = None
    trials: sweep.Recipe | None = None  # of the training
    needs: list[str] = field(default_factory=list)  # names of steps
    basis: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""  # why

    @property
    def name(self) -> str:
        return f"{self.benchmark}/{self.arm.name}"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def lines(self) -> list[str]:
        """The commands as one would type them."""
        return [command_line(words, self.shared(words)) for words in self.commands]

    def shared(self, words: Sequence[str]) -> int:
        """Processes of a command: a sweep starts them itself, a few pictures need one."""
        return self.processes if words[0] in ("evaluate", "robustness") else 1

    @property
    def basis_digest(self) -> str:
        """Of what all results in the folder depend on: with another one they are worth nothing."""
        return digest(self.basis)

    @property
    def fingerprint(self) -> str:
        """Of everything: a finished step with another one is done again, with what is still good."""
        told = [[word for word in words if word.partition("=")[0] not in ELSEWHERE] for words in self.commands]
        return digest([self.basis, told, self.trials.grid if self.trials else {}, self.seeds])

    def note(self) -> dict[str, Any]:
        """Its step.json; empty where there is none."""
        path = self.folder / STEP
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def done(self) -> bool:
        note = self.note()
        return note.get("state") == "done" and note["fingerprint"] == self.fingerprint


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


# -------------------- what is to be done


def plan(recipe: Any, arms: Sequence[Arm], inputs: Inputs) -> dict[str, Step]:
    """All steps of a bench by name, those that are left out among them. UserError for settings that do not fit."""
    steps = {step.name: step for name in BENCHMARKS for step in _benchmark(recipe, name, arms, inputs)}
    for step in steps.values():
        for needed in step.needs:
            if needed not in steps:
                known = ", ".join(name for name in steps if name.startswith("finetune/"))
                raise UserError(f"{step.benchmark}.set: {BEST}{needed}: no such step; expected one of {known}")
            if steps[needed].left_out and not step.left_out:
                step.left_out = f"needs {needed}, which is left out"
    for step in steps.values():
        if not step.left_out:
            step.basis["needs"] = {needed: steps[needed].fingerprint for needed in step.needs}
    return steps


def _benchmark(recipe: Any, name: str, arms: Sequence[Arm], inputs: Inputs) -> Iterator[Step]:
    """A benchmark's step for each arm."""
    keys, names = getattr(recipe, name), [arm.name for arm in arms]
    for unknown in set(keys.arms) - set(names):
        raise UserError(
            f"{name}.arms: found {unknown!r}, expected some of {', '.join(names)}{did_you_mean(unknown, names)}"
        )
    for arm in arms:
        step = Step(name, arm, Path(recipe.out), processes=recipe.bench.processes)
        step.seeds = keys.seeds or (recipe.finetune.seeds if name == "robustness" else None) or recipe.seeds
        sets = [TRAININGS[name].data] if name in TRAININGS else ["imagenet"]
        if name == "robustness":
            sets = [key for key in ROBUSTNESS if getattr(recipe.data, key, "")] or ["imagenet_a"]
        lacking = [key for key in sets if not getattr(recipe.data, key)]
        if keys.arms and arm.name not in keys.arms:
            step.left_out = f"not one of {name}.arms"
        elif lacking and not (name == "robustness" and "corrupt" in keys.set):
            step.left_out = f"data.{lacking[0]} is not given"
        elif name == "generation" and arm.init == "random":
            step.left_out = "an encoder of random weights generates nothing"
        elif name == "generation" and not arm.generates:
            step.left_out = f"{arm.model} is no ADDP checkpoint"
        else:
            settings = {key: _resolved(value, step, recipe) for key, value in keys.set.items()}
            paths = {key: getattr(recipe.data, key) for key in sets if getattr(recipe.data, key)}
            if name == "generation":
                _generation(step, settings, paths["imagenet"], inputs)
            elif name == "robustness":
                _robustness(step, settings, paths, recipe)
            else:
                _training(step, settings, paths[sets[0]], recipe, inputs)
            step.basis |= {
                "addp": addp_core.__version__,
                "model": arm.digest,
                "data": {key: inputs.listings[path] for key, path in paths.items()},
            }
        yield step


def _resolved(value: Any, step: Step, recipe: Any) -> Any:
    if not (isinstance(value, str) and value.startswith(BEST)):
        return value
    needed = value.removeprefix(BEST)
    step.needs.append(needed)
    benchmark, _, arm = needed.partition("/")
    seeds = getattr(getattr(recipe, benchmark, None), "seeds", None) or recipe.seeds
    return str(sweep.best_run(step.out / needed / arm, seeds[0]))


def as_words(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={sweep.word(value, 0)}" for key, value in settings.items()]


def _training(step: Step, settings: dict[str, Any], path: str, recipe: Any, inputs: Inputs) -> None:
    training, keys = TRAININGS[step.benchmark], getattr(recipe, step.benchmark)
    start = {"model": step.arm.model} | ({"init": "random"} if step.arm.init == "random" else {})
    given = {training.source: path, **settings}
    words = [*training.verb.split(), *([keys.recipe] if keys.recipe else []), *as_words(given | start)]
    words.append(f"out={step.folder}")
    for values in itertools.product(*keys.grid.values()):
        typed([*words, *as_words(dict(zip(keys.grid, values, strict=True)))], step.benchmark)
    chosen = typed(words, step.benchmark)
    step.basis["settings"] = essence(chosen)
    step.training = FAST if step.benchmark == "linprobe" and chosen.mode == "fast" else training
    step.trials = sweep.Recipe(
        out=str(step.folder),
        verb=training.verb,
        arms={step.arm.name: start},
        recipe=keys.recipe,
        set=given,
        grid=keys.grid,
        seeds=step.seeds,
        metric=step.training.metric,
        jobs=recipe.jobs,
        processes=step.processes,
    )
    step.commands = [["sweep", str(step.folder / SWEEP)]]
    if step.benchmark in ("det", "seg"):
        trained = sweep.best_run(step.folder / step.arm.name, step.seeds[0])
        shown = inputs.folder(training.data)
        words = [step.benchmark, "predict", f"model={trained}", f"images={shown}", f"out={step.folder / PICTURES}"]
        step.commands.append([*words, f"score={SURE}", f"most={MOST}"] if step.benchmark == "det" else words)


def _robustness(step: Step, settings: dict[str, Any], paths: dict[str, str], recipe: Any) -> None:
    seeds = recipe.finetune.seeds or recipe.seeds
    if unknown := [seed for seed in step.seeds if seed not in seeds]:
        raise UserError(f"robustness.seeds: found {unknown[0]}, expected seeds of finetune: {seeds}")
    tuned = f"finetune/{step.arm.name}"
    step.needs.append(tuned)
    for seed in step.seeds:
        model = sweep.best_run(step.out / tuned / step.arm.name, seed)
        keys = {"model": model, "out": step.folder / f"seed{seed}", **paths, **settings}
        step.commands.append(["robustness", *as_words({key: _text(value) for key, value in keys.items()})])
    step.basis["settings"] = essence(typed(step.commands[0], step.benchmark))


def _generation(step: Step, settings: dict[str, Any], reference: str, inputs: Inputs) -> None:
    for seed in step.seeds:
        keys = {"model": step.arm.model, "reference": reference, "out": step.folder / f"seed{seed}", "seed": seed}
        step.commands.append(["evaluate", *as_words({key: _text(value) for key, value in (keys | settings).items()})])
    step.basis["settings"] = essence(typed(step.commands[0], step.benchmark))
    shared = ("sampling", "tokenizer", "encoder_heads", "decoder_heads", "precision")
    shared = {key: value for key, value in settings.items() if key.split(".")[0] in shared}
    for picture in inputs.pictures["imagenet"][:REPAINTED]:
        keys = {"model": step.arm.model, "image": picture.path, "out": step.folder / FILLED / picture.path.stem}
        keys |= {"size": list(step.arm.image_size), "box": in_middle(picture.size), "n": 3, **shared}
        step.commands.append(["inpaint", *as_words({key: _text(value) for key, value in keys.items()})])
        typed(step.commands[-1], step.benchmark)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def essence(recipe: Any) -> dict[str, Any]:
    """The resolved recipe of a verb without what does not change its result, or is told apart otherwise."""
    tree = yaml.safe_load(dump(recipe))
    for key in ELSEWHERE:
        *sections, last = key.split(".")
        section = tree
        for name in sections:
            section = section.get(name) or {}
        section.pop(last, None)
    return tree


# -------------------- what came out


def scores(step: Step) -> dict[str, Any]:
    """Of a step that has run: setting, seeds, scores, chance, runs, pictures and a training's notes, as bench.json has
    them.
    """
    if step.benchmark in TRAININGS:
        found = _training_scores(step)
    elif step.benchmark == "robustness":
        found = _robustness_scores(step)
    else:
        found = _generation_scores(step)
    found["pictures"] = [str(path.relative_to(step.out)) for path in found["pictures"]]
    found["runs"] = {str(seed): str(path.relative_to(step.out)) for seed, path in found["runs"].items()}
    return {"seeds": step.seeds, **found}


def _training_scores(step: Step) -> dict[str, Any]:
    arm = step.arm.name
    picked = json.loads((step.folder / "sweep.json").read_text(encoding="utf-8"))["arms"][arm]
    runs = {seed: sweep.best_run(step.folder / arm, seed) for seed in step.seeds}
    figures, places = [sweep.figures(run) for run in runs.values()], step.training.scores
    found = {name: [factor * _at(each, place) for each in figures] for name, (place, factor) in places.items()}
    if step.benchmark == "seg":
        chance = figures[0]["constant_mIoU"]
    else:
        chance = 0.0 if step.benchmark == "det" else 100 / figures[0]["classes"]
    return {
        "setting": picked["setting"],
        "grid": {name.split("/")[-1]: score for name, score in picked["grid"].items()},
        "notes": picked["notes"],
        "scores": found,
        "chance": dict.fromkeys(found, chance),
        "runs": runs,
        "pictures": sorted((step.folder / PICTURES).glob("*.png")),
    }


def _at(tree: dict[str, Any], place: str) -> Any:
    for part in place.split("."):
        tree = tree[part]
    return tree


def _robustness_scores(step: Step) -> dict[str, Any]:
    from cls.robustness import CORRUPTIONS, corruption_errors

    reports = [json.loads((step.folder / f"seed{seed}" / "results.json").read_text("utf-8")) for seed in step.seeds]
    found: dict[str, list[float]] = {}
    chance = {}
    for report in reports:
        for row in report["rows"]:
            if name := ROBUSTNESS.get(row["key"]):
                found.setdefault(name, []).append(row["score"])
                chance[name] = 100 / row["classes"]
                if name.startswith("c"):  # 1 - mCE: the guess's errors, too, are divided by AlexNet's
                    guess = {corruption: {1: 1 - 1 / row["classes"]} for corruption in CORRUPTIONS}
                    errors = [each["ce"] for each in corruption_errors(guess).values()]
                    chance[name] = 100 - sum(errors) / len(errors)
        if report["average"] is not None:
            found.setdefault("average", []).append(report["average"])
    if "average" in found:
        chance["average"] = sum(chance[name] for name in found if name != "average") / (len(found) - 1)
    runs = {seed: step.folder / f"seed{seed}" for seed in step.seeds}
    return {"setting": {}, "scores": found, "chance": chance, "runs": runs, "pictures": []}


def _generation_scores(step: Step) -> dict[str, Any]:
    from gen.image_folder import write_grid

    runs = {seed: step.folder / f"seed{seed}" for seed in step.seeds}
    tables = [json.loads((run / "evaluation.json").read_text("utf-8"))["rows"] for run in runs.values()]
    place = min(range(len(tables[0])), key=lambda i: tables[0][i].get("fid", tables[0][i].get("fd")))
    rows = [table[place] for table in tables]
    found = {name: [row[key] for row in rows] for key, name in GENERATION.items() if key in rows[0]}
    images = next(iter(runs.values())) / rows[0]["name"]
    write_grid(images, min(rows[0]["images"], SHOWN))
    pictures = [images / "grid.png", *sorted((step.folder / FILLED).glob("*/grid.png"))]
    setting = {f"sampling.{key}": value for key, value in rows[0]["sampling"].items()}
    return {"setting": setting, "scores": found, "chance": {}, "runs": runs, "pictures": pictures}


# -------------------- the folder of a step


def make_ready(step: Step) -> str:
    """Make its folder and write what its commands read. Results that no longer hold are moved aside, into
    `out/before`; returns where to, or "".
    """
    aside = ""
    known = step.note().get("basis")
    if known is not None and known != step.basis_digest:
        taken = [
            re.sub(r".*-", "", path.name) for path in (step.out / "before").glob(f"{step.benchmark}-{step.arm.name}-*")
        ]
        number = max((int(text) for text in taken if text.isdigit()), default=0) + 1
        target = step.out / "before" / f"{step.benchmark}-{step.arm.name}-{number}"
        target.parent.mkdir(exist_ok=True)
        step.folder.rename(target)
        aside = str(target)
    step.folder.mkdir(parents=True, exist_ok=True)
    for name in (PICTURES, FILLED):
        shutil.rmtree(step.folder / name, ignore_errors=True)
    if step.trials:
        (step.folder / SWEEP).write_text(dump(step.trials), encoding="utf-8")
    return aside
