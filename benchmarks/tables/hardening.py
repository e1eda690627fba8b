"""What is tried against the trainers, counted from the tests."""

from benchmarks.tables.markdown import table


def hardening(result):
    """docs/hardening.json, as `tests/count_hardening.py` writes it."""
    rows = [[kind, counted["what"], counted["tests"], counted["cases"]] for kind, counted in result.items()]
    totals = [f"**{sum(counted[name] for counted in result.values())}**" for name in ("tests", "cases")]
    return table(["tried", "what it is", "tests", "cases"], [*rows, ["**all**", "", *totals]])
