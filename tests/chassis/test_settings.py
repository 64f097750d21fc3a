"""Settings: where they come from, which goes first, and how faults are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from chassis.settings import (
    Address,
    MeshSettings,
    RoomSettings,
    SettingsError,
    load,
    load_mesh,
    room_config,
)


class Room(RoomSettings):
    """A room's settings."""

    model_config = room_config("kitchen")

    listen: Address = "127.0.0.1:50099"
    ovens: int = Field(2, ge=1)
    menu: dict[str, int] = Field(default_factory=dict)


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory and an environment without anybody's settings."""
    monkeypatch.chdir(tmp_path)
    for name in ("ENVIRONMENT", "LOG_LEVEL", "DATABASE_URL", "MESH_SECRET", "STATE_DIR"):
        monkeypatch.delenv(f"TOLLGATE_{name}", raising=False)


def test_defaults_need_nothing() -> None:
    """Without a variable or a file there are settings to run with."""
    mesh, room = load(MeshSettings, Room)
    assert (mesh.router_address, room.ovens) == ("127.0.0.1:50050", 2)


def test_the_environment_goes_before_files_and_a_file_of_it_before_the_general_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Environment, then `.env.{environment}`, then `.env`."""
    Path(".env").write_text(
        "TOLLGATE_ENVIRONMENT=stage\nTOLLGATE_KITCHEN_OVENS=3\nTOLLGATE_LOG_LEVEL=ERROR\n"
        "TOLLGATE_GRACE_S=7\n"
    )
    Path(".env.stage").write_text("TOLLGATE_KITCHEN_OVENS=4\nTOLLGATE_LOG_LEVEL=WARNING\n")
    monkeypatch.setenv("TOLLGATE_LOG_LEVEL", "DEBUG")
    mesh, room = load(MeshSettings, Room)
    assert (mesh.log_level, room.ovens, mesh.grace_s) == ("DEBUG", 4, 7.0)


def test_any_setting_can_come_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`<NAME>_FILE` names a file that has the value, as container secrets do."""
    Path("secret").write_text("of the mesh\n")
    Path("url").write_text("postgresql://u:p@h/d\n")
    monkeypatch.setenv("TOLLGATE_MESH_SECRET_FILE", "secret")
    Path(".env").write_text("TOLLGATE_DATABASE_URL_FILE=url\n")
    mesh = load_mesh()
    assert mesh.secret == b"of the mesh"
    assert mesh.database_url is not None
    assert mesh.database_url.get_secret_value() == "postgresql://u:p@h/d"
    assert "p@h" not in repr(mesh)


def test_a_file_may_hold_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """A structured setting is JSON in a file as it is in a variable."""
    monkeypatch.setenv("TOLLGATE_KITCHEN_MENU_FILE", "menu")
    Path("menu").write_text('{"soup": 3}\n')
    assert load(MeshSettings, Room)[1].menu == {"soup": 3}
    Path("menu").write_text("{sesame")
    with pytest.raises(SettingsError, match="TOLLGATE_KITCHEN_MENU_FILE: must hold JSON"):
        load(MeshSettings, Room)


def test_all_faults_are_told_at_once_by_name_and_never_by_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every faulty variable of every kind is named; what it held is not."""
    wrong = {
        "TOLLGATE_LOG_LEVEL": "sesame-1",
        "TOLLGATE_TRACE_SAMPLE_RATIO": "sesame-2",
        "TOLLGATE_ROUTER_ADDRESS": "sesame-3",
        "TOLLGATE_KITCHEN_OVENS": "0",
        "TOLLGATE_KITCHEN_LISTEN": "sesame-4",
        "TOLLGATE_DATABASE_URL": "mysql://u:sesame-5@h/d",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOLLGATE_MESH_SECRET_FILE", "nowhere")
    with pytest.raises(SettingsError) as caught:
        load(MeshSettings, Room)
    told = str(caught.value)
    for name in (*wrong, "TOLLGATE_MESH_SECRET_FILE"):
        assert f"{name}: " in told
    assert "sesame" not in told


def test_a_value_that_is_not_the_json_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A structured setting that does not parse is told without its value."""
    monkeypatch.setenv("TOLLGATE_KITCHEN_MENU", "{sesame")
    with pytest.raises(SettingsError, match="TOLLGATE_KITCHEN_MENU: ") as caught:
        load(MeshSettings, Room)
    assert "sesame" not in str(caught.value)


def test_the_mesh_secret_is_made_once() -> None:
    """Where none is set, the first to ask makes one that only its owner may read."""
    first, second = load_mesh(), load_mesh()
    assert first.secret == second.secret
    assert len(first.secret) >= 32
    assert (Path(".tollgate") / "mesh.secret").stat().st_mode & 0o777 == 0o600
