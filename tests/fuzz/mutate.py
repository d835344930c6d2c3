"""Ways to spoil text, plain data and bytes; all draw from the generator they are given: a seed gives the same again."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP = "@DEEP@"
"""Where `dumps` puts a value that is too deeply nested for Python's own JSON writer."""
_LONG = "x" * 200_000

WORDS = [
    *("off", "~", "null", "true", "no", ".nan", "-.inf", "1e400", "0x", "1_0", "9" * 5000, "2020-13-45", "2020-01-01"),
    *("<<", "=", "!!binary aGk=", "!!set {a}", "!!python/object/apply:os.system [id]", "!!python/name:os.system"),
    *("!!timestamp 2020-01-01", "!local x", "!<tag:x> y", "&a", "*a", "&a [*a]", "*none", "{}", "[]", "[", "}", ":"),
    *(
        "- ",
        "? ",
        "#",
        "|",
        ">",
        "---",
        "...",
        "%YAML 9",
        "%TAG ! x",
        "\t",
        "\0",
        "\ufeff",
        "\u2028",
        "\x85",
        "\x1b[2J",
    ),
    *("\u202edcba", "\U0001f600", "\ud800", "\r", "\r\n", "'", '"', "\\", "\\u0000", "{" * 60, "[" * 3000, "- " * 200),
    *("use", "steps", "weights", "head", "rows", "experts", "stages", "data", "extends", "default", "name", "output"),
    *("./mine.py:Mine", "json:X", "a:b:c", "__main__:X", "..", "~/x", "~nobody/x", "/", "/dev/zero", "/proc/self/mem"),
    *("-1", "0", "1.5", "9223372036854775808", "1e308", "-0.0", "0o17", "1:30:00", "y" * 20_000),
]
SNIPPETS = [
    'a: &a ["x","x","x"]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nd: &d [*c,*c,*c]\ne: &e [*d,*d,*d]\nf: &f [*e,*e,*e]\n'
    "g: &g [*f,*f,*f]\nh: &h [*g,*g,*g]\ni: &i [*h,*h,*h]\nj: &j [*i,*i,*i]\n",
    "<<: {name: merged, seed: 3}\n",
    "<<: [{a: 1}, {b: 2}]\n",
    "x: &x {<<: *x}\n",
    "? [complex, key]\n: value\n",
    "? {a: b}\n: value\n",
    "---\nname: second\n",
    "...\n---\n",
    "%YAML 1.2\n---\n",
    "name: again\nname: again\n",
    "\tname: tab\n",
    "1: number\nnull: none\ntrue: yes\n2020-01-01: date\n",
    "blob: !!binary |\n  R0lGODlhDAAMAIQAAP\n",
    "thing: !!python/object/new:os.system [echo hi]\n",
    "deep: " + "{a: " * 45 + "1" + "}" * 45 + "\n",
    "deep: " + "[" * 5000 + "]" * 5000 + "\n",
    "long: " + _LONG + "\n",
    "".join(f"key{i}: {i}\n" for i in range(800)),
    "\u202ename: rtl\n",
    "# " + "\u0301" * 500 + "\n",
    "extends: spec.yaml\n",
    "extends: .\n",
    "extends: /dev/zero\n",
    "extends: [a, b]\n",
    "extends: " + "a/" * 5000 + "b.yaml\n",
    'output: "a\\0b"\n',
    "output: ../../../../../../etc/x\n",
    "output: " + "d" * 300 + "\n",
]
_ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "\0", "\ud800", "\u202eabc", "\x1b[31m", "null", "nan"),
    *(
        "../../../etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "/",
        ".",
        "..",
        "a/b",
        "~",
        "x" * 5000,
        "<script>alert(1)</script>",
    ),
    *(
        "shard.tar#0+99999999999",
        "a.parquet#audio[0]",
        "a#-1+-1",
        "\u0000\uffff",
        "\U0001f600" * 50,
        "line\nline\r\nline",
    ),
    *([], {}, [None], [[]], [{}], {"": None}, {"a": {"b": {"c": []}}}, list(range(300)), [""] * 40, "2020-01-01"),
    *({f"k{i}": i for i in range(120)}, r"$\frac{$", "y" * 300),
    DEEP,
]


def text(draw: random.Random, content: str) -> str:
    """One to four edits of a YAML text."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, length = draw.randrange(len(content) + 1), draw.randrange(1, 14)
        lines = content.splitlines(keepends=True) or [""]
        line = draw.randrange(len(lines))
        edit = draw.randrange(14)
        if edit == 0:
            content = content[:at] + content[at + length :]
        elif edit == 1:
            content = content[: at + length] + content[at:]
        elif edit == 2:
            content = content[:at] + draw.choice(WORDS) + content[at + length :]
        elif edit == 3:
            content = content[:at] + draw.choice(WORDS) + content[at:]
        elif edit == 4:
            content = "".join(lines[:line] + lines[line + 1 :])
        elif edit == 5:
            content = "".join([*lines[: line + 1], *lines[line:]])
        elif edit == 6:
            content = "".join([*lines[:line], draw.choice(SNIPPETS), *lines[line:]])
        elif edit == 7:
            content = draw.choice(SNIPPETS) + content if draw.random() < 0.5 else content + draw.choice(SNIPPETS)
        elif edit == 8:
            content = content.replace("\n", draw.choice(("\r\n", "\r", "\n\n", "\n\t", "\u2028")))
        elif edit == 9:
            content = draw.choice(("\ufeff", "\ufeff\ufeff", "\0", "\ufffe")) + content
        elif edit == 10:
            key, colon, _ = lines[line].partition(":")
            content = "".join([*lines[:line], f"{key}{colon} {draw.choice(WORDS)}\n", *lines[line + 1 :]])
        elif edit == 11:
            lines[line] = draw.choice(("", " ", "    ", "\t")) + lines[line].lstrip()
            content = "".join(lines)
        elif edit == 12:
            draw.shuffle(lines)
            content = "".join(lines)
        else:
            content = content[:at]
    return content


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested data."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def value(draw: random.Random, data: Any) -> Any:
    """Plain data with one to three places replaced, taken away, renamed, doubled or moved."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        there = places(data)[1:]
        if not there or draw.random() < 0.02:
            return draw.choice(_ODD)
        path = draw.choice(there)
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        last, edit = path[-1], draw.randrange(8)
        if edit <= 3:
            holder[last] = copy.deepcopy(draw.choice(_ODD))
        elif edit == 4:
            del holder[last]
        elif edit == 5 and isinstance(holder, dict):
            holder[draw.choice(("", "extra", "\ud800", "\0", "$x{$", f"{last} ", str(last).upper(), "x" * 300))] = (
                holder.pop(last)
            )
        elif edit == 5:
            holder.insert(last, copy.deepcopy(holder[last]))
        elif edit == 6:
            other = data
            for key in draw.choice(there):
                other = other[key]
            holder[last] = copy.deepcopy(other)
        else:
            was = holder[last]
            holder[last] = draw.choice(([was], {"value": was}, str(was), repr(was), [was, was]))
    return data


def dumps(data: Any) -> str:
    """JSON with what JSON does not have (NaN) and what its writer cannot write (deep nesting)."""
    return json.dumps(data).replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000)


def raw(draw: random.Random, content: bytes) -> bytes:
    """Bytes cut off, flipped, holed, doubled, with other lengths in their header or rubbish in them."""
    edit, at = draw.randrange(11), draw.randrange(len(content) + 1)
    head = min(len(content), 64)
    changed = bytearray(content)
    if edit == 0:
        return content[:at]
    if edit == 1:
        return content[: draw.randrange(head + 1)]
    if edit == 2:
        return content[:at] + draw.randbytes(draw.randrange(1, 200)) + content[at:]
    if edit == 3:
        return content + draw.choice((b"\0" * 100, draw.randbytes(50), content))
    if edit == 4:
        return draw.choice((b"", b"\0", b"{}", b"[]", b"null", b"PK\3\4", draw.randbytes(300), bytes(len(content))))
    if edit == 5 and head >= 8:
        size = draw.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(content), len(content) - 8))
        return size.to_bytes(8, "little") + content[8:]
    if edit == 6 and head >= 8:
        place, width = draw.randrange(head - 7), draw.choice((1, 2, 4))
        changed[place : place + width] = draw.choice((b"\xff", b"\0", b"\x7f")) * width
        return bytes(changed)
    if edit == 7:
        size = draw.randrange(1, 3000)
        return content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]
    if edit == 8:
        return content[:at] + content[at + draw.randrange(1, 500) :]
    reach = min(len(content), draw.choice((40, 400, len(content))))
    for _ in range(draw.randrange(1, 12)):
        if reach:
            changed[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    return bytes(changed)
