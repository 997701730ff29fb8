"""What becomes of a run when its text is damaged, changes, or does not come: a row each."""

from __future__ import annotations

import gzip
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from faulty_store import Fault, Proxy, proxy_of
from support import sentences

from configs.text import Cache, Faults, Retry
from trainer.data import cache, patience, shards, stores
from trainer.data.blocks import Place
from trainer.data.damage import Damage, DamagedShard, DamageReport, Unavailable
from trainer.data.gzips import PIECE_BYTES
from trainer.data.listing import Shard, list_shards
from trainer.data.pieces import pieces
from trainer.data.shards import Reading, documents, spans
from trainer.data.stores import Reader

WHY = "A FAILING STORE WAS NOT TESTED: that needs moto[server] and s3fs"
TEXTS = sentences(9000)
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
RETRY = Retry(attempts=3, timeout_seconds=1.0)


def read(shard: Shard, retry: Retry = RETRY) -> tuple[dict[int, str], list[Damage]]:
    damages: list[Damage] = []
    return dict(documents(shard, "text", damages.append, Reading(retry))), damages


def shard_of(path: Path) -> Shard:
    return Shard(f"file://{path}", path.stat().st_size)


# Damaged files of this machine ------------------------------------------------------------------------------


def broken(line: bytes) -> Callable[[Path], Path]:
    """A shard whose third document is this line."""

    def write(directory: Path) -> Path:
        path = directory / "shard.jsonl"
        path.write_bytes(b"".join([*LINES[:2], line, b"\n", *LINES[3:]]))
        return path

    return write


def cut(name: str, compress: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        path = directory / name
        data = compress(b"".join(LINES))
        path.write_bytes(data[: len(data) // 2])
        return path

    return write


def damaged_gzip(directory: Path) -> Path:
    path = directory / "shard.json.gz"
    first, second = (gzip.compress(b"".join(lines)) for lines in (LINES[:4500], LINES[4500:]))
    path.write_bytes(first + second[:100] + bytes(1000) + second[1100:])
    return path


def as_parquet(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), sink)
    return sink.getvalue().to_pybytes()


def empty(directory: Path) -> Path:
    path = directory / "shard.json.gz"
    path.touch()
    return path


def endless_line(directory: Path) -> Path:
    path = directory / "shard.json"
    path.write_bytes(b"".join(LINES[:2]) + b"[" + b"1," * 600_000)
    return path


FILES: dict[str, tuple[Callable[[Path], Path], str, range]] = {
    # What is wrong: the file, the kind of fault, which documents are certainly read.
    "malformed JSON": (broken(b'{"text": "no end'), "document", range(3, 9000)),
    "bad UTF-8": (broken(b'{"text": "\xff"}'), "document", range(3, 9000)),
    "half a surrogate pair": (broken(b'{"text": "\\ud83d"}'), "document", range(3, 9000)),
    "missing field": (broken(b'{"body": "text"}'), "document", range(3, 9000)),
    "field is no text": (broken(b'{"text": null}'), "document", range(3, 9000)),
    "gzip cut short": (cut("a.json.gz", gzip.compress), "shard", range(1000)),
    "zstd cut short": (cut("a.jsonl.zst", zstandard.ZstdCompressor().compress), "shard", range(0)),
    "gzip damaged": (damaged_gzip, "shard", range(3000)),
    "parquet cut short": (cut("a.parquet", as_parquet), "shard", range(0)),
    "empty file": (empty, "shard", range(0)),
    "no line ends": (endless_line, "shard", range(2)),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_a_damaged_file_loses_what_is_damaged_or_ends_the_run(
    tmp_path: Path, what: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "LONGEST_LINE_BYTES", 1_000_000)
    write, kind, whole = FILES[what]
    shard = shard_of(write(tmp_path))
    if policy == "fail":
        report = DamageReport(tmp_path, Faults.model_validate({kind: "fail"}), rank=0)
        with pytest.raises(
            DamagedShard, match=rf"data\.faults\.{kind}=fail: {shard.address}, document \d+: "
        ):
            list(documents(shard, "text", report, Reading(RETRY)))
        return
    found, [damage] = read(shard)
    assert (damage.kind, damage.shard) == (kind, shard.address)
    assert all(found[number] == TEXTS[number] for number in whole)
    assert all(text == TEXTS[number] for number, text in found.items())  # the others keep their numbers
    if kind == "document":
        assert damage.document == 2
        assert set(found) == set(range(9000)) - {2}
    else:
        assert damage.document == len(found)


def test_a_parquet_file_with_any_bytes_damaged_is_damage(tmp_path: Path) -> None:
    path, chance = tmp_path / "a.parquet", random.Random(0)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "number": [1, 2]}), path)
    whole = path.read_bytes()
    damages: list[Damage] = []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        damages += read(shard_of(path))[1]
    assert {damage.kind for damage in damages} == {"document", "shard"}


@pytest.mark.parametrize("text", [b"\n", b"a b\n"])
def test_a_zstd_file_that_unfolds_without_end_comes_in_small_pieces(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(text * (40 << 20)))
    with closing(Reader(stores.LocalSource(str(path), shard_of(path), RETRY))) as reader:
        lengths = [len(piece) for piece in pieces(reader, ".txt.zst", 0)]
    assert sum(lengths) == len(text) * (40 << 20)
    assert max(lengths) <= PIECE_BYTES


def test_a_file_that_is_gone_is_told_at_once(tmp_path: Path) -> None:
    began = time.perf_counter()
    found, [damage] = read(Shard(f"file://{tmp_path}/gone.jsonl", 100), Retry())
    assert (found, damage.kind, damage.document) == ({}, "store", 0)
    assert time.perf_counter() - began < 0.4  # before the first pause


def test_a_store_that_failed_is_not_waited_for_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    shard, reading, damages = shard_of(path), Reading(RETRY), list[Damage]()
    path.rename(tmp_path / "away")
    assert not list(documents(shard, "text", damages.append, reading))
    (tmp_path / "away").rename(path)
    assert not list(documents(shard, "text", damages.append, reading))
    assert [damage.kind for damage in damages] == ["store", "store"]
    assert len(list(documents(shard, "text", damages.append, Reading(RETRY)))) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz"])
def test_a_file_of_another_size_than_listed_has_changed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shard{suffix}"
    path.write_bytes(b"".join(LINES) if suffix == ".jsonl" else gzip.compress(b"".join(LINES)))
    shard = shard_of(path)._replace(size_bytes=100)
    found, [damage] = read(shard)
    assert (found, damage.kind) == ({}, "changed")
    assert f"has {path.stat().st_size} bytes, had 100" in damage.reason
    with pytest.raises(DamagedShard, match=r"data\.faults\.changed=fail"):  # the policy unless told otherwise
        list(documents(shard, "text", DamageReport(tmp_path, Faults(), 0), Reading(RETRY)))


def test_a_file_that_shrinks_while_it_is_read_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "shard.jsonl"
    path.write_bytes(b"".join(LINES) * 3)
    damages: list[Damage] = []
    found = documents(shard_of(path), "text", damages.append, Reading(RETRY))
    assert next(found) == (0, TEXTS[0])
    path.write_bytes(b"".join(LINES)[:1000])
    for number, text in found:
        assert text == TEXTS[number % 9000]
    assert [damage.kind for damage in damages] == ["changed"]


# A store of this machine that fails -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    s3fs = pytest.importorskip("s3fs", reason=WHY)
    moto = pytest.importorskip("moto.server", reason=WHY)
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    with proxy_of(server.get_host_and_port()[1]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # so that faults reach us
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def proxy(server: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(stores, "REQUEST_BYTES", 100_000)
    server.behave()
    yield server
    server.behave()


@pytest.fixture(params=["s3", "http"])
def shard(proxy: Proxy, request: pytest.FixtureRequest) -> Shard:
    """A megabyte of json lines behind the proxy, read in many requests."""
    put(proxy, b"".join(LINES))
    address = {"s3": "s3://texts/*.jsonl", "http": f"http://127.0.0.1:{proxy.port}/texts/a.jsonl"}
    [listed] = list_shards("data.corpora.x.train", [address[request.param]])
    assert listed.version
    proxy.gets = 0
    return listed


def put(proxy: Proxy, data: bytes) -> Any:
    """Write the shard, not through the proxy; the file system that did it."""
    import s3fs

    store = s3fs.S3FileSystem(
        endpoint_url=f"http://127.0.0.1:{proxy.upstream}", s3_additional_kwargs={"ACL": "public-read"}
    )
    if not store.exists("texts"):
        store.mkdir("texts")
    store.pipe_file("texts/a.jsonl", data)
    return store


WHOLE = dict(enumerate(TEXTS))


def test_a_store_that_works_is_asked_for_nothing_twice(proxy: Proxy, shard: Shard) -> None:
    assert read(shard) == (WHOLE, [])
    assert proxy.gets == -(-(shard.size_bytes or 0) // 100_000)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_answers_that_tell_of_trouble_are_asked_for_again(proxy: Proxy, shard: Shard, status: int) -> None:
    proxy.faults += [Fault(status), Fault(status)]
    assert read(shard) == (WHOLE, [])


@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_connection_that_ends_in_the_middle_loses_nothing(proxy: Proxy, shard: Shard, end: str) -> None:
    proxy.faults += [Fault(body_bytes=40_000, end=end), Fault(body_bytes=0, end=end)]
    assert read(shard) == (WHOLE, [])


def test_a_store_may_take_its_time(proxy: Proxy, shard: Shard) -> None:
    proxy.faults.append(Fault(delay_seconds=2.0))
    assert read(shard, Retry(attempts=1)) == (WHOLE, [])


@pytest.mark.parametrize("body_bytes", [0, 40_000])
def test_a_read_that_hangs_is_given_up_and_tried_again(proxy: Proxy, shard: Shard, body_bytes: int) -> None:
    proxy.faults.append(Fault(body_bytes=body_bytes, end="hang"))
    began = time.perf_counter()
    assert read(shard) == (WHOLE, [])
    assert time.perf_counter() - began > 0.9  # after timeout_seconds


@pytest.mark.parametrize("fault", [Fault(503), Fault(body_bytes=40_000), Fault(body_bytes=9, end="hang")])
def test_a_store_that_goes_on_failing_ends_the_run_in_time(
    tmp_path: Path, proxy: Proxy, shard: Shard, fault: Fault
) -> None:
    found = spans(
        shard,
        "text",
        part=0,
        parts=1,
        window=100,
        start=Place(),
        on_damage=DamageReport(tmp_path, Faults(), 0),
        reading=Reading(Retry(attempts=2, timeout_seconds=0.7)),
    )
    first = next(found)
    assert list(first.texts.values()) == TEXTS[:100]
    time.sleep(0.2)  # the request that is under way ends well
    proxy.forever = fault
    with pytest.raises(
        Unavailable, match=rf"data\.faults\.store=fail: {shard.address}, document [1-9].*: attempt 2 of 2"
    ):
        list(found)


def test_a_store_that_fails_may_be_skipped_by_order_of_the_user(proxy: Proxy, shard: Shard) -> None:
    proxy.forever = Fault(503)
    found, [damage] = read(shard, Retry(attempts=2))
    assert (found, damage.kind, damage.document) == ({}, "store", 0)


def test_a_file_that_is_gone_from_its_store_is_told_at_once(proxy: Proxy, shard: Shard) -> None:
    put(proxy, b"").rm_file("texts/a.jsonl")
    found, [damage] = read(shard, Retry(attempts=12, timeout_seconds=5))
    assert (found, damage.kind) == ({}, "store")
    assert "FileNotFoundError" in damage.reason


@pytest.mark.parametrize("same_size", [True, False])
def test_a_file_with_another_version_or_size_has_changed(proxy: Proxy, shard: Shard, same_size: bool) -> None:
    put(proxy, b"".join(reversed(LINES)) if same_size else b"".join(LINES[1:]))
    found, [damage] = read(shard, Retry(attempts=12, timeout_seconds=5))
    assert (found, damage.kind) == ({}, "changed")
    assert ("is version" if same_size else "bytes, had") in damage.reason


def test_a_file_that_is_replaced_in_s3_while_it_is_read_is_never_mixed(proxy: Proxy, shard: Shard) -> None:
    if not shard.address.startswith("s3://"):
        pytest.skip("http cannot ask for one version")
    damages: list[Damage] = []
    found = documents(shard, "text", damages.append, Reading(RETRY))
    assert next(found) == (0, TEXTS[0])
    put(proxy, b"".join(reversed(LINES)))
    for number, text in found:
        assert text == TEXTS[number]
    assert [damage.kind for damage in damages] == ["changed"]


class Plain(BaseHTTPRequestHandler):
    """Knows no ranges, and tells the size of a file only if its name says so."""

    packed = gzip.compress(b"".join(LINES))

    def do_HEAD(self) -> None:
        self.send_response(200)
        if "sized" in self.path:
            self.send_header("Content-Length", str(len(self.packed)))
            self.send_header("Accept-Ranges", "none")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.packed)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", ["sized", "any"])
def test_http_without_ranges_or_sizes_is_read_from_the_beginning(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "REQUEST_BYTES", 20_000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/{name}.json.gz?token=1"
        shards = list_shards("data.corpora.x.train", [address])
        assert [shard.size_bytes for shard in shards] == [len(Plain.packed) if name == "sized" else None]
        assert read(shards[0]) == (WHOLE, [])
        server.shutdown()


def test_http_without_sizes_that_ends_early_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "NEAR_BYTES", 0)
    size = len(Plain.packed) + 1000
    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        shard = Shard(f"http://127.0.0.1:{server.server_address[1]}/any.json.gz", size)
        for copies in (None, cache.Copies(Cache(directory=str(tmp_path)), RETRY, tmp_path)):
            damages: list[Damage] = []
            list(documents(shard, "text", damages.append, Reading(RETRY, copies)))
            reason = f"has {len(Plain.packed)} bytes, had {size} when the run began"
            assert [(damage.kind, damage.reason) for damage in damages] == [("changed", reason)]
        server.shutdown()
    for writer in (thread for thread in threading.enumerate() if thread.name == "copy"):
        writer.join(10)
        assert not writer.is_alive()
