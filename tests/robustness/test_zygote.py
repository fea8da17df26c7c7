"""The instrument itself: it sees a crash, a hang, a traceback, and memory."""

import pytest


def run(zygote, call, *arguments, seconds=10):
  return zygote.run(call, list(arguments), "/", seconds)


def test_it_sees_what_memory_a_case_takes(zygote):
  little, much = (run(zygote, "operator:mul", "x", n * 2**20) for n in (1, 300))
  # What is taken in the last hundredth of a second is not seen.
  assert little.mib < 30 and 270 <= much.mib < 330
  # One case's memory is not the next one's.
  assert run(zygote, "operator:mul", "x", 1).mib < 30


@pytest.mark.parametrize(
  "call, arguments, told",
  [
    ("os:abort", [], "signal 6"),
    ("ctypes:string_at", [1], "signal 11"),
    ("time:sleep", [9], "hangs"),
    ("builtins:int", ["x"], "traceback"),
    ("builtins:int", ["5"], "accepted"),
    ("os:_exit", [1], "without an error"),
  ],
)
def test_it_sees_what_is_no_answer(zygote, call, arguments, told):
  assert told in run(zygote, call, *arguments, seconds=1).problem()


def test_it_takes_an_error_of_a_line_for_an_answer(zygote):
  outcome = run(zygote, "infer", "--gin.MODEL_DIR=/nonesuch")
  assert outcome.status == 1 and outcome.problem() is None
