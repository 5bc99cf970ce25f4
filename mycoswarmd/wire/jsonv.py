"""Typed access to untrusted JSON: the one place where a request's JSON becomes Python values.

Rule: an error says where (`messages[3].content`), what was expected and what kind of thing was found;
never the value itself, which may be text of a prompt.
"""

import json
from collections.abc import Collection

from mycoswarmd.errors import BadRequest

# Kind names that people who write JSON know.
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


def parse_json(untrusted: bytes, *, what: str = "the request") -> object:
    """Parse a JSON text; the caller has bounded its size."""
    try:
        return json.loads(untrusted.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as exc:
        raise BadRequest("bad-request", f"cannot read {what}: it is not UTF-8 (byte {exc.start})") from exc
    except json.JSONDecodeError as exc:
        raise BadRequest(
            "bad-request", f"cannot read {what}: it is not JSON (line {exc.lineno}, column {exc.colno})"
        ) from exc
    except RecursionError as exc:
        raise BadRequest("bad-request", f"cannot read {what}: it is nested too deeply") from exc
    except ValueError as exc:  # NaN, Infinity, or an integer of thousands of digits
        raise BadRequest("bad-request", f"cannot read {what}: it has a number out of range") from exc


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def parse_object(untrusted: bytes, *, what: str = "the request") -> dict[str, object]:
    """Parse a JSON text that must be an object."""
    return as_object(parse_json(untrusted, what=what), where="")


def join(where: str, key: str) -> str:
    """Return the path of a key inside the object at `where`."""
    return f"{where}.{key}" if where else key


def bad_value(where: str, expected: str, value: object) -> BadRequest:
    """Make the error for a value of the wrong kind; says its kind and never its text."""
    found = "nothing" if value is None else _KINDS.get(type(value), "something else")
    name = repr(where) if where else "the JSON"
    return BadRequest("bad-request", f"cannot accept {name}: expected {expected}, found {found}", where=where)


def bad_range(where: str, expected: str) -> BadRequest:
    """Make the error for a value of the right kind that is out of bounds."""
    return BadRequest("bad-request", f"cannot accept {where!r}: expected {expected}", where=where)


def as_object(value: object, *, where: str) -> dict[str, object]:
    """Return the value as an object."""
    if isinstance(value, dict):
        return value
    raise bad_value(where, "an object", value)


def as_list(value: object, *, where: str, max_items: int) -> list[object]:
    """Return the value as a list of bounded length."""
    if not isinstance(value, list):
        raise bad_value(where, "a list", value)
    if len(value) > max_items:
        raise bad_range(where, f"at most {max_items} items, found {len(value)}")
    return value


def as_str(value: object, *, where: str, max_len: int, min_len: int = 0) -> str:
    """Return the value as well-formed text of bounded length in characters."""
    if not isinstance(value, str):
        raise bad_value(where, "a string", value)
    if not min_len <= len(value) <= max_len:
        raise bad_range(where, f"{min_len} to {max_len} characters, found {len(value)}")
    if not value.isascii():
        # JSON can spell half a surrogate pair, which no UTF-8 encoder takes later on.
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise bad_range(where, "well-formed Unicode, found half a surrogate pair") from exc
    return value


def as_int(value: object, *, where: str, low: int, high: int) -> int:
    """Return the value as an integer within bounds; 1.0 counts as 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_value(where, "an integer", value)
    if not low <= value <= high:
        raise bad_range(where, f"{low} to {high}")
    return value


def as_number(value: object, *, where: str, low: float, high: float) -> float:
    """Return the value as a number within bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad_value(where, "a number", value)
    if not low <= value <= high:
        raise bad_range(where, f"{low:g} to {high:g}")
    return value


def as_bool(value: object, *, where: str) -> bool:
    """Return the value as a boolean."""
    if not isinstance(value, bool):
        raise bad_value(where, "true or false", value)
    return value


def get_object(obj: dict[str, object], key: str, *, where: str) -> dict[str, object]:
    """Return a required object."""
    return as_object(obj.get(key), where=join(where, key))


def get_list(obj: dict[str, object], key: str, *, where: str, max_items: int) -> list[object]:
    """Return a required list."""
    return as_list(obj.get(key), where=join(where, key), max_items=max_items)


def get_str(
    obj: dict[str, object],
    key: str,
    *,
    where: str,
    max_len: int = 1 << 20,
    min_len: int = 0,
    default: str | None = None,
) -> str:
    """Return a string; absent or null is the default, or an error where there is none."""
    value = obj.get(key)
    if value is None and default is not None:
        return default
    return as_str(value, where=join(where, key), max_len=max_len, min_len=min_len)


def get_int(
    obj: dict[str, object],
    key: str,
    *,
    where: str,
    low: int = 0,
    high: int = 2**53,
    default: int | None = None,
) -> int:
    """Return an integer, by default any that is not negative and that JSON keeps exact."""
    value = obj.get(key)
    if value is None and default is not None:
        return default
    return as_int(value, where=join(where, key), low=low, high=high)


def get_bool(obj: dict[str, object], key: str, *, where: str, default: bool | None = None) -> bool:
    """Return a boolean; absent or null is the default, or an error where there is none."""
    value = obj.get(key)
    if value is None and default is not None:
        return default
    return as_bool(value, where=join(where, key))


def opt_str(obj: dict[str, object], key: str, *, where: str, max_len: int) -> str | None:
    """Return a string, or None where it is absent or null."""
    value = obj.get(key)
    return None if value is None else as_str(value, where=join(where, key), max_len=max_len)


def get_choice(obj: dict[str, object], key: str, *, where: str, choices: Collection[str]) -> str:
    """Return a required string that is one of a few."""
    value = get_str(obj, key, where=where, max_len=64)
    if value not in choices:
        raise bad_range(join(where, key), "one of " + ", ".join(sorted(choices)))
    return value
