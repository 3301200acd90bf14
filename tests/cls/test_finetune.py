"""`addp finetune`, mostly through its verb: training, validation, resuming, and wrong input."""

import csv
import errno
import json
import os
import shutil
import signal
import tarfile
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checks import shards_on_cpus
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny_addp
from transfers import COLORS, NO_AUGMENTATION, write_color_images, write_tiny_checkpoint

import cls.data
import cls.finetune
import cls.results
from addp_core import load_classifier, load_encoder, save_model
from addp_core.data.config import DataConfig
from addp_core.data.images import eval_transform
from addp_core.data.sources import ImageSource, open_source
from addp_core.data.stream import Stream
from addp_core.networks.classifier import Classifier
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.recipes.cli import main
from addp_core.recipes.config import find_recipe, load
from addp_core.training.stage import TrainConfig
from cls.evaluation import Scores, evaluate_classifier
from cls.finetune import AugmentConfig, FinetuneStage, Recipe, layer_table


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("colors")
    write_color_images(root)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


def settings(images, model, out, *more):
    return [
        *("finetune", f"data={images}", "data.size=8", "data.workers=0", "data.scale=[0.5,1]", f"model={model}"),
        *(f"out={out}", "train.batch=8", "train.lr=0.01", "train.warmup_steps=2", "train.log_every=5"),
        *(f"{key}={value!r}" for key, value in NO_AUGMENTATION.items()),
        *more,
    ]


def test_learns_validates_and_keeps_the_best(images, pretrained, tmp_path, caplog):
    out = tmp_path / "run"
    assert main(settings(images, pretrained, out, "train.steps=40", "train.evaluate_every=10", "confusion=true")) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["images"], results["classes"], results["last"]["step"]) == (18, 3, 40)
    assert results["best"]["top1"] >= results["last"]["top1"]
    assert results["best"]["top1"] > 80
    assert results["last"]["top5"] == 100  # of three classes
    for name, key in (("model.safetensors", "last"), ("model-best.safetensors", "best")):
        model = load_classifier(out / name)
        assert model.class_names == ("blue", "green", "red")
        val = open_source(str(images), "val")
        scores = evaluate_classifier(model, val, eval_transform(8, 0.875), 3, mean=model.mean, std=model.std, workers=0)
        assert scores.metrics["top1"] == pytest.approx(results[key]["top1"])
    rows = [line.split(",") for line in (out / "confusion.csv").read_text().splitlines()]
    assert rows[0] == ["true\\answer", "blue", "green", "red"]
    assert [sum(map(int, row[1:])) for row in rows[1:]] == [6, 6, 6]
    assert (out / "images" / "confusion.png").stat().st_size > 1000
    # the encoder in it feeds other tasks
    assert load_encoder(out, 8).config.width == 16


def test_an_interrupted_run_resumes_bit_for_bit(images, pretrained, tmp_path, monkeypatch):
    options = ["train.steps=8", "train.evaluate_every=4", "augment.mixup=0.8", "drop_path=0.2"]
    assert main(settings(images, pretrained, tmp_path / "uninterrupted", *options)) == 0

    evaluate = FinetuneStage.evaluate

    def interrupted(self, model, step):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, model, step)

    monkeypatch.setattr(FinetuneStage, "evaluate", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        main(settings(images, pretrained, tmp_path / "interrupted", *options))
    assert exit_info.value.code == 0
    assert not (tmp_path / "interrupted" / "model.safetensors").exists()
    monkeypatch.setattr(FinetuneStage, "evaluate", evaluate)
    assert main(settings(images, pretrained, tmp_path / "interrupted", *options)) == 0
    one, other = (load_classifier(tmp_path / name).state_dict() for name in ("uninterrupted", "interrupted"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("uninterrupted", "interrupted")]
    assert results[0] == results[1]


@shards_on_cpus
def test_sharded_blocks_train_as_on_one_process(images, pretrained, tmp_path):
    """With layer decay, recomputed activations and averaged weights in validation."""
    keys = ["train.steps=4", "train.log_every=1", "train.ema=0.9", "checkpointing=true", "drop_path=0"]
    assert main(settings(images, pretrained, tmp_path / "one", *keys)) == 0
    sharded = settings(images, pretrained, tmp_path / "two", *keys, "train.parallel=fsdp")
    ended = run_ranks(sharded, tmp_path / "log", n=2)
    assert ended.codes == [0, 0], ended.text
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()[:4]]
        for name in ("two", "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one")]
    assert results[0]["last"] == results[1]["last"]
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")]
    for name, value in models[1].items():
        if not name.endswith("qkv.bias"):  # the keys' bias has no gradient but rounding, which Adam scales up
            assert torch.allclose(models[0][name], value, atol=1e-5), name


def test_layer_table_follows_the_published_rule():
    """Layer 0: patch embedding, class token, positions; block i: layer i + 1; norm and head: the last layer.

    The factor on the learning rate is decay ** (last - id).
    """
    model = Classifier(Encoder(EncoderConfig(16, 3, 2, tokenizer_norm=True), (8, 8), 4), 5)
    rows = [line.split(maxsplit=4) for line in layer_table(model, TrainConfig(layer_decay=0.5, lr=1.0)).splitlines()]
    assert [(row[0], float(row[1])) for row in rows[1:]] == [
        *(("0", 0.0625), ("1", 0.125), ("2", 0.25), ("3", 0.5), ("4", 1.0))
    ]
    assert [row[4] for row in rows[1:]] == [
        "cls_token, pos_embed, patch_embed, tokenizer_norm",
        *("blocks.0", "blocks.1", "blocks.2"),
        "fc_norm, head",
    ]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(int(row[3].replace(",", "")) for row in rows[1:]) == trained


@pytest.mark.parametrize(
    "more",
    [
        ["augment.mixup=0.8", "augment.cutmix=1"],
        ["augment.mixup=0.8", "loss=bce", "augment.repeats=2", "train.ema=0.9"],
        ["loss=bce", "bce_threshold=0.2", "augment.auto=rand-m9-mstd0.5-inc1", "augment.erase=1"],
        ["pooling=token", "tokenizer_norm=true", "normalisation=half", "checkpointing=true", "data.size=[8,12]"],
        ["init=random", "train.accumulate=2", "eval_crop=0.5", "data.cache=ram", "augment.color_jitter=0.4"],
    ],
)
def test_every_option_trains(images, pretrained, tmp_path, more):
    assert main(settings(images, pretrained, tmp_path, "train.steps=2", "train.warmup_steps=0", *more)) == 0
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 18
    losses = [json.loads(line).get("loss") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([loss for loss in losses if loss is not None]).all()


def test_training_keeps_the_shape_of_what_it_shows(images, pretrained, tmp_path):
    """The crop's aspect ratio is relative to that of the images which the model gets."""
    keys = ["data.size=[64,32]", "data.scale=[0.5,0.5]", "data.ratio=[1,1]", "data.flip=false"]
    transform = cls.finetune.train_transform(load(Recipe, None, settings(images, pretrained, tmp_path, *keys)[1:]))
    rows, columns = np.mgrid[-1:1:128j, -1:1:64j]
    disc = Image.fromarray(255 * (np.hypot(2 * rows, columns) < 0.4).astype(np.uint8)).convert("RGB")
    shown = transform(disc)[0] > 0
    height, width = (int(shown.any(axis).sum()) for axis in (1, 0))
    assert abs(height - width) <= 2


def test_options_of_the_initial_classifier(images, pretrained, tmp_path):
    def build(*more):
        arguments = settings(images, pretrained, tmp_path, *more)[1:]
        return cls.finetune.build_classifier(load(Recipe, None, arguments), tuple(COLORS))

    model, normed, random = build(), build("tokenizer_norm=true"), build("init=random")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(x), model(x))
    assert torch.equal(model.encoder.eval().forward_features(x), load_encoder(pretrained, 8).forward_features(x))
    assert not torch.allclose(model.encoder.forward_features(x), normed.encoder.eval().forward_features(x))
    assert not torch.allclose(model.encoder.pos_embed, random.encoder.pos_embed)
    assert torch.equal(random.encoder.pos_embed, build("init=random").encoder.pos_embed)
    assert not torch.equal(random.encoder.pos_embed, build("init=random", "train.seed=1").encoder.pos_embed)
    assert build("model=tiny", "init=random", "patch_size=4").encoder.config.width == 192
    assert 1e-6 < model.head.weight.std() < 1e-4


def test_repeated_augmentation_repeats_each_image(images):
    source = open_source(str(images), "train")
    config = DataConfig(str(images), size=8, workers=0)
    batches = Stream(source, eval_transform(8), config, seed=0, batch=6, repeats=3).batches()
    repeated = torch.cat([next(batches).indices for _ in range(16)])
    batches = Stream(source, eval_transform(8), config, seed=0, batch=6).batches()
    order = torch.cat([next(batches).indices for _ in range(8)])
    assert torch.equal(repeated, order[:32].repeat_interleave(3))


def test_a_head_for_other_classes_is_dropped_with_one_warning(images, pretrained, tmp_path, caplog):
    first = tmp_path / "first"
    assert main(settings(images, pretrained, first, "train.steps=1")) == 0
    head = load_classifier(first).head.weight.clone()
    recipe = load(Recipe, None, settings(images, first, tmp_path / "x")[1:])
    assert torch.equal(cls.finetune.build_classifier(recipe, tuple(COLORS)).head.weight, head)
    caplog.clear()
    with caplog.at_level("INFO", "addp"):
        assert cls.finetune.build_classifier(recipe, ("a", "b")).head.weight.shape == (2, 16)
    messages = [record.message for record in caplog.records if "head" in record.message]
    assert messages == [f"{first}: dropping its head for 3 classes; training a new one for 2"]


@pytest.mark.parametrize("main_process", [True, False])
def test_the_head_of_a_foreign_file_is_dropped_with_a_warning(images, tmp_path, caplog, monkeypatch, main_process):
    state = SimpleNamespace(is_main_process=main_process)
    monkeypatch.setattr(cls.finetune, "process_state", lambda: state)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    for name, classes in (("with-head", 5), ("without-head", 0)):
        save_file(VisionTransformer(**shape, num_classes=classes).state_dict(), tmp_path / f"{name}.safetensors")
        arguments = settings(images, tmp_path / f"{name}.safetensors", tmp_path / "x", "encoder_heads=2")
        cls.finetune.build_classifier(load(Recipe, None, arguments[1:]), tuple(COLORS))
    messages = [record.message for record in caplog.records if "head" in record.message]
    expected = [f"{tmp_path / 'with-head.safetensors'}: dropping its head for 5 classes; training a new one for 3"]
    assert messages == (expected if main_process else [])


def test_averaged_weights_are_validated_and_kept(images, pretrained, tmp_path):
    options = ["train.steps=6", "train.evaluate_every=2", "train.ema=0.9", "eval_crop=0.6"]
    assert main(settings(images, pretrained, tmp_path, *options)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    val = open_source(str(images), "val")
    for name, key in (("model", "last"), ("model-best", "best")):
        model = load_classifier(tmp_path / f"{name}.safetensors")
        assert model.crop == 0.6  # stored with the model
        scores = evaluate_classifier(model, val, eval_transform(8, 0.6), 3, mean=model.mean, std=model.std, workers=0)
        assert scores.metrics["top1"] == pytest.approx(results[key]["top1"])
    checkpoint = torch.load(tmp_path / "checkpoints" / "step-6" / "training.pt")
    last = load_classifier(tmp_path).state_dict()
    assert torch.equal(last["head.weight"], checkpoint["ema"]["head.weight"])
    assert not torch.equal(last["head.weight"], checkpoint["model"]["head.weight"])


def test_a_full_disk_does_not_stop_the_run(images, pretrained, tmp_path, monkeypatch, caplog):
    """The disk is full at the first validation; the next one writes what is missing."""
    save_model, write, calls = cls.finetune.save_model, cls.results.write_atomically, []

    def full_once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_model(*arguments)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_confusion(path, content):
        (full if path.name == "confusion.csv" else write)(path, content)

    monkeypatch.setattr(cls.finetune, "save_model", full_once)
    monkeypatch.setattr(cls.results, "write_atomically", full_for_confusion)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    options = ["train.steps=4", "train.evaluate_every=2", "confusion=true"]
    assert main(settings(images, pretrained, tmp_path, *options)) == 0
    for name in ("model-best.safetensors", "confusion.csv", "images/confusion.png"):
        assert f"{tmp_path / name}: not written (No space left on device); the run continues" in caplog.text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["last"]["step"] == results["best"]["step"] == 4
    assert load_classifier(tmp_path / "model-best.safetensors").num_classes == 3


def test_confusion_matrix_of_class_names_with_commas(tmp_path):
    (tmp_path / "images").mkdir()
    names = ("crane, bird", 'crane "machine"', "tench")
    cls.results.write_confusion(Scores(torch.arange(9).view(3, 3)), names, tmp_path)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["true\\answer", *names], [names[0], *"012"], [names[1], *"345"], [names[2], *"678"]]


def test_confusion_matrix_of_class_names_that_are_no_plain_text(images, pretrained, tmp_path):
    """A name that is not UTF-8 (a zip file of another system), and one that matplotlib would take for a formula."""
    shutil.copytree(images, tmp_path / "data")
    for split in ("train", "val"):
        root = os.fsencode(tmp_path / "data" / split)
        os.rename(root + b"/blue", root + b"/bl\xfc")
        os.rename(root + b"/green", root + b"/$\\x$")
    options = ["train.steps=1", "train.evaluate_every=1", "confusion=true"]
    assert main(settings(tmp_path / "data", pretrained, tmp_path / "out", *options)) == 0
    header = (tmp_path / "out" / "confusion.csv").read_text().splitlines()[0]
    assert header == "true\\answer,$\\x$,bl\\udcfc,red"
    assert (tmp_path / "out" / "images" / "confusion.png").exists()
    assert load_classifier(tmp_path / "out").class_names == ("$\\x$", "bl\udcfc", "red")


def test_confusion_matrix_of_class_names_in_any_script(tmp_path, caplog):
    """Each letter is drawn, where an installed font has it; matplotlib's own would draw a box, and warn."""
    (tmp_path / "images").mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph .* missing")
        cls.results.write_confusion(Scores(torch.arange(4).view(2, 2)), ("\U000f0001", "\u017caba"), tmp_path)
    assert "no installed font has all characters of these names; drawn as boxes: \U000f0001" in caplog.text
    assert (tmp_path / "images" / "confusion.png").exists()


def test_validation_settings_may_change_when_a_run_continues(images, pretrained, tmp_path, caplog):
    """The validation batch and the confusion matrix do not change results; a finished run writes no matrix."""
    assert main(settings(images, pretrained, tmp_path, "train.steps=2")) == 0
    longer = ["train.steps=3", "eval_batch=2"]
    assert main(settings(images, pretrained, tmp_path, *longer)) == 0
    assert json.loads((tmp_path / "results.json").read_text())["last"]["step"] == 3
    with caplog.at_level("INFO", "addp"):
        assert main(settings(images, pretrained, tmp_path, *longer, "confusion=true")) == 0
    assert "this run has finished" in caplog.text


def test_a_run_that_continues_from_another_file_says_so(images, pretrained, tmp_path, caplog):
    model = tmp_path / "model.safetensors"
    shutil.copy(pretrained, model)
    assert main(settings(images, model, tmp_path / "out", "train.steps=2")) == 0
    save_model(tiny_addp(image_size=(8, 8), seed=1), model)
    assert main(settings(images, model, tmp_path / "out", "train.steps=3")) == 0
    assert caplog.text.count(f"model: {model} has changed since this run began") == 1


@pytest.mark.parametrize("policy", ["foo", "rand-m9-zz1", "v0-foo1"])
def test_an_unknown_policy_is_refused_before_anything_is_read(tmp_path, capsys, policy):
    line = ["finetune", "model=nowhere.pth", f"data={tmp_path / 'nowhere'}", f"out={tmp_path / 'out'}"]
    assert main([*line, f"augment.auto={policy}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(f"addp: augment.auto: found '{policy}', expected a policy in timm's notation")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("known_at_once", [False, True])
@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_out_of_range(images, pretrained, tmp_path, capsys, monkeypatch, split, known_at_once, label):
    """Of a dataset whose labels are known at once, and of one whose labels come with its images."""
    train, open_source = cls.data.open_source(str(images), "train"), cls.data.open_source

    class OneLabel(ImageSource):
        classes = train.classes
        labels = np.array([label] * len(train)) if known_at_once else None

        def __len__(self):
            return len(train)

        def name(self, index):
            return f"set[{index}]"

        def open_image(self, index):
            return train.open_image(index)[0], label

    def open_or_replace(config, opened_split=None, classes=None):
        opened_split = opened_split or "train"
        return OneLabel() if opened_split == split else open_source(config, opened_split, classes)

    monkeypatch.setattr(cls.data, "open_source", open_or_replace)
    val = ["val=set"] if split == "val" else []
    message = error_of(capsys, *settings(images, pretrained, tmp_path / "run", "train.steps=1", *val))
    if split == "val":
        location = "set" if known_at_once else "set[0]"
    else:
        location = str(images) if known_at_once else "data.source"
    assert message == f"addp: {location}: found label {label}, expected 0 to 2"


def error_of(capsys, *arguments) -> str:
    """Run a command that fails with a UserError, and return the last line of its output."""
    assert main(list(arguments)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_classifier_keeps_the_norm_it_was_trained_with(images, pretrained, tmp_path):
    first = tmp_path / "first"
    assert main(settings(images, pretrained, first, "train.steps=1", "tokenizer_norm=true")) == 0
    assert load_encoder(first, 8).config.tokenizer_norm
    assert not load_encoder(pretrained, 8).config.tokenizer_norm


def test_token_input(images, tmp_path):
    """MAGE: the encoder reads token ids, and the tokenizer is in a file of its own."""
    model = tiny_addp(image_size=(8, 8))
    model.predictor.trained_on = ""
    save_model(model.predictor, tmp_path / "mage.safetensors", (4, 4))
    save_model(model.tokenizer, tmp_path / "vqgan.safetensors")
    options = [f"tokenizer={tmp_path / 'vqgan.safetensors'}", "train.steps=2"]
    assert main(settings(images, tmp_path / "mage.safetensors", tmp_path / "run", *options)) == 0
    assert load_classifier(tmp_path / "run").encoder.grid == (4, 4)


def test_one_class_is_refused(pretrained, tmp_path, capsys):
    """Every prediction would be right."""
    write_color_images(tmp_path / "one", {"red": COLORS["red"]}, train=2, val=2)
    message = error_of(capsys, *settings(tmp_path / "one", pretrained, tmp_path / "out"))
    assert all(part in message for part in ("data.source", "one class, 'red'", "at least two"))


def test_wrong_input(images, pretrained, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "set"
    shutil.copytree(images, copy)
    shutil.rmtree(copy / "val" / "green")
    message = error_of(capsys, *settings(copy, pretrained, tmp_path / "a"))
    assert "1 of the 3 classes have no images: green" in message
    (copy / "val" / "violet").mkdir()
    shutil.copy(copy / "val" / "red" / "0.png", copy / "val" / "violet" / "0.png")
    assert "violet is none of the 3 classes" in error_of(capsys, *settings(copy, pretrained, tmp_path / "b"))

    flat = tmp_path / "flat"
    for split in ("train", "val"):
        shutil.copytree(images / split / "red", flat / split)
    assert "has no class folders" in error_of(capsys, *settings(flat, pretrained, tmp_path / "c"))

    listed = tmp_path / "listed"
    shutil.copytree(images, listed)
    (listed / "meta").mkdir()
    for split, labels in (("train", (0, 1)), ("val", (0, 7))):
        lines = [f"red/{i}.png {label}" for i, label in enumerate(labels)]
        (listed / "meta" / f"{split}.txt").write_text("\n".join(lines))
    assert "label 7, but there are 2 classes" in error_of(capsys, *settings(listed, pretrained, tmp_path / "d"))

    tars = tmp_path / "tars"
    for split, names in (("train", ("blue", "red")), ("val", ("green", "red"))):
        (tars / split).mkdir(parents=True)
        with tarfile.open(tars / split / "0.tar", "w") as tar:
            for name in names:
                tar.add(images / "train" / name / "0.png", f"{name}/0.png")
    message = error_of(capsys, *settings(tars, pretrained, tmp_path / "t"))
    assert f"data.classes: {tars}/val/green is none of the 2 classes" in message

    odd = error_of(capsys, *settings(images, pretrained, tmp_path / "e", "train.batch=7", "augment.mixup=0.8"))
    assert odd.startswith("addp: train.batch: 7 images of a micro-step cannot be mixed in pairs")
    with monkeypatch.context() as patch:
        patch.setattr(cls.finetune, "process_state", lambda: SimpleNamespace(num_processes=8))
        odd = error_of(capsys, *settings(images, pretrained, tmp_path / "e", "augment.mixup=0.8"))
    assert odd.startswith("addp: train.batch: 1 images of a micro-step on each of 8 processes cannot be mixed in pairs")
    assert "expected a multiple of 16" in odd
    assert "expected init=random" in error_of(capsys, *settings(images, "tiny", tmp_path / "f"))
    size = error_of(capsys, *settings(images, pretrained, tmp_path / "g", "data.size=9"))
    assert "9 x 9: expected multiples of the patch size 2" in size
    assert not (tmp_path / "a" / "checkpoints").exists() or not any((tmp_path / "a" / "checkpoints").iterdir())


def test_published_recipes():
    """App. D.2: a recipe that drifts from the published numbers is a bug."""
    for name, epochs, lr, warmup, decay, drop in (
        ("vit_b_100ep", 100, 1e-3, 20, 0.65, 0.1),
        ("vit_l_50ep", 50, 2.5e-4, 5, 0.8, 0.2),
    ):
        recipe = load(Recipe, find_recipe(cls.finetune, name), ["out=x", "model=x"])
        train, augment = recipe.train, recipe.augment
        assert (train.epochs, train.base_lr, train.warmup_epochs, train.layer_decay) == (epochs, lr, warmup, decay)
        assert (recipe.drop_path, recipe.data.size, train.batch, train.min_lr) == (drop, 256, 1024, 1e-6)
        assert (train.betas, train.weight_decay, train.clip_grad) == ((0.9, 0.999), 0.05, None)
        expected = AugmentConfig("rand-m9-mstd0.5-inc1", 0.0, 0.25, 0.8, 1.0, smoothing=0.1)
        assert augment == expected
