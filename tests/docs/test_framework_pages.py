"""The pages for users of timm, detectron2 and mmsegmentation: their Python blocks run as they stand there.

The blocks of a page run in order and share their names, as a reader would paste them into one session, in a folder with
`runs/vit_b` and `runs/resnet50` (pretraining runs) and `runs/ft_b` (a fine-tuned classifier), all tiny.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from tiny import tiny_addp, tiny_cnn_addp

from addp_core import save_model
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main

ROOT = Path(__file__).parents[2]
READERS_REPOSITORY = "hf://you/"


class Page(NamedTuple):
    """A page of docs/ whose blocks are run."""

    framework: str  # the module without which the page is skipped
    prepare: Callable[[Path], None] = lambda folder: None  # writes what else the blocks read into their folder


def write_image_folders(folder: Path) -> None:
    """Write two small images of each of three classes to data/train."""
    for name in ("cat", "dog", "owl"):
        (folder / "data" / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (24, 20), (60 * i, 100, 200)).save(folder / "data" / "train" / name / f"{name}{i}.png")


def prepare_segmentor(folder: Path) -> None:
    """Train the run `runs/seg` for a step, and write an image."""
    assert main(["toy", f"out={folder}/toy", "only=[ade20k]", "scene=48", "ade_train=4", "ade_val=2"]) == 0
    sizes = ["data.crop=32", "data.scale=[48,192]", "channels=8", "train.steps=1", "train.batch=2", "data.workers=0"]
    paths = [f"data={folder}/toy/ade20k", f"model={folder}/runs/vit_b", f"out={folder}/runs/seg"]
    assert main(["seg", "train", "config=upernet_addp-tiny_500_ade20k-512x512", *paths, *sizes]) == 0
    Image.new("RGB", (48, 40), "green").save(folder / "image.png")


PAGES = {
    "timm.md": Page("timm", write_image_folders),
    "detectron2.md": Page("detectron2"),
    "mmseg.md": Page("mmseg", prepare_segmentor),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which the blocks run, with the runs that they read."""
    torch.manual_seed(0)
    for name, model in {
        "vit_b": tiny_addp(image_size=(16, 16)),
        "resnet50": tiny_cnn_addp(image_size=(16, 16)),
        "ft_b": Classifier(Encoder(EncoderConfig(32, 4, 2), (32, 32), 8), 3, class_names=("cat", "dog", "owl")),
    }.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        save_model(model, tmp_path / "runs" / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python_blocks(page: str) -> int:
    """Execute the blocks of Python on a page of docs/ in order and return their number; errors name the page's line.

    Those that read a repository of the reader's are left out: tests/tools/test_hub.py has them, with a stand-in.
    """
    path = ROOT / "docs" / page
    text, names = path.read_text(encoding="utf-8"), {"__name__": "__main__"}
    found = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    found = [block for block in found if READERS_REPOSITORY not in block[1]]
    for block in found:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], path, "exec"), names)
    return len(found)


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / "docs" / page).exists()])
def test_the_blocks_of_a_page_run(page, folder):
    framework, prepare = PAGES[page]
    try:
        importlib.import_module(framework)
    except ImportError as error:
        pytest.skip(f"{framework} is not installed ({error})")
    prepare(folder)
    assert run_python_blocks(page) > 0
