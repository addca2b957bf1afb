"""Gin files and bindings -> one checked `Experiment`. No other module but the entry points knows of gin.

A gin file names what it uses by import, so that the code it configures needs no decorators:

    from __gin__ import dynamic_registration
    from lmscale import experiment
    from lmscale.bodies import lstm
    include 'shared/defaults.gin'               # beside this file, or else from the working directory
    TRAIN_STEPS = 1_000                         # a macro
    experiment.Experiment.train_steps = %TRAIN_STEPS
    experiment.Experiment.body = @lstm.lstm_body            # the function itself, as a `Factory`
    experiment.Experiment.row_optimizer = @Adagrad()        # what it returns

Gin parses; what it lets pass is refused here, before anything is built: a value of the wrong type, a required
macro without a value, any setting that the run never uses. The objects are built without gin: a `Factory` has
its own arguments, and stays what it is when the next configuration is loaded.
"""

import codecs
import contextlib
import dataclasses
import difflib
import io
import logging
import math
import os
import re
import sys
import tokenize
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import tensorflow as tf
from gin import config as gin_config
from gin import config_parser

from lmscale import factories, paths
from lmscale.experiment import Experiment

logger = logging.getLogger(__name__)

# Local and remote paths alike. (gin.tf, which is meant for that, asks for tf.estimator, which is gone.)
_FILE_SYSTEM = tf.io.gfile
_MACRO = "gin.macro"


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
        there, here = _assignments(text), _assignments(self.text)
        return [
            f"{name}: {there.get(name, '(not set)')} -> {here.get(name, '(not set)')}"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]


def load(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    *,
    seed: int | None = None,
    root: type = Experiment,
) -> ResolvedConfig:
    """Reads, checks and builds a configuration.

    Gin's global state is cleared before and after, so that configurations can be loaded one after the other.

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
            f"At least one gin file is needed. Received: {gin_files!r}. Pass --gin_file=configs/NAME.gin."
        )

    with _cleared_gin():
        for path in gin_files:
            _parse_file(path)
        for binding in bindings:
            if binding != binding.encode("utf-8", "replace").decode("utf-8"):
                raise ValueError(
                    f"A binding must be UTF-8. Received: {binding!a}. Rename the file that it names."
                )
            imports = gin_config.ImportManager(gin_config._IMPORTS).sorted_imports
            imports = "\n".join(statement.format() for statement in imports)
            with _explained(f"binding {binding!r}"):
                gin.parse_config(f"{imports}\n{binding}")
        _check_writable(gin_config._CONFIG)
        text = _text()
    # What is checked and built is the text itself: so it is known to be complete.
    with _cleared_gin():
        with _explained("the resolved configuration"):
            gin.parse_config(text)
        if _text() != text:
            raise RuntimeError(
                f"gin reads its own text back as another configuration:\n{text}\n---\n{_text()}"
            )
        resolver = _Resolver()
        factory = resolver.root(root)
        resolver.check_all_used()
    used: list[factories.Factory] = []
    for other in resolver.used.values():  # The same in two scopes is told once.
        used += [other] if other not in used else []
    macros = dict(sorted(resolver.macros.items()))
    settings = macros | dict(sorted(resolver.settings.items()))
    return ResolvedConfig(experiment=factory(), text=text, macros=macros, settings=settings, used=used)


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


# ----------------------------------------------------------------------------- gin: files -> bindings -> text


@contextlib.contextmanager
def _cleared_gin():
    """Gin without a configuration or what earlier files made it register, and with our way to open files."""
    readers = list(gin_config._FILE_READERS)
    _forget()
    gin_config._FILE_READERS[:] = [(_IncludedFile, _IncludedFile.find)]
    try:
        yield
    finally:
        gin_config._FILE_READERS[:] = readers
        _forget()


def _forget():
    gin.clear_config()
    # Dynamic registrations outlive clear_config, with the spelling of the import that made them.
    for selector, configurable in list(gin_config._REGISTRY.items()):
        if configurable.import_source is not None:
            gin_config._REGISTRY.pop(selector)
            gin_config._INVERSE_REGISTRY.pop(configurable.wrapped, None)


class _IncludedFile:
    """Opens gin files: an included name is looked for beside the file that includes it, then as it stands.

    Warns of what a file sets above an include and the included file, or one that it includes, sets otherwise.
    """

    _open_files: typing.ClassVar[list["_IncludedFile"]] = []

    def __init__(self, name):
        self.path = self.find(name)
        open_paths = [file.path for file in self._open_files]
        if os.path.normpath(self.path) in map(os.path.normpath, open_paths):
            raise ValueError(
                "A gin file must not include itself. Received: " + " -> ".join([*open_paths, self.path])
            )

    def __enter__(self):
        with _FILE_SYSTEM.GFile(self.path, "rb") as file:
            self._text = _decoded(file.read())
        self._num_includes = 0
        self._above = self._open_files[-1].set_above_next_include() if self._open_files else []
        self._open_files.append(self)
        return _NamedText(self._text, name=self.path)

    def __exit__(self, error_type, error, traceback):
        self._open_files.pop()
        if error_type is not None:
            return
        for statement, key, value in self._above:
            new_value = _bound(key)
            if new_value != value:
                logger.warning(
                    "%s, line %d: %s = %r is overwritten by the included %s, which sets %r. Write it below the "
                    "include to keep it.",
                    *(
                        statement.location.filename,
                        statement.location.line_num,
                        _written_name(statement),
                        value,
                    ),
                    *(self.path, new_value),
                )

    @classmethod
    def find(cls, name):
        """The path of a file that is there, or None."""
        name = paths.expand(name)
        names = [os.path.join(os.path.dirname(file.path), name) for file in cls._open_files[-1:]] + [name]
        return next((n for n in names if _FILE_SYSTEM.exists(n) and not _FILE_SYSTEM.isdir(n)), None)

    def set_above_next_include(self):
        """[(statement, gin's key, value)] of what this file sets above its next include, and not again below it."""
        statements = _statements(self._text, name=self.path)
        includes = [i for i, s in enumerate(statements) if isinstance(s, config_parser.IncludeStatement)]
        here = includes[self._num_includes] if self._num_includes < len(includes) else 0
        self._num_includes += 1
        last = {
            _written_name(s): i
            for i, s in enumerate(statements)
            if isinstance(s, config_parser.BindingStatement)
        }
        above = [statements[i] for i in last.values() if i < here]
        keys = [gin_config.ParsedBindingKey.parse(_key(statement)) for statement in above]
        return [(statement, key, _bound(key)) for statement, key in zip(above, keys, strict=True)]


class _NamedText(io.StringIO):
    """A file's text, with the name that gin gives in its messages."""

    def __init__(self, text, *, name):
        super().__init__(text)
        self.name = name


def _decoded(content):
    """The text of a gin file, without a byte-order mark."""
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        seen = "UTF-16" if is_utf16 else f"byte 0x{content[error.start]:02x} at byte {error.start + 1:,}"
    else:
        if "\0" not in text:
            return text
        seen = "NUL characters, as UTF-16 has them"
    raise ValueError(
        f"a gin file must be UTF-8. Received: {seen}. Convert it, for instance with iconv -t UTF-8."
    )


class _NoReferences(config_parser.ParserDelegate):
    """For statements of which only the names and the places matter."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return None

    def macro(self, macro_name):
        return None


def _statements(text, *, name):
    """The statements of a gin file, up to one that is wrong, of which gin will tell."""
    statements = []
    with contextlib.suppress(SyntaxError, tokenize.TokenError):
        statements.extend(config_parser.ConfigParser(_NamedText(text, name=name), _NoReferences()))
    return statements


def _key(statement):
    """A binding's key, as `gin.parse_config` makes it."""
    if statement.arg_name:
        return statement.scope, statement.selector, statement.arg_name
    return (
        f"{statement.scope}/{statement.selector}" if statement.scope else statement.selector,
        _MACRO,
        "value",
    )


def _written_name(statement):
    scope = f"{statement.scope}/" if statement.scope else ""
    return f"{scope}{statement.selector}{f'.{statement.arg_name}' if statement.arg_name else ''}"


def _bound(key):
    """What gin has for a setting now."""
    return gin_config._CONFIG.get(key.config_key, {}).get(key.arg_name)


def _parse_file(path):
    paths.check_spelling(path, what="A gin file")
    with _explained(path):
        found = _IncludedFile.find(path)
    if found is None:
        folder, name = os.path.split(path)
        there = _FILE_SYSTEM.listdir(folder or ".") if _FILE_SYSTEM.isdir(folder or ".") else []
        near = _did_you_mean(name, [n for n in there if n.endswith(".gin")])
        raise ValueError(f"The gin file must exist. Received: {path!r}, which is not a file.{near}")
    with _explained(path):
        gin.parse_config_file(path)


def _text():
    return gin.config_str().rstrip() + "\n"


def _check_writable(config):
    """Raises ValueError for a value that a gin file can hold but `gin.config_str` cannot write: 1e999."""
    for (scope, selector), parameters in config.items():
        for parameter, value in parameters.items():
            if any(
                isinstance(v, float) and not math.isfinite(v)
                for v in gin_config._iterate_flattened_values(value)
            ):
                name = scope if selector == _MACRO else f"{selector}.{parameter}"
                raise ValueError(f"{name} must be finite. Received: {value!r}.")


@contextlib.contextmanager
def _explained(source):
    """Turns what gin raises while it parses `source` into a ValueError: where, what, and what to do."""
    try:
        yield
    except (SyntaxError, tokenize.TokenError) as error:
        message = error.args[0]
        where = source
        if isinstance(error, SyntaxError):
            where = f"{error.filename}, line {error.lineno}" if error.filename else source
            message = f"{error.msg} in: {(error.text or '').strip()}" if error.text else error.msg
        shell = " (which a shell must let through)" if source.startswith("binding") else ""
        raise ValueError(
            f"{where}: {_one_line(message)}. Expected NAME = value, text in quotes{shell}: NAME = 'text'."
        ) from error
    except tf.errors.OpError as error:
        raise ValueError(f"{source}: it cannot be read: {error.message}.") from error
    except (ValueError, AttributeError, NameError, ImportError, OSError, TypeError, RuntimeError) as error:
        message, *locations = re.split(r"\n  In (?=file \"|bindings string)", str(error))
        if locations and (match := re.match(r'file "(.*?)", line (\d+)', locations[0])):
            source = f"{match[1]}, line {match[2]}"
        raise ValueError(f"{source}: {_advise(_one_line(message))}") from error


def _one_line(message):
    return re.sub(r"\s*\n\s*", " ", str(message)).strip().rstrip(".")


def _advise(message):
    """Gin's message, plainer, and with the way out."""
    if match := re.fullmatch(r"Configurable '(.*)' doesn't have a parameter named '(.*)'", message):
        registered = gin_config._REGISTRY.items()
        function = next(c.wrapped for name, c in registered if f".{name}".endswith(f".{match[1]}"))
        names = [parameter.name for parameter in factories.parameters(function)]
        near = _did_you_mean(match[2], names)
        return f"{match[1]} has no parameter {match[2]!r}.{near} It has: {', '.join(names)}."
    if match := re.fullmatch(
        r"Couldn't resolve selector (.*); <(?:module|class) '(.*?)'.*> has no attribute (.*)", message
    ):
        near = _did_you_mean(match[3], dir(sys.modules.get(match[2])))
        return f"{match[1]} does not exist: {match[2]} has no {match[3]!r}.{near}"
    if match := re.fullmatch(r"'(.*)' was not provided by an import statement", message):
        return (
            f"{match[1]!r} is not imported. Import its module in the gin file (from lmscale.bodies import "
            "lstm, say) and write names as imported: lstm.lstm_body. A macro needs no import: NAME = value."
        )
    if match := re.fullmatch(r"No configurable matching (?:reference )?'(.*)'.*", message):
        return (
            f"{match[1]} is not known. The gin file must begin with `from __gin__ import "
            "dynamic_registration` and import the module."
        )
    if message.startswith("No module named"):
        return f"{message}. Only modules can be imported, not the functions and classes in them."
    if match := re.fullmatch(r"Unable to open file: (.*)\. Searched config paths: .*", message):
        return f"the included file {match[1]!r} is neither beside this file nor in the working directory."
    return f"{message}."


def _did_you_mean(name, names):
    near = difflib.get_close_matches(name, sorted(set(names)))
    return f" Did you mean {' or '.join(near)}?" if near else ""


# ----------------------------------------------------------------------- Checks: what gin parsed -> Factories


class _Resolver:
    """Follows the references from the root, and keeps account of what is met.

    Attributes:
      macros: {name: value} of the macros met.
      settings: {name: value} of the parameters met, but for those that a macro decides.
      used: {(selector, scopes): Factory}, in the order in which they are met.
    """

    def __init__(self) -> None:
        self.macros: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.used: dict[tuple[str, str], factories.Factory] = {}
        self._config = {key: dict(parameters) for key, parameters in gin_config._CONFIG.items()}
        self._defined = [scope for scope, selector in self._config if selector == _MACRO]
        self._scopes = {scope for scope, selector in self._config if selector != _MACRO}
        self._imports = gin_config.ImportManager(gin_config._IMPORTS)
        self._followed: set[tuple[str, str, str]] = set()  # (scope, selector, parameter)
        self._path: dict[tuple[str, str], str] = {}  # What is being resolved, to notice a circle.

    def root(self, cls) -> factories.Factory:
        configurable = gin_config._inverse_lookup(cls)
        if configurable is None:
            package, _, module = cls.__module__.rpartition(".")
            raise ValueError(
                f"The gin files must configure {module}.{cls.__name__}. Received: files that never name it. "
                f"Add `from {package} import {module}` and bind its parameters: "
                f"{module}.{cls.__name__}.NAME = ..."
            )
        factory = self._factory(configurable, scopes=[], name=self._name(configurable))
        factory.check_complete(())
        return factory

    def check_all_used(self):
        """Raises ValueError if something is set which the root does not lead to: it would be ignored."""
        unused = []
        for scope, selector in self._config:
            for parameter in self._config[scope, selector]:
                if (scope, selector, parameter) in self._followed:
                    continue
                if selector == _MACRO:
                    names = [name for name in self._defined if name != scope]
                    unused.append(f"macro {scope} (nothing uses %{scope}).{_did_you_mean(scope, names)}")
                else:
                    name = self._name(gin_config._REGISTRY[selector])
                    why = f"nothing refers to @{name}"
                    if selector in [used for used, _ in self.used]:
                        why = "no reference has this scope, or an inner scope overrides it"
                    unused.append(f"{scope + '/' if scope else ''}{name}.{parameter} ({why}).")
        if unused:
            raise ValueError(
                f"Every setting must have an effect. Received, without any: {' '.join(unused)} "
                "Remove what is not meant, or refer to it."
            )

    def _name(self, configurable):
        self._imports.require_configurable(configurable)
        return self._imports.minimal_selector(configurable)

    def _factory(self, configurable, *, scopes, name) -> factories.Factory:
        selector, function = configurable.selector, configurable.wrapped
        while scopes and not any(f"{scope}/".startswith("/".join([*scopes, ""])) for scope in self._scopes):
            scopes = scopes[:-1]  # Nothing is bound in it: most often the name of a macro, a scope to gin.
        key = (selector, "/".join(scopes))
        if key in self.used and key not in self._path:
            return self.used[key]
        bound = {}
        for depth in range(len(scopes) + 1):
            scope = "/".join(scopes[:depth])
            for parameter, value in self._config.get((scope, selector), {}).items():
                bound[parameter] = (scope, value)
        arguments = []
        self.used[key] = factories.Factory(name=name, function=function, arguments=())  # Keeps its place.
        with self._following(key, name):
            # Parts last: of a macro of the wrong type, the error then names the outermost use.
            for parameter, (scope, value) in sorted(bound.items(), key=lambda item: _is_part(item[1][1])):
                self._followed.add((scope, selector, parameter))
                where = f"{scope + '/' if scope else ''}{self._name(configurable)}.{parameter}"
                resolved = self._value(value, scopes=scopes, where=where)
                if not factories.fits(resolved, factories.annotations(function).get(parameter, Any)):
                    raise factories.wrong_type(where, resolved, function=function, macro=_macro_name(value))
                arguments.append((parameter, resolved))
        self.used[key] = factories.Factory(name=name, function=function, arguments=tuple(arguments))
        # Not the functions and objects among the defaults: as text, they hold an address.
        values = {
            parameter.name: parameter.default
            for parameter in factories.parameters(function)
            if isinstance(parameter.default, bool | int | float | str | tuple | None)
        }
        values |= arguments
        by_macro = {parameter for parameter, (_, value) in bound.items() if _macro_name(value) is not None}
        prefix = "/".join([*scopes, self._name(configurable)])
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
        if not isinstance(value, gin_config.ConfigurableReference):
            return value
        name = "/".join(value.scopes)
        if value.configurable.wrapped is gin_config.macro:
            return self._macro(name, where=where)
        if value.configurable.wrapped is gin_config._retrieve_constant:
            constant = gin_config._CONSTANTS[name]
            if constant is gin.REQUIRED:
                raise ValueError(
                    f"{where} must be set. Received: no value (it is marked as required). Add the line "
                    f"{where} = ... to a gin file, or pass it as --gin_param."
                )
            return constant
        if value.configurable.wrapped is gin_config.singleton:
            raise ValueError(
                f"{where} must not be a gin.singleton. Received: @{value.scoped_selector}. Use a macro."
            )
        name = "/".join([*value.scopes, self._name(value.configurable)])
        factory = self._factory(value.configurable, scopes=value.scopes or scopes, name=name)
        if not value.evaluate:
            return factory
        factory.check_complete(())
        return factories.Result(factory)

    def _macro(self, name, *, where):
        bound = self._config.get((name, _MACRO))
        if bound is None or str(bound["value"]) == "%gin.REQUIRED":
            received = "no such macro" if bound is None else "none (it is marked as required)"
            near = _did_you_mean(name, [other for other in self._defined if other != name])
            raise ValueError(
                f"The macro {name}, which {where} uses, must have a value. Received: {received}.{near} "
                f"Add the line {name} = ... to a gin file, or pass --gin_param='{name} = ...'."
            )
        self._followed.add((name, _MACRO, "value"))
        with self._following((_MACRO, name), f"%{name}"):
            value = self._value(bound["value"], scopes=name.split("/"), where=where)
        self.macros[name] = _plain(value)
        return value

    @contextlib.contextmanager
    def _following(self, key, name):
        if key in self._path:
            circle = " -> ".join([*self._path.values(), name])
            raise ValueError(f"A setting must not refer to itself. Received: {circle}.")
        self._path[key] = name
        yield
        del self._path[key]


def _macro_name(value):
    """The macro at the end of `%A` (where A = %B, B), which is the one to change; None for anything else."""
    name = None
    while (
        isinstance(value, gin_config.ConfigurableReference) and value.configurable.wrapped is gin_config.macro
    ):
        name = "/".join(value.scopes)
        value = gin_config._CONFIG[name, _MACRO]["value"]
    return name


def _is_part(value):
    return (
        isinstance(value, gin_config.ConfigurableReference)
        and value.configurable.wrapped is not gin_config.macro
    )


def _plain(value):
    return value if isinstance(value, bool | int | float | str | None) else factories.spell(value)


def _assignments(text) -> dict[str, str]:
    """{name: value} of a configuration's `text`, values as text on one line."""
    statements: list[str] = []
    for line in text.splitlines():
        if line[:1].isspace() and statements:
            statements[-1] += " " + line.strip()
        elif line and not line.startswith(("#", "import ", "from ")):
            statements.append(line.removesuffix("\\").strip())
    return {name: value.strip() for name, _, value in (s.partition(" =") for s in statements)}
