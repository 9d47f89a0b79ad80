"""Errors: one family that the command line can print, each also the builtin that Python callers expect."""

from __future__ import annotations

import inspect

import pytest

from sumuk.base import errors
from sumuk.base.errors import (
    BadFile,
    BadInput,
    Cancelled,
    MissingExtra,
    MissingFile,
    OutOfMemory,
    SumukError,
    nearest,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (BadInput("x"), ValueError),
        (BadFile("x"), ValueError),
        (MissingFile("x"), FileNotFoundError),
        (MissingExtra("x", "y"), ImportError),
        (OutOfMemory("x"), Exception),
        (Cancelled("x"), Exception),
    ],
)
def test_each_is_ours_and_pythons(error: Exception, builtin: type[Exception]):
    assert isinstance(error, SumukError)
    assert isinstance(error, builtin)


def test_every_error_of_the_module_is_ours():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert len(classes) == 7
    assert all(issubclass(each, SumukError) for each in classes)


def test_messages_are_what_was_said():
    assert str(MissingFile("no file at /x")) == "no file at /x"
    assert str(MissingFile()) == ""
    assert BadFile("bad", "safetensors.overlap").code == "safetensors.overlap"
    assert BadFile("bad").code == "file" and str(BadFile("bad")) == "bad"
    assert str(MissingExtra("serving", "serve")).endswith("run: pip install 'sumuk[serve]'")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("eulr", "; did you mean 'euler'?"),
        ("EULER", "; did you mean 'euler'?"),
        ("qqqq", "; known: ddim, euler"),
    ],
)
def test_nearest(name: str, hint: str):
    assert nearest(name, {"euler": 1, "ddim": 2}) == hint


def test_a_long_list_of_names_is_cut_at_a_name():
    names = [f"setting_{number:03d}" for number in range(60)]
    hint = nearest("zzz", names)
    assert hint.endswith(" and 37 more") and len(hint) < 340
    shown = hint.removeprefix("; known: ").removesuffix(" and 37 more").split(", ")
    assert shown == names[:23]
