"""The pretraining that a bench begins with: a step for each arm, and one for the frozen parts that arms share.

`pretrain/<arm>` runs `addp pretrain` once for each seed in `pretrain.seeds`, in `out/pretrain/<arm>/seed<n>`. The
tokenizer and the predictor of arms that train them in the same way on the same images are trained once, in
`pretrain/stages`. The later steps of an arm need its pretraining. Their results depend on its settings and data, not
on its seeds: a further seed keeps what exists.
"""

import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import addp_core
from addp_core.base.errors import UserError, did_you_mean
from tools.bench.arguments import as_argument, as_arguments, digest, digests_of_files, verb_recipe
from tools.bench.arms import PRETRAINED, Arm
from tools.bench.benchmark import Outcome, Settings
from tools.bench.benchmarks.imagenet import IMAGENET
from tools.bench.inputs import Inputs, listing_digest
from tools.bench.recipe import PRETRAIN, PRETRAINED_HERE, STAGES, BenchRecipe
from tools.bench.step import STEP, Command, Step

if TYPE_CHECKING:
    from pretrain.addp import Recipe as PretrainRecipe

SEED_KEY = "train.seed"
FROZEN_KEYS = ("tokenizer", "predictor")  # whose weights are in the basis
SET_BY_BENCH = {"out": "the bench's out", SEED_KEY: "pretrain.seeds"}


@dataclass(frozen=True)
class FrozenParts:
    """The tokenizer and the predictor of an arm.

    Attributes:
        sources: "tokenizer" and "predictor" -> run folder or file.
        identity: What they depend on, or their weights if they are given.
        stride: Pixels of a side for each token.
        needs: The step that trains them, if one does.
        files: Digests of files that the settings of their training name.
    """

    sources: dict[str, str]
    identity: Any
    stride: int
    needs: list[str] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)


class Pretraining:
    """The arms that a bench pretrains, and the steps that do it.

    Args:
        needed: Names of arms whose pretraining is checked; what is wrong with any other one leaves its steps out.

    Raises:
        UserError: if a key is unknown, data are missing, or given frozen parts do not belong together.
    """

    def __init__(self, recipe: BenchRecipe, inputs: Inputs, needed: Collection[str]):
        self.recipe, self.keys, self.inputs, self.out = recipe, recipe.pretrain, inputs, Path(recipe.out)
        self.arms: list[Arm] = []
        self.steps: dict[str, Step] = {}
        self.trainings: dict[str, PretrainRecipe] = {}  # arm -> resolved recipe
        self._stages: dict[str, Step] = {}  # what frozen parts depend on -> the step that trains them
        self._loaded: dict[str, FrozenParts] = {}  # given files and the size of the images -> what was read
        self._seen: set[str] = set()  # datasets that have been opened
        runs: list[Step] = []
        for name in self.keys.arms:
            try:
                runs.append(self._plan_arm(name))
            except UserError as error:
                if name in needed:
                    raise
                arm = Arm(name, self._model(name), PRETRAINED, "", None, (224, 224), False, str(error))
                runs.append(Step(PRETRAIN, arm, self.out, left_out=str(error)))
        self.arms = [step.arm for step in runs]
        self.steps = {step.name: step for step in [*self._stages.values(), *runs]}

    # ---------------------------------------------------------------- an arm

    def _plan_arm(self, name: str) -> Step:
        settings = self._settings(name)
        training = self._resolve(settings, name)
        self._check_images(training, name)
        try:
            frozen = self._frozen_parts(name, training)
        except UserError as error:
            raise UserError(f"{_key(name)}: {error}") from error
        basis = {
            "addp": addp_core.__version__,
            "settings": _result_values(training, SEED_KEY, "tokenizer", "predictor"),
            "data": self._listing(training),
            "frozen": frozen.identity,
        }
        files: dict[str, Any] = digests_of_files(training, self.out, known=FROZEN_KEYS)
        files |= {STAGES: frozen.files} if frozen.files else {}
        encoder = {key: value for key, value in basis["settings"].items() if key.startswith("model.encoder.")}
        arm = Arm(
            name,
            self._model(name),
            PRETRAINED,
            digest(basis),
            None,
            training.data.hw,
            generates=True,
            random_digest=digest(["random", encoder, training.data.hw, frozen.stride]),
            seeds=tuple(self.keys.seeds),
            pretrained_by=f"{PRETRAIN}/{name}",
            pretrained_with=self._varied_settings(training),
        )
        step = Step(PRETRAIN, arm, self.out, list(self.keys.seeds), self.recipe.bench.processes, needs=frozen.needs)
        step.basis, step.files = basis, files
        for seed in step.seeds:
            fixed = {**frozen.sources, SEED_KEY: seed, "out": step.folder / f"seed{seed}"}
            texts = [f"{key}={as_argument(value, seed)}" for key, value in settings.items() if key not in fixed]
            step.commands.append(Command([*self._verb(), *texts, *as_arguments(fixed)], step.processes))
        self.trainings[name] = training
        return step

    def _model(self, name: str) -> str:
        """Return an arm's run folder, in which {seed} stands for the seed if there are several."""
        seed = "{seed}" if len(self.keys.seeds) > 1 else str(self.keys.seeds[0])
        return str(self.out / PRETRAIN / name / f"seed{seed}")

    def _verb(self) -> list[str]:
        return [PRETRAIN, *([self.keys.recipe] if self.keys.recipe else [])]

    def _settings(self, name: str) -> Settings:
        """Return the settings of an arm; the images are the bench's ImageNet unless it names others."""
        settings = {**self.keys.set, **self.keys.arms[name]}
        for key, where in SET_BY_BENCH.items():
            if key in settings:
                raise UserError(f"{_key(name)}: {key}: found {settings[key]!r}, but it follows from {where}; remove it")
        out = {"out": self.out / PRETRAIN / name}
        verb_recipe([*self._verb(), *as_arguments(self.keys.set | out)], PRETRAIN)
        training = verb_recipe([*self._verb(), *as_arguments(settings | out)], _key(name))
        if not training.data.source:
            images = self.recipe.data.path(IMAGENET.key)
            if not images:
                raise UserError(
                    f"{PRETRAIN}: data.source: not given; expected data.{IMAGENET.key}=<folder>, or pretrain.set="
                    "{data.source: <images>}"
                )
            settings["data.source"] = images
        return settings

    def _varied_settings(self, training: "PretrainRecipe") -> Settings:
        """Return the keys that some arm sets, and this one's values."""
        from addp_core.training.run_recipe import RunRecipe

        varied = {key for settings in self.keys.arms.values() for key in settings}
        values = RunRecipe(training).values
        return {key: value for key, value in values.items() if any(f"{key}.".startswith(f"{each}.") for each in varied)}

    def _resolve(self, settings: Settings, name: str) -> "PretrainRecipe":
        arguments = [*self._verb(), *as_arguments(settings | {"out": self.out / PRETRAIN / name})]
        return verb_recipe(arguments, _key(name))

    def _check_images(self, training: "PretrainRecipe", name: str) -> None:
        from addp_core.data.sources import open_source
        from addp_core.recipes.config import dump

        if (text := dump(training.data)) not in self._seen:
            try:
                open_source(training.data)
            except UserError as error:
                raise UserError(f"{_key(name)}: {error}") from error
            self._seen.add(text)

    def _listing(self, training: "PretrainRecipe") -> str:
        source = training.data.source
        if source not in self.inputs.digests:
            self.inputs.digests[source] = listing_digest(source)
        return self.inputs.digests[source]

    # ---------------------------------------------------------------- its frozen parts

    def _frozen_parts(self, name: str, training: "PretrainRecipe") -> FrozenParts:
        """Return the frozen parts of an arm. Those that are not given are trained by a step that arms share."""
        from addp_core.weights.fingerprint import fingerprint
        from pretrain.addp import load_frozen_parts
        from pretrain.common import load_frozen_tokenizer, token_grid
        from pretrain.frozen_stages import FROZEN_STAGES, check_frozen_parts, frozen_stage_recipe

        check_frozen_parts(training)
        given = {part: source for part in FROZEN_STAGES if (source := getattr(training, part))}
        identity: Any = given
        key = digest([given, training.predictor_heads, training.predictor_decoder_heads, training.data.hw])
        if set(given) == set(FROZEN_STAGES):
            if key not in self._loaded:
                tokenizer, predictor = load_frozen_parts(training, given["tokenizer"], given["predictor"])
                identity = [fingerprint(tokenizer), fingerprint(predictor)]
                self._loaded[key] = FrozenParts(given, identity, tokenizer.config.stride)
            return self._loaded[key]
        if "tokenizer" in given:
            if key not in self._loaded:
                tokenizer, _ = load_frozen_tokenizer(given["tokenizer"], training.data)
                self._loaded[key] = FrozenParts(given, fingerprint(tokenizer), tokenizer.config.stride)
            stride, identity = self._loaded[key].stride, self._loaded[key].identity
        else:
            codes = frozen_stage_recipe(training, "tokenizer", out="").model
            token_grid(codes, training.data)
            stride = codes.stride
        step = self._stages_step(name, training, given, identity)
        trained = {part: str(step.folder / part) for part in FROZEN_STAGES if part not in given}
        return FrozenParts(given | trained, step.arm.digest, stride, [step.name], step.files)

    def _stages_step(self, name: str, training: "PretrainRecipe", given: dict[str, str], identity: Any) -> Step:
        """Return the step that trains the frozen parts which are not given, the same one for all arms that agree."""
        from pretrain.frozen_stages import FROZEN_STAGES, frozen_stage_recipe

        wanted = [part for part in FROZEN_STAGES if part not in given]
        recipes = {
            part: frozen_stage_recipe(training, part, out="", **({} if part == "tokenizer" else {"tokenizer": ""}))
            for part in wanted
        }
        basis = {
            "addp": addp_core.__version__,
            "settings": {part: _result_values(recipe, "tokenizer") for part, recipe in recipes.items()},
            "data": self._listing(training),
            "given": identity,
        }
        if (key := digest(basis)) in self._stages:
            return self._stages[key]
        named = {part: digests_of_files(recipe, self.out, known=FROZEN_KEYS) for part, recipe in recipes.items()}
        files = {part: digests for part, digests in named.items() if digests}
        arm = Arm("", "", PRETRAINED, key, None, training.data.hw, generates=False)
        step = Step(PRETRAIN, arm, self.out, processes=self.recipe.bench.processes, basis=basis, in_sequence=True)
        step.files = files
        folder = self._folder_of_stages(name, step)
        step.arm = replace(arm, name=folder.name, model=str(folder / wanted[-1]))
        tokenizer = given.get("tokenizer") or str(folder / "tokenizer")
        for part, recipe in recipes.items():
            step.commands.append(
                Command(_stage_arguments(training, part, recipe, folder / part, tokenizer), step.processes)
            )
        self._stages[key] = step
        return step

    def _folder_of_stages(self, name: str, step: Step) -> Path:
        """Return the folder with a step's frozen parts or, without one, a folder that no others are in."""
        recorded = {
            path.parent: json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((self.out / PRETRAIN).glob(f"{STAGES}*/{STEP}"))
        }
        if existing := next((path for path, record in recorded.items() if step.holds(record)), None):
            return existing
        taken = {*recorded, *(step.folder for step in self._stages.values())}
        names = itertools.chain([STAGES, f"{STAGES}-{name}"], (f"{STAGES}-{name}-{i}" for i in itertools.count(2)))
        return next(folder for each in names if (folder := self.out / PRETRAIN / each) not in taken)

    # ---------------------------------------------------------------- models that name a run of this bench

    def model_of_arm(self, name: str, model: str) -> Arm:
        """Return the arm of a model `pretrain:<arm>`, another arm's own (with other settings in its transfers), or
        `pretrain:<arm>/models/step-<n>`, an intermediate checkpoint of it.

        Raises UserError, with the key, if there will be no such model.
        """
        key, (arm_name, _, path) = f"models.{name}", model.removeprefix(PRETRAINED_HERE).partition("/")
        arm = next((arm for arm in self.arms if arm.name == arm_name), None)
        if arm is None:
            known = ", ".join(self.keys.arms) or "none"
            hint = did_you_mean(arm_name, list(self.keys.arms))
            raise UserError(f"{key}: found {model!r}, expected an arm of pretrain.arms ({known}){hint}")
        if arm.problem:
            raise UserError(f"{key}: {arm.problem}")
        if not path:
            return replace(arm, name=name)
        _check_intermediate(key, path, self.trainings[arm_name])
        step = self.steps[arm.pretrained_by]
        missing = [seed for seed in step.seeds if step.done and not Path(arm.model_of(seed), path).exists()]
        if missing:
            raise UserError(
                f"{key}: {Path(arm.model_of(missing[0]), path)}: not there; the pretraining finished without it; "
                f"expected train.export_every to be set before, or another out"
            )
        return replace(arm, name=name, model=f"{arm.model}/{path}", digest=digest([arm.digest, path]))


def read_outcome(step: Step) -> Outcome:
    """Return what a pretraining leaves: the run of each seed. It has no score."""
    return Outcome(setting={}, scores={}, chance={}, runs={seed: step.folder / f"seed{seed}" for seed in step.seeds})


def _check_intermediate(key: str, path: str, training: "PretrainRecipe") -> None:
    """Raise UserError if a run will not write the intermediate checkpoint `path`, as models/step-100."""
    from addp_core.training.run_folder import INTERMEDIATE_MODELS

    folder, _, number = path.partition("/step-")
    every, steps = training.train.export_every, training.train.steps
    step = int(number) if folder == INTERMEDIATE_MODELS and number.isdecimal() else 0
    # the last step leaves the model itself
    if step and every and step % every == 0 and (steps is None or step < steps):
        return
    known = f"models/step-<a multiple of {every}{f' below {steps}' if steps else ''}>" if every else ""
    expected = known or "train.export_every in pretrain.set, which writes intermediate checkpoints"
    raise UserError(f"{key}: found {path!r} of a pretraining, expected {expected}")


def _stage_arguments(training: "PretrainRecipe", part: str, recipe: Any, out: Path, tokenizer: str) -> list[str]:
    """Return the arguments that train a frozen part on the images of a pretraining: its recipe, with their keys."""
    from addp_core.training.run_recipe import RunRecipe
    from pretrain.frozen_stages import frozen_stage_name

    name = frozen_stage_name(training, part)
    needed = {"out": str(out)} | ({} if part == "tokenizer" else {"tokenizer": tokenizer})
    own = RunRecipe(verb_recipe([part, name, *as_arguments(needed)], PRETRAIN)).values
    data = {key: value for key, value in RunRecipe(recipe).values.items() if key.startswith("data.")}
    changed = {key: value for key, value in data.items() if own.get(key) != value}
    return [part, name, *as_arguments(changed | needed)]


def _result_values(recipe: Any, *without: str) -> dict[str, Any]:
    """Return the keys that a run's result depends on, and their values."""
    from addp_core.training.precision import AUTO
    from addp_core.training.run_recipe import (
        CHECKPOINTING,
        FORMER_PRECISION,
        PRECISION,
        RESIZE,
        RunRecipe,
        result_values,
    )

    values = RunRecipe(recipe).values
    if values[PRECISION] == AUTO:  # a result from before `auto` existed still holds: runs keep what they had
        values[PRECISION] = FORMER_PRECISION
    if values.get(RESIZE) is None:  # nor does one from before this key existed change
        values.pop(RESIZE, None)
    return {key: value for key, value in result_values(values).items() if key not in {CHECKPOINTING, *without}}


def _key(name: str) -> str:
    """Return the key of an arm, for messages."""
    return f"{PRETRAIN}.arms.{name}"
