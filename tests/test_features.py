"""Captured activations, removal of hooks, and detection of the stages of a network."""
from itertools import pairwise

import pytest
import torch
from torch import nn

from datafree.losses import attention_loss, attention_map
from model import MODEL_NAMES, build_model
from model.features import batch_norms, capture_inputs, capture_outputs, classifier, paired_stages, pooled, stages
from model.registry import REGISTRY

GROUPS = ("group1", "group2", "group3")
# The first network of each family in the registry.
FAMILIES = list({getattr(REGISTRY[name].build, "func", name): name for name in reversed(MODEL_NAMES)}.values())
WITH_CLASSIFIERS = ("net", "mlp", "resnet18", "preresnet20", "mobilenetv2", "shufflenetv2", "wrn16_1")


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, 7)


def test_outputs_and_inputs_are_those_of_the_modules_and_keep_their_graph():
    torch.manual_seed(0)
    network, images = build_model("wrn16_1", 4).eval(), torch.randn(2, 3, 16, 16)
    with capture_outputs(network, "group1", "bn") as outputs, capture_inputs(network, "group2", "fc") as inputs:
        logits = network(images)
    assert outputs["group1"] is inputs["group2"]
    assert torch.equal(network.fc(inputs["fc"]), logits)
    gradient, = torch.autograd.grad(outputs["group1"].sum(), network.conv1.weight)
    assert gradient.any()
    assert [call.name for call in outputs.calls] == ["group1", "bn"]


def test_captured_outputs_are_those_of_torchvisions_feature_extractor():
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor
    torch.manual_seed(0)
    network, images = resnet18(num_classes=4).eval(), torch.randn(2, 3, 64, 64)
    names = tuple(stages(network, 64))
    assert names == ("relu", "layer1", "layer2", "layer3", "layer4")
    with torch.inference_mode(), capture_outputs(network, *names) as captured:
        network(images)
        expected = create_feature_extractor(network, list(names))(images)
    assert all(torch.equal(captured[name], expected[name]) for name in names)


def test_no_hook_stays_on_a_network_not_even_after_an_error():
    network = build_model("net", 4, num_channels=4)
    for capture in (capture_inputs, capture_outputs):
        with pytest.raises(ValueError, match="32x32"), capture(network, "conv1", "fc2"):
            assert hooks(network) == 2
            network(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError), capture(network, "conv1", "conv99"):
            pass
        assert hooks(network) == 0


def test_all_calls_of_a_shared_module_are_captured():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = self.alias = nn.Linear(2, 2)

        def forward(self, x):
            return self.alias(self.layer(x))

    network, x = Twice(), torch.randn(1, 2)
    with capture_outputs(network, "layer", "alias") as captured:
        result = network(x)
    assert [call.name for call in captured.calls] == ["layer", "alias"] * 2
    assert captured["layer"] is captured["alias"] is result
    assert torch.equal(captured.calls[0].value, network.layer(x))


def test_tensors_in_tuples_and_keywords_are_captured():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.name = Pair(), Name()

        def forward(self, x):
            self.name()
            return self.pair(scale=2, images=x)[0]

    class Pair(nn.Module):
        def forward(self, scale, images):
            return scale * images, None

    class Name(nn.Module):
        def forward(self):
            return "name"

    network, x = Odd(), torch.ones(1)
    with capture_inputs(network, "pair", "name") as inputs, capture_outputs(network, "pair", "name") as outputs:
        result = network(x)
    assert inputs["pair"] is x and outputs["pair"] is result
    with pytest.raises(KeyError, match="'name' has not been called"):
        outputs["name"]


def test_an_unknown_module_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no module 'grup1' \(did you mean 'group1'\?\)"), capture_outputs(
            on_meta("wrn16_1"), "grup1"):
        pass


def test_activations_in_autocast_are_bfloat16():
    network = build_model("wrn16_1", 4).eval()
    with torch.autocast("cpu", torch.bfloat16), capture_outputs(network, "group2.1.conv2") as captured:
        network(torch.zeros(1, 3, 16, 16))
    assert captured["group2.1.conv2"].dtype == torch.bfloat16


def test_a_compiled_function_captures_the_same_tensors():
    network, images = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)

    def loss(images):
        with capture_outputs(network, "0") as outputs, capture_inputs(network, "2") as inputs:
            logits = network(images)
        return logits.square().sum() + outputs["0"].abs().sum() + inputs["2"].sum()

    compiled = torch.compile(loss, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(images), loss(images))
    assert hooks(network) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_the_zoo_has_stages_that_halve_except_for_the_perceptron(name):
    found = stages(on_meta(name))
    if name == "mlp":
        assert found == {}
        return
    heights = [height for height, _ in found.values()]
    assert len(heights) >= 3
    assert all(small == (large + 1) // 2 for large, small in pairwise(heights))


@pytest.mark.parametrize("name, names", [
    ("wrn16_1", GROUPS), ("preresnet20", ("layer1", "layer2", "layer3")), ("net", ("bn1", "bn2", "bn3")),
    ("resnet18", ("layer1", "layer2", "layer3", "layer4")), ("resnext29", ("stage_1", "stage_2", "stage_3")),
    ("densenet121", ("features.dense_block_layer_0", "features.dense_block_layer_1", "features.dense_block_layer_2",
                     "features.dense_block3")),
    ("mobilenetv2", ("stage1", "stage2", "stage3", "conv1")), ("shufflenetv2", ("pre", "stage2", "stage3", "conv5"))])
def test_stages_of_each_family_end_with_their_last_block(name, names):
    assert tuple(stages(on_meta(name))) == names


@pytest.mark.parametrize("name, count, size", [
    ("mobilenet_v3_small", 5, 64), ("vgg11_bn", 5, 32), ("convnext_tiny", 4, 64), ("swin_t", 0, 64)])
def test_torchvision_networks_have_stages_unless_they_are_transformers(name, count, size):
    from torchvision.models import get_model
    with torch.device("meta"):
        network = get_model(name, weights=None, num_classes=7)
    assert len(stages(network, size)) == count
    assert classifier(network, size) is not None


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "convnext_atto", "repvgg_a0"])
def test_timm_networks_have_the_stages_that_timm_names(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=7)
        expected = timm.create_model(name, features_only=True).feature_info
    found = stages(network, 128)
    by_size = {128 // info["reduction"]: info["module"] for info in expected}
    assert {height for height, _ in found.values()} >= by_size.keys() - {4}
    assert sum(name == by_size.get(height) for name, (height, _) in found.items()) >= len(by_size) - 2


@pytest.mark.parametrize("name", WITH_CLASSIFIERS)
def test_the_classifier_is_the_layer_whose_input_makes_the_logits(name):
    torch.manual_seed(0)
    network = build_model(name, 7).eval()
    layer = classifier(network)
    with torch.inference_mode(), capture_inputs(network, layer) as inputs:
        logits = network(torch.randn(2, 3, 32, 32))
        expected = network.get_submodule(layer)(inputs[layer]).flatten(1)
    assert torch.equal(logits, expected.relu() if name == "mlp" else expected)
    assert pooled(inputs[layer]).shape == inputs[layer].shape[:2]


def test_a_network_without_a_layer_of_class_count_outputs_has_no_classifier():
    assert classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())) == "0"
    assert classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(10), nn.Flatten())) is None
    assert classifier(nn.Flatten()) is None


def test_features_are_pooled_over_positions():
    assert pooled(torch.arange(8.0).view(1, 2, 2, 2)).tolist() == [[1.5, 5.5]]
    vectors = torch.randn(2, 3)
    assert pooled(vectors) is vectors


def test_batch_norms_are_named_in_the_order_of_the_network():
    assert batch_norms(on_meta("wrn16_1"))[:2] == ["group1.0.bn1", "group1.0.bn2"]
    assert batch_norms(on_meta("net")) == ["bn1", "bn2", "bn3"]
    assert batch_norms(on_meta("mlp")) == []


def test_finding_stages_changes_no_modes_buffers_hooks_or_random_state():
    class Restless(nn.Module):
        """Counts its calls and draws random numbers, also in eval mode."""

        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.norm, self.convolution = nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, x):
            self.calls += 1
            return self.convolution(self.norm(x)) + torch.rand(1)

    network = nn.Sequential(nn.Conv2d(3, 3, 1), Restless(), nn.Flatten())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    assert stages(network) == {"0": (32, 32), "1": (15, 15)}
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training and network[1].training and not network[1].norm.training
    assert hooks(network) == 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_error_of_the_network_is_raised_while_finding_stages():
    network = build_model("preresnet20", 4)
    with pytest.raises(ValueError, match="takes 3x32x32 images"):
        stages(network, 64)
    assert network.training and hooks(network) == 0


def test_stages_of_two_networks_are_paired_by_size():
    wide = on_meta("wrn16_1")
    assert paired_stages(wide, on_meta("wrn16_2")) == [(group, group) for group in GROUPS]
    assert paired_stages(on_meta("net"), wide) == [("bn1", "group1"), ("bn2", "group2"), ("bn3", "group3")]
    assert paired_stages(wide, on_meta("mobilenetv2")) == [("group1", "stage1"), ("group2", "stage2"),
                                                           ("group3", "stage3")]
    assert paired_stages(wide, on_meta("mlp")) == paired_stages(on_meta("mlp"), wide) == []


def test_attention_maps_of_different_sizes_are_compared_at_the_smaller_one():
    activation = torch.randn(2, 3, 8, 8)
    averaged = nn.functional.adaptive_avg_pool2d(activation.square().mean(1), 4)
    assert torch.equal(attention_map(activation, (4, 4)), nn.functional.normalize(averaged.flatten(1)))
    assert torch.equal(attention_map(activation, (8, 8)), attention_map(activation))
    small, large = torch.randn(2, 5, 4, 4), activation
    assert attention_loss([small], [large]) == attention_loss([large], [small]) > 0
