"""A process, watched: what the kernel says about its memory while it runs, by phases that its own lines begin."""

import contextlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import ROOT


MB = 2**20
SAMPLE_SECONDS = 0.005
# Lines of the trainers (and of the children of bench_memory.py) that begin a phase; before the first it is "start".
PHASES = {
    "Quantizing the text_encoder": "quantizing the text encoder",
    "Quantizing the unet": "quantizing the UNet",
    "Exporting the UNet": "exporting the UNet",
    "candidates a step": "training",
    "scales in": "training",
    "adapter weights in": "training",
    "Steps: 100%": "results",
    "phase: ": None,  # the name follows
}


class Sample(NamedTuple):
    """A process at one moment; bytes, and `time.monotonic()`, which is the same clock in all processes."""

    time: float
    rss: int
    anonymous: int
    high_water: int  # of rss, by the kernel: it misses nothing between samples


class Watched(NamedTuple):
    samples: list
    lines: list  # (time, line) of what it printed
    seconds: float
    children: dict  # per name of a child process: most bytes that were its own (a fork shares its parent's pages)
    gpu: int | None  # most MB in use on the GPU, above what was in use before; None: no nvidia-smi


def read_status(pid):
    """A `Sample`, or None once the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = dict(re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", status, re.MULTILINE))
    if len(fields) < 3:  # a zombie
        return None
    return Sample(time.monotonic(), *(1024 * int(fields[name]) for name in ("VmRSS", "RssAnon", "VmHWM")))


def own_bytes(pid):
    """(name, private bytes) of a process."""
    sizes = re.findall(r"^Private_\w+:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return Path(f"/proc/{pid}/comm").read_text().strip(), 1024 * sum(map(int, sizes))


def note_children(pid, known):
    """Raises in `known` (name: bytes) what the direct children of a process have now."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in path.read_text().split():
                name, size = own_bytes(child)
                known[name] = max(known.get(name, 0), size)


@contextlib.contextmanager
def watch_gpu(device):
    """Yields a list that fills with the GPU's memory in use (MB) until the end of the block."""
    used = []
    if device != "cuda" or not shutil.which("nvidia-smi"):
        yield used
        return
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    query = ["nvidia-smi", "-i", first, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "50"]
    process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    reader = threading.Thread(
        target=lambda: used.extend(int(line) for line in process.stdout if line.strip().isdigit())
    )
    reader.start()
    time.sleep(0.5)  # the first readings are those before
    try:
        yield used
    finally:
        process.terminate()
        reader.join()
        process.wait()


def watch(command, device):
    """Runs a command and samples its process until the end.

    Raises:
        RuntimeError: it failed; the message ends with what it printed last.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    samples, lines, children, started = [], [], {}, time.monotonic()

    def read(stream):
        for line in stream:  # text mode: the carriage returns of a progress bar end lines, too
            lines.append((time.monotonic(), line.rstrip()))

    with watch_gpu(device) as gpu:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        reader = threading.Thread(target=read, args=(process.stdout,))
        reader.start()
        try:
            while process.poll() is None:
                if sample := read_status(process.pid):
                    samples.append(sample)
                if len(samples) % 50 == 1:
                    note_children(process.pid, children)
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()
            process.wait()
            reader.join()
    seconds = time.monotonic() - started
    if process.returncode:
        last = "\n".join(line for _, line in lines[-15:])
        raise RuntimeError(f"exit code {process.returncode}: {shlex.join(command)}\n{last}")
    return Watched(samples, lines, seconds, children, max(gpu) - gpu[0] if gpu else None)


def megabytes(size):
    return round(size / MB, 1)


def divide_phases(watched):
    """Per phase in order of time: when it began, and the largest of what was sampled in it."""
    begins = [(watched.samples[0].time, "start")]
    for moment, line in watched.lines:
        for mark, name in PHASES.items():
            if mark in line:
                name = name or line.split(mark)[1]
                if name not in [known for _, known in begins]:
                    begins.append((moment, name))
    phases = {}
    for (moment, name), (end, _) in itertools.zip_longest(begins, begins[1:], fillvalue=(math.inf, "")):
        inside = [s for s in watched.samples if moment <= s.time < end]
        if inside:
            phases[name] = {
                "begins_s": round(moment - begins[0][0], 1),
                "rss_at_begin_mb": megabytes(inside[0].rss),
                "anonymous_at_begin_mb": megabytes(inside[0].anonymous),
                "peak_rss_mb": megabytes(max(s.rss for s in inside)),
                "peak_anonymous_mb": megabytes(max(s.anonymous for s in inside)),
            }
    return phases


def summarize(watched, imports=None):
    """The headline figures and the phases of a process; `imports` is that of the bare imports."""
    result = {
        "peak_rss_mb": megabytes(max(s.high_water for s in watched.samples)),
        "peak_rss_sampled_mb": megabytes(max(s.rss for s in watched.samples)),
        "peak_anonymous_mb": megabytes(max(s.anonymous for s in watched.samples)),
        "children_mb": {name: megabytes(size) for name, size in watched.children.items()},
        "phases": divide_phases(watched),
    }
    if imports:
        for name in ("peak_rss_mb", "peak_anonymous_mb"):
            result[f"{name.removesuffix('_mb')}_above_imports_mb"] = round(result[name] - imports[name], 1)
    if watched.gpu is not None:
        result["gpu_used_mb"] = watched.gpu
    return result


def last_json(watched):
    """The last line that is a JSON object."""
    return json.loads(next(line for _, line in reversed(watched.lines) if line.startswith("{")))
