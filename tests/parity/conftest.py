"""Numbers are compared as users get them: with all optimizations."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_by_users(optimized):
    pass
