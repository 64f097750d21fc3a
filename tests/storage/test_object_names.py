"""What storage says of names, without a wire."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chassis.errors import InvalidField
from services.storage.names import PageTokens, checked_object_name, past_prefix


def _is_allowed(name: str) -> bool:
    """The rule of the proto's comment, said another way."""
    raw = name.encode()
    return (
        1 <= len(raw) <= 1_024
        and not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in name)
        and not {".", ".."} & set(name.split("/"))
        and name[0] != "/"
        and name[-1] != "/"
    )


@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(st.sampled_from([".", "..", "a", "", "\\", "é", "\x00", "\x85"])).map("/".join),
        st.integers(1_000, 1_040).map(lambda n: "n" * n),
        st.integers(500, 520).map(lambda n: "é" * n),
    )
)
@example("a/../b")
@example("..\\..\\etc")
@example("…")
@example("\ud7ff")
def test_names_are_allowed_exactly_as_documented(name: str) -> None:
    """A name passes unchanged if the proto's comment allows it, and is InvalidField otherwise."""
    if _is_allowed(name):
        assert checked_object_name("name", name) == name
    else:
        with pytest.raises(InvalidField) as refused:
            checked_object_name("name", name)
        assert refused.value.violations[0].subject == "name"


@given(st.text(max_size=4), st.text(max_size=6))
@example("a\U0010ffff", "b")
@example("\ud7ff", "\ue000")
@example("\U0010ffff", "\U0010ffff\U0010ffff")
def test_the_bound_after_a_prefix_parts_what_begins_so(prefix: str, name: str) -> None:
    """Of the names not before a prefix, those before its bound are those that begin with it."""
    if name.encode(errors="surrogatepass") < prefix.encode(errors="surrogatepass"):
        return
    bound = past_prefix(prefix)
    assert name.startswith(prefix) == (bound is None or name < bound)


@given(st.text(max_size=20), st.text(max_size=20), st.binary(max_size=40))
def test_a_page_token_is_good_for_its_own_list_only(last: str, other: str, junk: bytes) -> None:
    """A token reads back what it was made of; in another list, or made up, it is InvalidField."""
    tokens = PageTokens(b"secret")
    token = tokens.made(("objects", "acme"), last)
    assert tokens.read(("objects", "acme"), token) == last
    for scope, forged in (
        (("objects", f"not acme{other}"), token),
        (("objectsacme", ""), token),
        (("objects", "acme"), junk.hex() or "x"),
        (("objects", "acme"), "é" + token),
        (("objects", "acme"), token + "AAAA"),
    ):
        with pytest.raises(InvalidField):
            tokens.read(scope, forged)
