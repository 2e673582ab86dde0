"""Networks of transformers and timm through the command."""

import json

import pandas as pd
import pytest

from analysis.branches import main
from tests.integration.test_networks import imported

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # other people's code
]
TEXT = "the branch is added to the stream and the stream grows from layer to layer . " * 60


@pytest.fixture
def gpt(tmp_path):
    """A folder with a small GPT-2, and a tokenizer of words that begins each text with a token."""
    transformers, tokenizers = imported("transformers"), imported("tokenizers")
    words = {word: i for i, word in enumerate(["<s>", *dict.fromkeys(TEXT.split())])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=16, vocab_size=len(words)
    )
    folder = tmp_path / "gpt"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(folder)
    return folder


def test_a_language_model_on_a_text(gpt, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--data", str(tmp_path / "text.txt"), "--length", "12", "--images", "20"]
    options += ["--lesion", "16", "--format", "png", "--out", str(tmp_path)]
    assert main([f"mine=hf:{gpt}", *options]) == 0
    frame = pd.read_csv(tmp_path / "branches.csv")
    assert frame["branch_kind"].tolist() == ["attention", "mlp"] * 3
    assert frame["images"].unique() == [20]
    assert frame["count"].unique() == [20 * 11 * 32]  # the first token is left out
    assert frame["lesion_loss"].notna().all()
    assert "mine: network GPT2LMHeadModel (transformers" in capsys.readouterr().out
    assert json.loads((tmp_path / "branches.json").read_text())["mine"]["data"]["length"] == 12


def test_what_is_missing(gpt, tmp_path, capsys):
    options = ["--out", str(tmp_path)]
    assert main([f"hf:{gpt}", *options]) == 2
    assert "gpt: it takes text: name a text file with --data" in capsys.readouterr().err
    assert main(["hf:nobody/nothing", *options]) == 2
    assert "hf:nobody/nothing: no such folder, and no such network in" in capsys.readouterr().err
    imported("timm")
    assert main(["timm:resnet1", *options]) == 2
    assert "has no network of this name" in capsys.readouterr().err
    assert main(["timm:resnet18", *options]) == 2
    assert "timm:resnet18: no weights in the local cache" in capsys.readouterr().err
