"""Markdown of tables, and the words that several of them need."""


def table(header, rows):
    """A markdown table of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def code_note(entries):
    """The commits of the code that measured entries, as the end of a note; nothing where none is recorded."""
    commits = [
        entry["commit"][:7] + " with changes" * bool(entry["changed"]) for entry in entries if entry.get("commit")
    ]
    if not commits:
        return ""
    before = len(entries) - len(commits)
    words = f" Code: {', '.join(dict.fromkeys(commits))}"
    return words + (f" ({before} of {len(entries)} from before commits were recorded)." if before else ".")


def loss_name(result):
    """The name of the loss by which `compare_methods.py` judged: older results held no picture out."""
    return "held-out loss" if "pictures" in result["configuration"]["judging"] else "validation loss"


PREDICTS = {"base": "v, with zero terminal SNR", "base_eps": "ε, as Stable Diffusion 1.5 does"}


def model_of(result):
    """The folder of a result's base in demo/; older results do not say that it is the only one there was."""
    return result["configuration"].get("model", "base")


def on_base(result):
    """A sentence that says which base a result is of."""
    base = model_of(result)
    return f"Base: `demo/{base}`, which predicts {PREDICTS[base]}."


def command_on(result, base):
    """The command that makes a result; one recorded without `--base` is from when `demo/base` was its default."""
    return result["command"] if "--base " in result["command"] else f"{result['command']} --base {base}"
