"""PEFT's adapter folders: LoRA's matrices apart from the model."""

from __future__ import annotations

from collections.abc import Mapping
import os
from typing import Any

from fat5_jax.convert import (
  folders,
  hf,
  model_card,
  table,
  tensor_files,
  tokenizers,
)
from fat5_jax.convert.table import Leaves
from fat5_jax.errors import UserError
from fat5_jax.models.config import LoRAConfig, T5Config

_WRAPPER = "base_model.model."
CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's options that change the mathematics, and the value that is plain LoRA.
_PLAIN = {
  "bias": "none",
  "use_dora": False,
  "rank_pattern": {},
  "alpha_pattern": {},
  "fan_in_fan_out": False,
  "modules_to_save": None,
  "layers_to_transform": None,
  "lora_bias": False,
  "trainable_token_indices": None,
}


def _rows(config: T5Config, published: bool = False) -> list[table.Row]:
  """PEFT's name of every LoRA matrix, and of what trains beside them."""
  rank, found = config.lora.rank, []
  base = hf.rows(config.replace(lora=None), published)
  for row in base:
    module = _WRAPPER + row.foreign.removesuffix(".weight")
    *path, last = row.path
    if last == "kernel" and config.lora.applies_to("/".join(path)):
      inputs, outputs = row.shape
      for name, ours, shape in (
        ("lora_A", "lora_a", (inputs, rank)),
        ("lora_B", "lora_b", (rank, outputs)),
      ):
        found.append(
          table.Row(f"{module}.{name}.weight", (*path, ours), shape, True)
        )
  if not found:
    raise UserError(
      f"LoRA targets {config.lora.targets}: no projection has such a name"
    )
  own = [row for row in base if row.path[0] in ("head", "classifier")]
  return found + [
    table.Row(_WRAPPER + row.foreign, row.path, row.shape, row.transposed)
    for row in own
  ]


_TASKS = {
  "sequence_classification": "SEQ_CLS",
  "token_classification": "TOKEN_CLS",
  "question_answering": "QUESTION_ANS",
  "embedding": "FEATURE_EXTRACTION",
}


def to_peft(
  config: T5Config,
  params: Mapping[str, Any],
  folder: str,
  base: str = "",
  facts: Mapping[str, Any] | None = None,
  tokenizer: Any = None,
) -> None:
  """Writes an adapter folder that `peft.PeftModel.from_pretrained` loads.

  Args:
    config: of a model with LoRA.
    params: its parameters; a head's own layers are written too.
    folder: created; replaced as a whole if it is an earlier export.
    base: name or path of the model that the adapter belongs to.
    facts: what the model card says of the run; model_card.facts_of_run.
    tokenizer: as in tokenizers.write; None for none.

  Raises:
    UserError: if the model has no LoRA, or is none of Hugging Face's.
  """
  if config.lora is None:
    raise UserError("the model has no LoRA to write as a PEFT adapter")
  model_rows = _rows(config)
  wanted = {row.path for row in model_rows}
  leaves = {k: x for k, x in table.as_leaves(params).items() if k in wanted}
  tensors = table.to_foreign(model_rows, leaves, "the LoRA parameters")
  modules = sorted(
    name.removeprefix(_WRAPPER).removesuffix(".lora_A.weight")
    for name in tensors
    if name.endswith(".lora_A.weight")
  )
  saved = sorted(
    {
      row.foreign.removeprefix(_WRAPPER).split(".")[0]
      for row in model_rows
      if row.path[0] in ("head", "classifier")
    }
  )
  kind = "" if config.head is None else config.head.kind
  adapter = _PLAIN | {
    "peft_type": "LORA",
    "task_type": _TASKS.get(kind, "SEQ_2_SEQ_LM"),
    "base_model_name_or_path": base,
    "r": config.lora.rank,
    "lora_alpha": config.lora.alpha,
    "lora_dropout": config.lora.dropout_rate,
    "target_modules": modules,
    "modules_to_save": saved or None,
    "inference_mode": True,
  }
  card = model_card.text(config, "peft", {**(facts or {}), "base": base})
  with folders.whole_folder(folder) as target:
    folders.write_files(target, {CONFIG: adapter, "README.md": card})
    tensor_files.write_safetensors(tensors, os.path.join(target, _WEIGHTS))
    if tokenizer is not None:
      tokenizers.write(tokenizer, target)


def is_adapter(folder: str) -> bool:
  return os.path.exists(os.path.join(folder, CONFIG))


def from_peft(
  folder: str, config: T5Config, leaves: Leaves
) -> tuple[T5Config, Leaves]:
  """A model with the adapter of a PEFT folder, not merged.

  Args:
    folder: holds adapter_config.json and adapter_model.safetensors.
    config: of the base model.
    leaves: its tensors.

  Raises:
    UserError: for an adapter that is not plain LoRA, or of another model.
  """
  path = os.path.join(folder, CONFIG)
  adapter = tensor_files.read_json(path)
  for key, plain in _PLAIN.items():
    value = adapter.get(key) or plain
    if value != plain and key != "modules_to_save":
      raise UserError(f"{path}: {key} = {str(value)[:80]!r} is not supported")
  if adapter.get("peft_type") != "LORA":
    raise UserError(
      f"{path}: peft_type is {str(adapter.get('peft_type'))[:80]!r}"
    )
  rank, alpha = adapter.get("r"), adapter.get("lora_alpha")
  try:
    LoRAConfig(rank, alpha, adapter.get("lora_dropout") or 0.0)
  except ValueError as e:
    raise UserError(
      f"{path}: r, lora_alpha or lora_dropout is wrong: {e}"
    ) from None
  if adapter.get("use_rslora"):
    # Scales by alpha / sqrt(rank).
    alpha *= rank**0.5
  tensors = tensor_files.read_safetensors(os.path.join(folder, _WEIGHTS))
  # As the base is named; see hf.open_model.
  published = not any(n.startswith(f"{_WRAPPER}transformer.") for n in tensors)
  base = hf.rows(config, published)
  paths = {
    _WRAPPER + row.foreign.removesuffix(".weight"): row.path[:-1]
    for row in base
    if row.path[-1] == "kernel"
  }
  found = {n.rpartition(".lora_")[0] for n in tensors if ".lora_" in n}
  unknown = sorted(found - set(paths))
  if unknown:
    raise UserError(
      f"{folder}: no such projection in the model: {table.shown(unknown[0])}"
    )
  # The shortest names that choose these projections and no others.
  chosen = {"/".join(paths[module]) for module in found}
  everything = {"/".join(path) for path in paths.values()}
  if not chosen:
    raise UserError(f"{folder}: no LoRA matrices in {_WEIGHTS}")
  lora_config = LoRAConfig(
    rank,
    alpha,
    adapter.get("lora_dropout") or 0.0,
    _targets(chosen, everything),
  )
  try:
    config = config.replace(lora=lora_config)
  except ValueError as e:
    raise UserError(f"{path}: {e}") from None
  model_rows = _rows(config, published)
  own = {row.foreign for row in model_rows if row.path[-1][:5] != "lora_"}
  if not own & set(tensors):
    model_rows = [row for row in model_rows if row.foreign not in own]
  return config, leaves | table.to_leaves(model_rows, tensors, folder)


def _targets(chosen: set[str], everything: set[str]) -> tuple[str, ...]:
  for parts in (1, 2):
    ends = {"/".join(name.split("/")[-parts:]) for name in chosen}
    lora_config = LoRAConfig(targets=tuple(sorted(ends)))
    if {name for name in everything if lora_config.applies_to(name)} == chosen:
      return lora_config.targets
  return tuple(sorted(chosen))
