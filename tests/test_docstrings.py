"""What public names say of themselves: their arguments, and the errors that they raise."""

import ast
import inspect
import re
import textwrap

import pytest

import tomesd_plus
from tomesd_plus import tomesd

REFERS = re.compile(r"takes what :(func|class):`|Undo :func:`")  # to another's arguments


def public_callables():
    """Functions, classes and their public methods, by name."""
    things = {name: getattr(tomesd_plus, name) for name in tomesd_plus.__all__}
    things |= {f"tomesd.{name}": getattr(tomesd, name) for name in tomesd.__all__}
    for name, thing in list(things.items()):
        if inspect.isclass(thing):
            members = {each: value for each, value in vars(thing).items() if not each.startswith("_")}
            things |= {f"{name}.{each}": value for each, value in members.items() if inspect.isfunction(value)}
    return {name: thing for name, thing in things.items() if callable(thing)}


CALLABLES = public_callables()


def arguments(thing):
    try:
        names = inspect.signature(thing).parameters
    except ValueError:  # an abstract class without any
        return []
    return [name for name in names if name not in ("self", "cls", "args", "kwargs")]


def documented(text):
    """Names under ``Args:``."""
    section = re.search(r"^( *)Args:\n(.*?)(?=\n\1\S|\Z)", text, re.DOTALL | re.MULTILINE)
    if section is None:
        return set()
    lines = re.findall(rf"^{section[1]}    (\w+(?:, \w+)*):", section[2], re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def raised(thing):
    """Names of errors in its own body; of a class, in its constructor."""
    if inspect.isclass(thing):
        own = [vars(thing)[name] for name in ("__init__", "__post_init__") if name in vars(thing)]
        own = [each for each in own if each.__qualname__.startswith(thing.__qualname__)]
    else:
        own = [inspect.unwrap(thing)]
    found = set()
    for each in own:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError):  # made by dataclass
            continue
        calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
        found |= {call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
    return found


@pytest.mark.parametrize("name", CALLABLES)
def test_arguments_are_documented(name):
    thing = CALLABLES[name]
    text = thing.__doc__ or ""
    wanted = arguments(thing)
    if REFERS.search(text):
        return
    if len(wanted) == 1:  # may stand in the sentence
        return
    assert not [each for each in wanted if each not in documented(text)]


@pytest.mark.parametrize("name", CALLABLES)
def test_errors_are_documented(name):
    thing = CALLABLES[name]
    text = inspect.getdoc(thing) or ""
    told = text[text.find("Raises:") :] if "Raises:" in text else "".join(re.findall(r"raises \w+", text))
    assert not [error for error in raised(thing) if error not in told]


def test_the_checks_see_something():
    assert {"ratio", "seed"} <= documented(tomesd_plus.ToMeConfig.__doc__)
    assert raised(tomesd_plus.ToMeConfig) == {"ValueError"} and raised(tomesd_plus.merging_report) == set()
    assert "Schedule.with_mean" in CALLABLES and raised(tomesd_plus.Schedule.with_mean) == {"ValueError"}
