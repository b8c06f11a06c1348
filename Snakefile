# Snakemake workflow of the experiments (pip install snakemake), for one machine, Slurm or Kubernetes.
#
#     snakemake --rerun-triggers mtime --cores 1 --config experiments=experiments/demo                 # one at a time
#     snakemake --dry-run --rerun-triggers mtime --cores 1 --config experiments=experiments/CIFAR10
#     snakemake --rerun-triggers mtime --executor slurm --jobs 8 --config experiments=experiments/CIFAR10 data_dir=/shared/data
#
# A run with a results.json is finished and never repeated, whatever has changed since (use a stage's --restart).
# Without `--rerun-triggers mtime`, Snakemake may repeat finished runs if other experiments are requested. When a job
# fails, Snakemake deletes the declared output of its rule. That is only results.json, which is written last: the
# checkpoints stay, and the next call continues after the last finished epoch.
import re
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from runs.directories import find, unreadable
from runs.graph import needs, without

roots = [Path(root) for root in config.get("experiments", "experiments").split(",")]
found, remarks = find(roots)
unread = unreadable(roots, found)
found, in_vain = without(found, unread)
print("".join(f"remark: {text}\n" for text in [*remarks, *in_vain]), end="", file=sys.stderr)
if not found:
    raise WorkflowError("no experiment found: set experiments to directories with a params.json")
graph = needs(found)
scripts = {run.directory: run.params.script for run in found}
# Not parameters of the rules: another data_dir or a moved clone would make Snakemake repeat all runs.
stages, data_dir = Path(workflow.basedir), config.get("data_dir", "data")


if unread:

    # Everything that can run comes first; then this rule fails, and Snakemake with it.
    rule all:
        input:
            [directory / "results.json" for directory in graph],
        localrule: True
        params:
            error="; ".join([f"cannot be read: {directory / 'params.json'}" for directory in unread] + in_vain),
        shell:
            "echo error: {params.error:q} >&2; exit 1"

else:

    rule all:
        input:
            [directory / "results.json" for directory in graph],


for number, (directory, sources) in enumerate(graph.items()):

    rule:
        name:
            f"{re.sub(r'[^A-Za-z0-9]', '_', str(directory))}__{number}"
        input:
            ancient(directory / "params.json"),
            [ancient(source / "results.json") for source in sources],
        output:
            directory / "results.json",
        resources:
            gpu=config.get("gpu", 0),
        params:
            script=scripts[directory],
            directory=str(directory),
        shell:
            "{sys.executable:q} {stages:q}/{params.script} --save_path {params.directory:q} --data_dir {data_dir:q}"
