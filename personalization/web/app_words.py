"""What the web page says about runs: durations, states, predictions, curves and pictures, as HTML and tables."""

import html
import re
import shutil
from urllib.parse import quote

import pandas as pd
import psutil

from . import app_runs


SERIES = "training (running mean)", "validation"
GLYPHS = {app_runs.RUNNING: "●", app_runs.FINISHED: "✓", app_runs.STOPPED: "■", app_runs.FAILED: "✕"}

CSS = """
.gradio-container, .gradio-container > main { width: min(1180px, 100%) !important; margin: auto; }
html { scroll-padding-bottom: 180px; } .gradio-container::after { content: ""; display: block; height: 180px; }
#title h1 { margin: 0 0 2px; font-size: 26px; } #title p { margin: 0; opacity: .75; }
#command { position: fixed; bottom: 0; left: 50%; transform: translateX(-50%); width: min(1132px, 100vw); z-index: 20;
  box-shadow: 0 -6px 22px rgba(0, 0, 0, .13); border-radius: 12px 12px 0 0; }
#command .cm-editor, #command .cm-scroller { max-height: 104px; overflow: auto; }
#command .cm-content { font-size: 12px; padding-top: 0; }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 16px; line-height: 1.55;
  background: var(--background-fill-secondary); }
.card.good { border-left: 4px solid #16a34a; } .card.bad { border-left: 4px solid #dc2626; }
.card.busy { border-left: 4px solid var(--color-accent); } .card.calm { border-left: 4px solid #d97706; }
.card b.big { font-size: 19px; font-weight: 650; margin-right: 4px; } .card .facts { display: flex; gap: 34px; }
.bar { height: 9px; border-radius: 6px; background: var(--border-color-primary); margin-top: 9px; overflow: hidden; }
.bar div { height: 100%; background: var(--color-accent); transition: width .6s; }
.empty { text-align: center; padding: 36px 12px; opacity: .7; }
.strips { max-height: 330px; overflow-y: auto; padding-right: 6px; } .strips small { opacity: .8; }
.strips img { width: 100%; border-radius: 8px; display: block; margin: 2px 0 10px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; margin-bottom: 8px; } .pair figure { margin: 0; }
.pair figcaption { padding: 2px 2px 6px; opacity: .8; } .pair a { flex: 1; } .pair .row { display: flex; gap: 6px; }
.pair img { width: 100%; border-radius: 8px; display: block; }
footer { display: none !important; }
"""


def duration(seconds):
    """Seconds in words, as exact as an estimate is: "45 s", "3 min 20 s", "2 h 10 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(round(seconds, -1) if seconds < 600 else seconds, 60)
    if minutes < 10:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def card(text, kind=""):
    return f'<div class="card {kind}">{text}</div>'


def empty(text):
    return f'<div class="empty">{text}</div>'


def say(text):
    """Text of a visitor or a script, as HTML."""
    return html.escape(str(text))


def status_card(state, sentence, step, steps, seconds_left):
    """How a run is, as HTML."""
    share = min(1.0, step / steps) if steps else 0.0
    bar = f'<div class="bar" data-step="{step}"><div style="width: {100 * share:.1f}%"></div></div>'
    count = f"step {step} of {steps}"
    if state == app_runs.RUNNING:
        left = f", about {duration(seconds_left)} left" if seconds_left is not None else ""
        doing = f"<b>Training</b>: {count}{left}" if step else "<b>Starting</b>: loading the model and the pictures"
        return card(f"{doing}. You may close this page, it goes on.{bar}", "busy")
    if state == app_runs.FINISHED:
        return card(f"<b>Finished</b> after {step} steps. ", "good")
    if state == app_runs.STOPPED:
        return card(f"<b>Stopped</b> at {count}, with a checkpoint. Resume goes on right there.{bar}", "calm")
    if state == app_runs.FAILED:
        return card(f"<b>It broke off</b> at {count}. {say(sentence)}{bar}", "bad")
    return card("<b>Not started.</b>", "calm")


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


def picture(path):
    """An image that a click opens, as HTML; the server shows what lies in concepts and runs."""
    link = f"./gradio_api/file={quote(str(path))}"
    return f'<a href="{link}" target="_blank"><img src="{link}" alt=""></a>'


def strip(path, title):
    """An image with a title above it, as HTML."""
    return f"<small>{say(title)}</small>{picture(path)}"


def pair(titles, columns):
    """Two groups of images side by side, as HTML; a click opens one.

    Args:
        titles: of the two.
        columns: two lists of paths, which the server may show.
    """
    figures = []
    for title, paths in zip(titles, columns):
        row = "".join(picture(path) for path in paths)
        figures.append(f'<figure><figcaption>{say(title)}</figcaption><div class="row">{row}</div></figure>')
    return f'<div class="pair">{"".join(figures)}</div>'


def card_text(run):
    """The model card of a run as it is shown before a push: without its metadata and what only the Hub can show."""
    try:
        text = (run.output / "README.md").read_text(encoding="utf-8", errors="replace")[:200_000]
    except OSError:
        return "*The card is written when the run is finished.*"
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).replace("<Gallery />", "")
    return re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"*(picture: \1)*", text)
