"""A server on this machine that speaks the Hugging Face hub's protocol.

What `huggingface_hub` asks to fetch a repository: its revisions, its files,
their contents. It notes what it was asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse


class Hub:
  """Repositories by (kind, name), each a list of commits, {file: bytes}.

  Attributes:
    asked: lines of requests, in order.
    private: names of repositories that need a token.
    failures: how many of the next requests are answered by 503.
  """

  def __init__(self):
    self.repos: dict[tuple[str, str], list[tuple[str, dict[str, bytes]]]] = {}
    self.asked: list[str] = []
    self.private: set[str] = set()
    self.failures = 0

  def commit(self, name: str, files: dict[str, bytes], kind="models") -> str:
    """A new commit of a repository, which is `main` from now on; its hash."""
    sha = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
    self.repos.setdefault((kind, name), []).append((sha, files))
    return sha

  def _at(self, kind, name, revision):
    commits = self.repos[kind, name]
    if revision in ("main", None):
      return commits[-1]
    return next(((s, f) for s, f in commits if s == revision), None)

  def answer(self, method: str, path: str, token: str | None):
    """(status, headers, body) of a request."""
    path = urllib.parse.unquote(urllib.parse.urlparse(path).path)
    self.asked.append(f"{method} {path}")
    if self.failures:
      self.failures -= 1
      return 503, {}, b"busy"
    is_api = path.startswith("/api/")
    parts = path.removeprefix("/api").strip("/").split("/")
    kind = "models"
    if parts[0] in ("models", "datasets"):
      kind, parts = parts[0], parts[1:]
    name, rest = "/".join(parts[:2]), parts[2:]
    if name in self.private and not token:
      return 401, {"X-Error-Code": "GatedRepo"}, b"{}"
    if (kind, name) not in self.repos:
      return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    revision = rest[1] if len(rest) > 1 else None
    found = self._at(kind, name, revision)
    if found is None:
      return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    sha, files = found
    if is_api:
      if rest and rest[0] == "tree":
        value = [
          {
            "type": "file",
            "path": file,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
          }
          for file, data in files.items()
        ]
      else:
        siblings = [{"rfilename": file} for file in files]
        value = {"id": name, "sha": sha, "siblings": siblings, "tags": []}
        value |= {"private": False, "downloads": 0}
      return 200, {"Content-Type": "application/json"}, json.dumps(value)
    file = "/".join(rest[2:])
    if file not in files:
      return 404, {"X-Error-Code": "EntryNotFound"}, b""
    etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
    return 200, {"X-Repo-Commit": sha, "ETag": etag}, files[file]


@contextlib.contextmanager
def served():
  """(a Hub, its address) while it lasts."""
  hub = Hub()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self):
      token = self.headers.get("Authorization")
      status, headers, body = hub.answer(self.command, self.path, token)
      body = body.encode() if isinstance(body, str) else body
      asked = self.headers.get("Range")
      if asked and status == 200:
        first = int(asked.removeprefix("bytes=").split("-")[0])
        status, body = 206, body[first:]
      self.send_response(status)
      for key, value in headers.items():
        self.send_header(key, value)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      if self.command != "HEAD":
        self.wfile.write(body)

    do_GET = do_HEAD = _answer

    def log_message(self, *more):
      del more

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield hub, f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    server.server_close()
