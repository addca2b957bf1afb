"""Gin files and bindings -> what they bind, and one text that says it all. No other module knows of gin.

A gin file names what it uses by import, so that the code it configures needs no decorators:

    from __gin__ import dynamic_registration
    from lmscale import experiment
    from lmscale.bodies import lstm
    include 'shared/defaults.gin'               # beside this file, in the working directory, or one of lmscale's own
    TRAIN_STEPS = 1_000                         # a macro
    experiment.Experiment.train_steps = %TRAIN_STEPS
    next_token.NextToken.body = @lstm.lstm_body             # the function itself
    groups.Group.update = @update_rules.Adagrad()           # what it returns

Gin has one configuration for the whole process, reads files in its own way and explains little. What it takes to do
otherwise, by names that are private to it, is all here.
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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import tensorflow as tf
from gin import config as gin_config
from gin import config_parser

from lmscale import factories, paths

logger = logging.getLogger(__name__)

# Local and remote paths alike. (gin.tf, which is meant for that, asks for tf.estimator, which is gone.)
_FILE_SYSTEM = tf.io.gfile
_MACRO = "gin.macro"
_MOVED = {
    "losses": "lmscale.softmax",
    "models": "lmscale.bodies",
    "vocabulary": "lmscale.softmax (samplers), lmscale.tables (table) and lmscale.parameters (row_optimizers, now "
    "update_rules)",
}


class _Required:
    """Stands for `%gin.REQUIRED`: no value, though one is needed."""


REQUIRED = _Required()
SINGLETON = gin_config.singleton


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configurable:
    """A function or class that gin knows.

    Attributes:
      selector: gin's own name for it.
      name: as the text spells it, by the imports of the text.
      function: what it is.
    """

    selector: str
    name: str
    function: Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """`@scopes/name`, or `@scopes/name()` if `is_call`."""

    configurable: Configurable
    scopes: tuple[str, ...]
    is_call: bool


@dataclasses.dataclass(frozen=True)
class MacroReference:
    """`%name`."""

    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bindings:
    """What a text binds. Values are Python's, but for a `Reference`, a `MacroReference` or `REQUIRED` among them.

    Attributes:
      macros: {name: value}.
      parameters: {(scope, selector): {parameter: value}}; the scope is "a/b", or "" for none.
      configurables: {selector: Configurable} of all that are bound or referred to.
    """

    macros: Mapping[str, Any]
    parameters: Mapping[tuple[str, str], Mapping[str, Any]]
    configurables: Mapping[str, Configurable]


def read(gin_files: Sequence[str], bindings: Sequence[str] = ()) -> str:
    """Merges files and bindings into one text.

    Args:
      gin_files: paths, later ones win over earlier ones. What is not there is looked for among the configurations
        that come with lmscale: `quickstart.gin`.
      bindings: `NAME = value` each, with the names that the files import; they win.

    Returns:
      All of it as one gin file, which holds nothing of where it was read from.

    Raises:
      ValueError: for what gin cannot read, naming the file and line or the binding, and what to do.
    """
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
        return _text()


def parse(text: str) -> Bindings:
    """What a text that `read` returned binds.

    Raises:
      ValueError: as of `read`.
      RuntimeError: if the text does not say all that gin reads in it.
    """
    with _cleared_gin():
        with _explained("the resolved configuration"):
            gin.parse_config(text)
        if _text() != text:
            raise RuntimeError(
                f"gin reads its own text back as another configuration:\n{text}\n---\n{_text()}"
            )
        configurables = _Configurables()
        macros, parameters = {}, {}
        for (scope, selector), bound in gin_config._CONFIG.items():
            values = {name: _converted(value, configurables) for name, value in bound.items()}
            if selector == _MACRO:
                macros[scope] = values["value"]
            else:
                configurables.add(gin_config._REGISTRY[selector])
                parameters[scope, selector] = values
        return Bindings(macros=macros, parameters=parameters, configurables=configurables.by_selector)


def assignments(text: str) -> dict[str, str]:
    """{name: value} of a text that `read` returned, values as text on one line."""
    statements: list[str] = []
    for line in text.splitlines():
        if line[:1].isspace() and statements:
            statements[-1] += " " + line.strip()
        elif line and not line.startswith(("#", "import ", "from ")):
            statements.append(line.removesuffix("\\").strip())
    return {name: value.strip() for name, _, value in (s.partition(" =") for s in statements)}


def macro_users(text: str) -> dict[str, set[str]]:
    """{macro: names of the settings of a text that it decides}, directly or by way of other macros."""
    users: dict[str, set[str]] = {}
    for statement in _statements(text, name="text"):
        if isinstance(statement, config_parser.BindingStatement):
            for value in gin_config._iterate_flattened_values(statement.value):
                if isinstance(value, MacroReference):
                    users.setdefault(value.name, set()).add(_written_name(statement))
    for _ in users:  # As often as a chain of macros can be long.
        for settings in users.values():
            settings |= {user for setting in settings for user in users.get(setting, ())}
    return users


def did_you_mean(name: str, names: typing.Iterable[str]) -> str:
    """` Did you mean ...?` with those of the names that resemble one, or nothing."""
    near = difflib.get_close_matches(name, sorted(set(names)))
    return f" Did you mean {' or '.join(near)}?" if near else ""


class _Configurables:
    """Gin's configurables as `Configurable`s, named by the imports of what is parsed."""

    def __init__(self):
        self.by_selector: dict[str, Configurable] = {}
        self._imports = gin_config.ImportManager(gin_config._IMPORTS)

    def add(self, configurable) -> Configurable:
        selector = configurable.selector
        if selector not in self.by_selector:
            self._imports.require_configurable(configurable)
            self.by_selector[selector] = Configurable(
                selector=selector,
                name=self._imports.minimal_selector(configurable),
                function=configurable.wrapped,
            )
        return self.by_selector[selector]


def _converted(value, configurables):
    """A value of gin's with our own references in it."""
    if isinstance(value, list | tuple):
        return type(value)(_converted(v, configurables) for v in value)
    if isinstance(value, dict):
        return {k: _converted(v, configurables) for k, v in value.items()}
    if not isinstance(value, gin_config.ConfigurableReference):
        return value
    if value.configurable.wrapped is gin_config.macro:
        return MacroReference("/".join(value.scopes))
    if value.configurable.wrapped is gin_config._retrieve_constant:
        constant = gin_config._CONSTANTS["/".join(value.scopes)]
        return REQUIRED if constant is gin.REQUIRED else constant
    return Reference(
        configurable=configurables.add(value.configurable),
        scopes=tuple(value.scopes),
        is_call=value.evaluate,
    )


# ------------------------------------------------------------------------------ Gin's one state, and its files


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
    """Opens gin files: a name is looked for beside the file that includes it, as it stands, then among lmscale's own.

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
        names = [os.path.join(os.path.dirname(file.path), name) for file in cls._open_files[-1:]]
        names += [name, os.path.join(paths.CONFIGS, name)]
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


class _NothingImported(config_parser.ParserDelegate):
    """For statements of which only the names, the macros and the places matter."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return None

    def macro(self, macro_name):
        return MacroReference(macro_name)


def _statements(text, *, name):
    """The statements of a gin file, up to one that is wrong, of which gin will tell."""
    statements = []
    with contextlib.suppress(SyntaxError, tokenize.TokenError):
        statements.extend(config_parser.ConfigParser(_NamedText(text, name=name), _NothingImported()))
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
        near = did_you_mean(name, [n for n in [*there, *os.listdir(paths.CONFIGS)] if n.endswith(".gin")])
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
            # Where Python has something to say, it is the address of an object.
            message = re.sub(r"malformed node or string.*\n\s*", "", error.msg)
            message = f"{message} in: {error.text.strip()}" if error.text else message
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
        near = did_you_mean(match[2], names)
        return f"{match[1]} has no parameter {match[2]!r}.{near} It has: {', '.join(names)}."
    if match := re.fullmatch(
        r"Couldn't resolve selector (.*); <(?:module|class) '(.*?)'.*> has no attribute (.*)", message
    ):
        near = did_you_mean(match[3], dir(sys.modules.get(match[2])))
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
    if (match := re.match(r"No module named 'lmscale\.(\w+)", message)) and match[1] in _MOVED:
        return (
            f"{message}. The modules that version 0.1.0 had in lmscale.{match[1]} are in {_MOVED[match[1]]} now. "
            "Write so in the gin file; CHANGELOG.md tells more."
        )
    if message.startswith("No module named"):
        return f"{message}. Only modules can be imported, not the functions and classes in them."
    if match := re.fullmatch(r"Unable to open file: (.*)\. Searched config paths: .*", message):
        return (
            f"the included file {match[1]!r} is neither beside this file, nor in the working directory, nor one of "
            f"those that come with lmscale ({paths.CONFIGS})."
        )
    return f"{message}."
