"""Who may talk to the server of the page, and what a browser may do with its answers.

Any web site can make a visitor's browser send requests here, under a name of its own that it lets point to this
computer (DNS rebinding). So a request must name a host that this server is known by, and come from its own page.
"""

import ipaddress
import os
import re
import socket
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse


LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
SPACES = "https://huggingface.co https://*.hf.space"  # a Space is a frame in the Hub's page
SHOWN = {f"image/{kind}" for kind in ("png", "jpeg", "webp", "gif", "bmp", "avif")}  # pictures that cannot be programs
A_FILE = re.compile(r"/file[=/]")


def is_loopback(host):
    """Whether an address to listen at is reached from this computer alone."""
    address = as_address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def as_address(host):
    """The IP address that a host is, or None for a name."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def host_of(netloc):
    """The host of a Host header, or of the part of an address that is like one; "" where there is none."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """ASGI middleware that answers only the page itself, and lets no picture be a program.

    Args:
        app: what it guards.
        host: that the server listens at.
        names: more names of the server, such as a proxy's.
    """

    def __init__(self, app, host, names=()):
        self.app, self.only_here = app, is_loopback(host)
        space = os.environ.get("SPACE_HOST", "")
        self.names = {name.lower() for name in (*names, *space.split(",")) if name}
        self.known = LOOPBACK_NAMES | {host.strip("[]").lower()} | self.names
        if not self.only_here:
            own = socket.gethostname().lower()
            self.known |= {own, f"{own.split('.')[0]}.local", socket.getfqdn().lower()}
        self.frames = "frame-ancestors " + (SPACES if space else "'none'")

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        if why := self.refusal(scope):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await PlainTextResponse(f"{why}\n", 403)(scope, receive, send)

        async def guarded(message):
            if message["type"] == "http.response.start":
                self.limit(MutableHeaders(scope=message), scope["path"])
            await send(message)

        await self.app(scope, receive, guarded)

    def refusal(self, scope):
        """Why a request is not answered; None where it is."""
        headers = Headers(scope=scope)
        hosts, origin = headers.getlist("host"), headers.get("origin")
        if len(hosts) != 1 or not self.is_known(host_of(hosts[0])):
            return "This server is not known by that name: its owner can allow it with --allow_host."
        if origin is not None and not self.is_own_page(origin, hosts[0]):
            return "This server answers its own page only."
        if re.search(r"/file[=/]\s*[a-z][a-z0-9+.-]*:", unquote(scope["path"]), re.IGNORECASE):
            return "This server fetches nothing for its visitors."
        return None

    def is_known(self, host):
        """Whether this server goes by a name; an address of its network cannot be made to point elsewhere."""
        return host in self.known or (not self.only_here and as_address(host) is not None)

    def is_own_page(self, origin, host):
        """Whether an Origin header is that of the page at a Host header, or at a proxy's name."""
        scheme, _, netloc = origin.lower().partition("://")
        port = {"http": ":80", "https": ":443"}.get(scheme, "")
        return netloc.removesuffix(port) == host.lower().removesuffix(port) or host_of(netloc) in self.names

    def limit(self, headers, path):
        """What a browser may do with an answer."""
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Cross-Origin-Resource-Policy"] = "same-origin"
        headers["Referrer-Policy"] = "same-origin"
        headers["Content-Security-Policy"] = self.frames
        if self.frames.endswith("'none'"):
            headers["X-Frame-Options"] = "DENY"
        if A_FILE.search(path):
            headers["Content-Security-Policy"] = f"default-src 'none'; sandbox; {self.frames}"
            if headers.get("content-type", "").partition(";")[0].strip().lower() not in SHOWN:
                found = headers.get("content-disposition", "attachment")
                headers["Content-Disposition"] = re.sub("^inline", "attachment", found)
