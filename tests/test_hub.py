"""Pushing to a Hub: a local server speaks the Hub's HTTP, and a process of its own pushes to it, as a user's does."""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import save_file

from lsg_converter.hub import push
from lsg_converter.options import TargetError


TOKEN = "hf_aSecretOfTheOwner"
# Reads one push a line, and writes what came of it. `constants` are the Hub's, which it reads from the environment.
PUSHER = """
import json, signal, sys
from pathlib import Path
from huggingface_hub import constants
from lsg_converter.hub import push
signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    asked = json.loads(line)
    for name, value in asked.pop("constants").items():
        setattr(constants, name, value)
    try:
        answer = {"kind": "str", "text": push(Path(asked.pop("folder")), **asked)}
    except BaseException as error:
        answer = {"kind": type(error).__name__, "text": str(error)}
    print(json.dumps(answer), flush=True)
"""
ROUTES = {
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "delete": r"DELETE /api/repos/delete",
    "yaml": r"POST /api/validate-yaml",
    "preupload": r"POST /api/models/(\w+/[\w-]+)/preupload/main",
    "batch": r"POST /(\w+/[\w-]+)\.git/info/lfs/objects/batch",
    "object": r"PUT /objects/(\w+)",
    "commit": r"POST /api/models/(\w+/[\w-]+)/commit/main",
    "info": r"GET /api/models/(\w+/[\w-]+)(?:/revision/main)?",
}


class Repository:
    """What the Hub keeps: the commits' messages and files, and the files of the last one."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes]]] = []

    @property
    def files(self) -> dict[str, bytes]:
        return {path: content for _, files in self.commits for path, content in files.items()}


class Refusal(Exception):
    """An answer that is an error: its status and its content."""


class Hub:
    """A Hub of the owner `me` and the organization `lab`, on a port of this machine.

    `broken` says which requests fail, by the names of ROUTES: a status to answer, or a function to call before.
    """

    def __init__(self) -> None:
        self.reset()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def answer(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                try:
                    status, content = 200, hub.answer(self.command, self.path.split("?")[0], self.headers, data)
                except Refusal as refusal:
                    status, content = refusal.args
                except ConnectionError:
                    self.close_connection = True
                    return
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("X-Request-Id", "Root=1-abc")  # the Hub's client puts it into its messages
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: dict = {}

    def answer(self, method: str, path: str, headers, data: bytes) -> object:
        found = [(name, match) for name, route in ROUTES.items() if (match := re.fullmatch(route, f"{method} {path}"))]
        if not found:
            raise Refusal(404, {"error": f"this Hub has no {method} {path}"})
        [(name, match)] = found
        self.requests.append(name)
        given = headers.get("Authorization", "nothing")
        if name != "object" and given != f"Bearer {TOKEN}":
            raise Refusal(401, {"error": f"Invalid user token, got {given}"})
        trouble = self.broken.get(name)
        if callable(trouble):
            trouble()
        elif trouble:
            raise Refusal(trouble, {"error": f"no {name} for {given}\nand a second line"})
        return getattr(self, name)(*match.groups(), data if name in ("object", "commit") else json.loads(data or "{}"))

    def repository(self, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise Refusal(404, {"error": "Repository not found"})
        return self.repositories[repo_id]

    def whoami(self, asked: dict) -> dict:
        return {"type": "user", "name": "me"}

    def create(self, asked: dict) -> dict:
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repositories:
            raise Refusal(409, {"error": "You already created this model repo", **url})
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.repositories[repo_id] = Repository(private)
        return url

    def delete(self, asked: dict) -> dict:
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.repository(repo_id)
        del self.repositories[repo_id]
        return {}

    def yaml(self, asked: dict) -> dict:
        return {"errors": [], "warnings": []}

    def info(self, repo_id: str, asked: dict) -> dict:
        return {"id": repo_id, "sha": "c" * 40, "private": self.repository(repo_id).private, "siblings": [], "tags": []}

    def preupload(self, repo_id: str, asked: dict) -> dict:
        there, files = self.repository(repo_id).files, []
        for file in asked["files"]:
            lfs = file["path"].endswith(".safetensors")
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in there:
                content = there[file["path"]]
                git = hashlib.sha1(b"blob %d\0" % len(content) + content)
                answer["oid"] = (hashlib.sha256(content) if lfs else git).hexdigest()
            files.append(answer)
        return {"files": files}

    def batch(self, repo_id: str, asked: dict) -> dict:
        self.repository(repo_id)
        assert "basic" in asked["transfers"]
        upload = [
            {**item, "actions": {"upload": {"href": f"{self.url}/objects/{item['oid']}"}}} for item in asked["objects"]
        ]
        return {"transfer": "basic", "objects": upload}

    def object(self, oid: str, content: bytes) -> dict:
        assert hashlib.sha256(content).hexdigest() == oid
        self.objects[oid] = content
        return {}

    def commit(self, repo_id: str, data: bytes) -> dict:
        header, *lines = [json.loads(line) for line in data.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            files[value["path"]] = (
                self.objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            )
        self.repository(repo_id).commits.append((header["value"]["summary"], files))
        return {"commitUrl": f"{self.url}/{repo_id}/commit/{'c' * 40}", "commitOid": "c" * 40}


def environment(url: str, home: Path) -> dict[str, str]:
    """That of a user who has the Hub at `url`."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
    result = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    result |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**result, "PYTHONPATH": str(Path(__file__).parents[1])}


class Pusher:
    """A process that pushes to the Hub at `url`, with a home of its own."""

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home, self.log = url, home, home / "stderr"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PUSHER],
                env=environment(url, home),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, folder: Path, repo_id: str, url: str = "", xet: bool = False, **asked: object) -> tuple[str, str]:
        constants = {"ENDPOINT": url or self.url, "HF_HUB_DISABLE_XET": not xet}
        asked = {"private": False, "token": TOKEN, "message": "Convert to LSG", **asked}
        asked |= {"folder": str(folder), "repo_id": repo_id, "constants": constants}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)["kind"], json.loads(line)["text"]

    def fail(self, folder: Path, repo_id: str, **asked: object) -> str:
        """What a push that must fail says: one line, without the token; the folder stays as it is."""
        before = contents(folder)
        kind, text = self.ask(folder, repo_id, **asked)
        assert kind == "TargetError", text
        assert text.startswith("--push_to_hub: ") and " cannot be pushed: " in text
        assert text.endswith(f"; the checkpoint is complete in {folder}")
        assert "\n" not in text and TOKEN not in text and TOKEN not in self.log.read_text()
        assert contents(folder) == before
        return text


@pytest.fixture(scope="module")
def server():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.reset()
    return server


@pytest.fixture(scope="module")
def pusher(server: Hub, tmp_path_factory: pytest.TempPathFactory):
    pusher = Pusher(server.url, tmp_path_factory.mktemp("home"))
    yield pusher
    pusher.process.kill()
    pusher.process.communicate()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "lsg-model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}\n')
    (folder / "README.md").write_text("---\ntags: [lsg]\n---\n\nA model é.\n")
    (folder / "modeling.py").write_text("# The code.\n")
    (folder / "empty.txt").touch()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("private", [False, True])
def test_one_commit_holds_every_file(hub, pusher, checkpoint, private):
    before = contents(checkpoint)
    assert pusher.ask(checkpoint, "lab/lsg-model", private=private) == ("str", "lab/lsg-model")
    assert list(hub.repositories) == ["lab/lsg-model"]
    repository = hub.repositories["lab/lsg-model"]
    assert repository.private is private
    assert repository.commits == [("Convert to LSG", before)]
    assert list(hub.objects.values()) == [before["model.safetensors"]]
    assert contents(checkpoint) == before


def test_a_name_alone_is_the_owners(hub, pusher, checkpoint):
    assert pusher.ask(checkpoint, "lsg-model") == ("str", "me/lsg-model")
    assert pusher.ask(checkpoint, "lsg-model") == ("str", "me/lsg-model")
    assert list(hub.repositories) == ["me/lsg-model"]
    hub.repositories.clear()
    hub.broken = {"commit": 403}
    assert "'me/lsg-model' cannot be pushed: 403 no commit for Bearer ***; log in" in pusher.fail(
        checkpoint, "lsg-model"
    )
    assert not hub.repositories


def test_many_files_are_one_commit(hub, pusher, tmp_path):
    """With hf_xet, which most users have, upload_folder would make two commits of these."""
    for index in range(260):
        (tmp_path / f"{index}.txt").write_text(str(index))
    assert pusher.ask(tmp_path, "lab/lsg-model", xet=True)[0] == "str"
    [(_, files)] = hub.repositories["lab/lsg-model"].commits
    assert files == contents(tmp_path)


def test_pushing_again_is_a_second_commit(hub, pusher, checkpoint):
    pusher.ask(checkpoint, "lab/lsg-model", private=True)
    (checkpoint / "config.json").write_text('{"model_type": "roberta"}\n')
    assert pusher.ask(checkpoint, "lab/lsg-model", message="Again") == ("str", "lab/lsg-model")
    repository = hub.repositories["lab/lsg-model"]
    assert [message for message, _ in repository.commits] == ["Convert to LSG", "Again"]
    assert repository.files == contents(checkpoint) and repository.private
    assert "delete" not in hub.requests


def test_a_token_that_may_not_create_writes_to_what_exists(hub, pusher, checkpoint):
    hub.broken = {"create": 403}
    text = pusher.fail(checkpoint, "lab/lsg-model")
    assert "403 no create for Bearer ***; log in with a token that may write there" in text
    assert "delete" not in hub.requests
    hub.repositories["lab/lsg-model"] = Repository(private=True)
    assert pusher.ask(checkpoint, "lab/lsg-model") == ("str", "lab/lsg-model")
    assert len(hub.repositories["lab/lsg-model"].commits) == 1


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("request_name", "status"),
    [("preupload", 403), ("batch", 400), ("object", 403), ("commit", 400), ("commit", 403), ("commit", 500)],
)
def test_a_failure_deletes_a_new_repository_alone(hub, pusher, checkpoint, request_name, status, exists):
    commits = [("First", {"config.json": b"{}"})]
    if exists:
        hub.repositories["lab/lsg-model"] = Repository(private=True)
        hub.repositories["lab/lsg-model"].commits = list(commits)
    hub.broken = {request_name: status}
    text = pusher.fail(checkpoint, "lab/lsg-model", private=True)
    assert f"'lab/lsg-model' cannot be pushed: {status} no {request_name} for " in text
    assert f"then `hf upload lab/lsg-model {checkpoint} --private`;" in text
    if exists:
        assert hub.repositories["lab/lsg-model"].commits == commits and "delete" not in hub.requests
    else:
        assert hub.requests[-1] == "delete" and not hub.repositories


def hang_up() -> None:
    raise ConnectionError


def test_a_lost_connection_says_what_is_left(hub, pusher, checkpoint):
    hub.broken = {"commit": hang_up}
    assert "is left" not in pusher.fail(checkpoint, "lab/lsg-model")
    assert not hub.repositories
    hub.broken = {"commit": hang_up, "delete": hang_up}
    text = pusher.fail(checkpoint, "lab/lsg-model")
    assert "check the name and the connection" in text
    assert "; the new repository 'lab/lsg-model' is left, delete it; " in text
    assert hub.repositories


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupt_goes_on(hub, pusher, checkpoint, exists):
    if exists:
        hub.repositories["lab/lsg-model"] = Repository(private=False)
    before = contents(checkpoint)

    def interrupt() -> None:
        os.kill(pusher.process.pid, signal.SIGINT)
        time.sleep(0.2)
        raise ConnectionError

    hub.broken = {"commit": interrupt}
    assert pusher.ask(checkpoint, "lab/lsg-model")[0] == "KeyboardInterrupt"
    assert ("lab/lsg-model" in hub.repositories) is exists
    assert contents(checkpoint) == before


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("hf_wrong", "401 Invalid user token, got Bearer ***"),
        ("hf_two\nlines", "there is no token, or it has a space or a line break"),
        ("", "there is no token"),
        (False, "there is no token"),
        (None, "there is no token"),
        (True, "Token is required"),
    ],
    ids=["wrong", "lines", "empty", "none", "absent", "required"],
)
def test_a_wrong_token(hub, pusher, checkpoint, token, said):
    text = pusher.fail(checkpoint, "lab/lsg-model", token=token)
    assert said in text and "; log in with a token that may write there (`hf auth login`), then " in text
    assert "hf_" not in text and "hf_" not in pusher.log.read_text()
    assert not hub.repositories and hub.requests in ([], ["create"])


@pytest.mark.parametrize("token", [None, True])
def test_the_token_of_the_machine(hub, pusher, checkpoint, token):
    stored = pusher.home / "token"
    stored.write_text(f"{TOKEN}\n")
    try:
        assert pusher.ask(checkpoint, "lab/lsg-model", token=token) == ("str", "lab/lsg-model")
        hub.broken = {"create": 500}
        assert "500 no create for Bearer ***; check the name" in pusher.fail(checkpoint, "lab/other", token=token)
    finally:
        stored.unlink()


def test_a_name_that_is_none(hub, pusher, checkpoint):
    assert "'a/b/c' cannot be pushed: Repo id must be" in pusher.fail(checkpoint, "a/b/c")
    assert not hub.repositories


def test_no_server(hub, pusher, checkpoint):
    text = pusher.fail(checkpoint, "lab/lsg-model", url="http://127.0.0.1:9")
    assert "Connection refused; check the name and the connection" in text


def test_offline(checkpoint):
    with pytest.raises(TargetError, match=r"^--push_to_hub: 'lab/lsg-model' cannot be pushed: .* offline mode"):
        push(checkpoint, "lab/lsg-model", private=False, token=TOKEN, message="Convert")


def test_private_is_never_pushed_to_what_is_public(hub, pusher, checkpoint):
    hub.repositories["me/lsg"] = Repository(private=False)
    assert "it exists already, and is public" in pusher.fail(checkpoint, "me/lsg", private=True)
    assert not hub.repositories["me/lsg"].commits


def run_command(hub, tmp_path, *flags, source=GOLDEN / "bert" / "source"):
    """The command, as a user of the Hub at `hub` calls it."""
    command = [sys.executable, str(Path(__file__).parents[1] / "convert_checkpoint.py"), "--initial_model", str(source)]
    return subprocess.run(
        [*command, "--model_name", "lsg-bert", "--push_to_hub", *flags],
        cwd=tmp_path, env=environment(hub.url, tmp_path / "home"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command_pushes_what_it_wrote(hub, tmp_path):
    result = run_command(hub, tmp_path, "--private", "--token", TOKEN)
    assert result.returncode == 0, result.stderr
    assert "pushed to     me/lsg-bert" in result.stdout
    repository = hub.repositories["me/lsg-bert"]
    [(message, files)] = repository.commits
    assert repository.private and message == "Convert source to 4096 tokens"
    assert files == contents(tmp_path / "lsg-bert")
    assert b'from_pretrained("me/lsg-bert", trust_remote_code=True)' in files["README.md"]
    assert TOKEN not in result.stdout + result.stderr
    assert not any(TOKEN.encode() in content for content in files.values())


@pytest.mark.full
def test_the_command_keeps_the_checkpoint_when_the_push_fails(hub, tmp_path):
    hub.broken = {"commit": 403}
    result = run_command(hub, tmp_path, "--quiet", "--hub_model_id", "lab/it", "--use_auth_token", TOKEN)
    assert result.returncode == 4
    assert result.stderr.startswith("error: --push_to_hub: 'lab/it' cannot be pushed") and not result.stdout
    assert result.stderr.count("\n") == 1 and "is complete in lsg-bert" in result.stderr
    assert (tmp_path / "lsg-bert" / "lsg_conversion.json").exists() and not hub.repositories
    assert TOKEN not in result.stdout + result.stderr


@pytest.mark.full
def test_without_a_token_the_command_does_not_begin(hub, tmp_path):
    result = run_command(hub, tmp_path)
    assert result.returncode == 4 and "has no owner" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "lsg-bert").exists()
