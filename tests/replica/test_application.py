"""An application's version: what a class may say, and what is made of it."""

import re
import sys
import textwrap

import pytest

from replica import application
from replica.application import (
    VERSION_MAX,
    ApplicationLoadError,
    Context,
    Right,
    accesses_of,
    known_version,
    load_application,
)
from replica.apps.counter import Counter
from replica.apps.kv import KeyValue, get
from replica.apps.ledger import Ledger
from replica.core.state import BucketedMap
from replica.shell.changes import Recorder


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return what loads a class of this body, as a replica does."""
    monkeypatch.syspath_prepend(tmp_path)

    def load_class(body: str) -> application.Application:
        monkeypatch.delitem(sys.modules, "some_app", raising=False)
        code = f"class App:\n{textwrap.indent(body, '    ')}\n    def apply(self, operation, context):\n        pass\n"
        (tmp_path / "some_app.py").write_text(code)
        return load_application("some_app:App")

    return load_class


@pytest.mark.parametrize(("body", "version"), [("", 0), ("version = 0", 0), (f"version = {VERSION_MAX}", 65535)])
def test_versions_that_a_class_may_have(load, body, version):
    assert known_version(load(body)) == version


@pytest.mark.parametrize("value", ["-1", "65536", "'1'", "True", "None", "1.0"])
def test_what_is_no_version_is_refused_by_name(load, value):
    with pytest.raises(ApplicationLoadError, match=r"some_app:App: its attribute `version` is .* from 0 to 65535"):
        load(f"version = {value}")


def test_shipped_applications_are_at_version_0():
    assert [known_version(one) for one in (KeyValue(), Counter(), Ledger())] == [0, 0, 0]


def test_who_has_a_version_is_asked_for_keys_with_the_one_in_force():
    class Two:
        version = 2

        def apply(self, operation: bytes, context: Context) -> bytes:
            return operation

        def accesses(self, operation: bytes, version: int):
            return [(Right.READ, b"%d" % version)]

    for one in (Two(), Recorder(Two())):
        asked = accesses_of(one)
        assert asked is not None
        assert list(asked(b"", 1)) == [(Right.READ, b"1")]
        assert known_version(one) == 2
    for other in (KeyValue(), Recorder(KeyValue())):
        asked = accesses_of(other)
        assert asked is not None
        assert list(asked(get(b"k"), 1)) == [(Right.READ, b"k")]
        assert known_version(other) == 0
    assert accesses_of(Counter()) is None
    assert accesses_of(Recorder(Counter())) is None


def test_the_example_of_the_docstring():
    (code,) = re.findall(r"^    class .*?(?=^\S)", application.__doc__ or "", re.MULTILINE | re.DOTALL)
    names: dict = {"Context": Context}
    exec(textwrap.dedent(code), names)  # noqa: S102 - ours
    greeter = names["Greeter"]()
    assert known_version(greeter) == 1
    said = [greeter.apply(b"you", Context(BucketedMap(), version=version)) for version in (0, 1)]
    assert said == [b"hello you", b"good day you"]
