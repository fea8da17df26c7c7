"""What an exported folder answers in transformers is what our model answers.

Every head and family is written, loaded by transformers 4.37.1 (a copy that
`make test` puts in `.venv/oracle-4.37`) and 5, each in a process of its own,
and answers as ours does, or refuses to load. With FAT5_JAX_EXPORTS_TABLE=FILE
the differences are written there (docs/exports.md is one).
"""

import datetime
import functools
import itertools
import json
import os
import re
import subprocess

from conftest import ROOT
import exports
import jax
import numpy as np
import pytest
import seqio
import yaml

from fat5_jax import trees
from fat5_jax.checkpoints import reference
from fat5_jax.convert import hf, hf_heads, model_card, table
from fat5_jax.data import records, sources, tasks
from fat5_jax.inference import decoding
from fat5_jax.models import factory
from fat5_jax.models.config import HeadConfig

TABLE = os.environ.get("FAT5_JAX_EXPORTS_TABLE")
VERSIONS = [
  pytest.param(
    "4.37.1",
    marks=pytest.mark.skipif(
      not os.path.isdir(exports.ORACLE),
      reason="transformers 4.37 is put there by make test",
    ),
  ),
  "5",
]
each_version = pytest.mark.parametrize("version", VERSIONS)
# A relative difference, of float32 through two stacks with scores in hundreds.
TOLERANCE = 5e-4
# All heads of one family, and of the others these, unless a table is wanted.
EVERY_FAMILY = (
  "language model",
  "sequence, HF's (both stacks)",
  "sequence, dense + tanh",
  "sequence, linear",
  "tokens, linear",
  "spans, both stacks, hidden layer",
  "embedding, mean",
  "EncT5, multi-label, hidden layer",
)

# One worker: its fixtures are made once.
pytestmark = pytest.mark.xdist_group("exports")
TEXTS = ["a text", "and another one, which is longer"]


def loaders(config, how):
  """The classes that must answer as we do: name, and whether with code."""
  head = config.head
  form = hf_heads.form(config)
  if how == "flash_t5":
    return []
  if head is None or head.kind == "language_model":
    return [("AutoModelForSeq2SeqLM", form == "code")]
  if head.kind == "embedding":
    family = hf_heads.PREFIXES[config.model_type]
    return [(f"{family}EncoderModel", False)]
  found = [(hf_heads.ENDINGS[head.kind][1], form != "stock")]
  if form == "tokens":
    found.append(("AutoModelForTokenClassification", False))
  return found


def strangers(config, how):
  """Classes of transformers that the folder is not for."""
  form = hf_heads.form(config)
  if config.is_language_model and form == "stock":
    return []
  if config.num_decoder_layers and form == "stock":
    # HF's own head: its classes, and HF's own warnings.
    return []
  families = {"T5", hf_heads.PREFIXES[config.model_type]}
  endings = [
    *("Model", "ForConditionalGeneration", "ForSequenceClassification"),
    "ForQuestionAnswering",
  ]
  auto = [
    *("AutoModel", "AutoModelForSeq2SeqLM"),
    *("AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"),
  ]
  if how == "flash_t5" or (form == "code" and how == "hf"):
    endings += ["EncoderModel", "ForTokenClassification"]
    auto.append("AutoModelForTokenClassification")
  return [f + e for f in sorted(families) for e in endings] + auto


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """Every folder: config, leaves, inputs, our answer; with one tokenizer."""
  root = tmp_path_factory.mktemp("exports")
  y = np.random.default_rng(3).integers(3, exports.VOCABULARY, (5, 7))
  y = y.astype(np.int32)
  found = {}
  for (family, base), (name, (head, how)) in itertools.product(
    exports.FAMILIES.items(), exports.HEADS.items()
  ):
    if how != "hf" and family == "umT5":
      # Neither has a position table a layer.
      continue
    if not TABLE and family != "T5 1.1" and name not in EVERY_FAMILY:
      continue
    config, leaves = exports.large_leaves(base.with_head(head))
    folder = str(root / f"m{len(found)}")
    exports.WRITE[how](config, leaves, folder, seqio.ByteVocabulary(125))
    # HF's classifier takes no batch with different numbers of </s>.
    is_hf = (
      hf_heads.form(config) == "stock"
      and head is not None
      and head.kind == "sequence_classification"
    )
    x = exports.rows(one_eos=is_hf)
    inputs = {"input_ids": x, "attention_mask": x != 0}
    if config.is_language_model:
      inputs["decoder_input_ids"] = y
    np.savez(f"{folder}-inputs.npz", **inputs)
    found[family, name] = {
      "config": config,
      "leaves": leaves,
      "folder": folder,
      "x": x,
      "how": how,
      "ours": exports.ours(config, leaves, x, y),
    }
  return found


@pytest.fixture(scope="module")
def answered(exported, tmp_path_factory):
  """What a version of transformers does with every folder; asked once."""
  root = tmp_path_factory.mktemp("answers")
  known = {}

  def ask(version):
    if version in known:
      return known[version]
    jobs = []
    for (family, _), one in exported.items():
      config = one["config"]
      is_code = hf_heads.form(config) == "code" and one["how"] == "hf"
      labels = f"{one['folder']}-labels.npz" if is_code else None
      if labels:
        np.savez(labels, **made_up_labels(one))
      jobs.append(
        {
          "labels": labels,
          "folder": one["folder"],
          "inputs": f"{one['folder']}-inputs.npz",
          "load": loaders(config, one["how"]),
          "refuse": strangers(config, one["how"]),
          "readme": family == "T5 1.1",
          "save": is_code and family == "T5 1.1" and version == "5",
          "generate": config.is_language_model,
        }
      )
    found = exports.in_transformers(jobs, str(root), version)
    known[version] = found["version"], dict(zip(exported, found["jobs"]))
    return known[version]

  return ask


def made_up_labels(one):
  """Labels of the folder's kind, under the names of its forward."""
  head, x = one["config"].head, one["x"]
  rng = np.random.default_rng(5)
  rows = len(x)
  if head.kind == "language_model":
    return {"labels": rng.integers(3, 99, one["ours"].shape[:2])}
  if head.kind == "question_answering":
    first = np.arange(rows) % 2
    return {"start_positions": first, "end_positions": 1 - first}
  if head.kind == "token_classification":
    tags = rng.integers(0, head.num_labels, x.shape)
    return {"labels": np.where(x == 0, -100, tags)}
  if head.problem_type == "regression":
    return {"labels": rng.normal(size=rows).astype(np.float32)}
  if head.problem_type == exports.MULTI:
    many = rng.integers(0, 2, (rows, head.num_labels))
    return {"labels": many.astype(np.float32)}
  return {"labels": rng.integers(0, head.num_labels, rows)}


def loss_of(one, labels):
  """What it must be, of our logits."""
  head, logits = one["config"].head, one["ours"].astype(np.float64)
  if head.kind == "question_answering":
    pairs = (
      (logits[..., 0], labels["start_positions"]),
      (logits[..., 1], labels["end_positions"]),
    )
    return np.mean([cross_entropy(*pair) for pair in pairs])
  labels = labels["labels"]
  if head.problem_type == "regression":
    return np.square(logits[:, 0] - labels).mean()
  if head.problem_type == exports.MULTI:
    return (np.logaddexp(0, logits) - logits * labels).mean()
  return cross_entropy(logits, labels)


def cross_entropy(logits, labels):
  top = logits.max(-1, keepdims=True)
  log_sum = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
  chosen = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)
  return (log_sum - chosen[..., 0])[labels != -100].mean()


def as_ours(config, outputs, x):
  """Their output in the shape of ours, with all that padding says set to 0."""
  head = config.head
  if "start_logits" in outputs:
    found = np.stack([outputs["start_logits"], outputs["end_logits"]], -1)
  elif "logits" in outputs:
    found = outputs["logits"]
  else:
    found = outputs["last_hidden_state"]
  if head is None or head.kind == "language_model":
    return found
  if head.kind in ("token_classification", "question_answering"):
    return np.where((x != 0)[..., None], found, 0)
  if found.ndim == 3:
    # One linear layer, or none: pooled after it is pooled before it.
    found = pooled(found, x, head.pooled)
  if head.kind == "embedding":
    found = found / np.linalg.norm(found, axis=-1, keepdims=True)
  return found


def pooled(values, x, how):
  if how == "first":
    return values[:, 0]
  if how == "mean":
    real = (x != 0)[..., None]
    return (values * real).sum(1) / real.sum(1)
  last = [
    max(np.flatnonzero(row == 1), default=np.flatnonzero(row).max())
    for row in x
  ]
  return values[np.arange(len(x)), last]


def difference(one, outputs):
  """The largest between their output and ours, and the size of ours."""
  config, x = one["config"], one["x"]
  found = as_ours(config, outputs, x)
  expected = one["ours"]
  if config.head is not None and config.head.kind in (
    "token_classification",
    "question_answering",
  ):
    expected = np.where((x != 0)[..., None], expected, 0)
  assert found.shape == expected.shape
  return np.abs(found - expected).max(), np.abs(expected).max()


@each_version
def test_a_folder_answers_as_our_model_does(version, exported, answered):
  full, jobs = answered(version)
  is_5_before_24 = [5] <= [int(n) for n in full.split(".")[:2]] < [5, 24]
  for key, one in exported.items():
    for name, result in jobs[key]["loaded"].items():
      stock_tokens = name == "AutoModelForTokenClassification" and (
        hf_heads.form(one["config"]) == "tokens"
      )
      if stock_tokens and version == "4.37.1":
        # It has no such class: without the folder's file it refuses.
        assert "refused" in result, key
        continue
      assert "refused" not in result, (key, name, result)
      assert not result["missing"], (key, result)
      unexpected = set(result["unexpected"])
      assert all("final_layer_norm" in n for n in unexpected), (key, result)
      outputs = dict(np.load(result["outputs"]))
      if is_5_before_24 and key == ("umT5", "language model"):
        # These divide umT5's output by this, whatever config.json says.
        outputs["logits"] = outputs["logits"] * one["config"].emb_dim ** 0.5
      error, size = difference(one, outputs)
      assert error <= TOLERANCE * size, (key, name, error, size)


@each_version
def test_a_class_that_the_folder_is_not_for_refuses_it(
  version, exported, answered
):
  _, jobs = answered(version)
  tried = 0
  for key in exported:
    for name, result in jobs[key]["refusals"].items():
      assert "refused" in result, f"{key}: {name} answers"
      tried += 1
  assert tried > 100


@each_version
def test_the_lines_of_the_model_card_work(version, exported, answered):
  _, jobs = answered(version)
  x = np.zeros((2, len(TEXTS[1]) + 1), np.int32)
  for row, text in zip(x, TEXTS):
    row[: len(text) + 1] = [*(b + 3 for b in text.encode()), 1]
  for (family, name), one in exported.items():
    if family != "T5 1.1" or one["how"] == "flash_t5":
      continue
    config, head = one["config"], one["config"].head
    ran = jobs[family, name]["ran"]
    two_ways = hf_heads.form(config) == "tokens" and version == "5"
    assert len(ran) == 1 + two_ways, name
    if config.is_language_model:
      continue
    # Once for both versions.
    if "of texts" not in one:
      one["of texts"] = exports.ours(config, one["leaves"], x)
    expected = one["of texts"]
    for block in ran:
      if head.kind == "question_answering":
        found = np.stack([block["start"], block["end"]], -1)
      else:
        key = "embeddings" if head.kind == "embedding" else "logits"
        found = np.array(block[key])
      if head.kind in ("question_answering", "token_classification"):
        real = (x != 0)[..., None]
        found, expected = found * real, expected * real
      size = np.abs(expected).max()
      assert np.abs(found - expected).max() <= TOLERANCE * size, name
      if head.label_names and head.problem_type == (
        "single_label_classification"
      ):
        names = np.array(head.label_names)[np.argmax(found, -1)]
        labels = np.array(block["labels"])
        if head.kind == "token_classification":
          names, labels = names[x != 0], labels[x != 0]
        assert (labels == names).all()


def test_the_lines_for_fat5_jax_work_too(exported):
  for (family, name), one in exported.items():
    if family != "T5 1.1":
      continue
    with open(os.path.join(one["folder"], "README.md")) as file:
      block = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)[-1]
    scope = {}
    exec(block.replace("/models/this", one["folder"]), scope)
    found = scope["model"].config
    assert found.architecture() == one["config"].architecture(), name
    if found.head is not None:
      assert found.head.label_names == one["config"].head.label_names
    read = trees.flatten(scope["params"])
    assert read.keys() == one["leaves"].keys()
    for path, leaf in one["leaves"].items():
      assert np.array_equal(read[path], leaf.read()), path


@each_version
def test_the_loss_of_the_modelling_file_is_the_problems(
  version, exported, answered
):
  _, jobs = answered(version)
  found = 0
  for key, one in exported.items():
    for result in jobs[key]["loaded"].values():
      if "loss" in result:
        expected = loss_of(one, made_up_labels(one))
        assert abs(result["loss"] - expected) < 1e-3 * (1 + expected), key
        found += 1
  assert found > 10


@each_version
def test_a_language_model_generates_what_ours_does(version, exported, answered):
  _, jobs = answered(version)
  for key, one in exported.items():
    config = one["config"]
    if not config.is_language_model:
      continue
    if "generated" not in one:
      model, params = factory.create(config), table.read_all(one["leaves"])
      generate = functools.partial(decoding.generate, model, max_length=8)
      answers = jax.jit(generate)(params, one["x"])
      one["generated"] = np.asarray(answers.tokens[:, 0])
    ours = one["generated"]
    for result in jobs[key]["loaded"].values():
      found = np.array(result["generated"])[:, 1:]
      assert np.array_equal(found, ours[:, : found.shape[1]]), key


def test_what_transformers_saves_again_is_read_again(exported, answered):
  """Fine-tuned there, back here: the folder stays one of ours."""
  answered("5")
  saved = 0
  for (family, name), one in exported.items():
    form = hf_heads.form(one["config"])
    if family != "T5 1.1" or form != "code" or one["how"] != "hf":
      continue
    _, auto_class = hf_heads.ENDINGS[one["config"].head.kind]
    folder = f"{one['folder']}-saved-{auto_class}"
    assert hf_heads.CODE_FILE in os.listdir(folder)
    config, leaves = reference.open_params(reference.find(folder))
    assert config.architecture() == one["config"].architecture(), name
    for path, leaf in one["leaves"].items():
      assert np.array_equal(leaves[path].read(), leaf.read()), path
    saved += 1
  assert saved > 5


def test_hfs_classifier_refuses_rows_that_it_cannot_pool(exported, tmp_path):
  """Different numbers of </s> in a batch: an error there, never an answer."""
  one = exported["T5 1.1", "sequence, HF's (both stacks)"]
  x = exports.rows(one_eos=False)
  path = str(tmp_path / "inputs.npz")
  np.savez(path, input_ids=x, attention_mask=x != 0)
  job = {
    "folder": one["folder"],
    "inputs": path,
    "load": [("AutoModelForSequenceClassification", False)],
  }
  found = exports.in_transformers([job], str(tmp_path), "5")
  (result,) = found["jobs"][0]["loaded"].values()
  assert "number of <eos>" in result["refused"]


# ---- Sentence-transformers ---------------------------------------------------


def test_an_embedding_is_a_folder_of_sentence_transformers(exported):
  library = pytest.importorskip("sentence_transformers")
  for name in ("mean", "first", "eos"):
    one = exported["T5 1.1", f"embedding, {name}"]
    found = library.SentenceTransformer(one["folder"], device="cpu").encode(
      TEXTS
    )
    x = np.zeros((2, len(TEXTS[1]) + 1), np.int32)
    for row, text in zip(x, TEXTS):
      row[: len(text) + 1] = [*(b + 3 for b in text.encode()), 1]
    expected = exports.ours(one["config"], one["leaves"], x)
    assert np.abs(found - expected).max() < TOLERANCE


# ---- Model cards -------------------------------------------------------------

GIN = """
BATCH_SIZE = 128
INITIAL_CHECKPOINT_PATH = \\
    'google/t5-v1_1-base'
TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 8}
optimizers.create_learning_rate_scheduler.base_learning_rate = 0.001
BATCH_SIZE = %OTHER
"""
METRICS = """step,dataset,metric,value
100,train,loss,0.5
100,inference_eval/"rte",accuracy,0.5
200,training_eval/rte,loss,0.25
200,inference_eval/rte,accuracy,0.75
"""


def card_of_run(tmp_path, **model_json):
  (tmp_path / "config.gin").write_text(GIN)
  (tmp_path / "metrics.csv").write_text(METRICS)
  (tmp_path / "model.json").write_text(json.dumps(model_json))
  head = HeadConfig(
    "sequence_classification", num_labels=4, label_names=exports.NAMES
  )
  facts = model_card.facts_of_run(str(tmp_path))
  return model_card.text(exports.T5.with_head(head), "hf_code", facts)


def test_a_model_card_names_data_sets_of_the_hub(tmp_path):
  """As the sources record them: a file, or a folder, has no name there."""
  hub, folder = (
    sources.HuggingFace(path).record() for path in ("me/mine", str(tmp_path))
  )
  mixture = {
    name: {"name": name, "source": source}
    for name, source in (("a", hub), ("b", folder), ("c", hub), ("d", None))
  }
  text = card_of_run(tmp_path, task={"name": "all", "mixture": mixture})
  front = yaml.safe_load(text.split("---\n", 2)[1])
  assert front["datasets"] == ["me/mine"]


def test_a_model_card_says_what_the_run_folder_knows(tmp_path):
  task = {"name": 'my "own", task', "kind": "classification", "label": "y|z"}
  text = card_of_run(tmp_path, task=task, random_seed=7)
  _, front, body = text.split("---\n", 2)
  front = yaml.safe_load(front)
  assert front["base_model"] == "google/t5-v1_1-base"
  assert "datasets" not in front
  assert front["pipeline_tag"] == "text-classification"
  (result,) = front["model-index"][0]["results"]
  assert {"type": "accuracy", "value": 0.75} in result["metrics"]
  for said in (
    "| BATCH_SIZE | `128` |",
    "| base_learning_rate | `0.001` |",
    "| RANDOM_SEED | `7` |",
    "| inference_eval/rte | accuracy | 200 | 0.75 |",
    "| 2 | # 'third' \\| 日本語 |",
    "| label | y\\|z |",
    "trust_remote_code=True",
  ):
    assert said in body, said
  assert "train | loss" not in body


@pytest.mark.parametrize("mixed", [False, True])
def test_a_card_of_a_pre_training_asks_to_fill_a_gap(mixed, tmp_path):
  arguments = {"objective": "span_corruption", "column": "text"}
  task = {"factory": "pretraining.text", "arguments": arguments}
  task |= {"name": "text", "kind": "text_to_text", "asks": ["{text}"]}
  if mixed:
    task = {"name": "all", "mixture": {"a": task, "b": task}}
  (tmp_path / "model.json").write_text(json.dumps({"task": task}))
  facts = model_card.facts_of_run(str(tmp_path))
  found = model_card.text(exports.T5, "hf_stock", facts)
  assert "| objective | span_corruption |" in found
  assert "texts = ['The captain looked at the <extra_id_0>" in found
  assert "batch_decode(tokens))" in found and "{text}" not in found
  # No text spells the bytes that are ByT5's sentinels.
  kind = {"inputs": {"kind": "ByteVocabulary"}}
  (tmp_path / "model.json").write_text(
    json.dumps({"task": task | {"vocabulary": kind}})
  )
  facts = model_card.facts_of_run(str(tmp_path))
  found = model_card.text(exports.T5, "hf_stock", facts)
  assert "| objective | span_corruption |" in found
  assert "<extra_id_0>" not in found


@pytest.mark.parametrize(
  "name,lines",
  [
    ("glue_sst2_v002", "texts = ['sst2 sentence: {sentence}']\n"),
    (
      "glue_rte_classes",
      "first = ['{sentence1}']\nsecond = ['{sentence2}']\n",
    ),
    (
      "squad_v010_allanswers",
      "texts = ['question: {question} context: {context}']\n",
    ),
    ("squad_spans", "first = ['{question}']\nsecond = ['{context}']\n"),
  ],
)
def test_a_card_asks_in_the_words_of_the_task(name, lines, tmp_path):
  glue = {"SST-2": "sentence\tlabel\na\t1\n"}
  glue["RTE"] = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"
  for folder, rows in glue.items():
    (tmp_path / folder).mkdir()
    for split in ("train", "dev", "test"):
      (tmp_path / folder / f"{split}.tsv").write_text(rows)
  answers = {"text": ["a"], "answer_start": [0]}
  row = {"id": "1", "question": "a", "context": "a", "answers": answers}
  for split in ("train", "validation"):
    (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
  task = tasks.resolve(name, seqio.ByteVocabulary(125), str(tmp_path))
  text = card_of_run(tmp_path, task=records.describe(task))
  names = "first, second" if "first" in lines else "texts"
  assert f"{lines}batch = tokenizer({names}, padding=True" in text


def test_the_base_is_what_model_json_says_and_a_path_is_no_name(tmp_path):
  text = card_of_run(tmp_path, base="/models/mine")
  front = yaml.safe_load(text.split("---\n")[1])
  assert "base_model" not in front
  assert "started from `/models/mine`" in text


def test_a_plain_checkpoint_has_a_card_too(exported):
  one = exported["T5 1.1", "language model"]
  with open(os.path.join(one["folder"], "README.md")) as file:
    text = file.read()
  assert yaml.safe_load(text.split("---\n")[1])["library_name"]
  assert "AutoModelForSeq2SeqLM" in text and "## Metrics" not in text


# ---- Weights -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequence, dense + tanh", "EncT5"])
def test_bfloat16_goes_there_and_back_bit_for_bit(name, tmp_path):
  head, _ = exports.HEADS[name]
  config, leaves = exports.large_leaves(
    exports.T5.with_head(head), exports.BFLOAT16
  )
  hf.to_pretrained(config, leaves, tmp_path / "out")
  found_config, found = hf.open_model(tmp_path / "out")
  assert found_config.dtype == "bfloat16"
  assert found_config.architecture() == config.architecture()
  for path, leaf in leaves.items():
    assert found[path].read().tobytes() == leaf.read().tobytes(), path


@pytest.mark.parametrize("model_type", ["t5", "mt5"])
def test_a_tied_model_that_is_not_scaled_is_read_again_tied(
  model_type, tmp_path
):
  config, leaves = exports.large_leaves(
    exports.T5.replace(
      logits_via_embedding=True,
      scale_decoder_outputs=False,
      model_type=model_type,
    )
  )
  hf.to_pretrained(config, leaves, tmp_path / "out")
  found_config, found = hf.open_model(tmp_path / "out")
  assert found_config.architecture() == config.architecture()
  assert found.keys() == leaves.keys()


# ---- The table ---------------------------------------------------------------


def test_the_table_is_written_when_asked(exported, answered):
  if not TABLE:
    pytest.skip("set FAT5_JAX_EXPORTS_TABLE to a file")
  asked = {v: answered(v) for v in ("4.37.1", "5")}
  columns = list(itertools.product(exports.FAMILIES, asked))
  cells, largest = {}, 0.0
  for (family, name), one in exported.items():
    for version, (_, jobs) in asked.items():
      for loader, result in jobs[family, name]["loaded"].items():
        row = name, re.sub("^(MT5|UMT5)Enc", "T5Enc", loader)
        if "refused" in result:
          cell = "refuses"
        else:
          error, size = difference(one, dict(np.load(result["outputs"])))
          cell, largest = f"{error:.0e}", max(largest, error / size)
        cells.setdefault(row, {})[family, version] = cell
      if not jobs[family, name]["loaded"]:
        row = name, "any class of transformers"
        cells.setdefault(row, {})[family, version] = "refuses"
  versions = {v: found[0] for v, found in asked.items()}
  header = [f"{family}, {versions[v]}" for family, v in columns]
  lines = [
    f"| {' | '.join(['head', 'loaded by', *header])} |",
    "|" + "---|" * (2 + len(header)),
  ]
  for (name, loader), found in cells.items():
    loader = loader.replace("+code", " with the folder's code")
    row = [name, loader, *(found.get(c, "not written") for c in columns)]
    lines.append(f"| {' | '.join(row)} |")
  tried = [
    result
    for _, jobs in asked.values()
    for job in jobs.values()
    for result in job["refusals"].values()
  ]
  refused = sum("refused" in result for result in tried)
  commit = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  ).stdout.strip()
  with open(TABLE, "w", encoding="utf-8") as file:
    file.write(
      _TEXT.format(
        date=datetime.date.today(),
        commit=commit,
        table="\n".join(lines),
        largest=largest,
        refused=refused,
        tried=len(tried),
      )
    )


_TEXT = """# What an exported folder answers in transformers

The largest difference between the logits (of embeddings: the normalised
vectors) of our model and of the folder that `--to hf` (or what the row says)
writes, loaded by that version of transformers in float32; "refuses" where
loading, without the folder's code, is an error. Random weights under which
attention scores reach hundreds; five rows of 2 to 23 tokens, padded, with none
to three `</s>` (one each for HF's own classifier, which refuses a batch with
different numbers). At real tokens.

{table}

Relative to the largest logit of its model the largest difference is
{largest:.0e}. Classes that a folder is not for (`T5Model`,
`T5ForConditionalGeneration`, `AutoModel` and so on) refused it in {refused} of
{tried} tries.

Made by this command at commit {commit}, {date}, on a CPU:

```
FAT5_JAX_EXPORTS_TABLE=docs/exports.md python -m pytest tests/test_exports.py
```
"""
