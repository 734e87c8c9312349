"""Arguments that come as text get the types of the tool's schema."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_worker.gateway.arguments import typed

TREE = {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "integer"}]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "12.5", "12.5"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "12", 12),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "array"}, '["a", 1]', ["a", 1]),
        ({"type": "object"}, '{"a": {}}', {"a": {}}),
        ({"type": "object"}, "{broken", "{broken"),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "nothing", "nothing"),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"$ref": "#/$defs/tree"}, "7", 7),
        ({"$ref": "#/$defs/nothing"}, "7", "7"),
        ({"enum": ["a", "b"]}, "a", "a"),
        ({}, "7", "7"),
        ("not a schema", "7", "7"),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
    ],
)
def test_examples(schema: Any, text: str, value: Any) -> None:
    parameters = {"properties": {"x": schema}, "$defs": {"tree": TREE}}
    got = typed(text, "x", parameters)
    assert (got, type(got)) == (value, type(value))


def test_a_name_that_the_schema_lacks_is_text() -> None:
    assert typed("1", "y", {"properties": {"x": {"type": "integer"}}}) == "1"
    assert typed("1", "y", {"properties": ["x"]}) == "1"
    assert typed("1", "y", {}) == "1"
