"""Where results lie, which code made them and the tables that cards show of them: for every measurement."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What a result depends on; results and cards change while a table is made.
CODE = ("lightning_prune/*.py", "callbacks", "configs", "benchmarks/*.py")


def commit() -> str:
    """The commit of this folder; where git knows of none, what LIGHTNING_PRUNE_COMMIT says."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        except OSError:
            return ""

    known = git("rev-parse", "--short=12", "HEAD")
    if not known:
        return os.environ.get("LIGHTNING_PRUNE_COMMIT", "unknown")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return known + ("-dirty" if changed else "")


def write_card(card: Path, table: str) -> None:
    """Put `table` between the markers of a card. Raises `ValueError` if it has none."""
    begin, end = "<!-- table -->", "<!-- end of table -->"
    text = card.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"{card}: has no {begin} ... {end}")
    head, rest = text.split(begin, 1)
    card.write_text(f"{head}{begin}\n{table.strip()}\n{end}{rest.split(end, 1)[1]}")
