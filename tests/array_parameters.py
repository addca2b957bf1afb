"""Parameters whose values are plain arrays."""

from lmscale.parameters.tree import Parameter


def array_parameter(path, array, *, log=None):
    """A `Parameter` that reads from and writes to `array`; what it is asked for is added to the list `log`."""

    def note(start, stop):
        if log is not None:
            log.append((path, start, stop))

    def read(start, stop):
        note(start, stop)
        return array[start:stop] if array.ndim else array

    def write(start, rows):
        note(start, start + len(rows) if array.ndim else 1)
        if array.ndim:
            array[start : start + len(rows)] = rows
        else:
            array[...] = rows

    def scatter(ids, rows):
        assert len(set(ids.tolist())) == len(ids) == len(rows)
        array[ids] = rows

    return callback_parameter(path, array.shape, array.dtype, read=read, write=write, scatter=scatter)


def array_parameters(arrays, **kwargs):
    """The `Parameter`s of {path: array}."""
    return [array_parameter(path, array, **kwargs) for path, array in arrays.items()]


def callback_parameter(path, shape, dtype, *, read, write, scatter=None, sharded=False):
    """A `Parameter` of any shape and behaviour."""
    return Parameter(
        path=path,
        shape=shape,
        dtype=dtype,
        sharded=sharded,
        trainable=not path.startswith("slots/"),
        read=read,
        write=write,
        scatter=scatter,
    )
