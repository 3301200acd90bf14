"""Writes the output folders of `addp det eval` and `addp det predict`."""

import json
from pathlib import Path
from typing import Any

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically


def make_folder(out: str) -> Path:
    """Create the folder that the key `out` names. Raises UserError if that is impossible."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror}); choose another folder") from error
    return Path(out)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically. Raises UserError if it cannot be written."""
    try:
        write_atomically(path, json.dumps(content).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
