"""Detection on a plain install as a user runs it: train, stopped and continued, eval, predict, and the mistakes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from tiny import TOKENIZER

from addp_core.base.errors import UserError
from addp_core.networks.attention import AttentionConfig
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.networks.predictor import PredictorConfig
from addp_core.networks.token_encoder import TokenEncoder
from addp_core.networks.tokenizer import Vocabulary
from addp_core.recipes.cli import main
from addp_core.recipes.config import find_recipe, load
from addp_core.training.engine import make_optimizer
from addp_core.training.stage import TrainConfig
from addp_core.weights.checkpoint import load_encoder, save_model
from det import train as det_train
from det.augment import Scene
from det.config import Category, DetectorConfig, DetectorFile
from det.drawing import draw
from det.model import Detections, build, load_detector
from det.pyramid import FeaturePyramid
from det.stage import DetStage

RECIPE = """
engine: torchvision
data: {size: 48, scale: [0.5, 1.5], workers: 0}
drop_path: 0.1
attention: {window: 5, global_blocks: 1, relative: decomposed, class_token: false}
detector: {channels: 16, scales: [1, 0.5], convs: 8, fc: 16, proposals: 20, samples: 8, score: 0.001, detections: 5}
train: {steps: 4, batch: 2, lr: 1.0e-3, layer_decay: 0.8, log_every: 1, checkpoint_every: 2, keep: 9}
"""
VITDET = AttentionConfig(window=3, global_blocks=1, relative="decomposed", class_token=False)
PLAIN = AttentionConfig()
CATEGORIES = (Category(2, "two"), Category(7, "seven"))


def tiny_encoder(attention=PLAIN, size=32, seed=0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(EncoderConfig(32, 2, 2), (size, size), 4, attention, dynamic=True).eval()


def tiny_detector(attention=VITDET, score=0.0, samples=8, normalisation="imagenet"):
    encoder = tiny_encoder(attention)
    config = DetectorConfig(channels=16, scales=(2.0, 1.0), convs=8, fc=16, proposals=20, samples=samples, score=score)
    file = DetectorFile("torchvision", encoder.config, attention, 4, 32, config, CATEGORIES, normalisation)
    return build(file, encoder)


def scene(*boxes: tuple[int, int, int, int], seed=0) -> Scene:
    """A 32-pixel image and the filled boxes on it."""
    masks = torch.zeros(len(boxes), 32, 32, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(len(boxes)) % 2
    return Scene(image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels, masks)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A toy COCO, a recipe, an encoder's file and a finished run."""
    root = tmp_path_factory.mktemp("det")
    toy = ["toy", f"out={root / 'toy'}", "only=[coco]", "scene=48", "coco_train=10", "coco_val=5"]
    assert main(toy) == 0
    save_model(tiny_encoder(), root / "encoder.safetensors")
    (root / "recipe.yaml").write_text(RECIPE)
    assert main(training(root, root / "run")) == 0
    return root


def training(root: Path, out: Path, *settings: str) -> list[str]:
    data, model = f"data={root / 'toy' / 'coco'}", f"model={root / 'encoder.safetensors'}"
    return ["det", "train", str(root / "recipe.yaml"), data, model, f"out={out}", *settings]


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# -------------------- the parts


def test_the_pyramid_has_vitdets_levels_and_detectron2s_names():
    encoder = Encoder(EncoderConfig(32, 2, 2), (64, 64), 16, VITDET, dynamic=True)
    pyramid = FeaturePyramid(encoder, channels=8)
    maps = pyramid(torch.randn(2, 3, 64, 32))
    assert pyramid.strides == [4, 8, 16, 32, 64]
    assert [tuple(m.shape) for m in maps.values()] == [(2, 8, 64 // s, 32 // s or 1) for s in (4, 8, 16, 32, 64)]
    assert torch.equal(maps["4"], maps["3"][:, :, ::2, ::2])
    names = {name for name in pyramid.state_dict() if not name.startswith("net.")}
    norm = ("weight", "bias")
    expected = {f"simfp_{n}.{i}.{p}" for n, i in ((2, 0), (2, 1), (2, 3), (3, 0)) for p in norm}
    for n, first in ((2, 4), (3, 1), (4, 0), (5, 1)):
        expected |= {f"simfp_{n}.{i}.{p}" for i in (first, first + 1) for p in ("weight", "norm.weight", "norm.bias")}
    assert names == expected
    normed = maps["0"] - maps["0"].mean(1, keepdim=True)
    assert torch.allclose(normed.pow(2).mean(1), torch.ones(2, 16, 8), atol=1e-2)  # over channels, at each place


def test_scales_finer_than_pixels_are_refused():
    with pytest.raises(UserError, match=r"detector.scales: found \[4.0, 2.0\] of the map of 2-pixel patches"):
        FeaturePyramid(Encoder(EncoderConfig(32, 1, 2), (8, 8), 2), 8, (4.0, 2.0))
    for scales in ((1.0, 2.0), (4.0, 1.0), (3.0,), ()):
        with pytest.raises(ValueError, match="scales: found"):
            DetectorConfig(scales=scales)


def test_without_windows_and_relative_positions_the_map_is_the_recognition_encoders():
    encoder = tiny_encoder()
    images = torch.randn(2, 3, 32, 32)
    tokens = load_encoder(encoder.state_dict(), 32, encoder_heads=2).forward_features(images)
    (map_,) = encoder.forward_maps(images, [-1])
    assert torch.allclose(map_.flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-6)


def test_all_that_is_trained_gets_a_gradient_whatever_is_on_the_images():
    model = tiny_detector().train()
    for scenes in ([scene((3, 4, 20, 25)), scene()], [scene(), scene()]):
        model.zero_grad()
        losses = model(scenes)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_layer_decay_falls_from_the_heads_to_the_stem():
    model = tiny_detector()
    groups = make_optimizer(model, TrainConfig(layer_decay=0.5, weight_decay=0.1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    net = "backbone.net."
    assert scales[net + "pos_embed"] == (0.125, 0)
    assert scales[net + "patch_embed.proj.weight"] == (0.125, 0.1)
    assert scales[net + "blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert scales[net + "blocks.1.attn.qkv.bias"] == (0.5, 0)
    assert scales["backbone.simfp_2.0.weight"] == (1, 0.1)
    assert scales["roi_heads.box_head.0.1.weight"] == (1, 0)
    assert net + "norm.weight" not in scales


def test_activation_checkpointing_changes_nothing_but_memory():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_detector().train()
        model.backbone.net.checkpointing = checkpointing
        torch.manual_seed(1)
        sum(model([scene((3, 4, 20, 25))]).values()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_boxes_keep_their_precision_under_bfloat16():
    model, (seen, anchors, proposals) = tiny_detector(samples=128).train(), (scene((3, 4, 20, 25)), [], [])
    seen.boxes += 0.1234567  # bfloat16 has no such places
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: anchors.extend(output))
    model.roi_heads.box_roi_pool.register_forward_hook(lambda module, inputs, output: proposals.extend(inputs[1]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([seen])
        (found,) = model.eval().detect([seen.image])
    assert all(loss.isfinite() for loss in losses.values())
    assert {part.dtype for part in (*anchors, *proposals)} == {torch.float32}
    assert (proposals[0] == seen.boxes[0]).all(1).any()  # the ground truth is among them as it is
    for boxes in (*proposals, found.boxes):
        assert not torch.equal(boxes, boxes.bfloat16().float())


@pytest.mark.parametrize(("name", "white"), [("imagenet", (1 - 0.485) / 0.229), ("half", 1.0)])
def test_images_are_normalised_as_the_file_says(name, white):
    model, seen = tiny_detector(normalisation=name).eval(), []
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0]))
    model.detect([torch.full((3, 32, 32), 255, dtype=torch.uint8)])
    torch.testing.assert_close(seen[0][0], torch.full((32, 32), white))


def test_images_of_any_size_are_seen_whole():
    model = tiny_detector().eval()
    images = [torch.randint(256, (3, *hw), dtype=torch.uint8) for hw in ((20, 61), (90, 7), (32, 32))]
    for image, found in zip(images, model.detect(images), strict=True):
        height, width = image.shape[-2:]
        assert len(found.boxes) == len(found.scores) == len(found.labels) == len(found.masks) > 0
        assert found.boxes[:, 0::2].min() >= 0
        assert found.boxes[:, 0::2].max() <= width
        assert found.boxes[:, 1::2].max() <= height
        assert found.pixels(0).shape == (height, width)
        assert set(found.labels.tolist()) <= {0, 1}
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        (result, *_) = found.results(5, CATEGORIES)
        assert result["image_id"] == 5
        assert result["category_id"] in (2, 7)
        assert coco_mask.decode(result["segmentation"]).shape == (height, width)
        json.dumps(result)


def test_finding_nothing_is_an_answer():
    image = torch.zeros(3, 40, 30, dtype=torch.uint8)
    (found,) = tiny_detector(score=0.999).eval().detect([image])
    assert len(found.boxes) == len(found.masks) == 0
    assert found.results(1, CATEGORIES) == []
    assert torch.equal(draw(image, found, CATEGORIES), image)


def test_a_detector_learns_where_things_are():
    """One scene by heart: a white box on black."""
    model = tiny_detector()
    seen = scene((8, 6, 24, 22))
    seen.image[:] = seen.masks[0] * 255
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for step in range(60):
        torch.manual_seed(step)
        sum(model.train()([seen]).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    (found,) = model.eval().detect([seen.image])
    assert found.labels[0] == 0
    assert found.scores[0] > 0.7
    assert (found.boxes[0] - seen.boxes[0]).abs().max() < 3
    overlap = (found.pixels(0) & seen.masks[0].bool()).sum() / (found.pixels(0) | seen.masks[0].bool()).sum()
    assert overlap > 0.5


# -------------------- starts


@pytest.mark.parametrize("relative", ["none", "decomposed", "table"])
def test_positions_are_resampled_to_the_detectors_size(tmp_path, relative):
    """32-pixel start, 48-pixel detector; relative tables that the file has are resized, those it lacks start at 0."""
    attention = AttentionConfig(relative=relative, class_token=False)
    start = tiny_encoder(attention)
    for name, value in start.named_parameters():
        if ".relative." in name:
            torch.nn.init.normal_(value)
    save_model(start, tmp_path / "start.safetensors")
    settings = [f"model={tmp_path / 'start.safetensors'}", f"out={tmp_path}", "data.size=48"]
    settings += [f"attention={{window: 0, relative: {relative}, class_token: false}}"]
    encoder = det_train.build_encoder(load(det_train.Recipe, None, settings))
    assert encoder.pos_embed.shape == (1, 1 + 12 * 12, 32)
    small, large = (e.pos_embed.detach()[0, 1:].unflatten(0, (n, n)) for e, n in ((start, 8), (encoder, 12)))
    assert torch.allclose(large.mean((0, 1)), small.mean((0, 1)), atol=1e-2)
    tables = {name: value for name, value in encoder.named_parameters() if ".relative." in name}
    assert len(tables) == {"none": 0, "decomposed": 4, "table": 2}[relative]
    assert all(value.abs().max() > 0.5 for value in tables.values())
    plain = load(det_train.Recipe, None, [*settings, "attention.relative=decomposed", "attention.window=5"])
    if relative == "none":
        fresh = det_train.build_encoder(plain)
        assert all((p == 0).all() for n, p in fresh.named_parameters() if ".relative." in n)
    assert encoder.forward_maps(torch.randn(1, 3, 48, 48), [-1])[0].shape == (1, 32, 12, 12)


def test_a_random_start_has_the_architecture_alone(workshop):
    path = workshop / "encoder.safetensors"
    settings = [f"model={path}", "out=x", "init=random", "data.size=48", "checkpointing=true", "drop_path=0.2"]
    first, again = (det_train.build_encoder(load(det_train.Recipe, None, settings)) for _ in range(2))
    weight = "blocks.1.mlp.fc1.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], load_file(path)[weight])
    assert first.config.width == 32
    assert first.config.drop_path == 0.2
    assert first.checkpointing


def test_a_beit_start_is_read_with_its_tables_alone(tmp_path):
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    beit = Beit(**shape, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
    for block in beit.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.save({"model": beit.state_dict()}, tmp_path / "beit.pth")
    settings = [f"model={tmp_path / 'beit.pth'}", "out=x", "data.size=48"]
    with pytest.raises(
        UserError, match=r"attention.relative=decomposed: .*beit.pth .* expected attention.relative=table"
    ):
        det_train.build_encoder(load(det_train.Recipe, None, settings))
    kept = det_train.build_encoder(load(det_train.Recipe, None, [*settings, "attention.relative=table"]))
    assert kept.blocks[0].relative.relative_position_bias_table.abs().max() > 0.5
    det_train.build_encoder(load(det_train.Recipe, None, [*settings, "init=random"]))  # has positions of its own


@pytest.mark.parametrize("name", ["tiny", "vitdet_b_100ep", "vitdet_l_100ep"])
def test_every_named_recipe_is_read(name):
    load(det_train.Recipe, find_recipe(det_train, name), ["model=x", "out=y"])


@pytest.mark.parametrize(("name", "drop_path", "decay"), [("vitdet_b_100ep", 0.1, 0.8), ("vitdet_l_100ep", 0.4, 0.9)])
def test_recipes_hold_the_papers_numbers(name, drop_path, decay):
    recipe = load(det_train.Recipe, find_recipe(det_train, name), ["model=x", "out=y"])
    data, attention, train = recipe.data, recipe.attention, recipe.train
    assert (data.size, data.scale, data.flip) == (1024, (0.1, 2.0), True)
    assert (attention.window, attention.global_blocks, attention.relative) == (14, 4, "decomposed")
    assert (recipe.drop_path, train.layer_decay) == (drop_path, decay)
    assert (train.epochs, train.batch, train.warmup_steps) == (100, 128, 250)
    assert (train.peak_lr, train.schedule, train.min_lr) == (1.6e-4, "cosine", 0)
    assert (train.betas, train.weight_decay, train.clip_grad) == ((0.9, 0.999), 0.1, None)


# -------------------- the verbs


def test_training_leaves_a_run_folder_with_figures_and_pictures(workshop):
    run = workshop / "run"
    lines = metrics(run)
    losses = {"loss", "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert losses <= lines[0].keys()
    assert lines[-1]["box_AP"] < 0.05  # four steps from noise
    assert lines[-1]["mask_AP"] < 0.05
    assert (run / "images" / "detections-4.png").exists()
    model = load_detector(run)
    assert model.file.categories[0] == Category(1, "0")
    assert model.file.size == 48


def test_a_stopped_run_continues_bit_for_bit(workshop, tmp_path, monkeypatch):
    whole = DetStage.loss

    def stopped(self, model, batch, draw):
        if draw.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, model, batch, draw)

    monkeypatch.setattr(DetStage, "loss", stopped)
    with pytest.raises(SystemExit) as left:
        main(training(workshop, tmp_path / "run"))
    assert left.value.code == 0
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.setattr(DetStage, "loss", whole)
    assert main(training(workshop, tmp_path / "run", "data.workers=1")) == 0
    ours, theirs = (load_file(run / "model.safetensors") for run in (tmp_path / "run", workshop / "run"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics(tmp_path / "run")[-1] == metrics(workshop / "run")[-1]


def test_eval_gives_the_trainings_last_figures(workshop, tmp_path, capsys):
    arguments = ["det", "eval", f"model={workshop / 'run'}", f"data={workshop / 'toy' / 'coco'}"]
    assert main([*arguments, f"out={tmp_path}", "json=true", "per_class=true"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    last = metrics(workshop / "run")[-1]
    assert {name: figures[name] for name in last if name != "step"} == pytest.approx(
        {name: value for name, value in last.items() if name != "step"}
    )
    assert "box_AP/7" in figures
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == results[0].keys()
    assert {result["category_id"] for result in results} <= {1, 2, 3, 4, 5, 7, 8, 9, 10, 11}
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["box", "mask"]
    assert table[1].split()[0] == "AP"


def test_predict_draws_on_every_image_it_can_read(workshop, tmp_path, capsys):
    (tmp_path / "in" / "nested").mkdir(parents=True)
    Image.new("RGB", (70, 40), (200, 30, 30)).save(tmp_path / "in" / "a.jpg")
    Image.new("L", (33, 80)).save(tmp_path / "in" / "nested" / "b.png")
    (tmp_path / "in" / "c.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert (
        main(["det", "predict", f"model={workshop / 'run'}", f"images={tmp_path / 'in'}", f"out={out}", "score=0"]) == 0
    )
    assert "c.png: not an image of a known format; passed over" in capsys.readouterr().err
    assert Image.open(out / "a.jpg.png").size == (70, 40)
    assert Image.open(out / "nested" / "b.png.png").size == (33, 80)
    listed = json.loads((out / "images.json").read_text())
    assert {image["file_name"] for image in listed["images"]} == {"a.jpg", "nested/b.png"}
    found = json.loads((out / "detections.json").read_text())
    assert {result["file_name"] for result in found} <= {"a.jpg", "nested/b.png"}
    drawn = {result["file_name"] for result in found}
    assert drawn  # of 48-pixel noise, a score of 0 leaves something
    for name in drawn:
        before = Image.open(tmp_path / "in" / name).convert("RGB")
        assert Image.open(out / f"{name}.png").tobytes() != before.tobytes()


def test_the_surest_are_drawn():
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 20, 38, 38], [2, 2, 10, 10]])
    empty = coco_mask.encode(np.zeros((40, 40), dtype=np.uint8, order="F"))
    found = Detections(boxes, torch.tensor([0.6, 0.3]), torch.tensor([0, 1]), [empty, empty])
    one = draw(image, found, CATEGORIES, score=0.1, most=1)
    assert not one[:, 2:11, 2:11].any()
    assert one[:, 20:39, 20:39].any()
    assert torch.equal(one, draw(image, found, CATEGORIES))  # of at least 0.5
    assert draw(image, found, CATEGORIES, score=0.1)[:, 2:11, 2:11].any()


MISTAKES = {
    ("train", "data.size=50"): "data.size=50: image size 50 x 50: expected multiples of the patch size 4",
    ("train", "detector.scales=[8]"): "detector.scales: found [8.0], expected some of [4, 2, 1, 0.5]",
    ("train", "attention.class_token=true"): "attention.class_token: found true, expected false where window > 0",
    ("train", "model=nowhere"): "nowhere: no such file",
    ("train", "model={run}"): "this is the checkpoint of a detector; expected a checkpoint with an encoder",
    ("train", "model=base"): "expected init=random beside it",
    ("train", "data=nowhere"): "data.root: nowhere is not a folder",
    ("train", "data.scale=[2,1]"): "data.scale: [2.0, 1.0], expected 0 < low <= high",
    ("train", "data.sizes=3"): "unknown key 'data.sizes'; did you mean 'data.size'?",
    ("train", "tokenizer_norm=true"): "tokenizer_norm: ",
    ("eval", "model={root}/encoder.safetensors"): "is no detector; expected a run of `addp det train`",
    ("eval", "model={root}/other.safetensors"): "1 tensors do not fit its own description: extra",
    ("eval", "data.val_annotations={root}/renamed.json"): "(only here: 1 zero; only there: 1 0)",
    ("eval", "data.val_annotations={root}/recipe.yaml"): "recipe.yaml: not JSON",
    ("train", "model={root}/tokens.safetensors"): "tokens.safetensors: an encoder over tokens has neither windows",
    ("predict", "images={root}/nowhere"): "addp: images: {root}/nowhere does not exist",
    ("predict", "images={root}/pictures"): "addp: images: {root}/pictures has no folder 'train'; it has val",
    ("predict", "out={root}/recipe.yaml"): "recipe.yaml cannot be written",
}


@pytest.mark.parametrize(("action", "setting"), MISTAKES)
def test_mistakes_end_in_one_line(workshop, tmp_path, capsys, action, setting):
    (workshop / "pictures" / "val").mkdir(parents=True, exist_ok=True)
    if "renamed" in setting:
        annotations = json.loads((workshop / "toy" / "coco" / "annotations" / "instances_val.json").read_text())
        annotations["categories"][0]["name"] = "zero"
        (workshop / "renamed.json").write_text(json.dumps(annotations))
    if "tokens" in setting:
        encoder = TokenEncoder(PredictorConfig(16, 1, 2, 1, 2), Vocabulary(TOKENIZER.codebook), TOKENIZER, (48, 48))
        save_model(encoder, workshop / "tokens.safetensors")
    if "other" in setting:
        from safetensors import safe_open

        with safe_open(workshop / "run" / "model.safetensors", "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            save_file(state | {"extra": torch.zeros(1)}, workshop / "other.safetensors", file.metadata())
    model, data = f"model={workshop / 'run'}", f"data={workshop / 'toy' / 'coco'}"
    arguments = {
        "train": training(workshop, tmp_path / "run"),
        "eval": ["det", "eval", model, data],
        "predict": ["det", "predict", model, f"images={workshop / 'toy' / 'coco' / 'images'}", f"out={tmp_path}"],
    }[action]
    message, setting = (
        text.format(root=workshop, run=workshop / "run") for text in (MISTAKES[action, setting], setting)
    )
    arguments = [a for a in arguments if a.partition("=")[0] != setting.partition("=")[0]]
    assert main([*arguments, setting]) == 2
    assert message in last_line(capsys)


def test_cost_measures_both_ways(capsys):
    settings = ["size=64", "steps=1", "objects=2", "attention.window=3", "json=true"]
    settings += ["model=tiny", "detector={channels: 16, convs: 8, fc: 16, proposals: 20, samples: 8}"]
    assert main(["det", "cost", *settings]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures) == ["on", "off"]
    assert all(of["seconds_per_image"] > 0 and of["peak_memory_bytes"] > 0 for of in figures.values())


def _killed(recipe, checkpointing):
    """In place of a measurement: the way without checkpointing needs more memory than there is."""
    if not checkpointing:
        os.kill(os.getpid(), signal.SIGKILL)
    figures = dict.fromkeys(("seconds_per_image", "low", "high", "processor_seconds_per_image"), 1.0)
    return figures | {"peak_memory_bytes": 2**30, "device": "CPU"}


def test_cost_keeps_what_it_measured_before_memory_ran_out(monkeypatch, capsys):
    monkeypatch.setattr("det.cost.measure", _killed)
    assert main(["det", "cost"]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("checkpointing on   1 s an image")
    assert "checkpointing=off: the measuring process was killed" in said.err
    assert said.err.count("\n") == 1


def test_categories_of_both_parts_must_agree(workshop, tmp_path, capsys):
    source = workshop / "toy" / "coco" / "annotations" / "instances_val.json"
    content = json.loads(source.read_text())
    content["categories"].append({"id": 90, "name": "more"})
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert main(training(workshop, tmp_path / "run", f"data.val_annotations={tmp_path / 'val.json'}")) == 2
    assert "its categories are not those of" in last_line(capsys)


def test_a_run_continues_on_its_engine_whatever_was_installed_since(workshop, tmp_path, monkeypatch):
    arguments = training(workshop, tmp_path, "engine=auto", "normalisation=half", "train.steps=2")
    monkeypatch.setattr(det_train, "find_spec", lambda name: None)
    assert main(arguments) == 0
    recipe = tmp_path / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["engine"] == "torchvision"
    before = (tmp_path / "model.safetensors").read_bytes()

    monkeypatch.setattr(det_train, "find_spec", lambda name: object())
    for name in ("finished.json", "model.safetensors"):  # as if killed before the end
        (tmp_path / name).unlink()
    assert main(arguments) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == before
    file = load_detector(tmp_path).file
    assert (file.engine, file.normalisation) == ("torchvision", "half")

    monkeypatch.setattr(det_train, "find_spec", lambda name: None)
    recipe.write_text(recipe.read_text().replace("engine: torchvision", "engine: auto"))  # as it once was written
    (tmp_path / "finished.json").unlink()
    assert main(arguments) == 0


def test_detectron2_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(det_train, "find_spec", lambda name: None)
    assert det_train.choose_engine("auto") == "torchvision"
    with pytest.raises(UserError, match="engine=detectron2: it is not installed; `addp doctor` names the command"):
        det_train.choose_engine("detectron2")
    monkeypatch.setattr(det_train, "find_spec", lambda name: object())
    assert det_train.choose_engine("auto") == "detectron2"
    assert det_train.choose_engine("torchvision") == "torchvision"
