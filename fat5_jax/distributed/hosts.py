"""Many hosts: who is there, whether they agree, and what if one goes.

A roll call beside jax's own coordinator: every process keeps a TCP connection
to host 0, on the port after the coordinator's, for as long as it lives. So a
host that never comes, that runs another configuration, or that dies is named
within seconds, where a collective would only wait or crash. The messages are
lines of JSON. One process needs, and does, none of this.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
import dataclasses
import itertools
import json
import os
import queue
import socket
import sys
import threading
import time
from typing import Any

import fat5_jax
from fat5_jax.errors import UserError

# A host whose network is silent for 10 + 4 * 5 seconds is gone.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_RETRY_SECONDS = 0.2
_NEWS_SECONDS = 3.0
# A host that is this late is lost in another part of the program; one that is
# gone is told at once.
_AGREE_SECONDS = 1800.0


@dataclasses.dataclass(frozen=True)
class Place:
  """This process among all: the coordinator's address, how many, which."""

  address: str
  count: int
  index: int
  local_device_ids: list[int] | None = None


def find_place(
  address: str | None = None, count: int | None = None, index: int | None = None
) -> Place | None:
  """Where this process stands: by flags, or by what the environment says.

  Cloud TPU (GCE, GKE), SLURM and Open MPI are known by jax. None is a process
  alone.

  Raises:
    UserError: if some of the flags are missing or wrong.
  """
  given = {
    "coordinator_address": address,
    "process_count": count,
    "process_index": index,
  }
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if not missing:
    if ":" not in address:
      raise UserError(f"--coordinator_address={address}: write HOST:PORT")
    if not 0 <= index < count:
      raise UserError(
        f"--process_index={index} is not one of 0 to {count - 1}"
        f" (--process_count={count})"
      )
    return Place(address, count, index)
  if len(missing) < len(given):
    raise UserError(
      f"with --{', --'.join(set(given) - {m[2:] for m in missing})}"
      f" also give {', '.join(missing)}"
    )
  if not _cluster_says_several():
    return None
  # jax has no public name for what its own initialize() asks.
  from jax._src import clusters

  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, None, 300
  )
  if found[0] is None or not found[1] or found[1] == 1:
    return None
  return Place(*found)


def _cluster_says_several() -> bool:
  """Whether the environment is one of several processes.

  A quick look, so that a laptop with libtpu, or a login node, does not ask a
  metadata server.
  """
  number = lambda name: int(os.environ.get(name) or 1)
  if number("OMPI_COMM_WORLD_SIZE") > 1:
    return True
  if "SLURM_PROCID" in os.environ and number("SLURM_NTASKS") > 1:
    return True
  if os.environ.get("JAX_PLATFORMS", "tpu").find("tpu") < 0:
    return False
  on_tpu = any(
    name.startswith(("accel", "vfio")) for name in os.listdir("/dev")
  )
  several = "," in os.environ.get("TPU_WORKER_HOSTNAMES", ",")
  return on_tpu and several


class _Line:
  """A connection that carries a line of JSON a message."""

  def __init__(self, connection: socket.socket):
    self._socket = connection
    self._reader = connection.makefile(encoding="utf-8")

  def send(self, message: Mapping[str, Any]) -> None:
    try:
      self._socket.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
      pass  # Its listener says that it is gone.

  def receive(self, timeout: float) -> dict[str, Any]:
    """The next message; raises OSError or ValueError where none comes."""
    self._socket.settimeout(timeout)
    return json.loads(self._reader.readline())

  def keep_alive(self) -> None:
    """Waits for as long as the other end, and the way to it, live."""
    self._socket.settimeout(None)
    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
      if hasattr(socket, name):
        option = getattr(socket, name)
        self._socket.setsockopt(socket.IPPROTO_TCP, option, value)

  def __iter__(self):
    return map(json.loads, self._reader)


class _Alone:
  """The roll call of one process."""

  count, index = 1, 0

  def agree(self, what: str, value: Any) -> None:
    """Nobody to differ from."""

  def leave(self, reason: str | None = None) -> None:
    """Nobody to tell."""


class RollCall:
  """The connections between host 0 and the others.

  Raises:
    UserError: if a host does not come in time, or two say that they are the
      same one.
  """

  def __init__(self, place: Place, timeout: float):
    self.count, self.index = place.count, place.index
    self.name = socket.gethostname()
    host, port = place.address.rsplit(":", 1)
    self._address = (host.strip("[]"), int(port) + 1)
    self._timeout = timeout
    self._leaving = threading.Event()
    self._inbox: queue.Queue = queue.Queue()
    self._names = {self.index: self.name}
    # Host 0 has one of each other host, the others have one of host 0.
    self._peers: dict[int, _Line] = {}
    deadline = time.monotonic() + timeout
    if self.index == 0:
      self._receive_all(deadline)
    else:
      self._report(deadline)
    for peer, line in self._peers.items():
      line.keep_alive()
      threading.Thread(
        target=self._listen, args=(peer, line), daemon=True
      ).start()

  # ---- Coming together ----

  def _receive_all(self, deadline: float) -> None:
    port = self._address[1]
    try:
      if socket.has_dualstack_ipv6():
        server = socket.create_server(
          ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
        )
      else:
        server = socket.create_server(("", port))
    except OSError as e:
      raise UserError(
        f"host 0 ({self.name}) cannot listen on port {port}, the one after the"
        f" coordinator's: {e.strerror}. Choose another --coordinator_address"
      ) from None
    with server:
      server.listen(self.count)
      while len(self._peers) < self.count - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
          connection, _ = server.accept()
        except TimeoutError:
          self._refuse(self._absent())
        try:
          line = _Line(connection)
          hello = line.receive(10)
          index, name = hello["index"], hello["name"]
        except (OSError, ValueError, KeyError, TypeError):
          continue  # Somebody else's knock at the port.
        known = self._names.get(index)
        if hello["count"] != self.count or known is not None:
          message = (
            f"a process on {name} says that it is number {index} of"
            f" {hello['count']}; host 0 ({self.name}) is one of {self.count},"
            f" number {index} is {known or 'not there yet'}. Give every process"
            " the same --process_count and its own --process_index"
          )
          line.send({"error": message})
          self._refuse(message)
        self._peers[index] = line
        self._names[index] = name
    for line in self._peers.values():
      line.send({"names": self._names})

  def _absent(self) -> str:
    absent = sorted(set(range(self.count)) - set(self._names))
    came = ", ".join(self._title(i) for i in sorted(self._names))
    return (
      f"{len(absent)} of {self.count} hosts did not come within"
      f" {self._timeout:g} s: {', '.join(map(str, absent))}. There are: {came}."
      " See whether they were started, reach"
      f" {self._address[0]}:{self._address[1] - 1} and the port after it, and"
      " raise --initialization_timeout if they only need longer"
    )

  def _refuse(self, message: str) -> None:
    for line in self._peers.values():
      line.send({"error": message})
    raise UserError(message)

  def _report(self, deadline: float) -> None:
    hello = {"index": self.index, "name": self.name, "count": self.count}
    while True:
      try:
        line = _Line(socket.create_connection(self._address, timeout=5))
        line.send(hello)
        # Host 0 answers when all are there.
        answer = line.receive(max(1.0, deadline + 5 - time.monotonic()))
        break
      except (OSError, ValueError):
        if time.monotonic() > deadline:
          raise UserError(
            f"host {self.index} ({self.name}): host 0 does not answer at"
            f" {self._address[0]}:{self._address[1]} for {self._timeout:g} s."
            " Is it started, and is the port open?"
          ) from None
        time.sleep(_RETRY_SECONDS)
    if "names" not in answer:
      raise UserError(answer.get("error", "host 0 went away while waiting"))
    self._names = {int(i): name for i, name in answer["names"].items()}
    self._peers = {0: line}

  def _title(self, index: int) -> str:
    return f"{index} ({self._names[index]})"

  # ---- While all are there ----

  def _listen(self, peer: int, line: _Line) -> None:
    """Puts messages where they are waited for; ends the process if one goes."""
    reason = "is gone: killed, out of memory, or its network is down"
    try:
      for message in line:
        if "bye" in message:
          return
        if "gone" in message:
          self._stop(message["gone"])
        elif "stopped" in message:
          reason = f"stopped: {message['stopped']}"
        else:
          self._inbox.put((peer, message))
    except (OSError, ValueError):
      pass
    self._stop(f"host {self._title(peer)} {reason}")

  def _stop(self, what: str) -> None:
    if self._leaving.is_set():
      return
    self._leaving.set()
    if self.index == 0:
      for line in self._peers.values():
        line.send({"gone": what})
    print(
      f"error: {what}. Host {self._title(self.index)} stops too; the last"
      " checkpoint is whole. Start all hosts again to go on",
      file=sys.stderr,
      flush=True,
    )
    # The main thread waits in a collective that will never end.
    os._exit(1)

  def agree(self, what: str, value: Any) -> None:
    """Returns once all hosts have said the same.

    Raises:
      UserError: on every host, naming those that differ and how.
    """
    mine = json.dumps(value, sort_keys=True)
    if self.index:
      self._peers[0].send({"what": what, "value": mine})
      answer = self._await(what)[1]
    else:
      said = {0: mine}
      while len(said) < self.count:
        peer, message = self._await(what)
        said[peer] = message["value"]
      answer = {"what": what, "error": self._difference(what, said)}
      for line in self._peers.values():
        line.send(answer)
    if answer["error"]:
      raise UserError(answer["error"])

  def _await(self, what: str) -> tuple[int, Mapping[str, Any]]:
    try:
      peer, message = self._inbox.get(timeout=_AGREE_SECONDS)
    except queue.Empty:
      raise UserError(
        f"hosts did not agree on {what} within {_AGREE_SECONDS:g} s: one of"
        " them is elsewhere in the program, or very slow"
      ) from None
    if message["what"] != what:
      raise UserError(
        f"host {self._title(peer)} is at {message['what']!r}, this one at"
        f" {what!r}"
      )
    return peer, message

  def _difference(self, what: str, said: Mapping[int, str]) -> str | None:
    votes = collections.Counter(said.values())
    common = max(votes, key=lambda value: (votes[value], value == said[0]))
    others = sorted(i for i, value in said.items() if value != common)
    if not others:
      return None
    first = others[0]
    usual = next(i for i, value in said.items() if value == common)
    here, there = _first_difference(common, said[first])
    return (
      f"hosts differ in {what}: {', '.join(map(self._title, others))} of"
      f" {self.count}. Host {self._title(usual)}: {here!r}, host"
      f" {self._title(first)}: {there!r}"
    )

  def wait_for_news(self) -> None:
    """Gives the listeners time to say that a host is gone, and to end this."""
    time.sleep(_NEWS_SECONDS)

  def leave(self, reason: str | None = None) -> None:
    """Says goodbye; with a reason, the others stop too and tell it."""
    if self._leaving.is_set():
      return
    self._leaving.set()
    message = {"bye": True} if reason is None else {"stopped": reason}
    for line in self._peers.values():
      line.send(message)


def _first_difference(a: str, b: str) -> tuple[str, str]:
  """The first lines in which two values differ."""
  texts = [str(json.loads(value)).splitlines() for value in (a, b)]
  pairs = itertools.zip_longest(*texts, fillvalue="(nothing)")
  return next((x[:200], y[:200]) for x, y in pairs if x != y)


everyone: RollCall | _Alone = _Alone()


def start(place: Place | None, timeout: float) -> None:
  """Meets the other hosts and starts jax among them; None is alone.

  Raises:
    UserError: if a host does not come within `timeout` seconds.
  """
  global everyone
  if place is None or place.count == 1:
    return
  everyone = RollCall(place, timeout)
  import jax

  if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(
    place.address,
    place.count,
    place.index,
    local_device_ids=place.local_device_ids,
    cluster_detection_method="deactivate",
    # All have come, so this is quick; the roll call names who dies first.
    initialization_timeout=60,
    heartbeat_timeout_seconds=100,
  )
  everyone.agree(
    "versions", [f"{m.__name__} {m.__version__}" for m in (jax, fat5_jax)]
  )
