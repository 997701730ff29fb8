"""Checkpoints in an object store: a real S3 server on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import begin, checkpoints, flip_a_byte, loaded, names, save, tensors, told

from cluster import attempt as attempts
from configs.schema import Checkpoint, ConfigError
from trainer.checkpoint import agreement, loading
from trainer.checkpoint.places import Away, Bucket, places_of
from trainer.distributed import World
from trainer.sharding.logical import logical

pytest.importorskip("moto.server", reason="CHECKPOINTS IN S3 WERE NOT TESTED: that needs moto[server]")
s3fs = pytest.importorskip("s3fs", reason="CHECKPOINTS IN S3 WERE NOT TESTED: that needs s3fs")


class Server:
    """An S3 server that can go away and come back; what it holds stays."""

    def __init__(self) -> None:
        self._server: Any = None
        self.port = 0

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server
    server.stop()


@pytest.fixture
def address(server: Server, request: pytest.FixtureRequest) -> str:
    """An empty prefix in a bucket of its own."""
    bucket = f"bucket-{abs(hash(request.node.name))}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}/runs/a"


def objects(address: str) -> list[str]:
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    prefix = address.removeprefix("s3://")
    return sorted(path.removeprefix(prefix + "/") for path in fs.find(prefix))


def flip_an_object(address: str, path: str) -> None:
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    content = bytearray(fs.cat_file(f"{address}/{path}"))
    content[len(content) // 2] ^= 1
    fs.pipe_file(f"{address}/{path}", bytes(content))


def test_a_checkpoint_in_a_store_is_its_manifest_and_the_files_of_an_attempt(
    tmp_path: Path, world: World, address: str
) -> None:
    store = begin(tmp_path, world, directory=address)
    save(store, 3, 7)
    files = [".metadata", "__0_0.distcp", "state.json"]
    assert objects(address) == [
        name
        for step in ("step-00000003", "step-00000007")
        for name in (*(f"{step}/attempt-1/{file}" for file in files), f"{step}/manifest.json")
    ]
    assert loaded(store) == (7, 7.0)
    assert attempts.newest_checkpoint(tmp_path) == "step-00000007"
    assert [event["path"] for event in told(store, "checkpoint")] == [
        f"{address}/step-00000003",
        f"{address}/step-00000007",
    ]


def test_files_without_a_manifest_are_no_checkpoint_and_are_swept(
    tmp_path: Path, world: World, address: str
) -> None:
    store = begin(tmp_path, world, directory=address)
    save(store, 3, 7)
    s3fs.S3FileSystem().rm_file(f"{address}/step-00000007/manifest.json")
    again = begin(tmp_path, world, directory=address)
    assert loaded(again) == (3, 3.0)
    save(again, 5)
    assert {path.split("/")[0] for path in objects(address)} == {"step-00000003", "step-00000005"}


def test_a_store_keeps_what_retention_says(tmp_path: Path, world: World, address: str) -> None:
    store = begin(tmp_path, world, directory=address, keep_last=1, keep_every_steps=4)
    save(store, 2, 4, 6)
    assert {path.split("/")[0] for path in objects(address)} == {"step-00000004", "step-00000006"}


def test_a_damaged_checkpoint_in_a_store_is_set_aside_for_the_one_before(
    tmp_path: Path, world: World, address: str
) -> None:
    store = begin(tmp_path, world, directory=address)
    save(store, 3, 7)
    flip_an_object(address, "step-00000007/attempt-1/__0_0.distcp")
    assert loaded(store) == (3, 3.0)
    (event,) = told(store, "checkpoint_damaged")
    assert "does not match its checksum" in event["reason"]
    assert "step-00000007/manifest.json" not in objects(address)
    assert "step-00000007/attempt-1/__0_0.distcp" in objects(address)
    flip_an_object(address, "step-00000003/attempt-1/state.json")
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"no whole checkpoint is left.*{address} \([12]\)"):
            store.load(tensors())
    save(begin(tmp_path, world, directory=address), 9)  # sweeps nothing that was set aside
    assert "step-00000003/attempt-1/state.json" in objects(address)


def test_a_zombie_cannot_overwrite_what_a_newer_attempt_wrote(
    tmp_path: Path, world: World, address: str
) -> None:
    zombie = begin(tmp_path, world, directory=address)
    save(zombie, 3)
    newer = begin(tmp_path, world, directory=address)
    newer.save(5, tensors(50.0), {"step": 5})
    with pytest.raises(attempts.Fenced):
        save(zombie, 5)
    assert loaded(newer) == (5, 50.0)


def test_every_checkpoint_is_copied_to_the_durable_place(tmp_path: Path, world: World, address: str) -> None:
    store = begin(tmp_path, world, durable=address, asynchronous=True)
    save(store, 3)
    store.close()
    save(store, 7)
    store.close()
    first, second = places_of(tmp_path, Checkpoint(durable=address), "")
    assert first.steps() == second.steps() == [7, 3]
    assert second.manifest(7) == first.manifest(7)
    assert second.problem(second.manifest(7)) is None
    assert [event["step"] for event in told(store, "checkpoint_copied")] == [3, 7]


def test_loading_falls_back_to_the_durable_place(tmp_path: Path, world: World, address: str) -> None:
    store = begin(tmp_path, world, durable=address)
    save(store, 3)
    store.close()
    save(store, 7)
    store.close()
    flip_a_byte(checkpoints(store) / "step-00000007")
    assert loaded(store) == (7, 7.0)
    assert len(told(store, "checkpoint_damaged")) == 1
    for name in names(store):
        path = checkpoints(store) / name
        path.unlink() if path.is_symlink() else path.rename(tmp_path / name)
    assert loaded(begin(tmp_path, world, durable=address)) == (7, 7.0)


def test_the_newest_of_both_places_wins_and_equal_ones_come_from_the_first(
    tmp_path: Path, world: World, address: str
) -> None:
    store = begin(tmp_path, world, durable=address)
    save(store, 3)
    store.close()
    flip_an_object(address, "step-00000003/attempt-1/__0_0.distcp")
    assert loaded(store) == (3, 3.0)
    assert told(store, "checkpoint_damaged") == []  # nobody looked at it
    newer = begin(tmp_path / "elsewhere", world, directory=address)
    save(newer, 9)
    assert loaded(store) == (9, 9.0)


def test_a_store_that_is_away_delays_checkpoints_but_not_training(
    tmp_path: Path, world: World, address: str, server: Server
) -> None:
    store = begin(tmp_path, world, directory=address, asynchronous=True)
    live = torch.zeros(1000, 1000)

    def save_step(step: int) -> float:
        live.fill_(step)
        began = time.monotonic()
        store.save(step, {"weight/a": logical(live)}, {"step": step})
        return time.monotonic() - began

    save_step(1)
    store.close()
    server.stop()
    stalls = [save_step(2)]
    time.sleep(3)
    stalls.append(save_step(3))  # gives up the one that is late
    server.start()
    store.close()
    assert max(stalls) < agreement.RETRY_SECONDS / 20
    assert told(store, "checkpoint_delayed")[0]["step"] == 2
    assert [event["step"] for event in told(store, "checkpoint_failed")] == [2]
    assert [event["step"] for event in told(store, "checkpoint")] == [1, 3]
    state = store.load({"weight/a": logical(live.zero_())})
    assert state == {"step": 3}
    assert live.unique().tolist() == [3.0]


def test_a_run_does_not_end_well_while_its_last_checkpoint_is_not_saved(
    tmp_path: Path, world: World, address: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(loading, "LISTING_TRIES", 1)
    store = begin(tmp_path, world, directory=address, asynchronous=True)
    server.stop()
    try:
        save(store, 3)
        with pytest.raises(Away, match="connect"):
            store.close()
        with pytest.raises(Away, match="connect"):  # and does not begin anew as if there were none
            begin(tmp_path, world, directory=address).load(tensors())
    finally:
        server.start()


def test_a_durable_place_that_is_away_holds_up_nothing(
    tmp_path: Path, world: World, address: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "RETRY_SECONDS", 1.0)
    monkeypatch.setattr(loading, "LISTING_TRIES", 1)
    store = begin(tmp_path, world, durable=address, asynchronous=True)
    server.stop()
    try:
        save(store, 3)
        store.close()
        assert names(store) == ["latest", "step-00000003"]
        assert [event["path"] for event in told(store, "checkpoint_failed")] == [f"{address}/step-00000003"]
        assert loaded(store) == (3, 3.0)
    finally:
        server.start()
    save(store, 7)
    store.close()
    assert [event["step"] for event in told(store, "checkpoint_copied")] == [7]


def test_what_slow_copies_are_made_of_stays_at_the_first_place(
    tmp_path: Path, world: World, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begin(tmp_path, world, durable=address, keep_last=1)
    hold, begun = threading.Event(), threading.Event()
    put = Bucket.put

    def slow(place: Bucket, path: str, content: bytes) -> None:
        begun.set()
        hold.wait(30)
        put(place, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", slow)
        save(store, 1)
        assert begun.wait(30)
        save(store, 2, 3)
        assert names(store) == ["latest", "step-00000001", "step-00000003"]
        hold.set()
        store.close()
    assert [event["step"] for event in told(store, "checkpoint_copied")] == [1, 3]  # 2 was overtaken


@pytest.mark.parametrize(
    ("key", "address", "told"),
    [
        ("durable", "nonsense://a", "checkpoint.durable=nonsense://a: Protocol not known"),
        ("durable", "gs://a/b", "checkpoint.durable=gs://a/b: cannot be opened: Please install gcsfs"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, key: str, address: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        places_of(tmp_path, Checkpoint(**{key: address}), "")


def test_the_two_places_are_not_the_same(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name a second one"):
        places_of(tmp_path, Checkpoint(durable=str(tmp_path / "checkpoints")), "")
