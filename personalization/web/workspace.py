"""The folder that the web page works in: which paths a visitor may name, and concepts with pictures and captions.

    WORKSPACE/concepts/NAME/    pictures of a concept, and their captions in metadata.jsonl
    WORKSPACE/runs/NAME/        a run: how it was started, its log, what its script writes, what was drawn with it
    WORKSPACE/models/           base models in folders or single files, if there are any
    WORKSPACE/cache/, uploads/  quantized weights, models of the Hub for strangers; what a browser sends and is shown

A visitor reads and writes below the workspace. What else may be read (never written) is for whoever starts the server
to say.
"""

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import threading
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..data import images
from ..data.captions import (
    METADATA_NAMES,
    SIDECARS,
    WRITTEN,
    all_captions,
    check_text,
    file_key,
    kohya_name,
    read_captions,
)
from ..errors import InputError, first_cause, plain, quoted
from ..files import atomic_path, sha256
from ..models import single_file
from .uploads import gathered


THUMBNAIL_SIDE, KEPT_THUMBNAILS = 256, 300
MOST_PIXELS = 64 * 10**6  # of a picture: what is decoded costs up to 12 bytes for each
# What a visitor may bring: suffixes of pictures that are no programs, and of those that a visitor is told to convert.
PICTURES = set(".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .tif .tiff .avif".split())
FOREIGN = images.FOREIGN_FORMATS - {".svg"}
FORMATS = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"  # that PIL decodes itself, or pillow-heif
SINGLE_FILES = ".safetensors", ".ckpt"  # base models as other programs have them
FEW_PICTURES, MOST_NAME = 3, 48
SAME_PICTURE = 3.0  # mean difference of miniatures, of 255 levels, below which pictures are the same for the eye


def safe_name(text, otherwise="unnamed"):
    """A name of a folder from whatever a visitor typed: no separators, no leading dot. Its own safe name is itself."""
    name = unicodedata.normalize("NFC", str(text)).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:MOST_NAME].strip("-.") or otherwise


def safe_file_name(text, otherwise="unnamed"):
    """The same for a file that a browser sent, which keeps its suffix."""
    stem, suffix = os.path.splitext(str(text))
    suffix = re.sub(r"[^\w.]+", "", suffix)[:8]
    return safe_name(stem, otherwise) + suffix if safe_name(stem, "") else safe_name(suffix, otherwise)


def is_name(value):
    """Whether a value is the name of a folder that the page can show, and that leads nowhere else."""
    return isinstance(value, str) and value.isprintable() and re.fullmatch(r"[^./][^/]{0,254}", value) is not None


def is_text(value, most=10_000):
    """Whether a value is text that can be written down and sent: no half characters, no zero bytes, not endless."""
    if not isinstance(value, str) or len(value) > most or "\0" in value:
        return False
    return value == value.encode(errors="ignore").decode()


@contextlib.contextmanager
def saying_why(what):
    """Turns a failure of the disk into an `InputError`, one sentence for the page; `what` could not be done."""
    try:
        yield
    except OSError as error:
        advice = ": the disk is full, free some space and try again" if error.errno == errno.ENOSPC else ""
        raise InputError(f"{what} ({first_cause(error)}){advice}.") from None


class PictureFacts(NamedTuple):
    """A picture of a concept, as it is shown."""

    name: str
    caption: str  # "" for none
    thumbnail: Image.Image | None  # None where it cannot be read
    problems: list  # sentences


class Added(NamedTuple):
    """What came of files that a visitor brought."""

    count: int  # of new pictures; one that is there already, to the byte, is not copied again
    notes: list  # sentences about what was not kept


class Workspace:
    """The folder, and the rule which paths may be named.

    Args:
        root: made if it is not there.
        readable: folders outside that may be read.

    Raises:
        InputError: it cannot be made or written.
    """

    def __init__(self, root, readable=()):
        self.root = Path(root).resolve()
        self.readable = [Path(folder).resolve() for folder in readable]
        self._lock = threading.Lock()  # of what visitors write at the same time
        with saying_why(f"--workspace {quoted(root)} cannot be used"):
            for name in ("concepts", "runs", "models", "cache", "uploads"):
                (self.root / name).mkdir(parents=True, exist_ok=True)

    # Paths --------------------------------------------------------------------------------------------

    def readable_path(self, path):
        """A path that a visitor named, with links resolved; relative ones are taken from the workspace.

        Raises:
            InputError: it leads elsewhere.
        """
        try:
            resolved = (self.root / str(path).strip()).resolve()
        except (OSError, ValueError, RuntimeError):  # a zero byte, a loop of links
            raise InputError(f"{quoted(path)} is no path.") from None
        if not any(resolved.is_relative_to(folder) for folder in (self.root, *self.readable)):
            raise InputError(
                f"{quoted(path)} is outside the workspace, {str(self.root)!r}: copy it there, or start the server with"
                " --read and its folder."
            )
        return resolved

    def base_model(self, name):
        """A base model that a visitor named, as scripts take it: what may be read on the disk, or an id on the Hub.

        Raises:
            InputError: it is neither.
        """
        name = str(name or "").strip()
        if not name:
            raise InputError("Choose a base model first.")
        looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
        if looks_like_id and not (self.root / name).exists() and not Path(name).exists():
            return name
        path = self.readable_path(name)
        if not (path / "model_index.json").is_file() and not (is_single_file(path) and path.is_file()):
            raise InputError(
                f"{quoted(name)} is no model in diffusers format (no model_index.json) and no"
                f" {' or '.join(SINGLE_FILES)}: give its folder or file, or an id on the Hub such as"
                " stable-diffusion-v1-5/stable-diffusion-v1-5."
            )
        return str(path)

    @property
    def hub(self):
        """Where models of the Hub lie that visitors name who are not the owner of this computer."""
        return self.root / "cache" / "hub"

    def models(self):
        """Base models in the workspace: folders, and single files."""
        found = [path.parent for path in (self.root / "models").glob("*/model_index.json")]
        found += filter(is_single_file, (self.root / "models").glob("*.*"))
        return sorted(str(path) for path in found if is_name(path.name))

    # Concepts -----------------------------------------------------------------------------------------

    def concepts(self):
        """Their names, the newest first."""
        changed = {}
        for path in (self.root / "concepts").iterdir():
            with contextlib.suppress(OSError):  # deleted in between
                if path.is_dir() and is_name(path.name):
                    changed[path.name] = path.stat().st_mtime
        return sorted(changed, key=changed.get, reverse=True)

    def concept_name(self, name):
        """The name that a concept has on the disk: that of a folder there, or the safe one; "" for none."""
        name = str(name or "").strip()
        if is_name(name) and (self.root / "concepts" / name).is_dir():
            return name
        return safe_name(name) if name else ""

    def concept_folder(self, name):
        """Where the pictures of a concept lie; made if it is not there.

        Raises:
            InputError: there is no name, or the disk fails.
        """
        if not str(name or "").strip():
            raise InputError("Give the concept a name first, such as my-dog.")
        folder = self.root / "concepts" / self.concept_name(name)
        with saying_why(f"The concept {quoted(name)} cannot be made"):
            folder.mkdir(exist_ok=True)
        return folder

    def add_pictures(self, concept, paths):
        """Copies pictures into a concept, and their captions and masks, which have the names of the pictures.

        Args:
            concept: its name.
            paths: of files, ZIP files among them; a link out of what may be read is refused, like any other path.

        Returns:
            `Added`.

        Raises:
            InputError: a picture has too many pixels, the disk fails, or a ZIP file or captions cannot be read. What
                was copied before stays.
        """
        folder, paths = self.concept_folder(concept), [self.readable_path(path) for path in paths]
        with saying_why("Not all pictures could be copied"), gathered(paths, self.root / "uploads") as folders:
            added = [self._take(folder, source) for source in folders]
        repeats = {kohya_name(source)[0] for source in folders}
        notes = [note for each in added for note in each.notes]
        if len(repeats) > 1:
            notes.append("Here all pictures are drawn equally often: what names of folders say of repeats is lost.")
        return Added(sum(each.count for each in added), notes)

    def add_folder(self, concept, folder):
        """`add_pictures` of all that is in a folder that a visitor named.

        Raises:
            InputError: it may not be read, or holds no picture; and as `add_pictures`.
        """
        source = self.readable_path(folder)
        if not images.list_folder(source, "The folder").pictures:
            raise InputError(f"{quoted(folder)} holds no pictures: give the folder that they lie in.")
        with saying_why("Not all pictures could be copied"):
            return self._take(self.concept_folder(concept), source)

    def _take(self, folder, source):
        """Copies what a folder holds of pictures, captions and masks into that of a concept; returns `Added`."""
        entries = images.list_folder(source, "The folder")
        names = [name for name in entries.pictures + entries.foreign if is_picture(name)]
        described = [name for name in METADATA_NAMES if (source / name).is_file()]
        texts = [name for found in entries.sidecars.values() for name in found]
        for name in [*names, *described, *texts, *entries.masks.values()]:
            self.readable_path(source / name)
        captions, copied, renamed = all_captions(source, entries.sidecars, "The folder"), 0, {}
        with self._lock:
            before = images.list_folder(folder)
            there = {sha256(folder / name): name for name in [*before.pictures, *before.foreign]}
            stems = {os.path.splitext(name)[0] for name in there.values()}
            masks = {name: mask for name, mask in entries.masks.items() if is_picture(mask)}
            for name in names:
                stem, suffix = os.path.splitext(name)
                check_size(source / name)
                if (
                    stem.endswith(images.MASK) and stem.removesuffix(images.MASK) in stems
                ):  # it comes after its picture
                    copy(source / name, folder / f"{stem}{suffix.lower()}")
                    continue
                content = sha256(source / name)
                if content not in there:
                    new = there[content] = _free_name(folder, safe_file_name(name, "picture"))
                    copy(source / name, folder / new)
                    copied += 1
                renamed[name] = there[content]
            for name, mask in masks.items():
                if name in renamed:
                    check_size(source / mask)
                    stem, suffix = os.path.splitext(renamed[name])[0], os.path.splitext(mask)[1].lower()
                    copy(source / mask, folder / f"{stem}{images.MASK}{suffix}")
            by_key = {file_key(name): new for name, new in renamed.items()}
            if given := {by_key[key]: text for key, text in captions.items() if key in by_key and text}:
                self._write_captions(folder, self._captions(folder) | given)
        others = {*entries.pictures, *entries.ignored} - {*names, *entries.masks.values()}
        return Added(copied, not_taken(sorted(name for name in others if not name.startswith("."))))

    def new_concept_name(self, wanted="my-concept"):
        """A name that no concept has yet: the wanted one, or with a number."""
        wanted, taken = safe_name(wanted), {name.lower() for name in self.concepts()}
        numbered = (f"{wanted}-{n}" for n in range(2, 10**6))
        return wanted if wanted.lower() not in taken else next(n for n in numbered if n.lower() not in taken)

    def rename_concept(self, concept, name):
        """Gives a concept another name; returns it as it is on the disk.

        Raises:
            InputError: there is no such concept, no name, it is taken, or the disk fails.
        """
        old, new = self.existing_concept(concept), safe_name(str(name or "").strip(), "")
        if not new:
            raise InputError("Give the concept a new name first, such as my-dog.")
        if new != old.name:
            with self._lock, saying_why(f"The concept {quoted(concept)} could not be renamed"):
                if (old.parent / new).exists():
                    raise InputError(f"There is a concept {new} already: choose another name.")
                old.rename(old.parent / new)
        return new

    def delete_concept(self, concept):
        """Deletes a concept with its pictures and captions.

        Raises:
            InputError: there is no such concept, or the disk fails.
        """
        folder = self.existing_concept(concept)
        with self._lock, saying_why(f"The concept {quoted(concept)} could not be deleted"):
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder)

    def existing_concept(self, concept):
        """The folder of a concept.

        Raises:
            InputError: there is none.
        """
        name = self.concept_name(concept)
        if not name or not (self.root / "concepts" / name).is_dir():
            raise InputError(f"There is no concept {quoted(concept or '')}: choose one.")
        return self.root / "concepts" / name

    def remove_picture(self, concept, name):
        """Deletes a picture of a concept; the caption goes with it."""
        folder = self.concept_folder(concept)
        if name in os.listdir(folder):
            with self._lock, saying_why(f"{plain(name)} cannot be deleted"):
                if mask := images.list_folder(folder).masks.get(name):
                    (folder / mask).unlink()
                (folder / name).unlink()
                captions = {key: text for key, text in self._captions(folder).items() if key != file_key(name)}
                self._write_captions(folder, captions)

    def save_captions(self, concept, rows):
        """Writes captions of some pictures into `metadata.jsonl`, all of them or none.

        Args:
            concept: its name.
            rows: (file name, caption) pairs; of files that are not there nothing is kept.

        Raises:
            InputError: a caption is no text, or the disk fails; the captions before are still there.
        """
        folder = self.existing_concept(concept)
        there, captions = set(os.listdir(folder)), {}
        for name, text in rows:
            caption = check_text("" if text is None else str(text), f"The caption of {plain(name)}")
            if name in there:
                captions[name] = " ".join(caption.split()) if caption else ""
        with self._lock, saying_why("The captions could not be saved"):
            self._write_captions(folder, self._captions(folder) | captions)

    def review(self, concept, resolution):
        """Looks at the pictures of a concept.

        Args:
            concept: its name; None for none.
            resolution: of the base model, pixels.

        Returns:
            list of `PictureFacts`, and sentences about the whole.
        """
        folder = self.root / "concepts" / self.concept_name(concept)
        if not self.concept_name(concept) or not folder.is_dir():
            return [], []
        notes, rows, seen = [], [], {}
        entries = images.list_folder(folder)
        names = sorted(entries.pictures + entries.foreign)
        if strange := [name for name in names if not is_name(name)]:
            notes.append(f"{images.some(strange)} cannot be shown: give such files a name in plain letters.")
        try:
            captions = self._captions(folder)
        except InputError as error:
            captions, notes = {}, [*notes, str(error)]
        for name in filter(is_name, names):
            thumbnail, problems = look_at(folder / name, resolution)
            if thumbnail is not None:
                mini = miniature(thumbnail)
                twin = next((n for n, other in seen.items() if np.abs(mini - other).mean() < SAME_PICTURE), None)
                if twin:
                    problems.append(f"looks the same as {plain(twin)}: one of them is enough")
                else:
                    seen[name] = mini
            rows.append(PictureFacts(name, captions.get(file_key(name)) or "", thumbnail, problems))
        readable = sum(row.thumbnail is not None for row in rows)
        if readable == 1:
            notes.append("One picture only: its background will be learned, too. 3 to 20 different ones are better.")
        elif 1 < readable < FEW_PICTURES:
            notes.append("Two pictures are few: 3 to 20 different ones are better.")
        if entries.masks:
            notes.append(
                f"{len(entries.masks)} of the pictures have a mask: with --masked_loss among the other flags, the loss"
                " counts what is white in it."
            )
        return rows, notes

    def _captions(self, folder):
        return {name: text or "" for name, text in read_captions(folder, "The concept").items()}

    def _write_captions(self, folder, captions):
        lines = [json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in sorted(captions.items())]
        with atomic_path(folder / "metadata.jsonl") as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _free_name(folder, name):
    """`name`, or with a number where its stem is taken (upper and lower case are one on some disks)."""
    stem, suffix = os.path.splitext(name)
    taken = {os.path.splitext(other)[0].lower() for other in os.listdir(folder)}
    numbered = (f"{stem}-{n}" for n in range(2, 10**6))
    return name if stem.lower() not in taken else next(n for n in numbered if n.lower() not in taken) + suffix


def copy(source, target):
    """Copies a file, whole or not at all."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def is_picture(name):
    """Whether the page takes a file as a picture, by its name."""
    return os.path.splitext(name)[1].lower() in PICTURES | FOREIGN


def is_single_file(path):
    """Whether a path is that of a base model in a single file, by its name."""
    return path.suffix.lower() in SINGLE_FILES


def not_taken(names):
    """Sentences about files that a visitor brought and that are not kept."""
    if not names:
        return []
    said = (
        f"Not taken: {images.some(names)}. Pictures are JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC, or a ZIP of such."
    )
    if written := [name for name in names if os.path.splitext(name)[1].lower() in WRITTEN]:
        said += (
            f" If {images.some(written)} hold captions, they are lost: bring them as {' or '.join(METADATA_NAMES)}, or"
            f" as 01{' or 01'.join(SIDECARS)} together with a picture 01.jpg."
        )
    return [said]


def open_picture(path):
    """A picture as PIL opens it, by its header: nothing is decoded, and nothing that it holds is run."""
    Image.init()  # not all of PIL's builds have all formats
    images.readable_suffixes()  # with pillow-heif's, if it is there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `too_large` is stricter
        return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])


def too_large(size):
    """Why a picture of a size (width, height) is not decoded, as half a sentence; None where it is."""
    if size[0] * size[1] <= MOST_PIXELS:
        return None
    return f"has {size[0]} x {size[1]} pixels: scale it down to {MOST_PIXELS // 10**6} million at most"


def check_size(path):
    """Refuses a picture with too many pixels, by its header; what is none is for others to judge.

    Raises:
        InputError: it has.
    """
    try:
        with open_picture(path) as image:
            why = too_large(image.size)
    except Image.DecompressionBombError:
        why = f"has more than {MOST_PIXELS // 10**6} million pixels: scale it down"
    except Exception:  # PIL raises nearly anything on a damaged file
        why = None
    if why:
        raise InputError(f"{plain(path.name)} {why}.")


def look_at(path, resolution):
    """A picture's thumbnail (None where it cannot be read) and what is wrong with it, as half sentences."""
    try:
        facts = path.stat()
    except OSError as error:  # deleted in between
        return None, [f"cannot be read ({first_cause(error)}) and will not be used"]
    with _decoding:  # one at a time, whoever looks
        size, thumbnail, problems = _seen(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    problems = list(problems)
    if thumbnail is not None and min(size) < resolution:
        how_small = f"is only {size[0]} x {size[1]} pixels and the model generates {resolution} x {resolution}"
        problems.append(f"{how_small}: it will be blurred")
    return thumbnail, problems


_decoding = threading.Lock()


@functools.lru_cache(maxsize=KEPT_THUMBNAILS)
def _seen(path, *version):
    """A picture's size, thumbnail, and what is wrong with it at any resolution; kept while the file is the same."""
    try:
        with open_picture(path) as image:
            size, moving = image.size, getattr(image, "is_animated", False) and image.format != "MPO"
            if why := too_large(size):
                return size, None, (why,)
            image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))  # a JPEG is decoded small
            thumbnail = images.to_rgb(image)
    except Exception as error:  # PIL raises nearly anything on a damaged file
        if path.suffix.lower() in images.FOREIGN_FORMATS - images.readable_suffixes():
            more = " (or pip install pillow-heif on the server)" * (path.suffix.lower() in images.HEIF)
            return None, None, (f"cannot be read here: save it as JPEG or PNG{more}",)
        return None, None, (f"cannot be read ({images.why_not(error)}) and will not be used",)
    thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return size, thumbnail, ("moves or has pages: only the first is used",) if moving else ()


def miniature(image):
    """A picture as 16 x 16 pixels, `[16, 16, 3]`, by which two that are the same for the eye are known."""
    small = image.resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def model_resolution(base, unknown=512):
    """Side of the images that a base model draws, in pixels; `unknown` for one on the Hub."""
    try:
        single = single_file.open_file(base, "The model") if is_single_file(Path(base)) else None
        folder = Path(base) if single is None else single.root
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        if (folder / "transformer").is_dir():  # which takes any size
            return int(vae["sample_size"])
        unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
        unet |= single.overrides.get("unet", {}) if single else {}
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return unknown
