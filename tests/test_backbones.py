"""Backbones: every family gives (B, D) features, says what it expects, and refuses clearly."""

import sys
from itertools import chain

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision import models
from torchvision.models.inception import InceptionAux
from torchvision.ops import StochasticDepth

from finetune.backbones import FAMILIES
from finetune.backbones.base import Backbone, split_head
from finetune.backbones.module import module
from finetune.backbones.timm import timm
from finetune.backbones.tiny import LETTERS, tiny
from finetune.backbones.torchvision import torchvision
from finetune.errors import CheckpointError, ConfigError
from finetune.specs import IMAGENET_MEAN, IMAGENET_STD, InputSpec

CLASSIFIERS = models.list_models(module=models)
PUBLISHED = {n: models.get_model_weights(n).DEFAULT.meta["num_params"] for n in CLASSIFIERS}


@pytest.fixture
def no_init(monkeypatch):
    """Leave new parameters as they are allocated: shapes without the time that values take."""
    for name in (
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
        "trunc_normal_",
        "uniform_",
        "xavier_uniform_",
    ):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty folder for torch's downloads; none of the tests may touch the real one."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def served(monkeypatch, hub):
    """Stand-in for the download: a dict of address to state dict."""
    states = {}
    monkeypatch.setattr("finetune.backbones.torchvision.why_unreachable", lambda url: None)
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **_: states[url]
    )
    return states


def output_shape(net, size, batch=2):
    tensors = chain(net.named_parameters(), net.named_buffers())
    meta = {name: tensor.to("meta") for name, tensor in tensors}
    return functional_call(net, meta, (torch.empty(batch, 3, size, size, device="meta"),)).shape


# torchvision


def test_torchvision_has_the_classifiers_that_are_tested():
    assert len(CLASSIFIERS) >= 80


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if PUBLISHED[name] > 30e6 else [])
        for name in CLASSIFIERS
    ],
)
def test_every_torchvision_classifier_gives_flat_features_in_train_mode(name, no_init):
    backbone = torchvision(name, weights=None).train()
    assert output_shape(backbone, backbone.input_spec.size) == (2, backbone.num_features)

    # oracle: the published size of the whole classifier, less its 1000 outputs
    head = backbone.num_features * 1000 + (0 if name == "maxvit_t" else 1000)
    published = PUBLISHED[name]
    if name == "inception_v3":
        published -= sum(p.numel() for p in InceptionAux(768, 1000).parameters())
    assert backbone.num_parameters == published - head


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet"])
def test_the_old_head_on_the_features_gives_the_logits_of_the_classifier(name, tmp_path):
    auxiliary = {"init_weights": False} if name == "googlenet" else {}
    full = models.get_model(name, weights=None, **auxiliary).eval()
    full.transform_input = True
    torch.save(full.state_dict(), tmp_path / "weights.pt")
    backbone = torchvision(name, weights=str(tmp_path / "weights.pt")).eval()

    *_, head = (m for n, m in full.named_modules() if isinstance(m, nn.Linear) and "aux" not in n)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = F.linear(backbone(images), head.weight, head.bias)
        assert torch.equal(logits, full(images))


def test_input_spec_is_that_of_the_weights(no_init):
    assert torchvision("resnet50", None).input_spec == InputSpec(224, 232)
    assert torchvision("efficientnet_v2_l", None).input_spec == InputSpec(
        480, 480, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic"
    )


def test_other_weights_bring_their_own_input_size(served, no_init):
    member = models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    served[member.url] = models.vit_b_16(weights=None, image_size=384).state_dict()
    backbone = torchvision("vit_b_16", member.name)
    assert backbone.input_spec == InputSpec(384, 384, interpolation="bicubic")
    assert output_shape(backbone, 384) == (2, 768)
    assert backbone.recipe == {"family": "torchvision", "name": "vit_b_16", "input_size": 384}


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 64), ("vit_b_32", 96), ("swin_t", 100), ("maxvit_t", 448), ("vgg11", 48)],
)
def test_input_size_replaces_that_of_the_weights_without_a_margin(name, size, no_init):
    backbone = torchvision(name, None, input_size=size)
    assert (backbone.input_spec.size, backbone.input_spec.resize) == (size, size)
    assert output_shape(backbone, size) == (2, backbone.num_features)


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_b_32", 100), ("maxvit_t", 256), ("inception_v3", 32), ("resnet18", -1), ("alexnet", 8)],
)
def test_impossible_input_size_is_refused(name, size, no_init):
    with pytest.raises(ConfigError, match=rf"model\.input_size.* {size}"):
        torchvision(name, None, input_size=size)


def test_vit_interpolates_position_embeddings(served, no_init):
    state = models.vit_b_32(weights=None).state_dict()
    positions = state["encoder.pos_embedding"]
    positions[:, 0], positions[:, 1:] = 7.0, torch.arange(768.0)  # the same at every place
    served[models.ViT_B_32_Weights.DEFAULT.url] = state
    net = torchvision("vit_b_32", input_size=320).net
    fitted = net.encoder.pos_embedding
    assert fitted.shape == (1, 1 + 10 * 10, 768)
    assert torch.equal(fitted[:, 0], torch.full((1, 768), 7.0))
    # bicubic weights sum to 1 within float32 rounding
    torch.testing.assert_close(fitted[0, 1:], torch.arange(768.0).expand(100, 768))


def test_default_weights_are_downloaded_and_loaded(served, caplog):
    state = models.resnet18(weights=None).state_dict()
    served[models.ResNet18_Weights.DEFAULT.url] = state
    caplog.set_level("INFO")
    net = torchvision("resnet18").net
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert "loaded 120 of 120 tensors from ResNet18_Weights.IMAGENET1K_V1" in caplog.text
    assert "missing: none; left over: fc.weight, fc.bias" in caplog.text


def test_auxiliary_classifiers_are_left_over_without_a_warning(served, caplog):
    full = models.googlenet(weights=None, init_weights=False)
    served[models.GoogLeNet_Weights.DEFAULT.url] = full.state_dict()
    backbone = torchvision("googlenet").train()
    assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, 1024)
    assert not any("aux" in name for name, _ in backbone.named_modules())
    assert not caplog.records


def test_a_download_of_before_needs_no_network(hub, monkeypatch):
    def never(*args):
        raise AssertionError("asked the network")

    monkeypatch.setattr("finetune.backbones.torchvision.why_unreachable", never)
    state = models.squeezenet1_1(weights=None).state_dict()
    hub.mkdir(parents=True)
    torch.save(state, hub / "squeezenet1_1-b8a52dc0.pth")
    net = torchvision("squeezenet1_1").net
    assert torch.equal(net.features[0].weight, state["features.0.weight"])


def test_no_network_names_the_address_and_where_to_put_the_file(hub, monkeypatch):
    monkeypatch.setattr("finetune.backbones.torchvision.why_unreachable", lambda url: "no route")
    with pytest.raises(CheckpointError) as caught:
        torchvision("resnet18")
    message = str(caught.value)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth: no route" in message
    assert str(hub / "resnet18-f37072fd.pth") in message
    assert "model.weights=FILE or model.weights=null" in message


def test_a_broken_download_is_an_error_of_the_weights(served, monkeypatch):
    def break_off(url, **_):
        raise RuntimeError('invalid hash value (expected "f37072fd", got "0")')

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", break_off)
    with pytest.raises(CheckpointError, match=r"cannot download .*resnet18.*invalid hash value"):
        torchvision("resnet18")


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ConfigError, match=r"no torchvision classifier 'resnet5'; close: resnet50"):
        torchvision("resnet5")


def test_unknown_weights_list_the_members():
    with pytest.raises(ConfigError, match=r"'V3'; choose IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT,"):
        torchvision("resnet50", "V3")


@pytest.mark.parametrize("weights", ["missing.pt", "folder/missing"])
def test_weights_that_look_like_a_path_are_a_missing_file(weights):
    with pytest.raises(CheckpointError, match=r"no such weights file: .*missing"):
        torchvision("squeezenet1_1", weights)


# tiny


def test_tiny_takes_8_by_8_pixels_and_more():
    backbone = tiny(None)
    assert backbone.input_spec == InputSpec(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert 0.28e6 < backbone.num_parameters < 0.32e6
    assert backbone(torch.zeros(2, 3, 8, 8)).shape == (2, 128)
    assert tiny(None, 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    with pytest.raises(ConfigError, match=r"needs 4, got 3"):
        tiny(None, 3)


def test_tiny_reads_a_file(tmp_path):
    state = tiny(None).net.state_dict()
    save_file(state, tmp_path / "tiny.safetensors")
    loaded = tiny(str(tmp_path / "tiny.safetensors")).net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_tiny_says_how_to_make_missing_letters(monkeypatch, tmp_path):
    monkeypatch.setattr("finetune.backbones.tiny.LETTERS", tmp_path / LETTERS.name)
    with pytest.raises(CheckpointError, match=r"python train\.py experiment=letters"):
        tiny()
    with pytest.raises(ConfigError, match="tiny knows letters, null, or a file"):
        tiny("digits")


# a user's own class

NETS = """
import torch
from torch import nn

class Good(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3)
        self.aux_head = nn.Linear(6, 2)
        self.head = nn.Conv2d(6, num_classes, 1)

    def forward(self, x):
        return self.head(self.features(x).relu())

class Needs(nn.Module):
    def __init__(self, width):
        super().__init__()

class Headless(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten())

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x.flatten(2).mT)

class WrongOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 2)
        self.features = nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.features(x.mean((2, 3))))

function = torch.relu
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("own_nets", None)


def test_module_takes_a_class_of_the_working_directory(nets):
    backbone = module("own_nets.Good")
    assert backbone.num_features == 6
    assert backbone.input_spec == InputSpec(224, 224, IMAGENET_MEAN, IMAGENET_STD)
    # its head is a convolution: the feature map is averaged
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 6)
    assert backbone.training


def test_module_loads_a_file_and_its_own_normalisation(nets):
    weight = torch.randn(6, 3, 3, 3)
    torch.save({"model.features.weight": weight, "model.features.bias": torch.zeros(6)}, "own.pt")
    backbone = module("own_nets.Good", "own.pt", 32, mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    assert torch.equal(backbone.net.features.weight, weight)
    assert backbone.input_spec == InputSpec(32, 32, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_nets.Absent", r"cannot import 'own_nets\.Absent' from "),
        ("absent_package.Net", r"cannot import 'absent_package\.Net' from "),
        ("Good", r"'Good' is no dotted path; type package\.module\.Class"),
        ("own_nets.function", r"is no class of nn\.Module"),
        ("own_nets.Needs", r"must work without arguments: .*'width'"),
        ("own_nets.Headless", r"no Linear or Conv2d layer to take off"),
        ("own_nets.Tokens", r"gives \(2, 50176, 3\) for 2 images, expected \(2, 3\)"),
        ("own_nets.WrongOrder", r"The last Linear or Conv2d must be the classifier"),
    ],
)
def test_module_says_what_is_wrong_with_a_class(nets, target, message):
    with pytest.raises(ConfigError, match=message):
        module(target)


def test_module_needs_three_positive_values(nets):
    with pytest.raises(ConfigError, match=r"model\.mean: needs three values, R G B, got \[0\.5\]"):
        module("own_nets.Good", mean=[0.5])
    with pytest.raises(
        ConfigError, match=r"model\.std: must be positive, got \[0\.0, 1\.0, 1\.0\]"
    ):
        module("own_nets.Good", std=[0, 1, 1])


@pytest.mark.parametrize("name", ["vit_b_32", "mobilenet_v3_small", "vgg11", "swin_t"])
def test_dropout_is_that_of_torchvision(name, no_init):
    ours = torchvision(name, None, dropout=0.3).net
    theirs = models.get_model(name, weights=None, dropout=0.3)
    found = [[m.p for m in net.modules() if isinstance(m, nn.Dropout)] for net in (ours, theirs)]
    assert found[0] == found[1]
    assert 0.3 in found[0]


def test_dropout_of_densenet_is_that_of_torchvision(no_init):
    ours = torchvision("densenet121", None, dropout=0.3).net
    theirs = models.densenet121(weights=None, drop_rate=0.3)
    assert [m.drop_rate for m in ours.modules() if hasattr(m, "drop_rate")] == [
        m.drop_rate for m in theirs.modules() if hasattr(m, "drop_rate")
    ]


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "swin_t", "maxvit_t"])
def test_drop_path_grows_linearly_to_what_was_asked_for(name, no_init):
    def rates(**options):
        net = torchvision(name, None, **options).net
        return [m.p for m in net.modules() if isinstance(m, StochasticDepth)]

    own, ours = rates(), rates(drop_path=0.4)
    assert ours[0] == 0.0
    assert max(ours) == ours[-1] == pytest.approx(0.4)
    assert ours == pytest.approx([rate * 0.4 / max(own) for rate in own])
    assert set(rates(drop_path=0.0)) == {0.0}
    if name == "convnext_tiny":
        theirs = models.convnext_tiny(weights=None, stochastic_depth_prob=0.4)
        expected = [m.p for m in theirs.modules() if isinstance(m, StochasticDepth)]
        assert ours == pytest.approx(expected)
        assert ours == pytest.approx([0.4 * block / 17 for block in range(18)])


@pytest.mark.parametrize(
    ("make", "name", "key"),
    [
        (torchvision, "resnet18", "dropout"), (torchvision, "resnet18", "drop_path"),
        (torchvision, "vit_b_32", "drop_path"), (timm, "vgg11", "drop_path"),
        (timm, "hrnet_w18_small", "drop_path"),
    ],
)  # fmt: skip
def test_a_family_without_it_says_that_it_has_no_effect(make, name, key, no_init, caplog):
    if make is timm:
        pytest.importorskip("timm")
    make(name, None)
    assert not caplog.records
    make(name, None, **{key: 0.2})
    (record,) = caplog.records
    assert f"model.{key}=0.2 has no effect" in record.getMessage()


def test_dropout_and_drop_path_are_no_part_of_what_rebuilds_a_model(no_init):
    pytest.importorskip("timm")
    for make, name in ((torchvision, "swin_t"), (timm, "test_vit")):
        plain, dropped = make(name, None), make(name, None, dropout=0.3, drop_path=0.2)
        assert plain.recipe == dropped.recipe
        assert plain.state_dict().keys() == dropped.state_dict().keys()


# timm


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_resnet", 160), ("test_vit", 160), ("test_efficientnet", 160), ("test_convnext", 160)],
)
def test_timm_gives_flat_features_at_the_size_of_the_weights(name, size):
    pytest.importorskip("timm")
    backbone = timm(name, weights=None).train()
    assert backbone.input_spec.size == size
    assert backbone(torch.randn(2, 3, size, size)).shape == (2, backbone.num_features)


# one model whose pooling, tokens, widths or second head differ from the plain case
@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_distilled_patch16_224",
        "efficientvit_b0",
        "mambaout_femto",
        "mobilenetv3_small_050",
        "samvit_base_patch16",
        "vgg11",
    ],
)
def test_timm_knows_the_width_of_its_features(name, no_init):
    pytest.importorskip("timm")
    backbone = timm(name, weights=None).train()
    assert output_shape(backbone, backbone.input_spec.size) == (2, backbone.num_features)


def test_timm_input_spec_is_that_of_the_weights():
    pytest.importorskip("timm")
    # floor(160 / 0.95), as timm's own evaluation transform resizes
    expected = InputSpec(160, 168, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    assert timm("test_vit", None).input_spec == expected
    assert timm("test_vit", None, 96).input_spec.resize == 96
    assert timm("test_vit", None, 96)(torch.zeros(2, 3, 96, 96)).shape == (2, 64)


def test_timm_takes_dropout_of_the_features_and_drop_path_growing_linearly():
    pytest.importorskip("timm")
    net = timm("vit_tiny_patch16_224", None, dropout=0.3, drop_path=0.22).net
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]
    assert rates == pytest.approx([0.02 * block for block in range(12)])
    assert net.head_drop.p == 0.3


def test_timm_loads_its_default_weights(tmp_path, monkeypatch):
    library = pytest.importorskip("timm")
    full = library.create_model("test_vit").eval()
    save_file(full.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("finetune.backbones.timm.why_unreachable", lambda url: None)
    monkeypatch.setattr("finetune.backbones.timm._cached", lambda config: None)
    monkeypatch.setattr(
        "timm.models._hub.hf_hub_download", lambda **_: str(tmp_path / "model.safetensors")
    )
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        features = timm("test_vit").eval()(images)
        assert torch.equal(full.head(features), full(images))


def test_timm_needs_no_network_for_a_file_in_the_cache(tmp_path, monkeypatch):
    library = pytest.importorskip("timm")
    state = library.create_model("test_resnet").state_dict()
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda *_, **__: str(tmp_path / "model.safetensors"),
    )
    net = timm("test_resnet").net
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_timm_loads_a_file_and_interpolates_its_positions(tmp_path):
    library = pytest.importorskip("timm")
    state = library.create_model("test_vit").state_dict()
    torch.save({"state_dict": state}, tmp_path / "vit.pt")
    net = timm("test_vit", str(tmp_path / "vit.pt"), input_size=96).net
    assert torch.equal(net.patch_embed.proj.weight, state["patch_embed.proj.weight"])
    resized = library.create_model("test_vit", img_size=96).pos_embed.shape
    assert net.pos_embed.shape == resized != state["pos_embed"].shape


def test_timm_without_network_names_the_address(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr("finetune.backbones.timm.why_unreachable", lambda url: "no route")
    monkeypatch.setattr("finetune.backbones.timm._cached", lambda config: None)
    with pytest.raises(CheckpointError, match=r"huggingface\.co/timm/test_vit\.r160_in1k: no rou"):
        timm("test_vit")


def test_timm_that_is_not_installed_says_how_to(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install -e \"\.\[timm\]\""):
        timm("resnet18")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "resnet1"}, ConfigError, r"no timm model 'resnet1'; close: resnet18"),
        ({"name": "test_vit.no"}, ConfigError, r"no weights 'no' of test_vit; choose test_vit\.r"),
        ({"name": "gmlp_b16_224"}, ConfigError, r"timm has none of gmlp_b16_224"),
        ({"name": "test_vit", "weights": "a1"}, ConfigError, r"model\.name=test_vit\.a1"),
        ({"name": "test_vit", "weights": "a.pt"}, CheckpointError, r"no such weights file: a\.pt"),
        ({"name": "levit_128", "weights": None, "input_size": -9}, ConfigError, r"input_size"),
    ],
)
def test_timm_refuses_clearly(arguments, error, message):
    pytest.importorskip("timm")
    with pytest.raises(error, match=message):
        timm(**arguments)


# all families


def test_a_recipe_rebuilds_the_architecture(nets, no_init):
    backbones = [
        torchvision("vit_b_32", None, 64),
        torchvision("resnet18", None),
        tiny(None, 16),
        module("own_nets.Good", None, 48),
    ]
    pytest.importorskip("timm")
    backbones.append(timm("test_vit", None, 96))
    assert {backbone.recipe["family"] for backbone in backbones} == set(FAMILIES)
    for backbone in backbones:
        arguments = dict(backbone.recipe)
        again = FAMILIES[arguments.pop("family")](**arguments, weights=None)
        assert {n: t.shape for n, t in again.state_dict().items()} == {
            n: t.shape for n, t in backbone.state_dict().items()
        }
        assert again.recipe == backbone.recipe


def test_split_head_takes_the_last_layer_that_is_not_auxiliary():
    net = nn.Sequential()
    net.add_module("body", nn.Linear(4, 5))
    net.add_module("head", nn.Linear(5, 2))
    net.add_module("aux_head", nn.Linear(2, 2))
    assert split_head(net) == (5, "head")
    assert isinstance(net.head, nn.Identity)


def test_features_of_a_map_are_its_mean():
    backbone = Backbone(nn.Identity(), 3, InputSpec(4, 4), {"family": "own"})
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(backbone(images), images.mean(dim=(2, 3)))
