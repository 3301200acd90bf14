"""`push=owner/name` of `addp export`: the export as a repository of the Hugging Face Hub, with a model card.

A whole ADDP and an encoder are pushed as model.safetensors, which `load_addp` and the others read as hf://owner/name,
and with the encoder in timm's layout beside it, which timm reads as hf-hub:owner/name. timm's own layout and the files
of the others are pushed as they are.
"""

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError
from addp_core.weights.architectures import NORMALISATION
from addp_core.weights.files import MODEL_FILE
from addp_core.weights.hub import hub_errors, hub_reason
from addp_core.weights.reading import read_weights
from tools.export.card import check_bench, write_card
from tools.export.compare import given_heads
from tools.export.recipe import Recipe
from tools.export.timm_folder import export_timm

log = logging.getLogger("addp")

CARD = "README.md"
TIMM_FILE = "timm.safetensors"  # the encoder in timm's layout, beside the model.safetensors of a whole ADDP
ONLY_WITH_PUSH = ("private", "license", "bench")


def prepare_push(recipe: Recipe) -> None:
    """Check everything that a push needs, before the export: name, token, bench folder; create the repository.

    Raises UserError if something is missing, or the Hub refuses it.
    """
    if not recipe.push:
        for key in ONLY_WITH_PUSH:
            if getattr(recipe, key):
                raise UserError(
                    f"{key}: is for the model card and repository of push=owner/name; expected that key too"
                )
        return
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(recipe.push)
    except ValueError as error:
        raise UserError(f"push: found {recipe.push!r}, expected owner/name of a repository ({error})") from error
    if recipe.push.count("/") != 1:
        raise UserError(f"push: found {recipe.push!r}, expected owner/name of a repository")
    check_bench(recipe)
    if get_token() is None:
        raise UserError("push: no token of the Hugging Face Hub; expected `hf auth login`, or HF_TOKEN")
    with _one_line(recipe, "expected a network, and a token that may write there"):
        _api().create_repo(recipe.push, exist_ok=True, **({"private": True} if recipe.private else {}))


def push(recipe: Recipe, out: Path) -> None:
    """Upload an export with its model card. An existing README.md is kept. Raises UserError if the Hub refuses it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "repository"
        has_timm = _collect(recipe, out, folder)
        with _one_line(recipe, f"{out} is written; the same command pushes it"):
            api = _api()
            if api.file_exists(recipe.push, CARD):
                log.info(
                    "%s: has a %s, which is kept; without it there, the next push writes a new one", *_names(recipe)
                )
            else:
                write_card(recipe, folder / CARD, has_timm)
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            api.upload_folder(
                repo_id=recipe.push, folder_path=folder, commit_message=f"addp export layout={recipe.layout}"
            )
            log.info("%s/%s: %s", api.endpoint, recipe.push, ", ".join(files))


def _names(recipe: Recipe) -> tuple[str, str]:
    return recipe.push, CARD


def _collect(recipe: Recipe, out: Path, folder: Path) -> bool:
    """Copy an export into a new folder as it is pushed; return whether timm reads it."""
    if out.is_dir():
        shutil.copytree(out, folder)
        return recipe.layout == "timm"
    folder.mkdir()
    ours = recipe.layout in ("addp", "encoder")
    shutil.copy(out, folder / (MODEL_FILE if ours else out.name))
    return ours and _add_timm(recipe, out, folder)


def _add_timm(recipe: Recipe, out: Path, folder: Path) -> bool:
    """Write the encoder of our file in timm's layout beside it, if timm has a place for it."""
    exported = folder / "timm"
    try:
        normalisation = _normalisation(recipe)
        export_timm(Recipe(str(out), str(exported), layout="timm", normalisation=normalisation), exported)
    except (ValueError, UserError) as error:
        log.info("timm's layout is left out: %s", error)
        return False
    config: dict[str, Any] = json.loads((exported / "config.json").read_text())
    # Every timm looks for the .safetensors of a .bin first; older ones do not read a .safetensors by its own name.
    config["pretrained_cfg"]["hf_hub_filename"] = Path(TIMM_FILE).with_suffix(".bin").name
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.move(exported / MODEL_FILE, folder / TIMM_FILE)
    shutil.rmtree(exported)
    return True


def _normalisation(recipe: Recipe) -> Any:
    """Return the key of `NORMALISATION` that a classifier was trained with, None for another model.

    Raises ValueError if there is no such key.
    """
    weights = read_weights(recipe.model, "classifier", given_heads(recipe), wanted=recipe.weights)
    if weights.kind != "classifier":
        return None
    stated = tuple(weights.architecture.mean), tuple(weights.architecture.std)
    if (key := next((key for key, parts in NORMALISATION.items() if parts == stated), None)) is None:
        raise ValueError(f"no key of normalisation has the model's mean {stated[0]} and std {stated[1]}")
    return key


def _api() -> Any:
    from huggingface_hub import HfApi

    import addp_core

    return HfApi(library_name="addp", library_version=addp_core.__version__)


@contextlib.contextmanager
def _one_line(recipe: Recipe, advice: str) -> Iterator[None]:
    """Turn what the Hub refuses into a UserError that ends in `advice`."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        yield
    except hub_errors() as error:
        reason = hub_reason(error)
        if isinstance(error, RepositoryNotFoundError):
            reason = "the token is not accepted, or does not allow it"
        reason = reason.replace(get_token() or "\0", "<token>")
        raise UserError(f"push={recipe.push}: cannot be pushed ({reason}); {advice}") from error
