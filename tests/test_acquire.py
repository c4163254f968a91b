"""Acquire: hostile archives, interrupted downloads, folders, and a handful of the embedded tunes."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile

import pytest

import LakhMIDI as acquire
from LakhMIDI import Cfg, UserError, read_json

MIDI = b"MThd\0\0\0\6\0\0\0\1\1\xe0MTrk\0\0\0\4\0\xff\x2f\0"
NO_MUSIC = "not .mid, .midi, .kar, .rmi"


@pytest.fixture
def extract(tmp_path, monkeypatch):
    """extract(**knobs) -> midi_index.json, checked against MIDI_ROOT."""
    monkeypatch.chdir(tmp_path)

    def run(**knobs):
        cfg = Cfg(DATA_ROOT=tmp_path / "data", WORKERS=2, **knobs)
        acquire.extract(cfg)
        index = read_json(tmp_path / "data" / "midi_index.json")
        assert index["seen"] == len(index["files"]) + sum(index["skipped"].values())
        assert index["files"] == sorted(set(index["files"]))
        assert all((cfg.MIDI_ROOT / file).is_file() for file in index["files"])
        return index

    return run


def pack(path, kind, members):
    """A ZIP (kind "zip") or tar ("w", "w:gz" ...) of (name or TarInfo, bytes)."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(name, data)
        return path
    with tarfile.open(path, kind) as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


KINDS = pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
BOTH = pytest.mark.parametrize("kind", ["zip", "w"])


@KINDS
def test_every_archive_by_content_not_by_name(extract, tmp_path, kind):
    names = ["a/x.mid", "a/Y.MIDI", "k.KAR", "b/c/r.rmi", ".38 Special/.x.mid", "readme.txt", "inner.zip",
             "__MACOSX/a/._y.mid", "a/._x.mid", ".mid"]
    index = extract(LMD_ZIP_PATH=pack(tmp_path / "archive.bin", kind, [(name, MIDI) for name in names]))
    assert index["files"] == [".38 Special/.x.mid", ".mid", "a/Y.MIDI", "a/x.mid", "b/c/r.rmi", "k.KAR"]
    assert index["skipped"] == {NO_MUSIC: 1, "an archive in the source; unpack it and read the folder": 1,
                                "resource fork of macOS": 2}
    assert (tmp_path / "data/midi/a/x.mid").read_bytes() == MIDI


@BOTH
def test_hostile_names_are_refused(extract, tmp_path, kind):
    names = ["/abs.mid", "../up.mid", "a/../../up.mid", "C:/drive.mid", "c:drive.mid", "..\\win.mid",
             "\\\\host\\x.mid", "a/" + "n" * 241 + ".mid", "/".join(["d" * 40] * 20) + "/deep.mid"]
    path = pack(tmp_path / "hostile", kind, [(name, MIDI) for name in ["ok.mid", *names]])
    index = extract(LMD_ZIP_PATH=path, MAX_MIDI_FILES=1)  # they are no choice
    assert index["files"] == ["ok.mid"] and index["skipped"] == {"unsafe path": 7, "name too long": 2}
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")} == {"hostile", "data"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@BOTH
def test_odd_names_become_portable_and_never_collide(extract, tmp_path, kind):
    names = ["Who?.mid", "who_.MID", "a.mid", "A.mid", "a.mid", "a-2.mid", "a.mid/b.mid", "tab\there.mid",
             "dot./x.mid", "win\\dows.mid", "./a/./x.mid", "caf\u00e9.mid", "cafe\u0301.mid"]
    names += ["M\udcfcller.mid", "M\udce4ller.mid"] * (kind == "w")  # no UTF-8
    contents = [MIDI + bytes([i]) for i in range(len(names))]
    index = extract(LMD_ZIP_PATH=pack(tmp_path / "odd", kind, zip(names, contents, strict=True)))
    files = index["files"]
    assert len(files) == len({f.casefold() for f in files}) == len(names) and not index["skipped"]
    assert {(tmp_path / "data/midi" / f).read_bytes() for f in files} == set(contents)
    portable = {"Who_.mid", "a.mid", "a.mid_/b.mid", "tab_here.mid", "dot_/x.mid", "win/dows.mid", "a/x.mid"}
    assert portable | ({"M_ller.mid"} if kind == "w" else set()) <= set(files)


def test_what_an_archive_holds_beside_files(extract, tmp_path, monkeypatch):
    monkeypatch.setattr(acquire, "MAX_FILE_BYTES", 1000)
    special = []
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
             tarfile.GNUTYPE_SPARSE)
    for i, kind in enumerate(kinds):
        info = tarfile.TarInfo(f"{i}.mid")
        info.type, info.linkname = kind, "/etc/passwd" if i < 2 else ""
        special.append((info, b""))
    members = [("ok.mid", MIDI), *special, ("e.mid", b""), ("big.mid", b"x" * 1001)]
    index = extract(LMD_ZIP_PATH=pack(tmp_path / "t", "w", members))
    assert index["files"] == ["ok.mid"]
    assert index["skipped"] == {"link or device": 6, "empty": 1, "larger than 0 MiB": 1}
    link = zipfile.ZipInfo("link.mid")
    link.external_attr = 0o120777 << 16
    extract(LMD_ZIP_PATH=pack(tmp_path / "z", "zip", [("ok.mid", MIDI), (link, "/etc/passwd")]))
    assert not (tmp_path / "data/midi/link.mid").is_symlink()


def test_what_lies_in_the_way_is_replaced_or_left_alone(extract, tmp_path):
    names = ["a.mid", "b.mid", "old.mid"]
    extract(LMD_ZIP_PATH=pack(tmp_path / "1.zip", "zip", [(name, MIDI) for name in names]))
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "data/midi/b.mid").unlink()
    (tmp_path / "data/midi/b.mid").symlink_to(tmp_path / "mine.txt")
    os.link(tmp_path / "data/midi/a.mid", tmp_path / "backup.mid")
    path = pack(tmp_path / "2.zip", "zip", [("a.mid", MIDI + b"other"), ("b.mid", MIDI)])
    assert extract(LMD_ZIP_PATH=path)["files"] == ["a.mid", "b.mid"]
    assert (tmp_path / "mine.txt").read_text() == "mine" and (tmp_path / "backup.mid").read_bytes() == MIDI
    assert (tmp_path / "data/midi/b.mid").read_bytes() == MIDI
    with pytest.raises(UserError, match="MIDI_ROOT"):  # a folder of others
        extract(LMD_ZIP_PATH=path, MIDI_ROOT=tmp_path)
    assert not (tmp_path / "a.mid").exists()


def test_members_of_a_zip_that_can_not_be_read(extract, tmp_path):
    members = [("ok.mid", MIDI), ("locked.mid", MIDI), ("bad.mid", bytes(range(256)))]
    path = pack(tmp_path / "z", "zip", members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("bz.mid", MIDI, zipfile.ZIP_BZIP2)
    data = bytearray(path.read_bytes())
    for magic, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(magic, data.find(magic) + 1)
        data[at + flags] |= 1
    data[data.find(b"bad.mid") + 30] ^= 255
    path.write_bytes(data)
    index = extract(LMD_ZIP_PATH=path)
    assert index["files"] == ["ok.mid"]
    assert index["skipped"] == {"encrypted": 1, "damaged in the archive": 1,
                                "packed by another method than deflate": 1}


@KINDS
def test_bombs_and_what_is_cut_off(extract, tmp_path, monkeypatch, kind):
    """No cut may pass for a whole archive; only the zeros that pad a tar may go."""
    path = pack(tmp_path / "whole", kind, [(f"{i}.mid", os.urandom(700)) for i in range(3)])
    data = path.read_bytes()
    end = data.rstrip(b"\0") if kind == "w" else data
    for cut in {0, 1, 100, 512, 600, 1536, len(end) // 2, len(end) - 600, len(end) - 9, len(end) - 1}:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="whole"):
            extract(LMD_ZIP_PATH=path)
    if kind != "w":
        monkeypatch.setattr(acquire, "FREE_RATIO_BYTES", 2**20)
        zeros = bytes(8 * 2**20)
        pack(path, kind, [("ok.mid", MIDI), ("zeros.mid", zeros), ("zeros.bin", zeros)])
        with pytest.raises(UserError, match="unpacks to more"):
            extract(LMD_ZIP_PATH=path)
    assert not (tmp_path / "data/midi_index.json").exists() and not (tmp_path / "data/midi").exists()


def test_tars_made_to_do_harm(extract, tmp_path, monkeypatch):
    monkeypatch.setattr(acquire, "FREE_RATIO_BYTES", 2**20)
    monkeypatch.setattr(acquire, "MAX_MEMBERS", 5)
    path = tmp_path / "t"
    good = pack(path, "w", [(f"{i}.mid", MIDI) for i in range(3)]).read_bytes()
    garbled = bytearray(good)
    garbled[1024 + 150] ^= 255  # in the checksum of the second header
    name = tarfile.TarInfo("././@LongLink")
    name.type = tarfile.GNUTYPE_LONGNAME
    for data, words in [
        (gzip.compress(good + bytes(32 * 2**20)), "unpacks to more"),  # behind the end
        (garbled, "damaged"),
        (pack(path, "w", [("ok.mid", MIDI), (name, bytes(2**20 + 1))]).read_bytes(), "header"),
        (pack(path, "w", [(f"{i}.mid", MIDI) for i in range(7)]).read_bytes(), "more than 5"),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=words):
            extract(LMD_ZIP_PATH=path)
    path.write_bytes(good)
    monkeypatch.setattr(acquire, "SPARE_DISK_BYTES", 2**60)
    with pytest.raises(UserError, match="full"):
        extract(LMD_ZIP_PATH=path)


def test_what_holds_no_music(extract, tmp_path):
    with pytest.raises(UserError, match="unpack it"):
        extract(LMD_ZIP_PATH=pack(tmp_path / "nested.zip", "zip", [("inner.zip", b"PK")]))
    (tmp_path / "songs.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + os.urandom(5_000))
    with pytest.raises(UserError, match="no ZIP or tar"):
        extract(LMD_ZIP_PATH="songs.7z")
    with pytest.raises(UserError, match="inside LOCAL_MIDI_ROOT"):
        extract(USE_LOCAL_MIDI=True, LOCAL_MIDI_ROOT=tmp_path)
    assert not (tmp_path / "data/midi").exists() and not (tmp_path / "data/midi_index.json").exists()


def test_choice_does_not_depend_on_the_order(extract, tmp_path):
    names = [f"{i}.mid" for i in range(50)]
    (tmp_path / "local").mkdir()
    for name in names:
        (tmp_path / "local" / name).write_bytes(MIDI)
    sources = [{"USE_LOCAL_MIDI": True, "LOCAL_MIDI_ROOT": "local"}]
    for kind, order in (("zip", names), ("w:gz", names[::-1]), ("w", sorted(names))):
        path = pack(tmp_path / kind[-2:], kind, [(name, MIDI) for name in order])
        sources.append({"LMD_ZIP_PATH": path})
    chosen = [extract(**source, MAX_MIDI_FILES=7) for source in sources]
    assert len({tuple(index["files"]) for index in chosen}) == 1 and len(chosen[0]["files"]) == 7
    assert all(index["skipped"] == {"over MAX_MIDI_FILES": 43} for index in chosen)


def test_a_local_folder_is_only_read_whatever_its_names_and_links(extract, tmp_path):
    root, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    (root / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    odd = ["6:8 jig.mid", "back\\slash.mid", ".38 Special.mid", "M\udcfcller.mid"]
    for name in (*odd, "a.mid", "sub/B.KAR", "x.txt", "._a.mid", ".DS_Store"):
        (root / name).write_bytes(MIDI)
    (elsewhere / "linked.mid").write_bytes(MIDI)
    (root / "link").symlink_to(elsewhere)
    (elsewhere / "cycle").symlink_to(root)
    (root / "empty.mid").touch()
    (root / "broken.mid").symlink_to("gone")
    os.mkfifo(root / "fifo.mid")
    before = sorted(root.rglob("*"))
    index = extract(USE_LOCAL_MIDI=True, LOCAL_MIDI_ROOT=root)
    assert index["files"] == sorted([*odd, "a.mid", "sub/B.KAR", "link/linked.mid"])
    assert index["skipped"] == {NO_MUSIC: 1, "resource fork of macOS": 1, "empty": 1,
                                "broken link or device": 2}
    assert sorted(root.rglob("*")) == before


def test_identity_is_content(extract, tmp_path):
    """Touched, copied, spelt otherwise or gone: up to date; another byte of the same size and date: not."""
    root = tmp_path / "mine"
    root.mkdir()
    (root / "a.mid").write_bytes(MIDI)
    knobs = {"USE_LOCAL_MIDI": True, "LOCAL_MIDI_ROOT": root}
    extract(**knobs)
    os.utime(root / "a.mid", (1, 1))
    for spelling in ("mine", "./mine/", root):
        knobs["LOCAL_MIDI_ROOT"] = spelling
        assert acquire.extract.status(Cfg(DATA_ROOT=tmp_path / "data", **knobs)) == "up to date"
    (root / "a.mid").write_bytes(MIDI[:-1] + b"\1")
    os.utime(root / "a.mid", (1, 1))
    assert acquire.extract.status(Cfg(DATA_ROOT=tmp_path / "data", **knobs)) == "stale: source changed"

    path = pack(tmp_path / "z.zip", "zip", [("a.mid", MIDI)])
    extract(LMD_ZIP_PATH=path)
    cfg = Cfg(DATA_ROOT=tmp_path / "data", LMD_ZIP_PATH="z.zip")
    path.rename(tmp_path / "y.zip")
    path.write_bytes((tmp_path / "y.zip").read_bytes())
    assert acquire.extract.status(cfg) == "up to date"
    path.unlink()
    assert acquire.extract.status(cfg) == "up to date"
    (tmp_path / "data/midi/a.mid").write_bytes(MIDI[:-1] + b"\1")
    assert "midi changed" in acquire.extract.status(cfg)


def test_embedded_tunes(extract, tmp_path):
    index = extract(MAX_MIDI_FILES=6)
    assert len(index["files"]) == 6 and index["seen"] == 12762
    for file in index["files"]:
        assert (tmp_path / "data/midi" / file).read_bytes().startswith(b"MThd")
        assert file.split("/")[0] in acquire.FOLK_BOOKS
    assert set(index["files"]) <= set(extract(MAX_MIDI_FILES=12)["files"])


@pytest.mark.parametrize("script, reason", [("sleep 5", "timed out"), ("kill -SEGV $$", "failed")])
def test_abc2midi_that_hangs_or_fails(tmp_path, monkeypatch, script, reason):
    program = tmp_path / "abc2midi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setenv("SYMUSIC_ABC2MIDI", str(program))
    with pytest.raises(acquire.Skip, match=reason):
        acquire.run_abc2midi(b"X:1\n", timeout_s=0.2)


# --- download

BODY = os.urandom(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """A web server of BODY at .url; .how: a dict of what it does otherwise, .asked: the ranges asked for."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            how, start = server.how, int(self.headers["Range"][6:-1]) * server.how.get("ranges", 1)
            body, cuts = how.get("body", BODY), how.get("cuts", [])
            server.asked.append(start)
            part = 206 if start < len(body) else 416
            self.send_response(how.get("status", part if how.get("ranges", 1) else 200))
            if how.get("length", True):
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:cuts.pop(0) if cuts else None])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.how, server.url = [], {}, f"http://127.0.0.1:{server.server_port}/x.tar.gz"
        threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def download(server, tmp_path):
    return functools.partial(acquire.download, server.url, tmp_path / "down/x.tar.gz", SHA256, pauses=(0, 0))


def test_download_is_resumed_after_cuts_and_by_the_next_run(server, download, tmp_path):
    server.how = {"cuts": [100_000]}
    with pytest.raises(UserError, match="broke off"):
        download(pauses=())
    assert not (tmp_path / "down/x.tar.gz").exists()
    server.how = {"cuts": [200_000]}
    assert download().read_bytes() == BODY
    assert server.asked == [0, 65536, 196608]
    assert os.listdir(tmp_path / "down") == ["x.tar.gz"]
    assert download() and len(server.asked) == 3  # it is there


@pytest.mark.parametrize("how", [{"ranges": 0, "cuts": [100_000]}, {"length": False}])
def test_server_that_knows_no_range_or_length(server, download, how):
    server.how = how
    assert download().read_bytes() == BODY


@pytest.mark.parametrize("part", [b"another file", BODY, BODY + b"more"])
def test_what_is_found_of_a_download_is_the_file_or_goes(download, tmp_path, part):
    (tmp_path / "down").mkdir()
    (tmp_path / "down/x.tar.gz.part").write_bytes(part)
    if part != BODY:
        with pytest.raises(UserError, match="not the known file"):
            download()
        assert os.listdir(tmp_path / "down") == []
    assert download().read_bytes() == BODY


def test_refused_or_offline(server, download, tmp_path):
    for status, tries in ((404, 1), (503, 4)):
        server.how = {"status": status}
        with pytest.raises(UserError, match=str(status)):
            download()
        assert len(server.asked) == tries
    with pytest.raises(UserError, match=r"\A.*can't download.*\Z"):
        acquire.download("http://127.0.0.1:9/x", tmp_path / "x", pauses=(0,))


def test_lakh_by_download(server, extract, tmp_path, monkeypatch):
    body = pack(tmp_path / "t", "w:gz", [("lmd_full/0/a.mid", MIDI)]).read_bytes()
    monkeypatch.setattr(acquire, "LAKH_URL", server.url.rsplit("/", 1)[0] + "/")
    monkeypatch.setattr(acquire, "LAKH", {"full": ("lmd_full.tar.gz", hashlib.sha256(body).hexdigest())})
    server.how = {"body": body}
    assert extract(LMD_DOWNLOAD="full")["files"] == ["lmd_full/0/a.mid"]
    (tmp_path / "data/downloads/lmd_full.tar.gz").unlink()  # to save space: nothing becomes stale
    assert acquire.extract(Cfg(DATA_ROOT=tmp_path / "data", LMD_DOWNLOAD="full")) is False
    same = Cfg(DATA_ROOT=tmp_path / "data", LMD_ZIP_PATH=tmp_path / "t")  # the same bytes under another name
    assert acquire.extract.status(same) == "up to date"
