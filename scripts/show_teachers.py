"""Draw how teachers differ: their logits for the same images, and embeddings of the test images.

    python scripts/show_teachers.py experiments/demo/baseline/net16 experiments/demo/kd_nasty_net16/nasty_net16
    python scripts/show_teachers.py DIR DIR --names normal nasty --num_images 3 --out docs/images

Writes to `--out`:

- responses.png, a bar chart of the logits of each network for the first test image of each class;
- embeddings.png, t-SNE (van der Maaten & Hinton, JMLR 2008) of the classifier's input and of the logits, for 1,000 test
  images balanced over the classes, if scikit-learn is installed (`pip install scikit-learn`).

Uses the networks of the last epoch.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.features import capture_inputs, classifier, pooled
from reports.plots import drawable, legend, plt, save
from runs.trained import Source, read_source
from utils import augment
from utils.cli import main
from utils.datasets import Dataset, load_dataset
from utils.errors import UserError
from utils.image_folder import Decoding

POINTS = 1000
COLORS = ("#1f3b73", "#f4a259", "#5b8e7d", "#bc4b51")  # of different lightness, so readable in grayscale


def show_teachers() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="experiments on the same data")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), metavar="DIR",
                        help="directory of the data sets (default: data)")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR",
                        help="output directory (default: report)")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names in the legend (default: the directories)")
    parser.add_argument("--num_images", type=int, default=6, metavar="N",
                        help="number of images in responses.png (default: 6)")
    arguments = parser.parse_args()
    names = arguments.names or ["/".join(directory.parts[-2:]) for directory in arguments.directories]
    if len(names) != len(arguments.directories):
        raise UserError(f"--names: {len(names)} names for {len(arguments.directories)} directories: give one per "
                        "directory")
    if arguments.num_images < 1:
        raise UserError(f"--num_images is {arguments.num_images}: give at least 1")
    sources = [read_source(str(directory)) for directory in arguments.directories]
    first = sources[0].params
    for source in sources:
        if source.params.dataset != first.dataset:
            raise UserError(f"{source.name} has another data set than {sources[0].name}: give runs on the same data")
    dataset = load_dataset(first.dataset, arguments.data_dir, Decoding.of(first), training=False)
    networks = [source.build(dataset.num_classes, dataset.image_size) for source in sources]

    def pixels(source: Source, index: Tensor) -> Tensor:
        mean, std = source.params.mean or dataset.mean, source.params.std or dataset.std
        return augment.normalize(dataset.test_images[index], torch.tensor(mean), torch.tensor(std))

    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = torch.stack([(dataset.test_labels == label).nonzero()[0, 0]
                          for label in dataset.test_labels.unique()[:arguments.num_images]])
    with torch.inference_mode():
        answers = [network(pixels(source, chosen)) for source, network in zip(sources, networks, strict=True)]
    _draw(responses(dataset, chosen, answers, names), arguments.out / "responses.png")
    some = balanced(dataset.test_labels)
    seen = [_look(network, pixels(source, some)) for source, network in zip(sources, networks, strict=True)]
    _draw(embeddings(seen, dataset.test_labels[some], names, dataset.classes), arguments.out / "embeddings.png")


def balanced(labels: Tensor) -> Tensor:
    """Indices of up to `POINTS` images: the first ones of each class, the same number for all classes."""
    classes = labels.unique()
    return torch.cat([(labels == label).nonzero()[:max(1, POINTS // len(classes)), 0] for label in classes])


def _look(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of the classifier (N, F), and logits (N, C)."""
    features, logits = [], []
    layer = classifier(network, images.shape[-1])
    if layer is None:
        raise UserError("a network without a linear layer or convolution that computes its logits has no features")
    for batch in images.split(100):
        with torch.inference_mode(), capture_inputs(network, layer) as captured:
            logits.append(network(batch))
        features.append(pooled(captured[layer]))
    return torch.cat(features), torch.cat(logits)


def responses(dataset: Dataset, chosen: Tensor, answers: Sequence[Tensor], names: Sequence[str]) -> plt.Figure:
    """One row per image: the image, and the logits of each network, with one group of bars per class."""
    classes = [drawable(name)[:14] for name in dataset.classes]
    figure, axes = plt.subplots(len(chosen), 2, figsize=(9, 1.9 * len(chosen)), sharex="col", squeeze=False,
                                gridspec_kw={"width_ratios": [1, 6]})
    width = 0.8 / len(answers)
    for row, (picture, bars) in enumerate(axes):
        label = int(dataset.test_labels[chosen[row]])
        picture.imshow(dataset.test_images[chosen[row]].numpy())
        picture.set_title(drawable(dataset.classes[label]), fontsize=11)
        picture.axis("off")
        for number, logits in enumerate(answers):
            places = [at - 0.4 + (number + 0.5) * width for at in range(len(classes))]
            bars.bar(places, logits[row].tolist(), width, color=COLORS[number % len(COLORS)])
        bars.axhline(0, color="black", lw=0.8)
        bars.axvspan(label - 0.5, label + 0.5, color="0.9", zorder=0)
        bars.set_ylabel("logit")
    axes[-1][1].set_xticks(range(len(classes)), classes, rotation=30 if len(classes) <= 20 else 90, ha="right")
    legend(figure, axes[0][1].containers, names, loc="upper center", ncols=len(names), frameon=False,
           title="gray: the true class; the scale differs by row")
    figure.tight_layout(h_pad=1.5, rect=(0, 0, 1, 1 - 0.6 / figure.get_figheight()))
    return figure


def embeddings(seen: Sequence[tuple[Tensor, Tensor]], labels: Tensor, names: Sequence[str],
               classes: Sequence[str]) -> plt.Figure:
    """One row per network: t-SNE of features and of logits."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("embeddings.png needs scikit-learn: pip install scikit-learn; responses.png is ready") from None
    figure, axes = plt.subplots(len(seen), 2, figsize=(11, 5 * len(seen)), squeeze=False)
    for row, (values, name) in enumerate(zip(seen, names, strict=True)):
        for plot, points, what in zip(axes[row], values, ("features", "logits"), strict=True):
            perplexity = min(30, (len(points) - 1) / 3)
            places = TSNE(perplexity=perplexity, random_state=0).fit_transform(points.numpy())
            dots = plot.scatter(*places.T, c=labels, s=8, cmap="tab10" if len(classes) <= 10 else "nipy_spectral",
                                vmin=0, vmax=max(9, len(classes) - 1))
            plot.set_title(drawable(f"{name}: {what}"))
            plot.set(xticks=[], yticks=[])
    if len(classes) <= 10:
        legend(figure, dots.legend_elements()[0], [classes[label] for label in labels.unique()], loc="center left",
               bbox_to_anchor=(1, 0.5), frameon=False)
    figure.suptitle(f"t-SNE of {len(labels)} test images")
    figure.tight_layout()
    return figure


def _draw(figure: plt.Figure, file: Path) -> None:
    save(figure, file)
    print(file)


if __name__ == "__main__":
    main(show_teachers)
