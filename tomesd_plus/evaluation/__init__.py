"""Measure what merging and caching do to speed and images.

An evaluation is a folder that three passes work on. Each pass is a package that imports only the ones before it:

- :mod:`~tomesd_plus.evaluation.generation`: generates and times the images of each configuration; also compares a few
  images in memory;
- :mod:`~tomesd_plus.evaluation.scoring`: computes a table of metrics with intervals from the folders of images;
- :mod:`~tomesd_plus.evaluation.reporting`: writes tables and plots.

The modules here are what they share: configurations, items, the experiment's folder. This file imports none of them:
a light module such as :mod:`~tomesd_plus.evaluation.errors` loads nothing else.
"""
