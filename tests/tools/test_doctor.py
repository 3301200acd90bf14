"""The doctor: what it finds in a whole, an empty and a broken environment."""

import json
import sys
from pathlib import Path

import pytest

from addp_core.recipes.cli import main
from tools import doctor


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: None)


def examined(capsys, *settings: str) -> dict:
    assert main(["doctor", "json=true", *settings]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_environment_of_the_tests(capsys):
    report = examined(capsys)
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["torch"]["version"].startswith(report["packages"]["torch"])
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["memory_gib"] > 0
    for task in ("pretrain", "gen", "export", "throughput", "toy"):
        assert report["tasks"][task]["ready"], report["tasks"][task]
        assert report["tasks"][task]["in_this_version"]
    assert not [problem for problem in report["problems"] if "import" in problem]
    text = doctor.as_text(report)
    assert f"torch       {report['torch']['version']}" in text
    assert "  pretrain    ready" in text


def test_nothing_installed(nothing_installed, capsys):
    report = examined(capsys)
    assert report["torch"]["version"] is None
    for name, task in report["tasks"].items():
        assert not task["ready"]
        assert set(task["lacks"]) == set(doctor.TASKS[name].needs)
    assert any(command.endswith("-m pip install 'addp[seg]'") for command in report["tasks"]["seg"]["commands"])
    assert any(command.endswith("-m pip install 'addp[det]'") for command in report["tasks"]["det"]["commands"])
    assert any("-m pip install 'timm" in command for command in report["tasks"]["pretrain"]["commands"])
    assert any(
        all(word in command for word in ("omegaconf<2.4", "setuptools<81", "--no-build-isolation", "detectron2"))
        for command in report["tasks"]["det"]["commands"]
    )
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch       not usable" in text
    assert "  seg         not ready" in text


def test_from_a_source_tree_that_is_not_installed(nothing_installed, monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", dict)
    assert doctor.command_for("pycocotools").endswith("-m pip install -e '.[det]'")
    assert doctor.command_for("timm").endswith("-m pip install 'timm'")
    assert doctor.command_for("no_such_package") is None


def impostor(folder, name: str, code: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


def test_torchvision_that_was_built_for_another_torch(tmp_path, monkeypatch, capsys):
    torch = "class version: cuda = hip = None\nclass cuda: is_available = staticmethod(lambda: False)\n"
    torch += "class backends:\n    class mps: is_available = staticmethod(lambda: False)\n"
    impostor(tmp_path, "torch", f"__version__ = '2.14.0+cpu'\n{torch}")
    impostor(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = examined(capsys)
    assert not report["tasks"]["pretrain"]["ready"]
    assert report["tasks"]["pretrain"]["broken"] == ["torchvision"]
    [problem] = [problem for problem in report["problems"] if problem.startswith("torchvision ")]
    assert "operator torchvision::nms does not exist (torch " in problem
    assert "not built for each other" in problem
    assert "--force-reinstall 'torch" in problem
    assert "(both from the same index)" in problem


def test_broken_packages_are_findings(tmp_path, monkeypatch, capsys):
    impostor(tmp_path, "torch", "import os; os.kill(os.getpid(), 11)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = examined(capsys)
    assert report["tasks"]["export"]["broken"] == ["torch"]
    assert any(
        problem.startswith("torch is installed but does not import: ended with code -11")
        for problem in report["problems"]
    )


def test_versions_that_were_never_tested(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "installed_version", lambda package: "0.1" if package.module == "timm" else None)
    report = examined(capsys)
    assert any(problem.startswith("timm 0.1 was never tested, expected timm") for problem in report["problems"])


def test_the_pages_install_detectron2_as_doctor_says():
    page = (Path(doctor.__file__).parents[1] / "docs" / "detection.md").read_text()
    for command in doctor.DETECTRON2.removesuffix(" (builds for minutes)").split(" && "):
        assert command.replace(doctor.PIP, "pip install") in page
