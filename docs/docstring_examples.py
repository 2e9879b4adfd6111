"""For the pages of the Python names: griffe knows "Examples:", and our docstrings say "Example:"."""

from typing import Any

from griffe import Extension, Object


class SingularExamples(Extension):
    """Makes doctests of what would be a note."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Each module, class, function and attribute, once."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
