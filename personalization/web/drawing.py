"""Drawing with what was learned, by one process that keeps its model loaded: only the first drawing waits for it.

The process is the evaluation with `--orders`: it draws what its command line says, then what is put into that folder,
and ends by itself when nothing came for a while, or when a training needs its memory.
"""

import contextlib
import time
from pathlib import Path

import psutil

from ..errors import InputError
from ..files import read_json, write_json
from .processes import new_mark, processes_of
from .run_logs import refusal, tail
from .workspace import saying_why


DONE = "done.json"  # in the folder of a drawing, written when all its pictures are there


class Painter:
    """The process that draws, of which there is one at a time in a workspace, whoever asks.

    Args:
        root: of the workspace.
        spawn: starts a process: takes a command, the path of its log and a mark, returns as `processes.spawn`.
    """

    def __init__(self, root, spawn):
        self.orders, self.path, self._spawn = root / "cache" / "orders", root / ".drawing.json", spawn

    def record(self):
        """Which process it is, and the folder that it last drew into; {} where nobody can say."""
        try:
            record = read_json(self.path)
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def is_alive(self):
        return bool(processes_of(self.record()))

    def is_busy(self):
        """Whether it draws, or has been asked to."""
        record = self.record()
        return bool(processes_of(record)) and not is_done(record.get("folder"))

    def ask(self, command, folder):
        """Has a command line of the evaluation drawn into a folder: by the process that is there, or by a new one.

        Raises:
            InputError: another drawing is on the way, or the disk fails.
        """
        if self.is_busy():
            raise InputError("Images are on the way: one visitor at a time, so that memory is enough. Try again soon.")
        with saying_why("The images could not be started"):
            self.orders.mkdir(parents=True, exist_ok=True)
            self.forget_orders()
            if self.is_alive():
                write_json(self.path, self.record() | {"folder": str(folder)})
                write_json(self.orders / "order.json", {"words": command[2:], "log": str(folder / "log.txt")})
            else:
                mark = new_mark()
                write_json(self.path, {"mark": mark, "folder": str(folder)})
                command = [*command, "--orders", str(self.orders)]
                _, record = self._spawn(command, folder / "log.txt", mark)
                write_json(self.path, record | {"folder": str(folder)})

    def wait(self, command, folder):
        """Waits until a drawing that was asked for is done.

        Yields:
            The end of its log, about twice a second.

        Raises:
            InputError: it failed; the sentence is the evaluation's.
        """
        while not is_done(folder):
            if not self.is_alive():
                if is_done(folder):
                    break
                if not (self.orders / "order.json").exists():
                    raise InputError(refusal(folder / "log.txt"))
                self.ask(command, folder)  # it left before it saw the order
            yield tail(folder / "log.txt", 1)
            time.sleep(0.5)

    def forget_orders(self):
        for path in self.orders.glob("*.json"):
            path.unlink(missing_ok=True)

    def leave(self):
        """Ends the process if it only waits: its memory is needed."""
        if not self.is_busy():
            for process in processes_of(self.record()):
                with contextlib.suppress(psutil.Error):
                    process.terminate()


def is_done(folder):
    """Whether a drawing is complete."""
    return isinstance(folder, str | Path) and (Path(folder) / DONE).is_file()
