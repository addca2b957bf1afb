"""Keras's global settings: a run does not depend on those of the user's home directory."""

import json

import keras
import pytest

from lmscale import keras_settings


def test_reset(monkeypatch):
    keras.config.set_floatx("float16")
    keras.config.set_epsilon(0.1)
    keras.config.set_image_data_format("channels_first")
    keras_settings.reset(seed=3)
    assert (keras.config.floatx(), keras.config.epsilon()) == ("float32", 1e-7)
    assert keras.config.image_data_format() == "channels_last"
    assert keras.config.dtype_policy().name == "float32"
    keras_settings.reset(seed=3, compute_dtype="bfloat16")
    assert keras.config.dtype_policy().name == "mixed_bfloat16"
    first = keras.random.normal([3])
    keras_settings.reset(seed=3)
    assert (keras.random.normal([3]) == first).numpy().all()
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"Received: the backend jax, .*KERAS_BACKEND.*keras\.json"):
        keras_settings.reset(seed=3)


@pytest.mark.parametrize(
    "settings",
    [{"floatx": "bfloat16"}, {"epsilon": 1}, {"image_data_format": "nchw"}, {"floatx": None}, ["floatx"]],
)
def test_a_file_that_keras_refuses_is_named(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    keras_settings.check_surroundings()
    path = tmp_path / "keras.json"
    for accepted in ("{", "{}", '{"floatx": "float64", "epsilon": 0.1, "backend": "jax"}'):
        path.write_text(accepted)
        keras_settings.check_surroundings()
    path.write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"keras\.json must be .* Received: .* Correct the file or remove it"
    ):
        keras_settings.check_surroundings()


def test_a_variable_that_keras_refuses_is_named(monkeypatch):
    monkeypatch.setenv("KERAS_MAX_EPOCHS", "3")
    keras_settings.check_surroundings()
    monkeypatch.setenv("KERAS_MAX_EPOCHS", "many")
    with pytest.raises(ValueError, match=r"KERAS_MAX_EPOCHS .* whole number. Received: 'many'. Unset it"):
        keras_settings.check_surroundings()
