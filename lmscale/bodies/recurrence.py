"""The LSTM recurrence for CPUs: everything that need not wait for the previous time step is done in one product.

Four of the six products of a layer (inputs; gradients of inputs, kernel and recurrent kernel) run over all time steps
at once; the loop over time keeps one small product and one compiled cell a step, forward and backward. On GPUs,
cuDNN does the same behind `keras.layers.LSTM`.
"""

import functools

import tensorflow as tf


def lstm_sequence(inputs, h, c, *, kernel, recurrent_kernel, bias, compute_dtype=tf.float32):
    """An LSTM layer over a window, with its gradient written out.

    With gates (i, f, g, o) = split(x_t W + h_{t-1} U + b), in the order of Keras:

        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)

    Differentiable once, in every argument. The loop over time is unrolled into the graph, which a window of hundreds
    of steps takes a second to trace.

    Args:
      inputs: [batch, time, dim] float, static shape.
      h, c: [batch, hidden] float32, the state before the window.
      kernel: [dim, 4 * hidden] float32, W.
      recurrent_kernel: [hidden, 4 * hidden] float32, U.
      bias: [4 * hidden] float32, b.
      compute_dtype: of the products, whose results are rounded to it, those of the weight gradients after their sum
        over time. Gates and states stay float32.

    Returns:
      (h of every time step [batch, time, hidden], last h [batch, hidden], last c [batch, hidden]), float32.

    Raises:
      ValueError: if the shape of inputs is not static, or shapes disagree.

    Communication: none.
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; one product for the weight
      gradient of all time steps: Appleyard et al. 2016 (arXiv:1604.01946), section 3.
    """
    if not inputs.shape.is_fully_defined():
        raise ValueError(
            f"inputs must have a static shape [batch, time, dim]. Received: {inputs.shape}. Fix the batch size, or use "
            "tf.ensure_shape."
        )
    batch, time, dim = inputs.shape
    hidden = recurrent_kernel.shape[0]
    for name, value, shape in (
        ("h", h, [batch, hidden]),
        ("c", c, [batch, hidden]),
        ("kernel", kernel, [dim, 4 * hidden]),
        ("recurrent_kernel", recurrent_kernel, [hidden, 4 * hidden]),
        ("bias", bias, [4 * hidden]),
    ):
        if not tf.TensorShape(value.shape).is_compatible_with(shape):
            raise ValueError(
                f"{name} must have the shape {shape}, with inputs {inputs.shape} and {hidden} rows of "
                f"recurrent_kernel. Received: {value.shape}. Give state and weights of one layer and one batch size."
            )
    forward, backward = _layer(
        batch, time, dim, hidden, tf.as_dtype(compute_dtype), eager=tf.config.functions_run_eagerly()
    )

    @tf.custom_gradient
    def layer(inputs, h, c, kernel, recurrent_kernel, bias):
        outputs, last_h, last_c, *residuals = forward(inputs, h, c, kernel, recurrent_kernel, bias)
        return (outputs, last_h, last_c), lambda *d: backward(*d, kernel, recurrent_kernel, *residuals)

    inputs, h, c = (tf.cast(x, tf.float32) for x in (inputs, h, c))
    return layer(inputs, h, c, *(tf.convert_to_tensor(x) for x in (kernel, recurrent_kernel, bias)))


@functools.cache
def _layer(batch, time, dim, hidden, compute_dtype, *, eager):
    """Forward and backward of a layer of these sizes, each traced once in a process, for all layers and devices.

    `eager`, for debugging: Python functions that are not traced.
    """

    def forward(inputs, h, c, kernel, recurrent_kernel, bias):
        # Time first, so that a step is a contiguous block.
        x = tf.reshape(tf.cast(_swap_batch_and_time(inputs), compute_dtype), [time * batch, dim])
        w, u = tf.cast(kernel, compute_dtype), tf.cast(recurrent_kernel, compute_dtype)
        from_inputs = tf.split(tf.nn.bias_add(tf.cast(tf.matmul(x, w), tf.float32), bias), time)
        outputs, narrow_outputs, cells, gates = [], [tf.cast(h, compute_dtype)], [c], []
        for t in range(time):
            step = _cell(from_inputs[t], tf.matmul(narrow_outputs[t], u), cells[t])
            for values, value in zip((outputs, narrow_outputs, cells, gates), step, strict=True):
                values.append(value)
        residuals = (
            x,
            tf.concat(narrow_outputs[:-1], axis=0),
            tf.concat(cells, axis=0),
            tf.concat(gates, axis=0),
        )
        return tf.stack(outputs, axis=1), outputs[-1], cells[-1], *residuals

    def backward(d_outputs, d_h, d_c, kernel, recurrent_kernel, x, previous_outputs, cells, gates):
        d_outputs = tf.unstack(_swap_batch_and_time(d_outputs))
        cells, gates = tf.split(cells, time + 1), tf.split(gates, time)
        w_transposed, u_transposed = (
            _transposed(tf.cast(weights, compute_dtype)) for weights in (kernel, recurrent_kernel)
        )
        d_h = tf.cast(d_h, compute_dtype)
        d_gates = []
        for t in reversed(range(time)):
            d_gate, d_c = _cell_gradient(d_outputs[t], d_h, d_c, gates[t], cells[t], cells[t + 1])
            d_gates.append(d_gate)
            d_h = tf.matmul(d_gate, u_transposed)
        d_gates = tf.concat(d_gates[::-1], axis=0)
        d_inputs = tf.reshape(tf.matmul(d_gates, w_transposed), [time, batch, dim])
        return (
            tf.cast(_swap_batch_and_time(d_inputs), tf.float32),
            tf.cast(d_h, tf.float32),
            d_c,
            tf.cast(tf.matmul(x, d_gates, transpose_a=True), tf.float32),
            tf.cast(tf.matmul(previous_outputs, d_gates, transpose_a=True), tf.float32),
            tf.reduce_sum(tf.cast(d_gates, tf.float32), axis=0),
        )

    if eager:
        return forward, backward

    def spec(*shape, dtype=tf.float32):
        return tf.TensorSpec(shape, dtype)

    state, weights = spec(batch, hidden), (spec(dim, 4 * hidden), spec(hidden, 4 * hidden))
    residuals = (
        spec(time * batch, dim, dtype=compute_dtype),
        spec(time * batch, hidden, dtype=compute_dtype),
        spec((time + 1) * batch, hidden),
        spec(time * batch, 4 * hidden),
    )
    with tf.init_scope():  # Outside the graph, and away from the device, of whoever asks first.
        return (
            tf.function(forward, autograph=False).get_concrete_function(
                spec(batch, time, dim), state, state, *weights, spec(4 * hidden)
            ),
            tf.function(backward, autograph=False).get_concrete_function(
                spec(batch, time, hidden), state, state, *weights, *residuals
            ),
        )


def _swap_batch_and_time(x):
    return tf.transpose(x, [1, 0, 2])


def _transposed(matrix):
    """The transpose, in a form that TensorFlow does not fold into the products that use it.

    On CPUs a float32 product with a transposed right side takes up to 3 times as long, and here each is taken once a
    time step.
    """
    rows, columns = matrix.shape
    return tf.reshape(tf.transpose(tf.reshape(matrix, [rows, 4, -1]), [1, 2, 0]), [columns, rows])


@tf.function(jit_compile=True, autograph=False)
def _cell(from_inputs, from_outputs, c):
    """(h, h in the compute dtype, c, gates [batch, 4 * hidden] after their nonlinearities) of one time step."""
    i, f, g, o = tf.split(from_inputs + tf.cast(from_outputs, tf.float32), 4, axis=1)
    i, f, g, o = tf.sigmoid(i), tf.sigmoid(f), tf.tanh(g), tf.sigmoid(o)
    c = f * c + i * g
    h = o * tf.tanh(c)
    return h, tf.cast(h, from_outputs.dtype), c, tf.concat([i, f, g, o], axis=1)


@tf.function(jit_compile=True, autograph=False)
def _cell_gradient(d_output, d_h, d_c, gates, previous_c, c):
    """(gradient before the nonlinearities [batch, 4 * hidden] in the compute dtype, d_c of the step before)."""
    i, f, g, o = tf.split(gates, 4, axis=1)
    squashed_c = tf.tanh(c)
    dtype = d_h.dtype
    d_h = d_output + tf.cast(d_h, tf.float32)
    d_c += d_h * o * (1 - squashed_c * squashed_c)
    d_gates = [
        d_c * g * i * (1 - i),
        d_c * previous_c * f * (1 - f),
        d_c * i * (1 - g * g),
        d_h * squashed_c * o * (1 - o),
    ]
    return tf.cast(tf.concat(d_gates, axis=1), dtype), d_c * f
