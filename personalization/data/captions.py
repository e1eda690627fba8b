"""Captions: rows of a metadata file, text files beside pictures, names of folders; judged where they enter."""

import codecs
import csv
import io
import json
import os
import re
import unicodedata

from ..errors import InputError, first_cause, plain, quoted, shorten
from ..logs import get_logger


logger = get_logger(__name__)

METADATA_NAMES = "metadata.jsonl", "metadata.csv"
SIDECARS = ".txt", ".caption"  # of 01.jpg: 01.txt; where there are both, the first counts
# Files that may hold what somebody wrote about pictures.
WRITTEN = {*SIDECARS, *".json .jsonl .csv .tsv .yaml .yml .xml .parquet .toml .md .xlsx .ods".split()}
MARKS = "<embedding>", "[trigger]", "[name]"  # which mark the concept for OneTrainer, ai-toolkit, Automatic1111
ROW = '{"file_name": "a.png", "text": "a photo of {}"}'


def read_captions(folder, flag="--train_data_dir"):
    """The captions in the `metadata.jsonl` or `metadata.csv` (the imagefolder format) of a folder of pictures.

    Every row has a `file_name` and a `text`. A text that is null, empty or blank means that the picture has no
    caption, so that it is trained with the templates. A table may be separated by commas, semicolons (Excel in much
    of Europe) or tabs; a byte order mark (Excel's "CSV UTF-8") is read over.

    Returns:
        dict, caption or None by `file_key`; {} where there is no such file.

    Raises:
        InputError: the file or a row of it cannot be used; the sentence names file, line and fix.
    """
    paths = [folder / name for name in METADATA_NAMES if os.path.lexists(folder / name)]
    if not paths:
        return {}
    path = paths[0]
    if len(paths) > 1:
        logger.warning(f"{paths[1].name} is not read, because {path.name} is there too.")
    try:
        rows = list((table_rows if path.suffix == ".csv" else json_rows)(read_text(path)))
        captions = captions_by_file(rows)
    except InputError as error:
        problem = str(error).removesuffix(".")
        raise InputError(
            f"{flag} {quoted(folder, 300)}: {path.name} cannot be read: {problem}; every row needs the"
            " fields file_name and text."
        ) from None
    if not rows:
        logger.warning(f"{path.name} has no rows: no picture has a caption.")
    return captions


def read_sidecars(folder, sidecars, flag="--train_data_dir"):
    """The captions in text files beside pictures, as kohya's scripts, OneTrainer and ai-toolkit have them.

    Args:
        folder: of the pictures.
        sidecars: name of a picture -> names of its text files, see `images.list_folder`.

    Returns:
        dict, caption or None by `file_key` of the picture. The lines of a file are one caption.

    Raises:
        InputError: a file cannot be read; the sentence names it.
    """
    captions, several, differ = {}, [], []
    for picture, names in sidecars.items():
        texts = []
        for name in names:
            try:
                lines = [line.strip() for line in read_text(folder / name).splitlines()]
            except InputError as error:
                problem = str(error).removesuffix(".")
                raise InputError(f"{flag} {quoted(folder, 300)}: {plain(name)} cannot be read: {problem}.") from None
            lines = [line for line in lines if line]
            several += [name] * (len(lines) > 1)
            texts.append(" ".join(lines) or None)
        differ += [names[0]] * (len(set(texts)) > 1)
        captions[file_key(picture)] = texts[0]
    if several:
        logger.warning(f"All lines of a text file are one caption: {some(several)}.")
    if differ:
        logger.warning(f"A second text file of a picture says something else and is not read: {some(differ)} counts.")
    return captions


def all_captions(folder, sidecars, flag="--train_data_dir"):
    """The captions of a folder by `file_key`: metadata first, then text files beside pictures. Raises as they do."""
    beside, listed = read_sidecars(folder, sidecars, flag), read_captions(folder, flag)
    differ = [name for name in sidecars if (key := file_key(name)) in listed and listed[key] != beside[key]]
    if differ:
        logger.warning(
            f"The metadata and the text files beside the pictures disagree about {some(differ)}: the metadata counts."
        )
    return beside | listed


def kohya_name(folder):
    """Repeats and class words in a folder's name, as kohya's scripts have it (`10_my dog`); (1, None) of others."""
    match = re.fullmatch(r"(\d{1,6})_(.*\S.*)", os.path.basename(os.path.abspath(folder)))
    repeats = int(match[1]) if match else 0
    return (repeats, " ".join(match[2].replace("_", " ").split())) if repeats else (1, None)


def whole_word(word):
    """The pattern of a word, or several, that is not part of another one."""
    return re.compile(rf"(?<!\w){re.escape(word.strip())}(?!\w)", re.IGNORECASE)


def mark_concept(pictures, word, names, flag="--caption_token"):
    """Puts {} in the place of a word, in captions that do not say yet where the concept goes.

    Args:
        pictures: `images.Picture`s.
        word: one or more words, the value of `flag`; None changes nothing.
        names: what else says it.

    Returns:
        The `Picture`s.
    """
    if word is None:
        return pictures
    marked, names = [], [name.lower() for name in ("{}", *names)]  # as the tokenizer reads them
    for picture in pictures:
        text = picture.caption
        if text is not None and not any(name in text.lower() for name in names):
            picture = picture._replace(caption=whole_word(word).sub("{}", text))
        marked.append(picture)
    if marked == pictures:
        logger.warning(f"{flag} {quoted(word)} changed nothing: no caption without {{}} says it.")
    return marked


def some(names):
    """The first few of many names, for a warning."""
    return ", ".join(map(plain, names[:5])) + (", ..." if len(names) > 5 else "")


def file_key(name):
    """A file name as it is compared: "é" may be one character in metadata and two on a disk of macOS."""
    return unicodedata.normalize("NFC", name).removeprefix("./")


def check_text(value, what):
    """A caption as a string, or None where there is none (null, empty or blank).

    Args:
        value: of a row.
        what: the sentence's subject, such as "line 3: text".

    Raises:
        InputError: it is not text.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{what} is {kind_of(value)} and not text.")
    check_unicode(value, what)
    return value if value.strip() else None


def check_unicode(text, what):
    """Refuses a string with half a character in it (a lone surrogate), which no tokenizer takes.

    Raises:
        InputError: it has one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} has {ascii(text[error.start])} in it, which is half of a character (text that is not UTF-8):"
            " write it again."
        ) from None


def kind_of(value):
    """What a value is, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def read_text(path):
    """The content of a text file.

    Raises:
        InputError: it is no file, cannot be opened or is not UTF-8.
    """
    try:
        if not path.is_file():
            raise InputError("it is not a file (but a folder, a device or a link to nothing)")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(first_cause(error)) from None
    if b"\0" in data or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError("it is not text in UTF-8: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save it as UTF-8 (in Excel: as CSV UTF-8)"
        ) from None


def json_rows(text):
    """(line, row) pairs of a file with one JSON object a line."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would split inside strings too
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"line {number} is not JSON ({error.msg} at column {error.colno}); a line is one object such as"
                    f" {ROW}"
                ) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
                raise InputError(f"line {number} is not JSON that can be read ({shorten(error)})") from None


def table_rows(text):
    """(line, row) pairs of a table with a header."""
    header = next((line for line in text.split("\n") if line.strip()), "")
    # The separator is the one that sets file_name apart in the header.
    delimiter = next((d for d in ",;\t|" if "file_name" in [name.strip(' "\r') for name in header.split(d)]), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        fields = None
        for values in reader:
            if not any(value.strip() for value in values):  # an empty line, or what Excel leaves of a deleted row
                continue
            if fields is None:
                fields = [name.strip() for name in values]
                twice = [name for name in fields if name in ("file_name", "text") and fields.count(name) > 1]
                if twice:
                    raise InputError(f"its header has the field {twice[0]} twice")
                continue
            if len(values) > len(fields):
                raise InputError(
                    f"line {reader.line_num} has {len(values)} fields and the header {len(fields)}: put a text with"
                    f" {'commas' if delimiter == ',' else repr(delimiter)} in it into double quotes, right"
                    " after the separator"
                )
            yield reader.line_num, dict(zip(fields, values + [None] * (len(fields) - len(values))))
    except csv.Error as error:
        raise InputError(f"line {reader.line_num} is not CSV ({shorten(error)})") from None


def captions_by_file(rows):
    """The schema of a row: `file_name`, a string that is not empty, and `text`, a string or nothing.

    Args:
        rows: (line, row) pairs.

    Returns:
        dict, caption or None by `file_key`.

    Raises:
        InputError: a row is something else, or two rows differ about one file.
    """
    captions, line_of, others = {}, {}, {}
    for line, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"line {line} is {kind_of(row)} and not an object such as {ROW}")
        for field in ("file_name", "text"):
            if field not in row:
                has = quoted(", ".join(map(str, row)))
                hint = ' ("" means no caption)' if field == "text" else ""
                raise InputError(f"line {line} has no field {field}{hint}; its fields are {has}")
        name = check_text(row["file_name"], f"line {line}: file_name")
        if name is None:
            raise InputError(f"line {line}: file_name is empty")
        caption, key = check_text(row["text"], f"line {line}: text"), file_key(name)
        words = (field for field, value in row.items() if isinstance(value, str) and re.search(r"[^\W\d_]", value))
        others |= dict.fromkeys(words)
        if key not in captions:
            captions[key], line_of[key] = caption, line
        elif captions[key] == caption:
            logger.warning(f"The metadata lists {quoted(name)} twice, in lines {line_of[key]} and {line}.")
        else:
            raise InputError(f"lines {line_of[key]} and {line} have two captions for {quoted(name)}: keep one of them")
    if unread := [field for field in others if field not in ("file_name", "text")]:
        logger.warning(f"Captions are in the field text of the metadata: what {some(unread)} say is lost.")
    return captions
