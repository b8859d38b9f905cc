"""The exception tree: one root, all of it public, each a plain exception with a message."""

from __future__ import annotations

import inspect

import pytest

import diffusionact
from diffusionact import errors

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def test_one_root() -> None:
    assert "DiffusionActError" in CLASSES and len(CLASSES) > 1
    for name, error in CLASSES.items():
        assert issubclass(error, errors.DiffusionActError), name


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_carries_its_message_and_is_public(name: str) -> None:
    assert str(CLASSES[name]("what, seen, wanted, next")) == "what, seen, wanted, next"
    assert getattr(diffusionact, name) is CLASSES[name]
    assert CLASSES[name].__doc__
