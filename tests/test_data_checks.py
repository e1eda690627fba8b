"""Pictures, captions and the placeholder as users give them: read, warned about or refused in one sentence each."""

import io
import json
import os
import shutil
import unicodedata
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import as_arguments
from PIL import Image

import train_zoodip_textual_inversion as zoodip
from personalization import files
from personalization.data import examples, images, prompts
from personalization.data.captions import kohya_name, mark_concept, read_captions
from personalization.data.dataset import read_dataset
from personalization.errors import InputError, first_cause, quoted, shorten
from personalization.methods import dreambooth
from personalization.models import base_model


@pytest.fixture(autouse=True)
def log(caplog):
    """The warnings of a test, as one text."""
    Accelerator()  # its logger wants a state
    caplog.set_level("WARNING")
    return lambda: "\n".join(record.message.removeprefix("[RANK 0] ") for record in caplog.records)


def save_picture(path, size=(40, 30), seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """A folder with the pictures a.png and b.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        save_picture(folder / name)
    return folder


def read(folder):
    return images.read_folder(folder, 16, False)


def captions(folder):
    return {picture.name: picture.caption for picture in read(folder)}


def sentence(call, *arguments):
    """The one sentence that a call refuses its input with."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 1000
    text.encode("utf-8")
    return text


# -------------------------------------------------------------------------------------------------- metadata: refused


ROW = {"file_name": "a.png", "text": "a {}"}


@pytest.mark.parametrize(
    "row, expected",
    [
        ({**ROW, "text": 7}, "line 2: text is a number and not text"),
        ({**ROW, "text": 0.5}, "line 2: text is a number and not text"),
        ({**ROW, "text": True}, "line 2: text is true or false and not text"),
        ({**ROW, "text": float("nan")}, "line 2: text is a number and not text"),
        ({**ROW, "text": float("inf")}, "line 2: text is a number and not text"),
        ({**ROW, "text": ["{}"]}, "line 2: text is a list and not text"),
        ({**ROW, "text": {"en": "{}"}}, "line 2: text is an object and not text"),
        ({**ROW, "text": "a \ud83d {}"}, "line 2: text has '\\ud83d' in it, which is half of a character"),
        ({**ROW, "file_name": 7}, "line 2: file_name is a number and not text"),
        ({**ROW, "file_name": ["a.png"]}, "line 2: file_name is a list and not text"),
        ({**ROW, "file_name": None}, "line 2: file_name is empty"),
        ({**ROW, "file_name": " "}, "line 2: file_name is empty"),
        ({**ROW, "file_name": "\udc80.png"}, "line 2: file_name has '\\udc80' in it"),
        ({"text": "{}"}, "line 2 has no field file_name; its fields are 'text'"),
        ({"file_name": "a.png", "caption": "{}"}, 'line 2 has no field text ("" means no caption); its fields are'),
        ({}, "line 2 has no field file_name; its fields are ''"),
        (["{}"], "line 2 is a list and not an object such as {"),
        ("{}", "line 2 is text and not an object"),
        (7, "line 2 is a number and not an object"),
        (None, "line 2 is null and not an object"),
        ({**ROW, "file_name": "b.png"}, "lines 1 and 2 have two captions for 'b.png': keep one"),
        ({"file_name": "./b.png", "text": ""}, "lines 1 and 2 have two captions for './b.png': keep one"),
    ],
)
def test_a_row_that_breaks_the_schema(folder, row, expected):
    first = {"file_name": "b.png", "text": "the {} of line 1"}
    (folder / "metadata.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(row)}\n")
    message = sentence(read, folder)
    assert "metadata.jsonl cannot be read: " in message and expected in message


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"file_name": "a.png", "text": "\xe9 {}"}', "line 1 is not UTF-8 (byte 0xe9): save it as UTF-8"),
        ('{"file_name": "a.png", "text": "{}"}'.encode("utf-16"), "it is not text in UTF-8: save it as UTF-8"),
        ('{"file_name": "a.png", "text": "{}"}'.encode("utf-16-le"), "it is not text in UTF-8"),
        (bytes(100), "it is not text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "line 1 is not UTF-8"),
        (b"[\n", "line 1 is not JSON (Expecting value at column 2)"),
        (b'\n\n{"file_name": "a.png",', "line 3 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"9" * 10_000, "line 1 is not JSON"),
        (b'{"file_name": "a.png", "text": "{}"} {}', "line 1 is not JSON (Extra data"),
    ],
)
def test_a_file_that_is_no_metadata(folder, content, expected):
    (folder / "metadata.jsonl").write_bytes(content)
    assert expected in sentence(read, folder)


def test_metadata_that_is_no_file_or_cannot_be_opened(folder, monkeypatch):
    path = folder / "metadata.jsonl"
    path.mkdir()
    assert "metadata.jsonl cannot be read: it is not a file" in sentence(read, folder)
    path.rmdir()
    path.symlink_to("nowhere")
    assert "it is not a file" in sentence(read, folder)
    path.unlink()
    path.symlink_to("metadata.jsonl")
    assert "it is not a file" in sentence(read, folder)
    path.unlink()
    os.mkfifo(path)
    assert "it is not a file" in sentence(read, folder)
    path.unlink()
    path.write_text("")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "read_bytes", refuse)  # root may read everything
    assert "metadata.jsonl cannot be read: Permission denied; every row" in sentence(read, folder)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("file_name,text\na.png,a {}, red\n", "line 2 has 3 fields and the header 2: put a text with commas in it"),
        ("file_name;text\na.png;a {}; red\n", "line 2 has 3 fields and the header 2: put a text with ';' in it"),
        ('file_name,text\na.png,"a {}\n', "is not CSV (unexpected end of data)"),
        ('file_name,text\na.png,"a" {}\n', "line 2 is not CSV"),
        (f"file_name,text\na.png,{'x' * 200_000}\n", "line 2 is not CSV (field larger than field limit"),
        ("file_name,text,text\na.png,{},{}\n", "its header has the field text twice"),
        ("a.png,a {}\nb.png,a {}\n", "line 2 has no field file_name; its fields are 'a.png, a {}'"),
        ("file_name,caption\na.png,a {}\n", "line 2 has no field text"),
        ("file_name,text\n,a {}\n", "line 2: file_name is empty"),
        ("file_name,text\na.png,a {}\n\na.png,b {}\n", "lines 2 and 4 have two captions for 'a.png'"),
    ],
)
def test_a_table_that_cannot_be_read(folder, content, expected):
    (folder / "metadata.csv").write_text(content)
    message = sentence(read, folder)
    assert "metadata.csv cannot be read: " in message and expected in message


def test_a_table_in_latin_1(folder):
    (folder / "metadata.csv").write_bytes("file_name,text\na.png,a {}\nb.png,ein schönes {}\n".encode("latin-1"))
    assert "line 3 is not UTF-8 (byte 0xf6): save it as UTF-8 (in Excel: as CSV UTF-8)" in sentence(read, folder)


# ------------------------------------------------------------------------------------------------- metadata: accepted


@pytest.mark.parametrize("text", [None, "", " ", "\u3000\n"])
def test_no_text_is_no_caption(folder, text, log):
    (folder / "metadata.jsonl").write_text(json.dumps({**ROW, "text": text}))
    assert captions(folder) == {"a.png": None, "b.png": None} and not log()


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_lines_end_at_line_feeds_only(folder, mark):
    content = f'{{"file_name": "a.png", "text": "one{mark}{{}}"}}\r\n\n{{"file_name": "b.png", "text": "{{}}"}}'
    (folder / "metadata.jsonl").write_bytes(content.encode())
    assert captions(folder) == {"a.png": f"one{mark}{{}}", "b.png": "{}"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_byte_order_mark_is_read_over(folder, name):
    row = json.dumps(ROW) if name.endswith("jsonl") else "file_name,text\r\na.png,a {}\r\n"
    (folder / name).write_bytes(b"\xef\xbb\xbf" + row.encode())
    assert captions(folder)["a.png"] == "a {}"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_the_separators_of_spreadsheets(folder, delimiter, quote):
    fields = [["number", "file_name", "text"], ["1", "a.png", "a {}"], ["2", "b.png", 'the "{}" \u2028 here']]
    stream = io.StringIO(newline="")
    for row in fields:
        doubled = [f"{quote}{value.replace(chr(34), chr(34) * 2) if quote else value}{quote}" for value in row]
        stream.write(delimiter.join(doubled) + "\r\n")
    (folder / "metadata.csv").write_bytes((stream.getvalue() + f"{delimiter * 2}\r\n").encode())
    assert captions(folder) == {"a.png": "a {}", "b.png": 'the "{}" \u2028 here'}


def test_lines_inside_quotes_and_rows_without_text(folder):
    (folder / "metadata.csv").write_text('file_name, text\na.png,"a {},\nwith a second line"\nb.png\n')
    assert captions(folder) == {"a.png": "a {},\nwith a second line", "b.png": None}


def test_a_row_twice_is_said(folder, log):
    (folder / "metadata.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    assert captions(folder)["a.png"] == "a {}"
    assert log() == "The metadata lists 'a.png' twice, in lines 1 and 2."


def test_two_metadata_files_and_one_without_rows(folder, log):
    (folder / "metadata.jsonl").write_text("\n \n")
    (folder / "metadata.csv").write_text("file_name,text\na.png,a {}\n")
    assert captions(folder)["a.png"] is None
    assert "metadata.csv is not read, because metadata.jsonl is there too." in log()
    assert "metadata.jsonl has no rows: no picture has a caption." in log()


def test_names_are_compared_as_people_read_them(folder, log):
    decomposed = unicodedata.normalize("NFD", "né.png")
    save_picture(folder / decomposed)
    rows = [{"file_name": unicodedata.normalize("NFC", decomposed), "text": "{}"}, {**ROW, "file_name": "./a.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(folder) == {"a.png": "a {}", "b.png": None, decomposed: "{}"} and not log()


def test_rows_of_missing_files_are_said(folder, log):
    rows = [{**ROW, "file_name": f"{i}.png"} for i in range(100)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read(folder)
    assert log() == (
        "The metadata lists files that are not among the images: 0.png, 1.png, 10.png, 11.png, 12.png, ...."
    )


def test_no_metadata_at_all(tmp_path):
    assert read_captions(tmp_path) == {}


# ------------------------------------------------------------------------------------------------- prompts


@pytest.fixture
def base(demo_base):
    return base_model.open_base(base_model.ModelSource(demo_base))


def build(base, caption, num_vectors=1, token="<my-toy>"):
    placeholder = prompts.add_placeholder(base.tokenizer, token, num_vectors, "star")
    return prompts.build_prompts([images.Picture("a.png", None, caption)], placeholder, base)


def test_a_megabyte_of_caption_is_not_echoed(base):
    assert "'red red " in sentence(build, base, "red " * 250_000)
    message = sentence(build, base, "red " * 250_000 + "{}", 1, "<other>")
    assert "cut off <other>: shorten it." in message


def test_the_longest_caption_that_fits(base):
    words = prompts.words_in_prompt(base.tokenizer)
    build(base, "red " * (words - 2) + "{}", 2)
    message = sentence(build, base, "red " * (words - 1) + "{}", 2, "<other>")
    assert "the caption 'red red" in message and "shorten it, or lower --num_vectors 2." in message


@pytest.mark.parametrize("caption", [None, "{}"])
@pytest.mark.parametrize("many", [31, 10**12])
def test_more_vectors_than_a_prompt_takes(base, many, caption):
    message = sentence(build, base, caption, many)
    assert f"--num_vectors {many} does not fit into a prompt, which takes 30 tokens" in message


def test_more_vectors_than_the_templates_have_room_for(base):
    message = sentence(build, base, None, 28)
    assert "--num_vectors 28 does not fit" in message and "caption" not in message
    most = int(message.split("give at most ")[1].rstrip("."))
    build(base, None, most, "<fits>")
    assert f"give at most {most}." in sentence(build, base, None, most + 1, "<does-not>")
    build(base, "{}", 30, "<whole>")


@pytest.mark.parametrize(
    "token",
    [
        *("", " ", " <toy>", "<toy>\n", "<toy> ", "<my toy>", "<my\ttoy>", "<toy>\r", "<toy>\0", "<t\x07oy>"),
        *("<toy\u00a0>", "<toy\u3000>", "\u2028<toy>", "<toy\u0085>", "<toy>\u200b", "\ufeff<toy>", "<to\u00ady>"),
        *("<toy\u200d>", "<toy\u202e>", "<toy\udcff>", "<toy\ue000>", "{}", "<{}>", "a\n" * 10**5),
    ],
)
def test_a_placeholder_is_one_visible_word(base, token):
    message = sentence(build, base, "{}", 1, token)
    assert message.startswith("--placeholder_token '") and "must be one word" in message


@pytest.mark.parametrize(
    "token", ["<toy>", "<玩具>", "<my-игрушка>", "<🧸>", "<é>", "<e\u0301>", "<a|b>", '<"q">', "sksx"]
)
def test_placeholders_of_any_script(base, token):
    placeholder = prompts.add_placeholder(base.tokenizer, token, 2, "star")
    ids, _ = prompts.build_prompts([images.Picture("a.png", None, "red {}, red")], placeholder, base)
    assert [placeholder.first_id, placeholder.first_id + 1] == ids[0, 2:4].tolist()


def test_an_initializer_with_half_a_character(base):
    assert "--initializer_token has '\\udcff' in it" in sentence(
        prompts.add_placeholder, base.tokenizer, "<toy>", 1, "st\udcffar"
    )


# ------------------------------------------------------------------------------------------------- folders


def test_the_folder_itself(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "loop", "dangling", "missing", "x" * 5000, "null\0"):
        assert "is not a folder: give the folder" in sentence(read, str(tmp_path / name))
    for name in ("", " "):
        assert f"--train_data_dir {name!r} is empty: give the folder" in sentence(read, name)

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert "cannot be read (Permission denied): give the folder" in sentence(read, str(tmp_path))


def test_what_lies_beside_the_pictures_is_said(folder, log, monkeypatch):
    (folder / "x.jpg").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder / "linked.png").symlink_to("a.png")
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0 ftypheic")
    monkeypatch.setattr(images, "readable_suffixes", lambda: {".png", ".jpg"})  # without pillow-heif
    assert list(captions(folder)) == ["a.png", "b.png", "linked.png"]
    assert log().splitlines() == [
        f"Ignored 1 files in '{folder}' that are not images: IMG_1.HEIC (IMG_1.HEIC cannot be read here: pip install"
        " pillow-heif, or save such images as JPEG or PNG).",
        f"Ignored folders in '{folder}': x.jpg; only pictures beside them are read.",
        f"Skipped links to nothing, pipes or devices in '{folder}': gone.png, loop.png, pipe.png, zero.png.",
    ]


# ------------------------------------------------------------------------------------------ captions beside pictures


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"a {} on grass", "a {} on grass"),
        (b"\xef\xbb\xbfa {} on grass\r\n", "a {} on grass"),
        ("a {} im Caf\u00e9\r\n\r\nat night \n".encode(), "a {} im Caf\u00e9 at night"),
        (b"", None),
        (b" \r\n", None),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.TXT"])
def test_a_text_file_beside_a_picture_is_its_caption(folder, log, name, content, expected):
    (folder / name).write_bytes(content)
    assert captions(folder) == {"a.png": expected, "b.png": None}
    assert ("All lines of a text file are one caption: a." in log()) == (b"night" in content) and "lost" not in log()


def test_text_files_and_metadata_that_disagree(folder, log):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "metadata {}"}))
    (folder / "a.txt").write_text("metadata {}\n")
    (folder / "b.txt").write_text("beside {}")
    assert captions(folder) == {"a.png": "metadata {}", "b.png": "beside {}"} and not log()
    (folder / "a.txt").write_text("another {}")
    assert captions(folder)["a.png"] == "metadata {}"
    assert log() == "The metadata and the text files beside the pictures disagree about a.png: the metadata counts."


def test_two_text_files_of_one_picture(folder, log):
    (folder / "a.caption").write_text("long {}")
    (folder / "a.txt").write_text("short {}")
    assert captions(folder)["a.png"] == "short {}"
    assert log() == "A second text file of a picture says something else and is not read: a.txt counts."


def test_a_text_file_that_cannot_be_read(folder):
    (folder / "a.txt").write_bytes("a {}".encode("utf-16"))
    assert "a.txt cannot be read: it is not text in UTF-8: save it as UTF-8." in sentence(read, folder)


WRITTEN = "c.txt captions.json meta_cap.json captions.csv metadata.parquet captions/a.txt a.png.txt".split()


@pytest.mark.parametrize("name", WRITTEN)
def test_what_somebody_wrote_is_not_dropped_without_a_sentence(folder, log, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    read(folder)
    assert f"If {name} hold captions, they are lost: captions are read from metadata.jsonl" in log()


def test_words_in_other_fields_of_metadata_are_said_to_be_lost(folder, log):
    row = {"file_name": "a.png", "text": "", "tags": "dog, sofa", "width": 40, "hash": "12", "note": ""}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    read(folder)
    assert log() == "Captions are in the field text of the metadata: what tags say is lost."


def test_folders_of_kohya(folder, log):
    parent = folder.parent / "train"
    (parent / "empty").mkdir(parents=True)
    for name in ("10_my_dog", "4_my dog"):
        shutil.copytree(folder, parent / name)
    (parent / "10_my_dog" / "a.txt").write_text("My Dog on grass, not my dogs")
    rows = ({"file_name": "4_my dog/b.png", "text": "b {}"}, {"file_name": "b.png", "text": "lost"})
    (parent / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pictures = read(parent)
    assert [(p.name, p.caption, p.repeats, p.class_words) for p in pictures] == [
        ("10_my_dog/a.png", "My Dog on grass, not my dogs", 10, "my dog"),
        ("10_my_dog/b.png", None, 10, "my dog"),
        ("4_my dog/a.png", None, 4, "my dog"),
        ("4_my dog/b.png", "b {}", 4, "my dog"),
    ]
    assert "Ignored folders in" in log() and "the images: b.png." in log()
    assert examples.order_of(pictures).tolist() == [0] * 5 + [1] * 5 + [2] * 2 + [3] * 2
    assert images.digest(pictures) != images.digest([each._replace(repeats=1) for each in pictures])
    marked = mark_concept(pictures, "my dog", ["<toy>"])
    assert [p.caption for p in marked] == ["{} on grass, not my dogs", None, None, "b {}"]
    alone = read(parent / "4_my dog")
    assert {(p.repeats, p.class_words) for p in alone} == {(1, "my dog")} and examples.order_of(alone) is None


@pytest.mark.parametrize(
    "name, expected",
    [("10_my dog", (10, "my dog")), ("1_a_b", (1, "a b")), ("0_x", (1, None)), ("10_", (1, None)), ("x_1", (1, None))],
)
def test_names_of_kohya(name, expected):
    assert kohya_name(name) == expected


def test_a_caption_that_names_the_class_word_only(base, log):
    placeholder = prompts.add_placeholder(base.tokenizer, "<my-toy>", 1, "star")
    pictures = [images.Picture(f"{i}.png", None, text) for i, text in enumerate(("a Star", "a cat", "a {}", None))]
    message = sentence(prompts.build_prompts, pictures, placeholder, base)
    assert message.endswith(
        'put {} or <my-toy> there, or give --caption_token "star", which 1 of 2 such captions name.'
    )
    marked = mark_concept(pictures, "star", ["<my-toy>"])
    assert [picture.caption for picture in marked] == ["a {}", "a cat", "a {}", None] and not log()
    message = sentence(prompts.build_prompts, marked, placeholder, base)
    assert message.endswith("put {} or <my-toy> there.")
    assert mark_concept(marked, "dog", []) == marked
    assert log() == "--caption_token 'dog' changed nothing: no caption without {} says it."


@pytest.mark.parametrize("mark", ["<embedding>", "[trigger]", "[name]"])
def test_captions_of_other_programs_say_where_the_concept_goes_in_their_way(base, mark):
    pictures = [images.Picture("a.png", None, f"a photo of {mark} in grass")]
    placeholder = prompts.add_placeholder(base.tokenizer, "<my-toy>", 1, "star")
    message = sentence(prompts.build_prompts, pictures, placeholder, base)
    assert f'or give --caption_token "{mark}", which 1 of 1 such captions name' in message
    (picture,) = mark_concept(pictures, mark, ["<my-toy>"])
    assert picture.caption == "a photo of {} in grass"


def test_a_placeholder_in_capitals_is_not_replaced_in_part():
    pictures = [images.Picture("a.png", None, "a photo of <My-Dog>, my dog")]
    assert mark_concept(pictures, "dog", ["<my-dog>"]) == pictures


def test_captions_of_class_images_are_said_to_be_lost(folder, log):
    (folder / "a.txt").write_text("a photo of a dog in grass")
    args = SimpleNamespace(class_data_dir=str(folder), num_class_images=2)
    assert len(dreambooth.read_class_folder(args, 16)) == 2
    assert "Captions in --class_data_dir are lost (a.png): class images have --class_prompt." in log()


def test_repeats_decide_how_often_a_picture_is_drawn():
    moments = torch.cat([torch.arange(2.0).view(1, 2, 1, 1, 1), torch.full((1, 2, 1, 1, 1), -60.0)], dim=2)
    family = SimpleNamespace(to_latents=lambda sample, config: sample)
    concept = examples.Concept(moments, 0.0, family, {}, torch.arange(2), [[0], [1]], None, torch.tensor([0, 0, 0, 1]))
    _, prompts_drawn, *_ = examples.draw_examples(concept, 4000, torch.Generator().manual_seed(0))
    assert prompts_drawn.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_a_folder_without_pictures_says_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "readable_suffixes", lambda: {".png", ".jpg"})  # without pillow-heif
    (tmp_path / "dogs").mkdir()
    message = sentence(read, tmp_path)
    assert "holds no readable image (0 files looked at)" in message and "one of the folders in it (dogs)" in message
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0")
    assert "IMG_1.HEIC cannot be read here: pip install pillow-heif, or save such images as JPEG or PNG." in sentence(
        read, tmp_path
    )


def test_pictures_that_cannot_be_decoded_are_skipped(folder, monkeypatch, log):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:500])
    save_picture(folder / "huge.png", (60, 60))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    assert list(captions(folder)) == ["a.png", "b.png"]
    lines = log().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        *("Skipped cut.png", "Skipped empty.png", "Skipped huge.png", "Skipped text.jpg")
    ]
    assert "it is empty, or of no format that is known here" in lines[1]
    assert "pixels: scale it down" in lines[2]
    assert str(folder) not in log()


def test_pictures_below_the_limit_of_pil_are_read_without_a_word(folder, monkeypatch, recwarn, log):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL warns of 1200 pixels and refuses more than 2000
    assert len(read(folder)) == 2 and not log() and not recwarn.list


def test_hundreds_of_damaged_pictures_take_a_few_lines(folder, log):
    for i in range(300):
        (folder / f"{i:03}.jpg").write_bytes(b"")
    assert len(read(folder)) == 2
    assert len(log().splitlines()) == images.MANY_WARNINGS + 1
    assert log().endswith("Skipped 300 of 302 files in all.")


def test_many_pictures_are_said(folder, monkeypatch, log):
    monkeypatch.setattr(images, "MANY_PICTURES", 1)
    assert len(read(folder)) == 2
    assert log().startswith("2 pictures are many (3 to 20 are usual)")


def test_moving_pictures_give_their_first_frame(folder, log):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png", "tiff"):
        frames[0].save(folder / f"moving.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    pictures = {picture.name: picture.pixels for picture in read(folder)}
    for suffix in ("gif", "webp", "png", "tiff"):
        assert pictures[f"moving.{suffix}"][0].min() > 250 and pictures[f"moving.{suffix}"][2].max() < 5
    names = "moving.gif, moving.png, moving.tiff, moving.webp"
    assert log() == f"Of pictures that move or have pages, only the first is used: {names}."


def test_tiny_and_thin_pictures(folder, log):
    save_picture(folder / "dot.png", (1, 1))
    save_picture(folder / "line.png", (1, 3000))
    for crop in (False, True):
        assert len(images.read_folder(folder, 16, crop)) == 4
    assert "far smaller than the resolution of 16 will be a blur: dot.png, line.png." in log()


def test_names_of_any_kind(folder, log):
    save_picture(folder / "LOUD.PNG")
    save_picture(folder / "two\nlines.png")
    raw = os.path.join(os.fsencode(folder), b"raw\xff.png")
    os.link(folder / "a.png", raw)
    os.link(folder / "a.png", raw + b".txt")
    pictures = read(folder)
    assert len(pictures) == 5 and "raw\\udcff.png.txt" in log()
    log().encode("utf-8")
    odd = next(picture for picture in pictures if "\n" in picture.name)
    placeholder = prompts.Placeholder("<toy>", 1, 0, 0)
    message = sentence(prompts.build_prompts, [odd._replace(caption="a dog")], placeholder, None)
    assert "the caption of two\\nlines.png, 'a dog', does not say" in message


# ------------------------------------------------------------------------------------------------- output folder


def test_the_output_folder_is_not_the_data_folder(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    flag = "--train_data_dir"
    for output in (folder, f"{folder}/", f"{folder}/../images", tmp_path / "link"):
        assert f" is {flag} " in sentence(files.check_apart, flag, folder, output)
    assert f" is {flag} " in sentence(files.check_apart, flag, tmp_path / "link", folder)
    assert f" lies in {flag} " in sentence(files.check_apart, flag, folder, folder / "out" / "new")
    assert f" holds {flag} " in sentence(files.check_apart, flag, folder, tmp_path)
    files.check_apart(flag, folder, tmp_path / "images-2")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"train_data_dir": ""}, "--train_data_dir '' is empty"),
        ({"train_data_dir": None, "dataset_name": ""}, "--dataset_name '' is empty"),
        ({"output_dir": ...}, "is --train_data_dir"),
        ({"placeholder_token": " <toy>"}, "--placeholder_token ' <toy>' must be one word"),
        ({"num_vectors": 75}, "--num_vectors 75 does not fit into a prompt"),
    ],
)
def test_by_the_command_line(basics, folder, flags, expected):
    flags = {f"--{name}": str(folder) if value is ... else value for name, value in flags.items()}
    before = sorted(os.listdir(folder))
    arguments = as_arguments({**basics, "--train_data_dir": str(folder), **flags})
    assert expected in sentence(lambda: zoodip.main(zoodip.parse_args(arguments)))
    assert sorted(os.listdir(folder)) == before


# ------------------------------------------------------------------------------------------------- datasets


def png(seed=0):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def dataset(tmp_path):
    """Writes columns as a dataset on disk; returns its name. Images are lists of {"bytes", "path"}."""

    def write(split="train", **columns):
        kinds = {"image": datasets.Image(), "other": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        features = datasets.Features({name: kinds.get(name, datasets.Value("string")) for name in columns})
        for name, values in columns.items():
            if name not in kinds and values and not isinstance(values[0], (str, type(None))):
                features[name] = datasets.Value("int64")
        folder = tmp_path / f"dataset-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        return str(folder)

    return write


def load(name, image_column="image", caption_column="text"):
    return read_dataset(name, None, image_column, caption_column, 16, False)


def test_damaged_images_of_a_dataset_are_skipped(dataset, log):
    cut = {"bytes": png()["bytes"][:200], "path": None}
    values = [png(), cut, {"bytes": b"", "path": None}, None, {"bytes": b"text", "path": None}, png(1)]
    pictures = load(dataset(image=values, text=[f"{i} {{}}" for i in range(6)]))
    assert [(picture.name, picture.caption) for picture in pictures] == [("image 0", "0 {}"), ("image 5", "5 {}")]
    assert [line.split(",")[0] for line in log().splitlines()] == [f"Skipped image {i}" for i in (1, 2, 3, 4)]
    message = sentence(load, dataset(image=[cut, cut], text=["{}", "{}"]))
    assert "has no readable image among the 2 of its train split" in message


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"image_column": "text"}, "does not hold images but string: choose from ['image', 'other']"),
        ({"image_column": "label"}, "does not hold images but the type ClassLabel"),
        ({"image_column": "number"}, "does not hold images but int64"),
        ({"image_column": "nothing"}, "is not in '"),
        ({"image_column": ""}, "--image_column '' is not in '"),
        ({"caption_column": "image"}, "does not hold text but the type Image: choose from ['text'], or give ''"),
        ({"caption_column": "other"}, "does not hold text but the type Image"),
        ({"caption_column": "label"}, "does not hold text but the type ClassLabel"),
        ({"caption_column": "number"}, "does not hold text but int64"),
        ({"caption_column": "nothing"}, "--caption_column 'nothing' is not in '"),
    ],
)
def test_columns_of_another_kind(dataset, columns, expected):
    name = dataset(image=[png()], other=[png()], text=["{}"], label=[0], number=[3])
    assert expected in sentence(lambda: load(name, **columns))


def test_captions_of_a_dataset(dataset, log):
    name = dataset(image=[png()] * 3, caption=["a {}", None, " "])
    assert [picture.caption for picture in load(name, caption_column="caption")] == ["a {}", None, None]
    assert [picture.caption for picture in load(name, caption_column="")] == [None] * 3 and not log()
    assert [picture.caption for picture in load(name)] == [None] * 3
    assert "has no column 'text': --caption_column would choose from ['caption']." in log()


def test_datasets_that_cannot_be_loaded(dataset, tmp_path):
    for name in ("", " "):
        assert "is empty: give the id of a dataset" in sentence(load, name)
    assert "cannot be loaded (" in sentence(load, str(tmp_path / "nowhere"))
    assert 'Unknown split "train"' in sentence(load, dataset("test", image=[png()]))
    assert "corresponds to no data" in sentence(load, dataset(image=[], text=[]))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "train.parquet").write_bytes(b"PAR1 and no more")
    assert "cannot be loaded (" in sentence(load, str(damaged))
    (damaged / "train.parquet").unlink()
    (damaged / "train.csv").write_text('a,b\n"' + "x" * 1000)
    sentence(load, str(damaged))


# ------------------------------------------------------------------------------------------------- sentences


def test_what_a_sentence_echoes_is_short_and_on_one_line():
    assert shorten("a\n  b") == "a b" and len(shorten("x" * 10**6)) == 80 and shorten("x" * 10**6).endswith("…")
    assert quoted("a\n\udcff") == "'a\\n\\udcff'" and len(quoted("x" * 10**6)) == 82
    error = OSError("outer")
    error.__cause__ = PermissionError(13, "Permission denied", "/secret")
    assert first_cause(error) == "Permission denied" and first_cause(ValueError()) == "ValueError"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_random_damage_to_metadata_is_one_sentence_at_most(tmp_path, name):
    """Cut, doubled, zeroed, flipped and swapped bytes: captions of text, or one sentence."""
    rows = [{"file_name": f"{i}.png", "text": f'ein "schönes" {{}}, Nr. {i}'} for i in range(4)]
    whole = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if name.endswith("csv"):
        doubled = (f'{row["file_name"]},"{row["text"].replace(chr(34), chr(34) * 2)}"' for row in rows)
        whole = "\n".join(["file_name,text", *doubled])
    draw, refusals = np.random.default_rng(0), 0
    for _ in range(500):
        data = bytearray(whole.encode())
        for _ in range(draw.integers(1, 4)):
            first, last = sorted(draw.integers(0, len(data) + 1, 2))
            chunk, kind = data[first:last], draw.integers(5)
            if kind == 4 and data:
                data[first % len(data)] ^= 1 << draw.integers(8)
            elif kind < 4:
                data[first:last] = (b"", chunk * 2, bytes(len(chunk)), chunk[::-1])[kind]
        (tmp_path / name).write_bytes(data)
        try:
            found = read_captions(tmp_path)
        except InputError as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) < 1000 and name in str(error)
        else:
            assert all(isinstance(key, str) and key for key in found)
            assert all(text is None or (isinstance(text, str) and text.strip()) for text in found.values())
    assert 100 < refusals < 500
