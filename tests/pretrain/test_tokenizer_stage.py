"""Stage 1: every loss term has its effect, and the codebook follows the features and stays in use."""

import math
from dataclasses import replace

import pytest
import torch
from small_tokenizer import MODEL, SIZE, smooth_images
from torch.nn import functional as F

from addp_core.base.errors import UserError
from addp_core.data.stream import Batch
from addp_core.networks.tokenizer import Tokenizer, TokenizerConfig
from addp_core.training.stage import MicroStep
from pretrain.losses import VGG16, PatchDiscriminator, PerceptualDistance, hinge_loss
from pretrain.tokenizer import LossConfig, TokenizerStage, TokenizerTraining


class OneProcess:
    """The part of an accelerator that `after_step` needs."""

    def reduce(self, tensor, how):
        return tensor


def micro_step_at(step: int, batch: int, rows: slice | None = None, world: int = 1) -> MicroStep:
    rank = 0 if rows is None else rows.start * world // batch
    return MicroStep(seed=0, step=step, index=step, rank=rank, world=world, batch=batch, rows=rows or slice(0, batch))


def batch_of(pixels: torch.Tensor) -> Batch:
    n = len(pixels)
    return Batch(pixels, torch.full((n,), -1), torch.arange(n), [])


def stage_of(model: TokenizerConfig = MODEL, **loss) -> TokenizerStage:
    torch.manual_seed(0)
    tokenizer = Tokenizer(model, model.grid((SIZE, SIZE)))
    return TokenizerStage(tokenizer, LossConfig(**loss), smooth_images(2))


def step(stage: TokenizerStage, number: int, pixels: torch.Tensor) -> tuple[dict, dict]:
    """Return the loss terms, after their backward pass, and the metrics of the codebook's update."""
    micro_step = micro_step_at(number, len(pixels))
    stage.model.zero_grad()
    terms = stage.loss(stage.model, batch_of(pixels), micro_step)
    terms["loss"].backward()
    return terms, stage.after_step(stage.model, micro_step, OneProcess())


# -------------------- gradients


def test_gradient_passes_straight_through_the_codes():
    stage = stage_of(commitment=0.0)
    step(stage, 0, smooth_images())
    stage.model.zero_grad()
    stage.loss(stage.model, batch_of(smooth_images()), micro_step_at(1, 4))["loss"].backward()
    parameters = dict(stage.model.named_parameters())
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in parameters.values())
    assert not any("quantize" in name for name in parameters)  # codes are averages

    # The encoder's output gets the gradient of the decoder's input.
    h = stage.model.tokenizer.encoder(smooth_images()).detach().requires_grad_()
    codes = stage.model.tokenizer.lookup(stage.model.tokenizer.quantize.nearest_ids(h))
    F.l1_loss(stage.model.tokenizer.decode(codes + (h - h.detach())), smooth_images()).backward()
    assert parameters["tokenizer.encoder.conv_out.bias"].grad == pytest.approx(h.grad.sum((0, 2, 3)), rel=1e-4)


def test_commitment_pulls_features_to_their_codes():
    stage = stage_of(commitment=0.0)
    step(stage, 0, smooth_images())
    out = stage.model(smooth_images())
    codes = stage.model.tokenizer.quantize.embedding(out["ids"].flatten())
    assert out["commitment"].item() == pytest.approx((out["features"] - codes).square().mean().item(), rel=1e-5)
    without = stage.loss(stage.model, batch_of(smooth_images()), micro_step_at(1, 4))["loss"]
    stage.config = replace(stage.config, commitment=2.0)
    terms = stage.loss(stage.model, batch_of(smooth_images()), micro_step_at(1, 4))
    assert (terms["loss"] - without).item() == pytest.approx(2 * terms["commitment"].item(), rel=1e-4)


def test_pixel_terms_and_psnr():
    stage = stage_of(l1=0.5, l2=3.0, commitment=0.0)
    terms = stage.loss(stage.model, batch_of(smooth_images()), micro_step_at(0, 4))
    assert terms["loss"].item() == pytest.approx((0.5 * terms["l1"] + 3 * terms["l2"]).item(), rel=1e-5)
    decoded = stage.model(smooth_images())["images"].detach().clamp(0, 1)
    each = [-10 * math.log10(F.mse_loss(*pair).item()) for pair in zip(decoded, smooth_images(), strict=True)]
    assert terms["psnr"].item() == pytest.approx(sum(each) / 4, rel=1e-4)


# -------------------- codebook


def update(training: TokenizerTraining, features, ids, decay=0.0, revive_after=None, candidates=None):
    counts, sums = training.statistics([(features, ids)])
    candidates = torch.full_like(sums, 99.0) if candidates is None else candidates
    return training.update_codebook(counts, sums, candidates, decay, revive_after)


def test_codes_are_the_means_of_their_clusters():
    training = TokenizerTraining(Tokenizer(MODEL))
    features, ids = torch.randn(40, 4), torch.arange(40) % 16
    update(training, features, ids)
    means = torch.stack([features[ids == k].mean(0) for k in range(16)])
    assert torch.allclose(training.tokenizer.quantize.embedding.weight, means, atol=1e-6)

    # With decay: sum and count shrink by the same factor, and the first step has the weight of its decayed count.
    training = TokenizerTraining(Tokenizer(MODEL))
    for part in (slice(0, 16), slice(16, 32)):
        update(training, features[part], ids[part], decay=0.9)
    expected = (0.9 * features[:16] + features[16:32]) / 1.9
    assert torch.allclose(training.tokenizer.quantize.embedding.weight, expected, atol=1e-5)


def test_unused_codes_move_to_candidates_in_time():
    training = TokenizerTraining(Tokenizer(MODEL))
    features, candidates = torch.randn(40, 4), torch.randn(16, 4)
    update(training, features, torch.arange(40) % 16, revive_after=3)
    codes = training.tokenizer.quantize.embedding.weight
    start = codes.clone()
    few = torch.arange(40) % 12  # the last four codes are unused
    for _ in range(2):
        metrics = update(training, features, few, revive_after=3, candidates=candidates)
        assert metrics["revived"] == 0
        assert metrics["usage"] == 12 / 16
        assert torch.equal(codes[12:], start[12:])  # an unused code keeps its place, though its average shrinks
    assert update(training, features, few, revive_after=3, candidates=candidates)["revived"] == 4
    assert torch.equal(codes[12:], candidates[12:])
    assert not torch.equal(codes[:12], candidates[:12])
    for _ in range(10):
        assert update(training, features, few, revive_after=None)["revived"] == 0
    assert codes.isfinite().all()


def test_codebook_starts_from_features_and_revival_keeps_it_in_use():
    def usage(revive_after):
        stage = stage_of(revive_after=revive_after, codebook_decay=0.5)
        _, first = step(stage, 0, smooth_images())
        assert first["revived"] > 0
        features = stage.model(smooth_images())["features"]
        codes = stage.model.tokenizer.quantize.embedding.weight
        assert torch.cdist(codes, features).amin(1).max() < features.std()  # each code is close to some feature
        # All but four codes are far from every feature, as after a sudden change of the encoder.
        codes[4:] += 100
        stage.model.count[4:] = stage.model.total[4:] = 0
        return [step(stage, number, smooth_images(seed=number))[1]["usage"] for number in range(1, 8)]

    assert max(usage(None)) <= 4 / 16
    assert usage(3)[-1] > 8 / 16


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_agree_with_one(world):
    """Counts, sums and candidates of all processes add up to those of one process with all rows."""
    whole = stage_of()
    whole.loss(whole.model, batch_of(smooth_images()), micro_step_at(0, 4))

    class Recorder(OneProcess):
        def __init__(self):
            self.seen = []

        def reduce(self, tensor, how):
            assert how == "sum"
            self.seen.append(tensor.clone())
            return tensor

    def recorded(stage, micro_step):
        recorder = Recorder()
        stage.after_step(stage.model, micro_step, recorder)
        return recorder.seen

    expected = recorded(whole, micro_step_at(0, 4))
    shares = []
    for rank in range(world):
        rows = slice(4 * rank // world, 4 * (rank + 1) // world)
        stage = stage_of()
        stage.loss(stage.model, batch_of(smooth_images()[rows]), micro_step_at(0, 4, rows, world))
        shares.append(recorded(stage, micro_step_at(0, 4, rows, world)))
    for one, parts in zip(expected, zip(*shares, strict=True), strict=True):
        assert torch.allclose(one, sum(parts), atol=1e-5)


def test_micro_steps_count_together_and_skipped_steps_do_not():
    stage = stage_of()
    stage.loss(stage.model, batch_of(smooth_images(seed=7)), micro_step_at(0, 4))  # skipped: no after_step
    for part in (slice(0, 2), slice(2, 4)):
        stage.loss(stage.model, batch_of(smooth_images()[part]), micro_step_at(1, 2))
    counts, sums = stage.model.statistics(stage.quantized)
    stage.loss(stage.model, batch_of(smooth_images()), micro_step_at(2, 4))
    expected = stage.model.statistics(stage.quantized)
    assert torch.equal(counts, expected[0])
    assert torch.allclose(sums, expected[1], atol=1e-5)


# -------------------- further loss terms


def write_vgg(path, depth: int, seed: int = 0) -> dict:
    """Write the first `depth` blocks of a VGG16 with random weights under torchvision's names."""
    generator, index, width_in = torch.Generator().manual_seed(seed), 0, 3
    state: dict[str, torch.Tensor] = {}
    for widths in VGG16[:depth]:
        for width in widths:
            weight = torch.randn(width, width_in, 3, 3, generator=generator) * (2 / (9 * width_in)) ** 0.5
            state |= {f"features.{index}.weight": weight, f"features.{index}.bias": torch.zeros(width)}
            index, width_in = index + 2, width
        index += 1
    torch.save(state, path)
    return state


def test_perceptual_distance_is_vgg16s(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    state = write_vgg(tmp_path / "vgg.pth", 2)
    distance = PerceptualDistance(tmp_path / "vgg.pth", depth=2)
    a, b = smooth_images(2), smooth_images(2, seed=1)
    assert distance(a, a).item() == 0
    with torch.device("meta"):
        reference = torchvision.models.vgg16(weights=None).features[:9]
    reference = reference.to_empty(device="cpu")
    reference.load_state_dict({name.removeprefix("features."): value for name, value in state.items()})
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = 0
    with torch.no_grad():
        x, y = (a - mean) / std, (b - mean) / std
        for number, layer in enumerate(reference):
            x, y = layer(x), layer(y)
            if number in (3, 8):
                expected += (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean() / 2
    assert distance(a, b).item() == pytest.approx(expected.item(), rel=1e-4)


def test_perceptual_term_reaches_the_encoder(tmp_path):
    write_vgg(tmp_path / "vgg.pth", 1)
    stage = stage_of(
        l1=0.0, commitment=0.0, perceptual_weights=str(tmp_path / "vgg.pth"), perceptual=0.5, perceptual_depth=1
    )
    assert list(stage.frozen) == [stage.perceptual]
    step(stage, 0, smooth_images())
    terms, _ = step(stage, 1, smooth_images())
    assert terms["loss"].item() == pytest.approx(0.5 * terms["perceptual"].item(), rel=1e-5)
    assert stage.model.tokenizer.encoder.conv_in.weight.grad.abs().max() > 0
    assert not any("perceptual" in name or "blocks.0.0" in name for name in stage.model.state_dict())
    assert all(not value.requires_grad for value in stage.perceptual.parameters())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (None, "no such file; expected a state dict of torchvision's vgg16"),
        (lambda state: {"features.0.weight": state["features.0.weight"]}, "no tensor features.0.bias"),
        (
            lambda state: state | {"features.2.weight": torch.zeros(8, 64, 3, 3)},
            r"found features.2.weight \(8, 64, 3, 3\), expected \(64, 64, 3, 3\)",
        ),
    ],
)
def test_perceptual_weights_that_do_not_fit(tmp_path, spoil, message):
    path = tmp_path / "vgg.pth"
    if spoil:
        torch.save(spoil(write_vgg(path, 1)), path)
    with pytest.raises(UserError, match=message) as error:
        PerceptualDistance(path, depth=1)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


ADVERSARIAL = {"adversarial": 0.5, "discriminator_width": 32, "discriminator_layers": 1, "commitment": 0.0}


def test_adversarial_term_starts_at_its_step():
    stage = stage_of(**ADVERSARIAL, adversarial_start=1)
    terms, _ = step(stage, 0, smooth_images())
    assert "adversarial" not in terms
    assert terms["loss"].item() == pytest.approx(terms["l1"].item(), rel=1e-6)
    gradients = [value.grad for value in stage.model.discriminator.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    terms, _ = step(stage, 1, smooth_images())
    parts = terms["l1"] + terms["discriminator"] + 0.5 * terms["adversarial"]
    assert terms["loss"].item() == pytest.approx(parts.item(), rel=1e-5)
    assert all(value.grad.abs().max() > 0 for value in stage.model.discriminator.parameters())


def test_each_side_learns_from_its_own_loss_alone():
    stage = stage_of(**ADVERSARIAL)
    step(stage, 0, smooth_images())
    training = stage.model
    for name, mine, others in [
        ("adversarial", training.tokenizer, training.discriminator),
        ("discriminator", training.discriminator, training.tokenizer),
    ]:
        training.zero_grad()
        training(smooth_images(), True)[name].backward()
        assert all(value.grad is None for value in others.parameters()), name
        assert all(value.grad.abs().max() > 0 for value in mine.parameters()), name
    out = training(smooth_images(), True)
    scores = training.discriminator(smooth_images()), training.discriminator(out["images"])
    assert out["discriminator"].item() == pytest.approx(hinge_loss(*scores).item(), rel=1e-5)
    assert out["adversarial"].item() == pytest.approx(-scores[1].mean().item(), rel=1e-5)


def test_adaptive_weight_balances_the_gradients():
    stage = stage_of(**ADVERSARIAL, adversarial_balance="adaptive")
    step(stage, 0, smooth_images())
    terms, _ = step(stage, 1, smooth_images())
    last = stage.model.tokenizer.decoder.conv_out.weight
    stage.model.zero_grad()
    out = stage.model(smooth_images(), True)
    fooled = torch.autograd.grad(out["adversarial"], last, retain_graph=True)[0].norm()
    similar = torch.autograd.grad(F.l1_loss(out["images"], smooth_images()), last)[0].norm()
    # after_step has updated the codebook between the two evaluations, so the values agree only roughly
    assert terms["adversarial_weight"].item() == pytest.approx((0.5 * similar / fooled).item(), rel=0.5)
    assert not terms["adversarial_weight"].requires_grad


def test_discriminator_learns_to_distinguish():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(32, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3)
    real, fake = smooth_images(), smooth_images(seed=1) + 0.2 * torch.randn(4, 3, SIZE, SIZE)
    before = hinge_loss(discriminator(real), discriminator(fake)).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss = hinge_loss(discriminator(real), discriminator(fake))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * before
