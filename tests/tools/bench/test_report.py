"""`addp report`: what it writes for a bench that is finished, half finished, or has special characters in its names."""

import csv
import html.parser
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from addp_core.recipes.cli import main
from tools.bench.benchmarks import BENCHMARKS
from tools.bench.metric import Metric
from tools.bench.report import _difference, write_report

SPECIAL = "<b>big|*one*</b>"  # an arm; the others are small and random
SEEDS = [0, 1, 2]
SCORES = {  # benchmark -> arm -> metric -> a value for each seed
    "generation": {
        "small": {"fd": [12.34], "cs": [3.21], "precision": [0.5], "recall": [0.25]},
        SPECIAL: {"fd": [9.5], "cs": [4.0], "precision": [0.75], "recall": [0.5]},
    },
    "finetune": {
        "small": {"top1": [50.0, 52.0, 54.0]},
        SPECIAL: {"top1": [60.0, None, 62.0]},
        "random": {"top1": [45.0, 45.0, 46.0]},
    },
    "linprobe": {"small": {"top1": [20.0]}, SPECIAL: {"top1": [30.0]}, "random": {"top1": [25.0]}},
    "robustness": {
        "small": {"a": [10.0, 12.0], "r": [20.0, 22.0], "sketch": [30.0, 32.0], "c": [40.0, 42.0]},
        SPECIAL: {"a": [11.0, 12.0]},
    },
    "det": {"small": {"box_ap": [5.0], "mask_ap": [4.0]}, "random": {"box_ap": [6.0], "mask_ap": [4.5]}},
}


def entry_of(benchmark, arm):
    """Return a step's entry in bench.json."""
    name = f"{benchmark}/{arm}"
    scores = SCORES[benchmark].get(arm, {})
    length = max(map(len, scores.values()), default=0)
    return {
        "name": name,
        "benchmark": benchmark,
        "arm": arm,
        "state": "done" if scores else "failed",
        "error": "" if scores else "RuntimeError: a < b & c",
        "seconds": 90.0,
        "finished": "2026-01-02T03:04:05",
        "commands": [f"addp sweep {name}/sweep.yaml"],
        "folder": name.replace(SPECIAL, "special"),
        "log": f"{name.replace(SPECIAL, 'special')}/log.txt",
        "setting": {"train.lr": 0.001, "train.layer_decay": 0.75} if benchmark == "finetune" else {},
        "seeds": SEEDS[:length],
        "scores": scores,
        "pictures": [],
    }


@pytest.fixture
def out(tmp_path) -> Path:
    return write_bench(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The same with its report, not to be changed."""
    folder = write_bench(tmp_path_factory.mktemp("written"))
    write_report(folder)
    return folder


def write_bench(tmp_path: Path) -> Path:
    """Write a bench of three arms: one step failed, one blocked, segmentation left out, some images missing."""
    arms = {
        "small": {"model": "runs/small", "init": "pretrained", "parameters": 1_234_567, "images_seen": 1000},
        SPECIAL: {"model": "runs/big", "init": "pretrained", "parameters": 1_234_567, "images_seen": 460_800},
        "random": {"model": "runs/small", "init": "random", "parameters": 1_234_567, "images_seen": None},
    }
    for entry in arms.values():
        entry |= {"run": None, "seconds": None}
    arms["small"] |= {"run": str(tmp_path / "run"), "seconds": 3600.0}
    steps = [
        entry_of(benchmark, arm) for benchmark in SCORES for arm in arms if (benchmark, arm) != ("generation", "random")
    ]
    blocked = next(step for step in steps if step["name"] == "robustness/random")
    blocked |= {"state": "blocked", "error": "blocked by finetune/random", "seconds": None, "finished": None}
    for benchmark, arm in (("generation", "random"), ("seg", "small")):
        steps.append(entry_of("finetune", "random") | {"benchmark": benchmark, "arm": arm, "state": "left out"})
    bench = {
        "recipe": "out: bench\ndata: {imagenet: toy/imagenet, coco: ''}\nbench: {processes: 2}\n",
        "versions": {"addp": "1.0", "torch": "2.15"},
        "hardware": "a CPU, 2 cores",
        "arms": arms,
        "steps": steps,
        "chance": {
            "finetune": {"top1": 10.0},
            "robustness": {"a": 50.0, "r": 30.0, "sketch": 10.0, "c": 10.0},
            "det": {"box_ap": 0.0, "mask_ap": 0.0},
        },
    }
    folder = tmp_path / "bench"
    finetuned = {str(seed): f"finetune/small/small/lr=0.001,seed{seed}" for seed in SEEDS}
    next(step for step in steps if step["name"] == "finetune/small")["runs"] = finetuned
    for step in steps:
        (folder / step["folder"]).mkdir(parents=True, exist_ok=True)
    failed = next(step for step in steps if step["state"] == "failed")
    (folder / failed["log"]).write_bytes(
        b"step 1\n 0%\r 50%\r100%\nTraceback <most recent>\n\nRuntimeError: a < b & c\n"
    )
    det = next(step for step in steps if step["name"] == "det/small")
    det["pictures"] = ["det/small/one.png", "det/small/gone.png", "det/small/text.jpg"]
    Image.new("P", (32, 20)).save(folder / "det/small/one.png")
    (folder / "det/small/text.jpg").write_text("not an image")
    for seed in SEEDS:
        run = folder / finetuned[str(seed)]
        run.mkdir(parents=True)
        lines = [{"step": step, "loss": 3.0 - step / 10 + seed / 20} for step in range(10)]
        lines.append({"step": 9, "top1": 50.0})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10, "lo')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "images": 8, "loss": 7.3}\n{"step": 2, "images": 16, "loss": 7.2}\n'
    )
    (folder / "bench.json").write_text(json.dumps(bench))
    return folder


def test_every_sampling_and_what_was_measured_with(out):
    """The tables above show the better sampling alone."""

    def add_rows(bench):
        for arm, features in (("small", "VGG16"), (SPECIAL, "Inception")):
            (step,) = (step for step in bench["steps"] if step["name"] == f"generation/{arm}")
            settings = [{"sampling.steps": steps, "sampling.temperature": 6.0} for steps in (20, 256)]
            scores = [{"fd": [12.34, 12.36], "cs": [3.21]}, {"fd": [15.0]}]
            step["rows"] = [{"setting": a, "scores": b} for a, b in zip(settings, scores, strict=True)]
            step["details"] = {"features": "a classifier", "precision and recall": f"{features}, k = 3"}

    edit(out, add_rows)
    write_report(out)
    text = (out / "report.md").read_text()
    section = text[text.index("### Every sampling") :]
    assert "| small | sampling.steps=20 | 12.35 ± 0.01 | 3.21 | - | - |" in section
    assert "| small | sampling.steps=256 | 15.00 | - | - | - |" in section
    assert "\nFeatures: a classifier.\n" in text
    assert "\nsmall: precision and recall: VGG16, k = 3.\n" in text
    edit(out, lambda bench: [step.update(rows=step.get("rows", [])[:1]) for step in bench["steps"]])
    write_report(out)
    assert "Every sampling" not in (out / "report.md").read_text()


def edit(out: Path, change) -> None:
    bench = json.loads((out / "bench.json").read_text())
    change(bench)
    (out / "bench.json").write_text(json.dumps(bench))


class Reader(html.parser.HTMLParser):
    """Checks that tags are closed in order; collects tables (rows of cells), tags, sources and texts."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.tables, self.texts = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += " " * bool(self.tables[-1][-1][-1]) + data


def row(table, name):
    return next(cells for cells in table if cells[0] == name)


def test_the_first_table(written):
    page = Reader((written / "report.html").read_text())
    table = page.tables[0]
    assert table[0] == ["", "Generation", "Fine-tuning", "Linear probe", "Robustness", "Detection", ""]
    assert table[1][:6] == ["arm", "FD ↓", "CS ↑", "precision ↑", "recall ↑", "top-1 ↑"]
    assert table[1][-5:] == ["average ↑", "box AP ↑", "mask AP ↑", "encoder", "images seen"]
    small, special, random = (row(table, arm) for arm in ("small", SPECIAL, "random"))
    assert small[-2:] == ["1.2 M", "1,000"]
    assert small[1:3] == ["12.34", "3.21"]
    assert small[3:5] == ["0.50", "0.25"]
    assert small[5] == "52.0 ± 2.0 +6.7"  # 52 - 45.33
    assert small[6] == "20.0 -5.0"
    assert small[-5] == "26.0 ± 1.4"  # of 25 and 27, the means of each seed's four
    assert special[5] == "61.0 ± 1.4 +15.7"  # of two seeds; the third one's run failed
    assert special[-4] == "failed"
    assert random[1:6] == ["-", "-", "-", "-", "45.3 ± 0.6"]
    assert random[7] == "blocked"
    chance = row(table, "chance")
    assert chance[5:7] == ["10.0", ""]
    assert chance[-5] == "25.0"
    paper = row(table, "paper: ADDP ViT-B")
    assert paper[1:7] == ["-", "-", "-", "-", "83.9", "11.5"]  # its FID is not an FD
    assert paper[-5:-2] == ["47.0", "51.7", "45.8"]
    of_generation = next(table for table in page.tables if "recall ↑" in table[0])
    assert [cells[0] for cells in of_generation] == ["arm", "small", SPECIAL]  # nor do precision and recall compare


def test_what_the_page_holds(written):
    page = (written / "report.html").read_text()
    reader = Reader(page)
    assert "<b>" not in page
    assert "script" not in reader.tags
    assert all(source.startswith(("data:image/", "#")) for source in reader.sources)
    assert not re.search(r"url\(|@import|http:", page.split("</style>")[0])
    text = "".join(reader.texts)
    assert "det/<b>big|*one*</b>: the end of det/special/log.txt" in text
    assert "step 1\n100%\nTraceback <most recent>\nRuntimeError: a < b & c" in text
    assert "blocked by finetune/random" in text
    assert "not comparable with the paper: the labeled images have 10 classes" in text.lower()
    assert "gone.png: No such file or directory" in text
    assert "text.jpg: not an image" in text
    assert page.count("data:image/png") == 1
    assert "Scores against images seen" in text
    # against images seen: FD, CS, precision, recall, top-1 twice, A; fine-tuning; pretraining twice
    assert page.count("data:image/svg") == 10
    assert "Left out, because no data are given or by choice: segmentation." in text
    assert "12 of 14 steps done, 1 failed, 1 blocked, last at 2026-01-02T03:04:05. a CPU" in text


def test_time_and_cost(out, written):
    assert main(["report", f"out={out}", "price_per_hour=2"]) == 0
    table = next(t for t in Reader((out / "report.html").read_text()).tables if "price" in t[0])
    assert row(table, "pretraining of small")[1:4] == ["1:00:00", "1.000", "2.00"]
    assert row(table, "finetune/small")[1:4] == ["0:01:30", "0.050", "0.05"]
    assert row(table, "robustness/random")[1:4] == ["-", "-", "-"]
    assert row(table, "all")[1:4] == ["1:19:30", "1.650", "2.65"]
    assert "price" not in (written / "report.md").read_text()


def test_markdown_has_the_same_content(written):
    text = (written / "report.md").read_text()
    assert "&lt;b&gt;big\\|\\*one\\*&lt;/b&gt;" in text
    assert "<b>" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    rows = [line for line in text.splitlines() if line.startswith("| small |")]
    assert "52.0 ± 2.0 (+6.7)" in rows[0]
    first = [line for line in text.splitlines() if line.startswith("|")][: 2 + 3 + 1 + 2]
    assert len({line.replace("\\|", "").count("|") for line in first}) == 1
    assert "](det/small/one.png)" in text
    assert "gone.png is not there" in text
    assert "*paper: ADDP ViT-L*" in text
    assert "Drawn in the HTML: Generation: FD ↓ over images seen in pretraining" in text


def test_colors_need_more_than_noise(written):
    page = (written / "report.html").read_text()
    assert "52.0 ± 2.0<small class=good>+6.7" in page
    assert "20.0<small>-5.0" in page  # one seed


def test_lower_is_better_for_distances():
    fid = Metric("fid", "FID", lower_is_better=True)
    assert _difference([9.0, 9.2], [20.0, 20.2], fid) == ("-11.0", "good")
    assert _difference([30.0, 30.2], [20.0, 20.2], fid) == ("+10.0", "bad")
    assert _difference([30.0], [20.0, 20.2], fid) == ("+9.9", "")
    assert _difference([44.0, 50.0, 41.0], [45.0, 46.0, 47.0], Metric("top1", "top-1")) == ("-1.0", "")


def test_a_bench_that_has_just_started(out):
    def reset(bench):
        bench["chance"] = {}
        for step in bench["steps"]:
            if step["state"] != "left out":
                step |= {
                    "state": "missing",
                    "scores": {},
                    "seconds": None,
                    "finished": None,
                    "error": "",
                    "pictures": [],
                }

    edit(out, reset)
    page = Reader(write_report(out).read_text())
    assert row(page.tables[0], "small")[1:4] == ["not yet"] * 3
    text = "".join(page.texts)
    assert "0 of 14 steps done" in text
    assert "the same addp bench command continues it" in text
    assert "What failed" not in text
    assert row(page.tables[0], "paper: ADDP ViT-B")[1:3] == ["8.9", "95.3"]  # FID and IS, until something is measured


def test_one_arm_without_random_or_data(out):
    def keep_one_arm(bench):
        bench["arms"] = {"small": bench["arms"]["small"]}
        bench["steps"] = [step for step in bench["steps"] if step["arm"] == "small" and step["benchmark"] == "finetune"]
        bench["chance"]["finetune"]["top1"] = 0.1

    edit(out, keep_one_arm)
    text = write_report(out).read_text()
    page = Reader(text)
    assert row(page.tables[0], "small")[1:2] == ["52.0 ± 2.0"]
    assert "Not comparable" not in text
    assert "difference to" not in text
    assert page.tables[1][0] == ["arm", "top-1 ↑", "best setting"]  # the paper has no model of this size

    toys = json.loads((out / "bench.json").read_text())
    (out / "toys").mkdir()
    (out / "toys" / "toy.json").write_text("{}")
    toys["recipe"] = json.dumps({"data": {"imagenet": str(out / "toys"), "coco": ""}, "price_per_hour": 3})
    (out / "bench.json").write_text(json.dumps(toys))
    text = write_report(out).read_text()
    assert "these are toy data (imagenet, by addp toy)" in text
    assert "Price at 3 an hour" in text


def test_comparison_with_the_paper_if_data_and_size_are_the_same(out):
    def scale_up(bench):
        for arm in bench["arms"].values():
            arm["parameters"] = 85_798_656
        bench["chance"]["finetune"]["top1"] = 0.1

    edit(out, scale_up)
    tables = Reader(write_report(out).read_text()).tables
    finetuned = next(table for table in tables if table[0] == ["arm", "top-1 ↑", "against the paper", "best setting"])
    assert row(finetuned, "small")[2] == "top-1 -31.9 (ADDP ViT-B)"  # 52.0 - 83.9
    assert row(finetuned, "random")[2] == "-"
    robust = next(table for table in tables if "Sketch ↑" in table[0])
    assert row(robust, "small")[-1].startswith("A -24.2, R -33.4")
    assert row(robust, "small")[-1].endswith("average -21.0 (ADDP ViT-B)")
    edit(out, lambda bench: bench["chance"]["finetune"].update(top1=10.0))
    assert "(ADDP ViT-B)" not in write_report(out).read_text()


def test_every_setting_that_was_tried(out):
    assert "Every setting tried" not in write_report(out).read_text()
    tried = {"lr=0.001,seed0": 50.0, "lr=0.01,seed0": None, "lr=0.001,seed1": 52.0, "lr=0.001,seed2": 54.0}
    edit(out, lambda bench: next(s for s in bench["steps"] if s["name"] == "finetune/small").update(grid=tried))
    text = "".join(Reader(write_report(out).read_text()).texts)
    assert "small  lr=0.001,seed0  50\nsmall  lr=0.01,seed0  -\n" in text


def test_notes_of_a_sweep_are_in_the_report(out):
    note = "lr=0.01: failed, left out"
    edit(out, lambda bench: next(s for s in bench["steps"] if s["name"] == "finetune/small").update(notes=[note]))
    assert f"small: {note}" in "".join(Reader(write_report(out).read_text()).texts)


def test_the_same_input_gives_the_same_files(written):
    first = (written / "report.html").read_bytes(), (written / "report.md").read_bytes()
    write_report(written)
    assert first == ((written / "report.html").read_bytes(), (written / "report.md").read_bytes())
    assert not list(written.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "bench.json: No such file or directory; expected the folder of an `addp bench`"),
        ("{", "bench.json: not as `addp bench` writes it"),
        ("[]", "bench.json: not as `addp bench` writes it"),
        ('{"arms": {}}', "bench.json: not as `addp bench` writes it"),
    ],
)
def test_wrong_bench_folders(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    assert main(["report", f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_paper_adds_up():
    """The paper's average is the mean of its four datasets; the rows that the first table needs are there."""
    scores = BENCHMARKS["robustness"].published["ADDP ViT-B"]
    assert sum(scores[key] for key in ("a", "r", "sketch", "c")) / 4 == pytest.approx(scores["average"], abs=0.05)
    assert {"finetune", "linprobe", "det", "seg", "generation"} <= {
        name for name, benchmark in BENCHMARKS.items() if "ADDP ViT-L" in benchmark.published
    }


def test_tables_are_written_as_csv_and_latex(out):
    (out / "tables").mkdir()
    (out / "tables/of-an-earlier-report.csv").write_text("a\n")
    write_report(out)
    assert not (out / "tables/of-an-earlier-report.csv").exists()
    head, *rows = csv.reader((out / "tables/all-benchmarks.csv").read_text().splitlines())
    column = head.index("Fine-tuning top-1 ↑")
    assert {row[0]: row[column] for row in rows if row[0] in SCORES["finetune"]} == {
        "small": "52.0 ± 2.0",
        SPECIAL: "61.0 ± 1.4",
        "random": "45.3 ± 0.6",
    }
    latex = (out / "tables/all-benchmarks.tex").read_text()
    assert r"Fine-tuning top-1 $\uparrow$" in latex
    assert r"52.0 $\pm$ 2.0 (+6.7)" in latex
    assert "\\midrule" in latex
    assert (out / "tables/fine-tuning-each-seed.csv").read_text().startswith("arm,seed,top-1 ↑\nsmall,0,50.0\n")
