"""Arguments of a tool call that came as text, given the types that the tool's JSON schema says.

What does not fit its type stays text: whoever offered the tool validates, and can tell the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

_PYTHONS = {"True": "true", "False": "false", "None": "null"}  # models write these, too
_FITS: dict[str, Callable[[Any], bool]] = {  # strings are not among them: they need no parsing
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def typed(text: str, name: str, parameters: Mapping[str, Any]) -> Any:
    """The value of parameter `name`; `parameters` is the JSON schema of all of them."""
    properties = parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    fits = [_FITS[kind] for kind in _types(schema, parameters) if kind in _FITS]
    if not fits:
        return text
    try:
        value = strict_json(_PYTHONS.get(text.strip(), text))
    except ValueError:
        return text
    return value if any(fit(value) for fit in fits) else text


def strict_json(text: str) -> Any:
    """What JSON says. ValueError if it is none, or has what cannot be sent on: NaN, lone surrogates."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _types(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """Names of the types that `schema` allows, as far as it says."""
    types: set[str] = set()
    seen: set[int] = set()  # a schema may contain itself, by references
    todo = [schema]
    while todo:
        node = todo.pop()
        if not isinstance(node, Mapping) or id(node) in seen:
            continue
        seen.add(id(node))
        given = node.get("type")
        types.update(
            kind for kind in (given if isinstance(given, list) else [given]) if isinstance(kind, str)
        )
        for alternatives in (node.get("anyOf"), node.get("oneOf"), node.get("allOf")):
            todo += alternatives if isinstance(alternatives, list) else []
        if isinstance(reference := node.get("$ref"), str):
            todo.append(_resolved(reference, root))
    return types


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference within the schema points to; None if there is nothing."""
    node: Any = root
    for part in reference.removeprefix("#/").split("/"):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
