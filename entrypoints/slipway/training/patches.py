"""The only way in which Slipway changes NeMo, Megatron, Lightning or torch: by name, and for one version of each.

A patch for one version can do silent harm to another version: it can undo what upstream has repaired since, or set an
attribute that is not read any more. So every change goes through `replace`,
`wrap` or `define`, which stop if the version or the attribute is not the expected one.

To raise a pin, change the version here and run tests/training/test_repairs.py and test_parallel.py. They show for each
patch that upstream is still wrong without it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from slipway.errors import PreflightError


@dataclass(frozen=True)
class Upstream:
    """A package, and the version of it that the patches were written for."""

    package: str
    version: str


MEGATRON = Upstream("megatron-core", "0.15.3")
NEMO = Upstream("nemo_toolkit", "2.7.3")
LIGHTNING = Upstream("lightning", "2.4.0")
TORCH = Upstream("torch", "2.11.0")
TRANSFORMER_ENGINE = Upstream("transformer_engine", "2.9.0")

MISSING = object()
CURE = "install the locked versions with `make setup`, or use the image"


@dataclass(frozen=True)
class Patch:
    """One attribute that was changed; `before` is MISSING where it did not exist, `by` the name of the change."""

    owner: Any
    name: str
    before: Any
    after: Any
    by: str


# Full name of the attribute → its patch, for modules and classes: an instance lives as long as its run.
APPLIED: dict[str, Patch] = {}


def replace(owner: Any, name: str, new: Any, upstream: Upstream) -> None:
    """Put `new` in the place of an attribute that upstream defines.

    Args:
        owner: the module, class or object that has the attribute.
        upstream: the package that the owner belongs to.

    Errors: PreflightError where the attribute does not exist or the package has another version.
    """
    _change(owner, name, lambda _: new, upstream, by=_name_of(new))


def wrap(owner: Any, name: str, make: Callable[[Any], Any], upstream: Upstream) -> None:
    """Replace an attribute by what `make` makes of it. A second call with the same function changes nothing.

    Errors: those of `replace`; RuntimeError where the attribute is changed by another function already.
    """
    _change(owner, name, make, upstream, by=_name_of(make))


def _change(owner: Any, name: str, make: Callable[[Any], Any], upstream: Upstream, by: str) -> None:
    before = _found(owner, name, upstream)
    if before is MISSING:
        raise PreflightError(f"{upstream.package} {upstream.version} has no {full_name(owner, name)}; {CURE}")
    _apply(owner, name, before, make, by)


def _name_of(change: Any) -> str:
    """Of a function or class, or of the kind of another object."""
    change = getattr(change, "func", change)  # of a partial
    return getattr(change, "__qualname__", type(change).__qualname__)


def define(owner: Any, name: str, value: Any, upstream: Upstream) -> None:
    """Add an attribute that upstream uses without defining it. A second call changes nothing.

    Errors: PreflightError where upstream defines it after all, or the package has another version.
    """
    before = _found(owner, name, upstream)
    if before is not MISSING and not _is_applied(owner, name, before):
        raise PreflightError(f"{upstream.package} {upstream.version} has its own {full_name(owner, name)}; {CURE}")
    _apply(owner, name, before, lambda _: value, _name_of(value))


def _found(owner: Any, name: str, upstream: Upstream) -> Any:
    """The attribute, or MISSING; PreflightError where the package has another version than the patch is for."""
    if installed(upstream.package) != upstream.version:
        raise PreflightError(
            f"{upstream.package} is version {installed(upstream.package)}, but Slipway changes "
            f"{full_name(owner, name)} of version {upstream.version}; {CURE}"
        )
    return getattr(owner, name, MISSING)


def _apply(owner: Any, name: str, before: Any, make: Callable[[Any], Any], by: str) -> None:
    if _is_applied(owner, name, before):
        known = APPLIED[full_name(owner, name)].by
        if known != by:  # left out in silence, it would be missed by nobody
            raise RuntimeError(
                f"{full_name(owner, name)} is changed by {known} already: make one change of it and {by}"
            )
        return
    setattr(owner, name, make(before))
    # getattr, because a class gives a function or a descriptor back in another form than it was given.
    if isinstance(owner, (ModuleType, type)):
        APPLIED[full_name(owner, name)] = Patch(owner, name, before, getattr(owner, name), by)


def _is_applied(owner: Any, name: str, found: Any) -> bool:
    # Compared with what is there now: it may have been put back since, and another object may have the same name.
    patch = APPLIED.get(full_name(owner, name))
    return patch is not None and patch.owner is owner and patch.after is found


def full_name(owner: Any, name: str) -> str:
    """The attribute as an error names it: module.attribute or module.Class.attribute."""
    if isinstance(owner, ModuleType):
        return f"{owner.__name__}.{name}"
    kind = owner if isinstance(owner, type) else type(owner)
    return f"{kind.__module__}.{kind.__qualname__}.{name}"


@functools.cache
def installed(package: str) -> str:
    """The version of a package, without what its builder added to it (2.11.0+cpu is 2.11.0)."""
    return importlib.metadata.version(package).partition("+")[0]
