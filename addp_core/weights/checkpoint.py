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

from addp_core.base.errors import UserError, nearest
from addp_core.base.files import replacing
from addp_core.method.addp import ADDP, ADDPConfig
from addp_core.method.diffusion import ProcessConfig
from addp_core.networks.attention import AttentionConfig, resize_table
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import SIZES, Encoder, EncoderConfig, resample_positions
from addp_core.networks.layers import PLAIN
from addp_core.networks.predictor import PredictorConfig, TokenPredictor
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig, Vocabulary
from addp_core.weights.layouts import (
    ARCHITECTURES,
    LAYOUTS,
    ClassifierFile,
    EncoderFile,
    PredictorFile,
    State,
    TokenEncoderFile,
    TokenizerFile,
    describe,
    is_published_addp,
    published_addp_names,
    strip,
    to_published,
    with_heads,
)

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
    tokenizer: Source | None = None,
) -> Encoder | TokenEncoder:
    """The encoder for recognition, from any ADDP file, a fine-tuned classifier, or a MAE-, BEiT- or timm-style ViT;
    with `tokenizer` (or where the file holds one), MAGE's encoder over token ids. Eval mode, float32, CPU.

    img_size: pixels, a side or (height, width); positions are resampled bicubically. tokenizer_norm: keep ADDP's input
    norm (published transfers drop it; a ViT's own is always kept). encoder_heads: where it is not width/64. attention,
    dynamic: see `Encoder`; the default is the file's own attention; relative positions that it lacks start at zero,
    those of other sizes are resampled.
    init: "random" takes the architecture alone and draws the weights from torch's global generator (a tokenizer keeps
    its own); `source` may then also be a size, tiny, small, base or large, with `patch_size` (16). The final norm,
    which recognition does without, is frozen.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    part = None if tokenizer is None else _read_part(tokenizer, "tokenizer")
    if isinstance(source, str) and source in SIZES and not Path(source).exists():
        if init != "random":
            raise UserError(f"{source}: a size, which has no weights; expected init=random beside it, or a checkpoint")
        where, state = source, {}
        if part is None:
            file = EncoderFile(EncoderConfig(**SIZES[source]), size, patch_size or NAMED_PATCH)
        else:
            codes = part.architecture.tokenizer
            file = TokenEncoderFile(PredictorConfig(**SIZES[source]), Vocabulary(codes.codebook), codes, size)
            state = {f"tokenizer.{key}": value for key, value in part.state.items()}
    else:
        where, state, file = _read_encoder(source, encoder_heads, part)
    if patch_size not in (None, file.patch_size):
        raise UserError(f"patch_size: found {patch_size}, but {where} has {file.patch_size}; leave the key out")
    if tokenizer_norm and init == "pretrained" and "tokenizer_norm.weight" not in state:
        raise UserError(f"tokenizer_norm: {where} has none; expected an ADDP checkpoint, or tokenizer_norm=false")
    try:
        encoder = _make_encoder(file, size, dropout, drop_path, tokenizer_norm, attention, dynamic)
    except ValueError as error:
        raise UserError(f"img_size={img_size}: {error}") from error
    encoder.norm.requires_grad_(False)
    if init == "pretrained":
        return _fill(encoder, _fitted(state, file, encoder), where)
    if isinstance(encoder, TokenEncoder):
        _fill(encoder.tokenizer, _tokenizer_alone(strip(state, "tokenizer.")), where)
    return encoder.eval()


def _read_encoder(
    source: Source, heads: int | None, tokenizer: Weights | None
) -> tuple[str, State, EncoderFile | TokenEncoderFile]:
    """(name for errors, tensors, architecture) of the encoder in any file that has one."""
    weights = read_weights(source, **({} if heads is None else {"encoder_heads": heads}))
    if weights.kind == "predictor":
        return _read_mage(source, weights, heads, tokenizer)
    if tokenizer is not None:
        raise UserError(f"tokenizer={tokenizer.where}: {weights.where} is no MAGE checkpoint; leave the key out")
    if weights.kind == "addp":
        config: ADDPConfig = weights.architecture
        file = EncoderFile(config.denoiser.encoder, config.image_size, config.tokenizer.stride)
        return weights.where, weights.part("denoiser.encoder."), file
    if weights.kind == "classifier":
        file = weights.architecture.encoder
        if isinstance(file, EncoderFile):  # a norm that it was trained with is its own by now
            file = replace(file, encoder=replace(file.encoder, pre_norm=file.encoder.tokenizer_norm))
        return weights.where, weights.part("encoder."), file
    if weights.kind in ("encoder", "token_encoder"):
        return weights.where, weights.state, weights.architecture
    raise UserError(
        f"{weights.where}: {_describe_kind(weights)}; expected a checkpoint with an encoder (ADDP, MAE, BEiT, MAGE or "
        "ViT with a pixel encoder)"
    )


def _read_mage(
    source: Source, weights: Weights, heads: int | None, tokenizer: Weights | None
) -> tuple[str, State, TokenEncoderFile]:
    """MAGE's encoder and the tokenizer, its own where none is given."""
    if tokenizer is None:
        tokenizer = read_weights(source, wanted="tokenizer")
        if tokenizer.kind != "tokenizer":
            raise UserError(f"{weights.where}: MAGE reads token ids; expected tokenizer=<VQGAN file> beside it")
    found: PredictorFile = _checked(weights.where, with_heads, weights.architecture, {"predictor_heads": heads})
    codes: TokenizerConfig = tokenizer.architecture.tokenizer
    _check_codes(tokenizer, found.vocabulary.codebook)
    if found.trained_on not in ("", fingerprint(_fill(Tokenizer(codes), tokenizer.state, tokenizer.where))):
        raise UserError(
            f"tokenizer={tokenizer.where}: {weights.where} was trained on another; expected the one it knows"
        )
    size = (found.grid[0] * codes.stride, found.grid[1] * codes.stride)
    names = ("token_emb.", "blocks.", "norm.")
    state = {key: value for key, value in weights.state.items() if key.startswith(names)}
    state |= {f"tokenizer.{key}": value for key, value in _tokenizer_alone(tokenizer.state).items()}
    return weights.where, state, TokenEncoderFile(found.predictor, found.vocabulary, codes, size)


def _tokenizer_alone(state: State) -> State:
    """A tokenizer's tensors without its decoder."""
    return {key: value for key, value in state.items() if not key.startswith("decoder.")}


def _make_encoder(
    file: EncoderFile | TokenEncoderFile,
    size: tuple[int, int],
    dropout: float,
    drop_path: float,
    tokenizer_norm: bool,
    attention: AttentionConfig | None = None,
    dynamic: bool = False,
) -> Encoder | TokenEncoder:
    """The encoder of a file for other sizes and rates. ValueError where it cannot be."""
    if isinstance(file, TokenEncoderFile):
        if dynamic or attention not in (None, PLAIN):
            raise UserError(
                "attention: an encoder over tokens has neither windows, relative positions nor dynamic sizes"
            )
        predictor = replace(file.predictor, dropout=dropout)
        return TokenEncoder(predictor, file.vocabulary, file.tokenizer, size, drop_path)
    config = replace(
        file.encoder,
        dropout=dropout,
        drop_path=drop_path,
        tokenizer_norm=tokenizer_norm or file.encoder.pre_norm,
        input_dropout=dropout,
    )
    return Encoder(config, size, file.patch_size, attention or file.attention, dynamic)


def _fitted(state: State, file: EncoderFile | TokenEncoderFile, encoder: Encoder | TokenEncoder) -> State:
    """A file's encoder tensors as `encoder` wants them: positions of its size, and only the parts that it has."""
    if isinstance(encoder, TokenEncoder):
        return _resample_all(state, file.grid, encoder.grid)
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
    if not key.endswith("relative_position_bias_table"):
        if table.shape == like.shape:
            return table
        return functional.interpolate(table.float().t().unsqueeze(0), size=len(like), mode="linear")[0].t()
    if file.attention.class_token and not encoder.attention.class_token:
        table = table[:-3]  # to, from and between class tokens
    block = int(key.split(".")[1])
    old, new = file.attention.windows(file.encoder.depth)[block], encoder.blocks[block].window
    old, new = (old, old) if old else file.grid, (new, new) if new else encoder.grid
    return resize_table(table.float(), old, new, encoder.prefix)


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
    stored = file.encoder
    try:
        if isinstance(stored, TokenEncoderFile):
            encoder = TokenEncoder(stored.predictor, stored.vocabulary, stored.tokenizer, size)
        else:
            encoder = Encoder(stored.encoder, size, stored.patch_size, stored.attention)
    except ValueError as error:
        raise UserError(f"img_size={img_size}: {error}") from error
    about = (file.class_names, file.mean, file.std, file.crop)
    model = Classifier(encoder, file.classes, file.pooling, file.norm, *about)
    fitted = _fitted(weights.part("encoder."), stored, encoder)
    return _fill(model, _replace_part(weights.state, "encoder.", fitted), weights.where)


# -------------------- saving


def save_model(module: nn.Module, path: str | os.PathLike, grid: tuple[int, int] | None = None) -> None:
    """Write an ADDP, Tokenizer, TokenPredictor, Encoder, TokenEncoder or Classifier as one safetensors file with its
    architecture in the metadata.

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
    kind = stored.get("kind") if isinstance(stored, dict) else None
    if isinstance(kind, str) and kind not in ARCHITECTURES:
        raise UserError(f"{where}: the weights of {kind!r}; expected one of {', '.join(ARCHITECTURES)}")
    try:
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
        "token_encoder": "this is an encoder over token ids",
        "classifier": "this is a fine-tuned classifier",
    }
    return hint.get(weights.kind, f"this is the checkpoint of a {weights.kind}")


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
    if isinstance(module, TokenEncoder):
        tokenizer = module.tokenizer.config
        file = TokenEncoderFile(module.predictor_config, module.vocabulary, tokenizer, module.image_size)
        return "token_encoder", file
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
            module.crop,
        )
    names = "ADDP, Tokenizer, TokenPredictor, Encoder, TokenEncoder or Classifier"
    raise TypeError(f"cannot save a {type(module).__name__}; expected {names}")


def _replace_part(state: State, prefix: str, part: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(prefix)} | {
        prefix + key: value for key, value in part.items()
    }


def _check_overrides(given: Mapping[str, Any], known: Iterable[str], function: str) -> None:
    for key in given:
        if key not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {key!r}{nearest(key, known)}")
