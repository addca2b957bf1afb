import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from lmscale.parameters import update_rules

ROWS, DIM, STEPS = 7, 5, 6
SHAPES = [(ROWS, DIM), (ROWS,), (ROWS, 2, 3)]

OPTIMIZERS = {
    "sgd": lambda lr: update_rules.SGD(learning_rate=lr),
    "adagrad": lambda lr: update_rules.Adagrad(learning_rate=lr),
    "row_wise_adagrad": lambda lr: update_rules.RowWiseAdagrad(learning_rate=lr),
    "adam": lambda lr: update_rules.Adam(learning_rate=lr),
}


def _problem(shape, *, steps=STEPS, seed=0):
    """Weights, and a gradient for each step, in float64 with the values of float32."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=shape).astype(np.float32)
    return weights, rng.normal(size=(steps, *shape)).astype(np.float32)


def _initial_slots(optimizer, shape):
    return {
        name: tf.fill(shape if slot.per_element else shape[:1], tf.cast(slot.initial_value, slot.dtype))
        for name, slot in optimizer.slots.items()
    }


def _run(optimizer, weights, gradients, *, touched=None):
    """Updates the rows that `touched` [steps, rows] names; returns weights and slots as numpy arrays."""
    weights = np.array(weights)
    slots = {name: slot.numpy() for name, slot in _initial_slots(optimizer, weights.shape).items()}

    # Compiled, with the step a tensor, as in training.
    @tf.function
    def update(weights, gradients, slots, step):
        return optimizer.update(weights=weights, gradients=gradients, slots=slots, step=step)

    for step, gradient in enumerate(gradients):
        rows = np.arange(len(weights)) if touched is None else np.flatnonzero(touched[step])
        new_weights, new_slots = update(
            tf.constant(weights[rows]),
            tf.constant(gradient[rows]),
            {name: tf.constant(slot[rows]) for name, slot in slots.items()},
            tf.constant(step),
        )
        assert new_slots.keys() == slots.keys()
        weights[rows] = new_weights.numpy()
        for name, slot in new_slots.items():
            slots[name][rows] = slot.numpy()
    return weights, slots


def _run_keras(optimizer, weights, gradients):
    """Weights and the optimizer's variables by name, after dense updates."""
    variable = keras.Variable(weights)
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient)], [variable])
    return variable.numpy(), {v.path.rsplit("_", 1)[-1]: v.numpy() for v in optimizer.variables}


@pytest.mark.parametrize("shape", SHAPES)
def test_sgd_equals_keras(shape):
    weights, gradients = _problem(shape)
    expected, _ = _run_keras(keras.optimizers.SGD(0.3), weights, gradients)
    actual, slots = _run(update_rules.SGD(learning_rate=0.3), weights, gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    assert slots == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_adagrad_equals_keras(shape):
    weights, gradients = _problem(shape)
    # With epsilon=0, because Keras adds it inside the root.
    expected, variables = _run_keras(
        keras.optimizers.Adagrad(0.3, initial_accumulator_value=0.2, epsilon=0), weights, gradients
    )
    optimizer = update_rules.Adagrad(learning_rate=0.3, initial_accumulator=0.2, epsilon=0)
    actual, slots = _run(optimizer, weights, gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slots["accumulator"], variables["accumulator"], rtol=1e-6)


def test_adagrad_adds_epsilon_outside_the_root():
    weights, gradients = _problem((ROWS, DIM))
    lr, epsilon, accumulator = 0.3, 0.5, np.full((ROWS, DIM), 0.25)
    expected = weights.astype(np.float64)
    for gradient in gradients.astype(np.float64):
        accumulator = accumulator + gradient**2
        expected = expected - lr * gradient / (np.sqrt(accumulator) + epsilon)
    optimizer = update_rules.Adagrad(learning_rate=lr, initial_accumulator=0.25, epsilon=epsilon)
    actual, slots = _run(optimizer, weights, gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slots["accumulator"], accumulator, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_row_wise_adagrad_against_numpy(shape):
    weights, gradients = _problem(shape)
    lr, epsilon, accumulator = 0.3, 1e-3, np.full(ROWS, 0.25)
    expected = weights.astype(np.float64)
    for gradient in gradients.astype(np.float64):
        accumulator = accumulator + np.mean(gradient.reshape(ROWS, -1) ** 2, axis=1)
        scale = lr / (np.sqrt(accumulator) + epsilon)
        expected = expected - scale.reshape([ROWS] + [1] * (len(shape) - 1)) * gradient
    optimizer = update_rules.RowWiseAdagrad(learning_rate=lr, initial_accumulator=0.25, epsilon=epsilon)
    actual, slots = _run(optimizer, weights, gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slots["accumulator"], accumulator, rtol=1e-6)
    assert slots["accumulator"].shape == (ROWS,)


@pytest.mark.parametrize("shape", SHAPES)
def test_adam_equals_keras_where_every_row_is_touched(shape):
    weights, gradients = _problem(shape, steps=11)
    # Epsilon next to nothing, because Keras does not correct it for bias with the second moment.
    kwargs = {"learning_rate": 0.03, "beta_1": 0.85, "beta_2": 0.97, "epsilon": 1e-12}
    expected, variables = _run_keras(keras.optimizers.Adam(**kwargs), weights, gradients)
    actual, slots = _run(update_rules.Adam(**kwargs), weights, gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slots["first_moment"], variables["momentum"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slots["second_moment"], variables["velocity"], rtol=1e-5, atol=1e-7)


def _touched(*, steps, rate, seed=1):
    """[steps, ROWS] bool: rows touched at a `rate` of the steps, each row at some."""
    touched = np.random.default_rng(seed).uniform(size=(steps, ROWS)) < rate
    touched[steps // 2] = True
    return touched


@pytest.mark.parametrize("epsilon", [1e-8, 0.3])
def test_adam_on_rows_touched_now_and_then_against_numpy(epsilon):
    steps, lr, beta_1, beta_2 = 40, 0.03, 0.9, 0.99
    weights, gradients = _problem((ROWS, DIM), steps=steps)
    # From a row touched at every step to one touched once in ten.
    touched = _touched(steps=steps, rate=np.linspace(1, 0.1, ROWS))
    expected = weights.astype(np.float64)
    second = np.zeros((ROWS, DIM))
    history = [[] for _ in range(ROWS)]  # Gradients of each row's own updates.
    for t, (gradient, mask) in enumerate(zip(gradients.astype(np.float64), touched, strict=True), start=1):
        second = beta_2 * second + (1 - beta_2) * np.where(mask[:, None], gradient, 0) ** 2
        for row in np.flatnonzero(mask):
            history[row].append(gradient[row])
            powers = beta_1 ** np.arange(len(history[row]))[::-1]
            mean = powers @ np.array(history[row]) / powers.sum()
            expected[row] -= lr * mean / (np.sqrt(second[row] / (1 - beta_2**t)) + epsilon)
    optimizer = update_rules.Adam(learning_rate=lr, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
    actual, slots = _run(optimizer, weights, gradients, touched=touched)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(slots["num_updates"], touched.sum(axis=0))
    np.testing.assert_array_equal(slots["last_step"], steps - np.argmax(touched[::-1], axis=0))
    behind = (steps - slots["last_step"])[:, None]
    np.testing.assert_allclose(beta_2**behind * slots["second_moment"], second, rtol=1e-5, atol=1e-8)


def test_second_moment_of_adam_is_that_of_dense_keras_adam_with_zero_gradients_on_skipped_steps():
    steps = 23
    weights, gradients = _problem((ROWS, DIM), steps=steps)
    touched = _touched(steps=steps, rate=0.3)
    optimizer = update_rules.Adam(learning_rate=0.03)
    _, slots = _run(optimizer, weights, gradients, touched=touched)
    dense = np.where(touched[:, :, None], gradients, 0)
    _, variables = _run_keras(keras.optimizers.Adam(0.03), weights, dense)
    # What a row has not caught up yet: the decay since it was last touched.
    behind = (steps - slots["last_step"])[:, None]
    assert behind.max() > 0
    second = optimizer.beta_2**behind * slots["second_moment"]
    np.testing.assert_allclose(second, variables["velocity"], rtol=1e-5, atol=1e-9)


def test_adam_without_first_moment_is_dense_keras_adam_with_zero_gradients_on_skipped_steps():
    steps = 23
    weights, gradients = _problem((ROWS, DIM), steps=steps)
    touched = _touched(steps=steps, rate=0.3)
    kwargs = {"learning_rate": 0.03, "beta_1": 0.0, "beta_2": 0.97, "epsilon": 1e-12}
    actual, slots = _run(update_rules.Adam(**kwargs), weights, gradients, touched=touched)
    dense = np.where(touched[:, :, None], gradients, 0)
    expected, _ = _run_keras(keras.optimizers.Adam(**kwargs), weights, dense)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert slots.keys() == {"second_moment", "last_step"}


def test_rare_rows_are_as_fast_under_adam_as_under_dense_keras_adam():
    steps, lr, beta_2 = 300, 0.01, 0.99
    periods = np.array([1, 2, 4, 10, 20, 50, 100])
    touched = (np.arange(steps)[:, None] + 1) % periods == 0
    gradients = np.full((steps, ROWS, DIM), 0.7, np.float32)
    weights = np.zeros((ROWS, DIM), np.float32)
    actual, _ = _run(update_rules.Adam(learning_rate=lr, beta_2=beta_2), weights, gradients, touched=touched)
    dense = np.where(touched[:, :, None], gradients, 0)
    # Steps more without gradient, in which dense Adam pays out the rest of its first moments.
    dense = np.concatenate([dense, np.zeros((50, ROWS, DIM), np.float32)])
    expected, _ = _run_keras(keras.optimizers.Adam(lr, beta_2=beta_2), weights, dense)
    np.testing.assert_allclose(actual, expected, rtol=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradient_leaves_fresh_rows_exactly_where_they_are(name):
    weights, _ = _problem((ROWS, DIM))
    optimizer = OPTIMIZERS[name](0.3)
    actual, _ = _run(optimizer, weights, np.zeros((3, ROWS, DIM), np.float32))
    np.testing.assert_array_equal(actual, weights)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_do_not_influence_each_other(name):
    weights, gradients = _problem((ROWS, DIM))
    together, slots_together = _run(OPTIMIZERS[name](0.3), weights, gradients)
    for row in range(ROWS):
        alone, slots_alone = _run(OPTIMIZERS[name](0.3), weights[[row]], gradients[:, [row]])
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-6)
        for slot in slots_alone:
            np.testing.assert_allclose(slots_alone[slot][0], slots_together[slot][row], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedule_is_read_at_the_number_of_updates_before(name):
    steps = 5
    weights, gradients = _problem((ROWS, DIM), steps=steps)
    schedule = keras.optimizers.schedules.CosineDecay(0.5, decay_steps=steps, alpha=0.1)
    rates = [0.5 * (0.9 * 0.5 * (1 + np.cos(np.pi * step / steps)) + 0.1) for step in range(steps)]
    optimizer = OPTIMIZERS[name](schedule)
    for step, rate in enumerate(rates):
        np.testing.assert_allclose(optimizer.learning_rate_at(tf.constant(step)), rate, rtol=1e-6)
    # A rule's step is proportional to its learning rate, whatever the slots.
    slots = _initial_slots(optimizer, (ROWS, DIM))
    for step, (rate, gradient) in enumerate(zip(rates, gradients, strict=True)):
        arguments = {"weights": weights, "gradients": gradient, "slots": slots, "step": tf.constant(step)}
        with_schedule, slots = optimizer.update(**arguments)
        with_constant, _ = OPTIMIZERS[name](rate).update(**arguments)
        np.testing.assert_allclose(with_schedule, with_constant, rtol=1e-6, atol=1e-7)
        assert np.abs(with_schedule - weights).max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_decay_of_adam_equals_keras_adamw(shape):
    weights, gradients = _problem(shape, steps=11)
    kwargs = {"learning_rate": 0.03, "beta_1": 0.85, "beta_2": 0.97, "epsilon": 1e-12, "weight_decay": 0.4}
    expected, _ = _run_keras(keras.optimizers.AdamW(**kwargs), weights, gradients)
    actual, slots = _run(update_rules.Adam(**kwargs), weights, gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    _, without = _run(update_rules.Adam(**{**kwargs, "weight_decay": 0.0}), weights, gradients)
    for slot, value in without.items():  # Decoupled: moments are those of the gradients alone.
        np.testing.assert_array_equal(slots[slot], value)


DECAYING = {
    "sgd": update_rules.SGD,
    "adagrad": update_rules.Adagrad,
    "row_wise_adagrad": update_rules.RowWiseAdagrad,
    "adam": update_rules.Adam,
}


@pytest.mark.parametrize("name", DECAYING)
def test_weights_decay_by_the_learning_rate_of_the_step_beside_the_update(name):
    """w <- u(w) - lr(step) * decay * w, in float64, with u the update without decay."""
    steps, decay = 5, 0.7
    weights, gradients = _problem((ROWS, DIM), steps=steps)
    schedule = keras.optimizers.schedules.CosineDecay(0.5, decay_steps=steps, alpha=0.1)
    with_decay = DECAYING[name](learning_rate=schedule, weight_decay=decay)
    without = DECAYING[name](learning_rate=schedule)
    slots = plain_slots = _initial_slots(without, (ROWS, DIM))
    for step, gradient in enumerate(gradients):
        rate = 0.5 * (0.9 * 0.5 * (1 + np.cos(np.pi * step / steps)) + 0.1)
        arguments = {"weights": weights, "gradients": gradient, "step": tf.constant(step)}
        plain, plain_slots = without.update(slots=plain_slots, **arguments)
        actual, slots = with_decay.update(slots=slots, **arguments)
        expected = plain.numpy() - rate * decay * weights.astype(np.float64)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
        # Another learning rate than the rule's own counts for the decay too.
        plain, _ = without.update(slots=plain_slots, learning_rate=tf.constant(0.03), **arguments)
        given, _ = with_decay.update(slots=slots, learning_rate=tf.constant(0.03), **arguments)
        expected = plain.numpy() - 0.03 * decay * weights.astype(np.float64)
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)
        weights = actual.numpy()


@pytest.mark.parametrize("name", DECAYING)
def test_rows_that_no_step_touches_do_not_decay(name):
    weights, gradients = _problem((ROWS, DIM))
    touched = np.zeros([STEPS, ROWS], bool)
    touched[:, :3] = True
    rule = DECAYING[name](learning_rate=0.1, weight_decay=0.5)
    actual, _ = _run(rule, weights, np.zeros_like(gradients), touched=touched)
    np.testing.assert_array_equal(actual[3:], weights[3:])
    np.testing.assert_allclose(actual[:3], (1 - 0.1 * 0.5) ** STEPS * weights[:3], rtol=1e-5)


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("weight_decay", [-0.1, float("inf"), float("nan")])
def test_weight_decay_out_of_range_is_refused(name, weight_decay):
    with pytest.raises(ValueError, match=re.escape(f"Received: weight_decay={weight_decay}.")):
        DECAYING[name](learning_rate=0.1, weight_decay=weight_decay)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("learning_rate", [0.0, -0.1, float("nan")])
def test_learning_rate_that_is_not_positive_is_refused(name, learning_rate):
    with pytest.raises(
        ValueError, match=re.escape(f"learning_rate must be positive. Received: {learning_rate}.")
    ):
        OPTIMIZERS[name](learning_rate)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (update_rules.Adagrad, {"initial_accumulator": -0.1}, "initial_accumulator=-0.1"),
        (update_rules.Adagrad, {"epsilon": -1e-9}, "epsilon=-1e-09"),
        (update_rules.RowWiseAdagrad, {"initial_accumulator": float("nan")}, "initial_accumulator=nan"),
        (update_rules.RowWiseAdagrad, {"epsilon": -1.0}, "epsilon=-1.0"),
        (update_rules.Adam, {"beta_1": 1.0}, "beta_1 must be in [0, 1). Received: beta_1=1.0"),
        (update_rules.Adam, {"beta_2": -0.5}, "beta_2 must be in [0, 1). Received: beta_2=-0.5"),
        (update_rules.Adam, {"epsilon": -1.0}, "epsilon=-1.0"),
    ],
)
def test_values_out_of_range_are_refused(make, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(learning_rate=0.1, **arguments)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (update_rules.Adagrad, {"initial_accumulator": 0.0, "epsilon": 0.0}),
        (update_rules.RowWiseAdagrad, {"initial_accumulator": 0.0, "epsilon": 0.0}),
        (update_rules.Adam, {"epsilon": 0.0}),
    ],
)
def test_settings_that_divide_a_zero_gradient_by_zero_are_refused(make, arguments):
    with pytest.raises(ValueError, match="epsilon"):
        make(learning_rate=0.1, **arguments)
