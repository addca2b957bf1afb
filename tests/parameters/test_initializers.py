"""First values: what is drawn, from which seed, and what cannot be."""

import functools
import re

import keras
import numpy as np
import pytest
import tiny_experiments
from tiny_experiments import Text, assert_same, language_model, one_rule, untied, values

from lmscale.bodies.lstm import lstm_body
from lmscale.parameters import initializers
from lmscale.parameters.groups import Group
from lmscale.parameters.initializers import GruGates, LstmGates, describe, initial_rows, initial_values
from lmscale.trainer import Trainer

PATH = "layers/lstm_0/kernel"


def draw(initializer, shape=(7, 12), *, seed=3, path=PATH):
    return initial_values(initializer, shape, seed=seed, path=path).numpy()


def constant(value):
    return keras.initializers.Constant(value)


def table(initializer, *, vocab_size, embed_dim=5, seed=3, path="tables/words/embedding"):
    """[vocab_size, embed_dim], joined from the blocks in which it is drawn."""
    blocks = list(initial_rows(initializer, vocab_size=vocab_size, embed_dim=embed_dim, seed=seed, path=path))
    assert [start for start, _ in blocks] == list(np.cumsum([0, *(len(x) for _, x in blocks[:-1])]))
    return np.concatenate([x for _, x in blocks])


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
def test_each_gate_of_an_lstm_has_its_part_in_the_order_of_keras(shape):
    gates = LstmGates(input=constant(1.0), forget=constant(2.0), cell=constant(3.0), output=constant(4.0))
    expected = np.broadcast_to(np.repeat([1.0, 2.0, 3.0, 4.0], 3), shape)
    np.testing.assert_array_equal(draw(gates, shape), expected)
    # Without anything said, what a Keras layer gives its bias.
    layer = keras.layers.LSTM(3)
    layer.build([None, None, 2])
    np.testing.assert_array_equal(draw(LstmGates(), (12,)), layer.cell.bias.numpy())


def test_gates_of_an_lstm_are_where_the_layer_reads_them():
    """A forget gate far below zero forgets: the second step then knows nothing of the first."""
    layer = keras.layers.LSTM(3, return_sequences=True)
    layer.build([None, None, 2])
    x = np.random.default_rng(0).normal(size=[1, 2, 2]).astype(np.float32)
    zeros, closed, open_ = keras.initializers.Zeros(), constant(-100.0), constant(100.0)
    kernel = draw(LstmGates(input=zeros, forget=zeros, cell=keras.initializers.Ones(), output=zeros), (2, 12))
    for forget, expected in ((closed, lambda c: c[1]), (open_, lambda c: c[0] + c[1])):
        bias = draw(LstmGates(input=open_, forget=forget, output=open_), (12,))
        layer.set_weights([kernel, np.zeros([3, 12], np.float32), bias])
        cells = np.tanh(x[0].astype(np.float64).sum(axis=1))
        np.testing.assert_allclose(layer(x)[0, 1], np.tanh([expected(cells)] * 3), rtol=1e-5)


@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 9)])
def test_each_gate_of_a_gru_has_its_part_in_the_order_of_keras(shape):
    gates = GruGates(update=constant(1.0), reset=constant(2.0), candidate=constant(3.0))
    np.testing.assert_array_equal(draw(gates, shape), np.broadcast_to(np.repeat([1.0, 2.0, 3.0], 3), shape))
    np.testing.assert_array_equal(draw(GruGates(), shape), np.zeros(shape))


def test_an_update_gate_of_a_gru_that_is_open_keeps_the_state():
    layer = keras.layers.GRU(3)
    layer.build([None, None, 2])
    kernel, recurrent = (draw(keras.initializers.RandomNormal(), (n, 9)) for n in (2, 3))
    layer.set_weights([kernel, recurrent, draw(GruGates(update=constant(50.0)), (2, 9))])
    state = np.array([[0.3, -0.2, 0.9]], np.float32)
    x = np.ones([1, 4, 2], np.float32)
    np.testing.assert_allclose(layer(x, initial_state=state), state, rtol=1e-6)


def test_gates_draw_apart():
    normal = keras.initializers.RandomNormal(stddev=1.0)
    gates = draw(LstmGates(input=normal, forget=normal, cell=normal, output=normal), (50, 400))
    correlations = np.corrcoef([part.ravel() for part in np.split(gates, 4, axis=1)])
    np.testing.assert_allclose(correlations, np.eye(4), atol=5 / np.sqrt(5000))


@pytest.mark.parametrize("gates", [LstmGates(), GruGates()], ids=["lstm", "gru"])
def test_gates_that_do_not_divide_the_last_axis_are_refused(gates):
    message = rf"initializer of {PATH} must fill its shape \(5, 7\)\. Received: {type(gates).__name__}\(.*equal size"
    with pytest.raises(ValueError, match=message):
        draw(gates, (5, 7))


def test_values_are_functions_of_seed_and_path_alone():
    normal = keras.initializers.RandomNormal(seed=11)
    first = draw(normal)
    keras.layers.Dense(3).build([None, 2])
    keras.initializers.RandomNormal()((2, 2))
    keras.utils.set_random_seed(99)
    np.testing.assert_array_equal(draw(normal), first)
    np.testing.assert_array_equal(draw(keras.initializers.RandomNormal(seed=12)), first)
    for other in (draw(normal, path="layers/lstm_1/kernel"), draw(normal, seed=4)):
        assert np.mean(other == first) < 0.01
        assert abs(np.corrcoef(other.ravel(), first.ravel())[0, 1]) < 5 / np.sqrt(first.size)


def test_orthogonal_matrices_are_orthogonal():
    values = draw(keras.initializers.Orthogonal(gain=2.0), (12, 12)).astype(np.float64)
    np.testing.assert_allclose(values.T @ values, 4 * np.eye(12), atol=1e-5)
    wide = draw(keras.initializers.Orthogonal(), (5, 12)).astype(np.float64)
    np.testing.assert_allclose(wide @ wide.T, np.eye(5), atol=1e-5)


@pytest.mark.parametrize(
    ("initializer", "shape"),
    [
        (keras.initializers.Orthogonal(), (12,)),
        (keras.initializers.Identity(), (3, 4, 5)),
        (constant([1.0, 2.0]), (5,)),
        (constant(np.ones([3, 5])), (5,)),
    ],
)
def test_a_shape_that_cannot_be_filled_names_path_and_initializer(initializer, shape):
    message = f"initializer of {PATH} must fill its shape {shape}. Received: {type(initializer).__name__}("
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(initializer, shape)


@pytest.mark.parametrize(
    "initializer", [keras.initializers.Orthogonal(), keras.initializers.Identity(), LstmGates()]
)
def test_what_needs_the_whole_matrix_is_refused_for_tables(initializer):
    message = rf"tables/words/embedding are drawn in blocks.*{type(initializer).__name__}"
    with pytest.raises(ValueError, match=message):
        table(initializer, vocab_size=7)


def test_a_constant_row_is_as_wide_as_the_table():
    np.testing.assert_array_equal(table(constant([1, 2, 3, 4, 5]), vocab_size=3), [[1, 2, 3, 4, 5]] * 3)
    with pytest.raises(
        ValueError, match=r"tables/words/embedding must fill its shape .*Received: Constant\("
    ):
        table(constant([1.0, 2.0]), vocab_size=3)


@pytest.mark.parametrize("distribution", ["truncated_normal", "untruncated_normal", "uniform"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
@pytest.mark.parametrize("vocab_size", [1001, 40_009])
def test_variance_scaling_has_the_fans_of_the_whole_table(monkeypatch, distribution, mode, vocab_size):
    """The variance is scale / fan. Blocks that are smaller than one table, and larger than the other."""
    monkeypatch.setattr(initializers, "BLOCK_ROWS", 7001)
    embed_dim = 11
    rule = keras.initializers.VarianceScaling(scale=3.0, mode=mode, distribution=distribution)
    rows = table(rule, vocab_size=vocab_size, embed_dim=embed_dim)
    fan = {"fan_in": vocab_size, "fan_out": embed_dim, "fan_avg": (vocab_size + embed_dim) / 2}[mode]
    # Of a normal variable, the standard deviation is found to 1 / sqrt(2n): within five of these.
    tolerance = 5 / np.sqrt(2 * rows.size)
    assert rows.astype(np.float64).std() == pytest.approx(np.sqrt(3 / fan), rel=tolerance)
    for part in np.array_split(rows, 3):
        assert part.astype(np.float64).std() == pytest.approx(np.sqrt(3 / fan), rel=2 * tolerance)
    if distribution == "uniform":
        assert np.abs(rows).max() <= np.sqrt(9 / fan) * (1 + 1e-6)


@pytest.mark.parametrize(
    "initializer",
    [keras.initializers.RandomNormal(), initializers.default_initializer(5)],
    ids=["normal", "default"],
)
def test_a_row_does_not_depend_on_the_number_of_rows(monkeypatch, initializer):
    monkeypatch.setattr(initializers, "BLOCK_ROWS", 64)
    whole = table(initializer, vocab_size=333)
    for vocab_size in (1, 63, 64, 65, 200):
        np.testing.assert_array_equal(table(initializer, vocab_size=vocab_size), whole[:vocab_size])
    assert len(np.unique(whole)) > 0.99 * whole.size  # Blocks are drawn apart.


def test_rows_by_default_are_uniform_about_logits_of_unit_order():
    rows = table(initializers.default_initializer(16), vocab_size=5003, embed_dim=16).astype(np.float64)
    assert np.abs(rows).max() <= 16**-0.5
    assert rows.std() == pytest.approx(16**-0.5 / np.sqrt(3), rel=0.01)
    assert abs(rows.mean()) < 5 * rows.std() / np.sqrt(rows.size)


def test_texts_leave_out_the_seed():
    normal = keras.initializers.RandomNormal(stddev=0.5, seed=3)
    assert describe(normal) == "RandomNormal(mean=0.0, stddev=0.5)"
    assert describe(initializers.default_initializer(16)) == "RandomUniform(minval=-0.25, maxval=0.25)"
    text = "LstmGates(input=RandomNormal(mean=0.0, stddev=0.5), forget=Ones(), cell=Zeros(), output=Zeros())"
    assert describe(LstmGates(input=normal)) == text


def build(strategy, groups, *, seed=3, bias="zeros"):
    task = language_model(
        body=functools.partial(lstm_body, num_layers=2, hidden_dim=4),
        **untied(input_dim=5, output_dim=5, bias=bias),
    )
    experiment = tiny_experiments.experiment(task=task, groups=groups, seed=seed)
    return Trainer(experiment, data=Text(), strategy=strategy)


def test_a_model_starts_from_what_its_groups_say(mirrored):
    """On any number of devices, and whatever Keras has made before."""
    normal = keras.initializers.RandomNormal(stddev=0.3)
    orthogonal = keras.initializers.Orthogonal()
    groups = [
        Group(pattern="layers/lstm_0/bias", initializer=LstmGates(forget=constant(2.0))),
        Group(pattern="layers/.*/recurrent_kernel", initializer=orthogonal),
        Group(pattern="layers/lstm_1/kernel|tables/.*/embedding", initializer=normal),
        *one_rule(),
    ]
    first = values(build(mirrored(1), groups).parameters())
    for num_replicas in (2, 3):
        keras.layers.LSTM(3).build([None, None, 2])
        assert_same(values(build(mirrored(num_replicas), groups).parameters()), first)
    np.testing.assert_array_equal(first["layers/lstm_0/bias"], np.repeat([0.0, 2.0, 0.0, 0.0], 4))
    for i in (0, 1):
        path = f"layers/lstm_{i}/recurrent_kernel"
        kernel = first[path].astype(np.float64)
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(4), atol=1e-5)
        np.testing.assert_array_equal(kernel, draw(orthogonal, (4, 16), path=path))
    np.testing.assert_array_equal(
        first["layers/lstm_1/kernel"], draw(normal, (4, 16), path="layers/lstm_1/kernel")
    )
    for name in ("inputs", "outputs"):
        path = f"tables/{name}/embedding"
        np.testing.assert_array_equal(first[path], table(normal, vocab_size=53, path=path))
    assert np.any(first["tables/inputs/embedding"] != first["tables/outputs/embedding"])
    # What no group speaks of is as without groups, and another seed changes what is drawn.
    plain = values(build(mirrored(1), one_rule()).parameters())
    for path in ("layers/lstm_0/kernel", "layers/lstm_1/bias", "layers/projection/kernel"):
        np.testing.assert_array_equal(first[path], plain[path])
    other = values(build(mirrored(1), groups, seed=4).parameters())
    for path in ("layers/lstm_1/kernel", "layers/lstm_1/recurrent_kernel", "tables/inputs/embedding"):
        assert np.any(other[path] != first[path]), path


def test_two_tables_of_one_shape_do_not_start_alike(mirrored):
    first = values(build(mirrored(1), one_rule()).parameters())
    rows = [first[f"tables/{name}/embedding"] for name in ("inputs", "outputs")]
    assert abs(np.corrcoef(rows[0].ravel(), rows[1].ravel())[0, 1]) < 5 / np.sqrt(rows[0].size)
    # Though each of them is the same on any number of devices.
    assert_same(values(build(mirrored(3), one_rule()).parameters()), first)


def test_an_initializer_that_does_not_fit_is_refused_when_the_model_is_built(mirrored):
    for pattern, message in (
        ("layers/lstm_0/bias", r"initializer of layers/lstm_0/bias must fill its shape \(16,\).*Orthogonal"),
        ("tables/outputs/embedding", r"rows of tables/outputs/embedding are drawn in blocks.*Orthogonal"),
    ):
        groups = [Group(pattern=pattern, initializer=keras.initializers.Orthogonal()), *one_rule()]
        with pytest.raises(ValueError, match=message):
            build(mirrored(1), groups)


@pytest.mark.parametrize("bias", ["zeros", "log_frequency"])
def test_an_initializer_for_a_bias_of_a_table_goes_before_what_the_table_says(mirrored, bias):
    normal = keras.initializers.RandomNormal(stddev=0.3)
    groups = [Group(pattern="tables/outputs/bias", initializer=normal), *one_rule()]
    for num_replicas in (1, 2):
        run = build(mirrored(num_replicas), groups, bias=bias)
        np.testing.assert_array_equal(
            values(run.parameters())["tables/outputs/bias"], draw(normal, (53,), path="tables/outputs/bias")
        )
