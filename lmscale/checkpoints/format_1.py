"""The names that format 1 gave to tensors, most of them positions in the body, and the paths of today."""

import collections
import re
from collections.abc import Iterable, Mapping

import keras

from lmscale.parameters.layers import layer_paths


def paths(names: Iterable[str]) -> dict[str, str]:
    """{name: path} of the tensors of a checkpoint of format 1.

    For a language model of one table and LSTM layers with, perhaps, a projection behind them:

        table/embedding                              tables/words/embedding
        table/embedding/second_moment                slots/tables/words/embedding/second_moment
        body/0/lstm_cell/kernel                      layers/lstm_0/kernel
        body_slots/0/lstm_cell/kernel/first_moment   slots/layers/lstm_0/kernel/first_moment
        body/2/kernel                                layers/projection/kernel
        carried_state/0                              state/0

    A name of another body stays as it is: the checkpoint does not tell what it stood for.
    """
    names = list(names)
    lstm_layers = {int(match[1]) for name in names if (match := re.match(r"body/(\d+)/lstm_cell/", name))}
    return {name: _path(name, lstm_layers) for name in names}


def _path(name, lstm_layers):
    kind, _, rest = name.partition("/")
    if kind == "table":
        is_slot = "/" in rest
        return f"{'slots/' if is_slot else ''}tables/words/{rest}"
    if kind == "carried_state":
        return f"state/{rest}"
    match = re.fullmatch(r"(\d+)/(lstm_cell/)?(.+)", rest)
    if kind not in ("body", "body_slots") or not match:
        return name
    layer, variable = int(match[1]), match[3]
    slots = "slots/" if kind == "body_slots" else ""
    if layer in lstm_layers:
        return f"{slots}layers/lstm_{layer}/{variable}"
    is_behind = bool(lstm_layers) and layer == len(lstm_layers) == max(lstm_layers) + 1
    if is_behind and variable.split("/")[0] == "kernel":
        return f"{slots}layers/projection/{variable}"
    return name


def names(paths: Iterable[str], layers: Mapping[str, keras.layers.Layer]) -> dict[str, str]:
    """{path: name in format 1} of the tensors of a model of one table, whatever its body.

    Args:
      paths: of the model's tensors.
      layers: {name: Keras layer}, the body's and then the projection, in the order of format 1.
    """
    numbered = {}
    for (position, layer), layer_name in zip(enumerate(layers.values()), layers, strict=True):
        seen: collections.Counter = collections.Counter()
        for path, variable in layer_paths({layer_name: layer}).items():
            rest = re.sub(r"_[0-9]+(?=/|$)", "", variable.path.split("/", 1)[-1])
            name = f"{position}/{rest}"
            numbered[path] = f"{name}_{seen[name]}" if seen[name] else name
            seen[name] += 1

    def name_of(path):
        if match := re.fullmatch(r"(?:slots/)?tables/[^/]+/(.+)", path):
            return f"table/{match[1]}"
        if match := re.fullmatch(r"state/(.+)", path):
            return f"carried_state/{match[1]}"
        if match := re.fullmatch(r"slots/(layers/.+)/([^/]+)", path):
            return f"body_slots/{numbered.get(match[1], match[1])}/{match[2]}"
        return f"body/{numbered[path]}" if path in numbered else path

    return {path: name_of(path) for path in paths}
