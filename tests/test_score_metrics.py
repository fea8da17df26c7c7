"""Metrics of a SeqIO task get what SeqIO's own Evaluator gives them."""

import json

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf

from fat5_jax.data import head_tasks, metrics, pipeline, sources, tasks
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.errors import UserError
from fat5_jax.evaluation.generation import InferenceEvaluator
from fat5_jax.inference.decoding import Decoding
from fat5_jax.inference.predictor import Predictor
from fat5_jax.inference.score import Scorer
from fat5_jax.models import factory, initial
from fat5_jax.models.config import HeadConfig, T5Config

BYTES = seqio.ByteVocabulary()
CONFIG = T5Config(
  vocab_size=384,
  emb_dim=8,
  num_heads=1,
  head_dim=8,
  num_encoder_layers=1,
  num_decoder_layers=1,
  mlp_dim=8,
  dtype="float32",
  attention_implementation="reference",
)
LENGTHS = {"inputs": 24, "targets": 8}
ROWS = [
  (f"say {'very ' * (i % 4)}{i}", f"{i} " * (i % 3 + 1)) for i in range(9)
]


class Recorder:
  """Metrics of every signature, and what each was called with."""

  def __init__(self):
    self.calls = {}

  def metrics(self, *names):
    def of_predictions(targets, predictions):
      self.calls["predictions"] = (targets, predictions)
      return {"count": len(predictions)}

    def of_scores(targets, scores):
      self.calls["scores"] = (targets, scores)
      return {"mean": float(np.mean(scores))}

    def of_aux(targets, predictions, aux_values, scale=2.0):
      self.calls["aux"] = (targets, predictions, aux_values)
      return {"sum": seqio.metrics.Scalar(scale * np.sum(aux_values["scores"]))}

    known = {"predictions": of_predictions, "scores": of_scores, "aux": of_aux}
    return [known[name] for name in names]


def task_of(metric_fns, name="scored"):
  """A task of SeqIO's own; its targets are told from its predictions."""

  def rows():
    keys = ("inputs", "targets")
    return tf.data.Dataset.from_generator(
      lambda: (dict(zip(keys, row)) for row in ROWS),
      output_signature=dict.fromkeys(keys, tf.TensorSpec([], tf.string)),
    )

  seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: rows(), splits=["validation"]
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={
      side: seqio.Feature(BYTES) for side in ("inputs", "targets")
    },
    postprocess_fn=lambda text, example=None, is_target=False: (
      f"{'wanted' if is_target else 'said'} {text}"
    ),
    metric_fns=metric_fns,
  )


@pytest.fixture(scope="module")
def model():
  """(a language model, parameters)."""
  made = factory.create(CONFIG)
  init = jax.jit(initial.init_params, static_argnums=(0, 1))
  return made, init(made, 0)


def mesh():
  return Partitioner(devices=jax.devices()[:1])


def evaluated(model, task, folder, **options):
  """(evaluator, metrics) of ours."""
  made, params = model
  data = pipeline.DatasetConfig(task, LENGTHS, "validation", 4)
  evaluator = InferenceEvaluator(made, data, str(folder), mesh(), **options)
  return evaluator, evaluator.evaluate(params, 3)[task.name]


def by_seqio(model, task, decoding):
  """The metrics of seqio.Evaluator, with our model's functions."""
  made, params = model
  evaluator = seqio.Evaluator(
    task.name,
    seqio.EncDecFeatureConverter(pack=False),
    "validation",
    sequence_length=LENGTHS,
    async_compute_metrics=False,
  )
  predictor = Predictor(
    made, mesh(), 4, LENGTHS["targets"], decoding.bind(BYTES, made.config)
  )
  scorer = Scorer(made, mesh(), 4)
  cut = lambda ids: ids[: int((ids != 0).sum())]

  def examples(dataset):
    for _, row in dataset.as_numpy_iterator():
      yield {
        "inputs": cut(row["encoder_input_tokens"]),
        "targets": cut(row["decoder_target_tokens"]),
      }

  def predict_with_aux(dataset):
    said = [found for _, found in predictor(params, examples(dataset))]
    tokens = [found.tokens[0].tolist() for found in said]
    scores = [float(found.scores[0]) for found in said]
    # In no order, as several hosts give them.
    numbered = [*enumerate(tokens)][::-1]
    return numbered, {"scores": scores[::-1]}

  def score(dataset):
    found = scorer(params, list(examples(dataset)))
    return [(i, float(x)) for i, x in enumerate(found)][::-1]

  found, _ = evaluator.evaluate(
    compute_metrics=True,
    step=3,
    predict_fn=lambda dataset: predict_with_aux(dataset)[0],
    score_fn=score,
    predict_with_aux_fn=predict_with_aux,
  )
  return found.result()[task.name]


def same(ours, theirs):
  """Arguments of a metric: of one kind, and equal."""
  assert len(ours) == len(theirs)
  for one, other in zip(ours, theirs):
    if isinstance(other, dict):
      assert set(one) == set(other)
      same([*one.values()], [*other.values()])
    elif isinstance(other, np.ndarray):
      assert isinstance(one, np.ndarray) and one.shape == other.shape
      assert one.dtype == other.dtype
      np.testing.assert_allclose(one, other, rtol=1e-5)
    else:
      assert one == other


@pytest.mark.parametrize(
  "decoding", [Decoding(), Decoding(num_beams=2)], ids=["greedy", "beams"]
)
@pytest.mark.parametrize(
  "names",
  [("scores",), ("aux",), ("predictions", "scores", "aux")],
  ids="+".join,
)
def test_arguments_are_those_of_seqio_s_evaluator(
  model, names, decoding, tmp_path
):
  recorder = Recorder()
  task = task_of(recorder.metrics(*names))
  _, ours = evaluated(model, task, tmp_path, decoding=decoding)
  found, recorder.calls = recorder.calls, {}
  theirs = by_seqio(model, task, decoding)
  assert set(found) == set(recorder.calls) == set(names)
  for name in names:
    same(found[name], recorder.calls[name])
  assert set(ours) == set(theirs)
  for name, value in theirs.items():
    assert ours[name] == pytest.approx(
      float(getattr(value, "value", value)), rel=1e-5
    )
  # What they are called with is worth telling apart.
  for arguments in found.values():
    assert arguments[0] == [f"wanted {target}" for _, target in ROWS]


def test_scores_alone_predict_nothing(model, tmp_path, monkeypatch):
  recorder = Recorder()
  task = task_of(recorder.metrics("scores"))
  monkeypatch.setattr(Predictor, "__call__", lambda *unused: 1 / 0)
  evaluator, found = evaluated(model, task, tmp_path)
  with open(tmp_path / "inference_eval/scored-000003.jsonl") as file:
    rows = [json.loads(line) for line in file]
  assert [set(row) for row in rows] == [{"input", "target", "score"}] * 9
  mean = np.mean([row["score"] for row in rows])
  assert found["mean"] == pytest.approx(mean)
  assert len(list(evaluator.samples(3, 4))) == 4


def test_a_task_of_ours_may_ask_for_scores(model, tmp_path):
  recorder = Recorder()
  source = sources.Function(
    {"validation": lambda: [{"a": a, "b": b.strip()} for a, b in ROWS]}
  )
  task = tasks.text_to_text(
    source, "{a}", "{b}", BYTES, metrics=recorder.metrics("scores", "aux")
  )
  _, found = evaluated(model, task, tmp_path)
  assert set(found) == {"mean", "sum"}
  _, scores = recorder.calls["scores"]
  assert scores.shape == (9,) and (scores < 0).all()


def test_a_classifier_s_probabilities_are_aux_values(tmp_path):
  """The area under the curve, of no decisions."""
  from sklearn.metrics import roc_auc_score

  def auc(targets, predictions, aux_values):
    p_NC = aux_values["probabilities"]
    assert predictions == p_NC.argmax(1).tolist()
    return {"auc": roc_auc_score(targets, p_NC[:, 1])}

  rows = [{"a": a, "y": i % 2} for i, (a, _) in enumerate(ROWS)]
  task = head_tasks.classification(
    sources.Function({"validation": lambda: rows}),
    "{a}",
    "y",
    BYTES,
    ("no", "yes"),
    metrics=(auc,),
    name="curve",
  )
  head = HeadConfig("sequence_classification", 2, label_names=("no", "yes"))
  made = factory.create(CONFIG.with_head(head))
  params = jax.jit(initial.init_params, static_argnums=(0, 1))(made, 0)
  data = pipeline.DatasetConfig(task, None, "validation", 4)
  evaluator = InferenceEvaluator(made, data, str(tmp_path), mesh())
  found = evaluator.evaluate(params, 3)["curve"]
  with open(tmp_path / "inference_eval/curve-000003.jsonl") as file:
    p = [json.loads(line)["probabilities"]["yes"] for line in file]
  assert found["auc"] == pytest.approx(
    roc_auc_score([row["y"] for row in rows], p), abs=1e-3
  )
  # How likely a target is, a language model alone tells.
  scored = head_tasks.classification(
    sources.Function({"validation": lambda: rows}),
    "{a}",
    "y",
    BYTES,
    ("no", "yes"),
    metrics=Recorder().metrics("scores"),
    name="scored_classes",
  )
  data = pipeline.DatasetConfig(scored, None, "validation", 4)
  with pytest.raises(UserError, match=r"\(targets, scores\)"):
    InferenceEvaluator(made, data, str(tmp_path), mesh())


def test_a_metric_of_other_arguments_is_a_line():
  def of_losses(targets, losses):
    return {}

  with pytest.raises(UserError, match="of_losses asks for targets, losses"):
    metrics.check([of_losses], "any")
