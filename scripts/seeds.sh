# To be sourced by the demos, in the repository: makes and activates .venv, and gives them what they share.
source scripts/venv.sh requirements.txt

# begin RUNS [SEED ...]: the seeds that were asked for, or 0, each of so many runs.
begin() {
    local runs=$1
    shift
    seeds=("${@:-0}") directories=()
    number=0 total=$((runs * ${#seeds[@]}))
    SECONDS=0
}

# run SCRIPT ...: one of the runs.
run() {
    number=$((number + 1))
    printf '\n[%d of %d] python %s\n' "$number" "$total" "$*"
    python "$@"
}

# seeded ROOT SEED prints ROOT for seed 0, else ROOT-seedN, to which it copies the experiments of ROOT with that seed.
seeded() {
    local root=$1 seed=$2 directory=$1 file
    if [ "$seed" != 0 ]; then
        directory="$root-seed$seed"
        (cd "$root" && find . -path "./abd*" -prune -o -name params.json -print) | while read -r file; do
            mkdir -p "$(dirname "$directory/$file")"
            sed "s#$root/#$directory/#; s#^{#{\"seed\": $seed,#" "$root/$file" > "$directory/$file"
        done
    fi
    echo "$directory"
}
