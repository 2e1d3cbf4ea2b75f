import pytest
from two_ranks import claims_of, outcomes


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What became of the claims of a test module."""
    return outcomes(claims_of(request.module.__name__), tmp_path_factory.mktemp("ranks"))
