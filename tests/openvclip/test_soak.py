"""A short soak; `python -m tests.soak` is the long one."""

from pathlib import Path

import pytest

from tests.soak import assert_steady, soak


@pytest.mark.slow
def test_memory_open_files_and_threads_stay_what_they_are(tmp_path: Path) -> None:
    assert_steady(soak(1.5, tmp_path))


def test_what_grows_is_told() -> None:
    steady = {"memory_mb": [400.0, 500.0, 510.0, 520.0], "threads": [5, 6, 6, 8], "open_files": [20, 30, 30, 30]}
    assert_steady(steady)
    for kind, value in (("memory_mb", 530.0), ("threads", 9), ("open_files", 33)):
        with pytest.raises(AssertionError, match=f"{kind} grew from"):
            assert_steady({**steady, kind: [*steady[kind][:3], value]})
