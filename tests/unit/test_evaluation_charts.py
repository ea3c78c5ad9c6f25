import math

from dkdetr.evaluation.charts import Line, line_chart


def test_a_line_runs_from_corner_to_corner():
    chart = line_chart("t", "x", [Line(2, [(0.0, 0.0), (5.0, math.nan), (10.0, 1.0)])])
    ((run, path),) = chart.paths
    assert run == 2
    start, end = path.removeprefix("M").split(" L")
    assert [float(v) for v in start.split()] == [chart.left, chart.bottom]
    assert [float(v) for v in end.split()] == [chart.right, chart.top]
    assert [tick.text for tick in chart.x_ticks] == ["0", "2.5", "5", "7.5", "10"]
    assert chart.x_ticks[0].place == chart.left


def test_what_leaves_the_range_stays_in_the_picture():
    chart = line_chart("t", "x", [Line(1, [(0.0, 99.0), (1.0, 0.5)])], y_range=(0, 1))
    assert f"M{chart.left:.1f} {chart.top:.1f}" in chart.paths[0][1]


def test_no_points_and_one_value_still_make_a_chart():
    assert line_chart("t", "x", [Line(1, [])]).paths == ()
    chart = line_chart("t", "x", [Line(1, [(3.0, 7.0)])])
    assert len(chart.paths) == 1
    assert all(chart.top <= tick.place <= chart.bottom for tick in chart.y_ticks)
