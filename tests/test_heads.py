"""Heads: what they compute, how they start, what a checkpoint knows of them."""

import copy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeClassifier, RidgeClassifierCV
from torch import nn
from torchvision import models

from conftest import SMALL, composed, facts_of, plain
from finetune import build, checkpoint, fit, heads, measure
from finetune.backbones.module import module
from finetune.backbones.run import run as backbone_of
from finetune.backbones.timm import timm
from finetune.backbones.tiny import tiny
from finetune.backbones.torchvision import torchvision
from finetune.data.split import stratified
from finetune.datamodule import labels_of
from finetune.errors import CheckpointError, ConfigError
from finetune.restore import load
from finetune.ridge import GRID

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def backbone():
    return tiny()


def test_a_linear_head_is_a_linear_layer_behind_dropout(backbone):
    head = heads.linear(backbone, CLASSES, dropout=0.5).eval()
    features = torch.randn(4, 128)
    assert torch.equal(head(features), features @ head.weight.T + head.bias)
    head.train()
    torch.manual_seed(0)
    dropped = F.dropout(features, 0.5)
    torch.manual_seed(0)
    assert torch.equal(head(features), F.linear(dropped, head.weight, head.bias))


def test_an_mlp_head_has_one_hidden_layer_as_wide_as_the_features(backbone):
    head = heads.mlp(backbone, CLASSES, dropout=0.5).eval()
    features = torch.randn(4, 128)
    hidden = F.gelu(features @ head.hidden.weight.T + head.hidden.bias)
    assert hidden.shape == (4, 128)
    torch.testing.assert_close(head(features), hidden @ head.output.weight.T + head.output.bias)
    assert heads.mlp(backbone, CLASSES, hidden=5).output.weight.shape == (3, 5)


def test_a_zero_head_says_nothing_and_can_learn(backbone):
    features = torch.randn(4, 128)
    for head in (
        heads.linear(backbone, CLASSES, init="zero"),
        heads.mlp(backbone, CLASSES, init="zero"),
    ):
        logits = head(features)
        assert torch.equal(logits, torch.zeros(4, 3))
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        last = head if isinstance(head, heads.Linear) else head.output
        assert last.weight.grad.abs().max() > 0


def test_random_is_what_torch_does(backbone):
    torch.manual_seed(3)
    plain = nn.Linear(128, 3)
    for init in (None, "random", "ridge"):  # ridge: until the features are there
        torch.manual_seed(3)
        assert torch.equal(heads.linear(backbone, CLASSES, init=init).weight, plain.weight)


# in a run, and back from it


@pytest.mark.parametrize(
    "overrides",
    [
        ("head=mlp", "head.hidden=7", "head.dropout=0.2"),
        ("head=linear", "head.dropout=0.3", "head.init=zero"),
    ],
    ids=" ".join,
)
def test_a_run_is_loaded_with_the_head_that_it_had(command, tmp_path, overrides):
    assert command("train", *SMALL, "logger=csv", *overrides, "hydra.run.dir=run").code == 0
    saved = checkpoint.read(checkpoint.best_path(tmp_path / "run"))
    model = load(tmp_path / "run").model
    assert model.head.dropout.p == saved.head["dropout"] > 0
    assert facts_of(tmp_path / "run")["model"]["head"] == saved.head
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.state_dict[name]), name
    done = command("evaluate", "run=run", "trainer.accelerator=cpu")
    assert done.code == 0, done.err
    measured = facts_of(tmp_path / "run")["test"]["test/loss"]
    assert f"{measured:.4f}" in done.out
    done = command("train", *[o for o in SMALL if "model" not in o], "logger=csv", "model=run",
                   "model.path=run", "head=keep", "max_steps=0", "hydra.run.dir=again")  # fmt: skip
    assert done.code == 0, done.err
    kept = load(tmp_path / "again").model
    assert kept.head.recipe == model.head.recipe
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(kept(images), model(images))


def test_a_checkpoint_of_before_there_were_several_heads_is_read(tmp_path, trained):
    content = checkpoint.load(checkpoint.best_path(trained))
    del content["head"]
    checkpoint.save(tmp_path / "best.ckpt", content)
    saved = checkpoint.read(tmp_path / "best.ckpt")
    head = heads.rebuild(saved.head, 128, len(saved.classes), "best.ckpt")
    head.load_state_dict({k: saved.state_dict[f"head.{k}"] for k in ("weight", "bias")})


@pytest.mark.parametrize(
    "recipe",
    [{"kind": "os.abort"}, {}, {"kind": "linear", "depth": 3}, {"kind": "mlp", "hidden": -1}],
)
def test_what_a_checkpoint_says_of_its_head_is_never_code(recipe):
    with pytest.raises(CheckpointError, match=r"best\.ckpt: .* head"):
        heads.rebuild(recipe, 8, 3, "best.ckpt")


def test_dropout_is_on_in_training_and_off_in_evaluation(train, monkeypatch):
    seen = []
    forward = heads.Linear.forward

    def watch(head, features):
        seen.append((torch.is_grad_enabled(), head.dropout.training))
        return forward(head, features)

    monkeypatch.setattr(heads.Linear, "forward", watch)
    # the backbone is in eval mode all the time; validation comes between the epochs
    train("strategy=linear_probe", "head.dropout=0.5")
    assert seen.count((True, True)) == 10
    assert set(seen) == {(True, True), (False, False)}


# ridge

DIGITS = (*(o for o in SMALL if not o.startswith(("data", "model"))), "data=digits", "logger=csv")


@pytest.fixture
def digits(tmp_path):
    """digits("data.shots=5", ...): a run of tiny on digits; returns run.json."""

    def run(*overrides, name="run"):
        cfg = composed(*DIGITS, *overrides)
        fit.fit(cfg, tmp_path / name, list(overrides), "as asked for")
        return facts_of(tmp_path / name)

    return run


def features_of(*overrides):
    """Features and labels by split, by the untrained model."""
    cfg = plain(*DIGITS, *overrides)
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    datamodule = build.build_datamodule(cfg, splits, model)
    found = {}
    for name, images in measure.named_splits(splits).items():
        features = datamodule.unaugmented_features(images, torch.device("cpu"))
        found[name] = features.double().numpy(), labels_of(images).numpy()
    return found


@pytest.mark.parametrize("shots", [2, 10, 50])
def test_a_ridge_head_starts_at_scikit_learns_accuracy(digits, shots, caplog):
    with caplog.at_level("INFO", "finetune.fit"):
        facts = digits(f"data.shots={shots}", "max_steps=0", "head.init=ridge")
    (line,) = [m for m in caplog.messages if m.startswith("head.init=ridge")]

    features = features_of(f"data.shots={shots}")
    known, labels = features["train"]
    penalties = np.array(GRID) * np.linalg.norm(known - known.mean(0), 2) ** 2
    chosen = RidgeClassifierCV(penalties).fit(known, labels).alpha_
    classifier = RidgeClassifier(chosen).fit(known, labels)
    for split in ("val", "test"):
        expected = classifier.score(*features[split])
        assert expected > 0.6
        assert facts[split][f"{split}/accuracy"] == pytest.approx(expected, abs=1e-6)
        # that of a uniform softmax is log 10
        assert facts[split][f"{split}/loss"] < 0.7 * np.log(10)
    assert f"{10 * shots} images, lambda {chosen:.3g}, leave-one-out accuracy 0." in line


def test_one_image_a_class_is_enough_for_ridge(digits):
    facts = digits("data.shots=1", "max_steps=0", "head.init=ridge")
    assert facts["test"]["test/accuracy"] > 0.3
    assert facts["test"]["test/loss"] < 1.01 * np.log(10)


def test_ridge_takes_at_most_so_many_images_and_says_so(digits, caplog, monkeypatch):
    monkeypatch.setattr(fit, "MOST_FOR_RIDGE", 30)
    with caplog.at_level("INFO", "finetune.fit"):
        digits("max_steps=0", "head.init=ridge")
    said = [m for m in caplog.messages if m.startswith("head.init=ridge")]
    assert said[0] == "head.init=ridge: 30 of 100 training images"
    assert said[1].startswith("head.init=ridge: 30 images, ")


def test_a_stratified_subset_has_the_same_share_of_each_class_and_at_least_one():
    labels = [0] * 60 + [1] * 30 + [2]
    kept = stratified(labels, 31, seed=0)
    assert kept == sorted(set(kept))
    assert [[labels[p] for p in kept].count(k) for k in range(3)] == [20, 10, 1]
    assert kept == stratified(labels, 31, seed=0) != stratified(labels, 31, seed=1)
    assert stratified(labels, 91, seed=0) == list(range(91))


# keep

NETS = """
from torch import nn

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 7, 3)
        )
        self.fc = nn.Linear(7, 3)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))

class NoBias(Plain):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(7, 3, bias=False)

class Convolution(Plain):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(7, 3, 1)

    def forward(self, x):
        return self.fc(self.features(x)).mean((2, 3))

class Rectified(Convolution):
    def forward(self, x):
        return self.fc(self.features(x)).relu().mean((2, 3))

class Wide(Convolution):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(7, 3, 3)

class Probabilities(Plain):
    def forward(self, x):
        return super().forward(x).log_softmax(1)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A user's own networks, in the working directory."""
    (tmp_path / "kept_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import kept_nets

    yield kept_nets
    sys.modules.pop("kept_nets", None)


def saved(net):
    """Write the weights as DataParallel names them; BatchNorm has seen some images."""
    net.train()(torch.rand(8, 3, 8, 8))
    torch.save({f"module.{name}": value for name, value in net.state_dict().items()}, "own.pt")
    return net.eval()


@pytest.mark.parametrize("name", ["Plain", "NoBias", "Convolution"])
def test_a_kept_head_gives_the_logits_of_the_network_that_it_was_in(
    nets, command, tmp_path, name, caplog
):
    net = saved(getattr(nets, name)())
    done = command("train", *(o for o in SMALL if not o.startswith("model")), "logger=csv",
                   "model=module", f"model.target=kept_nets.{name}", "model.weights=own.pt",
                   "model.input_size=8", "head=keep", "max_steps=0",
                   "hydra.run.dir=run")  # fmt: skip
    assert done.code == 0, done.err
    assert "its outputs are taken to be, in order: 'class_0', 'class_1', 'class_2'" in done.out
    # back from the checkpoint too
    model = load(tmp_path / "run", target=f"kept_nets.{name}").model
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        expected = net((images / 255 - model.mean) / model.std)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Rectified", "Rectified does more after its layer fc than pool"),
        ("Probabilities", "Probabilities does more after its layer fc than pool"),
        ("Wide", r"fc has weights of \(3, 7, 3, 3\), and only a Linear or a 1 x 1 Conv2d"),
    ],
)
def test_what_is_more_than_a_linear_head_is_refused_by_name(nets, name, said):
    saved(getattr(nets, name)())
    with pytest.raises(ConfigError, match=f"head=keep: {said}.*head=linear"):
        heads.keep(module(f"kept_nets.{name}", "own.pt", 8), CLASSES)


def test_looking_for_the_head_leaves_the_backbone_as_it_was(nets):
    saved(nets.Plain())
    backbone = module("kept_nets.Plain", "own.pt", 8)
    before = copy.deepcopy(backbone.state_dict())
    heads.keep(backbone, CLASSES)
    assert backbone.state_dict().keys() == before.keys()
    assert all(map(torch.equal, backbone.state_dict().values(), before.values()))
    assert backbone.training
    assert backbone.net.features.training
    assert backbone(torch.rand(2, 3, 8, 8)).shape == (2, 7)


def test_a_head_for_another_number_of_classes_is_refused_with_both_numbers(nets):
    saved(nets.Plain())
    with pytest.raises(ConfigError, match=r"3 outputs and the data 2 classes; type head=linear"):
        heads.keep(module("kept_nets.Plain", "own.pt", 8), ("ant", "bee"))


def test_weights_without_a_head_are_refused(nets):
    net = saved(nets.Plain())
    torch.save(net.features.state_dict(prefix="features."), "headless.pt")
    with pytest.raises(CheckpointError, match=r"headless\.pt has no fc\.weight.*head=linear"):
        heads.keep(module("kept_nets.Plain", "headless.pt", 8), CLASSES)
    with pytest.raises(ConfigError, match=r"model=tiny bring no head; type head=linear"):
        heads.keep(tiny(), CLASSES)
    with pytest.raises(ConfigError, match=r"model=module bring no head; type head=linear"):
        heads.keep(module("kept_nets.Plain", None, 8), CLASSES)


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [("resnet18", 32, "fc"), ("mobilenet_v3_small", 32, "classifier.3"), ("swin_t", 64, "head")],
)
def test_torchvision_keeps_the_head_of_a_file_of_other_classes(tmp_path, name, size, head):
    net = models.get_model(name, weights=None, num_classes=3).eval()
    torch.save(net.state_dict(), tmp_path / "own.pt")
    backbone = torchvision(name, str(tmp_path / "own.pt"), size)
    kept = heads.keep(backbone, CLASSES)
    assert torch.equal(kept.weight, net.get_submodule(head).weight)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(kept(backbone.eval()(images)), net(images))


def test_squeezenet_whose_head_is_followed_by_a_relu_is_refused(tmp_path):
    net = models.squeezenet1_1(num_classes=3)
    torch.save(net.state_dict(), tmp_path / "own.pt")
    backbone = torchvision("squeezenet1_1", str(tmp_path / "own.pt"), 64)
    with pytest.raises(ConfigError, match=r"after its layer classifier\.1"):
        heads.keep(backbone, CLASSES)


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224"])
def test_timm_keeps_the_head_of_a_file(tmp_path, name):
    import timm as library

    net = library.create_model(name, num_classes=3).eval()
    torch.save(net.state_dict(), tmp_path / "own.pt")
    backbone = timm(name, str(tmp_path / "own.pt"))
    kept = heads.keep(backbone, CLASSES)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(kept(backbone.eval()(images)), net(images))


def test_timm_keeps_the_head_that_a_model_was_published_with(tmp_path, monkeypatch):
    import timm as library

    net = library.create_model("resnet18").eval()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, name, **_: str(tmp_path / "pytorch_model.bin"),
    )
    backbone = timm("resnet18")
    kept = heads.keep(backbone, tuple(map(str, range(1000))))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(kept(backbone.eval()(images)), net(images))


def test_timm_with_two_heads_is_refused(tmp_path):
    import timm as library

    name = "deit_tiny_distilled_patch16_224"
    torch.save(library.create_model(name).state_dict(), tmp_path / "own.pt")
    backbone = timm(name, str(tmp_path / "own.pt"))
    with pytest.raises(ConfigError, match=r"has 2 heads \(head, head_dist\); type head=linear"):
        heads.keep(backbone, CLASSES)


def test_the_head_of_a_run_goes_on_only_with_its_own_classes(trained):
    backbone = backbone_of(str(trained))
    assert torch.equal(heads.keep(backbone, CLASSES).weight, load(trained).model.head.weight)
    for others in (("bee", "ant", "cat"), ("ant", "bee")):
        with pytest.raises(ConfigError, match=r"trained on 'ant', 'bee', 'cat'; the data has"):
            heads.keep(backbone, others)
