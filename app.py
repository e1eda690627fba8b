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
"""A web page on which a diffusion model learns a subject from a few photos, with the scripts of this repository.

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
import inspect
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from personalization import flags
from personalization.errors import InputError, quoted, run_script
from personalization.web import app_runs
from personalization.web.app_words import (
    CSS,
    GLYPHS,
    card,
    card_text,
    curve,
    empty,
    pair,
    prediction_card,
    say,
    status_card,
    strip,
)
from personalization.web.command_lines import (
    DEMO_BASE,
    METHODS,
    REPO,
    Form,
    default_flags,
    flag_words,
    is_demo,
    offered_methods,
    read_others,
    shown,
)
from personalization.web.guard import Guard, is_loopback
from personalization.web.workspace import Workspace, is_text, model_resolution, safe_name


SUBJECTS = REPO / "demo" / "subjects"
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
POLL_SECONDS = 1.5
PICTURES, MODEL, TRAINING, RESULT = range(4)  # the steps of the page

# Flags with a field of their own, and its label.
FIELDS = {
    "max_train_steps": "Steps",
    "validation_steps": "Draw samples every",
    "learning_rate": "Learning rate",
    "train_batch_size": "Batch size",
    "num_inference_steps": "Denoising steps of a sample",
    "num_validation_images": "Images a sample",
    "guidance_scale": "Guidance of samples",
    "seed": "Seed",
}


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
    """What every handler stands behind: its values are judged, an `InputError` is shown as one sentence."""
    try:
        check_values(values)
        yield
    except InputError as error:
        raise gr.Error(str(error), duration=12, print_exception=False) from None


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


class Handlers:
    """What the page does, for one workspace; the state of a visitor is on the page.

    Args:
        book: `app_runs.RunBook`.
    """

    def __init__(self, book):
        self.book, self.workspace = book, book.workspace

    # 1. Pictures ---------------------------------------------------------------------------------------

    def pictures(self, concept, base):
        """Thumbnails, captions, what is wrong, and the choice of pictures to remove."""
        resolution = model_resolution(base) if base else 512
        rows, notes = self.workspace.review(concept, resolution)
        if not rows:
            words = "Drop 3 to 20 pictures of one thing above, or try it with one of the demo's subjects."
            return None, [], empty(words), gr.update(choices=[], value=None)
        gallery = [(row.thumbnail, f"⚠ {row.name}" if row.problems else row.name) for row in rows if row.thumbnail]
        problems = [f"<b>{say(row.name)}</b> {say('; '.join(row.problems))}." for row in rows if row.problems]
        problems += [say(note) for note in notes]
        count = sum(row.thumbnail is not None for row in rows)
        said = f"{count} picture{'s' * (count != 1)}, nothing wrong with {'it' if count == 1 else 'them'}."
        found = card("<br>".join(problems), "calm") if problems else card(said, "good")
        names = [row.name for row in rows]
        return gallery, [[row.name, row.caption] for row in rows], found, gr.update(choices=names, value=None)

    def choose_concept(self, concept, base):
        return self.pictures(concept, base)

    def _added(self, concept, base, class_word):
        names = self.workspace.concepts()
        return [gr.update(choices=names, value=concept), class_word, *self.pictures(concept, base)]

    def upload(self, files, concept, base, class_word):
        concept = self.workspace.concept_name(concept) or "my-concept"
        for note in self.workspace.add_pictures(concept, files or []).notes:
            gr.Warning(say(note), duration=12)
        return [None, *self._added(concept, base, class_word)]

    def copy_folder(self, folder, concept, base, class_word):
        if not folder:
            raise InputError("Choose a folder first, or type the path of one in the workspace.")
        path = self.workspace.readable_path(folder)
        concept = self.workspace.concept_name(concept or path.name)
        for note in self.workspace.add_folder(concept, folder).notes:
            gr.Warning(say(note), duration=12)
        if path.parent == SUBJECTS and not class_word:  # they are called striped_star, dotted_circle, ...
            class_word = path.name.split("_")[-1]
        return self._added(concept, base, class_word)

    def remove_picture(self, name, concept, base):
        if name and concept:
            self.workspace.remove_picture(concept, name)
        return self.pictures(concept, base)

    def save_captions(self, table, concept):
        table = [row for row in table if isinstance(row, list) and len(row) > 1]
        self.workspace.save_captions(concept, [(str(row[0]), row[1]) for row in table])
        missing = [row[0] for row in table if row[1] and "{}" not in str(row[1])]
        if missing:
            return f"Saved. Put {{}} where the concept stands in the caption of {missing[0]}, or its name."
        return f"Saved in metadata.jsonl at {time.strftime('%H:%M:%S')}."

    # 2. Model and method -------------------------------------------------------------------------------

    def command(self, step, run_name, *form):
        """The command line in view: of the form in steps 1 and 2, of the run in 3 and 4."""
        try:
            if step >= TRAINING and run_name:
                return shown(self.book.open(run_name).record["command"])
            return shown(self.book.command(read_form(*form)))
        except InputError as error:
            return f"# {error}"

    def predict(self, *form):
        form = read_form(*form)
        flags = {**form.flags, **read_others(form.others, form.method)}
        yield card("Predicting memory and timing a few steps …", "busy")
        table = self.book.predict_memory(form)
        yield prediction_card(table, None, flags, self.workspace)
        yield prediction_card(table, self.book.time_steps(form), flags, self.workspace)

    def start(self, token, *form):
        run = self.book.start(read_form(*form), (token or "").strip() or None)
        return gr.update(choices=self.choices(), value=run.name), gr.update(selected=TRAINING), TRAINING, {}

    # 3. Training ---------------------------------------------------------------------------------------

    def resume(self, run_name, token):
        self.book.resume(self.book.open(run_name), (token or "").strip() or None)

    def stop(self, run_name):
        self.book.stop(self.book.open(run_name))
        gr.Info("Stopping after this step, with a checkpoint.", duration=4)

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
        if run is None:
            nothing = empty("Nothing has been trained yet. Choose pictures and a model, then start.")
            return {
                "status": (None, nothing),
                "plot": (None, gr.update(visible=False)),
                "samples": (None, ""),
                "log": (None, ""),
                "stop": (None, gr.update(visible=False)),
                "resume": (None, gr.update(visible=False)),
                "next": (None, gr.update(visible=False)),
            }
        history, (state, sentence) = self.book.history(run), run.outcome()
        alive, step = state == app_runs.RUNNING, history.loss[-1][0] if history.loss else 0
        left = history.seconds_left(run.steps, run.record.get("launched", 0)) if alive else None
        status, grids, log = status_card(state, sentence, step, run.steps, left), run.grids(), run.log_tail()
        strips = "".join(strip(path, f"step {number}") for path, number in reversed(grids))
        table = curve(history)
        can_resume = not alive and state != app_runs.FINISHED
        return {
            "status": ((run.name, status), status),
            "plot": ((run.name, len(table)), gr.update(value=table, visible=len(table) > 0)),
            "samples": (strips, f'<div class="strips">{strips}</div>'),
            "log": ((run.name, log), log),
            "stop": (alive, gr.update(visible=alive)),
            "resume": (can_resume, gr.update(visible=can_resume)),
            "next": (state, gr.update(visible=state == app_runs.FINISHED)),
        }

    def _result(self, run):
        """Parts of step 4."""
        done = run is not None and (run.output / run.method.result_name).is_file()
        grids, subject = run.grids() if run else [], run.form.subject if run else "the concept"
        comparison, drawn = "", ""
        if done:
            hint = card(say(f"Write {subject} or {{}} in a prompt, wherever it should appear."), "good")
            word = run.form.class_word
            if len(grids) > 1:
                titles = f"Before: step {grids[0][1]}", f"After: step {grids[-1][1]}"
                comparison = pair(titles, ([grids[0][0]], [grids[-1][0]]))
            for drawing, *columns in run.drawings():
                titles = drawing["prompt"].replace("{}", word), drawing["prompt"].replace("{}", subject)
                drawn += pair(titles, columns)
        else:
            hint = empty("The result appears here once a run is finished.")
        package = None
        try:
            package = run.package() if done else None
        except InputError as error:  # a full disk; the files themselves are there
            hint = card(say(error), "bad")
        file = str(run.output / run.method.result_name) if done else None
        name, text = run.name if run else None, card_text(run) if done else ""
        return {
            "hint": (hint, hint),
            "comparison": (comparison, comparison),
            "drawing": ((name, done), gr.update(visible=done)),
            "drawn": (drawn, drawn),
            "file": ((name, file, str(package)), gr.update(value=file)),
            "package": (
                (name, str(package)),
                gr.update(value=str(package) if package else None, interactive=bool(package)),
            ),
            "card": ((name, text), text),
        }

    # 4. Result -----------------------------------------------------------------------------------------

    def draw(self, run_name, prompt, count, seed, steps, guidance):
        run = self.book.open(run_name)
        yield card("Drawing …", "busy")
        for line in self.book.draw(run, prompt, count, seed, steps, guidance):
            yield card(f"Drawing … <code>{say(line[-90:])}</code>", "busy")
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
        """A page that is opened or loaded again: the concept and the run that it had, or the newest."""
        remembered = remembered if isinstance(remembered, dict) else {}
        names, concepts = self.book.names(), self.workspace.concepts()
        run_name = remembered.get("run") if remembered.get("run") in names else names[0] if names else None
        concept = remembered.get("concept") if remembered.get("concept") in concepts else None
        form = None
        if run_name:
            form = self.book.open(run_name).form
            concept = concept or (form.concept if form.concept in concepts else None)
        if form is None or concept != form.concept:
            base = str(DEMO_BASE) if DEMO_BASE.is_dir() else STABLE_DIFFUSION
            values = [base, "word", "", "", "a photo of a {} on the beach", *default_values("word", base)]
        else:
            values = form_values(form)
        base = values[0]
        return [
            gr.update(choices=concepts, value=concept),
            gr.update(choices=self.choices(), value=run_name),
            {},
            gr.update(selected=TRAINING if run_name else PICTURES),
            TRAINING if run_name else PICTURES,
            *values,
            *self.pictures(concept, base),
        ]


# =====================================================================================================
# The page
# =====================================================================================================


def build_page(book):
    """The `gr.Blocks` for a `RunBook`."""
    do = Handlers(book)
    with gr.Blocks(title="Teach a model your subject", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        remembered = gr.BrowserState({}, storage_key="zoodip-page")
        step, seen = gr.State(PICTURES), gr.State({})
        with gr.Row(equal_height=True):
            gr.Markdown(
                "# Teach a model your subject\nFrom a few photos to new pictures of it, on the computer you have.",
                elem_id="title",
            )
            run = gr.Dropdown(
                [], label="Runs on this server, the newest first", scale=0, min_width=330, elem_id="runs"
            )
        with gr.Tabs(selected=PICTURES) as tabs:
            with gr.Tab("1 · Pictures", id=PICTURES):
                pictures = pictures_step(do)
            with gr.Tab("2 · Model and method", id=MODEL):
                model = model_step(do, pictures["concept"])
            with gr.Tab("3 · Training", id=TRAINING):
                training = training_step()
            with gr.Tab("4 · Result", id=RESULT):
                result = result_step()
        command = gr.Code(
            label="The same as a command line, to be run in the folder of this repository",
            interactive=False,
            elem_id="command",
            show_line_numbers=False,
            buttons=["copy"],
        )
        timer = gr.Timer(POLL_SECONDS)
        quiet = {"show_progress": "hidden", "queue": True}
        form = [pictures["concept"], *model["form"]]

        # Pictures
        connect_pictures(do, pictures, model)
        gr.on([pictures["next"].click], lambda: gr.update(selected=MODEL), None, tabs, **quiet)

        gr.on([training["next"].click], lambda: gr.update(selected=RESULT), None, tabs, **quiet)

        # Model and method
        inputs, show = [step, run, *form], answering(do.command)
        changes = [component.change for component in (pictures["concept"], run, *model["form"])]
        gr.on(changes, show, inputs, command, trigger_mode="always_last", **quiet)
        for number, tab in enumerate(page_tabs(tabs)):
            tab.select(lambda number=number: number, None, step, **quiet).then(show, inputs, command, **quiet)
        model["predict"].click(answering(do.predict), form, model["prediction"], show_progress="hidden")
        started = model["start"].click(
            answering(do.start), [model["token"], *form], [run, tabs, step, seen], show_progress="minimal"
        )

        # Training and result
        watched = {
            "fn": answering(do.observe),
            "inputs": [run, seen],
            "outputs": [seen, run, *training["out"], *result["out"]],
        }
        timer.tick(**watched, trigger_mode="once", concurrency_limit=None, **quiet)
        run.input(lambda: {}, None, seen, **quiet).then(**watched, **quiet)
        started.success(**watched, **quiet)
        training["stop"].click(answering(do.stop), run, None, show_progress="minimal").then(**watched, **quiet)
        resumed = training["resume"].click(answering(do.resume), [run, model["token"]], None, show_progress="minimal")
        resumed.then(**watched, **quiet)
        drawing = [run, *(result[name] for name in ("prompt", "count", "seed", "steps", "guidance"))]
        gr.on(
            [result["draw"].click, result["prompt"].submit],
            answering(do.draw),
            drawing,
            result["progress"],
            show_progress="hidden",
            concurrency_limit=None,
        ).then(**watched, **quiet)
        what = [run, result["repo"], result["private"]]
        gr.on(
            [run.change, result["repo"].change, result["private"].change],
            answering(do.push_line),
            what,
            result["line"],
            **quiet,
        )
        result["push"].click(answering(do.push), [*what, result["token"]], result["pushed"], show_progress="hidden")

        # Opened, or loaded again
        loaded = [pictures["concept"], run, seen, tabs, step, *model["form"], *pictures["out"]]
        page.load(answering(do.load), remembered, loaded, **quiet).then(**watched, **quiet).then(
            show, inputs, command, **quiet
        )
        gr.on(
            [run.change, pictures["concept"].change],
            lambda run, concept: {"run": run, "concept": concept},
            [run, pictures["concept"]],
            remembered,
            **quiet,
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


def pictures_step(do):
    """Step 1; its components by name."""
    parts, demo = {}, REPO / "demo" in do.workspace.readable
    folders = [(f"Demo: {p.name.replace('_', ' ')}", str(p)) for p in sorted(SUBJECTS.glob("*/")) if demo]
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
                info="One of the demo's subjects, or a path on the server.",
                allow_custom_value=True,
                elem_id="folder",
            )
            parts["copy"] = gr.Button("Use these pictures", size="sm", elem_id="copy-folder")
    found = gr.HTML(elem_id="found")
    with gr.Row():
        gallery = gr.Gallery(
            show_label=False,
            columns=4,
            height=310,
            object_fit="cover",
            interactive=False,
            buttons=[],
            elem_id="gallery",
        )
        with gr.Column():
            captions = gr.Dataframe(
                headers=["picture", "caption"],
                type="array",
                interactive=True,
                static_columns=[0],
                column_widths=["32%", "68%"],
                label="Captions: say what else is in the picture; {} marks the concept",
                wrap=True,
                max_height=270,
                buttons=[],
                elem_id="captions",
            )
            parts["saved"] = gr.Markdown(elem_id="saved")
    with gr.Accordion("Remove a picture", open=False), gr.Row():
        parts["which"] = gr.Dropdown([], label="Picture", scale=3)
        parts["remove"] = gr.Button("Remove", variant="stop", size="sm")
    parts["next"] = gr.Button("Next: model and method", variant="primary", elem_id="to-model")
    return parts | {"captions": captions, "out": [gallery, captions, found, parts["which"]]}


def connect_pictures(do, pictures, model):
    """What happens in step 1."""
    concept, base, word = pictures["concept"], model["base"], model["class_word"]
    added = [concept, word, *pictures["out"]]
    concept.input(answering(do.choose_concept), [concept, base], pictures["out"], show_progress="hidden")
    pictures["upload"].upload(
        answering(do.upload), [pictures["upload"], concept, base, word], [pictures["upload"], *added]
    )
    pictures["copy"].click(answering(do.copy_folder), [pictures["folder"], concept, base, word], added)
    pictures["remove"].click(answering(do.remove_picture), [pictures["which"], concept, base], pictures["out"])
    pictures["captions"].input(
        answering(do.save_captions), [pictures["captions"], concept], pictures["saved"], show_progress="hidden"
    )
    base.change(answering(do.pictures), [concept, base], pictures["out"], show_progress="hidden")


def model_step(do, concept):
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
        prompt = gr.Textbox(
            "a photo of a {} on the beach", label="Sample prompt", info="{} marks the concept.", scale=2
        )
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
        predict = gr.Button("What will it take?", elem_id="predict")
        start = gr.Button("Start training", variant="primary", elem_id="start")
    prediction = gr.HTML(elem_id="prediction")
    ordered = [fields[name] for name in FIELDS]
    gr.on(
        [base.input, method.input],
        answering(default_values),
        [method, base],
        [others, *ordered],
        show_progress="hidden",
    )
    return {
        "base": base,
        "class_word": class_word,
        "form": [base, method, class_word, subject, prompt, others, *ordered],
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
    with gr.Row():
        plot = gr.LinePlot(
            x="step",
            y="loss",
            color="series",
            color_map={"training (running mean)": "#818cf8", "validation": "#ea580c"},
            title="Loss",
            height=300,
            visible=False,
            elem_id="curve",
        )
        samples = gr.HTML(elem_id="samples")
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(
            show_label=False,
            lines=12,
            max_lines=12,
            autoscroll=True,
            interactive=False,
            elem_id="log",
            buttons=["copy"],
        )
    following = gr.Button("Next: result", variant="primary", visible=False, elem_id="to-result")
    return {
        "stop": stop,
        "resume": resume,
        "next": following,
        "out": [status, plot, samples, log, stop, resume, following],
    }


def result_step():
    """Step 4; its components by name, and "out" as `Handlers.observe` fills them."""
    hint = gr.HTML(elem_id="hint")
    comparison = gr.HTML(elem_id="comparison")
    with gr.Column(visible=False) as drawing:
        with gr.Row():
            prompt = gr.Textbox(
                "a photo of a {} in the snow", label="Draw", info="{} marks the concept.", scale=4, elem_id="prompt"
            )
            draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=1)
        with gr.Accordion("Settings of drawings", open=False), gr.Row():
            count = gr.Slider(1, 8, 4, step=1, label="Images")
            seed = gr.Number(0, label="Seed", precision=0)
            steps = gr.Slider(1, 100, 25, step=1, label="Denoising steps")
            guidance = gr.Slider(0, 15, 5, step=0.5, label="Guidance")
        progress = gr.HTML(elem_id="drawing")
        drawn = gr.HTML(elem_id="drawn")
        with gr.Row():
            file = gr.DownloadButton("Download what was learned", elem_id="download")
            package = gr.DownloadButton("Download everything (ZIP)", interactive=False, elem_id="package")
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
    return parts | {"pushed": pushed, "out": [hint, comparison, drawing, drawn, file, package, card]}


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
    at_once = "Number of trainings at the same time."
    add("--trainings", type=int, default=1, limits=flags.Range(1, 1000), help=at_once)
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
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # nothing to fetch
    theme = gr.themes.Soft(primary_hue="indigo", **fonts).set(
        block_title_background_fill="none",
        block_title_text_color="*body_text_color",
        block_title_padding="0",
        block_label_text_color="*body_text_color",
        block_label_background_fill="*background_fill_secondary",
    )
    guard = Middleware(Guard, host=args.host, names=tuple(args.allow_host))
    page = build_page(book).queue(default_concurrency_limit=8)
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            allowed_paths=[str(workspace.root / name) for name in ("concepts", "runs")],
            inbrowser=args.open and has_screen(),
            show_error=True,
            ssr_mode=False,
            max_file_size="300mb",
            footer_links=[],
            theme=theme,
            css=CSS,
            app_kwargs={"middleware": [guard]},
            **options,
        )
    except OSError as error:
        raise InputError(f"--port {args.port or ''}: {error}") from None
    return page


if __name__ == "__main__":
    run_script(lambda: main(parse_args()), __file__)
