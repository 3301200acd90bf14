"""`addp export`: write a checkpoint in another layout and check it by reading it back.

Files of the layouts `timm` and `onnx` can be used without this project. The outputs of the exported model are compared
with those of the original on random images before the export counts as done.
"""

import logging
from pathlib import Path

from addp_core.base.errors import UserError
from addp_core.base.paths import expand_home
from addp_core.recipes.keys import keys_of
from addp_core.weights.files import MODEL_FILE
from tools.export.hub import prepare_push, push
from tools.export.layouts import LAYOUTS
from tools.export.recipe import Recipe as Recipe

log = logging.getLogger("addp")

ALWAYS = ("model", "out", "layout", "push", "private", "license", "bench")  # keys of every layout


def run(recipe: Recipe) -> None:
    """Write the layout, read it back and compare.

    Raises UserError if the layout cannot hold the model, and RuntimeError if the outputs differ.
    """
    layout, out = LAYOUTS[recipe.layout], Path(recipe.out)
    suffixes = {other.suffix for other in LAYOUTS.values()} - {""}
    if not layout.suffix and (out.is_file() or out.suffix in suffixes):
        raise UserError(f"out: found {out.name}, expected a folder for layout={recipe.layout}")
    if layout.suffix and out.suffix != layout.suffix:
        raise UserError(
            f"out: found {out.name}, expected a name that ends in {layout.suffix} for layout={recipe.layout}"
        )
    for key in keys_of(Recipe):
        if key not in (*ALWAYS, *layout.keys) and getattr(recipe, key) not in (None, False, ""):
            others = " or ".join(name for name, other in LAYOUTS.items() if key in other.keys)
            raise UserError(f"{key}: layout={recipe.layout} does not use it; expected layout={others}, or no {key}")
    source = expand_home(recipe.model)
    files = {path.resolve() for path in (source, source / MODEL_FILE) if path.is_file()}
    if (written := out / layout.weights).resolve() in files:
        raise UserError(f"out: {written} is the model itself, which the export would replace; expected another out")
    prepare_push(recipe)
    try:
        layout.write(recipe, out)
    except ValueError as error:
        raise UserError(f"layout={recipe.layout}: {error}") from error
    except OSError as error:
        raise UserError(
            f"out: {out} cannot be written ({error.strerror or error}); expected free space and permission"
        ) from error
    size = sum(p.stat().st_size for p in out.iterdir()) if out.is_dir() else out.stat().st_size
    log.info("%s: %.1f MB", out, size / 1e6)
    if recipe.push:
        push(recipe, out)
