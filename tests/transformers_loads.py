"""Loads exported folders in the transformers of this process, and runs them.

  python tests/transformers_loads.py JOBS [FOLDER_OF_TRANSFORMERS]

JOBS is a JSON list; test_exports.py writes it and reads the answers. Each job
has a `folder` and of `load`, `refuse` and `readme` what is wanted.
"""

import json
import os
import re
import sys

if len(sys.argv) > 2:
  sys.path.insert(0, sys.argv[2])

import numpy as np
import torch
import transformers

transformers.logging.set_verbosity_error()
IS_5 = int(transformers.__version__.split(".")[0]) >= 5
DTYPE = "dtype" if IS_5 else "torch_dtype"
torch.set_num_threads(1)


def load(folder, class_name, trust):
  options = {"trust_remote_code": True} if trust else {}
  cls = getattr(transformers, class_name)
  return cls.from_pretrained(
    folder, output_loading_info=True, **{DTYPE: torch.float32}, **options
  )


def arrays(output):
  return {
    k: v.float().numpy()
    for k, v in output.items()
    if isinstance(v, torch.Tensor)
  }


def run(job, class_name, trust):
  """Outputs by name, or why there are none."""
  if not hasattr(transformers, class_name):
    return {"refused": "no such class"}
  try:
    model, info = load(job["folder"], class_name, trust)
  except Exception as e:
    return {"refused": f"{type(e).__name__}: {e}"}
  found = {
    "missing": sorted(info["missing_keys"]),
    "unexpected": sorted(info["unexpected_keys"]),
  }
  inputs = {
    k: torch.tensor(v).long() for k, v in np.load(job["inputs"]).items()
  }
  if job.get("generate"):
    prompt = {k: x for k, x in inputs.items() if "decoder" not in k}
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    found["generated"] = tokens.tolist()
  try:
    with torch.no_grad():
      output = model(**inputs)
  except Exception as e:
    return found | {"refused": f"{type(e).__name__}: {e}"}
  path = os.path.join(job["answers"], f"{class_name}.npz")
  np.savez(path, **arrays(output))
  if trust and job.get("labels"):
    labels = {k: torch.tensor(v) for k, v in np.load(job["labels"]).items()}
    found["loss"] = model(**inputs, **labels).loss.item()
  if trust and job.get("save"):
    model.save_pretrained(job["folder"] + f"-saved-{class_name}")
  return found | {"outputs": path}


def lines(job):
  """Runs the python blocks of README.md that are this version's."""
  with open(os.path.join(job["folder"], "README.md"), encoding="utf-8") as file:
    text = file.read()
  ran = []
  for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
    first = block.split("\n")[0]
    if first in ("import fat5_jax", "# peft"):
      continue
    if first == "# sentence-transformers" or (
      first == "# transformers 5" and not IS_5
    ):
      continue
    scope = {}
    exec(block.replace("/models/this", job["folder"]), scope)
    ran.append(
      {
        k: scope[k].float().numpy().tolist()
        for k in ("logits", "start", "end", "embeddings")
        if k in scope
      }
      | {"first": first, "labels": scope.get("labels")}
    )
  return ran


def main():
  with open(sys.argv[1], encoding="utf-8") as file:
    jobs = json.load(file)
  for job in jobs:
    os.makedirs(job["answers"], exist_ok=True)
    job["loaded"] = {
      f"{name}{'+code' if trust else ''}": run(job, name, trust)
      for name, trust in job.get("load", ())
    }
    job["refusals"] = {
      name: run(job, name, False) for name in job.get("refuse", ())
    }
    if job.get("readme"):
      job["ran"] = lines(job)
  with open(f"{sys.argv[1]}.answers", "w", encoding="utf-8") as file:
    json.dump({"version": transformers.__version__, "jobs": jobs}, file)


if __name__ == "__main__":
  main()
