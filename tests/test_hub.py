"""What the Hub refuses, over real HTTP by the real client: one line that says what to do."""
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

REFUSALS = {  # part of the path: (status, the Hub's error code)
    "/gated/model/": (403, "GatedRepo"),
    "/no/model/": (404, "RepoNotFound"),
    "/api/whoami-v2": (401, ""),
    "/api/datasets/ed-donner/": (404, "RepoNotFound"),
}


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        status, code = next((refusal for part, refusal in REFUSALS.items() if part in self.path), (500, ""))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("arguments, said", [
    (("prepare", "--local", "--source", "catalogue.jsonl", "--base-model", "gated/model"), "gated/model: gated. Ask for access at {hub}/gated/model"),
    (("prepare", "--local", "--source", "catalogue.jsonl", "--base-model", "no/model"), "no/model: not on the Hub"),
    (("prepare", "--local", "--lite"), "ed-donner/items_lite: not on the Hub"),
    (("train", "--lite"), "HF_TOKEN: "),
])
def test_a_refusal_ends_in_one_line(run, catalogue, hub, arguments, said, tmp_path):
    done = run(*arguments, code=1, HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_TOKEN="hf_not_a_real_one", HF_HOME=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"app.py {arguments[0]}: ") and said.format(hub=hub) in last
    assert "hf_not_a_real_one" not in done.stdout + done.stderr
