"""Variables of the environment that switch something: both of ours read the same words."""

import pytest

import cache.location as location
from cache.spec import CacheError
from dkdetr.data.image_files import ALLOW_LINKS, links_allowed
from dkdetr.errors import UsageError
from dkdetr.offline import is_offline
from dkdetr.switches import OFF, ON

OFFLINE = "DKDETR_OFFLINE"
READERS = ((ALLOW_LINKS, links_allowed), (OFFLINE, is_offline))


@pytest.mark.parametrize(("variable", "is_on"), READERS)
def test_yes_and_no_are_understood_and_other_words_are_refused(variable, is_on, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    assert not is_on()
    for said in (*ON, "True", "YES "):
        monkeypatch.setenv(variable, said)
        assert is_on(), said
    for said in (*OFF, "False", "OFF", " "):
        monkeypatch.setenv(variable, said)
        assert not is_on(), said
    for said in ("2", "n", "nein"):
        monkeypatch.setenv(variable, said)
        with pytest.raises(UsageError, match=f"{variable}='{said}' is neither yes .* nor no"):
            is_on()


def test_the_cache_which_imports_nothing_of_ours_reads_the_same_words(monkeypatch):
    for said in OFF:
        monkeypatch.setenv(OFFLINE, said)
        location._refuse_offline("s3://bucket/cache")
    for said in (*ON, "nein"):
        monkeypatch.setenv(OFFLINE, said)
        with pytest.raises(CacheError, match="--offline forbids it"):
            location._refuse_offline("s3://bucket/cache")
