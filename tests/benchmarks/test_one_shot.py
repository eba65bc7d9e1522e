"""What the rows of the one-shot table are."""

from benchmarks.one_shot import METHODS, configured


def test_each_row_is_refined_or_not_as_it_says() -> None:
    configurations = {name: configured(name, ["retrain=none"]) for name in METHODS}
    settings = {name: config.moe.refined for name, config in configurations.items()}
    assert [name for name, refined in settings.items() if refined is None] == [
        "scores (WIFV), nothing made up for",
        "FLAP: scores and a bias",
        "scores, least squares",
        "elimination (OBS), least squares",
    ]
    assert [name for name, refined in settings.items() if refined is not None and refined.steps] == [
        "the same, local gradient steps",
        "8 token-refined experts, local gradient steps",
    ]
    assert all(refined.sequential for refined in settings.values() if refined is not None)
    assert [config.moe.experts for config in configurations.values()] == [1] * 8 + [8] * 2
