"""Properties of the entrances, whatever comes in: metadata rows and settings (damaged files: `test_damage.py`)."""

import csv
import io
import json
import string

import pytest
from accelerate import Accelerator
from damage import LONGEST_SENTENCE, QUICK, check_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_base import build_pictures

import train_zoodip_textual_inversion as zoodip
from personalization import flags
from personalization.data import images, prompts
from personalization.errors import InputError
from personalization.models import base_model


# =====================================================================================================
# Metadata
# =====================================================================================================

# What people type, and what JSON and CSV have trouble with: line ends of Unicode, quotes, separators, emoji.
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\u2028\u0085\x1c\",;'\\{}"))
CAPTIONS = st.builds(lambda before, after: f"{before.strip()} {{}} {after.strip()}".strip(), WORDS, WORDS)
NAMES = st.sampled_from(["a.png", "b.png", "c.png"])
ROWS = st.lists(st.fixed_dictionaries({"file_name": NAMES, "text": CAPTIONS}), unique_by=lambda row: row["file_name"])
ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda some: st.lists(some, max_size=2)
)
ANY_ROWS = st.lists(
    st.dictionaries(st.sampled_from(["file_name", "text", "caption"]), NAMES | CAPTIONS | ANY_VALUE) | ANY_VALUE,
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, whose metadata the tests overwrite."""
    Accelerator()  # its logger wants a state
    path = tmp_path_factory.mktemp("pictures") / "data"
    build_pictures(path)
    return path


@pytest.fixture(scope="module")
def read(folder, demo_base):
    """Reads the pictures with this metadata; returns captions by name, or the sentence that refuses it."""
    base = base_model.open_base(base_model.ModelSource(demo_base))
    placeholder = prompts.add_placeholder(base.tokenizer, "<my-toy>", 1, "star")

    def run(content, name="metadata.jsonl"):
        for other in folder.glob("metadata.*"):
            other.unlink()
        (folder / name).write_bytes(content)
        try:
            pictures = images.read_folder(folder, 8, False)
            prompts.build_prompts(pictures, placeholder, base)
        except InputError as error:
            sentence = str(error)
            assert "\n" not in sentence and len(sentence) <= LONGEST_SENTENCE, sentence
            assert name in sentence or "the caption" in sentence or str(folder) in sentence, sentence
            return sentence
        assert all(picture.caption is None or isinstance(picture.caption, str) for picture in pictures)
        return {picture.name: picture.caption for picture in pictures if picture.caption is not None}

    return run


@settings(QUICK, max_examples=100)
@given(ROWS, st.booleans(), st.sampled_from([b"", b"\xef\xbb\xbf"]), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_good_jsonl_is_read_to_the_letter(read, rows, escaped, mark, end):
    content = mark + end.join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode()
    check_good(read(content), rows)


@settings(QUICK, max_examples=100)
@given(ROWS, st.sampled_from([b"", b"\xef\xbb\xbf"]), st.sampled_from(["\n", "\r\n"]))
def test_good_csv_is_read_to_the_letter(read, rows, mark, end):
    text = io.StringIO()
    table = csv.DictWriter(text, ["file_name", "text"], lineterminator=end)
    table.writeheader()
    table.writerows(rows)
    check_good(read(mark + text.getvalue().encode(), "metadata.csv"), rows)


def check_good(captions, rows):
    """The captions of the rows; too long ones may be refused."""
    expected = {row["file_name"]: row["text"] for row in rows}
    assert captions == expected or "longer than" in captions


@settings(QUICK, max_examples=150)
@given(ANY_ROWS, st.booleans())
def test_any_rows(read, rows, escaped):
    text = "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    read(text.encode("utf-8", "surrogatepass"))


@settings(QUICK, max_examples=100)
@given(st.binary(min_size=1, max_size=200), st.sampled_from(["metadata.jsonl", "metadata.csv"]))
def test_any_bytes(read, content, name):
    read(content, name)


# =====================================================================================================
# Settings
# =====================================================================================================


ACTIONS = flags.actions(zoodip.make_parser())
NUMBERS = {name for name, action in ACTIONS.items() if action.facts.limits}


def numbers(name):
    """Words for a numeric flag: in its range, at its ends, beyond them, and what is no number."""
    limits = ACTIONS[name].facts.limits
    odd = st.sampled_from(["nan", "-inf", "1e400", "0", "-1", "-0.0", "1e-40", "1e30", str(2**64), "9" * 400, "x", ""])
    if isinstance(limits.most, float):
        return st.floats(limits.least, limits.most).map(repr) | odd
    few = st.integers(limits.least, min(limits.most, limits.least + 8))
    return (few | st.sampled_from([limits.least, limits.most, limits.most + 1])).map(str) | odd


ONES = {
    "quantization": ["int8", "none"],
    "gradient_estimator": ["rge", "spsa"],
    "lr_scheduler": ACTIONS["lr_scheduler"].choices,
    "learnable_property": ["object", "style"],
    "mixed_precision": ["no", "bf16", "fp16", "fp8"],
}
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=12) | st.text(string.printable, max_size=12)
FLAGS = {
    **{name: numbers(name) for name in sorted(NUMBERS)},
    **{name: st.sampled_from(values) for name, values in ONES.items()},
    **dict.fromkeys(["center_crop", "scale_lr", "low_vram", "save_a1111", "allow_noisy_estimates"], st.just(True)),
    **dict.fromkeys(("placeholder_token", "initializer_token", "validation_prompt", "report_to", "variant"), TEXT),
}


def some_of(names, **limits):
    """Dicts of a few of `FLAGS`."""
    chosen = st.lists(st.sampled_from(sorted(names)), unique=True, **limits)
    return chosen.flatmap(lambda keys: st.fixed_dictionaries({f"--{key}": FLAGS[key] for key in keys}))


@settings(QUICK, max_examples=60)
@given(some_of(FLAGS, min_size=1, max_size=4))
def test_any_settings_are_judged_before_anything_loads(world, flags):
    outcome = world.train(**{"--estimate_memory": True, **flags})
    if outcome.code:
        check_sentence(world, outcome, [], strict=False)


SHORT = NUMBERS - {"max_train_steps", "num_train_epochs", "repeats", "num_vectors", "resolution"}


@settings(QUICK, max_examples=30)
@given(some_of(SHORT - {"gradient_accumulation_steps", "train_batch_size"}, min_size=1, max_size=3))
def test_a_run_with_any_numbers_ends_well_or_in_one_sentence(world, flags):
    large = {"num_perturbations": 64, "max_candidates_per_forward": 64, "num_validation_samples": 64}
    for name, most in large.items():
        limit = ACTIONS[name].facts.limits.most
        if (value := flags.get(f"--{name}", "0")).isdigit() and most < int(value) <= limit:
            flags[f"--{name}"] = str(most)  # in range, and slow
    world.restore()
    outcome = world.train(**flags)
    if outcome.code:
        check_sentence(world, outcome, [], strict=False)
    else:
        learned = world.embedding()
        assert learned.isfinite().all()
        weights = load_file(world.live / "base" / "text_encoder" / "model.safetensors")
        (table,) = (weights[name] for name in weights if name.endswith("token_embedding.weight"))
        moved = not (learned[0] == table).all(dim=1).any()
        assert moved or "Nothing was learned" in outcome.warnings


def test_every_flag_above_is_one_of_the_script():
    assert FLAGS.keys() <= ACTIONS.keys()
