"""Language models so small that a test can compute them again, and the settings that all of them share."""

import functools

import keras
import numpy as np

from lmscale.bodies.body import keras_body
from lmscale.data.vocab import UnnamedVocabulary
from lmscale.experiment import Experiment
from lmscale.parameters.groups import Group
from lmscale.parameters.update_rules import SGD
from lmscale.softmax.full import FullSoftmax
from lmscale.softmax.sampled import SampledSoftmax
from lmscale.softmax.samplers import LogUniformSampler
from lmscale.tables.table_config import TableConfig
from lmscale.tasks.next_token import NextToken

VOCAB_SIZE, EMBED_DIM = 53, 6


class Text:
    """Stands in for `PreparedData`: the same tokens in each split."""

    def __init__(self, *, vocab_size=VOCAB_SIZE, ids=None, eos_id=0, counts=None):
        self.directory = "here"
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.ids = np.random.default_rng(0).integers(0, vocab_size, 301) if ids is None else ids
        self.counts = np.bincount(self.ids, minlength=vocab_size) if counts is None else counts
        self.vocabularies = {"words": UnnamedVocabulary(size=vocab_size, counts=self.counts)}

    def split(self, name):
        del name
        return self.ids


def tied(*, embed_dim=EMBED_DIM, bias="zeros"):
    """Tables of a tied model, as `language_model` takes them."""
    return {
        "tables": {"words": TableConfig(embed_dim=embed_dim, bias=bias)},
        "inputs": "words",
        "outputs": "words",
    }


def untied(*, input_dim, output_dim, bias="zeros"):
    """Tables of an untied model; that of the inputs has no bias."""
    return {
        "tables": {
            "inputs": TableConfig(embed_dim=input_dim, bias="none"),
            "outputs": TableConfig(embed_dim=output_dim, bias=bias),
        },
        "inputs": "inputs",
        "outputs": "outputs",
    }


def sampled(num_sampled=11):
    """The head that compares each token with so many candidates."""
    return functools.partial(
        SampledSoftmax, sampler=functools.partial(LogUniformSampler, num_sampled=num_sampled)
    )


def identity():
    """The body that returns what it is given."""
    return keras_body(layer=keras.layers.Identity)


def one_rule(rule=None):
    """Groups that update everything by one rule, plain gradient descent unless given."""
    return [Group(pattern=".*", update=rule or SGD(learning_rate=0.1))]


def language_model(*, body=identity, head=FullSoftmax, window=5, eval_window=5, **changes):
    """`Experiment.task` of a language model, tied unless `changes` name other tables."""
    return functools.partial(
        NextToken, body=body, head=head, window=window, eval_window=eval_window, **(tied() | changes)
    )


def experiment(*, task, **changes):
    """`Experiment` of a task, with a seed and sizes that divide by 1, 2 and 3 devices."""
    settings = {
        "data_dir": "",
        "groups": one_rule(),
        "train_steps": 100,
        "global_batch_size": 6,
        "seed": 3,
        "log_every": 1,
        "eval_every": 1,
        "save_every": 1,
    }
    return Experiment(task=task, **(settings | changes))


def values(parameters):
    """{path: array} of `Parameter`s, read in two blocks."""
    whole = {}
    for parameter in parameters:
        if parameter.shape:
            middle = parameter.shape[0] // 2
            blocks = [parameter.read(0, middle), parameter.read(middle, parameter.shape[0])]
            whole[parameter.path] = np.concatenate(blocks)
        else:
            whole[parameter.path] = np.asarray(parameter.read(0, 1))
        assert whole[parameter.path].shape == parameter.shape, parameter.path
        assert whole[parameter.path].dtype == parameter.dtype, parameter.path
    return whole


def restore(parameters, saved):
    """Writes the values of `values`, each in two blocks of other sizes."""
    for parameter in parameters:
        value = saved[parameter.path]
        if parameter.shape:
            cut = parameter.shape[0] // 3
            parameter.write(0, value[:cut])
            parameter.write(cut, value[cut:])
        else:
            parameter.write(0, value)


def assert_same(actual, expected):
    """Two {name: array} are equal, names and every number."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
