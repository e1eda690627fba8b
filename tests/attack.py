"""An attack by hypothesis on the rooms of the project: an hour of random inputs, which can be stopped and goes on.

    make attack                                             # an hour in all, or what is left of it
    python tests/attack.py --minutes 10 --rooms forms       # some of it
    python tests/attack.py --list; python tests/attack.py --report

A room is a place that takes input: `@room(name, prepare)` above a function of a world and of `data.draw`, which raises
where an input is answered badly. Rooms are in files `attack_*.py` beside this one; CI tries a few examples of each
(`test_attack.py`). What was found and how far it came is in `.attack/`; a finding is repeated with its round:

    python tests/attack.py --rooms forms --round 17
"""

import argparse
import contextlib
import importlib
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st


HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / ".attack"
EXAMPLES = 25  # of a round
ROOMS = {}


class Room(NamedTuple):
    """A place that takes input.

    Args:
        name: of it.
        prepare: context manager of a folder that yields a world, which many examples share.
        attack: function of the world and hypothesis' `data`: one example.
        examples: how many CI tries.
    """

    name: str
    prepare: object
    attack: object
    examples: int


def room(name, prepare, examples=10):
    """Declares the function below it a room."""

    def declare(attack):
        ROOMS[name] = Room(name, prepare, attack, examples)
        return attack

    return declare


def open_rooms():
    """Imports what declares rooms."""
    for path in sorted(HERE.glob("attack_*.py")):
        importlib.import_module(path.stem)
    return ROOMS


@contextlib.contextmanager
def world_of(room):
    """The world of a room, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True) as folder:
        with room.prepare(Path(folder)) as world:
            yield world


def attack(room, world, number, examples=EXAMPLES):
    """A round: raises what an example raises, made as simple as it can be."""
    phases = (Phase.generate, Phase.shrink)
    quick = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "phases": phases}

    @seed(number)
    @settings(max_examples=examples, report_multiple_bugs=False, print_blob=False, **quick)
    @given(st.data())
    def example(data):
        room.attack(world, data)

    example()


# =====================================================================================================
# What rooms draw
# =====================================================================================================

CHARACTERS = st.characters() | st.sampled_from("\0\n\r\t\x1b\u200b\u202e\ufeff<>\"'`{}[]()$\\/%&;|*?#é")
WORDS = st.text(CHARACTERS, max_size=20) | st.sampled_from(
    ["", " ", ".", "..", "../..", "/etc", "~", "--", "--help", "-1", "nan", "a\ud800b", "\udcff", "a\0b", "x" * 300]
    + ["x" * 3_000_000, "CON", "{}", "{0}", "{a}", "%s", "$(id)", "`id`", "<script>alert(1)</script>", "🐶👩‍👧"]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0, 1e-320])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(WORDS, inside, max_size=4),
    max_leaves=8,
)


def changed(draw, content):
    """JSON that is like `content`, with one value of it another, gone or new."""
    if not isinstance(content, (dict, list)) or not content or draw(st.integers(0, 5)) == 0:
        return draw(JSON)
    keys = sorted(content) if isinstance(content, dict) else range(len(content))
    key, copy = draw(st.sampled_from(keys)), content.copy()
    what = draw(st.integers(0, 6))
    if what == 0:
        del copy[key]
    elif what == 1 and isinstance(content, dict):
        copy[draw(WORDS)] = draw(JSON)
    else:
        copy[key] = changed(draw, content[key])
    return copy


def changed_file(draw, content):
    """The bytes of a JSON file: a changed one, or a damaged one."""
    text = json.dumps(changed(draw, content)).encode()
    if draw(st.integers(0, 5)) == 0:
        deep = st.sampled_from([b"[" * 10**5, b"\xff\xfe", b"\0" * 9, b"", b"null", b"\xef\xbb\xbf{}"])
        return draw(st.binary(max_size=50) | deep | st.just(text[: draw(st.integers(0, 200))]))
    return text


def is_sentence(text):
    """Whether a text can be shown to a user: one line, not endless, characters only."""
    text = str(text)
    return "\n" not in text and 0 < len(text) < 1200 and text == text.encode(errors="ignore").decode()


# =====================================================================================================
# The hour
# =====================================================================================================


class State:
    """How far the attack came, and what it found.

    Args:
        folder: that it is kept in.
    """

    def __init__(self, folder):
        self.path, self.findings = folder / "state.json", folder / "findings.jsonl"
        folder.mkdir(exist_ok=True)
        try:
            self.content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.content = {"seconds": 0.0, "rounds": {}}

    def next_round(self, room):
        return self.content["rounds"].get(room.name, 0)

    def done(self, room, seconds, error=None):
        """Writes down a round."""
        number = self.next_round(room)
        if error is not None:
            notes = "".join(f"{note}\n" for note in getattr(error, "__notes__", ()))
            place = traceback.extract_tb(error.__traceback__)[-1]
            finding = {"room": room.name, "round": number, "error": f"{type(error).__name__}: {error}"[:2000]}
            finding |= {"at": f"{place.filename}:{place.lineno}", "example": notes[:4000]}
            with self.findings.open("a") as file:
                file.write(json.dumps(finding) + "\n")
        self.content["rounds"][room.name] = number + 1
        self.content["seconds"] += seconds
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=2))
        temporary.replace(self.path)

    def report(self):
        """What was found, the same fault once."""
        lines = [json.loads(line) for line in self.findings.read_text().splitlines()] if self.findings.exists() else []
        faults = {}
        for finding in lines:
            faults.setdefault((finding["room"], finding["at"], finding["error"].partition(":")[0]), []).append(finding)
        for (name, at, _), found in faults.items():
            rounds = ", ".join(str(each["round"]) for each in found[:8])
            print(f"\n{name}, round {rounds} ({len(found)} in all), {at}\n  {found[0]['error'][:600]}")
            print("  " + found[0]["example"][:1500].replace("\n", "\n  "))
        rounds, minutes = self.content["rounds"], self.content["seconds"] / 60
        print(f"\n{len(faults)} faults in {sum(rounds.values())} rounds of {EXAMPLES}, {minutes:.0f} min: {rounds}")
        return len(faults)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="In all, what was done before counts.")
    parser.add_argument("--rooms", nargs="+", help="Which; all by default.")
    parser.add_argument("--round", type=int, help="Repeats one round of one room, and raises what it raises.")
    parser.add_argument("--list", action="store_true", help="Lists the rooms.")
    parser.add_argument("--report", action="store_true", help="Prints what was found so far.")
    args = parser.parse_args()
    state, rooms = State(FOLDER), open_rooms()
    if args.list:
        return print("\n".join(rooms))
    if args.report:
        return sys.exit(bool(state.report()))
    rooms = [rooms[name] for name in args.rooms or rooms]
    if args.round is not None:
        with world_of(rooms[0]) as world:
            return attack(rooms[0], world, args.round)
    with contextlib.suppress(KeyboardInterrupt):
        while state.content["seconds"] < 60 * args.minutes:
            room = min(rooms, key=state.next_round)  # in turn
            started, error = time.monotonic(), None
            try:
                with world_of(room) as world:
                    attack(room, world, state.next_round(room))
            except Exception as raised:
                error = raised
            state.done(room, time.monotonic() - started, error)
            said = f"{type(error).__name__}: {str(error)[:150]!r}" if error else "well"
            print(f"{room.name}, round {state.next_round(room) - 1}: {said}", flush=True)
    sys.exit(bool(state.report()))


if __name__ == "__main__":
    from attack import main  # the module that rooms import, too

    main()
