"""What is kept of a run's diary."""

from dkdetr.engine.metric_log import in_brief


def test_a_brief_has_the_first_the_last_and_no_clock():
    records = [{"iteration": k, "time": 1e9 + k, "loss": 1 / 3 + k} for k in range(100)]
    brief = in_brief(records, 5)
    assert [each["iteration"] for each in brief] == [0, 25, 50, 74, 99]
    assert brief[0] == {"iteration": 0, "loss": 0.3333}
    assert in_brief(records[:3], 8) == [{"iteration": k, "loss": round(1 / 3 + k, 3 + (k == 0))}
                                        for k in range(3)]  # fmt: skip
    assert in_brief([], 8) == []
    assert len(in_brief(records[:1], 8)) == 1
