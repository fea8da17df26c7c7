"""Every shipped gin file parses, and the public sizes are the public sizes."""

import os

from conftest import ROOT
import pytest

from fat5_jax import macros
from fat5_jax.convert import hf
from fat5_jax.errors import UserError
from fat5_jax.gin_config import grammar, parse, private
import gin

GIN = os.path.join(ROOT, "gin")
FILES = sorted(
  os.path.relpath(os.path.join(parent, name), GIN)
  for parent, _, names in os.walk(GIN)
  for name in names
)
MODELS = [f for f in FILES if f.startswith("models/") and f.count("/") == 2]
# Parameters in millions, as published (mT5 and umT5 with their large tables).
PUBLISHED = {
  "t5_1_0/small": 60.5,
  "t5_1_0/base": 222.9,
  "t5_1_0/large": 737.7,
  "t5_1_0/3b": 2851.6,
  "t5_1_0/11b": 11307.3,
  "t5_1_1/small": 77.0,
  "t5_1_1/base": 247.6,
  "t5_1_1/large": 783.2,
  "t5_1_1/xl": 2849.8,
  "t5_1_1/xxl": 11135.3,
  "mt5/small": 300.2,
  "mt5/base": 582.4,
  "mt5/large": 1229.6,
  "mt5/xl": 3742.6,
  "mt5/xxl": 12921.1,
  "byt5/small": 299.6,
  "byt5/base": 581.7,
  "byt5/large": 1228.0,
  "byt5/xl": 3739.5,
  "byt5/xxl": 12908.0,
}


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


def model_config(file):
  parse.parse([file], ["VOCAB_FILE = 'none'"], [], "none")
  return gin.get_configurable("config.T5Config")()


@pytest.mark.parametrize("file", MODELS)
def test_a_model_file_describes_a_published_model(file):
  config = model_config(file)
  size = sum(_product(row.shape) for row in hf.rows(config)) / 1e6
  published = PUBLISHED.get(
    file.removeprefix("models/")
    .removesuffix(".gin")
    .replace("flan_t5", "t5_1_1")
  )
  if published is not None:
    assert size == pytest.approx(published, rel=0.002), file


def _product(shape):
  total = 1
  for n in shape:
    total *= n
  return total


@pytest.mark.parametrize("file", MODELS)
def test_a_size_is_a_small_diff(file):
  with open(os.path.join(GIN, file), encoding="utf-8") as text:
    lines = [l for l in text if l.strip() and not l.startswith("#")]
  if not file.endswith("base.gin"):
    assert len(lines) <= 15


@pytest.mark.parametrize(
  "file", [f for f in FILES if f.startswith(("recipes/", "runs/", "heads/"))]
)
def test_a_run_file_parses(file, tmp_path):
  # In a file, because the command line may set only what the run uses.
  (tmp_path / "user.gin").write_text(
    """from __gin__ import dynamic_registration
import fat5_jax.models.factory as factory
MODEL_DIR = 'x'
MIXTURE_OR_TASK_NAME = 'x'
TASK_FEATURE_LENGTHS = {'inputs': 8}
INITIAL_CHECKPOINT_PATH = 'x'
VOCAB_FILE = 'x'
HEAD_WIDTHS = (8,)
TRAIN_FILES = 'x'
VALIDATION_FILES = 'x'
MODEL = @factory.create()
VOCABULARY = None
"""
  )
  files = [file, str(tmp_path / "user.gin")]
  if "infer" in file:
    files.insert(0, "runs/infer.gin")
  if file.startswith("heads/") or "tiny_cpu" in file:
    files[:0] = ["runs/finetune.gin", "models/from_checkpoint.gin"]
  parse.parse(files, [], [], "Run")


def test_positions_are_changed_by_a_file_after_the_models():
  bindings = ["VOCAB_FILE = 'none'", "POSITION_ENCODING = 'fire'"]
  bindings += ["FIRE_MLP_WIDTH = 16", "RANDOMIZED_POSITIONS = True"]
  parse.parse(["models/fat5/small.gin", "positions.gin"], bindings, [], "none")
  config = gin.get_configurable("config.T5Config")()
  assert config.position_encoding == "fire" and config.fire_mlp_width == 16
  assert config.randomized_positions and config.num_heads == 8


# ---- What a person may get wrong ---------------------------------------------


def refused(files=("recipes/quickstart.gin",), bindings=()):
  with pytest.raises(UserError) as e:
    parse.parse(list(files), list(bindings), [], "Run")
  (line,) = str(e.value).splitlines()
  return line


@pytest.mark.parametrize(
  "binding, told",
  [
    ("batch_size = 8", "Did you mean 'BATCH_SIZE'?"),
    ("skip_bad_rows = True", "tasks.text_to_text.skip_bad_rows"),
    ("TRAIN_STEP = 10", "Did you mean 'TRAIN_STEPS'?"),
    ("train/BATCH_SIZE = 7", "A macro has no scope"),
    ("BATCH_SIZEE/gin.macro.value = 8", "'BATCH_SIZEE'"),
    ("my_own_name = 1", "unknown gin name 'my_own_name'"),
    ("train/batch_sise = 1", "batch_sise"),
    ("HEAD_WIDTHS = (8,)", "no gin file of this run uses HEAD_WIDTHS"),
  ],
)
def test_every_name_on_the_command_line_counts(binding, told):
  assert told in refused(bindings=[binding])


def test_every_name_in_a_file_counts(tmp_path):
  path = tmp_path / "mine.gin"
  path.write_text("include 'recipes/quickstart.gin'\n\nbatch_size = 8\n")
  assert f"{path}, line 3: unknown gin name 'batch_size'" in refused(
    [str(path)]
  )
  # A name that the file itself uses is its own macro, in any case.
  path.write_text(
    "include 'recipes/quickstart.gin'\nsize = 8\nBATCH_SIZE = %size\n"
  )
  parse.parse([str(path)], ["MODEL_DIR = 'x'"], [], "Run")


@pytest.mark.parametrize(
  "text, line",
  [
    ("A = 1\nMODEL_DIR = '/tmp/x\n", 2),
    ("MODEL_DIR = /tmp/x\n", 1),
    ("TASK_FEATURE_LENGTHS = {'inputs': 3\nTRAIN_STEPS = 3\n", 2),
    ("train.model\n", 1),
    ("config.T5Config:\n  emb_dim = 'a\n", 2),
    ('"""\n', 1),
    ("config.T5Config:\n", 2),
    ("train.model:", 2),
  ],
)
def test_what_is_no_gin_is_told_in_a_line_with_its_place(tmp_path, text, line):
  path = tmp_path / "mine.gin"
  path.write_text(text)
  assert f"{path}, line {line}: " in refused([str(path)])


def test_a_table_with_a_list_as_key_is_told(tmp_path):
  path = tmp_path / "mine.gin"
  path.write_text("MESH = {['data']: 2}\n")
  assert f"{path}: a key of a table is a list" in refused([str(path)])


def test_schedule_and_rate_are_macros():
  for file in ("recipes/quickstart.gin", "recipes/xxl_v5e.gin"):
    gin.clear_config()
    parse.parse(
      [file],
      [
        "MODEL_DIR = 'x'",
        "LEARNING_RATE = 0.5",
        "WARMUP_STEPS = 10",
        "SCHEDULE = 'constant * linear_warmup'",
      ],
      [],
      "Run",
      ("INITIAL_CHECKPOINT_PATH", "VOCAB_FILE"),
    )
    schedule = gin.get_configurable(
      "optimizers.create_learning_rate_scheduler"
    )()
    assert float(schedule(5)) == pytest.approx(0.25)


def test_recipes_parse_where_folders_have_the_names_of_gins(
  tmp_path, monkeypatch
):
  for name in ("models", "runs", "recipes", "heads", "optimizers", "data"):
    (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  for recipe in ("quickstart", "classify", "tiny_cpu"):
    gin.clear_config()
    files = [f"recipes/{recipe}.gin"]
    if recipe == "tiny_cpu":
      files.insert(0, "recipes/classify.gin")
    parse.parse(
      files,
      ["MODEL_DIR = 'x'"],
      [],
      "Run",
      ("INITIAL_CHECKPOINT_PATH", "VOCAB_FILE"),
    )


def test_each_file_includes_what_lies_beside_it(tmp_path, monkeypatch):
  """Two folders with a file of one name: both count, and neither is here."""
  for folder, steps, rows in (("one", 7, 2), ("two", 9, 3), ("", 1, 1)):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "common.gin").write_text(
      f"TRAIN_STEPS = {steps}\nBATCH_SIZE = {rows}\n"
    )
  base = "include 'runs/pretrain.gin'\n"
  own = "include 'common.gin'  # its own\n"
  (tmp_path / "one" / "run.gin").write_text(base + own)
  # A text may hold what other languages take for the end of a line.
  (tmp_path / "two" / "run.gin").write_text(f"# a\u2028b\x0cc\n{own}")
  monkeypatch.chdir(tmp_path)
  for files, steps in (
    (["one/run.gin", "two/run.gin"], 9),
    (["one/run.gin"], 7),
  ):
    gin.clear_config()
    parse.parse(files, ["MODEL_DIR = 'run'"], [], "none")
    assert gin.query_parameter("TRAIN_STEPS/gin.macro.value") == steps


def test_files_that_include_each_other_are_named(tmp_path):
  (tmp_path / "a.gin").write_text("include 'b.gin'\n")
  (tmp_path / "b.gin").write_text("\ninclude 'a.gin'\n")
  told = refused([str(tmp_path / "a.gin")])
  assert f"{tmp_path}/b.gin, line 2: {tmp_path}/a.gin includes this" in told


def test_a_gin_file_of_t5x_is_told_from_ours(tmp_path):
  path = tmp_path / "theirs.gin"
  path.write_text(
    "from __gin__ import dynamic_registration\n"
    "import __main__ as train_script\nfrom t5x import utils\n"
  )
  assert "a gin file of T5X" in refused([str(path)])


def test_all_of_adafactor_is_bound_from_gin(tmp_path):
  (tmp_path / "user.gin").write_text(
    """
from __gin__ import dynamic_registration
import fat5_jax.optimizers as optimizers

include 'optimizers/adafactor.gin'

optimizers.create_learning_rate_scheduler.base_learning_rate = 0.25
optimizers.create_learning_rate_scheduler.factors = 'constant'
optimizers.adafactor:
  beta1 = 0.9
  factored = False
  weight_decay_rate = @decay/optimizers.HParamMap()
  weight_decay_rate_lr_exponent = 2.0
  max_parameter_scale = 1.0
  skip_nan_updates = True
  logical_factor_rules = @optimizers.standard_logical_factor_rules()
  learning_rate_multipliers = {'norm': 0.5}
decay/optimizers.HParamMap.rules = [('norm', None), ('.*', 0.1)]
"""
  )
  parse.parse([str(tmp_path / "user.gin")], [], [], "Run")
  optimizer = gin.get_configurable("optimizers.adafactor")()
  assert float(optimizer.learning_rate(7)) == 0.25
  assert optimizer.skip_nan_updates


def test_every_macro_of_the_shipped_files_is_in_the_table():
  used, table = set(), macros.MACROS
  for file in FILES:
    with open(os.path.join(GIN, file), encoding="utf-8") as text:
      parsed = grammar.read(text.read(), file)
    used |= parsed.uses | {name for name, _ in parsed.sets}
  assert used - {"gin.REQUIRED"} == {*table}


def test_gin_still_has_what_private_py_takes_of_it():
  with private.reading({"/nowhere/a.gin": "A_MACRO = 3\nANOTHER = %A_MACRO\n"}):
    gin.parse_config_file("/nowhere/a.gin")
    with pytest.raises(OSError):
      gin.parse_config_file(os.path.join(GIN, "models", "t5.gin"))
  found = private.bindings()
  assert found["A_MACRO", "gin.macro"] == {"value": 3}
  reference = found["ANOTHER", "gin.macro"]["value"]
  assert isinstance(reference, private.Reference)
  assert reference.config_key == ("A_MACRO", "gin.macro")
  assert "gin.macro" in private.selectors()
  assert callable(private.function_of("gin.macro"))
