"""Every operation of a traced function: what XLA could not compile of it, what a GPU would have on its host."""

import collections
import contextlib
import functools
import math

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
# Run what they call, or nothing, wherever that is placed.
_NO_KERNEL_OF_THEIR_OWN = {
    _ARGUMENT,
    *("PartitionedCall", "StatefulPartitionedCall", "While", "StatelessWhile", "If", "StatelessIf", "Case"),
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
    found = set()
    for operation in _operations(concrete):
        for output in operation.outputs:
            is_data = output.dtype not in (tf.resource, tf.variant)
            # Arguments that a loop's condition does not read have no shape there.
            if is_data and not output.shape.is_fully_defined() and "redundant_placeholder" not in output.name:
                found.add(operation.type)
    return sorted(found - _SHAPED_BY_XLA)


def on_host(concrete, *, unknown):
    """What the operations of a function read from, or write to, the host's memory where they are placed on a GPU.

    An operation without a GPU kernel for its types runs on the host; for int32, many kernels of GPUs keep all their
    arguments there. Each such tensor that comes from the GPU, or goes there, is copied, and waited for.

    Args:
      concrete: concrete function. All that it calls is looked at, bodies of loops, branches, but what XLA compiles,
        which has all of its values on the GPU.
      unknown: what a dimension counts for that is not known.

    Returns:
      {operation with its types: elements of its largest tensor on the host}.
    """
    largest: dict = {}
    for operation in _operations(concrete, in_compiled=False):
        tensors = [
            t
            for t in _of_host(operation)
            if t.dtype not in (tf.resource, tf.variant) and t.shape.rank is not None
        ]
        if tensors:
            name = " ".join([operation.type, *sorted({t.dtype.name for t in tensors})])
            sizes = [math.prod(unknown if d is None else d for d in t.shape) for t in tensors]
            largest[name] = max(largest.get(name, 0), *sizes)
    return largest


def ops_with_gpu_kernels(concrete, *, dtype):
    """{op: how often a function, and what it calls, has it in a dtype for which GPUs have a kernel}."""
    return collections.Counter(
        operation.type
        for operation in _operations(concrete)
        if dtype in {t.dtype.name for t in operation.outputs}
        and any(_accepts(kernel, operation.node_def) for kernel in _kernels(operation.type, "GPU"))
    )


def _of_host(operation):
    """Tensors that an operation on a GPU has in the host's memory; all of them where it has no kernel there."""
    if operation.type in _NO_KERNEL_OF_THEIR_OWN:
        return []
    node = operation.node_def
    # DEFAULT: of every device that has no kernel of its own.
    accepting = [
        k for device in ("GPU", "DEFAULT") for k in _kernels(operation.type, device) if _accepts(k, node)
    ]
    if not accepting:
        return [*operation.inputs, *operation.outputs]
    names = set(accepting[0].host_memory_arg)
    return [
        tensor
        for arguments, tensors in (
            (operation.op_def.input_arg, list(operation.inputs)),
            (operation.op_def.output_arg, list(operation.outputs)),
        )
        for name, tensor in zip(_names(arguments, operation), tensors, strict=True)
        if name in names
    ]


def _names(arguments, operation):
    """The name of the argument that each tensor of an operation belongs to: some take several."""
    for argument in arguments:
        count = 1
        if argument.number_attr:
            count = operation.get_attr(argument.number_attr)
        elif argument.type_list_attr:
            count = len(operation.get_attr(argument.type_list_attr))
        yield from [argument.name] * count


def _operations(concrete, *, in_compiled=True):
    """Operations of a concrete function and of every function that it calls; `in_compiled`: those for XLA as well."""
    graphs, seen = [concrete.graph], set()
    while graphs:
        graph = graphs.pop()
        for operation in graph.get_operations():
            yield operation
            if not in_compiled and operation.node_def.attr["_XlaMustCompile"].b:
                continue
            for attribute in operation.node_def.attr.values():
                for function in [attribute.func.name, *(f.name for f in attribute.list.func)]:
                    if function and function not in seen:
                        seen.add(function)
                        graphs.append(_graph_of(graph, function))


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
