"""What a step would have in the host's memory on a GPU, by the kernels that this TensorFlow has: no GPU is needed.

The wheel for Linux holds the kernels for GPUs, whether there is one or not.
"""

import importlib

import pytest
import tensorflow as tf
from traced_graphs import on_host, ops_with_gpu_kernels
from xla_cases import CASES, EMBED_DIM, VOCAB_SIZE, arguments, make_trainer, step_of

# Rows of a shard are numbered in blocks, which here are whole shards.
NUMBERED = {"gru, tied, full softmax": VOCAB_SIZE + 1}
GLOBAL_BATCH_SIZE, WINDOW, NUM_SAMPLED = 8, 3, 31


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_step_has_nothing_larger_than_ids_on_the_host(mirrored, case, num_replicas):
    """Neither [tokens, candidates] nor [rows, dim]: nothing but ids, which come from there, shapes and scalars."""
    run = make_trainer(mirrored(num_replicas), case, static_shapes=False, global_batch_size=GLOBAL_BATCH_SIZE)
    concrete = step_of(run, compiled=False).get_concrete_function(*arguments(run, 0))
    tokens = GLOBAL_BATCH_SIZE * WINDOW
    num_ids = 2 * tokens + NUM_SAMPLED
    assert tokens * NUM_SAMPLED > num_ids < num_ids * EMBED_DIM
    # What is asked of a device, by how many there are, may come to all ids of each.
    limit = max(num_replicas * num_ids, NUMBERED.get(case, 0))
    found = on_host(concrete, unknown=num_ids)
    assert {name: size for name, size in found.items() if size > limit} == {}


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_lstms_are_those_of_cudnn(mirrored, monkeypatch, compute_dtype, num_replicas):
    """Where Keras and lmscale take the devices for GPUs, forward and backward, in the dtype of the products."""
    task, settings = CASES["two lstms, dropout, tied, without replacement"]
    monkeypatch.setitem(CASES, "on a GPU", (task, settings | {"compute_dtype": compute_dtype}))
    run = make_trainer(mirrored(num_replicas), "on a GPU", static_shapes=False)
    monkeypatch.setattr("lmscale.bodies.lstm.runs_on_cpu", lambda: False)
    rnn = importlib.import_module(
        "keras.src.backend.tensorflow.rnn"
    )  # The package has a function of that name.
    monkeypatch.setattr(rnn, "_is_gpu_available", lambda: True)
    concrete = step_of(run, compiled=False).get_concrete_function(*arguments(run, 0))
    kernels = ops_with_gpu_kernels(concrete, dtype=compute_dtype)
    num_layers = 2
    for name in ("CudnnRNNV3", "CudnnRNNBackpropV3"):
        assert kernels[name] == num_layers * num_replicas
    assert not any(name.startswith(("TensorList", "While")) for name in kernels)


def test_what_the_host_would_hold_is_found():
    @tf.function(autograph=False)
    def function(labels, ids, words):
        equal = labels[:, tf.newaxis] == ids[tf.newaxis, :]
        # As the body of a loop, and of types for which there is no kernel.
        return tf.while_loop(
            lambda i, _: i < 3, lambda i, x: (i + 1, x | (words[:, tf.newaxis] == "a")), [0, equal]
        )

    specs = [tf.TensorSpec([7], tf.int32), tf.TensorSpec([11], tf.int32), tf.TensorSpec([7], tf.string)]
    found = on_host(function.get_concrete_function(*specs), unknown=1)
    assert found["Equal bool int32"] == 77
    assert found["Equal bool string"] == 7
    assert max(size for name, size in found.items() if not name.startswith("Equal")) <= 11
    as_int64 = [tf.TensorSpec([7], tf.int64), tf.TensorSpec([11], tf.int64), specs[2]]
    assert on_host(function.get_concrete_function(*as_int64), unknown=1).keys() >= {"Equal bool string"}
