"""What the measuring scripts repeat: places, provenance of a result, a look at the machine, processes, JSON files.

To be imported before torch: `personalization.quiet` must be there first.
"""

import personalization.quiet  # noqa: F401, before the libraries that it is about


# isort: split
import ast
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from personalization.files import write_json
from personalization.runs.provenance import installed_versions


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, CACHE = HERE / "results", HERE / ".cache"
DEMO, DOCS = ROOT / "demo", ROOT / "docs"
LIBRARIES = "torch diffusers transformers accelerate peft bitsandbytes optimum-quanto openvino cma"
TEMPORARY = re.compile(rf"{re.escape(str(CACHE))}/memory-\w+")  # folders of a process that is watched
BUSY = 0.2  # share of the processors in other hands from which times are not worth much


checkout = Path(getattr(sys.modules["__main__"], "__file__", None) or __file__).resolve().parent.parent
if checkout != ROOT and (checkout / "personalization" / "quiet.py").is_file():  # not the one that is installed
    raise SystemExit(f"{sys.argv[0]} would run the code in {ROOT}: set PYTHONPATH={checkout}.")


# =====================================================================================================
# Provenance
# =====================================================================================================


def public(text):
    """A text with paths as they are in any checkout: relative to it, or only the last part."""
    text = TEMPORARY.sub("TEMPORARY", text).replace(f"{ROOT}/", "")
    return re.sub(r"(?<![\w./~-])~?/(?:[\w.@+~-]+/)*([\w.@+~-]+)", r"\1", text)


def command_line(words=None):
    """A command (default: the one that started this process) as whoever repeats it types it in the repository."""
    if words is None:
        words = ["python", str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
    return public(shlex.join("python" if word == sys.executable else str(word) for word in words))


def git(*words):
    """What git says about this checkout; None where there is none."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except OSError:  # not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code():
    """The commit, and whether a Python file here is not as it has it: {"commit", "changed"}."""
    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "changed": None if commit is None else bool(git("status", "--porcelain", "--", "*.py"))}


CODE = code()  # as it was when this process began: files may change while it runs


def hardware(device="cpu"):
    """Device type, its name, and cores and threads of the host."""
    name = cpu_name()
    if str(device) == "cuda" and torch.cuda.is_initialized():
        name = torch.cuda.get_device_name()
    elif str(device) == "cuda":  # a context of torch's would be counted as memory in use
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {"device": str(device), "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def cpu_name(cpuinfo=Path("/proc/cpuinfo")):
    """The processor's marketing name, where Linux tells it, and its units for bfloat16, on which times hang."""
    lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines()] if cpuinfo.is_file() else []
    facts = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    flags = facts.get("flags", "").split()
    units = [name for flag, name in {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16"}.items() if flag in flags]
    return facts.get("model name", platform.machine()) + (f" ({units[0]})" if units else "")


def provenance(command=None, device="cpu", libraries=LIBRARIES):
    """What made a result: command, code, date, hardware, versions, and how busy others kept the machine before."""
    return {
        "command": command_line(command),
        **CODE,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": installed_versions(libraries),
        "busy_before": busy_before(),
    }


# =====================================================================================================
# Other code
# =====================================================================================================


def source_hash(*entries, without=()):
    """Of the code of some files and of all that they import from this repository, comments and docstrings left out.

    Args:
        entries: paths in the repository.
        without: beginnings of the paths of files that do not count.
    """
    waiting, found = [ROOT / entry for entry in entries], {}
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in found or name.startswith(tuple(without)):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += imported_files(tree, path)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        found[name] = ast.dump(tree)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def imported_files(tree, path):
    """The files of this repository that a syntax tree imports; `path` is where it stands."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(ROOT, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = path.parents[node.level - 1] if node.level else ROOT
            module = f"{node.module}." if node.module else ""
            names += [(start, module + alias.name) for alias in node.names] + [(start, module.rstrip("."))]
    for start, name in names:
        for folder in (start, path.parent):  # Python finds what lies beside a script, too
            base = folder.joinpath(*name.split("."))
            yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if name and file.is_file())


def say_what_is_kept(entries, source):
    """Prints how many stored entries are of other code: they are kept as they are, their commit beside them."""
    others = [entry for entry in entries if entry.get("source") != source]
    if others:
        commits = sorted({(entry.get("commit") or "unknown")[:7] for entry in others})
        print(
            f"{len(others)} of these runs are there, made by other code (commit {', '.join(commits)}): they stay."
            " --anew makes them again.",
            flush=True,
        )


# =====================================================================================================
# The machine
# =====================================================================================================


@functools.cache
def busy_before():
    """Share of the processors that others use; to be asked first before this process computes anything."""
    return round(psutil.cpu_percent(interval=1) / 100, 2)


def warn_if_busy():
    """Says so if others use this machine: times will be too long. Every provenance of this process has the share."""
    if busy_before() > BUSY:
        print(f"This machine is busy ({busy_before():.0%} of it with other work): times will be too long.", flush=True)


def as_words(flags):
    """{"flag": value} as words of a command line; True is a flag without a value, False none."""
    pairs = ((f"--{name}", value) for name, value in flags.items() if value is not False)
    return list(
        itertools.chain.from_iterable([flag] if value is True else [flag, str(value)] for flag, value in pairs)
    )


def make_pictures(folder, count):
    """Makes a folder of pictures of noise, 64 px: what they show is of no interest where only cost is measured."""
    Path(folder).mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(generator.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(Path(folder) / f"{i}.png")


def run(command, **environment):
    """Runs a command in the repository, offline, and returns what it printed.

    Raises:
        RuntimeError: it failed; the message ends with what it printed last.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    words = list(map(str, command))
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {shlex.join(words)}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


# =====================================================================================================
# JSON files
# =====================================================================================================


def key_of(entry, key):
    return tuple(entry[name] for name in key)


def read(path):
    """A result's content; {} where there is none yet."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}


def put(path, entries, key, order=None, **head):
    """Puts entries into a result's "entries", each in the place of an older one with the same key.

    Args:
        path: of the JSON file.
        entries: dicts.
        key: names of what tells entries apart.
        order: entry -> what to sort by; default: the key as text.
        head: what else the file says.
    """
    content = read(path)
    together = {key_of(entry, key): entry for entry in [*content.get("entries", []), *entries]}
    order = order or (lambda entry: [str(value) for value in key_of(entry, key)])
    write_json(path, {**content, **head, "entries": sorted(together.values(), key=order)})
