"""Plots of an evaluation."""

from tomesd_plus.evaluation.reporting.evaluation_plots import Point, pareto_front


def test_the_front_is_what_nothing_beats():
    points = [Point("a", 1.0, 40), Point("b", 1.5, 30), Point("c", 1.2, 30), Point("d", 1.4, 35), Point("e", 1.5, 29)]
    assert [point.name for point in pareto_front(points)] == ["a", "d", "b"]
