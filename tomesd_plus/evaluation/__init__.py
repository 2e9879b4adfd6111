"""Measure what merging and caching do to speed and images.

An evaluation has three passes over one folder, each a package of its own, and each importing only those before it:

- :mod:`~tomesd_plus.evaluation.generation`: images and speeds of each configuration; a quick comparison in memory;
- :mod:`~tomesd_plus.evaluation.scoring`: from folders of images to a table of figures with intervals;
- :mod:`~tomesd_plus.evaluation.reporting`: tables and plots as files.

What they share lies here: configurations, items, the experiment's folder. Nothing is imported until it is asked for.
"""
