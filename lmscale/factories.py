"""What a configuration refers to by `@name`, with its arguments; and whether values fit where they go."""

import collections.abc
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras

_MAY_CHANGE = "may change when a run goes on"
_T = typing.TypeVar("_T")
# Annotation of a field, or of a parameter of __init__ or of a function, with which a run may go on after it started
# with another value: `train_steps: MayChange[int]`. Whatever does not say so must stay what it was.
MayChange = typing.Annotated[_T, _MAY_CHANGE]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factory:
    """A function or class which a configuration refers to by `@name`, with the arguments bound there.

    Arguments written `@other()` are built anew at each call.

    Attributes:
      name: as the configuration spells it.
      function: what is called.
      arguments: ((parameter, value), ...).
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[tuple[str, Any], ...]

    @property
    def __name__(self):
        return self.function.__name__

    def __call__(self, *positional, **named):
        """Calls the function with the caller's arguments and the bound ones.

        Raises:
          ValueError: if an argument is given by both, or by neither, or built of the wrong type.
        """
        names = [parameter.name for parameter in parameters(self.function)]
        from_caller = {*names[: len(positional)], *named}
        for parameter, value in self.arguments:
            if parameter in from_caller:
                raise ValueError(
                    f"{self.name}.{parameter} is decided by the run, so a configuration must not set it. "
                    f"Received: {self.name}.{parameter} = {spell(value)}. Remove that line."
                )
        self.check_complete(from_caller)
        arguments = {parameter: _build(value) for parameter, value in self.arguments}
        for parameter, value in arguments.items():
            if not fits(value, annotations(self.function).get(parameter, Any)):
                raise wrong_type(f"{self.name}.{parameter}", value, function=self.function)
        try:
            return self.function(*positional, **named, **arguments)
        except ValueError as error:
            # Libraries tell only what they were given: say by which line of the configuration.
            if self.function.__module__.partition(".")[0] == __package__ or not arguments:
                raise
            given = ", ".join(f"{parameter}={spell(value)}" for parameter, value in self.arguments)
            raise ValueError(f"{self.name}({given}): {error}") from error

    def check_complete(self, from_caller: Collection[str]) -> None:
        """Raises ValueError unless every parameter without a default is bound or given `from_caller`."""
        given = {*dict(self.arguments), *from_caller}
        missing = [
            f"{self.name}.{parameter.name}"
            for parameter in parameters(self.function)
            if parameter.default is parameter.empty and parameter.name not in given
        ]
        if missing:
            raise ValueError(
                f"Every parameter without a default needs a value. Received none for: {', '.join(missing)}. "
                f"Add to the configuration: {missing[0]} = ..."
            )


@dataclasses.dataclass(frozen=True)
class Result:
    """What `factory` returns, wherever the configuration says `@name()`."""

    factory: Factory


def _build(value):
    """A value as its receiver gets it: results computed, containers copied."""
    if isinstance(value, Result):
        return value.factory()
    if isinstance(value, list | tuple):
        return type(value)(_build(v) for v in value)
    if isinstance(value, dict):
        return {k: _build(v) for k, v in value.items()}
    return value


def spell(value):
    """A resolved value as a gin file would have it."""
    if isinstance(value, Result):
        return f"@{value.factory.name}()"
    if isinstance(value, Factory):
        return f"@{value.name}"
    if isinstance(value, list):
        return f"[{', '.join(map(spell, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(spell, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {spell(v)}' for k, v in value.items())}}}"
    return repr(value)


def _construction(function):
    """The function whose signature is that of a call: `__init__` or `__new__` of a class."""
    if not inspect.isclass(function):
        return function
    for base in function.__mro__:
        for name in ("__init__", "__new__"):
            if name in vars(base):
                return getattr(base, name)
    return function


@functools.cache
def parameters(function) -> tuple[inspect.Parameter, ...]:
    """The parameters that can be given by name, in order."""
    found = tuple(inspect.signature(_construction(function)).parameters.values())
    found_but_self = found[int(inspect.isclass(function)) :]
    return tuple(p for p in found_but_self if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def may_change(function) -> set[str]:
    """The parameters that are annotated with `MayChange`."""
    try:
        hints = typing.get_type_hints(_construction(function), include_extras=True)
    except (NameError, TypeError):
        return set()
    return {
        name
        for name, hint in hints.items()
        if typing.get_origin(hint) is typing.Annotated and _MAY_CHANGE in hint.__metadata__
    }


@functools.cache
def annotations(function) -> Mapping[str, Any]:
    """{parameter: type}, and `return`, where told; `_NotText` for an untold one that takes numbers."""
    own = parameters(function)
    hints = {p.name: _NotText for p in own if type(p.default) in (int, float)}
    if inspect.isclass(function) and issubclass(function, keras.optimizers.schedules.LearningRateSchedule):
        # Keras tells no types. What may be None has None as its default.
        hints = {p.name: _NotText for p in own if p.name != "name" and p.default is not None}
    try:
        return hints | typing.get_type_hints(_construction(function))
    except (NameError, TypeError):  # Annotations that name what is imported for type checkers alone.
        return hints


class _NotText:
    """Stands for the untold type of a parameter that takes numbers: perhaps a schedule too, but no text."""


def fits(value, hint) -> bool:
    """Whether a resolved value may be given where `hint` is the annotation. In doubt, True."""
    if isinstance(hint, typing.NewType):
        return fits(value, hint.__supertype__)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if hint is _NotText:
        return not isinstance(value, str | bool | None)
    if hint is None or hint is types.NoneType:
        return value is None
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    kind = origin or hint
    if isinstance(value, Result):
        function = value.factory.function
        if kind is collections.abc.Callable and len(arguments) == 2 and _returns(function, arguments[1]):
            return False  # A body, say, which can be called, where a function that makes one is asked for.
        return _result_fits(function, kind)
    if kind is collections.abc.Callable:
        return callable(value)
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind in (int, float, complex):  # bool is an int to isinstance, and 1 no float.
        numbers = (int, float, complex)
        return isinstance(value, numbers[: numbers.index(kind) + 1]) and not isinstance(value, bool)
    if not isinstance(value, kind) or (isinstance(value, str) and kind is not str and arguments):
        return False
    return _items_fit(value, arguments)


def _result_fits(function, kind) -> bool:
    """Whether what `function` returns can be of `kind`: known for classes and annotated functions."""
    result = _result_type(function)
    if result is Any or not isinstance(result, type):
        # Unknown. Where a function is asked for, the function itself must have been meant, without ().
        return kind is not collections.abc.Callable
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False) or (result, kind) == (int, float):
        return True
    return issubclass(result, kind) or issubclass(kind, result)


def _returns(function, kind) -> bool:
    """Whether what `function` returns is known to be of `kind`."""
    result = _result_type(function)
    return isinstance(kind, type) and isinstance(result, type) and issubclass(result, kind)


def _result_type(function):
    result = function if inspect.isclass(function) else annotations(function).get("return", Any)
    return typing.get_origin(result) or result


def _items_fit(value, arguments) -> bool:
    if isinstance(value, Mapping) and len(arguments) == 2:
        return all(fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items())
    if isinstance(value, tuple) and arguments and arguments[-1] is not Ellipsis and len(arguments) > 1:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if isinstance(value, list | tuple) and arguments:
        return all(fits(v, arguments[0]) for v in value)
    return True


def _type_text(hint) -> str:
    if hint is _NotText:
        return "number"
    if hint is types.NoneType:
        return "None"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_type_text, typing.get_args(hint)))
    if isinstance(hint, type) and not typing.get_origin(hint):
        return hint.__name__
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(hint))


def wrong_type(where, value, *, function, macro=None) -> ValueError:
    """The error to raise when `value` does not fit a parameter of `function`.

    Args:
      where: the parameter, as the configuration spells it.
      macro: name of the macro that holds the value, if one does.
    """
    parameter = where.rpartition(".")[2]
    hint = annotations(function)[parameter]
    name = macro or where
    advice = f"Set {name} to a value of that type."
    if isinstance(value, Factory) and fits(Result(value), hint):
        advice = f"To pass what it returns, write {name} = @{value.name}()."
    elif isinstance(value, Result) and fits(value.factory, hint):
        advice = f"To pass the function itself, write {name} = @{value.factory.name}."
    kind = "a reference" if isinstance(value, Factory | Result) else type(value).__name__
    return ValueError(
        f"{where} must be of type {_type_text(hint)}. Received: {spell(value)} ({kind})"
        f"{f', from the macro {macro}' if macro else ''}. {advice}"
    )
