"""What the rows of SparseDM's table say of its claims: within the dense network, ahead of rivals, which chain wins.

A variant stands for its runs of all seeds. They are drawn from equal noise, so differences are averaged over seeds
sample by sample; intervals are over samples and know nothing of the seeds, whose number stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterable

from tables import Row, Table, interval

CONTROL = "dense-fine-tuned"
WITHIN = 0.05  # of the dense network's distance: the upper end of the interval may be that far above the control
NEAR = 0.10  # by how much one set of weights at several ratios may be above networks of one ratio, values alone
RIVALS = (
    "one-shot",
    "asp-retrained",
    "ste",
    "sr-ste",
    "asp-retrained-taught",
    "ste-taught",
    "gradual-magnitude",
    "small-dense",
    "diff-pruning",
    "fewer-steps",
)
OURS = (
    "sparsedm-fixed",
    "sparsedm-progressive",
    "sparsedm-fixed-distilled",
    "sparsedm-progressive-distilled",
    "sparsedm-calibrated",
    "sparsedm-calibrated-frozen",
    "sparsedm-calibrated-allocated",
)
# Chains of ratios and the run at one ratio that shares all else with them.
CHAINS = {
    "sparsedm-progressive": "sparsedm-fixed",
    "sparsedm-progressive-fifths": "sparsedm-fixed",
    "sparsedm-progressive-constant": "sparsedm-fixed-constant",
    "sparsedm-progressive-fifths-constant": "sparsedm-fixed-constant",
    "sparsedm-progressive-eighths-constant": "sparsedm-fixed-constant",
}
# One set of weights at a ratio, and the network that was trained for that ratio alone.
SEVERAL = {
    "sparsedm-several-at-dense": CONTROL,
    "sparsedm-several-at-7:8": "sparsedm-fixed-7:8",
    "sparsedm-several": "sparsedm-fixed",
}


def runs(table: Table, network: str, variant: str) -> dict[int, Row]:
    """The rows of a variant by seed."""
    return {row["seed"]: row for row in table.rows if (row["network"], row["variant"]) == (network, variant)}


def control_of(variant: str) -> str:
    """What a variant is measured against: trained as long, or where nothing is trained drawn from such weights."""
    if variant.endswith("one-shot") and variant != "one-shot":
        return f"{variant}-dense"
    if variant.endswith("-constant"):
        return f"{CONTROL}-constant"
    return f"{CONTROL}-long" if "-long" in variant else CONTROL


Pairs = list[tuple[Row, Row]]


def pairs_of(table: Table, network: str, variant: str, against: str) -> Pairs:
    """The rows of both variants by seed, where they can be compared."""
    ours, theirs = runs(table, network, variant), runs(table, network, against)
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return [(row, other) for row, other in pairs if table.difference(row, other) is not None]


def cell(table: Table, network: str, variant: str, against: str) -> str:
    """Mean difference with its interval, and of how many seeds it is."""
    pairs = pairs_of(table, network, variant, against)
    return f"{interval(table.mean_difference(pairs))} ({len(pairs)})" if pairs else ""


def networks(table: Table) -> list[str]:
    """The networks there are rows of."""
    return sorted({row["network"] for row in table.rows})


def of_dense(table: Table, variants: Iterable[str]) -> list[str]:
    """Lines of a table: each variant less its dense control, and whether it is within it."""
    lines = [
        "| network | variant | seeds | fd_fashion | less the dense start | less its dense control | of each seed | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for network in networks(table):
        found = {variant: pairs_of(table, network, variant, control_of(variant)) for variant in variants}
        lines += [_of_dense(table, network, variant, pairs) for variant, pairs in found.items() if pairs]
    return lines


def _of_dense(table: Table, network: str, variant: str, pairs: Pairs) -> str:
    found = table.mean_difference(pairs)
    assert found is not None
    each = [table.difference(*pair) for pair in pairs]
    mean = sum(row["fd_fashion"]["value"] for row, _ in pairs) / len(pairs)
    start = cell(table, network, variant, "dense").rsplit(" (")[0]
    cells = [network, variant, str(len(pairs)), f"{mean:.2f}", start, interval(found)]
    cells.append(", ".join(f"{value[0]:.2f}" for value in each if value))
    return f"| {' | '.join(cells)} | {_word(table, network, variant, found)} |"


def _word(table: Table, network: str, variant: str, found: tuple[float, float, float]) -> str:
    """Whether the upper end is at most 5 % of the dense start's distance, drawn alike; nothing where that is not."""
    own = control_of(variant) if control_of(variant).endswith("one-shot-dense") else "dense"
    dense = next(iter(runs(table, network, own).values()), None)
    if dense is None:
        return ""
    return "within" if found[2] <= WITHIN * dense["fd_fashion"]["value"] else "not within"


def against_rivals(table: Table) -> list[str]:
    """Lines of a table: SparseDM's variants less each rival; ahead is what lies below 0 with its whole interval."""
    lines = [f"| network | variant | {' | '.join(RIVALS)} |", "|---" * (2 + len(RIVALS)) + "|"]
    for network in networks(table):
        for variant in OURS:
            cells = [cell(table, network, variant, rival) for rival in RIVALS]
            if any(cells):
                lines.append(f"| {network} | {variant} | {' | '.join(cells)} |")
    return lines


def chains(table: Table) -> list[str]:
    """Lines of a table: a chain of ratios less the one ratio from the first step on."""
    lines = ["| network | chain | one ratio | chain less one ratio | ahead |", "|---|---|---|---|---|"]
    for network in networks(table):
        for chain, single in CHAINS.items():
            if (found := table.mean_difference(pairs_of(table, network, chain, single))) is not None:
                word = "chain" if found[2] < 0 else "one ratio" if found[1] > 0 else "neither"
                lines.append(f"| {network} | {chain} | {single} | {cell(table, network, chain, single)} | {word} |")
    return lines


def several(table: Table) -> list[str]:
    """Lines of a table: one set of weights at several ratios, against networks of one ratio trained as long."""
    lines = ["| one set of weights | one ratio | fd_fashion of each | more, % | |", "|---|---|---|---|---|"]
    for variant, single in SEVERAL.items():
        ours, theirs = runs(table, "fashion_dit", variant).get(0), runs(table, "fashion_dit", single).get(0)
        if ours and theirs:
            a, b = ours["fd_fashion"]["value"], theirs["fd_fashion"]["value"]
            word = "within 10 %" if a <= (1 + NEAR) * b else "not within 10 %"
            lines.append(f"| {variant} | {single} | {a:.2f}, {b:.2f} | {100 * (a / b - 1):.1f} | {word} |")
    return lines
