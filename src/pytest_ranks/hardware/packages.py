"""Which modules and distributions are installed, found without importing any."""

from __future__ import annotations


def has_module(name: str) -> bool:
    """Return whether a module can be found, importing neither it nor its parents."""
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    top, *rest = name.split(".")
    try:
        spec = find_spec(top)
    except ValueError:
        # It is in sys.modules without a spec: somebody made it by hand.
        return not rest
    for position in range(len(rest)):
        if spec is None or spec.submodule_search_locations is None:
            return False
        child = ".".join([top, *rest[: position + 1]])
        spec = PathFinder.find_spec(child, spec.submodule_search_locations)
    return spec is not None


def installed_version(name: str) -> str | None:
    """Return the version of the distribution of that name, or of the one that has that module."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        owners = metadata.packages_distributions().get(name.partition(".")[0], [])
        return metadata.version(owners[0]) if owners else None
