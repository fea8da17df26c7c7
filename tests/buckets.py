"""Emulators of Google's and Amazon's object stores, on this machine.

`python tests/buckets.py gs|s3 PORT` serves one until it is killed; the tests
start them. Google's keeps no promise of a generation: what tensorstore and a
lock need of the service is added here, as its pages tell it: the header
x-goog-generation, ifGenerationMatch (412) and ifGenerationNotMatch (304).
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

BUCKET = "bucket"


def _serve_gs(port: int) -> None:
  import logging

  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects
  import xxhash

  logging.disable()
  # It serves one request at a time; the others wait.
  http.server.HTTPServer.request_queue_size = 256
  download, insert, delete = objects.download, objects.insert, objects.delete
  # What changed, in order: read by `changes`.
  log = open(os.path.join(tempfile.gettempdir(), f"bucket-{port}"), "w")

  def generation(storage, bucket, name):
    try:
      return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
      return "0"

  def with_generation(request, response, storage, *args, **kwargs):
    params = request.params
    found = generation(storage, params["bucket_name"], params["object_id"])
    unwanted = request.query.get("ifGenerationNotMatch", [None])[0]
    if unwanted == found:
      response.status = http.HTTPStatus.NOT_MODIFIED
    else:
      response["x-goog-generation"] = found
      download(request, response, storage, *args, **kwargs)

  def if_it_matches(request, response, storage, *args, **kwargs):
    wanted = request.query.get("ifGenerationMatch", [None])[0]
    # In the query, or in the first part of the body.
    name = request.query.get("name", [None])[0]
    if name is None and isinstance(request.data, dict):
      name = request.data.get("meta", request.data).get("name")
    if wanted is not None and wanted != generation(
      storage, request.params["bucket_name"], name
    ):
      response.status = http.HTTPStatus.PRECONDITION_FAILED
      response.json({"error": {"code": 412, "message": "conditionNotMet"}})
      return None
    answer = insert(request, response, storage, *args, **kwargs)
    whole = request.query.get("uploadType", [None])[0] != "resumable"
    if whole and response.status == http.HTTPStatus.OK:
      data = storage.get_file(BUCKET, name)
      digest = xxhash.xxh3_128_hexdigest(data)
      # Of the sums of a step, what they say.
      said = data.decode() if name.endswith("/checksums.json") else ""
      print(json.dumps([name, digest, len(data), said]), file=log, flush=True)
    return answer

  def noted_delete(request, response, storage, *args, **kwargs):
    gone = [request.params["object_id"], None, 0, ""]
    print(json.dumps(gone), file=log, flush=True)
    return delete(request, response, storage, *args, **kwargs)

  objects.download, objects.insert = with_generation, if_it_matches
  objects.delete = noted_delete
  from gcp_storage_emulator.server import create_server

  create_server("127.0.0.1", port, True, default_bucket=BUCKET).run()


def _serve_s3(port: int) -> None:
  import boto3
  from moto.server import ThreadedMotoServer

  ThreadedMotoServer("127.0.0.1", port, verbose=False).start()
  client = boto3.client(
    "s3",
    endpoint_url=f"http://127.0.0.1:{port}",
    region_name="us-east-1",
    aws_access_key_id="key",
    aws_secret_access_key="secret",
  )
  client.create_bucket(Bucket=BUCKET)
  signal.pause()


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def environment(kind: str, port: int) -> dict[str, str]:
  """What points every library to the emulator."""
  address = f"http://127.0.0.1:{port}"
  if kind == "gs":
    nobody = "127.0.0.1:9"
    return {
      "STORAGE_EMULATOR_HOST": address,
      # Nobody looks for the accounts of a machine of Google's.
      "NO_GCE_CHECK": "true",
      **dict.fromkeys(
        ("GCE_METADATA_HOST", "GCE_METADATA_IP", "GCE_METADATA_ROOT"), nobody
      ),
    }
  return {
    "AWS_ENDPOINT_URL": address,
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
  }


@contextlib.contextmanager
def emulator(kind: str, port: int | None = None):
  """A process that serves `BUCKET` of a kind; its port."""
  port = port or free_port()
  process = subprocess.Popen(
    [sys.executable, os.path.abspath(__file__), kind, str(port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    deadline, is_there = time.monotonic() + 120, False
    while not is_there:
      assert process.poll() is None, "the emulator ended"
      assert time.monotonic() < deadline, "the emulator does not answer"
      time.sleep(0.1)
      # Whatever a client says of a server, or a bucket, that is not there yet.
      with contextlib.suppress(Exception):
        is_there = names(kind, port) == []
    yield port
  finally:
    process.kill()
    process.wait()


def objects(kind: str, port: int, prefix: str = "") -> dict[str, bytes]:
  """All objects of the bucket, by a client that is not fat5_jax's.

  Google's is asked by plain HTTP, Amazon's by its own library.
  """
  return {name: read(kind, port, name) for name in names(kind, port, prefix)}


def names(kind: str, port: int, prefix: str = "") -> list[str]:
  if kind == "s3":
    pages = _boto(port).get_paginator("list_objects_v2")
    return [
      entry["Key"]
      for page in pages.paginate(Bucket=BUCKET, Prefix=prefix)
      for entry in page.get("Contents", ())
    ]
  query = urllib.parse.urlencode({"prefix": prefix, "maxResults": 100_000})
  url = f"http://127.0.0.1:{port}/storage/v1/b/{BUCKET}/o?{query}"
  with urllib.request.urlopen(url) as answer:
    return [entry["name"] for entry in json.load(answer).get("items", ())]


def read(kind: str, port: int, name: str) -> bytes:
  if kind == "s3":
    return _boto(port).get_object(Bucket=BUCKET, Key=name)["Body"].read()
  path = urllib.parse.quote(name, safe="")
  url = f"http://127.0.0.1:{port}/download/storage/v1/b/{BUCKET}/o/{path}"
  with urllib.request.urlopen(f"{url}?alt=media") as answer:
    return answer.read()


def changes(port: int) -> list[tuple[str, str | None, int, str]]:
  """What Google's was told, in order: (name, xxh3_128 or None, bytes, what a
  step's sums say).
  """
  with open(os.path.join(tempfile.gettempdir(), f"bucket-{port}")) as file:
    return [tuple(json.loads(line)) for line in file]


def put(kind: str, port: int, name: str, data: bytes) -> None:
  if kind == "s3":
    _boto(port).put_object(Bucket=BUCKET, Key=name, Body=data)
    return
  query = urllib.parse.urlencode({"uploadType": "media", "name": name})
  url = f"http://127.0.0.1:{port}/upload/storage/v1/b/{BUCKET}/o?{query}"
  urllib.request.urlopen(urllib.request.Request(url, data, method="POST"))


def _boto(port: int):
  import boto3

  return boto3.client(
    "s3",
    endpoint_url=f"http://127.0.0.1:{port}",
    region_name="us-east-1",
    aws_access_key_id="key",
    aws_secret_access_key="secret",
  )


if __name__ == "__main__":
  {"gs": _serve_gs, "s3": _serve_s3}[sys.argv[1]](int(sys.argv[2]))
