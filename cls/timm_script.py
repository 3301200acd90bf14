"""Run a script of timm with our models registered: `python -m cls.timm_script train.py --model addp_vit_base_patch16`.

timm's train.py, validate.py and inference.py know the models of modules that are imported, and have no common flag that
imports one. With several processes: `torchrun --nproc-per-node 2 -m cls.timm_script train.py ...`.
"""

import runpy
import sys
from pathlib import Path

import cls  # noqa: F401 (registers the models)
from addp_core.base.errors import UserError


def main(arguments: list[str]) -> int:
    """Run the script that the first argument names with the others, and return the exit code: 2 for a `UserError`."""
    try:
        _run(arguments)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _run(arguments: list[str]) -> None:
    script = Path(arguments[0]) if arguments else Path()
    if not script.is_file():
        found = f"found {script}, which is no file" if arguments else "found no script"
        raise UserError(f"{found}; expected python -m cls.timm_script <timm's train.py> <its arguments>")
    sys.argv = arguments
    sys.path.insert(0, str(script.parent))  # as `python train.py` does
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
