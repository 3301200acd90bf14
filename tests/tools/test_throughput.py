"""`addp throughput`: its counts are right and its report is complete. Nothing here asserts a speed."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from tiny import tiny_addp
from torch import nn

from addp_core.base.errors import UserError
from addp_core.method.diffusion import cosine_ratio
from addp_core.networks.kernels import Conv3x3
from addp_core.networks.layers import Block
from addp_core.recipes.cli import run as cli
from addp_core.recipes.config import load
from addp_core.training import timing
from addp_core.training.timing import PartTimer
from addp_core.weights.saving import save_model
from tools.speed import published, throughput
from tools.speed.flops import count, sampling_flop, training_flop
from tools.speed.throughput import Recipe

CPU, PublishedCode = torch.device("cpu"), published.PublishedCode
# A miniature of the authors' repository: what `tools/speed/published.py` uses of it, and the packages it imports.
CLONE = {
    "engine_pretrain.py": """
import torch
def train_one_epoch(model, data_loader, optimizer, device, epoch, loss_scaler, log_writer=None, args=None):
    model.train()
    for (images,) in data_loader:
        loss = model(images.cuda())
        loss_scaler(loss, optimizer, parameters=model.parameters(), clip_grad=args.clip_grad)
        torch.cuda.synchronize()
        print("printed", args.output_dir)
""",
    "engine_generate.py": """
def save_imgs(*args, **kwargs):
    raise RuntimeError("nothing is to be saved")
def masked_generate_multi_step_addp(model, data_loader_val, device, args):
    model.eval()
    for images, labels, paths in data_loader_val:
        for step in range(args.num_iteration):
            model.module.vqgan.decode(images)
        save_imgs(images)
""",
    "util/misc.py": """
class NativeScalerWithGradNormCount:
    def __init__(self, enabled, growth_interval):
        assert not enabled
    def __call__(self, loss, optimizer, clip_grad=None, parameters=None):
        loss.backward()
        optimizer.step()
    def state_dict(self):
        return {}
""",
    "configs/vqgan.yaml": "model: {params: {scale: 2}}\n",
    "modeling/__init__.py": """
import cv2
import pytorch_lightning
import torch
from einops import rearrange
from omegaconf import OmegaConf

class VQ(pytorch_lightning.LightningModule):
    def encode(self, x): return rearrange(x, "b c h w -> b h w c")
    def decode(self, x): return x

class Predictor(torch.nn.Module):
    def sample_tokens(self, x): return x

class Model(torch.nn.Module):
    def __init__(self, norm_pix_loss, args):
        super().__init__()
        self.mask_ratios = torch.tensor([0.5, 0.7])
        self.scale = OmegaConf.load("./configs/vqgan.yaml").model.params.scale
        self.load_state_dict(torch.load(args.token_predictor_ckpt)["model"], strict=False)
        self.vqgan, self.token_predictor, self.weight = VQ(), Predictor(), torch.nn.Parameter(torch.ones(3, 3))
    def generate_mask_mlp_tokens(self, x): return x
    def forward_online_encoder(self, x): return x @ self.weight
    def forward_decoder(self, x): return x
    def forward(self, images):
        assert self.mask_ratio_generator.sample(torch.Size([1])).tolist() == [1]
        x = self.token_predictor.sample_tokens(self.vqgan.encode(images))
        x = self.forward_decoder(self.forward_online_encoder(self.generate_mask_mlp_tokens(x)))
        return self.vqgan.decode(x).mean() * self.scale

def addp_vit_base_patch16(**kwargs): return Model(**kwargs)
""",
}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(tiny_addp(dropout=0.1), path)
    return path


def write_clone(folder, **changes):
    for name, text in {**CLONE, **changes}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def measure(capsys, tmp_path, *settings):
    report = tmp_path / "report.json"
    assert cli(["throughput", "repeats=1", "warmup=0", f"json={report}", *settings]) == 0
    return json.loads(report.read_text()), capsys.readouterr().out


# -------------------- counting


def test_flop_of_known_modules():
    assert count(nn.Linear(3, 5), "forward", torch.zeros(7, 3))[""] == 2 * 7 * 3 * 5
    assert count(nn.Conv2d(3, 4, 3, padding=1), "forward", torch.zeros(2, 3, 5, 6))[""] == 2 * 2 * 5 * 6 * 4 * 3 * 9
    conv = Conv3x3(32, 32)
    conv.winograd = True  # counted as the direct sum all the same
    assert count(conv, "forward", torch.zeros(1, 32, 32, 32))[""] == 2 * 32**2 * 32 * 32 * 9


def test_flop_of_a_block_and_of_some_of_its_positions():
    width, length = 16, 7
    block = Block(width, 2, 0.0, 0.0).eval()
    attention = 2 * 2 * length * length * width  # q k^T and its product with v, over all heads
    linear = 2 * length * 12 * width**2  # qkv 3, proj 1, MLP 4 + 4
    x = torch.zeros(1, length, width)
    assert count(block, "forward", x)[""] == attention + linear
    at = torch.tensor([[1, 4]])
    some = 2 * 2 * 2 * length * width + 2 * (length * 2 + 2 * 10) * width**2  # keys and values of all, the rest of two
    assert count(block, "forward", x, None, at)[""] == some


def test_flop_of_sampling_is_the_sum_over_its_steps():
    model, steps = tiny_addp(), 5
    n = model.config.tokens
    image, ids = torch.zeros(1, 3, *model.config.image_size), torch.zeros(1, n, dtype=torch.long)
    direct = count(model.denoiser.decoder, "forward", None, ids, torch.ones(1, n, dtype=torch.bool))[""]
    for step in range(1, steps):
        mask = (torch.arange(n) < math.ceil(n * cosine_ratio(step / steps))).unsqueeze(0)
        direct += count(model.denoiser, "forward", image, ids, mask, masked_only=True)[""]
    found = sampling_flop(model, steps)
    assert found["encoder"] + found["decoder"] == pytest.approx(direct)
    assert found["vq_decode"] == steps * count(model.tokenizer, "decode", torch.zeros(1, 8, 4, 6))[""]


def test_flop_of_training_counts_the_backward_pass_twice():
    found = training_flop(tiny_addp(), 0.75)
    assert found["backward"] == 2 * (found["encoder"] + found["decoder"])
    once = training_flop(tiny_addp(condition="z_t"), 0.75)
    assert once["predictor"] == found["predictor"] / 2


# -------------------- timing


def test_inner_parts_are_subtracted_from_the_enclosing_one():
    parts = PartTimer(CPU)
    with parts("whole"), parts("outer"), parts("inner"):
        pass
    spans = {part: end - start for part, _, start, end in parts.spans}
    seconds = parts.take()
    assert seconds["outer"] == pytest.approx(spans["outer"] - spans["inner"])
    assert (seconds["whole"], seconds["inner"]) == (spans["whole"], spans["inner"])
    assert parts.take() == {}


def test_a_wrapped_module_is_called_and_looks_like_itself():
    owner, parts = nn.Module(), PartTimer(CPU)
    owner.layer = nn.Linear(2, 3)
    parts.wrap(owner, "layer", "layer")
    assert owner.layer(torch.zeros(1, 2)).shape == (1, 3)
    assert owner.layer.out_features == 3
    assert len(list(owner.parameters())) == 2
    assert list(parts.take()) == ["layer"]


def test_peak_memory():
    # In a process of its own: some systems cannot lower the mark, and this one may have been larger before.
    script = (
        "import torch; from addp_core.training.timing import peak_memory, reset_peak_memory; "
        "cpu = torch.device('cpu'); "
        "reset_peak_memory(cpu); before = peak_memory(cpu); held = torch.ones(2**27); print(peak_memory(cpu) - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert 2**28 < grown < 2**30  # 2**29 bytes, give or take what importing left behind


def test_matmul_peak_does_not_wait_for_slow_types(monkeypatch):
    monkeypatch.setitem(timing.MATMUL_SIDES, "cpu", (8, 16))
    assert set(timing.matmul_peak(CPU, torch.float32)) == {8, 16}
    monkeypatch.setattr(timing, "MATMUL_SECONDS", 1e-9)
    assert set(timing.matmul_peak(CPU, torch.bfloat16)) == {8}


# -------------------- the verb


def test_report_has_every_metric(capsys, tmp_path, model_file):
    report, text = measure(capsys, tmp_path, f"model={model_file}", "batch=2", "steps=3", "device=cpu")
    assert report["settings"]["size"] == [8, 12]
    assert max(report["matmul_gflop_per_s"].values()) > 0
    for task, parts in (
        ("train", {"vq_encode", "predictor", "vq_decode", "encoder", "decoder", "backward", "optimizer", "other"}),
        ("sample", {"encoder", "decoder", "vq_decode", "other"}),
    ):
        of = report[task]
        assert set(of["seconds_of_parts"]) == parts
        assert sum(of["seconds_of_parts"].values()) == pytest.approx(of["seconds"]["median"])
        assert min(of["seconds_of_parts"].values()) >= 0
        assert of["images_per_s"]["median"] == pytest.approx(2 / of["seconds"]["median"])
        assert of["gflop_per_image"] == pytest.approx(sum(of["gflop_of_parts"].values()))
        assert of["peak_memory_bytes"] > 2**20
        rate = of["gflop_per_image"] * of["images_per_s"]["median"]
        assert of["mfu"] == pytest.approx(rate / max(report["matmul_gflop_per_s"].values()))
        for word in (*parts, "images/s", "GFLOP/img", "MFU", "peak memory"):
            assert word in text


def test_sampling_only_without_accelerations(capsys, tmp_path, model_file, monkeypatch):
    monkeypatch.setitem(timing.MATMUL_SIDES, "cpu", (16,))  # bf16 is slow on many a CPU
    report, text = measure(
        capsys, tmp_path, f"model={model_file}", "train=false", "steps=2", "accelerate=false", "precision=bf16"
    )
    assert "train" not in report
    assert "training step" not in text
    assert report["sample"]["images_per_s"]["median"] > 0


def test_named_sizes_are_those_of_the_encoder():
    model = throughput.build(load(Recipe, settings=["model=tiny", "size=64"]))
    assert model.config.denoiser.encoder.width == model.config.predictor.width == 192
    assert model.config.image_size == (64, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train=false", "sample=false"], "train: found false"),
        (["tokens=true", "train=false"], "tokens: found true with train=false; expected train=true"),
        (["published=x", "model=tiny"], "published: found model=tiny; expected base or large"),
        (["published=x", "size=128"], "published: found size=128; expected 256"),
        (["device=tpu"], "device: found 'tpu'"),
        (["device=cuda:77"], "torch sees"),
        (["device=cpu", "precision=fp16"], "precision: found fp16"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(UserError, match=message):
        throughput.pick_device(load(Recipe, settings=settings))


def test_a_model_without_predictor_samples_only(capsys, tmp_path):
    model = tiny_addp()
    model.predictor, model.config = None, replace(model.config, predictor=None)
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    with pytest.raises(UserError, match=r"no token predictor.*train=false"):
        throughput.build(load(Recipe, settings=[f"model={path}"]))
    report, _ = measure(capsys, tmp_path, f"model={path}", "train=false", "steps=2")
    assert report["sample"]["images_per_s"]["median"] > 0


def test_json_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"json: .* cannot be written"):
        throughput.write_json(tmp_path / "missing" / "report.json", {})


# -------------------- the authors' code


def test_published_is_timed_in_turns(capsys, tmp_path, model_file, monkeypatch):
    clone = write_clone(tmp_path / "clone")
    monkeypatch.setitem(published.MODELS, str(model_file), published.MODELS["base"])
    monkeypatch.setattr(published, "PublishedCode", lambda path, size, *rest: PublishedCode(path, "base", *rest))
    report, text = measure(
        capsys, tmp_path, f"model={model_file}", f"published={clone}", "steps=2", "batch=1", "device=cpu", "tokens=true"
    )
    train, drawn = report["train"]["published"], report["sample"]["published"]
    assert set(train["seconds_of_parts"]) == {
        "vq_encode", "predictor", "vq_decode", "encoder", "decoder", "backward", "optimizer", "other"
    }  # fmt: skip
    assert sum(train["seconds_of_parts"].values()) == pytest.approx(train["seconds"]["median"])
    assert set(drawn["seconds_of_parts"]) == {"vq_decode", "other"}
    assert report["train"]["times_published"]["median"] > 0
    cached = report["train"]["cached_ids"]
    assert "vq_encode" not in cached["seconds_of_parts"]
    assert cached["times_published"]["median"] > 0
    assert "on cached ids:" in text
    assert "times the published speed" in text


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not look like the authors' repository"):
        published.PublishedCode(str(tmp_path), "base", 1, CPU, "fp32")


def test_a_clone_that_fails_reports_the_error(tmp_path):
    clone = write_clone(tmp_path, **{"modeling/__init__.py": "raise ImportError('no module named flux')"})
    with pytest.raises(UserError, match="does not run here: ImportError: no module named flux"):
        published.PublishedCode(str(clone), "base", 1, CPU, "fp32")


def test_replaced_modules_are_found_by_find_spec(monkeypatch):
    """accelerate and others ask for optional packages in this way; without a spec, that raises ValueError."""
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    for name in ("pytorch_lightning", "omegaconf", "einops", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    published.replace_missing_modules()
    assert sys.modules["omegaconf"].__spec__ is not None


def test_installed_modules_are_not_replaced(monkeypatch):
    real = ModuleType("einops")
    real.__spec__ = object()
    monkeypatch.setitem(sys.modules, "einops", real)
    for name in ("pytorch_lightning", "omegaconf", "cv2"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))
        monkeypatch.delitem(sys.modules, name)
    published.replace_missing_modules()
    assert sys.modules["einops"] is real


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(capsys, tmp_path, model_file):
    report, _ = measure(capsys, tmp_path, f"model={model_file}", "device=cuda", "precision=bf16", "steps=2")
    assert report["train"]["peak_memory_bytes"] > 0
    assert report["sample"]["mfu"] > 0
