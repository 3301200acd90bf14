"""Safe reading of weight files: our safetensors, PyTorch checkpoints, and state dicts that are already in memory.

Nothing is unpickled that could run code: a file is either `.safetensors` or read by `torch.load(weights_only=True)`.
"""

import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from addp_core.base.errors import UserError, did_you_mean
from addp_core.base.paths import MODEL_FILE
from addp_core.networks.encoder import METADATA_KEY
from addp_core.weights.assumptions import Assumption
from addp_core.weights.entries import State, select_entry, without_tensors
from addp_core.weights.hub import HUB_PREFIX, download
from addp_core.weights.unpickling import HARMLESS

MODULES_KEY = "modules"  # in what our files store: the same for parts of a model, by the prefix of their tensors
ZOO = Path(__file__).parent / "zoo"  # models that come with the package, as zoo:<name>

Source = str | os.PathLike | Mapping[str, Any]


@dataclass(frozen=True)
class FileContent:
    """What a weight file holds, before any conversion."""

    source: str  # names the file in error messages
    state: State  # tensors under the file's own names
    description: Any  # {"kind": ..., "architecture": ...} as our own files store it, or None
    entries: tuple[str, ...] = ()  # of the file that hold tensors
    wanted: str = ""  # the model that the caller named, if it is not an entry of the file
    assumptions: tuple[Assumption, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The entries without tensors, such as timm's `arch` and `args` or mmengine's `meta`."""
    descriptions: Mapping[str, Any] = field(default_factory=dict)
    """Of the modules that describe themselves, as in `description`, by the prefix of their tensors."""


def read_file(source: Source, wanted: str = "") -> FileContent:
    """Read the tensors of any file under the file's own names.

    Args:
        source: a path, a run folder, "zoo:name", "hf://owner/repository/file" (without a file: its
            model.safetensors), or a state dict.
        wanted: the name of the model to read, if the file holds several; see `select_entry`.

    Raises:
        UserError: if the file is missing, damaged, or holds pickled objects other than tensors and plain values.
    """
    if isinstance(source, Mapping):
        return _unwrap("state dict", source, wanted)
    path = _locate(os.fspath(source))
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, wanted)
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _unpickling_refused(path, error) from error
    except (SafetensorError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable checkpoint ({first_line(error)}); expected a complete .safetensors or PyTorch file"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: found a {type(content).__name__}, expected a dictionary of tensors")
    return _unwrap(str(path), content, wanted)


def read_tensors(source: Source, wanted: str = "") -> State:
    """Read the tensors of any file under the file's own names. Raises UserError like `read_file`."""
    return read_file(source, wanted).state


def strip_prefix(state: State, prefix: str) -> State:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_safetensors(path: Path, wanted: str) -> FileContent:
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no mapping)
    return _unwrap(str(path), content | ({METADATA_KEY: text} if text else {}), wanted)


def _unpickling_refused(path: Path, error: pickle.UnpicklingError) -> UserError:
    """Return the error for a file that `torch.load(weights_only=True)` refuses."""
    with path.open("rb") as file:
        first_bytes = file.read(16)
    if not first_bytes.startswith((b"PK", b"\x80")):
        return UserError(
            f"{path}: not a checkpoint (it begins with {first_bytes!r}); expected a .safetensors or PyTorch file; "
            "if a web page was saved in its place, download it again"
        )
    forbidden = re.search(r"(?:GLOBAL|global|Unsupported class) ([\w.]+)", str(error))
    reason = f"it asks for {forbidden[1]}" if forbidden else "it holds more than tensors"
    return UserError(
        f"{path}: refused because unpickling it could run code ({reason}); expected plain tensors; "
        "if you trust the file, save it again as safetensors"
    )


def _locate(source: str) -> Path:
    """Return the local path of a file, of a run folder's model, of a model of the zoo, or of a downloaded hub file."""
    if source.startswith(HUB_PREFIX):
        return download(source)
    if source.startswith("zoo:"):
        return _find_in_zoo(source.removeprefix("zoo:"))
    path = Path(source)
    if path.is_dir():
        if not (path / MODEL_FILE).exists():
            raise UserError(
                f"{path}: this folder has no {MODEL_FILE}; expected a file or the folder of a finished run "
                "(start its command again to finish it)"
            )
        return path / MODEL_FILE
    if not path.exists():
        hint = did_you_mean(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(
            f"{path}: no such file{hint}; expected a checkpoint, a run folder or hf://owner/repository/file"
        )
    return path


def _find_in_zoo(name: str) -> Path:
    path = ZOO / f"{name}.safetensors"
    names = sorted(path.stem for path in ZOO.glob("*.safetensors"))
    if name not in names:
        raise UserError(f"zoo:{name}: no such model{did_you_mean(name, names)}; the models are {', '.join(names)}")
    return path


def _unwrap(source: str, content: Mapping[str, Any], wanted: str) -> FileContent:
    """Find the state dict and our description in a checkpoint."""
    text = content.get(METADATA_KEY)
    entry = select_entry(source, content, wanted)
    return FileContent(
        source,
        entry.state,
        json.loads(text) if isinstance(text, str) else None,
        entry.entries,
        entry.wanted,
        entry.assumptions,
        without_tensors(content),
        {prefix: json.loads(description) for prefix, description in entry.descriptions.items()},
    )
