"""The legend of `lmscale.plot`."""

from lmscale import plot


def test_names_tell_runs_apart(monkeypatch, tmp_path):
    assert plot._names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert plot._names(["x/run", "y/run", "y/other"]) == ["x/run", "y/run", "other"]
    monkeypatch.chdir(tmp_path)
    assert plot._names(["."]) == [tmp_path.name]
