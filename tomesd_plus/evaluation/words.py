"""Words for tables and terminals."""

from collections.abc import Mapping


def in_words(skipped: Mapping[str, int]) -> str:
    """Reasons with their numbers, the most frequent first.

    Example:
        >>> in_words({"hidden": 1, "damaged or truncated": 3})
        '3 × damaged or truncated, 1 × hidden'
    """
    ordered = sorted(skipped.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{count} × {reason}" for reason, count in ordered)


def printable(name: object) -> str:
    r"""A file's name for tables and terminals: line breaks, and bytes that are not UTF-8, as escapes.

    Example:
        >>> print(printable("two" + chr(10) + "lines.png"))
        two\nlines.png
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in str(name)
    )
