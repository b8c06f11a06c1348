# The experiments as a graph for Snakemake (pip install snakemake): on one machine, on Slurm, on Kubernetes.
#
#     snakemake --rerun-triggers mtime --cores 1 --config experiments=experiments/demo                 # one at a time, here
#     snakemake --dry-run --rerun-triggers mtime --cores 1 --config experiments=experiments/CIFAR10
#     snakemake --rerun-triggers mtime --executor slurm --jobs 8 --config experiments=experiments/CIFAR10 data_dir=/shared/data
#
# What has its results.json is finished, whatever was changed since: no run is remade (a stage's --restart does that).
# Without `--rerun-triggers mtime` Snakemake would run again what it was once asked for in other company. It removes what a rule declares as its output when its job fails, so that is results.json, which is
# written last: the checkpoints stay, and the next call goes on after the last finished epoch.
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
    raise WorkflowError("there is no experiment")
graph = needs(found)
scripts = {run.directory: run.params.script for run in found}
# Not parameters of the rules: Snakemake would take runs with another data_dir, or in a moved clone, for others.
stages, data_dir = Path(workflow.basedir), config.get("data_dir", "data")


if unread:

    # All that can be run comes first; then this fails, and so does Snakemake.
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
