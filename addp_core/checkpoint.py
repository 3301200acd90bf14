"""Every byte of weights read or written: our safetensors, the published ADDP, MAGE and VQGAN files, and plain ViT
files.

Nothing is ever unpickled that could run code: `.safetensors` or `torch.load(weights_only=True)`.
Foreign layouts are mapped in layouts.py.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from addp_core.addp import ADDP, ADDPConfig
from addp_core.attention import AttentionConfig, resize_table
from addp_core.classifier import Classifier
from addp_core.diffusion import ProcessConfig
from addp_core.encoder import SIZES, Encoder, EncoderConfig, resample_positions
from addp_core.errors import UserError, nearest
from addp_core.files import replacing
from addp_core.layouts import (
    ARCHITECTURES,
    LAYOUTS,
    ClassifierFile,
    EncoderFile,
    PredictorFile,
    State,
    TokenizerFile,
    describe,
    is_published_addp,
    published_addp_names,
    strip,
    to_published,
    with_heads,
)
from addp_core.predictor import TokenPredictor
from addp_core.tokenizer import Tokenizer

MODEL_FILE = "model.safetensors"  # of a run folder
METADATA_KEY = "addp"
NAMED_PATCH = 16  # of an encoder named by its size
POSITIONS = re.compile(r"(^|\.)(decoder_)?pos(_\w+)?_embed(_learned)?$|position_embeddings")

HEADS = ("encoder_heads", "decoder_heads", "predictor_heads", "predictor_decoder_heads")

Source = str | os.PathLike | Mapping[str, Any]


@dataclass(frozen=True)
class Weights:
    """A file's tensors under our names, its kind, and its architecture. `where` names the file in errors."""

    where: str
    kind: str
    state: State
    architecture: Any

    def part(self, prefix: str) -> State:
        return strip(self.state, prefix)


def read_weights(source: Source, wanted: str | None = None, **overrides: int) -> Weights:
    """Read any supported file: its tensors under our names, and the architecture (inferred from shapes where it is not
    stored).

    source: a path, a run folder, "hf://owner/repository/file", or a state dict. wanted: the kind to take where a file
    holds several. overrides: numbers that shapes do not tell (heads). UserError for a file that is missing, damaged,
    hostile or of another method, saying what it looks like.
    """
    where, content, stored = _open(source)
    if stored is not None:
        kind, architecture = _stored_architecture(where, stored)
        if kind == "addp" and is_published_addp(content):
            content = published_addp_names(content)
        return Weights(where, kind, content, _checked(where, with_heads, architecture, overrides))
    for kind, recognise, convert in sorted(LAYOUTS, key=lambda layout: layout[0] != wanted):
        if recognise(content):
            state, architecture = _checked(where, convert, where, content, overrides)
            return Weights(where, kind, state, architecture)
    raise UserError(f"{where}: {describe(content)}; expected an ADDP, MAGE, VQGAN or ViT checkpoint")


def _checked(where: str, function: Callable, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:  # an impossible architecture, such as heads that do not divide the width
        raise UserError(f"{where}: {error}") from error


def read_tensors(source: Source) -> State:
    """The tensors of any file, under the file's own names. UserError for one that is missing, damaged or hostile."""
    return _open(source)[1]


# -------------------- loading


def load_addp(
    source: Source,
    *,
    tokenizer: Source | None = None,
    predictor: Source | None = None,
    image_size: tuple[int, int] | None = None,
    process: ProcessConfig | None = None,
    **heads: int,
) -> ADDP:
    """An ADDP in eval mode, float32, on the CPU.

    source: a path, a run folder, "hf://owner/repository/file" or a state dict, published layout or ours.
    tokenizer, predictor: sources for files that lack those parts (without a predictor the model samples but cannot
    train).
    image_size: (height, width); positions are resampled where it differs from the file's. process: other than the
    file's.
    heads: encoder_heads, decoder_heads, predictor_heads, predictor_decoder_heads, where they are not width/64
    (decoders: 16). UserError names every missing, unexpected or mis-shaped tensor.
    """
    _check_overrides(heads, HEADS, "load_addp")
    weights = read_weights(source, **heads)
    if weights.kind != "addp":
        raise UserError(f"{weights.where}: {_describe_kind(weights)}; expected an ADDP checkpoint")
    config: ADDPConfig = weights.architecture
    state = dict(weights.state)
    if tokenizer is not None:
        part = _read_part(tokenizer, "tokenizer")
        _check_codes(part, config.vocabulary.codebook)
        config = replace(config, tokenizer=part.architecture.tokenizer)
        state = _replace_part(state, "tokenizer.", part.state)
    if predictor is not None:
        part = _read_part(predictor, "predictor", **heads)
        _check_codes(part, config.vocabulary.codebook)
        resampled = _resample_all(part.state, part.architecture.grid, config.grid)
        config = replace(config, predictor=part.architecture.predictor)
        state = _replace_part(state, "predictor.", resampled)
    if not any(key.startswith("tokenizer.") for key in state):
        raise UserError(f"{weights.where}: it has no tokenizer; expected one in the file or as tokenizer=<VQGAN file>")
    if process is not None:
        config = replace(config, process=process)
    if image_size is not None:
        target = replace(config, image_size=tuple(image_size))
        state = _resample_all(state, config.grid, target.grid)
        config = target
    return _fill(ADDP(config), state, weights.where)


def stated_heads(recipe: Any) -> dict[str, int]:
    """The numbers of heads that a recipe states, for `load_addp`."""
    return {key: getattr(recipe, key) for key in HEADS if getattr(recipe, key, None) is not None}


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer of a VQGAN file, a tokenizer run or any ADDP file; eval mode, float32, CPU."""
    weights = _read_part(source, "tokenizer")
    return _fill(Tokenizer(weights.architecture.tokenizer, weights.architecture.grid), weights.state, weights.where)


def load_predictor(source: Source, grid: tuple[int, int] | None = None, **heads: int) -> TokenPredictor:
    """The token predictor of a MAGE file, a predictor run or any ADDP file; eval mode, float32, CPU.

    grid: token grid (rows, columns); positions are resampled where it differs from the file's.
    """
    weights = _read_part(source, "predictor", **heads)
    file: PredictorFile = weights.architecture
    state = weights.state if grid is None else _resample_all(weights.state, file.grid, grid)
    rows, columns = grid or file.grid
    predictor = TokenPredictor(file.predictor, rows * columns, file.vocabulary)
    predictor.trained_on = file.trained_on
    return _fill(predictor, state, weights.where)


def load_encoder(
    source: Source,
    img_size: int | tuple[int, int] = 224,
    *,
    encoder_heads: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    tokenizer_norm: bool = False,
    attention: AttentionConfig | None = None,
    dynamic: bool = False,
    init: Literal["pretrained", "random"] = "pretrained",
    patch_size: int | None = None,
) -> Encoder:
    """The pixel encoder for recognition, from any ADDP file, a fine-tuned classifier, or a MAE-, BEiT- or timm-style
    ViT; eval mode, float32, CPU.

    img_size: pixels, a side or (height, width); positions are resampled bicubically. tokenizer_norm: keep ADDP's input
    norm (published transfers drop it). encoder_heads: where it is not width/64. attention, dynamic: see `Encoder`; the
    default is the file's own attention; relative positions that it lacks start at zero, those of other sizes are
    resampled.
    init: "random" takes the architecture alone and draws the weights from torch's global generator; `source` may then
    also be a size, tiny, small, base or large, with `patch_size` (16). The final norm, which recognition does without,
    is frozen.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    options = {"dropout": dropout, "drop_path": drop_path, "tokenizer_norm": tokenizer_norm, "input_dropout": dropout}
    if isinstance(source, str) and source in SIZES and not Path(source).exists():
        if init != "random":
            raise UserError(f"{source}: a size, which has no weights; expected init=random beside it, or a checkpoint")
        where, state = source, None
        file = EncoderFile(EncoderConfig(**SIZES[source]), size, patch_size or NAMED_PATCH)
    else:
        where, state, file = _read_encoder(source, encoder_heads)
        if patch_size not in (None, file.patch_size):
            raise UserError(f"patch_size: found {patch_size}, but {where} has {file.patch_size}; leave the key out")
        if tokenizer_norm and init == "pretrained" and "tokenizer_norm.weight" not in state:
            raise UserError(f"tokenizer_norm: {where} has none; expected an ADDP checkpoint, or tokenizer_norm=false")
    try:
        encoder = Encoder(replace(file.encoder, **options), size, file.patch_size, attention or file.attention, dynamic)
    except ValueError as error:
        raise UserError(f"img_size={img_size}: {error}") from error
    encoder.norm.requires_grad_(False)
    return encoder.eval() if init == "random" else _fill(encoder, _fitted(state, file, encoder), where)


def _read_encoder(source: Source, heads: int | None) -> tuple[str, State, EncoderFile]:
    """(name for errors, tensors, architecture) of the pixel encoder in any file that has one."""
    weights = read_weights(source, **({} if heads is None else {"encoder_heads": heads}))
    if weights.kind == "addp":
        config: ADDPConfig = weights.architecture
        file = EncoderFile(config.denoiser.encoder, config.image_size, config.tokenizer.stride)
        return weights.where, weights.part("denoiser.encoder."), file
    if weights.kind == "classifier":
        return weights.where, weights.part("encoder."), weights.architecture.encoder
    if weights.kind == "encoder":
        return weights.where, weights.state, weights.architecture
    raise UserError(
        f"{weights.where}: {_describe_kind(weights)}; expected a checkpoint with a pixel encoder (ADDP, MAE or ViT)"
    )


def _fitted(state: State, file: EncoderFile, encoder: Encoder) -> State:
    """A file's encoder tensors as `encoder` wants them: positions of its size, and only the parts that it has."""
    state, expected = dict(state), encoder.state_dict()
    if not encoder.config.tokenizer_norm:
        state = {key: value for key, value in state.items() if not key.startswith("tokenizer_norm.")}
    if not encoder.attention.class_token:
        state.pop("cls_token", None)
    state = {key: value for key, value in state.items() if ".relative." not in key or key in expected}
    for key, value in expected.items():
        if ".relative." in key:
            state[key] = _resample_relative(state[key], value, key, file, encoder) if key in state else value
    return _resample_all(state, file.grid, encoder.grid)


def _resample_relative(table: Tensor, like: Tensor, key: str, file: EncoderFile, encoder: Encoder) -> Tensor:
    """A relative table for the grid that its block sees in `encoder`."""
    if key.endswith("relative_position_bias_table"):
        if file.attention.class_token and not encoder.attention.class_token:
            table = table[:-3]  # to, from and between class tokens
        return resize_table(table.float(), file.grid, encoder.grid, encoder.prefix)
    if table.shape == like.shape:
        return table
    return functional.interpolate(table.float().t().unsqueeze(0), size=len(like), mode="linear")[0].t()


def load_classifier(source: Source, img_size: int | tuple[int, int] | None = None) -> Classifier:
    """A classifier that `addp finetune` or `addp linprobe` trained; eval mode, float32, CPU.

    img_size: pixels, where other than those it was trained on; positions are resampled bicubically.
    """
    weights = read_weights(source)
    if weights.kind != "classifier":
        raise UserError(f"{weights.where}: {_describe_kind(weights)}; expected a classifier: a run of `addp finetune`")
    file: ClassifierFile = weights.architecture
    size = file.encoder.image_size if img_size is None else img_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    encoder = Encoder(file.encoder.encoder, size, file.encoder.patch_size, file.encoder.attention)
    model = Classifier(encoder, file.classes, file.pooling, file.norm, file.class_names, file.mean, file.std)
    fitted = _fitted(weights.part("encoder."), file.encoder, encoder)
    return _fill(model, _replace_part(weights.state, "encoder.", fitted), weights.where)


# -------------------- saving


def save_model(module: nn.Module, path: str | os.PathLike, grid: tuple[int, int] | None = None) -> None:
    """Write an ADDP, Tokenizer, TokenPredictor, Encoder or Classifier as one safetensors file with its architecture in
    the metadata.

    grid: the token grid of a TokenPredictor. The file appears whole or not at all; OSError where it cannot be written.
    """
    kind, architecture = _architecture_of(module, grid)
    text = json.dumps({"kind": kind, "architecture": asdict(architecture)})
    state = {key: value.detach().to("cpu").contiguous() for key, value in module.state_dict().items()}
    with replacing(Path(path)) as temporary:
        try:
            save_file(state, temporary, metadata={METADATA_KEY: text})
        except SafetensorError as error:  # how its writer reports a full disk
            raise OSError(str(error)) from error


def save_published(model: ADDP, path: str | os.PathLike) -> None:
    """Write `{"model": ...}` with every tensor the published implementation declares. ValueError as `to_published`,
    OSError where the file cannot be written.
    """
    text = json.dumps({"kind": "addp", "architecture": asdict(model.config)})
    content = {"model": to_published(model), METADATA_KEY: text}
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def fingerprint(*modules: nn.Module) -> str:
    """A digest of the modules' weights: equal for equal tensors under equal names."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# -------------------- reading files safely


def _open(source: Source) -> tuple[str, State, dict | None]:
    """(name for errors, tensors, stored architecture or None)."""
    if isinstance(source, Mapping):
        return "state dict", *_unwrap("state dict", source)
    path = _locate(os.fspath(source))
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(METADATA_KEY)
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no mapping)
                return str(path), state, json.loads(text) if text else None
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            begin = file.read(16)
        if not begin.startswith((b"PK", b"\x80")):
            raise UserError(
                f"{path}: not a checkpoint (it begins with {begin!r}); expected .safetensors or a PyTorch file; "
                "a download page saved in its place? fetch it again"
            ) from error
        wanted = re.search(r"(?:GLOBAL|global|Unsupported class) ([\w.]+)", str(error))
        reason = f"it wants {wanted[1]}" if wanted else "it holds more than tensors"
        raise UserError(
            f"{path}: refused, unpickling it could run code ({reason}); expected plain tensors: "
            "re-save it as safetensors where you trust it"
        ) from error
    except (SafetensorError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({_first_line(error)}); "
            "expected .safetensors or a PyTorch file, complete"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: found a {type(content).__name__}, expected a dictionary of tensors")
    return str(path), *_unwrap(str(path), content)


def _locate(source: str) -> Path:
    if source.startswith("hf://"):
        owner, _, rest = source.removeprefix("hf://").partition("/")
        repository, _, name = rest.partition("/")
        if not name:
            raise UserError(f"{source}: expected hf://owner/repository/file")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(f"{owner}/{repository}", name))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise UserError(
                f"{source}: cannot be fetched ({_first_line(error)}); expected a reachable hub file or a local path"
            ) from error
    path = Path(source)
    if path.is_dir():
        if not (path / MODEL_FILE).exists():
            raise UserError(
                f"{path}: a folder without {MODEL_FILE}; "
                "expected a finished run (start its command again to finish it) or a file"
            )
        return path / MODEL_FILE
    if not path.exists():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(
            f"{path}: no such file{near}; expected a checkpoint, a run folder or hf://owner/repository/file"
        )
    return path


def _unwrap(where: str, content: Mapping[str, Any]) -> tuple[State, dict | None]:
    """The state dict inside `model`, `state_dict` or `module`, or at the top; without DDP's prefix and anything but
    tensors.
    """
    stored = content.get(METADATA_KEY)
    inner = next(
        (content[key] for key in ("model", "state_dict", "module") if isinstance(content.get(key), Mapping)), content
    )
    state = {key.removeprefix("module."): value for key, value in inner.items() if isinstance(value, Tensor)}
    if not state:
        entries = ", ".join(map(str, list(content)[:6])) or "none"
        raise UserError(f"{where}: no tensors in it (entries: {entries}); expected a checkpoint")
    return state, json.loads(stored) if isinstance(stored, str) else None


def _stored_architecture(where: str, stored: Any) -> tuple[str, Any]:
    try:
        kind = stored["kind"]
        return kind, TypeAdapter(ARCHITECTURES[kind]).validate_python(stored["architecture"])
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(
            f"{where}: its description of the architecture does not fit this version ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _describe_kind(weights: Weights) -> str:
    hint = {
        "addp": "this is an ADDP checkpoint",
        "predictor": "this is a MAGE checkpoint: pass it as predictor=",
        "tokenizer": "this is a VQGAN checkpoint: pass it as tokenizer=",
        "encoder": "this is a ViT encoder's checkpoint (MAE, timm or exported): load_encoder reads it",
        "classifier": "this is a fine-tuned classifier",
    }
    return hint[weights.kind]


def _read_part(source: Source, kind: str, **heads: int) -> Weights:
    """A tokenizer's or predictor's weights, from its own file or from within an ADDP file."""
    weights = read_weights(source, wanted=kind, **heads)
    if weights.kind == kind:
        return weights
    if weights.kind == "addp" and (state := weights.part(f"{kind}.")):
        config: ADDPConfig = weights.architecture
        file = (
            TokenizerFile(config.tokenizer, config.grid)
            if kind == "tokenizer"
            else PredictorFile(config.predictor, config.grid, config.vocabulary)
        )
        return Weights(weights.where, kind, state, file)
    wanted = {"tokenizer": "VQGAN", "predictor": "MAGE"}[kind]
    raise UserError(f"{kind}={weights.where}: {_describe_kind(weights)}; expected a {wanted} checkpoint")


# -------------------- filling a module


def _fill(module: nn.Module, state: State, where: str) -> Any:
    """Copy the tensors in; UserError that names every missing, unexpected or mis-shaped one."""
    expected = module.state_dict()
    faults = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "mis-shaped": [
            f"{key} (found {tuple(state[key].shape)}, expected {tuple(value.shape)})"
            for key, value in expected.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {word}: {', '.join(names)}" for word, names in faults.items() if names)
        raise UserError(f"{where}: the tensors do not fit the {type(module).__name__}: {found}")
    module.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in state.items()})
    return module.eval()


def _resample_all(state: State, old: tuple[int, int], new: tuple[int, int]) -> State:
    """Positions on the old token grid (rows, columns) -> the new one, bicubically; the class position is kept."""
    if tuple(old) == tuple(new):
        return state
    return {key: _resample(value, old, new) if POSITIONS.search(key) else value for key, value in state.items()}


def _resample(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    batched = positions if positions.ndim == 3 else positions[None]
    resized = resample_positions(batched.float(), old, new)
    return resized if positions.ndim == 3 else resized[0]


def _check_codes(part: Weights, codes: int) -> None:
    file = part.architecture
    found = file.tokenizer.codebook if part.kind == "tokenizer" else file.vocabulary.codebook
    if found != codes:
        raise UserError(f"{part.kind}={part.where}: it has {found} codes, but the model predicts {codes}")


def _architecture_of(module: nn.Module, grid: tuple[int, int] | None) -> tuple[str, Any]:
    if isinstance(module, ADDP):
        return "addp", module.config if module.predictor else replace(module.config, predictor=None)
    if isinstance(module, Tokenizer):
        return "tokenizer", TokenizerFile(module.config, module.grid)
    if isinstance(module, TokenPredictor):
        return "predictor", PredictorFile(module.config, grid, module.vocabulary, module.trained_on)
    if isinstance(module, Encoder):
        return "encoder", EncoderFile(module.config, module.image_size, module.patch_size, module.attention)
    if isinstance(module, Classifier):
        _, encoder = _architecture_of(module.encoder, None)
        return "classifier", ClassifierFile(
            encoder,
            module.num_classes,
            module.pooling,
            module.norm,
            module.class_names,
            module.mean,
            module.std,
        )
    names = "ADDP, Tokenizer, TokenPredictor, Encoder or Classifier"
    raise TypeError(f"cannot save a {type(module).__name__}; expected {names}")


def _replace_part(state: State, prefix: str, part: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(prefix)} | {
        prefix + key: value for key, value in part.items()
    }


def _check_overrides(given: Mapping[str, Any], known: Iterable[str], function: str) -> None:
    for key in given:
        if key not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {key!r}{nearest(key, known)}")
