"""What the rows of SparseDM's table say of its claims: within the dense network, ahead of rivals, which chain wins.

A variant stands for its runs of all seeds. They are drawn from equal noise, so differences are averaged over seeds
sample by sample; intervals are over samples and know nothing of the seeds, which stand beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tables import Row, Table, interval

CONTROL = "dense-fine-tuned"
WITHIN = 0.05  # of the dense network's distance: the upper end of the interval may be that far above the control
NEAR = 0.10  # the same for one set of weights at several ratios, against networks of one ratio
RIVALS = (
    "one-shot",
    "calibrated-one-shot",
    "asp-retrained",
    "ste",
    "sr-ste",
    "gradual-magnitude",
    "small-dense",
    "diff-pruning",
    "fewer-steps",
)
OURS = (
    "sparsedm-fixed",
    "sparsedm-progressive",
    "sparsedm-distilled",
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
    return f"{CONTROL}-long" if "-long" in variant else CONTROL


def difference(table: Table, network: str, variant: str, against: str) -> tuple[float, float, float] | None:
    """Mean over the seeds that both have of `variant` less `against`, with its interval."""
    ours, theirs = runs(table, network, variant), runs(table, network, against)
    return table.mean_difference([(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())])


def networks(table: Table) -> list[str]:
    """The networks there are rows of."""
    return sorted({row["network"] for row in table.rows})


def of_dense(table: Table, variants: Iterable[str]) -> list[str]:
    """Lines of a table: each variant less the dense network fine-tuned alike, and whether it is within it."""
    lines = [
        "| network | variant | seeds | fd_fashion, mean | less its dense control, paired | of each seed | |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in networks(table):
        found = {variant: difference(table, network, variant, control_of(variant)) for variant in variants}
        lines += [_of_dense(table, network, variant, value) for variant, value in found.items() if value]
    return lines


def _of_dense(table: Table, network: str, variant: str, found: tuple[float, float, float]) -> str:
    ours, theirs = runs(table, network, variant), runs(table, network, control_of(variant))
    seeds = sorted(ours.keys() & theirs.keys())
    each = [table.difference(ours[seed], theirs[seed]) for seed in seeds]
    mean = sum(ours[seed]["fd_fashion"]["value"] for seed in seeds) / len(seeds)
    word = "within" if found[2] <= WITHIN * dense_distance(table, network) else "not within"
    cells = [network, variant, str(len(seeds)), f"{mean:.2f}", interval(found)]
    return f"| {' | '.join(cells)} | {', '.join(f'{value[0]:.2f}' for value in each if value)} | {word} |"


def dense_distance(table: Table, network: str) -> float:
    """The distance of the dense start, drawn as the rows of the table are."""
    return float(next(iter(runs(table, network, "dense").values()))["fd_fashion"]["value"])


def against_rivals(table: Table) -> list[str]:
    """Lines of a table: SparseDM's variants less each rival; ahead is what lies below 0 with its whole interval."""
    lines = [f"| network | variant | {' | '.join(RIVALS)} |", "|---" * (2 + len(RIVALS)) + "|"]
    for network in networks(table):
        for variant in OURS:
            found = [difference(table, network, variant, rival) for rival in RIVALS]
            if any(found):
                lines.append(f"| {network} | {variant} | {' | '.join(map(interval, found))} |")
    return lines


def chains(table: Table) -> list[str]:
    """Lines of a table: a chain of ratios less the one ratio from the first step on."""
    return _pairs(table, CHAINS, ("chain", "one ratio", "chain less one ratio"), ("chain", "neither", "one ratio"))


def _pairs(table: Table, pairs: dict[str, str], head: Sequence[str], words: Sequence[str]) -> list[str]:
    lines = [f"| network | {' | '.join(head)} | ahead |", "|---|---|---|---|---|"]
    for network in networks(table):
        for variant, against in pairs.items():
            if (found := difference(table, network, variant, against)) is not None:
                word = words[0] if found[2] < 0 else words[2] if found[1] > 0 else words[1]
                lines.append(f"| {network} | {variant} | {against} | {interval(found)} | {word} |")
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
