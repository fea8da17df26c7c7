"""The table of a day with a chip, made from the rows of on_chip.py alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_TITLES = {
  "launch": "Tiny launches",
  "sanitizer": "compute-sanitizer: memory",
  "suite": "Suite: error over that of naive attention; more than 2 is wrong",
  "bench": "Attention, forward and backward (tools/bench_attention.py)",
  "train": "Training step of T5 1.1 (tools/bench_train.py)",
  "tune": "Each knob alone, forward and backward (tools/tune_attention.py)",
  "races": "compute-sanitizer: races",
}
_RESULTS = ("o", "dq", "dk", "dv", "dposition")


def table(rows: Sequence[dict]) -> str:
  """Markdown; of a unit with several rows the last."""
  last = {row["key"]: row for row in rows}
  some = rows[-1]
  kind = ", smoke" if some["smoke"] else ""
  parts = [f"# {some['chip']}, jax {some['jax']}{kind}\n"]
  parts.append(f"{some['commit']}, {rows[0]['date']} to {some['date']}")
  if machine := last.get("machine"):
    versions = [f"{k} {v}" for k, v in machine["versions"].items() if v]
    cores = f"Python {machine['python']}, {machine['cores']} cores"
    parts[-1] += f"; {cores}, {', '.join(versions)}"
  parts[-1] += ".\n"
  for phase, title in _TITLES.items():
    found = [row for row in last.values() if row["phase"] == phase]
    if not found:
      continue
    columns = _columns(phase, found)
    parts.append(f"\n## {title}\n")
    parts.append(f"| {' | '.join(['', 'status', *columns])} |")
    parts.append("|---" * (len(columns) + 2) + "|")
    for row in found:
      name = row["key"].removeprefix(f"{phase}, ")
      cells = [name, row["status"]]
      if row["status"] in ("ok", "wrong"):
        cells += [show(row) for show in columns.values()]
      if row["status"] != "ok":
        reason = (row.get("reason") or row.get("stderr") or [""])[0]
        if row["status"] == "timeout":
          reason = f"killed after {row['limit']:g} s"
        cells[1] += f": {reason[:90]}".replace("|", "/").rstrip(": ")
      cells += [""] * (len(columns) + 2 - len(cells))
      parts.append(f"| {' | '.join(cells)} |")
  return "\n".join(parts) + "\n"


def _number(name: str, form: str, scale: float = 1) -> Callable[[dict], str]:
  return lambda row: format(row[name] * scale, form) if name in row else "-"


def _ratio(name: str) -> Callable[[dict], str]:
  return lambda row: f"{row.get('ratios', {}).get(name, '-')}"


def _columns(phase: str, rows: list[dict]) -> dict[str, Callable[[dict], str]]:
  """Title -> cell of a row."""
  ratios = {name: _ratio(name) for name in _RESULTS}
  if phase in ("launch", "suite"):
    return ratios | {"s": _number("seconds", ".1f")}
  if phase in ("sanitizer", "races"):
    summary = lambda row: (row.get("sanitizer") or ["-"])[-1].strip("= ")
    return {"it says": summary}
  if phase == "bench":
    columns = {}
    for name, title in (
      ("forward", "forward"),
      ("backward", "backward"),
      ("backward_bias", "with bias gradient"),
    ):
      columns[f"{title} ms"] = _number(f"{name}_ms", ".3f")
      columns[f"{title} TFLOP/s"] = _number(f"{name}_tflops", ".1f")
    return columns | {
      "memory MiB": _number("memory_mib", ",.1f"),
      "error": _number("error", ".1e"),
      "bias gradient error": lambda row: (
        row.get("problem") or _number("dtable_error", ".1e")(row)
      )[:80].replace("|", "/"),
    }
  if phase == "train":
    return {
      "tokens/s": _number("tokens_per_second", ",.0f"),
      "MFU": _number("mfu", ".1%"),
      "s a step": _number("seconds_a_step", ".4f"),
      "rows x inputs + targets": lambda row: (
        f"{row['batch']} x {row['inputs']} + {row['targets']}"
      ),
      "memory GiB": _number("memory_gib", ".1f"),
      "s to start": _number("start_seconds", ".0f"),
    }
  base = {}
  for row in rows:
    where, _, label = row["key"].rpartition(", ")
    if label.startswith("as in") and "forward_ms" in row:
      base[where] = row["forward_ms"] + row["backward_bias_ms"]

  def against(row: dict) -> str:
    """Time as a part of what tiling.py gives."""
    where = row["key"].rpartition(", ")[0]
    if "forward_ms" not in row or where not in base:
      return "-"
    return f"{(row['forward_ms'] + row['backward_bias_ms']) / base[where]:.3f}"

  return {
    "forward ms": _number("forward_ms", ".3f"),
    "backward ms": _number("backward_bias_ms", ".3f"),
    "time over tiling.py's": against,
  }
