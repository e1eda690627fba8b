"""The script on a real GPU: the shared matrix, and what needs numbers, memory or a second process."""

import json
import os
import subprocess
import sys

import pytest
from matrix import BASICS, MATRIX, REPO, SCRIPT, SUBSPACE, TOKEN, command_line, command_lines, faults
from safetensors.torch import load_file


pytestmark = pytest.mark.cuda

# Two ranks share a GPU over gloo (NCCL refuses that); accelerate takes the process group that it finds.
LAUNCH_ON_GLOO = """
import runpy, sys, torch
torch.distributed.init_process_group("gloo")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
# Float32, and a μ at which rounding is far below the loss differences: devices should then agree closely.
EXACT = {"--mixed_precision": "no", "--perturbation_scale": 1e-2, "--num_vectors": 2, "--num_perturbations": 4}
COMPILING = 1200  # seconds


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(run_script, cache, tmp_path):
    """Trains by the command line and returns the output folder."""

    def run(name, env=None, **flags):
        chosen = BASICS | {"--quantized_cache_dir": cache} | {f"--{flag}": value for flag, value in flags.items()}
        run_script(*command_line(chosen | {"--output_dir": tmp_path / name}), env=env)
        return tmp_path / name

    return run


def embedding(folder):
    return load_file(folder / "learned_embeds.safetensors")[TOKEN]


def assert_close(first, second, start):
    """Both have moved away from where they started, by nearly the same."""
    way = embedding(first) - start
    assert way.norm() > 0
    assert (embedding(first) - embedding(second)).norm() < 0.01 * way.norm()


@pytest.fixture
def start(train):
    """The embedding before the first step that moves it."""
    return embedding(train("start", **named(EXACT), learning_rate=1e-30, max_train_steps=1, env=ON_CPU))


def named(flags):
    return {flag.removeprefix("--"): value for flag, value in flags.items()}


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: case.name)
def test_matrix(case, run_script, cache, tmp_path):
    for arguments in command_lines(case, tmp_path / "out", cache):
        done = run_script(*arguments, timeout=COMPILING)
    assert not faults(case, tmp_path / "out", done.stdout + done.stderr)


def test_cuda_learns_what_a_cpu_learns(train, start):
    cpu, cuda = train("cpu", **named(EXACT), env=ON_CPU), train("cuda", **named(EXACT))
    devices = [json.loads((f / "zoodip_config.json").read_text())["hardware"]["device"] for f in (cpu, cuda)]
    assert devices == ["cpu", "cuda"]
    assert_close(cpu, cuda, start)


def test_streamed_weights_learn_the_same(train, start):
    assert_close(train("resident", **named(EXACT)), train("streamed", **named(EXACT), low_vram=True), start)


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_resumed_run_equals_the_uninterrupted_one(train, quantization):
    flags = named(SUBSPACE) | {"quantization": quantization, "max_train_steps": 7, "checkpointing_steps": 4}
    whole = train("whole", **flags)
    parts = train("parts", **flags, resume_from_checkpoint=whole / "checkpoint-4")
    for name in ("learned_embeds.safetensors", "learned_embeds-best.safetensors"):
        if name == "learned_embeds.safetensors" or (parts / name).is_file():  # the best may lie before the checkpoint
            assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture
def train_on_two_ranks(cache, tmp_path):
    driver = tmp_path / "launch_on_gloo.py"
    driver.write_text(LAUNCH_ON_GLOO)

    def run(name, env=None):
        chosen = BASICS | EXACT | {"--quantized_cache_dir": cache, "--output_dir": tmp_path / name}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, str(driver), str(SCRIPT), *command_line(chosen)]
        done = subprocess.run(command, cwd=REPO, env={**os.environ, **(env or {})}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return tmp_path / name

    return run


def test_two_ranks_on_one_gpu_learn_what_two_cpu_processes_learn(train_on_two_ranks, start):
    cpu, cuda = train_on_two_ranks("cpu", env=ON_CPU), train_on_two_ranks("cuda")
    config = json.loads((cuda / "zoodip_config.json").read_text())
    assert config["hardware"]["device"] == "cuda" and config["figures"]["forward_passes"] == 3 * 5 * 2
    assert_close(cpu, cuda, start)
