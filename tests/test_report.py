"""report.html: its numbers, and what a person sees in a real browser."""

import collections
import json
import os

from browser import Browser, find
import numpy as np
import pytest
import sklearn.metrics

from fat5_jax.evaluation import report
from fat5_jax.loggers import curves
from fat5_jax.models.config import HeadConfig

NASTY = "</script><script>document.title='broken'</script><!-- & \u2028 é"


def write_run(folder, classes, rows=600):
  """A run folder as train leaves it; (targets, predictions) of its rows."""
  rng = np.random.default_rng(classes)
  os.makedirs(folder / "inference_eval")
  lines = ["step,dataset,metric,value"]
  for step in range(0, 1000, 100):
    lines += [
      f"{step},train,loss_per_nonpadding_target_token,{3 * 0.99**step + 0.01}",
      f"{step},train,learning_rate,{0.001 * (1 - step / 1000)}",
      f"{step},train,accuracy,{step / 1200}",
      f"{step},training_eval/own,loss_per_nonpadding_target_token,1.5",
      f"{step},inference_eval/own,accuracy,{step / 10}",
      f"{step},inference_eval/own,f1,{step / 1100}",
    ]
  lines.append("900,inference_eval/own,broken,nan")
  (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
  (folder / "config.gin").write_text(f"NAME = '{NASTY}'\n")
  best = {"metric": "own/accuracy", "step": 700, "value": 70.0}
  (folder / "best.json").write_text(json.dumps(best))
  names = [f"class {i}" for i in range(classes)]
  pairs = []
  with open(folder / "inference_eval" / "own-000900.jsonl", "w") as file:
    for i in range(rows):
      if classes:
        target = int(rng.integers(classes))
        found = target if rng.random() < 0.7 else int(rng.integers(classes))
        p = rng.dirichlet(np.ones(classes))
        p[[found, p.argmax()]] = p[[p.argmax(), found]]
        row = {"target": target, "prediction": found, "output": [found, *p]}
        pairs.append((names[target], names[found]))
      else:
        row = {"target": f"a text {i}", "prediction": f"a text {i + i % 2}"}
        row["output"] = row["prediction"]
      text = NASTY if i == 3 else f"row {i}"
      file.write(json.dumps(row | {"input": {"inputs_pretokenized": text}}))
      file.write("\n")
  head = None
  if classes:
    head = HeadConfig(
      "sequence_classification", classes, label_names=tuple(names)
    )
  return pairs, head


@pytest.mark.parametrize("classes", [2, 150])
def test_the_numbers_are_those_of_scikit_learn(classes, tmp_path):
  pairs, head = write_run(tmp_path, classes)
  (task,) = report.collect(str(tmp_path), head)["tasks"]
  targets, found = zip(*pairs)
  names = list(head.label_names)
  wanted = sklearn.metrics.confusion_matrix(targets, found, labels=names)
  np.testing.assert_array_equal(task["confusion"]["counts"], wanted)
  precision, recall, f1, support = (
    sklearn.metrics.precision_recall_fscore_support(
      targets, found, labels=names, zero_division=0
    )
  )
  for i, row in enumerate(task["classes"]):
    assert row[0] == names[i] and row[4] == support[i]
    shown = [0 if x is None else x for x in row[1:4]]
    np.testing.assert_allclose(shown, [precision[i], recall[i], f1[i]])
  # Calibration against a sum by hand.
  bins = task["calibration"]["bins"]
  assert sum(row[2] for row in bins) == len(pairs)
  hits = sum(row[2] * row[4] for row in bins)
  assert round(hits) == sum(t == p for t, p in pairs)


def test_texts_are_no_classes_and_labels_in_words_are(tmp_path):
  _, head = write_run(tmp_path, 0)
  (task,) = report.collect(str(tmp_path), head)["tasks"]
  assert "classes" not in task and "confusion" not in task
  path = tmp_path / "inference_eval" / "own-000900.jsonl"
  rows = [
    {
      "input": {"inputs_pretokenized": "x"},
      "target": "yes" if i % 2 else "no",
      "prediction": "yes" if i % 3 else "maybe",
      "output": "",
    }
    for i in range(60)
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  (task,) = report.collect(str(tmp_path), None)["tasks"]
  assert task["confusion"]["classes"] == ["no", "yes", "maybe"]
  counts = collections.Counter((r["target"], r["prediction"]) for r in rows)
  assert task["confusion"]["counts"][1][2] == counts["yes", "maybe"]


def test_the_worst_errors_come_first(tmp_path):
  _, head = write_run(tmp_path, 3, rows=3000)
  (task,) = report.collect(str(tmp_path), head)["tasks"]
  wrong = [s for s in task["samples"] if not s[3]]
  assert len(wrong) == 400
  assert [s[4] for s in wrong] == sorted((s[4] for s in wrong), reverse=True)
  assert task["samples"][: len(wrong)] == wrong


def test_metrics_of_one_scale_are_on_one_axis(tmp_path):
  write_run(tmp_path, 2)
  data = report.collect(str(tmp_path), None)
  panels = {panel["title"]: panel for panel in data["panels"]}
  assert list(panels["predictions (0 to 1)"]["series"]) == ["own f1"]
  hundred = panels["predictions (0 to 100)"]
  assert list(hundred["series"]) == ["own accuracy"]
  assert hundred["best"] == ("own accuracy", 700, 70.0)
  from fat5_jax.loggers import metrics

  rows = metrics.read_csv(str(tmp_path / "metrics.csv"))
  curves.plot(rows, str(tmp_path / "curves.png"), "a run")
  assert (tmp_path / "curves.png").stat().st_size > 20_000


@pytest.fixture(scope="module")
def browser():
  find()
  with Browser() as found:
    yield found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("classes", [0, 2, 150])
def test_a_person_sees_it_in_a_browser(classes, dark, tmp_path, browser):
  _, head = write_run(tmp_path, classes)
  path = report.write(str(tmp_path), head)
  browser.errors.clear()
  browser.open(path, dark)
  assert not browser.errors
  assert browser.run("document.title") == tmp_path.name
  text = browser.run("document.body.innerText")
  for word in ("Curves", "Metrics", "own", "Configuration", "Environment"):
    assert word in text
  assert "best own/accuracy: 70 at step 700" in text
  assert NASTY in browser.run(
    "[...document.querySelectorAll('.samples td, pre')]"
    ".map(x => x.textContent).join('\\n')"
  )
  # Nothing is wider than the page, and text is told from its ground.
  wide = "document.documentElement.scrollWidth <= innerWidth"
  assert browser.run(wide)
  colors = browser.run(
    "['color', 'backgroundColor'].map(x => getComputedStyle(document.body)[x])"
  )
  light = [sum(map(int, c[4:-1].split(","))) for c in colors]
  assert (light[0] > 600 and light[1] < 120) == dark
  assert (light[0] < 120 and light[1] > 600) != dark
  cells = browser.run("document.querySelectorAll('.matrix td').length")
  assert cells == classes**2
  assert browser.run("document.querySelectorAll('svg polyline').length") == 6
  # The filter shows what it says.
  shown = browser.run("document.querySelectorAll('.samples tbody tr').length")
  choose = (
    "(name => { const s = document.querySelector('select'); s.value = name;"
    " s.onchange(); return document.querySelectorAll('.samples tbody tr')"
    ".length; })"
  )
  wrong, right = (
    browser.run(f"{choose}('wrong')"),
    browser.run(f"{choose}('right')"),
  )
  assert wrong > 0 and right > 0 and wrong + right == shown
  assert (
    browser.run("document.querySelectorAll('.samples td.right').length")
    == right
  )
  browser.picture(tmp_path / "page.png")
  assert (tmp_path / "page.png").stat().st_size > 30_000
