"""Who may do what on the page: each row of the table in docs/web.md, through HTTP, on each of its three places."""

import contextlib
import io
import subprocess
import threading

import pytest
from page import LOOK, Refused, Visitor, app, form, served
from PIL import Image
from test_app import wait_for

from personalization.web import app_runs, processes


PLACES = {
    "here": ([], {}, "127.0.0.1"),
    "network": (["--host", "0.0.0.0", "--allow_host", "photos.example.org"], {}, "photos.example.org"),
    "space": (["--host", "0.0.0.0"], {"SPACE_HOST": "me-page.hf.space"}, "me-page.hf.space"),
}
OWNERS = {"HF_TOKEN": "hf_owner", "HF_TOKEN_PATH": "/home/owner/token", "HF_HOME": "/home/owner/hf", "MY_API_KEY": "k"}


@pytest.fixture(scope="module", params=PLACES)
def place(request, tmp_path_factory):
    """A server at a place with one picture in a concept: (the place, page, workspace's folder)."""
    words, environment, _ = PLACES[request.param]
    root = tmp_path_factory.mktemp("trust") / "workspace"
    with served(root, *words, **environment) as page:
        yield request.param, page, root


@pytest.fixture
def visitor(place):
    return Visitor(place[1], host=PLACES[place[0]][2])


@pytest.fixture
def started(place, monkeypatch):
    """What processes are started with instead of being started: (command, environment) pairs."""

    def sleep(command, log, mark, environment):
        process = subprocess.Popen(["sleep", "60"], start_new_session=True, env=environment | {processes.MARK: mark})
        threading.Thread(target=process.wait, daemon=True).start()
        sleeping.append(process)
        found.append((command, environment))
        return process, {"mark": mark, "pid": process.pid}

    found, sleeping = [], []
    monkeypatch.setattr(app_runs, "spawn", sleep)
    yield found
    for process in sleeping:
        process.kill()


def png(size=(64, 64), colour="red", kind="PNG"):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, kind)
    return content.getvalue()


def stop(place, visitor, run):
    visitor.do("stop", run)
    wait_for(lambda: not app_runs.Run(place[2] / "runs" / run).is_alive())


def with_pictures(visitor, concept="my-toy"):
    visitor.do("upload", visitor.upload(("a.png", png())), concept, *LOOK)


# Hosts and web sites ---------------------------------------------------------------------------------


def test_visitors_are_answered(place, visitor):
    assert "Teach a model" in visitor.get("/").text
    assert "&#x27;nowhere&#x27; " in visitor.do("command", 0, None, *form("nowhere"))[0]
    own_page = {"here": f"http://127.0.0.1:{place[1].server_port}"}.get(place[0], f"https://{PLACES[place[0]][2]}")
    port = f":{place[1].server_port}" if place[0] == "here" else ""
    assert visitor.get("/", host=PLACES[place[0]][2] + port, origin=own_page).status_code == 200
    here = Visitor(place[1])  # as the machine itself calls it
    assert here.get("/").status_code == 200
    assert here.get("/", host=f"localhost:{place[1].server_port}").status_code == 200


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/file=/etc/passwd", "/gradio_api/heartbeat/x"])
@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:{port}", "127.0.0.1.evil.com", "localhost.evil.com:80", "", "[", "a b"]
)
def test_a_name_that_was_pointed_here_is_refused(place, path, host):
    """DNS rebinding: the browser believes that the server is evil.com's."""
    host = host.format(port=place[1].server_port)
    for origin in ({}, {"origin": f"http://{host}"}):
        answer = Visitor(place[1]).get(path, host=host, **origin)
        assert answer.status_code in (400, 403) and len(answer.text) < 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.com", "https://evil.com:7860", "null", "http://127.0.0.1:1", "file://", "http://localhost", ""],
)
def test_another_web_site_starts_nothing(place, visitor, started, origin):
    with_pictures(visitor)
    with pytest.raises(Refused, match="status 403: This server answers its own page only"):
        visitor.do("start", "", *form(str(app.DEMO_BASE)), origin=origin)
    assert visitor.client.post("/gradio_api/upload", headers={"origin": origin}).status_code == 403
    assert not started


def test_addresses_of_a_network_are_its_own(place, visitor):
    answer = Visitor(place[1]).get("/", host="192.168.1.7:7860")
    assert answer.status_code == (403 if place[0] == "here" else 200)


def test_who_may_frame_the_page(place, visitor):
    headers = visitor.get("/").headers
    if place[0] == "space":
        assert headers["content-security-policy"].startswith("frame-ancestors https://huggingface.co ")
        assert "x-frame-options" not in headers
    else:
        assert headers["content-security-policy"] == "frame-ancestors 'none'" and headers["x-frame-options"] == "DENY"


# Files -----------------------------------------------------------------------------------------------


def test_what_is_read(place, visitor, repo, tmp_path):
    root = place[2]
    with_pictures(visitor)
    assert visitor.file(f"{root}/concepts/my-toy/a.png").content == png()
    (root / "secret.txt").write_text("hidden")
    (root / "concepts" / "link").unlink(missing_ok=True)
    (root / "concepts" / "link").symlink_to("/etc")
    for path in (
        "/etc/passwd",
        repo / "README.md",
        root / "secret.txt",
        f"{root}/concepts/../secret.txt",
        f"{root}/concepts/link/passwd",
        f"{root}/.starting",
    ):
        assert visitor.file(path).status_code in (403, 404), path


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x", "https://evil.com/a.html", "HTTP://evil.com", "ftp://x", "file:///etc/passwd"]
)
def test_the_server_fetches_nothing_for_visitors(visitor, url):
    for path in (f"file={url}", f"file/{url}", "file=" + url.replace(":", "%3A").replace("/", "%2F")):
        assert visitor.get(f"/gradio_api/{path}").status_code == 403
    for path in (f"proxy={url}", "proxy=" + url.replace(":", "%3A").replace("/", "%2F")):
        assert visitor.get(f"/gradio_api/{path}").status_code >= 400


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "https://evil.com/a.png"])
def test_no_address_is_fetched_in_the_place_of_a_file(visitor, url, monkeypatch):
    download = "gradio.processing_utils.async_ssrf_protected_download"
    monkeypatch.setattr(download, lambda *_, **__: pytest.fail("fetched"))
    sent = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Refused, match="fetches nothing for its visitors"):
        visitor.do("upload", [sent], "fetched", *LOOK)


PROGRAMS = {
    "a.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "a.html": b"<script>alert(1)</script>",
    "a.xml": b"<?xml version='1.0'?><x/>",
    "a.pdf": b"%PDF-1.4",
    "a.xhtml": b"<html xmlns='http://www.w3.org/1999/xhtml'><script>alert(1)</script></html>",
    "a.js": b"alert(1)",
    "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "noname": b"<html>",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_file_is_a_program_of_the_page(place, visitor, name):
    """Uploaded, it is not in a concept; from wherever it is served, it is a download."""
    (sent,) = visitor.upload((name, PROGRAMS[name]))
    visitor.do("upload", [sent], "programs", *LOOK)
    folder = place[2] / "concepts" / "programs"
    assert not list(folder.glob("*"))
    (folder / name).write_bytes(PROGRAMS[name])  # as the owner of the workspace could
    for path in (folder / name, sent["path"]):
        for headers in ({}, {"Range": "bytes=0-3"}):
            answer = visitor.file(path, **headers)
            assert answer.status_code in (200, 206)
            assert answer.headers["content-disposition"].startswith("attachment")
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in answer.headers["content-security-policy"]
    (folder / name).unlink()


def test_pictures_are_shown(place, visitor):
    with_pictures(visitor)
    (place[2] / "concepts" / "my-toy" / "b.png").write_bytes(PROGRAMS["a.html"])
    for name in ("a.png", "b.png"):
        answer = visitor.file(place[2] / "concepts" / "my-toy" / name)
        assert answer.headers["content-type"] == "image/png" and answer.headers["x-content-type-options"] == "nosniff"
        assert not answer.headers.get("content-disposition", "").startswith("attachment")
    (place[2] / "concepts" / "my-toy" / "b.png").unlink()


def test_a_postscript_file_named_as_a_picture_is_not_run(visitor, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript ran"))
    found = visitor.do("upload", visitor.upload(("a.png", PROGRAMS["a.eps"])), "postscript", *LOOK)
    assert "cannot be read" in str(found)


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(place, visitor, monkeypatch):
    bomb = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(bomb, "PNG")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(Refused, match="a.png has 13000 x 13000 pixels: scale it down"):
        visitor.do("upload", visitor.upload(("a.png", bomb.getvalue())), "bomb", *LOOK)
    folder = place[2] / "concepts" / "bomb"
    (folder / "b.png").write_bytes(bomb.getvalue())
    assert "b.png</b> has 13000 x 13000 pixels" in str(visitor.do("choose_concept", "bomb"))


def test_a_picture_is_decoded_once_for_all_visitors(place, visitor, monkeypatch):
    with_pictures(visitor, "seen")
    monkeypatch.setattr(app.Workspace.review.__globals__["images"], "to_rgb", lambda *_: pytest.fail("decoded again"))
    assert "One picture only" in str(Visitor(place[1]).do("choose_concept", "seen"))


@pytest.mark.parametrize("folder", ["/etc", "../..", "concepts/../../secret", "~", "/proc/self"])
def test_no_folder_outside_is_read(visitor, folder):
    with pytest.raises(Refused, match="outside the workspace|is not a folder"):
        visitor.do("copy_folder", folder, "outside", "", *LOOK)


@pytest.mark.parametrize("name", ["../../evil", "/evil", "..", "a/../../evil", "C:\\evil", "~/evil", "evil\n/../.."])
def test_nothing_is_written_outside(place, visitor, started, name):
    """Whatever a concept or a picture is called, it is a folder of concepts and a file in that."""
    outside = {path for path in place[2].parent.rglob("*") if not path.is_relative_to(place[2])}
    concept = visitor.do("upload", visitor.upload((f"x{name}.png", png())), name, *LOOK)[1]["value"]
    assert len(list((place[2] / "concepts" / concept).glob("*.png"))) == 1
    visitor.do("save_caption", name, event={"picture": f"{name}.png", "caption": "x"})
    run = visitor.do("start", "", *form(str(app.DEMO_BASE), concept=name))[0]["value"]
    stop(place, visitor, run)
    for folder in ("concepts", "runs"):
        assert all(len(path.relative_to(place[2]).parts) == 2 for path in (place[2] / folder).iterdir())
    words = started[0][0]
    written = [words[words.index(f"--{flag}") + 1] for flag in ("output_dir", "quantized_cache_dir")]
    assert all(app.Path(path).resolve().is_relative_to(place[2]) for path in written)
    assert {path for path in place[2].parent.rglob("*") if not path.is_relative_to(place[2])} == outside
    assert not app.Path("/evil").exists() and not app.Path("/evil.png").exists()


# The owner's login -----------------------------------------------------------------------------------


def test_whose_login_a_process_has(place, visitor, started, monkeypatch):
    """On this computer the visitor is its owner; elsewhere nothing secret of the owner goes with a process."""
    for name, value in OWNERS.items():
        monkeypatch.setenv(name, value)
    with_pictures(visitor)
    run, *_ = visitor.do("start", "", *form(str(app.DEMO_BASE)))
    stop(place, visitor, run["value"])
    visitor.do("start", "hf_visitor", *form(str(app.DEMO_BASE)))
    (_, without), (_, with_token) = started
    assert with_token["HF_TOKEN"] == "hf_visitor"
    for environment in (without, with_token):
        if place[0] == "here":
            assert environment["HF_HOME"] == OWNERS["HF_HOME"] and environment["MY_API_KEY"] == "k"
        else:
            assert environment["HF_HOME"] == str(place[2] / "cache" / "hub")
            assert not {"HF_TOKEN_PATH", "MY_API_KEY"} & environment.keys()
            assert "hf_owner" not in environment.values()
    assert without.get("HF_TOKEN") == ("hf_owner" if place[0] == "here" else None)
    stop(place, visitor, visitor.do("load", {})[1]["value"])


def test_whose_login_pushes(place, visitor, started):
    with_pictures(visitor)
    run = visitor.do("start", "", *form(str(app.DEMO_BASE)))[0]["value"]
    stop(place, visitor, run)
    del started[:]
    if place[0] == "here":
        threading.Timer(1, lambda: [process.kill() for process in living()]).start()
        assert "The process ended early" in str(visitor.do("push", run, "alice/toy", True, ""))
        ((command, _),) = started
        assert "--push_only" in command
    else:
        assert "Give a token of your own" in str(visitor.do("push", run, "alice/toy", True, " "))
        assert not started


def living():
    return [p for p in processes.psutil.process_iter() if p.name() == "sleep" and processes.MARK in environment_of(p)]


def environment_of(process):
    with contextlib.suppress(processes.psutil.Error):
        return process.environ()
    return {}


# What visitors may ask for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        "--output_dir /etc",
        "--trust_remote_code",
        "--push_to_hub",
        "--report_to wandb",
        "--hub_token x",
        "--logging_dir /",
    ],
)
def test_no_flag_names_a_file_or_leaves_the_server(visitor, started, others):
    with_pictures(visitor)
    with pytest.raises(Refused, match="cannot be set here"):
        visitor.do("start", "", *form(str(app.DEMO_BASE), others=others))
    assert not started


def test_one_training_and_one_drawing_at_a_time(place, visitor, started):
    with_pictures(visitor)
    run = visitor.do("start", "", *form(str(app.DEMO_BASE)))[0]["value"]
    other = Visitor(place[1], host=PLACES[place[0]][2])
    waits = other.do("start", "", *form(str(app.DEMO_BASE), concept="my-toy"))[0]["value"]
    assert "<b>Waiting</b>" in str(other.do("observe", waits, None)) and len(started) == 1
    other.do("stop", waits)
    stop(place, visitor, run)
    output = place[2] / "runs" / run / run
    output.mkdir()
    (output / "learned_embeds.safetensors").write_bytes(b"")
    book = app_runs.RunBook(app.Workspace(place[2]))
    first = book.draw(book.open(run), "a {}", 1, 0, 1, 4)
    next(first)
    for _ in range(3):
        assert "Images are on the way: one visitor at a time" in str(visitor.do("draw", run, "a {}", 1, 0, 1, 4))
    assert len(list((place[2] / "runs" / run / "drawings").iterdir())) == 1 and len(started) == 2
