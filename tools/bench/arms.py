"""The arms of a bench. An arm is one checkpoint or baseline under comparison, and a row of the report's tables."""

import functools
import hashlib
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addp_core.base.errors import UserError, did_you_mean
from addp_core.training.curves import read_metrics
from tools.bench.arguments import as_arguments, errors_name, verb_recipe

if TYPE_CHECKING:  # `addp report` does without torch
    from collections.abc import Mapping

    from torch import Tensor

    from addp_core.networks.encoder import FeatureEncoder

PRETRAINED = "pretrained"  # the `init` of every arm but "random"


@dataclass(frozen=True)
class Arm:
    """One checkpoint or baseline under comparison.

    Attributes:
        name: Its key in `models`, or "random".
        model: Its run folder, file or hub path; of "random", the model whose architecture it has.
        init: "pretrained" or "random".
        settings: Settings of its encoder in every transfer, such as {"input": "token"}.
        digest: Hash of architecture and weights.
        parameters: Number of parameters of the encoder, None if the file holds no encoder.
        image_size: (height, width) in pixels.
        generates: Whether the checkpoint can generate images: ADDP, or MAGE with its tokenizer.
        problem: Why the checkpoint cannot be read, "" if it can; no chosen step needs such an arm.
        random_digest: Digest of the arm "random" if it has this one's architecture.
        seeds: Seeds of its pretraining, if this bench does it; with several, {seed} in `model` stands for the seed.
        pretrained_by: The step of this bench that trains the model, "" if the model is given.
        pretrained_with: The settings of that step's pretraining in which the bench's pretrainings can differ.
    """

    name: str
    model: str
    init: str
    digest: str
    parameters: int | None
    image_size: tuple[int, int]
    generates: bool
    problem: str = ""
    random_digest: str = ""
    seeds: tuple[int, ...] = ()
    pretrained_by: str = ""
    settings: "Mapping[str, Any]" = field(default_factory=dict)
    pretrained_with: "Mapping[str, Any]" = field(default_factory=dict)

    def model_of(self, seed: int) -> str:
        """Return the model that a transfer or generation with this seed takes."""
        return self.model.replace("{seed}", str(seed)) if len(self.seeds) > 1 else self.model

    @property
    def first_model(self) -> str:
        """The model, or that of the first seed of its pretraining."""
        return self.model_of(self.seeds[0]) if self.seeds else self.model

    def about(self) -> dict[str, Any]:
        """Return the arm's entry in bench.json. If the model is a run folder, it has the budget of its pretraining:
        the images seen, and the seconds of all stages together, unless steps of this bench have taken them.
        """
        parameters = _parameters(self.first_model) if self.pretrained_by else self.parameters
        entry: dict[str, Any] = {"model": self.model, "init": self.init, "parameters": parameters}
        settings = {**({} if self.init == "random" else self.pretrained_with), **self.settings}
        entry |= {"settings": settings} if settings else {}
        entry |= {"images_seen": None, "run": None, "seconds": None}
        run, last_step = _pretraining_run(Path(self.first_model))
        if self.init == "random" or not (run / "metrics.jsonl").is_file():
            return entry
        images, seconds = _budget(run, last_step)
        seconds += sum(_budget(run / stage)[1] for stage in ("tokenizer", "predictor"))
        seconds = 0.0 if self.pretrained_by else seconds
        return entry | {"images_seen": images or None, "run": str(run), "seconds": round(seconds, 1) or None}


def _pretraining_run(model: Path) -> tuple[Path, float]:
    """Return the run folder that a model comes from, and its last step: models/step-N is an intermediate checkpoint."""
    from addp_core.training.run_folder import INTERMEDIATE_MODELS
    from addp_core.weights.files import MODEL_FILE

    if model.name == MODEL_FILE:
        model = model.parent
    if model.parent.name == INTERMEDIATE_MODELS and (step := re.fullmatch(r"step-(\d+)", model.name)):
        return model.parent.parent, int(step[1])
    return model, math.inf


def _budget(run: Path, last_step: float = math.inf) -> tuple[int, float]:
    """Return (images seen, seconds) of a run up to `last_step`; (0, 0.0) if it has no metrics.jsonl."""
    seen, seconds = 0, 0.0
    for line in read_metrics(run / "metrics.jsonl"):
        if "images" in line and line.get("img_s") and line["step"] <= last_step:
            seconds += (line["images"] - seen) / line["img_s"]
            seen = int(line["images"])
    return seen, seconds


def open_arm(name: str, model: str, settings: "Mapping[str, Any] | None" = None) -> Arm:
    """Read the checkpoint of an arm once.

    settings: of its encoder in every transfer. Raises UserError, with the key, if it cannot be read with them.
    """
    if settings:
        return with_settings(_open_with_settings(name, model, settings), settings)
    with errors_name(f"models.{name}"):
        return _open_arm(name, model)


def with_settings(arm: Arm, settings: "Mapping[str, Any]") -> Arm:
    """Return an arm whose encoder has these settings in every transfer.

    Raises UserError, with the key, if one is no key of transfers' encoders.
    """
    if not settings:
        return arm
    _check_settings(f"models.{arm.name}", settings)
    paths = {key: _file_digest(str(value)) for key, value in settings.items() if key == "tokenizer" and value}
    digest = hashlib.sha256(repr([arm.digest, sorted((dict(settings) | paths).items())]).encode()).hexdigest()
    init = str(settings.get("init", arm.init))
    random = {"digest": arm.random_digest, "generates": False} if init == "random" else {"digest": digest}
    return replace(arm, init=init, settings=settings, **random)


def random_arm(first: Arm) -> Arm:
    """Return the arm "random": fresh weights in the architecture of another arm."""
    digest = first.random_digest
    return replace(first, name="random", model=first.first_model, init="random", digest=digest, generates=False)


def _check_settings(key: str, settings: "Mapping[str, Any]") -> None:
    from addp_core.recipes.keys import keys_of
    from addp_core.weights.pretrained import EncoderKeys

    known = [name for name in keys_of(EncoderKeys) if name != "model"]
    for name in settings:
        if name not in known:
            raise UserError(f"{key}.{name}: no such key; expected one of {', '.join(known)}{did_you_mean(name, known)}")


def _open_with_settings(name: str, model: str, settings: "Mapping[str, Any]") -> Arm:
    """Read the encoder of an arm as transfers with these settings do, at the size of its file or else 224 pixels."""
    key = f"models.{name}"
    _check_settings(key, settings)
    arguments = ["finetune", *as_arguments({"model": model, **settings, "data.source": "-", "out": "-"})]
    keys = verb_recipe(arguments, key)
    with errors_name(key):
        try:
            arm = _open_arm(name, model)
        except UserError:  # the name of an architecture, which has no file
            if keys.init != "random" or Path(model).exists():
                raise
            arm = Arm(name, model, "random", "", None, (224, 224), False)
        encoder = keys.load_encoder(arm.image_size)
    parameters = [each for name, each in encoder.named_parameters() if not name.startswith("tokenizer.")]
    counted = sum(parameter.numel() for parameter in parameters)
    return replace(arm, parameters=counted, random_digest=_random_digest(encoder))


@functools.cache
def _file_digest(source: str) -> str:
    from addp_core.weights.reading import read_weights

    return _digest("", read_weights(source).state)


def _parameters(model: str) -> int | None:
    """Return the number of parameters of a model's encoder, None as long as there is no model."""
    from addp_core.weights.files import MODEL_FILE

    return _read_parameters(model) if Path(model, MODEL_FILE).exists() else None


@functools.cache
def _read_parameters(model: str) -> int | None:
    return _open_arm("", model).parameters


def _open_arm(name: str, model: str) -> Arm:
    """Read a checkpoint."""
    from addp_core.weights.encoders import load_encoder
    from addp_core.weights.reading import read_weights
    from gen.model import GENERATORS

    weights = read_weights(model)
    architecture: Any = weights.architecture
    encoder_config = getattr(architecture, "encoder", None)
    size = getattr(architecture, "image_size", None) or getattr(encoder_config, "image_size", None) or (224, 224)
    digest = _digest(f"{weights.kind} {architecture}", weights.state)
    parameters, random_digest = None, digest
    if weights.kind != "predictor":  # MAGE's encoder needs a tokenizer
        heads = getattr(encoder_config, "heads", None)  # which the number of parameters does not depend on
        encoder = load_encoder(model, size, init="random", encoder_heads=heads)
        parameters = sum(parameter.numel() for parameter in encoder.parameters())
        random_digest = _random_digest(encoder)
    height, width = size[0], size[1]
    generates = weights.kind in GENERATORS
    return Arm(name, model, PRETRAINED, digest, parameters, (height, width), generates, random_digest=random_digest)


def _digest(text: str, state: "Mapping[str, Tensor]") -> str:
    import torch

    digest = hashlib.sha256(text.encode())
    for key, value in sorted(state.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _random_digest(encoder: "FeatureEncoder") -> str:
    """Return a digest of what an encoder with random weights takes from its checkpoint: the architecture and, if it
    reads token ids, the tokenizer.
    """
    described: Any = encoder
    about = [type(encoder).__name__, described.config, described.image_size, described.patch_size]
    if tokenizer := getattr(encoder, "tokenizer", None):
        return _digest(f"random {about} {described.vocabulary}", tokenizer.state_dict())
    return _digest(f"random {about} {getattr(encoder, 'attention', None)}", {})  # a CNN has no attention
