"""Do the tests notice? Each mutant of mutants.toml is one wrong line, and the tests that should fail on it.

    make mutants                        # about half an hour on one core; goes on where it was
    make mutants MUTANTS=windows        # those whose name or file has this in it
    make mutants MUTANTS=--report       # what is known so far

Mutants are tried in a copy of the checkout, one after the other. One that the tests pass on has *survived*: a test is
missing, or the line means nothing. `docs/development.md` says what was decided about each. Verdicts are kept in
`tests/.mutants.json` under the content of the mutated file and of the tests, so that a change of either tries again.
Not part of CI.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import NamedTuple


REPO = Path(__file__).resolve().parent.parent
LIST, STORE = REPO / "tests" / "mutants.toml", REPO / "tests" / ".mutants.json"
TIMEOUT = 600  # seconds; a mutant that hangs is noticed, too


class Mutant(NamedTuple):
    """A line that is wrong."""

    name: str
    file: str
    old: str  # occurs once in the file
    new: str
    tests: str  # words of pytest, which should fail


def read_mutants():
    """All `Mutant`s of mutants.toml."""
    of_files = tomllib.loads(LIST.read_text(encoding="utf-8"))
    return [Mutant(name, file, *rest) for file, table in of_files.items() for name, rest in table.items()]


def digest(mutant):
    """What a verdict belongs to: the mutant, the file as it is, and the tests."""
    found = hashlib.sha256(repr(mutant).encode())
    for name in (mutant.file, mutant.tests.split()[0]):
        found.update((REPO / name).read_bytes())
    return found.hexdigest()[:16]


def copy_of_checkout(folder):
    """What git knows of this checkout, as it is."""
    listed = subprocess.run(
        ["git", "-C", str(REPO), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)


def run_tests(folder, words):
    """Whether tests pass in a copy; None where none was run."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-n", "0", "-x", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            command + shlex.split(words), cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, 2):  # no test was found, or pytest itself broke
        return None
    return done.returncode == 0


def verdict_of(mutant, folder, passing):
    """ "noticed", "survived", or what keeps one from knowing.

    Args:
        mutant: `Mutant`.
        folder: copy of the checkout, which is as it was afterwards.
        passing: tests -> whether they pass without a mutant; what is not known yet is found out.
    """
    path = folder / mutant.file
    right = path.read_text(encoding="utf-8")
    if right.count(mutant.old) != 1:
        return f"its line occurs {right.count(mutant.old)} times"
    if mutant.tests not in passing:
        passing[mutant.tests] = run_tests(folder, mutant.tests)
    if not passing[mutant.tests]:
        return "its tests fail as it is" if passing[mutant.tests] is False else "it has no tests"
    try:
        path.write_text(right.replace(mutant.old, mutant.new), encoding="utf-8")
        return "survived" if run_tests(folder, mutant.tests) else "noticed"
    finally:
        path.write_text(right, encoding="utf-8")


def report(mutants, known):
    """Prints what is known of mutants; returns whether each of them was noticed."""
    verdicts = {mutant.name: known.get(digest(mutant), "not tried") for mutant in mutants}
    for name, verdict in verdicts.items():
        if verdict != "noticed":
            print(f"{name}: {verdict}")
    noticed = list(verdicts.values()).count("noticed")
    print(f"{noticed} of {len(verdicts)} mutants are noticed.")
    return noticed == len(verdicts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="", help="Only mutants with this in their name or file.")
    parser.add_argument("--report", action="store_true", help="Try nothing; say what is known.")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Begin no mutant after these.")
    args = parser.parse_args()
    known, passing = json.loads(STORE.read_text()) if STORE.is_file() else {}, {}
    mutants = [mutant for mutant in read_mutants() if args.part in f"{mutant.name} {mutant.file}"]
    waiting = [mutant for mutant in mutants if digest(mutant) not in known]
    if waiting and not args.report:
        with tempfile.TemporaryDirectory() as folder:
            copy_of_checkout(Path(folder))
            ends = time.monotonic() + 60 * args.minutes
            for mutant in waiting:
                if time.monotonic() > ends:
                    break
                verdict = verdict_of(mutant, Path(folder), passing)
                print(f"{mutant.name}: {verdict}", flush=True)
                if verdict in ("noticed", "survived"):
                    known[digest(mutant)] = verdict
                    STORE.write_text(json.dumps(known, indent=1) + "\n")
    return 0 if report(mutants, known) else 1


if __name__ == "__main__":
    sys.exit(main())
