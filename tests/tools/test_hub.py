"""`addp export push=owner/name` to a stand-in of the Hugging Face Hub, and what was pushed read back: by plain timm, by
`addp_core.load_*`, by `model=hf://...` and by torch.hub, with equal outputs. Nothing leaves this machine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_stand_in import READ_ONLY, TOKEN, Hub, running_hub
from huggingface_hub import constants, file_download
from tiny import tiny_addp

from addp_core import load_classifier, save_model
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.recipes.keys import all_keys
from addp_core.recipes.verbs import recipe_module
from addp_core.weights.files import MODEL_FILE
from tools.export.hub import TIMM_FILE

ROOT = Path(__file__).parents[2]
TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"  # of a file's address


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, to which this process would upload, with a token that may."""
    with running_hub() as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + TEMPLATE,
            "HF_HUB_OFFLINE": False,  # which tests/conftest.py sets
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
            if hasattr(file_download, name):  # older versions copy it
                monkeypatch.setattr(file_download, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield server


def export(*settings: object) -> int:
    return main(["export", *map(str, settings)])


def read_in_process(hub: Hub, tmp_path: Path, script: str, *arguments: object) -> None:
    """Run Python in a process of its own, which knows the Hub by its environment alone, and has no token."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


READ = """
import sys, timm, torch
from addp_core import load_addp, load_encoder, load_predictor, load_tokenizer
from addp_core.base.errors import UserError

assert not any(name == "cls" or name.startswith("cls.") for name in sys.modules)
plain = timm.create_model("hf-hub:me/addp", pretrained=True).eval()
model = load_addp("hf://me/addp")
encoder = load_encoder("hf://me/addp@main/model.safetensors", model.config.image_size)
by_hub = torch.hub.load(sys.argv[1], "addp", "hf://me/addp", source="local")
assert all(map(torch.equal, by_hub.state_dict().values(), model.state_dict().values()))
load_tokenizer("hf://me/addp"), load_predictor("hf://me/addp")
original = load_addp(sys.argv[2])
assert all(map(torch.equal, original.state_dict().values(), model.state_dict().values()))
images = torch.rand(2, 3, *encoder.image_size)
with torch.inference_mode():
    expected = load_encoder(sys.argv[2], model.config.image_size).forward_features(images)
    assert torch.equal(encoder.forward_features(images), expected)
    assert torch.allclose(plain.forward_features(images), expected, atol=1e-5)
for source, words in {
    "hf://me/addp/other.pth": "has no other.pth (found README.md, config.json, model.safetensors",
    "hf://me/nothing": "no such repository, or a private one",
    "hf://me": "expected hf://owner/repository/file, or hf://owner/repository for its model.safetensors",
}.items():
    try:
        load_addp(source)
        raise SystemExit(f"{source} was read")
    except UserError as error:
        assert words in str(error), error
        assert "\\n" not in str(error)
"""


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A finished run of ADDP."""
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    save_model(tiny_addp(), folder / MODEL_FILE)
    recipe = {"out": str(folder), "data": {"source": "/home/me/photos"}, "process": {"steps": 10}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "finished.json").write_text('{"step": 300}')
    return folder


@pytest.fixture
def bench(tmp_path, run_folder) -> Path:
    """The folder of a bench that measured that run."""
    step = {"benchmark": "finetune", "arm": "addp", "state": "done", "scores": {"top1": [80.0, 82.0]}}
    folder = tmp_path / "bench"
    folder.mkdir()
    arms = {"addp": {"model": str(run_folder), "init": "pretrained"}, "random": {"model": "x", "init": "random"}}
    steps = [step, step | {"arm": "random", "scores": {"top1": [7.0, 9.0]}}]
    (folder / "bench.json").write_text(json.dumps({"arms": arms, "steps": steps}))
    return folder


def test_a_whole_addp_is_read_by_plain_timm_and_by_load_addp(hub, tmp_path, run_folder, bench, capsys):
    settings = [f"model={run_folder}", "out=out.safetensors", "push=me/addp", "license=apache-2.0", f"bench={bench}"]
    assert export(*settings, "private=true") == 0
    messages = "".join(capsys.readouterr())
    assert f"{hub.endpoint}/me/addp: README.md, config.json, model.safetensors, timm.safetensors" in messages
    assert TOKEN not in messages
    files = hub.files["me/addp"]
    assert set(files) == {"README.md", "config.json", MODEL_FILE, TIMM_FILE}
    assert files[MODEL_FILE] == (tmp_path / "out.safetensors").read_bytes()
    assert hub.private["me/addp"]
    check_card(files["README.md"].decode())
    read_in_process(hub, tmp_path, READ, ROOT, run_folder)


def test_the_card_has_the_scores_of_the_model_alone(hub, tmp_path, run_folder, bench, monkeypatch):
    monkeypatch.chdir(run_folder)  # where the missing path of the random arm would be that of the model
    settings = ["model=.", f"out={tmp_path}/out.safetensors", "push=me/addp", "license=mit", f"bench={bench}"]
    assert export(*settings) == 0
    card = hub.files["me/addp"]["README.md"].decode()
    assert "81.00" in card
    assert "8.00" not in card


@pytest.mark.parametrize(("mean", "std"), [((0.5,) * 3, (0.5,) * 3), ((0.1, 0.2, 0.3), (0.5,) * 3)])
def test_the_encoder_of_a_classifier_keeps_its_normalization_for_timm(hub, tmp_path, mean, std):
    encoder = Encoder(EncoderConfig(64, 2, 2), (32, 32), 8)
    save_model(Classifier(encoder, 3, mean=mean, std=std), tmp_path / "classifier.safetensors")
    settings = [f"model={tmp_path}/classifier.safetensors", "layout=encoder", "push=me/encoder", "license=mit"]
    assert export(*settings, "out=encoder.safetensors") == 0
    files = hub.files["me/encoder"]
    if mean[0] == 0.5:
        assert json.loads(files["config.json"])["pretrained_cfg"]["mean"] == list(mean)
    else:
        assert TIMM_FILE not in files  # which could not be told the right one


def check_card(card: str) -> None:
    _, head, body = card.split("---\n", 2)
    values = yaml.safe_load(head)
    assert (values["license"], values["pipeline_tag"]) == ("apache-2.0", "unconditional-image-generation")
    for text in (
        'load_addp("hf://me/addp")',
        'timm.create_model("hf-hub:me/addp", pretrained=True)',
        "| finetune | top-1 ↑ | 81.00 ± 1.41 | 2 |",
        "source: photos",
        "| data | photos |",
        "| steps | 300 |",
        "@inproceedings{tian2024addp",
        "title     = {{ADDP}: Learning",
    ):
        assert text in body, body
    assert "/home/me" not in body


TRAININGS = ("tokenizer", "predictor", "pretrain", "mae", "finetune", "linprobe", "det train", "seg train")


@pytest.mark.parametrize("verb", TRAININGS)
def test_the_card_names_the_verb_of_the_run(hub, run_folder, verb):
    """A recipe in a run folder has all keys of its verb, and an older one some of them not."""
    keys = [name for name, _ in all_keys(recipe_module(verb).Recipe) if "." not in name]
    recipe = {name: "here" for name in keys if name != "launch"} | {"data": {"source": "photos"}}
    recipe |= {"model": {"width": 8}} if verb in TRAININGS[:4] else {"model": "runs/tiny"}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert export(f"model={run_folder}", "out=out.safetensors", "push=me/addp") == 0
    card = hub.files["me/addp"]["README.md"].decode()
    assert f"`addp {verb}`, with every key of the run" in card
    assert ("| trained from | tiny |" in card) == (verb not in TRAININGS[:4])


def test_a_classifier_of_timms_layout_beside_a_card_of_the_user(hub, tmp_path, capsys):
    torch.manual_seed(0)
    model = Classifier(Encoder(EncoderConfig(64, 2, 2), (32, 32), 8), 3, class_names=("ant", "bee", "cat")).eval()
    torch.nn.init.normal_(model.head.weight)
    save_model(model, tmp_path / "classifier.safetensors")
    hub.files["me/pets"] = {"README.md": b"mine"}
    assert export("model=classifier.safetensors", "out=folder", "layout=timm", "push=me/pets") == 0
    assert "has a README.md, which is kept" in capsys.readouterr().err
    assert set(hub.files["me/pets"]) == {"README.md", "config.json", MODEL_FILE}
    assert hub.files["me/pets"]["README.md"] == b"mine"
    again = load_classifier("hf://me/pets", 32, encoder_heads=2)
    plain = timm.create_model("hf-hub:me/pets", pretrained=True, cache_dir=tmp_path / "cache").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        for loaded in (again, plain):
            torch.testing.assert_close(loaded(images), model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("token", "settings", "words"),
    [
        ("", ["push=me/addp"], "push: no token of the Hugging Face Hub; expected `hf auth login`, or HF_TOKEN"),
        (
            READ_ONLY,
            ["push=me/addp"],
            "push=me/addp: cannot be pushed (the token does not allow it)",
        ),
        (TOKEN, ["push=addp"], "push: found 'addp', expected owner/name"),
        (TOKEN, ["push=a b/c"], "push: found 'a b/c', expected owner/name"),
        (TOKEN, ["private=true"], "private: is for the model card and repository of push=owner/name"),
        (TOKEN, ["push=me/addp", "bench=nowhere"], "bench: nowhere/bench.json: No such file or directory"),
    ],
)
def test_what_cannot_be_pushed_is_one_line_before_the_export(
    hub, tmp_path, run_folder, token, settings, words, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", token)
    assert export(f"model={run_folder}", "out=out.safetensors", *settings) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("addp: ")]
    assert words in line
    assert not (tmp_path / "out.safetensors").exists()
    assert not token or token not in line


def test_no_network_is_one_line(hub, tmp_path, run_folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert export(f"model={run_folder}", "out=out.safetensors", "push=me/addp") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("addp: ")]
    assert "push=me/addp: cannot be pushed (" in line
    assert not (tmp_path / "out.safetensors").exists()
