"""The tree of errors: whose turn it is can be read off a class, and the user's own errors are Python's ValueError too."""

import pickle

import pytest

from moe_ray import errors
from moe_ray.errors import (
    FrozenChanged,
    InputError,
    MoeRayError,
    NotFinite,
    NothingSelected,
    NotTrainable,
    OutsideFailed,
)

TREE = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def test_one_except_clause_catches_everything_that_is_raised_on_purpose():
    assert set(TREE) == {
        *(MoeRayError, InputError, NothingSelected, NotTrainable, NotFinite, OutsideFailed, FrozenChanged),
    }
    assert [kind for kind in TREE if not issubclass(kind, MoeRayError)] == []


def test_what_is_the_users_to_mend_is_a_value_error_and_nothing_else_is():
    mended_by_the_user = {InputError, NothingSelected, NotTrainable, NotFinite}
    assert {kind for kind in TREE if issubclass(kind, InputError)} == mended_by_the_user
    assert {kind for kind in TREE if issubclass(kind, ValueError)} == mended_by_the_user


@pytest.mark.parametrize("kind", TREE)
def test_an_error_comes_from_another_process_as_it_was(kind):
    error = pickle.loads(pickle.dumps(kind("got 1, expected 2")))
    assert type(error) is kind
    assert str(error) == "got 1, expected 2"
