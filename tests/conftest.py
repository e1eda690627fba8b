"""Fixtures shared by all tests: the repository's demo data, and the ways to run the training script."""

import atexit
import dataclasses
import gc
import os
import shutil
import tempfile


# What the script caches between runs belongs to the test that runs it, not to the user.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="zoodip-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# What tests start as processes imports this checkout, not the one that this environment has installed.
os.environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Tests run side by side (pytest-xdist), so each process, and each one it starts, keeps to one thread: threads that
# share a core spend their time waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_base import build_pictures, build_tiny_base

import train_zoodip_textual_inversion as zoodip
from personalization.models import base_model, memory


REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "train_zoodip_textual_inversion.py"

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny `base` and `pictures`."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_base(folder / "base")
    build_pictures(folder / "pictures")
    return folder


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage():
    """What the imports left is not looked through at every garbage collection of a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def remembered():
    """Runs in this process find out only once what follows from configs alone, a third of a short run's time.

    A refusal is not remembered, and the command line's own runs are processes that remember nothing.
    """
    fits, predict, known = base_model.compute_empty, zoodip.estimate_memory, {}

    def configs(base):
        found = (base_model.config_of(base, name) for name in base.family.components)
        found = [config if isinstance(config, dict) else config.to_dict() for config in found]
        return repr((base.family.name, found, len(base.tokenizers), base.prompt_length))

    def compute_empty(base):
        key = configs(base)
        if key not in known:
            known[key] = fits(base)

    def estimate_memory(args, base, compute):
        settings = {name: value for name, value in vars(args).items() if not name.endswith(("_dir", "_checkpoint"))}
        settings["is_cached"] = args.quantized_cache_dir is not None
        key = repr((settings, compute)) + configs(base)
        if key not in known:
            known[key] = predict(args, base, compute)
        now = memory.process_memory().rss + memory.CPU_KERNEL_BYTES if known[key].libraries else 0
        return dataclasses.replace(known[key], libraries=now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_model, "compute_empty", compute_empty)
        patch.setattr(zoodip, "estimate_memory", estimate_memory)
        yield


LONGEST = "training app_browser app hub tangents tuneqdm_runs run_folder selective_runs".split()  # minutes each


def pytest_collection_modifyitems(items):
    """The longest files come first, so that no worker is alone with one at the end."""
    first = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def repo():
    return REPO


@pytest.fixture(scope="session")
def demo_base():
    path = REPO / "demo" / "base"
    if not (path / "model_index.json").is_file():
        pytest.skip("demo/base is not in this checkout (make it with demo/build_demo_base.py)")
    return str(path)


@pytest.fixture(scope="session")
def subject():
    subjects = sorted((REPO / "demo" / "subjects").glob("*/metadata.jsonl"))
    if not subjects:
        pytest.skip("demo/subjects is not in this checkout (make it with demo/build_demo_base.py)")
    return subjects[0].parent


@pytest.fixture(scope="session")
def run_script():
    """Runs `python train_zoodip_textual_inversion.py ...` and checks its exit code (`expect`; None: any)."""

    def run(*arguments, expect=0, env=None, timeout=300):
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        return _run(command, expect, env, timeout)

    return run


@pytest.fixture(scope="session")
def launch():
    """Runs the script by the real `accelerate launch` (flags of the launcher in `launcher`)."""

    def run(*arguments, expect=0, env=None, timeout=300, launcher=()):
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(SCRIPT), *map(str, arguments)]
        return _run(command, expect, env, timeout)

    return run


def _run(command, expect, env, timeout):
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=timeout)
    if expect is not None:
        assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture
def basics(demo_base, subject, tmp_path):
    """The shortest valid argument list, as a dict of flags that a test may change."""
    return {
        "--pretrained_model_name_or_path": demo_base,
        "--train_data_dir": str(subject),
        "--placeholder_token": "<my-toy>",
        "--initializer_token": "star",
        "--output_dir": str(tmp_path / "out"),
        "--max_train_steps": "3",
        "--report_to": "none",
    }


@pytest.fixture
def train(basics):
    """Trains in this process (fast: imports are paid once) and returns the output directory."""

    def run(**flags):
        chosen = {**basics, **{f"--{name}": value for name, value in flags.items()}}
        zoodip.main(zoodip.parse_args(as_arguments(chosen)))
        return Path(chosen["--output_dir"])

    run.folder = Path(basics["--output_dir"]).parent
    return run


def short_run(base, pictures, cache, output_dir, word):
    """The shortest command line of a run on a small base, as a dict of flags."""
    return {
        "--pretrained_model_name_or_path": base,
        "--train_data_dir": pictures,
        "--placeholder_token": "<my-toy>",
        "--initializer_token": word,
        "--output_dir": output_dir,
        "--quantized_cache_dir": cache,
        "--max_train_steps": 3,
        "--report_to": "none",
    }


def as_arguments(flags):
    """{"--flag": value} as a command line; True is a bare flag, None drops it."""
    words = []
    for flag, value in flags.items():
        if value is True:
            words.append(flag)
        elif value is not None:
            words += [flag, str(value)]
    return words


@pytest.fixture(scope="module")
def built():
    """An empty `damage.World`."""
    from damage import World

    made = World()
    yield made
    shutil.rmtree(made.root)


@pytest.fixture
def world(built, capsys, caplog):
    """The undamaged `damage.World`; `world.train(**flags)` is a run of three steps in it."""
    built.capture = capsys, caplog
    if not built.kept.is_dir():
        built.build()
    built.restore()
    return built
