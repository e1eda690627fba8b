#!/usr/bin/env python
# Copyright 2026 The ZOODiP textual inversion authors. SPDX-License-Identifier: Apache-2.0
#
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11", "diffusers>=0.42.1", "transformers>=5.23", "accelerate>=1.15", "peft>=0.21",
#     "huggingface_hub>=2.4", "datasets>=5.2", "safetensors>=0.8", "bitsandbytes>=0.50", "psutil>=7.2", "Jinja2>=3.1",
#     "matplotlib>=3.10", "numpy>=2.0", "pillow>=12.0", "tensorboard>=2.21", "tqdm>=4.66", "gradio>=6.31,<7",
# ]
# ///
"""A web page on which a diffusion model learns a concept from a few photos, with the scripts of this repository.

    python app.py                               # http://127.0.0.1:7860, everything in ./workspace
    python app.py --workspace /data/concepts --read /data/photos --port 8000

The page trains nothing itself: what is chosen on it becomes the command line of a script, shown to copy, and runs as a
process of its own that outlives the page and the server.
"""

import os


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # the page tells nobody that it is used

import personalization.quick_help  # noqa: F401, before the libraries that take seconds
import personalization.quiet  # noqa: F401, before the libraries whose false alarms it silences


# isort: split
import contextlib
import functools
import importlib.util
import inspect
import re
import shlex
import socket
import sys
import tempfile
import time
from pathlib import Path


if __name__ == "__main__" and importlib.util.find_spec("gradio") is None:
    sys.exit("app.py: error: The page needs Gradio: pip install -r requirements-app.txt")

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from personalization import flags
from personalization.errors import InputError, quoted, run_script
from personalization.web import app_runs, queue, run_logs
from personalization.web.app_words import (
    CSS,
    GLYPHS,
    PROGRAMS,
    SCRIPT,
    SERIES,
    card,
    card_text,
    command_box,
    curve,
    downloads,
    empty,
    pair,
    prediction_card,
    say,
    shots,
    slider,
    status_card,
    strip,
    tiles,
    uses,
    validation_sentence,
)
from personalization.web.checks import LABELS as FIELDS
from personalization.web.command_lines import (
    DEMO_BASE,
    METHODS,
    REPO,
    Form,
    default_flags,
    fit_of,
    flag_words,
    is_demo,
    offered_methods,
    read_others,
    shown,
    to_copy,
)
from personalization.web.guard import Guard, is_loopback
from personalization.web.workspace import Workspace, is_text, model_resolution, safe_name


SUBJECTS = REPO / "demo" / "subjects"
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PROMPT = "a photo of a {} on the beach"
POLL_SECONDS = 1.5
PICTURES, MODEL, TRAINING, RESULT = range(4)  # the steps of the page


# =====================================================================================================
# What the handlers share
# =====================================================================================================


def check_values(values):
    """Refuses what no page sends, and no folder, command line or answer can hold.

    Raises:
        InputError: a text has half characters or zero bytes in it or is endless, or a number is none.
    """
    for value in values:
        if isinstance(value, (list, tuple)):
            check_values(value)
        elif isinstance(value, str) and not is_text(value):
            raise InputError("A text on the page is too long, or not all of it is characters: correct it.")
        elif isinstance(value, (int, float)) and not abs(value) < 2**53:
            raise InputError("A number on the page is too large, or is none: correct it.")


@contextlib.contextmanager
def door(values):
    """What every handler stands behind: its values are judged, an `InputError` is shown as one sentence.

    The browser takes such a sentence for HTML, so it is made some.
    """
    try:
        check_values(values)
        yield
    except InputError as error:
        raise gr.Error(say(error), duration=12, print_exception=False) from None


def answering(handler):
    """A handler behind the `door`."""

    @functools.wraps(handler)
    def plain(*values):
        with door(values):
            return handler(*values)

    @functools.wraps(handler)
    def generator(*values):
        with door(values):
            yield from handler(*values)

    return generator if inspect.isgeneratorfunction(handler) else plain


def in_its_card(handler):
    """A generator of cards whose last one says what went wrong, if anything did: no card is busy for ever."""

    @functools.wraps(handler)
    def generator(*values):
        try:
            yield from handler(*values)
        except InputError as error:
            yield card(say(error), "bad")

    return generator


def tell(text):
    """Says something in a corner of the page for a while."""
    gr.Info(say(text), duration=5)


def said_by(event, name):
    """A text that `page.js` or a component's own script sends with an event; "" where it is none."""
    value = event._data.get(name) if isinstance(event._data, dict) else None
    check_values([value])
    return value if isinstance(value, str) else ""


def read_form(concept, base, method, class_word, subject, prompt, others, *fields):
    """The `Form` of what stands on the page; `fields` in the order of `FIELDS`."""
    values = {}
    for name, value in zip(FIELDS, fields):
        if value is not None and value != "":
            try:
                values[name] = int(value) if is_whole(name) else float(value)
            except (TypeError, ValueError, OverflowError):
                raise InputError(f"{FIELDS[name]}: {quoted(value)} is no number.") from None
    if method not in offered_methods():
        raise InputError("Choose a method first.")
    concept, base, word = str(concept or "").strip(), str(base or "").strip(), str(class_word or "").strip()
    return Form(
        concept=concept,
        base=base,
        method=method,
        class_word=word,
        subject=str(subject or "").strip() or automatic_subject(concept, base, method, word),
        prompt=str(prompt or ""),
        flags=values,
        others=str(others or ""),
    )


def automatic_subject(concept, base, method, class_word):
    """What a concept is called in prompts where nobody said: <my-dog>, or sks dog; the demo base knows no sks."""
    if METHODS[method].makes_a_word:
        return f"<{safe_name(concept or 'my-concept').lower()}>"
    return class_word if is_demo(base) else f"sks {class_word}".strip()


def is_whole(name):
    """Whether a flag of `FIELDS`, which all methods have, takes whole numbers."""
    return METHODS["word"].flags[name]["kind"] == "whole number"


def default_values(method, base):
    """Values of the fields that fit a method and a base: the other flags, then `FIELDS`."""
    if method not in offered_methods():
        raise InputError("Choose a method first.")
    flags = default_flags(method, base)
    fields = [flags.pop(name, None) for name in FIELDS]
    return [shlex.join(flag_words(flags)), *fields]


def form_values(form):
    """A `Form` as values of the page, in the order that `read_form` takes them, without the concept."""
    subject = (
        ""
        if form.subject == automatic_subject(form.concept, form.base, form.method, form.class_word)
        else form.subject
    )
    fields = [form.flags.get(name) for name in FIELDS]
    fields = [value if type(value) in (int, float) else None for value in fields]  # whatever a record says
    return [form.base, form.method, form.class_word, subject, form.prompt, form.others, *fields]


def new_form_values():
    """The same for a concept of which nobody has said anything yet."""
    base = str(DEMO_BASE) if DEMO_BASE.is_dir() else STABLE_DIFFUSION
    return [base, "word", "", "", PROMPT, *default_values("word", base)]


@functools.cache
def demo_subjects():
    """(name, title, first picture) of the demo's."""
    found = []
    for folder in sorted(SUBJECTS.glob("*/")):
        if pictures := sorted(folder.glob("*.png")):
            found.append((folder.name, folder.name.replace("_", " "), Image.open(pictures[0]).convert("RGB")))
    return found


def plain_word_of(name):
    """What a subject of the demo is: they are called striped_star, dotted_circle, ..."""
    return name.split("_")[-1]


class Handlers:
    """What the page does, for one workspace; the state of a visitor is on the page.

    Args:
        book: `app_runs.RunBook`.
        captioner: folder of a model that describes pictures, or None.
    """

    def __init__(self, book, captioner=None):
        self.book, self.workspace, self.captioner = book, book.workspace, captioner

    # 1. Pictures ---------------------------------------------------------------------------------------

    def pictures(self, concept, base, method, others):
        """The pictures with their captions, what is wrong with them, and what to do where there are none."""
        resolution = model_resolution(base) if base else 512
        rows, notes = self.workspace.review(concept, resolution)
        if not rows:
            words = "Drop 3 to 20 pictures of one thing above"
            words += ", or try it with one of these: one click, a minute or two." if demo_subjects() else "."
            return "", empty(words), gr.update(visible=True)
        problems = [f"<b>{say(row.name)}</b> {say('; '.join(row.problems))}." for row in rows if row.problems]
        problems += [say(note) for note in notes]
        count = sum(row.thumbnail is not None for row in rows)
        found = f"{count} picture{'s' * (count != 1)}, nothing wrong with {'it' if count == 1 else 'them'}."
        found = card("<br>".join(problems), "calm") if problems else card(found, "good")
        return shots(rows, fit_of(method, others)), found, gr.update(visible=False)

    def settings_of(self, concept):
        """Values of the form that belong to a concept: those of its newest run, or those of a new one."""
        runs = self.book.runs_of(self.workspace.concept_name(concept)) if concept else []
        return form_values(runs[0].form) if runs else new_form_values()

    def choose_concept(self, concept):
        values = self.settings_of(concept)
        return [*values, *self.pictures(concept, values[0], values[1], values[5])]

    def _shown(self, concept, *look):
        return [gr.update(choices=self.workspace.concepts(), value=concept), *self.pictures(concept, *look)]

    def upload(self, files, concept, *look):
        concept = self.workspace.concept_name(concept) or self.workspace.new_concept_name()
        for note in self.workspace.add_pictures(concept, files or []).notes:
            gr.Warning(say(note), duration=12)
        return [None, *self._shown(concept, *look)]

    def copy_folder(self, folder, concept, class_word, *look):
        if not folder:
            raise InputError("Choose a folder first, or type the path of one in the workspace.")
        path = self.workspace.readable_path(folder)
        if not concept and path.parent != SUBJECTS:
            concept = self.workspace.new_concept_name(path.name)
        concept = self.workspace.concept_name(concept or path.name)
        for note in self.workspace.add_folder(concept, folder).notes:
            gr.Warning(say(note), duration=12)
        if path.parent == SUBJECTS and not class_word:
            class_word = plain_word_of(path.name)
        return [class_word, *self._shown(concept, *look)]

    def remove_picture(self, concept, base, method, others, event: gr.EventData):
        if concept and (name := said_by(event, "remove")):
            self.workspace.remove_picture(concept, name)
        return self.pictures(concept, base, method, others)

    def save_caption(self, concept, event: gr.EventData):
        name, caption = said_by(event, "picture"), said_by(event, "caption")
        self.workspace.save_captions(concept, [(name, caption)])
        if caption and "{}" not in caption:
            return f"Saved. Put {{}} where the concept stands in the caption of {name}, or its name."
        return f"Saved in metadata.jsonl at {time.strftime('%H:%M:%S')}."

    def write_captions(self, concept, class_word, *look):
        """Has the captions that are missing written by a model on this computer."""
        yield card("Writing captions …", "busy"), gr.skip()
        try:
            count = self.book.write_captions(concept, self.captioner, class_word)
        except InputError as error:
            yield card(say(error), "bad"), gr.skip()
        else:
            found = self.pictures(concept, *look)
            done = f"{count} caption{'s' * (count != 1)} written: read them, and correct what is wrong."
            yield card(done if count else "Every picture has a caption already.", "good"), found[0]

    def rename_concept(self, concept, name):
        renamed = self.book.rename_concept(concept, name)
        return gr.update(choices=self.workspace.concepts(), value=renamed), ""

    def delete_concept(self, concept):
        if not concept:  # the visitor thought again
            return gr.skip()
        self.book.delete_concept(concept)
        values = new_form_values()
        return [*self._shown(None, values[0], values[1], values[5]), *values]

    def teach(self, event: gr.EventData):
        """One click: a subject of the demo becomes a concept, and its training starts."""
        name = said_by(event, "teach")
        if name not in [subject for subject, _, _ in demo_subjects()]:
            raise InputError(f"There is no subject {quoted(name)} in the demo.")
        self.workspace.add_folder(name, SUBJECTS / name)
        values = new_form_values()
        values[2] = plain_word_of(name)
        started = self.start(None, name, *values)
        return [*started, *self._shown(name, values[0], values[1], values[5]), *values]

    # 2. Model and method -------------------------------------------------------------------------------

    def command(self, step, run_name, *form):
        """The command line: of the form in steps 1 and 2, of the run in 3 and 4."""
        try:
            if step >= TRAINING and run_name:
                return command_box(to_copy(self.book.open(run_name).record["command"]))
            return command_box(to_copy(self.book.command(read_form(*form))))
        except InputError as error:
            return command_box(f"# {error}")

    def predict(self, *form):
        form = read_form(*form)
        flags = {**form.flags, **read_others(form.others, form.method)}
        yield card("Predicting memory …", "busy")
        table = self.book.predict_memory(form)
        yield prediction_card(table, None, flags, self.workspace)
        yield prediction_card(table, self.book.time_steps(form), flags, self.workspace)

    def start(self, token, *form):
        run = self.book.start(read_form(*form), (token or "").strip() or None)
        if run.outcome()[0] == app_runs.WAITING:
            tell(f"{run.name} waits for its turn, and starts by itself.")
        return gr.update(choices=self.choices(), value=run.name), gr.update(selected=TRAINING), TRAINING, {}

    # 3. Training ---------------------------------------------------------------------------------------

    def resume(self, run_name, token):
        self.book.resume(self.book.open(run_name), (token or "").strip() or None)

    def finish(self, run_name):
        self.book.resume(self.book.open(run_name), finish=True)

    def stop(self, run_name):
        run = self.book.open(run_name)
        was_on = run.is_alive()
        self.book.stop(run)
        tell("Stopping after this step, with a checkpoint." if was_on else f"{run.name} no longer waits.")

    def rename_run(self, run_name, name):
        renamed = self.book.rename(self.book.open(run_name), name)
        return gr.update(choices=self.choices(), value=renamed.name), "", {}

    def delete_run(self, run_name):
        if not run_name:  # the visitor thought again
            return gr.skip(), gr.skip()
        self.book.delete(self.book.open(run_name))
        return gr.update(choices=self.choices(), value=next(iter(self.book.names()), None)), {}

    def choices(self):
        """Runs for the list: (label, name)."""
        result = []
        for name in self.book.names():
            state, _ = app_runs.Run(self.book.folder / name).outcome()
            result.append((f"{GLYPHS.get(state, '○')} {name}: {state}", name))
        return result

    def observe(self, run_name, seen):
        """Everything that a run shows, for the timer; only what has changed since `seen` is sent again.

        Returns:
            `seen` anew, and values of `Page.observed`.
        """
        try:
            run = self.book.open(run_name) if run_name else None
        except InputError:
            run = None
        parts = {"runs": (choices := self.choices(), gr.update(choices=choices, visible=bool(choices)))}
        parts |= self._training(run) | self._result(run)
        seen = seen or {}
        fresh = {name: repr(signature) for name, (signature, _) in parts.items()}
        updates = [update if seen.get(name) != fresh[name] else gr.skip() for name, (_, update) in parts.items()]
        return [fresh, *updates]

    def _training(self, run):
        """Parts of step 3: name -> (what it depends on, update)."""
        hidden = gr.update(visible=False)
        if run is None:
            nothing = empty("Nothing has been trained yet. Choose pictures and a model, then start.")
            return {
                "status": (None, nothing),
                "plot": (None, hidden),
                "samples": (None, ""),
                "log": (None, ""),
                **dict.fromkeys(("stop", "resume", "finish", "next", "manage"), (None, hidden)),
            }
        history, (state, sentence), record = self.book.history(run), run.outcome(), run.record
        alive, waits = state == app_runs.RUNNING, state == app_runs.WAITING
        doing = run_logs.doing(run.log_tail(400, start=record.get("log_start", 0))) if alive else None
        step = max(history.loss[-1][0] if history.loss else 0, doing.step if doing else 0)
        left = history.seconds_left(run.steps, record.get("launched", 0)) if alive else None
        ahead = [other.name for other in self.book.waiting()].index(run.name) if waits else 0
        best = validation_sentence(history, step if alive else 0)
        can_go_on = run.can_resume()
        status = status_card(state, sentence, step, run.steps, left, doing, ahead, best, can_go_on)
        previews, log, table = run.grids(), run.log_tail(), curve(history)
        previews = strip(previews) if previews else ""
        can_resume = not alive and not waits and state != app_runs.FINISHED
        can_finish = can_resume and can_go_on
        done = run.has_result() and not alive and not waits
        return {
            "status": ((run.name, status), status),
            "plot": ((run.name, len(table)), gr.update(value=table, visible=len(table) > 0)),
            "samples": (previews, previews),
            "log": ((run.name, log), log),
            "stop": (alive or waits, gr.update(visible=alive or waits)),
            "resume": (can_resume, gr.update(visible=can_resume)),
            "finish": (can_finish, gr.update(visible=can_finish)),
            "next": (done, gr.update(visible=done)),
            "manage": (True, gr.update(visible=True)),
        }

    def _result(self, run):
        """Parts of step 4."""
        done = run is not None and (run.output / run.method.result_name).is_file()
        grids, subject = run.grids() if run else [], run.form.subject if run else "the concept"
        comparison, generated, files = "", "", ""
        if done:
            hint = card(say(f"Write {subject} or {{}} in a prompt, wherever it should appear."), "good")
            word, files = run.form.class_word, downloads(run)
            if len(grids) > 1:
                titles = f"Before: step {grids[0][1]}", f"After: step {grids[-1][1]}"
                comparison = slider(grids[0][0], grids[-1][0], titles)
            for drawing, *columns in run.drawings():
                titles = drawing["prompt"].replace("{}", word), drawing["prompt"].replace("{}", subject)
                generated += pair(titles, columns)
        else:
            can_finish = run is not None and run.can_resume() and not run.is_alive()
            words = "The result appears here once a run is finished"
            hint = empty(words + (": “Use it as it is”, in step 3, finishes this one now." if can_finish else "."))
        package = None
        try:
            package = run.package() if done else None
        except InputError as error:  # a full disk; the files themselves are there
            hint = card(say(error), "bad")
        file = str(run.output / run.method.result_name) if done else None
        name, text, used = run.name if run else None, card_text(run) if done else "", uses(run) if done else {}
        return {
            "hint": (hint, hint),
            "comparison": (comparison, comparison),
            "generating": ((name, done), gr.update(visible=done)),
            "generated": (generated, generated),
            "file": ((name, file, str(package)), gr.update(value=file)),
            "package": (
                (name, str(package)),
                gr.update(value=str(package) if package else None, interactive=bool(package)),
            ),
            "files": (files, files),
            **{program: ((name, used.get(program)), used.get(program, "")) for program in PROGRAMS},
            "card": ((name, text), text),
        }

    # 4. Result -----------------------------------------------------------------------------------------

    def draw(self, run_name, prompt, count, seed, steps, guidance):
        run = self.book.open(run_name)
        yield card("Generating …", "busy")
        for line in self.book.draw(run, prompt, count, seed, steps, guidance):
            yield card(f"Generating … <code>{say(line[-90:])}</code>", "busy")
        yield ""

    def push(self, run_name, repo_id, private, token):
        yield card("Pushing …", "busy")
        address = say(self.book.push(self.book.open(run_name), (repo_id or "").strip(), private, token))
        yield card(f'On the Hub: <a href="{address}" target="_blank">{address}</a>', "good")

    def push_line(self, run_name, repo_id, private):
        try:
            return shown(app_runs.push_command(self.book.open(run_name), repo_id or "USER/NAME", private))
        except InputError:
            return ""

    # The page itself -----------------------------------------------------------------------------------

    def load(self, remembered):
        """A page that is opened or loaded again: as it was, or with a new concept."""
        remembered = remembered if isinstance(remembered, dict) else {}
        names, concepts = self.book.names(), self.workspace.concepts()
        known = remembered.get("run") in names
        run_name = remembered.get("run") if known else names[0] if names else None
        concept = remembered.get("concept") if remembered.get("concept") in concepts else None
        values = self.settings_of(concept)
        if known and concept and self.book.open(run_name).form.concept == concept:
            values = form_values(self.book.open(run_name).form)
        step = remembered.get("step")
        if type(step) is not int or step not in range(RESULT + 1):
            step = TRAINING if known else PICTURES
        return [
            gr.update(choices=concepts, value=concept),
            gr.update(choices=self.choices(), value=run_name),
            {},
            gr.update(selected=step),
            step,
            *values,
            *self.pictures(concept, values[0], values[1], values[5]),
        ]


# =====================================================================================================
# The page
# =====================================================================================================


QUIET = {"show_progress": "hidden", "queue": True}


def build_page(book, captioner=None):
    """The `gr.Blocks` for a `RunBook`; `captioner` as for `Handlers`."""
    do = Handlers(book, captioner)
    with gr.Blocks(title="Teach a model your concept", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        # The names are no secret: without one of its own, each start of the server would forget them.
        remembered = gr.BrowserState({}, storage_key="zoodip-page", secret="zoodip-page")
        step, seen = gr.State(PICTURES), gr.State({})
        with gr.Row(equal_height=True):
            gr.Markdown(
                "# Teach a model your concept\nFrom a few photos to new pictures of it, on the computer you have.",
                elem_id="title",
            )
            run = gr.Dropdown(
                [], label="Runs on this server, the newest first", scale=0, min_width=330, elem_id="runs"
            )
        with gr.Tabs(selected=PICTURES) as tabs:
            with gr.Tab("1 · Pictures", id=PICTURES):
                pictures = pictures_step(do)
            with gr.Tab("2 · Model", id=MODEL):
                model = model_step(do)
            with gr.Tab("3 · Training", id=TRAINING):
                training = training_step()
            with gr.Tab("4 · Result", id=RESULT):
                result = result_step()
        command = gr.HTML(elem_id="command")
        timer = gr.Timer(POLL_SECONDS)
        form = [pictures["concept"], *model["form"]]

        # Every so often, and after whatever changes a run
        watched = {
            "fn": answering(do.observe),
            "inputs": [run, seen],
            "outputs": [seen, run, *training["out"], *result["out"]],
        }
        timer.tick(**watched, trigger_mode="once", concurrency_limit=None, **QUIET)
        run.input(lambda: {}, None, seen, **QUIET).then(**watched, **QUIET)

        # Pictures
        taught = connect_pictures(do, pictures, model, [run, tabs, step, seen])
        taught.success(**watched, **QUIET)
        gr.on([pictures["next"].click], lambda: gr.update(selected=MODEL), None, tabs, **QUIET)

        # Model and method
        inputs, show = [step, run, *form], answering(do.command)
        changes = [component.change for component in (pictures["concept"], run, *model["form"])]
        gr.on(changes, show, inputs, command, trigger_mode="always_last", **QUIET)
        for number, tab in enumerate(page_tabs(tabs)):
            tab.select(lambda number=number: number, None, step, **QUIET).then(show, inputs, command, **QUIET)
        predict = answering(in_its_card(do.predict))
        model["predict"].click(predict, form, model["prediction"], show_progress="hidden")
        started = model["start"].click(
            answering(do.start), [model["token"], *form], [run, tabs, step, seen], show_progress="minimal"
        )
        started.success(**watched, **QUIET)

        # Training and result
        connect_training(do, training, run, seen, model["token"], watched)
        gr.on([training["next"].click], lambda: gr.update(selected=RESULT), None, tabs, **QUIET)
        connect_result(do, result, run, watched)

        # Opened, or loaded again
        loaded = [pictures["concept"], run, seen, tabs, step, *model["form"], *pictures["out"]]
        page.load(answering(do.load), remembered, loaded, **QUIET).then(**watched, **QUIET).then(
            show, inputs, command, **QUIET
        )
        gr.on(
            [run.change, pictures["concept"].change, step.change],
            lambda run, concept, step: {"run": run, "concept": concept, "step": step},
            [run, pictures["concept"], step],
            remembered,
            **QUIET,
        )
    fetch_nothing(page)
    return page


def fetch_nothing(page):
    """Lets no component of a `gr.Blocks` fetch what a visitor names instead of sending a file."""

    def of_a_file(keep):
        async def keep_file(path):
            if re.match(r"\s*[a-z][a-z0-9+.-]*:", str(path), re.IGNORECASE):
                raise gr.Error("This server fetches nothing for its visitors.", print_exception=False)
            return await keep(path)

        return keep_file

    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = of_a_file(block.async_move_resource_to_block_cache)


def page_tabs(tabs):
    return [child for child in tabs.children if isinstance(child, gr.Tab)]


def confirmed(question):
    """JavaScript that asks before a button does something for good; without a yes its value is null."""
    return f"(value) => [confirm({question!r}) ? value : null]"


def pictures_step(do):
    """Step 1; its components by name."""
    parts, demo = {}, REPO / "demo" in do.workspace.readable
    folders = [(f"Demo: {title}", str(SUBJECTS / name)) for name, title, _ in demo_subjects() if demo]
    parts["concept"] = gr.Dropdown(
        do.workspace.concepts(),
        value=None,
        label="Concept",
        info="Type a name for something new, or choose one from before.",
        allow_custom_value=True,
        elem_id="concept",
    )
    with gr.Row(equal_height=True):
        parts["upload"] = gr.File(
            file_count="multiple", label="Drop pictures or a ZIP", height=172, elem_id="upload", scale=2
        )
        with gr.Column():
            parts["folder"] = gr.Dropdown(
                folders,
                value=None,
                label="Or take them from a folder",
                info="One of the demo's, or a path on the server.",
                allow_custom_value=True,
                elem_id="folder",
            )
            parts["copy"] = gr.Button("Use these pictures", size="sm", elem_id="copy-folder")
    found = gr.HTML(elem_id="found")
    parts["tiles"] = gr.HTML(
        tiles(demo_subjects() if demo and DEMO_BASE.is_dir() else []),
        elem_id="tiles",
        js_on_load="""element.addEventListener("click", (event) => {
            const tile = event.target.closest("[data-teach]");
            if (tile) trigger("select", { teach: tile.dataset.teach });
        });""",
    )
    parts["shots"] = gr.HTML(
        elem_id="shots",
        js_on_load="""element.addEventListener("change", ({ target }) => {
            const picture = target.dataset.caption;
            if (picture !== undefined) trigger("submit", { picture, caption: target.value });
        });
        element.addEventListener("click", (event) => {
            const button = event.target.closest("[data-remove]");
            if (button) trigger("delete", { remove: button.dataset.remove });
        });""",
    )
    parts["saved"] = gr.Markdown("Captions say what else is in a picture; {} marks the concept.", elem_id="saved")
    if do.captioner:
        parts["describe"] = gr.Button("Write the captions that are missing", size="sm", elem_id="write-captions")
        parts["described"] = gr.HTML(elem_id="described")
    with gr.Accordion("Rename or delete this concept", open=False, elem_id="manage-concept"), gr.Row():
        parts["new_name"] = gr.Textbox(label="New name of the concept", scale=3, elem_id="concept-name")
        parts["rename"] = gr.Button("Rename the concept", size="sm", elem_id="rename-concept")
        parts["delete"] = gr.Button("Delete the concept", variant="stop", size="sm", elem_id="delete-concept")
    parts["next"] = gr.Button("Next: model", variant="primary", elem_id="to-model")
    return parts | {"out": [parts["shots"], found, parts["tiles"]]}


def connect_pictures(do, pictures, model, started):
    """What happens in step 1.

    Args:
        pictures, model: components of the steps.
        started: outputs of `Handlers.start`.

    Returns:
        The event that a tile was taught.
    """
    concept, word, form, out = pictures["concept"], model["class_word"], model["form"], pictures["out"]
    base, method, others = form[0], form[1], form[5]
    look = [base, method, others]
    last = {"trigger_mode": "always_last", "show_progress": "hidden"}
    concept.input(answering(do.choose_concept), concept, [*form, *out], **last)
    pictures["upload"].upload(
        answering(do.upload), [pictures["upload"], concept, *look], [pictures["upload"], concept, *out]
    )
    pictures["copy"].click(
        answering(do.copy_folder), [pictures["folder"], concept, word, *look], [word, concept, *out]
    )
    pictures["shots"].delete(answering(do.remove_picture), [concept, *look], out, show_progress="hidden")
    pictures["shots"].submit(answering(do.save_caption), concept, pictures["saved"], show_progress="hidden")
    if do.captioner:
        pictures["describe"].click(
            answering(do.write_captions),
            [concept, word, *look],
            [pictures["described"], pictures["shots"]],
            show_progress="hidden",
        )
    pictures["rename"].click(
        answering(do.rename_concept), [concept, pictures["new_name"]], [concept, pictures["new_name"]]
    )
    pictures["delete"].click(
        answering(do.delete_concept),
        concept,
        [concept, *out, *form],
        js=confirmed("Delete this concept with its pictures and captions?"),
    )
    # Only what a visitor changes: whoever else sets the form shows its pictures himself, and an answer to the change
    # that came later would show those of the concept before.
    crop = {"fn": answering(do.pictures), "inputs": [concept, *look], "outputs": out, **last}
    model["defaults"].then(**crop)
    others.input(**crop)
    return pictures["tiles"].select(answering(do.teach), None, [*started, concept, *out, *form])


def model_step(do):
    """Step 2; its components by name."""
    methods = offered_methods()
    bases = [("Demo base: tiny, a minute a run", str(DEMO_BASE))] if DEMO_BASE.is_dir() else []
    bases += [("Stable Diffusion 1.5, from the Hub", STABLE_DIFFUSION)]
    bases += [(f"In the workspace: {Path(path).name}", path) for path in do.workspace.models()]
    with gr.Row():
        base = gr.Dropdown(
            bases,
            value=bases[0][1],
            label="Base model",
            info="Or type an id on the Hub, or a folder or file in the workspace.",
            allow_custom_value=True,
            elem_id="base",
        )
        class_word = gr.Textbox(
            label="What is it, in one plain word?",
            info="Where learning starts.",
            placeholder="dog (the demo base knows star, ring, heart, moon, cross, circle)",
            elem_id="class-word",
        )
        subject = gr.Textbox(
            label="Its name in prompts",
            info="Empty: made from the concept.",
            placeholder="<my-dog>",
            elem_id="subject",
        )
    method = gr.Radio(
        [(m.title, key) for key, m in methods.items()],
        value="word",
        label="Method",
        info=METHODS["word"].about,
        elem_id="method",
    )
    method.change(
        lambda key: gr.update(info=METHODS[key].about if key in METHODS else ""),
        method,
        method,
        show_progress="hidden",
    )
    fields = {}
    with gr.Row():
        prompt = gr.Textbox(PROMPT, label="Prompt of previews", info="{} marks the concept.", scale=2)
        for name in ("max_train_steps", "validation_steps"):
            fields[name] = number_field(name)
    with gr.Accordion("More settings", open=False):
        with gr.Row():
            for name in list(FIELDS)[2:]:
                fields[name] = number_field(name)
        others = gr.Textbox(
            label="Other flags of the script",
            info="As on a command line; the script's --help explains them all.",
            elem_id="others",
        )
        token = gr.Textbox(
            label="Token of the Hub, for a base model that asks for one",
            info="Only handed to the process; never written to disk.",
            type="password",
        )
    with gr.Row():
        predict = gr.Button("How much memory and time?", elem_id="predict")
        start = gr.Button("Start training", variant="primary", elem_id="start")
    prediction = gr.HTML(elem_id="prediction")
    ordered = [fields[name] for name in FIELDS]
    defaults = gr.on(
        [base.input, method.input],
        answering(default_values),
        [method, base],
        [others, *ordered],
        trigger_mode="always_last",
        show_progress="hidden",
    )
    return {
        "base": base,
        "class_word": class_word,
        "form": [base, method, class_word, subject, prompt, others, *ordered],
        "defaults": defaults,
        "token": token,
        "predict": predict,
        "start": start,
        "prediction": prediction,
    }


def number_field(name):
    default = METHODS["word"].flags[name]["default"]
    words = {"label": FIELDS[name], "info": f"Empty: {'the script’s own' if default is None else default}."}
    precision = 0 if is_whole(name) else None
    return gr.Number(None, **words, precision=precision, elem_id=name.replace("_", "-"), min_width=130)


def training_step():
    """Step 3; its components by name, and "out" as `Handlers.observe` fills them."""
    status = gr.HTML(elem_id="status")
    with gr.Row():
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
        resume = gr.Button("Resume", variant="primary", visible=False, elem_id="resume")
        finish = gr.Button("Use it as it is", visible=False, elem_id="finish")
    samples = gr.HTML(elem_id="samples")
    plot = gr.LinePlot(
        x="step",
        y="loss",
        color="series",
        color_map=dict(zip(SERIES, ("#818cf8", "#ea580c"))),
        title="Loss",
        height=280,
        visible=False,
        elem_id="curve",
    )
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(
            show_label=False,
            label="Log",
            lines=12,
            max_lines=12,
            autoscroll=True,
            interactive=False,
            elem_id="log",
            buttons=["copy"],
        )
    with gr.Accordion("Rename or delete this run", open=False, visible=False, elem_id="manage-run") as manage:
        with gr.Row():
            new_name = gr.Textbox(label="New name of the run", scale=3, elem_id="run-name")
            rename = gr.Button("Rename the run", size="sm", elem_id="rename-run")
            delete = gr.Button("Delete the run", variant="stop", size="sm", elem_id="delete-run")
    following = gr.Button("Next: result", variant="primary", visible=False, elem_id="to-result")
    return {
        "stop": stop,
        "resume": resume,
        "finish": finish,
        "next": following,
        "new_name": new_name,
        "rename": rename,
        "delete": delete,
        "out": [status, plot, samples, log, stop, resume, finish, following, manage],
    }


def connect_training(do, training, run, seen, token, watched):
    """What happens in step 3; afterwards the run is looked at, as `watched` says."""
    training["stop"].click(answering(do.stop), run, None, show_progress="minimal").then(**watched, **QUIET)
    resumed = training["resume"].click(answering(do.resume), [run, token], None, show_progress="minimal")
    resumed.then(**watched, **QUIET)
    training["finish"].click(answering(do.finish), run, None, show_progress="minimal").then(**watched, **QUIET)
    renamed = training["rename"].click(
        answering(do.rename_run), [run, training["new_name"]], [run, training["new_name"], seen]
    )
    renamed.success(**watched, **QUIET)
    deleted = training["delete"].click(
        answering(do.delete_run), run, [run, seen], js=confirmed("Delete this run with its result and its pictures?")
    )
    deleted.success(**watched, **QUIET)


def result_step():
    """Step 4; its components by name, and "out" as `Handlers.observe` fills them."""
    hint = gr.HTML(elem_id="hint")
    comparison = gr.HTML(elem_id="comparison")
    with gr.Column(visible=False) as generating:
        with gr.Row():
            prompt = gr.Textbox(
                "a photo of a {} in the snow", label="Prompt", info="{} marks the concept.", scale=4, elem_id="prompt"
            )
            draw = gr.Button("Generate", variant="primary", elem_id="draw", scale=1)
        with gr.Accordion("Settings of generated images", open=False), gr.Row():
            count = gr.Slider(1, 8, 4, step=1, label="Images")
            seed = gr.Number(0, label="Seed", precision=0)
            steps = gr.Slider(1, 100, 25, step=1, label="Denoising steps")
            guidance = gr.Slider(0, 15, 5, step=0.5, label="CFG scale")
        progress = gr.HTML(elem_id="drawing")
        generated = gr.HTML(elem_id="drawn")
        with gr.Row():
            file = gr.DownloadButton("Download what was learned", elem_id="download")
            package = gr.DownloadButton("Download everything (ZIP)", interactive=False, elem_id="package")
        files, used = gr.HTML(elem_id="files"), []
        gr.Markdown("**Use it in**")
        with gr.Tabs(elem_id="use-it-in"):
            for program in PROGRAMS:
                with gr.Tab(program):
                    used.append(gr.Markdown(elem_id=f"use-{program.lower()}", buttons=["copy"]))
        with gr.Accordion("Push to the Hub", open=False):
            gr.Markdown("This card goes with it; your pictures stay here.")
            card = gr.Markdown(elem_id="card", container=True, max_height=340)
            with gr.Row():
                repo = gr.Textbox(label="Repository", placeholder="user/my-dog", elem_id="repo")
                token = gr.Textbox(
                    label="Token with the right to write",
                    info="Only handed to the process; never written to disk.",
                    type="password",
                    elem_id="token",
                )
            private = gr.Checkbox(True, label="Private, if the repository is new")
            line = gr.Code(
                label="As a command line; the token comes from hf auth login or HF_TOKEN",
                interactive=False,
                show_line_numbers=False,
                buttons=["copy"],
            )
            push = gr.Button("Push", variant="primary", elem_id="push")
            pushed = gr.HTML(elem_id="pushed")
    parts = {"prompt": prompt, "count": count, "seed": seed, "steps": steps, "guidance": guidance, "draw": draw}
    parts |= {"progress": progress, "repo": repo, "token": token, "private": private, "line": line, "push": push}
    out = [hint, comparison, generating, generated, file, package, files, *used, card]
    return parts | {"pushed": pushed, "out": out}


def connect_result(do, result, run, watched):
    """What happens in step 4."""
    drawing = [run, *(result[name] for name in ("prompt", "count", "seed", "steps", "guidance"))]
    gr.on(
        [result["draw"].click, result["prompt"].submit],
        answering(in_its_card(do.draw)),
        drawing,
        result["progress"],
        show_progress="hidden",
        concurrency_limit=None,
    ).then(**watched, **QUIET)
    what = [run, result["repo"], result["private"]]
    gr.on(
        [run.change, result["repo"].change, result["private"].change],
        answering(do.push_line),
        what,
        result["line"],
        **QUIET,
    )
    push = answering(in_its_card(do.push))
    result["push"].click(push, [*what, result["token"]], result["pushed"], show_progress="hidden")


# =====================================================================================================
# Main
# =====================================================================================================


def parse_args(words=None):
    """Parses and checks the command line."""
    parser = make_parser()
    args = flags.parse(parser, words)
    flags.check_ranges(parser, args)
    for folder in args.read:
        if not Path(folder).is_dir():
            parser.error(f"--read {folder!r} is not a folder.")
    if args.captioner is not None and not (Path(args.captioner) / "config.json").is_file():
        parser.error(f"--captioner {args.captioner!r} is no folder of a model with a config.json: download one first.")
    return args


def make_parser():
    """The parser, with every flag."""
    parser = flags.new_parser(__file__, "A web page that trains with the scripts beside it.", "%(prog)s [options]")
    add = functools.partial(flags.add, parser)
    add(
        "--workspace",
        default=os.environ.get("APP_WORKSPACE", "workspace"),
        path=True,
        help="Folder of everything that is uploaded, trained and drawn.",
    )
    readable = "Folders that visitors may copy pictures from, too."
    add("--read", nargs="+", default=[], metavar="FOLDER", path=True, help=readable)
    add(
        "--host",
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        help="Address to listen at. Any other than this computer's own lets everyone in who reaches it.",
    )
    names = "Other names that the server goes by, such as that of a proxy before it."
    add("--allow_host", nargs="+", default=[], metavar="NAME", help=names)
    port = "Port to listen at. Default: the first free one from 7860 on."
    add("--port", type=int, limits=flags.Range(1, 65535), help=port)
    add("--open", action="store_true", help="Open the page in a browser, where there is a screen.")
    at_once = "Number of trainings at the same time; others wait for their turn."
    add("--trainings", type=int, default=1, limits=flags.Range(1, 1000), help=at_once)
    describer = "Folder of a model that describes pictures (transformers, image to text), for captions."
    add("--captioner", metavar="FOLDER", path=True, help=describer)
    return parser


def has_screen():
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def main(args, **options):
    """Serves the page.

    Args:
        args: settings.
        options: more for `gr.Blocks.launch`.
    """
    workspace = Workspace(args.workspace, [REPO / "demo", *args.read])
    os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = str(workspace.root / "uploads")  # what browsers send
    only_here = is_loopback(args.host)
    book = app_runs.RunBook(workspace, args.trainings, own_login=only_here)
    book.remove_trials()
    if not only_here:
        print(
            f"Listening on {args.host}: everyone who reaches it may train here and see all that is in the workspace."
        )
    guard = Middleware(Guard, host=args.host, names=tuple(args.allow_host))
    page = build_page(book, args.captioner).queue(default_concurrency_limit=8)
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            allowed_paths=[str(workspace.root / name) for name in ("concepts", "runs")],
            inbrowser=args.open and has_screen(),
            show_error=False,  # a fault of the page is the log's, and an `InputError` is shown all the same
            ssr_mode=False,
            max_file_size="300mb",
            footer_links=[],
            theme=make_theme(),
            css=CSS,
            head=f"<script>{SCRIPT}</script>",
            app_kwargs={"middleware": [guard]},
            **options,
        )
    except OSError as error:
        raise InputError(why_not_served(args, error)) from None
    queue.keep_moving(book, lambda: page.is_running)
    return page


def make_theme():
    """Gradio's, with borders that are to be seen and help that can be read, in the light and in the dark."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing to fetch
    subdued = {"": "*neutral_600", "_dark": "*neutral_300"}
    borders = {"": "*neutral_400", "_dark": "*neutral_600"}
    fields = {"": "*neutral_500", "_dark": "*neutral_400"}
    colours = {
        "block_info_text_color": subdued,
        "body_text_color_subdued": subdued,
        "input_placeholder_color": subdued,
        "border_color_primary": borders,
        "block_border_color": borders,
        "input_border_color": fields,
    }
    named = {name + theme: colour for name, of_themes in colours.items() for theme, colour in of_themes.items()}
    return gr.themes.Soft(primary_hue="indigo", **fonts).set(
        block_title_background_fill="none",
        block_title_text_color="*body_text_color",
        block_title_padding="0",
        block_label_text_color="*body_text_color",
        block_label_background_fill="*background_fill_secondary",
        block_border_width="1px",
        input_border_width="1px",
        checkbox_label_background_fill_selected="*primary_600",  # white on 500 is 4.47:1
        checkbox_label_background_fill_selected_dark="*primary_600",
        button_secondary_background_fill_hover_dark="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        **named,
    )


def why_not_served(args, error):
    """What is said of a server that could not listen."""
    if args.port is None:
        return f"No port from 7860 on is free ({error}): give another with --port."
    where = f"--port {args.port} at --host {args.host}"
    with contextlib.closing(socket.socket()) as probe:
        if probe.connect_ex((args.host if args.host != "0.0.0.0" else "127.0.0.1", args.port)) == 0:
            return f"{where} is in use, perhaps by this page started before: open that, or give another --port."
    return f"{where} cannot be listened at: choose another port, or the address of this computer."


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
