"""Files that a browser sent, as folders of pictures: loose ones together, those of a ZIP file as they lie in it."""

import contextlib
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

from ..errors import InputError, plain


ARCHIVE = ".zip"
MOST_FILES, MOST_BYTES = 2000, 2 * 2**30  # of a ZIP file, unpacked
PIECE = 2**20


@contextlib.contextmanager
def gathered(paths, place):
    """Yields folders in which the files lie under their names; they are gone afterwards.

    Args:
        paths: of files; ZIP files are unpacked.
        place: folder for temporary ones.

    Raises:
        InputError: a ZIP file cannot be read, or is too large.
    """
    with tempfile.TemporaryDirectory(prefix="brought-", dir=place) as root:
        count = 0
        for path in map(Path, paths):
            if path.suffix.lower() == ARCHIVE:
                count += 1
                unpack(path, Path(root) / f"zip-{count}")
            else:
                lay(path, Path(root))
        yield [Path(folder) for folder, _, names in sorted(os.walk(root)) if names]


def lay(path, root):
    """Puts a link to a file into the first folder that has no file of its name."""
    folders = (root / f"loose-{number}" for number in range(1, 10**6))
    folder = next(folder for folder in folders if not os.path.lexists(folder / path.name))
    folder.mkdir(exist_ok=True)
    (folder / path.name).symlink_to(path)


def unpack(path, folder):
    """Unpacks the files of a ZIP, links and what systems add left out; their sizes are counted, not believed.

    Raises:
        InputError: it is damaged, encrypted or too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if is_wanted(entry)]
            if len(entries) > MOST_FILES:
                raise InputError(f"{plain(path.name)} holds {len(entries)} files: bring {MOST_FILES} at most.")
            left = MOST_BYTES
            for entry in entries:
                left -= extract(archive, entry, folder, left, path.name)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, ValueError) as error:
        raise InputError(f"{plain(path.name)} is no ZIP file that can be read ({error}): pack it again.") from None


def is_wanted(entry):
    """Whether an entry of a ZIP is a file of the user's, by its name."""
    parts = entry.filename.replace("\\", "/").split("/")
    regular = not entry.is_dir() and (entry.external_attr >> 28) in (0, 0o10)  # of Unix, or of no kind
    return regular and all(parts) and not any(part.startswith((".", "__MACOSX")) or "\0" in part for part in parts)


def extract(archive, entry, folder, most, name):
    """Writes an entry of a ZIP below a folder; returns its size in bytes.

    Raises:
        InputError: there are more than `most`.
    """
    target, size = folder / entry.filename.replace("\\", "/"), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, open(target, "wb") as file:
        while piece := source.read(PIECE):
            size += len(piece)
            if size > most:
                raise InputError(f"{plain(name)} is more than {MOST_BYTES >> 30} GB unpacked: bring fewer pictures.")
            file.write(piece)
    return size
