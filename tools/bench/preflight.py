"""What `addp sweep` checks before its first run: the keys, checkpoints and datasets of all runs that are still to do.

`addp bench` checks before its first step whether they accept the encoders that exist by then. A training that is going
to fail over a missing file takes seconds to say so, and a sweep has dozens of trainings.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from addp_core.base.errors import naming_key
from addp_core.recipes.config import dump
from tools.bench.arguments import verb_recipe


def check_commands(verb: str, commands: Iterable[tuple[str, list[str]]]) -> None:
    """Check (arm, arguments of `addp`) for each run of `verb`, every dataset and checkpoint once.

    Raises UserError, with the key, for what the runs would refuse before their first step.
    """
    checked: set[tuple[object, ...]] = set()
    for arm, arguments in commands:
        training = verb_recipe(arguments, verb)
        data = getattr(training, "data", None)
        validation = getattr(training, "val", ""), getattr(training, "val_share", 0.0)
        dataset = ("data", dump(data) if data is not None else "", *validation)
        if verb in DATASET_CHECKS and dataset not in checked:
            DATASET_CHECKS[verb](training)
        model = ("model", getattr(training, "model", ""), getattr(training, "init", ""))
        if verb in DATASET_CHECKS and model not in checked:
            with naming_key(f"arms.{arm}.model"):
                _check_model(training)
        checked |= {dataset, model}


def check_networks(arguments: list[str], out: Path) -> None:
    """Load the networks of one command as it will, if it may refuse what others accept, as a detector a CNN.

    Those that lie in `out`, the folder of the bench, may not exist yet and are left out. Raises UserError, with the
    key, for a network that the command would refuse.
    """
    verb = next((verb for verb in NETWORK_CHECKS if arguments[: len(verb.split())] == verb.split()), "")
    if verb:
        NETWORK_CHECKS[verb](verb_recipe(arguments, verb), out)


def _check_model(training: Any) -> None:
    """Read the checkpoint of a training. Raises UserError if it is missing, damaged or of no known layout."""
    from addp_core.networks.encoder import VIT_SIZES
    from addp_core.weights.reading import read_weights

    if training.model not in VIT_SIZES or Path(training.model).exists():
        heads = training.encoder_heads
        read_weights(training.model, heads={} if heads is None else {"encoder_heads": heads})
    elif training.init != "random":
        training.load_encoder(training.data.size)  # says that a size has no weights


def _check_labeled_images(training: Any) -> None:
    from cls.data import open_splits

    open_splits(training.data, training.val, training.val_share, training.train.seed, training.label_share)


def _check_coco(training: Any) -> None:
    from det.coco import locate_coco

    for split in ("train", "val"):
        locate_coco(training.data, split)  # only located: reading hundreds of megabytes is left to the training


def _check_encoder_of_detector(training: Any, out: Path) -> None:
    from det.train import build_encoder

    build_encoder(training)


def _check_encoder_of_segmentor(training: Any, out: Path) -> None:
    from seg.mmseg_config import read_config
    from seg.train import load_model, resolve

    config = read_config(training.config)
    load_model(resolve(training, config), config)


def _check_extractors(evaluation: Any, out: Path) -> None:
    """Load the networks whose features are compared, but those that would have to be downloaded."""
    import torch

    from addp_core.training.extractors import open_extractor, open_vgg16

    classifier, device = evaluation.extractor, torch.device("cpu")
    if classifier and Path(classifier).absolute().is_relative_to(out.absolute()):
        return
    if classifier or evaluation.inception:
        open_extractor(evaluation.inception, classifier, device)
    if evaluation.vgg16:
        open_vgg16(evaluation.vgg16, device)


def _check_scenes(training: Any) -> None:
    from seg.scenes import find_pairs, read_class_names

    read_class_names(training.data.source, training.data.classes)
    for split in ("train", "val"):
        find_pairs(training.data.source, split)


NETWORK_CHECKS: dict[str, Callable[[Any, Path], None]] = {
    "evaluate": _check_extractors,
    "det train": _check_encoder_of_detector,
    "seg train": _check_encoder_of_segmentor,
}
DATASET_CHECKS: dict[str, Callable[[Any], None]] = {
    "finetune": _check_labeled_images,
    "linprobe": _check_labeled_images,
    "det train": _check_coco,
    "seg train": _check_scenes,
    "seg probe": _check_scenes,
}
