"""Which experiment a cache's split means."""

from dkdetr.engine.start import ablated_experiment, experiment_of_split


def test_the_papers_tables_are_of_36_epochs() -> None:
    assert ablated_experiment("lvis_train") == "lvis_r50_36e"
    assert experiment_of_split("lvis_train") == "lvis_r50_70e"
    assert ablated_experiment("ovcoco_train") == "ovcoco_r50"
