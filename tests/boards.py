"""TensorBoard's own readers and plugins, without its web server: what its tabs show of a log directory."""

import contextlib
import time
from pathlib import Path

import pytest
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.data import provider, server_ingester
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tensorboard.util import grpc_util

LOADERS = ("python", "data_server")
_STATUSES = {value: name.removeprefix("STATUS_").lower() for name, value in api_pb2.Status.items()}


class Board:
    """What a TensorBoard shows that has just been started; after `reload`, what one shows that was running."""

    def __init__(self, logdir, *, loader="python"):
        """Reads the directory. Skips the test on a machine without the data server.

        Args:
          logdir: as its flag.
          loader: "python", of --load_fast=false, or "data_server", of --load_fast=true. The second reads again by
            itself, every second.
        """
        self._logdir = str(logdir)
        self._multiplexer = None
        if loader == "data_server":
            try:
                binary = server_ingester.get_server_binary()
            except server_ingester.NoDataServerError as error:
                pytest.skip(f"TensorBoard has no data server here: {error}")
            ingester = server_ingester.SubprocessServerDataIngester(
                binary,
                self._logdir,
                reload_interval=1,
                channel_creds_type=grpc_util.ChannelCredsType.LOCAL,
            )
            ingester.start()
            self._ingester = ingester  # Its process ends with it.
            self._provider = ingester.data_provider
        else:
            self._multiplexer = plugin_event_multiplexer.EventMultiplexer()
            self._provider = data_provider.MultiplexerDataProvider(self._multiplexer, self._logdir)
        # The data server answers before it has read.
        written = {path.parent for path in Path(logdir).rglob("events.out.tfevents.*")}
        self.reload_until(lambda: len(self._runs()) == len(written))

    def reload(self):
        if self._multiplexer is not None:
            self._multiplexer.AddRunsFromDirectory(self._logdir)
            self._multiplexer.Reload()

    def reload_until(self, condition, *, deadline_secs=20):
        """Reads again until condition() holds, or the time is over."""
        end = time.monotonic() + deadline_secs
        self.reload()
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)
            self.reload()

    def hparams(self):
        """{trial: {"runs", "statuses", "hparams", "metrics"}}: the table of the HParams tab.

        "metrics" is {tag: value}, with `group.` before the tags of another run than the session's.
        """
        ctx, request = context.RequestContext(), api_pb2.ListSessionGroupsRequest(slice_size=1000)
        request.allowed_statuses.extend(api_pb2.Status.values())
        handler = list_session_groups.Handler(ctx, self._hparams_context(), "", request)
        return {
            group.name: {
                "runs": [session.name for session in group.sessions],
                "statuses": [_STATUSES[session.status] for session in group.sessions],
                "hparams": {name: getattr(v, v.WhichOneof("kind")) for name, v in group.hparams.items()},
                "metrics": {
                    f"{metric.name.group}.{metric.name.tag}".removeprefix("."): metric.value
                    for metric in group.metric_values
                },
            }
            for group in handler.run().session_groups
        }

    def differing_hparams(self):
        """Names of the columns that the tab says differ between the trials."""
        ctx, request = context.RequestContext(), api_pb2.GetExperimentRequest()
        experiment = get_experiment.Handler(ctx, self._hparams_context(), "", request).run()
        return {info.name for info in experiment.hparam_infos if info.differs}

    def texts(self, run, tag="config"):
        """[(step, text), ...] in the order of the Text tab's data, which it shows from the last to the first."""
        data = self._read(self._provider.read_tensors, "text", run, tag)
        return [(datum.step, datum.numpy.item().decode()) for datum in data]

    def scalars(self, run, tag):
        """[(step, value), ...]."""
        return [(datum.step, datum.value) for datum in self._scalars(run, tag)]

    def wall_times(self, run, tag):
        return [datum.wall_time for datum in self._scalars(run, tag)]

    def _runs(self):
        return self._provider.list_runs(context.RequestContext(), experiment_id="")

    def _scalars(self, run, tag):
        return self._read(self._provider.read_scalars, "scalars", run, tag)

    def _read(self, read, plugin, run, tag):
        data = read(
            context.RequestContext(),
            experiment_id="",
            plugin_name=plugin,
            downsample=1000,
            run_tag_filter=provider.RunTagFilter(runs=[run], tags=[tag]),
        )
        with contextlib.suppress(KeyError):
            return data[run][tag]
        return []

    def _hparams_context(self):
        return backend_context.Context(base_plugin.TBContext(data_provider=self._provider))
