"""The paper's numbers in a bench: what a recipe may say, rows and verdicts of the report, and what is not repeated."""

import csv
import json
from pathlib import Path

import pytest
from bench_commands import bench_command, bench_json, commands_run, last_line
from test_bench_pretrains import bench_line, recipes  # noqa: F401 (a fixture)

from addp_core.recipes.cli import main

SEEDS = [0, 1, 2]
PAPER = {
    "table": "Table 3",
    "baseline": "default",
    "arms": {
        "default": {"generation": {"fid": 23.63, "is": 33.09}, "finetune": {"top1": 83.5}},
        "z_t": {"generation": {"fid": 80.75, "is": 13.48}, "finetune": {"top1": 83.7}},
        "argmax": {"generation": {"fid": 26.62}, "finetune": {"top1": 83.5}},
        "mae": {"finetune": {"top1": 83.6}},
    },
    "pairs": [["z_t", "argmax"]],
}
SCORES = {
    "default": {"fd": [2.0, 2.1, 2.2], "cs": [3.0, 3.1, 3.2], "top1": [50.0, 51.0, 52.0]},
    "z_t": {"fd": [4.0, 4.1, 4.2], "cs": [5.0, 5.1, 5.2], "top1": [51.0, 52.0, 53.0]},
    "argmax": {"fd": [3.0], "cs": [3.0], "top1": [60.0, 61.0, 62.0]},
}


def write_bench(out: Path, paper: dict, chance: float = 10.0) -> None:
    """Write the bench.json of three arms with three seeds each, apart from one generation."""
    steps = []
    for arm, scores in SCORES.items():
        for benchmark, metrics in (("generation", ("fd", "cs")), ("finetune", ("top1",))):
            step = {"name": f"{benchmark}/{arm}", "benchmark": benchmark, "arm": arm, "state": "done", "seconds": 1.0}
            measured = {metric: scores[metric] for metric in metrics}
            steps.append(step | {"scores": measured, "seeds": SEEDS[: len(measured[metrics[0]])]})
    settings = {"default": {"process.condition": "z_t+1"}, "z_t": {"process.condition": "z_t"}}
    arms = {arm: {"model": arm, "init": "pretrained", "settings": settings.get(arm)} for arm in SCORES}
    recipe = json.dumps({"data": {"imagenet": "photos"}, "paper": paper})
    content = {"recipe": recipe, "arms": arms, "steps": steps, "chance": {"finetune": {"top1": chance}}}
    (out / "bench.json").write_text(json.dumps(content))


def read_table(out: Path, name: str) -> list[list[str]]:
    return list(csv.reader((out / "tables" / f"{name}.csv").read_text().splitlines()))


def test_verdicts_on_differences(tmp_path):
    write_bench(tmp_path, PAPER)
    assert main(["report", f"out={tmp_path}"]) == 0
    head, *rows = read_table(tmp_path, "against-the-paper")
    assert head == ["difference", "metric", "paper", "measured", "standard error", "verdict"]
    assert rows == [
        ["z_t - default", "Generation: FD ↓", "+57.12", "+2.00", "0.082", "agrees"],
        ["z_t - default", "Generation: CS ↑", "-19.61", "+2.00", "0.082", "disagrees"],
        ["z_t - default", "Fine-tuning: top-1 ↑", "+0.2", "+1.0", "0.82", "undecided"],
        ["argmax - default", "Generation: FD ↓", "+2.99", "+0.90", "-", "undecided"],
        ["argmax - default", "Fine-tuning: top-1 ↑", "+0.0", "+10.0", "0.82", "undecided"],
        ["z_t - argmax", "Generation: FD ↓", "+54.13", "+1.10", "-", "undecided"],
        ["z_t - argmax", "Fine-tuning: top-1 ↑", "+0.2", "-9.0", "0.82", "disagrees"],
    ]
    text = (tmp_path / "report.md").read_text()
    assert "Of 7 differences: agrees 1, disagrees 2, undecided 4." in text
    for reason in ("within two standard errors", "one seed", "the paper has no difference"):
        assert f"| undecided ({reason}) |" in text
    assert "FD stands for the paper's FID and CS stands for the paper's IS." in text
    assert "Only the signs compare: the data, sizes and budgets are not the paper's." in text
    assert "Not arms of this bench, and so without a measured difference: mae." in text
    latex = " ".join((tmp_path / "tables" / "against-the-paper.tex").read_text().split())
    assert r"z\_t - default & Generation: FD $\downarrow$ & +57.12 & +2.00" in latex
    assert "<td>undecided<small>one seed</small></td>" in (tmp_path / "report.html").read_text()


def test_rows_of_the_paper(tmp_path):
    write_bench(tmp_path, PAPER)
    assert main(["report", f"out={tmp_path}"]) == 0
    _, *rows = read_table(tmp_path, "all-benchmarks")
    assert [row[0] for row in rows[4:]] == [f"paper: {arm}" for arm in PAPER["arms"]]
    assert rows[5][1:4] == ["80.75", "13.48", "83.7"]  # an FID where an FD was measured
    assert rows[7][1:4] == ["-", "-", "83.6"]
    assert [row[0] for row in read_table(tmp_path, "generation")[4:]] == [
        "paper: default",
        "paper: z_t",
        "paper: argmax",
    ]
    text = (tmp_path / "report.md").read_text()
    assert "Rows named paper: Table 3, ADDP paper, arXiv 2306.05423 (ICLR 2024). FD stands for" in text
    assert "against the paper |" not in text
    write_bench(tmp_path, PAPER, chance=0.1)  # of ImageNet
    assert main(["report", f"out={tmp_path}"]) == 0
    assert "| z_t | 52.0 ± 1.0 | top-1 -31.7 |" in (tmp_path / "report.md").read_text()


def test_without_the_papers_numbers_the_report_has_no_such_section(tmp_path):
    write_bench(tmp_path, {})
    assert main(["report", f"out={tmp_path}"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Against the paper" not in text
    assert "stands for" not in text
    assert "*paper: ADDP ViT-B*" in text


def test_settings_in_which_arms_differ(tmp_path):
    write_bench(tmp_path, {})
    assert main(["report", f"out={tmp_path}"]) == 0
    assert read_table(tmp_path, "all-benchmarks-what-the-arms-differ-in") == [
        ["arm", "process.condition"],
        ["default", "z_t+1"],
        ["z_t", "z_t"],
        ["argmax", "-"],
    ]


@pytest.mark.parametrize(
    ("paper", "message"),
    [
        (
            "arms={{a: {{fine-tune: {{top1: 1}}}}}}",
            "paper.arms.a: found 'fine-tune', expected one of generation, finetune, finetune_10, finetune_1, "
            "linprobe, robustness, det, seg, seg_probe; did you mean 'finetune'?",
        ),
        (
            "arms={{a: {{generation: {{fidd: 1}}}}}}",
            "paper.arms.a.generation: found 'fidd', expected metrics (fid, is, precision, recall); did you mean 'fid'?",
        ),
        ("arms={{a: {{generation: {{fd: 1}}}}}}", "paper.arms.a.generation: found 'fd', expected metrics (fid, is"),
        ("arms={{a: {{seg: {{miou: high}}}}}}", "paper.arms: found {{a: {{seg: {{miou: high}}}}}}, expected "),
        ("baseline=a", "paper.baseline: found 'a', expected one of paper.arms (none)"),
        ("pairs=[[a,b]]", "paper.pairs: found ['a', 'b'], expected two of paper.arms ()"),
    ],
)
def test_wrong_numbers_are_named_before_the_first_step(toys, fake, tmp_path, capsys, paper, message):
    out = tmp_path / "out"
    assert main(bench_command(toys, out, f"paper.{paper.format()}")) == 2
    assert message.format() in last_line(capsys)
    assert not out.exists()
    assert commands_run(fake, out) == []


def test_adding_the_papers_numbers_repeats_nothing(toys, recipes, fake, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    assert main(bench_line(toys, recipes, out, "random=false")) == 0
    assert len(commands_run(fake, out)) == 6
    assert bench_json(out)["against_paper"] == []
    paper = "paper={baseline: ours, arms: {ours: {finetune: {top1: 83.5}}, z_t: {finetune: {top1: 83.7}}}}"
    assert main(bench_line(toys, recipes, out, "random=false", paper)) == 0
    assert commands_run(fake, out) == []
    (comparison,) = bench_json(out)["against_paper"]
    assert comparison == {
        "arm": "z_t",
        "baseline": "ours",
        "benchmark": "finetune",
        "metric": "top1",
        "measured_metric": "top1",
        "paper": 0.2,
        "measured": 0.0,
        "standard_error": None,
        "verdict": "undecided",
        "reason": "one seed",
    }
    assert bench_json(out)["arms"]["z_t"]["settings"] == {"process.condition": "z_t"}
    assert bench_json(out)["arms"]["ours"]["settings"] == {"process.condition": "z_t+1"}
