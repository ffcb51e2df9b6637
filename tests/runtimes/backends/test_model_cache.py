"""The folder of compiled graphs: what is found, what is kept, what goes first."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from latentc.runtimes.backends.model_cache import CacheWarning, ModelCache

FACTS = {"graph": "a", "device": "CPU"}


def put(cache: ModelCache, facts: dict[str, str], size: int) -> Path:
    with cache.scratch(size) as folder:
        assert folder is not None
        made = folder / "made.blob"
        made.write_bytes(bytes(size))
        cache.keep(facts, made)
    blob = cache.find(facts)
    assert blob is not None
    return blob


def test_only_what_fits_is_found(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    blob = put(cache, FACTS, 10)
    assert cache.find(dict(reversed(FACTS.items()))) == blob
    for other in ({**FACTS, "device": "GPU"}, {"graph": "a"}, {**FACTS, "more": ""}):
        assert cache.find(other) is None
    blob.write_bytes(bytes(10))  # as long as before, and another file
    assert cache.find(FACTS) is None


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, limit=25)
    a, b, c = ({"graph": name} for name in "abc")
    for facts in (a, b):
        put(cache, facts, 10)
        time.sleep(0.02)  # file times are coarse
    assert cache.find(a) is not None  # now b is the one that was not used for longest
    time.sleep(0.02)
    put(cache, c, 10)
    assert [cache.find(facts) is not None for facts in (a, b, c)] == [True, False, True]
    assert len(list(tmp_path.iterdir())) == 4


def test_more_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    with (
        pytest.warns(CacheWarning, match="no room"),
        ModelCache(tmp_path, limit=9).scratch(10) as folder,
    ):
        assert folder is None
    assert not list(tmp_path.iterdir())
