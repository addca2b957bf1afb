"""What gin files bind -> one checked `Experiment`: references become objects, and nothing that is wrong gets through.

`lmscale.gin_text` has read the files. What gin lets pass is refused here, before anything is built: a value of the
wrong type, a required macro without a value, any setting that the run never uses. The objects are built without gin:
a `Factory` has its own arguments, and stays what it is when the next configuration is loaded.
"""

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from lmscale import factories, gin_text
from lmscale.experiment import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A configuration, checked and built.

    Attributes:
      experiment: the object that it describes.
      text: all of it as one gin file: includes merged, bindings applied. Loaded by itself, it gives an equal
        experiment. Holds nothing of where it was read from.
      macros: {name: value} in the order of names; a reference as text.
      settings: {name: value}, to compare runs by: the macros, then each parameter whose value is not just a macro's,
        defaults included, under the name by which a binding would change it.
      used: everything that takes part, the experiment first.
    """

    experiment: Any
    text: str
    macros: Mapping[str, Any]
    settings: Mapping[str, Any]
    used: Sequence[factories.Factory]

    def differences(self, text: str) -> list[str]:
        """What another configuration says otherwise.

        Args:
          text: the `text` of that configuration.

        Returns:
          Lines `name: value there -> value here`, with `(not set)` for what one of them does not set. None if
          they agree.
        """
        there, here = gin_text.assignments(text), gin_text.assignments(self.text)
        return [
            f"{name}: {there.get(name, '(not set)')} -> {here.get(name, '(not set)')}"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]

    def refused_changes(self, text: str) -> list[str]:
        """What another configuration says otherwise, and a run that started with it must not go on with.

        A parameter may change if its annotation is a `factories.MayChange`, and a macro if one of the parameters that
        it decides, here or there, may: TRAIN_STEPS moves the end of a schedule, too.

        Args:
          text: the `text` of that configuration.

        Returns:
          Lines as of `differences`.
        """
        functions = {factory.name.rpartition("/")[2]: factory.function for factory in self.used}
        users = [gin_text.macro_users(t) for t in (text, self.text)]

        def may_change(name):
            function, _, parameter = name.rpartition("/")[2].rpartition(".")
            if function in functions:
                return parameter in factories.may_change(functions[function])
            return any(may_change(user) for macros in users for user in macros.get(name, ()) if "." in user)

        return [line for line in self.differences(text) if not may_change(line.partition(":")[0])]


def load(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    *,
    seed: int | None = None,
    root: type = Experiment,
) -> ResolvedConfig:
    """Reads, checks and builds a configuration.

    Gin's global state is cleared before and after, so that configurations can be loaded one after the other. Keras,
    Python, NumPy and TensorFlow are seeded with the root's `seed`, if it has one: Keras's initialisers draw their own
    seeds when they are built.

    Args:
      gin_files: paths, later ones win over earlier ones.
      bindings: `NAME = value` each, as in a gin file, with the names that the files import; they win.
      seed: value for the macro SEED, if not None.
      root: the class which the configuration builds.

    Returns:
      The `ResolvedConfig`.

    Raises:
      ValueError: for anything wrong with the files or bindings, naming the setting, what was received and
        what to do. Whatever the constructors of `root` and of its parts raise comes through.
    """
    bindings = list(bindings)
    if seed is not None:
        if any(re.match(r"\s*SEED\s*=", binding) for binding in bindings):
            raise ValueError(
                f"The seed must be given once. Received: seed={seed} and {bindings}. Remove one of them."
            )
        bindings.append(f"SEED = {seed}")
    if isinstance(gin_files, str) or not gin_files:
        raise ValueError(
            f"At least one gin file is needed. Received: {gin_files!r}. Pass --gin_file=quickstart.gin."
        )

    text = gin_text.read(gin_files, bindings)
    # What is checked and built is the text itself: so it is known to be complete.
    return build(gin_text.parse(text), text=text, root=root)


def build(bindings: gin_text.Bindings, *, text: str, root: type = Experiment) -> ResolvedConfig:
    """Checks and builds what a text binds: the second half of `load`, which needs no gin.

    Args:
      bindings: what `gin_text.parse` returned.
      text: what it was parsed from.
      root: as of `load`.

    Returns:
      The `ResolvedConfig`.

    Raises:
      ValueError: as of `load`, but for what gin cannot read.
    """
    resolver = _Resolver(bindings)
    factory = resolver.root(root)
    resolver.check_all_used()
    root_seed = dict(factory.arguments).get("seed")
    if isinstance(root_seed, int):
        # An initialiser without a seed draws one when it is built. Whether the root takes this one, it says itself.
        keras.utils.set_random_seed(root_seed % 2**32)
    experiment = factory()
    used: list[factories.Factory] = []
    for other in resolver.used.values():  # The same in two scopes is told once.
        used += [other] if other not in used else []
    macros = dict(sorted(resolver.macros.items()))
    settings = macros | dict(sorted(resolver.settings.items()))
    return ResolvedConfig(experiment=experiment, text=text, macros=macros, settings=settings, used=used)


def describe(config: ResolvedConfig) -> str:
    """All settings of a configuration as aligned text: macros, then each part's parameters and defaults."""
    sections = []
    if config.macros:
        sections.append(("Macros", [(name, repr(value), "") for name, value in config.macros.items()]))
    for factory in config.used:
        arguments = dict(factory.arguments)
        rows = []
        for parameter in factories.parameters(factory.function):
            if parameter.name in arguments:
                rows.append((parameter.name, factories.spell(arguments.pop(parameter.name)), ""))
            elif parameter.default is parameter.empty:
                rows.append((parameter.name, "", "given by the run"))
            else:
                rows.append((parameter.name, factories.spell(parameter.default), "default"))
        rows += [(name, factories.spell(value), "") for name, value in arguments.items()]  # Of its **kwargs.
        sections.append((factory.name, rows))
    widths = [max((len(row[i]) for _, rows in sections for row in rows), default=0) for i in range(2)]
    lines = []
    for title, rows in sections:
        lines += ["", title]
        lines += [
            f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {note}".rstrip() for name, value, note in rows
        ]
    return "\n".join(lines[1:]) + "\n"


# ----------------------------------------------------------------------- Checks: what gin parsed -> Factories


def _holds_reference(value) -> bool:
    """Whether a parsed value is a reference, or a container with one in it, however deep."""
    if isinstance(value, dict):
        return any(map(_holds_reference, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_reference, value))
    return isinstance(value, gin_text.Reference)


class _Resolver:
    """Follows the references from the root, and keeps account of what is met.

    Attributes:
      macros: {name: value} of the macros met.
      settings: {name: value} of the parameters met, but for those that a macro decides.
      used: {(selector, scopes): Factory}, in the order in which they are met.
    """

    def __init__(self, bindings: gin_text.Bindings) -> None:
        self.macros: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.used: dict[tuple[str, str], factories.Factory] = {}
        self._bindings = bindings
        self._scopes = {scope for scope, _ in bindings.parameters}
        self._followed: set[tuple[str, str, str]] = set()  # (scope, selector, parameter)
        self._followed_macros: set[str] = set()
        self._path: dict[tuple[str, str] | str, str] = {}  # What is being resolved, to notice a circle.

    def root(self, cls) -> factories.Factory:
        known = self._bindings.configurables.values()
        configurable = next((c for c in known if c.function is cls), None)
        if configurable is None:
            package, _, module = cls.__module__.rpartition(".")
            raise ValueError(
                f"The gin files must configure {module}.{cls.__name__}. Received: files that never name it. "
                f"Add `from {package} import {module}` and bind its parameters: "
                f"{module}.{cls.__name__}.NAME = ..."
            )
        factory = self._factory(configurable, scopes=(), name=configurable.name)
        factory.check_complete(())
        return factory

    def check_all_used(self):
        """Raises ValueError if something is set which the root does not lead to: it would be ignored.

        What is `%gin.REQUIRED` is not set: so a binding takes back what a file sets for a part that is not used now.
        """
        unused = []
        for macro, value in self._bindings.macros.items():
            if macro not in self._followed_macros and value is not gin_text.REQUIRED:
                names = [name for name in self._bindings.macros if name != macro]
                near = gin_text.did_you_mean(macro, names)
                unused.append(f"macro {macro} (nothing uses %{macro}).{near}")
        for (scope, selector), bound in self._bindings.parameters.items():
            for parameter, value in bound.items():
                if (scope, selector, parameter) in self._followed or value is gin_text.REQUIRED:
                    continue
                name = self._bindings.configurables[selector].name
                why = f"nothing refers to @{name}"
                if selector in [used for used, _ in self.used]:
                    why = "no reference has this scope, or an inner scope overrides it"
                unused.append(f"{scope + '/' if scope else ''}{name}.{parameter} ({why}).")
        if unused:
            raise ValueError(
                f"Every setting must have an effect. Received, without any: {' '.join(unused)} "
                "Remove what is not meant, or refer to it. To take back what a file sets: NAME = %gin.REQUIRED."
            )

    def _factory(self, configurable, *, scopes, name) -> factories.Factory:
        selector, function = configurable.selector, configurable.function
        while scopes and not any(f"{scope}/".startswith("/".join([*scopes, ""])) for scope in self._scopes):
            scopes = scopes[:-1]  # Nothing is bound in it: most often the name of a macro, a scope to gin.
        key = (selector, "/".join(scopes))
        if key in self.used and key not in self._path:
            return self.used[key]
        bound = {}
        for depth in range(len(scopes) + 1):
            scope = "/".join(scopes[:depth])
            for parameter, value in self._bindings.parameters.get((scope, selector), {}).items():
                bound[parameter] = (scope, value)
        arguments = []
        self.used[key] = factories.Factory(name=name, function=function, arguments=())  # Keeps its place.
        with self._following(key, name):
            # Parts last: of a macro of the wrong type, the error then names the outermost use.
            for parameter, (scope, value) in sorted(
                bound.items(), key=lambda item: _holds_reference(item[1][1])
            ):
                self._followed.add((scope, selector, parameter))
                where = f"{scope + '/' if scope else ''}{configurable.name}.{parameter}"
                resolved = self._value(value, scopes=scopes, where=where)
                if not factories.fits(resolved, factories.annotations(function).get(parameter, Any)):
                    raise factories.wrong_type(
                        where, resolved, function=function, macro=self._macro_name(value)
                    )
                for result in _results(resolved):
                    result.factory.check_complete(())
                arguments.append((parameter, resolved))
        self.used[key] = factories.Factory(name=name, function=function, arguments=tuple(arguments))
        # Not the functions and objects among the defaults: as text, they hold an address.
        values = {
            parameter.name: parameter.default
            for parameter in factories.parameters(function)
            if isinstance(parameter.default, bool | int | float | str | tuple | None)
        }
        values |= arguments
        by_macro = {
            parameter for parameter, (_, value) in bound.items() if self._macro_name(value) is not None
        }
        prefix = "/".join([*scopes, configurable.name])
        self.settings |= {
            f"{prefix}.{parameter}": _plain(value)
            for parameter, value in values.items()
            if parameter not in by_macro
        }
        return self.used[key]

    def _value(self, value, *, scopes, where):
        if isinstance(value, list | tuple):
            return type(value)(self._value(v, scopes=scopes, where=where) for v in value)
        if isinstance(value, dict):
            return {k: self._value(v, scopes=scopes, where=where) for k, v in value.items()}
        if value is gin_text.REQUIRED:
            raise ValueError(
                f"{where} must be set. Received: no value (it is marked as required). Add the line "
                f"{where} = ... to a gin file, or pass it as --gin_param."
            )
        if isinstance(value, gin_text.MacroReference):
            return self._macro(value.name, where=where)
        if not isinstance(value, gin_text.Reference):
            return value
        name = "/".join([*value.scopes, value.configurable.name])
        if value.configurable.function is gin_text.SINGLETON:
            raise ValueError(f"{where} must not be a gin.singleton. Received: @{name}. Use a macro.")
        factory = self._factory(value.configurable, scopes=value.scopes or scopes, name=name)
        return factories.Result(factory) if value.is_call else factory

    def _macro(self, name, *, where):
        macros = self._bindings.macros
        bound = macros.get(name, gin_text.REQUIRED)
        if bound is gin_text.REQUIRED:
            received = "none (it is marked as required)" if name in macros else "no such macro"
            near = gin_text.did_you_mean(name, [other for other in macros if other != name])
            raise ValueError(
                f"The macro {name}, which {where} uses, must have a value. Received: {received}.{near} "
                f"Add the line {name} = ... to a gin file, or pass --gin_param='{name} = ...'."
            )
        self._followed_macros.add(name)
        with self._following(name, f"%{name}"):
            value = self._value(bound, scopes=tuple(name.split("/")), where=where)
        self.macros[name] = _plain(value)
        return value

    def _macro_name(self, value):
        """The macro at the end of `%A` (where A = %B, B), which is the one to change; None for anything else."""
        name = None
        while isinstance(value, gin_text.MacroReference):
            name = value.name
            value = self._bindings.macros[name]
        return name

    @contextlib.contextmanager
    def _following(self, key, name):
        if key in self._path:
            circle = " -> ".join([*self._path.values(), name])
            raise ValueError(f"A setting must not refer to itself. Received: {circle}.")
        self._path[key] = name
        yield
        del self._path[key]


def _results(value):
    """The `Result`s in a resolved value, however deep in containers."""
    if isinstance(value, factories.Result):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [result for item in items for result in _results(item)]


def _plain(value):
    return value if isinstance(value, bool | int | float | str | None) else factories.spell(value)
