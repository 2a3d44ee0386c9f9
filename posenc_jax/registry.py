"""Classes that a table names, such as encodings and tasks. A module is imported when a class of it is looked up."""

import importlib
from collections.abc import Mapping
from typing import Any

from posenc_jax.schema import ConfigError


def find(table: Mapping[str, str], package: str, name: Any, field: str) -> Any:
    """The class with a name in a table, whose values are files and classes of a package, such as "bias.ALiBi".

    Raises ConfigError, naming `field`, for a name that is not in the table.
    """
    if not isinstance(name, str) or name not in table:
        own = f"a class of your own needs a row in TABLE of {package.replace('.', '/')}/__init__.py"
        raise ConfigError(field, name, f"must be one of: {', '.join(table)}; {own}", table)
    file, class_name = table[name].split(".")
    return getattr(importlib.import_module(f"{package}.{file}"), class_name)
