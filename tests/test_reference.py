"""docs/ says what the code says."""

import os
import re
import sys

from conftest import ROOT
import pytest

sys.path.insert(0, ROOT)

from tools import reference


def test_the_reference_page_is_the_code_s():
  """Written by `python tools/reference.py`."""
  with open(reference.PAGE, encoding="utf-8") as file:
    assert file.read() == reference.page()


def _pages():
  yield from (os.path.join(ROOT, n) for n in ("README.md", "CONTRIBUTING.md"))
  for folder, _, names in os.walk(os.path.join(ROOT, "docs")):
    yield from (os.path.join(folder, n) for n in names if n.endswith(".md"))


PAGES = sorted(_pages())


@pytest.mark.parametrize(
  "page", PAGES, ids=lambda page: os.path.relpath(page, ROOT)
)
def test_what_a_page_links_to_is_there(page):
  with open(page, encoding="utf-8") as file:
    text = file.read()
  for target in re.findall(r"\]\(([^)#\s]+)", text):
    if "://" not in target:
      path = os.path.join(os.path.dirname(page), target)
      assert os.path.exists(path), target


@pytest.mark.parametrize(
  "page", PAGES, ids=lambda page: os.path.relpath(page, ROOT)
)
def test_the_files_that_a_page_names_are_there(page):
  """Gin files as a command takes them, tools, modules of the library."""
  with open(page, encoding="utf-8") as file:
    text = file.read()
  for name in re.findall(r"(?:recipes|runs|models|heads)/[\w/]+\.gin", text):
    assert os.path.exists(os.path.join(reference.GIN, name)), name
  for name in re.findall(r"(?:tools|fat5_jax|tests)/[\w/]+\.py", text):
    assert os.path.exists(os.path.join(ROOT, name)), name
