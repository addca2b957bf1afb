"""Every operation of a traced function, and what XLA could not compile among them."""

import contextlib
import functools

import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.python.framework import kernels

# Stands in a graph for an argument, and is not run.
_ARGUMENT = "Placeholder"
# XLA knows the lengths of these, and TensorFlow's tracing does not: from the number and the shape of a list's elements;
# from the static shapes of two factors, of which one is broadcast.
_SHAPED_BY_XLA = {"TensorListConcatV2", "BroadcastGradientArgs"}
# How a program for all cores of a TPU is put together: compiled by what only tensorflow-tpu has.
_OF_TPU_PROGRAMS = {
    "TPUReplicateMetadata",
    "TPUReplicatedInput",
    "TPUReplicatedOutput",
    "TPUCompilationResult",
    "CrossReplicaSum",
}


@functools.cache
def devices():
    """The devices for which this TensorFlow's bridge to XLA has kernels: XLA_TPU_JIT only with tensorflow-tpu."""
    # The registry is filled when the first function is compiled. (tensorflow-tpu compiles none without a TPU.)
    with contextlib.suppress(tf.errors.NotFoundError):
        tf.function(lambda: tf.zeros([]), jit_compile=True, autograph=False)()
    found = {kernel.device_type for kernel in kernels.get_registered_kernels_for_op("MatMul").kernel}
    return sorted(found & {"XLA_CPU_JIT", "XLA_TPU_JIT"})


@functools.cache
def _kernels(op, device):
    registered = kernels.get_registered_kernels_for_op(op).kernel
    return [kernel for kernel in registered if kernel.device_type == device]


def _nodes(concrete):
    """Nodes of a concrete function and of every function that it calls: loops, branches."""
    graph = concrete.graph.as_graph_def()
    return [*graph.node, *(node for function in graph.library.function for node in function.node_def)]


def _accepts(kernel, node):
    """Whether a kernel is for the types of a node."""
    for constraint in kernel.constraint:
        attribute = node.attr[constraint.name]
        wanted = {attribute.type} if attribute.type else set(attribute.list.type)
        if not wanted <= set(constraint.allowed_values.list.type):
            return False
    return True


def without_kernel(concrete, *, device="XLA_CPU_JIT"):
    """What of a function has no kernel by which XLA could compile it.

    Args:
      concrete: concrete function. All that it calls is looked at: bodies of loops, branches.
      device: one of `devices`, the kernels of which count.

    Returns:
      Sorted list of ops with their types.
    """
    assert device in devices()
    missing = set()
    for node in _nodes(concrete):
        if node.op not in {_ARGUMENT, *_OF_TPU_PROGRAMS} and not any(
            _accepts(kernel, node) for kernel in _kernels(node.op, device)
        ):
            types = [types_pb2.DataType.Name(a.type) for _, a in sorted(node.attr.items()) if a.type]
            missing.add(" ".join([node.op, *types]))
    return sorted(missing)


def with_dynamic_shape(concrete):
    """Sorted ops of a function, and of all that it calls, some output of which has no static shape."""
    found, seen = set(), set()

    def visit(graph):
        for operation in graph.get_operations():
            for output in operation.outputs:
                is_data = output.dtype not in (tf.resource, tf.variant)
                # Arguments that a loop's condition does not read have no shape there.
                if (
                    is_data
                    and not output.shape.is_fully_defined()
                    and "redundant_placeholder" not in output.name
                ):
                    found.add(operation.type)
            for attribute in operation.node_def.attr.values():
                for function in [attribute.func.name, *(f.name for f in attribute.list.func)]:
                    if function and function not in seen:
                        seen.add(function)
                        visit(_graph_of(graph, function))

    visit(concrete.graph)
    return sorted(found - _SHAPED_BY_XLA)


def _graph_of(graph, name):
    """The graph of a function that `graph` calls."""
    while graph is not None:
        for function in graph._functions.values():
            if function.cached_definition.signature.name == name:
                return function.graph
        graph = getattr(graph, "outer_graph", None)
    raise AssertionError(f"{name} is not among the functions of the graph")


def dtypes(concrete):
    """The dtypes of all outputs, by op: {dtype: sorted ops}."""
    found: dict = {}
    for node in _nodes(concrete):
        for attribute in node.attr.values():
            for number in [attribute.type, *attribute.list.type]:
                if number:
                    found.setdefault(tf.as_dtype(number), set()).add(node.op)
    return {dtype: sorted(ops) for dtype, ops in found.items()}
