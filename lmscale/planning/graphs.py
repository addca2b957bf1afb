"""What a traced function costs: memory of intermediate values, operations of products, bytes that are moved.

Nothing is run. Operations are gone through as TensorFlow's executor takes them with a thread for each that is ready:
each starts as soon as its inputs are there and takes as long as what it multiplies and moves; one that XLA compiles
runs one after the other. A value is there from the start of the operation that makes it to the end of the last one that
reads it. As in TensorFlow, views share the memory of what they show, and an operation that works element by element
writes over an input that nobody else still reads. What the function is given counts for nothing: whoever calls it holds
it.

Memory of small values stays with the allocator once it was taken, so the most of small values comes on top of the most
of large ones, whenever either was.

TensorFlow's threads may take operations in another order: the result is an estimate.
"""

import collections
import dataclasses
import heapq
import itertools

import numpy as np
import tensorflow as tf

_VIEWS = {
    "Bitcast",
    "EnsureShape",
    "ExpandDims",
    "Identity",
    "IdentityN",
    "PreventGradient",
    "ReadVariableOp",
    "Reshape",
    "Snapshot",
    "Squeeze",
    "StopGradient",
}
# Views where they cut the first axis.
_CUTS = {"Slice", "Split", "SplitV", "StridedSlice", "Unpack"}
_IN_PLACE = {
    "Abs",
    "Add",
    "AddN",
    "AddV2",
    "BiasAdd",
    "DivNoNan",
    "Elu",
    "Exp",
    "GeluGrad",
    "Log",
    "LogSoftmax",
    "Maximum",
    "Minimum",
    "Mul",
    "MulNoNan",
    "Neg",
    "Pow",
    "RealDiv",
    "Relu",
    "ReluGrad",
    "Rsqrt",
    "RsqrtGrad",
    "Select",
    "SelectV2",
    "Sigmoid",
    "SigmoidGrad",
    "Softmax",
    "Softplus",
    "SoftplusGrad",
    "Sqrt",
    "SqrtGrad",
    "Square",
    "SquaredDifference",
    "Sub",
    "Tanh",
    "TanhGrad",
    "TensorScatterAdd",
    "TensorScatterUpdate",
}
_CALLS = {"PartitionedCall": "f", "StatefulPartitionedCall": "f"}
_BRANCHES = {"If", "StatelessIf"}
_LOOPS = {"While", "StatelessWhile"}
_MATRIX_PRODUCTS = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"}
_CONVOLUTIONS = {"Conv2D", "Conv3D"}
_CONVOLUTION_GRADIENTS = {
    "Conv2DBackpropFilter",
    "Conv2DBackpropInput",
    "Conv3DBackpropFilterV2",
    "Conv3DBackpropInputV2",
}
# How long operations take beside each other: of a core, some 100 GFLOP/s of products, 10 GB/s of memory, and 3 us until
# an operation starts.
_FLOPS_A_BYTE = 10
_BYTES_OF_A_START = 30_000
# Memory of values below it, once taken, stays with the allocator of the C library, for other such values.
_GIVEN_BACK = 32 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphCost:
    """What a call of a function costs.

    Attributes:
      peak_bytes: {part: bytes of values of that part} when all values together take most; of small and large values
        each by themselves.
      most_bytes: {part: bytes of values of that part} when those of the part alone take most.
      product_flops: {part: floating-point operations of its matrix products and convolutions}, a multiplication and an
        addition each.
      moved_bytes: {part: bytes that its operations read and write}. A program that XLA compiles moves what goes in and
        out of it.
      has_unknown_sizes: whether some values have shapes that depend on data; they count for nothing.
    """

    peak_bytes: dict[str, int]
    most_bytes: dict[str, int]
    product_flops: dict[str, float]
    moved_bytes: dict[str, float]
    has_unknown_sizes: bool


def cost_of(function, *specs, part_of):
    """Traces a function and goes through what it does.

    Args:
      function: of tensors, or structures of them.
      specs: `tf.TensorSpec`s of its arguments, in such structures.
      part_of: function of an operation's name that returns the part that it belongs to.

    Returns:
      `GraphCost`.
    """
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    walk = _Walk(part_of)
    walk.run(concrete.graph, [walk.given() for _ in concrete.graph.inputs])
    return GraphCost(
        peak_bytes=walk.peak_by_part(),
        most_bytes=dict(walk.most),
        product_flops=dict(walk.flops),
        moved_bytes=dict(walk.moved),
        has_unknown_sizes=walk.has_unknown_sizes,
    )


class _Buffer:
    """Memory of a value and its views.

    `uses`: reads that are still to come; `trips`: of the loop that filled it; `is_small`: whether its memory, once
    freed, stays with the allocator.
    """

    def __init__(self, size, part, *, is_given=False):
        self.size, self.part, self.is_given = size, part, is_given
        self.uses, self.trips, self.is_small = 0, 1, False


class _Account:
    """Bytes that are taken and given back, by part; `at_peak`: a `Counter`, of when they were most in all."""

    def __init__(self):
        self._live = self._peak = 0
        self._by_part: collections.Counter = collections.Counter()
        self.at_peak: collections.Counter = collections.Counter()

    def add(self, size, part):
        self._live += size
        self._by_part[part] += size
        if self._live > self._peak:
            self._peak = self._live
            self.at_peak = +self._by_part

    def remove(self, size, part):
        self._live -= size
        self._by_part[part] -= size


class _Value:
    """A tensor of one call of a function."""

    def __init__(self, tensor):
        self.tensor = tensor


class _Node:
    """An operation of one call of a function. `after`: the nodes that it waits for without reading them."""

    def __init__(self, op, inputs, outputs, after, part):
        self.op, self.inputs, self.outputs, self.after, self.part = op, inputs, outputs, after, part


class _Program:
    """Operations with those of called functions in the place of the calls, as TensorFlow puts them.

    Attributes:
      nodes: list of `_Node`.
    """

    def __init__(self, part_of, *, leave_calls):
        self.nodes: list[_Node] = []
        self._part_of, self._leave_calls = part_of, leave_calls

    def add(self, graph, arguments, part, *, num_outputs=None):
        """Adds the operations of a graph; returns the values of its first outputs."""
        values = {x.ref(): value for x, value in zip(graph.inputs, arguments, strict=True)}
        nodes = {}
        for op in _in_order(graph):
            if op.type == "Placeholder" and op.outputs[0].ref() in values:
                continue
            inputs = [values[x.ref()] for x in op.inputs]
            its_part = part or self._part_of(op.name)
            inner = None
            if op.type in _CALLS and not self._leave_calls:
                inner, is_compiled = _function_named(op.graph, op.get_attr(_CALLS[op.type]).name)
                inner = None if is_compiled else inner
            if inner is not None:
                outputs = self.add(inner, inputs, its_part, num_outputs=len(op.outputs))
            else:
                outputs = [_Value(x) for x in op.outputs]
                after = [nodes[other] for other in op.control_inputs if other in nodes]
                nodes[op] = _Node(op, inputs, outputs, after, its_part)
                self.nodes.append(nodes[op])
            values |= {x.ref(): value for x, value in zip(op.outputs, outputs, strict=True)}
        return [values[x.ref()] for x in graph.outputs[:num_outputs]]


class _Walk:
    def __init__(self, part_of):
        self._part_of = part_of
        self._live: dict[_Buffer, None] = {}
        self._large, self._small = _Account(), _Account()
        self._live_by_part: collections.Counter = collections.Counter()
        self.most: collections.Counter = collections.Counter()
        self._trips = 1
        self._is_fused = False
        self.flops: dict[str, float] = collections.defaultdict(float)
        self.moved: dict[str, float] = collections.defaultdict(float)
        self.has_unknown_sizes = False

    def given(self):
        return _Buffer(0, "", is_given=True)

    def peak_by_part(self):
        return dict(self._large.at_peak + self._small.at_peak)

    def run(self, graph, arguments, *, part=None, num_outputs=None):
        """Goes through a graph; returns the buffers of its first outputs, each with one use to come."""
        program = _Program(self._part_of, leave_calls=self._is_fused)
        given = [_Value(x) for x in graph.inputs]
        # A function that is differentiated somewhere shares its graph with one that also returns what gradients need.
        returned = program.add(graph, given, part, num_outputs=num_outputs)
        uses = collections.Counter(returned)
        for node in program.nodes:
            uses.update(node.inputs)
        buffers = dict(zip(given, arguments, strict=True))
        for value, buffer in buffers.items():
            buffer.uses += uses[value]
        waiting_for, waiting = {}, collections.defaultdict(list)
        ready: collections.deque = collections.deque()
        for node in program.nodes:
            needed = {*node.inputs, *node.after} - buffers.keys()
            waiting_for[node] = len(needed)
            for value in needed:
                waiting[value].append(node)
            if not needed:
                ready.append(node)
        now, numbers = 0.0, itertools.count()
        running: list[tuple] = []
        while ready or running:
            while ready and not (running and self._is_fused):
                node = ready.popleft()
                inputs = [buffers[value] for value in node.inputs]
                before = self._work()
                outputs = self._execute(node.op, inputs, node.part)
                for value, buffer in zip(node.outputs, outputs, strict=True):
                    buffers[value] = buffer
                    buffer.uses += uses[value]
                ends = now + self._work() - before + _BYTES_OF_A_START
                heapq.heappush(running, (ends, next(numbers), node, inputs, outputs))
            now, _, node, inputs, outputs = heapq.heappop(running)
            for buffer in inputs:
                buffer.uses -= 1
            for buffer in (*inputs, *outputs):
                self._free_if_unused(buffer)
            for value in (*node.outputs, node):
                for other in waiting.pop(value, ()):
                    waiting_for[other] -= 1
                    if not waiting_for[other]:
                        ready.append(other)
        return [buffers[value] for value in returned]

    def _work(self):
        """How long all that was done so far takes by itself, in bytes moved."""
        return sum(self.moved.values()) + sum(self.flops.values()) / _FLOPS_A_BYTE

    def _execute(self, op, inputs, part):
        """The buffers of an operation's outputs, perhaps those of its inputs."""
        if op.type in _CALLS:
            return self._call(op, inputs, op.get_attr(_CALLS[op.type]).name, part)
        if op.type in _BRANCHES:
            # The branch that is taken where all goes well.
            return self._call(op, inputs[1:], op.get_attr("then_branch").name, part)
        if op.type in _LOOPS:
            return self._loop(op, inputs, part)
        if op.type in ("TensorListPushBack", "TensorListSetItem"):
            return [self._append(op, inputs[0])]
        is_cut = op.type in _CUTS and _cuts_first_axis(op)
        if inputs and (is_cut or op.type in _VIEWS):
            if op.type == "IdentityN":
                return inputs
            # Of a Split, the axis comes first.
            return [inputs[1 if op.type == "Split" else 0]] * len(op.outputs)
        self._count(op, part)
        sizes = [self._size(x) for x in op.outputs]
        # A choice that broadcasts writes elsewhere.
        is_broadcast = (
            op.type == "SelectV2"
            and not self._is_fused
            and any(x.shape != op.outputs[0].shape for x in op.inputs)
        )
        if op.type in _IN_PLACE and not is_broadcast:
            for tensor, buffer in zip(op.inputs, inputs, strict=True):
                if buffer.uses == 1 and not buffer.is_given and buffer.size == sizes[0] == self._size(tensor):
                    return [buffer]
        outputs = []
        for size in sizes:
            # Constants are part of the graph.
            outputs.append(self.given() if op.type == "Const" else self._allocate(size, part))
        return outputs

    def _call(self, op, inputs, name, part):
        inner, is_compiled = _function_named(op.graph, name)
        was_fused = self._is_fused
        if is_compiled and not was_fused:
            self.moved[part] += self._trips * sum(self._size(x) for x in (*op.inputs, *op.outputs))
        self._is_fused = was_fused or is_compiled
        outputs = self._run_inner(inner, inputs, part, num_outputs=len(op.outputs))
        self._is_fused = was_fused
        return outputs

    def _loop(self, op, inputs, part):
        body, _ = _function_named(op.graph, op.get_attr("body").name)
        trips = max([_trips(op), *(buffer.trips for buffer in inputs)])
        before, self._trips = self._trips, self._trips * trips
        outputs = self._run_inner(body, inputs, part, num_outputs=len(op.outputs))
        self._trips = before
        for tensor, buffer in zip(op.outputs, outputs, strict=True):
            if tensor.dtype == tf.variant:
                buffer.trips = trips
        return outputs

    def _run_inner(self, graph, inputs, part, *, num_outputs):
        # An argument of a branch or a loop may be gone before that ends. What XLA has compiled leaves its arguments
        # alone.
        held = 1 if self._is_fused else 0
        for buffer in inputs:
            buffer.uses -= 1 - held
        outputs = self.run(graph, inputs, part=part, num_outputs=num_outputs)
        for buffer in inputs:
            buffer.uses += 1 - held
        # `run` has left a use for each output; those of the caller take its place.
        for buffer in outputs:
            buffer.uses -= 1
        return outputs

    def _append(self, op, target):
        """A list that keeps one value of each turn of the loop."""
        size = self._trips * self._size(op.inputs[-1])
        if target.is_given:
            return target
        target.size += size
        self._live[target] = None
        self._grow(size, target)
        return target

    def _allocate(self, size, part):
        buffer = _Buffer(size, part)
        buffer.is_small = 0 < size < _GIVEN_BACK
        self._live[buffer] = None
        self._grow(size, buffer)
        return buffer

    def _grow(self, size, buffer):
        part = buffer.part
        self._live_by_part[part] += size
        self.most[part] = max(self.most[part], self._live_by_part[part])
        (self._small if buffer.is_small else self._large).add(size, part)

    def _free_if_unused(self, buffer):
        if buffer.uses == 0 and buffer in self._live:
            del self._live[buffer]
            self._live_by_part[buffer.part] -= buffer.size
            (self._small if buffer.is_small else self._large).remove(buffer.size, buffer.part)

    def _size(self, tensor):
        if tensor.dtype in (tf.resource, tf.variant, tf.string):
            return 0
        size = tensor.shape.num_elements()
        if size is None:
            self.has_unknown_sizes = True
            return 0
        return size * tensor.dtype.size

    def _count(self, op, part):
        self.flops[part] += self._trips * _product_flops(op)
        if not self._is_fused and op.type not in ("Const", "Placeholder", "Shape"):
            self.moved[part] += self._trips * sum(self._size(x) for x in (*_read_inputs(op), *op.outputs))


def _in_order(graph):
    """The operations in the order in which they were made, but each after those that it reads.

    A gradient makes operations that the loop which it belongs to reads, after the loop.
    """
    order: dict = {}
    for first in graph.get_operations():
        stack = [first]
        while stack:
            op = stack[-1]
            missing = [x.op for x in op.inputs if x.op not in order]
            if missing:
                stack += reversed(missing)
            else:
                order[stack.pop()] = None
    return list(order)


def _read_inputs(op):
    """The inputs that an operation reads the whole of: of what it gathers from, it reads what it returns."""
    if op.type in ("GatherV2", "ResourceGather"):
        return op.outputs
    return op.inputs


def _function_named(graph, name):
    """(graph, whether XLA compiles it) of a function that an operation of `graph` calls."""
    function = graph._get_function(name)
    attributes = function.cached_definition.attr
    # To look up what is not there would add it, to the function itself.
    return function.graph, "_XlaMustCompile" in attributes and attributes["_XlaMustCompile"].b


def _cuts_first_axis(op):
    """Whether the outputs are blocks of the input along its first axis."""
    x = next(x for x in op.inputs if x.shape.rank) if op.type == "Split" else op.inputs[0]
    rest = x.shape[1:]
    if op.type == "Unpack":
        return op.get_attr("axis") == 0
    return all(y.shape[1:] == rest or y.shape == rest for y in op.outputs)


def _trips(op):
    """Turns of a loop, where the graph says so; else 1."""
    most = tf.get_static_value(op.inputs[1]) if len(op.inputs) > 1 else None
    if most is not None and np.ndim(most) == 0 and most > 0 and op.inputs[1].dtype == tf.int32:
        return int(most)
    condition, _ = _function_named(op.graph, op.get_attr("cond").name)
    bounds = [
        tf.get_static_value(inner.inputs[1]) for inner in condition.get_operations() if inner.type == "Less"
    ]
    return max([1, *(int(bound) for bound in bounds if bound is not None)])


def _product_flops(op):
    if op.type in _MATRIX_PRODUCTS:
        x = op.inputs[0].shape
        is_transposed = op.get_attr("transpose_a") if op.type == "MatMul" else op.get_attr("adj_x")
        terms = x[-2] if is_transposed else x[-1]
        return 2 * (op.outputs[0].shape.num_elements() or 0) * (terms or 0)
    if op.type == "Einsum":
        return _einsum_flops(op)
    if op.type in _CONVOLUTIONS:
        return 2 * (op.outputs[0].shape.num_elements() or 0) * int(np.prod(op.inputs[1].shape[:-1]))
    if op.type in _CONVOLUTION_GRADIENTS:
        kernel = op.outputs[0].shape if "Filter" in op.type else op.inputs[1].shape
        return 2 * (op.inputs[2].shape.num_elements() or 0) * int(np.prod(kernel[:-1]))
    return 0


def _einsum_flops(op):
    if len(op.inputs) != 2:
        return 0
    sizes: dict[str, int] = {}
    for labels, x in zip(op.get_attr("equation").decode().split("->")[0].split(","), op.inputs, strict=True):
        before, dots, after = labels.partition("...")
        shape = [size or 0 for size in x.shape.as_list()]
        for label, size in zip(before, shape, strict=False):
            sizes[label] = size
        if after:
            sizes |= dict(zip(after, shape[-len(after) :], strict=True))
        if dots:
            inner = shape[len(before) : len(shape) - len(after)]
            sizes["..."] = max(sizes.get("...", 1), int(np.prod(inner)))
    return 2 * int(np.prod(list(sizes.values()), dtype=np.int64))
