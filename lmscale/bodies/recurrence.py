"""The LSTM recurrence for CPUs: everything that need not wait for the previous time step is done in one product.

Four of the six products of a layer (inputs; gradients of inputs, kernel and recurrent kernel) run over all time steps
at once; the loop over time keeps one small product and one compiled cell a step, forward and backward. On GPUs,
cuDNN does the same behind `keras.layers.LSTM`.
"""

import functools

import tensorflow as tf


def lstm_sequence(inputs, h, c, *, kernel, recurrent_kernel, bias, projection=None, compute_dtype=tf.float32):
    """An LSTM layer over a window, with its gradient written out.

    With gates (i, f, g, o) = split(x_t W + h_{t-1} U + b), in the order of Keras:

        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)

    With a projection P, h_t P takes the place of h_t, in the outputs and in the next time step.

    Differentiable once, in every argument. The loop over time is unrolled into the graph, which a window of hundreds
    of steps takes a second to trace.

    Args:
      inputs: [batch, time, dim] float, static shape.
      h, c: [batch, width] and [batch, hidden] float32, the state before the window; width is that of the outputs.
      kernel: [dim, 4 * hidden] float32, W.
      recurrent_kernel: [width, 4 * hidden] float32, U.
      bias: [4 * hidden] float32, b.
      projection: [hidden, width] float32, P; None for none, then width is hidden.
      compute_dtype: of the products, whose results are rounded to it, those of the weight gradients after their sum
        over time. Gates and states stay float32.

    Returns:
      (h of every time step [batch, time, width], last h [batch, width], last c [batch, hidden]), float32.

    Raises:
      ValueError: if the shape of inputs is not static, or shapes disagree.

    Communication: none.
    Source: Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; projection: Sak et al. 2014
      (arXiv:1402.1128), its recurrent one; one product for the weight gradient of all time steps: Appleyard et al. 2016
      (arXiv:1604.01946), section 3.
    """
    if not inputs.shape.is_fully_defined():
        raise ValueError(
            f"inputs must have a static shape [batch, time, dim]. Received: {inputs.shape}. Fix the batch size, or use "
            "tf.ensure_shape."
        )
    batch, time, dim = inputs.shape
    width = recurrent_kernel.shape[0]
    hidden = width if projection is None else projection.shape[0]
    projections = () if projection is None else (projection,)
    for name, value, shape in (
        ("h", h, [batch, width]),
        ("c", c, [batch, hidden]),
        ("kernel", kernel, [dim, 4 * hidden]),
        ("recurrent_kernel", recurrent_kernel, [width, 4 * hidden]),
        ("bias", bias, [4 * hidden]),
        *(("projection", value, [hidden, width]) for value in projections),
    ):
        if not tf.TensorShape(value.shape).is_compatible_with(shape):
            rows = f"{width} rows of recurrent_kernel"
            if projections:
                rows += f" and {hidden} of projection"
            raise ValueError(
                f"{name} must have the shape {shape}, with inputs {inputs.shape} and {rows}. Received: {value.shape}. "
                "Give state and weights of one layer and one batch size."
            )
    forward, backward = _layer(
        batch,
        time,
        dim,
        hidden,
        width if projections else None,
        tf.as_dtype(compute_dtype),
        eager=tf.config.functions_run_eagerly(),
    )

    @tf.custom_gradient
    def layer(inputs, h, c, kernel, recurrent_kernel, bias, *projections):
        outputs, last_h, last_c, *residuals = forward(
            inputs, h, c, kernel, recurrent_kernel, bias, *projections
        )
        weights = kernel, recurrent_kernel, *projections
        return (outputs, last_h, last_c), lambda *d: backward(*d, *weights, *residuals)

    inputs, h, c = (tf.cast(x, tf.float32) for x in (inputs, h, c))
    weights = kernel, recurrent_kernel, bias, *projections
    return layer(inputs, h, c, *(tf.convert_to_tensor(x) for x in weights))


@functools.cache
def _layer(batch, time, dim, hidden, projected, compute_dtype, *, eager):
    """Forward and backward of a layer of these sizes, each traced once in a process, for all layers and devices.

    `projected` is the width of the outputs; None for no projection. `eager`, for debugging: Python functions that are
    not traced.
    """

    def forward(inputs, h, c, kernel, recurrent_kernel, bias, *projections):
        # Time first, so that a step is a contiguous block.
        x = tf.reshape(tf.cast(_swap_batch_and_time(inputs), compute_dtype), [time * batch, dim])
        w, u = tf.cast(kernel, compute_dtype), tf.cast(recurrent_kernel, compute_dtype)
        from_inputs = tf.split(tf.nn.bias_add(tf.cast(tf.matmul(x, w), tf.float32), bias), time)
        outputs, narrow_outputs, cells, gates, unprojected = [], [tf.cast(h, compute_dtype)], [c], [], []
        for t in range(time):
            output, narrow, *rest = _cell(from_inputs[t], tf.matmul(narrow_outputs[t], u), cells[t])
            for projection in projections:
                unprojected.append(narrow)
                narrow = tf.matmul(narrow, tf.cast(projection, compute_dtype))
                output = tf.cast(narrow, tf.float32)
            step = output, narrow, *rest
            for values, value in zip((outputs, narrow_outputs, cells, gates), step, strict=True):
                values.append(value)
        residuals = (
            x,
            tf.concat(narrow_outputs[:-1], axis=0),
            tf.concat(cells, axis=0),
            tf.concat(gates, axis=0),
            *([tf.concat(unprojected, axis=0)] if projections else []),
        )
        return tf.stack(outputs, axis=1), outputs[-1], cells[-1], *residuals

    def backward(d_outputs, d_h, d_c, kernel, recurrent_kernel, *rest):
        projections, (x, previous_outputs, cells, gates, *unprojected) = (
            rest[:num_projections],
            rest[num_projections:],
        )
        d_outputs = tf.unstack(_swap_batch_and_time(d_outputs))
        cells, gates = tf.split(cells, time + 1), tf.split(gates, time)
        w_transposed, u_transposed = (
            _transposed(tf.cast(weights, compute_dtype)) for weights in (kernel, recurrent_kernel)
        )
        p_transposed = [_transposed(tf.cast(weights, compute_dtype), parts=1) for weights in projections]
        d_h = tf.cast(d_h, compute_dtype)
        d_gates, d_projected = [], []
        for t in reversed(range(time)):
            d_output = d_outputs[t]
            for p in p_transposed:
                d_projected.append(tf.cast(d_output + tf.cast(d_h, tf.float32), compute_dtype))
                d_output, d_h = tf.zeros([]), tf.matmul(d_projected[-1], p)
            d_gate, d_c = _cell_gradient(d_output, d_h, d_c, gates[t], cells[t], cells[t + 1])
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
            *(
                tf.cast(tf.matmul(h, tf.concat(d_projected[::-1], axis=0), transpose_a=True), tf.float32)
                for h in unprojected
            ),
        )

    num_projections = 0 if projected is None else 1
    if eager:
        return forward, backward

    def spec(*shape, dtype=tf.float32):
        return tf.TensorSpec(shape, dtype)

    width = hidden if projected is None else projected
    state = spec(batch, width), spec(batch, hidden)
    weights = spec(dim, 4 * hidden), spec(width, 4 * hidden)
    projections = [spec(hidden, width)] * num_projections
    residuals = (
        spec(time * batch, dim, dtype=compute_dtype),
        spec(time * batch, width, dtype=compute_dtype),
        spec((time + 1) * batch, hidden),
        spec(time * batch, 4 * hidden),
        *[spec(time * batch, hidden, dtype=compute_dtype)] * num_projections,
    )
    with tf.init_scope():  # Outside the graph, and away from the device, of whoever asks first.
        return (
            tf.function(forward, autograph=False).get_concrete_function(
                spec(batch, time, dim), *state, *weights, spec(4 * hidden), *projections
            ),
            tf.function(backward, autograph=False).get_concrete_function(
                spec(batch, time, width), *state, *weights, *projections, *residuals
            ),
        )


def _swap_batch_and_time(x):
    return tf.transpose(x, [1, 0, 2])


def _transposed(matrix, *, parts=4):
    """The transpose, in a form that TensorFlow does not fold into the products that use it.

    On CPUs a float32 product with a transposed right side takes up to 3 times as long, and here each is taken once a
    time step.
    """
    rows, columns = matrix.shape
    return tf.reshape(tf.transpose(tf.reshape(matrix, [rows, parts, -1]), [1, 2, 0]), [columns, rows])


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
