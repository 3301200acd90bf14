"""`train.parallel=fsdp`: sharded processes give the results of one, and continue on any number of processes."""

import signal
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checks import assert_user_error, shards_on_cpus
from ranks import Fault, run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from toy_stage import ROUNDING_ONLY, Faults, ToyStage, checkpoint_names, metrics, run

from addp_core.training.checkpoints import Checkpoints
from addp_core.training.optimization import make_optimizer
from addp_core.training.parallel import full_tensor, optimizer_state_for, shard
from addp_core.training.processes import process_state
from addp_core.training.stage import SHARDED_OPTIMIZERS, TrainConfig

SHARDED = "train.parallel=fsdp"


def toy(out: Path, *settings: str, n: int, fault: Fault | tuple[()] = (), before=None) -> str:
    """Run the toy stage in `out` on `n` processes and return what they printed."""
    log = out.parent / f"{out.name}-{n}-{len(list(out.parent.iterdir()))}"
    ended = run_ranks(["toy", f"out={out}", *settings], log, n=n, fault=fault, before=before)
    assert ended.codes == [0] * n, ended.text
    return ended.text


def assert_equal_to_rounding(out: Path, expected: Path) -> None:
    for ours, theirs in zip(metrics(out), metrics(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for name in ("model.safetensors", "model-raw.safetensors"):  # averaged, and last weights
        ours, theirs = load_file(out / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.allclose(ours[key], value, rtol=1e-4, atol=1e-6), (name, key)


@shards_on_cpus
def test_two_four_and_one_process_continue_a_run_of_one(tmp_path):
    """A run that begins without shards goes on with two and four of them, and ends on one process."""
    settings = [*ROUNDING_ONLY, "train.accumulate=2", "train.clip_grad=0.2"]
    run([f"out={tmp_path / 'one'}", *settings])
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        run([f"out={out}", *settings, SHARDED], Faults(signals={3: signal.SIGTERM}))  # one process shards nothing
    assert files(out, 4) == ["state.json", "training.pt"]
    toy(out, *settings, SHARDED, n=2, fault=Fault("SIGTERM", "step", count=4))
    assert files(out, 8) == ["state.json", "training-0.pt", "training-1.pt"]
    toy(out, *settings, SHARDED, n=4, fault=Fault("SIGTERM", "step", rank=3, count=5))
    assert files(out, 13) == ["state.json", *(f"training-{rank}.pt" for rank in range(4))]
    run([f"out={out}", *settings])
    assert_equal_to_rounding(out, tmp_path / "one")


def files(out: Path, step: int) -> list[str]:
    return sorted(path.name for path in (out / f"checkpoints/step-{step}").iterdir())


def lose_a_loss() -> None:
    """Let the loss of the third step be no number on one process."""
    loss = ToyStage.loss

    def with_fault(stage, *arguments):
        stage.faults = Faults(nan_loss=(2,), only_rank=1)
        return loss(stage, *arguments)

    patch.object(ToyStage, "loss", with_fault).start()


@shards_on_cpus
def test_a_sharded_run_continues_exactly(tmp_path):
    """With dropout, batch statistics, a moving average, a skipped step and a full disk on one process."""
    settings = [SHARDED, "train.log_every=1"]
    full = Fault("disk full", "saving", rank=1)
    printed = toy(tmp_path / "whole", *settings, n=2, fault=full, before=lose_a_loss)
    assert "step-4: not written (No space left on device)" in printed
    assert checkpoint_names(tmp_path / "whole") == ["step-12", "step-8"]
    toy(tmp_path / "run", *settings, n=2, fault=Fault("SIGTERM", "step", count=6), before=lose_a_loss)
    toy(tmp_path / "run", *settings, n=2)
    ours, theirs = (Checkpoints(tmp_path / name, 2).read(12) for name in ("run", "whole"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=0)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert [line.get("skipped") for line in metrics(tmp_path / "run")] == [0, 0, *[1] * 10, None]


def test_versions_of_torch_that_shard_on_gpus_only(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    assert_user_error(lambda: shard(nn.Linear(1, 1), torch.device("cpu")), "expected torch 2.7 or newer for CPUs")


def test_a_damaged_part_is_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.folder.mkdir()
    for step in (1, 2):
        checkpoints.write_sharded(step, {"x": torch.arange(step)}, {})
    (tmp_path / "checkpoints/step-2/training-0.pt").write_bytes(b"")
    assert checkpoints.newest() == 1
    assert checkpoint_names(tmp_path) == ["damaged-step-2", "step-1"]
    assert torch.equal(checkpoints.read(1)[0]["x"], torch.arange(1))


def test_the_optimizer_of_a_run_under_accelerates_fsdp_is_read():
    """Its checkpoints have the names of parameters where those of other runs have their positions."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = make_optimizer(model, TrainConfig())
    model(torch.ones(2, 3)).square().mean().backward()
    optimizer.step()
    by_name = get_optimizer_state_dict(model, optimizer)
    assert set(by_name["state"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert optimizer_state_for(optimizer, by_name) == optimizer.state_dict()


def compare_optimizers() -> None:
    """Train a few steps on half of the batch with sharded weights, and on the batch with whole ones; then exit."""
    rank = process_state().process_index
    images = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    rows = slice(2 * rank, 2 * rank + 2)
    for optimizer in SHARDED_OPTIMIZERS:
        torch.manual_seed(0)
        whole = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
        sharded = deepcopy(whole)
        shard(sharded, torch.device("cpu"))
        config = TrainConfig(optimizer=optimizer, lr=0.01)
        for model, batch in ((whole, images), (sharded, images[rows])):
            step = make_optimizer(model, config)
            for _ in range(3):
                model(batch).square().mean().backward()
                step.step()
                step.zero_grad()
        for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(full_tensor(ours), theirs, atol=1e-6), optimizer
    raise SystemExit(0)


@shards_on_cpus
def test_optimizers_compute_the_same_on_shards(tmp_path):
    ended = run_ranks([], tmp_path / "log", n=2, before=compare_optimizers)
    assert ended.codes == [0, 0], ended.text


def test_optimizers_that_need_whole_weights_are_refused():
    TrainConfig(optimizer="muon")
    with pytest.raises(ValueError, match=r"^optimizer: found 'muon', expected one of adamw, .*, or parallel=ddp$"):
        TrainConfig(optimizer="muon", parallel="fsdp")
