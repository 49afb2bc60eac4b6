#!/bin/sh
# The tests and the benchmark on one GPU, in two calls. What they print is left in $OUT (default: runs/gpu), and the
# results of the benchmark as JSON, written anew with every result.
#
#     sh experiments/on_gpu.sh tests    what the GPU computes is what the CPU computes (-n 8, with pytest-xdist, is faster)
#     sh experiments/on_gpu.sh bench    time and memory of the papers' pairs: eight minutes, and what is left is left out
#
# Further words are options of pytest or of experiments.bench.
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-runs/gpu}
what=$1
mkdir -p "$OUT"
nvidia-smi >"$OUT/gpu.txt" 2>&1
case $what in
tests) shift && python -m pytest -m cuda tests/cuda --durations=15 "$@" >"$OUT/tests.txt" 2>&1 ;;
bench) shift && python -m experiments.bench --quick --json "$OUT/bench.json" "$@" >"$OUT/bench.txt" 2>"$OUT/progress.txt" ;;
*) echo "usage: sh experiments/on_gpu.sh tests|bench [options]" >&2 && exit 2 ;;
esac
status=$?
tail -n 60 "$OUT/$what.txt"
exit $status
