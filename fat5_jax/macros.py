"""Every macro of the gin files: what it may be, and what it is for.

One table. gin_config/checks.py checks a run's values by it before anything is
built, the parameters that the shipped files bind to a macro too; it is a part
of docs/reference.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any, NamedTuple

from fat5_jax.errors import UserError

# Steps are int32 on the devices; the rest is beyond any machine.
_STEPS, _ROWS, _TOKENS = 2**31 - 1, 2**24, 2**24
MOST_PREDICTED = 2**17


class Reference:
  """A value that gin builds (`@name()`), known when it is built."""

  def __repr__(self) -> str:
    return "a reference (@name())"


REFERENCE = Reference()


@dataclasses.dataclass(frozen=True)
class Kind:
  """A sort of value: its words, and a check that is false for any other."""

  words: str
  holds: Callable[[Any], bool]

  @property
  def is_built(self) -> bool:
    return self.holds(REFERENCE) and not self.holds("a task")


def _or_none(kind: Kind) -> Kind:
  holds = lambda value: value is None or kind.holds(value)
  return Kind(f"{kind.words}, or None", holds)


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  is_real = isinstance(value, float) or _is_whole(value)
  return is_real and math.isfinite(value)


def _whole(least: int, most: int) -> Kind:
  words = f"a whole number from {least:,} to {most:,}"
  return Kind(words, lambda v: _is_whole(v) and least <= v <= most)


def _rate() -> Kind:
  holds = lambda v: _is_number(v) and 0 <= v < 1
  return Kind("a number from 0 to less than 1", holds)


def _number(least: float = 0, open_end: bool = False) -> Kind:
  words = (
    f"a number above {least}" if open_end else f"a number, {least} or more"
  )
  holds = lambda v: _is_number(v) and (
    v > least or (v == least and not open_end)
  )
  return Kind(words, holds)


def _is_text(value: Any) -> bool:
  # The system takes no name with a zero byte, and none that is no UTF-8.
  if not isinstance(value, str) or not value.strip() or "\0" in value:
    return False
  return not any("\ud800" <= c <= "\udfff" for c in value)


def _choice(*values: str) -> Kind:
  words = "one of " + ", ".join(map(repr, values))
  return Kind(words, lambda v: isinstance(v, str) and v in values)


def _compiles(value: Any) -> bool:
  try:
    return isinstance(value, str) and bool(re.compile(value))
  except (re.error, RecursionError, OverflowError):
    return False


def _is_table(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
  def check(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
      return False
    return all(_is_text(k) and holds(v) for k, v in value.items())

  return check


def _is_list(holds: Callable[[Any], bool], least: int = 1):
  def check(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple))
    return is_list and len(value) >= least and all(map(holds, value))

  return check


def _is_rule(value: Any) -> bool:
  axes = lambda v: v is None or _is_text(v) or _is_list(_is_text)(v)
  return (
    isinstance(value, (list, tuple))
    and len(value) == 2
    and _is_text(value[0])
    and axes(value[1])
  )


_text = Kind("a text that is not empty", _is_text)
_flag = Kind("True or False", lambda v: isinstance(v, bool))
_pattern = Kind("a regular expression", _compiles)
_built = Kind("a reference, @name()", lambda v: v is REFERENCE)
_task = Kind(
  "a task's name, or a reference, @name()",
  lambda v: v is REFERENCE or _is_text(v),
)
_files = Kind(
  "a path, or a list of paths", lambda v: _is_text(v) or _is_list(_is_text)(v)
)
_is_weight = lambda v: _is_number(v) and v > 0
_train_files = Kind(
  "a path, or a list of paths, or weights by path, {'a.jsonl': 3.0}",
  lambda v: _files.holds(v) or _is_table(_is_weight)(v),
)
_is_denoiser = lambda v: isinstance(v, Mapping) and bool(v)
_objective = Kind(
  "the name of an objective, or a list of denoisers, [{'noise_density': 0.15}]",
  lambda v: _is_text(v) or _is_denoiser(v) or _is_list(_is_denoiser)(v),
)
_length = _whole(1, _TOKENS)
_lengths = Kind(
  "a table of tokens by feature, {'inputs': 512, 'targets': 128}",
  _is_table(_length.holds),
)
_shape = lambda v: _length.holds(v) or (
  isinstance(v, (list, tuple)) and len(v) == 2 and all(map(_length.holds, v))
)
_buckets = Kind(
  "a number of lengths from 1 to 64, or a list of them, [64, 128] or"
  " [(64, 8), (128, 32)]",
  lambda v: _whole(1, 64).holds(v) or _is_list(_shape)(v),
)
_curriculum = Kind(
  "a table of lengths by the step they end at, {1000: {'inputs': 128}}",
  lambda v: (
    isinstance(v, Mapping)
    and bool(v)
    and all(_length.holds(k) and _lengths.holds(x) for k, x in v.items())
  ),
)
_mesh = Kind(
  "a table of devices by axis, {'fsdp': 8}, -1 for those that are left",
  _is_table(lambda v: v == -1 or _whole(1, 2**20).holds(v)),
)


class Macro(NamedTuple):
  """A row of the table."""

  kind: Kind
  about: str


MACROS: dict[str, Macro] = {
  # The run.
  "MODEL_DIR": Macro(_text, "the run folder"),
  "MODEL": Macro(_built, "the model; a model file sets it"),
  "OPTIMIZER": Macro(_built, "an optimizer's file sets it"),
  "TRAIN_STEPS": Macro(
    _or_none(_whole(0, _STEPS)), "the step to reach, a checkpoint's counted"
  ),
  "TRAIN_STEPS_RELATIVE": Macro(
    _or_none(_whole(1, _STEPS)), "instead, steps from the checkpoint on"
  ),
  "BATCH_SIZE": Macro(_whole(1, _ROWS), "rows a step, over all devices"),
  "NUM_MICROBATCHES": Macro(
    _or_none(_whole(1, _ROWS)), "parts of a batch, one after the other"
  ),
  "RANDOM_SEED": Macro(
    _whole(0, 2**32 - 1), "of fresh parameters, order and dropout"
  ),
  "EVAL_PERIOD": Macro(
    _whole(0, _STEPS), "steps between evaluations; 0 for one at the end"
  ),
  "EVAL_STEPS": Macro(
    _or_none(_whole(1, _STEPS)), "batches of an evaluation's loss; None all"
  ),
  "STATS_PERIOD": Macro(
    _or_none(_whole(1, _STEPS)), "steps between rows of the metrics"
  ),
  "CHECKPOINT_PERIOD": Macro(_whole(1, _STEPS), "steps between checkpoints"),
  "KEEP": Macro(_or_none(_whole(1, _STEPS)), "checkpoints that stay; None all"),
  "INITIAL_CHECKPOINT_PATH": Macro(
    _or_none(_text), "a checkpoint of any format to start from"
  ),
  "EVAL_BEFORE_TRAINING": Macro(_flag, "evaluate the start too"),
  "EMA_DECAY": Macro(
    _or_none(_rate()), "average the parameters; the average is what is kept"
  ),
  "PARAMETER_DTYPE": Macro(
    _choice("float32", "bfloat16"),
    "of parameters as they train; in bfloat16 Kahan's compensation, a part of"
    " the optimizer's state, keeps what rounding would lose",
  ),
  "KEEP_BEST": Macro(
    _or_none(_text), "TASK/METRIC; the best step stays, whatever KEEP says"
  ),
  "BEST_MODE": Macro(
    _or_none(_choice("max", "min")), "of KEEP_BEST; None by the metric's name"
  ),
  "PATIENCE": Macro(
    _or_none(_whole(1, _STEPS)),
    "evaluations without a better one, after which the run ends",
  ),
  "LOGGERS": Macro(
    Kind(
      "a list of 'tensorboard', 'wandb', 'mlflow' and 'trackio'",
      _is_list(_choice("tensorboard", "wandb", "mlflow", "trackio").holds, 0),
    ),
    "what takes the metrics; metrics.csv has them in any case",
  ),
  "PROFILE_STEPS": Macro(
    _or_none(
      Kind(
        "two steps, (first, last)",
        lambda v: _is_list(_whole(1, _STEPS).holds)(v)
        and len(v) == 2
        and v[0] <= v[1],
      )
    ),
    "are captured into MODEL_DIR/profile, for XProf and TensorBoard",
  ),
  "REINITIALIZE": Macro(
    _or_none(_pattern), "names of parameters that are not read from it"
  ),
  "TRAINABLE": Macro(_or_none(_pattern), "names of parameters that train"),
  "FROZEN": Macro(_or_none(_pattern), "names of those of them that do not"),
  # The data.
  "MIXTURE_OR_TASK_NAME": Macro(_or_none(_task), "the task, or a mixture"),
  "MIXTURE_OR_TASK_MODULE": Macro(
    _or_none(_text), "a module that registers tasks, imported first"
  ),
  "TASK_FEATURE_LENGTHS": Macro(
    _lengths, "tokens a row, the end of sequence counted"
  ),
  "DATA_DIR": Macro(_or_none(_text), "where a task's files lie"),
  "CACHE_DIR": Macro(
    _or_none(_text),
    "of prepared data; None is FAT5_JAX_CACHE or ~/.cache/fat5_jax",
  ),
  "CURRICULUM": Macro(
    _or_none(_curriculum),
    "shorter TASK_FEATURE_LENGTHS to begin with, by the step they end at",
  ),
  "BUCKETS": Macro(
    _or_none(_buckets),
    "in the place of PACK: rows of about one length together",
  ),
  "STREAM": Macro(_flag, "read rows as they come, prepare nothing"),
  "NUM_WORKERS": Macro(
    _whole(0, 1024), "processes that read training data; 0 is a thread"
  ),
  "TRAIN_FILES": Macro(_or_none(_train_files), "rows to train on"),
  "VALIDATION_FILES": Macro(_or_none(_files), "rows to evaluate on"),
  "OBJECTIVE": Macro(_objective, "what is asked about texts"),
  "TEXT_LENGTH": Macro(
    _or_none(_length), "tokens of the longest text that is asked about"
  ),
  "INPUTS": Macro(_or_none(_text), "the template of the inputs"),
  "TARGETS": Macro(_or_none(_text), "the template of the targets"),
  "PACK": Macro(_flag, "several examples a row"),
  "USE_CACHED_TASKS": Macro(_flag, "read SeqIO's cache"),
  "VOCABULARY": Macro(_or_none(_built), "of the tasks; a model file sets it"),
  "VOCAB_FILE": Macro(
    _or_none(_text), "a SentencePiece model; None where a family has none"
  ),
  "VOCAB_EXTRA_IDS": Macro(_whole(0, 2**16), "sentinels after its pieces"),
  "STRIDE": Macro(_length, "tokens between the windows of a long text"),
  # The objective.
  "LEARNING_RATE": Macro(_number(), "what the schedule multiplies"),
  "SCHEDULE": Macro(
    _text,
    "T5X's factors, joined by *; cosine_to_end and linear_to_end fall until"
    " TRAIN_STEPS",
  ),
  "WARMUP_STEPS": Macro(_whole(0, _STEPS), "of the schedule"),
  "DROPOUT_RATE": Macro(_rate(), "of the model"),
  "LABEL_SMOOTHING": Macro(_rate(), "of the targets"),
  "Z_LOSS": Macro(_number(), "times log(Z)^2, added to the loss"),
  "LOSS_NORMALIZING_FACTOR": Macro(
    Kind(
      "a number above 0, 'NUM_REAL_TARGET_TOKENS', 'NUM_TOTAL_TARGET_TOKENS',"
      " 'AVERAGE_PER_SEQUENCE', or None",
      lambda v: (
        v is None
        or _number(0, open_end=True).holds(v)
        or v
        in (
          "NUM_REAL_TARGET_TOKENS",
          "NUM_TOTAL_TARGET_TOKENS",
          "AVERAGE_PER_SEQUENCE",
        )
      ),
    ),
    "what the summed loss is divided by",
  ),
  # The machine.
  "DTYPE": Macro(
    _or_none(_choice("bfloat16", "float32")),
    "of the products; float16 ends at 65504, which T5 exceeds. None, of infer"
    " and eval alone, is the checkpoint's own",
  ),
  "ATTENTION": Macro(
    _or_none(
      _choice("mosaic_tpu", "mosaic_gpu", "triton", "chunked", "reference")
    ),
    "an implementation; None is the chip's best",
  ),
  "SCAN_LAYERS": Macro(_flag, "compile one layer, not all of them"),
  "REMAT_POLICY": Macro(
    _choice("none", "minimal", "gathered", "full"),
    "what is computed again in the backward pass",
  ),
  "MESH": Macro(_or_none(_mesh), "devices by axis (runs/mesh.gin)"),
  "DCN_MESH": Macro(_or_none(_mesh), "slices by axis"),
  "NUM_PARTITIONS": Macro(
    _or_none(_whole(1, 2**20)), "T5X's name for the size of `model`"
  ),
  "MODEL_PARALLEL_SUBMESH": Macro(
    _or_none(
      Kind(
        "four whole numbers, (x, y, z, cores)",
        lambda v: _is_list(_whole(1, 2**20).holds)(v) and len(v) == 4,
      )
    ),
    "the same as a part of a TPU's torus",
  ),
  "LOGICAL_AXIS_RULES": Macro(
    Kind("pairs (name, axis or None)", _is_list(_is_rule, least=0)),
    "before the standard rules",
  ),
  # Heads and LoRA.
  "HEAD_WIDTHS": Macro(
    _or_none(Kind("a list of sizes, (256, 64)", _is_list(_length.holds))),
    "hidden layers before the output",
  ),
  "HEAD_ACTIVATION": Macro(
    _choice("relu", "gelu", "gelu_exact", "silu", "linear", "tanh"),
    "between them",
  ),
  "HEAD_DROPOUT_RATE": Macro(_rate(), "of the head"),
  "HEAD_MODULE": Macro(
    _or_none(_text), "a head module of your own that may be imported"
  ),
  "BODY": Macro(_choice("encoder", "encoder_decoder"), "what a head reads"),
  "POOLING": Macro(
    _or_none(_choice("eos", "mean", "first")), "of tokens to one vector"
  ),
  "SIMILARITY_SCALE": Macro(
    _number(0, open_end=True), "of cosines, as the softmax sees them"
  ),
  "MAX_ANSWER_TOKENS": Macro(_length, "of an answer's span"),
  "DECODER_LAYERS": Macro(_whole(1, 10_000), "of EncT5"),
  "LORA_RANK": Macro(_whole(1, _TOKENS), "of the updates"),
  "LORA_ALPHA": Macro(
    _number(0, open_end=True), "the updates' scale, times the rank"
  ),
  "LORA_DROPOUT_RATE": Macro(_rate(), "of what the updates read"),
  "LORA_TARGETS": Macro(
    Kind("a list of names, ('query', 'value')", _is_list(_is_text)),
    "the projections that get updates",
  ),
  # A model from scratch with other positions.
  "POSITION_ENCODING": Macro(
    _choice("t5", "alibi", "rope", "fire", "none"),
    "where tokens learn their place",
  ),
  "ALIBI_MODE": Macro(
    _choice("symmetric", "asymmetric"),
    "asymmetric: half of the heads see what is before, half what is after",
  ),
  "ROTARY_FRACTION": Macro(
    Kind("a number above 0, 1 at most", lambda v: _is_number(v) and 0 < v <= 1),
    "of the head dimension, what turns",
  ),
  "ROTARY_BASE": Macro(_number(1, open_end=True), "of the wavelengths"),
  "ROTARY_INTERLEAVED": Macro(
    _flag, "neighbours turn together, not the two halves"
  ),
  "ROTARY_SCALE_BASE": Macro(
    _or_none(_number(0, open_end=True)),
    "tokens over which xPos shrinks scores; None is no xPos",
  ),
  "ROTARY_SCOPE": Macro(
    _choice("self_attention", "everything"),
    "everything: values and cross-attention too, as FAT5",
  ),
  "FIRE_MLP_WIDTH": Macro(_whole(1, 2**16), "hidden units of FIRE's network"),
  "RANDOMIZED_POSITIONS": Macro(
    _flag, "in training tokens stand at random places, in their order"
  ),
  "MAX_POSITIONS": Macro(
    _whole(1, _STEPS), "places to draw from; xPos is centred at half of them"
  ),
  # eval and infer.
  "CHECKPOINT_PATH": Macro(_text, "what is read, if not MODEL_DIR's latest"),
  "EVAL_SPLIT": Macro(_or_none(_text), "what is evaluated; None nothing"),
  "CHECKPOINTS": Macro(
    _or_none(
      Kind(
        "'all', or a list of steps",
        lambda v: v == "all" or _is_list(_whole(0, _STEPS).holds)(v),
      )
    ),
    "of the run folder, each evaluated; None is CHECKPOINT_PATH",
  ),
  "EVAL_BATCH_SIZE": Macro(_whole(1, _ROWS), "rows at a time"),
  "EVAL_FEATURE_LENGTHS": Macro(
    _or_none(_lengths), "None takes texts of any length whole"
  ),
  "EVAL_OUTPUT_DIR": Macro(_or_none(_text), "MODEL_DIR/eval if None"),
  "EVAL_VOCABULARY": Macro(
    _or_none(_built), "None is what the checkpoint brings"
  ),
  "INPUT": Macro(_or_none(_text), "a file of rows; '-' is standard input"),
  "OUTPUT": Macro(_text, "where predictions go; '-' is standard output"),
  "OUTPUT_FORMAT": Macro(
    _or_none(_choice("jsonl", "tsv", "glue", "squad", "conll")),
    "None is what OUTPUT ends in",
  ),
  "INFER_BATCH_SIZE": Macro(_whole(1, 2**16), "rows at a time"),
  "INFER_SPLIT": Macro(_text, "of the task that is predicted"),
  "INFER_VOCABULARY": Macro(
    _or_none(_built), "None is what the checkpoint brings"
  ),
  # One token is the end of the sequence.
  "MAX_INPUT_LENGTH": Macro(
    _or_none(_whole(2, MOST_PREDICTED)), "longer rows are cut there"
  ),
  "MAX_OUTPUT_LENGTH": Macro(
    _whole(1, MOST_PREDICTED), "tokens of a prediction"
  ),
  "USE_TEMPLATE": Macro(_flag, "ask in the words of the training's task"),
  "MODE": Macro(
    _choice("predict", "score", "rank"),
    "answers, how likely the targets are, or the likeliest of ALLOWED_OUTPUTS",
  ),
  "SHARD": Macro(_whole(0, 2**20), "the number of this command, from 0"),
  "NUM_SHARDS": Macro(_whole(1, 2**20), "commands that predict together"),
  "OUTPUT_SCORES": Macro(_flag, "whether each answer has its score"),
  # Where a head decides.
  "THRESHOLD": Macro(
    _or_none(
      Kind(
        "a number from 0 to less than 1, 'dev' or 'dev_by_class'",
        lambda v: v in ("dev", "dev_by_class") or _rate().holds(v),
      )
    ),
    "of a label's probability; 'dev': what the run's evaluation found best;"
    " None is 0.5",
  ),
  "NO_ANSWER_THRESHOLD": Macro(
    _or_none(Kind("a number", _is_number)),
    "a question has no answer if that scores better by more; None always"
    " answers",
  ),
  # How a language model answers (inference/decoding.py).
  "NUM_BEAMS": Macro(_whole(1, 256), "2 or more is beam search"),
  "NUM_RETURN_SEQUENCES": Macro(_whole(1, 4096), "answers to a row"),
  "LENGTH_PENALTY": Macro(
    Kind("a number", _is_number), "of beams; above 0 favours long answers"
  ),
  "EARLY_STOPPING": Macro(
    Kind(
      "True, False or 'never'", lambda v: isinstance(v, bool) or v == "never"
    ),
    "when beams are done, by Hugging Face's rule",
  ),
  "BEAM_RULE": Macro(_choice("hf", "t5x"), "whose length penalty and end"),
  "DO_SAMPLE": Macro(_flag, "draw answers at random"),
  "TEMPERATURE": Macro(
    _or_none(_number(1e-6)), "of what is drawn; sets DO_SAMPLE"
  ),
  "TOP_K": Macro(
    _or_none(_whole(1, _TOKENS)), "draw among so many tokens; sets DO_SAMPLE"
  ),
  "TOP_P": Macro(
    _or_none(
      Kind(
        "a number above 0, at most 1", lambda v: _is_number(v) and 0 < v <= 1
      )
    ),
    "draw among the likeliest, up to this mass; sets DO_SAMPLE",
  ),
  "SEARCH_SEED": Macro(_whole(0, 2**32 - 1), "of what is drawn"),
  "MIN_OUTPUT_LENGTH": Macro(
    _whole(0, MOST_PREDICTED), "tokens before a prediction may end"
  ),
  "NO_REPEAT_NGRAM_SIZE": Macro(
    _whole(0, 64), "so many tokens do not come a second time; 0 is no rule"
  ),
  "REPETITION_PENALTY": Macro(
    _number(0, open_end=True), "above 1, what is there becomes less likely"
  ),
  "FORCED_FIRST_TOKEN": Macro(
    Kind(
      "a piece of the vocabulary, or its number, or None",
      lambda v: v is None or _is_text(v) or _whole(0, _TOKENS).holds(v),
    ),
    "every answer begins with it",
  ),
  "OUTPUT_PROMPT": Macro(_or_none(_text), "every answer begins with it"),
  "ALLOWED_OUTPUTS": Macro(
    _or_none(
      Kind(
        "a list of texts, or a file with one a line",
        lambda v: _is_text(v) or _is_list(_is_text)(v),
      )
    ),
    "the only answers there may be",
  ),
}


def check(name: str, value: Any, where: str) -> None:
  """Raises UserError, naming the place, for what a macro may not be."""
  macro = MACROS[name]
  if macro.kind.holds(value):
    return
  shown = repr(value) if len(repr(value)) <= 200 else f"{value!r:.200}..."
  hint = ""
  if isinstance(value, str):
    if value.strip() in ("True", "False", "None") or _looks_numeric(value):
      hint = "; without quotes"
  elif "text" in macro.kind.words or "path" in macro.kind.words:
    hint = f"; in quotes: {str(value)!r}" if _is_number(value) else ""
  elif isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
    hint = f"; write {int(value)}" if "whole" in macro.kind.words else ""
  raise UserError(
    f"{where} = {shown}: {name} ({macro.about}) must be"
    f" {macro.kind.words}{hint}"
  )


def _looks_numeric(text: str) -> bool:
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False
