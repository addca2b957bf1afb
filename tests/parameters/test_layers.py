"""Paths of the variables of layers: what they are called, and that nothing outside has a say in it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.parameters.layers import Layers, check_all_listed, layer_paths, name_of

DIM = 6
GATES = ("kernel", "recurrent_kernel", "bias")


def built(layer, shape=(None, 5, DIM)):
    layer.build(shape)
    return layer


def called(layer):
    layer(tf.zeros([2, 5, DIM]))
    return layer


def attention(**settings):
    layer = keras.layers.MultiHeadAttention(2, 3, **settings)
    layer(tf.zeros([2, 5, DIM]), tf.zeros([2, 5, DIM]))
    return layer


def stacked_cells():
    cells = [keras.layers.LSTMCell(4), keras.layers.LSTMCell(3), keras.layers.GRUCell(2)]
    return keras.layers.RNN(cells, return_sequences=True)


def nested():
    def block():
        return keras.Sequential(
            [keras.layers.Dense(4), keras.layers.LayerNormalization(), keras.layers.Dense(DIM)]
        )

    return keras.Sequential([block(), keras.layers.GRU(DIM, return_sequences=True), block()])


def named():
    """Names that a user gave, one of them with a number of its own."""
    return keras.Sequential(
        [
            keras.layers.Dense(4, name="down"),
            keras.layers.Dense(4, name="level_7"),
            keras.layers.Dense(DIM, name="up"),
        ],
        name="tower_3",
    )


def of(prefix, *names):
    return [f"{prefix}/{name}" for name in names]


# {case: (function that makes a layer, the paths of its trainable variables below layers/NAME)}.
CASES = {
    "lstm": (lambda: built(keras.layers.LSTM(4)), [*GATES]),
    "gru": (lambda: built(keras.layers.GRU(4)), [*GATES]),
    "simple_rnn": (lambda: built(keras.layers.SimpleRNN(4)), [*GATES]),
    "dense": (lambda: built(keras.layers.Dense(4)), ["kernel", "bias"]),
    "bidirectional": (
        lambda: called(keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True))),
        [*of("forward_lstm", *GATES), *of("backward_lstm", *GATES)],
    ),
    "stacked_cells": (
        lambda: called(stacked_cells()),
        [
            *of("stacked_rnn_cells_0/lstm_cell_0", *GATES),
            *of("stacked_rnn_cells_0/lstm_cell_1", *GATES),
            *of("stacked_rnn_cells_0/gru_cell_0", *GATES),
        ],
    ),
    "nested": (
        lambda: called(nested()),
        [
            *of("sequential_0/dense_0", "kernel", "bias"),
            *of("sequential_0/layer_normalization_0", "gamma", "beta"),
            *of("sequential_0/dense_1", "kernel", "bias"),
            *of("gru_0", *GATES),
            *of("sequential_1/dense_0", "kernel", "bias"),
            *of("sequential_1/layer_normalization_0", "gamma", "beta"),
            *of("sequential_1/dense_1", "kernel", "bias"),
        ],
    ),
    "attention": (
        attention,
        [f"{name}/{v}" for name in ("query", "key", "value", "attention_output") for v in ("kernel", "bias")],
    ),
    "named": (
        lambda: called(named()),
        [f"{name}/{v}" for name in ("down", "level_7", "up") for v in ("kernel", "bias")],
    ),
}


def paths(layer, name="body"):
    return list(Layers({name: layer}, num_replicas=1).trainable_variables)


def litter():
    """Makes Keras count on: one of each kind, and more of some."""
    for make, _ in CASES.values():
        make()
    for _ in range(3):
        called(nested())
        attention()


@pytest.mark.parametrize("case", CASES)
def test_paths(case):
    make, expected = CASES[case]
    expected = [f"layers/body/{path}" for path in expected]
    for _ in range(2):
        layer = make()
        assert paths(layer) == expected
        # Each is the variable that it says, in the order of the layer.
        for path, variable in zip(expected, layer.trainable_variables, strict=True):
            assert variable.name == path.rpartition("/")[2]
        litter()


def test_paths_lead_to_the_right_variables():
    layers = {"deep": called(nested()), "flat": built(keras.layers.Dense(3))}
    found = layer_paths(layers)
    block_0, gru, block_1 = layers["deep"].layers
    assert found["layers/deep/sequential_0/dense_1/kernel"] is block_0.layers[2].kernel
    assert found["layers/deep/sequential_1/dense_0/bias"] is block_1.layers[0].bias
    assert found["layers/deep/gru_0/recurrent_kernel"] is gru.cell.recurrent_kernel
    assert found["layers/flat/kernel"] is layers["flat"].kernel


@pytest.mark.parametrize("case", CASES)
def test_another_layer_of_another_name_changes_nothing(case):
    layer = CASES[case][0]()
    alone = layer_paths({"body": layer})
    for others in (
        {"before": built(keras.layers.Dense(4)), "body": layer},
        {"body": layer, "after": CASES[case][0]()},
        {"before": CASES[case][0](), "body": layer, "after": built(keras.layers.LSTM(4))},
    ):
        found = {path: v for path, v in layer_paths(others).items() if path.startswith("layers/body/")}
        assert list(found) == list(alone)
        assert all(found[path] is variable for path, variable in alone.items())


def test_generators_of_random_numbers_have_paths_too():
    """Else a resumed run would draw other masks."""
    stack = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(4), keras.layers.Dropout(0.5)])
    expected = None
    for _ in range(2):
        found = layer_paths({"body": called(stack)})
        assert len(found) == len(stack.variables) == 4
        assert {id(v) for v in found.values()} == {id(v) for v in stack.variables}
        expected = expected or list(found)
        assert list(found) == expected
        litter()
        stack = keras.Sequential(
            [keras.layers.Dropout(0.5), keras.layers.Dense(4), keras.layers.Dropout(0.5)]
        )


def test_a_shared_layer_is_there_once_under_the_first_name():
    shared = built(keras.layers.Dense(DIM))
    stack = keras.Sequential([shared, keras.layers.Dense(DIM)])
    stack.build((None, 5, DIM))
    found = layer_paths({"first": shared, "stack": stack, "again": shared})
    assert list(found) == [
        "layers/first/kernel",
        "layers/first/bias",
        "layers/stack/dense_0/kernel",
        "layers/stack/dense_0/bias",
    ]
    assert found["layers/first/kernel"] is shared.kernel
    assert found["layers/stack/dense_0/kernel"] is stack.layers[1].kernel


def test_a_layer_used_twice_in_a_sequence_is_there_once():
    shared = keras.layers.Dense(DIM, name="shared")
    stack = keras.Sequential([shared, keras.layers.ReLU(), shared])
    stack.build((None, 5, DIM))
    assert list(layer_paths({"body": stack})) == ["layers/body/shared/kernel", "layers/body/shared/bias"]


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: keras.layers.LSTM(3), "lstm_0"),
        (lambda: keras.layers.MultiHeadAttention(2, 3), "multi_head_attention_0"),
        (lambda: keras.layers.Conv1D(2, 3), "conv1d_0"),
        (lambda: keras.layers.Dense(2, name="down"), "down"),
        (lambda: keras.layers.Dense(2, name="level_7"), "level_7"),
    ],
)
def test_name_of_a_layer(layer, name):
    for _ in range(3):  # Whatever number Keras has got to.
        assert name_of(layer()) == name
    if name.endswith("_0"):
        assert name_of(layer(), number=4) == name.replace("_0", "_4")


def test_variables_are_trained_frozen_or_gathered():
    stack = keras.Sequential(
        [
            keras.layers.Dense(DIM, name="free"),
            keras.layers.Dense(DIM, name="frozen", trainable=False),
            keras.layers.BatchNormalization(name="normalization"),
        ]
    )
    layers = Layers({"body": called(stack)}, num_replicas=1)

    def below(names):
        return [f"layers/body/{name}" for name in names]

    trained = below(["free/kernel", "free/bias", "normalization/gamma", "normalization/beta"])
    gathered = below(["normalization/moving_mean", "normalization/moving_variance"])
    assert list(layers.trainable_variables) == trained
    assert list(layers.statistics) == gathered
    assert layers.variables.keys() == {*trained, *gathered, *below(["frozen/kernel", "frozen/bias"])}
    with pytest.raises(ValueError, match=r"layers/body/normalization/moving_mean.*LayerNormalization"):
        Layers({"body": stack}, num_replicas=2)


def test_a_frozen_layer_freezes_those_inside_it():
    stack = nested()
    stack.trainable = False
    called(stack)
    assert paths(stack) == []


def test_penalties_are_those_of_the_last_call():
    layer = built(keras.layers.Dense(DIM, kernel_regularizer=keras.regularizers.L2(0.5)))
    layers = Layers({"body": layer}, num_replicas=1)
    x = tf.ones([2, 5, DIM])
    for _ in range(2):
        outputs = layers.call(lambda: layer(layer(x)), x, training=True)
        np.testing.assert_allclose(outputs, layer(layer(x)), rtol=1e-6)
        kernel = layer.kernel.numpy().astype(np.float64)
        # However often a layer is called, its weights are there once.
        assert sum(map(float, layers.penalties())) == pytest.approx(0.5 * np.sum(kernel**2), rel=1e-5)


def test_layers_are_told_whether_they_train():
    dropout = keras.layers.Dropout(0.5)
    layers = Layers({"body": built(dropout)}, num_replicas=1)
    x = tf.ones([20, 5, DIM])
    for training, expected in ((False, {1.0}), (True, {0.0, 2.0})):
        assert set(np.unique(layers.call(lambda: dropout(x), x, training=training))) == expected


class Reader:
    pass


def test_reading_a_layer_that_is_not_listed_is_refused():
    listed, forgotten = (built(keras.layers.Dense(DIM, name=name)) for name in ("listed", "forgotten"))
    with tf.GradientTape() as tape:
        forgotten(listed(tf.zeros([2, 5, DIM])))
    check_all_listed(tape.watched_variables(), layers={"a": listed, "b": forgotten}, reader=Reader())
    with pytest.raises(ValueError, match=r"Reader, which reads forgotten/kernel, forgotten/bias\. List"):
        check_all_listed(tape.watched_variables(), layers={"a": listed}, reader=Reader())
