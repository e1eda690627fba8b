"""What the web page says, as HTML and tables: durations, states, predictions, curves, pictures, command lines."""

import base64
import html
import io
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import psutil

from ..data import images
from . import app_runs


SERIES = "training (running mean)", "validation"
GLYPHS = {app_runs.RUNNING: "●", app_runs.FINISHED: "✓", app_runs.STOPPED: "■", app_runs.FAILED: "✕"}
GLYPHS |= {app_runs.WAITING: "…"}

CSS, SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))


def duration(seconds):
    """Seconds in words, as exact as an estimate is: "45 s", "3 min 20 s", "2 h 10 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(round(seconds, -1) if seconds < 600 else seconds, 60)
    if minutes < 10:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def card(text, kind="", title=""):
    """A sentence, as HTML.

    Args:
        text: HTML.
        kind: good, bad, calm or busy.
        title: for the tab of the browser.
    """
    title = f' data-title="{say(title)}"' if title else ""
    return f'<div class="card {kind}"{title}>{text}</div>'


def empty(text):
    return f'<div class="empty">{text}</div>'


def say(text):
    """Text of a visitor or a script, as HTML."""
    return html.escape(str(text))


def status_card(state, sentence, step, steps, seconds_left, doing=None, ahead=0, best="", has_checkpoint=True):
    """How a run is, as HTML; `page.js` puts its `data-title` into the title of the tab.

    Args:
        state, sentence: of `app_runs.Run.outcome`.
        step, steps: how far it is, and of how many.
        seconds_left: None as long as nobody knows.
        doing: `run_logs.Doing` of one that is on.
        ahead: how many runs come before one that waits.
        best: of `validation_sentence`.
        has_checkpoint: whether one that was stopped can go on.
    """
    share = min(1.0, step / steps) if steps else 0.0
    bar = f'<div class="bar" data-step="{step}"><div style="width: {100 * share:.1f}%"></div></div>'
    count, best = f"step {step} of {steps}", f"<p>{say(best)}</p>" if best else ""
    if state == app_runs.RUNNING:
        left = f", about {duration(seconds_left)} left" if seconds_left is not None else ""
        phase = doing.phase if doing else "Training"
        said = f"<b>Training</b>: {count}{left}." if step else f"<b>{say(phase)}</b> …"
        line = f"<p><code>{say(doing.bar)}</code></p>" if step and doing and doing.bar else ""
        text = f"{said} You may close this page, it goes on.{bar}{line}{best}"
        return card(text, "busy", f"{share:.0%} {count}" if step else phase)
    if state == app_runs.WAITING:
        before = f"{ahead} other{'s' * (ahead != 1)} before it" if ahead else "it is the next one"
        return card(
            f"<b>Waiting</b> for its turn: {before}. It starts by itself; Stop takes it out.", "calm", "Waiting"
        )
    if state == app_runs.FINISHED:
        return card(f"<b>Finished</b> after {step} steps. {best}", "good")
    if state == app_runs.STOPPED:
        goes_on = ", before its first checkpoint. Resume begins anew."
        if has_checkpoint:
            goes_on = ", with a checkpoint. Resume goes on right there; “Use it as it is” makes the result of what it"
            goes_on += " has learned so far."
        return card(f"<b>Stopped</b> at {count}{goes_on}{bar}{best}", "calm")
    if state == app_runs.FAILED:
        return card(f"<b>Failed</b> at {count}. {say(sentence)}{bar}", "bad")
    return card("<b>Not started.</b>", "calm")


def validation_sentence(history, step):
    """The validation loss as a sentence; "" where there is too little of it.

    Args:
        history: `app_runs.History`.
        step: how far the run is.
    """
    losses = [(value, at) for at, value, _ in history.held_out]
    if len(losses) < 3:
        return ""
    (least, best), (last, at) = min(losses), losses[-1]
    said = f"Validation loss: best at step {best} ({least:.4f})"
    if best == at:
        return f"{said}, still improving."
    since = sum(when > best for _, when in losses)
    worse = f"{said}, now {last:.4f}: no better in the last {since} look{'s' * (since != 1)}"
    return f"{worse}. It no longer improves: stop?" if since >= PATIENCE and step else f"{worse}."


PATIENCE = 3  # looks at the validation loss without a better one, after which the page asks whether to stop


def prediction_card(memory_table, timed, flags, workspace):
    """What a run will take, as HTML.

    Args:
        memory_table: of `--estimate_memory`; None where the method has none.
        timed: `app_runs.TimedSteps`; None while the trial is on.
        flags: of the form.
        workspace: its disk counts.
    """
    available, facts, rest = psutil.virtual_memory().available / 2**20, [], ""
    peak = re.search(r"^\s*peak\s+(\d+) MB", memory_table, re.MULTILINE) if memory_table else None
    if peak:
        facts.append(f'<b class="big">{int(peak[1]) / 1024:.1f} GB</b> of memory, predicted')
        rest = f"<details><summary>By component</summary><pre>{say(memory_table.strip())}</pre></details>"
    if timed is None:
        facts.append("timing a few steps …")
    else:
        if not peak:
            facts.append(f'<b class="big">{timed.peak_mb / 1024:.1f} GB</b> of memory, measured')
        facts.append(f'<b class="big">{duration(timed.total(flags))}</b> in all, {timed.step:.2g} s a step, timed')
    facts.append(
        f"free: {available / 1024:.1f} GB of memory, {shutil.disk_usage(workspace.root).free / 2**30:.0f} GB of disk"
    )
    needed = int(peak[1]) if peak else timed.peak_mb if timed else 0
    warning = ""
    if needed > available:
        warning = "<p><b>That is more memory than is free:</b> close other programs, or choose fewer pixels.</p>"
    facts = "".join(f"<span>{fact}</span>" for fact in facts)
    return card(f'<div class="facts">{facts}</div>{warning}{rest}', "bad" if warning else "good" if timed else "busy")


def curve(history, most=400):
    """Losses as rows for the plot: the training loss as a running mean, and the validation loss."""
    rows, losses = [], [(step, value) for step, value, _ in history.loss]
    width = max(1, len(losses) // 20)
    every = max(1, len(losses) // most)
    for i in range(0, len(losses), every):
        near = [value for _, value in losses[max(0, i - width + 1) : i + 1]]
        rows.append((losses[i][0], sum(near) / len(near), SERIES[0]))
    rows += [(step, value, SERIES[1]) for step, value, _ in history.held_out]
    # The plot settles its colours by what it is given first.
    rows += [(0, None, series) for series in SERIES if rows and series not in {row[2] for row in rows}]
    return pd.DataFrame(rows, columns=["step", "loss", "series"])


def picture(path, alt):
    """An image that a click opens, as HTML; the server shows what lies in concepts and runs."""
    link = link_to(path)
    return f'<a href="{link}" target="_blank"><img src="{link}" alt="{say(alt)}"></a>'


def link_to(path):
    """The address of a file that the server shows, a new one when the file changes."""
    try:
        version = Path(path).stat().st_mtime_ns
    except OSError:  # deleted in between
        version = 0
    return f"./gradio_api/file={quote(str(path))}?v={version}"


def strip(grids):
    """Previews in time, as HTML: (path, step) of each."""
    shown = [
        f"<div><small>step {step}</small>{picture(path, f'Previews at step {step}')}</div>" for path, step in grids
    ]
    return f'<div class="strips" tabindex="0" role="group" aria-label="Previews in time">{"".join(shown)}</div>'


def pair(titles, columns):
    """Two groups of images side by side, as HTML; a click opens one.

    Args:
        titles: of the two.
        columns: two lists of paths, which the server may show.
    """
    figures = []
    for title, paths in zip(titles, columns):
        row = "".join(picture(path, title) for path in paths)
        figures.append(f'<figure><figcaption>{say(title)}</figcaption><div class="row">{row}</div></figure>')
    return f'<div class="pair">{"".join(figures)}</div>'


def slider(before, after, titles):
    """Two images of one size, one over the other, with a handle between them, as HTML.

    Args:
        before, after: paths, which the server may show.
        titles: of the two.
    """
    left, right = map(say, titles)
    return (
        f'<div class="slider"><img src="{link_to(after)}" alt="{right}">'
        f'<img class="before" src="{link_to(before)}" alt="{left}">'
        f'<span class="left">{left}</span><span class="right">{right}</span>'
        f'<input type="range" min="0" max="100" value="50" aria-label="How much is shown of {left}"></div>'
    )


def thumbnail(image):
    """A PIL image as the address of itself."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def shots(rows, fit):
    """Pictures of a concept with the part of each that is trained, and their captions to edit, as HTML.

    Args:
        rows: `workspace.PictureFacts`.
        fit: one of `command_lines.FITS`.
    """
    figures = []
    for row in rows:
        shot = '<div class="gone">cannot be shown</div>'
        if row.thumbnail is not None:
            squeezed = ' class="squeezed"' if fit == "squeezed" else ""
            frame = crop_frame(row.thumbnail.size) if fit == "cropped" else ""
            image = f'<img{squeezed} src="{thumbnail(row.thumbnail)}" alt="{say(row.name)}">'
            shot = f'<div class="shot">{image}{frame}</div>'
        name, caption, wrong = say(row.name), say(row.caption), " class='wrong'" if row.problems else ""
        figures.append(
            f'<figure{wrong} data-picture="{name}">{shot}'
            f'<textarea data-caption="{name}" value="{caption}" aria-label="Caption of {name}"'
            f' placeholder="a photo of {{}}">{caption}</textarea>'
            f'<div class="foot"><span>{name}</span>'
            f'<button class="small" data-remove="{name}" aria-label="Remove {name}">Remove</button></div></figure>'
        )
    return f'<div class="shots">{"".join(figures)}</div>'


def crop_frame(size):
    """The square that a picture (width, height) is cropped to, as HTML over it; "" for a square."""
    found = images.frame(size[1], size[0], 10_000, True)
    share = [kept / whole for kept, whole in zip(found.kept, found.scaled)]
    if min(share) > 0.99:
        return ""
    top, left = (round(100 * at / whole, 2) for at, whole in zip(found.crop, found.scaled))
    return f'<i style="top: {top}%; left: {left}%; width: {100 * share[1]:.2f}%; height: {100 * share[0]:.2f}%"></i>'


def tiles(subjects):
    """The demo's subjects, each of which one click teaches, as HTML: (name, title, PIL image) of each."""
    buttons = [
        f'<button data-teach="{say(name)}"><img src="{thumbnail(image)}" alt=""><b>{say(title)}</b>'
        "<span>Teach it this one</span></button>"
        for name, title, image in subjects
    ]
    return f'<div class="tiles">{"".join(buttons)}</div>' if buttons else ""


def command_box(text):
    """A command line, folded to its first line, with a button that copies the whole, as HTML."""
    if text.startswith("#"):
        return f'<div class="line"><span class="hint">As a command line: {say(text[1:].strip())}</span></div>'
    folded = " ".join(line.rstrip("\\").strip() for line in text.splitlines())
    return (
        f'<div class="line"><button class="small" data-copy="{say(text)}">Copy</button>'
        f'<details><summary aria-label="The same as a command line">{say(folded)}</summary>'
        f'<pre tabindex="0">{say(text)}</pre></details></div>'
    )


def downloads(run):
    """The files of a result, each to download, as HTML."""
    rows = []
    for path in run.result_files():
        size = path.stat().st_size
        shown = f"{size / 1e6:.1f} MB" if size > 1e5 else f"{size / 1e3:.1f} KB"
        rows.append(f'<a href="{link_to(path)}" download>{say(path.name)}</a> ({shown})')
    return f'<p class="downloads">{", ".join(rows)}</p>' if rows else ""


PROGRAMS = "diffusers", "ComfyUI", "Automatic1111"


def uses(run):
    """How to use a result in each of `PROGRAMS`, as Markdown: what its model card says."""
    text, found = card_text(run), {}
    for program in PROGRAMS:
        section = re.search(rf"^### {program}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
        found[program] = section[1].strip() if section else f"*This kind of result is not for {program}.*"
    return found


def card_text(run):
    """The model card of a run as it is shown before a push: without its metadata and what only the Hub can show."""
    try:
        text = (run.output / "README.md").read_text(encoding="utf-8", errors="replace")[:200_000]
    except OSError:
        return "*The card is written when the run is finished.*"
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).replace("<Gallery />", "")
    return re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"*(picture: \1)*", text)
