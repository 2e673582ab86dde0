"""What is lost without a branch, against hooks that set it to zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis
from analysis.additions.lesion import add_lesions
from models import build


def test_lesions_as_hooks_that_zero_a_branch():
    model = build("resnet-14").eval()
    x, y = torch.randn(24, 3, 32, 32), torch.arange(24) % 10
    batches = [(x[:16], y[:16]), (x[16:], y[16:])]
    done = []
    frame = add_lesions(
        analysis.measure_branches(model, batches), model, batches, progress=done.append
    )
    assert sum(done) == 2 * 7  # whole, and without each of 6 branches

    def results():
        with torch.no_grad():
            logits = model(x)
        return (logits.argmax(1) == y).double().mean(), F.cross_entropy(logits, y)

    accuracy, loss = results()
    for row in frame.to_dict("records"):
        branch = model.get_submodule(row["branch"])
        with branch.register_forward_hook(lambda module, args, output: output * 0):
            without = results()
        assert row["lesion_accuracy"] == pytest.approx(float(accuracy - without[0]), abs=1e-6)
        assert row["lesion_loss"] == pytest.approx(float(without[1] - loss), rel=1e-4)


class Model(nn.Module):
    """A language model of two layers of its own tensors: logits (N, T, V)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11)

    def forward(self, ids, labels):
        return {"logits": self.head(self.layers(self.embed(ids)))}


def test_language_models_predict_the_next_token():
    model = Model().eval()
    ids = torch.randint(0, 11, (4, 6))
    labels = ids.clone()
    labels[:, 3] = -100  # ignored
    batch = {"ids": ids, "labels": labels}
    frame = analysis.measure_branches(model, [batch])
    frame = add_lesions(frame, model, [batch], images=2)

    def loss():
        with torch.no_grad():
            logits = model(**batch)["logits"][:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()

    whole = loss()
    for i, row in enumerate(frame.to_dict("records")):
        branch = getattr(model.layers.layers[i // 2], "linear2" if i % 2 else "self_attn")
        hook = (lambda m, a, o: (o[0] * 0, o[1])) if i % 2 == 0 else (lambda m, a, o: o * 0)
        with branch.register_forward_hook(hook):
            assert row["lesion_loss"] == pytest.approx(loss() - whole, rel=1e-3, abs=1e-6)


def test_batches_without_labels():
    model = build("resnet-8").eval()
    x = torch.randn(2, 3, 32, 32)
    frame = analysis.measure_branches(model, [x])
    with pytest.raises(ValueError, match="no labels, or no logits to compare them with"):
        add_lesions(frame, model, [x])
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
