"""The benchmark's tables and plots, of rows that were never measured."""

from dataclasses import replace

from tomesd_plus.benchmark import UNTOUCHED, Measured, Workload, as_markdown, settings_from, speedup_figure
from tomesd_plus.benchmark.rows import make_rows


def rows_of(name, size, device="one"):
    """Of a setting that takes a second a call, as the untouched UNet does."""
    measured = [Measured(setting, [1.0]) for setting in (UNTOUCHED, *settings_from([name], [0.5]))]
    return make_rows(Workload("sd15", size), measured, device, {})


def test_tables_and_plots_of_several_devices_and_sizes():
    rows = [row for size in (512, 1024) for device in ("one", "two") for row in rows_of("attn1", size, device)]
    text = as_markdown(rows)
    assert text.count("## sd15, 512 × 512, batch 2, float32, eager") == 2
    assert text.count("| attn1 | 0.5 | 1 | 1000 [1000, 1000] | 1.00× [1.00, 1.00] |") == 4
    figure = speedup_figure(rows)
    assert [axis.get_title().splitlines()[1] for axis in figure.axes] == ["one", "two"]
    assert speedup_figure([]) is None


def test_settings_of_one_size_are_drawn_where_none_has_several():
    once = rows_of("block", 512)
    several = [row for size in (512, 1024) for row in rows_of("attn1", size)]

    def drawn(rows):
        return [text.get_text() for text in speedup_figure(rows).axes[0].get_legend().get_texts()]

    assert drawn(once) == ["block, 0.5"]
    assert drawn([*once, *several]) == ["attn1, 0.5"]


def test_a_table_tells_from_when_to_when_it_was_measured():
    first, second = rows_of("attn1", 512)
    assert "; 2026-11-21; 1 runs." in as_markdown([replace(row, date="2026-11-21") for row in (first, second)])
    both = [replace(first, date="2026-11-22"), replace(second, date="2026-11-21")]
    assert "; 2026-11-21 to 2026-11-22; 1 runs." in as_markdown(both)
