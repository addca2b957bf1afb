"""What `lmscale.plot` reads, and the legend of its picture."""

import pytest

from lmscale import plot


def test_names_tell_runs_apart(monkeypatch, tmp_path):
    assert plot._names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert plot._names(["x/run", "y/run", "y/other"]) == ["x/run", "y/run", "other"]
    monkeypatch.chdir(tmp_path)
    assert plot._names(["."]) == [tmp_path.name]


def test_losses_by_frequency_are_those_of_the_last_evaluation_that_has_them():
    first = {"step": 1, "valid/by_frequency/decile_01_loss_nats": 9.0}
    second = {
        "step": 2,
        "valid/exact_loss_nats": 5.0,
        "valid/by_frequency/decile_01_loss_nats": 1.5,
        "valid/by_frequency/decile_10_loss_nats": 7.5,
        "valid/by_frequency/unknown_loss_nats": 4.0,
    }
    assert plot._by_frequency([first, second, {"step": 3, "valid/exact_loss_nats": 5.0}]) == {
        "1": 1.5,
        "10": 7.5,
        "unknown": 4.0,
    }
    assert plot._by_frequency([{"step": 1, "valid/exact_loss_nats": 5.0}]) == {}


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ("", "none"),
        ("perplexity 107.5\n", "none"),
        ('{"split": "test", "step": 3}\n', "a line without split, step or loss_nats"),
        ('{"split": "test", "step": "3", "loss_nats": 4.5}\n', "a line without"),
        ('{"split": "test", "step": 3, "loss_nats": "4.5"}\n', "a line without"),
        ('{"split": "test", "step": 3, "loss_nats": 4.5\n', "Expecting"),
    ],
)
def test_a_file_of_something_else(tmp_path, text, received):
    path = tmp_path / "evaluations"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=f"must hold lines printed by lmscale.evaluate. Received: {received}"
    ):
        plot._evaluations(path)


def test_evaluations_are_told_from_other_lines(tmp_path):
    """A loss that is not finite is null there, and has no place in the order of losses."""
    path = tmp_path / "evaluations"
    path.write_text('a log line\n{"split": "test", "step": 3, "loss_nats": null, "tokens": 7}\n')
    (point,) = plot._evaluations(path)
    assert (point["step"], point["loss_nats"]) == (3, None)
