"""A Hub on this machine, as much of it as an upload of small files needs."""

import base64
import http.server
import json
import threading


class Hub:
    """
    Takes what is uploaded to a repository: `files`, path -> content; `requests`, (path, authorization) of each;
    `created`, what the repository was made with.
    """

    def __init__(self):
        self.requests, self.files, self.created = [], {}, {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = self.read_chunks()
                hub.requests.append((self.path, self.headers.get("Authorization")))
                self.answer(hub.take(self.path, body))

            def do_GET(self):
                self.answer({})

            def read_chunks(self):
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def answer(self, value):
                content = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def take(self, path, body):
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return {"url": f"{self.address}/datasets/{self.created['organization']}/{self.created['name']}"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            url = f"{self.address}/datasets/someone/toy/commit/0123456789abcdef"
            return {"commitUrl": url, "commitOid": "0123456789abcdef", "success": True}
        return {"errors": [], "warnings": []}
