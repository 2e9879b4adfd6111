"""``python -m tomesd_plus`` is ``tomesd-plus``."""

from tomesd_plus.cli import app

app(prog_name="tomesd-plus")
