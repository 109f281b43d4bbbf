"""A service that keeps itself registered, and drains itself before it ends.

    python3 examples/python/service.py http://127.0.0.1:9901
"""

import http.client
import json
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GATEWAY = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:9901"
TTL = 5  # seconds


class Hello(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = b"hello from Python\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
path = f"/services/hello/python-{os.getpid()}"
address = f"http://127.0.0.1:{server.server_port}"
over = threading.Event()


def call(method, path, body=None, timeout=10):
    """The status of a call of the gateway's API, or None if nobody answers."""
    headers = {"Content-Type": "application/json"} if body else {}
    if "KERBEROS_TOKEN" in os.environ:
        headers["Authorization"] = "Bearer " + os.environ["KERBEROS_TOKEN"]
    request = urllib.request.Request(GATEWAY + path, body and json.dumps(body).encode(), headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def keep():
    """Renews the lease three times in its time, and registers again where the gateway has forgotten it."""
    registered = False
    while not over.is_set():
        if registered:
            registered = call("POST", path + "/heartbeat") == 204
        if not registered:
            registered = call("PUT", path, {"addr": address, "ttl": f"{TTL}s"}) == 204
            print("registered" if registered else "not registered", flush=True)
        over.wait(TTL / 3 if registered else 0.5)


signal.signal(signal.SIGTERM, lambda *_: over.set())
signal.signal(signal.SIGINT, lambda *_: over.set())
threading.Thread(target=server.serve_forever, daemon=True).start()
keeper = threading.Thread(target=keep)
keeper.start()
over.wait()
keeper.join()
call("DELETE", path + "?drain=30s", timeout=40)  # returns when no request is under way any more
server.shutdown()
