"""What the user's environment says of other things does not reach a run; what it cannot go on with, it names."""

import json
import os
import subprocess
import sys

import tiny_runs

FEW_STEPS = {"TRAIN_STEPS": 2, "EVAL_EVERY": 2, "SAVE_EVERY": 2, "experiment.Experiment.probe_tokens": 0}


def test_variables_of_other_programs_and_closed_streams(data_dir, tmp_path):
    """Those of a notebook, of Keras on JAX, of Keras 2; a terminal of ASCII; no stdin nor stderr."""
    settings = {"backend": "jax", "floatx": "float16", "epsilon": 0.1, "image_data_format": "channels_first"}
    (tmp_path / "keras.json").write_text(json.dumps(settings | {"nnx_enabled": True}))
    environment = {
        "KERAS_HOME": str(tmp_path),
        "KERAS_BACKEND": "jax",
        "KERAS_NNX_ENABLED": "1",
        "TF_USE_LEGACY_KERAS": "1",
        "MPLBACKEND": "module://no.such_backend",
        "PYTHONIOENCODING": "ascii",
        "PYTHONOPTIMIZE": "2",
        "PYTHONWARNINGS": "error",
        "HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = tiny_runs.train_arguments(workdir="~/m\u00fcde", data_dir=data_dir, **FEW_STEPS)
    result = subprocess.run(
        ["sh", "-c", '"$0" -m lmscale.train "$@" <&- 2>&-', sys.executable, *arguments],
        cwd=tiny_runs.REPOSITORY,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.startswith(f"Finished: {tmp_path}/m\\xfcde, ")
    assert tiny_runs.checkpoint_steps(tmp_path / "m\u00fcde") == [2]


def test_a_full_disk_and_a_lack_of_memory_are_named(data_dir, tmp_path):
    arguments = tiny_runs.train_arguments(
        workdir=tmp_path / "run", data_dir=data_dir, **FEW_STEPS, EMBED_DIM=300_000_000
    )
    code, _, stderr = tiny_runs.run_forked("lmscale.train", arguments, log=tmp_path / "log")
    assert code == 2
    assert "Received: none left while building the model, with tables of 5,003 rows (" in stderr

    for split in ("train", "eval"):
        (tmp_path / "run" / split).mkdir()
        line = {"step": 1, "epoch": 0.1, "sampled_loss_nats": 2.0, "valid/exact_loss_nats": 3.0}
        (tmp_path / "run" / split / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    picture = tmp_path / "full.svg"
    picture.symlink_to("/dev/full")
    arguments = [f"--workdir={tmp_path / 'run'}", f"--output={picture}"]
    code, _, stderr = tiny_runs.run_forked("lmscale.plot", arguments, log=tmp_path / "log")
    assert code == 2
    assert f"error: {picture}: No space left on device" in stderr

    arguments[1] = f"--output={tmp_path / 'curve'}"  # Matplotlib would write curve.png.
    code, _, stderr = tiny_runs.run_forked("lmscale.plot", arguments, log=tmp_path / "log")
    assert code == 2
    assert f"error: --output must end in the picture's format. Received: {tmp_path / 'curve'}." in stderr
    assert not list(tmp_path.glob("curve*"))
