"""What a machine without a TPU shows of runs on one: the program for its cores is traced by `TPUStrategy` itself.

Its operations have XLA kernels (of XLA for TPUs where tensorflow-tpu is installed), its shapes are static; and what
differs from other strategies, one program that learns its core's number as it runs, computes the same on the CPU.
"""

import numpy as np
import pytest
import tensorflow as tf
from tiny_experiments import Text, assert_same, experiment, language_model, restore, tied, values
from tpu_stand_in import tpu_strategy
from traced_graphs import devices, dtypes, with_dynamic_shape, without_kernel
from xla_cases import CASES, arguments, make_trainer, step_of, tensors

from lmscale.distribution import collectives
from lmscale.evaluation import Evaluator
from lmscale.tables.exchange import StaticExchange
from lmscale.trainer import Trainer

# Devices times parts of the accumulation.
BATCH = 8


@pytest.fixture(scope="module")
def cores():
    """A `TPUStrategy` of two cores that are not there."""
    return tpu_strategy(2)


def check(concrete):
    for device in devices():
        assert without_kernel(concrete, device=device) == []
    assert with_dynamic_shape(concrete) == []
    # TPUs have none: XLA computes it in pieces of float32.
    assert tf.float64 not in dtypes(concrete)


@pytest.mark.parametrize("case", CASES)
def test_programs_of_steps_and_evaluations(cores, case):
    run = make_trainer(cores, case, static_shapes=False, global_batch_size=BATCH)
    exchanges = {type(table._exchange) for table in run.model.tables.values()}
    assert exchanges == {StaticExchange}  # Nobody had to ask for static shapes.
    check(step_of(run, compiled=False).get_concrete_function(*arguments(run, 0)))

    evaluator = Evaluator.of_experiment(run.experiment, run.model, strategy=cores)

    @tf.function(autograph=False)
    def evaluate(features, number):
        return evaluator._step(evaluator._initial_state(), features, number, with_training_loss=True)

    features = tensors(run.task.evaluation_batches("valid").at(0))
    check(evaluate.get_concrete_function(features, tf.constant(0)))


def test_program_with_the_loop_over_steps(cores):
    """The host's loop, which calls the cores, traces around the step as it does for other strategies."""
    run = Trainer(
        experiment(task=language_model(), steps_per_call=3),
        data=Text(),
        strategy=cores,
    )
    features, number, starts_epoch = arguments(run, 0)
    features = {name: tf.stack([x] * 3) for name, x in features.items()}
    concrete = run._train_steps.get_concrete_function(
        features, tf.stack([starts_epoch] * 3), number, tf.constant(2)
    )
    nodes = [node for f in concrete.graph.as_graph_def().library.function for node in f.node_def]
    assert sum(node.op == "TPUReplicateMetadata" for node in nodes) == 1
    assert any(node.op == "CrossReplicaSum" for node in nodes)


def test_parameters_are_read_and_written_as_under_other_strategies(cores, mirrored):
    def make(strategy):
        return Trainer(experiment(task=language_model(**tied(embed_dim=7))), data=Text(), strategy=strategy)

    run, other = make(cores), make(mirrored(2))
    initial = values(other.parameters())
    assert_same(values(run.parameters()), initial)
    changed = {path: value + np.ones([], value.dtype) for path, value in initial.items()}
    restore(run.parameters(), changed)
    assert_same(values(run.parameters()), changed)


@pytest.mark.parametrize(
    "case", ["lstm, untied, with replacement", "gru, tied, full softmax", "convolution, tied, in-batch"]
)
def test_one_program_for_all_replicas_computes_the_same(mirrored, monkeypatch, case):
    """Replicas that learn their number as they run, as cores do, against those that are traced with it."""

    def train():
        run = make_trainer(mirrored(2), case, static_shapes=True, global_batch_size=BATCH)
        step = step_of(run, compiled=False)
        losses = []
        for number in range(3):
            results = step(*arguments(run, number))
            losses.append(float(mirrored(2).experimental_local_results(results["loss"])[0]))
        return losses, values(run.parameters())

    losses, expected = train()

    def replica_id():
        return tf.identity(tf.distribute.get_replica_context().replica_id_in_sync_group)

    monkeypatch.setattr(collectives, "replica_id", replica_id)
    own_losses, actual = train()
    assert len(set(losses)) == 3
    np.testing.assert_allclose(own_losses, losses, rtol=1e-6)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=1e-6, atol=1e-6, err_msg=path)
