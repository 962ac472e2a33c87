"""Bad input of a search for gates, through the command line: one line, status 2, nothing written."""

from pathlib import Path

import pytest

from tests.cli.test_bad_input import refused

CONFIGS = Path(__file__).parents[2] / "configs" / "smoke"
MODEL = "--model.init_args"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([f"{MODEL}.budget=0.1"], "0.1 is out of reach"),
        ([f"{MODEL}.budget=1.5"], "model.budget: 1.5"),
        ([f"{MODEL}.granularity=fine"], "granularity: 'fine'"),
        ([f"{MODEL}.cache_mode=output"], "cache_mode: output"),
        ([f"{MODEL}.sampler.steps=1"], "model.sampler.steps"),
        ([f"{MODEL}.sampler.steps=5"], "model.sampler"),
        ([f"{MODEL}.sampler.name=flow-euler"], "flow-euler cannot sample"),
        ([f"{MODEL}.sampler.name=euler-maruyama"], "model.sampler: euler-maruyama draws noise"),
        ([f"{MODEL}.compare=[nonsense]"], "compare"),
        ([f"{MODEL}.temperature=0"], "model.temperature"),
        ([f"{MODEL}.preset=nothing"], "preset"),
    ],
)
def test_the_line_names_what_is_wrong(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(arguments, capsys, tmp_path, CONFIGS / "dipgo_dit.yaml")


def test_a_genetic_search_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{MODEL}.population=1"]
    assert "model.population" in refused(arguments, capsys, tmp_path, CONFIGS / "dipgo_rule.yaml")
