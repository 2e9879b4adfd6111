"""Silence of the host libraries, for commands and the app: what they print is not for a user of these."""

import warnings

import diffusers
import transformers


def quiet_libraries() -> None:
    """Switch off diffusers' and transformers' bars and hints; before a pipeline is imported, which prints some."""
    warnings.simplefilter("ignore", FutureWarning)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
