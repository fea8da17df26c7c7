"""Mixtures: T5's rates, of counted rows, from Python, gin and a run folder."""

import gzip
import json
import os

import pytest
import seqio

from fat5_jax.data import (
  conll,
  formats,
  head_tasks,
  memory,
  mixtures,
  nli,
  pipeline,
  records,
  sources,
  squad,
  tasks,
)
from fat5_jax.errors import UserError
from fat5_jax.gin_config import cli
import gin

BYTES = seqio.ByteVocabulary(0)


def text_task(name, rows=3, source=None, **options):
  made = [{"a": f"text {i}", "b": f"word {i}"} for i in range(rows)]
  source = source or sources.Function({"train": lambda: made})
  return tasks.text_to_text(source, "{a}", "{b}", BYTES, name, **options)


def rates_of(mixture):
  return {
    task.name: mixture.get_rate(task) for task in seqio.get_subtasks(mixture)
  }


# ---- Rates -------------------------------------------------------------------


@pytest.mark.parametrize("maximum", [None, 20])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_proportional_rates_are_seqios(maximum, temperature, scale):
  parts = [text_task("small", 3), text_task("large", 50)]
  mixture = tasks.mixture(
    [(part, scale) for part in parts],
    rates="proportional",
    maximum=maximum,
    temperature=temperature,
  )
  assert rates_of(mixture) == {
    part.name: pytest.approx(
      seqio.mixing_rate_num_examples(
        part, maximum=maximum, scale=scale, temperature=temperature
      )
    )
    for part in parts
  }


def test_what_a_person_writes_is_a_rate():
  a, b = text_task("a", 3), text_task("b", 50)
  assert rates_of(tasks.mixture([a, b])) == {"a": 3, "b": 50}
  assert rates_of(tasks.mixture({a: 2.0, b: 1})) == {"a": 2, "b": 1}
  assert rates_of(tasks.mixture([a, b], rates="equal")) == {"a": 1, "b": 1}
  assert rates_of(tasks.mixture([a, b], rates=(5, 0.5))) == {"a": 5, "b": 0.5}
  capped = tasks.mixture({a: 4.0, b: 100.0}, maximum=16, temperature=2)
  assert rates_of(capped) == {"a": 2, "b": 4}


def test_the_share_of_each_task_is_told():
  held_out = sources.Function({"validation": lambda: [{"a": "x", "b": "y"}]})
  never = text_task("never", source=held_out)
  parts = {text_task("a"): 1.0, text_task("b"): 3.0, never: 9.0}
  told = mixtures.describe(tasks.mixture(parts, name="ours"))
  assert told == "ours draws 75 % b, 25 % a"
  ours = seqio.MixtureRegistry.get("ours")
  assert mixtures.drawn(ours, "validation") == [(never, 9.0)]
  assert mixtures.drawn(never) == []
  assert mixtures.drawn(never, "validation") == [(never, 1.0)]
  off = tasks.mixture({text_task("a"): 0.0, text_task("b"): 2.0})
  assert [task.name for task, _ in mixtures.drawn(off)] == ["b"]


def test_a_mixture_in_a_mixture_has_its_share():
  a, b, c = text_task("a", 10), text_task("b", 30), text_task("c", 60)
  inner = tasks.mixture([a, b], name="inner")
  outer = tasks.mixture([inner, c], name="outer")
  # The rows of all it draws from, shared out as it does.
  assert rates_of(outer) == {"a": 10, "b": 30, "c": 60}
  assert rates_of(tasks.mixture({"inner": 1.0, c: 1.0}, name="again")) == {
    "a": 0.25,
    "b": 0.75,
    "c": 1,
  }


def test_a_task_without_training_rows_is_evaluated_only():
  train = text_task("train_only", 4)
  held_out = sources.Function({"validation": lambda: [{"a": "x", "b": "y"}]})
  mixture = tasks.mixture([train, text_task("held_out", source=held_out)])
  assert rates_of(mixture) == {"held_out": 0, "train_only": 4}
  rows = mixture.get_dataset({"inputs": 16, "targets": 16}, num_epochs=1)
  assert len(list(rows)) == 4


def test_a_mixture_draws_at_its_rates():
  no = sources.Function({"train": lambda: [{"a": "no", "b": "no"}]})
  parts = {text_task("yes", 5): 3.0, text_task("no", source=no): 1.0}
  drawn = tasks.mixture(parts).get_dataset(
    {"inputs": 16, "targets": 16}, shuffle=False, seed=1
  )
  targets = [row["targets"].numpy() for row in drawn.take(2000)]
  found = sum(BYTES.decode(ids.tolist()) == "no" for ids in targets)
  # Five standard deviations of a binomial.
  assert abs(found - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(
  "wrong, told",
  [
    (dict(tasks="cola"), "must name tasks"),
    (dict(tasks={}), "must name tasks"),
    (dict(tasks={"glue_col_v002": 1.0}), "Did you mean 'glue_cola_v002'"),
    (dict(tasks={"glue_cola_v002": -1}), "rate of glue_cola_v002 is -1"),
    (dict(tasks={"glue_cola_v002": "2"}), "is '2', and must be a number"),
    (dict(tasks=[3]), "3 is a int"),
    (dict(rates="prop"), "rates = 'prop' must be 'proportional'"),
    (dict(rates=(1, 2, 3)), "3 rates, and 2 tasks: a, b"),
    (dict(temperature=0), "temperature = 0 must be a number above 0"),
    (dict(maximum=-3), "maximum = -3 must be a number above 0"),
    (dict(name="a"), "holds a task of the same name"),
  ],
)
def test_what_makes_no_mixture_is_told(wrong, told):
  settings = {"tasks": [text_task("a"), text_task("b")]} | wrong
  with pytest.raises(UserError, match=told):
    tasks.mixture(**settings, vocabulary=BYTES)


def test_tasks_that_no_model_learns_together_are_told():
  rows = sources.Function({"train": lambda: [{"a": "x", "y": 0}]})
  classes = lambda name, *labels: head_tasks.classification(
    rows, "{a}", "y", BYTES, labels, name=name
  )
  yes_no, no_yes = classes("one", "yes", "no"), classes("two", "no", "yes")
  single = "single_label_classification"
  with pytest.raises(UserError, match=f"{single} yes, no; {single} no, yes"):
    tasks.mixture([yes_no, no_yes])
  with pytest.raises(UserError, match=f"text; {single} yes, no"):
    tasks.mixture([text_task("text"), yes_no])
  many = head_tasks.classification(
    rows, "{a}", "y", BYTES, ("yes", "no"), "multi_label_classification", "many"
  )
  with pytest.raises(UserError, match="multi_label_classification yes, no"):
    tasks.mixture([yes_no, many])
  other = tasks.text_to_text(
    rows, "{a}", "{y}", seqio.ByteVocabulary(5), "other"
  )
  with pytest.raises(UserError, match="other vocabularies"):
    tasks.mixture([text_task("text"), other])
  with pytest.raises(UserError, match="two tasks are named 'text'"):
    tasks.mixture([text_task("text"), text_task("text")])


# ---- Counts ------------------------------------------------------------------


def files_of_rows(folder):
  """Files of 5 rows in every format, of which some lines are none."""
  import pyarrow as pa
  from pyarrow import parquet

  rows = [{"a": f"text {i}", "b": f"{i}"} for i in range(5)]
  parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "rows.jsonl").write_text(lines)
  (folder / "open.jsonl").write_text(lines.rstrip("\n"))
  with gzip.open(folder / "packed.jsonl.gz", "wt") as file:
    file.write(lines)
  (folder / "rows.tsv").write_text(
    "a\tb\n" + "".join(f'say "{r["a"]}\t{r["b"]}\n' for r in rows)
  )
  (folder / "rows.csv").write_text(
    "a,b\n" + "".join(f'"{r["a"]}\nand more",{r["b"]}\n' for r in rows)
  )
  (folder / "rows.txt").write_text("x\n\ny\nz\n\n")
  return sorted(folder.iterdir())


def test_rows_are_counted_as_they_are_read(tmp_path):
  for path in files_of_rows(tmp_path):
    read = list(formats.read_file(str(path)))
    assert formats.count_rows(str(path)) == len(read) == 5, path
    source = sources.Files({"train": str(path)})
    assert source.num_rows("train") == 5
  bare = tmp_path / "bare.tsv"
  bare.write_text("x\t1\ny\t2\n")
  source = sources.Files({"train": str(bare)}, columns=("a", "b"))
  assert source.num_rows("train") == len(list(source.rows("train"))) == 2


def test_a_file_is_counted_once_and_again_when_it_changes(
  tmp_path, monkeypatch
):
  path = tmp_path / "rows.tsv"
  path.write_text("a\tb\nx\ty\n")
  passes = []
  original = sources.count_rows
  monkeypatch.setattr(
    sources, "count_rows", lambda *a, **k: passes.append(1) or original(*a, **k)
  )
  make = lambda: text_task("t", source=sources.Files({"train": str(path)}))
  assert [make().num_input_examples("train") for _ in range(3)] == [1, 1, 1]
  assert len(passes) == 1
  path.write_text("a\tb\nx\ty\nz\tw\n")
  assert make().num_input_examples("train") == 2


def test_every_source_counts_its_rows(tmp_path):
  import datasets

  (tmp_path / "a.conll").write_text("New\tB-LOC\n\nis\tO\nbig\tO\n\n")
  (tmp_path / "a.en").write_text("one\ntwo\n")
  (tmp_path / "a.de").write_text("eins\nzwei\n")
  questions = [{"id": str(i), "question": "?"} for i in range(2)]
  (tmp_path / "qa.json").write_text(
    json.dumps(
      {
        "data": [
          {
            "paragraphs": [
              {"context": "x", "qas": [q | {"answers": []} for q in questions]}
            ]
          }
        ]
      }
    )
  )
  data = datasets.Dataset.from_list([{"a": "x"}, {"a": "y"}])
  datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
  path = lambda name: str(tmp_path / name)
  for source in (
    conll.Conll({"train": path("a.conll")}),
    sources.ParallelFiles({"train": {"en": path("a.en"), "de": path("a.de")}}),
    squad.SquadFiles({"train": path("qa.json")}),
    sources.HuggingFace(path("saved"), splits={"train": "train"}),
    memory.Rows([{"a": "x"}, {"a": "y"}], "train"),
    memory.Joined([memory.Rows(data, "train")]),
  ):
    assert len(list(source.rows("train"))) == 2, source
    assert source.num_rows("train") == 2, source


def test_rows_that_are_left_out_are_not_counted():
  rows = [{"a": "x", "b": "y"}, {"a": "", "b": "y"}, {"a": "z", "b": "w"}]
  source = sources.Function({"train": lambda: rows})
  lenient = text_task("lenient", source=source, skip_bad_rows=True)
  assert lenient.num_input_examples("train") == 2


def test_the_official_files_have_as_many_rows_as_t5_says(shared_data):
  folder = os.path.join(shared_data, "glue")
  for name, rate in mixtures.GLUE_RATES.items():
    short = name.removeprefix("glue_").removesuffix("_v002")
    # The others' training files are not here.
    if short in ("cola", "sst2", "mrpc", "stsb", "rte"):
      task = tasks.glue(short, BYTES, folder)
      assert task.num_input_examples("train") == rate, name


# ---- Ready mixtures ----------------------------------------------------------


def test_a_ready_mixture_names_all_files_that_are_missing(shared_data):
  folder = os.path.join(shared_data, "glue")
  with pytest.raises(UserError, match="(?s)QQP: none of.*MNLI: none of") as e:
    tasks.resolve("glue_v002_proportional", BYTES, folder)
  assert "@tasks.mixture() mixes those tasks that you have" in str(e.value)


def test_glue_is_mixed_as_t5_does():
  """From the hub: nothing is loaded before its rows are."""
  mixture = tasks.resolve("glue_v002_proportional", BYTES)
  rates = rates_of(mixture)
  assert rates == mixtures.GLUE_RATES
  assert "glue_wnli_v002" not in rates
  assert seqio.MixtureRegistry.get("glue_v002_proportional") is mixture


def test_a_mixture_of_classes_is_one_for_a_head():
  """Pairs of one kind from two data sets: one classifier learns both."""
  pair = {"premise": "x", "hypothesis": "y", "label": 2}
  made = memory.Rows([pair], "train")
  parts = [nli.classes(BYTES, name=name, source=made) for name in ("a", "b")]
  mixture = tasks.mixture(parts)
  config = pipeline.DatasetConfig(mixture, {"inputs": 8}, "train", 2)
  head = pipeline.head_config(config, "sequence_classification")
  assert head.label_names == nli.LABELS
  batch = next(pipeline.train_batches(config, 384))
  assert batch["labels"].tolist() == [[2], [2]]


# ---- Records and runs --------------------------------------------------------


def test_a_record_of_a_mixture_is_the_mixture(tmp_path):
  for name, text in (("one", "a\tb\nx\ty\n"), ("two", "a\tb\nz\tw\nv\tu\n")):
    (tmp_path / f"{name}.tsv").write_text(text)
  source = lambda name: sources.Files({"train": str(tmp_path / f"{name}.tsv")})
  parts = [text_task(name, source=source(name)) for name in ("one", "two")]
  mixture = tasks.mixture(parts, temperature=2, rates="proportional")
  record = json.loads(json.dumps(records.describe(mixture)))
  again = records.build(record, BYTES, with_data=True)
  assert rates_of(again) == rates_of(mixture) == {"one": 1, "two": 2**0.5}
  assert not records.difference(record, records.describe(again))
  assert list(again.tasks[1].source.examples("train")) == list(
    parts[1].source.examples("train")
  )
  # Another rate is another run; so is another template of one task.
  flat = tasks.mixture(parts, rates="proportional")
  (line, _) = records.difference(record, records.describe(flat))
  assert "mixture two.rate" in line
  own = {"name": "own", "source": {}, "rate": "1.0"}
  record["mixture"]["own"] = own
  with pytest.raises(UserError, match="'own' of the run folder is registered"):
    records.build(record, BYTES, with_data=True)


MIXED = """
from __gin__ import dynamic_registration
import fat5_jax.data.sources as sources
import fat5_jax.data.tasks as tasks
import fat5_jax.models.config as config

include 'models/byt5/base.gin'
include 'runs/pretrain.gin'

MIXTURE_OR_TASK_NAME = @tasks.mixture()
tasks.mixture:
  tasks = {@one/tasks.text_to_text(): 2.0, 'glue_rte_v002': 1.0}
  vocabulary = %VOCABULARY
  data_dir = %DATA_DIR
one/tasks.text_to_text:
  name = 'one'
  source = @sources.Files()
  inputs = 'say {a}'
  targets = '{b}'
  vocabulary = %VOCABULARY
sources.Files.splits = {'train': 'one.tsv', 'validation': 'one.tsv'}
DATA_DIR = 'glue'
TASK_FEATURE_LENGTHS = {'inputs': 40, 'targets': 8}
BATCH_SIZE = 4
TRAIN_STEPS = 2
EVAL_PERIOD = 0
EVAL_STEPS = 1
CHECKPOINT_PERIOD = 2
DTYPE = 'float32'
ATTENTION = 'reference'
config.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  num_encoder_layers = 1
  num_decoder_layers = 1
  mlp_dim = 16
"""


def test_a_mixture_from_gin_is_trained_and_evaluated_from_its_folder(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mixed.gin").write_text(MIXED)
  lines = "".join(f"text {i}\tword {i}\n" for i in range(6))
  (tmp_path / "one.tsv").write_text("a\tb\n" + lines)
  (tmp_path / "glue" / "RTE").mkdir(parents=True)
  for name in ("train", "dev"):
    (tmp_path / "glue" / "RTE" / f"{name}.tsv").write_text(
      "index\tsentence1\tsentence2\tlabel\n" + "0\tx\ty\tentailment\n" * 4
    )

  def run(command, *flags):
    gin.clear_config()
    assert cli.main(command, list(flags)) == 0, capfd.readouterr().err
    gin.clear_config()
    return capfd.readouterr()

  told = run("train", "--gin_file=mixed.gin", "--gin.MODEL_DIR=x", "--dry_run")
  assert "mixture draws 66.7 % one, 33.3 % glue_rte_v002" in told.err
  run("train", "--gin_file=mixed.gin", "--gin.MODEL_DIR=out")
  run("eval", "--gin.MODEL_DIR=out")
  for name in ("one", "glue_rte_v002"):
    read = lambda path: (tmp_path / path).read_text()
    file = f"inference_eval/{name}-metrics.jsonl"
    assert read(f"out/eval/{file}") == read(f"out/{file}")
  (tmp_path / "lines.txt").write_text("say text 3\n")
  done = run(
    "infer",
    "--gin.MODEL_DIR=out",
    "--gin.INPUT=lines.txt",
    "--gin.MAX_OUTPUT_LENGTH=2",
  )
  assert "the run mixed" in done.err and "glue_rte_v002" in done.err
  assert json.loads(done.out)["inputs"] == "say text 3"
