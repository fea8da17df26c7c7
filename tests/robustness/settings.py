"""Wrong settings, as people write them: macros, parameters, flags, files."""

from __future__ import annotations

from collections.abc import Iterator
import os
import random
from typing import NamedTuple

COUNTS = (
  *("BATCH_SIZE", "CHECKPOINT_PERIOD", "NUM_MICROBATCHES", "EVAL_STEPS"),
  *("STATS_PERIOD", "KEEP", "BUCKETS", "NUM_PARTITIONS"),
)
STEPS = ("TRAIN_STEPS", "EVAL_PERIOD", "WARMUP_STEPS", "RANDOM_SEED")
RATES = ("DROPOUT_RATE", "LABEL_SMOOTHING")
SIZES = ("LEARNING_RATE", "Z_LOSS")
FLAGS = ("PACK", "USE_CACHED_TASKS", "SCAN_LAYERS")
CHOICES = ("DTYPE", "ATTENTION", "REMAT_POLICY")
TEXTS = ("MODEL_DIR", "DATA_DIR", "MIXTURE_OR_TASK_MODULE", "EVAL_SPLIT")
PATTERNS = ("TRAINABLE", "FROZEN", "REINITIALIZE")
TABLES = ("TASK_FEATURE_LENGTHS", "MESH", "DCN_MESH", "EVAL_FEATURE_LENGTHS")
BUILT = ("MODEL", "OPTIMIZER", "VOCABULARY")
OF_INFER = (
  *(("INFER_BATCH_SIZE", v) for v in ("0", "-1", "1.5", "True", "'x'", "[8]")),
  *(("MAX_INPUT_LENGTH", v) for v in ("0", "-1", "2.0", "False", "'512'")),
  *(("MAX_OUTPUT_LENGTH", v) for v in ("0", "-3", "None", "1e3", "(1,)")),
  *(("OUTPUT_FORMAT", v) for v in ("'xml'", "3", "'JSONL '", "True")),
  *(("USE_TEMPLATE", v) for v in ("'yes'", "2", "None", "[]")),
  *(("INPUT", v) for v in ("5", "['a']", "''", "'a\\0b'")),
  *(("OUTPUT", v) for v in ("None", "1", "' '", "{}")),
  *(("CHECKPOINT_PATH", v) for v in ("None", "7", "''", "('a', 'b')")),
  *(("HEAD_MODULE", v) for v in ("1", "['os']")),
)
# What no number, text or flag is.
_ODD = (
  *("{'a': 1}", "[1, 2]", "(1, [2])", "b'x'", "1j", "{1, 2}"),
  *("'a' 'b' * 3", "lambda: 1", "@nosuch()", "@train", "%NOSUCH", "..."),
)
_NO_NUMBER = ("'x'", "'8'", "''", "True", "1e999", "-1e999", "1e999 - 1e999")
NONSENSE: dict[tuple[str, ...], tuple[str, ...]] = {
  COUNTS: (*_NO_NUMBER, "0", "-1", "1.5", "10**30", "99999999999999"),
  STEPS: (*_NO_NUMBER, "-1", "1.5", "1e5", "99999999999999"),
  RATES: (*_NO_NUMBER, "-0.1", "1", "1.0", "2", "None"),
  SIZES: (*_NO_NUMBER, "-1", "-1e-9", "None"),
  FLAGS: ("'True'", "2", "-1", "'no'", "None", "0.5", "[]"),
  CHOICES: ("'none '", "'NONE'", "3", "True", "'float16'", "''", "['none']"),
  TEXTS: ("5", "''", "'  '", "'a\\0b'", "'\\ud800'", "True", "['a']", "0.5"),
  PATTERNS: ("'('", "'*a'", "'[z-a]'", "5", "True", "['a']", "'(?P<1>a)'"),
  TABLES: (
    *("5", "'inputs'", "[]", "{'inputs': 0}", "{'inputs': -5}", "{}"),
    *("{'inputs': 1.5}", "{'inputs': '8'}", "{5: 8}", "{'': 8}", "True"),
    *("{'inputs': None}", "{'inputs': True}", "{'inputs': 10**12}"),
  ),
  BUILT: ("5", "'t5'", "True", "[]"),
  ("LOSS_NORMALIZING_FACTOR",): (
    *("-1", "0", "'x'", "True", "1e999", "'num_real_target_tokens'", "[1]"),
  ),
  ("TRAIN_STEPS_RELATIVE",): ("0", "-5", "2.5", "'10'"),
  ("SCHEDULE",): (
    "5",
    "''",
    "'cosine'",
    "'constant +'",
    "None",
    "['constant']",
  ),
  ("MODEL_PARALLEL_SUBMESH",): ("4", "(1, 2)", "(1, 1, 1, 0)", "'1,1,1,1'"),
  ("LOGICAL_AXIS_RULES",): ("5", "('vocab',)", "((1, 2),)", "'vocab'", "None"),
  ("MIXTURE_OR_TASK_NAME",): ("5", "''", "True", "['a']", "'no_such_task'"),
}
# Where one value makes no sense beside another, or a name is no name.
LINES = (
  *("TRAIN_STEPS = None", "TRAIN_STEPS_RELATIVE = 5", "NOSUCH = 1"),
  *("TRAIN_STEP = 5", "train_steps = 5", "BATCH-SIZE = 5", "= 5", "BATCH_SIZE"),
  *("train/BATCH_SIZE = 5", "BATCH_SIZE = ", "BATCH_SIZE = 1 2"),
  *("BATCH_SIZE = 'x", "BATCH_SIZE = [1", "BATCH_SIZE = )", "BATCH_SIZE == 5"),
  *("T5Config.emb_dim = 'x'", "T5Config.num_heads = -3", "T5Config.nosuch = 5"),
  *("T5Config.mlp_activations = ('no',)", "T5Config.vocab_size = 0"),
  *("T5Config.layer_norm_epsilon = -1.0", "T5Config.num_encoder_layers = 1.5"),
  *("pipeline.DatasetConfig.batch_size = 0", "train.eval_period = 'x'"),
  *("train.total_steps = 1.5", "train.random_seed = 'x'", "train.nosuch = 1"),
  *("SaveCheckpointConfig.keep = 0", "SaveCheckpointConfig.period = -1"),
  *("MESH = {'nosuch': 2}", "MESH = {'fsdp': 3}", "MESH = {'data': 7}"),
  *("include 'nosuch.gin'", "include '.'", "import nosuch", "from x import y"),
  *("A = %B\nB = %A\nBATCH_SIZE = %A", "BATCH_SIZE = %BATCH_SIZE"),
  *("adafactor.learning_rate = -1.0", "adafactor.beta1 = 2.0"),
  *("adafactor.learning_rate_multipliers = 5", "adafactor.decay_rate = 'x'"),
  *("adafactor.clipping_threshold = -1.0", "adafactor.step_offset = 2.5"),
  *("adafactor.multiply_by_parameter_scale = 'yes'", "train.model = 5"),
  *("Partitioner.logical_axis_rules = [('a',)]", "train.optimizer = 'x'"),
  *("CheckpointConfig.save = 5", "CheckpointConfig.restore = None"),
  *("train/pipeline.DatasetConfig.shuffle = 'no'", "train.partitioner = 5"),
  *("train.train_dataset_cfg = 5", "train.checkpoint_cfg = None"),
  *("MODEL = @adafactor()", "OPTIMIZER = @Partitioner()"),
  *("VOCABULARY = @tasks.quickstart()", "train.config_text = 5"),
  *("create_learning_rate_scheduler.steps_per_decay = 0",),
  *("create_learning_rate_scheduler.min_learning_rate = -9.0",),
  *("KEEP = %MODEL_DIR", "MODEL_DIR = %MODEL", "BATCH_SIZE = %PACK"),
)
COMMAND_LINES = (
  *("--gin.BATCH_SIZE", "--gin.", "--gin.=5", "--nosuch", "--gin_file=nosuch"),
  *("--gin_file=.", "--gin_file=", "--gin_bindings=BATCH_SIZE", "--gin_file"),
  *("--process_count=2", "--process_index=x", "--initialization_timeout=x"),
  *("--gin.BATCH_SIZE=0", "--gin.BATCH_SIZE=", "--gin.BATCH_SIZE=8x"),
  *("--gin.MODEL_DIR=", "--gin.TRAIN_STEPS=1.5", "--gin.KEEP=0", "spare"),
)


class Case(NamedTuple):
  """A gin text beside a recipe, or flags; and whether it must be refused."""

  text: str = ""
  flags: tuple[str, ...] = ()
  wrong: bool = True


def macros(rng: random.Random, odd: int = 2) -> Iterator[Case]:
  """Every wrong value of every macro, and some that are wrong for all."""
  for names, values in NONSENSE.items():
    for name in names:
      for value in (*values, *rng.sample(_ODD, odd)):
        yield Case(f"{name} = {value}")


def lines() -> Iterator[Case]:
  yield from map(Case, LINES)
  for flag in COMMAND_LINES:
    yield Case(flags=(flag,))


def mutations(rng: random.Random, text: str, count: int) -> Iterator[bytes]:
  """A gin file with a few bytes changed, lost, doubled or moved."""
  data = text.encode()
  for _ in range(count):
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
      at, to = sorted(rng.sample(range(len(found)), 2))
      match rng.randrange(6):
        case 0:
          found[at] = rng.randrange(256)
        case 1:
          del found[at : min(to, at + rng.randint(1, 40))]
        case 2:
          found[at:at] = found[at : min(to, at + 60)]
        case 3:
          found[at:at] = bytes(rng.choices(b"()[]{}'\"%@=:,\\\n\0#", k=3))
        case 4:
          found[at:at] = rng.choice(("\u2028", "\ufeff", "\x85", "é")).encode()
        case 5:
          del found[to:]
    yield bytes(found)


def write_odd_files(folder: str) -> list[str]:
  """Gin files that are none."""
  deep = "A = " + "[" * 3000 + "]" * 3000
  contents = {
    "binary.gin": os.urandom(3000),
    "zeros.gin": bytes(4096),
    "utf16.gin": "BATCH_SIZE = 5\n".encode("utf-16"),
    "latin.gin": "# é\nBATCH_SIZE = 5\n".encode("latin-1"),
    "bom.gin": b"\xef\xbb\xbfBATCH_SIZE = 5\n",
    "deep.gin": deep.encode(),
    "self.gin": b"include 'self.gin'\n",
    "one.gin": b"include 'two.gin'\n",
    "two.gin": b"include 'one.gin'\n",
    "long.gin": b"A = '" + b"x" * 2_000_000,
    "tabs.gin": b"T5Config:\n\temb_dim = 5\n  num_heads = 3\n",
  }
  for name, data in contents.items():
    with open(os.path.join(folder, name), "wb") as file:
      file.write(data)
  os.mkdir(os.path.join(folder, "folder.gin"))
  os.symlink("loop.gin", os.path.join(folder, "loop.gin"))
  return [*contents, "folder.gin", "loop.gin"]
