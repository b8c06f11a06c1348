# To be sourced: what the demos share.

# start_counting TOTAL, then `run SCRIPT ...` says which of the runs it is.
start_counting() {
    number=0 total=$1
}

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
