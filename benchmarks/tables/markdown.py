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
