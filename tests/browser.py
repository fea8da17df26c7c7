"""A headless Chromium, told by its own protocol through two pipes.

`make .venv/chromium` unpacks one from npm; without it tests skip.
"""

import base64
import glob
import json
import os
import subprocess
import tempfile

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FOLDER = os.path.join(ROOT, ".venv", "chromium")


def find():
  """The program; a skip with the reason where there is none."""
  path = os.path.join(FOLDER, "chromium")
  if not os.path.exists(path):
    pytest.skip("no headless browser: make .venv/chromium")
  return path


class Browser:
  """`with Browser() as browser: browser.open(url)`."""

  def __init__(self):
    self._folder = tempfile.TemporaryDirectory(prefix="fat5_jax_browser_")
    to_read, self._write = os.pipe()
    self._read, to_write = os.pipe()
    libraries = glob.glob(os.path.join(FOLDER, "*", "lib"))
    fonts = os.path.join(self._folder.name, "fonts.conf")
    with open(fonts, "w", encoding="utf-8") as file:
      file.write(
        f"<fontconfig><dir>{FOLDER}/fonts</dir><dir>/usr/share/fonts</dir>"
        f"<cachedir>{self._folder.name}</cachedir></fontconfig>"
      )
    # The browser reads file descriptor 3 and writes 4.
    script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
    self._process = subprocess.Popen(
      [
        *("bash", "-c", script, "browser", find(), "--headless", "about:blank"),
        *("--no-sandbox", "--disable-gpu", "--single-process", "--no-zygote"),
        *("--remote-debugging-pipe", f"--user-data-dir={self._folder.name}"),
      ],
      pass_fds=(to_read, to_write),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      env=os.environ
      | {"LD_LIBRARY_PATH": ":".join(libraries), "FONTCONFIG_FILE": fonts},
    )
    os.close(to_read)
    os.close(to_write)
    self._left, self._number, self._session = b"", 0, None
    self.errors = []

  def _ask(self, method, **parameters):
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    while True:
      found = self._next()
      if found.get("id") == self._number:
        assert "error" not in found, found["error"]
        return found["result"]
      if found.get("method") in (
        *("Runtime.exceptionThrown", "Log.entryAdded"),
      ):
        self.errors.append(found["params"])

  def _next(self):
    while b"\0" not in self._left:
      piece = os.read(self._read, 1 << 16)
      assert piece, "the browser has ended"
      self._left += piece
    message, self._left = self._left.split(b"\0", 1)
    return json.loads(message)

  def open(self, path, dark=False, size=(1200, 900)):
    """Loads a file, as light or dark as a person has it."""
    if self._session is None:
      target = self._ask("Target.createTarget", url="about:blank")
      self._session = self._ask(
        "Target.attachToTarget", targetId=target["targetId"], flatten=True
      )["sessionId"]
      for name in ("Page", "Runtime", "Log"):
        self._ask(f"{name}.enable")
    scheme = {"name": "prefers-color-scheme", "value": "dark" * dark or "light"}
    self._ask("Emulation.setEmulatedMedia", features=[scheme])
    width, height = size
    self._ask(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )
    self._ask("Page.navigate", url=f"file://{os.path.abspath(path)}")
    ready = "new Promise(done => document.readyState === 'complete' ? done() :"
    self.run(f"{ready} addEventListener('load', done))")

  def run(self, script):
    """The value of an expression."""
    found = self._ask(
      "Runtime.evaluate",
      expression=script,
      returnByValue=True,
      awaitPromise=True,
    )
    assert "exceptionDetails" not in found, found["exceptionDetails"]
    return found["result"].get("value")

  def picture(self, path):
    """All of the page, as a PNG."""
    data = self._ask(
      "Page.captureScreenshot", captureBeyondViewport=True, format="png"
    )
    with open(path, "wb") as file:
      file.write(base64.b64decode(data["data"]))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._process.kill()
    self._process.wait()
    os.close(self._read)
    os.close(self._write)
    self._folder.cleanup()
