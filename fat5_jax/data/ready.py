"""The tasks that are ready under a name: T5's, SuperGLUE, XSum and others.

Each reads local files of DATA_DIR, or without one a data set of HF's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools

import seqio

from fat5_jax.data import (
  glue,
  head_tasks,
  mixtures,
  nli,
  pretraining,
  super_glue,
  super_glue_tasks,
  tasks,
)


def _ready_mixture(name: str, rates: Mapping[str, float]) -> Callable:
  """What builds a mixture of T5's by its name."""

  def make(vocabulary, data_dir=None):
    return tasks.mixture(rates, vocabulary, data_dir, name=name)

  return make


# Built when a run asks for one.
TASKS: dict[str, Callable[..., seqio.Task | seqio.Mixture]] = {
  **{
    f"glue_{name}_v002": functools.partial(tasks.glue, name)
    for name in glue.GLUE
  },
  "squad_v010_allanswers": tasks.squad,
  "wmt_t2t_ende_v003": functools.partial(
    tasks.translation, "en", "de", name="wmt_t2t_ende_v003", hf_name="de-en"
  ),
  "wmt14_enfr_v003": functools.partial(
    tasks.translation, "en", "fr", name="wmt14_enfr_v003", hf_name="fr-en"
  ),
  "wmt16_enro_v003": functools.partial(
    tasks.translation,
    "en",
    "ro",
    name="wmt16_enro_v003",
    hf_path="wmt/wmt16",
    hf_name="ro-en",
  ),
  "wmt15_enfr_v003": functools.partial(
    tasks.translation,
    "en",
    "fr",
    name="wmt15_enfr_v003",
    hf_path="wmt/wmt15",
    hf_name="fr-en",
  ),
  "wmt19_ende_v003": functools.partial(
    tasks.translation,
    "en",
    "de",
    name="wmt19_ende_v003",
    hf_path="wmt/wmt19",
    hf_name="de-en",
  ),
  **{
    f"multi30k_{first}_{second}": functools.partial(
      tasks.translation,
      first,
      second,
      name=f"multi30k_{first}_{second}",
      hf_path="bentrevett/multi30k",
    )
    for first, second in (
      *(("en", "de"), ("en", "fr"), ("en", "cs")),
      *(("de", "en"), ("fr", "en"), ("cs", "en")),
    )
  },
  "cnn_dailymail_v002": functools.partial(
    tasks.summarization, "article", "highlights", name="cnn_dailymail_v002"
  ),
  "xsum": functools.partial(
    tasks.summarization,
    "document",
    "summary",
    name="xsum",
    hf_path="EdinburghNLP/xsum",
    hf_name=None,
  ),
  **{
    f"orangesum_{part}": functools.partial(
      tasks.summarization,
      "text",
      "summary",
      name=f"orangesum_{part}",
      hf_path="EdinburghNLP/orange_sum",
      hf_name=part,
    )
    for part in ("abstract", "title")
  },
  **{
    name: functools.partial(pretraining.c4, objective=objective, name=name)
    for name, objective in (
      ("c4_v220_span_corruption", "span_corruption"),
      ("c4_v220_unsupervised", "span_corruption"),
      ("c4_prefix_lm_objective_encoder_decoder_architecture", "prefix_lm"),
      ("c4_ul2", "ul2"),
      ("c4_causal_lm", "causal_lm"),
    )
  },
  "nli": nli.text,
  "spoken_values": lambda vocabulary, data_dir=None: tasks.quickstart(
    vocabulary
  ),
  **{
    f"super_glue_{name}_v102": functools.partial(super_glue_tasks.text, name)
    for name in super_glue.SUPER_GLUE
    if name != "wsc"
  },
  **{
    f"super_glue_wsc_v102_simple_{part}": functools.partial(
      super_glue_tasks.text, f"wsc_{part}"
    )
    for part in ("train", "eval")
  },
  "dpr_v001_simple": super_glue_tasks.definite_pronoun_resolution,
  "super_glue_v102_proportional": _ready_mixture(
    "super_glue_v102_proportional", mixtures.SUPER_GLUE_RATES
  ),
  "glue_v002_proportional": _ready_mixture(
    "glue_v002_proportional", mixtures.GLUE_RATES
  ),
  **{
    f"super_glue_{name}_classes": functools.partial(
      super_glue_tasks.classes, name
    )
    for name, task in super_glue.SUPER_GLUE.items()
    if task.head_inputs
  },
  "nli_classes": nli.classes,
  **head_tasks.BUILTIN_TASKS,
}
