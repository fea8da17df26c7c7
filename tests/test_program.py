"""What a run compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from test_kahan import TINY

from fat5_jax import optimizers
from fat5_jax.distributed.sharding import Partitioner
from fat5_jax.models import factory
from fat5_jax.training.program import Program


def test_a_run_from_a_checkpoint_compiles_its_step_once(caplog):
  model, one = factory.create(TINY), Partitioner(devices=jax.devices()[:1])
  batch = {
    key: np.ones((2, 8), np.int32)
    for key in (
      "encoder_input_tokens",
      "decoder_input_tokens",
      "decoder_target_tokens",
      "decoder_loss_weights",
    )
  }
  program = Program(model, one, optimizers.Compensated(optax.sgd(1.0)))
  params = program.init_state().params
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  state = program.state_from(7, params)
  with jax.log_compiles():
    for _ in range(3):
      state, _ = program.train_step(state, one.to_devices(batch, 0, 2))
  done = [r for r in caplog.messages if "compilation of jit(train_step)" in r]
  assert len(done) == 1, done
  assert int(state.step) == 10
