"""Pretraining on tar shards at an address: interrupted by the server and continued, it equals a run on the disk."""

import json
import tarfile
from pathlib import Path

import pytest
from image_data import add_member, encode, smooth_image
from safetensors.torch import load_file
from shard_server import ShardServer, serve

from addp_core.data import remote
from addp_core.recipes.cli import main

pytest.importorskip("aiohttp")

STEPS, BATCH, SECRET = 8, 4, "hush-hush"
KEYS = ("data.size=16", "data.shuffle_block=2", f"train.steps={STEPS}", f"train.batch={BATCH}", "train.log_every=1")
MODEL = ("model.width=32", "model.multipliers=[1,1]", "model.blocks=1", "model.codebook=16", "model.dim=4")


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOGIN", f"user:{SECRET}")
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "shards" / f"x-{shard}.tar", "w") as tar:
            for i in range(4):
                add_member(tar, f"{i}.png", encode(smooth_image(20 + 2 * i, 20 + shard)))
    with serve(tmp_path / "shards") as server:
        yield server


def tokenizer(data: str, out: Path, *settings: str) -> int:
    return main(["tokenizer", f"data={data}", f"out={out}", *KEYS, *MODEL, "train.precision=fp32", *settings])


def address(server: ShardServer) -> str:
    return server.url.replace("://", "://${LOGIN}@") + "/x-{0..2}.tar"


def losses(out: Path) -> dict[int, float]:
    path = out / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_that_the_server_interrupts_continues_to_the_same_weights(server, tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    assert tokenizer(str(server.folder), here, "data.workers=0") == 0
    settings = ("data.workers=1", "data.prefetch=1", "data.tries=2", "train.checkpoint_every=2")
    server.fail = lambda request: 503 if len(losses(there)) > 1 else None
    capsys.readouterr()
    assert tokenizer(address(server), there, *settings) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "://${LOGIN}@127.0.0.1" in error
    assert "/x-" in error
    assert "HTTP 503" in error
    assert not (there / "model.safetensors").exists()
    assert len(losses(there)) > 1
    server.fail = lambda request: None
    assert tokenizer(address(server), there, *settings) == 0
    assert losses(there) == losses(here)
    expected, found = (load_file(run / "model.safetensors") for run in (here, there))
    assert all(found[name].equal(expected[name]) for name in expected)
    assert_secret_is_nowhere(tmp_path, capsys)


def assert_secret_is_nowhere(folder: Path, capsys) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "recipe.yaml" and "${LOGIN}" in path.read_text() for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in "".join(capsys.readouterr())


def test_credentials_in_the_address_are_refused_before_anything_is_written(server, tmp_path, capsys):
    given = server.url.replace("://", f"://user:{SECRET}@") + "/x-0.tar"
    assert tokenizer(given, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "data: the address holds credentials" in message
    assert SECRET not in message
    assert not (tmp_path / "out").exists()
    assert not server.requests
