"""A run's small world on disk, ways to damage it, and what a run may do about it."""

import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from conftest import SCRIPT, as_arguments
from hypothesis import HealthCheck, settings
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from tiny_base import build_pictures, build_tiny_base

import train_zoodip_textual_inversion as zoodip
from personalization.errors import run_script


PATIENCE = 30  # seconds after which a run hangs
HEADROOM = 3 * 2**30  # bytes of address space that a run of the tiny base may add: what wants more fails, not the host
LONGEST_SENTENCE = 450  # characters, paths included
# Of property-based tests: the same examples in every run, however slow, and a world that they share.
QUICK = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


class Hang(BaseException):
    """A run did not end; no `except Exception` stops this one."""


# =====================================================================================================
# A run inside this process, seen from outside
# =====================================================================================================


class Outcome(NamedTuple):
    """How a run ended, as a user sees it."""

    code: int  # of the process
    said: str  # all of standard error
    warnings: str  # what was logged as a warning or worse

    @property
    def sentence(self):
        """What stands behind "error:", to the end of standard error; the empty string if nothing was refused."""
        return re.split(r"^[^:\n]+: error: ", self.said, flags=re.M)[-1].strip() if self.code else ""


@contextlib.contextmanager
def limits():
    """Bounds of time and memory: a damaged number must not take the machine with it."""

    def ring(*_):
        raise Hang(f"no end after {PATIENCE} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    if not torch.cuda.is_available():  # CUDA reserves more than that by itself
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)


def run_from_outside(words, capsys, caplog):
    """The `Outcome` of the script with these arguments; whatever would be a traceback is raised."""
    capsys.readouterr()
    caplog.clear()
    code = 0
    with limits(), caplog.at_level("WARNING"):
        try:
            run_script(lambda: zoodip.main(zoodip.parse_args(words)), SCRIPT)
        except SystemExit as end:
            code = end.code
    gc.collect()  # what a refusal left behind (a lock, a mapped file) leaves as it would with its process
    return Outcome(code, capsys.readouterr().err, "\n".join(record.getMessage() for record in caplog.records))


# =====================================================================================================
# The world
# =====================================================================================================

USER_FILES = {
    "notes.txt": b"remember the milk",
    ".hidden": b"mine",
    "holiday/a.png": b"not a picture",
    "checkpoint-best/state.pt": b"kept by hand",
    "samples of last year.png": b"mine, too",
}
OWN = (  # patterns of what a run may replace in its folder, with the lock and the records it may keep there
    *("learned_embeds*.safetensors", "my-toy.*", "loss_curve.png", "zoodip_config.json", "README.md"),
    *("pipeline.py", "samples/*.png", "validation/*.png", ".lock", ".*.json"),
)


def snapshot(folder):
    """Relative path -> content of every file in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class World:
    """A base, pictures, an INT8 cache and the folder of an earlier run of two steps, with a user's files beside it.

    Paths and times are part of a cache's names, so that damage is done in place and `restore` mends it.
    """

    def __init__(self):
        self.root = Path(tempfile.mkdtemp(prefix="zoodip-"))  # short: sentences name its files
        self.live, self.kept = self.root / "w", self.root / "kept"
        self.capture = None  # pytest's capsys and caplog, those of the test in progress

    def build(self):
        """Makes everything, and keeps a copy."""
        build_tiny_base(self.live / "base")
        build_pictures(self.live / "data")
        first = {"--max_train_steps": 2, "--save_a1111": True, "--validation_prompt": "a {}"}
        first |= {"--num_validation_images": 1, "--num_inference_steps": 1}
        assert self.train(**first).code == 0
        for name, content in USER_FILES.items():
            path = self.live / "out" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        shutil.copytree(self.live, self.kept)
        self.expected = {}
        for quantization in ("int8", "none"):
            assert self.train(out="fresh", **{"--quantization": quantization}).code == 0
            self.expected[quantization] = self.embedding("fresh")
            self.restore()

    def words(self, out="out", **flags):
        """The command line of a run of three steps."""
        live = self.live
        basics = {
            "--pretrained_model_name_or_path": live / "base",
            "--train_data_dir": live / "data",
            "--quantized_cache_dir": live / "cache",
            "--output_dir": live / out,
            "--placeholder_token": "<my-toy>",
            "--initializer_token": "star",
            "--max_train_steps": 3,
            "--checkpointing_steps": 1,
            "--logging_steps": 1,
            "--num_validation_samples": 2,
            "--report_to": "none",
        }
        return as_arguments(basics | flags)

    def train(self, out="out", **flags):
        """The `Outcome` of a run of three steps."""
        return run_from_outside(self.words(out, **flags), *self.capture)

    def push(self):
        """The `Outcome` of pushing the earlier run."""
        words = ["--push_only", "--output_dir", str(self.live / "out"), "--hub_model_id", "alice/toy"]
        return run_from_outside(words, *self.capture)

    def embedding(self, out="out"):
        """What was learned."""
        (theta,) = load_file(self.live / out / "learned_embeds.safetensors").values()
        return theta

    def restore(self):
        """Everything as it was, to the nanosecond; what was not touched keeps the times that only the system sets."""
        for path in [*self.live.rglob("*")]:
            kept = self.kept / path.relative_to(self.live)
            if path.is_symlink() or path.is_dir() != kept.is_dir():
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
            elif path.is_file() and not (kept.is_file() and same_file(path, kept)):
                path.unlink()
        for kept in self.kept.rglob("*"):
            path = self.live / kept.relative_to(self.kept)
            if kept.is_dir():
                path.mkdir(exist_ok=True)
            elif not path.exists():
                shutil.copy2(kept, path)

    def files(self, group):
        """Paths of the files that belong to "base", "data", "cache", "checkpoint" or "result", in a fixed order."""
        folder = self.live / (group if group in ("base", "data", "cache") else "out")
        names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        if folder.name == "out":
            numbered = [name for name in names if name.parts[0] in ("checkpoint-1", "checkpoint-2")]
            names = numbered if group == "checkpoint" else [n for n in names if n not in numbered]
            names = [name for name in names if name.as_posix() not in USER_FILES]
        # A cache's folders end in a hash of path and time: their order must not hang on it.
        return [folder / name for name in sorted(names, key=lambda name: (name.parent.name[:8], name.name, str(name)))]


def same_file(one, other):
    """Whether content and time of two files are the same."""
    return one.stat().st_mtime_ns == other.stat().st_mtime_ns and one.read_bytes() == other.read_bytes()


# =====================================================================================================
# Damage
# =====================================================================================================

GROUPS = ("base", "data", "cache", "checkpoint", "result")


def cut(content, rng):
    return content[: rng.choice([0, 1, rng.randrange(len(content)), len(content) - 1])]


def zeroed(content, rng):
    first = rng.choice([0, rng.randrange(len(content))])
    last = rng.choice([len(content), min(len(content), first + rng.choice([1, 8, 64, 512]))])
    return content[:first] + bytes(last - first) + content[last:]


def flipped(content, rng):
    damaged = bytearray(content)
    # Half of the flips are aimed at the front, where the structure of most formats is.
    end = len(content) if rng.random() < 0.5 else min(len(content), 1024)
    for _ in range(rng.choice([1, 1, 4])):
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


CHANGES = {"cut": cut, "zeroed": zeroed, "flipped": flipped}
KINDS = (*CHANGES, "swapped", "gone")


def parses(path):
    """Whether a JSON or safetensors file can still be read as one; other files: True."""
    with contextlib.suppress(SafetensorError, ValueError, RecursionError, OSError):
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_bytes()), dict)
        if path.suffix == ".safetensors":
            load(path.read_bytes())
        return True
    return False


def write_over(path, content, keep_time):
    """New content; bit rot leaves the time as it was."""
    before = path.stat()
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@dataclasses.dataclass(frozen=True)
class Damage:
    """A reproducible damage: `seed` decides the file and the bytes."""

    group: str
    kind: str
    seed: int

    def __str__(self):
        return f"{self.group}-{self.kind}-{self.seed}"

    @property
    def rng(self):
        return random.Random(str(self))

    def apply(self, world):
        """Damages the world; returns the paths: two where files are swapped."""
        rng = self.rng
        files = world.files(self.group)
        if not files:  # an earlier damage has taken all
            return []
        path, keep_time = rng.choice(files), rng.random() < 0.5
        if self.kind == "gone":
            path.unlink()
            return [path]
        if self.kind != "swapped":
            change(path, CHANGES[self.kind], rng, keep_time)
            return [path]
        if self.seed % 10 >= 7:  # with a file of any kind
            files = [file for group in GROUPS for file in world.files(group)]
        content = path.read_bytes()
        others = [file for file in files if file.read_bytes() != content]
        if not others:
            return []
        other = rng.choice(others)
        write_over(path, other.read_bytes(), keep_time)
        write_over(other, content, keep_time)
        return [path, other]


def change(path, how, rng, keep_time=True):
    """Rewrites a file by `how(content, rng)`, which may not leave it as it is."""
    content = path.read_bytes()
    damaged = content
    while damaged == content and content:
        damaged = how(content, rng)
    write_over(path, damaged, keep_time)


# =====================================================================================================
# What is allowed
# =====================================================================================================


def names_one_of(sentence, world, paths):
    """Whether a sentence says what is damaged: a file, its folder, or the flag that it came by."""
    flags = {
        "base": ["--pretrained_model_name_or_path"],
        "data": ["--train_data_dir", *(path.name for path in world.files("data"))],
        "cache": ["--quantized_cache_dir"],
        "out": ["--resume_from_checkpoint", "--output_dir", "--push_only"],
    }
    words = []
    for path in paths:
        inside = path.relative_to(world.live).parts
        words += [path.name, *inside[1:-1], *flags[inside[0]]]
    return any(word in sentence for word in words)


def check_nothing_lost(world, before, outcome):
    """What was there before is there, unchanged, but for what the run may replace."""
    after = snapshot(world.live)
    stopped_midway = "last good embedding" in outcome.sentence  # it trained, so its results may stand there
    for name, content in before.items():
        folder, _, inside = name.partition("/")
        if folder == "cache":
            continue
        own = folder == "out" and any(Path(inside).match(pattern) for pattern in OWN)
        if own and (outcome.code == 0 or stopped_midway):
            continue
        numbered = folder == "out" and inside.startswith(("checkpoint-1/", "checkpoint-2/"))
        if numbered and outcome.code == 0:  # a run that goes on from an older one writes the newer anew
            assert name in after, f"{name} is gone"
            continue
        assert name in after, f"{name} is gone"
        assert after[name] == content, f"{name} was changed"
    left = [name for name in after if "/.tmp-" in name and name not in before]
    assert not left, f"left behind: {left}"


def check_sentence(world, outcome, paths, strict):
    """A refusal is one sentence, at the start of a line, that names what is damaged (`strict`)."""
    assert outcome.code in (2, 3) or "the loss became" in outcome.sentence, f"exit code {outcome.code}"
    last = outcome.said.rstrip("\n").rpartition("\n")[2]
    assert re.match("[^:]+[.]py: error: ", last), f"standard error does not end in one sentence: {last[-300:]!r}"
    sentence = outcome.sentence
    assert "\n" not in sentence and "Traceback" not in outcome.said
    assert len(sentence) <= LONGEST_SENTENCE, f"{len(sentence)} characters: {sentence[:600]}"
    if strict:
        named = [path.relative_to(world.live).as_posix() for path in paths]
        assert names_one_of(sentence, world, paths), f"blames something else than {named}: {sentence}"
