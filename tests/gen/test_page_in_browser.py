"""The page of `addp app` in a headless Chromium: what a visitor sees and does, on a phone and on a wide screen."""

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_addp

from addp_core import save_model

pytest.importorskip("gradio", reason="needs gradio: pip install 'addp[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
app, page_module = pytest.importorskip("gen.app"), pytest.importorskip("gen.page")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (or its path in CHROMIUM)")
HW = (16, 16)
PHONE, SCREEN = {"width": 390, "height": 800}, {"width": 1280, "height": 800}
SOON = 10_000  # milliseconds that an element may take to appear


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A page with every tab: its address, a gate that holds each step while it is closed, the steps begun, a run,
    visits and those that the server knows to have ended.
    """
    root = tmp_path_factory.mktemp("app")
    save_model(tiny_addp(HW), root / "model.safetensors")
    (root / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{i}.png")
    run = root / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    recipe = app.Recipe(
        model=str(root / "model.safetensors"), runs=(str(run),), data=str(root / "photos"), max_n=4, port=port
    )
    actions = page_module.Actions(*app.open_actions(recipe))
    gate, steps = threading.Event(), []
    gate.set()
    render = actions.sampling.model.render

    def held_render(*arguments):
        steps.append(1)
        assert gate.wait(30)
        return render(*arguments)

    actions.sampling.model.render = held_render
    blocks = page_module.build_page(actions, page_module.page_title(recipe, actions))
    visits, left = [], []
    with blocks:
        blocks.unload(lambda: left.append(1))
    page_module.serve(blocks, recipe, prevent_thread_lock=True, quiet=True)
    yield SimpleNamespace(
        address=f"http://127.0.0.1:{port}", gate=gate, steps=steps, run=run, root=root, visits=visits, left=left
    )
    gate.set()
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[PHONE, SCREEN], ids=["phone", "screen"])
def page(served, browser, request):
    with visit(served, browser, request.param) as page:
        yield page


@pytest.fixture
def wide(served, browser):
    with visit(served, browser, SCREEN) as page:
        yield page


def visit(served, browser, viewport):
    served.visits.append(1)
    page = browser.new_page(viewport=viewport)
    page.set_default_timeout(SOON)
    page.goto(served.address)
    page.get_by_role("button", name="generate", exact=True).wait_for()
    return page


def click(page, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).locator("visible=true").click()


def open_tab(page, tab: str) -> None:
    page.get_by_role("tab", name=tab).click()


def see(page, text: str) -> None:
    page.get_by_text(re.compile(text)).locator("visible=true").first.wait_for()


def upload(page, path: Path) -> None:
    """Upload a file to the tab of features."""
    see(page, "Drop File Here")
    page.wait_for_timeout(300)  # until the field listens
    page.get_by_role("tabpanel").locator("visible=true").locator("input[type=file]").last.set_input_files(path)
    see(page, path.name)


def test_images_are_generated_step_by_step_and_nothing_covers_them(page):
    button = page.get_by_role("button", name="generate", exact=True).bounding_box()
    settings = page.get_by_label("seed").bounding_box()
    assert button["y"] < settings["y"]
    click(page, "generate")
    see(page, "Step 20 of 20")
    images = page.locator(".addp-tiles img")
    assert images.count() == 4 + 4 * 10  # the images, and ten of their steps
    first = images.first
    assert first.evaluate("element => getComputedStyle(element).imageRendering") == "pixelated"
    assert first.bounding_box()["width"] >= 100
    for n in range(4):  # what lies at the corners of an image is the image itself
        covered = images.nth(n).evaluate(
            """element => {
                element.scrollIntoView({block: 'center'});
                const box = element.getBoundingClientRect();
                const corners = [[3, 3], [box.width - 3, 3], [3, box.height - 3], [box.width - 3, box.height - 3]];
                return corners.some(([x, y]) => document.elementFromPoint(box.left + x, box.top + y) !== element);
            }"""
        )
        assert not covered
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_stop_ends_what_runs_and_what_waits(served, browser, wide):
    with visit(served, browser, PHONE) as other:
        served.gate.clear()
        served.steps.clear()
        click(wide, "generate")
        see(wide, page_module.WAITING)
        click(other, "generate")
        see(other, page_module.WAITING)
        click(other, "stop")
        click(wide, "stop")
        wide.wait_for_timeout(300)  # until the server knows
        served.gate.set()
        see(wide, "Stopped after step 1 of 20")
        see(other, "Stopped before the first step")
        assert len(served.steps) == 1


def test_closing_the_page_stops_its_sampling(served, browser, wide):
    with visit(served, browser, SCREEN) as other:
        served.gate.clear()
        served.steps.clear()
        click(other, "generate")
        see(other, page_module.WAITING)
        for _ in range(40):  # until its first step has begun, which the gate holds
            if served.steps:
                break
            other.wait_for_timeout(250)
    for _ in range(40):  # until the server knows
        if len(served.left) == len(served.visits) - 1:
            break
        wide.wait_for_timeout(250)
    served.gate.set()
    click(wide, "generate")
    see(wide, "Step 20 of 20")
    assert len(served.steps) == 1 + 20


def test_a_painted_part_is_filled(served, wide):
    open_tab(wide, "inpaint")
    canvas, invitation = wide.locator("canvas").first, wide.get_by_text("select the draw tool")
    canvas.wait_for()
    invitation.wait_for()
    click(wide, "fill")
    see(wide, "Upload an image first")
    wide.get_by_text("Waiting for its turn").wait_for(state="hidden")
    wide.locator("input[type=file]").first.set_input_files(served.root / "photos" / "0.png")
    invitation.wait_for(state="hidden")
    wide.wait_for_timeout(500)  # the editor draws the image without telling
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    wide.mouse.move(x - 20, y)
    wide.mouse.down()
    wide.mouse.move(x + 20, y + 10, steps=4)
    wide.mouse.up()
    wide.wait_for_timeout(500)  # until the editor has taken the stroke in
    click(wide, "fill")
    see(wide, "Step 20 of 20")
    see(wide, "image 3, step by step")


def test_features_of_an_upload_are_shown_and_a_bad_file_is_one_line(served, page):
    open_tab(page, "features")
    bad = served.root / "bad.png"
    bad.write_text("no image")
    upload(page, bad)
    click(page, "show features")
    see(page, "cannot be read as an image")
    page.get_by_label("Clear").or_(page.get_by_label("Remove")).locator("visible=true").first.click()
    upload(page, served.root / "photos" / "1.png")
    click(page, "show features")
    see(page, "nearest of 3 images")
    see(page, "1.00, photos/1.png")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.get_by_label("seed").locator("visible=true").count() == 0  # the sampler's settings are not of this tab


def test_the_curves_of_a_run_grow(served, wide):
    open_tab(wide, "runs")
    see(wide, "run: step ")
    step = len(served.steps) + 2
    with (served.run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1.0, "psnr": 20.0}) + "\n")
    (served.run / "images").mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), "red").save(served.run / "images" / f"sample-{step}.png")
    see(wide, f"run: step {step}, written")
    see(wide, f"sample, step {step}")
    assert wide.locator(".addp-tiles.wide img").locator("visible=true").count() == 3  # loss, psnr and the preview
