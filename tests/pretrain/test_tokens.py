"""The token cache: runs that read ids instead of pixels have the same losses, and a cache of other crops is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from addp_core.recipes.cli import main
from pretrain.tokens import TokenCache, TokenCacheKey, TokenStream, read_record

IMAGES, BATCH, CROPS = 12, 4, 2
STEPS = CROPS * IMAGES // BATCH  # after which the crops of the cache begin again
DATA = ("data.size=[16,24]", "data.workers=0")
TRAIN = (f"train.steps={STEPS}", f"train.batch={BATCH}", "train.log_every=1", "train.lr=0.001", "train.precision=fp32")
SMALL = ("width=16", "depth=1", "heads=2", "decoder_depth=1", "decoder_heads=2")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with images, one of which cannot be read, a trained tokenizer and the cache `tokens`."""
    root = tmp_path_factory.mktemp("tokens")
    (root / "photos").mkdir()
    for i in range(IMAGES - 1):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(root / "photos" / f"{i}.png")
    (root / "photos" / "broken.png").write_bytes(b"no image")
    model = ("width=32", "multipliers=[1,1,1]", "blocks=1", "codebook=32", "dim=8")
    assert (
        main(["tokenizer", f"out={root / 'tokenizer'}", *data(root), *TRAIN, *(f"model.{key}" for key in model)]) == 0
    )
    assert main(cache(root, root / "tokens")) == 0
    return root


def data(root: Path) -> list[str]:
    return [f"data={root / 'photos'}", *DATA]


def cache(root: Path, out: Path, *settings: str) -> list[str]:
    sizes = (f"crops={CROPS}", "batch=3", "rows_per_file=9")  # unlike those of the runs
    return ["tokenizer", "cache", f"model={root / 'tokenizer'}", *data(root), *sizes, f"out={out}", *settings]


def predictor(root: Path, out: Path, *settings: str) -> list[str]:
    model = [f"model.{key}" for key in SMALL]
    return ["predictor", f"tokenizer={root / 'tokenizer'}", f"out={out}", *data(root), *TRAIN, *model, *settings]


def pretrain(root: Path, out: Path, *settings: str) -> list[str]:
    parts = [f"tokenizer={root / 'tokenizer'}", f"predictor={root / 'predictor'}"]
    encoder = [f"model.encoder.{key}" for key in SMALL[:3]]
    model = [*encoder, "model.decoder.depth=1", "model.decoder.heads=2"]
    return ["pretrain", *parts, f"out={out}", *data(root), *TRAIN, *model, *settings]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_both_stages_have_the_losses_of_runs_without_the_cache(root, tmp_path, monkeypatch):
    tokens = f"data.tokens={root / 'tokens'}"
    assert main(predictor(root, root / "predictor")) == 0
    assert main(pretrain(root, tmp_path / "pixels")) == 0
    monkeypatch.setattr("addp_core.data.stream.Stream.batches", None)  # no image is loaded
    assert main(predictor(root, tmp_path / "ids", tokens)) == 0
    assert losses(tmp_path / "ids") == losses(root / "predictor")
    assert main(pretrain(root, tmp_path / "addp", tokens)) == 0
    assert losses(tmp_path / "addp") == losses(tmp_path / "pixels")
    assert len(losses(tmp_path / "addp")) == STEPS


def test_a_stopped_run_continues_as_if_it_had_not_been_stopped(root, tmp_path):
    settings = (f"data.tokens={root / 'tokens'}", "train.schedule=constant")
    assert main(predictor(root, tmp_path / "whole", *settings)) == 0
    assert main(predictor(root, tmp_path / "parts", *settings, "train.steps=2")) == 0
    assert main(predictor(root, tmp_path / "parts", *settings)) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_every_epoch_shows_each_image_once_and_the_crops_repeat(root):
    record = read_record(root / "tokens")
    names = ("images", "data", "size", "scale", "ratio", "flip", "resize", "interpolation", "tokenizer")
    tokens = TokenCache(root / "tokens", TokenCacheKey(**{name: record[name] for name in names}))
    batches = TokenStream(tokens, seed=7, batch=BATCH).batches()
    epochs = [np.concatenate([next(batches).ids.numpy() for _ in range(IMAGES // BATCH)]) for _ in range(4)]
    for first, second in ((0, 2), (1, 3)):  # the same crops in another order
        assert sorted(map(tuple, epochs[first])) == sorted(map(tuple, epochs[second]))
        assert not np.array_equal(epochs[first], epochs[second])
    halves = [next(TokenStream(tokens, seed=7, batch=BATCH).batches(5, rank, 2)).ids for rank in (0, 1)]
    whole = next(TokenStream(tokens, seed=7, batch=BATCH).batches(5)).ids
    assert np.array_equal(np.concatenate(halves), whole)


def test_a_cache_of_blocks_of_neighbors(root, tmp_path, capsys):
    blocks, tokens = "data.shuffle_block=3", f"data.tokens={tmp_path / 'tokens'}"
    assert main(cache(root, tmp_path / "tokens", blocks)) == 0
    assert main(predictor(root, tmp_path / "pixels", blocks)) == 0
    assert main(predictor(root, tmp_path / "ids", blocks, tokens)) == 0
    assert losses(tmp_path / "ids") == losses(tmp_path / "pixels")
    capsys.readouterr()
    assert main(predictor(root, tmp_path / "other", tokens)) == 2
    assert "data.shuffle_block: found 1, but data.tokens=" in capsys.readouterr().err


def test_a_cache_from_before_blocks_existed(root, tmp_path):
    shutil.copytree(root / "tokens", tmp_path / "tokens")
    record = json.loads((root / "tokens" / "tokens.json").read_text())
    assert record.pop("shuffle_block") == 1
    (tmp_path / "tokens" / "tokens.json").write_text(json.dumps(record))
    assert main(cache(root, tmp_path / "tokens")) == 0
    assert main(predictor(root, tmp_path / "run", f"data.tokens={tmp_path / 'tokens'}", "train.steps=1")) == 0


def test_a_stopped_cache_is_continued_and_others_files_are_kept(root, tmp_path, caplog):
    shutil.copytree(root / "tokens", tmp_path / "tokens")
    removed, kept = (tmp_path / "tokens" / f"ids-0000{number}.npy" for number in (1, 2))
    content, time = removed.read_bytes(), kept.stat().st_mtime_ns
    removed.unlink()
    caplog.set_level("INFO", logger="addp")
    assert main(cache(root, tmp_path / "tokens")) == 0
    assert removed.read_bytes() == content
    assert kept.stat().st_mtime_ns == time
    assert f"2 crops of {IMAGES} images, 24 ids each" in caplog.text
    assert "1 files of 9 crops to compute" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.scale=[0.5,1]"], "data.scale: found [0.5, 1.0], but data.tokens="),
        (["data.flip=false"], "data.flip: found False"),
        (["interpolation=bilinear"], "interpolation: found bilinear"),
    ],
)
def test_a_cache_of_other_crops_is_one_line(root, tmp_path, capsys, settings, message):
    assert main(predictor(root, tmp_path / "run", f"data.tokens={root / 'tokens'}", *settings)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"addp: {message}")
    assert "expected the same value, or another cache" in error


def test_caches_of_other_images_other_tokenizers_and_incomplete_ones_are_one_line(root, tmp_path, capsys):
    tokens = tmp_path / "tokens"

    def error(*settings: str, verb=predictor) -> str:
        assert main(verb(root, tmp_path / "run", f"data.tokens={tokens}", *settings)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "holds no tokens.json; expected a folder that `addp tokenizer cache` has written" in error()
    assert "natural_share: found 0.5 with data.tokens" in error("process.natural_share=0.5", verb=pretrain)
    shutil.copytree(root / "tokens", tokens)
    shutil.copytree(root / "photos", tmp_path / "photos")
    (tmp_path / "photos" / "1.png").unlink()
    assert "are not the 11 images of data.source" in error(f"data={tmp_path / 'photos'}")
    (tokens / "ids-00001.npy").write_bytes(b"")
    assert "ids-00001.npy is damaged" in error()
    (tokens / "ids-00001.npy").unlink()
    assert "lacks ids-00001.npy; `addp tokenizer cache` has not come to its end" in error()
    assert main(cache(root, tokens, "crops=3")) == 2
    assert "holds a token cache with crops=2, expected 3" in capsys.readouterr().err.splitlines()[-1]
    record = json.loads((root / "tokens" / "tokens.json").read_text())
    shutil.rmtree(tokens)
    shutil.copytree(root / "tokens", tokens)
    (tokens / "tokens.json").write_text(json.dumps(record | {"tokenizer": "other"}))
    assert "was computed with another tokenizer than `tokenizer`" in error()
