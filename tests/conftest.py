import os
import shutil

# Many small models: one thread each is fastest, and the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny import tiny_encoder

from distillabse.config import ExportConfig
from distillabse.corpus.records import Sentence
from distillabse.export.bundle import write_bundle
from distillabse.models.teacher import load_encoder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """Four layers, mean pooling, random weights."""
    return tiny_encoder(tmp_path_factory.mktemp("mean") / "encoder", layers=4)


@pytest.fixture(scope="session")
def labse_folder(tmp_path_factory):
    """The layout of LaBSE: Transformer, CLS pooling, Dense + tanh, Normalize."""
    return tiny_encoder(tmp_path_factory.mktemp("cls") / "encoder", layers=4, pooling="cls", dense=True)


SENTENCES = [
    "The train is late this morning.",
    "Where is the old house by the water?",
    "hello",
    "She will read a good book tonight, and then sleep well until the day after.",
    "No",
    "My friend likes the big blue bird in the tree.",
    "Please write your name here.",
    "We always walk through the city at night.",
]


@pytest.fixture
def sentences():
    return list(SENTENCES)


@pytest.fixture
def texts(sentences):
    """The sentences, said to be of two languages."""
    return [Sentence(text, language) for text in sentences for language in ("en", "de")]


@pytest.fixture(scope="session", params=["encoder_folder", "labse_folder"])
def good(request, tmp_path_factory):
    """A bundle of mean pooling, and one of LaBSE's layout."""
    return exported(request.getfixturevalue(request.param), tmp_path_factory)


@pytest.fixture(scope="session")
def mean_pooled(encoder_folder, tmp_path_factory):
    """A bundle of mean pooling."""
    return exported(encoder_folder, tmp_path_factory)


@pytest.fixture
def bundle(mean_pooled, tmp_path):
    """A copy to plant a fault in."""
    return shutil.copytree(mean_pooled, tmp_path / "bundle")


def exported(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_bundle(load_encoder(str(encoder)), folder, ExportConfig(), {"config": {"export": {"opset": 18}}})
    return folder
