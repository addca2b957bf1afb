"""SIGTERM and Ctrl-C: save at the next step boundary, exit with code 75, go on later as if nothing had happened.

The body here carries no state, so that windows are shuffled, and has dropout of its own, whose random state
Keras keeps.
"""

import re
import signal

import tiny_runs

EXIT_STOPPED = 75
LAST_STEP = 200
GIN = """
from __gin__ import dynamic_registration

from keras import layers
from lmscale import experiment
from lmscale.bodies import body
from lmscale.parameters import groups
from lmscale.parameters import update_rules
from lmscale.softmax import sampled
from lmscale.softmax import samplers
from lmscale.tables import table_config
from lmscale.tasks import next_token

experiment.Experiment.data_dir = %DATA_DIR
experiment.Experiment.train_steps = 200
experiment.Experiment.global_batch_size = 24
experiment.Experiment.seed = 3
experiment.Experiment.log_every = 1
experiment.Experiment.eval_every = 150
experiment.Experiment.save_every = 150
experiment.Experiment.keep_checkpoints = 5
experiment.Experiment.probe_tokens = 0
experiment.Experiment.task = @next_token.NextToken
next_token.NextToken.tables = {'words': @table_config.TableConfig()}
next_token.NextToken.inputs = 'words'
next_token.NextToken.outputs = 'words'
next_token.NextToken.window = 5
table_config.TableConfig.embed_dim = 8
next_token.NextToken.body = @body.keras_body
body.keras_body.layer = @layers.GRU
layers.GRU.units = 12
layers.GRU.return_sequences = True
layers.GRU.dropout = 0.3
next_token.NextToken.head = @sampled.SampledSoftmax
sampled.SampledSoftmax.sampler = @samplers.LogUniformSampler
samplers.LogUniformSampler.num_sampled = 64
experiment.Experiment.groups = [@rows/groups.Group(), @layers/groups.Group()]
rows/groups.Group.pattern = 'tables/.*'
rows/groups.Group.update = @update_rules.RowWiseAdagrad()
layers/groups.Group.pattern = 'layers/.*'
layers/groups.Group.update = @update_rules.SGD()
update_rules.SGD.learning_rate = 0.1
update_rules.RowWiseAdagrad.learning_rate = 0.1
"""


def test_stopped_runs_save_and_go_on(data_dir, in_background, tmp_path):
    gin_file = tmp_path / "gru.gin"
    gin_file.write_text(GIN)

    def arguments(workdir):
        return tiny_runs.train_arguments(
            workdir=workdir, gin_file=gin_file, cpu_devices=2, bindings={}, DATA_DIR=str(data_dir)
        )

    uninterrupted = in_background(tiny_runs.finish, arguments(tmp_path / "whole"), log=tmp_path / "whole.log")
    stopped = tmp_path / "stopped"
    for number, at_step in ((signal.SIGTERM, 20), (signal.SIGINT, 70)):
        process = tiny_runs.Process("lmscale.train", arguments(stopped), log=tmp_path / number.name)
        process.wait_until(lambda at_step=at_step: tiny_runs.steps_done(stopped) >= at_step)
        reached = tiny_runs.steps_done(stopped)
        process.send(number)
        assert process.wait() == EXIT_STOPPED, process.stderr
        message = re.search(
            rf"stopped by {number.name} after step (\d+); the checkpoint is saved", process.stderr
        )
        step = int(message[1])
        assert "Run the same command again to go on" in process.stderr
        # The next boundary: the step that it was in, not the next save.
        assert (
            reached <= step == tiny_runs.steps_done(stopped) == tiny_runs.checkpoint_steps(stopped)[-1] < 150
        )
        assert not (stopped / "finished.json").exists()
    tiny_runs.finish(arguments(stopped), log=tmp_path / "last")
    whole = uninterrupted.result()
    assert [line["step"] for line in tiny_runs.metrics(stopped)] == list(range(1, LAST_STEP + 1))
    tensors = tiny_runs.tensors(whole, LAST_STEP)
    assert any("seed_generator" in name for name in tensors)
    tiny_runs.assert_same_bits(tiny_runs.tensors(stopped, LAST_STEP), tensors)
