"""The page as a visitor meets it: a server in this process, and requests as a browser (or anyone else) sends them."""

import contextlib
import json
import secrets
import tempfile

import httpx
import pytest


app = pytest.importorskip("app", reason="gradio is not installed")


@contextlib.contextmanager
def served(root, *words, **environment):
    """`app.py --workspace ROOT ...` in this process; yields the page, with `local_url` and `book`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", tempfile.tempdir)
        patch.setenv("GRADIO_TEMP_DIR", "")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost,0.0.0.0")
        for name, value in environment.items():
            patch.setenv(name, value)
        args = app.parse_args(["--workspace", str(root), *words])
        page = app.main(args, prevent_thread_lock=True, quiet=True)
        try:
            yield page
        finally:
            page.close(verbose=False)


class Refused(Exception):
    """What the page said instead of an answer."""


class Visitor:
    """A visitor's browser with the page open.

    Args:
        page: of `served`.
        headers: of all requests, such as another Host.
    """

    def __init__(self, page, **headers):
        self.url = f"http://127.0.0.1:{page.server_port}"
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)
        self.session = secrets.token_hex(5)
        self.functions = {d["api_name"]: d for d in page.config["dependencies"] if d["backend_fn"]}

    def get(self, path, **headers):
        return self.client.get(path, headers=headers)

    def file(self, path, **headers):
        return self.get(f"/gradio_api/file={path}", **headers)

    def upload(self, *named):
        """Sends (name, bytes) pairs; returns them as values of a `gr.File`."""
        answer = self.client.post("/gradio_api/upload", files=[("files", pair) for pair in named])
        answer.raise_for_status()
        return [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in answer.json()]

    def do(self, name, *values, event=None, **headers):
        """What a handler of the page answers to values, all of them JSON (bytes are sent as they are).

        `event` is what a component's own script sends with them.

        Raises:
            Refused: with the sentence that a visitor sees, or the status of the answer.
        """
        function = self.functions[name]
        body = {"data": list(values), "fn_index": function["id"], "session_hash": self.session, "event_data": event}
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        answer = self.client.post("/gradio_api/queue/join", content=content, headers=headers)
        if answer.status_code != 200:
            raise Refused(f"status {answer.status_code}: {answer.text}")
        with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise Refused(str(message["output"].get("error")))
                    return message["output"]["data"]
                if message.get("msg") in ("unexpected_error", "server_stopped"):
                    raise Refused(f"{message['msg']}: {message.get('message')}")
        raise Refused("no answer")


def form(base, concept="my-toy", **changes):
    """What stands on the page, in the order in which the handlers take it."""
    values = {
        "concept": concept,
        "base": base,
        "method": "word",
        "class_word": "star",
        "subject": "",
        "prompt": "a {}",
    }
    values |= {"others": ""} | dict.fromkeys(app.FIELDS) | {"max_train_steps": 3}
    return list((values | changes).values())


LOOK = None, "word", "--center_crop"  # base, method and other flags, by which pictures are shown
