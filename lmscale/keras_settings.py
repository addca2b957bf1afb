"""Keras's settings for the whole process: those of a run, whatever ~/.keras/keras.json says."""

import json
import os

# Of matrix products, and Keras's policy that has them with float32 weights.
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}
_FLOAT_TYPES = ("float16", "float32", "float64")
_DATA_FORMATS = ("channels_last", "channels_first")


def check_surroundings() -> None:
    """Checks what Keras and TensorFlow stumble over when they are imported, without saying where they have it from.

    Raises:
      ValueError: naming the variable of the environment, or the path of keras.json.
    """
    for name in ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH"):
        value = os.environ.get(name, "1")
        if not value.strip().lstrip("+-").isdecimal():
            raise ValueError(
                f"{name} in the environment must be a whole number. Received: {value!r}. Unset it: lmscale has no use "
                "for it."
            )
    path = os.path.expanduser(os.path.join(os.environ.get("KERAS_HOME", "~/.keras"), "keras.json"))
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError):
        return  # They take no notice of it either, or say its name.
    if not (
        isinstance(settings, dict)
        and settings.get("floatx", "float32") in _FLOAT_TYPES
        and isinstance(settings.get("epsilon", 1e-7), float)
        and settings.get("image_data_format", "channels_last") in _DATA_FORMATS
    ):
        raise ValueError(
            f"{path} must be an object with a floatx of {', '.join(_FLOAT_TYPES)}, an epsilon with a decimal point and "
            f"an image_data_format of {', '.join(_DATA_FORMATS)}, or without them. Received: {settings!r}. Correct "
            "the file or remove it: lmscale uses none of them."
        )


def reset(*, seed: int, compute_dtype: str = "float32") -> None:
    """Sets them as they are without a keras.json: a run is repeated from its configuration alone.

    Args:
      seed: of initial values that Keras draws.
      compute_dtype: of Keras's layers, one of `POLICIES`; their weights are float32.

    Raises:
      ValueError: if Keras was imported with another backend than TensorFlow.
    """
    import keras

    backend = keras.config.backend()
    if backend != "tensorflow":
        raise ValueError(
            f"Keras must run on TensorFlow. Received: the backend {backend}, because Keras was imported before lmscale "
            "with KERAS_BACKEND in the environment, or `backend` in ~/.keras/keras.json, set so. Set KERAS_BACKEND to "
            "tensorflow, or import lmscale before Keras."
        )
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy(POLICIES[compute_dtype])
    keras.utils.set_random_seed(seed)


def check_compute_dtype(name: str | None) -> None:
    """Checks what a part of an experiment wants its products in; None is the experiment's.

    Raises:
      ValueError: if it is none of `POLICIES`; if it is float16 and the experiment's is not, whose loss is not scaled.
    """
    import keras

    if name not in (None, *POLICIES):
        raise ValueError(
            f"compute_dtype must be {', '.join(map(repr, POLICIES))} or None. Received: compute_dtype={name!r}."
        )
    if name == "float16" and keras.config.dtype_policy().compute_dtype != "float16":
        raise ValueError(
            "compute_dtype must be 'float16' of the whole experiment where it is of a part: gradients vanish without "
            f"the loss scaling that comes with it. Received: compute_dtype={name!r} of a part alone. Set "
            "Experiment.compute_dtype = 'float16', or 'bfloat16' here."
        )
