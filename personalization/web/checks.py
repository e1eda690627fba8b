"""What can be said of a form before its script is started, in the words of the page."""

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ..errors import InputError, quoted
from .command_lines import METHODS, read_others


LONGEST_VOCABULARY = 50 * 2**20  # bytes


def check_form(form, workspace):
    """Judges what a visitor has chosen.

    Args:
        form: `command_lines.Form`, its base as it is on the disk or the Hub.
        workspace: `workspace.Workspace`.

    Raises:
        InputError: the script would refuse it, which takes it many seconds.
    """
    rows, _ = workspace.review(form.concept, 1)
    if not any(row.thumbnail is not None for row in rows):
        raise InputError("There are no pictures yet: add some in step 1.")
    method = METHODS[form.method]
    if method.makes_a_word:
        check_words(form, vocabulary(form.base, workspace))
    check_flags({**form.flags, **read_others(form.others, form.method)}, method)


def check_words(form, known):
    """Judges the plain word and the new one.

    Args:
        form: of a method that makes a word.
        known: words that are one token of the base each; None where nobody can say.

    Raises:
        InputError: the plain word is not one token, or the new one is not new.
    """
    start, name = form.class_word.strip(), form.subject.strip()
    if len(start.split()) > 1:
        raise InputError(
            f"What is it, in one plain word? {quoted(start)} is {len(start.split())} words: choose one, such as"
            f" {quoted(start.split()[-1])}, and keep the others for the captions."
        )
    if " " in name or "{}" in name:
        raise InputError(f"Its name in prompts, {quoted(name)}, must be one word without spaces, such as <my-dog>.")
    if known is None:
        return
    if start and start.lower() not in known:
        raise InputError(
            f"What is it, in one plain word? The base model does not know {quoted(start)} as one word: choose a"
            " simpler one for the same kind of thing, such as dog."
        )
    if name.lower() in known:
        raise InputError(
            f"Its name in prompts, {quoted(name)}, is a word that the base model has already: choose a new one, such"
            f" as {quoted('<my-' + name.lower() + '>')}."
        )


def check_flags(flags, method):
    """Judges values by the names of their flags.

    Raises:
        InputError: one is out of the flag's range, or none of its choices.
    """
    for name, value in flags.items():
        flag = method.flags.get(name)
        if flag is None or value is None or value == "":
            continue
        if flag["choices"] and value is not True and str(value) not in map(str, flag["choices"]):
            offered = ", ".join(map(str, flag["choices"]))
            raise InputError(f"{label(name)}: {quoted(value)} is none of {offered}.")
        if not flag["limits"]:
            continue
        least, most, above, below = flag["limits"]
        whole = flag["kind"] == "whole number"
        try:
            number = int(str(value)) if whole and not isinstance(value, float) else float(value)
        except ValueError:
            raise InputError(f"{label(name)}: {quoted(value)} is no {'whole ' * whole}number.") from None
        if not ((least < number if above else least <= number) and (number < most if below else number <= most)):
            smallest = f"{'above' if above else 'at least'} {least:g}"
            raise InputError(
                f"{label(name)} is {value} and must be {smallest} and {'below' if below else 'at most'} {most:g}."
            )


def label(name):
    """What a flag is called on the page."""
    return LABELS.get(name, f"--{name}")


# Flags with a field of their own, and its label.
LABELS = {
    "max_train_steps": "Steps",
    "validation_steps": "Preview every",
    "learning_rate": "Learning rate",
    "train_batch_size": "Batch size",
    "num_inference_steps": "Denoising steps of a preview",
    "num_validation_images": "Images a preview",
    "guidance_scale": "CFG scale of previews",
    "seed": "Seed",
}


def vocabulary(base, workspace):
    """Words of a base's first tokenizer that are one token each, in lower case; None where it is not on this disk."""
    for name in ("tokenizer/vocab.json", "tokenizer/tokenizer.json"):
        path = Path(base) / name
        if not path.is_file() and not Path(base).exists():
            folders = (None, workspace.hub / "hub")
            found = (try_to_load_from_cache(base, name, cache_dir=folder) for folder in folders)
            path = next((Path(each) for each in found if isinstance(each, str)), path)
        if path.is_file() and path.stat().st_size < LONGEST_VOCABULARY:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                tokens = content["model"]["vocab"] if name.endswith("tokenizer.json") else content
                of_clip = {token.removesuffix("</w>") for token in tokens if token.endswith("</w>")}
                of_qwen = {token[1:].lower() for token in tokens if token.startswith("Ġ")}
                return of_clip or of_qwen or None
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return None  # the script will say what is wrong with it
    return None
