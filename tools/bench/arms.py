"""The arms of a bench. An arm is one checkpoint or baseline under comparison, and a row of the report's tables."""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addp_core.base.errors import UserError
from tools.bench.arguments import errors_name
from tools.bench.curves import read_metrics

if TYPE_CHECKING:  # `addp report` does without torch
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from addp_core.networks.encoder import FeatureEncoder


@dataclass(frozen=True)
class Arm:
    """One checkpoint or baseline under comparison.

    Attributes:
        name: Its key in `models`, or "random".
        model: Its run folder, file or hub path; of "random", the model whose architecture it has.
        init: "pretrained" or "random".
        digest: Hash of architecture and weights.
        parameters: Number of parameters of the encoder, None if the file holds no encoder.
        image_size: (height, width) in pixels.
        generates: Whether the checkpoint is a complete ADDP model, which can generate images.
        problem: Why the checkpoint cannot be read, "" if it can; no chosen step needs such an arm.
    """

    name: str
    model: str
    init: str
    digest: str
    parameters: int | None
    image_size: tuple[int, int]
    generates: bool
    problem: str = ""

    def about(self) -> dict[str, Any]:
        """Return the arm's entry in bench.json. If the model is a run folder, it has the budget of its pretraining:
        the images seen, and the seconds of all stages together.
        """
        entry = {"model": self.model, "init": self.init, "parameters": self.parameters}
        entry |= {"images_seen": None, "run": None, "seconds": None}
        run, last_step = _pretraining_run(Path(self.model))
        if self.init == "random" or not (run / "metrics.jsonl").is_file():
            return entry
        images, seconds = _budget(run, last_step)
        seconds += sum(_budget(run / stage)[1] for stage in ("tokenizer", "predictor"))
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


def open_arms(models: "Mapping[str, str]", random: bool, needed: "Collection[str] | None" = None) -> list[Arm]:
    """Read every checkpoint once; with `random`, add the arm "random", which has the first one's architecture.

    Raises UserError, with the key, if a checkpoint of an arm in `needed` (None: of any arm) cannot be read.
    """
    arms, random_digests = [], []
    for name, model in models.items():
        try:
            with errors_name(f"models.{name}"):
                arm, random_digest = _open_arm(name, model)
        except UserError as error:
            if needed is None or name in needed:
                raise
            arm, random_digest = Arm(name, model, "pretrained", "", None, (224, 224), False, str(error)), ""
        arms.append(arm)
        random_digests.append(random_digest)
    if random:
        arms.append(replace(arms[0], name="random", init="random", digest=random_digests[0], generates=False))
    return arms


def _open_arm(name: str, model: str) -> tuple[Arm, str]:
    """Read a checkpoint. Returns its arm, and the digest of the arm "random" if that has this architecture."""
    from addp_core.weights.encoders import load_encoder
    from addp_core.weights.reading import read_weights

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
    arm = Arm(name, model, "pretrained", digest, parameters, (size[0], size[1]), weights.kind == "addp")
    return arm, random_digest


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
    return _digest(f"random {about} {described.attention}", {})
