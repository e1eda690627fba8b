"""The web page in a real browser, from pictures to a download.

The README's picture is made by this test, with the page's own length of training instead of 30 steps:

    APP_SCREENSHOT=docs/app.png python -m pytest -n 0 tests/test_app_browser.py
"""

import contextlib
import io
import json
import os
import re
import shutil
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from PIL import Image
from test_app import serve

from personalization.web import app_runs


api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
SCREENSHOT = os.environ.get("APP_SCREENSHOT")
SLOW = 120_000  # milliseconds that a loaded machine may need for a step of the page

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here (apt-get install chromium)")


@pytest.fixture
def browser():
    with api.sync_playwright() as playwright:
        with contextlib.closing(playwright.chromium.launch(executable_path=BROWSER, args=FLAGS.split())) as started:
            yield started


@pytest.fixture
def root(tmp_path, repo):
    """The workspace; for the README it is where `make app` has it, for the sake of the command lines."""
    folder = repo / "workspace" if SCREENSHOT else tmp_path / "workspace"
    if folder.exists():
        pytest.fail(f"{folder} is somebody's: move it away first")
    yield folder
    if SCREENSHOT:
        shutil.rmtree(folder)


@pytest.fixture
def address(root):
    with serve(root) as url:
        yield url
    for path in root.glob("runs/*/run.json"):
        for process in app_runs.processes_of(app_runs.Run(path.parent).record.get("process")):
            with contextlib.suppress(psutil.Error):
                process.kill()


def open_page(browser, address):
    """A page of a visitor of its own, and the hosts that it has asked for anything."""
    page, hosts = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page(), set()
    page.set_default_timeout(SLOW)
    page.on("request", lambda request: hosts.add(re.split("[/:]+", request.url)[1]))
    page.goto(address)
    page.wait_for_selector("#found .empty, #found .card", state="attached")  # what it remembers is there
    return page, hosts


def step_of(page):
    """The step that the page says the run is at."""
    bar = page.locator("#status .bar")
    return int(bar.get_attribute("data-step")) if bar.count() else 0


def wait_until(page, condition):
    end = time.monotonic() + SLOW / 1000
    while not (found := condition()):
        assert time.monotonic() < end, page.locator("#status").inner_text()
        page.wait_for_timeout(200)
    return found


def tab(page, number):
    page.get_by_role("tab", name=f"{number} ·").click()


def picture_of(page, name, pictures):
    if SCREENSHOT:
        page.wait_for_timeout(1500)
        pictures[name] = Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def test_from_pictures_to_a_download(browser, address, root, subject, tmp_path, repo):
    page, hosts = open_page(browser, address)
    pictures = {}
    if SCREENSHOT:
        subject = repo / "demo" / "subjects" / "striped_star"

    # Pictures: uploaded, and a caption is edited.
    page.locator("#concept input").fill("my-toy")
    page.keyboard.press("Enter")
    page.locator("#upload input[type=file]").set_input_files(
        [*sorted(subject.glob("*.png")), subject / "metadata.jsonl"]
    )
    page.wait_for_selector("#found :text('5 pictures, nothing wrong')")
    assert page.locator("#gallery img").count() == 5
    assert "initializer" not in page.locator("#command").inner_text()  # it says what is missing instead
    page.locator("#captions [data-testid='cell-0-1']").dblclick()
    metadata = root / "concepts" / "my-toy" / "metadata.jsonl"
    caption = json.loads(metadata.read_text().splitlines()[0])["text"].replace("a {}", "the {}")  # as true as before
    page.locator("#captions textarea:visible").fill(caption)
    page.keyboard.press("Enter")
    wait_until(page, lambda: caption in metadata.read_text())
    page.wait_for_selector("#saved :text('Saved in metadata.jsonl')")
    picture_of(page, "pictures", pictures)

    # Model and method: the command line is in view and follows the form.
    page.click("#to-model")
    page.locator("#class-word textarea, #class-word input").first.fill(subject.name.split("_")[-1])
    page.get_by_text("More settings").click()
    if not SCREENSHOT:
        page.locator("#max-train-steps input").fill("30")
        page.locator("#validation-steps input").fill("10")
        page.locator("#num-validation-images input").fill("2")
        others = page.locator("#others textarea, #others input").first
        others.fill("--logging_steps 1 --checkpointing_steps 1000")
        wait_until(page, lambda: "--logging_steps 1" in page.locator("#command").inner_text())
    command = wait_until(page, lambda: "initializer" in (t := page.locator("#command").inner_text()) and t)
    assert "accelerate launch" in command and "<my-toy>" in command
    if SCREENSHOT:
        page.get_by_text("More settings").click()  # folded again
        page.click("#predict")
        page.wait_for_selector("#prediction .good")
        picture_of(page, "model", pictures)

    # Training: curve and grid appear, the page is loaded again in the middle, stopped, resumed.
    page.click("#start")
    wait_until(page, lambda: step_of(page) >= 2)
    page.wait_for_selector("#samples img")
    if not SCREENSHOT:
        page.reload()
        page.wait_for_selector("#status .bar")
        assert page.get_by_role("tab", name="3 ·").get_attribute("aria-selected") == "true"
        page.click("#stop")
        page.wait_for_selector("#status :text('Stopped')")
        stopped_at = step_of(page)
        assert 2 <= stopped_at < 30
        run = app_runs.Run(root / "runs" / "my-toy-1")
        assert [path.name for path in app_runs.list_checkpoints(run.output)] == [f"checkpoint-{stopped_at}"]
        other, _ = open_page(browser, address)  # another visitor finds it, too
        other.wait_for_selector("#status :text('Stopped')")
        other.close()
        page.click("#resume")
        wait_until(page, lambda: page.locator("#status :text('Training')").count() and step_of(page) > stopped_at)
    page.wait_for_selector("#curve canvas, #curve svg")
    page.wait_for_selector("#status :text('Finished')", timeout=4 * SLOW)
    picture_of(page, "training", pictures)
    if not SCREENSHOT:
        assert "Resumed from" in run.log_tail(10**6)

    # Result: drawn, side by side, and downloaded.
    page.click("#to-result")
    page.wait_for_selector("#comparison img")
    page.click("#draw")
    page.wait_for_selector("#drawn img")
    page.wait_for_selector("#drawing .card", state="detached")
    assert page.locator("#drawn img").count() == 8
    assert page.evaluate("Array.from(document.images).every(image => image.complete && image.naturalWidth > 0)")
    picture_of(page, "result", pictures)
    with page.expect_download() as download:
        page.click("#package")
    saved = tmp_path / "result.zip"
    download.value.save_as(saved)
    with zipfile.ZipFile(saved) as archive:
        assert {"my-toy-1/learned_embeds.safetensors", "my-toy-1/README.md"} <= set(archive.namelist())
    assert hosts <= {"127.0.0.1"}, "the page asks nobody else"
    if SCREENSHOT:
        write_screenshot(pictures, repo / SCREENSHOT)


def write_screenshot(pictures, path):
    """The steps side by side, small."""
    shots = [
        pictures[name].resize((800, 625), Image.Resampling.LANCZOS)
        for name in ("pictures", "model", "training", "result")
    ]
    sheet = Image.new("RGB", (800 * 2, 625 * 2), "white")
    for i, shot in enumerate(shots):
        sheet.paste(shot, (800 * (i % 2), 625 * (i // 2)))
    sheet.quantize(128, dither=Image.Dither.NONE).save(Path(path), optimize=True)


def test_errors_are_sentences(browser, address, root, subject):
    """A path outside, nothing to train on; the tab of a run that is on is closed, and the run goes on."""
    page, _ = open_page(browser, address)
    for typed in ("/etc", "../.."):
        page.locator("#folder input").fill(typed)
        page.keyboard.press("Enter")
        page.click("#copy-folder")
        page.wait_for_selector(".toast-body :text('outside the workspace')")
        page.locator(".toast-close").first.click()
    tab(page, 2)
    page.click("#start")
    page.wait_for_selector(".toast-body :text('There are no pictures yet')")
    page.locator(".toast-close").first.click()
    tab(page, 1)
    page.locator("#folder input").fill(str(subject))
    page.keyboard.press("Enter")
    page.click("#copy-folder")
    page.wait_for_selector("#found :text('nothing wrong')")
    tab(page, 2)
    page.click("#start")
    page.wait_for_selector("#status :text('Starting')")
    page.close()
    (folder,) = (root / "runs").glob("*/")
    run, histories = app_runs.Run(folder), app_runs.Histories()
    end = time.monotonic() + SLOW / 1000
    while not histories.read(run.output).loss and time.monotonic() < end:
        time.sleep(0.3)
    assert run.outcome() == (app_runs.RUNNING, "")
