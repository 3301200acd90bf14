"""`addp data <dataset> out=DIR`: download, verify and unpack a public dataset, in the layout that the tasks read.

A recipe names the archives and their checksums. A stopped command continues where it was: downloads in mid-file, and
archives that have been unpacked are not fetched again. Datasets that nobody may pass on say what to fetch, and how.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from addp_core.base.errors import UserError
from addp_core.base.files import write_atomically
from addp_core.base.paths import expand_home

log = logging.getLogger("addp")

STATE = "dataset.json"  # in `out`: archive -> MD5 of what has been unpacked


@dataclass
class Recipe:
    """Where a public dataset is, and how it is laid out."""

    out: Annotated[str, "folder of the dataset"]
    archives: Annotated[dict[str, str], "file name -> address of an archive"] = field(default_factory=dict)
    md5: Annotated[dict[str, str], "file name -> MD5, as its publisher states it"] = field(default_factory=dict)
    strip: Annotated[int, Ge(0), "leading folders of the archives to leave out"] = 0
    layout: Annotated[Literal["unpacked", "cifar10"], "the archives' own files, or CIFAR-10's as PNG images"] = (
        "unpacked"
    )
    mirror: Annotated[str, "folder or address that has the archives under the same names, instead of their own"] = ""
    keep: Annotated[bool, "keep the archives after they have been unpacked"] = False
    by_hand: Annotated[str, "what to do for a dataset that cannot be downloaded without an account"] = ""
    licence: Annotated[str, "who may use it for what; shown before the download"] = ""
    used_by: Annotated[str, "a command that uses it, shown at the end"] = ""

    def __post_init__(self) -> None:
        for name in self.archives:
            if name not in self.md5:
                raise ValueError(f"md5: found none for {name}, expected its checksum")


def run(recipe: Recipe) -> None:
    """Download and unpack what is missing. Raises UserError if an archive cannot be had, or not as published."""
    if recipe.by_hand:
        raise UserError(f"data: {recipe.by_hand}")
    if not recipe.archives:
        raise UserError("data: found no archives, expected a dataset, as in addp data cifar10 out=cifar10")
    out = expand_home(recipe.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        state = _read_state(out)
        if recipe.licence and len(state) < len(recipe.archives):
            log.info("%s", recipe.licence)
        for name in recipe.archives:
            if state.get(name) == recipe.md5[name]:
                log.info("%s: unpacked before", name)
                continue
            _add(recipe, name, out)
            state[name] = recipe.md5[name]
            write_atomically(out / STATE, json.dumps(state, indent=1).encode())
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror or error})") from error
    log.info("data: %s is complete", out)
    if recipe.used_by:
        log.info("next: %s", recipe.used_by.replace("{out}", str(out)))


def _read_state(out: Path) -> dict[str, str]:
    try:
        return dict(json.loads((out / STATE).read_text("utf-8")))
    except (OSError, ValueError):
        return {}


def _add(recipe: Recipe, name: str, out: Path) -> None:
    """Fetch an archive, check and unpack it."""
    from tools.datasets.archives import check_md5, download, is_url, unpack
    from tools.datasets.cifar10 import write_images

    advice = f"fetch it in another way and name its folder: mirror=<folder with {name}>"
    own = out / name
    if recipe.mirror and not is_url(recipe.mirror):
        archive = expand_home(recipe.mirror) / name
        if not archive.is_file():
            raise UserError(f"mirror: {archive}: no such file; expected the archive from {recipe.archives[name]}")
    else:
        archive = own
        url = f"{recipe.mirror.rstrip('/')}/{name}" if recipe.mirror else recipe.archives[name]
        if not archive.exists():
            log.info("%s: downloading from %s", name, url)
            download(url, archive, advice, "mirror" if recipe.mirror else "archives")
    log.info("%s: checking %.1f MB", name, archive.stat().st_size / 1e6)
    check_md5(archive, recipe.md5[name])
    log.info("%s: unpacking into %s", name, out)
    if recipe.layout == "cifar10":
        write_images(archive, out)
    else:
        unpack(archive, out, recipe.strip)
    os.sync()  # once, before the archive is called unpacked or removed: for each of a million files it takes hours
    if archive == own and not recipe.keep:
        archive.unlink()
