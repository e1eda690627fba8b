"""Writes what is known of the scripts' flags without importing them: docs/usage.md and personalization/flags.json.

python -m docs.generate        # `make docs`
"""

import importlib
import json
from pathlib import Path

from personalization import flags


REPO = Path(__file__).resolve().parent.parent
USAGE = REPO / "docs" / "usage.md"
SCRIPTS = (
    "train_zoodip_textual_inversion.py",
    "train_tuneqdm_dreambooth.py",
    "train_selective_dreambooth_lora.py",
    "convert_embedding.py",
    "evaluate_personalization.py",
    "app.py",
)
HEAD = """# Every flag of every script

Generated from the flags themselves by `make docs`; `python SCRIPT --help` says the same. A flag with a default can be
left out, an empty default is none. Abbreviations are not accepted.

"Decides" is what else follows from a value. *training*: a checkpoint resumes only under the same value. *training with
a schedule*: the same, but only where the learning rate follows one. *calibration*: INT8 activations
(`--openvino_precision int8`) are calibrated anew for another value. Nothing: it may change from one part of a run to
the next. A flag of one optimizer is refused beside another. Of paths only the last part is ever published, of a token
nothing.
"""
DECIDES = {"run": "training", "schedule": "training with a schedule", "calibration": "calibration"}


def describe_scripts():
    """Script -> what its parser says of itself, as JSON has it."""
    parsers = {name: importlib.import_module(Path(name).stem).make_parser() for name in SCRIPTS}
    return json.loads(json.dumps({name: flags.describe(parser) for name, parser in parsers.items()}))


def usage(descriptions):
    """The content of docs/usage.md."""
    return "\n".join([HEAD, *(describe_script(name, words) for name, words in descriptions.items())])


def describe_script(name, words):
    names = {flag["name"] for group in words["groups"] for flag in group["flags"]}
    columns = ["Flag", "Value", "Default", "Meaning"]
    columns += ["Decides"] * ("resume_from_checkpoint" in names)
    kinds = [kind for kind in DECIDES if kind != "calibration" or "openvino_precision" in names]
    lines = [f"## {name}", "", words["description"], "", "```", words["usage"].replace("%(prog)s", f"python {name}")]
    lines += ["```", ""]
    for group in words["groups"]:
        lines += [f"### {group['title'].capitalize()}", ""] * (len(words["groups"]) > 1)
        lines += [row(columns), row(["---"] * len(columns))]
        lines += [row(cells(flag, kinds)[: len(columns)]) for flag in group["flags"]] + [""]
    return "\n".join(lines)


def cells(flag, kinds):
    """A flag as cells of its row."""
    default = flags.shown_default(flag["default"])
    owners = " or ".join(f"`{name}`" for name in flags.owners_of(flag["optimizer"]))
    belongs = f" (`--optimizer` {owners})" if owners else ""
    decides = ", ".join(DECIDES[kind] for kind in flag["decides"] if kind in kinds)
    value = "**required**" if flag["required"] else code(default) if default else ""
    return [f"`--{flag['name']}`", values(flag), value, flag["help"].replace("%%", "%") + belongs, decides]


def values(flag):
    """The values that a flag may have, in words."""
    if flag["choices"]:
        return ", ".join(map(code, flag["choices"]))
    if flag["limits"]:
        return str(flags.Range(*flag["limits"])).removeprefix("a finite number ").removeprefix("of ")
    if flag["path"]:
        return "path or name" if flag["path"] == flags.OR_NAME else "path"
    return flag["kind"]


def code(value):
    return f"`{value}`"


def row(parts):
    return f"| {' | '.join(part.replace('|', chr(92) + '|') for part in parts)} |"


def as_json(found):
    """The descriptions with a flag a line, so that a change is one in a diff."""
    lines = json.dumps(found, ensure_ascii=False).replace('{"name": ', '\n{"name": ')
    lines = lines.replace('"groups": [', '\n"groups": [').replace('{"title"', '\n{"title"')
    return lines.replace(", \n", ",\n") + "\n"


def main():
    found = describe_scripts()
    flags.DESCRIPTIONS.write_text(as_json(found), encoding="utf-8")
    USAGE.write_text(usage(found), encoding="utf-8")


if __name__ == "__main__":
    main()
