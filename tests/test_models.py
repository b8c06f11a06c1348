"""The model zoo equals the published networks: names, shapes, sizes, outputs and initialization.

`golden/models.json` holds, per model of the first system, what the published implementation has: parameter counts by
class count, logits by image size (null: not supported), and the state-dict entries for 10 classes in order, one line
per module, shapes after names ("bn1: weight 64, bias 64, ..., num_batches_tracked").
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import MODEL_NAMES, build_model
from model.features import capture_outputs
from model.imported import check_logits, imported_code
from model.registry import register
from model.wideresnet import WideResNet

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "models.json").read_text())
ONE_PER_BLOCK_TYPE = (
    "net",
    "mlp",
    "resnet18",
    "resnet50",
    "preresnet20",
    "preresnet44",
    "densenet121",
    "resnext29",
    "mobilenetv2",
    "shufflenetv2",
    "wrn16_1",
)
WITH_DEFAULT_INIT = ("net", "mlp", "resnet18", "resnet50", "densenet121", "mobilenetv2", "shufflenetv2")
ONLY_32X32 = tuple(name for name, golden in GOLDEN.items() if golden["logits"]["64"] is None)

# Models that the second system adds: parameters by class count, convolutions, batch-norm channels.
WIDE_RESNETS = {
    "wrn16_1": ({10: 175066, 43: 177211, 100: 180916}, 15, 464),
    "wrn16_2": ({10: 691674, 43: 695931, 100: 703284}, 16, 912),
    "wrn28_2": ({10: 1467610, 43: 1471867, 100: 1479220}, 28, None),
    "wrn40_1": ({10: 563930, 43: 566075, 100: 569780}, 39, None),
    "wrn40_2": ({10: 2243546, 43: 2247803, 100: 2255156}, 40, 2704),
}

DEEP = ("resnet101", "resnet152", "densenet161", "densenet201", "resnext29")  # seconds for a forward pass
published_models = pytest.mark.parametrize("name", GOLDEN)
one_per_block_type = pytest.mark.parametrize("name", ONE_PER_BLOCK_TYPE)


def build_on_meta(name: str, num_classes: int, **options: float) -> nn.Module:
    """Model on the meta device: shapes without memory, and no initialization cost."""
    with torch.device("meta"):
        return build_model(name, num_classes, **options)


def small_images(name: str, count: int) -> Tensor:
    """Random images of a size that the model takes; 16x16 is a quarter of the work."""
    size = 32 if name in ONLY_32X32 else 16
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def listing(state_dict: dict[str, Tensor]) -> list[str]:
    return [f"{name} {'x'.join(map(str, tensor.shape))}".strip() for name, tensor in state_dict.items()]


def golden_listing(name: str) -> list[str]:
    entries = []
    for line in GOLDEN[name]["state_dict"]:
        module, tensors = line.split(": ")
        entries += [f"{module}.{tensor}" for tensor in tensors.split(", ")]
    return entries


def golden_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the golden logits: entry i of the state dict is drawn from random seed i."""
    weights = {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        v = np.random.RandomState(i).standard_normal(tuple(tensor.shape))
        if name.endswith("running_var"):
            v = 1 + 0.1 * np.abs(v)
        elif name.endswith(("running_mean", "bias")):
            v = 0.1 * v
        elif v.ndim == 1:
            v = 1 + 0.1 * v
        else:
            v = v / math.sqrt(v.size / v.shape[0])
        weights[name] = torch.from_numpy(v)
    return weights


def test_the_zoo_has_the_published_models_in_order():
    published = (*GOLDEN, *WIDE_RESNETS)
    assert MODEL_NAMES[:len(published)] == published


@published_models
def test_state_dict_has_the_published_names_and_shapes_in_order(name: str):
    built, golden = listing(build_on_meta(name, 10).state_dict()), golden_listing(name)
    for i, (ours, published) in enumerate(zip(built, golden, strict=False)):
        assert ours == published, f"entry {i} of {name} is the first to differ"
    assert len(built) == len(golden)


@published_models
@pytest.mark.parametrize("num_classes", [10, 100, 200])
def test_parameter_count_is_the_published_one(name: str, num_classes: int):
    count = sum(parameter.numel() for parameter in build_on_meta(name, num_classes).parameters())
    assert count == GOLDEN[name]["parameters"][str(num_classes)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in DEEP)) for name in GOLDEN])
def test_logits_are_the_published_ones(name: str):
    model = build_on_meta(name, 10).eval()
    model.load_state_dict(golden_weights(model), assign=True)
    for size, golden in GOLDEN[name]["logits"].items():
        if golden is None:
            continue
        images = torch.from_numpy(np.random.RandomState(999).standard_normal((2, 3, int(size), int(size))))
        with torch.inference_mode():
            logits = model(images)
        torch.testing.assert_close(logits, torch.tensor(golden, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ONLY_32X32)
def test_an_unsupported_image_size_is_an_error(name: str):
    with pytest.raises(ValueError, match=f"^{name} takes 3x32x32 images, got 3x64x64$"):
        build_on_meta(name, 10)(torch.empty(2, 3, 64, 64, device="meta"))


@one_per_block_type
def test_gradients_reach_every_parameter(name: str):
    torch.manual_seed(0)
    model = build_model(name, 10).train()
    F.cross_entropy(model(small_images(name, 2)), torch.tensor([3, 7])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        # A bias before BN has no gradient but rounding, so only weights must have one.
        if parameter.ndim > 1:
            assert parameter.grad.any(), parameter_name


@one_per_block_type
def test_one_image_in_bfloat16_gives_finite_logits_close_to_float32(name: str):
    torch.manual_seed(0)
    model = build_model(name, 10).eval()
    image = small_images(name, 1)
    with torch.inference_mode():
        exact = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(image)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize("name", [name for name in ONE_PER_BLOCK_TYPE if name != "mlp"])
def test_channels_last_images_stay_channels_last_throughout(name: str):
    torch.manual_seed(0)
    model = build_model(name, 10).eval()
    images = small_images(name, 2)
    with torch.inference_mode():
        expected = model(images)

    def channel_stride_is_1(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        assert inputs[0].stride(1) == output.stride(1) == 1

    model = model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(channel_stride_is_1)
    with torch.inference_mode():
        logits = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def assert_normal(weight: Tensor, std: float) -> None:
    """Mean and standard deviation within six standard errors of N(0, std), and as many tails as a normal has."""
    z, n = weight.detach().flatten() / std, weight.numel()
    assert abs(z.mean()) < 6 / math.sqrt(n)
    assert abs(z.std() - 1) < 6 / math.sqrt(2 * n)
    within = math.erf(1 / math.sqrt(2))
    assert abs((z.abs() < 1).float().mean() - within) < 6 * math.sqrt(within * (1 - within) / n)


def assert_batch_norms_are_identity(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


@pytest.mark.parametrize("name", WIDE_RESNETS)
def test_a_wide_resnet_has_the_known_parameters_convolutions_and_batch_norms(name: str):
    parameters, convolutions, channels = WIDE_RESNETS[name]
    for num_classes, expected in parameters.items():
        assert sum(p.numel() for p in build_on_meta(name, num_classes).parameters()) == expected
    modules = list(build_on_meta(name, 10).modules())
    assert sum(isinstance(module, nn.Conv2d) for module in modules) == convolutions
    if channels:
        assert sum(module.num_features for module in modules if isinstance(module, nn.BatchNorm2d)) == channels


def test_the_logits_of_a_wide_resnet_are_the_classified_mean_of_its_activated_last_group():
    torch.manual_seed(0)
    model = WideResNet(10, 1, 10).eval()
    with torch.inference_mode(), capture_outputs(model, "group3") as captured:
        logits = model(small_images("wrn16_1", 2))
        assert torch.equal(logits, model.fc(model.bn(captured["group3"]).relu().mean((2, 3))))


def test_a_wide_block_splits_after_the_activation_where_channels_change_and_before_it_elsewhere():
    """A block equals its shortcut if its second convolution is zero."""
    torch.manual_seed(0)
    model = WideResNet(16, 1, 10).eval()
    widening, equal = model.group2
    for block in (widening, equal):
        nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(widening(x), widening.shortcut(widening.bn1(x).relu()))
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(equal(x), x)
    assert model.group1[0].shortcut is None


@pytest.mark.parametrize(("depth", "width", "words"), [(15, 1, "6n"), (4, 1, "6n"), (16, 0, "width")])
def test_a_wide_resnet_of_impossible_depth_or_width_is_an_error(depth: int, width: int, words: str):
    with pytest.raises(ValueError, match=words):
        WideResNet(depth, width, 10)


def test_a_wide_resnet_starts_with_a_zero_bias_and_a_default_classifier():
    torch.manual_seed(0)
    fc = build_model("wrn16_2", 10).fc
    assert (fc.bias == 0).all()
    assert fc.weight.abs().max() <= 1 / math.sqrt(fc.in_features)
    assert fc.weight.std().item() == pytest.approx(1 / math.sqrt(3 * fc.in_features), rel=0.1)


@pytest.mark.parametrize("name", ["preresnet20", "preresnet44", "wrn16_2"])
def test_preresnet_and_wide_resnet_start_from_normal_convolutions_over_the_fan_out(name: str):
    torch.manual_seed(0)
    model = build_model(name, 10)
    assert_batch_norms_are_identity(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert_normal(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))


def test_resnext_starts_from_normal_weights_and_zero_bias():
    torch.manual_seed(0)
    model = build_model("resnext29", 10)
    assert_batch_norms_are_identity(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert_normal(module.weight, std=math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
    assert_normal(model.classifier.weight, std=math.sqrt(2 / model.classifier.in_features))
    assert (model.classifier.bias == 0).all()


@pytest.mark.parametrize("name", WITH_DEFAULT_INIT)
def test_other_families_keep_the_uniform_default_initialization(name: str):
    torch.manual_seed(0)
    model = build_model(name, 10)
    assert_batch_norms_are_identity(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            bound = 1 / math.sqrt(weight[0].numel())
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=6 / math.sqrt(weight.numel()))


def test_num_channels_scales_every_layer_of_net():
    state_dict = build_on_meta("net", 10, num_channels=8).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    assert shapes["conv1.weight"] == (8, 3, 3, 3)
    assert shapes["conv2.weight"] == (16, 8, 3, 3)
    assert shapes["conv3.weight"] == (32, 16, 3, 3)
    assert shapes["fc1.weight"] == (32, 32 * 16)
    assert shapes["fc2.weight"] == (10, 32)


def test_dropout_of_net_acts_in_train_mode_only():
    images = small_images("net", 4)
    model = build_model("net", 10, dropout_rate=0.5)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_net_has_no_dropout_by_default():
    images = small_images("net", 4)
    model = build_model("net", 10).train()
    assert torch.equal(model(images), model(images))


def test_an_unknown_name_is_an_error_with_the_nearest_name_and_the_choices():
    with pytest.raises(ValueError, match=r"unknown model 'ResNet81'.*did you mean 'resnet18'") as error:
        build_model("ResNet81", 10)
    assert all(name in str(error.value) for name in MODEL_NAMES)


def test_a_name_unlike_any_other_is_an_error_without_a_suggestion():
    with pytest.raises(ValueError, match=r"^unknown model 'qqq'; choose from net, mlp, "):
        build_model("qqq", 10)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="two models are registered as 'net'"):
        register("net")(nn.Identity)


def test_the_recipe_of_a_network_is_adam_for_net_and_mlp_and_sgd_for_all_others():
    published = (*GOLDEN, *WIDE_RESNETS)
    with torch.device("meta"):
        assert {name for name in published if build_model(name, 2).default_optimizer == "adam"} == {"net", "mlp"}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(name, source)` writes a module in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        sys.modules.pop(name, None)

    return write


MINE = """
from torch import nn

class Wide(nn.Sequential):
    def __init__(self, num_classes, *, width=1):
        super().__init__(nn.Flatten(), nn.Linear(192, width), nn.Linear(width, num_classes))

def no_network(num_classes):
    return {"classes": num_classes}

def ten_classes():
    return Wide(10)

def broken(num_classes):
    raise KeyError("no such\\nwidth")

constant = 1
"""


def test_a_callable_of_the_current_directory_gets_the_number_of_classes_and_its_options(module):
    module("my_networks", MINE)
    network = build_model("my_networks:Wide", 7, options={"width": 5})
    assert network[2].weight.shape == (7, 5)
    assert imported_code("my_networks:Wide") == f"my_networks ({Path('my_networks.py').absolute()})"


def test_only_callables_import_code():
    assert imported_code("net") is imported_code("timm:resnet18") is imported_code("torchvision:resnet18") is None


@pytest.mark.parametrize("name, words", [
    ("no_such_module:build", "module 'no_such_module' is neither installed nor in "),
    ("os.no_such_module:build", "module 'os.no_such_module' is neither installed nor in "),
    ("my_networks:Wade", "module my_networks has no 'Wade' (did you mean 'Wide'?)"),
    ("my_networks:constant", "my_networks:constant cannot be called: it is of type int"),
    ("my_networks:ten_classes", "my_networks:ten_classes takes no keyword argument 'num_classes'"),
    ("my_networks:Wide", "my_networks:Wide takes no keyword argument 'depth'"),
    ("my_networks:no_network", "my_networks:no_network returns an object of type dict, not a torch.nn.Module"),
    ("my_networks:broken", "my_networks:broken cannot be built: KeyError: 'no such\\nwidth'"),
    ("needs_another:build", "module needs_another cannot be imported: ModuleNotFoundError: No module named 'another'"),
    ("has_a_typo:build", "module has_a_typo cannot be imported: SyntaxError"),
    ("ends:build", "module ends cannot be imported: SystemExit: 3"),
    (":build", "cannot be imported"), ("torchvision:resnet19", "torchvision has no classifier 'resnet19' (did you"),
    ("torchvision:fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
    ("torchvision:alexnet", "unexpected keyword argument 'depth'")])
def test_a_network_that_cannot_be_built_is_one_line(module, name, words):
    for file, source in (("my_networks", MINE), ("needs_another", "import another"), ("has_a_typo", "def build(:"),
                         ("ends", "raise SystemExit(3)")):
        module(file, source)
    with torch.device("meta"), pytest.raises(ValueError) as error:
        build_model(name, 7, options={"depth": 3} if name in ("my_networks:Wide", "torchvision:alexnet") else None)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_networks_of_the_zoo_have_no_options():
    with pytest.raises(ValueError, match=r"^net: 'num_channels' is no option: networks of the zoo have none$"):
        build_on_meta("net", 7, options={"num_channels": 3})
    with pytest.raises(ValueError, match=r"^resnet18 takes no keyword argument 'width'$"):
        build_on_meta("resnet18", 7, options={"width": 2})


@pytest.mark.parametrize("name, option", [("torchvision:resnet18", "weights"), ("torchvision:resnet18", "num_classes"),
                                          ("torchvision:googlenet", "aux_logits")])
def test_arguments_of_a_network_are_not_options(name, option):
    with pytest.raises(ValueError, match=f"^{name}: '{option}' is no option"):
        build_model(name, 7, options={option: None})


def test_a_torchvision_network_is_built_by_name_with_its_options():
    from torchvision.models import mobilenet_v3_small
    built = build_on_meta("torchvision:mobilenet_v3_small", 7, options={"dropout": 0.5})
    with torch.device("meta"):
        expected = mobilenet_v3_small(num_classes=7)
    assert listing(built.state_dict()) == listing(expected.state_dict())
    assert built.classifier[2].p == 0.5


def test_a_torchvision_network_with_auxiliary_heads_is_built_without_them():
    network = build_on_meta("torchvision:googlenet", 7)
    assert network.train()(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 7)


def test_a_timm_network_is_built_by_name_with_its_options():
    timm = pytest.importorskip("timm")
    built = build_on_meta("timm:resnet10t", 7, options={"drop_rate": 0.5})
    with torch.device("meta"):
        expected = timm.create_model("resnet10t", num_classes=7)
    assert listing(built.state_dict()) == listing(expected.state_dict())
    assert built.drop_rate == 0.5
    with pytest.raises(ValueError, match=r"^timm has no model 'resnet10q' \(did you mean .*'resnet10t'"):
        build_model("timm:resnet10q", 7)
    for option in ("pretrained", "checkpoint_path"):  # weights would be downloaded, or unpickled
        with pytest.raises(ValueError, match=f"'{option}' is no option"):
            build_model("timm:resnet10t", 7, options={option: "x"})


def test_networks_of_a_missing_timm_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"^timm:resnet18 needs timm: pip install timm$"):
        build_model("timm:resnet18", 7)


def test_the_zoo_is_imported_without_torchvision():
    code = "import model, sys; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


class Auxiliary(nn.Module):
    """Network with an auxiliary head in training, dropout and batch norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.fc = nn.BatchNorm2d(3), nn.Dropout(), nn.LazyLinear(4)

    def forward(self, images):
        logits = self.fc(self.dropout(self.norm(images)).flatten(1))
        return (logits, logits) if self.training else logits


@pytest.mark.parametrize("network, words", [
    (Auxiliary(), "gives tuple for an image in training mode, not 4 logits"),
    (nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), r"gives Tensor of shape \(5,\) for an image in eval mode"),
    (nn.Conv2d(3, 4, 3), r"gives Tensor of shape \(4, 6, 6\)"), (nn.Linear(7, 4), "images of 8x8 pixels: RuntimeErr")])
def test_a_network_whose_output_is_not_logits_is_one_line(network, words):
    if not isinstance(network, nn.Linear):
        network(torch.zeros(2, 3, 8, 8))  # lazy layers
    before, state = {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(ValueError, match=words) as error:
        check_logits(network, 4, 8)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@one_per_block_type
def test_networks_of_the_zoo_give_logits(name: str):
    check_logits(build_on_meta(name, 4), 4, 32)


@pytest.mark.parametrize("num_classes", [0, -1])
def test_a_model_has_at_least_one_class(num_classes: int):
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        build_model("net", num_classes)
