"""What the walk through a graph finds, against arithmetic by hand."""

import tensorflow as tf

from lmscale.planning.graphs import cost_of

ROWS, WIDE, NARROW = 64, 48, 32
X = tf.TensorSpec([ROWS, NARROW])
W = tf.TensorSpec([NARROW, WIDE])


def cost(function, *specs):
    return cost_of(function, *specs, part_of=lambda name: name.split("/")[0])


def everything(of_parts):
    return sum(of_parts.values())


def test_a_product_and_what_is_written_over_it():
    found = cost(lambda x, w: tf.nn.relu(tf.tanh(x @ w)), X, W)
    assert everything(found.product_flops) == 2 * ROWS * NARROW * WIDE
    assert everything(found.peak_bytes) == 4 * ROWS * WIDE
    # The product reads both and writes one; the other two read it and write it.
    assert everything(found.moved_bytes) == 4 * (ROWS * NARROW + NARROW * WIDE + 5 * ROWS * WIDE)


def test_what_somebody_else_reads_is_not_written_over():
    def function(x, w):
        y = x @ w
        return y, tf.tanh(y)

    assert everything(cost(function, X, W).peak_bytes) == 2 * 4 * ROWS * WIDE


def test_arguments_are_not_written_over():
    assert everything(cost(tf.tanh, X).peak_bytes) == 4 * ROWS * NARROW


def test_views_take_nothing():
    def function(x, w):
        pieces = tf.split(tf.reshape(x @ w, [2 * ROWS, WIDE // 2]), 4)
        return pieces[1][3:7]

    assert everything(cost(function, X, W).peak_bytes) == 4 * ROWS * WIDE


def test_pieces_hold_what_they_are_cut_from():
    """Of a Split the axis is the first input: what is read later is not the axis."""

    def function(x, w):
        pieces = tf.split(x @ w, 4)
        narrow = tf.reduce_sum(x @ w @ tf.transpose(w) @ w)
        return [piece + narrow for piece in pieces]

    assert everything(cost(function, X, W).peak_bytes) >= 2 * 4 * ROWS * WIDE


def test_values_that_a_gradient_needs_are_kept():
    def function(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = x
            for _ in range(3):
                y = tf.tanh(y @ w @ tf.transpose(w))
        return tape.gradient(y, [x, w])

    found = cost(function, X, W)
    # Each of six products forward is three with the gradients of both factors.
    assert everything(found.product_flops) == 3 * 6 * 2 * ROWS * NARROW * WIDE
    kept = 3 * ROWS * (WIDE + NARROW) + NARROW * WIDE
    assert 4 * kept <= everything(found.peak_bytes) < 4 * (kept + 3 * ROWS * WIDE + 8 * NARROW * WIDE)


def test_a_choice_that_broadcasts_is_not_written_over_its_input():
    def function(x, w):
        y = x @ w
        return tf.where(x[:, :1] > 0, y, 0.0)

    assert everything(cost(function, X, W).peak_bytes) >= 2 * 4 * ROWS * WIDE


def test_memory_of_small_values_is_not_given_back_for_large_ones():
    def function(x, w):
        y = x @ w
        small = tf.reduce_sum(y)
        return tf.fill([64, 1024], small)

    assert everything(cost(function, X, W).peak_bytes) >= 4 * ROWS * WIDE + 4 * 64 * 1024


def test_what_runs_at_once_holds_what_it_reads():
    """While a product reads it, another operation that is ready may not write over it."""

    def function(x, w):
        y = x @ w
        return y @ (tf.transpose(w) @ w), tf.tanh(y)

    assert everything(cost(function, X, W).peak_bytes) >= 3 * 4 * ROWS * WIDE


def test_a_loop_counts_its_turns_and_keeps_one_turn_alone():
    def function(x, w):
        return tf.while_loop(
            lambda i, _: i < 7,
            lambda i, y: (i + 1, tf.tanh(y @ w) @ tf.transpose(w)),
            [0, x],
            parallel_iterations=1,
        )[1]

    found = cost(function, X, W)
    assert everything(found.product_flops) == 7 * 2 * 2 * ROWS * NARROW * WIDE
    assert everything(found.peak_bytes) < 4 * (2 * ROWS * (WIDE + NARROW) + NARROW * WIDE) + 64


def test_a_loop_with_gradient_keeps_every_turn():
    def function(x, w):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.while_loop(
                lambda i, _: i < 7, lambda i, y: (i + 1, tf.tanh(y)), [0, x], maximum_iterations=7
            )[1]
        del w
        return tape.gradient(y, x)

    found = cost(function, X, W)
    assert everything(found.peak_bytes) >= 7 * 4 * ROWS * NARROW


def test_a_program_of_xla_moves_what_goes_in_and_out():
    compiled = tf.function(lambda x: tf.exp(tf.sin(x)) + tf.cos(x), jit_compile=True, autograph=False)
    found = cost(lambda x: compiled(x), X)
    assert everything(found.moved_bytes) == 2 * 4 * ROWS * NARROW


def test_parts_are_told_apart_at_the_peak():
    def function(x, w):
        with tf.name_scope("one"):
            y = x @ w
        with tf.name_scope("two"):
            z = tf.matmul(y, w, transpose_b=True)
        return y, z

    found = cost(function, X, W)
    assert found.peak_bytes == {"one": 4 * ROWS * WIDE, "two": 4 * ROWS * NARROW}
    assert found.product_flops == dict.fromkeys(("one", "two"), 2 * ROWS * NARROW * WIDE)


def test_an_einsum_and_a_convolution():
    def function(x, w):
        images = tf.reshape(x, [1, 8, 8, NARROW])
        kernel = tf.reshape(w, [3, 2, NARROW, WIDE // 6])
        return tf.einsum("ab,bc->ac", x, w), tf.nn.conv2d(images, kernel, strides=1, padding="SAME")

    expected = 2 * ROWS * NARROW * WIDE + 2 * ROWS * (WIDE // 6) * 3 * 2 * NARROW
    assert everything(cost(function, X, W).product_flops) == expected


def test_the_most_of_a_part_may_be_at_another_time_than_the_peak():
    def function(x, w):
        with tf.name_scope("one"):
            y = tf.reduce_sum(x @ w)
        with tf.name_scope("two"):
            return tf.matmul(tf.concat([x, x], axis=0) + y, w)

    found = cost(function, X, W)
    assert found.most_bytes["one"] >= 4 * ROWS * WIDE
    assert found.peak_bytes.get("one", 0) < 16
    assert found.peak_bytes["two"] == found.most_bytes["two"] == 2 * 4 * ROWS * (NARROW + WIDE)
