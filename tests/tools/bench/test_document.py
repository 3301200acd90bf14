"""Blocks of a report, written as HTML and as Markdown."""

from PIL import Image

from tools.bench.document import Cell, Images, Row, Table, to_html, to_markdown


def test_large_images_shrink_and_small_ones_grow(tmp_path):
    Image.effect_noise((3000, 500), 50).save(tmp_path / "large.png")
    Image.new("RGB", (24, 24), "red").save(tmp_path / "small.png")
    files = [(tmp_path / name, name) for name in ("large.png", "small.png")]
    page = to_html("t", [Images(files)])
    assert len(page) < 500_000
    assert 'width="240"' in page
    assert "image/jpeg" in page
    assert "image/png" in page
    assert "](large.png)" in to_markdown("t", [Images(files)], tmp_path)


def test_a_table_in_markdown_by_hand(tmp_path):
    table = Table(["a", "b"], [Row(["x|y", Cell("1_000", "_up_")]), Row(["p", ""], "paper")], [("", 1), ("G", 1)], "C.")
    text = to_markdown("T", [table], tmp_path)
    assert text == "# T\n\n| a | G b |\n| --- | ---: |\n| x\\|y | 1_000 (\\_up\\_) |\n| *p* |  |\n\nC.\n"


def test_a_column_of_long_texts_is_aligned_left_with_its_head():
    rows = [Row(["a", "1.0", "train.lr=0.001, train.layer_decay=0.75"]), Row(["b" * 40, "2.0", "-"])]
    page = to_html("t", [Table(["arm", "score", "setting"], rows)])
    assert '<th>arm</th><th>score</th><th class="text">setting</th>' in page
    assert page.count('<td class="text">') == 2
    assert "<td>1.0</td>" in page
