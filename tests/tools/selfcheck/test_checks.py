"""`addp doctor check=true`: what the checks find on a CPU, in networks that are wrong, and in runs that differ."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from addp_core.base.paths import MODEL_FILE
from addp_core.recipes.cli import main
from tools import doctor
from tools.selfcheck import check, checks, networks, on_device
from tools.selfcheck.checks import Check
from tools.selfcheck.commands import CommandFailed, Commands, Device
from tools.selfcheck.outcome import Outcome

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("environment")


def run_check(out: Path, *settings: str) -> tuple[int, dict]:
    """Run `addp doctor check=true` on the CPU and return its exit code and its report."""
    line = ["doctor", "check=true", "device=cpu", f"out={out / 'check.json'}", *settings]
    try:
        code = main(line)
    except SystemExit as error:
        code = error.code
    return code, json.loads((out / "check.json").read_text())


@pytest.fixture(scope="module")
def examined():
    """The environment, examined once: it takes seconds."""
    return doctor.examine()


@pytest.fixture
def environment(examined, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda imports: examined)


def replace_checks(monkeypatch, **functions) -> None:
    """Let these functions be all checks."""
    for module in (check, checks):
        monkeypatch.setattr(module, "CHECKS", {})
    for name, function in functions.items():
        check.CHECKS[name] = Check(f"the title of {name}", f"what a failure of {name} means", 10, function)


def passed(commands: Commands) -> Outcome:
    return Outcome("ok", "as expected", {"number": 1})


# -------------------- the command


def test_parity_passes_here(tmp_path, capsys):
    code, report = run_check(tmp_path, "checks=[parity]")
    assert code == 0
    [found] = report["checks"]
    assert (found["check"], found["state"]) == ("parity", "ok")
    assert "ids are equal" in found["note"]
    assert found["values"]["errors"]["logits"]["max"] < 1e-4
    assert found["values"]["hardware"]
    assert report["environment"]["packages"]["torch"]
    assert report["device"]["name"] == "cpu"
    text, progress = capsys.readouterr()
    assert re.search(r"^parity +ok +\d+ +largest error", text, re.MULTILINE)
    assert re.search(r"check 1 of 1, parity: the networks' golden numbers in float32; about \d+ s left", progress)


def test_a_failure_is_named_and_ends_with_code_1(monkeypatch, tmp_path, capsys):
    def breaks(commands):
        commands.python("breaks", "no_such_module")

    replace_checks(monkeypatch, parity=lambda commands: Outcome("failed", "a number", {}), memory=breaks, resume=passed)
    code, report = run_check(tmp_path)
    assert code == 1
    assert report["failed"] == ["parity", "memory"]
    assert [found["state"] for found in report["checks"]] == ["failed", "failed", "ok"]
    assert "ended with code 1" in report["checks"][1]["note"]
    assert "No module named no_such_module" in report["checks"][1]["note"]
    text = capsys.readouterr().out
    assert "parity failed: what a failure of parity means\n" in text
    assert "resume failed" not in text


def test_what_does_not_fit_in_the_time_is_skipped(monkeypatch, tmp_path, capsys):
    replace_checks(monkeypatch, parity=passed, memory=passed)
    code, report = run_check(tmp_path, "seconds=5", "checks=[memory]", "json=true")
    assert code == 0
    [found] = report["checks"]
    assert found["state"] == "skipped"
    assert re.fullmatch(r"needs about 10 s, \d s of seconds=5 are left", found["note"])
    assert json.loads(capsys.readouterr().out)["checks"] == report["checks"]


@pytest.mark.parametrize(("seconds", "state"), [(30, "skipped"), (600, "failed")])
def test_a_command_that_hangs_is_ended(monkeypatch, tmp_path, seconds, state):
    """It fails if it had several times what it needs, and is skipped if the time for all checks was up."""

    def hangs(commands):
        commands.deadline = 0.0
        commands.python("sleeping", "timeit", "-n1", "-r1", "import time; time.sleep(600)")

    replace_checks(monkeypatch, processes=hangs)
    _, report = run_check(tmp_path, f"seconds={seconds}")
    [found] = report["checks"]
    assert found["state"] == state
    assert "sleeping: did not end within 1 s; expected 10 s" in found["note"]


def test_ctrl_c_leaves_what_was_done(monkeypatch, tmp_path, capsys):
    def interrupted(commands):
        os.kill(os.getpid(), signal.SIGINT)
        commands.python("never", "timeit", "pass")

    replace_checks(monkeypatch, parity=passed, memory=interrupted, resume=passed)
    code, report = run_check(tmp_path)
    assert code == 1
    assert [(found["check"], found["state"]) for found in report["checks"]] == [
        ("parity", "ok"),
        ("memory", "skipped"),
        ("resume", "skipped"),
    ]
    assert report["checks"][0]["values"] == {"number": 1}
    assert report["checks"][1]["note"] == "interrupted"
    assert "parity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["check=true", "checks=[party]"], "parity"),
        (["checks=[parity]"], "without check=true"),
        (["check=true", "device=cuda"], "torch sees no GPU; expected device=cpu"),
        (["check=true", "out=no/such/folder/check.json"], "cannot be written"),
    ],
)
def test_impossible_settings_are_refused(monkeypatch, tmp_path, capsys, settings, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(doctor.examine(False)["torch"], "devices", [])
    assert main(["doctor", *settings]) == 2
    assert message in capsys.readouterr().err


# -------------------- on the device


def test_the_golden_numbers_are_those_of_the_network():
    model = networks.golden_network().double()
    inputs, golden = networks.read_golden()
    found = networks.outputs(model, networks.inputs_for(model)) | {"sample": networks.sampled(model)}
    assert found.keys() == golden.keys()
    for name, value in golden.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert len(inputs.ids.unique()) > 16


@pytest.mark.parametrize("part", ["tokenizer", "predictor", "denoiser.encoder", "denoiser.decoder"])
def test_parity_fails_for_other_weights_of_any_part(monkeypatch, part):
    model = networks.golden_network()
    with torch.no_grad():
        for parameter in model.get_submodule(part).parameters():
            parameter.mul_(1.01)
    monkeypatch.setattr(on_device, "golden_network", lambda: model)
    assert on_device.parity(CPU).state == "failed"


def test_numbers_that_are_not_finite_fail(monkeypatch):
    model = networks.golden_network()
    with torch.no_grad():
        model.denoiser.encoder.norm.weight[0] = torch.nan
    monkeypatch.setattr(on_device, "golden_network", lambda: model)
    for name in ("parity", "precision"):
        outcome = on_device.CHECKS[name](CPU)
        assert outcome.state == "failed"
        assert "inf of a standard deviation" in outcome.note


def test_bf16_has_a_distance_and_fp16_a_reason():
    outcome = on_device.precision(CPU)
    assert outcome.state == "ok", outcome.note
    assert 1e-4 < outcome.values["bf16"]["logits"]["rms"] < 0.1
    assert "fp16 needs a GPU" in outcome.note


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(on_device, "SETTLED_STEP", 1)
    monkeypatch.setattr(on_device, "LAST_STEP", 2)


@pytest.mark.parametrize("name", ["sampling", "memory"])
def test_sampling_and_memory_pass_on_a_cpu(few_steps, name):
    outcome = on_device.CHECKS[name](CPU)
    assert outcome.state == "ok", outcome.note


def test_memory_that_grows_fails(few_steps, monkeypatch):
    used = iter([2**30, 2**31])
    monkeypatch.setattr(on_device, "used_memory", lambda device: next(used))
    assert on_device.memory(CPU).state == "failed"


def test_images_that_depend_on_their_batch_fail(monkeypatch):
    def sample(model, n, batch, **options):
        return torch.full((n, 3, 32, 32), 1 / batch)

    monkeypatch.setattr(on_device, "sample", sample)
    assert on_device.sampling(CPU).note == "an image depends on the others of its batch"


# -------------------- training runs


@pytest.fixture
def commands(tmp_path):
    return Commands(tmp_path, Device("cpu"))


def write_run(out: Path, losses: list[float], finished: bool = True) -> None:
    """Write the metrics and, of a finished run, a model that depends on the losses."""
    out.mkdir(exist_ok=True)
    lines = [json.dumps({"step": 1 + i, "loss": loss, "grad_norm": 1.0}) for i, loss in enumerate(losses)]
    (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in [*lines, json.dumps({"step": len(losses)})]))
    if finished:
        (out / MODEL_FILE).write_bytes(str(losses).encode())


def fake_runs(monkeypatch, **losses: float) -> None:
    """Let each training have a loss of 1, and of the given value from step 11 on."""

    def train(commands, out, *settings, stop_when=None, **options):
        last = losses.get(out.name.replace("-", "_"), 1.0)
        steps = [1.0] * 10 + [last] * (checks.STEPS - 10)
        write_run(out, steps[: checks.STOP_AFTER] if stop_when else steps, finished=not stop_when)

    monkeypatch.setattr(checks, "train", train)


@pytest.mark.parametrize(("loss", "state"), [(1.0, "ok"), (1.00001, "ok"), (1.01, "failed"), (float("nan"), "failed")])
def test_two_processes_with_another_loss_fail(monkeypatch, commands, loss, state):
    fake_runs(monkeypatch, two_processes=loss)
    assert checks.processes(commands).state == state


def test_a_continued_run_that_differs_fails(monkeypatch, commands):
    fake_runs(monkeypatch, stopped=1.00001)
    outcome = checks.resume(commands)
    assert outcome.state == "failed"
    assert outcome.note == "stopped after step 5 of 40 and continued: differs from step 11 on"


@pytest.mark.parametrize(("loss", "state"), [(1.00001, "ok"), (1.1, "failed")])
def test_a_device_that_does_not_repeat_itself_is_not_blamed_on_the_stop(monkeypatch, commands, loss, state):
    fake_runs(monkeypatch, stopped=loss, not_stopped_again=1.00002)
    outcome = checks.resume(commands)
    assert outcome.state == state
    assert "does not repeat itself" in outcome.note


def test_a_run_without_all_steps_is_no_comparison(monkeypatch, commands):
    monkeypatch.setattr(checks, "train", lambda commands, out, *_, **__: write_run(out, [1.0]))
    with pytest.raises(CommandFailed, match="found 1 and 1 steps, expected 40"):
        checks.processes(commands)


@pytest.mark.slow
def test_a_real_run_stops_and_continues(commands):
    outcome = checks.resume(commands)
    assert outcome.state == "ok", outcome.note
    assert checks.STOP_AFTER <= outcome.values["stopped_after"] < checks.STEPS
