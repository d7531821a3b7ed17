"""Write the page of every operation of the HTTP API, from the service's own description of itself (OpenAPI)."""

from __future__ import annotations

from typing import Any

from docs import tables

HEAD = """# Every operation

Made from the interface description of the service (`/openapi.json`). [Conventions, routes and errors](api.md) are on a
page of their own; `/docs` on a running service lets you try each operation.
"""

Schema = dict[str, Any]


def page() -> str:
    """The whole page, as Markdown."""
    description = tables.said().description
    parts = [HEAD]
    operations = tables.routes()
    for tag in dict.fromkeys(_tag(operation) for _, _, operation in operations):
        parts.append(f"## {tag.capitalize()}\n")
        parts += [
            _operation(method, path, operation) for method, path, operation in operations if _tag(operation) == tag
        ]
    parts.append("## Models\n\nWhat JSON bodies hold.\n")
    parts += [_model(name, schema) for name, schema in sorted(description["components"]["schemas"].items())]
    return "\n".join(parts)


def _tag(operation: Schema) -> str:
    return str((operation.get("tags") or ["service"])[0])


def _operation(method: str, path: str, operation: Schema) -> str:
    lines = [f"### `{method} {path}`", "", operation.get("description") or operation["summary"], ""]
    lines += [f"Needs: {_needs(method, path)}.", ""]
    parameters = operation.get("parameters", ())
    if parameters:
        lines += ["| parameter | in | type | meaning |", "|---|---|---|---|"]
        for each in parameters:
            meaning = tables.one_line(each.get("description") or each["schema"].get("description") or "")
            name = f"`{each['name']}`" + (" (required)" if each.get("required") and each["in"] != "path" else "")
            lines.append(f"| {name} | {each['in']} | {type_of(each['schema'])} | {meaning} |")
        lines.append("")
    body = operation.get("requestBody", {}).get("content", {})
    if body:
        lines += [f"Body: {_content(body)}.", ""]
    lines += ["| status | answer | headers |", "|---|---|---|"]
    for status, answer in sorted(operation["responses"].items()):
        said = tables.one_line(answer["description"]).removesuffix(".")
        content = "" if "problem+json" in "".join(answer.get("content", {})) else _content(answer.get("content", {}))
        headers = ", ".join(f"`{name}`" for name in answer.get("headers", ()))
        said = "done" if said == "Successful Response" else said
        lines.append(f"| {status} | {': '.join(filter(None, (said, content)))} | {headers} |")
    return "\n".join([*lines, ""])


def _needs(method: str, path: str) -> str:
    needed = tables.needs(method, path)
    return "no token" if needed == "-" else f"a token with the scope {needed.replace(', ', ' for ')}"


def _content(content: Schema) -> str:
    return ", ".join(
        f"`{kind}`" + ("" if (shape := type_of(media.get("schema", {}))) in ("binary", "any") else f" {shape}")
        for kind, media in content.items()
    )


def _model(name: str, schema: Schema) -> str:
    lines = [f"### {name}", "", tables.one_line(schema.get("description", "")), ""]
    properties = schema.get("properties", {})
    if properties:
        lines += ["| field | type | meaning |", "|---|---|---|"]
        for field, each in properties.items():
            needed = " (required)" if field in schema.get("required", ()) else ""
            lines.append(f"| `{field}`{needed} | {type_of(each)} | {tables.one_line(each.get('description', ''))} |")
        lines.append("")
    return "\n".join(lines)


def type_of(schema: Schema) -> str:
    """A schema in a few words: `integer 0..8192, 4 if left out`, a list, a link to a model."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [type_of(each) for each in schema.get("anyOf") or schema["oneOf"]]
        return " or ".join(dict.fromkeys(kinds)) + _default(schema)
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum") or [schema["const"]]) + _default(schema)
    kind = schema.get("type")
    if kind == "array":
        return f"list of {type_of(schema.get('items', {}))}" + _default(schema)
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"names with {type_of(schema['additionalProperties'])}"
    if kind == "string":
        return f"{'binary' if schema.get('format') == 'binary' else schema.get('format', 'text')}" + _default(schema)
    if kind in ("integer", "number"):
        return str(kind) + _range(schema) + _default(schema)
    return str(kind or "any") + _default(schema)


def _range(schema: Schema) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'above' if 'exclusiveMinimum' in schema else 'from'} {low}"
    return f" {'above ' if 'exclusiveMinimum' in schema else ''}{low if low is not None else ''}..{high}"


def _default(schema: Schema) -> str:
    given = schema.get("default")
    return "" if given is None or given == "" else f", `{given}` if left out"
