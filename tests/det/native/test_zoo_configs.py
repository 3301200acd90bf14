"""Configs of detectron2's model zoo with our backbones: MODEL.BACKBONE.NAME and the node MODEL.ENCODER change alone."""

# ruff: noqa: E402 (modules that need detectron2 are imported after the check that it is installed)

import logging

import pytest
import torch

from addp_core.base.errors import UserError
from addp_core.networks.encoder import Encoder, EncoderConfig
from addp_core.weights.saving import save_model

pytest.importorskip("detectron2", reason="detectron2 is not installed; `addp doctor` shows the command to install it")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("toy_sets")]  # deprecated names of torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, build_backbone, build_model
from detectron2.utils.logger import setup_logger
from zoo import CASCADE, FASTER, MASK, RETINANET, ZOO, Trainer, zoo_config

import det
from addp_core.weights.encoders import load_encoder
from det.native.backbone import EncoderBackbone


@pytest.mark.parametrize("name", [FASTER, MASK, CASCADE, RETINANET])
def test_a_config_of_the_zoo_trains_evaluates_predicts_and_traces(name, encoder_file, tmp_path):
    cfg = zoo_config(name, encoder_file, tmp_path, checkpointing=True)
    trainer = Trainer(cfg)
    trainer.train()
    assert "bbox" in trainer.test(cfg, trainer.model)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    predictor = DefaultPredictor(cfg)
    image = torch.randint(0, 256, (50, 70, 3), dtype=torch.uint8).numpy()
    assert predictor(image)["instances"].image_size == (50, 70)
    model, inputs = predictor.model, [{"image": torch.rand(3, 60, 84) * 255}]
    inference = None if isinstance(model, GeneralizedRCNN) else lambda model, inputs: model(inputs)[0]["instances"]
    adapter = TracingAdapter(model, inputs, inference)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no two scores are equal up to rounding
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        expected = adapter(*adapter.flattened_inputs)  # boxes and scores among them
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        found = traced(*adapter.flattened_inputs)
    assert len(expected[0]) > 0
    for each, its_own in zip(found, expected, strict=True):
        # The sides of small boxes are differences of coordinates up to 84, of which a float32 holds 8e-6.
        torch.testing.assert_close(each, its_own, rtol=1.3e-6, atol=1e-4)


def test_a_square_that_is_smaller_than_the_images_is_refused(encoder_file, tmp_path, caplog):
    cfg = zoo_config(FASTER, encoder_file, tmp_path, square_pad=64)
    with pytest.raises(UserError, match=r"square_pad: found 64, but INPUT\.MAX_SIZE_TEST=90: larger images"):
        build_backbone(cfg)
    cfg.INPUT.MAX_SIZE_TEST = 64
    with caplog.at_level("WARNING", "detectron2.addp"):
        build_backbone(cfg)
    assert "INPUT.MAX_SIZE_TRAIN=1333: larger images would be cut off" in caplog.text


def test_only_the_name_and_the_source_need_to_be_given(encoder_file):
    cfg = get_cfg()
    det.add_encoder_config(cfg)
    cfg.merge_from_file(str(ZOO / MASK))
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "EncoderPyramid", "MODEL.ENCODER.source", str(encoder_file)])
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    encoder = model.backbone.net.encoder
    assert (encoder.dynamic, encoder.image_size, encoder.attention.window) == (True, (1024, 1024), 14)
    assert [model.pixel_mean.flatten()[0].item(), model.pixel_std.flatten()[0].item()] == pytest.approx(
        [255 * 0.485, 255 * 0.229]
    )
    assert model.input_format == "RGB"


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_pyramid_of_any_patch_size_has_the_levels_of_fpn(patch):
    arch = {"width": 32, "depth": 2, "heads": 2}
    cfg = zoo_config(MASK, "", arch=arch, patch_size=patch, img_size=4 * patch, attention={"window": 2})
    cfg.MODEL.ENCODER.attention.relative = "decomposed"
    pyramid = build_backbone(cfg).eval()
    assert pyramid.size_divisibility == 32
    maps = pyramid(torch.randn(1, 3, 96, 160))
    assert {name: tuple(map_.shape[1:]) for name, map_ in maps.items()} == {
        f"p{n}": (16, -(-96 // 2**n), -(-160 // 2**n)) for n in range(2, 7)
    }
    assert {name: (shape.stride, shape.channels) for name, shape in pyramid.output_shape().items()} == {
        f"p{n}": (2**n, 16) for n in range(2, 7)
    }


def test_resampled_map_keeps_positions():
    encoder = Encoder(EncoderConfig(32, 1, 2), (56, 56), 14)
    backbone = EncoderBackbone(encoder=encoder, stride=16).eval()
    assert backbone.size_divisibility == 16
    columns = torch.arange(64.0)  # a map that says where its cells lie
    row = lambda images: columns[: images.shape[-1] // 14] * 14 + 7  # noqa: E731
    encoder.forward_maps = lambda images, blocks: [row(images).expand(1, 1, images.shape[-2] // 14, -1)]
    found = backbone(torch.zeros(1, 3, 32, 160))["last_feat"]
    assert found.shape[-1] == 10
    torch.testing.assert_close(found[0, 0, 0], torch.arange(10.0) * 16 + 8)


def test_retinanet_gets_p3_to_p7_and_windows_need_no_class_token(encoder_file):
    cfg = zoo_config(RETINANET, encoder_file, attention={"window": 4})
    pyramid = build_backbone(cfg)
    assert [*pyramid.output_shape()] == ["p3", "p4", "p5", "p6", "p7"]
    assert all("simfp_2" not in name for name, _ in pyramid.named_parameters())
    cfg.MODEL.ENCODER = CfgNode({"source": str(encoder_file), "img_size": 64, "attention": {"window": 4}})
    assert build_backbone(cfg).net.encoder.attention.class_token is False


def change(cfg: CfgNode, key: str, value) -> None:
    """Set MODEL.<key>, also if it does not exist yet."""
    *nodes, last = key.split(".")
    node = cfg.MODEL
    for name in nodes:
        node = node[name]
    node[last] = value


MISTAKES = {
    ("ENCODER.windw", 3): "MODEL.ENCODER.windw: no such key; the keys are source, init",
    ("ENCODER.img_sise", 3): "MODEL.ENCODER.img_sise: no such key; did you mean 'img_size'?",
    ("ENCODER.attention.windows", 3): "MODEL.ENCODER.attention.windows: no such key; did you mean 'window'?",
    ("ENCODER.attention.class_token", True): "MODEL.ENCODER.attention.class_token: found true, expected false where",
    ("ENCODER.source", ""): "MODEL.ENCODER.source: missing; expected a checkpoint",
    ("ENCODER.source", "nowhere"): "nowhere: no such file",
    ("ENCODER.img_size", 60): "MODEL.ENCODER.img_size=60: image size 60 x 60: expected multiples of the patch size 8",
    ("ENCODER.arch.width", 32): "has its own; leave one of the two out",
    ("ENCODER.levels", ("p2", "p4")): "MODEL.ENCODER.levels: found ['p2', 'p4'], expected consecutive levels",
    ("RPN.IN_FEATURES", ("res4",)): "MODEL.RPN.IN_FEATURES: reads res4, but MODEL.BACKBONE.NAME=EncoderPyramid has p2",
}


@pytest.mark.parametrize(("key", "value"), MISTAKES)
def test_mistakes_in_the_node_end_in_one_line(encoder_file, key, value):
    cfg = zoo_config(MASK, encoder_file, attention={"window": 3})
    change(cfg, key, value)
    with pytest.raises(UserError) as caught:
        build_model(cfg)
    assert MISTAKES[key, value] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_keys_of_a_file_are_refused_too(encoder_file, tmp_path):
    (tmp_path / "a.yaml").write_text("MODEL: {BACKBONE: {NAME: EncoderPyramid}, ENCODER: {sorce: x}}")
    cfg = zoo_config(MASK, encoder_file)
    cfg.merge_from_file(str(tmp_path / "a.yaml"))
    with pytest.raises(UserError, match=r"MODEL.ENCODER.sorce: no such key; did you mean 'source'"):
        build_model(cfg)
    plain = get_cfg()
    plain.MODEL.BACKBONE.NAME = "EncoderPyramid"
    with pytest.raises(UserError, match=r"MODEL.ENCODER: missing; call det.add_encoder_config"):
        build_backbone(plain)


def test_other_images_and_maps_than_the_encoders_are_pointed_out(encoder_file, caplog):
    setup_logger(name="detectron2.other")
    logging.getLogger("detectron2").propagate = True
    cfg = zoo_config(MASK, encoder_file)
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD, cfg.MODEL.BACKBONE.NAME = "BGR", [1.0, 1.0, 1.0], "EncoderBackbone"
    build_backbone(cfg)
    assert "MODEL.RPN.IN_FEATURES: reads p2, p3, p4, p5, p6, but MODEL.BACKBONE.NAME=EncoderBackbone has" in caplog.text
    assert "MODEL.PIXEL_STD=[1.0, 1.0, 1.0]: encoders were pretrained on another" in caplog.text
    assert "INPUT.FORMAT=BGR: encoders were pretrained on RGB images" in caplog.text


def test_a_pretrained_encoder_as_weights_of_the_detector_is_refused_in_one_line(encoder_file, tmp_path):
    cfg = zoo_config(MASK, encoder_file)
    model = build_model(cfg)
    with pytest.raises(UserError, match=r"expected it as MODEL.ENCODER.source") as caught:
        DetectionCheckpointer(model).load(str(encoder_file))
    assert "\n" not in str(caught.value)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    larger = build_model(zoo_config(MASK, encoder_file, img_size=96))
    with pytest.raises(UserError, match=r"pos_embed: the checkpoint has none for images of 96 x 96 pixels"):
        DetectionCheckpointer(larger).load(str(tmp_path / "model.pth"))


def test_checkpoints_of_other_parts_alone_can_be_loaded(encoder_file):
    model = build_model(zoo_config(MASK, encoder_file))
    heads = {name: value for name, value in model.state_dict().items() if name.startswith("roi_heads.")}
    model.load_state_dict(heads, strict=False)
    model.load_state_dict({"stem.conv1.weight": torch.zeros(1)}, strict=False)  # R-50.pkl
    vitdet = {f"backbone.net.{name}": value for name, value in load_encoder(encoder_file).state_dict().items()}
    model.load_state_dict({**heads, **vitdet}, strict=False)  # the heads of detectron2's own ViTDet


def test_whole_pretraining_runs_are_refused_as_weights_too(encoder_file, tmp_path):
    encoder = Encoder(EncoderConfig(32, 1, 2), (32, 32), 8)
    save_model(encoder, tmp_path / "e.safetensors")
    model = build_model(zoo_config(RETINANET, encoder_file))
    state = {f"denoiser.encoder.{name}": value for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError, match="nothing under those of this detector"):
        model.load_state_dict(state, strict=False)
