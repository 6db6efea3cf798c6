"""Features of a frozen backbone: the logits of the images, and found only where they are theirs."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import SMALL, assert_same_end, finish, metrics_of, plain, write_photos
from finetune import build, checkpoint, features
from finetune.callbacks.checkpoints import StepCheckpoints
from finetune.data import transforms
from finetune.data.base import ImageArray, LabelledImages
from finetune.data.image_folder import image_folder
from finetune.features import Features, Phase, Plan
from finetune.files import make_room
from finetune.model import Activations, Classifier
from finetune.prefix import Unsplittable
from finetune.specs import InputSpec
from finetune.strategies.freeze_until import FreezeUntil
from finetune.strategies.full import Full
from finetune.strategies.gradual_unfreeze import GradualUnfreeze
from finetune.strategies.linear_probe import LinearProbe
from finetune.strategies.lp_ft import LpFt

CPU = torch.device("cpu")
NETS = ("nets.Cnn", "nets.Swin")
PROBE = (
    *(o for o in SMALL if not o.startswith(("model", "augment"))),
    *("strategy=linear_probe", "augment=none", "logger=csv"),
    *("model=module", "model.input_size=8", "model.target=nets.Cnn"),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where this test alone keeps features."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def parts(*overrides):
    """Datamodule, model and splits of a composed run, the backbone with the statistics of noise."""
    cfg = plain(*PROBE, "batch_size=16", *overrides)
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8))
    return build.build_datamodule(cfg, splits, model), model, splits


@pytest.mark.parametrize("net", NETS)
def test_features_give_the_logits_of_the_images(folder, net):
    module, model, splits = parts(f"model.target={net}")
    images = torch.stack([splits.train[i][0] for i in range(len(splits.train))])
    model.train()  # dropout, drop-path and BatchNorm are off while features are computed
    computed = module.unaugmented_features(splits.train, CPU)
    assert all(part.training for part in model.modules())
    found = module.unaugmented_features(splits.train, CPU)
    assert len([*folder.iterdir()]) == 1
    model.eval()
    with torch.no_grad():
        assert torch.equal(computed, model.features(images))  # one batch, as there
        assert torch.equal(found, computed)
        one_by_one = torch.cat([model(image[None]) for image in images])
        # another batch may add in another order
        given = Activations(found, model.depth)
        torch.testing.assert_close(model(given), one_by_one, rtol=1e-5, atol=1e-6)


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


def digest(root, model=None, change=lambda images: images, size=None, batch=64, **kwargs):
    torch.manual_seed(0)
    order = model if model == "channels_last" else None
    model = None if order else model
    model = model or Classifier(build.build_backbone(plain(*PROBE)), ("a", "b"))
    model.to(memory_format=torch.channels_last if order else torch.preserve_format)
    spec = replace(model.input_spec, resize=size or model.input_spec.resize)
    images = change(image_folder(str(root)).train)
    store = Features(model, None, batch, Plan())
    return store.digest(images, transforms.evaluation(spec), CPU, **kwargs)


def moved(model, parameter=0):
    with torch.no_grad():
        [*model.backbone.parameters()][parameter][0] += 1e-3
    return model


def test_only_the_layers_before_are_in_the_digest_of_what_they_make(photos):
    def model():
        torch.manual_seed(0)
        return Classifier(build.build_backbone(plain(*PROBE)), ("a", "b"))

    found = [digest(photos, m, layers=2) for m in (model(), moved(model(), -1), moved(model()))]
    assert found[0] == found[1] != found[2]


def test_the_digest_is_the_same_for_the_same(photos):
    assert digest(photos) == digest(photos) == digest(photos, batch=128)


@pytest.mark.parametrize(
    "change",
    [
        {"change": lambda images: images.subset([*range(len(images) - 1)])},
        {"change": lambda images: images.subset([1, 0, *range(2, len(images))])},
        {"size": 9},
        {"precision": "bf16-mixed"},
        {"model": "channels_last"},
        {"seed": 0},
        {"batch": 8},
        {"layers": 2},
    ],
    ids=lambda change: "".join(change),
)
def test_what_the_features_depend_on_changes_the_digest(photos, change):
    assert digest(photos, **change) != digest(photos)


def test_views_and_seeds_have_digests_of_their_own(photos):
    found = {digest(photos, seed=seed, view=view) for seed in (0, 1) for view in (0, 1)}
    assert len(found) == 4


def test_weights_architecture_normalisation_and_code_change_the_digest(photos, monkeypatch):
    def model():
        torch.manual_seed(0)
        return Classifier(build.build_backbone(plain(*PROBE)), ("a", "b"))

    first, other, spec = model(), model(), model()
    other.backbone.recipe["target"] = "nets.Swin"
    spec.backbone.input_spec = replace(spec.input_spec, mean=(0.5, 0.5, 0.5))
    found = [digest(photos, m) for m in (first, moved(model()), other, spec)]
    monkeypatch.setattr(features, "versions", lambda: ["finetune 99"])
    found.append(digest(photos, model()))
    assert len({*found}) == 5
    assert found[0] is not None


def test_a_file_that_was_written_again_changes_the_digest(photos):
    before, path = digest(photos), photos / "train" / "ant" / "0.png"
    status = path.stat()
    Image.new("RGB", (12, 10), "red").save(path)
    written = digest(photos)
    assert written != before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # another size tells as well
    assert digest(photos) not in (before, written)


NETWORK = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_a_line_of_somebodys_network_changes_the_digest(photos, tmp_path, monkeypatch):
    file = tmp_path / "their_net.py"
    file.write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)

    def found():
        torch.manual_seed(0)
        backbone = build.build_backbone(plain(*PROBE[:-1], "model.target=their_net.Net"))
        return digest(photos, Classifier(backbone, ("a", "b")))

    before = [found(), found()]
    file.write_text(NETWORK.replace("nn.ReLU()", "nn.LeakyReLU(1e-4)"))
    assert before[0] == before[1] != found()


@pytest.mark.parametrize("augment", ["light", "strong", "crop", "subpixel", "randaugment"])
def test_views_are_found_by_a_transform_that_was_built_anew(photos, augment):
    images = image_folder(str(photos)).train
    store = Features(Classifier(build.build_backbone(plain(*PROBE)), ("a", "b")), None, 64, Plan())

    def found(size):
        transform = getattr(transforms, augment)(InputSpec(size, size))
        return store.digest(images, transform, CPU, seed=0)

    assert found(8) == found(8) != found(9)


def test_features_of_a_transform_without_origin_are_not_kept(photos):
    images = image_folder(str(photos)).train
    store = Features(Classifier(build.build_backbone(plain(*PROBE)), ("a", "b")), None, 64, Plan())
    assert store.digest(images, lambda image: image, CPU) is None


def test_images_in_memory_are_told_apart_by_their_pixels():
    array = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = array.clone()
    other[1, 2, 3, 3] = 1
    of = [LabelledImages.of(ImageArray(a), [0, 1]).fingerprint() for a in (array, other, array)]
    assert of[0] == of[2] != of[1]


def test_code_that_has_changed_is_noticed(folder, monkeypatch, caplog):
    module, model, splits = parts()
    before = module.unaugmented_features(splits.train, CPU)
    as_before = type(model.backbone.net).forward
    monkeypatch.setattr(type(model.backbone.net), "forward", lambda net, x: as_before(net, 0.5 * x))
    caplog.set_level("INFO", "finetune.features")
    after = module.unaugmented_features(splits.train, CPU)
    assert "the code has changed" in caplog.text
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("damage", ["cut", "bit", "other"])
def test_a_damaged_file_is_computed_again(folder, damage):
    module, _, splits = parts()
    before = module.unaugmented_features(splits.train, CPU)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "cut":
        content = content[: len(content) // 2]
    path.write_bytes(content)
    if damage == "other":
        checkpoint.save(path, {"features": torch.zeros(3, 16)})
    assert torch.equal(module.unaugmented_features(splits.train, CPU), before)
    assert torch.equal(checkpoint.load(path)["features"], before)


def test_files_that_were_not_read_for_longest_make_room_and_no_others(tmp_path):
    ours = [tmp_path / f"{i:032x}.pt" for i in range(4)]
    theirs = tmp_path / "my_thesis_model.pt"
    for age, path in enumerate([theirs, *ours]):
        path.write_bytes(bytes(100))
        os.utime(path, (age, age))
    make_room([ours[3]], most=250)
    assert {*tmp_path.iterdir()} == {theirs, *ours[2:]}


def test_what_a_killed_process_left_of_features_is_removed(tmp_path):
    path, name = tmp_path / f"{0:032x}.pt", f"{1:032x}.pt"
    parts = f"{name}.1.part", f"{name}.2.part", "x.pt.1.part"
    old, new, theirs = (tmp_path / part for part in parts)
    for part in (old, new, theirs):
        part.write_bytes(b"half")
    for part in (old, theirs):
        os.utime(part, (0, 0))
    features.write(path, torch.zeros(2, 3))
    assert {*tmp_path.iterdir()} == {path, new, theirs}  # somebody may be writing the new one


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    caplog.set_level("INFO", "finetune.features")
    features.write(tmp_path / "file" / "a.pt", torch.zeros(2, 3))
    assert "features are not kept" in caplog.text


PLANNED = {
    "phases": [Phase(0, 3, 3)], "depth": 3, "epochs": 3, "augment": None, "views": None,
    "mixes": False, "several": False, "num_bytes": lambda layers: 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "views", "why"),
    [
        ({}, 1, None),
        ({"phases": [Phase(0, 2, 3)]}, 1, None),
        ({"phases": []}, 0, None),
        ({"augment": "light"}, 0, "in each of 3 epochs; with augment=none it would be computed"),
        ({"augment": "light", "views": 4}, 4, None),
        ({"views": 4}, 1, None),
        ({"mixes": True}, 0, "mixup and cutmix blend pixels"),
        ({"phases": [Phase(0, 2, 3)], "several": True}, 0, "with one device"),
        ({"num_bytes": lambda layers: 10**15}, 0, "smaller data.fraction"),
    ],
    ids=map(str, range(9)),  # a function has another address in each process
)
def test_what_stands_in_for_training_images(change, views, why):
    found = features.plan(**PLANNED | change)
    assert found.views == views
    assert (why or "") in (found.why_not or "")
    assert (why is None) == (found.why_not is None)
    assert found.always == ([*found.phases] == PLANNED["phases"])
    # those of val do so whatever becomes of those of training images
    assert [*found.phases] == [*(PLANNED | change)["phases"]]


FROM_TOP = [Phase(0, 2, 3), Phase(2, 3, 2)]  # nothing else ever trains but the last layer


def room_for(*layers):
    return lambda asked: 1000 if asked in layers else 10**15


def unsplittable(layers):
    raise Unsplittable("its forward is odd")


@pytest.mark.parametrize(
    ("change", "phases"),
    [
        ({}, FROM_TOP),
        ({"several": True}, [Phase(0, 3, 2)]),
        ({"several": True, "phases": FROM_TOP, "epochs": 4}, FROM_TOP[:1]),  # of val alone
        ({"num_bytes": room_for(1, 3)}, [Phase(0, 2, 3), Phase(2, 3, 1)]),
        ({"num_bytes": room_for(3)}, FROM_TOP[:1]),
        ({"phases": FROM_TOP[1:], "num_bytes": unsplittable}, []),
        ({"augment": "light"}, FROM_TOP[:1]),
        ({"augment": "light", "views": 2}, FROM_TOP),
    ],
    ids=map(str, range(8)),
)
def test_as_many_frozen_layers_as_can_be_kept_are_computed_once(change, phases):
    found = features.plan(**PLANNED | {"phases": FROM_TOP} | change)
    assert [*found.phases] == phases
    assert not found.always
    if change.get("num_bytes") is unsplittable:
        assert "taken apart after 2 layers: its forward is odd" in found.why_not


@dataclass
class Refreeze:
    """Layer 1 trains in the first epoch alone."""

    def lr_scale(self, layer, depth, epoch):
        return float(layer == depth or (layer == 1 and epoch == 0))


@pytest.mark.parametrize(
    ("strategy", "phases"),
    [
        (Full(), []),
        (LinearProbe(), [Phase(0, 6, 4)]),
        (LpFt(Full(), probe_epochs=1), [Phase(0, 1, 4)]),
        (FreezeUntil(Full(), 2), [Phase(0, 6, 2)]),
        (FreezeUntil(LpFt(Full(), probe_epochs=2), 1), [Phase(0, 2, 4), Phase(2, 6, 1)]),
        (GradualUnfreeze(Full(), 2), [Phase(0, 2, 4), Phase(2, 4, 3), Phase(4, 6, 2)]),
        (GradualUnfreeze(Full(), 1), [Phase(0, 1, 4), Phase(1, 3, 2)]),
        (Refreeze(), [Phase(0, 6, 1)]),  # what has trained is no longer what it was
    ],
    ids=str,
)
def test_in_which_epochs_which_layers_have_not_trained_yet(strategy, phases):
    assert features.frozen_phases(strategy, depth=4, epochs=6) == phases


def test_where_features_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    assert features.default_folder() == tmp_path / "features"
    monkeypatch.delenv("FINETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert features.default_folder() == tmp_path / "finetune" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert features.default_folder() == Path.home() / ".cache" / "finetune" / "features"


def ends_alike(one, other, frozen, tolerance=1e-5):
    """Curves and weights within a tolerance: batches of features add in another order.

    frozen: how the names of weights begin that are the same bit for bit.
    """
    rows = [
        {(step, name): value for step, name, value in metrics_of(run) if "time/" not in name}
        for run in (one, other)
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4, abs=tolerance)
    states = [checkpoint.read(checkpoint.best_path(run)).state_dict for run in (one, other)]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=tolerance)
        if name.startswith(frozen):
            assert torch.equal(value, states[1][name])


@pytest.mark.parametrize(
    "changes",
    [
        ("epochs=4", "ema=0.9", "head.dropout=0.2", "data.balance=sampler"),
        ("epochs=4", "strategy=lp_ft", "l2_sp=0.01"),
        ("epochs=2", "strategy=full", "freeze_until=2", "augment=light", "features.views=2"),
        # a rest with dropout and stochastic depth draws the same random numbers
        ("epochs=4", "strategy=gradual_unfreeze", "strategy.every=2", "model.target=nets.Swin"),
        ("epochs=2", "augment=strong", "features.views=2"),  # as many views as epochs
        ("epochs=2", "augment=strong", "model.target=nets.Swin"),  # val alone
        ("epochs=2", "head.init=ridge", "trainer.accumulate_grad_batches=2"),
    ],
    ids=" ".join,
)
def test_a_run_on_features_is_the_run_on_images(folder, tmp_path, changes):
    cached = finish(tmp_path / "run", *PROBE, *changes)
    assert [*folder.iterdir()]
    images = [o for o in changes if not o.startswith("features")]
    images += ["data.cache=none"]  # views are drawn as images in files are
    plain_run = finish(tmp_path / "images", *PROBE, *images, "features.cache=none")
    layers = ("stem", "stage1") if "strategy=full" in changes else ("",)
    trains = {"strategy=lp_ft", "strategy=gradual_unfreeze"}.intersection(changes)
    ends_alike(cached, plain_run, () if trains else tuple(f"backbone.net.{n}" for n in layers))


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        (("freeze_until=2", "epochs=3"), [{0}, {0}, {0, 1, 2}, {0, 1, 2}]),
        (
            ("strategy=gradual_unfreeze", "strategy.every=2", "epochs=6"),
            [{0, 2, 4}, {0, 2, 4}, {0, 2, 4, 5}, {0, 2, 3, 4, 5}],
        ),
    ],
    ids=str,
)
def test_frozen_layers_are_computed_in_the_first_epoch_of_a_phase_alone(changes, epochs, tmp_path):
    cfg = plain(*PROBE, "strategy=full", *changes, f"features.dir={tmp_path}")
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    budget = build.build_budget(cfg, len(splits.train), len(splits.val))
    task = build.build_task(cfg, model, budget)
    trainer = build.build_trainer(cfg, tmp_path, budget, [], [])
    datamodule = build.build_datamodule(cfg, splits, model, task, budget)
    called = [set() for _ in range(model.depth)]
    for layer, modules in enumerate(model.modules_by_layer()[:-1]):
        for module in modules:
            module.register_forward_hook(
                lambda *_, layer=layer: called[layer].add(trainer.current_epoch)
            )
    trainer.fit(task, datamodule=datamodule)
    assert called == epochs


def test_a_second_run_finds_what_the_first_computed(folder, tmp_path):
    one = finish(tmp_path / "one", *PROBE)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(files) == 3  # train, val, test
    another = finish(tmp_path / "another", *PROBE, "seed=0")
    assert_same_end(another, one)
    assert "train, 16 values each, found" in (another / "train.log").read_text()
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize(
    ("changes", "step", "lost"),
    [
        (("strategy=linear_probe",), 3, "deleted"),
        (("strategy=lp_ft",), 3, "kept"),
        (("strategy=full", "freeze_until=2"), 8, "deleted"),
        # in the second of two epochs after the same layers, those above have trained by then
        (("strategy=gradual_unfreeze", "strategy.every=2", "epochs=4", "ema=0.9"), 18, "deleted"),
    ],
    ids=str,
)
def test_a_run_on_features_that_was_lost_ends_with_the_same_bytes(
    command, folder, tmp_path, monkeypatch, changes, step, lost
):
    typed = [*PROBE, "epochs=3", *changes, "checkpoint.every_n_steps=2"]
    finish(tmp_path / "whole", *typed)

    def power_fails(self, trainer, task, optimizer):
        if trainer.global_step == step:
            raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(StepCheckpoints, "on_before_optimizer_step", power_fails, raising=False)
        assert command("train", *typed, "hydra.run.dir=run").code == 1
    if lost == "deleted":
        for path in folder.iterdir():
            path.unlink()
    assert command("train", "resume=run", "model.target=nets.Cnn").code == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("augment=light",), "augment=light makes new pixels in each of 2 epochs"),
        (("features.views=3",), "features.views=3 has no effect"),
        (("strategy=full", "features.views=3"), "no epoch trains the head alone, and no two"),
        (("strategy=full", "freeze_until=1", "mixup=1.0"), "mixup and cutmix blend pixels"),
        (("strategy=lp_ft", "trainer.strategy=ddp"), "with one device it would not"),
    ],
    ids=" ".join,
)
def test_why_a_frozen_backbone_is_computed_again_is_told(changes, said, caplog):
    cfg = plain(*PROBE, *changes)
    splits = build.build_splits(cfg)
    model = build.build_model(cfg, splits.classes)
    budget = build.build_budget(cfg, len(splits.train))
    task = build.build_task(cfg, model, budget)
    caplog.set_level("INFO", "finetune.build")
    build.tell_of_features(cfg, build.build_datamodule(cfg, splits, model, task, budget).plan)
    assert said in caplog.text
