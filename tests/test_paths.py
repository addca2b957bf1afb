"""Paths as users give them: home directories, what TensorFlow makes of odd ones, and files that cannot be written."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from lmscale import paths, storage

ROOT = Path(__file__).parents[1]


def test_home_directories(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    assert paths.expand("~/run") == "/home/me/run"
    assert paths.expand("~") == "/home/me"
    assert paths.expand("~root") == os.path.expanduser("~root") != "~root"
    for path in ("./~/run", "a/~", "~nobody-of-this-name/run", "", ".", "./a//b/"):
        assert paths.expand(path) == path
    assert paths.expand(tmp_path) == str(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # As where there is no entry for the user.
    with pytest.raises(ValueError, match=r"home directory. Received: '~/run', and none is known. Set HOME"):
        paths.expand("~/run")


def test_schemes():
    for text, path in (
        ("file:///a/b c", "/a/b c"),
        ("file://localhost/a", "/a"),
        ("FILE:///a/", "/a/"),
        ("file:a", "file:a"),
        ("./gs://a", "./gs://a"),
        ("a/gs://b", "a/gs://b"),
    ):
        assert paths.expand(text) == paths.expand(text, remote=True) == path
    for text in ("file://a", "file://host/a"):
        with pytest.raises(ValueError, match=f"must be one of this machine, .* Received: {text}\\."):
            paths.expand(text, remote=True)
    assert paths.expand("gs://bucket/~/x//", remote=True) == "gs://bucket/~/x//"
    with pytest.raises(
        ValueError, match=r"must be a path of this machine\. Received: gs://bucket/x\. Copy it"
    ):
        paths.expand("gs://bucket/x")


def test_paths_in_stores():
    path = storage.as_path("ram://bucket//a/b.txt/")
    assert (str(path), path.name, str(path.parent)) == ("ram://bucket/a/b.txt", "b.txt", "ram://bucket/a")
    assert str(path.parent.parent.parent) == "ram://bucket"
    assert str(path.with_name("c") / "d") == "ram://bucket/a/c/d"
    assert path == storage.as_path(str(path)) == storage.as_path(path)
    assert path != storage.as_path("ram://bucket/a")
    path.parent.mkdir(exist_ok=True)
    path.write_text("m\u00fc\r\n")
    assert path.read_bytes() == "m\u00fc\r\n".encode()
    path.write_text("x")
    assert path.read_text() == "x"
    assert (path.stat().st_size, path.is_file(), path.is_dir(), path.parent.is_dir()) == (
        1,
        True,
        False,
        True,
    )
    assert [str(p) for p in path.parent.iterdir()] == [str(path)]
    assert list(path.parent.glob("*.txt")) == [path]
    assert list((path.parent / "absent").glob("*")) == []
    with pytest.raises(FileExistsError):
        path.open("xb")
    with pytest.raises(ValueError, match="mode='a'"):
        path.open("a")
    path.unlink()
    path.unlink(missing_ok=True)
    for act in (path.unlink, path.read_bytes, path.stat, (path / "x").remove_tree):
        with pytest.raises(FileNotFoundError) as caught:
            act()
        assert caught.value.filename.startswith(str(path))
    assert storage.as_path("file:///a") == Path("/a")
    with pytest.raises(ValueError, match=r"TensorFlow knows: .*ram.* Received: s3://bucket. Mount the store"):
        storage.as_path("s3://bucket")


def tensorflow_finds_what_it_writes(directory):
    prefix = str(directory / "tensors")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=["x"], shape_and_slices=[""], tensors=[tf.constant(1.0)])
    try:
        return tf.train.load_checkpoint(prefix).get_tensor("x") == 1.0
    except tf.errors.NotFoundError:
        return False


@pytest.mark.parametrize(
    ("name", "is_found"),
    [
        ("lr[0.004]", False),
        ("[[]", False),
        ("[!a]", False),
        ("[^ab]", False),
        ("a[b/c]d", False),
        ("back\\slash", False),
        ("lr[0.004", True),
        ("[]", True),
        ("a]b", True),
        ("a*b?", True),
        ("{a,b}", True),
        ("~ #%41$HOME:;'\"|<>&-=+@,^`()\n", True),
        ("m\u00fcde-\u4e2d", True),
    ],
)
def test_paths_that_tensorflow_takes_for_patterns(tmp_path, name, is_found):
    directory = tmp_path / name
    directory.mkdir(parents=True)
    assert tensorflow_finds_what_it_writes(directory) == is_found
    if is_found:
        paths.check_checkpoint_path(directory, what="The place")
    else:
        with pytest.raises(
            ValueError, match=r"The place must not have square brackets .* Received: "
        ) as caught:
            paths.check_checkpoint_path(directory, what="The place")
        assert f"Received: {directory}. Choose another name" in str(caught.value)


def test_paths_that_tensorflow_spells_otherwise(monkeypatch):
    with pytest.raises(ValueError, match=r"The place must be .* Received: 'a\\udcff'. Rename it in UTF-8"):
        paths.check_checkpoint_path("a\udcff", what="The place")
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("iso8859-1"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    paths.check_checkpoint_path("ascii", what="The place")
    for name in ("\u00e9", "\u4e2d"):
        with pytest.raises(
            ValueError, match=r"encodes it as iso8859-1 here.* Received: '\\.*. Set LC_ALL=C.UTF-8"
        ):
            paths.check_spelling(name, what="The place")


@pytest.mark.skipif(shutil.which("localedef") is None, reason="no localedef to make a locale with")
def test_a_locale_that_is_not_utf8_makes_no_second_directory(tmp_path):
    name = "en_US.ISO-8859-1"
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / name)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("localedef lacks the locale's sources")
    result = subprocess.run(
        [sys.executable, "-c", "from lmscale.workdir import Workdir; Workdir('m\u00fcde')"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LOCPATH": str(tmp_path), "LC_ALL": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "ValueError: The working directory must be a path that Python, which encodes it as iso8859-1"
        in result.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_full_disk_is_named(tmp_path):
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, paths.naming(path), open(path, "w") as file:
        file.write("x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(FileNotFoundError) as caught, paths.naming(path):
        (tmp_path / "absent").read_text()
    assert caught.value.filename == str(tmp_path / "absent")
