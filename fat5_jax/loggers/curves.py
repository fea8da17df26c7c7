"""What is drawn of a run: its metrics over steps, those of a scale together."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import math
import os

Row = tuple[int, str, str, float]
_TRAINING = ("train", "training_eval")
_LOSS = "loss_per_nonpadding_target_token"


@dataclasses.dataclass
class Panel:
  """Curves of one scale.

  Attributes:
    title: what they are, with the unit.
    series: [(step, value)] by name, in the order of steps.
    is_log: whether the values are seen best by their logarithm.
    best: a point (name, step, value) to mark, or None.
  """

  title: str
  series: dict[str, list[tuple[int, float]]]
  is_log: bool = False
  best: tuple[str, int, float] | None = None


def panels(
  rows: Iterable[Row], best: tuple[str, int, float] | None = None
) -> list[Panel]:
  """The panels of a run; none that would be empty.

  Args:
    rows: of metrics.csv.
    best: (TASK/METRIC, step, value) that a run follows, or None.
  """
  loss = Panel("loss per target or label (nats)", {}, is_log=True)
  accuracy = Panel("accuracy of targets or labels, teacher-forced (0 to 1)", {})
  rate = Panel("learning rate", {})
  scores: dict[str, Panel] = {}
  predicted: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for step, dataset, metric, value in rows:
    kind, _, task = dataset.partition("/")
    if kind in _TRAINING:
      name = dataset if kind == "train" else f"evaluation: {task}"
      for panel, wanted in (
        (loss, _LOSS),
        (accuracy, "accuracy"),
        (rate, "learning_rate"),
      ):
        if metric == wanted and math.isfinite(value):
          panel.series.setdefault(name, []).append((step, value))
    elif kind == "inference_eval" and math.isfinite(value):
      predicted.setdefault((task, metric), []).append((step, value))
  for (task, metric), points in sorted(predicted.items()):
    title = _scale(value for _, value in points)
    panel = scores.setdefault(title, Panel(title, {}))
    panel.series[f"{task} {metric}"] = points
    if best is not None and best[0] in (
      f"{task}/{metric}",
      metric,
      f"inference_eval/{task}/{metric}",
    ):
      panel.best = (f"{task} {metric}", *best[1:])
  if any(value <= 0 for line in loss.series.values() for _, value in line):
    loss.is_log = False
  found = [loss, accuracy, *scores.values(), rate]
  return [panel for panel in found if panel.series]


def _scale(values: Iterable[float]) -> str:
  """The title of the panel that values go to."""
  values = list(values)
  least, most = min(values), max(values)
  if least >= 0 and most <= 1:
    return "predictions (0 to 1)"
  if least >= 0 and most <= 100:
    return "predictions (0 to 100)"
  if least >= -1 and most <= 1:
    return "predictions (-1 to 1)"
  return "predictions (other scales)"


def plot(
  rows: Iterable[Row],
  path: str,
  title: str = "",
  best: tuple[str, int, float] | None = None,
) -> None:
  """The panels as a PNG, which is there when it is whole."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  from matplotlib.ticker import MaxNLocator

  found = panels(rows, best)
  columns = 2 if len(found) > 1 else 1
  count = max(1, -(-len(found) // columns))
  # Fixed margins: a layout that is solved for would draw everything twice.
  size = (5.5 * columns, 3.4 * count + 0.4)
  figure, axes = plt.subplots(count, columns, figsize=size, squeeze=False)
  top = 1 - 0.62 / size[1]
  figure.subplots_adjust(
    *(0.33 / columns * 0.4, 0.42 / size[1], 0.98, top), 0.17, 0.3
  )
  figure.suptitle(title, y=1 - 0.12 / size[1], fontsize="medium")
  for axis, panel in zip(axes.flat, found):
    for name, points in panel.series.items():
      steps, values = zip(*points)
      axis.plot(steps, values, label=name, marker="." * (len(steps) < 30))
    if panel.best is not None:
      name, step, value = panel.best
      axis.plot(step, value, "*", markersize=13, color="black", zorder=3)
      (first, last), (low, high) = axis.get_xlim(), axis.get_ylim()
      # Towards the middle, where there is room.
      is_late, is_low = 2 * step > first + last, 2 * value < low + high
      axis.annotate(
        f"best {value:.4g}",
        (step, value),
        (-8 if is_late else 8, 9 if is_low else -16),
        textcoords="offset points",
        ha="right" if is_late else "left",
        weight="bold",
        bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none"},
      )
    axis.set_title(panel.title, fontsize="medium")
    if panel.is_log:
      # A loss that falls a hundredfold needs a logarithm to be seen.
      axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
  for axis in list(axes.flat)[len(found) :]:
    axis.set_axis_off()
  temporary = os.path.join(
    os.path.dirname(path), f".writing-{os.path.basename(path)}"
  )
  figure.savefig(temporary, dpi=110, format="png")
  os.replace(temporary, path)
  plt.close(figure)
