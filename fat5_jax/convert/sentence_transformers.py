"""What makes the folder of an embedding one of sentence-transformers too."""

from __future__ import annotations

from typing import Any

from fat5_jax.models.config import T5Config

# A tokenizer ends every text in </s>, so that the last token is ours of "eos".
_POOLING = {"mean": "mean_tokens", "first": "cls_token", "eos": "lasttoken"}
_MODES = (
  *("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"),
  *("weightedmean_tokens", "lasttoken"),
)


def files(config: T5Config) -> dict[str, Any]:
  """The JSON files: the encoder at the top, then pooling, then length one."""
  modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
  modules.append(("2_Normalize", "Normalize"))
  mode = _POOLING[config.head.pooled]
  return {
    "modules.json": [
      {
        "idx": i,
        "name": str(i),
        "path": path,
        "type": f"sentence_transformers.models.{name}",
      }
      for i, (path, name) in enumerate(modules)
    ],
    "sentence_bert_config.json": {
      "max_seq_length": None,
      "do_lower_case": False,
    },
    "1_Pooling/config.json": {
      "word_embedding_dimension": config.emb_dim,
      **{f"pooling_mode_{name}": name == mode for name in _MODES},
    },
    "2_Normalize/config.json": {},
    "config_sentence_transformers.json": {
      "model_type": "SentenceTransformer",
      "similarity_fn_name": "cosine",
    },
  }
