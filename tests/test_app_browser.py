"""The web page in a real browser, from pictures to a download, at a desk and on a phone, in the light and the dark.

The pictures of docs/web.md are made by this test, with the page's own length of training instead of 30 steps:

    APP_SCREENSHOTS=docs python -m pytest -n 0 tests/test_app_browser.py

Another folder than docs/ gets every step in both widths and themes as a file of its own, too.
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
axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
SCREENSHOTS = os.environ.get("APP_SCREENSHOTS")
AXE = (Path(axe.__path__[0]) / "axe.min.js").read_text(encoding="utf-8")
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
    folder = repo / "workspace" if SCREENSHOTS else tmp_path / "workspace"
    if folder.exists():
        pytest.fail(f"{folder} is somebody's: move it away first")
    yield folder
    if SCREENSHOTS:
        shutil.rmtree(folder)


@pytest.fixture
def address(root):
    with serve(root) as url:
        yield url
    for path in root.glob("runs/*/run.json"):
        for process in app_runs.processes_of(app_runs.Run(path.parent).record.get("process")):
            with contextlib.suppress(psutil.Error):
                process.kill()


DESK, PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}


def open_page(browser, address):
    """A page of a visitor of its own, and the hosts that it has asked for anything."""
    context = browser.new_context(viewport=DESK, permissions=["clipboard-read", "clipboard-write"])
    page, hosts = context.new_page(), set()
    page.set_default_timeout(SLOW)
    page.on("dialog", lambda dialog: dialog.accept())
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


def value_of(page, selector):
    return page.locator(f"{selector} textarea, {selector} input").first.input_value()


def fill(page, selector, text):
    page.locator(f"{selector} textarea, {selector} input").first.fill(text)


def choose(page, selector, text):
    """Types a value into a list that takes any."""
    page.locator(f"{selector} input").fill(text)
    page.keyboard.press("Enter")


def close_toasts(page):
    """Closes what is said in the corner; by script, since each may leave by itself just then."""
    page.evaluate("for (const close of document.querySelectorAll('.toast-close')) close.click()")
    page.wait_for_selector(".toast-body", state="detached")


def toast(page, text):
    """Waits for a sentence in the corner, and closes it."""
    shown = page.wait_for_selector(f".toast-body:has-text({text!r})").inner_html()
    close_toasts(page)
    return shown


def serious_faults(page):
    """What axe-core finds, and calls serious or worse, in both themes."""
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(AXE)
    faults = []
    for theme in ("light", "dark"):
        page.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)
        page.wait_for_timeout(400)  # colours fade over
        for found in page.evaluate("async () => (await axe.run()).violations"):
            if found["impact"] in ("serious", "critical"):
                nodes = [node["html"][:160] for node in found["nodes"]]
                faults += [(theme, found["id"], found["help"], node) for node in nodes]
    page.evaluate("document.body.classList.remove('dark')")
    return faults


def look(page, name, shots):
    """What is to be seen of each step: no serious fault, nothing beside a phone's screen; and its pictures."""
    close_toasts(page)  # Gradio's own, and over what is looked at
    faults = serious_faults(page)
    assert not faults, f"{name}: {faults}"
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(400)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= PHONE["width"], f"{name} is {wide} pixels wide on a phone"
    steps = [page.get_by_role("tab", name=f"{number} ·") for number in (1, 2, 3, 4)]
    assert all(step.is_visible() for step in steps), f"{name}: not all steps are to be seen on a phone"
    page.set_viewport_size(DESK)
    if SCREENSHOTS:
        for width, viewport in (("desk", DESK), ("phone", PHONE)):
            page.set_viewport_size(viewport)
            for theme in ("light", "dark"):
                page.evaluate("theme => document.body.classList.toggle('dark', theme === 'dark')", theme)
                page.wait_for_timeout(1200)
                shots[name, width, theme] = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        page.evaluate("document.body.classList.remove('dark')")
        page.set_viewport_size(DESK)


def test_from_pictures_to_a_download(browser, address, root, subject, tmp_path, repo):
    page, hosts = open_page(browser, address)
    shots = {}
    if SCREENSHOTS:
        subject = repo / "demo" / "subjects" / "striped_star"

    # An empty page has something to try.
    page.wait_for_selector("#tiles button")
    look(page, "empty", shots)

    # Pictures: uploaded, and a caption is edited under its picture.
    choose(page, "#concept", "my-toy")
    page.locator("#upload input[type=file]").set_input_files(
        [*sorted(subject.glob("*.png")), subject / "metadata.jsonl"]
    )
    page.wait_for_selector("#found :text('5 pictures, nothing wrong')")
    assert page.locator("#shots img").count() == 5
    assert "plain word" in page.locator("#command").inner_text()  # it says what is missing instead
    metadata = root / "concepts" / "my-toy" / "metadata.jsonl"
    caption = json.loads(metadata.read_text().splitlines()[0])["text"].replace("a {}", "the {}")  # as true as before
    page.locator("#shots textarea").first.fill(caption)
    page.keyboard.press("Tab")
    wait_until(page, lambda: caption in metadata.read_text())
    page.wait_for_selector("#saved :text('Saved in metadata.jsonl')")
    look(page, "pictures", shots)

    # Model and method: the command line is in view, folded, and follows the form; it is copied whole.
    page.click("#to-model")
    fill(page, "#class-word", subject.name.split("_")[-1])
    page.get_by_text("More settings").click()
    if not SCREENSHOTS:
        page.locator("#max-train-steps input").fill("30" if SCREENSHOTS else "400")
        page.locator("#validation-steps input").fill("10")
        page.locator("#num-validation-images input").fill("2")
        fill(page, "#others", "--center_crop --logging_steps 5 --checkpointing_steps 1000")
        wait_until(page, lambda: "--logging_steps 5" in page.locator("#command").inner_text())
    wait_until(page, lambda: "initializer" in page.locator("#command").inner_text())
    page.get_by_text("More settings").click()  # folded again
    page.locator("#command [data-copy]").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"cd {repo}") and "accelerate" in copied and "'<my-toy>'" in copied
    assert page.locator("#command").bounding_box()["height"] < 60, "one line"
    if SCREENSHOTS:
        page.click("#predict")
        page.wait_for_selector("#prediction .good")
    look(page, "model", shots)

    # Training: phases, then curve and previews; the page is loaded again in the middle, and a second run waits.
    page.click("#start")
    page.wait_for_selector("#status .busy")
    wait_until(page, lambda: step_of(page) >= 2)
    page.wait_for_selector("#samples img")
    wait_until(page, lambda: re.search(r"\d+% step \d+ of", page.title()))
    if not SCREENSHOTS:
        page.reload()
        page.wait_for_selector("#status .bar")
        assert page.get_by_role("tab", name="3 ·").get_attribute("aria-selected") == "true"
        tab(page, 2)
        page.click("#start")
        page.wait_for_selector("#status :text('Waiting')")
        other, _ = open_page(browser, address)  # another visitor begins with a new concept, and may look
        assert other.locator("#concept input").input_value() == "" and other.locator("#tiles button").count()
        tab(other, 3)
        other.wait_for_selector("#status .card")
        other.close()
        page.click("#stop")
        page.wait_for_selector("#status :text('Not started')")
        page.get_by_text("Rename or delete this run").click()
        page.click("#delete-run")
        wait_until(page, lambda: not (root / "runs" / "my-toy-2").exists())
        page.wait_for_selector("#status :text('Training')")
        page.click("#stop")
        page.wait_for_selector("#status :text('Stopped')")
        stopped_at = step_of(page)
        assert 2 <= stopped_at < 400
        run = app_runs.Run(root / "runs" / "my-toy-1")
        assert [path.name for path in app_runs.list_checkpoints(run.output)] == [f"checkpoint-{stopped_at}"]
        look(page, "stopped", shots)
        page.click("#finish")  # a stopped run has a result, too
    page.wait_for_selector("#curve canvas, #curve svg")
    page.wait_for_selector("#status :text('Finished')", timeout=4 * SLOW)
    look(page, "training", shots)
    if not SCREENSHOTS:
        assert "Resumed from" in run.log_tail(10**6)

    # Result: generated, side by side, how to use it, and downloaded.
    page.click("#to-result")
    page.wait_for_selector("#comparison .slider img")
    page.locator("#comparison input").fill("20")
    assert "20%" in page.locator("#comparison .slider").get_attribute("style")
    fill(page, "#prompt", "a photo of a dog")
    page.click("#draw")
    page.wait_for_selector("#drawing .bad:has-text('into the prompt')")  # an error ends the busy card
    fill(page, "#prompt", "a photo of a {} in the snow")
    page.click("#draw")
    page.wait_for_selector("#drawn img")
    page.wait_for_selector("#drawing .card", state="detached")
    wait_until(page, lambda: page.locator("#drawn img").count() == 8)
    wait_until(page, lambda: page.evaluate("Array.from(document.images).every(image => image.naturalWidth > 0)"))
    page.get_by_role("tab", name="ComfyUI").click()
    page.wait_for_selector("#use-comfyui :text('embedding:my-toy')")
    assert page.locator("#files a").count() >= 2
    look(page, "result", shots)
    with page.expect_download() as download:
        page.click("#package")
    saved = tmp_path / "result.zip"
    download.value.save_as(saved)
    with zipfile.ZipFile(saved) as archive:
        assert {"my-toy-1/learned_embeds.safetensors", "my-toy-1/README.md"} <= set(archive.namelist())
    tab(page, 1)
    page.get_by_text("Rename or delete this concept").click()
    page.click("#delete-concept")
    wait_until(page, lambda: not (root / "concepts" / "my-toy").exists() and value_of(page, "#concept") == "")
    page.wait_for_selector("#tiles button")
    assert hosts <= {"127.0.0.1"}, "the page asks nobody else"
    if SCREENSHOTS:
        write_screenshots(shots, repo / SCREENSHOTS, repo)


def test_no_wrong_start(browser, root, tmp_path, repo):
    """What began wrong runs before: the rate, the concept, the crop, words that no base knows; a server anew."""
    Image.effect_noise((300, 400), 60).convert("RGB").save(tmp_path / "tall.png")
    with serve(root) as address:
        port = int(address.rsplit(":", 1)[1].strip("/"))
        page, _ = open_page(browser, address)
        page.locator("#upload input[type=file]").set_input_files([tmp_path / "tall.png"])
        page.wait_for_selector("#shots .shot i")  # a photo of 3:4 shows its crop
        wait_until(page, lambda: value_of(page, "#concept") == "my-concept")
        tab(page, 2)
        fill(page, "#class-word", "golden retriever")
        wait_until(page, lambda: "--center_crop" in page.locator("#command").inner_text())
        page.click("#start")
        toast(page, "is 2 words")
        assert not list((root / "runs").iterdir())

        # A LoRA on a real base has that base's rate.
        page.get_by_text("A LoRA (selective)").click()
        wait_until(
            page, lambda: "2e-3" in page.locator("#command").inner_text() or "0.002" in page.inner_text("#command")
        )
        choose(page, "#base", "user/stable-diffusion")
        wait_until(page, lambda: "user/stable-diffusion" in page.inner_text("#command"))
        wait_until(page, lambda: "learning_rate" not in page.inner_text("#command"))

        # Settings are a concept's own; the next visitor begins with none, and its pictures are its own.
        tab(page, 1)
        choose(page, "#concept", "another")
        wait_until(page, lambda: value_of(page, "#class-word") == "")
        choose(page, "#concept", "my-concept")
        page.wait_for_selector("#shots .shot")
        other, _ = open_page(browser, address)
        assert value_of(other, "#concept") == "" and not other.locator("#shots img").count()
        other.locator("#upload input[type=file]").set_input_files([tmp_path / "tall.png"])
        other.wait_for_selector("#shots .shot")
        wait_until(other, lambda: value_of(other, "#concept") == "my-concept-2")
        other.close()

        # What is typed is no HTML.
        choose(page, "#folder", "<img src=x>")
        page.click("#copy-folder")
        assert "<img" not in toast(page, "is not a folder")
    with serve(root, port=port):
        with contextlib.suppress(api.Error):  # the page, too, reloads when it finds the server
            page.reload()
        page.wait_for_selector("#shots .shot")
        wait_until(page, lambda: value_of(page, "#concept") == "my-concept")  # remembered over a start of the server


def write_screenshots(shots, folder, repo):
    """The steps side by side, small, as docs/web.md shows them; elsewhere each by itself, too."""
    names = "empty", "pictures", "model", "training", "result"
    for width, size in (("desk", (800, 625)), ("phone", (234, 506))):
        row = [shots[name, width, "light"].resize(size, Image.Resampling.LANCZOS) for name in names]
        row.append(shots["result", width, "dark"].resize(size, Image.Resampling.LANCZOS))
        columns = 2 if width == "desk" else len(row)
        sheet = Image.new("RGB", (size[0] * columns, size[1] * -(-len(row) // columns)), "white")
        for i, shot in enumerate(row):
            sheet.paste(shot, (size[0] * (i % columns), size[1] * (i // columns)))
        name = "app.png" if width == "desk" else "app_phone.png"
        sheet.quantize(128, dither=Image.Dither.NONE).save(folder / name, optimize=True)
    if folder.resolve() != (repo / "docs").resolve():
        for (name, width, theme), shot in shots.items():
            shot.save(folder / f"{name}-{width}-{theme}.png")


def test_errors_are_sentences(browser, address, root, subject):
    """A path outside, nothing to train on; one click trains, the page is closed, and the run goes on."""
    page, _ = open_page(browser, address)
    for typed in ("/etc", "../.."):
        choose(page, "#folder", typed)
        page.click("#copy-folder")
        toast(page, "outside the workspace")
    tab(page, 2)
    fill(page, "#class-word", "star")
    page.click("#start")
    toast(page, "There are no pictures yet")
    tab(page, 1)
    clicked = time.monotonic()
    page.locator("#tiles button:has-text('Teach it')").first.click()  # one click from an empty page to a training
    page.wait_for_selector("#status :text('Starting')")
    wait_until(page, lambda: value_of(page, "#concept") == subject.name)
    if SCREENSHOTS:  # in full length, on a quiet machine
        page.wait_for_selector("#status :text('Finished')", timeout=4 * SLOW)
        print(f"From one click to the result: {time.monotonic() - clicked:.0f} s")
        assert time.monotonic() - clicked < 120
        return
    page.close()
    (folder,) = (root / "runs").glob("*/")
    run, histories = app_runs.Run(folder), app_runs.Histories()
    end = time.monotonic() + SLOW / 1000
    while not histories.read(run.output).loss and time.monotonic() < end:
        time.sleep(0.3)
    assert run.outcome() == (app_runs.RUNNING, "")
