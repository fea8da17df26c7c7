"""What may happen to any file of a folder."""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import random

# What is broken: (folder, its own randomness).
Damage = Callable[[pathlib.Path, random.Random], None]


def text(name: str, content: str | bytes) -> Damage:
  def damage(folder, rng):
    path = folder / name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(data)

  return damage


def is_folder(name: str) -> Damage:
  def damage(folder, rng):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()

  return damage


def is_pipe(name: str) -> Damage:
  def damage(folder, rng):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

  return damage


def is_link(name: str, target: str) -> Damage:
  def damage(folder, rng):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)

  return damage


def cut(name: str) -> Damage:
  def damage(folder, rng):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: rng.randrange(len(data))])

  return damage
