"""Groups: which parameters start, move, rest and are clipped in which way, by patterns over their paths.

A configuration lists groups in order. Each names parameters by a pattern and says something about them: their update
rule, when they are active, the bound on their gradient's norm, their initialiser. What a group leaves out is left to
the groups after it: of each of these, a parameter takes the first that a matching group gives. So one line sets an
initialiser, and another, for many more parameters, the update rule.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence

import keras

from lmscale.parameters.activity import Activity, Always, Never
from lmscale.parameters.update_rules import UpdateRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """What is said about the parameters whose whole path matches `pattern`. None: left to the groups after it.

    Attributes:
      pattern: regular expression over paths, such as 'tables/words/embedding' or 'layers/.*/recurrent_kernel'.
      update: rule by which they are updated.
      active: when they are; `Always` unless a group says otherwise. Parameters that are `Never` active need no rule.
      clip_norm: bound on the norm of the gradient of the parameters that take it from this group, together. Those that
        take none from any group share the experiment's.
      initializer: what they start from; unless a group says otherwise, what the layer or the table says.
    """

    pattern: str
    update: UpdateRule | None = None
    active: Activity | None = None
    clip_norm: float | None = None
    initializer: keras.initializers.Initializer | None = None

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"Group.pattern must be a regular expression. Received: {self.pattern!r} ({error})."
            ) from error
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"Group.clip_norm must be positive or None. Received: clip_norm={self.clip_norm}, of the group "
                f"{self.pattern!r}."
            )
        if all(getattr(self, name) is None for name in _SAID):
            raise ValueError(
                f"A group must say something about its parameters. Received: the group {self.pattern!r} without any of "
                f"{', '.join(_SAID)}. Give it one, or remove it."
            )


_SAID = ("update", "active", "clip_norm", "initializer")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A bound on the norm of the gradient of all parameters that take it from the group of this pattern."""

    group: str
    norm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Treatment:
    """What the groups say about one parameter.

    Attributes:
      update: its rule; None for a parameter that is never active.
      active: when it is updated.
      clip: the group that bounds its gradient's norm, and the bound; None for the experiment's.
      initializer: None for what the layer or the table says.
      group: pattern of the group that gives the rule, or that freezes it.
    """

    update: UpdateRule | None
    active: Activity
    clip: Clip | None
    initializer: keras.initializers.Initializer | None
    group: str


def treat(groups: Sequence[Group], paths: Sequence[str]) -> Mapping[str, Treatment]:
    """Finds what the groups say about each parameter.

    Args:
      groups: in order.
      paths: of the parameters that may be trained.

    Returns:
      {path: Treatment}.

    Raises:
      ValueError: for a group that matches nothing, or decides nothing because of those before it, and for a parameter
        without an update rule; with the nearest paths and patterns.
    """
    deciding: set[int] = set()
    treatments = {}
    for path in paths:
        matching = [(i, g) for i, g in enumerate(groups) if re.fullmatch(g.pattern, path)]
        first = {
            name: next(((i, g) for i, g in matching if getattr(g, name) is not None), None) for name in _SAID
        }
        said = {name: getattr(found[1], name) if found else None for name, found in first.items()}
        active = said["active"] or Always()
        if said["update"] is None and not isinstance(active, Never):
            raise ValueError(
                f"Every parameter needs a group that says how it is updated. Received: none for {path}; "
                f"the groups with an update rule are {_listed(g.pattern for g in groups if g.update)}. Add one, or "
                "freeze it by a group with active = @Never()."
            )
        if isinstance(active, Never):
            first["update"] = first["clip_norm"] = (
                None  # Of no effect: a group that says only that decides nothing.
            )
        deciding |= {found[0] for found in first.values() if found}
        deciding_group = first["active"] if isinstance(active, Never) else first["update"]
        assert deciding_group is not None
        treatments[path] = Treatment(
            update=None if isinstance(active, Never) else said["update"],
            active=active,
            clip=_clip(first["clip_norm"][1]) if first["clip_norm"] else None,
            initializer=said["initializer"],
            group=deciding_group[1].pattern,
        )
    for i, group in enumerate(groups):
        if not any(re.fullmatch(group.pattern, path) for path in paths):
            near = difflib.get_close_matches(group.pattern, paths, n=3, cutoff=0.3) or sorted(paths)[:5]
            raise ValueError(
                f"The pattern of a group must match a parameter's whole path. Received: {group.pattern!r}, which "
                f"matches none. Near: {_listed(near)}. Without this group, --dry_run lists all paths."
            )
        if i not in deciding:
            matched = [treatments[path] for path in paths if re.fullmatch(group.pattern, path)]
            frozen_by = {treatment.group for treatment in matched if treatment.update is None}
            if all(treatment.update is None for treatment in matched):
                raise ValueError(
                    f"A group must decide something. Received: the group {group.pattern!r}, all of whose parameters "
                    f"are frozen by {_listed(sorted(frozen_by))}. Give it active = @Always(), or remove one of them."
                )
            raise ValueError(
                f"A group must decide something. Received: the group {group.pattern!r}, after groups that decide all "
                "it says. Put the narrower pattern first."
            )
    return treatments


def _clip(group: Group) -> Clip:
    assert group.clip_norm is not None
    return Clip(group.pattern, group.clip_norm)


def _listed(names) -> str:
    return ", ".join(repr(name) for name in names) or "none"
