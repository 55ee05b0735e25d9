"""The API reference as Markdown, made from the server's own OpenAPI description.

python -m finetune.serving.reference > docs/serving-api.md
"""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.serving.app import bare_app

HEAD = """\
# API reference of `ft serve`

Made from the server's OpenAPI description, which a running server shows at `/openapi.json`. The guide is
[serving.md](serving.md). Unknown fields are refused; "Not supported" marks fields that clients may send with the value
that changes nothing. Every refusal is `{"error": {"message", "type", "param", "code"}}`.
"""

Schema = Mapping[str, Any]


def reference() -> str:
    """All of the page."""
    described = bare_app("any").openapi()
    return "\n".join([HEAD, *_operations(described), *_refusals(described), *_objects(described)])


def _operations(described: Schema) -> Iterator[str]:
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            yield f"## {method.upper()} {path}\n\n{operation['description']}\n"
            if body := operation.get("requestBody"):
                schema = body["content"]["application/json"]["schema"]
                yield f"Body: {_type(schema)}.\n"
            yield from _answers(operation["responses"])


def _answers(responses: Schema) -> Iterator[str]:
    schema = responses["200"].get("content", {}).get("application/json", {}).get("schema")
    others = ", ".join(status for status in sorted(responses) if status != "200")
    yield f"Answer: {_type(schema) if schema else 'text'}. Refusals: {others}.\n"


def _refusals(described: Schema) -> Iterator[str]:
    yield "## Refusals\n\n| status | meaning |\n|---|---|"
    operations = (operation for path in described["paths"].values() for operation in path.values())
    responses = {status: found for operation in operations for status, found in operation["responses"].items()}
    del responses["200"]
    yield from (f"| {status} | {found['description']} |" for status, found in sorted(responses.items()))
    yield ""


def _objects(described: Schema) -> Iterator[str]:
    for name, schema in sorted(described["components"]["schemas"].items()):
        yield f"## {name}\n\n{schema.get('description', '')}\n\n| field | type | |\n|---|---|---|"
        required = schema.get("required", ())
        for field, value in schema.get("properties", {}).items():
            notes = ["required"] if field in required else []
            notes += [text for text in (_range(value), value.get("description", "")) if text]
            yield f"| `{field}` | {_type(value)} | {'; '.join(notes)} |"
        yield ""


def _type(schema: Schema) -> str:
    """A type in words, with links to objects."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[key]))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    return str(schema.get("type", "anything"))


def _range(schema: Schema) -> str:
    """Bounds of a number, or of a text's or list's length."""
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    words |= {"minLength": "length at least", "maxLength": "length at most"}
    words |= {"minItems": "at least {} items", "maxItems": "at most {} items"}
    found = []
    for part in (schema, *schema.get("anyOf", ())):
        for key, text in words.items():
            if key in part:
                found.append(text.format(part[key]) if "{}" in text else f"{text} {part[key]}")
    return ", ".join(dict.fromkeys(found))


if __name__ == "__main__":
    sys.stdout.write(reference())
