"""`load_mage`: MAGE as a generator, from a file of its own or a run of `addp predictor`, and its tokenizer."""

import contextlib
import os

import yaml

from addp_core.base.errors import UserError
from addp_core.base.paths import RECIPE_FILE, expand_home
from addp_core.method.mage import MAGE, MAGEConfig
from addp_core.networks.tokenizer import Tokenizer
from addp_core.weights.architectures import PredictorArchitecture
from addp_core.weights.assumptions import Assumption, settle
from addp_core.weights.files import Source
from addp_core.weights.fingerprint import fingerprint
from addp_core.weights.fitting import fill, replace_part, resample_state
from addp_core.weights.loading import PREDICTOR_HEADS, check_codebook
from addp_core.weights.reading import Weights, describe_kind, read_part, read_weights


def load_mage(
    source: Source,
    *,
    tokenizer: Source | None = None,
    image_size: tuple[int, int] | None = None,
    **heads: int,
) -> MAGE:
    """Load MAGE, which generates with its token predictor alone; in eval mode, float32, on the CPU.

    Args:
        source: a MAGE file or a run of `addp predictor`.
        tokenizer: its VQGAN, if neither the file nor the recipe of the run tells it.
        image_size: (height, width) in pixels; positions are resampled if it differs from the file's.
        heads: predictor_heads and predictor_decoder_heads, if the file does not store them.

    Raises:
        UserError: if the file is no MAGE checkpoint, or its tokenizer is missing or another one.
    """
    weights = read_weights(source, heads=heads)
    if weights.kind != "predictor":
        raise UserError(f"{weights.source}: {describe_kind(weights)}; expected a MAGE checkpoint")
    weights.settle(("weights", *PREDICTOR_HEADS), ("predictor_heads",), fixed=("weights",))
    vqgan = read_part(tokenizer, "tokenizer") if tokenizer else read_tokenizer_of_mage(source, weights.source)
    stored: PredictorArchitecture = weights.architecture
    check_tokenizer_of_mage(stored, weights.source, vqgan)
    codes = vqgan.architecture.tokenizer
    size = image_size or (stored.grid[0] * codes.stride, stored.grid[1] * codes.stride)
    config = MAGEConfig((size[0], size[1]), codes, stored.vocabulary, stored.predictor)
    predictor = resample_state(weights.state, stored.grid, config.grid)
    state = replace_part(replace_part({}, "tokenizer.", vqgan.state), "predictor.", predictor)
    return fill(MAGE(config), state, weights.source)


def check_tokenizer_of_mage(mage: PredictorArchitecture, name: str, vqgan: Weights) -> None:
    """Raise UserError if MAGE was trained on the ids of another tokenizer, as far as the file tells."""
    check_codebook(vqgan, mage.vocabulary.codebook)
    tokenizer = fill(Tokenizer(vqgan.architecture.tokenizer), vqgan.state, vqgan.source)
    if mage.trained_on not in ("", fingerprint(tokenizer)):
        raise UserError(f"tokenizer={vqgan.source}: {name} was trained on another tokenizer; expected that one")


def read_tokenizer_of_mage(source: Source, name: str, wanted: str = "") -> Weights:
    """Return the tokenizer in MAGE's own file, or else that of its run, which is then said.

    name: of the file, for errors. wanted: the name of the model to read, if a checkpoint holds several.
    Raises UserError if there is none.
    """
    inside = read_weights(source, "tokenizer", wanted=wanted)
    return inside if inside.kind == "tokenizer" else _read_tokenizer_of_run(source, name)


def _read_tokenizer_of_run(source: Source, name: str) -> Weights:
    """Return the tokenizer that the recipe beside a file of `addp predictor` names, and say so.

    Raises UserError if there is none.
    """
    expected = "expected tokenizer=<VQGAN file> with it"
    path = tokenizer_in_recipe(source)
    if not path:
        raise UserError(f"{name}: MAGE reads token ids; {expected}")
    try:
        vqgan = read_part(path, "tokenizer")
    except UserError as error:
        raise UserError(f"{name}: MAGE reads token ids, and its run names a tokenizer ({error}); {expected}") from error
    note = f"took the tokenizer that the recipe of its run names, {path}"
    settle(name, (Assumption("tokenizer", note, "tokenizer=<file> takes another"),), ("tokenizer",))
    return vqgan


def tokenizer_in_recipe(source: Source) -> str:
    """Return the key `tokenizer` of the recipe in a run folder, or beside a file of it; "" if there is none."""
    if not isinstance(source, str | os.PathLike):
        return ""
    path = expand_home(source)
    recipe = (path if path.is_dir() else path.parent) / RECIPE_FILE
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError, UnicodeDecodeError):
        return str(yaml.safe_load(recipe.read_text(encoding="utf-8")).get("tokenizer") or "")
    return ""
