"""Runs the matrix on the pretended CUDA device and prints a table; exit code 1 if a case did not pass.

.venv-cuda/bin/python tests/gpu/run_matrix.py [words of the cases' names]        # all of them without words
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matrix import MATRIX, REPO, SCRIPT, Case, command_lines, faults


PRETEND = Path(__file__).with_name("pretend_cuda.py")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
NO_WAITS = "a step never waits"


def run(case, folder):
    """Runs a case; (its faults, how often the host waited for the device)."""
    output_dir = folder / re.sub(r"\W+", "-", case.name)
    for arguments in command_lines(case, output_dir, folder / "cache"):
        command = [sys.executable, str(PRETEND), str(SCRIPT), *arguments]
        done = subprocess.run(command, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True)
        if done.returncode:
            return [f"exit {done.returncode}", *done.stderr.strip().splitlines()[-12:]], None
    operations, waits = map(int, re.search(r"pretended device: (\d+) operations, (\d+) waits", done.stderr).groups())
    found = faults(case, output_dir, done.stdout + done.stderr)
    if not operations and "--estimate_memory" not in case.flags:
        found.append("nothing ran on the device")
    return found, waits


def run_without_waits(folder):
    """Two more steps must not make the host wait once more."""
    runs = [run(Case(f"{NO_WAITS} {steps}", {"--max_train_steps": steps}), folder) for steps in (3, 5)]
    (first, few), (second, many) = runs
    return first + second or [f"two more steps waited {many - few} times"] * (few != many), many


def main(words):
    cases = [case.name for case in MATRIX if not case.needs] + [NO_WAITS]
    cases = [name for name in cases if not words or any(word in name for word in words)]
    by_name = {case.name: case for case in MATRIX}

    def timed(name):
        started = time.perf_counter()
        found, _ = run_without_waits(folder) if name == NO_WAITS else run(by_name[name], folder)
        return found, time.perf_counter() - started

    failed = 0
    with tempfile.TemporaryDirectory(prefix="pretend-cuda-") as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        for name, (found, seconds) in zip(cases, pool.map(timed, cases)):
            print(f"{name:<34}{'FAILED' if found else 'passed'} {seconds:5.0f} s", flush=True)
            print("".join(f"    {line}\n" for line in found), end="", flush=True)
            failed += bool(found)
    for case in MATRIX:
        if case.needs and not words:
            print(f"{case.name:<34}needs a GPU: {case.needs}")
    print(f"{len(cases) - failed} passed, {failed} failed on the pretended device")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
