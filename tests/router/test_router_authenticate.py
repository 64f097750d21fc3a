"""Who is calling, and how keys are kept."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from chassis.call import CALL_ID, IDENTITY, PROJECT, REQUEST_ID, TENANT, Call
from chassis.errors import Forbidden, InvalidField, NotFound, Unauthenticated
from chassis.identity import sign
from chassis.keys import KeyFile, KeysError
from services.router.authenticate import AUTHORIZATION, authenticator, is_loopback

SECRET = b"a secret"


def test_a_key_makes_the_tenant(tmp_path: Path) -> None:
    """A key's bearer is its tenant and project, and an operator only where the key says so."""
    keys = KeyFile(tmp_path / "keys.jsonl")
    _, plain = keys.add("laptop", tenant="acme", project="search")
    _, chief = keys.add("chief", tenant="acme", operator=True)
    authenticate = authenticator(SECRET, keys)
    call = authenticate({AUTHORIZATION: f"Bearer {plain}", CALL_ID: "c"})
    assert (call.tenant, call.project, call.call_id) == ("acme", "search", "c")
    assert not call.operator
    assert not call.internal
    assert len(call.request_id) == 32
    assert authenticate({AUTHORIZATION: f"bearer {chief}"}).operator


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    """A missing, foreign, altered or revoked key is UNAUTHENTICATED, at once."""
    keys = KeyFile(tmp_path / "keys.jsonl")
    key, text = keys.add("laptop", tenant="acme")
    authenticate = authenticator(SECRET, keys)
    wrong = ["", "Bearer", f"Basic {text}", f"Bearer {text}x", f"Bearer tg_{key.id}_", "Bearer é"]
    for value in wrong:
        with pytest.raises(Unauthenticated):
            authenticate({AUTHORIZATION: value})
    assert authenticate({AUTHORIZATION: f"Bearer {text}"})
    KeyFile(tmp_path / "keys.jsonl").revoke(key.id)
    with pytest.raises(Unauthenticated):
        authenticate({AUTHORIZATION: f"Bearer {text}"})
    with pytest.raises(NotFound):
        keys.revoke(key.id)


def test_a_key_speaks_for_its_own_tenant_and_project_only(tmp_path: Path) -> None:
    """Naming another tenant or project beside a key is FORBIDDEN."""
    keys = KeyFile(tmp_path / "keys.jsonl")
    _, text = keys.add("laptop", tenant="acme", project="search")
    authenticate = authenticator(SECRET, keys)
    for key in (TENANT, PROJECT):
        with pytest.raises(Forbidden):
            authenticate({AUTHORIZATION: f"Bearer {text}", key: "another"})


def test_the_file_has_hashes_and_one_owner(tmp_path: Path) -> None:
    """Nobody but the owner can read the file of keys, and no key is in it."""
    path = tmp_path / "deep" / "keys.jsonl"
    _, text = KeyFile(path).add("laptop", tenant="acme")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert text.rpartition("_")[2] not in path.read_text()
    assert json.loads(path.read_text())["tenant"] == "acme"
    assert sorted(child.name for child in path.parent.iterdir()) == [
        "keys.jsonl",
        "keys.jsonl.lock",
    ]


def test_a_file_that_is_no_file_of_keys_is_told(tmp_path: Path) -> None:
    """A spoilt file of keys lets nobody in, and says what it is."""
    path = tmp_path / "keys.jsonl"
    path.write_text("not json\n")
    with pytest.raises(KeysError, match="not a key"):
        KeyFile(path).find("tg_x_y")


def test_without_keys_a_tenant_is_taken_at_its_word() -> None:
    """On loopback the tenant is the one named, else `default`; names are checked."""
    authenticate = authenticator(SECRET, None)
    assert authenticate({}).tenant == "default"
    assert authenticate({TENANT: "acme", REQUEST_ID: "r"}).request_id == "r"
    for key in (TENANT, PROJECT, REQUEST_ID, CALL_ID):
        for value in ("", "x" * 129, "ta\tb", "é"):
            with pytest.raises(InvalidField):
                authenticate({key: value})


def test_daemons_come_with_their_signed_identity(tmp_path: Path) -> None:
    """A mesh identity is internal, however outsiders authenticate; a forged one is refused."""
    for keys in (None, KeyFile(tmp_path / "keys.jsonl")):
        authenticate = authenticator(SECRET, keys)
        identity = sign(Call("acme", request_id="r"), SECRET)
        call = authenticate({IDENTITY: identity, TENANT: "other"})
        assert (call.tenant, call.request_id, call.internal) == ("acme", "r", True)
        with pytest.raises(Unauthenticated):
            authenticate({IDENTITY: sign(Call("acme"), b"another secret")})


@pytest.mark.parametrize(
    ("listen", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/tmp/x", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.com:1", False),
    ],
)
def test_what_only_this_machine_reaches(listen: str, loopback: bool) -> None:
    """Loopback addresses and unix sockets are this machine's alone."""
    assert is_loopback(listen) is loopback
