#!/bin/sh
# The tests and the benchmark on one GPU, in two calls. Output goes to $OUT (default: runs/gpu), and the results of
# the benchmark also as JSON, which is written again with every result.
#
#     sh experiments/on_gpu.sh tests    compare the GPU's results with the CPU's (faster with -n 8 and pytest-xdist)
#     sh experiments/on_gpu.sh bench    time and memory of the papers' pairs in seven minutes; what remains is skipped
#
# Further arguments are options of pytest or of experiments.bench.
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
