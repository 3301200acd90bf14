"""notebooks/quickstart.ipynb: its cells run in order, as in Jupyter, and it is committed without outputs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


def read_cells() -> list[tuple[str, str]]:
    """Return (kind, source) of each cell."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def run_command(line: str) -> None:
    """Run a line of a cell that begins with an exclamation mark."""
    program, *arguments = shlex.split(line)
    assert program == "addp"
    subprocess.run([sys.executable, "-m", "addp_core", *arguments], check=True, capture_output=True)


def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    names: dict = {"run_command": run_command}
    for kind, source in read_cells():
        if kind == "code":
            exec(re.sub(r"^!(.*)$", lambda found: f"run_command({found[1]!r})", source, flags=re.M), names)
    plt.close("all")
    assert len(figures) == 4
    assert names["images"].shape == (16, 3, 32, 32)
    assert names["val_features"].shape == (100, 64, 128)
    assert [float(each) > 0 for each in re.findall(r"([\d.]+) %", capsys.readouterr().out)] == [True, True]
    assert {path.name for path in tmp_path.iterdir()} == {"toy", "finetuned"}


@pytest.mark.parametrize("key", ["outputs", "execution_count"])
def test_no_outputs_are_committed(key):
    assert not any(cell.get(key) for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"])
