"""Warnings are shown each time under Python's own filters, and the user's filters hold."""

import subprocess
import sys
import warnings

import pytest

from tomesd_plus.host.promise import Promise
from tomesd_plus.host.say import warn

TWICE = """
import warnings
from tomesd_plus.host.promise import Promise
for _ in range(2):  # two models that both break their promise, the second once more after it was kept
    promise = Promise("Nothing happens")
    promise.judge("why")
    promise.judge("why")
promise.judge(None)
promise.judge("why")
"""


def test_the_same_words_are_shown_again_under_the_default_filters():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=True)
    assert done.stderr.count("Nothing happens: why.") == 3


def test_the_users_filters_hold():
    promise = Promise("Nothing happens")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        promise.judge("why")
    assert not told
    promise.judge(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Nothing happens: why"):
            promise.judge("why")


def test_the_line_that_is_named_is_the_callers():
    def function():
        warn("words")

    with pytest.warns(UserWarning, match="words") as told:
        function()
    assert told[0].filename == __file__
    with pytest.warns(UserWarning):
        warn("words", stacklevel=1000)  # from beyond the stack
