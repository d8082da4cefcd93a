"""docs/errors.md is what the error classes and the mistakes say."""

import inspect

import pytest

from docs import generate_errors
from fxcompress import errors
from tests.errors.mistakes import MISTAKES

CLASSES = [*generate_errors.classes(errors.UserError), *generate_errors.classes(errors.InternalError)]


def test_the_page_is_up_to_date():
    assert generate_errors.PAGE.read_text() == generate_errors.page(), "run: python -m docs.generate_errors"


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_every_class_says_what_it_means_and_what_to_do(error):
    assert all(f"\n{field}: " in inspect.getdoc(error) for field in ("Cause", "Fix"))


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_every_class_is_shown_by_a_mistake(error):
    """But for what depends on the machine: a backend that is not built."""
    assert error is errors.BackendError or any(mistake.error is error for mistake in MISTAKES)
